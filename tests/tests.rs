//! Scenarios against a whole server, one module per topic.

mod architecture;
mod documentation;
mod lifecycle;
mod overload;
mod shutdown;
mod support;
mod swap;
