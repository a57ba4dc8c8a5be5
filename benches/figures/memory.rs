//! What the server and its models hold in memory.

use std::path::Path;

use anyhow::Result;

use super::{Bench, repository};
use crate::{machine::resident, report::Better::Lower, statistics::median};

const MEGABYTE: f64 = 1e6;

impl Bench {
    /// Resident memory with no model, and what models add.
    pub(super) fn memory(&mut self, magika: Option<&Path>) -> Result<()> {
        let measure = |models: &[(&str, &Path)]| -> Result<f64> {
            let repository = repository(models)?;
            let sizes: Vec<f64> = (0..3)
                .map(|_| Ok(resident(self.programs.serve(repository.path())?.id())? / MEGABYTE))
                .collect::<Result<_>>()?;
            Ok(median(&sizes))
        };
        let idle = measure(&[])?;
        let mut added = Vec::new();
        let models = [("iris", Some(self.iris.as_path())), ("magika", magika)];
        for (name, files) in models.into_iter().filter_map(|(name, files)| Some((name, files?))) {
            let file = std::fs::metadata(files.join("model.onnx"))?.len() as f64 / MEGABYTE;
            added.push((name, file, measure(&[(name, files)])? - idle));
        }
        self.report.single("idle_rss_mb", "resident memory, ready with no model", "MB", Lower, idle, None);
        for (name, file, more) in added {
            let title = format!("resident memory that `{name}` adds (its file: {file:.1} MB)");
            self.report.single(&format!("{name}_rss_mb"), &title, "MB", Lower, more, None);
        }
        Ok(())
    }
}
