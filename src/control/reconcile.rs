//! The one writer of the catalog: compares what the repository holds with what runs, and closes the gap.
//!
//! Each pass looks at everything anew and takes the next step of every model, so a missed notification costs a tick
//! and nothing else. Everything that can fail happens before a version is published; the version it replaces is
//! drained after that.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};

use self::{
    elsewhere::Elsewhere,
    sourced::{Looked, Sourced},
};
use super::{
    ModelControl, Settings,
    command::Orders,
    promote::{self, Rollouts},
    spec::ModelSpec,
    store::SharedStore,
    tracked::{PointedBy, Progress, SETTLE_TIME, Target, Targets, Tracked, targets},
};
use crate::{
    backend::Backends,
    error::{Code, Error},
    heap,
    id::{ModelName, Version},
    metrics::Metrics,
    model::{
        ModelVersion, State,
        catalog::{Catalog, CatalogWriter, Deployment},
        golden,
        load::{self, Decode, Loaded, Plan},
    },
    priority, rollout,
    source::{
        local::{self, Fingerprint, FoundModel, FoundVersion, Origin, Scan},
        signed::{Outcome, Signatures},
    },
};

mod elsewhere;
mod orders;
mod routes;
mod sourced;

/// How nice the threads are that load models before the server is ready: they leave most of the processor to what is
/// served already, and yet other programs of the machine cannot keep it from starting.
const LOADER_NICENESS: i32 = 15;

/// What loading needs beside the plan.
#[derive(Clone)]
pub struct Loader {
    pub backends: Backends,
    pub decode: Decode,
    pub metrics: Arc<Metrics>,
    pub signatures: Arc<Signatures>,
}

/// Follows the repository until it is cancelled.
pub struct Reconciler {
    settings: Settings,
    loader: Loader,
    writer: CatalogWriter,
    models: BTreeMap<ModelName, Tracked>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    loads: Arc<Semaphore>,
    loading: JoinSet<()>,
    drains: JoinSet<usize>,
    /// Without watching, what the first look found; with explicit control, changed by commands.
    first_scan: Option<Scan>,
    /// Without watching, what the settings said when the model was looked at.
    specs: BTreeMap<ModelName, Result<ModelSpec, Error>>,
    complete: bool,
    /// When the repository was looked at last.
    looked_at: rollout::Moment,
    orders: Orders,
    ordered: orders::Ordered,
    elsewhere: Elsewhere<Looked>,
    /// What mirrors held when something changed there last.
    mirrored: BTreeMap<ModelName, Looked>,
    rollouts: Rollouts,
}

/// Something that happened off the reconciler's task.
enum Event {
    Loaded {
        name: ModelName,
        version: Version,
        fingerprint: Fingerprint,
        /// What the files are like after the load; another fingerprint means that they changed while they were read.
        after: std::io::Result<Fingerprint>,
        /// How its signature was found, when anybody looked.
        signature: Option<Outcome>,
        result: Result<Box<Loaded>, Error>,
    },
}

impl Reconciler {
    pub fn new(settings: Settings, loader: Loader, writer: CatalogWriter, orders: Orders, state: SharedStore) -> Self {
        let loads = Arc::new(Semaphore::new(settings.load_concurrency.max(1)));
        let rollouts = Rollouts::new(state, loader.metrics.clone());
        Self {
            settings,
            loader,
            writer,
            models: BTreeMap::new(),
            events: mpsc::channel(64),
            loads,
            loading: JoinSet::new(),
            drains: JoinSet::new(),
            first_scan: None,
            specs: BTreeMap::new(),
            complete: false,
            looked_at: 0,
            orders,
            ordered: orders::Ordered::default(),
            elsewhere: Elsewhere::default(),
            mirrored: BTreeMap::new(),
            rollouts,
        }
    }

    /// Refuses what is ordered until `ready` ends: before that the repository is not what there is to serve.
    pub async fn refuse_until(&mut self, ready: impl Future<Output = ()>, why: impl Fn() -> String) {
        self.orders.refuse_until(ready, why).await;
    }

