//! The text that Prometheus scrapes: many recorders' texts as one.

use std::collections::BTreeMap;

/// Joins exposition texts so that each family appears once, with one header.
pub(super) fn merge_families(texts: impl Iterator<Item = String>) -> String {
    #[derive(Default)]
    struct Lines {
        header: String,
        samples: String,
    }
    let mut families: BTreeMap<String, Lines> = BTreeMap::new();
    for text in texts {
        let mut current = String::new();
        let mut fresh = false;
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(header) = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE ")) {
                let name = header.split(' ').next().unwrap_or_default();
                if name != current {
                    current = name.to_owned();
                    fresh = !families.contains_key(name);
                }
                let family = families.entry(current.clone()).or_default();
                if fresh {
                    family.header.push_str(line);
                    family.header.push('\n');
                }
            } else {
                let family = families.entry(current.clone()).or_default();
                family.samples.push_str(line);
                family.samples.push('\n');
            }
        }
    }
    families.into_values().map(|family| family.header + &family.samples).collect()
}
