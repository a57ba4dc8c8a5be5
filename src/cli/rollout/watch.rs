//! A rollout's progress as it happens: redrawn in a terminal, line by line elsewhere.

use std::{
    io::IsTerminal,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::bail;
use http::StatusCode;

use super::{
    super::{
        ask::{Answer, Ops, Refused},
        print::{print, say, say_json_line, seen},
    },
    advised, path,
    progress::{change, fold, is_over, lines},
};
use crate::{api::admin::documents::RolloutStatus, id::ModelName, rollout::Phase};

/// How often the server is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long it may be away: a restart does not end a rollout.
const PATIENCE: Duration = Duration::from_secs(60);
/// The narrowest terminal on which all is seen.
const WIDTH: usize = 80;
/// Changes that are shown below the progress in a terminal.
const SHOWN: usize = 6;

/// Follows a model's rollout until it is over; the exit code says whether the candidate was promoted for good.
///
/// # Errors
/// When the server refuses to tell, is away for too long, or has another rollout of the model.
pub fn watch(ops: &Ops, model: &ModelName, json: bool) -> anyhow::Result<ExitCode> {
    let mut id = None;
    let mut screen = Screen::new(json);
    loop {
        let answer = patiently(ops, model, id.is_some())?;
        let status: RolloutStatus = answer.read()?;
        let watched = id.get_or_insert_with(|| status.id.clone());
        if *watched != status.id {
            bail!("rollout '{watched}' has made way for '{}': `tidegate rollout status {model}`", status.id);
        }
        screen.draw(&status, &answer)?;
        if is_over(status.phase) {
            return Ok(if status.phase == Phase::Done { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Asks until the server answers. One that has just started may yet know nothing of a rollout that was `seen`.
fn patiently(ops: &Ops, model: &ModelName, seen: bool) -> anyhow::Result<Answer> {
    let begin = Instant::now();
    loop {
        let error = match ops.get(&path(model)) {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let refused = error.downcast_ref::<Refused>().map(|refused| refused.status);
        let passes = match refused {
            Some(status) => seen && (status == StatusCode::NOT_FOUND || status.is_server_error()),
            None => seen,
        };
        if !passes || begin.elapsed() > PATIENCE {
            return Err(advised(error, model));
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Where the progress is shown.
enum Screen {
    /// As many lines as were drawn last are drawn over.
    Terminal { drawn: usize },
    /// As many changes as were told are not told again.
    Lines { told: usize },
    /// The document, whenever the epoch is another or the judge has looked.
    Json { last: Option<(u64, u64)> },
}

impl Screen {
    fn new(json: bool) -> Self {
        match json {
            true => Self::Json { last: None },
            false if std::io::stdout().is_terminal() => Self::Terminal { drawn: 0 },
            false => Self::Lines { told: 0 },
        }
    }

    fn draw(&mut self, status: &RolloutStatus, answer: &Answer) -> anyhow::Result<()> {
        match self {
            Self::Terminal { drawn } => {
                let frame = frame(status);
                // Up over the last frame, and all below wiped; lines are cut at the terminal's edge, lest they take
                // two.
                let up = if *drawn > 0 { format!("\x1b[{drawn}A") } else { String::new() };
                print(&format!("{up}\r\x1b[J\x1b[?7l{}\x1b[?7h", frame.concat()))?;
                *drawn = frame.len();
            }
            Self::Lines { told } => {
                let new = status.history.iter().skip(*told);
                new.map(change).try_for_each(|line| say(format_args!("{line}")))?;
                *told = status.history.len();
                if is_over(status.phase) {
                    lines(status).iter().try_for_each(|line| say(format_args!("{line}")))?;
                }
            }
            Self::Json { last } => {
                let now = Some((status.epoch, status.samples));
                if *last != now {
                    say_json_line(&answer.read::<serde_json::Value>()?)?;
                    *last = now;
                }
            }
        }
        Ok(())
    }
}

/// Lines of a terminal, each with its end.
fn frame(status: &RolloutStatus) -> Vec<String> {
    let skipped = status.history.len().saturating_sub(SHOWN);
    let changes = status.history.iter().skip(skipped).map(|transition| format!("  {}", change(transition)));
    let folded = lines(status).into_iter().chain(changes).flat_map(|line| fold(&seen(&line), WIDTH - 1));
    folded.map(|line| line + "\n").collect()
}
