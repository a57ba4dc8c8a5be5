//! Regions against real objects in `/dev/shm`: what they give, and all that they must survive.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;

use super::*;
use crate::{
    api::codec::{InferCall, PlacedInput, Placement, decode_json},
    metrics::Page,
    tensor::{DType, Data, Tensor},
};

/// A shared memory object that goes with the test.
struct Object {
    key: String,
    file: File,
}

impl Object {
    fn new(bytes: &[u8]) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let key = format!("/tidegate-test-{}-{number}", std::process::id());
        let file = File::options().create_new(true).read(true).write(true).open(path(&key)).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Self { key, file }
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(path(&self.key)).unwrap()
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let _ = fs::remove_file(path(&self.key));
    }
}

fn path(key: &str) -> PathBuf {
    PathBuf::from(format!("/dev/shm{key}"))
}

fn regions(max_regions: usize, max_bytes: u64) -> Arc<Regions> {
    let config = SharedMemoryConfig { enabled: true, max_regions, max_bytes };
    Regions::new(&config, Metrics::new("0", "0")).unwrap()
}

/// A call with one input of `shape` in region `r`, and with output `y` there from `offset` on.
fn call(dtype: DType, shape: &[usize], input: (u64, u64), output: (u64, u64)) -> InferCall {
    let place = |(offset, byte_size)| Placement { region: "r".to_owned(), offset, byte_size };
    let json = format!(
        r#"{{"inputs":[],"outputs":[{{"name":"y","parameters":{{"shared_memory_region":"r",
            "shared_memory_offset":{},"shared_memory_byte_size":{}}}}}]}}"#,
        output.0, output.1
    );
    let mut call = decode_json(&Bytes::from(json), None).unwrap();
    call.placed.push(PlacedInput { name: "x".into(), dtype, shape: shape.into(), placement: place(input) });
    call
}

fn output(bytes: &'static [u8]) -> Tensor {
    let data = Data::Plain(Bytes::from_static(bytes));
    Tensor::new("y".into(), DType::Uint8, [bytes.len()].as_slice().into(), data).unwrap()
}

#[test]
fn inputs_come_out_of_a_region_and_outputs_go_into_it() {
    let object = Object::new(b"....abcd....");
    let regions = regions(4, 100);
    regions.register("r", &object.key, 2, 10).unwrap();
    let mut call = call(DType::Uint8, &[2, 2], (2, 4), (6, 4));
    let places = Reach::Open(regions.clone()).fetch(&mut call, 4).unwrap();
    assert_eq!(call.inputs[0].data, Data::Plain(Bytes::from_static(b"abcd")));
    assert!(call.placed.is_empty());
    // Whoever began with a region keeps it.
    regions.unregister("r");
    places.fill(&[output(b"123")]).unwrap();
    assert_eq!(object.bytes(), b"....abcd123.");
    let error = places.fill(&[output(b"12345")]).unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument);
    assert!(error.message.starts_with("output 'y': takes 5 bytes, more than the 4"), "{error}");
    assert_eq!(object.bytes(), b"....abcd123.");
}

#[test]
fn texts_are_told_apart_within_their_bytes() {
    let object = Object::new(b"\x02\0\0\0ab\0\0\0\0\x09\0\0\0");
    let regions = regions(4, 100);
    regions.register("r", &object.key, 0, 14).unwrap();
    let reach = Reach::Open(regions);
    let mut whole = call(DType::Bytes, &[2], (0, 10), (0, 0));
    reach.fetch(&mut whole, 100).unwrap();
    assert_eq!(whole.inputs[0].data, Data::Strings(vec![Bytes::from_static(b"ab"), Bytes::new()]));
    let error = reach.fetch(&mut call(DType::Bytes, &[3], (0, 14), (0, 0)), 100).err().unwrap();
    assert_eq!(error.message, "input 'x': BYTES element 2 claims 9 bytes where 0 are left");
}

