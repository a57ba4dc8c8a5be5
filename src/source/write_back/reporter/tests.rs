//! Who writes back, to a registry that is the test's, in paused time.

use std::ops::Range;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::*;
use crate::source::{
    ByteStream, Look, RemoteFile, RemoteModel, RemoteVersion, SourceUri, WriteBack, follow::WrittenBack,
};

/// What the registry was told, and what is to be said.
#[derive(Default)]
struct Book {
    told: Option<Told>,
    served: Served,
    /// Whether no version serves any more.
    is_gone: bool,
    /// Whether nobody can say anything.
    panics: bool,
    /// Tags as they were written, `version state`.
    records: Vec<String>,
    promotions: Vec<Promotion>,
    moved: Option<Moved>,
    /// Requests of each time that was measured.
    measured: Vec<u64>,
    /// What was tried to be said of them.
    rows: Vec<Measured>,
    /// What the next calls answer.
    failures: Vec<SourceError>,
    /// The version for which tags are never taken.
    broken: Option<String>,
    /// Whether calls are never answered.
    hangs: bool,
    calls: usize,
}

struct Registry {
    uri: SourceUri,
    book: Arc<Mutex<Book>>,
}

struct Known(Arc<Mutex<Book>>);

#[async_trait]
impl Source for Registry {
    fn uri(&self) -> &SourceUri {
        &self.uri
    }

    fn recorder(&self) -> Option<&dyn Recorder> {
        Some(self)
    }

    async fn look(&self) -> Result<Look, SourceError> {
        unreachable!()
    }

    async fn artifact(&self, _: &ModelName, _: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        unreachable!()
    }

    async fn read(&self, _: &RemoteFile, _: Range<u64>) -> Result<ByteStream, SourceError> {
        unreachable!()
    }
}

impl Registry {
    async fn call(&self) -> Result<parking_lot::MutexGuard<'_, Book>, SourceError> {
        let failure = {
            let mut book = self.book.lock();
            book.calls += 1;
            book.failures.pop()
        };
        if let Some(error) = failure {
            return Err(error);
        }
        if self.book.lock().hangs {
            std::future::pending::<()>().await;
        }
        Ok(self.book.lock())
    }
}

#[async_trait]
impl Recorder for Registry {
    async fn record(&self, version: &Version, record: &Record) -> Result<bool, SourceError> {
        let said = format!("{version} {}", record.state.as_deref().unwrap_or("-"));
        let mut book = self.call().await?;
        if book.broken.as_deref() == Some(version.as_str()) {
            return Err(away());
        }
        book.records.push(said);
        Ok(true)
    }

    async fn promote(&self, promotion: &Promotion) -> Result<Moved, SourceError> {
        let mut book = self.call().await?;
        book.promotions.push(promotion.clone());
        Ok(book.moved.clone().unwrap_or(Moved::Written))
    }

    async fn measured(&self, _: &Version, measured: &Measured) -> Result<(), SourceError> {
        self.book.lock().rows.push(measured.clone());
        self.call().await?.measured.push(measured.served.requests);
        Ok(())
    }
}

impl Teller for Known {
    fn told(&self, _: &ModelName) -> Option<Told> {
        let book = self.0.lock();
        assert!(!book.panics, "as told");
        book.told.clone()
    }

    fn served(&self, _: &ModelName, _: &str) -> Option<Served> {
        let book = self.0.lock();
        (!book.is_gone).then(|| book.served.clone())
    }
}

struct Fixture {
    book: Arc<Mutex<Book>>,
    reporter: Reporter,
    status: SharedStatus,
    models: BTreeMap<ModelName, super::Known>,
}

