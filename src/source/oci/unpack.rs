//! Archives of model files, unpacked into a folder: one by itself, or an image's layers, each over those below.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use super::tar::{Archive, Kind};
use crate::{
    error::abridge,
    source::{SourceError, digest::Hasher},
};

/// Members of all archives together: an operating system below a model has less.
const MAX_MEMBERS: usize = 200_000;
/// Bytes of a member's path, as file systems have it.
const MAX_PATH: usize = 4096;
const WHITEOUT: &str = ".wh.";
/// The whiteout of everything in its folder.
const OPAQUE: &str = ".wh..wh..opq";

/// What may come out of archives yet, all of them together.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    pub bytes: u64,
    members: usize,
}

impl Budget {
    pub fn of(bytes: u64) -> Self {
        Self { bytes, members: MAX_MEMBERS }
    }
}

/// What is in an archive.
#[derive(Debug, Default)]
pub struct Layer {
    pub members: BTreeMap<String, Entry>,
    folders: BTreeSet<String>,
    /// What is gone of the layers below.
    whiteouts: BTreeSet<String>,
    /// Folders of which nothing is left of the layers below.
    opaque: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    File(Unpacked),
    /// What it is instead, and is not taken for.
    Other(&'static str),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    pub path: PathBuf,
    /// In bytes.
    pub size: u64,
    pub sha256: [u8; 32],
}

/// Unpacks the archive in a file into the folder `into`, which must be there, as plain files with numbers for names. Of
/// an image's layer only what is in the folder `keep` is unpacked, and its whiteouts are heeded. `left` is what may come
/// out of it, and what remains of that.
///
/// # Errors
/// `Refused` when it is no archive, more comes out of it than may, or a member is outside its folder; `Disk` and `Full`.
pub fn unpack(archive: &Path, into: &Path, keep: Option<&str>, left: &mut Budget) -> Result<Layer, SourceError> {
    let file = File::open(archive).map_err(|error| SourceError::disk(archive, &error))?;
    let name = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let wrong = |error: io::Error| match error.raw_os_error() {
        // The disk's, and not the archive's.
        Some(_) => SourceError::disk(archive, &error),
        None => refused(&name, format!("it cannot be unpacked: {error}")),
    };
    let content = decompressed(BufReader::new(file)).map_err(wrong)?;
    let Budget { bytes, members } = left;
    let mut packed = Archive::new(Bounded { content, left: bytes });
    let mut layer = Layer::default();
    for number in 0.. {
        let Some(member) = packed.next().map_err(wrong)? else { break };
        let most = || refused(&name, format!("there are more than {MAX_MEMBERS} members"));
        *members = members.checked_sub(1).ok_or_else(most)?;
        if member.path.len() > MAX_PATH {
            return Err(refused(&name, format!("the path of a member has more than {MAX_PATH} bytes")));
        }
        let name = String::from_utf8_lossy(&member.path);
        // Where images are built and run, a slash before a path means nothing.
        let path = plain(if keep.is_some() { name.trim_start_matches('/') } else { &name })?;
        let is_kept = |path: &str| keep.is_none_or(|folder| path == folder || is_below(path, folder));
        if keep.is_some() && layer.note_whiteout(&path) || !is_kept(&path) {
            continue;
        }
        if matches!(name, Cow::Owned(_)) {
            return Err(refused(&name, "its name is not UTF-8"));
        }
        let entry = match member.kind {
            Kind::Folder => {
                layer.folders.insert(path);
                continue;
            }
            Kind::Other(kind) => Entry::Other(kind),
            Kind::File => Entry::File(copy(&mut packed, &path, into.join(number.to_string()), wrong)?),
        };
        layer.members.insert(path, entry);
    }
    Ok(layer)
}

impl Layer {
    /// What there is when this layer lies over others.
    pub fn over(self, mut below: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
        below.retain(|path, _| !self.hides(path));
        below.extend(self.members);
        below
    }

