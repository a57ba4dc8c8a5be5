//! A checkout's settings, as `.dvc/config` has them.

use std::collections::BTreeMap;

/// Texts by section and key.
#[derive(Debug, Default)]
pub struct Settings {
    texts: BTreeMap<(String, String), String>,
}

impl Settings {
    /// Adds those of a file, which hold instead of earlier ones. Lines that make no sense are passed over: they are for
    /// DVC to complain of.
    pub fn add(&mut self, text: &str) {
        let mut section = String::new();
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                section = unquoted(name).to_owned();
            } else if let Some((key, value)) = line.split_once('=') {
                self.texts.insert((section.clone(), key.trim().to_owned()), unquoted(value).to_owned());
            }
        }
    }

    pub fn get(&self, section: &str, key: &str) -> Option<&str> {
        self.texts.get(&(section.to_owned(), key.to_owned())).map(String::as_str)
    }
}

/// A text without spaces and the quotes around it.
fn unquoted(text: &str) -> &str {
    let text = text.trim();
    let without = |quote| text.strip_prefix(quote).and_then(|text| text.strip_suffix(quote));
    without('\'').or_else(|| without('"')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_file_holds() {
        let mut settings = Settings::default();
        settings
            .add("[core]\n    remote = store\n# remote = none\n['remote \"store\"']\n    url = \"s3://bucket/a b\"\n");
        settings.add("[core]\nremote=near\n[remote \"near\"]\nurl = ../remote\nnonsense\n");
        assert_eq!(settings.get("core", "remote"), Some("near"));
        assert_eq!(settings.get("remote \"store\"", "url"), Some("s3://bucket/a b"));
        assert_eq!(settings.get("remote \"near\"", "url"), Some("../remote"));
        assert_eq!(settings.get("cache", "dir"), None);
    }
}