    /// Reconciles on every tick, kick, event and command. When told to stop it drains all versions, which may take as
    /// long as `stop` says, and returns how many requests were cut short.
    pub async fn run(mut self, mut kicks: mpsc::Receiver<()>, mut stop: oneshot::Receiver<Duration>) -> usize {
        let mut tick = tokio::time::interval(self.settings.poll_interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.rollouts.open().await;
        let limit = loop {
            let look = self.rollouts.next_look();
            tokio::select! {
                limit = &mut stop => break limit.unwrap_or_default(),
                // A judge's look needs none at the repository.
                () = tokio::time::sleep_until(look.into()) => {
                    self.promote().await;
                    continue;
                }
                _ = tick.tick() => {}
                Some(()) = kicks.recv() => {}
                Some(event) = self.events.1.recv() => self.handle(event).await,
                Some(command) = self.orders.0.recv() => self.obey(command).await,
                Some(_) = self.drains.join_next() => {}
                Some(_) = self.loading.join_next() => {}
            }
            while let Ok(event) = self.events.1.try_recv() {
                self.handle(event).await;
            }
            self.pass().await;
        };
        self.shut_down(limit).await
    }

    async fn pass(&mut self) {
        match self.scan().await {
            Ok(scan) => {
                let sourced = self.sourced(&scan).await;
                self.step(&sourced);
                self.complete |= self.is_complete(&scan);
            }
            // A folder that cannot be read for a moment is no reason to unload what runs.
            Err(error) => {
                tracing::warn!(models = %self.settings.models.display(), %error, "the repository cannot be read");
            }
        }
        self.publish();
        self.promote().await;
        self.answer();
    }

    /// What there is and shall be looked at, by the control mode.
    async fn scan(&mut self) -> std::io::Result<Scan> {
        self.looked_at = promote::now();
        if let (Some(first), true) = (&self.first_scan, self.settings.control != ModelControl::Watch) {
            return Ok(first.clone());
        }
        let (root, backends) = (self.settings.models.clone(), self.loader.backends.clone());
        let mut scan = tokio::task::spawn_blocking(move || local::scan(&root, |name| backends.knows(name)))
            .await
            .map_err(std::io::Error::other)??;
        let wanted = &self.settings.load_models;
        if self.settings.control == ModelControl::Explicit {
            for text in wanted.iter().filter(|text| *text != "*") {
                // A model that is not there shall show as one that failed.
                match ModelName::parse(text) {
                    Ok(name) => {
                        let directory = self.settings.models.join(text);
                        scan.entry(name).or_insert(FoundModel { directory, ..FoundModel::default() });
                    }
                    Err(error) => tracing::error!(%error, "this model cannot be loaded"),
                }
            }
            scan.retain(|name, _| wanted.iter().any(|wanted| wanted == "*" || wanted == name.as_str()));
        }
        if self.first_scan.is_none() {
            self.first_scan = Some(scan.clone());
        }
        Ok(scan)
    }

    fn step(&mut self, scan: &Sourced) {
        let missing: Vec<ModelName> = self.models.keys().filter(|name| !scan.contains_key(*name)).cloned().collect();
        for name in missing {
            let Some(model) = self.models.get_mut(&name) else { continue };
            model.problem = None;
            model.forget_missing(&[]);
            self.retire_unwanted(&name, true);
            if self.models.get(&name).is_some_and(|model| model.versions.is_empty()) {
                self.models.remove(&name);
            }
        }
        for (name, (found, spec)) in scan {
            self.step_model(name, found, spec);
        }
        self.want_places();
    }

    fn step_model(&mut self, name: &ModelName, found: &FoundModel, spec: &Result<ModelSpec, Error>) {
        let pointed_by = self.pointed_by(name, found, spec);
        let mut found = Cow::Borrowed(found);
        if let PointedBy::Alias(alias) = &pointed_by
            && let Some(pointer) = self.rollouts.standing(name).aliases.get(alias.as_str())
        {
            found.to_mut().follow(pointer.clone());
        }
        let found = found.as_ref();
        if let Some(error) = &found.unreadable {
            // What runs keeps running; whether its files are still there, nobody knows.
            tracing::warn!(model = %name, error, "the model's folder cannot be read");
            self.models.entry(name.clone()).or_default().problem = Some(error.clone());
            return;
        }
        let awaited = self.ordered.is_awaited(name);
        let standing = self.rollouts.standing(name);
        let model = self.models.entry(name.clone()).or_default();
        let Targets { wanted: targets, held } = targets(&model.versions, found, spec, standing, promote::now());
        let first_pass = !self.complete;
        let mut to_load = Vec::new();
        if let Ok(spec) = spec {
            model.policy.clone_from(&spec.versions);
            model.settings.clone_from(&spec.rollout);
        }
        model.found.clone_from(&found.versions);
        model.pointer.clone_from(&found.pointer);
        model.pointed_by = pointed_by;
        model.problem = match spec {
            Err(error) if found.versions.is_empty() => Some(error.message.clone()),
            _ if found.versions.is_empty() && model.source.is_some() => {
                model.source.as_ref().map(|uri| sourced::nothing(&self.settings.places, name, uri))
            }
            _ if found.versions.is_empty() => Some("the repository holds no version of it (1, 2, …)".to_owned()),
            _ if targets.is_empty() && found.versions.iter().all(|found| model.find(&found.version).is_none()) => {
                Some("the version policy selects none of the versions in the folder".to_owned())
            }
            _ => None,
        };
        let is_mirrored = is_mirrored(&self.settings, found);
        for Target { found: wanted, selected, needed } in &targets {
            let tracked = model.find_or_insert(name, &wanted.version, &self.loader.metrics);
            (tracked.selected, tracked.needed) = (*selected, *needed);
            tracked.seen(wanted);
            let fingerprint = wanted.fingerprint;
            let held = matches!(tracked.progress, Progress::Held { .. });
            let again = tracked.progress.is_due_again();
            let fresh = held || again || tracked.progress.fingerprint() != Some(fingerprint);
            if fresh {
                let serves = tracked.serving.as_ref().is_some_and(|(_, served)| *served == fingerprint);
                tracked.progress = if serves {
                    Progress::Done { fingerprint }
                } else {
                    Progress::Settling { fingerprint, since: Instant::now(), failed: None }
                };
            }
            let Progress::Settling { since, .. } = &tracked.progress else { continue };
            if *since > Instant::now() {
                // A load is tried again then.
                continue;
            }
            // At start, and of what an operator asks for, nobody has watched the files yet; their age says as much.
            // Whoever asks for a load says that they are complete; should they change all the same, they settle before
            // the next try.
            let settled = is_mirrored
                || since.elapsed() >= SETTLE_TIME
                || ((first_pass || *needed) && fingerprint.older_than(SETTLE_TIME))
                || (fresh && awaited);
            if settled {
                let claim = Arc::new(());
                to_load.push((wanted.clone(), Arc::downgrade(&claim)));
                tracked.progress = Progress::Loading { fingerprint, claim };
            }
        }
        for (held, reason) in held {
            let tracked = model.find_or_insert(name, &held.version, &self.loader.metrics);
            tracked.seen(&held);
            tracked.progress = Progress::Held { fingerprint: held.fingerprint, reason };
        }
        for tracked in &mut model.versions {
            let wanted = targets.iter().any(|wanted| wanted.found.version == tracked.version);
            tracked.selected &= wanted;
            tracked.needed &= wanted || standing.needs(&tracked.version, promote::now());
            let there = found.versions.iter().any(|found| found.version == tracked.version);
            tracked.wanted = wanted;
            if there && !wanted && !matches!(tracked.progress, Progress::Failed { .. } | Progress::Held { .. }) {
                tracked.progress = Progress::Gone;
            }
        }
        model.forget_missing(&found.versions);
        // Where versions are on their way, or nobody can tell whether there are any, what serves does so until then.
        let is_bare = model.source.is_none() || model.is_bare;
        for (wanted, claim) in to_load {
            self.start_load(name, found, wanted, claim, spec.clone());
        }
        self.retire_unwanted(name, found.versions.is_empty() && is_bare);
    }

    /// Who says which version is the one to serve.
    fn pointed_by(&self, name: &ModelName, found: &FoundModel, spec: &Result<ModelSpec, Error>) -> PointedBy {
        if found.pointer.version().is_some() {
            return PointedBy::Registry;
        }
        match (spec, self.models.get(name)) {
            (Ok(spec), _) => PointedBy::Alias(spec.followed_alias().to_owned()),
            // Broken settings say nothing.
            (Err(_), Some(model)) => model.pointed_by.clone(),
            (Err(_), None) => PointedBy::Nobody,
        }
    }

    /// What the model's settings are. Without watching, changes to the file wait until the model is looked at again.
    fn spec(&mut self, name: &ModelName, found: &FoundModel) -> Result<ModelSpec, Error> {
        let is_mirror = self.settings.is_mirror;
        let read = || ModelSpec::read(&found.settings, name)?.checked_for(is_mirror);
        match self.ordered.overrides.get(name) {
            Some(ordered) => Ok(ordered.spec.clone()),
            None if self.settings.control == ModelControl::Watch => read(),
            None => self.specs.entry(name.clone()).or_insert_with(read).clone(),
        }
    }

    fn start_load(
        &mut self,
        name: &ModelName,
        found: &FoundModel,
        wanted: FoundVersion,
        claim: Weak<()>,
        spec: Result<ModelSpec, Error>,
    ) {
        let events = self.events.0.clone();
        let loads = self.loads.clone();
        let loader = self.loader.clone();
        let name = name.clone();
        let FoundVersion { version, files, fingerprint, .. } = wanted;
        let directory = found.directory.clone();
        let plan = spec.map(|spec| self.plan(&name, &version, files.clone(), found, spec));
        let check = plan.as_ref().ok().map(|plan| plan.signature.clone());
        let ordered = self.ordered.overrides.get(&name);
        let config = ordered.map(|ordered| ordered.config.clone());
        // Uploaded files stay as long as they are read.
        let upload = ordered.and_then(|ordered| ordered.upload.clone());
        // Requests come once the server is ready.
        let quiet = self.complete;
        tracing::info!(model = %name, %version, "loading");
        self.loading.spawn(async move {
            // Closed when the server stops: what has not begun to load need not.
            let Ok(_permit) = loads.acquire_owned().await else { return };
            if claim.strong_count() == 0 {
                return tracing::info!(model = %name, %version, "not loaded: nobody wants it any more");
            }
            // The files are looked at there too: their disk may take its time, or for ever.
            let loading = move || {
                let result = plan.and_then(|plan| load::load(plan, &loader.backends, loader.decode));
                Ok((result, local::fingerprint(&files, &directory)))
            };
            let (result, after) = match on_loader_thread(quiet, loading).await {
                Ok((result, after)) => (result.map(Box::new), after),
                Err(error) => (Err(error), Err(std::io::Error::other("not looked at"))),
            };
            let after = after.map(|after| config.map_or(after, |config| after.with(&config)));
            drop(upload);
            let signature = check.and_then(|check| check.found());
            // The receiver is gone only when the server stops; then nobody wants the model any more.
            let _ = events.send(Event::Loaded { name, version, fingerprint, after, signature, result }).await;
        });
    }

    fn plan(
        &self,
        name: &ModelName,
        version: &Version,
        files: std::path::PathBuf,
        found: &FoundModel,
        spec: ModelSpec,
    ) -> Plan {
        let Settings { profile, cores, .. } = self.settings;
        let stable = self.models.get(name).and_then(|model| model.stable(self.rollouts.standing(name)));
        let runtime = tokio::runtime::Handle::current();
        Plan {
            name: name.clone(),
            version: version.clone(),
            interface: spec.interface(),
            options: spec.resolved_options(profile),
            instances: spec.instances(profile, cores),
            groups: spec.instance_group,
            cores,
            backend: spec.backend,
            file_name: spec.file_name,
            max_batch_size: spec.max_batch_size,
            batching: spec.batching,
            schedule: spec.queue,
            labels: spec.labels.iter().map(|(output, path)| (output.clone(), found.directory.join(path))).collect(),
            configured_samples: spec.warmup.iter().map(|path| found.directory.join(path)).collect(),
            described_samples: (spec.warmup_requests, found.directory.join(local::SAMPLES)),
            sample_folders: vec![files.join(local::SAMPLES), found.directory.join(local::SAMPLES)],
            check_signature: spec.check_signature.unwrap_or(true),
            text: spec.text,
            golden: golden::Check {
                settings: spec.golden,
                folders: [files.clone(), found.directory.clone()],
                stable: stable.map(|version| golden::Stable { version, runtime }),
            },
            metrics: self.loader.metrics.version(name.as_str(), version.as_str()),
            parameters: spec.parameters,
            predictions: spec.predictions.unwrap_or(true),
            notes: spec.notes,
            signature: self.loader.signatures.check(name.as_str()),
            is_mirrored: is_mirrored(&self.settings, found),
            files,
        }
    }

    async fn handle(&mut self, event: Event) {
        let Event::Loaded { name, version, fingerprint, after, signature, result } = event;
        let tracked = self.models.get_mut(&name).and_then(|model| model.find(&version));
        let Some(tracked) = tracked.filter(|tracked| {
            matches!(tracked.progress, Progress::Loading { fingerprint: loading, .. } if loading == fingerprint)
        }) else {
            tracing::info!(model = %name, %version, "loaded in vain: it changed or went away meanwhile");
            return;
        };
        tracked.signature = signature.map(Arc::new);
        if let Ok(after) = after
            && after != fingerprint
        {
            tracing::info!(model = %name, %version, "its files changed while they were read; loading again");
            tracked.progress = Progress::Settling { fingerprint: after, since: Instant::now(), failed: None };
            // Without watching, the first look is all there is; it shall know of the files as they are now.
            self.specs.remove(&name);
            let first_look = self.first_scan.as_mut().and_then(|scan| scan.get_mut(&name));
            let seen = first_look.and_then(|model| model.versions.iter_mut().find(|found| found.version == version));
            if let Some(seen) = seen {
                seen.fingerprint = after;
            }
            return;
        }
        let started =
            result.and_then(|loaded| ModelVersion::start(*loaded, self.settings.queue, tracked.metrics.clone()));
        match started {
            Ok(ready) => {
                log_ready(&ready);
                tracked.progress = Progress::Done { fingerprint };
                // These are the files that were seen last: others would have another fingerprint.
                tracked.served_stamp = tracked.stamp;
                let replaced = tracked.serving.replace((Arc::new(ready), fingerprint));
                self.publish();
                self.retire(replaced.map(|(old, _)| old));
            }
            // While one is refused for longer, the version before it is to serve.
            Err(error)
                if let Some(pause) = error.retry_after
                    && (error.code != Code::Forbidden || pause <= SETTLE_TIME) =>
            {
                tracing::warn!(model = %name, %version, %error, "loading failed for now");
                let failed = Some(error.message);
                tracked.progress = Progress::Settling { fingerprint, since: Instant::now() + pause, failed };
            }
            Err(error) => {
                tracing::error!(model = %name, %version, %error, "loading failed");
                let entry = routes::kept_out(&name, &version, &error);
                let again = error.retry_after.map(|pause| Instant::now() + pause);
                tracked.progress = Progress::Failed { fingerprint, error, again };
                if again.is_none() {
                    self.rollouts.log(entry).await;
                }
            }
        }
    }

    /// Drains what is no longer wanted, once everything that is wanted serves (at once, when nothing is wanted).
    fn retire_unwanted(&mut self, name: &ModelName, nothing_wanted: bool) {
        let Some(model) = self.models.get_mut(name) else { return };
        let ready = model.versions.iter().all(|tracked| !tracked.progress.is_under_way());
        let successor = model.versions.iter().any(|tracked| matches!(tracked.progress, Progress::Done { .. }));
        let may_retire = nothing_wanted || (ready && successor);
        let mut retired = Vec::new();
        model.versions.retain_mut(|tracked| {
            let gone = tracked.progress == Progress::Gone;
            let failed = matches!(tracked.progress, Progress::Failed { .. } | Progress::Held { .. });
            let unwanted = gone || (failed && !tracked.wanted);
            if !unwanted || (tracked.serving.is_some() && (!may_retire || (tracked.needed && !nothing_wanted))) {
                return true;
            }
            if let Some((old, _)) = tracked.serving.take() {
                tracked.metrics.state(State::Draining.as_str(), &State::NAMES);
                retired.push(old);
            }
            // What failed stays known, so that operators see why.
            failed
        });
        if !retired.is_empty() {
            self.publish();
            retired.into_iter().for_each(|old| self.retire(Some(old)));
        }
    }

    /// Lets a version that is no longer published finish its requests, then frees it, all off the serving threads.
    fn retire(&mut self, version: Option<Arc<ModelVersion>>) {
        let Some(version) = version else { return };
        let limit = self.settings.drain_timeout;
        tracing::info!(model = %version.name, version = %version.version, in_flight = version.in_flight(), "draining");
        self.drains.spawn_blocking(move || {
            let cut = version.drain(limit);
            heap::trim();
            tracing::info!(model = %version.name, version = %version.version, cut_short = cut, "unloaded");
            cut
        });
    }

    fn is_complete(&self, scan: &Scan) -> bool {
        scan.keys().all(|name| {
            self.models
                .get(name)
                .is_none_or(|model| model.versions.iter().all(|tracked| !tracked.progress.is_under_way()))
                && !self.awaits_source(name)
        })
    }

    fn publish(&mut self) {
        let deployment =
            |(name, model): (&ModelName, &Tracked)| (name.clone(), model.deployment(self.rollouts.standing(name)));
        let deployments: BTreeMap<ModelName, Deployment> = self.models.iter().map(deployment).collect();
        let serving = |only_copies| deployments.values().flat_map(move |model| model.serving(only_copies).cloned());
        let copied: Vec<Arc<ModelVersion>> = serving(true).collect();
        // Who is to be waited for makes haste before anybody comes, and slows down when nobody comes any more.
        serving(false).for_each(|version| set_background(&version, false));
        for (name, deployment) in &deployments {
            if let Some(model) = self.models.get_mut(name) {
                model.shown = deployment.entries.iter().any(|entry| entry.serving.is_some());
            }
        }
        self.writer.publish(Catalog { deployments, complete: self.complete });
        copied.iter().for_each(|version| set_background(version, true));
    }

    async fn shut_down(mut self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        self.rollouts.catch_up().await;
        self.events.1.close();
        self.orders.0.close();
        self.ordered.abandon();
        self.loads.close();
        self.settings.drain_timeout = limit;
        let serving: Vec<_> =
            self.models.values_mut().flat_map(|model| &mut model.versions).filter_map(|v| v.serving.take()).collect();
        serving.into_iter().for_each(|(version, _)| self.retire(Some(version)));
        let mut cut = 0;
        while let Some(drained) = self.drains.join_next().await {
            cut += drained.unwrap_or(0);
        }
        // A load cannot be stopped, and a library that is being used is not to be torn down.
        let loads = async { while self.loading.join_next().await.is_some() {} };
        if tokio::time::timeout_at(deadline.into(), loads).await.is_err() {
            tracing::warn!("a model was still loading");
        }
        cut
    }
}

/// Whether a model's versions lie where nobody but the server writes.
fn is_mirrored(settings: &Settings, found: &FoundModel) -> bool {
    settings.is_mirror || found.origin == Origin::Mirrored
}

fn set_background(version: &ModelVersion, background: bool) {
    if let Err(error) = version.set_background(background) {
        // It serves all the same, at the wrong priority.
        tracing::warn!(model = %version.name, version = %version.version, background, %error, "executors not changed");
    }
}

fn log_ready(version: &ModelVersion) {
    tracing::info!(
        model = %version.name,
        version = %version.version,
        seconds = version.load_duration.as_secs_f64(),
        instances = version.instances,
        batching = version.batching.reason,
        "ready"
    );
}

/// Runs `work` on a thread of its own: with others of this process serving, one that takes only what they leave of the
/// processor. Threads that operators run on are started elsewhere and have an executor's priority.
async fn on_loader_thread<T: Send + 'static>(
    quiet: bool,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let spawned = std::thread::Builder::new().name("load".to_owned()).spawn(move || {
        if quiet {
            priority::step_back();
        } else {
            // On Linux niceness belongs to the thread. Where it is refused, loading is merely not as quiet.
            let _ = rustix::process::nice(LOADER_NICENESS);
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let _ = sender.send(result.unwrap_or_else(|_| Err(Error::internal("loading panicked"))));
    });
    spawned.map_err(|error| Error::internal(format!("cannot start a loader thread: {error}")))?;
    let result = receiver.await.unwrap_or_else(|_| Err(Error::internal("the loader thread ended without a result")));
    // Not on the loader's thread: whoever waits for the heap's lock must not wait for a thread that gets no turn. Memory
    // that is not returned now is used by the next load.
    let _ = tokio::task::spawn_blocking(heap::trim).await;
    result
}
