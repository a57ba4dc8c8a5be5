//! The thread that follows the place the models are mirrored from, away from everything that serves.

use std::{path::PathBuf, sync::Arc, thread::JoinHandle};

use anyhow::Context;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    control, priority,
    source::{
        self, Scratch, SourceUri,
        cache::Cache,
        follow::{Follower, Select, SharedStatus},
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

impl Mirroring {
    /// # Errors
    /// When the place is none that can be mirrored, or the cache cannot be used.
    pub fn open(uri: &SourceUri, config: &Config) -> anyhow::Result<Self> {
        let directory = config.cache_directory();
        let hint = || format!("cannot use the cache {}; name another one with --cache", directory.display());
        let source = source::open(uri, Scratch::of(&directory, &config.cache))?;
        let cache = Arc::new(Cache::open(&directory, &config.cache).with_context(hint)?);
        let select: Select = Box::new(control::wanted);
        let follower = Follower::new(source, cache, config.follow.clone(), select).with_context(hint)?;
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
