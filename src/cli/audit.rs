//! `tidegate audit`: what was changed by whom and why, and whether the log is as it was written.

use std::{path::PathBuf, process::ExitCode, time::SystemTime};

use anyhow::Context;
use clap::{Args, Subcommand};
use humantime_serde::re::humantime::parse_duration;
use serde_json::json;
use toml::Table;

use super::{
    ask::{AskArgs, Ops},
    say,
};
use crate::{
    api::admin::documents::{AuditEntry, AuditPage},
    config::Config,
    control::store::Store,
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
    /// Check that no entry was changed or taken out since it was written, also while a server runs.
    Verify {
        /// The server's data directory [default: as its configuration says]
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
    },
}

/// Runs the command.
///
/// # Errors
/// What is wrong with the log, or keeps it from being read.
pub fn run(args: &AuditArgs) -> anyhow::Result<ExitCode> {
    if let Some(AuditAction::Verify { data }) = &args.action {
        return verify(data.clone(), args.ask.json);
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
            page.entries.iter().for_each(|entry| say(format_args!("{}", line(entry))));
        }
        next = page.next;
    }
    if args.ask.json {
        say(format_args!("{}", serde_json::to_string_pretty(&AuditPage { entries, next: None })?));
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

fn verify(data: Option<PathBuf>, json: bool) -> anyhow::Result<ExitCode> {
    let data = match data {
        Some(data) => data,
        None => {
            let environment = std::env::vars_os()
                .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
            Config::load(None, environment, Table::new())?.0.data_directory()
        }
    };
    let hint = || format!("the audit log in {} cannot be verified; name another folder with --data", data.display());
    let store = Store::open_to_read(&data).with_context(hint)?;
    let entries = store.verify(None).with_context(|| format!("the audit log in {} is broken", data.display()))?.entries;
    if json {
        say(format_args!("{}", json!({ "entries": entries, "whole": true })));
    } else {
        say(format_args!("{entries} entries, all as they were written"));
    }
    Ok(ExitCode::SUCCESS)
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
