//! Carrying out commands: load what is asked for at once, unload at once, and answer when the model is at rest.

use std::{collections::BTreeMap, path::PathBuf};

use super::{Progress, Reconciler, Tracked};
use crate::{
    control::command::{Answer, Command, Override},
    error::{Code, Error},
    id::ModelName,
    source::local::{self, FoundModel},
};

/// What was ordered and is in force, and who waits for it.
#[derive(Default)]
pub(super) struct Ordered {
    /// Models that do not run as the repository has them.
    pub(super) overrides: BTreeMap<ModelName, Box<Override>>,
    /// Loads that are answered once their model is at rest.
    waiting: Vec<(ModelName, Answer)>,
}

impl Ordered {
    /// Whether somebody waits for the model, so that its files are taken as they are.
    pub(super) fn is_awaited(&self, name: &ModelName) -> bool {
        self.waiting.iter().any(|(awaited, _)| awaited == name)
    }

    /// Tells those who wait for the model that it will not become what they asked for.
    fn overtake(&mut self, name: &ModelName, by: &str) {
        let (overtaken, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|(n, _)| n == name);
        self.waiting = waiting;
        let overtaken: Vec<(ModelName, Answer)> = overtaken;
        for (_, answer) in overtaken {
            let message = format!("model '{name}': another request to {by} came before the load was done");
            let _ = answer.send(Err(Error::new(Code::NotReady, message)));
        }
    }

    /// Gives up what waits; the callers learn that the server stops.
    pub(super) fn abandon(&mut self) {
        self.waiting.clear();
    }
}

impl Reconciler {
    pub(super) async fn obey(&mut self, command: Command) {
        // Whoever has gone meanwhile misses the answer, and the command is carried out all the same.
        match command {
            Command::Load { name, replacement, answer } => match self.load(&name, replacement).await {
                Ok(()) => self.ordered.waiting.push((name, answer)),
                Err(error) => drop(answer.send(Err(error))),
            },
            Command::Unload { name, answer } => drop(answer.send(self.unload(&name).await)),
            Command::Change { name, asked, change, answer } => {
                drop(answer.send(self.change(&name, asked, change).await));
            }
        }
    }

    /// Looks at the model anew and has the next step load what is new in it, with what failed before.
    async fn load(&mut self, name: &ModelName, replacement: Option<Box<Override>>) -> Result<(), Error> {
        let mut found = self.look(name, replacement.as_deref()).await?;
        if let Some(error) = found.unreadable {
            return Err(Error::internal(error).of_model(name.as_str()));
        }
        if found.versions.is_empty() && !self.awaits_source(name) {
            let message = format!("model '{name}': {} holds no version of it (1, 2, …)", found.directory.display());
            return Err(Error::not_found(message));
        }
        if let Some(replacement) = &replacement {
            // Another configuration makes another version of the same files.
            found.versions.iter_mut().for_each(|found| found.fingerprint = found.fingerprint.with(&replacement.config));
        }
        let before = self.ordered.overrides.get(name).map(Box::as_ref);
        if before.map(identity) != replacement.as_deref().map(identity) {
            self.ordered.overtake(name, "load it with another configuration");
        }
        match replacement {
            Some(replacement) => self.ordered.overrides.insert(name.clone(), replacement),
            None => self.ordered.overrides.remove(name),
        };
        for tracked in self.models.get_mut(name).into_iter().flat_map(|model| &mut model.versions) {
            let there = found.versions.iter().any(|found| found.version == tracked.version);
            // What is being loaded from other files, or as another configuration said, comes in vain.
            let other = !found.versions.iter().any(|found| tracked.progress.fingerprint() == Some(found.fingerprint));
            let under_way = matches!(tracked.progress, Progress::Loading { .. } | Progress::Settling { .. });
            if !there || matches!(tracked.progress, Progress::Failed { .. }) || (under_way && other) {
                tracked.progress = Progress::Gone;
            }
        }
        self.specs.remove(name);
        self.first_scan.get_or_insert_default().insert(name.clone(), found);
        Ok(())
    }

