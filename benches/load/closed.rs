//! The closed loop: every connection always has as many requests open as it may.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{
    Target,
    generator::{Generator, STALL},
};
use crate::machine::{Moment, Usage};

/// What a closed loop found.
#[derive(Clone, Copy, Debug)]
pub struct Saturation {
    /// Replies per second.
    pub rate: f64,
    /// CPU seconds of the server for each reply.
    pub cpu: f64,
    pub usage: Usage,
}

/// Keeps every connection full: for `warm` without looking, then for `window`.
///
/// # Errors
/// When the server cannot be reached, stalls, or fails a single request.
pub fn closed(target: &Target<'_>, warm: Duration, window: Duration) -> Result<Saturation> {
    closed_of(target, warm, window, |_| 1.0, || Ok(()))
}

/// The same where requests differ: a reply counts as much as `weight` says of the place of its message, and `look` is
/// called before the window begins and after it ends.
///
/// # Errors
/// As `closed`, and what `look` fails with.
pub fn closed_of(
    target: &Target<'_>,
    warm: Duration,
    window: Duration,
    weight: impl Fn(usize) -> f64,
    mut look: impl FnMut() -> Result<()>,
) -> Result<Saturation> {
    let mut generator = Generator::connect(target)?;
    let mut begun: Option<Moment> = None;
    let mut replied = 0.0;
    let usage = loop {
        let now = generator.now();
        for connection in &mut generator.connections {
            while connection.wire.has_room() {
                connection.begin(now);
            }
        }
        generator.turn(Some(STALL))?;
        let replies = &mut generator.replies.all;
        let (count, failed) = (replies.len(), replies.iter().filter(|reply| !reply.succeeded).count());
        let counted: f64 = replies.drain(..).map(|reply| weight(reply.message)).sum();
        ensure!(failed == 0, "{failed} of {count} requests failed under full load");
        // The window begins and ends with replies, so that a batch is in it with all of its time or not at all.
        match &begun {
            None if count > 0 && now >= warm => {
                look()?;
                begun = Some(Moment::beside(target.pid)?);
            }
            Some(start) => {
                replied += counted;
                if count > 0 && start.elapsed() >= window {
                    let usage = start.until(&Moment::beside(target.pid)?);
                    look()?;
                    break usage;
                }
            }
            None => {}
        }
    };
    generator.drain()?;
    Ok(Saturation { rate: replied / usage.seconds, cpu: usage.server / replied, usage })
}

/// Keeps every connection full until so many requests have been answered as `lengths` says, one after the other over
/// the same connections, and calls `done` after each.
///
/// # Errors
/// As `closed`.
pub fn exactly(target: &Target<'_>, lengths: &[usize], mut done: impl FnMut() -> Result<()>) -> Result<()> {
    let mut generator = Generator::connect(target)?;
    for &length in lengths {
        let (mut begun, mut answered) = (0, 0);
        while answered < length {
            for connection in &mut generator.connections {
                while begun < length && connection.wire.has_room() {
                    connection.begin(Duration::ZERO);
                    begun += 1;
                }
            }
            generator.turn(Some(STALL))?;
            let replies = &mut generator.replies;
            ensure!(
                replies.all.iter().all(|reply| reply.succeeded),
                "a request failed: {}",
                String::from_utf8_lossy(&replies.body)
            );
            answered += replies.all.len();
            replies.all.clear();
        }
        done()?;
    }
    Ok(())
}
