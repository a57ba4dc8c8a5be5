//! The follower, with a place whose looks and failures are the test's, and in paused time.

use std::fs;

use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::source::cache::tests::{Shelf, cache};

/// Wants the newest version of each model.
#[derive(Clone, Default)]
struct Newest {
    /// What becomes of the versions of `m`; all others are in use.
    fates: Arc<Mutex<BTreeMap<String, Fate>>>,
}

impl Interest for Newest {
    fn wanted(&self, _: &Path, _: &ModelName, offered: &[Version]) -> Vec<Version> {
        offered.iter().rev().take(1).cloned().collect()
    }

    fn fate(&self, model: &ModelName, version: &Version) -> Fate {
        let fate = self.fates.lock().get(version.as_str()).copied().filter(|_| *model == name());
        fate.unwrap_or(Fate::InUse)
    }
}

struct Fixture {
    shelf: Arc<Shelf>,
    root: TempDir,
    follower: Option<Follower>,
    models: std::path::PathBuf,
    status: SharedStatus,
    newest: Newest,
}

impl Fixture {
    fn new(max_bytes: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let shelf = Shelf::new();
        let newest = Newest::default();
        let source: Arc<dyn Source> = shelf.clone();
        let cache = cache(root.path(), max_bytes);
        let mirror = Mirror::open(cache, "shelf").unwrap();
        let follower = Follower::new(source, mirror, FollowConfig::default(), Box::new(newest.clone()));
        let (models, status) = (follower.mirror().models(), follower.status());
        Self { shelf, root, follower: Some(follower), models, status, newest }
    }

    /// From now on, this becomes of a version of `m`.
    fn fate(&self, version: &str, fate: Fate) {
        self.newest.fates.lock().insert(version.to_owned(), fate);
    }

    /// One look and what follows; whether everything that there is to mirror was tried.
    async fn round(&mut self) -> bool {
        let (mirrored, told) = watch::channel(false);
        self.follower.as_mut().unwrap().round(&mirrored).await;
        tokio::time::advance(FollowConfig::default().interval).await;
        *told.borrow()
    }

    /// `model/version/file` for every file that is published.
    fn published(&self) -> Vec<String> {
        fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => walk(&path, root, found),
                    false => found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned()),
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.models, &self.models, &mut found);
        found.sort();
        found
    }

    /// What failed is tried at the next look.
    fn failures_are_over(&mut self) {
        self.follower.as_mut().unwrap().failed.clear();
    }

    fn problem(&self, version: &str) -> String {
        let problems = self.status.read().problems;
        problems[&(name(), Some(version.to_owned()))].error.to_string()
    }
}

fn name() -> ModelName {
    ModelName::parse("m").unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_is_new_is_published_and_what_is_gone_goes_after_a_while() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    shelf.version("m", "2", vec![shelf.put("model.onnx", b"two"), shelf.put("data/weights", b"w")]);
    shelf.version("other", "1", vec![shelf.put("model.onnx", b"other")]);
    let settings = shelf.put("model.toml", b"instances = 1");
    shelf.change(|models| models.get_mut(&name()).unwrap().beside = vec![settings]);
    assert!(fixture.round().await);
    let newest = ["m/2/data/weights", "m/2/model.onnx", "m/model.toml", "other/1/model.onnx"];
    assert_eq!(fixture.published(), newest);

    // Nothing new: nothing is read.
    let reads = shelf.reads.load(Ordering::Relaxed);
    assert!(fixture.round().await);
    assert_eq!(shelf.reads.load(Ordering::Relaxed), reads);

    // A new version, and the one before stays.
    shelf.version("m", "3", vec![shelf.put("model.onnx", b"three")]);
    shelf.change(|models| drop(models.remove(&ModelName::parse("other").unwrap())));
    fixture.round().await;
    assert_eq!(fixture.published()[2..], ["m/3/model.onnx", "m/model.toml", "other/1/model.onnx"]);
    fixture.round().await;
    assert_eq!(fixture.published()[2..], ["m/3/model.onnx", "m/model.toml"]);

    // Two looks at once, while somebody replaces it, do not count.
    let versions = shelf.look.lock().clone();
    shelf.change(|models| models.get_mut(&name()).unwrap().versions.retain(|one| one.version.as_str() != "3"));
    for _ in 0..2 {
        fixture.follower.as_mut().unwrap().round(&watch::channel(false).0).await;
    }
    assert_eq!(fixture.published()[2..], ["m/3/model.onnx", "m/model.toml"]);
    *shelf.look.lock() = versions;
    fixture.round().await;

    // Other bytes in the same version.
    shelf.version("m", "3", vec![shelf.put("model.onnx", b"changed")]);
    fixture.round().await;
    assert_eq!(fs::read(fixture.models.join("m/3/model.onnx")).unwrap(), b"changed");

    shelf.change(|models| models.get_mut(&name()).unwrap().versions.retain(|one| one.version.as_str() == "3"));
    fixture.round().await;
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/3/model.onnx", "m/model.toml"]);
}

