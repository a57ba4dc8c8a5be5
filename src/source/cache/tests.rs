//! The cache, against a place whose files, failures and lies are the test's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use tempfile::TempDir;

use super::{mirror::Mirror, *};
use crate::{
    id::{ModelName, Version},
    source::{ByteStream, Look, RemoteFile, RemoteModel, RemoteVersion, Source, SourceUri, local},
};

/// A place in memory.
pub struct Shelf {
    uri: SourceUri,
    pub look: Mutex<Result<Look, SourceError>>,
    /// By model and version.
    pub artifacts: Mutex<HashMap<(String, String), Vec<RemoteFile>>>,
    /// By location.
    pub bytes: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Bytes that a read gives before its connection breaks; the next reads are whole again.
    pub breaks: Mutex<Vec<u64>>,
    /// Bytes of a piece, and how long each takes.
    pace: Mutex<(usize, Duration)>,
    /// Whether every read breaks at once.
    pub away: std::sync::atomic::AtomicBool,
    /// Whether files come from their start only.
    pub whole: std::sync::atomic::AtomicBool,
    /// Bytes that went out.
    pub read: AtomicU64,
    pub reads: AtomicUsize,
    /// What versions are called, which have a lineage then.
    pub names: Mutex<Option<crate::source::Names>>,
    /// How often somebody asked for names, and for lineages.
    pub asked: [AtomicUsize; 2],
}

impl Shelf {
    pub fn new() -> Arc<Self> {
        Self::at("s3://shelf/models")
    }

    pub fn at(uri: &str) -> Arc<Self> {
        Arc::new(Self {
            uri: SourceUri::parse(uri).unwrap(),
            look: Mutex::new(Ok(Look::default())),
            artifacts: Mutex::default(),
            bytes: Mutex::default(),
            breaks: Mutex::default(),
            pace: Mutex::new((3, Duration::ZERO)),
            away: false.into(),
            whole: false.into(),
            read: AtomicU64::new(0),
            reads: AtomicUsize::new(0),
            names: Mutex::default(),
            asked: Default::default(),
        })
    }

    /// From now on, reads give `piece` bytes each time that `pace` has passed.
    pub fn drip(&self, piece: usize, pace: Duration) {
        *self.pace.lock() = (piece, pace);
    }

    /// A file at `path`, pinned by its bytes.
    pub fn put(&self, path: &str, bytes: &[u8]) -> RemoteFile {
        let location = format!("{path}#{}", self.bytes.lock().len());
        self.bytes.lock().insert(location.clone(), bytes.to_vec());
        RemoteFile {
            path: path.into(),
            size: bytes.len() as u64,
            digest: None,
            location,
            pin: Some("v1".into()),
            likeness: None,
        }
    }

    /// A version of a model, at a revision of its own.
    pub fn version(&self, model: &str, version: &str, files: Vec<RemoteFile>) {
        let revision = files.iter().map(|file| file.location.as_str()).collect::<String>();
        self.artifacts.lock().insert((model.into(), version.into()), files);
        let mut look = self.look.lock();
        let look = look.get_or_insert_default();
        let found = look.models.entry(ModelName::parse(model).unwrap()).or_default();
        let version = Version::parse(version).unwrap();
        found.versions.retain(|remote| remote.version != version);
        found.versions.push(RemoteVersion { version, revision });
        found.versions.sort_by_key(|remote| remote.version.number());
    }

    pub fn change(&self, change: impl FnOnce(&mut BTreeMap<ModelName, RemoteModel>)) {
        change(&mut self.look.lock().get_or_insert_default().models);
    }
}

/// `Result::get_or_insert_default`, which there is for options only.
trait GetOrInsert {
    fn get_or_insert_default(&mut self) -> &mut Look;
}

impl GetOrInsert for Result<Look, SourceError> {
    fn get_or_insert_default(&mut self) -> &mut Look {
        if self.is_err() {
            *self = Ok(Look::default());
        }
        self.as_mut().unwrap()
    }
}

#[async_trait]
impl Source for Shelf {
    fn uri(&self) -> &SourceUri {
        &self.uri
    }

    fn seeks(&self, _file: &RemoteFile) -> bool {
        !self.whole.load(Ordering::Relaxed)
    }

    async fn look(&self) -> Result<Look, SourceError> {
        self.look.lock().clone()
    }

    async fn artifact(&self, model: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        Ok(self.artifacts.lock()[&(model.to_string(), version.version.to_string())].clone())
    }

