//! `Pointer`: which version of a model an alias, tag, stage or branch points at, and where it pointed before.
//!
//! A registry's lies in the model's folder, so that it outlives a restart with the registry away: a line for each version, the one
//! that it came to last at the end, and the milliseconds since the epoch at which that was seen.

use std::{fmt::Write, fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::id::Version;

/// The file's name. Its dot keeps it out of what stands for a version's files.
pub const POINTER_FILE: &str = ".pointer";

/// Versions that are remembered: far more than are ever kept.
const MOST: usize = 64;

/// A pointer's way, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pointer {
    /// Each version once, in the order in which the pointer came to them last, with the milliseconds since the epoch.
    passed: Vec<(Version, u64)>,
}

impl Pointer {
    /// The pointer of the model in `folder`; one that points at nothing when there is none.
    ///
    /// # Errors
    /// When nobody can tell.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let text = match fs::read_to_string(folder.join(POINTER_FILE)) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                String::new()
            }
            text => text?,
        };
        let entry = |line: &str| {
            let (version, since) = line.split_once(' ')?;
            Some((Version::parse(version).ok().filter(is_folder)?, since.parse().ok()?))
        };
        Ok(Self { passed: text.lines().filter_map(entry).collect() })
    }

    /// The file's text.
    pub fn text(&self) -> String {
        self.passed.iter().fold(String::new(), |mut text, (version, since)| {
            let _ = writeln!(text, "{version} {since}");
            text
        })
    }

    /// Moves it to `version`; whether it was elsewhere.
    pub fn move_to(&mut self, version: &Version, now: u64) -> bool {
        if self.version() == Some(version) {
            return false;
        }
        self.passed.retain(|(passed, _)| passed != version);
        self.passed.push((version.clone(), now));
        let surplus = self.passed.len().saturating_sub(MOST);
        self.passed.drain(..surplus);
        true
    }

    /// Moves it to `version` anew, wherever it was.
    pub fn call(&mut self, version: &Version, now: u64) {
        if !self.move_to(version, now)
            && let Some((_, since)) = self.passed.last_mut()
        {
            *since = now;
        }
    }

    /// What it points at.
    pub fn version(&self) -> Option<&Version> {
        self.passed.last().map(|(version, _)| version)
    }

    /// Since when it points there.
    pub fn since(&self) -> Option<u64> {
        self.passed.last().map(|(_, since)| *since)
    }

    /// The place of a version on its way; later ones have greater places, and those it never came to have none.
    pub fn place(&self, version: &Version) -> Option<usize> {
        self.passed.iter().position(|(passed, _)| passed == version)
    }
}

/// Whether a version's name leads to a folder of its own below the model's.
fn is_folder(version: &Version) -> bool {
    !version.as_str().starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn the_way_is_remembered_in_the_order_of_the_last_visits() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Pointer::read(folder.path()).unwrap(), Pointer::default());
        let mut pointer = Pointer::default();
        assert!(pointer.move_to(&version("2"), 10));
        assert!(pointer.move_to(&version("main-1"), 20));
        assert!(!pointer.move_to(&version("main-1"), 30), "it is there already");
        assert!(pointer.move_to(&version("2"), 40));
        pointer.call(&version("2"), 50);
        fs::write(folder.path().join(POINTER_FILE), pointer.text()).unwrap();
        let read = Pointer::read(folder.path()).unwrap();
        assert_eq!(read, pointer);
        assert_eq!((read.version(), read.since()), (Some(&version("2")), Some(50)));
        assert_eq!(
            [read.place(&version("main-1")), read.place(&version("2")), read.place(&version("7"))],
            [Some(0), Some(1), None]
        );
    }

    #[test]
    fn a_file_of_something_else_points_at_nothing_outside() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(POINTER_FILE), "../x 1\n.. 2\n\n3\nv4 x\nv5 6\n").unwrap();
        assert_eq!(Pointer::read(folder.path()).unwrap().text(), "v5 6\n");
        let mut long = Pointer::default();
        (0..200).for_each(|number| assert!(long.move_to(&version(&number.to_string()), number)));
        assert_eq!((long.text().lines().count(), long.version()), (MOST, Some(&version("199"))));
    }
}
