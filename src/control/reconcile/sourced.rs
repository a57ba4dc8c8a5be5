//! Models whose settings say where their versions come from: found there, or where that is mirrored.

use std::{borrow::Cow, collections::BTreeMap, io, time::Duration};

use super::{Reconciler, elsewhere::Wanted};
use crate::{
    control::{ModelControl, spec::ModelSpec},
    error::Error,
    id::ModelName,
    source::{
        SourceUri,
        local::{self, Fingerprint, FoundModel, Origin, Scan},
        places::{Places, Trial},
    },
};

/// How long folders elsewhere may take to be looked at, before the server is ready and after.
const PATIENCE: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(1)];

/// How old what a look has found may be for one who asks for a load, so that a slow folder can be loaded on a second try.
const MOMENT: Duration = Duration::from_secs(30);

/// What a look at a folder elsewhere has found.
#[derive(Clone)]
pub(super) struct Looked {
    found: FoundModel,
    /// Of a mirror: it holds as long as nothing changes there or beside the model's settings.
    as_of: Option<AsOf>,
}

/// The state of a mirror when the look began; what changed meanwhile is found by the next one.
#[derive(Clone, Copy, PartialEq, Eq)]
struct AsOf {
    changes: u64,
    beside: Fingerprint,
}

/// Models and their settings, with the versions that their sources have where these name one.
pub(super) type Sourced<'a> = BTreeMap<ModelName, (Cow<'a, FoundModel>, Result<ModelSpec, Error>)>;