    async fn lineage(&self, _: &ModelName, _: &RemoteVersion) -> Result<Option<crate::source::Lineage>, SourceError> {
        self.asked[1].fetch_add(1, Ordering::Relaxed);
        Ok(self.names.lock().as_ref().map(|_| crate::source::Lineage::default()))
    }

    async fn names(&self, _: &ModelName, _: &RemoteModel) -> Result<Option<crate::source::Names>, SourceError> {
        self.asked[0].fetch_add(1, Ordering::Relaxed);
        Ok(self.names.lock().clone())
    }

    async fn read(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let broken = SourceError::Unavailable { place: "shelf".into(), reason: "connection reset".into() };
        if self.away.load(Ordering::Relaxed) {
            return Err(broken);
        }
        let bytes = self.bytes.lock()[&file.location].clone();
        let (start, end) = (range.start.min(bytes.len() as u64), range.end.min(bytes.len() as u64));
        // A place that sends too much begins right, and does not stop.
        let end = if bytes.len() as u64 > file.size && range.end == file.size { bytes.len() as u64 } else { end };
        let mut bytes = bytes[start as usize..end as usize].to_vec();
        let breaks = self.breaks.lock().pop();
        if let Some(kept) = breaks {
            bytes.truncate(kept as usize);
        }
        self.read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let (piece, pace) = *self.pace.lock();
        let mut pieces: Vec<Result<Bytes, SourceError>> =
            bytes.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        pieces.extend(breaks.map(|_| Err(broken)));
        if pace.is_zero() {
            return Ok(Box::pin(tokio_stream::iter(pieces)));
        }
        Ok(Box::pin(tokio_stream::StreamExt::then(tokio_stream::iter(pieces), move |piece| async move {
            tokio::time::sleep(pace).await;
            piece
        })))
    }
}

/// A cache with parts of eight bytes.
pub fn cache(root: &Path, max_bytes: u64) -> Arc<Cache> {
    let config = CacheConfig { directory: None, max_bytes, connections: 2 };
    let mut cache = Cache::open(root, &config).unwrap();
    cache.part = 8;
    Arc::new(cache)
}

struct Fixture {
    shelf: Arc<Shelf>,
    cache: Arc<Cache>,
    root: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        Self { shelf: Shelf::new(), cache: cache(root.path(), 1 << 20), root }
    }

    /// The same folder opened anew, as soon as the parts that were given up have let go of it.
    async fn restart(self, max_bytes: u64) -> Self {
        let Self { shelf, cache: before, root } = self;
        while Arc::strong_count(&before) > 1 {
            tokio::task::yield_now().await;
        }
        drop(before);
        Self { shelf, cache: cache(root.path(), max_bytes), root }
    }

    async fn fetch(&self, file: &RemoteFile) -> Result<Blob, SourceError> {
        let source: Arc<dyn Source> = self.shelf.clone();
        self.cache.fetch(&source, file, &Arc::default()).await
    }

    fn read(&self) -> u64 {
        self.shelf.read.load(Ordering::Relaxed)
    }

    /// Names of what lies in `partial`.
    fn partial(&self) -> usize {
        fs::read_dir(self.root.path().join("partial")).unwrap().count()
    }

    fn blobs(&self) -> Vec<evict::Kept> {
        evict::list(self.root.path()).unwrap().into_iter().filter(|kept| kept.digest.is_some()).collect()
    }
}

const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog";

fn sha256(text: &[u8]) -> Digest {
    let mut hasher = digest::Hasher::new(None, 0);
    hasher.update(text);
    Digest::Sha256(hasher.finish("").unwrap())
}

#[tokio::test]
async fn a_file_comes_in_parts_and_is_kept_by_its_digest() {
    let fixture = Fixture::new();
    for text in [TEXT, b"", b"12345678", b"123456789"] {
        let blob = fixture.fetch(&fixture.shelf.put("model.onnx", text)).await.unwrap();
        assert_eq!(Digest::Sha256(blob.sha256), sha256(text));
        assert_eq!(fs::read(fixture.cache.blob_path(&blob.sha256)).unwrap(), text);
    }
    assert_eq!((fixture.partial(), fixture.blobs().len()), (0, 4));
    assert_eq!(fixture.shelf.reads.load(Ordering::Relaxed), TEXT.len().div_ceil(8) + 1 + 2);
    fixture.blobs().iter().for_each(|kept| evict::verify(kept).unwrap());
}

