//! What it takes to count what a version answered: every answer passes here.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use tidegate::{
    backend::{Signature, TensorSpec},
    metrics::Way,
    observe::Tally,
    tensor::{DType, Data, Tensor},
};

/// Answers before those that count, and with them.
const ANSWERS: [usize; 2] = [1_000, 11_000];

/// Counts so many answers of iris: a label and three scores.
///
/// # Errors
/// Never: the tensors are as they should be.
pub fn count(answers: usize) -> Result<()> {
    let tensor = |name: &str, dtype, shape: &[usize], bytes: Vec<u8>| {
        Tensor::new(name.into(), dtype, shape.into(), Data::Plain(bytes.into()))
    };
    let spec = |name: &str, dtype, shape: &[i64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
    let outputs = vec![spec("label", DType::Int64, &[-1]), spec("probabilities", DType::Fp32, &[-1, 3])];
    let tally = Tally::new(&Signature { outputs, ..Signature::default() });
    // As different as they come from the model, so that branches are not always the same.
    let answer = |index: u8| {
        let mut scores = [0.05_f32, 0.04, 0.01];
        scores[usize::from(index % 3)] = 0.5 + f32::from(index) / 64.0;
        let scores = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
        let label = i64::from(index % 3).to_le_bytes().to_vec();
        Ok([tensor("label", DType::Int64, &[1], label)?, tensor("probabilities", DType::Fp32, &[1, 3], scores)?])
    };
    let different = (0..32).map(answer).collect::<Result<Vec<_>>>()?;
    for (index, outputs) in different.iter().cycle().take(answers).enumerate() {
        tally.answered(Way::Stable, Duration::from_micros(100 + index as u64 % 64), outputs);
    }
    let counted = tally.window(Way::Stable).requests;
    ensure!(counted == answers as u64, "{counted} of {answers} answers were counted");
    Ok(())
}

/// Instructions for each answer.
///
/// # Errors
/// When valgrind is missing, or the program fails.
pub fn instructions() -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let [some, all] = ANSWERS.map(|answers| total(folder.path(), answers));
    Ok((all? - some?) / (ANSWERS[1] - ANSWERS[0]) as f64)
}

/// Those of a program that counts so many.
fn total(folder: &Path, answers: usize) -> Result<f64> {
    let profile = folder.join(format!("profile-{answers}"));
    let mut command = Command::new("valgrind");
    command.args(["--quiet", "--tool=callgrind"]).arg(format!("--callgrind-out-file={}", profile.display()));
    let status = command.arg(std::env::current_exe()?).arg("tally").arg(answers.to_string()).status();
    ensure!(status.context("cannot run valgrind")?.success(), "the program that counts answers failed");
    let text = std::fs::read_to_string(&profile).context("callgrind wrote no profile")?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok());
    total.context("a profile has no totals")
}
