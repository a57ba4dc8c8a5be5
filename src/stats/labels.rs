//! `Labels`: how often each label came.
//!
//! Memory is bounded whatever comes: labels that are small numbers, as those of most classifiers, have a place each, so
//! that counting one takes a handful of instructions; of others so many are told apart, and the rest is counted as one.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Labels from 0 up to this have a place each.
pub const MAX_CLASSES: usize = 4096;
/// Other labels that are told apart: the first so many that come.
const MAX_NAMED: usize = 1000;
/// Bytes of the longest text that is a label; what is longer is no answer to choose from.
pub const MAX_BYTES: usize = 64;

/// How often each label came.
#[derive(Clone, Debug, Default)]
pub struct Labels {
    classes: Vec<u64>,
    named: HashMap<Box<[u8]>, u64>,
    other: u64,
}

impl Labels {
    /// Counts a label that is a number.
    pub fn class(&mut self, label: i64) {
        let place = usize::try_from(label).ok().filter(|&place| place < MAX_CLASSES);
        match place {
            Some(place) => {
                if place >= self.classes.len() {
                    self.classes.resize(place + 1, 0);
                }
                self.classes[place] += 1;
            }
            None => self.text(itoa::Buffer::new().format(label).as_bytes()),
        }
    }

    /// Counts a label that is a text.
    pub fn text(&mut self, label: &[u8]) {
        if label.len() > MAX_BYTES {
            self.other += 1;
        } else if let Some(count) = self.named.get_mut(label) {
            *count += 1;
        } else if self.named.len() < MAX_NAMED {
            self.named.insert(label.into(), 1);
        } else {
            self.other += 1;
        }
    }

    /// Whether none came.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty() && self.named.is_empty() && self.other == 0
    }

    /// Each label that came, and how often; those of one text are one.
    pub fn counts(&self) -> BTreeMap<Arc<str>, u64> {
        let mut counts = BTreeMap::new();
        let mut text = itoa::Buffer::new();
        for (label, count) in self.classes.iter().enumerate().filter(|(_, count)| **count > 0) {
            counts.insert(Arc::from(text.format(label)), *count);
        }
        for (label, count) in &self.named {
            *counts.entry(String::from_utf8_lossy(label).into()).or_default() += count;
        }
        counts
    }

    /// How many came that are not told apart.
    pub fn other(&self) -> u64 {
        self.other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(labels: &Labels) -> Vec<(String, u64)> {
        labels.counts().into_iter().map(|(label, count)| (label.to_string(), count)).collect()
    }

    #[test]
    fn numbers_and_texts_are_labels() {
        let mut labels = Labels::default();
        [2, 0, 2, -1, 5000, i64::MIN].into_iter().for_each(|label| labels.class(label));
        ["cat", "2", "caf\u{e9}"].into_iter().for_each(|label| labels.text(label.as_bytes()));
        labels.text(b"\xff");
        let expected = [("-1", 1), ("-9223372036854775808", 1), ("0", 1), ("2", 3), ("5000", 1), ("caf\u{e9}", 1)];
        let expected = expected.into_iter().chain([("cat", 1), ("\u{fffd}", 1)]);
        let expected: BTreeMap<String, u64> = expected.map(|(label, count)| (label.to_owned(), count)).collect();
        assert_eq!(counted(&labels), expected.into_iter().collect::<Vec<_>>());
        assert_eq!(labels.other(), 0);
    }

    #[test]
    fn memory_is_bounded_whatever_comes() {
        let mut labels = Labels::default();
        (0..10_000).for_each(|label| labels.class(-label));
        assert_eq!(labels.counts().len(), 1 + MAX_NAMED);
        assert_eq!(labels.other(), 9_999 - MAX_NAMED as u64);
        labels.class(-1);
        labels.text(&[b'x'; MAX_BYTES + 1]);
        assert_eq!((labels.counts()["-1"], labels.other()), (2, 10_000 - MAX_NAMED as u64));
        (0..10_000).for_each(|label| labels.class(label));
        assert!(labels.classes.len() == MAX_CLASSES && labels.named.len() == MAX_NAMED);
    }
}
