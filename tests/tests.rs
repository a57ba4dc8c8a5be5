//! Scenarios against a whole server, one module per topic.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that fails shall say where")]

mod admin;
mod aliases;
mod architecture;
mod codes;
mod commands;
mod documentation;
mod fairness;
mod golden;
mod lifecycle;
mod monitoring;
mod overload;
mod pointers;
mod rollout;
mod rollout_api;
mod rollout_cli;
mod routes;
mod schedule;
mod shadow;
mod shutdown;
mod streams;
mod support;
mod swap;
mod uploads;