#[tokio::test]
async fn a_file_that_cannot_be_read_from_its_middle_comes_in_one_part() {
    let fixture = Fixture::new();
    fixture.shelf.whole.store(true, Ordering::Relaxed);
    for text in [TEXT, b""] {
        let blob = fixture.fetch(&fixture.shelf.put("model.onnx", text)).await.unwrap();
        assert_eq!(Digest::Sha256(blob.sha256), sha256(text));
    }
    assert_eq!(fixture.shelf.reads.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn what_was_fetched_is_not_fetched_again() {
    let fixture = Fixture::new();
    let file = fixture.shelf.put("model.onnx", TEXT);
    fixture.fetch(&file).await.unwrap();
    let read = fixture.read();
    assert_eq!(read, TEXT.len() as u64);
    fixture.fetch(&file).await.unwrap();
    let named = RemoteFile { digest: Some(sha256(TEXT)), location: "elsewhere".into(), ..file.clone() };
    fixture.fetch(&named).await.unwrap();
    assert_eq!(fixture.read(), read);
    // The same place, and no longer the same content.
    let later = RemoteFile { pin: Some("v2".into()), ..file };
    fixture.fetch(&later).await.unwrap();
    assert_eq!(fixture.read(), 2 * read);
    assert_eq!(fixture.blobs().len(), 1);
}

#[tokio::test]
async fn files_that_are_alike_are_fetched_once_even_at_a_time() {
    let fixture = Fixture::new();
    let alike = |path: &str| RemoteFile { likeness: Some("same".into()), ..fixture.shelf.put(path, TEXT) };
    let (one, other) = (alike("a"), alike("b"));
    let (one, other) = tokio::join!(fixture.fetch(&one), fixture.fetch(&other));
    assert_eq!(one.unwrap(), other.unwrap());
    assert_eq!(fixture.read(), TEXT.len() as u64);
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_where_it_broke() {
    let fixture = Fixture::new();
    let file = fixture.shelf.put("model.onnx", TEXT);
    *fixture.shelf.breaks.lock() = vec![0, 5, 2, 7];
    fixture.fetch(&file).await.unwrap();
    assert_eq!(fixture.read(), TEXT.len() as u64);
}

#[tokio::test]
async fn a_fetch_goes_on_after_a_restart() {
    let mut fixture = Fixture::new();
    let file = fixture.shelf.put("model.onnx", TEXT);
    // Two connections: the first two parts come whole, then nothing does.
    let source: Arc<dyn Source> = fixture.shelf.clone();
    let fetched = Arc::new(AtomicU64::new(0));
    *fixture.shelf.breaks.lock() = vec![0; 40];
    fixture.shelf.breaks.lock().extend([8, 8]);
    let error = fixture.cache.fetch(&source, &file, &fetched).await.unwrap_err();
    assert!(matches!(&error, SourceError::Unavailable { reason, .. } if reason == "connection reset"), "{error}");
    let came = fixture.read();
    assert!(came >= 8, "{came}");
    assert_eq!((fixture.partial(), fixture.blobs().len()), (2, 0));

    fixture = fixture.restart(1 << 20).await;
    fixture.shelf.breaks.lock().clear();
    let fetched = Arc::new(AtomicU64::new(0));
    let blob = fixture.cache.fetch(&source, &file, &fetched).await.unwrap();
    assert_eq!(Digest::Sha256(blob.sha256), sha256(TEXT));
    assert_eq!(fetched.load(Ordering::Relaxed), TEXT.len() as u64);
    assert!(fixture.read() < came + TEXT.len() as u64, "{} bytes were read", fixture.read());
}

#[tokio::test]
async fn half_a_file_is_part_of_what_is_to_come_and_may_be_gone() {
    let mut fixture = Fixture::new();
    let file = fixture.shelf.put("model.onnx", TEXT);
    let source: Arc<dyn Source> = fixture.shelf.clone();
    *fixture.shelf.breaks.lock() = vec![0; 40];
    fixture.fetch(&file).await.unwrap_err();
    assert_eq!(fixture.partial(), 2);
    fixture = fixture.restart(TEXT.len() as u64).await;
    fixture.cache.make_room_for(source.as_ref(), std::slice::from_ref(&file)).unwrap();
    assert_eq!(fixture.partial(), 2);

    // A list of parts without the file, as a crash may leave it.
    let partial = fs::read_dir(fixture.root.path().join("partial")).unwrap().map(|entry| entry.unwrap().path());
    partial.filter(|path| path.extension().is_none()).for_each(|path| fs::remove_file(path).unwrap());
    fixture.shelf.breaks.lock().clear();
    let blob = fixture.fetch(&file).await.unwrap();
    assert_eq!(Digest::Sha256(blob.sha256), sha256(TEXT));
}

#[tokio::test]
async fn nothing_goes_on_that_nothing_pins() {
    let fixture = Fixture::new();
    let file = RemoteFile { pin: None, ..fixture.shelf.put("model.onnx", TEXT) };
    *fixture.shelf.breaks.lock() = vec![0; 40];
    fixture.shelf.breaks.lock().extend([8, 8]);
    fixture.fetch(&file).await.unwrap_err();
    fixture.shelf.breaks.lock().clear();
    let before = fixture.read();
    fixture.fetch(&file).await.unwrap();
    assert_eq!(fixture.read(), before + TEXT.len() as u64);
}

#[tokio::test]
async fn bytes_that_are_not_what_was_announced_are_not_kept() {
    let fixture = Fixture::new();
    let file = fixture.shelf.put("model.onnx", TEXT);
    let cases = [
        (RemoteFile { digest: Some(sha256(b"other")), ..file.clone() }, "expected sha256:"),
        (RemoteFile { digest: Digest::from_hex("md5", &"0".repeat(32)), ..file.clone() }, "got md5:77add1d5f41223d5"),
        (RemoteFile { size: 60, ..file.clone() }, "it ends after 43 of 60 bytes"),
        (RemoteFile { size: 40, ..file.clone() }, "more bytes come than the 40 that were announced"),
    ];
    for (file, said) in cases {
        let error = fixture.fetch(&file).await.unwrap_err();
        assert!(matches!(&error, SourceError::Corrupt { file, .. } if file == "model.onnx"), "{error}");
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!((fixture.partial(), fixture.blobs().len()), (0, 0));
    }
}

#[tokio::test]
async fn pickles_are_not_kept_by_name_or_content() {
    let fixture = Fixture::new();
    let error = fixture.fetch(&fixture.shelf.put("model.pkl", TEXT)).await.unwrap_err();
    assert!(error.to_string().starts_with("file 'model.pkl' is refused"), "{error}");
    assert_eq!(fixture.read(), 0);
    let pickle = b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.";
    let error = fixture.fetch(&fixture.shelf.put("model.onnx", pickle)).await.unwrap_err();
    assert!(error.to_string().starts_with("file 'model.onnx' is refused: it holds a pickle"), "{error}");
    assert!(!error.passes());
    assert_eq!((fixture.partial(), fixture.blobs().len()), (0, 0));
}

/// Publishes `files` as a version of `m`.
async fn publish(fixture: &Fixture, mirror: &Mirror, version: &str, files: &[(&str, &[u8])]) -> mirror::Manifest {
    let mut staged = mirror.stage().unwrap();
    for (path, text) in files {
        let blob = fixture.fetch(&fixture.shelf.put(path, text)).await.unwrap();
        staged.add(path, &blob).unwrap();
    }
    let (model, version) = (ModelName::parse("m").unwrap(), Version::parse(version).unwrap());
    let origin = mirror::Origin { uri: fixture.shelf.uri(), revision: "r", lineage: None };
    mirror.publish(&model, &version, staged, origin).unwrap()
}

#[tokio::test]
async fn a_version_is_published_whole_and_found_as_in_any_folder() {
    let fixture = Fixture::new();
    let mirror = Mirror::open(fixture.cache.clone(), "shelf").unwrap();
    let scan = || local::scan(&mirror.models(), |name| name.ends_with(".onnx")).unwrap()["m"].versions.clone();
    let first = publish(&fixture, &mirror, "1", &[("model.onnx", TEXT), ("data/weights", b"1234")]).await;
    assert_eq!(fs::read(mirror.models().join("m/1/data/weights")).unwrap(), b"1234");
    let before = scan();
    assert_eq!(before.len(), 1);
    // Its files count as old: nobody waits for them to settle.
    assert!(before[0].fingerprint.older_than(Duration::from_secs(1)));

    // The same again is no change to those who look.
    let again = publish(&fixture, &mirror, "1", &[("model.onnx", TEXT), ("data/weights", b"1234")]).await;
    assert_eq!((&again, scan()[0].fingerprint), (&first, before[0].fingerprint));

    // Other bytes of the same length are.
    let other = publish(&fixture, &mirror, "1", &[("model.onnx", TEXT), ("data/weights", b"4321")]).await;
    assert_ne!(other.digest, first.digest);
    let after = scan();
    assert_ne!(after[0].fingerprint, before[0].fingerprint);
    assert_ne!(after[0].stamp, before[0].stamp);
    assert_eq!(fs::read(mirror.models().join("m/1/data/weights")).unwrap(), b"4321");
    assert_eq!(fs::read_dir(fixture.root.path().join("staging")).unwrap().count(), 0);

    // A folder that somebody deleted is published once more.
    fs::remove_dir_all(mirror.models().join("m/1")).unwrap();
    assert_eq!(mirror.manifest(&ModelName::parse("m").unwrap(), &Version::parse("1").unwrap()), None);
    publish(&fixture, &mirror, "1", &[("model.onnx", TEXT), ("data/weights", b"4321")]).await;
    assert_eq!(fs::read(mirror.models().join("m/1/data/weights")).unwrap(), b"4321");

    mirror.withdraw(&ModelName::parse("m").unwrap(), &Version::parse("1").unwrap()).unwrap();
    assert!(!mirror.models().join("m/1").exists());
    assert!(mirror.published().unwrap()[&ModelName::parse("m").unwrap()].is_empty());
}

#[tokio::test]
async fn what_stands_for_a_version_is_the_same_in_every_cache() {
    let mut stamps = Vec::new();
    for _ in 0..2 {
        let fixture = Fixture::new();
        let mirror = Mirror::open(fixture.cache.clone(), "shelf").unwrap();
        publish(&fixture, &mirror, "1", &[("model.onnx", TEXT)]).await;
        stamps.push(local::scan(&mirror.models(), |_| true).unwrap()["m"].versions[0].stamp);
    }
    assert_eq!(stamps[0], stamps[1]);
}

#[tokio::test]
async fn places_at_other_endpoints_have_other_mirrors() {
    let fixture = Fixture::new();
    let open = |key: &str| Mirror::open(fixture.cache.clone(), key).unwrap();
    let usual = open("hf://acme/iris");
    publish(&fixture, &usual, "1", &[("model.onnx", TEXT)]).await;
    let other = open("hf://acme/iris at http://mirror");
    assert!(other.published().unwrap().is_empty());
    assert_eq!(open("hf://acme/iris").published().unwrap().len(), 1);

    // One of which nobody knows where it is from goes to who asks first.
    let before = open("models:/iris@champion");
    publish(&fixture, &before, "1", &[("model.onnx", TEXT)]).await;
    fs::remove_file(before.models().with_file_name("place")).unwrap();
    assert_eq!(open("models:/iris@champion at http://one").published().unwrap().len(), 1);
    assert!(open("models:/iris@champion at http://two").published().unwrap().is_empty());
    assert_eq!(open("models:/iris@champion at http://one").published().unwrap().len(), 1);
}

#[tokio::test]
async fn no_path_leaves_the_version() {
    let fixture = Fixture::new();
    let mirror = Mirror::open(fixture.cache.clone(), "shelf").unwrap();
    let blob = fixture.fetch(&fixture.shelf.put("model.onnx", TEXT)).await.unwrap();
    for path in ["../model.onnx", "/model.onnx", "a/../../model.onnx", "a\\b"] {
        let error = mirror.stage().unwrap().add(path, &blob).unwrap_err();
        assert!(matches!(error, SourceError::Refused { .. }), "{error}");
    }
    assert!(mirror.published().unwrap().is_empty());
}

#[tokio::test]
async fn files_beside_versions_come_change_and_go() {
    let fixture = Fixture::new();
    let mirror = Mirror::open(fixture.cache.clone(), "shelf").unwrap();
    let model = ModelName::parse("m").unwrap();
    let beside = async |revision: &str, files: &[(&str, &[u8])]| {
        let mut staged = mirror.stage().unwrap();
        for (path, text) in files {
            staged.add(path, &fixture.fetch(&fixture.shelf.put(path, text)).await.unwrap()).unwrap();
        }
        mirror.publish_beside(&model, &staged, revision)
    };
    assert!(beside("a", &[("model.toml", b"x = 1"), ("warmup/1.json", b"{}")]).await.unwrap());
    assert!(!beside("b", &[("model.toml", b"x = 1"), ("warmup/1.json", b"{}")]).await.unwrap());
    assert_eq!(mirror.beside_revision(&model).as_deref(), Some("b"));
    assert!(beside("c", &[("model.toml", b"x = 2")]).await.unwrap());
    assert_eq!(fs::read(mirror.models().join("m/model.toml")).unwrap(), b"x = 2");
    assert!(!mirror.models().join("m/warmup/1.json").exists());
    let error = beside("d", &[("1/model.onnx", b"x")]).await.unwrap_err();
    assert!(error.to_string().contains("it lies within a version"), "{error}");
    let error = beside("d", &[("0/x", b"x"), ("model.toml", b"x = 3")]).await.unwrap_err();
    assert!(error.to_string().contains("file '0/x' is refused"), "{error}");
    // What is refused is refused before anything is touched.
    assert_eq!(mirror.beside_revision(&model).as_deref(), Some("c"));
    assert_eq!(fs::read(mirror.models().join("m/model.toml")).unwrap(), b"x = 2");

    // A file becomes a folder, and is one again.
    assert!(beside("e", &[("labels", b"a")]).await.unwrap());
    assert!(beside("f", &[("labels/all/a.txt", b"a"), ("labels/b.txt", b"b")]).await.unwrap());
    assert_eq!(fs::read(mirror.models().join("m/labels/all/a.txt")).unwrap(), b"a");
    assert!(beside("g", &[("labels", b"a")]).await.unwrap());
    assert_eq!(fs::read(mirror.models().join("m/labels")).unwrap(), b"a");
    assert_eq!(mirror.beside_revision(&model).as_deref(), Some("g"));
}

#[tokio::test]
async fn files_beside_versions_that_did_not_all_arrive_are_placed_once_more() {
    let fixture = Fixture::new();
    let mirror = Mirror::open(fixture.cache.clone(), "shelf").unwrap();
    let model = ModelName::parse("m").unwrap();
    let folder = mirror.models().join("m");
    // A folder that is in the way: nothing can be put in its place.
    fs::create_dir_all(folder.join("model.toml/in the way")).unwrap();
    let beside = async || {
        let mut staged = mirror.stage().unwrap();
        for (path, text) in [("labels.txt", b"a"), ("model.toml", b"#")] {
            staged.add(path, &fixture.fetch(&fixture.shelf.put(path, text)).await.unwrap()).unwrap();
        }
        mirror.publish_beside(&model, &staged, "a")
    };
    assert!(matches!(beside().await.unwrap_err(), SourceError::Disk { .. }));
    assert_eq!(mirror.beside_revision(&model).as_deref(), Some(""));
    fs::remove_dir_all(folder.join("model.toml")).unwrap();
    assert!(beside().await.unwrap());
    assert_eq!(fs::read(folder.join("model.toml")).unwrap(), b"#");
    assert_eq!(mirror.beside_revision(&model).as_deref(), Some("a"));
}

#[tokio::test]
async fn room_is_made_of_what_nothing_uses_the_longest_unused_first() {
    let fixture = Fixture::new();
    let mirror = Mirror::open(fixture.cache.clone(), "shelf").unwrap();
    publish(&fixture, &mirror, "1", &[("model.onnx", &[1; 100])]).await;
    for byte in 2..5 {
        fixture.fetch(&fixture.shelf.put("model.onnx", &[byte; 100])).await.unwrap();
    }
    drop((fixture.cache, mirror));
    let cache = cache(fixture.root.path(), 450);
    let left = || {
        let list = evict::list(fixture.root.path()).unwrap();
        list.iter().map(|kept| fs::read(&kept.path).unwrap()[0]).collect::<std::collections::BTreeSet<u8>>()
    };
    let make_room = |bytes: usize| {
        let shelf = fixture.shelf.as_ref();
        cache.make_room_for(shelf, &[shelf.put("model.onnx", &vec![9; bytes])])
    };
    make_room(50).unwrap();
    assert_eq!(left().len(), 4);
    make_room(51).unwrap();
    assert_eq!(left(), [1, 3, 4].into());
    let error = make_room(351).unwrap_err();
    assert_eq!(error.to_string(), "the cache has no room for 351 bytes: versions use 100 of its 450 (cache.max_bytes)");
    assert_eq!(left(), [1, 3, 4].into());
    assert_eq!(cache.prune(None).unwrap(), 200);
    assert_eq!(left(), [1].into());
}

#[tokio::test]
async fn mirrors_that_nobody_uses_any_more_make_room_the_longest_unused_first() {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let fixture = Fixture::new();
    for (key, byte) in [("new", 1), ("old", 2), ("older", 3), ("used", 4)] {
        let mirror = Mirror::open(fixture.cache.clone(), key).unwrap();
        publish(&fixture, &mirror, "1", &[("model.onnx", &[byte; 100])]).await;
    }
    let fixture = fixture.restart(400).await;
    let age = |key: &str, days: u32| {
        let place = mirror::folder(fixture.root.path(), key).join("place");
        File::options().write(true).open(place).unwrap().set_modified(SystemTime::now() - DAY * days).unwrap();
    };
    [("new", 29), ("old", 31), ("older", 32), ("used", 33)].into_iter().for_each(|(key, days)| age(key, days));
    let users = mirror::users(fixture.root.path()).unwrap();
    assert!(users.values().all(|users| users[0].used.elapsed().unwrap() > DAY * 28));
    let used = Mirror::open(fixture.cache.clone(), "used").unwrap();
    age("used", 33);
    let contents = || {
        let list = fixture.blobs();
        list.iter().map(|kept| fs::read(&kept.path).unwrap()[0]).collect::<BTreeSet<u8>>()
    };
    let room = |bytes: usize| {
        let file = fixture.shelf.put("model.onnx", &vec![9; bytes]);
        fixture.cache.make_room_for(fixture.shelf.as_ref(), &[file]).map(drop)
    };
    room(401).unwrap_err();
    assert_eq!(contents().len(), 4, "nothing goes for what does not fit");
    room(50).unwrap();
    assert_eq!(contents(), [1, 2, 4].into());
    assert!(!mirror::folder(fixture.root.path(), "older").exists());
    let error = room(300).unwrap_err();
    assert!(error.to_string().contains("versions use 200 of its 400"), "{error}");
    assert_eq!(used.published().unwrap().len(), 1);
    used.touch();
    // What is asked for by name of its age goes sooner.
    assert_eq!(fixture.cache.prune(Some(DAY * 28)).unwrap(), 200);
    assert_eq!(contents(), [4].into());
    // One of an earlier server has no date, so it begins to be unused now.
    let mirror = Mirror::open(fixture.cache.clone(), "new").unwrap();
    fs::remove_file(mirror.models().with_file_name("place")).unwrap();
    drop((used, mirror));
    let fixture = fixture.restart(400).await;
    assert_eq!(fixture.cache.prune(Some(DAY)).unwrap(), 0);
    assert!(mirror::folder(fixture.root.path(), "new").join("place").exists());
}

#[tokio::test]
async fn what_a_version_needs_that_is_being_fetched_stays_and_has_its_room() {
    let fixture = Fixture::new();
    let shelf = fixture.shelf.clone();
    let old = shelf.put("weights.data", &[1; 100]);
    fixture.fetch(&old).await.unwrap();
    fixture.fetch(&shelf.put("weights.data", &[2; 100])).await.unwrap();
    let fixture = fixture.restart(400).await;
    let contents = || {
        let list = fixture.blobs();
        list.iter().map(|kept| fs::read(&kept.path).unwrap()[0]).collect::<BTreeSet<u8>>()
    };
    let new = shelf.put("model.onnx", &[3; 100]);
    let reserved = fixture.cache.make_room_for(shelf.as_ref(), &[new.clone(), old.clone()]).unwrap();
    assert_eq!(contents(), [1, 2].into());
    // Another version takes what is left, and no more; what came first would be the first to go.
    let other = fixture.cache.make_room_for(shelf.as_ref(), &[shelf.put("model.onnx", &[4; 200])]).unwrap();
    assert_eq!(contents(), [1].into());
    let error = fixture.cache.make_room_for(shelf.as_ref(), &[shelf.put("model.onnx", &[5; 1])]).unwrap_err();
    assert!(error.to_string().contains("no room for 301 bytes: versions use 100 of its 400"), "{error}");
    // What has come is not counted twice, and what is given up makes room.
    fixture.fetch(&new).await.unwrap();
    let error = fixture.cache.make_room_for(shelf.as_ref(), &[shelf.put("model.onnx", &[5; 1])]).unwrap_err();
    assert!(error.to_string().contains("no room for 201 bytes: versions use 200 of its 400"), "{error}");
    drop((reserved, other));
    fixture.cache.make_room_for(shelf.as_ref(), &[shelf.put("model.onnx", &[5; 300])]).unwrap();
    assert_eq!(contents().len(), 1);
}

#[tokio::test]
async fn a_content_that_rots_is_found() {
    let fixture = Fixture::new();
    let blob = fixture.fetch(&fixture.shelf.put("model.onnx", TEXT)).await.unwrap();
    let path = fixture.cache.blob_path(&blob.sha256);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, b"rotten").unwrap();
    let error = evict::verify(&fixture.blobs()[0]).unwrap_err();
    assert!(error.to_string().contains("expected sha256:"), "{error}");
}

/// Writes over a content where it lies, as a disk that fails does.
fn spoil(cache: &Cache, blob: &Blob, bytes: &[u8]) {
    let path = cache.blob_path(&blob.sha256);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, bytes).unwrap();
}

#[tokio::test]
async fn a_damaged_content_makes_way_for_one_that_is_fetched() {
    let fixture = Fixture::new();
    let file = fixture.shelf.put("model.onnx", TEXT);
    let blob = fixture.fetch(&file).await.unwrap();
    let path = fixture.cache.blob_path(&blob.sha256);
    // Of another length it is not taken for the content at all; of the same, another fetch finds out.
    let reversed: Vec<u8> = TEXT.iter().rev().copied().collect();
    for (damage, pin) in [(&b"rotten"[..], "v1"), (&reversed, "v2")] {
        spoil(&fixture.cache, &blob, damage);
        fixture.fetch(&RemoteFile { pin: Some(pin.into()), ..file.clone() }).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), TEXT);
        evict::verify(&fixture.blobs()[0]).unwrap();
    }
    // One that is whole stays, with the links to it.
    let before = fs::metadata(&path).unwrap().ino();
    fixture.fetch(&RemoteFile { pin: Some("v3".into()), ..file }).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().ino(), before);
    assert_eq!(fixture.partial(), 0);
}

