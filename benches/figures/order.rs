//! What a server does by order: above all load and unload models, also while it is asked.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Sender, channel},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::machine::pin;

/// How long an order may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Has the server load or unload a model, and waits until it has.
///
/// # Errors
/// When it refuses, or takes more than a minute.
pub(super) fn order(rest: SocketAddr, model: &str, what: &str) -> Result<()> {
    ask(rest, "POST", &format!("/v2/repository/models/{model}/{what}"), "")
}

/// Has the server at `address` do something, and waits until it has.
///
/// # Errors
/// When it refuses, or takes more than a minute.
pub(super) fn ask(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<()> {
    call(address, method, path, body).map(drop)
}

/// What the server at `address` shows at `path`, with its head.
///
/// # Errors
/// As `ask`.
pub(super) fn page(address: SocketAddr, path: &str) -> Result<String> {
    call(address, "GET", path, "")
}

fn call(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).with_context(|| format!("no answer to {method} {path}"))?;
    ensure!(reply.starts_with("HTTP/1.1 200"), "{method} {path} fails: {reply}");
    Ok(reply)
}

/// A load that whoever asks the server meanwhile begins in the midst of it.
pub(super) struct Load<'a> {
    start: Option<Sender<()>>,
    ended: &'a AtomicBool,
}

impl Load<'_> {
    /// Has the load begin, and does not wait; whether it had not begun before.
    ///
    /// # Errors
    /// When nobody is there to order it.
    pub(super) fn begin(&mut self) -> Result<bool> {
        let Some(start) = self.start.take() else { return Ok(false) };
        start.send(()).context("nobody loads models")?;
        Ok(true)
    }

    /// Whether the server has answered the order.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// Calls `ask`, which may have `model` loaded meanwhile, and returns when both have ended. Whoever waits for the load
/// does so on `core`, the server's: the generator must not be held up.
///
/// # Errors
/// As `order` and `ask`.
pub(super) fn beside_load<T>(
    core: usize,
    rest: SocketAddr,
    model: &str,
    ask: impl FnOnce(&mut Load<'_>) -> Result<T>,
) -> Result<T> {
    let ended = AtomicBool::new(false);
    let (start, started) = channel();
    std::thread::scope(|scope| {
        let loader = scope.spawn(|| -> Result<()> {
            pin(&[core])?;
            // Without a word `ask` has failed, and says so itself.
            let result = started.into_iter().next().map_or(Ok(()), |()| order(rest, model, "load"));
            ended.store(true, Ordering::Release);
            result
        });
        let found = {
            let mut load = Load { start: Some(start), ended: &ended };
            ask(&mut load)
        };
        match loader.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        found
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server that answers one order with `status`, and tells what it was.
    fn server(status: &'static str) -> (SocketAddr, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = [0; 1024];
            let got = stream.read(&mut bytes).unwrap();
            write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").unwrap();
            String::from_utf8_lossy(&bytes[..got]).into_owned()
        });
        (address, asked)
    }

    fn load(rest: SocketAddr) -> Result<bool> {
        beside_load(0, rest, "deep", |load| {
            assert!(!load.has_ended());
            let first = load.begin()?;
            while !load.has_ended() {
                std::thread::yield_now();
            }
            Ok(first && !load.begin()?)
        })
    }

    #[test]
    fn a_load_begins_when_it_is_told_to_and_ends_with_its_answer() {
        let (rest, asked) = server("200 OK");
        assert!(load(rest).unwrap());
        assert!(asked.join().unwrap().starts_with("POST /v2/repository/models/deep/load HTTP/1.1\r\n"));
        let (rest, _) = server("404 Not Found");
        assert!(load(rest).unwrap_err().to_string().contains("POST /v2/repository/models/deep/load fails"));
    }

    #[test]
    fn nothing_is_loaded_for_those_who_fail_before() {
        let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
        let failed: Result<()> = beside_load(0, nobody, "deep", |_| anyhow::bail!("the server is gone"));
        assert_eq!(failed.unwrap_err().to_string(), "the server is gone");
    }
}
