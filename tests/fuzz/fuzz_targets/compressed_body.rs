//! A compressed REST body: the first byte picks the encoding, the next two the limit, the rest is the body.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate::{
    api::compression::{Encoding, accepted, decode_body, encode_body},
    error::Code,
};
use tidegate_fuzz::within;

/// What unpacking holds beside the result: the window of the format, and the chunk that is being read.
const WORKSPACE: usize = 256 << 10;

fuzz_target!(|data: &[u8]| {
    let [encoding, low, high, body @ ..] = data else { return };
    let encoding = [Encoding::Gzip, Encoding::Deflate, Encoding::Identity][usize::from(*encoding) % 3];
    let limit = usize::from(u16::from_le_bytes([*low, *high]));
    let body = Bytes::copy_from_slice(body);
    // A gzip file may have a name, which is read on the way.
    let unpacked = within(2 * limit + 2 * body.len() + WORKSPACE, || decode_body(encoding, body.clone(), limit));
    match unpacked {
        Ok(unpacked) => {
            assert!(unpacked.len() <= limit);
            if !unpacked.is_empty() {
                let tight = decode_body(encoding, body.clone(), unpacked.len() - 1).unwrap_err();
                assert_eq!(tight.code, Code::TooLarge);
            }
            assert_eq!(decode_body(encoding, body.clone(), unpacked.len()).as_ref(), Ok(&unpacked));
        }
        Err(error) => assert!(matches!(error.code, Code::TooLarge | Code::InvalidArgument), "{error}"),
    }
    let packed = encode_body(encoding, &[body.slice(..body.len() / 2), body.slice(body.len() / 2..)]).unwrap();
    assert_eq!(decode_body(encoding, packed, body.len()).as_ref(), Ok(&body));
    if let Ok(header) = std::str::from_utf8(&body) {
        accepted(header);
    }
});
