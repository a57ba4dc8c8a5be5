//! Fetching one content: in parts, over several connections, going on where an earlier try ended.

use std::{
    fs::File,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};
use tokio_stream::StreamExt;

use super::{
    Blob, Cache,
    connections::{LEAST, Pace, Permit},
    partial::{Partial, write_at},
    vet,
};
use crate::source::{Digest, RemoteFile, Source, SourceError, digest, endpoint};

/// How long no byte may come before a connection is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// The same where a file cannot be read from its middle on: the place may be fetching all of it for itself.
const SILENCE_OF_WHOLE: Duration = Duration::from_secs(600);
/// Tries in a row of which none brings a byte, or none does in time.
const TRIES: u32 = 3;
/// Tries for one part, however much each of them brings: nobody is asked for a part byte by byte.
const MOST_TRIES: u32 = 64;
/// The pause before the second of them; twice as long before the next.
const PAUSE: Duration = Duration::from_millis(250);

impl Cache {
    /// Has the content of `file` in the cache, fetching what is missing of it. `fetched` grows by every byte that came,
    /// or that had come before.
    ///
    /// # Errors
    /// The source's own; `Corrupt` when the content is shorter, longer or another one than was announced; `Refused`
    /// when it is a pickle; `Full` and `Disk`. What has come stays for the next try, unless it is known to be wrong.
    pub async fn fetch(
        self: &Arc<Self>,
        source: &Arc<dyn Source>,
        file: &RemoteFile,
        fetched: &Arc<AtomicU64>,
    ) -> Result<Blob, SourceError> {
        vet::path(&file.path)?;
        let (names, key) = self.names(source.as_ref(), file);
        let claim = self.claim(&key);
        let _claimed = claim.lock().await;
        if let Some(blob) = self.known(file, &names) {
            fetched.fetch_add(blob.size, Ordering::Relaxed);
            return Ok(blob);
        }
        // Without a name nothing says that what comes now goes with what came before.
        let resumable = file.digest.is_some() || !names.is_empty();
        let part = if source.seeks(file) { self.part } else { file.size.max(1) };
        let mut partial = Partial::open(&self.root.join("partial"), &key, file.size, part, resumable)?;
        fetched.fetch_add(partial.bytes(), Ordering::Relaxed);
        let result = self.complete(source, file, &names, &mut partial, fetched).await;
        if let Err(SourceError::Corrupt { .. } | SourceError::Changed { .. } | SourceError::Refused { .. }) = &result {
            partial.discard();
        }
        let blob = result?;
        partial.done();
        Ok(blob)
    }

    /// What the place of `file` calls its content, and what it goes by while it is fetched.
    pub(super) fn names(&self, source: &dyn Source, file: &RemoteFile) -> (Vec<String>, String) {
        let names = names(source, file);
        let key = key(source, file, &names);
        (names, key)
    }

    /// The content of `file`, when it is here, so that nothing of it has to be fetched.
    pub(super) fn known(&self, file: &RemoteFile, names: &[String]) -> Option<Blob> {
        let blob = match file.digest {
            Some(Digest::Sha256(sha256)) => self.blob(sha256),
            _ => names.iter().find_map(|name| self.named(name)),
        };
        blob.filter(|blob| blob.size == file.size)
    }

    /// Fetches the missing parts, hashing along, and moves the file to its place.
    async fn complete(
        self: &Arc<Self>,
        source: &Arc<dyn Source>,
        file: &RemoteFile,
        names: &[String],
        partial: &mut Partial,
        fetched: &Arc<AtomicU64>,
    ) -> Result<Blob, SourceError> {
        let disk = |error: std::io::Error| SourceError::disk(&self.root, &error);
        let (tell, told) = mpsc::channel();
        let hashing = spawn_blocking(partial.hash(file.digest, &file.path, told));
        // The hashing thread goes when the sender does; what it then says is heard below.
        let _ = tell.send(partial.contiguous());
        let mut missing = partial.missing().into_iter();
        let mut parts = JoinSet::new();
        let window = self.connections.most();
        loop {
            while parts.len() < window
                && let Some((number, range)) = missing.next()
            {
                let part = Part {
                    cache: self.clone(),
                    source: source.clone(),
                    file: file.clone(),
                    into: partial.writer().map_err(disk)?,
                    path: partial.path.clone(),
                    fetched: fetched.clone(),
                };
                parts.spawn(async move { part.fetch(range).await.map(|()| number) });
            }
            let Some(done) = parts.join_next().await else { break };
            partial.note(done.map_err(|error| disk(std::io::Error::other(error)))??)?;
            let _ = tell.send(partial.contiguous());
        }
        drop(tell);
        let sha256 = hashing.await.map_err(|error| disk(std::io::Error::other(error)))??;
        let blob = Blob { sha256, size: file.size };
        let (cache, path, name, names) = (self.clone(), partial.path.clone(), file.path.clone(), names.to_vec());
        let adopting = spawn_blocking(move || {
            let mut content = File::open(&path).map_err(|error| SourceError::disk(&path, &error))?;
            vet::content(&name, &mut content)?;
            // First: as soon as it is in its place, who makes room knows whose it is. A name without a content says nothing.
            names.iter().for_each(|name| cache.remember(name, &blob));
            cache.adopt(&path, &blob)
        });
        adopting.await.map_err(|error| disk(std::io::Error::other(error)))??;
        Ok(blob)
    }
}

