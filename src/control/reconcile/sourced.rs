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
        places::{Places, Standing},
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
        if found.unreadable.is_some() {
            return (Cow::Borrowed(found), spec);
        }
        let is_ordered = self.ordered.overrides.contains_key(name);
        let model = self.models.entry(name.clone()).or_default();
        // Broken settings say nothing, and those of an order nothing of where the files are.
        if let Ok(spec) = &spec
            && !is_ordered
        {
            model.source.clone_from(&spec.source);
        }
        let Some(uri) = model.source.clone().filter(|_| found.origin == Origin::Here) else {
            return (Cow::Borrowed(found), spec);
        };
        if !found.versions.is_empty() {
            let message = "source stands in place of versions in the model's folder; keep one of both";
            return (Cow::Borrowed(found), spec.and(Err(Error::invalid(message))));
        }
        let found = match self.at_source(name, &uri, found) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(model = %name, source = %uri, %error, "the versions cannot be read");
                FoundModel { unreadable: Some(error.to_string()), ..found.clone() }
            }
        };
        if self.settings.control != ModelControl::Watch && !found.versions.is_empty() {
            // The first look that finds something is the one that counts.
            self.first_scan.get_or_insert_default().insert(name.clone(), found.clone());
        }
        (Cow::Owned(found), spec)
    }

    /// A model that somebody asks for, with the versions that its source has now.
    pub(super) fn looked_up(&mut self, name: &ModelName, found: FoundModel) -> Result<FoundModel, Error> {
        let Some(uri) = ModelSpec::read(&found.settings, name).ok().and_then(|spec| spec.source) else {
            return Ok(found);
        };
        if !found.versions.is_empty() {
            // The load says what is wrong.
            return Ok(found);
        }
        let looked = self.at_source(name, &uri, &found);
        self.models.entry(name.clone()).or_default().source = Some(uri);
        self.want_places();
        match looked {
            // What is on its way is looked at again when it has come.
            Ok(looked) if looked.versions.is_empty() => Ok(found),
            Ok(looked) => Ok(looked),
            Err(error) => Err(Error::internal(format!("model '{name}': {error}"))),
        }
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

    /// Whether a model has no version yet because the first ones are on their way.
    pub(super) fn awaits_source(&self, name: &ModelName) -> bool {
        self.models.get(name).is_some_and(|model| {
            model.versions.is_empty()
                && model.source.as_ref().is_some_and(|uri| uri.folder().is_none())
                && matches!(self.settings.places.standing(name), Standing::Awaited(_))
        })
    }
}

/// Why a model has no version.
pub(super) fn nothing(places: &Places, name: &ModelName, uri: &SourceUri) -> String {
    match places.standing(name) {
        _ if uri.folder().is_some() => format!("source: there is no version of it in {uri} (1, 2, …)"),
        Standing::Awaited(reason) => reason,
        Standing::Tried(Some(reason)) => format!("its versions do not come from {uri}: {reason}"),
        Standing::Tried(None) => format!("{uri} holds no version of it"),
    }
}