#[tokio::test]
async fn what_is_discarded_is_fetched_and_published_anew() {
    let fixture = Fixture::new();
    let mirror = Mirror::open(fixture.cache.clone(), "shelf").unwrap();
    let (model, one) = (ModelName::parse("m").unwrap(), Version::parse("1").unwrap());
    publish(&fixture, &mirror, "1", &[("model.onnx", TEXT), ("data", b"1234")]).await;
    publish(&fixture, &mirror, "2", &[("model.onnx", b"other")]).await;
    let settings = async || {
        let blob = fixture.fetch(&fixture.shelf.put("labels.txt", TEXT)).await.unwrap();
        let mut staged = mirror.stage().unwrap();
        staged.add("labels.txt", &blob).unwrap();
        mirror.publish_beside(&model, &staged, "a").unwrap()
    };
    assert!(settings().await);

    let broken = fixture.blobs().into_iter().find(|kept| kept.digest == Some(sha256(TEXT))).unwrap();
    fixture.cache.discard(&broken).unwrap();
    assert_eq!((mirror.manifest(&model, &one), mirror.models().join("m/1").exists()), (None, false));
    assert_eq!(mirror.published().unwrap()[&model].len(), 1);
    assert_eq!(mirror.beside_revision(&model).as_deref(), Some(""));
    assert!(!mirror.models().join("m/labels.txt").exists());
    assert_eq!(fixture.blobs().len(), 2);

    publish(&fixture, &mirror, "1", &[("model.onnx", TEXT), ("data", b"1234")]).await;
    assert!(settings().await);
    assert_eq!(fs::read(mirror.models().join("m/1/model.onnx")).unwrap(), TEXT);
    assert_eq!(fs::read(mirror.models().join("m/labels.txt")).unwrap(), TEXT);
}