/// What the place calls the content, as file names in the cache. Digests other than SHA-256 are believed of the place
/// that gave them only: contents with one MD5 can be made.
fn names(source: &dyn Source, file: &RemoteFile) -> Vec<String> {
    let uri = source.uri();
    let mut place = format!("{:?} {}", uri.scheme(), uri.authority());
    if let Some(endpoint) = endpoint::endpoint(uri) {
        place = format!("{place} {endpoint}");
    }
    let size = file.size.to_string();
    let named = |kind: &str, texts: &[&str]| digest::of_texts(&[&[kind, &place, &size], texts].concat());
    let mut names = Vec::new();
    match file.digest {
        Some(Digest::Sha256(_)) => return names,
        Some(digest) => names.push(named("digest", &[&digest.to_string()])),
        None => {}
    }
    names.extend(file.likeness.as_ref().map(|likeness| named("likeness", &[likeness])));
    names.extend(file.pin.as_ref().map(|pin| named("pin", &[&file.location, pin])));
    names
}

/// What the file goes by while it is fetched: the same for all files that have one content, as far as the place says so.
fn key(source: &dyn Source, file: &RemoteFile, names: &[String]) -> String {
    match (file.digest, names.first()) {
        (Some(Digest::Sha256(sha256)), _) => digest::encode(&sha256),
        (_, Some(name)) => name.clone(),
        (_, None) => digest::of_texts(&["place", &source.uri().to_string(), &file.location, &file.size.to_string()]),
    }
}

/// One part on its way.
struct Part {
    cache: Arc<Cache>,
    source: Arc<dyn Source>,
    file: RemoteFile,
    into: File,
    path: PathBuf,
    fetched: Arc<AtomicU64>,
}

impl Part {
    /// Fetches `range`, going on after failures that may pass at once. It has a connection while it reads, and none while
    /// it waits for another try.
    async fn fetch(self, range: Range<u64>) -> Result<(), SourceError> {
        let place = self.source.uri().to_string();
        let mut position = range.start;
        let (mut failed, mut tries) = (0, 0);
        loop {
            let mut permit = self.cache.connections.acquire(&place).await;
            let before = position;
            let result = self.read(&mut position, range.end, &mut permit).await;
            drop(permit);
            let has_come = match result {
                Ok(Reading::Over) => return Ok(()),
                Ok(Reading::GivenUp) => continue,
                Ok(Reading::TooSlow) => false,
                Err(_) => position > before,
            };
            tries += 1;
            failed = if has_come { 1 } else { failed + 1 };
            let error = match result {
                Err(error) => error,
                Ok(_) => SourceError::Unavailable {
                    place: place.clone(),
                    reason: format!("less than {LEAST} bytes of '{}' came in {:?}", self.file.path, self.silence()),
                },
            };
            let may_pass = matches!(error, SourceError::Unavailable { .. } | SourceError::Corrupt { .. });
            match error {
                // A connection that breaks when every byte has come has done its work.
                SourceError::Unavailable { .. } if position == range.end => return Ok(()),
                _ if may_pass && failed < TRIES && tries < MOST_TRIES && position < range.end => {
                    sleep(PAUSE * (1 << (failed - 1))).await;
                }
                error => return Err(error),
            }
        }
    }

    /// How long nothing, or next to nothing, may come.
    fn silence(&self) -> Duration {
        if self.source.seeks(&self.file) { SILENCE } else { SILENCE_OF_WHOLE }
    }

    /// Reads from `position` to `end` in one go, moving `position` along.
    async fn read(&self, position: &mut u64, end: u64, permit: &mut Permit<'_>) -> Result<Reading, SourceError> {
        let (silence, seeks) = (self.silence(), self.source.seeks(&self.file));
        let silent = || SourceError::Unavailable {
            place: self.source.uri().to_string(),
            reason: format!("no byte of '{}' came in {silence:?}", self.file.path),
        };
        let wrong = |reason: String| SourceError::Corrupt { file: self.file.path.clone(), reason };
        let reading = async {
            let reading = self.source.read(&self.file, *position..end);
            timeout(silence, reading).await.map_err(|_| silent())?
        };
        let mut stream = tokio::select! {
            stream = reading => stream?,
            () = permit.wanted_elsewhere(), if seeks => return Ok(Reading::GivenUp),
        };
        let mut pace = Pace::new(silence);
        loop {
            let piece = tokio::select! {
                piece = timeout(silence, stream.next()) => piece.map_err(|_| silent())?,
                // What cannot be read from its middle on would come from its start again.
                () = permit.wanted_elsewhere(), if seeks => return Ok(Reading::GivenUp),
            };
            let Some(bytes) = piece else { break };
            let bytes = bytes?;
            if bytes.len() as u64 > end - *position {
                return Err(wrong(format!("more bytes come than the {} that were announced", self.file.size)));
            }
            // This waits for the disk when it is slow, and with it everything else that is fetched, and nothing more.
            write_at(&self.into, &bytes, *position, &self.path)?;
            *position += bytes.len() as u64;
            self.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if pace.is_too_slow(bytes.len() as u64) && *position < end {
                return Ok(Reading::TooSlow);
            }
        }
        if *position < end {
            return Err(wrong(format!("it ends after {position} of {} bytes", self.file.size)));
        }
        Ok(Reading::Over)
    }
}

