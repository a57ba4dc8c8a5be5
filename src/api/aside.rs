//! Work on long messages, done on threads of its own while the I/O threads serve other connections.

use std::{sync::Arc, time::Instant};

use tokio::sync::Semaphore;

use crate::error::{Code, Error};

/// So many turns to read or write a long message; who waits for one may leave, with what it brought.
pub struct Aside(Arc<Semaphore>);

impl Aside {
    pub fn new(turns: usize) -> Self {
        Self(Arc::new(Semaphore::new(turns)))
    }

    /// Runs `work` on one of the runtime's threads for that, when there is a turn.
    ///
    /// It waits for its turn, with what it holds, here and not in the runtime's line: dropping the future before takes
    /// the work with it, so that nobody works for a client that is gone.
    ///
    /// # Errors
    /// `DeadlineExceeded` when there was no turn until `latest`, `Internal` when the work panics.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        latest: Option<Instant>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.0.clone().acquire_owned();
        let turn = match latest {
            None => turn.await,
            Some(latest) => tokio::time::timeout_at(latest.into(), turn).await.map_err(|_| {
                Error::new(Code::DeadlineExceeded, "the deadline passed while other long messages were read or written")
            })?,
        };
        let done = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(turn);
            result
        });
        let done = done.await;
        done.map_err(|_| Error::internal("reading or writing a long message failed"))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        time::Duration,
    };

    use super::*;

    /// One turn, and who has it until something is sent.
    fn taken() -> (Arc<Aside>, tokio::task::JoinHandle<Result<(), Error>>, mpsc::Sender<()>) {
        let aside = Arc::new(Aside::new(1));
        let (release, released) = mpsc::channel();
        let first = aside.clone();
        let first = tokio::spawn(async move { first.run(None, move || released.recv().unwrap()).await });
        (aside, first, release)
    }

    #[tokio::test]
    async fn a_deadline_ends_the_wait_for_a_turn_and_the_work_is_not_done() {
        let (aside, first, release) = taken();
        while aside.0.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let soon = Instant::now() + Duration::from_millis(20);
        let error = aside.run(Some(soon), || unreachable!("it had no turn")).await.unwrap_err();
        assert_eq!(error.code, Code::DeadlineExceeded);
        assert!(error.message.contains("other long messages"), "{error}");
        assert!(Instant::now() >= soon);
        release.send(()).unwrap();
        first.await.unwrap().unwrap();
        aside.run(Some(Instant::now() + Duration::from_secs(20)), || ()).await.unwrap();
    }

    #[tokio::test]
    async fn who_leaves_takes_its_work_along() {
        let (aside, first, release) = taken();
        while aside.0.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let done = Arc::new(AtomicUsize::new(0));
        let waiting = |number: usize| {
            let (aside, done) = (aside.clone(), done.clone());
            tokio::spawn(async move { aside.run(None, move || done.fetch_add(number, Ordering::Relaxed)).await })
        };
        let (leaves, stays) = (waiting(1), waiting(10));
        // Both have asked for a turn once they have been polled.
        tokio::task::yield_now().await;
        leaves.abort();
        assert!(leaves.await.unwrap_err().is_cancelled());
        assert_eq!(Arc::strong_count(&done), 2, "what it brought is gone while the turn is still another's");
        release.send(()).unwrap();
        first.await.unwrap().unwrap();
        stays.await.unwrap().unwrap();
        assert_eq!(done.load(Ordering::Relaxed), 10);
    }

    #[tokio::test]
    async fn a_panic_gives_the_turn_back() {
        let aside = Aside::new(1);
        let error = aside.run(None, || panic!("it fails")).await.unwrap_err();
        assert_eq!(error.code, Code::Internal);
        assert_eq!(aside.run(None, || 3).await.unwrap(), 3);
    }
}