#[tokio::test]
async fn names_go_with_what_they_name() {
    let fixture = Fixture::new();
    for text in [&b"one"[..], b"three"] {
        let file = RemoteFile { likeness: Some("alike".into()), ..fixture.shelf.put("model.onnx", text) };
        fixture.fetch(&file).await.unwrap();
    }
    let names = |root: &Path| fs::read_dir(root.join("names")).unwrap().count();
    assert!(names(fixture.root.path()) >= 2);
    fs::write(fixture.root.path().join("names/scribble"), b"\xff").unwrap();
    let kept = fixture.blobs();
    fs::remove_file(&kept[0].path).unwrap();
    let before = names(fixture.root.path());
    let fixture = fixture.restart(1 << 20).await;
    let left = names(fixture.root.path());
    assert!(left > 0 && left < before, "{left} of {before}");
    assert_eq!(fixture.cache.prune(None).unwrap(), kept[1].size);
    assert_eq!(names(fixture.root.path()), 0);
}

#[test]
fn a_cache_has_one_server() {
    let root = tempfile::tempdir().unwrap();
    let first = cache(root.path(), 1);
    let error = Cache::open(root.path(), &CacheConfig::default()).err().unwrap();
    assert!(error.to_string().contains("in use by another process"), "{error}");
    drop(first);
    Cache::open(root.path(), &CacheConfig::default()).unwrap();
}

/// A full disk is one that gives no more blocks: here, by a file that is longer than any disk.
#[tokio::test]
async fn a_full_disk_is_noticed_before_anything_is_fetched() {
    let fixture = Fixture::new();
    let file = RemoteFile { size: 1 << 50, ..fixture.shelf.put("model.onnx", TEXT) };
    let error = fixture.fetch(&file).await.unwrap_err();
    assert!(matches!(error, SourceError::Full(_) | SourceError::Disk { .. }), "{error}");
    assert_eq!(fixture.read(), 0);
    assert!(evict::list(fixture.root.path()).unwrap().iter().all(|kept| kept.size < 1 << 20));
}
