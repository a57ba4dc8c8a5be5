//! The threads that follow the places models come from, away from everything that serves.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    control,
    id::{ModelName, Version},
    model::{State, catalog::CatalogReader},
    priority,
    source::{
        self, SourceUri,
        cache::{Cache, CacheConfig, mirror::Mirror},
        endpoint,
        follow::{Fate, FollowConfig, Followed, Follower, Interest, SharedStatus, Status},
        places::Places,
        write_back::{Teller, reporter::Reporter},
    },
};

use super::reporting;

/// How long until a cache is tried again that cannot be used.
const CACHE_RETRY: Duration = Duration::from_secs(10);

/// A follower that does not follow yet.
pub struct Mirroring {
    /// The folder that the models are mirrored into.
    pub models: PathBuf,
    follower: Follower,
    reporter: Reporter,
    /// Whether an earlier server has left something there to serve.
    is_filled: bool,
}

/// A follower on its thread.
pub struct Mirrors {
    thread: JoinHandle<()>,
    cancel: CancellationToken,
    mirrored: watch::Receiver<bool>,
    status: SharedStatus,
}

/// What is mirrored is for the models of the catalog.
struct Catalogued {
    catalog: CatalogReader,
    /// The folder of models whose settings count, when they are not mirrored with the versions.
    settings: Option<PathBuf>,
}

impl Mirroring {
    /// Mirrors for those models that `catalog` tells of.
    ///
    /// # Errors
    /// When the place is none that can be mirrored, or the cache cannot be used.
    pub fn open(uri: &SourceUri, config: &Config, catalog: CatalogReader, followed: &Followed) -> anyhow::Result<Self> {
        let directory = config.cache_directory();
        let hint = || format!("cannot use the cache {}; name another one with --cache", directory.display());
        let cache = Arc::new(Cache::open(&directory, &config.cache).with_context(hint)?);
        let source = source::open(uri, cache.scratch())?;
        let mirror = Mirror::open(cache, &endpoint::key(uri, None)).with_context(hint)?;
        let is_filled = mirror.published().with_context(hint)?.values().any(|versions| !versions.is_empty());
        let models = mirror.models();
        let settings = Some(config.write_back.clone());
        let teller = Box::new(reporting::Catalogued::new(catalog.clone(), settings, models.clone()));
        let interest = Box::new(Catalogued { catalog, settings: None });
        let follower = Follower::new(source.clone(), mirror, config.follow.clone(), interest);
        let reporter = Reporter::new(source, teller, follower.status(), config.follow.clone());
        followed.add(&follower.status());
        Ok(Self { models, follower, reporter, is_filled })
    }

    /// Follows from now on.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(self) -> anyhow::Result<Mirrors> {
        let cancel = CancellationToken::new();
        let (filled, mirrored) = watch::channel(self.is_filled);
        let status = self.follower.status();
        let shown = status.clone();
        let follower = self.follower.run(cancel.clone(), filled);
        let reporter = self.reporter.run_apart(cancel.clone());
        let both = async {
            tokio::join!(follower, reporter);
        };
        let thread = on_thread(both, move |reason| shown.give_up(reason))?;
        Ok(Mirrors { thread, cancel, mirrored, status })
    }
}

/// What follows the places that models name in their settings.
pub struct Sourced {
    pub places: Places,
    /// The folder of models.
    pub models: PathBuf,
    /// The cache's folder.
    pub directory: PathBuf,
    pub cache: CacheConfig,
    pub follow: FollowConfig,
    pub followed: Followed,
    /// What it is for.
    pub catalog: CatalogReader,
}

impl Sourced {
    /// Waits until a model names a place, and follows from then on until it is cancelled. `kick` hears of every change.
    pub async fn run(self, kick: mpsc::Sender<()>, cancel: CancellationToken) -> anyhow::Result<()> {
        let Some(cache) = cancel.run_until_cancelled(self.cache()).await else { return Ok(()) };
        let Self { places, follow, followed, models, catalog, .. } = self;
        // The settings are not in the mirrors.
        let asked = move |folder| -> (Box<dyn Interest>, Box<dyn Teller>) {
            let interest = Catalogued { catalog: catalog.clone(), settings: Some(models.clone()) };
            (Box::new(interest), Box::new(reporting::Catalogued::new(catalog.clone(), None, folder)))
        };
        let standing = followed.clone();
        let follower = places.follow(cache, follow, asked, followed, kick, cancel.child_token());
        let thread = on_thread(follower, move |reason| standing.give_up(&reason))?;
        cancel.cancelled().await;
        tokio::task::spawn_blocking(move || join(thread)).await?;
        Ok(())
    }