#[tokio::test(start_paused = true)]
async fn what_the_pointer_points_at_is_mirrored_whatever_is_newest() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    shelf.version("m", "2", vec![shelf.put("model.onnx", b"two")]);
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("1").ok());
    // It may have left while the version was fetched, so it is looked at once more before it counts.
    assert!(!fixture.round().await);
    assert_eq!(fixture.published(), ["m/1/model.onnx", "m/2/model.onnx"]);
    assert!(fixture.round().await);
    assert_eq!(fixture.published(), ["m/.pointer", "m/1/model.onnx", "m/2/model.onnx"]);
    assert_eq!(fixture.status.read().defaults[&name()].as_str(), "1");
    let pointed = |fixture: &Fixture| {
        let pointer = crate::source::pointer::Pointer::read(&fixture.models.join("m")).unwrap();
        pointer.version().unwrap().to_string()
    };
    assert_eq!(pointed(&fixture), "1");

    // It comes along when the version is here, and not before.
    let mut refused = shelf.put("model.onnx", b"three");
    refused.path = "../model.onnx".into();
    shelf.version("m", "3", vec![refused]);
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("3").ok());
    fixture.round().await;
    assert_eq!(pointed(&fixture), "1");
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("2").ok());
    fixture.round().await;
    assert_eq!(pointed(&fixture), "2");

    // Back where it was when the new version has come.
    shelf.version("m", "4", vec![shelf.put("model.onnx", b"four")]);
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("4").ok());
    fixture.round().await;
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("2").ok());
    fixture.round().await;
    let way = fs::read_to_string(fixture.models.join("m/.pointer")).unwrap();
    assert!(pointed(&fixture) == "2" && !way.contains("4 "), "{way}");
    // Another version of that number is not what is here.
    shelf.version("m", "1", vec![shelf.put("../model.onnx", b"another")]);
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("1").ok());
    fixture.round().await;
    fixture.round().await;
    assert_eq!(pointed(&fixture), "2");
}

#[test]
fn no_place_is_left_alone_for_ever() {
    let error = SourceError::Limited {
        place: "shelf".into(),
        reason: "busy".into(),
        retry_after: Some(Duration::from_secs(u64::MAX)),
    };
    let pause = jittered(error.retry_after().unwrap());
    assert!(pause <= Duration::from_secs(4000) && Instant::now().checked_add(pause).is_some());
}

