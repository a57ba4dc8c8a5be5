//! Commands: what an operator asks of the reconciler while it runs, and how the answer comes back.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{
    ModelControl, Settings, pbtxt,
    spec::ModelSpec,
    standing::{Split, Standing},
    store::{Logged, SharedStore},
    upload::{Upload, Uploads},
};
use crate::{
    backend::Backends,
    error::{Code, Error},
    id::{Alias, ModelName, Version},
    rollout::{self, Moment},
    source::local::{self, Scan},
};

/// Commands on their way to the reconciler; when full, callers wait.
const QUEUE: usize = 64;

/// What a load may bring along.
#[derive(Default)]
pub struct Load {
    /// Triton's model configuration as JSON, in place of the settings beside the model.
    pub config: Option<String>,
    /// By parameter name, `file:<version>/<name>`; in place of the repository's files. They need a `config`.
    pub files: Vec<(String, Bytes)>,
}

/// How a model shall run when not as the repository has it.
pub(super) struct Override {
    /// What `spec` was read from; tells one override from another.
    pub(super) config: String,
    pub(super) spec: ModelSpec,
    /// In place of the repository's files.
    pub(super) upload: Option<Arc<Upload>>,
}

/// Who asks for a change, why, and of what state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub author: String,
    pub reason: String,
    /// The model's epoch as the caller knows it; with another one nothing is changed.
    pub epoch: Option<u64>,
}

/// What operators may change of who gets which version of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A rollout to a version, by the keys of `rollout::plan::Settings` laid over the model's own.
    Start { to: Version, settings: serde_json::Map<String, serde_json::Value> },
    /// To the rollout that there is.
    Tell(rollout::Command),
    /// Divides the requests by hand; `None` as the repository and the policy have it.
    Route(Option<Split>),
    /// Has an alias stand for a version, or, with `None`, for none any more.
    Alias(Alias, Option<Version>),
    /// Forgets whatever was changed by request, but for aliases.
    Clear,
}

pub(super) type Answer = oneshot::Sender<Result<(), Error>>;

/// A call that waits; the answer to one that was given up goes nowhere.
pub(super) enum Command {
    Load { name: ModelName, replacement: Option<Box<Override>>, answer: Answer },
    Unload { name: ModelName, answer: Answer },
    Change { name: ModelName, asked: Asked, change: Change, answer: Answer },
}

/// Asks the reconciler, from anywhere.
#[derive(Clone)]
pub struct Commands {
    sender: mpsc::Sender<Command>,
    control: ModelControl,
    models: PathBuf,
    backends: Backends,
    uploads: Arc<Uploads>,
    /// One look at the whole repository at a time.
    looks: Arc<Semaphore>,
    state: SharedStore,
}

/// The other end, for the reconciler.
pub struct Orders(pub(super) mpsc::Receiver<Command>);

impl Orders {
    /// Refuses whatever is asked until `ready` ends, saying why: what is not there yet is not to be called unknown.
    pub async fn refuse_until(&mut self, ready: impl Future<Output = ()>, why: impl Fn() -> String) {
        tokio::pin!(ready);
        loop {
            tokio::select! {
                () = &mut ready => return,
                Some(command) = self.0.recv() => {
                    let refused = Err(Error::new(Code::NotReady, why()));
                    // Whoever asked may have gone.
                    let _ = command.into_answer().send(refused);
                }
            }
        }
    }
}

impl Command {
    fn into_answer(self) -> Answer {
        match self {
            Command::Load { answer, .. } | Command::Unload { answer, .. } | Command::Change { answer, .. } => answer,
        }
    }
}

/// Both ends of the way to the reconciler.
pub fn commands(settings: &Settings, backends: Backends, uploads: Uploads, state: SharedStore) -> (Commands, Orders) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let commands = Commands {
        sender,
        control: settings.control,
        models: settings.models.clone(),
        backends,
        uploads: Arc::new(uploads),
        looks: Arc::new(Semaphore::new(1)),
        state,
    };
    (commands, Orders(receiver))
}

impl Commands {
    /// Loads a model, or what has changed of it since, and waits until it serves or failed. Nothing is taken back when
    /// the future is dropped.
    ///
    /// # Errors
    /// `NotReady` without explicit control, `NotFound` for a model that is not in the repository, `Forbidden` for
    /// files that may not be uploaded, `InvalidArgument` for a configuration or file that cannot be used, and why the
    /// model failed.
    pub async fn load(&self, name: ModelName, load: Load) -> Result<(), Error> {
        self.check_control()?;
        let replacement = self.replacement(&name, load).await?;
        tracing::info!(model = %name, replaced = replacement.is_some(), "asked to load");
        self.ask(|answer| Command::Load { name, replacement, answer }).await
    }

    /// Unloads a model, and waits until it takes no more requests; those it has are answered. A model that is not
    /// loaded may be unloaded.
    ///
    /// # Errors
    /// `NotReady` without explicit control, `NotFound` for a model nobody has heard of.
    pub async fn unload(&self, name: ModelName) -> Result<(), Error> {
        self.check_control()?;
        tracing::info!(model = %name, "asked to unload");
        self.ask(|answer| Command::Unload { name, answer }).await
    }

