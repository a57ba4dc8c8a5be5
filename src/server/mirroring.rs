//! The thread that follows the place the models are mirrored from, away from everything that serves.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use anyhow::Context;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    control,
    id::{ModelName, Version},
    model::{State, catalog::CatalogReader},
    priority,
    source::{
        self, SourceUri,
        cache::Cache,
        follow::{Fate, Follower, Interest, SharedStatus},
    },
};

/// A follower that does not follow yet.
pub struct Mirroring {
    /// The folder that the models are mirrored into.
    pub models: PathBuf,
    follower: Follower,
    /// Whether an earlier server has left something there to serve.
    is_filled: bool,
}

/// A follower on its thread.
pub struct Mirrors {
    thread: JoinHandle<()>,
    cancel: CancellationToken,
    mirrored: watch::Receiver<bool>,
}

/// What is mirrored is for the models of the catalog.
struct Catalogued(CatalogReader);

impl Mirroring {
    /// Mirrors for those models that `catalog` tells of.
    ///
    /// # Errors
    /// When the place is none that can be mirrored, or the cache cannot be used.
    pub fn open(uri: &SourceUri, config: &Config, catalog: CatalogReader) -> anyhow::Result<Self> {
        let directory = config.cache_directory();
        let hint = || format!("cannot use the cache {}; name another one with --cache", directory.display());
        let source = source::open(uri)?;
        let cache = Arc::new(Cache::open(&directory, &config.cache).with_context(hint)?);
        let interest = Box::new(Catalogued(catalog));
        let follower = Follower::new(source, cache, config.follow.clone(), interest).with_context(hint)?;
        let is_filled = follower.mirror().published().with_context(hint)?.values().any(|versions| !versions.is_empty());
        Ok(Self { models: follower.mirror().models(), follower, is_filled })
    }

    /// What others see of it.
    pub fn status(&self) -> SharedStatus {
        self.follower.status()
    }

    /// Follows from now on.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(self) -> anyhow::Result<Mirrors> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // These are the threads that hash; the one that fetches is below.
            .thread_name("sources-hash")
            .on_thread_start(priority::be_patient)
            .build()?;
        let cancel = CancellationToken::new();
        let (filled, mirrored) = watch::channel(self.is_filled);
        let follower = self.follower.run(cancel.clone(), filled);
        let thread = std::thread::Builder::new().name("sources".to_owned()).spawn(move || {
            priority::be_patient();
            runtime.block_on(follower);
            // What hashes or waits for the disk may do so to its end, which nobody waits for.
            runtime.shutdown_background();
        })?;
        Ok(Mirrors { thread, cancel, mirrored })
    }
}

impl Mirrors {
    /// Ends when there is something to serve, or never will be.
    pub fn mirrored(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut mirrored = self.mirrored.clone();
        async move {
            // An error is a follower that was stopped.
            let _ = mirrored.wait_for(|mirrored| *mirrored).await;
        }
    }

    /// Ends the following; what is being fetched goes on after the next start.
    pub fn stop(self) {
        self.cancel.cancel();
        if self.thread.join().is_err() {
            tracing::error!("the thread that follows the models' place panicked");
        }
    }
}

impl Interest for Catalogued {
    fn wanted(&self, folder: &Path, name: &ModelName, offered: &[Version]) -> Vec<Version> {
        control::wanted(folder, name, offered)
    }

    fn fate(&self, name: &ModelName, version: &Version) -> Fate {
        let catalog = self.0.load();
        let entry = catalog.deployments.get(name).and_then(|deployment| deployment.entry(version.as_str()));
        match entry.map(|entry| entry.state) {
            Some(State::Settling | State::Loading | State::Ready | State::Draining) => Fate::InUse,
            // What is held back does not serve by itself either; after a rollback the version before it does.
            Some(State::Failed | State::Held) => Fate::Failed,
            // The versions that a rollout needs are known once all that was there at start was looked at.
            None if !catalog.complete => Fate::InUse,
            None => Fate::Idle,
        }
    }
}
