//! How rollouts stand and whether copies agree, as series.

use std::time::Duration;

use super::{
    families::{
        ROLLOUT_PHASE, ROLLOUT_STEP, ROLLOUT_STEP_AGE, ROLLOUT_STEP_DURATION, ROLLOUT_VERDICT, ROLLOUT_WEIGHT,
        SHADOW_COMPARED, SHADOW_COSINE, SHADOW_DISAGREED, SHADOW_FAILED, SHADOW_MAX_DIFFERENCE, SHADOW_MEAN_DIFFERENCE,
        SHADOW_MISSING,
    },
    page::Page,
};

/// How a model's current or last rollout stands.
pub struct RolloutStanding<'a> {
    pub model: &'a str,
    pub rollout: &'a str,
    pub phase: &'a str,
    /// All phases that there are.
    pub phases: &'a [&'a str],
    /// The candidate's share of the requests, 0 to 1.
    pub weight: f64,
    pub step: usize,
    /// Since it came to this phase and step.
    pub age: Duration,
    /// What the step takes at least and at most, while it takes place.
    pub bounds: Option<[Duration; 2]>,
    /// By metric: -1 for worse, 0 for inconclusive, 1 for good.
    pub verdicts: Vec<(&'a str, i8)>,
}

/// How the answers of a version to copies compare with the live ones.
pub struct CopiesCompared<'a> {
    pub model: &'a str,
    pub version: &'a str,
    pub failed: u64,
    /// Copies without an answer, by reason.
    pub missing: &'a [(&'a str, u64)],
    pub outputs: Vec<OutputCompared<'a>>,
}

/// The same of one output.
pub struct OutputCompared<'a> {
    pub output: &'a str,
    pub compared: u64,
    pub disagreed: u64,
    /// The largest absolute difference of two elements so far, the mean one, and the mean cosine of answers: of outputs
    /// of numbers.
    pub max_difference: Option<f64>,
    pub mean_difference: Option<f64>,
    pub cosine: Option<f64>,
}

impl Page {
    /// Shows how a rollout stands.
    pub fn rollout(&mut self, of: &RolloutStanding<'_>) {
        let series = [("model", of.model), ("rollout", of.rollout)];
        let [model, rollout] = series;
        for phase in of.phases {
            self.sample(ROLLOUT_PHASE, &[model, rollout, ("phase", phase)], u8::from(*phase == of.phase));
        }
        self.sample(ROLLOUT_WEIGHT, &series, of.weight);
        self.sample(ROLLOUT_STEP, &series, of.step);
        self.sample(ROLLOUT_STEP_AGE, &series, of.age.as_secs_f64());
        for (bound, duration) in ["min", "max"].into_iter().zip(of.bounds.into_iter().flatten()) {
            self.sample(ROLLOUT_STEP_DURATION, &[model, rollout, ("bound", bound)], duration.as_secs_f64());
        }
        for (metric, verdict) in &of.verdicts {
            self.sample(ROLLOUT_VERDICT, &[model, rollout, ("metric", metric)], verdict);
        }
    }

    /// Shows how the answers to copies compare with the live ones.
    pub fn copies(&mut self, of: &CopiesCompared<'_>) {
        let series @ [model, version] = [("model", of.model), ("version", of.version)];
        self.sample(SHADOW_FAILED, &series, of.failed);
        for (reason, missing) in of.missing {
            self.sample(SHADOW_MISSING, &[model, version, ("reason", reason)], missing);
        }
        for found in &of.outputs {
            let series = [model, version, ("output", found.output)];
            self.sample(SHADOW_COMPARED, &series, found.compared);
            self.sample(SHADOW_DISAGREED, &series, found.disagreed);
            let gauges = [
                (SHADOW_MAX_DIFFERENCE, found.max_difference),
                (SHADOW_MEAN_DIFFERENCE, found.mean_difference),
                (SHADOW_COSINE, found.cosine),
            ];
            for (family, value) in gauges {
                if let Some(value) = value {
                    self.sample(family, &series, value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollout_shows_where_it_is() {
        let mut page = Page::default();
        page.rollout(&RolloutStanding {
            model: "m",
            rollout: "m/r3",
            phase: "canary",
            phases: &["canary", "done"],
            weight: 0.05,
            step: 1,
            age: Duration::from_millis(1500),
            bounds: Some([60, 1800].map(Duration::from_secs)),
            verdicts: vec![("errors", 1), ("distribution of 'y'", -1)],
        });
        let text = page.text();
        for line in [
            r#"tidegate_rollout_phase{model="m",rollout="m/r3",phase="canary"} 1"#,
            r#"tidegate_rollout_phase{model="m",rollout="m/r3",phase="done"} 0"#,
            r#"tidegate_rollout_weight_ratio{model="m",rollout="m/r3"} 0.05"#,
            r#"tidegate_rollout_step{model="m",rollout="m/r3"} 1"#,
            r#"tidegate_rollout_step_age_seconds{model="m",rollout="m/r3"} 1.5"#,
            r#"tidegate_rollout_step_duration_seconds{model="m",rollout="m/r3",bound="min"} 60"#,
            r#"tidegate_rollout_step_duration_seconds{model="m",rollout="m/r3",bound="max"} 1800"#,
            r#"tidegate_rollout_verdict{model="m",rollout="m/r3",metric="distribution of 'y'"} -1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn copies_show_what_they_answered() {
        let output = |output, max_difference| OutputCompared {
            output,
            compared: 10,
            disagreed: 2,
            max_difference,
            mean_difference: max_difference,
            cosine: None,
        };
        let outputs = vec![output("label", None), output("scores", Some(0.25))];
        let mut page = Page::default();
        page.copies(&CopiesCompared { model: "m", version: "2", failed: 3, missing: &[("full", 4)], outputs });
        let text = page.text();
        for line in [
            r#"tidegate_shadow_failed_total{model="m",version="2"} 3"#,
            r#"tidegate_shadow_missing_total{model="m",version="2",reason="full"} 4"#,
            r#"tidegate_shadow_disagreed_total{model="m",version="2",output="label"} 2"#,
            r#"tidegate_shadow_difference_max{model="m",version="2",output="scores"} 0.25"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("cosine") && !text.contains(r#"difference_max{model="m",version="2",output="label""#));
    }
}
