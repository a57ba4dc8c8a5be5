//! `Places`: the sources that models name in their own settings, each followed for as long as a model names it.
//!
//! Who reads the settings says which model comes from where, and finds its versions in a folder; who follows hears of
//! it. Neither waits for the other.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    ByteStream, Lineage, Look, RemoteFile, RemoteVersion, Source, SourceError, SourceUri,
    cache::{
        Cache,
        mirror::{self, Mirror},
    },
    follow::{FollowConfig, Followed, Follower, Interest, SharedStatus},
};
use crate::id::ModelName;

/// Which model comes from where.
type Wanted = BTreeMap<ModelName, SourceUri>;

/// What both sides know. Cheap to clone.
#[derive(Clone)]
pub struct Places {
    /// The folder of the cache, where mirrors lie.
    cache: PathBuf,
    wanted: watch::Sender<Wanted>,
    standing: Arc<Mutex<BTreeMap<ModelName, SharedStatus>>>,
}

/// How a model's place stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody has looked, or what the first look found is on its way.
    Awaited(String),
    /// What there was to mirror was tried; why there may be less than expected.
    Tried(Option<String>),
}

impl Places {
    /// For a cache in the folder `cache`, which nobody makes before there is something to follow.
    pub fn new(cache: PathBuf) -> Self {
        Self { cache, wanted: watch::Sender::new(Wanted::new()), standing: Arc::default() }
    }

    /// Says which models come from where, all of them.
    pub fn want(&self, places: Wanted) {
        self.wanted.send_if_modified(|wanted| {
            let is_new = *wanted != places;
            if is_new {
                *wanted = places;
            }
            is_new
        });
    }

    /// The folder that a model's versions are mirrored into.
    pub fn folder(&self, name: &ModelName, uri: &SourceUri) -> PathBuf {
        mirror::folder(&self.cache, &key(name, uri)).join("models").join(name.as_str())
    }

    /// How the place of a model stands.
    pub fn standing(&self, name: &ModelName) -> Standing {
        let status = self.standing.lock().get(name).map(SharedStatus::read);
        let Some(status) = status else {
            return Standing::Awaited("its place was not looked at yet".to_owned());
        };
        let problem = status.problems.values().next().map(|problem| problem.error.to_string());
        match (&status.away, status.settled) {
            (Some((_, said)), _) => Standing::Tried(Some(said.clone())),
            (None, false) => Standing::Awaited(format!("its versions are on their way from {}", status.uri)),
            (None, true) => Standing::Tried(problem),
        }
    }

    /// Ends when there is something to follow.
    pub async fn needed(&self) {
        // The sender is here.
        let _ = self.wanted.subscribe().wait_for(|wanted| !wanted.is_empty()).await;
    }

    /// Follows what is wanted until it is cancelled. `kick` hears whenever there may be something new in a folder.
    pub async fn follow(
        self,
        cache: Arc<Cache>,
        config: FollowConfig,
        interest: impl Fn() -> Box<dyn Interest>,
        followed: Followed,
        kick: mpsc::Sender<()>,
        cancel: CancellationToken,
    ) {
        let mut wanted = self.wanted.subscribe();
        let mut running: BTreeMap<ModelName, (SourceUri, CancellationToken, tokio::task::JoinHandle<()>)> =
            BTreeMap::new();
        loop {
            let places = wanted.borrow_and_update().clone();
            let over: Vec<ModelName> = {
                let is_over = |(name, (uri, ..)): &(&ModelName, &(SourceUri, _, _))| places.get(*name) != Some(uri);
                running.iter().filter(is_over).map(|(name, _)| name.clone()).collect()
            };
            for name in over {
                if let Some((uri, token, task)) = running.remove(&name) {
                    token.cancel();
                    let _ = task.await;
                    if let Some(status) = self.standing.lock().remove(&name) {
                        followed.remove(&status);
                    }
                    tracing::info!(model = %name, source = %uri, "is not followed any more");
                }
            }
            for (name, uri) in places {
                if running.contains_key(&name) {
                    continue;
                }
                let status = SharedStatus::new(uri.to_string());
                self.standing.lock().insert(name.clone(), status.clone());
                followed.add(&status);
                let opened = super::open(&uri, cache.scratch()).and_then(|source| {
                    let mirror = Mirror::open(cache.clone(), &key(&name, &uri))?;
                    Ok((Arc::new(Named::new(source, name.clone())), mirror))
                });
                let token = cancel.child_token();
                let task = match opened {
                    Ok((source, mirror)) => {
                        tracing::info!(model = %name, source = %uri, "is followed");
                        let follower = Follower::new(source, mirror, config.clone(), interest())
                            .with_status(status)
                            .telling(kick.clone());
                        tokio::spawn(follower.run(token.clone(), watch::Sender::new(false)))
                    }
                    Err(error) => {
                        tracing::error!(model = %name, source = %uri, %error, "cannot be followed");
                        status.failed(&error);
                        let _ = kick.try_send(());
                        tokio::spawn(std::future::ready(()))
                    }
                };
                running.insert(name, (uri, token, task));
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                // The sender is in `self`.
                _ = wanted.changed() => {}
            }
        }
        for (_, _, task) in running.into_values() {
            let _ = task.await;
        }
    }
}

/// What a model's mirror goes by: two models from one place have a mirror each, which share the contents.
fn key(name: &ModelName, uri: &SourceUri) -> String {
    format!("{uri} as {name}")
}

/// The one model of a place, under the name that it has here.
struct Named {
    source: Arc<dyn Source>,
    name: ModelName,
    /// What the last look showed it to be called over there.
    there: Mutex<ModelName>,
}

impl Named {
    fn new(source: Arc<dyn Source>, name: ModelName) -> Self {
        Self { source, there: Mutex::new(name.clone()), name }
    }

    /// What the model is called over there.
    fn there(&self, look: &Look) -> Result<ModelName, SourceError> {
        if look.models.contains_key(&self.name) {
            return Ok(self.name.clone());
        }
        let mut names = look.models.keys();
        match (names.next(), names.next()) {
            (Some(name), None) => Ok(name.clone()),
            (None, _) => {
                let place = self.uri().to_string();
                Err(SourceError::NotFound { place, what: "any model".to_owned() })
            }
            _ => {
                let names: Vec<&str> = look.models.keys().take(5).map(ModelName::as_str).collect();
                let (place, names) = (self.uri().to_string(), names.join(", "));
                let reason = format!("there are several models ({names}, …) and none is called '{}'", self.name);
                Err(SourceError::Senseless { place, reason })
            }
        }
    }
}

#[async_trait]
impl Source for Named {
    fn uri(&self) -> &SourceUri {
        self.source.uri()
    }

    fn settle_time(&self) -> std::time::Duration {
        self.source.settle_time()
    }

    async fn look(&self) -> Result<Look, SourceError> {
        let mut look = self.source.look().await?;
        let there = self.there(&look)?;
        let mut model = look.models.remove(&there).unwrap_or_default();
        // Its settings are those that name the place.
        model.beside.clear();
        *self.there.lock() = there;
        Ok(Look { models: BTreeMap::from([(self.name.clone(), model)]) })
    }

    async fn artifact(&self, _: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        let there = self.there.lock().clone();
        self.source.artifact(&there, version).await
    }

    async fn lineage(&self, _: &ModelName, version: &RemoteVersion) -> Result<Option<Lineage>, SourceError> {
        let there = self.there.lock().clone();
        self.source.lineage(&there, version).await
    }

    async fn read(&self, file: &RemoteFile, range: std::ops::Range<u64>) -> Result<ByteStream, SourceError> {
        self.source.read(file, range).await
    }
}