    /// What could be loaded by request: the whole repository with explicit control, else nothing.
    ///
    /// # Errors
    /// `Internal` when the repository cannot be read.
    pub async fn loadable(&self) -> Result<Scan, Error> {
        if self.control != ModelControl::Explicit {
            return Ok(Scan::new());
        }
        let unreadable = |error: std::io::Error| {
            Error::internal(format!("the repository {} cannot be read: {error}", self.models.display()))
        };
        let permit = self.looks.clone().acquire_owned().await.map_err(|_| Error::internal("nobody looks any more"))?;
        let (root, backends) = (self.models.clone(), self.backends.clone());
        let look = tokio::task::spawn_blocking(move || {
            // Held to the end of the look, also when whoever asked for it has gone.
            let _permit = permit;
            local::scan(&root, |name| backends.knows(name))
        });
        look.await.map_err(std::io::Error::other).flatten().map_err(unreadable)
    }

    /// Changes who gets which version of a model; once it returns, the change is stored and in the catalog.
    ///
    /// # Errors
    /// `NotFound` for an unknown model, version or rollout, `InvalidArgument` for a plan or a split that cannot be,
    /// `Conflict` when it cannot be done as things stand or `asked.epoch` is not the model's, `NotReady` when it cannot
    /// be stored.
    pub async fn change(&self, name: ModelName, asked: Asked, change: Change) -> Result<(), Error> {
        tracing::info!(model = %name, author = asked.author, reason = asked.reason, ?change, "asked to change the route");
        self.ask(|answer| Command::Change { name, asked, change, answer }).await
    }

    /// What was written down of changes of a model (of all without) since a moment and behind the entry of a number,
    /// oldest first.
    ///
    /// # Errors
    /// `NotReady` when the state cannot be read.
    pub async fn audit(
        &self,
        model: Option<&str>,
        since: Moment,
        after: u64,
        most: usize,
    ) -> Result<Vec<Logged>, Error> {
        let model = model.map(str::to_owned);
        self.state.with(move |store| store.audit(model.as_deref(), since, after, most)).await
    }

    /// Everything that was changed by request or by rollouts, by model. What cannot be read of a model is logged and left
    /// out.
    ///
    /// # Errors
    /// `NotReady` when the state cannot be read.
    pub async fn overrides(&self) -> Result<Vec<(ModelName, Standing)>, Error> {
        let known = |(name, standing): (ModelName, Result<Standing, Error>)| {
            let unknown = |error: &Error| tracing::error!(model = %name, %error, "its overrides are not known");
            let standing = standing.inspect_err(unknown).ok()?;
            Some((name, standing))
        };
        Ok(self.state.with(|store| store.standings()).await?.into_iter().filter_map(known).collect())
    }

    fn check_control(&self) -> Result<(), Error> {
        let mode = match self.control {
            ModelControl::Explicit => return Ok(()),
            ModelControl::Watch => "watch",
            ModelControl::None => "none",
        };
        let message = format!(
            "models are loaded and unloaded by request only with model_control = \"explicit\" (--model-control \
             explicit); this server runs with \"{mode}\""
        );
        Err(Error::new(Code::NotReady, message))
    }

    async fn replacement(&self, name: &ModelName, load: Load) -> Result<Option<Box<Override>>, Error> {
        if !load.files.is_empty() {
            self.uploads.check_allowed()?;
        }
        let Some(config) = load.config else {
            let wanting = "uploaded files need a parameter 'config' with the model's configuration";
            return if load.files.is_empty() { Ok(None) } else { Err(Error::invalid(wanting).of_model(name.as_str())) };
        };
        let spec = pbtxt::from_json(&config, name)?;
        if load.files.is_empty() {
            return Ok(Some(Box::new(Override { config, spec, upload: None })));
        }
        let (uploads, model) = (self.uploads.clone(), name.clone());
        let written = tokio::task::spawn_blocking(move || uploads.write(&model, &load.files)).await;
        let upload = written.map_err(|error| Error::internal(format!("uploading failed: {error}")))??;
        Ok(Some(Box::new(Override { config, spec, upload: Some(upload) })))
    }

    async fn ask(&self, command: impl FnOnce(Answer) -> Command) -> Result<(), Error> {
        let stopping = || Error::new(Code::NotReady, "the server is stopping");
        let (answer, answered) = oneshot::channel();
        self.sender.send(command(answer)).await.map_err(|_| stopping())?;
        answered.await.unwrap_or_else(|_| Err(stopping()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_asked_too_early_is_refused_and_what_comes_later_waits() {
        let (sender, receiver) = mpsc::channel(4);
        let mut orders = Orders(receiver);
        let ask = || {
            let (answer, answered) = oneshot::channel();
            let name = ModelName::parse("m").unwrap();
            (Command::Unload { name, answer }, answered)
        };
        let (ready, is_ready) = oneshot::channel::<()>();
        let (early, refused) = ask();
        let until = async { drop(is_ready.await) };
        let telling = async {
            sender.send(early).await.unwrap_or_default();
            let refused = refused.await.unwrap().unwrap_err();
            assert_eq!((refused.code, refused.message.as_str()), (Code::NotReady, "not yet"));
            ready.send(()).unwrap();
        };
        tokio::join!(orders.refuse_until(until, || "not yet".to_owned()), telling);
        let (late, mut answered) = ask();
        sender.send(late).await.unwrap_or_default();
        assert!(matches!(orders.0.recv().await, Some(Command::Unload { .. })));
        assert!(answered.try_recv().is_err());
    }

    #[tokio::test]
    async fn nobody_who_asks_is_no_reason_to_stop_waiting() {
        let (sender, receiver) = mpsc::channel(1);
        drop(sender);
        let mut orders = Orders(receiver);
        let waiting = orders.refuse_until(std::future::pending(), String::new);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), waiting).await.is_err());
    }
}
