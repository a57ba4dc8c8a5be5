//! Files on this machine, read as sources give their bytes: away from the thread that all places share, since the disk may be
//! somebody else's, far away and silent.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, SemaphorePermit, mpsc},
    task::spawn_blocking,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{ByteStream, SourceError};

/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be taken.
const AHEAD: usize = 2;
/// How long a disk may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Threads that wait for disks, of all places. One is lost for each path on a disk that never answers.
static THREADS: Semaphore = Semaphore::const_new(32);
/// Paths that a thread still waits for whom nobody listens to any more. No other one waits there beside it.
static SILENT: Mutex<BTreeMap<PathBuf, Weak<()>>> = Mutex::new(BTreeMap::new());

/// The bytes `range` of the file at `path`.
///
/// # Errors
/// `Disk` when there is no such file, also while it is read; `Unavailable` when its disk does not answer.
pub async fn read(path: &Path, range: Range<u64>) -> Result<ByteStream, SourceError> {
    let wanted = path.to_path_buf();
    let opening = move || {
        let failed = |error: std::io::Error| SourceError::disk(&wanted, &error);
        let mut file = File::open(&wanted).map_err(failed)?;
        file.seek(SeekFrom::Start(range.start)).map_err(failed)?;
        Ok(file.take(range.end.saturating_sub(range.start)))
    };
    let mut content = off_thread(path, opening).await?;
    let thread = thread(path, PATIENCE).await?;
    let (give, given) = mpsc::channel(AHEAD);
    let path = path.to_path_buf();
    // Whoever stops listening ends it.
    spawn_blocking(move || {
        let _thread = thread;
        loop {
            let mut piece = Vec::new();
            let piece = match content.by_ref().take(PIECE as u64).read_to_end(&mut piece) {
                Ok(0) => return,
                Ok(_) => Ok(Bytes::from(piece)),
                Err(error) => Err(SourceError::disk(&path, &error)),
            };
            let failed = piece.is_err();
            if give.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    Ok(Box::pin(ReceiverStream::new(given)))
}

/// What `work` finds at `path`.
///
/// # Errors
/// Its own; `Unavailable` when the disk does not answer.
pub async fn off_thread<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    within(PATIENCE, path, work).await
}

async fn within<T: Send + 'static>(
    patience: Duration,
    path: &Path,
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    if SILENT.lock().get(path).is_some_and(|waits| waits.strong_count() > 0) {
        return Err(silent(path, patience));
    }
    let thread = thread(path, patience).await?;
    let waits = Arc::new(());
    let still_waits = Arc::downgrade(&waits);
    let working = spawn_blocking(move || {
        let _held = (thread, waits);
        work()
    });
    match timeout(patience, working).await {
        Ok(found) => found.unwrap_or_else(|error| Err(SourceError::disk(path, &std::io::Error::other(error)))),
        Err(_) => {
            let mut silent_ones = SILENT.lock();
            silent_ones.retain(|_, waits| waits.strong_count() > 0);
            silent_ones.insert(path.to_path_buf(), still_waits);
            Err(silent(path, patience))
        }
    }
}

/// One of the threads.
async fn thread(path: &Path, patience: Duration) -> Result<SemaphorePermit<'static>, SourceError> {
    match timeout(patience, THREADS.acquire()).await {
        Ok(Ok(thread)) => Ok(thread),
        _ => Err(silent(path, patience)),
    }
}

fn silent(path: &Path, patience: Duration) -> SourceError {
    SourceError::Unavailable {
        place: path.display().to_string(),
        reason: format!("nothing comes from its disk in {patience:?}"),
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_range_comes_in_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let piece = PIECE as u64;
        let content: Vec<u8> = (0..piece * 2 + 10).map(|number| (number % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let all = async |range: Range<u64>| {
            let stream = read(&path, range).await.unwrap();
            stream.map(Result::unwrap).collect::<Vec<Bytes>>().await
        };
        assert_eq!(all(5..piece * 2).await.concat(), content[5..PIECE * 2]);
        assert_eq!(all(5..piece * 9).await.len(), 3);
        assert!(matches!(read(&folder.path().join("none"), 0..1).await, Err(SourceError::Disk { .. })));
    }

    #[tokio::test]
    async fn a_disk_that_does_not_answer_is_given_up() {
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let hanging = move || gate.recv().map_err(|error| SourceError::Full(error.to_string()));
        let error = within(Duration::from_millis(50), Path::new("/hung"), hanging).await.unwrap_err();
        assert_eq!(error.to_string(), "/hung does not answer: nothing comes from its disk in 50ms");
        let another = || -> Result<(), SourceError> { unreachable!("one thread at most waits there") };
        let error = within(PATIENCE, Path::new("/hung"), another).await.unwrap_err();
        assert_eq!(error.to_string(), "/hung does not answer: nothing comes from its disk in 30s");
        drop(open);
        while within(PATIENCE, Path::new("/hung"), || Ok(1)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(within(PATIENCE, Path::new("/quick"), || Ok(1)).await.unwrap(), 1);
    }
}
