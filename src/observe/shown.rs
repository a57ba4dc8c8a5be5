//! `Shown`: the labels of an output that have a series of their own, and what each series says.
//!
//! The labels that came most often change while they are counted, and a counter must never fall. So a series tells what
//! came while its label was among them, and "other" tells the rest: from the moment that a label takes another's place,
//! it counts on its own, and what it counted before stays where it was.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    metrics::{OTHER, SHOWN_LABELS},
    stats::labels::MAX_BYTES,
};

/// What the last scrape said.
#[derive(Default)]
pub(super) struct Shown {
    told: HashMap<String, Told>,
    /// How many there were that nobody tells apart.
    unnamed: u64,
    other: u64,
}

#[derive(Clone, Copy, Default)]
struct Told {
    /// How often the label had come.
    seen: u64,
    /// How many of those its own series tells.
    own: u64,
}

impl Shown {
    /// What each series says now, and what "other" says. `counts` and `unnamed` are what came so far; `names` are those
    /// of the classes, by index.
    pub(super) fn tell(
        &mut self,
        counts: &BTreeMap<Arc<str>, u64>,
        unnamed: u64,
        names: &[Box<str>],
    ) -> (Vec<(&str, u64)>, u64) {
        let mut named: BTreeMap<String, u64> = BTreeMap::new();
        for (label, count) in counts {
            *named.entry(name(label, names)).or_default() += count;
        }
        self.other += unnamed - self.unnamed;
        self.unnamed = unnamed;
        let mut all: Vec<(&String, u64)> = named.iter().map(|(label, count)| (label, *count)).collect();
        all.sort_by_key(|(label, count)| (*label == OTHER, Reverse(*count)));
        let mut shown = Vec::new();
        for (place, (label, count)) in all.into_iter().enumerate() {
            // Made only where it is missing: thousands of labels may have been told before.
            if !self.told.contains_key(label) {
                self.told.insert(label.clone(), Told::default());
            }
            let Some(told) = self.told.get_mut(label) else { continue };
            let fresh = count - told.seen;
            told.seen = count;
            if place < SHOWN_LABELS && label != OTHER {
                told.own += fresh;
                shown.push(label);
            } else {
                self.other += fresh;
            }
        }
        let told = &self.told;
        let series = shown.into_iter().filter_map(|label| told.get_key_value(label));
        (series.map(|(label, told)| (label.as_str(), told.own)).collect(), self.other)
    }
}

/// What a label is called: as its class, if that has a name, and not for too long.
fn name(label: &str, names: &[Box<str>]) -> String {
    let class = label.parse().ok().and_then(|index: usize| names.get(index)).filter(|name| !name.is_empty());
    let text = class.map_or(label, |name| name);
    if text.len() <= MAX_BYTES {
        return text.to_owned();
    }
    let mut text = text[..text.floor_char_boundary(MAX_BYTES)].to_owned();
    text.push('…');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tell(shown: &mut Shown, counts: &[(&str, u64)], unnamed: u64) -> (BTreeMap<String, u64>, u64) {
        let counts = counts.iter().map(|(label, count)| (Arc::from(*label), *count)).collect();
        let (series, other) = shown.tell(&counts, unnamed, &[]);
        (series.into_iter().map(|(label, count)| (label.to_owned(), count)).collect(), other)
    }

    #[test]
    fn those_that_came_most_often_are_shown_and_no_counter_falls() {
        let labels: Vec<String> = (0..30).map(|label| format!("l{label:02}")).collect();
        let mut counts: Vec<(&str, u64)> = labels.iter().map(|label| (label.as_str(), 10)).collect();
        counts[29].1 = 1;
        let mut shown = Shown::default();
        let (first, other) = tell(&mut shown, &counts, 7);
        assert_eq!((first.len(), first["l00"], other), (SHOWN_LABELS, 10, 9 * 10 + 1 + 7));
        // The rarest becomes the most frequent, and takes the place of one that is told no more.
        counts[29].1 = 1001;
        counts[0].1 = 25;
        let (second, other) = tell(&mut shown, &counts, 9);
        assert_eq!((second.len(), second["l29"], second["l00"], other), (SHOWN_LABELS, 1000, 25, 98 + 2));
        assert!(!second.contains_key("l19"));
        // Back again, it goes on where it was.
        counts[19].1 = 40;
        let (third, other) = tell(&mut shown, &counts, 9);
        assert_eq!((third["l19"], third["l29"], other), (40, 1000, 100));
        let (fourth, same) = tell(&mut shown, &counts, 9);
        assert_eq!((fourth, same), (third, other));
    }

    #[test]
    fn all_series_together_are_all_that_came() {
        let mut shown = Shown::default();
        let labels: Vec<String> = (0..100).map(|label| label.to_string()).collect();
        let mut counts = vec![0; labels.len()];
        for round in 0..50_usize {
            for (label, count) in counts.iter_mut().enumerate() {
                *count += ((label * 31 + round * 17) % 97) as u64;
            }
            let pairs: Vec<(&str, u64)> = labels.iter().map(String::as_str).zip(counts.iter().copied()).collect();
            let (_, other) = tell(&mut shown, &pairs, round as u64);
            let own: u64 = shown.told.values().map(|told| told.own).sum();
            assert_eq!(own + other, counts.iter().sum::<u64>() + round as u64);
        }
    }

    #[test]
    fn classes_have_their_names() {
        let names: Vec<Box<str>> = ["cat", "", "crane", "crane", "other"].map(Box::from).to_vec();
        let counts = ["0", "1", "2", "3", "4", "5", "dog"].map(|label| (Arc::from(label), 2)).into_iter().collect();
        let mut shown = Shown::default();
        let (series, other) = shown.tell(&counts, 1, &names);
        let series: BTreeMap<&str, u64> = series.into_iter().collect();
        assert_eq!(series, BTreeMap::from([("cat", 2), ("1", 2), ("crane", 4), ("5", 2), ("dog", 2)]));
        assert_eq!(other, 3, "a class of the name is not told from the rest");
        assert_eq!(name(&"é".repeat(40), &[]), format!("{}…", "é".repeat(32)));
    }
}