#[test]
fn a_shrunk_object_is_an_answer() {
    let object = Object::new(&[7; 8192]);
    let regions = regions(4, 1 << 20);
    regions.register("r", &object.key, 0, 8192).unwrap();
    let reach = Reach::Open(regions);
    let mut call_of_all = call(DType::Uint8, &[8192], (0, 8192), (4096, 4096));
    let places = reach.fetch(&mut call_of_all, 1 << 20).unwrap();
    for size in [8191, 4096, 0] {
        object.file.set_len(size).unwrap();
        let error = reach.fetch(&mut call(DType::Uint8, &[8192], (0, 8192), (0, 1)), 1 << 20).err().unwrap();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains("input 'x'") && error.message.contains("region 'r'"), "{error}");
        let full = Tensor::new("y".into(), DType::Uint8, [4096].as_slice().into(), Data::Plain(vec![1; 4096].into()));
        let error = places.fill(&[full.unwrap()]).unwrap_err();
        assert!(error.message.contains("smaller than it was"), "{error}");
        assert_eq!(object.bytes().len() as u64, size, "writing must not make it grow");
    }
}

#[test]
fn places_outside_of_the_region_are_refused() {
    let object = Object::new(&[0; 64]);
    let regions = regions(4, 100);
    regions.register("r", &object.key, 8, 16).unwrap();
    let reach = Reach::Open(regions);
    let fetch = |input, output, shape: &[usize]| {
        let fetched = reach.fetch(&mut call(DType::Uint8, shape, input, output), 100);
        fetched.map(|_| ()).map_err(|error| (error.code, error.message))
    };
    assert_eq!(fetch((0, 16), (0, 16), &[16]), Ok(()));
    assert_eq!(fetch((16, 0), (16, 0), &[0]), Ok(()));
    for (input, output, shape, named) in [
        ((0, 17), (0, 1), 17, "input 'x': 17 bytes from offset 0 on end beyond the 16 bytes"),
        ((15, 2), (0, 1), 2, "input 'x'"),
        ((u64::MAX, 2), (0, 1), 2, "input 'x'"),
        ((0, 8), (9, 8), 8, "output 'y'"),
        ((0, 8), (0, u64::MAX), 8, "output 'y'"),
        ((0, 8), (u64::MAX, u64::MAX), 8, "output 'y'"),
        ((0, 7), (0, 8), 8, "input 'x': shape [8] of UINT8 takes 8 bytes, and 'shared_memory_byte_size' is 7"),
    ] {
        let (code, message) = fetch(input, output, &[shape]).unwrap_err();
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.starts_with(named), "{message}");
    }
}

#[test]
fn inputs_are_bounded_like_messages() {
    let object = Object::new(&[0; 64]);
    let regions = regions(4, 100);
    regions.register("r", &object.key, 0, 64).unwrap();
    let reach = Reach::Open(regions);
    let twice = || {
        let mut call = call(DType::Uint8, &[32], (0, 32), (0, 1));
        call.placed.push(call.placed[0].clone());
        call
    };
    assert!(reach.fetch(&mut twice(), 64).is_ok());
    let error = reach.fetch(&mut twice(), 63).err().unwrap();
    assert_eq!(error.code, Code::TooLarge);
    assert!(error.message.contains("input 'x'") && error.message.contains("limits.max_message_bytes"), "{error}");
}

#[test]
fn keys_lead_to_plain_objects_only() {
    let object = Object::new(&[0; 64]);
    let made = |name: &str| path(&format!("{}-{name}", object.key));
    let (link, folder, pipe) = (made("link"), made("folder"), made("pipe"));
    std::os::unix::fs::symlink(path(&object.key), &link).unwrap();
    fs::create_dir(&folder).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let regions = regions(4, 100);
    let outside = format!("/../shm{}", object.key);
    let [link_key, folder_key, pipe_key] =
        [&link, &folder, &pipe].map(|path| format!("/{}", path.file_name().unwrap().to_str().unwrap()));
    let long = format!("/{}", "k".repeat(256));
    let refused = [
        ("", "key ''"),
        ("/", "key '/'"),
        ("//x", "key '//x'"),
        ("/.", "key '/.'"),
        ("/..", "key '/..'"),
        ("/../../etc/passwd", "'/../../etc/passwd'"),
        (&outside, "further slashes"),
        ("/a/b", "further slashes"),
        ("/a\0b", "further slashes"),
        (&long, "at most 255 bytes"),
        (&link_key, "cannot open"),
        (&folder_key, "cannot open"),
        (&pipe_key, "is no shared memory object"),
    ];
    for (key, named) in refused {
        let error = regions.register("r", key, 0, 8).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument, "{key}: {error}");
        assert!(error.message.contains("region 'r'") && error.message.contains(named), "{key}: {error}");
    }
    let error = regions.register("r", "/tidegate-test-not-there", 0, 8).unwrap_err();
    assert_eq!(error.code, Code::NotFound);
    // Some clients leave the slash away, as `shm_open` lets them.
    regions.register("r", object.key.trim_start_matches('/'), 0, 8).unwrap();
    fs::remove_file(link).unwrap();
    fs::remove_dir(folder).unwrap();
    fs::remove_file(pipe).unwrap();
}