impl Fixture {
    fn new(settings: WriteBack) -> Self {
        let book = Arc::new(Mutex::new(Book::default()));
        book.lock().told = Some(Told { settings, ..Told::default() });
        let uri = SourceUri::parse("mlflow://host/iris@live").unwrap();
        let status = SharedStatus::new(uri.to_string());
        let model = RemoteModel { default: Some(Version::parse("1").unwrap()), ..RemoteModel::default() };
        status.answered(&Look { models: [(ModelName::parse("iris").unwrap(), model)].into() });
        let source = Arc::new(Registry { uri, book: book.clone() });
        let reporter = Reporter::new(source, Box::new(Known(book.clone())), status.clone(), FollowConfig::default());
        Self { book, reporter, status, models: BTreeMap::new() }
    }

    /// From now on a version is in a state.
    fn is(&self, version: &str, state: Option<&str>) {
        let record = Record { state: state.map(ToOwned::to_owned), ..Record::default() };
        self.book.lock().told.as_mut().unwrap().records.insert(version.to_owned(), record);
    }

    fn serves(&self, requests: u64) {
        let mut book = self.book.lock();
        book.served.requests += requests;
        (0..requests).for_each(|_| book.served.latency.add(0.01));
    }

    fn fails(&self, errors: Vec<SourceError>) {
        self.book.lock().failures = errors;
    }

    async fn round(&mut self) -> WrittenBack {
        self.reporter.round(&mut self.models, false).await;
        self.status.read().write_back.unwrap_or_default()
    }

    /// How many calls there were in so many seconds.
    async fn calls_in(&mut self, seconds: u64) -> usize {
        let before = self.book.lock().calls;
        for _ in 0..seconds {
            tokio::time::advance(Duration::from_secs(1)).await;
            self.round().await;
        }
        self.book.lock().calls - before
    }

    fn records(&self) -> Vec<String> {
        std::mem::take(&mut self.book.lock().records)
    }
}

fn tags() -> WriteBack {
    WriteBack { tags: true, ..WriteBack::default() }
}

fn metrics() -> WriteBack {
    WriteBack { metrics: true, ..WriteBack::default() }
}

fn away() -> SourceError {
    SourceError::Unavailable { place: "mlflow://host".to_owned(), reason: "500".to_owned() }
}

#[tokio::test(start_paused = true)]
async fn only_changes_are_said_and_a_version_that_went_is_unloaded() {
    let mut fixture = Fixture::new(tags());
    fixture.is("1", None);
    assert_eq!(fixture.calls_in(3).await, 0);
    fixture.is("1", Some("ready"));
    assert_eq!(fixture.calls_in(30).await, 1);
    // While it drains, nothing is to be said.
    fixture.is("1", None);
    assert_eq!(fixture.calls_in(3).await, 0);
    fixture.is("2", Some("ready"));
    fixture.book.lock().told.as_mut().unwrap().records.remove("1");
    assert_eq!(fixture.calls_in(30).await, 2);
    assert_eq!(fixture.records(), ["1 ready", "2 ready", "1 unloaded"]);
    let written = fixture.round().await;
    assert!(written.last.is_some() && written.failed.is_none());
    assert_eq!(written.tries, [(Outcome::Written, 3)].into());
    // Turned off, nothing is known or said any more.
    fixture.book.lock().told.as_mut().unwrap().settings = WriteBack::default();
    fixture.round().await;
    assert_eq!((fixture.status.read().write_back, fixture.models.len()), (None, 0));
}

