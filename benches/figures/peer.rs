//! The same load against any other server that speaks the Open Inference Protocol.
//!
//! It is somebody else's process, so nothing is said of its CPU, and whoever compares starts it on one core.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tidegate::tensor::{DType, Data, Tensor};

use super::{OPEN_STREAMS, Pace, held_up, limited};
use crate::{
    load::{self, Target, between},
    pairs::{Value, stolen},
    report::{
        Better::{Higher, Lower},
        Report, say,
    },
    requests::Protocol,
    statistics::median,
    wire::Request,
};

/// For metadata.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Over HTTP/1.1 a request of an open loop waits for a connection of its own.
const OPEN_CONNECTIONS: usize = 64;

/// Where the server listens, and what is asked of it.
pub struct Peer {
    /// `host:port`, with or without `http://` before it.
    pub rest: String,
    /// `host:port`; without it, gRPC is left out.
    pub grpc: Option<String>,
    pub model: String,
}

#[derive(Deserialize)]
struct Metadata {
    inputs: Vec<Input>,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    datatype: String,
    shape: Vec<i64>,
}

impl Peer {
    /// Saturates the server in each protocol, and finds the latency at a tenth of that.
    ///
    /// # Errors
    /// When the server cannot be reached, or has no such model; a protocol that it does not speak is void.
    pub fn measure(&self, pace: &Pace, report: &mut Report) -> Result<()> {
        let rest = resolve(&self.rest)?;
        let grpc = self.grpc.as_deref().map(resolve).transpose()?;
        let metadata: Metadata = serde_json::from_str(&get(rest, &format!("/v2/models/{}", self.model))?)
            .with_context(|| format!("the metadata of '{}'", self.model))?;
        let row = metadata.inputs.iter().map(Input::row).collect::<Result<Vec<_>>>()?;
        for protocol in Protocol::ALL {
            let address = if protocol == Protocol::Grpc { grpc } else { Some(rest) };
            let Some(address) = address else {
                say(format_args!("gRPC is left out: no address was given for it"));
                continue;
            };
            let request = protocol.request_of(&self.model, &row)?;
            self.ask(protocol, address, &request, pace, report)?;
        }
        Ok(())
    }

    fn ask(
        &self,
        protocol: Protocol,
        address: SocketAddr,
        request: &Request,
        pace: &Pace,
        report: &mut Report,
    ) -> Result<()> {
        // Named as in the report of our own server, so that the two compare.
        let prefix = if self.model == "iris" { "w1" } else { &self.model };
        let name = |what: &str| format!("{prefix}_{}_{what}", protocol.name());
        let title = |what: &str| format!("`{}`, {}: {what}", self.model, protocol.title());
        let (connections, streams) = protocol.concurrency();
        let full = Target { address, pid: None, request, connections, streams };
        if let Err(error) = load::ask(&full).and_then(|body| protocol.outputs(&body)) {
            let void = Some(format!("{error:#}"));
            report.single(&name("rps"), &title("served"), "req/s", Higher, f64::NAN, void);
            return Ok(());
        }
        let (mut rates, mut ceilings) = (Vec::new(), Vec::new());
        for round in 1..=pace.pairs {
            say(format_args!("{} under full load, {}, round {round} of {}", self.model, protocol.title(), pace.pairs));
            let found = load::closed(&full, pace.warm, pace.window)?;
            let void = stolen(&found.usage).or_else(|| limited(&found.usage));
            rates.push(Value { number: found.rate, void: void.clone() });
            ceilings.push(Value { number: found.rate * found.usage.seconds / found.usage.own, void });
        }
        report.median(&name("rps"), &title("served"), "req/s", Higher, &rates);
        report.median(&name("generator_rps"), &title("the generator's own ceiling"), "req/s", Higher, &ceilings);

        let rate = median(&rates.iter().map(|rate| rate.number).collect::<Vec<_>>()) / 10.0;
        let (connections, streams) =
            if protocol == Protocol::Grpc { (connections, OPEN_STREAMS) } else { (OPEN_CONNECTIONS, 1) };
        let open = Target { connections, streams, ..full };
        let mut quantiles = [Vec::new(), Vec::new()];
        for round in 1..=pace.latency_pairs {
            say(format_args!("{} at 10 % load, {}, round {round}", self.model, protocol.title()));
            let run = load::open(&open, rate, round as u64, between(pace.warm, pace.warm + pace.latency_window))?;
            ensure!(run.failed == 0, "{} requests failed at 10 % load", run.failed);
            let void = stolen(&run.usage).or_else(|| held_up(&run));
            for (values, share) in quantiles.iter_mut().zip([0.5, 0.99]) {
                values.push(Value { number: run.latencies.quantile(share) * 1e6, void: void.clone() });
            }
        }
        for (quantile, values) in ["p50", "p99"].into_iter().zip(&quantiles) {
            let title = title(&format!("{quantile} at 10 % load"));
            report.median(&name(&format!("{quantile}_us")), &title, "µs", Lower, values);
        }
        Ok(())
    }
}