    fn hides(&self, path: &str) -> bool {
        let ends = || path.match_indices('/').map(|(end, _)| end);
        let is_gone = |path: &str| self.whiteouts.contains(path) || self.members.contains_key(path);
        let inside = format!("{path}/");
        self.opaque.contains("")
            || is_gone(path)
            || ends().any(|end| is_gone(&path[..end]) || self.opaque.contains(&path[..end]))
            // It was a file and is a folder now.
            || self.folders.contains(path)
            || self.members.range(inside.clone()..).next().is_some_and(|(member, _)| member.starts_with(&inside))
    }

    /// Whether it was one.
    fn note_whiteout(&mut self, path: &str) -> bool {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let Some(gone) = name.strip_prefix(WHITEOUT) else { return false };
        if name == OPAQUE {
            self.opaque.insert(folder.to_owned());
        } else if !gone.starts_with(WHITEOUT) {
            self.whiteouts.insert(if folder.is_empty() { gone.to_owned() } else { format!("{folder}/{gone}") });
        }
        true
    }
}

/// A member's path without what means nothing: `./` before it, `/` after it.
fn plain(path: &str) -> Result<String, SourceError> {
    if path.starts_with('/') {
        return Err(refused(path, "its path in the archive is absolute"));
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return Err(refused(path, "its path in the archive leaves the folder"));
    }
    Ok(parts.join("/"))
}

/// Writes the present member of an archive into a new file.
fn copy(
    archive: &mut impl Read,
    name: &str,
    path: PathBuf,
    wrong: impl Fn(io::Error) -> SourceError,
) -> Result<Unpacked, SourceError> {
    let disk = |error: io::Error| SourceError::disk(&path, &error);
    let mut file = File::create_new(&path).map_err(disk)?;
    let mut hasher = Hasher::new(None, 0);
    let mut buffer = vec![0; 128 << 10];
    let mut size = 0;
    loop {
        match archive.read(&mut buffer).map_err(&wrong)? {
            0 => break,
            read => {
                hasher.update(&buffer[..read]);
                file.write_all(&buffer[..read]).map_err(disk)?;
                size += read as u64;
            }
        }
    }
    let sha256 = hasher.finish(name)?;
    Ok(Unpacked { path, size, sha256 })
}

/// The content of a file, whatever it is packed with: the names of packings are often wrong, their first bytes never.
fn decompressed(mut file: BufReader<File>) -> io::Result<Box<dyn Read>> {
    let head = file.fill_buf()?;
    Ok(if head.starts_with(b"\x1f\x8b") {
        Box::new(MultiGzDecoder::new(file))
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") || head.get(1..4) == Some(b"\x2a\x4d\x18") {
        Box::new(Frames { source: file, decoder: FrameDecoder::new(), is_open: false })
    } else {
        Box::new(file)
    })
}

/// What zstd has packed: frames, one after the other, and some that hold nothing.
struct Frames<R> {
    source: R,
    decoder: FrameDecoder,
    is_open: bool,
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.is_open {
                if self.source.fill_buf()?.is_empty() {
                    return Ok(0);
                }
                match self.decoder.init(&mut self.source) {
                    Ok(()) => self.is_open = true,
                    Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                        length, ..
                    })) => {
                        io::copy(&mut self.source.by_ref().take(u64::from(length)), &mut io::sink())?;
                        continue;
                    }
                    Err(error) => return Err(io::Error::other(error)),
                }
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let decoded = self.decoder.decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1));
                decoded.map_err(io::Error::other)?;
            }
            match self.decoder.read(buffer)? {
                0 if !buffer.is_empty() => self.is_open = false,
                read => return Ok(read),
            }
        }
    }
}

/// What comes out of an archive, as far as it may.
struct Bounded<'a> {
    content: Box<dyn Read>,
    left: &'a mut u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.content.read(buffer)?;
        *self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, "unpacked it is larger than the cache may be (cache.max_bytes)")
        })?;
        Ok(read)
    }
}

/// Whether a path lies in a folder.
pub fn is_below(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

fn refused(file: &str, reason: impl Into<String>) -> SourceError {
    SourceError::Refused { file: abridge(file), reason: reason.into() }
}
