//! `tidegate cache`: what is kept of models that are elsewhere, whether it is whole, and what may go.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use humantime_serde::re::humantime::{format_rfc3339_seconds, parse_duration};
use serde_json::json;
use toml::Table;

use super::{
    ConfigFile,
    print::{say, say_json},
};
use crate::{
    config::Config,
    source::{
        SourceError,
        cache::{
            Cache,
            evict::{self, Kept},
            mirror::{self, User},
        },
    },
};

#[derive(Args)]
pub struct CacheArgs {
    #[command(subcommand)]
    action: CacheAction,
}

#[derive(Subcommand)]
enum CacheAction {
    /// List the files in the cache and the versions that use them, also while a server runs
    Ls(Which),
    /// Read every file, and say which are not what was fetched, also while a server runs
    ///
    /// The exit code is 0 when all are, 2 when some are not, and 1 when the cache cannot be read.
    Verify(Verify),
    /// Delete the files that no version uses, while no server uses the cache
    Prune(Prune),
}

#[derive(Args)]
struct Verify {
    #[command(flatten)]
    which: Which,
    /// Take files that are not what was fetched out of the cache, with the versions that use them, so that the server
    /// fetches them anew when it starts; while no server uses the cache
    #[arg(long)]
    repair: bool,
}

#[derive(Args)]
struct Prune {
    #[command(flatten)]
    which: Which,
    /// Delete before that what is mirrored of places that no server has looked at for so long, such as 30days
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    unused_for: Option<Duration>,
}

#[derive(Args)]
struct Which {
    #[command(flatten)]
    file: ConfigFile,
    /// The cache [default: as the server's configuration says]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The exit code for files that are not what was fetched.
const BROKEN: u8 = 2;
/// Servers that run say several times a day that they use a mirror.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Runs the command.
///
/// # Errors
/// What keeps the cache from being read or changed.
pub fn run(args: &CacheArgs) -> anyhow::Result<ExitCode> {
    match &args.action {
        CacheAction::Ls(which) => ls(&which.open()?.0, which.json),
        CacheAction::Verify(args) => verify(&args.which.open()?, args),
        CacheAction::Prune(args) => prune(&args.which.open()?, args),
    }
}

impl Which {
    fn open(&self) -> anyhow::Result<(PathBuf, Config)> {
        let (config, _) = self.file.load(Table::new())?;
        let root = self.cache.clone().unwrap_or_else(|| config.cache_directory());
        if !root.join("blobs").is_dir() {
            bail!("there is no cache in {}; name another folder with --cache", root.display());
        }
        Ok((root, config))
    }
}

fn ls(root: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let (kept, users) = (evict::list(root)?, mirror::users(root)?);
    let used_by = |kept: &Kept| -> Vec<User> {
        let digest = kept.digest.map(|digest| digest.hex()).unwrap_or_default();
        users.get(&digest).cloned().unwrap_or_default()
    };
    if json {
        let shown = kept.iter().map(|kept| {
            json!({
                "path": kept.path, "digest": kept.digest.map(|digest| digest.to_string()), "bytes": kept.size,
                "used": kept.used, "versions": names(&used_by(kept)),
                "unused_since": unused_since(&used_by(kept)).map(|since| format_rfc3339_seconds(since).to_string()),
            })
        });
        say_json(&shown.collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    say(format_args!("{:<71} {:>14} USED BY", "FILE", "BYTES"))?;
    for kept in &kept {
        let name = kept.digest.map_or_else(|| "(not complete)".to_owned(), |digest| digest.to_string());
        let users = used_by(kept);
        let mut versions = names(&users).join(", ");
        if let Some(since) = unused_since(&users) {
            versions = format!("{versions} (unused since {})", format_rfc3339_seconds(since));
        }
        // The files beside versions are in no list of a version.
        let versions = if versions.is_empty() && kept.used { "settings" } else { &versions };
        say(format_args!("{name:<71} {:>14} {versions}", kept.size))?;
    }
    let (bytes, used) = (total(&kept, |_| true), total(&kept, |kept| kept.used));
    say(format_args!("{} files, {bytes} bytes; {used} of them are used", kept.len()))?;
    Ok(ExitCode::SUCCESS)
}

fn names(users: &[User]) -> Vec<&str> {
    users.iter().map(|user| user.version.as_str()).collect()
}

/// Since when no server has used any of the mirrors that a file is in, when that is longer ago than servers let pass.
fn unused_since(users: &[User]) -> Option<SystemTime> {
    let used = users.iter().map(|user| user.used).max()?;
    used.elapsed().is_ok_and(|elapsed| elapsed >= DAY).then_some(used)
}

fn total(kept: &[Kept], which: impl Fn(&Kept) -> bool) -> u64 {
    kept.iter().filter(|kept| which(kept)).map(|kept| kept.size).sum()
}

fn verify((root, config): &(PathBuf, Config), args: &Verify) -> anyhow::Result<ExitCode> {
    let hint = || format!("cannot repair {}", root.display());
    let cache = args.repair.then(|| Cache::open(root, &config.cache).map(Arc::new)).transpose().with_context(hint)?;
    let users = mirror::users(root)?;
    let (mut files, mut bytes, mut broken) = (0, 0, Vec::new());
    for kept in evict::list(root)?.iter().filter(|kept| kept.digest.is_some()) {
        match evict::verify(kept) {
            Ok(()) => {}
            Err(error @ SourceError::Corrupt { .. }) => {
                let digest = kept.digest.map(|digest| digest.hex()).unwrap_or_default();
                let users = users.get(&digest).map(Vec::as_slice).unwrap_or_default();
                broken.push((error.to_string(), names(users)));
                if let Some(cache) = &cache {
                    cache.discard(kept).with_context(hint)?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        files += 1;
        bytes += kept.size;
    }
    if args.which.json {
        let broken = broken.iter().map(|(error, versions)| json!({ "error": error, "versions": versions }));
        say_json(&json!({ "files": files, "bytes": bytes, "broken": broken.collect::<Vec<_>>() }))?;
    } else {
        for (error, versions) in &broken {
            let versions = if versions.is_empty() { "no version uses it".to_owned() } else { versions.join(", ") };
            say(format_args!("{error} ({versions})"))?;
        }
        let found =
            if broken.is_empty() { "all as they were fetched".to_owned() } else { format!("{} broken", broken.len()) };
        say(format_args!("{files} files, {bytes} bytes, {found}"))?;
    }
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(BROKEN) })
}

fn prune((root, config): &(PathBuf, Config), args: &Prune) -> anyhow::Result<ExitCode> {
    let hint = || format!("cannot prune {}", root.display());
    let freed = Cache::open(root, &config.cache).and_then(|cache| cache.prune(args.unused_for)).with_context(hint)?;
    if args.which.json {
        say_json(&json!({ "freed_bytes": freed }))?;
    } else {
        say(format_args!("{freed} bytes freed"))?;
    }
    Ok(ExitCode::SUCCESS)
}
