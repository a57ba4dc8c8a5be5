//! How long the server takes to start.

use anyhow::Result;

use super::{Bench, repository, watched};
use crate::{
    pairs::Pairs,
    report::{Better::Lower, say},
};

impl Bench {
    /// From exec to ready, above what it takes to load the library and the session.
    pub(super) fn start(&mut self) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        say(format_args!("{} starts", self.pace.starts));
        let mut pairs = Pairs::new();
        for _ in 0..self.pace.starts {
            let start = || Ok(self.programs.serve(repository.path())?.ready_after.as_secs_f64() * 1e3);
            let load = || Ok(self.programs.session_load(&self.iris)? * 1e3);
            pairs.take(|| watched(start), || watched(load))?;
        }
        let report = &mut self.report;
        report.median("ready_ms", "exec to ready with `iris`", "ms", Lower, &pairs.values(|ready, _| *ready));
        let title = "library and `iris` session loaded in-process";
        report.median("load_ms", title, "ms", Lower, &pairs.values(|_, load| *load));
        let title = "exec to ready above session load";
        report.median("start_ms", title, "ms", Lower, &pairs.values(|ready, load| ready - load));
        Ok(())
    }
}