#[tokio::test(start_paused = true)]
async fn what_a_pointer_has_pointed_at_stays_while_it_is_used_and_the_last_of_it_beyond() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    // A place that shows nothing but what its pointer points at.
    for version in ["10", "9", "11", "12"] {
        shelf.change(|models| models.clear());
        shelf.version("m", version, vec![shelf.put("model.onnx", version.as_bytes())]);
        shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse(version).ok());
        fixture.round().await;
        fixture.round().await;
    }
    assert_eq!(fixture.published()[1..], ["m/10/model.onnx", "m/11/model.onnx", "m/12/model.onnx", "m/9/model.onnx"]);
    for version in ["10", "9", "11", "12"] {
        fixture.fate(version, Fate::Idle);
    }
    fixture.round().await;
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/.pointer", "m/11/model.onnx", "m/12/model.onnx"]);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_wants_or_uses_any_more_makes_room() {
    let mut fixture = Fixture::new(100);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", &[1; 40])]);
    fixture.round().await;
    shelf.version("m", "2", vec![shelf.put("model.onnx", &[2; 40])]);
    fixture.round().await;
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/1/model.onnx", "m/2/model.onnx"]);

    // It is out of use for good, not between two looks.
    fixture.fate("1", Fate::Idle);
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/1/model.onnx", "m/2/model.onnx"]);
    fixture.fate("1", Fate::InUse);
    fixture.round().await;
    fixture.fate("1", Fate::Idle);
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/1/model.onnx", "m/2/model.onnx"]);
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/2/model.onnx"]);

    // What is wanted stays, used or not, and so does what was there before it until it has come.
    fixture.fate("2", Fate::Idle);
    let third = shelf.put("model.onnx", &[3; 40]);
    shelf.version("m", "3", vec![RemoteFile { digest: Some(crate::source::Digest::Sha256([7; 32])), ..third.clone() }]);
    for _ in 0..3 {
        fixture.round().await;
    }
    assert_eq!(fixture.published(), ["m/2/model.onnx"]);
    fixture.failures_are_over();
    shelf.version("m", "3", vec![third]);
    fixture.round().await;
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/3/model.onnx"]);
    // Its bytes are what the next version's may take the place of.
    let reads = shelf.reads.load(Ordering::Relaxed);
    shelf.change(|models| models.get_mut(&name()).unwrap().versions.retain(|one| one.version.as_str() == "2"));
    fixture.round().await;
    assert!(fixture.published().contains(&"m/2/model.onnx".to_owned()));
    assert_eq!(shelf.reads.load(Ordering::Relaxed), reads);
}

#[tokio::test(start_paused = true)]
async fn nothing_makes_room_before_a_look_has_settled() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    fixture.round().await;
    shelf.version("m", "2", vec![shelf.put("model.onnx", b"two")]);
    fixture.round().await;
    fixture.fate("1", Fate::Idle);
    fixture.follower.as_mut().unwrap().settled = false;
    // The first of these settles, and only those that follow may count.
    fixture.round().await;
    assert!(fixture.follower.as_ref().unwrap().unwanted.is_empty());
    fixture.round().await;
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/2/model.onnx"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_used_again_while_others_are_fetched_stays() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    fixture.round().await;
    let look = shelf.look.lock().clone().unwrap();
    for (fate, left) in [(Fate::InUse, 1), (Fate::Idle, 0)] {
        fixture.fate("1", fate);
        for _ in 0..2 {
            let follower = fixture.follower.as_mut().unwrap();
            follower.unwanted.insert((name(), "1".to_owned()));
            follower.withdraw(&look).unwrap();
            tokio::time::advance(FollowConfig::default().interval).await;
        }
        assert_eq!(fixture.published().len(), left);
    }
}

