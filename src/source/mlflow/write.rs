//! Writes back to MLflow: tags of versions, metrics of the runs that made them, and the alias that follows rollouts.
//!
//! MLflow has no call that changes an alias only when it still is where one saw it. So it is read, decided upon, written
//! and read back; and a tag of the version says which rollout was decided upon, so that it is so once, also when the
//! server was stopped in the middle.
//!
//! The tag holds one decision. Of several replicas, each with rollouts of its own, that is the last writer's, and the
//! others may decide once more. And a rollout is told to the place that its model comes from now: after `source` was
//! changed, one that ended before may be told to the new registry, of versions with the same numbers.

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{API, One, Registry};
use crate::{
    error::shorten,
    id::Version,
    source::{
        SourceError,
        write_back::{Measured, Moved, Promotion, Record, Recorder},
    },
};

const DIGEST: &str = "tidegate.digest";
const STATE: &str = "tidegate.state";
const ROLLOUT: &str = "tidegate.rollout";
/// What was decided of an alias, and by which rollout.
const ALIAS: &str = "tidegate.alias";
/// What begins the source of a version that MLflow 3 has logged: the id of its model follows.
const LOGGED: &str = "models:/m-";

/// A version, as far as what is written back goes.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Tagged {
    tags: Vec<Tag>,
    run_id: String,
    source: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Tag {
    key: String,
    value: String,
}

#[derive(Deserialize)]
struct OfModel {
    registered_model: Named,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Named {
    aliases: Vec<Alias>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Alias {
    alias: String,
    version: String,
}

/// What the tag says of an alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decided {
    /// It is about to be set, or was, and nobody got to say so.
    Setting,
    Set,
    /// It was there already, or somebody else has moved it.
    Left,
    /// It was set back, or is not to be.
    Back,
}

#[async_trait]
impl Recorder for Registry {
    async fn record(&self, version: &Version, record: &Record) -> Result<bool, SourceError> {
        let wanted = [(DIGEST, &record.digest), (STATE, &record.state), (ROLLOUT, &record.rollout)];
        let there = self.tagged(version).await?.pairs();
        let mut is_written = false;
        for (key, value) in wanted.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?))) {
            if there.get(key) != Some(value) {
                self.tag(version, key, value).await?;
                is_written = true;
            }
        }
        Ok(is_written)
    }

    async fn promote(&self, promotion: &Promotion) -> Result<Moved, SourceError> {
        let Promotion { alias, from, to, .. } = promotion;
        let tag = self.tagged(to).await?.pairs().remove(ALIAS);
        let decided = tag.and_then(|tag| Decided::read(&tag, promotion));
        let (target, done) = match (promotion.is_undone, decided) {
            (false, None | Some(Decided::Setting)) => (to, Decided::Set),
            (true, Some(Decided::Setting | Decided::Set)) => (from, Decided::Back),
            // It was decided before; and what was not set is not set back.
            (false, Some(Decided::Set | Decided::Left | Decided::Back))
            | (true, None | Some(Decided::Left | Decided::Back)) => return Ok(Moved::Unchanged),
        };
        let place = self.alias(alias).await?;
        let is_ours = match &place {
            None => !promotion.is_undone,
            Some(place) => *place == from.as_str() || *place == to.as_str(),
        };
        if !is_ours {
            let left = if promotion.is_undone { Decided::Back } else { Decided::Left };
            self.decide(promotion, left).await?;
            return Ok(Moved::LeftAlone(says(place.as_deref())));
        }
        if place.as_deref() == Some(target.as_str()) {
            // Without a word of ours that it was to be set, somebody else has.
            self.decide(promotion, if decided.is_none() { Decided::Left } else { done }).await?;
            return Ok(Moved::Unchanged);
        }
        if decided.is_none() {
            self.decide(promotion, Decided::Setting).await?;
        }
        let body = json!({ "name": self.model.as_str(), "alias": alias, "version": target.as_str() });
        let what = format!("version {target} of model '{}'", self.model);
        self.client.change(&format!("{API}/registered-models/alias"), &body, &what).await?;
        let place = self.alias(alias).await?;
        let stayed = place.as_deref() == Some(target.as_str());
        self.decide(promotion, if stayed || promotion.is_undone { done } else { Decided::Left }).await?;
        Ok(if stayed { Moved::Written } else { Moved::LeftAlone(says(place.as_deref())) })
    }

    async fn measured(&self, version: &Version, measured: &Measured) -> Result<(), SourceError> {
        let found = self.tagged(version).await?;
        if found.run_id.is_empty() {
            let what = format!("the run that made version {version} of model '{}'", self.model);
            return Err(SourceError::NotFound { place: self.client.place().to_owned(), what });
        }
        let (served, latency) = (&measured.served, &measured.served.latency);
        let milliseconds = |share| latency.quantile(share).map(|seconds| seconds * 1e3);
        let values = [
            ("serve.requests", Some(served.requests as f64)),
            ("serve.errors", Some(served.errors as f64)),
            ("serve.p50_ms", milliseconds(0.5)),
            ("serve.p99_ms", milliseconds(0.99)),
        ];
        let metric = |(key, value): (&str, Option<f64>)| {
            let mut metric = json!({
                "key": key, "value": value?, "timestamp": measured.moment(), "step": measured.step(),
            });
            if let Some(id) = found.model_id() {
                metric["model_id"] = json!(id);
            }
            Some(metric)
        };
        let metrics: Vec<Value> = values.into_iter().filter_map(metric).collect();
        let what = format!("run '{}'", shorten(&found.run_id));
        let body = json!({ "run_id": found.run_id, "metrics": metrics });
        self.client.change(&format!("{API}/runs/log-batch"), &body, &what).await
    }
}