#[test]
fn regions_lie_within_their_object() {
    let object = Object::new(&[0; 64]);
    let regions = regions(100, 1000);
    for (offset, byte_size) in [(0, 65), (64, 1), (65, 1), (0, 0), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        let error = regions.register("r", &object.key, offset, byte_size).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument, "{offset} {byte_size}: {error}");
    }
    for (index, (offset, byte_size)) in [(0, 64), (63, 1), (0, 1)].into_iter().enumerate() {
        regions.register(&format!("r{index}"), &object.key, offset, byte_size).unwrap();
    }
    for name in ["", &"n".repeat(256)] {
        assert_eq!(regions.register(name, &object.key, 0, 1).unwrap_err().code, Code::InvalidArgument);
    }
}

#[test]
fn regions_are_few_and_small_enough() {
    let object = Object::new(&[0; 64]);
    let regions = regions(2, 40);
    let register = |name: &str, byte_size| regions.register(name, &object.key, 0, byte_size);
    let error = register("a", 41).unwrap_err();
    assert_eq!(error.code, Code::TooLarge);
    assert!(error.message.contains("shared_memory.max_bytes"), "{error}");
    register("a", 30).unwrap();
    assert!(register("a", 1).unwrap_err().message.contains("'a' is registered already"));
    assert_eq!(register("b", 11).unwrap_err().code, Code::TooLarge);
    register("b", 10).unwrap();
    regions.unregister("a");
    register("c", 30).unwrap();
    let error = register("d", 1).unwrap_err();
    assert_eq!(error.code, Code::TooLarge);
    assert!(error.message.contains("shared_memory.max_regions"), "{error}");
    let text = regions.metrics.render(Page::default());
    assert!(text.contains("tidegate_shared_memory_regions 2\n"), "{text}");
    assert!(text.contains("tidegate_shared_memory_bytes 40\n"), "{text}");
    regions.unregister("not there");
    assert_eq!(regions.list("").unwrap().len(), 2);
    regions.unregister("");
    assert!(regions.list("").unwrap().is_empty());
    assert_eq!(regions.list("b").err().unwrap().code, Code::NotFound);
    register("b", 40).unwrap();
}

#[test]
fn nobody_else_has_any() {
    let wish = || call(DType::Uint8, &[8], (0, 8), (0, 8));
    let error = Reach::Off.fetch(&mut wish(), 100).err().unwrap();
    assert_eq!(error.code, Code::Unimplemented);
    assert!(error.message.contains("input 'x'") && error.message.contains("shared_memory.enabled"), "{error}");
    let reason = Error::new(Code::Forbidden, "not from there");
    let error = Reach::Refused(reason).fetch(&mut wish(), 100).err().unwrap();
    assert_eq!(error.code, Code::Forbidden);
    assert!(error.message.contains("input 'x'") && error.message.contains("not from there"), "{error}");
    let mut nothing = decode_json(&Bytes::from_static(br#"{"inputs":[]}"#), None).unwrap();
    assert!(Reach::Off.fetch(&mut nothing, 0).is_ok(), "what uses none needs none");
    assert!(Regions::new(&SharedMemoryConfig::default(), Metrics::new("0", "0")).is_none());
}
