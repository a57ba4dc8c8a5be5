//! What there is to say, at the place that they are from, of the models in the catalog.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::SystemTime,
};

use parking_lot::Mutex;

use crate::{
    error::abridge,
    id::ModelName,
    metrics::Way,
    model::{
        State,
        catalog::{CatalogReader, Deployment, Entry},
    },
    rollout::{Phase, Rollout},
    source::{
        WriteBack,
        cache::mirror,
        write_back::{Promotion, Record, Served, Teller, Told},
    },
};

/// Tells of the models of the catalog.
pub struct Catalogued {
    catalog: CatalogReader,
    /// What is to be told of all of them; of each what its own settings say, without.
    settings: Option<WriteBack>,
    /// The folder that its versions are mirrored into. Those that lie elsewhere are another place's, or somebody's uploads.
    models: PathBuf,
    digests: Mutex<BTreeMap<ModelName, Digests>>,
}

/// What stands for the files of a model's versions, by where that is written down, and when that was.
type Digests = BTreeMap<PathBuf, (SystemTime, String)>;

impl Catalogued {
    pub fn new(catalog: CatalogReader, settings: Option<WriteBack>, models: PathBuf) -> Self {
        Self { catalog, settings, models, digests: Mutex::default() }
    }

    /// Where a version's files lie when they are from this place.
    fn mirrored<'a>(&self, entry: &'a Entry) -> Option<&'a Path> {
        entry.files.as_deref().filter(|files| files.starts_with(&self.models) && mirror::manifest_path(files).is_some())
    }
}

impl Teller for Catalogued {
    fn told(&self, name: &ModelName) -> Option<Told> {
        let catalog = self.catalog.load();
        let mut before = self.digests.lock().remove(name).unwrap_or_default();
        let deployment = catalog.deployments.get(name)?;
        let settings = self.settings.as_ref().unwrap_or(&deployment.write_back).clone();
        if settings.is_off() {
            return Some(Told { settings, ..Told::default() });
        }
        let mut digests = Digests::new();
        let mut records: BTreeMap<String, Record> = BTreeMap::new();
        for (entry, files) in deployment.entries.iter().filter_map(|entry| Some((entry, self.mirrored(entry)?))) {
            let mut record = Record { state: state(entry), ..Record::default() };
            // What is known of new files says nothing of those that serve, or are being loaded.
            let manifest = mirror::manifest_path(files).filter(|_| settings.tags && !entry.is_outdated);
            if let Some(manifest) = manifest.filter(|_| record.state.is_some())
                && let Some((written, digest)) = digest(files, before.remove(&manifest), &manifest)
            {
                record.digest = Some(digest.clone());
                digests.insert(manifest, (written, digest));
            }
            records.insert(entry.version.to_string(), record);
        }
        self.digests.lock().insert(name.clone(), digests);
        // A rollout among versions that somebody has uploaded is none of the place's.
        let is_of_place =
            deployment.entries.iter().all(|entry| entry.files.is_none() || self.mirrored(entry).is_some());
        let rollout = deployment.rollout.as_deref().filter(|_| is_of_place);
        if let Some((rollout, result)) = rollout.and_then(|rollout| Some((rollout, result(rollout)?))) {
            // Before all that was there at start was looked at, nobody can tell what is not there.
            let state = catalog.complete.then(|| "unloaded".to_owned());
            let gone = || Record { state, ..Record::default() };
            records.entry(rollout.candidate.to_string()).or_insert_with(gone).rollout = Some(result);
        }
        let alias = settings.promoted_alias.as_deref();
        let promotion = alias.zip(rollout).and_then(|(alias, rollout)| promotion(alias, rollout, deployment));
        Some(Told { settings, records, promotion })
    }

    fn served(&self, name: &ModelName, version: &str) -> Option<Served> {
        let catalog = self.catalog.load();
        let entry = catalog.deployments.get(name)?.entry(version).filter(|entry| self.mirrored(entry).is_some())?;
        let version = entry.serving.as_ref()?;
        let mut served = Served::default();
        // Copies are nobody's requests.
        for way in Way::ALL.into_iter().filter(|way| *way != Way::Shadow) {
            let window = version.tally.window(way);
            served.requests += window.requests;
            served.errors += window.errors;
            served.latency.join(&window.latency);
        }
        Some(served)
    }
}

