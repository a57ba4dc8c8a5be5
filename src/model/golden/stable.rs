//! The version that serves now, measured by the cases that its successor answered.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Case, Outcome, Tally, Tolerance, of_case};
use crate::{
    error::{Code, Error},
    model::{ModelVersion, Refused, schedule::Urgency},
    text,
};

/// What it may take to answer a case; a load must not wait for ever for a version that hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is asked a case that it has no time for, and what lies between.
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// When a load is worth another try that could not be compared: it takes some of the processor, of which there may be
/// none to spare.
const LATER: Duration = Duration::from_secs(10);

/// The version that requests get which name none.
pub struct Stable {
    pub version: Arc<ModelVersion>,
    /// Where the time of its queue passes.
    pub runtime: tokio::runtime::Handle,
}

impl Stable {
    /// Compares the accuracy of a version that did as `outcome` says. Blocks when the stable version was not measured
    /// with these cases yet: not for threads of a runtime.
    ///
    /// # Errors
    /// `InvalidArgument` when `outcome` is worse by more than is `allowed`; `Overloaded` when the stable version has no
    /// time to be measured, so that another load is worth it later; why else it could not be measured.
    pub(super) fn compare(
        &self,
        outcome: &Outcome,
        cases: &[Case],
        tolerance: Tolerance,
        allowed: f64,
    ) -> Result<(), Error> {
        let name = &self.version.version;
        let known = self.version.golden.as_ref().filter(|known| known.subject == outcome.subject);
        let accuracy = known.map_or_else(|| self.measure(cases, tolerance), |known| Ok(known.accuracy));
        let accuracy = accuracy.map_err(|error| {
            let message =
                format!("the stable version '{name}' cannot be compared with (golden.max_accuracy_drop): {error}");
            Error { message, ..error }
        })?;
        // A drop of just so much is allowed, whatever the last bit of a difference of shares says.
        if accuracy - outcome.accuracy <= allowed + f64::EPSILON {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "an accuracy of {:.4} is {:.4} below that of the stable version '{name}', {accuracy:.4}, and \
             golden.max_accuracy_drop is {allowed}",
            outcome.accuracy,
            accuracy - outcome.accuracy
        )))
    }

    /// Asks it one case after the other, among everybody's requests.
    fn measure(&self, cases: &[Case], tolerance: Tolerance) -> Result<f64, Error> {
        let mut tally = Tally::default();
        for (index, case) in cases.iter().enumerate() {
            let comparisons =
                self.answer(case).and_then(|outputs| case.compare(&self.version.signature, &outputs, tolerance));
            tally.add(index, case, comparisons.map_err(|error| of_case(index, error))?);
        }
        Ok(tally.accuracy())
    }

    fn answer(&self, case: &Case) -> Result<Vec<crate::tensor::Tensor>, Error> {
        let signature = &self.version.signature;
        case.check(signature)?;
        let inputs = signature.arrange(self.version.name.as_str(), case.inputs.clone())?;
        let mut tries = 0;
        loop {
            let urgency = Urgency { deadline: Some(Instant::now() + PATIENCE), ..Urgency::default() };
            let error = match self.runtime.block_on(self.version.infer(inputs.clone(), &urgency, text::Wish::NONE)) {
                Ok(outputs) => return Ok(outputs),
                Err(Refused::Error(error)) => error,
                Err(Refused::Draining(_)) => Error::new(Code::NotReady, "it went away meanwhile"),
            };
            tries += 1;
            // How busy it is says nothing of its successor.
            if !matches!(error.code, Code::Overloaded | Code::NotReady | Code::DeadlineExceeded) {
                return Err(error);
            }
            if tries == TRIES {
                let message = format!("{error} ({TRIES} tries); the load is tried again in {LATER:?}");
                return Err(Error::overloaded(message, LATER));
            }
            self.runtime.block_on(async { tokio::time::sleep(PAUSE).await });
        }
    }
}
