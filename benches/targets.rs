//! What figures must reach, and what they may dream of: the one table of both.

/// What a figure is measured against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    pub target: f64,
    pub stretch: f64,
}

/// A figure that is found for several workloads has a workload behind its name, all with the same goal.
const WORKLOADS: [&str; 2] = ["_w4", "_magika"];

/// Names, targets and stretches.
const GOALS: [(&str, f64, f64); 41] = [
    ("w1_grpc_vs_echo", 0.80, 0.90),
    ("w1_json_vs_echo", 0.75, 0.85),
    ("w1_binary_vs_json", 1.0, 1.2),
    ("w1_grpc_rps", 50_000.0, 70_000.0),
    ("w1_json_rps", 60_000.0, 80_000.0),
    ("roofline_w1", 0.90, 0.95),
    ("roofline_digits", 0.90, 0.95),
    ("roofline_w3", 0.95, 0.98),
    ("roofline_magika", 0.95, 0.98),
    ("magika_vs_inprocess", 0.97, 0.99),
    ("w3_grpc_vs_echo", 0.90, 1.0),
    ("w3_binary_vs_echo", 0.90, 1.0),
    ("added_p50_us", 50.0, 20.0),
    ("added_p99_us", 200.0, 100.0),
    ("queue50_p50", 1.10, 1.05),
    ("queue50_p99", 1.25, 1.10),
    ("queue80_p50", 1.10, 1.05),
    ("queue80_p99", 1.25, 1.10),
    ("goodput_2x", 0.95, 0.97),
    ("reject_p99_ms", 5.0, 1.0),
    ("fairness_p99", 1.5, 1.2),
    ("instructions", 15_000.0, 6_000.0),
    ("allocations", 5.0, 0.0),
    ("copies_in", 2.0, 1.0),
    ("copies_out", 1.0, 0.0),
    ("swap_failures", 0.0, 0.0),
    ("swap_p99", 1.2, 1.05),
    ("shadow_p99", 1.1, 1.05),
    ("shadow_dense_p99", 1.1, 1.05),
    ("load_p99_1core", 2.0, 1.2),
    ("load_p99_2core", 1.2, 1.05),
    ("model_memory", 1.15, 1.05),
    ("executors_memory", 2.2, 1.3),
    ("idle_mb", 40.0, 28.0),
    ("start_ms", 100.0, 30.0),
    ("cycles_memory", 1.05, 1.01),
    ("text_vs_inprocess", 0.95, 0.98),
    ("text_budget_vs_fixed", 1.3, 1.5),
    ("text_padding", 10.0, 5.0),
    ("text_memory", 1.3, 1.15),
    ("text_tokenization", 5.0, 2.0),
];

/// Below zero these say that noise is larger than what is added, and not how little that is.
const NEVER_NEGATIVE: [&str; 2] = ["added_p50_us", "added_p99_us"];

/// Whether a value of the figure `name` that is below zero is noise.
pub fn is_never_negative(name: &str) -> bool {
    NEVER_NEGATIVE.contains(&name)
}

/// What is expected of the figure `name`; most are only reported.
pub fn goal(name: &str) -> Option<Goal> {
    let of = |name: &str| GOALS.iter().find(|goal| goal.0 == name);
    let shared = || WORKLOADS.iter().find_map(|workload| of(name.strip_suffix(workload)?));
    let &(_, target, stretch) = of(name).or_else(shared)?;
    Some(Goal { target, stretch })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_found_by_name_and_for_every_workload() {
        assert_eq!(goal("w1_grpc_vs_echo"), Some(Goal { target: 0.80, stretch: 0.90 }));
        assert_eq!(goal("queue80_p99_w4"), Some(Goal { target: 1.25, stretch: 1.10 }));
        // A workload's name at the end is no workload where the whole name has a goal of its own.
        assert_eq!(goal("roofline_magika"), Some(Goal { target: 0.95, stretch: 0.98 }));
        assert_eq!(goal("w1_grpc_echo_rps"), None);
        assert_eq!(goal("queue80_p99_w5"), None);
        assert!(goal("fairness_p99_magika").is_some() && goal("fairness_p99_4_magika").is_none());
    }

    #[test]
    fn no_name_stands_twice() {
        for (index, (name, ..)) in GOALS.iter().enumerate() {
            assert!(GOALS[..index].iter().all(|goal| goal.0 != *name), "{name}");
        }
    }
}