#[tokio::test(start_paused = true)]
async fn for_a_version_that_fails_to_load_the_one_before_it_is_mirrored() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    for version in ["1", "2", "3", "4", "5"] {
        shelf.version("m", version, vec![shelf.put("model.onnx", version.as_bytes())]);
        fixture.fate(version, Fate::Idle);
    }
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/5/model.onnx"]);
    fixture.fate("5", Fate::Failed);
    for _ in 0..4 {
        fixture.round().await;
    }
    assert_eq!(fixture.published(), ["m/4/model.onnx", "m/5/model.onnx"]);

    // When all of them fail, it is something else, and not everything there ever was is fetched for it.
    for version in ["1", "2", "3", "4"] {
        fixture.fate(version, Fate::Failed);
    }
    for _ in 0..8 {
        fixture.round().await;
    }
    assert_eq!(fixture.published(), ["m/3/model.onnx", "m/4/model.onnx", "m/5/model.onnx"]);

    // Other bytes may do.
    shelf.version("m", "4", vec![shelf.put("model.onnx", b"better")]);
    fixture.round().await;
    fixture.fate("4", Fate::InUse);
    assert_eq!(fs::read(fixture.models.join("m/4/model.onnx")).unwrap(), b"better");
    // A newer one is fetched all the same, and nobody has to stand in for what failed.
    shelf.version("m", "6", vec![shelf.put("model.onnx", b"six")]);
    for _ in 0..3 {
        fixture.round().await;
    }
    assert_eq!(fixture.published(), ["m/4/model.onnx", "m/6/model.onnx"]);
}

#[tokio::test(start_paused = true)]
async fn a_place_that_is_away_or_empty_takes_nothing_with_it() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    assert!(fixture.round().await);
    let look = shelf.look.lock().clone();

    *shelf.look.lock() = Err(SourceError::Unavailable { place: "shelf".into(), reason: "gone fishing".into() });
    let since = {
        assert!(!fixture.round().await);
        let (since, said) = fixture.status.read().away.unwrap();
        assert_eq!(said, "shelf does not answer: gone fishing");
        since
    };
    *shelf.look.lock() = Ok(Look::default());
    fixture.round().await;
    fixture.round().await;
    let status = fixture.status.read();
    assert_eq!((status.away.unwrap(), status.failures), ((since, "any model is not at s3://shelf/models".into()), 3));
    assert_eq!(fixture.published(), ["m/1/model.onnx"]);

    *shelf.look.lock() = look;
    assert!(fixture.round().await);
    assert_eq!((fixture.status.read().away, fixture.status.read().failures), (None, 0));
}

#[tokio::test(start_paused = true)]
async fn looks_draw_apart_while_the_place_is_away() {
    let mut fixture = Fixture::new(1 << 20);
    *fixture.shelf.look.lock() =
        Err(SourceError::Limited { place: "shelf".into(), reason: "429".into(), retry_after: None });
    let (mirrored, _told) = watch::channel(false);
    let mut pauses = Vec::new();
    for _ in 0..7 {
        pauses.push(fixture.follower.as_mut().unwrap().round(&mirrored).await.as_secs_f64());
    }
    for (pause, expected) in pauses.iter().zip([10.0, 20.0, 40.0, 80.0, 120.0, 120.0, 120.0]) {
        assert!((expected * 0.9..expected * 1.1).contains(pause), "{pauses:?}");
    }
    let retry_after = Some(Duration::from_secs(600));
    *fixture.shelf.look.lock() = Err(SourceError::Limited { place: "shelf".into(), reason: "429".into(), retry_after });
    let pause = fixture.follower.as_mut().unwrap().round(&mirrored).await.as_secs_f64();
    assert!((540.0..660.0).contains(&pause), "{pause}");
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_is_never_tried_again_and_the_version_before_it_is_mirrored() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    for (path, said) in [("../escaped", "its path leaves the folder"), ("model.pkl", "by its name it is a pickle")] {
        shelf.version("m", "2", vec![shelf.put("model.onnx", b"two"), shelf.put(path, b"x")]);
        fixture.round().await;
        assert!(fixture.problem("2").contains(said), "{}", fixture.problem("2"));
        let reads = shelf.reads.load(Ordering::Relaxed);
        fixture.round().await;
        assert_eq!(fixture.published(), ["m/1/model.onnx"]);
        fixture.round().await;
        assert!(shelf.reads.load(Ordering::Relaxed) <= reads + 1);
    }
    assert!(!fixture.root.path().join("escaped").exists());
    shelf.version("m", "2", vec![shelf.put("model.onnx", b"two")]);
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/1/model.onnx", "m/2/model.onnx"]);
    assert!(fixture.status.read().problems.is_empty());
}

