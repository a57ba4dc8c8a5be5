//! A model file's content, in memory that goes back to the system as soon as ONNX Runtime has read it.
//!
//! Rust's allocator keeps what is freed for a second and until it is next asked for much, which on a quiet server may
//! be never: 200 MB of weights then cost 400 MB. ONNX Runtime allocates as C does, where `main` has seen to that.

use std::{fs::File, io::Read, ops::Deref, path::Path};

use ort::{memory::Allocator, value::Tensor};

/// The bytes of a file.
pub struct Content {
    bytes: Tensor<u8>,
    length: usize,
}

impl Content {
    /// # Errors
    /// What the file system says; a folder is no file.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(std::io::Error::other("not a file"));
        }
        let length = usize::try_from(metadata.len()).map_err(std::io::Error::other)?;
        // A tensor without elements may have no memory at all.
        let bytes = Tensor::new(&Allocator::default(), [length.max(1)]);
        let mut content = Self { bytes: bytes.map_err(std::io::Error::other)?, length };
        file.read_exact(&mut content.bytes.extract_tensor_mut().1[..length])?;
        Ok(content)
    }
}

impl Deref for Content {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes.extract_tensor().1[..self.length]
    }
}
