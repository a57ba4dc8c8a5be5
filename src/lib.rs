pub mod api;
pub mod backend;
pub mod error;
pub mod id;
pub mod tensor;