#[tokio::test(start_paused = true)]
async fn bytes_that_changed_since_they_were_listed_are_not_published() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    let mut file = shelf.put("model.onnx", b"one");
    file.digest = Some(crate::source::Digest::Sha256([7; 32]));
    shelf.version("m", "1", vec![file]);
    fixture.round().await;
    assert!(fixture.problem("1").contains("expected sha256:0707"), "{}", fixture.problem("1"));
    assert!(fixture.published().is_empty());
    // It may pass, so it is tried again, but not at once.
    let failed = &fixture.follower.as_ref().unwrap().failed[&(name(), "1".to_owned())];
    assert!(failed.again.unwrap() > Instant::now() + Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn a_version_for_which_there_is_no_room_leaves_the_others() {
    let mut fixture = Fixture::new(100);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", &[1; 60])]);
    fixture.round().await;
    shelf.version("m", "2", vec![shelf.put("model.onnx", &[2; 60])]);
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/1/model.onnx"]);
    assert!(fixture.problem("2").contains("no room for 60 bytes"), "{}", fixture.problem("2"));
}

#[tokio::test(start_paused = true)]
async fn models_that_share_files_fetch_them_once() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    let alike = |path: &str| RemoteFile { likeness: Some("weights".into()), ..shelf.put(path, &[1; 64]) };
    shelf.version("m", "1", vec![alike("model.onnx")]);
    shelf.version("other", "1", vec![alike("model.onnx")]);
    fixture.round().await;
    assert_eq!(fixture.published(), ["m/1/model.onnx", "other/1/model.onnx"]);
    assert_eq!(shelf.read.load(Ordering::Relaxed), 64);
}

#[tokio::test(start_paused = true)]
async fn following_wakes_and_ends_when_it_is_told_to() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    let follower = fixture.follower.take().unwrap();
    let (cancel, wake) = (CancellationToken::new(), follower.status().waker());
    let (mirrored, mut told) = watch::channel(false);
    let following = tokio::spawn(follower.run(cancel.clone(), mirrored));
    told.wait_for(|mirrored| *mirrored).await.unwrap();
    assert_eq!(fixture.published(), ["m/1/model.onnx"]);

    shelf.version("m", "2", vec![shelf.put("model.onnx", b"two")]);
    told.mark_unchanged();
    wake.notify_one();
    // Long before the next look by itself.
    timeout(Duration::from_secs(1), told.changed()).await.unwrap().unwrap();
    assert_eq!(fixture.published(), ["m/1/model.onnx", "m/2/model.onnx"]);

    cancel.cancel();
    timeout(Duration::from_secs(1), following).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_look_that_shows_nothing_new_is_not_told() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    let (kick, mut kicks) = mpsc::channel(8);
    let follower = fixture.follower.take().unwrap().telling(kick);
    let cancel = CancellationToken::new();
    let following = tokio::spawn(follower.run(cancel.clone(), watch::Sender::new(false)));
    let mut told = async || {
        let mut times = 0;
        while timeout(Duration::from_secs(300), kicks.recv()).await.is_ok() {
            times += 1;
        }
        times
    };
    assert_eq!(told().await, 1, "the first look");
    assert_eq!(told().await, 0, "the same ever since");
    shelf.version("m", "2", vec![shelf.put("model.onnx", b"two")]);
    assert_eq!(told().await, 1, "a version");
    let look = shelf.look.lock().clone();
    *shelf.look.lock() = Err(SourceError::Unavailable { place: "shelf".into(), reason: "gone fishing".into() });
    assert_eq!(told().await, 1, "once, however often it does not answer");
    *shelf.look.lock() = look;
    assert_eq!(told().await, 1, "it answers again");
    shelf.change(|models| models.get_mut(&name()).unwrap().versions.retain(|one| one.version.as_str() == "2"));
    assert_eq!(told().await, 1, "a version is gone");
    cancel.cancel();
    following.await.unwrap();
}