/// What stands for a version's files, and when that was written down; read only when it was since `before`.
fn digest(files: &Path, before: Option<(SystemTime, String)>, manifest: &Path) -> Option<(SystemTime, String)> {
    let written = manifest.metadata().and_then(|found| found.modified()).ok()?;
    before
        .filter(|(before, _)| *before == written)
        .or_else(|| mirror::manifest_of(files).map(|manifest| (written, manifest.digest)))
}

/// The state of a version when it is one that lasts.
fn state(entry: &Entry) -> Option<String> {
    match entry.state {
        State::Ready => Some(State::Ready.as_str().to_owned()),
        state @ (State::Failed | State::Held) => Some(format!("{}: {}", state.as_str(), abridge(&entry.reason))),
        State::Settling | State::Loading | State::Draining => None,
    }
}

/// How a rollout ended; `None` while nobody knows.
fn result(rollout: &Rollout) -> Option<String> {
    let strategy = if rollout.plan.shadow.is_some() { "shadow, canary" } else { "canary" };
    let why = || rollout.history.last().map(|last| abridge(&last.reason)).unwrap_or_default();
    let result = match rollout.phase {
        Phase::Watching | Phase::Done => "promoted".to_owned(),
        Phase::Aborted => format!("aborted: {}", why()),
        Phase::RolledBack => format!("rolled_back: {}", why()),
        Phase::Pending | Phase::Shadow | Phase::Canary | Phase::Paused | Phase::Promoting => return None,
    };
    Some(format!("{result} ({strategy}, {})", rollout.id))
}

