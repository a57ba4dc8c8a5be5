//! What is never published, whoever vouches for it: files outside their folder, and pickles, which run code.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use crate::source::{RemoteFile, SourceError};

/// Files of one version; more than any model has.
const MAX_FILES: usize = 10_000;
/// Bytes of one part of a path, as file systems have it.
const MAX_PART: usize = 255;
/// Bytes of a path below the version's folder.
const MAX_PATH: usize = 1024;
/// Endings that only pickles have, by themselves or in torch's archives.
const PICKLES: [&str; 6] = [".pkl", ".pickle", ".pt", ".pth", ".joblib", ".dill"];
/// What torch's own programs call the pickles that end in `.bin`, as other files do, too.
const TORCH: [&str; 5] = ["pytorch_model", "training_args", "optimizer", "scheduler", "rng_state"];
/// How much of an archive's end is searched for its list of files. A list of 10,000 names takes less.
const ARCHIVE_END: u64 = 1 << 20;

/// Checks the list of a version's files, before any byte is read.
///
/// # Errors
/// `Refused`, naming the file.
pub fn list(files: &[RemoteFile]) -> Result<(), SourceError> {
    if files.len() > MAX_FILES {
        let file = files.first().map(|file| file.path.clone()).unwrap_or_default();
        return Err(refused(&file, format!("it is one of {} files; at most {MAX_FILES} are taken", files.len())));
    }
    let mut seen = BTreeSet::new();
    for file in files {
        path(&file.path)?;
        if !seen.insert(file.path.as_str()) {
            return Err(refused(&file.path, "it is listed twice"));
        }
    }
    let is_folder = |path: &str| {
        let inside = format!("{path}/");
        seen.range(inside.as_str()..).next().is_some_and(|next| next.starts_with(&inside))
    };
    match files.iter().find(|file| is_folder(&file.path)) {
        Some(file) => Err(refused(&file.path, "it is listed as a file and as a folder")),
        None => Ok(()),
    }
}

/// Checks one path below a version's folder.
///
/// # Errors
/// `Refused`, saying what is wrong with it.
pub fn path(path: &str) -> Result<(), SourceError> {
    let reason = if path.is_empty() {
        "it has no name"
    } else if path.starts_with('/') {
        "its path is absolute"
    } else if path.contains('\\') || path.chars().any(char::is_control) {
        "its path has a backslash or a control character"
    } else if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        "its path leaves the folder, or has an empty part"
    } else if path.len() > MAX_PATH || path.split('/').any(|part| part.len() > MAX_PART) {
        "its path is too long"
    } else if is_pickle_name(path) {
        "by its name it is a pickle, which can run any code"
    } else {
        return Ok(());
    };
    Err(refused(path, reason))
}

/// Checks what was fetched as the file `path`.
///
/// # Errors
/// `Refused` when it begins as a pickle does or is an archive that holds one.
pub fn content(path: &str, file: &mut File) -> Result<(), SourceError> {
    match is_pickle(file) {
        Ok(false) => Ok(()),
        Ok(true) => Err(refused(path, "it holds a pickle, which can run any code")),
        Err(error) => Err(SourceError::Disk { what: format!("file '{path}'"), reason: error.to_string() }),
    }
}

fn refused(file: &str, reason: impl Into<String>) -> SourceError {
    SourceError::Refused { file: crate::error::abridge(file), reason: reason.into() }
}

/// Whether a file is taken for a pickle by its name alone.
pub fn is_pickle_name(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    PICKLES.iter().any(|ending| name.ends_with(ending))
        || (name.ends_with(".bin") && TORCH.iter().any(|start| name.starts_with(start)))
}

fn is_pickle(file: &mut File) -> io::Result<bool> {
    let size = file.metadata()?.len();
    let mut head = [0; 11];
    let read = read_at(file, 0, &mut head)?;
    if starts_as_pickle(&head[..read], size) {
        return Ok(true);
    }
    if !head.starts_with(b"PK\x03\x04") {
        return Ok(false);
    }
    let mut end = vec![0; usize::try_from(size.min(ARCHIVE_END)).unwrap_or_default()];
    let read = read_at(file, size - size.min(ARCHIVE_END), &mut end)?;
    Ok(names(&end[..read]).any(|name| name.ends_with(b".pkl")))
}

fn read_at(file: &mut File, start: u64, buffer: &mut [u8]) -> io::Result<usize> {
    file.seek(SeekFrom::Start(start))?;
    let mut read = 0;
    while read < buffer.len() {
        match file.read(&mut buffer[read..])? {
            0 => break,
            more => read += more,
        }
    }
    Ok(read)
}

