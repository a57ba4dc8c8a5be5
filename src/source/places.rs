//! `Places`: the sources that models name in their own settings, each followed for as long as a model names it.
//!
//! Who reads the settings says which model comes from where, and finds its versions in a folder; who follows hears of
//! it. Neither waits for the other.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    ByteStream, Lineage, Look, Names, Progress, RemoteFile, RemoteModel, RemoteVersion, Source, SourceError, SourceUri,
    cache::{
        Cache,
        mirror::{self, Mirror},
    },
    endpoint,
    follow::{FollowConfig, Followed, Follower, Interest, SharedStatus},
    write_back::{Recorder, Teller, reporter::Reporter},
};
use crate::id::ModelName;

/// Who says what is wanted of a place, and what is to be said there.
type Asked = (Box<dyn Interest>, Box<dyn Teller>);

/// Which model comes from where.
type Wanted = BTreeMap<ModelName, SourceUri>;

/// What both sides know. Cheap to clone.
#[derive(Clone)]
pub struct Places {
    /// The folder of the cache, where mirrors lie.
    cache: PathBuf,
    wanted: watch::Sender<Wanted>,
    standing: Arc<Mutex<BTreeMap<ModelName, (SourceUri, SharedStatus)>>>,
    /// Why nothing can be followed at all.
    unusable: Arc<Mutex<Option<String>>>,
}

/// How far the following of a model's place has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trial {
    /// Nobody has looked, or what the first look found is on its way.
    Awaited(String),
    /// What there was to mirror was tried; why there may be less than expected.
    Over(Option<String>),
}

impl Places {
    /// For a cache in the folder `cache`, which nobody makes before there is something to follow.
    pub fn new(cache: PathBuf) -> Self {
        let wanted = watch::Sender::new(Wanted::new());
        Self { cache, wanted, standing: Arc::default(), unusable: Arc::default() }
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
        mirror::folder(&self.cache, &endpoint::key(uri, Some(name))).join("models").join(name.as_str())
    }

    /// How far the following of a model's place has come.
    pub fn trial(&self, name: &ModelName, uri: &SourceUri) -> Trial {
        if let Some(reason) = self.unusable.lock().clone() {
            return Trial::Over(Some(reason));
        }
        let status = self.standing.lock().get(name).filter(|(of, _)| of == uri).map(|(_, status)| status.read());
        let Some(status) = status else {
            return Trial::Awaited(format!("{uri} was not looked at yet"));
        };
        let problem = status.problems.into_values().next().map(|problem| problem.error.to_string());
        match (status.given_up, status.away, status.settled) {
            (Some(reason), ..) | (None, Some((_, reason)), _) => Trial::Over(Some(reason)),
            (None, None, false) => Trial::Awaited(format!("its versions are on their way from {uri}")),
            (None, None, true) => Trial::Over(problem),
        }
    }

    /// What is another number whenever there may be something new in a model's folder; `None` while nobody looks after it.
    pub fn changes(&self, name: &ModelName, uri: &SourceUri) -> Option<u64> {
        self.standing.lock().get(name).filter(|(of, _)| of == uri).map(|(_, status)| status.changes())
    }

    /// Says why nothing can be followed, or that it can.
    pub fn unusable(&self, reason: Option<String>) {
        *self.unusable.lock() = reason;
    }

    /// Ends when there is something to follow.
    pub async fn needed(&self) {
        // The sender is here.
        let _ = self.wanted.subscribe().wait_for(|wanted| !wanted.is_empty()).await;
    }

    /// Follows what is wanted until it is cancelled, for whoever `asked` makes for each model and its folder, and writes back
    /// what it says.
    /// `kick` hears whenever there may be something new in a folder.
    pub async fn follow(
        self,
        cache: Arc<Cache>,
        config: FollowConfig,
        asked: impl Fn(PathBuf) -> Asked,
        followed: Followed,
        kick: mpsc::Sender<()>,
        cancel: CancellationToken,
    ) {
        let mut wanted = self.wanted.subscribe();
        let mut running: BTreeMap<ModelName, Following> = BTreeMap::new();
        loop {
            let places = wanted.borrow_and_update().clone();
            let is_over = |(name, one): &(&ModelName, &Following)| places.get(*name) != Some(&one.uri) || one.may_retry;
            let over: Vec<ModelName> = running.iter().filter(is_over).map(|(name, _)| name.clone()).collect();
            let over: Vec<Following> = over.iter().filter_map(|name| running.remove(name)).collect();
            over.iter().for_each(|one| followed.remove(&one.status));
            end(over).await;
            self.standing.lock().retain(|name, _| running.contains_key(name));
            for (name, uri) in places {
                if running.contains_key(&name) {
                    continue;
                }
                let status = SharedStatus::new(uri.to_string());
                followed.add(&status);
                let asked = asked(self.folder(&name, &uri));
                let one = self.start(&cache, &config, asked, kick.clone(), (&name, uri, status), &cancel);
                self.standing.lock().insert(name.clone(), (one.uri.clone(), one.status.clone()));
                let _ = kick.try_send(());
                running.insert(name, one);
            }
            tokio::select! {
                () = cancel.cancelled() => break,
                // The sender is in `self`.
                _ = wanted.changed() => {}
                () = tokio::time::sleep(config.max_interval) => {}
            }
        }
        end(running.into_values().collect()).await;
    }