impl Registry {
    async fn tagged(&self, version: &Version) -> Result<Tagged, SourceError> {
        let path = format!("{API}/model-versions/get");
        let what = format!("version {version} of model '{}'", self.model);
        let query = [("name", self.model.as_str()), ("version", version.as_str())];
        let found: One<Tagged> = self.client.call(self.client.root(), &path, &query, &what).await?;
        Ok(found.model_version)
    }

    async fn tag(&self, version: &Version, key: &str, value: &str) -> Result<(), SourceError> {
        let name = self.model.as_str();
        let body = json!({ "name": name, "version": version.as_str(), "key": key, "value": value });
        let what = format!("version {version} of model '{name}'");
        self.client.change(&format!("{API}/model-versions/set-tag"), &body, &what).await
    }

    /// Where an alias is.
    async fn alias(&self, alias: &str) -> Result<Option<String>, SourceError> {
        let (path, what) = (format!("{API}/registered-models/get"), format!("model '{}'", self.model));
        let query = [("name", self.model.as_str())];
        let found: OfModel = self.client.call(self.client.root(), &path, &query, &what).await?;
        let aliases = found.registered_model.aliases.into_iter();
        Ok(aliases.filter(|one| one.alias == alias).map(|one| one.version).next())
    }

    async fn decide(&self, promotion: &Promotion, decided: Decided) -> Result<(), SourceError> {
        self.tag(&promotion.to, ALIAS, &decided.text(promotion)).await
    }
}

impl Tagged {
    fn pairs(self) -> BTreeMap<String, String> {
        self.tags.into_iter().map(|tag| (tag.key, tag.value)).collect()
    }

    /// The id of the model that the version is, which versions of MLflow 2 have not.
    fn model_id(&self) -> Option<&str> {
        let is_logged = self.source.starts_with(LOGGED) && !self.source[LOGGED.len()..].contains('/');
        is_logged.then(|| &self.source["models:/".len()..])
    }
}

impl Decided {
    const ALL: [Self; 4] = [Self::Setting, Self::Set, Self::Left, Self::Back];

    /// As the tag has it.
    fn text(self, of: &Promotion) -> String {
        let word = match self {
            Self::Setting => "to be set",
            Self::Set => "set",
            Self::Left => "left alone",
            Self::Back => "taken back",
        };
        format!("{}: {word} by {}", of.alias, of.rollout)
    }

    /// What the tag says of this rollout, if it is of it.
    fn read(text: &str, of: &Promotion) -> Option<Self> {
        Self::ALL.into_iter().find(|decided| decided.text(of) == text)
    }
}

/// Where somebody else has moved an alias.
fn says(place: Option<&str>) -> String {
    place.map_or_else(|| "and it is gone".to_owned(), |version| format!("to version {}", shorten(version)))
}

#[cfg(test)]
mod tests;