#[test]
fn pauses_grow_and_have_an_end() {
    let seconds = Duration::from_secs;
    let pauses = [1, 2, 3, 40].map(|failures| backed_off(seconds(10), seconds(35), failures));
    assert_eq!(pauses, [10, 20, 35, 35].map(seconds));
    assert_eq!(backed_off(seconds(60), seconds(35), 3), seconds(60));
}

#[tokio::test(start_paused = true)]
async fn a_host_that_asks_one_follower_for_patience_is_left_alone_by_all() {
    let root = tempfile::tempdir().unwrap();
    let cache = cache(root.path(), 1 << 20);
    let follower = |uri: &str| {
        let shelf = Shelf::at(uri);
        let mirror = Mirror::open(cache.clone(), uri).unwrap();
        let source: Arc<dyn Source> = shelf.clone();
        shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
        (Follower::new(source, mirror, FollowConfig::default(), Box::new(Newest::default())), shelf)
    };
    let [(mut busy, at_busy), (mut beside, _), (mut elsewhere, _)] =
        ["s3://host/busy", "s3://host/beside", "s3://elsewhere/a"].map(follower);
    let (place, reason) = ("s3://host/busy".into(), "429".into());
    let limited = SourceError::Limited { place, reason, retry_after: Some(Duration::from_secs(300)) };
    *at_busy.look.lock() = Err(limited);
    let mirrored = watch::channel(false).0;
    busy.round(&mirrored).await;
    let pause = beside.round(&mirrored).await;
    assert!(pause > Duration::from_secs(200), "{pause:?}");
    assert!(beside.mirror().published().unwrap().is_empty());
    let away = beside.status().read().away.unwrap().1;
    assert!(away.contains("s3://host/beside wants fewer calls: its host has asked for that"), "{away}");
    elsewhere.round(&mirrored).await;
    assert_eq!(elsewhere.mirror().published().unwrap().len(), 1);
    tokio::time::advance(Duration::from_secs(301)).await;
    beside.round(&mirrored).await;
    assert_eq!(beside.mirror().published().unwrap().len(), 1);
}

/// Wants all that there is.
struct All;

impl Interest for All {
    fn wanted(&self, _: &Path, _: &ModelName, offered: &[Version]) -> Vec<Version> {
        offered.to_vec()
    }

    fn fate(&self, _: &ModelName, _: &Version) -> Fate {
        Fate::Idle
    }
}

#[tokio::test]
async fn many_versions_take_no_longer_than_as_many_times_one() {
    let mut fixture = Fixture::new(1 << 20);
    let follower = fixture.follower.as_mut().unwrap();
    follower.interest = Box::new(All);
    let version = |number: usize| RemoteVersion {
        version: Version::parse(&number.to_string()).unwrap(),
        revision: "a".to_owned(),
    };
    let versions: Vec<RemoteVersion> = (1..=20_000).map(version).collect();
    for remote in &versions {
        let again = Some(Instant::now() + Duration::from_secs(3600));
        let failed = Failed { revision: remote.revision.clone(), times: 1, again };
        follower.failed.insert((name(), remote.version.to_string()), failed);
    }
    fixture.shelf.change(|models| models.entry(name()).or_default().versions = versions);
    let started = Instant::now();
    follower.round(&watch::channel(false).0).await;
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!(follower.failed.len(), 20_000);
}