    /// Takes the model out of the catalog at once; what it has begun it finishes.
    async fn unload(&mut self, name: &ModelName) -> Result<(), Error> {
        let ordered = self.first_look().await?.remove(name).is_some();
        self.ordered.overrides.remove(name);
        self.specs.remove(name);
        self.ordered.overtake(name, "unload it");
        let Some(model) = self.models.get_mut(name) else {
            // Not loaded, which is as it should be, provided that there is such a model.
            return if ordered { Ok(()) } else { self.look(name, None).await.map(drop) };
        };
        model.problem = None;
        model.versions.iter_mut().for_each(|tracked| tracked.progress = Progress::Gone);
        self.retire_unwanted(name, true);
        self.models.remove(name);
        self.publish();
        Ok(())
    }

    /// The model as it is now: in the folder that was uploaded, or in the repository.
    async fn look(&mut self, name: &ModelName, replacement: Option<&Override>) -> Result<FoundModel, Error> {
        self.first_look().await?;
        let uploaded = replacement.and_then(|replacement| replacement.upload.as_ref());
        let directory: PathBuf = match uploaded {
            Some(upload) => upload.directory().to_owned(),
            None => self.settings.models.join(name.as_str()),
        };
        let (backends, at) = (self.loader.backends.clone(), directory.clone());
        let look = tokio::task::spawn_blocking(move || local::scan_model(&at, &|name| backends.knows(name)));
        match look.await.map_err(std::io::Error::other).flatten() {
            Ok(Some(found)) if uploaded.is_none() => self.looked_up(name, found).await,
            Ok(found) => found.ok_or_else(|| {
                Error::not_found(format!(
                    "unknown model '{name}': the repository has no folder with a model of that name"
                ))
            }),
            Err(error) => Err(Error::internal(format!("model '{name}': {}: {error}", directory.display()))),
        }
    }

    /// What explicit control serves, which commands change; looked at first when nobody has yet.
    async fn first_look(&mut self) -> Result<&mut local::Scan, Error> {
        if self.first_scan.is_none() {
            self.scan().await.map_err(|error| Error::internal(format!("the repository cannot be read: {error}")))?;
        }
        Ok(self.first_scan.get_or_insert_default())
    }

    /// Answers the loads whose model is at rest.
    pub(super) fn answer(&mut self) {
        for (name, answer) in std::mem::take(&mut self.ordered.waiting) {
            let lost = || Some(Err(Error::internal(format!("model '{name}' was lost while it was loaded"))));
            let outcome = match self.models.get(&name) {
                Some(_) if self.awaits_source(&name) => None,
                model => model.map_or_else(lost, |model| outcome(&name, model)),
            };
            match outcome {
                Some(outcome) => drop(answer.send(outcome)),
                None => self.ordered.waiting.push((name, answer)),
            }
        }
    }
}

/// What makes one override differ from another: its configuration, and the folder of its files.
fn identity(replacement: &Override) -> (&str, Option<&std::path::Path>) {
    (&replacement.config, replacement.upload.as_ref().map(|upload| upload.directory()))
}

/// How a load went; `None` while it goes on.
fn outcome(name: &ModelName, model: &Tracked) -> Option<Result<(), Error>> {
    let mut failures = Vec::new();
    let mut serves = Vec::new();
    for tracked in &model.versions {
        match &tracked.progress {
            Progress::Settling { .. } | Progress::Loading { .. } => return None,
            Progress::Failed { error, .. } => failures.push((&tracked.version, error)),
            Progress::Done { .. } => serves.push(tracked.version.as_str()),
            Progress::Gone | Progress::Held { .. } => {}
        }
    }
    if let Some((_, first)) = failures.first() {
        let told: Vec<String> =
            failures.iter().map(|(version, error)| format!("version '{version}': {error}")).collect();
        let mut message = format!("model '{name}' could not be loaded: {}", told.join("; "));
        if !serves.is_empty() {
            message.push_str(&format!("; version {} serves", serves.join(", ")));
        }
        return Some(Err(Error::new(first.code, message)));
    }
    if serves.is_empty() {
        let problem =
            model.problem.as_deref().unwrap_or("the version policy selects none of the versions in the folder");
        return Some(Err(Error::invalid(problem).of_model(name.as_str())));
    }
    Some(Ok(()))
}
