//! Compiles the protocol with a pure-Rust compiler, so building needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["inference.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // Tensor contents stay slices of the received message instead of copies.
        .bytes(".inference")
        .codec_path("crate::api::message::MessageCodec")
        .compile_fds(descriptors)?;
    Ok(())
}
