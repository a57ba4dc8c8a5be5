//! Who a request comes from, for queues that clients share fairly: its connection, or what a header says.

use std::hash::{BuildHasher, RandomState};

use http::{HeaderMap, HeaderName};

use super::auth::Peer;
use crate::{
    error::{Error, shorten},
    model::batcher::Client,
};

/// Tells clients apart.
pub struct Clients {
    header: Option<HeaderName>,
    /// Known to nobody, so nobody can choose a value that passes for another's.
    secret: RandomState,
}

impl Clients {
    /// `header`, the setting `queue.client_header`, names clients; without it, connections do.
    ///
    /// # Errors
    /// `InvalidArgument` when there can be no such header.
    pub fn new(header: Option<&str>) -> Result<Self, Error> {
        let parse = |name: &str| {
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| {
                Error::invalid(format!("queue.client_header must be the name of a header, got '{}'", shorten(name)))
            })
        };
        Ok(Self { header: header.map(parse).transpose()?, secret: RandomState::new() })
    }

    /// The client of a request: whoever the header names, else its connection.
    pub fn of(&self, headers: &HeaderMap, peer: Option<&Peer>) -> Client {
        let named = self.header.as_ref().and_then(|name| headers.get(name));
        let number = match named {
            Some(value) => self.secret.hash_one(value.as_bytes()),
            None => peer.map_or(0, |peer| peer.connection),
        };
        Client(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(clients: &Clients, name: Option<&str>, connection: u64) -> Client {
        let mut headers = HeaderMap::new();
        if let Some(name) = name {
            headers.insert("x-tenant", name.parse().unwrap());
        }
        clients.of(&headers, Some(&Peer { address: [127, 0, 0, 1].into(), connection }))
    }

    #[test]
    fn connections_are_clients_unless_a_header_names_them() {
        let by_connection = Clients::new(None).unwrap();
        assert_eq!(client(&by_connection, Some("a"), 7), Client(7));
        let by_header = Clients::new(Some("X-Tenant")).unwrap();
        assert_eq!(client(&by_header, Some("a"), 7), client(&by_header, Some("a"), 8));
        assert_ne!(client(&by_header, Some("a"), 7), client(&by_header, Some("b"), 7));
        assert_eq!(client(&by_header, None, 7), Client(7), "who is not named counts by connection");
        let others = Clients::new(Some("X-Tenant")).unwrap();
        assert_ne!(client(&by_header, Some("a"), 7), client(&others, Some("a"), 7), "nobody can foretell the number");
    }

    #[test]
    fn a_header_has_a_name() {
        for wrong in ["", "two words", "x:y"] {
            let error = Clients::new(Some(wrong)).err().unwrap();
            assert!(error.message.contains("queue.client_header"), "{error}");
        }
    }
}
