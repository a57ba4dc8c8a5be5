//! `magika`, a model of milliseconds, served and in-process.

use std::path::Path;

use anyhow::Result;

use super::{Bench, is_disturbed, repository, target};
use crate::{
    load,
    pairs::{Measured, Pairs},
    report::{Better::Higher, say},
    requests::Protocol,
};

const MAGIKA_BATCHES: [usize; 4] = [1, 2, 4, 8];
/// Enough to fill batches of four while the next four wait; more would only wait longer.
const MAGIKA_CONCURRENCY: (usize, usize) = (4, 2);

impl Bench {
    /// `magika` served, and the same rows in-process.
    pub(super) fn magika(&mut self, files: &Path) -> Result<()> {
        let mut model = self.load(files, |index| (index as u32 % 256).to_le_bytes())?;
        let mut best = (f64::NEG_INFINITY, 1);
        for rows in MAGIKA_BATCHES {
            let rate = rows as f64 / model.run(rows, self.pace.sweep)?.0;
            best = if rate > best.0 { (rate, rows) } else { best };
        }
        let rows = best.1;
        let repository = repository(&[("magika", files)])?;
        let server = self.programs.serve(repository.path())?;
        let request = Protocol::Grpc.request("magika", model.row())?;
        let target = target(&server, Protocol::Grpc, &request, MAGIKA_CONCURRENCY);
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.pairs {
            say(format_args!("magika served and in-process, pair {pair} of {}", self.pace.pairs));
            let served = || {
                let run = load::closed(&target, self.pace.warm, self.pace.long_window)?;
                Ok(Measured { value: run.rate, usage: run.usage, spoiled: is_disturbed(&run.usage) })
            };
            let inprocess = || {
                let (seconds, usage) = model.run(rows, self.pace.long_window)?;
                Ok(Measured { value: rows as f64 / seconds, usage, spoiled: is_disturbed(&usage) })
            };
            pairs.take(served, inprocess)?;
        }
        let inprocess = format!("`magika` in-process, batches of {rows}, the best of {MAGIKA_BATCHES:?}");
        let report = &mut self.report;
        report.median("magika_rps", "`magika` served over gRPC", "rows/s", Higher, &pairs.values(|ours, _| *ours));
        report.median("magika_inprocess_rps", &inprocess, "rows/s", Higher, &pairs.values(|_, bare| *bare));
        let ratios = pairs.values(|ours, bare| ours / bare);
        report.median("magika_vs_inprocess", "`magika`: served ÷ in-process", "", Higher, &ratios);
        self.foreign.extend(pairs.foreign());
        Ok(())
    }
}
