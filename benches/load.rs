//! The load generator: one thread that never sleeps longer than it has to, on a core of its own.
//!
//! Closed loop: every connection always has as many requests open as it may; this finds the most a server can do.
//! Open loop: requests come at random, as if from many strangers, and a late one does not hold up the next; latency
//! counts from the moment at which a request was meant to be sent, so a server that stalls cannot hide it.

use std::net::SocketAddr;

use crate::wire::Request;

mod closed;
mod generator;
mod open;

pub use closed::{Saturation, closed, closed_of, exactly};
pub use generator::ask;
pub use open::{Arrivals, Phase, beside, between, open, poisson};

/// Whom to ask what, and over how many connections.
#[derive(Clone)]
pub struct Target<'a> {
    pub address: SocketAddr,
    /// The process whose CPU time counts, if it is one of this machine's.
    pub pid: Option<u32>,
    pub request: &'a Request,
    pub connections: usize,
    /// Requests that may be open on each connection; over HTTP/1.1 it is always one.
    pub streams: usize,
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        time::Duration,
    };

    use bytes::Bytes;

    use super::*;
    use crate::{echo, requests::Protocol};

    /// The addresses of an echo that serves until the tests end.
    pub fn echo() -> [SocketAddr; 2] {
        let server = echo::Server::bind().unwrap();
        let addresses = server.addresses();
        std::thread::spawn(move || server.serve().unwrap());
        addresses
    }

    pub fn flower() -> tidegate::tensor::Tensor {
        use tidegate::tensor::{DType, Data, Tensor};
        let bytes: Vec<u8> = [5.7f32, 2.8, 4.1, 1.3].into_iter().flat_map(f32::to_le_bytes).collect();
        Tensor::new("X".into(), DType::Fp32, [1, 4].as_slice().into(), Data::Plain(bytes.into())).unwrap()
    }

    #[test]
    fn both_loops_drive_the_echo_over_every_protocol() {
        let [rest, grpc] = echo();
        for protocol in Protocol::ALL {
            let request = protocol.request("iris", &flower()).unwrap();
            let address = if protocol == Protocol::Grpc { grpc } else { rest };
            let target =
                Target { address, pid: Some(std::process::id()), request: &request, connections: 4, streams: 4 };
            let outputs = protocol.outputs(&ask(&target).unwrap()).unwrap();
            assert_eq!(outputs, ["label INT64 [1]", "probabilities FP32 [1, 3]"], "{protocol:?}");

            let full = closed(&target, Duration::from_millis(20), Duration::from_millis(200)).unwrap();
            assert!(full.rate > 10.0 && full.usage.seconds >= 0.2, "{protocol:?}: {full:?}");

            let (mut looks, weights) = (0, [2.0]);
            let look = || {
                looks += 1;
                Ok(())
            };
            let window = Duration::from_millis(50);
            let counted = closed_of(&target, Duration::ZERO, window, |message| weights[message], look).unwrap();
            assert!(counted.rate > 10.0 && looks == 2, "{protocol:?}: {counted:?}, looked {looks} times");

            let mut done = 0;
            exactly(&target, &[10, 0, 100], || {
                done += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(done, 3);

            let (warm, end) = (Duration::from_millis(100), Duration::from_millis(1100));
            let run = open(&target, 300.0, 7, between(warm, end)).unwrap();
            // 300 expected with a deviation of 17.
            assert!((230..370).contains(&run.all.count()), "{protocol:?}: {}", run.all.count());
            assert_eq!(run.failed, 0);
        }
    }

    #[test]
    fn large_messages_come_back_whole() {
        use tidegate::tensor::{DType, Data, Tensor};
        let [rest, grpc] = echo();
        let bytes: Vec<u8> = (0..300_000_u32).map(|index| index as u8 & 0x3f).collect();
        let image = Tensor::new("image".into(), DType::Fp32, [1, 75_000].as_slice().into(), Data::Plain(bytes.into()));
        let image = image.unwrap();
        for protocol in [Protocol::Grpc, Protocol::Binary] {
            let request = protocol.request("identity", &image).unwrap();
            let address = if protocol == Protocol::Grpc { grpc } else { rest };
            let target = Target { address, pid: None, request: &request, connections: 2, streams: 2 };
            let body = ask(&target).unwrap();
            assert_eq!(protocol.outputs(&body).unwrap(), ["same FP32 [1, 75000]"]);
            let Data::Plain(sent) = &image.data else { panic!() };
            assert!(body.ends_with(sent), "{protocol:?}: {} bytes", body.len());
            let full = closed(&target, Duration::ZERO, Duration::from_millis(100)).unwrap();
            assert!(full.rate > 10.0, "{protocol:?}: {full:?}");
        }
    }

    #[test]
    fn failures_are_noticed() {
        const SERVER_LIVE: &str = "/inference.GRPCInferenceService/ServerLive";
        let [rest, grpc] = echo();
        let broken = [
            (rest, Request::Http1("POST /nowhere HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n".into())),
            (grpc, Request::Grpc { path: SERVER_LIVE, messages: vec![Bytes::new()], deadline: None }),
        ];
        for (address, request) in &broken {
            let target =
                Target { address: *address, pid: Some(std::process::id()), request, connections: 2, streams: 2 };
            assert!(ask(&target).is_err());
            assert!(closed(&target, Duration::ZERO, Duration::from_millis(50)).is_err());
            let run = open(&target, 500.0, 7, between(Duration::ZERO, Duration::from_millis(100))).unwrap();
            assert!(run.failed > 10 && run.latencies.count() == 0, "{} of {}", run.failed, run.latencies.count());
        }
    }

    #[test]
    fn latency_counts_from_when_a_request_was_meant_to_be_sent() {
        // A server that takes its time for the first request, while one connection is all there is.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut pause = Duration::from_millis(300);
            while stream.read(&mut [0; 64]).is_ok_and(|got| got > 0) {
                std::thread::sleep(std::mem::take(&mut pause));
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            }
        });
        let request = Request::Http1("GET / HTTP/1.1\r\n\r\n".into());
        let target = Target { address, pid: Some(std::process::id()), request: &request, connections: 1, streams: 1 };
        let run = open(&target, 200.0, 7, between(Duration::ZERO, Duration::from_millis(400))).unwrap();
        // About three quarters of all requests were meant for the pause, and waited for half of it on average.
        assert!(run.all.quantile(0.5) > 0.05, "{}", run.all.quantile(0.5));
    }
}