impl Reconciler {
    /// What there is to serve: what lies in the models' folder, and elsewhere where their settings say so.
    pub(super) async fn sourced<'a>(&mut self, scan: &'a Scan) -> Sourced<'a> {
        let mut sourced = Sourced::new();
        let mut wanted = Vec::new();
        let mut asked = BTreeMap::new();
        for (name, found) in scan {
            let (spec, uri) = self.source_of(name, found);
            let mut shown = Cow::Borrowed(found);
            if let Some(uri) = uri {
                let as_of = self.as_of(name, &uri, found);
                match self.mirrored.get(name) {
                    Some(kept) if as_of.is_some() && kept.as_of == as_of => {
                        let kept = kept.found.clone();
                        shown = Cow::Owned(self.found_at_source(name, found, Ok(kept)));
                    }
                    _ => {
                        asked.insert(name.clone(), as_of);
                        wanted.push(self.wanted_from(name, &uri, found, as_of));
                    }
                }
            }
            sourced.insert(name.clone(), (shown, spec));
        }
        self.elsewhere.retain(|name| scan.contains_key(name));
        self.mirrored.retain(|name, _| scan.contains_key(name));
        let patience = PATIENCE[usize::from(self.complete)];
        for (name, result) in self.elsewhere.look(wanted, patience).await {
            let Some((shown, _)) = sourced.get_mut(&name) else { continue };
            let result = result.and_then(|looked| {
                // One that took longer than its pass tells what was then.
                let is_of_now = asked.get(&name) == Some(&looked.as_of);
                if is_of_now { Ok(looked) } else { Err(io::Error::other("it changed while it was looked at")) }
            });
            match result.as_ref().ok().filter(|looked| looked.as_of.is_some()) {
                Some(kept) => drop(self.mirrored.insert(name.clone(), kept.clone())),
                None => drop(self.mirrored.remove(&name)),
            }
            *shown = Cow::Owned(self.found_at_source(&name, shown, result.map(|looked| looked.found)));
        }
        sourced
    }

    /// The model's settings, and where its versions are when that is to be looked at.
    fn source_of(&mut self, name: &ModelName, found: &FoundModel) -> (Result<ModelSpec, Error>, Option<SourceUri>) {
        let spec = self.spec(name, found);
        let ordered = self.ordered.overrides.get(name);
        let is_upload = ordered.is_some_and(|ordered| ordered.upload.is_some());
        if found.unreadable.is_some() || is_upload {
            if let Some(model) = self.models.get_mut(name).filter(|_| is_upload) {
                // Uploaded files are here; whatever comes from the source is not waited for.
                (model.is_awaited, model.is_bare) = (false, false);
            }
            return (spec, None);
        }
        let is_ordered = ordered.is_some();
        let model = self.models.entry(name.clone()).or_default();
        // Broken settings say nothing, and those of an order nothing of where the files are and what is said there.
        if let (Ok(spec), false) = (&spec, is_ordered) {
            model.source.clone_from(&spec.source);
            model.write_back.clone_from(&spec.write_back);
        }
        (model.is_awaited, model.is_bare) = (false, false);
        let Some(uri) = model.source.clone().filter(|_| found.origin == Origin::Here) else {
            return (spec, None);
        };
        if !found.versions.is_empty() {
            let message = "source stands in place of versions in the model's folder; keep one of both";
            return (spec.and(Err(Error::invalid(message))), None);
        }
        // Asked before the folder is looked at: what comes in between is found by the next look.
        let trial = trial(&self.settings.places, name, &uri);
        model.is_awaited = matches!(trial, Trial::Awaited(_));
        model.is_bare = trial == Trial::Over(None);
        // The first of several versions is not to be taken for all of them.
        let is_awaited = model.is_awaited;
        (spec, Some(uri).filter(|_| !is_awaited))
    }

    /// The model with what was found where its settings say.
    fn found_at_source(&mut self, name: &ModelName, found: &FoundModel, looked: io::Result<FoundModel>) -> FoundModel {
        let mut found = looked.unwrap_or_else(|error| {
            tracing::warn!(model = %name, %error, "the versions cannot be read");
            FoundModel { unreadable: Some(error.to_string()), ..found.clone() }
        });
        if let Some(ordered) = self.ordered.overrides.get(name) {
            found.versions.iter_mut().for_each(|found| found.fingerprint = found.fingerprint.with(&ordered.config));
        }
        if self.settings.control != ModelControl::Watch && !found.versions.is_empty() {
            // The first look that finds something is the one that counts.
            self.first_scan.get_or_insert_default().insert(name.clone(), found.clone());
        }
        found
    }

    /// A model that somebody asks for, with the versions that its source has now.
    pub(super) async fn looked_up(&mut self, name: &ModelName, found: FoundModel) -> Result<FoundModel, Error> {
        let spec = ModelSpec::read(&found.settings, name).and_then(|spec| spec.checked_for(self.settings.is_mirror));
        // What is wrong with the settings, or beside them, the load says.
        let Some(uri) = spec.ok().and_then(|spec| spec.source).filter(|_| found.versions.is_empty()) else {
            return Ok(found);
        };
        let trial = trial(&self.settings.places, name, &uri);
        let model = self.models.entry(name.clone()).or_default();
        model.source = Some(uri.clone());
        model.is_awaited = matches!(trial, Trial::Awaited(_));
        let is_awaited = model.is_awaited;
        self.want_places();
        if is_awaited {
            // What is on its way is looked at again when it has come.
            return Ok(found);
        }
        let wanted = self.wanted_from(name, &uri, &found, None);
        self.elsewhere.forget_ended(name, MOMENT);
        let patience = PATIENCE[usize::from(self.complete)];
        let looked = self.elsewhere.look(vec![wanted], patience).await.remove(name);
        let looked = looked.unwrap_or_else(|| Err(io::Error::other("it was not looked at")));
        looked.map(|looked| looked.found).map_err(|error| Error::internal(format!("model '{name}': {error}")))
    }

    /// What there is to look at for a model whose versions are elsewhere.
    fn wanted_from(
        &self,
        name: &ModelName,
        uri: &SourceUri,
        found: &FoundModel,
        as_of: Option<AsOf>,
    ) -> Wanted<Looked> {
        let (folder, origin) = match uri.folder() {
            Some(path) => (found.directory.join(path), Origin::Elsewhere),
            None => (self.settings.places.folder(name, uri), Origin::Mirrored),
        };
        let (backends, found, at) = (self.loader.backends.clone(), found.clone(), folder.clone());
        let scan = move || {
            let found = local::scan_elsewhere(&found, &at, origin, &|file| backends.knows(file))?;
            Ok(Looked { found, as_of })
        };
        Wanted { name: name.clone(), folder, scan: Box::new(scan) }
    }

    /// As of when a look at a mirror's folder would be that begins now; `None` of folders that nobody else looks after.
    fn as_of(&self, name: &ModelName, uri: &SourceUri, found: &FoundModel) -> Option<AsOf> {
        let changes = self.settings.places.changes(name, uri).filter(|_| uri.folder().is_none())?;
        // A folder that cannot be read is not as it was.
        let beside = local::fingerprint_beside(&found.directory).ok()?;
        Some(AsOf { changes, beside })
    }

    /// Says which models come from where.
    pub(super) fn want_places(&self) {
        let remote = |uri: &&SourceUri| uri.folder().is_none();
        let wanted = self.models.iter().filter_map(|(name, model)| Some((name, model.source.as_ref().filter(remote)?)));
        self.settings.places.want(wanted.map(|(name, uri)| (name.clone(), uri.clone())).collect());
    }

    /// Whether the first versions of a model are on their way from its source.
    pub(super) fn awaits_source(&self, name: &ModelName) -> bool {
        self.models.get(name).is_some_and(|model| model.is_awaited)
    }
}

/// How far the following of a source has come; of a folder it is over.
fn trial(places: &Places, name: &ModelName, uri: &SourceUri) -> Trial {
    if uri.folder().is_some() { Trial::Over(None) } else { places.trial(name, uri) }
}

/// Why a model has no version.
pub(super) fn nothing(places: &Places, name: &ModelName, uri: &SourceUri) -> String {
    if uri.folder().is_some() {
        return format!("source: there is no version of it in {uri} (1, 2, …)");
    }
    match places.trial(name, uri) {
        Trial::Awaited(reason) => reason,
        Trial::Over(Some(reason)) => format!("its versions do not come from {uri}: {reason}"),
        Trial::Over(None) => format!("{uri} holds no version of it"),
    }
}
