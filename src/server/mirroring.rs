//! The threads that follow the places models come from, away from everything that serves.

use std::{path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    control, priority,
    source::{
        self, SourceUri,
        cache::{Cache, CacheConfig, mirror::Mirror},
        follow::{FollowConfig, Followed, Follower, Select},
        places::Places,
    },
};

/// How long until a cache is tried again that cannot be used.
const CACHE_RETRY: Duration = Duration::from_secs(10);

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
    pub fn open(uri: &SourceUri, config: &Config, followed: &Followed) -> anyhow::Result<Self> {
        let directory = config.cache_directory();
        let hint = || format!("cannot use the cache {}; name another one with --cache", directory.display());
        let source = source::open(uri)?;
        let cache = Arc::new(Cache::open(&directory, &config.cache).with_context(hint)?);
        let mirror = Mirror::open(cache, &uri.to_string()).with_context(hint)?;
        let is_filled = mirror.published().with_context(hint)?.values().any(|versions| !versions.is_empty());
        let models = mirror.models();
        let select: Select = Box::new(control::wanted);
        let follower = Follower::new(source, mirror, config.follow.clone(), select);
        followed.add(&follower.status());
        Ok(Self { models, follower, is_filled })
    }

    /// Follows from now on.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(self) -> anyhow::Result<Mirrors> {
        let cancel = CancellationToken::new();
        let (filled, mirrored) = watch::channel(self.is_filled);
        let thread = on_thread(self.follower.run(cancel.clone(), filled))?;
        Ok(Mirrors { thread, cancel, mirrored })
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
}

impl Sourced {
    /// Waits until a model names a place, and follows from then on until it is cancelled. `kick` hears of every change.
    pub async fn run(self, kick: mpsc::Sender<()>, cancel: CancellationToken) -> anyhow::Result<()> {
        let Some(cache) = cancel.run_until_cancelled(self.cache()).await else { return Ok(()) };
        let models = self.models;
        let select = move || -> Select {
            let models = models.clone();
            // The settings are not in the mirror.
            Box::new(move |_, name, offered| control::wanted(&models.join(name.as_str()), name, offered))
        };
        let thread =
            on_thread(self.places.follow(cache, self.follow, select, self.followed, kick, cancel.child_token()))?;
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
                Ok(cache) => return Arc::new(cache),
                Err(error) => {
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
fn on_thread(follow: impl Future<Output = ()> + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // These are the threads that hash; the one that fetches is below.
        .thread_name("sources-hash")
        .on_thread_start(priority::be_patient)
        .build()?;
    let thread = std::thread::Builder::new().name("sources".to_owned()).spawn(move || {
        priority::be_patient();
        runtime.block_on(follow);
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
        join(self.thread);
    }
}