#[tokio::test(start_paused = true)]
async fn names_move_while_files_stay() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    let point = |version: &str| {
        let aliases = [("live".to_owned(), version.to_owned())].into();
        *shelf.names.lock() = Some(crate::source::Names { aliases, ..Default::default() });
    };
    let aliases = |fixture: &Fixture, version: &str| {
        let found = crate::source::lineage::Provenance::of(&fixture.models.join("m").join(version)).unwrap();
        found.lineage.unwrap().aliases
    };
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    point("1");
    fixture.round().await;
    assert_eq!(aliases(&fixture, "1"), ["live"]);
    shelf.version("m", "2", vec![shelf.put("model.onnx", b"two")]);
    fixture.round().await;
    assert_eq!((aliases(&fixture, "1"), aliases(&fixture, "2")), (vec!["live".to_owned()], vec![]));
    let reads = shelf.reads.load(Ordering::Relaxed);
    point("2");
    fixture.round().await;
    assert_eq!((aliases(&fixture, "1"), aliases(&fixture, "2")), (vec![], vec!["live".to_owned()]));
    assert_eq!(shelf.reads.load(Ordering::Relaxed), reads);
    // A place that says nothing of names takes none away.
    *shelf.names.lock() = None;
    fixture.round().await;
    assert_eq!(aliases(&fixture, "2"), ["live"]);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_could_tell_when_it_was_mirrored_is_learned_later() {
    let mut fixture = Fixture::new(1 << 20);
    let shelf = fixture.shelf.clone();
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("1").ok());
    let aliases = |fixture: &Fixture| {
        let found = crate::source::lineage::Provenance::of(&fixture.models.join("m/1")).unwrap();
        found.lineage.map(|lineage| lineage.aliases)
    };
    let asked = || shelf.asked[1].load(Ordering::Relaxed);
    fixture.round().await;
    // A place that says nothing is not asked at every look.
    for _ in 0..5 {
        fixture.round().await;
    }
    assert_eq!((asked(), aliases(&fixture)), (1, None));
    tokio::time::advance(LINEAGE_INTERVAL).await;
    fixture.round().await;
    fixture.round().await;
    assert_eq!((asked(), aliases(&fixture)), (2, None));
    let live = [("live".to_owned(), "1".to_owned())].into();
    *shelf.names.lock() = Some(crate::source::Names { aliases: live, ..Default::default() });
    tokio::time::advance(LINEAGE_INTERVAL).await;
    fixture.round().await;
    fixture.round().await;
    assert_eq!((asked(), aliases(&fixture)), (3, Some(vec!["live".to_owned()])));

    // What a server mirrored that asked for none.
    let manifest = fixture.follower.as_ref().unwrap().mirror().manifest(&name(), &Version::parse("1").unwrap());
    let path = fixture.models.join("../manifests/m/versions/1.json");
    fs::write(&path, serde_json::to_vec(&Manifest { lineage: None, ..manifest.unwrap() }).unwrap()).unwrap();
    assert_eq!(aliases(&fixture), None);
    fixture.round().await;
    assert_eq!((asked(), aliases(&fixture)), (4, Some(vec!["live".to_owned()])));
}

#[tokio::test(start_paused = true)]
async fn what_is_pointed_at_waits_for_no_names() {
    let mut fixture = Fixture::new(1 << 20);
    let (kick, mut kicked) = mpsc::channel(1);
    fixture.follower = fixture.follower.take().map(|follower| follower.telling(kick));
    let shelf = fixture.shelf.clone();
    let asked = || shelf.asked[0].load(Ordering::Relaxed);
    shelf.version("m", "1", vec![shelf.put("model.onnx", b"one")]);
    shelf.change(|models| models.get_mut(&name()).unwrap().default = Version::parse("1").ok());
    fixture.round().await;
    assert_eq!((asked(), fixture.published()), (0, vec!["m/1/model.onnx".to_owned()]));
    // It is told within the look that has the pointer follow.
    assert!(kicked.try_recv().is_err());
    fixture.round().await;
    assert_eq!((asked(), fixture.published()[0].as_str()), (1, "m/.pointer"));
    assert!(kicked.try_recv().is_ok());
    fixture.round().await;
    assert!(kicked.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn what_takes_long_is_told_of_meanwhile() {
    let told = std::cell::Cell::new(0);
    let work = async |seconds| {
        sleep(Duration::from_secs(seconds)).await;
        seconds
    };
    assert_eq!(telling(work(9), || told.set(told.get() + 1)).await, 9);
    assert_eq!(told.get(), 0);
    assert_eq!(telling(work(35), || told.set(told.get() + 1)).await, 35);
    assert_eq!(told.get(), 3);
}
