//! What a model's author asks of the golden check: where its file lies, and how far answers may be off.

use std::{path::Path, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tensor::DType;

/// What a version must pass before it takes any traffic. Whatever is set, outputs must have the shapes and types that
/// are expected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The name of a *.json file in the version's folder, else beside the versions: a list of cases, each with `inputs`
    /// as in a request and `outputs` as in the right answer, in the protocol's JSON; read whole, 64 MiB at most.
    /// Default: "golden.json" if there is one; with any key of this table there must be.
    pub file: Option<String>,
    /// By how much floats may differ from what is expected; all else must be equal, unless an accuracy is asked for.
    /// Default: 0.0001 (FP16 0.002, BF16 0.02), and that share of numbers above 1; with an accuracy, none.
    pub max_difference: Option<f64>,
    /// The smallest share of right labels, 0 to 1, in each output. A row of floats stands for its largest; single floats
    /// are right within `max_difference` or its default, all else when it is equal.
    pub min_accuracy: Option<f64>,
    /// By how much the accuracy may be below that of the version that serves requests without a version, measured with
    /// the same cases. While none serves, as at a start, any will do.
    pub max_accuracy_drop: Option<f64>,
    /// How long a case may take by itself on this machine, the median of five runs; in processor time for models that
    /// run on one thread.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "Option<String>")]
    pub max_latency: Option<Duration>,
}

impl Settings {
    /// # Errors
    /// What is wrong, naming the key.
    pub fn validate(&self) -> Result<(), String> {
        if let Some(file) = &self.file {
            // Only there a change of the file loads the version anew.
            let name = Path::new(file).file_name();
            if name.is_none_or(|name| name != file.as_str()) || !file.ends_with(".json") {
                return Err(format!("golden.file '{file}' must be the name of a *.json file, without a folder"));
            }
        }
        if let Some(most) = self.max_difference.filter(|most| !(most.is_finite() && *most >= 0.0)) {
            return Err(format!("golden.max_difference must be a number from 0, got {most}"));
        }
        let shares = [("min_accuracy", self.min_accuracy), ("max_accuracy_drop", self.max_accuracy_drop)];
        for (key, share) in shares {
            if let Some(share) = share.filter(|share| !(0.0..=1.0).contains(share)) {
                return Err(format!("golden.{key} must be a number from 0 to 1, got {share}"));
            }
        }
        match self.max_latency {
            Some(Duration::ZERO) => Err("golden.max_latency must be longer than 0".to_owned()),
            _ => Ok(()),
        }
    }

    /// A key that is set, with which the file must be there.
    pub(super) fn wish(&self) -> Option<&'static str> {
        let keys = [
            ("golden.file", self.file.is_some()),
            ("golden.max_difference", self.max_difference.is_some()),
            ("golden.min_accuracy", self.min_accuracy.is_some()),
            ("golden.max_accuracy_drop", self.max_accuracy_drop.is_some()),
            ("golden.max_latency", self.max_latency.is_some()),
        ];
        keys.into_iter().find_map(|(key, is_set)| is_set.then_some(key))
    }

    /// Whether outputs of this type must be right element by element.
    pub(super) fn judges_elements(&self, dtype: DType) -> bool {
        let by_accuracy = self.min_accuracy.is_some() || self.max_accuracy_drop.is_some();
        !by_accuracy || (super::is_float(dtype) && self.max_difference.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        let settings: Settings = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.validate().map(|()| settings)
    }

    #[test]
    fn a_full_table_is_read() {
        let text = "file = \"g.json\"\nmax_difference = 0\nmin_accuracy = 0.9\nmax_accuracy_drop = 0.02\n\
                    max_latency = \"5ms\"";
        let settings = read(text).unwrap();
        assert_eq!(settings.max_latency, Some(Duration::from_millis(5)));
        assert_eq!((settings.max_difference, settings.wish()), (Some(0.0), Some("golden.file")));
        assert_eq!((read("").unwrap(), read("").unwrap().wish()), (Settings::default(), None));
    }

    #[test]
    fn mistakes_name_the_key() {
        for (text, words) in [
            ("file = \"a/g.json\"", "golden.file 'a/g.json'"),
            ("file = \"../g.json\"", "golden.file '../g.json'"),
            ("file = \"/g.json\"", "golden.file '/g.json'"),
            ("file = \"g.json/\"", "golden.file 'g.json/'"),
            ("file = \"..\"", "golden.file '..'"),
            ("file = \"g.txt\"", "*.json"),
            ("max_difference = -1", "golden.max_difference"),
            ("max_difference = nan", "golden.max_difference"),
            ("max_difference = inf", "golden.max_difference"),
            ("min_accuracy = 1.1", "golden.min_accuracy"),
            ("min_accuracy = nan", "golden.min_accuracy"),
            ("max_accuracy_drop = -0.1", "golden.max_accuracy_drop"),
            ("max_latency = \"0s\"", "golden.max_latency"),
            ("latency = \"1s\"", "latency"),
        ] {
            let message = read(text).unwrap_err();
            assert!(message.contains(words), "{text}: {message}");
        }
    }

    #[test]
    fn an_accuracy_takes_the_place_of_equal_elements() {
        let judges = |text: &str| [DType::Fp32, DType::Int64].map(|dtype| read(text).unwrap().judges_elements(dtype));
        assert_eq!(judges(""), [true, true]);
        assert_eq!(judges("max_latency = \"1s\""), [true, true]);
        assert_eq!(judges("max_difference = 1"), [true, true]);
        assert_eq!(judges("min_accuracy = 0.5"), [false, false]);
        assert_eq!(judges("max_accuracy_drop = 0.5"), [false, false]);
        assert_eq!(judges("max_difference = 1\nmin_accuracy = 0.5"), [true, false]);
    }
}
