//! Compiles the protocol with a pure-Rust compiler, so building needs no protoc.

use std::{env, error::Error, fs, path::Path};

use protox::prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["inference.proto"], ["proto"])?;
    // For server reflection, and for reading config.pbtxt.
    fs::write(Path::new(&env::var("OUT_DIR")?).join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Tensor contents stay slices of the received message instead of copies.
        .bytes(".inference")
        .codec_path("crate::api::message::MessageCodec")
        .compile_fds(descriptors)?;
    Ok(())
}