    /// The cache, as soon as somebody needs it and it can be used.
    async fn cache(&self) -> Arc<Cache> {
        self.places.needed().await;
        loop {
            let (directory, config) = (self.directory.clone(), self.cache.clone());
            let opened = tokio::task::spawn_blocking(move || Cache::open(&directory, &config)).await;
            match opened.map_err(|error| error.to_string()).and_then(|opened| opened.map_err(|error| error.to_string()))
            {
                Ok(cache) => {
                    self.places.unusable(None);
                    return Arc::new(cache);
                }
                Err(error) => {
                    self.places.unusable(Some(error.clone()));
                    tracing::error!(
                        error,
                        "no model that names a source can be fetched; name another cache with --cache"
                    );
                }
            }
            tokio::time::sleep(CACHE_RETRY).await;
        }
    }
}

/// Runs what follows on a thread of its own.
fn on_thread(
    follower: impl Future<Output = ()> + Send + 'static,
    give_up: impl FnOnce(String) + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // These are the threads that hash; the one that fetches is below.
        .thread_name("sources-hash")
        .on_thread_start(priority::be_patient)
        .build()?;
    let thread = std::thread::Builder::new().name("sources".to_owned()).spawn(move || {
        priority::be_patient();
        follow(&runtime, follower, give_up);
        // What hashes or waits for the disk may do so to its end, which nobody waits for.
        runtime.shutdown_background();
    })?;
    Ok(thread)
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("the thread that follows the models' place panicked");
    }
}

impl Mirrors {
    /// Ends when there is something to serve, or the following was stopped.
    pub fn mirrored(&self) -> impl Future<Output = ()> + Send + 'static {
        let (mut mirrored, cancel) = (self.mirrored.clone(), self.cancel.clone());
        async move {
            // A follower that is gone without having been stopped has given up: what is not there does not come.
            if mirrored.wait_for(|mirrored| *mirrored).await.is_err() {
                cancel.cancelled().await;
            }
        }
    }

    /// What others see of it.
    pub fn status(&self) -> SharedStatus {
        self.status.clone()
    }

    /// Ends the following; what is being fetched goes on after the next start.
    pub fn stop(self) {
        self.cancel.cancel();
        join(self.thread);
    }
}

/// Why nothing can be ordered yet.
pub fn still_waits(status: &Status) -> String {
    let place = &status.uri;
    match (&status.given_up, &status.away) {
        (Some(reason), _) => format!("models are no longer mirrored from {place}: {reason}"),
        (None, Some((_, error))) => format!("models are still being mirrored from {place}: {error}"),
        (None, None) => format!("models are still being mirrored from {place}"),
    }
}

/// Follows to the end, or says why that came too early: what was mirrored serves on.
fn follow(runtime: &Runtime, follower: impl Future<Output = ()>, give_up: impl FnOnce(String)) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| runtime.block_on(follower))) {
        let reason = format!("following it panicked: {}", said(panic.as_ref()));
        tracing::error!(reason, "the models' place is followed no longer, until the server is started anew");
        give_up(reason);
    }
}

/// What a panic says.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a word")
}

impl Interest for Catalogued {
    fn wanted(&self, folder: &Path, name: &ModelName, offered: &[Version]) -> Vec<Version> {
        let settings = self.settings.as_ref().map(|models| models.join(name.as_str()));
        control::wanted(settings.as_deref().unwrap_or(folder), name, offered)
    }

    fn fate(&self, name: &ModelName, version: &Version) -> Fate {
        let catalog = self.catalog.load();
        let entry = catalog.deployments.get(name).and_then(|deployment| deployment.entry(version.as_str()));
        match entry.map(|entry| entry.state) {
            Some(State::Settling | State::Loading | State::Ready | State::Draining) => Fate::InUse,
            // What is held back does not serve by itself either; after a rollback the version before it does.
            Some(State::Failed | State::Held) => Fate::Failed,
            // The versions that a rollout needs are known once all that was there at start was looked at, and those of a
            // model that nobody has loaded are not.
            None if !catalog.complete || !catalog.deployments.contains_key(name) => Fate::InUse,
            None => Fate::Idle,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn a_follower_that_panics_is_seen_to_have_given_up_and_nothing_counts_as_mirrored() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let status = SharedStatus::default();
        let (filled, mirrored) = watch::channel(false);
        let follower = async move {
            let _filled = filled;
            panic!("as {}", "told");
        };
        follow(&runtime, follower, |reason| status.give_up(reason));
        assert_eq!(status.read().given_up.as_deref(), Some("following it panicked: as told"));
        assert_eq!(still_waits(&status.read()), "models are no longer mirrored from : following it panicked: as told");
        let mirrors = Mirrors { thread: std::thread::spawn(|| {}), cancel: CancellationToken::new(), mirrored, status };
        runtime.block_on(async {
            assert!(timeout(Duration::from_millis(20), mirrors.mirrored()).await.is_err());
            mirrors.cancel.cancel();
            timeout(Duration::from_secs(5), mirrors.mirrored()).await.unwrap();
        });
    }
}
