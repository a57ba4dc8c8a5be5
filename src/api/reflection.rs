//! `grpc.reflection.v1` and `v1alpha`: what the services look like, for clients without our .proto files.

use tonic::service::Routes;
use tonic_reflection::{pb, server::Builder};

use super::health;
use crate::error::Error;

/// The only method of each service.
pub const V1: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
pub const V1ALPHA: &str = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

/// Everything that is served, each file after those it needs. Both versions of the service list the same.
const DESCRIPTORS: [&[u8]; 4] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin")),
    health::DESCRIPTORS,
    pb::v1::FILE_DESCRIPTOR_SET,
    pb::v1alpha::FILE_DESCRIPTOR_SET,
];

/// Adds both services.
///
/// # Errors
/// `Internal` when a descriptor is broken.
pub fn add(routes: Routes) -> Result<Routes, Error> {
    let builder = || DESCRIPTORS.into_iter().fold(Builder::configure(), Builder::register_encoded_file_descriptor_set);
    let broken = |error| Error::internal(format!("the descriptors of our services cannot be read: {error}"));
    let v1 = builder().build_v1().map_err(broken)?;
    let v1alpha = builder().build_v1alpha().map_err(broken)?;
    Ok(routes.add_service(v1).add_service(v1alpha))
}
