//! Models whose settings say where their versions come from: found there, or where that is mirrored.

use std::{borrow::Cow, io};

use super::Reconciler;
use crate::{
    control::{ModelControl, spec::ModelSpec},
    error::Error,
    id::ModelName,
    source::{
        SourceUri,
        local::{self, FoundModel, Origin},
        places::{Places, Trial},
    },
};

impl Reconciler {
    /// The model and its settings, with the versions that its source has when these name one.
    pub(super) fn sourced<'a>(
        &mut self,
        name: &ModelName,
        found: &'a FoundModel,
    ) -> (Cow<'a, FoundModel>, Result<ModelSpec, Error>) {
        let spec = self.spec(name, found);
        let ordered = self.ordered.overrides.get(name);
        let is_upload = ordered.is_some_and(|ordered| ordered.upload.is_some());
        if found.unreadable.is_some() || is_upload {
            return (Cow::Borrowed(found), spec);
        }
        let config = ordered.map(|ordered| ordered.config.clone());
        let model = self.models.entry(name.clone()).or_default();
        // Broken settings say nothing, and those of an order nothing of where the files are.
        if let (Ok(spec), None) = (&spec, &config) {
            model.source.clone_from(&spec.source);
        }
        (model.is_awaited, model.is_bare) = (false, false);
        let Some(uri) = model.source.clone().filter(|_| found.origin == Origin::Here) else {
            return (Cow::Borrowed(found), spec);
        };
        if !found.versions.is_empty() {
            let message = "source stands in place of versions in the model's folder; keep one of both";
            return (Cow::Borrowed(found), spec.and(Err(Error::invalid(message))));
        }
        // Asked before the folder is looked at: what comes in between is found by the next look.
        let trial = trial(&self.settings.places, name, &uri);
        model.is_awaited = matches!(trial, Trial::Awaited(_));
        model.is_bare = trial == Trial::Over(None);
        if model.is_awaited {
            // The first of several versions is not to be taken for all of them.
            return (Cow::Borrowed(found), spec);
        }
        let mut found = match self.at_source(name, &uri, found) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(model = %name, source = %uri, %error, "the versions cannot be read");
                FoundModel { unreadable: Some(error.to_string()), ..found.clone() }
            }
        };
        if let Some(config) = config {
            found.versions.iter_mut().for_each(|found| found.fingerprint = found.fingerprint.with(&config));
        }
        if self.settings.control != ModelControl::Watch && !found.versions.is_empty() {
            // The first look that finds something is the one that counts.
            self.first_scan.get_or_insert_default().insert(name.clone(), found.clone());
        }
        (Cow::Owned(found), spec)
    }

    /// A model that somebody asks for, with the versions that its source has now.
    pub(super) fn looked_up(&mut self, name: &ModelName, found: FoundModel) -> Result<FoundModel, Error> {
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
        self.at_source(name, &uri, &found).map_err(|error| Error::internal(format!("model '{name}': {error}")))
    }

    fn at_source(&self, name: &ModelName, uri: &SourceUri, found: &FoundModel) -> io::Result<FoundModel> {
        let (folder, origin) = match uri.folder() {
            Some(path) => (found.directory.join(path), Origin::Elsewhere),
            None => (self.settings.places.folder(name, uri), Origin::Mirrored),
        };
        local::scan_elsewhere(found, &folder, origin, &|file| self.loader.backends.knows(file))
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
