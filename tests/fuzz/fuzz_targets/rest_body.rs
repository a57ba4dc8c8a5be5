//! A REST request that is all JSON.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate::api::codec::decode_json;
use tidegate_fuzz::{allowance, check, within};

fuzz_target!(|body: &[u8]| {
    let body = Bytes::copy_from_slice(body);
    let call = within(allowance(body.len()), || decode_json(&body, None));
    check(&call);
    // Read with an unknown member in front, it is not a usual request, and says the same.
    if let (Ok(call), Some(start)) = (&call, body.iter().position(|&byte| byte == b'{')) {
        let unusual = [&body[..=start], br#""":0,"#, &body[start + 1..]].concat();
        assert_eq!(decode_json(&unusual.into(), None).as_ref(), Ok(call));
    }
    // To say that the JSON ends with the body says nothing new.
    let announced = decode_json(&body, Some(body.len()));
    assert_eq!(announced.map_err(|error| error.code), call.map_err(|error| error.code));
});
