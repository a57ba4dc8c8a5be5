//! `tidegate audit`: what was changed by whom and why, and whether the log is as it was written.

use std::{path::PathBuf, process::ExitCode, time::SystemTime};

use anyhow::Context;
use clap::{Args, Subcommand};
use humantime_serde::re::humantime::parse_duration;
use serde_json::json;
use toml::Table;

use super::{
    ConfigFile,
    ask::{AskArgs, Ops},
    print::{say, say_json},
};
use crate::{
    api::admin::documents::{AuditEntry, AuditPage},
    control::store::{Store, Verified},
    error::Code,
    id::ModelName,
};

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct AuditArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// Name of a model; without it, the changes of all
    #[arg(value_parser = ModelName::parse)]
    model: Option<ModelName>,
    /// How far back: 1h for instance, or a time like 2026-03-01T12:00:00Z
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    #[command(subcommand)]
    action: Option<AuditAction>,
}

#[derive(Subcommand)]
enum AuditAction {
    /// Check that no entry was changed, put in or taken out since it was written, also while a server runs.
    ///
    /// Each entry holds the hash of the one before, and the end of the chain is kept beside it. There is no key to it:
    /// whoever may write the server's files can write all of the log anew, or begin another, and no hash in it will tell.
    /// What tells is one that was noted down elsewhere: keep the hash that this command prints, or the server's own log,
    /// which has that of each entry, and give it with --head later.
    ///
    /// The exit code is 0 for a log that is as it was written, 2 for one that is not, and 1 when it cannot be read.
    Verify(VerifyArgs),
}

#[derive(Args)]
struct VerifyArgs {
    #[command(flatten)]
    file: ConfigFile,
    /// The server's data directory [default: as its configuration says]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// A hash that was noted down earlier, which an entry must have
    #[arg(long, value_name = "HASH", value_parser = hash)]
    head: Option<String>,
}

/// The exit code for a log that is not as it was written.
const BROKEN: u8 = 2;

/// Runs the command.
///
/// # Errors
/// What is wrong with the log, or keeps it from being read.
pub fn run(args: &AuditArgs) -> anyhow::Result<ExitCode> {
    if let Some(AuditAction::Verify(which)) = &args.action {
        return verify(which, args.ask.json);
    }
    let since = args.since.as_deref().map(|text| since(text, SystemTime::now())).transpose()?;
    let given = [("model", args.model.as_ref().map(ToString::to_string)), ("since", since)];
    let given = given.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?)));
    let ops = Ops::with_token(&args.ask)?;
    let mut entries = Vec::new();
    let mut next = Some(format!("/admin/v1/audit?{}", given.collect::<Vec<_>>().join("&")));
    while let Some(path) = next.take() {
        let page: AuditPage = ops.get(&path)?.read()?;
        if args.ask.json {
            entries.extend(page.entries);
        } else {
            page.entries.iter().try_for_each(|entry| say(format_args!("{}", line(entry))))?;
        }
        next = page.next;
    }
    if args.ask.json {
        say_json(&AuditPage { entries, next: None })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A time as the server takes it.
fn since(text: &str, now: SystemTime) -> anyhow::Result<String> {
    let Ok(back) = parse_duration(text) else {
        // What has a sign of its own in a query is sent by its number.
        let plain =
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-:.+".contains(&byte));
        anyhow::ensure!(plain, "--since must be a time like 1h or 2026-03-01T12:00:00Z, got '{text}'");
        return Ok(text.to_owned());
    };
    let then = now.checked_sub(back).and_then(|then| then.duration_since(SystemTime::UNIX_EPOCH).ok());
    Ok(then.unwrap_or_default().as_millis().to_string())
}

fn line(entry: &AuditEntry) -> String {
    let AuditEntry { number, at, model, author, action, reason, .. } = entry;
    let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    format!("{number:>6}  {at}  {model}  {action} by {author}{reason}")
}

fn verify(args: &VerifyArgs, json: bool) -> anyhow::Result<ExitCode> {
    let data = match &args.data {
        Some(data) => data.clone(),
        None => args.file.load(Table::new())?.0.data_directory(),
    };
    let hint = || format!("the audit log in {} cannot be verified; name another folder with --data", data.display());
    let store = Store::open_to_read(&data).with_context(hint)?;
    match store.verify(args.head.as_deref()) {
        Ok(Verified { entries, head }) if json => {
            say_json(&json!({ "whole": true, "entries": entries, "head": head }))?;
        }
        Ok(Verified { entries: 0, .. }) => say(format_args!("no entries yet"))?,
        Ok(Verified { entries, head }) => {
            say(format_args!("{entries} entries, all as they were written; the last has the hash"))?;
            say(format_args!("{head}"))?;
        }
        Err(error) if error.code == Code::Conflict => {
            if json {
                say_json(&json!({ "whole": false, "error": error.message }))?;
            } else {
                say(format_args!("the audit log in {} is broken: {error}", data.display()))?;
            }
            return Ok(ExitCode::from(BROKEN));
        }
        Err(error) => return Err(error).with_context(hint),
    }
    Ok(ExitCode::SUCCESS)
}

/// A hash as `verify` prints it.
fn hash(text: &str) -> Result<String, &'static str> {
    let is_hash = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_hash { Ok(text.to_ascii_lowercase()) } else { Err("it must be the 64 hexadecimal digits of a hash") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_time_is_told_in_either_form() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(7200);
        assert_eq!(since("1h", now).unwrap(), "3600000");
        assert_eq!(since("1d", now).unwrap(), "0");
        assert_eq!(since("2026-03-01T12:00:00+01:00", now).unwrap(), "2026-03-01T12:00:00+01:00");
        for wrong in ["", "an hour ago", "1&model=x"] {
            assert!(since(wrong, now).unwrap_err().to_string().contains("--since"), "{wrong}");
        }
    }
}