    fn start(
        &self,
        cache: &Arc<Cache>,
        config: &FollowConfig,
        (interest, teller): Asked,
        kick: mpsc::Sender<()>,
        (name, uri, status): (&ModelName, SourceUri, SharedStatus),
        cancel: &CancellationToken,
    ) -> Following {
        let opened = super::open(&uri, cache.scratch()).and_then(|source| {
            let mirror = Mirror::open(cache.clone(), &endpoint::key(&uri, Some(name)))?;
            let is_filled = mirror.published()?.get(name).is_some_and(|versions| !versions.is_empty());
            Ok((Arc::new(Named::new(source, name.clone())), mirror, is_filled))
        });
        let token = cancel.child_token();
        let (task, may_retry) = match opened {
            Ok((source, mirror, is_filled)) => {
                tracing::info!(model = %name, source = %uri, "is followed");
                if is_filled {
                    // What an earlier server has left is there to serve.
                    status.settled();
                }
                let source: Arc<dyn Source> = source;
                let reporter = Reporter::new(source.clone(), teller, status.clone(), config.clone());
                let follower =
                    Follower::new(source, mirror, config.clone(), interest).with_status(status.clone()).telling(kick);
                let following = tokio::spawn(follower.run(token.clone(), watch::Sender::new(false)));
                let reporting = reporter.run_apart(token.clone());
                (tokio::spawn(watched(following, reporting, name.clone(), status.clone())), false)
            }
            Err(error) => {
                tracing::error!(model = %name, source = %uri, %error, "cannot be followed");
                status.failed(&error);
                (tokio::spawn(std::future::ready(())), error.passes())
            }
        };
        Following { uri, status, token, task, may_retry }
    }
}

/// A model's place that is followed, or could not be.
struct Following {
    uri: SourceUri,
    status: SharedStatus,
    token: CancellationToken,
    task: JoinHandle<()>,
    /// Whether it could not be, and may be later.
    may_retry: bool,
}

/// Ends the following of some, of all of them at once: each may take a moment.
async fn end(following: Vec<Following>) {
    following.iter().for_each(|one| one.token.cancel());
    for one in following {
        let _ = one.task.await;
    }
}

/// Says when following ended that nobody has ended, beside what is written back.
async fn watched(
    following: JoinHandle<()>,
    reporting: impl Future<Output = ()>,
    name: ModelName,
    status: SharedStatus,
) {
    let following = async {
        if let Err(error) = following.await {
            let reason = format!("following it panicked: {error}");
            tracing::error!(model = %name, reason, "its place is followed no longer, until the server is started anew");
            status.give_up(reason);
        }
    };
    tokio::join!(following, reporting);
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

    fn seeks(&self, file: &RemoteFile) -> bool {
        self.source.seeks(file)
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

    fn preparing(&self) -> Option<Arc<Progress>> {
        self.source.preparing()
    }

    fn done(&self, version: &RemoteVersion) {
        self.source.done(version);
    }

    async fn lineage(&self, _: &ModelName, version: &RemoteVersion) -> Result<Option<Lineage>, SourceError> {
        let there = self.there.lock().clone();
        self.source.lineage(&there, version).await
    }

    async fn names(&self, _: &ModelName, shown: &RemoteModel) -> Result<Option<Names>, SourceError> {
        let there = self.there.lock().clone();
        self.source.names(&there, shown).await
    }

    fn recorder(&self) -> Option<&dyn Recorder> {
        self.source.recorder()
    }

    async fn read(&self, file: &RemoteFile, range: std::ops::Range<u64>) -> Result<ByteStream, SourceError> {
        self.source.read(file, range).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, sleep, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_written_back_goes_on_and_ends_beside_the_following() {
        let status = SharedStatus::default();
        let following = tokio::spawn(std::future::pending());
        let reporting = async { status.not_written_back(std::time::SystemTime::now(), "as told") };
        let watched = watched(following, reporting, ModelName::parse("iris").unwrap(), status.clone());
        assert!(timeout(Duration::from_secs(1), watched).await.is_err());
        assert!(status.read().write_back.is_some_and(|written| written.failed.is_some()));
    }

    #[tokio::test(start_paused = true)]
    async fn many_end_in_the_time_that_one_takes() {
        let one = |_| {
            let (uri, token) = (SourceUri::parse("mlflow://host/iris@live").unwrap(), CancellationToken::new());
            let cancel = token.clone();
            let task = tokio::spawn(async move {
                cancel.cancelled().await;
                sleep(Duration::from_secs(2)).await;
            });
            Following { uri, status: SharedStatus::default(), token, task, may_retry: false }
        };
        let before = Instant::now();
        end((0..50).map(one).collect()).await;
        assert_eq!(before.elapsed().as_secs(), 2);
    }
}