impl Input {
    /// One row, with small numbers in it.
    fn row(&self) -> Result<Tensor> {
        let dtype = DType::parse(&self.datatype)
            .with_context(|| format!("input '{}' has the unknown datatype '{}'", self.name, self.datatype))?;
        let shape: Vec<usize> = self.shape.iter().map(|&size| usize::try_from(size).unwrap_or(1)).collect();
        let element = |index: usize| -> Result<Vec<u8>> {
            let small = index % 8;
            Ok(match dtype {
                DType::Fp32 => (small as f32 / 2.0).to_le_bytes().to_vec(),
                DType::Fp64 => (small as f64 / 2.0).to_le_bytes().to_vec(),
                DType::Bytes => bail!("input '{}' takes texts, which no benchmark sends", self.name),
                // Integers have their low byte first; half floats and booleans are all zero.
                _ => {
                    let mut bytes = vec![0; dtype.size().unwrap_or(1)];
                    if !matches!(dtype, DType::Bool | DType::Fp16 | DType::Bf16) {
                        bytes[0] = small as u8;
                    }
                    bytes
                }
            })
        };
        let elements = (0..shape.iter().product()).map(element).collect::<Result<Vec<_>>>()?.concat();
        Ok(Tensor::new(self.name.as_str().into(), dtype, shape.as_slice().into(), Data::Plain(elements.into()))?)
    }
}

fn resolve(address: &str) -> Result<SocketAddr> {
    let plain = address.trim_start_matches("http://").trim_end_matches('/');
    let mut addresses = plain.to_socket_addrs().with_context(|| format!("'{address}' is no host:port"))?;
    addresses.next().with_context(|| format!("'{address}' has no address"))
}

/// The body of a successful answer.
fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&address, TIMEOUT).with_context(|| format!("cannot reach {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).with_context(|| format!("no answer to GET {path}"))?;
    let (head, body) = reply.split_once("\r\n\r\n").context("an answer without a body")?;
    ensure!(head.get(9..12) == Some("200"), "GET {path}: {head}\n{body}");
    // Of a body in chunks, what lies between the braces.
    let json = body.find('{').zip(body.rfind('}')).map(|(start, end)| &body[start..=end]);
    Ok(json.with_context(|| format!("GET {path} answers no JSON object: {body}"))?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_from_metadata() {
        let metadata = r#"{"name": "m", "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [-1, 3]}, {"name": "b", "datatype": "INT16", "shape": [2]}]}"#;
        let metadata: Metadata = serde_json::from_str(metadata).unwrap();
        let rows: Vec<Tensor> = metadata.inputs.iter().map(|input| input.row().unwrap()).collect();
        assert_eq!(&rows[0].shape[..], [1, 3]);
        assert_eq!(rows[0].data, Data::Plain([0.0_f32, 0.5, 1.0].map(f32::to_le_bytes).concat().into()));
        assert_eq!(rows[1].data, Data::Plain(vec![0, 0, 1, 0].into()));
        let input = |datatype: &str| Input { name: "c".into(), datatype: datatype.into(), shape: vec![1] };
        assert!(input("BYTES").row().is_err() && input("FP8").row().is_err() && input("BOOL").row().is_ok());
    }

    #[test]
    fn addresses_may_be_urls() {
        for address in ["127.0.0.1:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8000/"] {
            assert_eq!(resolve(address).unwrap(), SocketAddr::from(([127, 0, 0, 1], 8000)));
        }
        assert!(resolve("http://127.0.0.1").is_err());
    }
}