#[tokio::test(start_paused = true)]
async fn what_fails_is_tried_again_later_and_only_the_latest_counts() {
    let mut fixture = Fixture::new(tags());
    fixture.is("1", Some("ready"));
    fixture.fails(vec![away(), away(), away()]);
    let written = fixture.round().await;
    assert_eq!(written.failed.map(|(_, error)| error).as_deref(), Some("mlflow://host does not answer: 500"));
    fixture.is("1", Some("failed: later"));
    // After 10 s, and 20 s more, and 40 s more, give or take a tenth.
    assert_eq!(fixture.calls_in(8).await, 0);
    assert_eq!(fixture.calls_in(4).await, 1);
    assert_eq!(fixture.calls_in(14).await, 0);
    assert_eq!(fixture.calls_in(12).await, 1);
    assert_eq!(fixture.calls_in(50).await, 1);
    assert_eq!(fixture.records(), ["1 failed: later"]);
    let written = fixture.round().await;
    assert_eq!((written.failed, written.tries), (None, [(Outcome::Written, 1), (Outcome::Failed, 3)].into()));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_always_fails_holds_up_no_other_for_ever() {
    let mut fixture = Fixture::new(tags());
    fixture.book.lock().broken = Some("1".to_owned());
    fixture.is("1", Some("ready"));
    fixture.is("2", Some("ready"));
    fixture.calls_in(20).await;
    assert_eq!(fixture.records(), ["2 ready"]);
    fixture.is("2", Some("held: later"));
    fixture.calls_in(200).await;
    assert_eq!(fixture.records(), ["2 held: later"]);
    // One that is gone is given up some time.
    fixture.book.lock().told.as_mut().unwrap().records.remove("1");
    fixture.calls_in(3600).await;
    assert_eq!(fixture.calls_in(3600).await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_version_that_cannot_be_written_to_holds_up_no_other() {
    let mut fixture = Fixture::new(tags());
    fixture.is("1", Some("ready"));
    fixture.is("2", Some("ready"));
    let place = "mlflow://host".to_owned();
    fixture.fails(vec![SourceError::Denied { place: place.clone(), reason: "403".to_owned() }]);
    let written = fixture.round().await;
    assert_eq!(fixture.records(), ["2 ready"]);
    assert_eq!(written.tries, [(Outcome::Written, 1), (Outcome::Denied, 1)].into());
    assert!(written.failed.is_some_and(|(_, error)| error.contains("refuses: 403")));
    // Of one that was deleted there nothing is to be said.
    fixture.fails(vec![SourceError::NotFound { place, what: "version 1".to_owned() }]);
    assert_eq!(fixture.calls_in(60).await, 1);
    assert_eq!(fixture.round().await.failed, None);
}

#[tokio::test(start_paused = true)]
async fn metrics_are_of_each_interval_in_which_something_was_served() {
    let mut fixture = Fixture::new(metrics());
    fixture.is("1", Some("ready"));
    fixture.serves(5);
    assert_eq!(fixture.calls_in(59).await, 0);
    assert_eq!(fixture.calls_in(120).await, 1);
    fixture.serves(2);
    fixture.fails(vec![away()]);
    fixture.calls_in(60).await;
    fixture.serves(1);
    fixture.calls_in(120).await;
    // Loaded anew.
    fixture.book.lock().served = Served::default();
    fixture.serves(1);
    fixture.calls_in(60).await;
    assert_eq!(fixture.book.lock().measured, [5, 2, 1, 1]);
    assert!(fixture.records().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_promotion_that_could_not_be_said_comes_before_the_next() {
    let mut fixture = Fixture::new(WriteBack { promoted_alias: Some("champion".into()), ..WriteBack::default() });
    let version = |number: u64| Version::parse(&number.to_string()).unwrap();
    let promotion = |number| Promotion {
        alias: "champion".into(),
        rollout: format!("m/r{number} at {number}"),
        from: version(number),
        to: version(number + 1),
        is_undone: false,
    };
    {
        let mut book = fixture.book.lock();
        book.told.as_mut().unwrap().promotion = Some(promotion(1));
        book.failures = vec![SourceError::Full("no".into())];
    }
    fixture.round().await;
    // The next rollout begins, and is over, before there is another try.
    fixture.book.lock().told.as_mut().unwrap().promotion = None;
    assert!(fixture.round().await.failed.is_some(), "it is still owed");
    fixture.book.lock().told.as_mut().unwrap().promotion = Some(promotion(2));
    fixture.round().await;
    assert!(fixture.book.lock().promotions.is_empty());
    tokio::time::advance(Duration::from_secs(60)).await;
    fixture.round().await;
    fixture.round().await;
    assert_eq!(fixture.book.lock().promotions, [promotion(1), promotion(2)]);
}

#[tokio::test(start_paused = true)]
async fn a_promotion_is_said_once_and_so_is_its_end() {
    let mut fixture = Fixture::new(WriteBack { promoted_alias: Some("champion".to_owned()), ..WriteBack::default() });
    let version = |text| Version::parse(text).unwrap();
    let (alias, rollout) = ("champion".to_owned(), "iris/r1 at 17".to_owned());
    let mut promotion = Promotion { alias, rollout, from: version("1"), to: version("2"), is_undone: false };
    fixture.book.lock().told.as_mut().unwrap().promotion = Some(promotion.clone());
    fixture.fails(vec![away()]);
    assert_eq!(fixture.calls_in(60).await, 2);
    let said = fixture.round().await.alias;
    assert_eq!(said.as_deref(), Some("alias 'champion' was set to version 2 by iris/r1 at 17"));
    promotion.is_undone = true;
    {
        let mut book = fixture.book.lock();
        book.told.as_mut().unwrap().promotion = Some(promotion);
        book.moved = Some(Moved::LeftAlone("to version 7".to_owned()));
    }
    assert_eq!(fixture.calls_in(60).await, 1);
    let said = fixture.round().await.alias.unwrap();
    assert!(said.contains("was not set to version 1") && said.ends_with("meanwhile, to version 7"), "{said}");
    let undone: Vec<bool> = fixture.book.lock().promotions.iter().map(|one| one.is_undone).collect();
    assert_eq!(undone, [false, true]);
}

#[tokio::test(start_paused = true)]
async fn what_was_served_last_is_written_when_the_server_stops() {
    let fixture = Fixture::new(metrics());
    fixture.is("1", Some("ready"));
    let cancel = CancellationToken::new();
    let running = tokio::spawn(fixture.reporter.run(cancel.clone()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    {
        let mut book = fixture.book.lock();
        book.served.requests = 4;
        assert!(book.measured.is_empty());
    }
    cancel.cancel();
    running.await.unwrap();
    assert_eq!(fixture.book.lock().measured, [4]);
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_says_nothing_does_not_keep_the_server_from_stopping() {
    let fixture = Fixture::new(tags());
    fixture.is("1", Some("ready"));
    fixture.book.lock().hangs = true;
    let cancel = CancellationToken::new();
    let running = tokio::spawn(fixture.reporter.run(cancel.clone()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    cancel.cancel();
    let before = Instant::now();
    running.await.unwrap();
    assert_eq!(before.elapsed(), LAST_TRY);
    assert!(fixture.book.lock().records.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_a_version_did_last_is_told_when_it_is_gone() {
    let mut fixture = Fixture::new(metrics());
    fixture.is("1", Some("ready"));
    fixture.serves(5);
    assert_eq!(fixture.calls_in(10).await, 0);
    {
        let mut book = fixture.book.lock();
        book.is_gone = true;
        book.told.as_mut().unwrap().records.clear();
    }
    fixture.fails(vec![away()]);
    assert_eq!(fixture.calls_in(1).await, 1);
    assert_eq!(fixture.calls_in(60).await, 1);
    assert_eq!(fixture.book.lock().measured, [5]);
    assert!(fixture.models.values().all(|known| known.versions.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn of_a_model_that_went_all_versions_are_unloaded() {
    let mut fixture = Fixture::new(tags());
    fixture.is("1", Some("ready"));
    fixture.is("2", Some("ready"));
    fixture.round().await;
    fixture.records();
    let told = fixture.book.lock().told.take();
    // A server that stops says no such thing.
    fixture.reporter.round(&mut fixture.models, true).await;
    assert!(fixture.records().is_empty());
    fixture.book.lock().told = told;
    fixture.calls_in(1).await;
    fixture.records();
    fixture.book.lock().told = None;
    assert_eq!(fixture.calls_in(30).await, 2);
    assert_eq!(fixture.records(), ["1 unloaded", "2 unloaded"]);
    assert!(fixture.models.values().all(|known| known.versions.is_empty()));
    // Nor is it known any longer when its place does not have it either.
    fixture.status.answered(&Look::default());
    assert_eq!(fixture.round().await, WrittenBack::default());
    assert!(fixture.models.is_empty());
}

#[tokio::test(start_paused = true)]
async fn without_a_run_metrics_are_not_missed() {
    let mut fixture = Fixture::new(metrics());
    fixture.is("1", Some("ready"));
    fixture.round().await;
    fixture.serves(5);
    let (place, what) = ("mlflow://host".to_owned(), "the run that made version 1".to_owned());
    fixture.fails(vec![SourceError::NotFound { place, what }]);
    assert_eq!(fixture.calls_in(90).await, 1);
    let written = fixture.round().await;
    assert_eq!((written.failed, written.tries), (None, [(Outcome::Unchanged, 1)].into()));
}

#[tokio::test(start_paused = true)]
async fn a_place_that_is_away_is_asked_once_and_not_for_each_version() {
    let mut fixture = Fixture::new(tags());
    for version in ["1", "2", "3"] {
        fixture.is(version, Some("ready"));
    }
    fixture.fails(vec![away(), away()]);
    fixture.round().await;
    assert_eq!(fixture.book.lock().calls, 1);
    assert_eq!(fixture.calls_in(8).await, 0);
    assert_eq!(fixture.calls_in(4).await, 1);
    assert_eq!(fixture.calls_in(14).await, 0);
    assert_eq!(fixture.calls_in(12).await, 3);
    // What has not failed goes first.
    assert_eq!(fixture.records(), ["3 ready", "1 ready", "2 ready"]);
    assert_eq!(fixture.round().await.failed, None);
}

#[tokio::test(start_paused = true)]
async fn a_failure_shows_while_the_rest_is_still_tried() {
    let mut fixture = Fixture::new(tags());
    fixture.is("1", Some("ready"));
    fixture.is("2", Some("ready"));
    fixture.fails(vec![SourceError::Denied { place: "mlflow://host".to_owned(), reason: "403".to_owned() }]);
    fixture.book.lock().hangs = true;
    assert!(timeout(Duration::from_secs(1), fixture.round()).await.is_err());
    let written = fixture.status.read().write_back.unwrap();
    assert!(written.failed.is_some_and(|(_, error)| error.contains("refuses: 403")));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_may_have_been_carried_out_is_made_again_as_it_was() {
    let mut fixture = Fixture::new(metrics());
    fixture.is("1", Some("ready"));
    fixture.serves(5);
    fixture.book.lock().hangs = true;
    fixture.round().await;
    tokio::time::advance(Duration::from_secs(60)).await;
    assert!(timeout(Duration::from_secs(1), fixture.round()).await.is_err());
    fixture.serves(1);
    fixture.book.lock().hangs = false;
    fixture.fails(vec![away()]);
    fixture.calls_in(20).await;
    {
        let book = fixture.book.lock();
        assert_eq!((&book.measured[..], book.rows.len()), (&[5][..], 3));
        assert!(book.rows.iter().all(|row| *row == book.rows[0]));
    }
    // What came meanwhile is told with the next interval, or when the server stops.
    fixture.reporter.round(&mut fixture.models, true).await;
    assert_eq!(fixture.book.lock().measured, [5, 1]);
}

#[tokio::test(start_paused = true)]
async fn who_panics_is_seen_to_write_back_no_longer() {
    let fixture = Fixture::new(tags());
    fixture.book.lock().panics = true;
    fixture.reporter.run_apart(CancellationToken::new()).await;
    let written = fixture.status.read().write_back.unwrap();
    let (_, error) = written.failed.unwrap();
    assert!(error.starts_with("writing back panicked: ") && error.contains("as told"), "{error}");
}
