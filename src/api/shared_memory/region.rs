//! `Region`: an open part of a shared memory object, and the bytes of one tensor in it.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use rustix::{buffer::spare_capacity, fs::OFlags, io::Errno};

use crate::{
    api::codec::Placement,
    error::{Code, Error},
    id::shorten,
};

/// Where Linux keeps the objects of `shm_open`, as files.
const FOLDER: &str = "/dev/shm";

/// Bytes of a file's longest name.
const MAX_KEY: usize = 255;

/// A part of a shared memory object, held open and never mapped.
pub(super) struct Region {
    pub(super) name: String,
    /// What the client calls the object.
    pub(super) key: String,
    /// Bytes from the start of the object.
    pub(super) offset: u64,
    pub(super) byte_size: u64,
    object: File,
}

impl Region {
    /// Opens the object, which must be there and hold the whole region.
    ///
    /// # Errors
    /// `InvalidArgument` for keys that lead elsewhere and sizes that do not fit, `NotFound` for objects that are not
    /// there, `Forbidden` for those that the server's user may not read and write.
    pub(super) fn open(name: &str, key: &str, offset: u64, byte_size: u64) -> Result<Self, Error> {
        let of_region = |message: String| format!("shared memory region '{}': {message}", shorten(name));
        let invalid = |message| Error::invalid(of_region(message));
        let shown = shorten(key);
        let file_name = key.strip_prefix('/').unwrap_or(key);
        if matches!(file_name, "" | "." | "..") || file_name.len() > MAX_KEY || file_name.contains(['/', '\0']) {
            return Err(invalid(format!(
                "key '{shown}' must be a slash and the name of an object, of at most {MAX_KEY} bytes and without \
                 further slashes"
            )));
        }
        let end = offset.checked_add(byte_size).filter(|_| byte_size > 0).ok_or_else(|| {
            invalid(format!("byte_size must be at least 1, and offset and byte_size together at most {}", u64::MAX))
        })?;
        // Neither a link out of the folder nor a wait for the other end of a pipe.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.cast_signed())
            .open(Path::new(FOLDER).join(file_name));
        let object = opened.map_err(|error| {
            let code = match Errno::from_io_error(&error) {
                Some(Errno::NOENT) => Code::NotFound,
                Some(Errno::ACCESS | Errno::PERM) => Code::Forbidden,
                Some(Errno::LOOP | Errno::ISDIR) => Code::InvalidArgument,
                _ => Code::Internal,
            };
            Error::new(code, of_region(format!("cannot open the object '{shown}': {error}")))
        })?;
        let metadata = object
            .metadata()
            .map_err(|error| Error::internal(of_region(format!("cannot look at the object '{shown}': {error}"))))?;
        if !metadata.is_file() {
            return Err(invalid(format!("'{shown}' is no shared memory object")));
        }
        if metadata.len() < end {
            return Err(invalid(format!(
                "{byte_size} bytes from offset {offset} on end beyond the {} bytes of the object '{shown}'",
                metadata.len()
            )));
        }
        Ok(Self { name: name.to_owned(), key: key.to_owned(), offset, byte_size, object })
    }

    /// The place of a tensor.
    ///
    /// # Errors
    /// `InvalidArgument` when it does not lie within the region.
    pub(super) fn window(self: Arc<Self>, placement: &Placement) -> Result<Window, Error> {
        let Placement { offset, byte_size, .. } = *placement;
        let within = offset.checked_add(byte_size).is_some_and(|end| end <= self.byte_size);
        match usize::try_from(byte_size) {
            Ok(byte_size) if within => Ok(Window { start: self.offset + offset, byte_size, region: self }),
            _ => Err(Error::invalid(format!(
                "{byte_size} bytes from offset {offset} on end beyond the {} bytes of shared memory region '{}'",
                self.byte_size,
                shorten(&self.name)
            ))),
        }
    }
}

/// Where one tensor lies, or at most lies: some bytes within a region.
pub(super) struct Window {
    region: Arc<Region>,
    /// Bytes from the start of the object.
    start: u64,
    pub(super) byte_size: usize,
}

impl Window {
    /// All bytes, as they are now.
    ///
    /// # Errors
    /// `InvalidArgument` when the object has been shrunk since the region was registered.
    pub(super) fn read(&self) -> Result<Bytes, Error> {
        let mut bytes = Vec::with_capacity(self.byte_size);
        while bytes.len() < self.byte_size {
            let at = self.start + bytes.len() as u64;
            match rustix::io::pread(&self.region.object, spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(self.shrunk()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed("read", error)),
            }
        }
        // A list may have been given more room than it asked for.
        bytes.truncate(self.byte_size);
        Ok(bytes.into())
    }

    /// Writes `bytes`, which must not be more than there is room for, to the beginning.
    ///
    /// # Errors
    /// `InvalidArgument` when the object has been shrunk since the region was registered.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        // Writing beyond the end would make the object grow again. Should it be shrunk just now, it grows to what was
        // registered at most.
        let held = self.region.object.metadata().map_err(|error| self.failed("look at", error))?.len();
        if held < self.start + bytes.len() as u64 {
            return Err(self.shrunk());
        }
        self.region.object.write_all_at(bytes, self.start).map_err(|error| self.failed("write to", error))
    }

    /// # Errors
    /// `InvalidArgument` when there is no room for `needed` bytes.
    pub(super) fn check_room(&self, needed: usize) -> Result<(), Error> {
        if needed <= self.byte_size {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "takes {needed} bytes, more than the {} that the request gives it in shared memory region '{}'",
            self.byte_size,
            shorten(&self.region.name)
        )))
    }

    fn shrunk(&self) -> Error {
        Error::invalid(format!(
            "shared memory region '{}': the object '{}' is smaller than it was when the region was registered",
            shorten(&self.region.name),
            shorten(&self.region.key)
        ))
    }

    fn failed(&self, what: &str, error: impl std::fmt::Display) -> Error {
        let (name, key) = (shorten(&self.region.name), shorten(&self.region.key));
        Error::internal(format!("shared memory region '{name}': cannot {what} the object '{key}': {error}"))
    }
}