/// How a read ended that did not fail.
enum Reading {
    /// All has come.
    Over,
    /// The connection is wanted for another place.
    GivenUp,
    /// So little came that the connection is not worth keeping.
    TooSlow,
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::source::cache::{CacheConfig, tests::Shelf};

    #[tokio::test(start_paused = true)]
    async fn a_part_that_comes_byte_by_byte_is_given_up() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("part");
        let shelf = Shelf::new();
        let part = Part {
            cache: Arc::new(Cache::open(root.path(), &CacheConfig::default()).unwrap()),
            source: shelf.clone(),
            file: shelf.put("model.onnx", &[7; 100]),
            into: File::create(&path).unwrap(),
            path,
            fetched: Arc::default(),
        };
        *shelf.breaks.lock() = vec![1; 100];
        let error = part.fetch(0..100).await.unwrap_err();
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
        assert_eq!(shelf.reads.load(Ordering::Relaxed), MOST_TRIES as usize);
    }

    /// All of `file` as one part.
    fn part(cache: &Arc<Cache>, shelf: &Arc<Shelf>, file: &RemoteFile) -> Part {
        let path = cache.root.join(shelf.uri().to_string().replace('/', "-"));
        Part {
            cache: cache.clone(),
            source: shelf.clone(),
            file: file.clone(),
            into: File::create(&path).unwrap(),
            path,
            fetched: Arc::default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_drips_is_given_up_and_one_that_is_merely_slow_is_not() {
        let root = tempfile::tempdir().unwrap();
        let cache = Arc::new(Cache::open(root.path(), &CacheConfig::default()).unwrap());
        let shelf = Shelf::new();
        let file = shelf.put("model.onnx", &vec![7; 200 << 10]);
        let read = async |piece: usize, pace: Duration| {
            shelf.drip(piece, pace);
            let started = Instant::now();
            (part(&cache, &shelf, &file).fetch(0..file.size).await, started.elapsed())
        };
        // Of eight connections over 50 KB/s.
        let (result, _) = read(6 << 10, Duration::from_secs(1)).await;
        result.unwrap();
        let (result, took) = read(100, Duration::from_secs(1)).await;
        let error = result.unwrap_err().to_string();
        assert!(error.contains("less than 32768 bytes of 'model.onnx' came in 30s"), "{error}");
        assert!(took < 4 * SILENCE, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_hangs_or_fails_leaves_connections_to_others() {
        let root = tempfile::tempdir().unwrap();
        let config = CacheConfig { connections: 2, ..CacheConfig::default() };
        let cache = Arc::new(Cache::open(root.path(), &config).unwrap());
        let (slow, quick) = (Shelf::at("s3://slow/models"), Shelf::at("s3://quick/models"));
        slow.drip(1, SILENCE * 9);
        let (stuck, file) = (slow.put("model.onnx", &[7; 100]), quick.put("model.onnx", &[7; 100]));
        let hanging: Vec<_> = (0..2).map(|_| tokio::spawn(part(&cache, &slow, &stuck).fetch(0..100))).collect();
        tokio::time::sleep(Duration::from_millis(1)).await;
        let got = timeout(SILENCE / 2, part(&cache, &quick, &file).fetch(0..100)).await;
        got.expect("a connection within the time that the other place may be silent").unwrap();
        hanging.iter().for_each(tokio::task::JoinHandle::abort);
        for hanging in hanging {
            let _ = hanging.await;
        }

        // The only connection is not held while nothing is read.
        let root = tempfile::tempdir().unwrap();
        let config = CacheConfig { connections: 1, ..CacheConfig::default() };
        let cache = Arc::new(Cache::open(root.path(), &config).unwrap());
        slow.away.store(true, Ordering::Relaxed);
        let failing = tokio::spawn(part(&cache, &slow, &stuck).fetch(0..100));
        tokio::time::sleep(Duration::from_millis(1)).await;
        timeout(PAUSE / 2, part(&cache, &quick, &file).fetch(0..100)).await.expect("it waits meanwhile").unwrap();
        failing.await.unwrap().unwrap_err();
    }
}
