//! The messages and services of `proto/`, as the compiler generates them.
#![allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs, reason = "generated code")]

tonic::include_proto!("inference");