/// Whether a file of `size` bytes that begins with `head` is a pickle of protocol 2 to 5. Two bytes alone would take one
/// raw weights file of 16,000 for one, so the third has to fit as well: from protocol 4 on it opens a frame that lies
/// within the file, or the whole pickle is too short for a frame; before, it is an instruction that pushes something.
fn starts_as_pickle(head: &[u8], size: u64) -> bool {
    let &[0x80, protocol @ 2..=5, next, ref rest @ ..] = head else { return false };
    if protocol < 4 {
        return b"(])}cNKMJIGFLX\x8a\x8b\x88\x89UTVC\x81h".contains(&next);
    }
    match (next, <[u8; 8]>::try_from(rest)) {
        (0x95, Ok(length)) => u64::from_le_bytes(length).checked_add(11).is_some_and(|end| end <= size),
        _ => size < 16,
    }
}

/// The names in a zip archive's list of files, as far as `end` holds it.
fn names(end: &[u8]) -> impl Iterator<Item = &[u8]> {
    const HEADER: usize = 46;
    memchr::memmem::find_iter(end, b"PK\x01\x02").filter_map(move |start| {
        let length = end.get(start + 28..start + 30)?;
        let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
        end.get(start + HEADER..start + HEADER + length)
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(path: &str) -> RemoteFile {
        RemoteFile { path: path.into(), size: 1, digest: None, location: path.into(), pin: None, likeness: None }
    }

    fn holds_pickle(bytes: &[u8]) -> bool {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        content("weights", &mut file).is_err()
    }

    #[test]
    fn paths_stay_in_their_folder() {
        for good in ["model.onnx", "onnx/model.onnx_data", ".gitattributes", "a/..b/c..", "ünïcode é.txt"] {
            assert_eq!(path(good), Ok(()), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "a/..", ".", "a//b", "a/", "a\\..\\b", "a\nb", "a\0b"] {
            let error = path(bad).unwrap_err();
            assert!(matches!(error, SourceError::Refused { .. }), "{bad:?}: {error}");
        }
        assert!(path(&"x".repeat(256)).is_err());
        assert!(path("long/".repeat(205).trim_end_matches('/')).is_ok());
        assert!(path(&format!("{}x", "long/".repeat(205))).is_err());
    }

    #[test]
    fn a_list_names_each_file_once() {
        assert_eq!(list(&[file("a"), file("b/c"), file("b.d"), file("b-")]), Ok(()));
        assert!(list(&[file("a"), file("a")]).unwrap_err().to_string().contains("'a' is refused: it is listed twice"));
        let error = list(&[file("b/c"), file("b"), file("b.d")]).unwrap_err();
        assert!(error.to_string().contains("'b' is refused: it is listed as a file and as a folder"), "{error}");
        assert!(list(&vec![file("a"); MAX_FILES + 1]).unwrap_err().to_string().contains("10001 files"));
    }

    #[test]
    fn pickles_are_known_by_name() {
        for bad in ["model.pkl", "a/B.PICKLE", "m.pt", "m.pth", "m.joblib", "pytorch_model-00001-of-00002.bin"] {
            assert!(path(bad).unwrap_err().to_string().contains("pickle"), "{bad}");
        }
        for good in ["weights.bin", "model.pkl.md", "pt", "openvino_model.bin"] {
            assert_eq!(path(good), Ok(()), "{good}");
        }
    }

    /// As Python's `pickle.dumps` gives them.
    #[test]
    fn pickles_are_known_by_their_first_bytes() {
        for protocol in [2, 3] {
            assert!(holds_pickle(&[&[0x80, protocol][..], b"}q\x00X\x01\x00\x00\x00aq\x01K\x01s."].concat()));
        }
        assert!(holds_pickle(b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."));
        assert!(holds_pickle(b"\x80\x05N."));
        // Raw weights, that begin with the same two bytes.
        assert!(!holds_pickle(&[&b"\x80\x04\x3f\x3f"[..], &[0; 60]].concat()));
        assert!(!holds_pickle(&[&b"\x80\x04\x95\xff\xff"[..], &[1; 60]].concat()));
        assert!(!holds_pickle(&[&b"\x80\x02\x3f\x3f"[..], &[0; 60]].concat()));
        assert!(!holds_pickle(b""));
        assert!(!holds_pickle(b"\x08\x08onnx"));
    }

    /// An archive with one stored, empty file.
    fn archive(name: &str) -> Vec<u8> {
        let length = u16::try_from(name.len()).unwrap().to_le_bytes();
        let mut bytes =
            [&b"PK\x03\x04\x0a\0\0\0\0\0\0\0\0\0"[..], &[0; 12], &length, &[0; 2], name.as_bytes()].concat();
        let list = [&b"PK\x01\x02\x0a\0\x0a\0"[..], &[0; 20], &length, &[0; 16], name.as_bytes()].concat();
        bytes.extend(list);
        bytes
    }

    #[test]
    fn archives_of_pickles_are_known() {
        assert!(holds_pickle(&archive("archive/data.pkl")));
        assert!(!holds_pickle(&archive("archive/data.json")));
    }
}
