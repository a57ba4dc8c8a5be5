//! A model's configuration: config.pbtxt from a repository of elsewhere, or JSON, which starts with a brace, from a
//! request to load the model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::{
    control::{pbtxt, spec::ModelSpec},
    error::Code,
    id::ModelName,
};
use tidegate_fuzz::{MAX_MESSAGE, within};

/// A field of a few bytes is a message of some hundreds, which is turned into JSON on the way.
fn allowance(length: usize) -> usize {
    (4 << 20) + 4096 * length
}

fuzz_target!(|text: &str| {
    let model = ModelName::parse("m").unwrap();
    let read = || if text.starts_with('{') { pbtxt::from_json(text, &model) } else { pbtxt::from_text(text, &model) };
    let spec = match within(allowance(text.len()), read) {
        Ok(spec) => spec,
        Err(error) => {
            assert_eq!(error.code, Code::InvalidArgument, "{error}");
            assert!(error.message.len() <= MAX_MESSAGE, "a message of {} bytes", error.message.len());
            return;
        }
    };
    // Notes are about the file, not about the model.
    let spec = ModelSpec { notes: Vec::new(), ..spec };
    let toml = spec.to_toml().unwrap();
    assert_eq!(ModelSpec::from_toml(&toml).as_ref(), Ok(&spec), "{toml}");
    let (text, left_out) = pbtxt::to_text(&spec).unwrap();
    if left_out.is_empty() {
        let again = pbtxt::parse(&text).map(|again| ModelSpec { notes: Vec::new(), ..again });
        assert_eq!(again.as_ref(), Ok(&spec), "{text}");
    }
});