/// What a rollout says of the alias that follows rollouts.
fn promotion(alias: &str, rollout: &Rollout, deployment: &Deployment) -> Option<Promotion> {
    let at = rollout.promoted_at?;
    let is_undone = match rollout.phase {
        // What came after it is not its doing.
        Phase::Watching | Phase::Done if deployment.default.as_ref() == Some(&rollout.candidate) => false,
        Phase::RolledBack => true,
        _ => return None,
    };
    Some(Promotion {
        alias: alias.to_owned(),
        rollout: format!("{} at {at}", rollout.id),
        from: rollout.stable.clone(),
        to: rollout.candidate.clone(),
        is_undone,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc, time::Duration};

    use super::*;
    use crate::{
        id::Version,
        metrics::Metrics,
        model::catalog::{Catalog, CatalogWriter, catalog},
        rollout::{Command, Event, plan::Settings},
    };

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    /// A rollout from version 1 to 2, and what it says at each moment: its result, and whether the alias is to be at 2.
    fn told(events: Vec<Event>, default: &str) -> Vec<(Option<String>, Option<bool>)> {
        let plan = Settings { steps: vec![100.0], ..Settings::default() }.plan().unwrap();
        let mut rollout = Rollout::new("m/r1".into(), [version("1"), version("2")], plan, None, 0).unwrap();
        let deployment = Deployment { default: Some(version(default)), ..Deployment::default() };
        let says = |rollout: &Rollout| {
            let promotion = promotion("champion", rollout, &deployment);
            (result(rollout), promotion.map(|promotion| !promotion.is_undone))
        };
        let mut told = vec![says(&rollout)];
        for event in events {
            rollout.apply(event, 7).unwrap();
            told.push(says(&rollout));
        }
        told
    }

    #[test]
    fn a_rollout_says_how_it_ended_and_where_its_alias_belongs() {
        let by_hand = |command| Event::Told(command, "as told".to_owned());
        let (promote, rollback) = (by_hand(Command::Promote), by_hand(Command::Rollback));
        let some = |text: &str| Some(format!("{text} (canary, m/r1)"));
        let (promoted, rolled_back) = (some("promoted"), some("rolled_back: as told"));
        assert_eq!(
            told(vec![Event::Ready, promote.clone(), Event::Promoted, rollback], "2"),
            [(None, None), (None, None), (None, None), (promoted.clone(), Some(true)), (rolled_back, Some(false))]
        );
        assert_eq!(
            told(vec![Event::Ready, Event::Failed("no opset".to_owned())], "1").last(),
            Some(&(some("aborted: no opset"), None))
        );
        // Another version has taken over since.
        assert_eq!(told(vec![Event::Ready, promote, Event::Promoted], "3").last(), Some(&(promoted, None)));
    }

    /// A model of one version, whose files are from a place or somewhere else.
    struct Fixture {
        folder: tempfile::TempDir,
        teller: Catalogued,
        writer: CatalogWriter,
        entry: Entry,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (reader, writer) = catalog();
            let settings = WriteBack { tags: true, ..WriteBack::default() };
            let teller = Catalogued::new(reader, Some(settings), folder.path().join("models"));
            let entry = Entry {
                version: version("1"),
                state: State::Ready,
                reason: String::new(),
                serving: None,
                files: Some(folder.path().join("models/iris/1").into()),
                is_outdated: false,
                signature: None,
                metrics: Metrics::new("0", "0").version("iris", "1"),
            };
            Self { folder, teller, writer, entry }
        }

        fn manifest(&self, digest: &str, minute: u64) {
            let path = mirror::manifest_path(self.entry.files.as_ref().unwrap()).unwrap();
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = format!(r#"{{"uri": "mlflow://host", "revision": "1", "digest": "{digest}", "files": {{}}}}"#);
            fs::write(&path, text).unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(60 * minute)).unwrap();
        }

        /// What is told of the version: its digest and state.
        fn told(&self) -> Option<(Option<String>, Option<String>)> {
            let mut rollout = Rollout::new("iris/r1".into(), [version("0"), version("1")], plan(), None, 0).unwrap();
            rollout.apply(Event::Failed("no opset".to_owned()), 7).unwrap();
            let deployment = Deployment {
                entries: vec![self.entry.clone()],
                rollout: Some(Arc::new(rollout)),
                ..Deployment::default()
            };
            let name = ModelName::parse("iris").unwrap();
            self.writer.publish(Catalog { deployments: [(name.clone(), deployment)].into(), complete: true });
            let record = self.teller.told(&name).unwrap().records.remove("1")?;
            assert!(record.rollout.is_some());
            Some((record.digest, record.state))
        }
    }

    fn plan() -> crate::rollout::plan::Plan {
        Settings { steps: vec![100.0], ..Settings::default() }.plan().unwrap()
    }

    #[test]
    fn the_digest_is_that_of_what_serves_and_read_only_when_it_changed() {
        let mut fixture = Fixture::new();
        let ready = |digest: Option<&str>| Some((digest.map(ToOwned::to_owned), Some("ready".to_owned())));
        assert_eq!(fixture.told(), ready(None));
        fixture.manifest("sha256:a", 1);
        assert_eq!(fixture.told(), ready(Some("sha256:a")));
        fixture.manifest("sha256:b", 1);
        assert_eq!(fixture.told(), ready(Some("sha256:a")));
        fixture.manifest("sha256:b", 2);
        assert_eq!(fixture.told(), ready(Some("sha256:b")));
        fixture.entry.is_outdated = true;
        assert_eq!(fixture.told(), ready(None));
        (fixture.entry.is_outdated, fixture.entry.state) = (false, State::Loading);
        assert_eq!(fixture.told(), Some((None, None)));
        assert!(fixture.teller.digests.lock().values().all(BTreeMap::is_empty));
    }

    #[test]
    fn versions_that_somebody_has_uploaded_are_none_of_the_registrys() {
        let mut fixture = Fixture::new();
        assert!(fixture.told().is_some());
        fixture.entry.files = Some(fixture.folder.path().join("0-iris/1").into());
        assert_eq!(fixture.told(), None);
        // It is another place's, and serves until this one has a version.
        fixture.entry.files = Some(fixture.folder.path().join("other/models/iris/1").into());
        assert_eq!(fixture.told(), None);
    }
}
