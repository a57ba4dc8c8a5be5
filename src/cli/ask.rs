//! Asking a running server over its operators' port.

use std::{fmt, str::FromStr, time::Duration};

use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http::{Method, Request, StatusCode, header, uri::Authority};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde::{Serialize, de::DeserializeOwned};
use tokio::runtime::Runtime;

use super::print::seen;
use crate::api::admin::documents::Refusal;

/// The port has a thread of its own, so that reading takes no longer even when the server has much to do.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// A version's files are read at a few hundred MB/s, and the largest have tens of gigabytes.
const READING_TIMEOUT: Duration = Duration::from_secs(300);
/// A change is written to the disk before it is answered.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct OpsArgs {
    /// Operators' address of the server
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8002", env = "TIDEGATE_OPS", global = true)]
    ops: Address,
}

#[derive(Args)]
pub struct AskArgs {
    #[command(flatten)]
    server: OpsArgs,
    /// The server's token, which changes need when it has one; better as TIDEGATE_TOKEN
    #[arg(long, value_name = "TOKEN", env = "TIDEGATE_TOKEN", hide_env_values = true, global = true)]
    token: Option<String>,
    /// Print the server's answer as JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// A host and a port.
#[derive(Clone)]
struct Address(Authority);

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let authority: Authority = text.parse().context("it must be HOST:PORT")?;
        anyhow::ensure!(authority.port_u16().is_some() && !text.contains('@'), "it must be HOST:PORT");
        Ok(Self(authority))
    }
}

/// A server to ask.
pub struct Ops {
    address: Authority,
    token: Option<String>,
    runtime: Runtime,
}

/// What a server answers when all is well.
pub struct Answer(Bytes);

/// What a server says when it does not do what it was asked for.
#[derive(Debug)]
pub struct Refused {
    pub status: StatusCode,
    pub refusal: Refusal,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It is one line, whatever it says.
        f.write_str(&seen(&self.refusal.error))
    }
}

impl std::error::Error for Refused {}

impl Ops {
    /// # Errors
    /// When the system has no means for a runtime.
    pub fn new(args: &OpsArgs) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { address: args.ops.0.clone(), token: None, runtime })
    }

    /// # Errors
    /// When the system has no means for a runtime.
    pub fn with_token(args: &AskArgs) -> anyhow::Result<Self> {
        Ok(Self { token: args.token.clone(), ..Self::new(&args.server)? })
    }

    /// # Errors
    /// `Refused` by the server, or why it cannot be asked.
    pub fn get(&self, path: &str) -> anyhow::Result<Answer> {
        let (status, body) = self.fetch(path)?;
        Answer::of(status, body)
    }

    /// What the server has to read files for.
    ///
    /// # Errors
    /// As for [`Ops::get`].
    pub fn get_slowly(&self, path: &str) -> anyhow::Result<Answer> {
        let (status, body) = self.send(Method::GET, path, None, Bytes::new(), READING_TIMEOUT)?;
        Answer::of(status, body)
    }

    /// The answer, whatever it is.
    ///
    /// # Errors
    /// Why the server cannot be asked.
    pub fn fetch(&self, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        self.send(Method::GET, path, None, Bytes::new(), READ_TIMEOUT)
    }

    /// Asks for a change; with an `epoch`, for the state that was seen then.
    ///
    /// # Errors
    /// `Refused` by the server, or why it cannot be asked.
    pub fn change(
        &self,
        method: Method,
        path: &str,
        epoch: Option<u64>,
        body: &impl Serialize,
    ) -> anyhow::Result<Answer> {
        let body = serde_json::to_vec(body)?.into();
        let (status, body) = self.send(method, path, epoch, body, CHANGE_TIMEOUT)?;
        Answer::of(status, body)
    }

    fn send(
        &self,
        method: Method,
        path: &str,
        epoch: Option<u64>,
        body: Bytes,
        timeout: Duration,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let address = &self.address;
        let mut request = Request::builder().method(method).uri(format!("http://{address}{path}"));
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(epoch) = epoch {
            request = request.header(header::IF_MATCH, format!("\"{epoch}\""));
        }
        let request = request.body(Full::new(body)).context("the address, the token or a name cannot be sent")?;
        self.runtime.block_on(async {
            let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
            let asking = async {
                let response = client.request(request).await?;
                let status = response.status();
                anyhow::Ok((status, response.into_body().collect().await?.to_bytes()))
            };
            tokio::time::timeout(timeout, asking)
                .await
                .with_context(|| format!("no answer from {address} within {timeout:?}"))?
                .with_context(|| format!("no server answers at {address}; name another with --ops or TIDEGATE_OPS"))
        })
    }
}

impl Answer {
    fn of(status: StatusCode, body: Bytes) -> anyhow::Result<Self> {
        if status.is_success() {
            return Ok(Self(body));
        }
        let unknown = |_| Refusal { error: format!("the server answered {status}"), state: None };
        let refusal = serde_json::from_slice(&body).unwrap_or_else(unknown);
        Err(Refused { status, refusal }.into())
    }

    /// # Errors
    /// When the answer is something else.
    pub fn read<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        serde_json::from_slice(&self.0)
            .context("the server's answer is not what was asked for; are its versions alike?")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_port() {
        for good in ["127.0.0.1:8002", "localhost:80", "[::1]:8002", "tidegate.example:1"] {
            assert!(good.parse::<Address>().is_ok(), "{good}");
        }
        for bad in ["", "localhost", "http://localhost:80", "me@localhost:80", "localhost:x", "a b:1"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn refusals_are_the_servers_own_words() {
        let refused = |status, body: &'static str| {
            let error = Answer::of(StatusCode::from_u16(status).unwrap(), Bytes::from(body)).map(drop).unwrap_err();
            (error.downcast_ref::<Refused>().unwrap().status.as_u16(), error.to_string())
        };
        assert_eq!(refused(404, r#"{"error":"unknown model 'm'"}"#), (404, "unknown model 'm'".to_owned()));
        assert_eq!(refused(502, "<html>"), (502, "the server answered 502 Bad Gateway".to_owned()));
    }
}
