//! `Weights`: tensors of safetensors files by name, read one by one into memory of their own.
//!
//! A file is never mapped, for whoever truncates a mapped file kills the server, and never held whole: what is resident
//! after loading is the tensors that the model uses, in the type that `options.dtype` names. Headers are checked before
//! anything is allocated by what they say.

use std::{
    collections::HashMap,
    fs::File,
    io::{ErrorKind, Read, Seek, SeekFrom},
    path::{Component, Path},
};

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::Deserialize;

use super::config::bounded;
use crate::error::{Error, shorten};

pub const FILE_NAME: &str = "model.safetensors";
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// The length of the header, before it.
const PREFIX: usize = 8;

/// What the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// Files that an index may list; each is open while the model loads.
const MAX_SHARDS: usize = 1024;

/// Bytes that are converted at a time.
const CHUNK: usize = 256 << 10;

/// The tensors of a model, still on disk.
pub struct Weights {
    files: Vec<Shard>,
    tensors: HashMap<String, (usize, TensorInfo)>,
    dtype: DType,
    device: Device,
}

struct Shard {
    name: String,
    file: File,
    /// Where the data begins.
    start: u64,
}

/// What says which file has which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Reads the headers of the file `path`, or of all files that it lists if it is an index; tensors will be of `dtype`
    /// on `device`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file and what is wrong with it; `Internal` when the disk fails.
    pub fn open(path: &Path, dtype: DType, device: &Device) -> Result<Self, Error> {
        let mut weights = Self { files: Vec::new(), tensors: HashMap::new(), dtype, device: device.clone() };
        let folder = path.parent().unwrap_or(Path::new("."));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".json") {
            weights.add_listed(path, folder).map_err(|error| within(&name, error))?;
        } else {
            weights.add(path, &name, |_| true).map_err(|error| within(&name, error))?;
        }
        Ok(weights)
    }

    fn add_listed(&mut self, path: &Path, folder: &Path) -> Result<(), Error> {
        let content = bounded(path)?;
        let Index { weight_map } = serde_json::from_slice(&content)
            .map_err(|error| Error::invalid(format!("not an index of safetensors files: {error}")))?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort();
        names.dedup();
        if names.len() > MAX_SHARDS {
            return Err(Error::invalid(format!("lists {} files; at most {MAX_SHARDS} are opened", names.len())));
        }
        for name in &names {
            check_name(name)?;
            let in_this = |tensor: &str| weight_map.get(tensor) == Some(*name);
            self.add(&folder.join(name), name, in_this)
                .map_err(|error| within(&format!("file '{}'", shorten(name)), error))?;
        }
        match weight_map.iter().find(|(tensor, _)| !self.tensors.contains_key(*tensor)) {
            Some((tensor, file)) => {
                Err(Error::invalid(format!("tensor '{}' is not in '{}'", shorten(tensor), shorten(file))))
            }
            None => Ok(()),
        }
    }

    /// Adds the tensors of one file that `wanted` is true of.
    fn add(&mut self, path: &Path, name: &str, wanted: impl Fn(&str) -> bool) -> Result<(), Error> {
        // Opening a pipe would wait for whoever writes into it.
        let metadata = std::fs::metadata(path).map_err(unread)?;
        if !metadata.is_file() {
            return Err(Error::invalid("not a file"));
        }
        let mut file = File::open(path).map_err(unread)?;
        let metadata = file.metadata().map_err(unread)?;
        let (start, header) = header(&mut file, metadata.len())?;
        let shard = self.files.len();
        for (tensor, info) in header.tensors() {
            if wanted(&tensor) {
                self.tensors.insert(tensor, (shard, info.clone()));
            }
        }
        self.files.push(Shard { name: name.to_owned(), file, start });
        Ok(())
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name`, which the configuration says to have `shape`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the tensor when it is missing, of another shape or of a type that is none of floats.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        self.stacked(&[name.to_owned()], shape)
    }

    /// The tensors `names`, all of `shape`, one after the other along the first dimension.
    ///
    /// # Errors
    /// As for one.
    pub fn stacked(&mut self, names: &[String], shape: &[usize]) -> Result<Tensor, Error> {
        match self.dtype {
            DType::F16 => self.read::<f16>(names, shape, f16::from_f32),
            DType::BF16 => self.read::<bf16>(names, shape, bf16::from_f32),
            _ => self.read::<f32>(names, shape, |value| value),
        }
    }

    fn read<T: Pod + WithDType>(
        &mut self,
        names: &[String],
        shape: &[usize],
        of: fn(f32) -> T,
    ) -> Result<Tensor, Error> {
        // Nothing is allocated before the files are known to hold it.
        for name in names {
            self.check(name, shape)?;
        }
        let length = shape.iter().product::<usize>();
        let mut elements = room(length.saturating_mul(names.len()))
            .map_err(|error| within(&format!("tensor '{}'", names.join("', '")), error))?;
        for name in names {
            let Some((shard, info)) = self.tensors.get(name) else { return Err(missing(name, shape)) };
            let shard = &mut self.files[*shard];
            shard.read(info, &mut elements, of).map_err(|error| {
                let error = match error.kind() {
                    ErrorKind::UnexpectedEof => Error::invalid("the file has become shorter while it was read"),
                    _ => unread(error),
                };
                within(&shard.name, within(&format!("tensor '{name}'"), error))
            })?;
        }
        let mut whole = shape.to_vec();
        if let Some(first) = whole.first_mut() {
            *first *= names.len();
        }
        Tensor::from_vec(elements, whole, &self.device)
            .map_err(|error| Error::internal(format!("tensor '{}': {error}", names.join("', '"))))
    }

    fn check(&self, name: &str, shape: &[usize]) -> Result<(), Error> {
        let Some((_, info)) = self.tensors.get(name) else { return Err(missing(name, shape)) };
        if info.shape != shape {
            return Err(Error::invalid(format!(
                "tensor '{name}' must have shape {shape:?} by config.json, has {:?}",
                info.shape
            )));
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(Error::invalid(format!("tensor '{name}' must be F32, F16 or BF16, is {:?}", info.dtype)));
        }
        Ok(())
    }
}

impl Shard {
    /// Appends the elements of a tensor.
    fn read<T: Pod>(&mut self, info: &TensorInfo, elements: &mut Vec<T>, of: fn(f32) -> T) -> std::io::Result<()> {
        let (begin, end) = info.data_offsets;
        self.file.seek(SeekFrom::Start(self.start + begin as u64))?;
        let mut buffer = vec![0u8; CHUNK.min(end - begin)];
        let mut left = end - begin;
        while left > 0 {
            let bytes = &mut buffer[..CHUNK.min(left)];
            self.file.read_exact(bytes)?;
            left -= bytes.len();
            let (pairs, _) = bytes.as_chunks::<2>();
            match info.dtype {
                Dtype::F16 => elements.extend(pairs.iter().map(|&pair| of(f16::from_le_bytes(pair).to_f32()))),
                Dtype::BF16 => elements.extend(pairs.iter().map(|&pair| of(bf16::from_le_bytes(pair).to_f32()))),
                _ => elements.extend(bytes.as_chunks::<4>().0.iter().map(|&four| of(f32::from_le_bytes(four)))),
            }
        }
        Ok(())
    }
}

/// Where the data of a file of `length` bytes begins, and what its header says.
fn header(file: &mut File, length: u64) -> Result<(u64, Metadata), Error> {
    let mut prefix = [0u8; PREFIX];
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => {
            Error::invalid(format!("not a safetensors file: it has {length} bytes, and no whole header"))
        }
        _ => unread(error),
    };
    file.read_exact(&mut prefix).map_err(failed)?;
    let size = u64::from_le_bytes(prefix);
    if size > MAX_HEADER {
        return Err(Error::invalid(format!("not a safetensors file: its header would take {size} bytes")));
    }
    let start = PREFIX as u64 + size;
    if start > length {
        return Err(Error::invalid(format!("truncated: it has {length} bytes, and its header ends at {start}")));
    }
    let mut text = vec![0u8; usize::try_from(size).map_err(|error| Error::invalid(error.to_string()))?];
    file.read_exact(&mut text).map_err(failed)?;
    // Also checks that tensors lie one after the other and are as long as their shapes say.
    let header: Metadata =
        serde_json::from_slice(&text).map_err(|error| Error::invalid(format!("its header is wrong: {error}")))?;
    let end = start + header.data_len() as u64;
    let reason = format!("it has {length} bytes, and its tensors end at {end}");
    match end.cmp(&length) {
        std::cmp::Ordering::Greater => Err(Error::invalid(format!("truncated: {reason}"))),
        std::cmp::Ordering::Less => Err(Error::invalid(reason)),
        std::cmp::Ordering::Equal => Ok((start, header)),
    }
}

/// An empty vector with room for `count` elements; without it the process would end where there is no memory.
fn room<T>(count: usize) -> Result<Vec<T>, Error> {
    let mut elements = Vec::new();
    match elements.try_reserve_exact(count) {
        Ok(()) => Ok(elements),
        Err(error) => Err(Error::internal(format!("no memory for it: {error}"))),
    }
}

/// Refuses names that lead out of the folder, and files of other formats.
fn check_name(name: &str) -> Result<(), Error> {
    let shown = shorten(name);
    let is_inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if !is_inside || name.contains("//") || name.contains("/./") {
        return Err(Error::invalid(format!("file '{shown}' must lie in the model's folder")));
    }
    if !name.ends_with(".safetensors") {
        return Err(Error::invalid(format!("file '{shown}' must be a safetensors file")));
    }
    Ok(())
}

fn missing(name: &str, shape: &[usize]) -> Error {
    Error::invalid(format!("tensor '{name}' is missing; by config.json it has shape {shape:?}"))
}

fn unread(error: std::io::Error) -> Error {
    Error::unread(&error, error.to_string())
}

/// The same failure with what it is in named in front.
fn within(what: &str, error: Error) -> Error {
    Error { message: format!("{what}: {}", error.message), ..error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::candle::testing::{self, Stored},
        error::Code,
    };

    fn open(folder: &Path, name: &str) -> Result<Weights, String> {
        Weights::open(&folder.join(name), DType::F32, &Device::Cpu).map_err(|error| error.message)
    }

    fn some() -> Vec<(String, Stored)> {
        let stored = |shape: &[usize]| Stored::counting(shape);
        vec![("a".to_owned(), stored(&[2, 3])), ("b".to_owned(), stored(&[4]))]
    }

    #[test]
    fn every_type_of_floats_is_read_as_any() {
        let folder = tempfile::tempdir().unwrap();
        for stored in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let tensor = Stored { dtype: stored, ..Stored::counting(&[2, 3]) };
            testing::write(&folder.path().join(FILE_NAME), &[("a".to_owned(), tensor)]);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let mut weights = Weights::open(&folder.path().join(FILE_NAME), dtype, &Device::Cpu).unwrap();
                let tensor = weights.tensor("a", &[2, 3]).unwrap();
                assert_eq!(tensor.dtype(), dtype);
                let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(values, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "{stored:?} as {dtype:?}");
            }
        }
    }

    #[test]
    fn tensors_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = some();
        tensors.push(("i".to_owned(), Stored { dtype: Dtype::I32, ..Stored::counting(&[4]) }));
        testing::write(&folder.path().join(FILE_NAME), &tensors);
        let mut weights = open(folder.path(), FILE_NAME).unwrap();
        let mut message = |name: &str, shape: &[usize]| weights.tensor(name, shape).unwrap_err().message;
        assert_eq!(message("c", &[5]), "tensor 'c' is missing; by config.json it has shape [5]");
        assert_eq!(message("a", &[3, 2]), "tensor 'a' must have shape [3, 2] by config.json, has [2, 3]");
        assert_eq!(message("i", &[4]), "tensor 'i' must be F32, F16 or BF16, is I32");
        let both = weights.stacked(&["b".to_owned(), "b".to_owned()], &[4]).unwrap();
        assert_eq!(both.to_vec1::<f32>().unwrap(), [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        testing::write(&path, &some());
        let whole = std::fs::read(&path).unwrap();
        let message = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            open(folder.path(), FILE_NAME).err()
        };
        for length in 0..whole.len() {
            let message = message(&whole[..length]).unwrap();
            assert!(message.starts_with("model.safetensors: "), "{message}");
        }
        assert_eq!(
            message(&whole[..whole.len() - 1]).unwrap(),
            format!(
                "model.safetensors: truncated: it has {} bytes, and its tensors end at {}",
                whole.len() - 1,
                whole.len()
            )
        );
        assert!(message(&[&whole[..], b"x"].concat()).unwrap().contains("its tensors end at"));
        assert!(message(&[0xff; 64]).unwrap().contains("its header would take"));
        let with_header = |header: &str, data: &[u8]| {
            message(&[&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat())
        };
        assert!(with_header("{", b"").unwrap().contains("its header is wrong"));
        let far = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        assert!(with_header(far, &[0; 8]).unwrap().contains("its header is wrong"));
        let vast = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#;
        assert!(with_header(vast, &[0; 8]).unwrap().contains("its header is wrong"));
        let other = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
        assert!(with_header(other, &[0; 8]).unwrap().contains("its header is wrong"));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_eq!(open(folder.path(), FILE_NAME).err().unwrap(), "model.safetensors: not a file");
    }

    #[test]
    fn files_that_shrink_while_they_are_read_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        testing::write(&path, &some());
        let mut weights = open(folder.path(), FILE_NAME).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(80).unwrap();
        let message = weights.tensor("a", &[2, 3]).unwrap_err().message;
        assert_eq!(message, "model.safetensors: tensor 'a': the file has become shorter while it was read");
    }

    #[test]
    fn what_there_is_no_memory_for_is_an_error() {
        // More than any address space has, whatever the system promises.
        for count in [usize::MAX, isize::MAX as usize / size_of::<f32>()] {
            let error = room::<f32>(count).unwrap_err();
            assert_eq!(error.code, Code::Internal);
            assert!(error.message.starts_with("no memory for it: "), "{error}");
        }
        assert!(room::<f32>(7).unwrap().capacity() >= 7);
    }

    /// Neither waits, as for whoever writes into a pipe, nor reads without end, as a device would be.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_no_file_is_not_read() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        mknodat(CWD, path("pipe.safetensors"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("device.safetensors")).unwrap();
        std::fs::create_dir(path("folder.safetensors")).unwrap();
        for name in ["pipe.safetensors", "device.safetensors", "folder.safetensors"] {
            assert_eq!(open(folder.path(), name).err().unwrap(), format!("{name}: not a file"));
            std::fs::write(path(INDEX_NAME), serde_json::json!({"weight_map": {"a": name}}).to_string()).unwrap();
            let message = open(folder.path(), INDEX_NAME).err().unwrap();
            assert_eq!(message, format!("{INDEX_NAME}: file '{name}': not a file"));
            std::fs::remove_file(path(INDEX_NAME)).unwrap();
            std::fs::rename(path(name), path(INDEX_NAME)).unwrap();
            assert_eq!(open(folder.path(), INDEX_NAME).err().unwrap(), format!("{INDEX_NAME}: not a file"));
            std::fs::rename(path(INDEX_NAME), path(name)).unwrap();
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn disks_that_fail_are_not_the_models_fault() {
        let folder = tempfile::tempdir().unwrap();
        for name in [FILE_NAME, INDEX_NAME] {
            // Reading the memory at address 0 fails as a disk does.
            std::os::unix::fs::symlink("/proc/self/mem", folder.path().join(name)).unwrap();
            let error = Weights::open(&folder.path().join(name), DType::F32, &Device::Cpu).err().unwrap();
            assert_eq!(error.code, Code::Internal, "{error}");
            assert!(
                error.message.starts_with(&format!("{name}: ")) && error.message.contains("(os error 5)"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_index_may_list_many_tensors_and_not_too_many_files() {
        let folder = tempfile::tempdir().unwrap();
        let count = 20_000;
        let tensors: Vec<_> = (0..count).map(|index| (format!("t{index}"), Stored::counting(&[1]))).collect();
        let (first, second) = tensors.split_at(count / 2);
        testing::write(&folder.path().join("one.safetensors"), first);
        testing::write(&folder.path().join("two.safetensors"), second);
        let index = |file: &dyn Fn(usize) -> String| {
            let map: HashMap<String, String> = (0..count).map(|index| (format!("t{index}"), file(index))).collect();
            std::fs::write(folder.path().join(INDEX_NAME), serde_json::json!({ "weight_map": map }).to_string())
                .unwrap();
            open(folder.path(), INDEX_NAME)
        };
        let right = |index: usize| if index < count / 2 { "one.safetensors" } else { "two.safetensors" }.to_owned();
        let mut weights = index(&right).unwrap();
        assert_eq!(weights.files.len(), 2, "each file is opened once");
        assert_eq!(weights.tensor("t0", &[1]).unwrap().dims(), [1]);
        assert_eq!(weights.tensor(&format!("t{}", count - 1), &[1]).unwrap().dims(), [1]);
        let message = index(&|index| format!("{index}.safetensors")).err().unwrap();
        assert_eq!(message, format!("{INDEX_NAME}: lists {count} files; at most {MAX_SHARDS} are opened"));
    }

    #[test]
    fn shards_are_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let shard = |name: &str, tensors: &[(String, Stored)]| testing::write(&folder.path().join(name), tensors);
        let tensors = some();
        shard("one.safetensors", &tensors[..1]);
        shard("two.safetensors", &tensors[1..]);
        let index = |map: serde_json::Value| {
            let text = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
            std::fs::write(folder.path().join(INDEX_NAME), text).unwrap();
            open(folder.path(), INDEX_NAME)
        };
        let mut weights = index(serde_json::json!({"a": "one.safetensors", "b": "two.safetensors"})).unwrap();
        assert_eq!(weights.tensor("a", &[2, 3]).unwrap().dims(), [2, 3]);
        assert_eq!(weights.tensor("b", &[4]).unwrap().dims(), [4]);
        for (map, expected) in [
            (serde_json::json!({"a": "../one.safetensors"}), "must lie in the model's folder"),
            (serde_json::json!({"a": "/one.safetensors"}), "must lie in the model's folder"),
            (serde_json::json!({"a": ""}), "must be a safetensors file"),
            (serde_json::json!({"a": "pytorch_model.bin"}), "must be a safetensors file"),
            (serde_json::json!({"a": "two.safetensors"}), "tensor 'a' is not in 'two.safetensors'"),
            (serde_json::json!({"a": "none.safetensors"}), "file 'none.safetensors': "),
            (serde_json::json!([]), "not an index of safetensors files"),
        ] {
            let message = index(map).err().unwrap();
            assert!(message.starts_with("model.safetensors.index.json: ") && message.contains(expected), "{message}");
        }
    }
}
