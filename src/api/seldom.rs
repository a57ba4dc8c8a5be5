//! What every connection waits for and hardly ever comes, at no cost to each of its requests.
//!
//! A connection's task is woken twice for a request. To look each time whether the server stops, and to make, register
//! and drop a timer for the next request's headers, took 1,300 instructions of 34,000 by callgrind.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};

/// A future of a spawned task that is polled only when it asked for it itself, not whenever the task is woken.
pub(super) struct Seldom<F> {
    future: F,
    bell: Option<Arc<Bell>>,
}

/// Passes a future's wakes on, and remembers them.
struct Bell {
    rung: AtomicBool,
    task: Waker,
}

impl<F: Future + Unpin> Seldom<F> {
    pub(super) fn new(future: F) -> Self {
        Self { future, bell: None }
    }
}

impl<F: Future + Unpin> Future for Seldom<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Self { future, bell } = &mut *self;
        let known = bell.take().filter(|bell| bell.task.will_wake(context.waker()));
        let task = || Bell { rung: AtomicBool::new(true), task: context.waker().clone() };
        let bell = bell.insert(known.unwrap_or_else(|| Arc::new(task())));
        if !bell.rung.load(Ordering::Relaxed) || !bell.rung.swap(false, Ordering::Acquire) {
            return Poll::Pending;
        }
        Pin::new(future).poll(&mut Context::from_waker(&Waker::from(bell.clone())))
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.task.wake_by_ref();
    }
}

/// Times that are noticed only when somebody looks; who has a connection look in time, knows how exact they are.
#[derive(Clone, Copy)]
pub(super) struct Unwatched;

struct Until(Instant);

impl Timer for Unwatched {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(Instant::now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(Until(deadline))
    }
}

impl Future for Until {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if Instant::now() < self.0 { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Sleep for Until {}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[tokio::test]
    async fn only_its_own_wakes_have_it_polled() {
        let (sender, mut receiver) = tokio::sync::oneshot::channel();
        let polls = Arc::new(AtomicUsize::new(0));
        let counted = {
            let polls = polls.clone();
            std::future::poll_fn(move |context| {
                polls.fetch_add(1, Ordering::Relaxed);
                Pin::new(&mut receiver).poll(context)
            })
        };
        let (busy, begun) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let mut seldom = Seldom::new(counted);
            // The task is woken again and again for something else.
            tokio::select! {
                biased;
                _ = &mut seldom => panic!("nothing was sent"),
                () = async {
                    for _ in 0..10 {
                        tokio::task::yield_now().await;
                    }
                } => {}
            }
            busy.send(()).unwrap();
            seldom.await
        });
        begun.await.unwrap();
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        sender.send(7).unwrap();
        assert_eq!((task.await.unwrap(), polls.load(Ordering::Relaxed)), (Ok(7), 2));
    }

    #[tokio::test]
    async fn another_task_that_polls_it_is_the_one_it_wakes() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let mut seldom = Seldom::new(receiver);
        assert!(Pin::new(&mut seldom).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let waiting = tokio::spawn(seldom);
        tokio::task::yield_now().await;
        sender.send(7).unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(7));
    }

    #[tokio::test]
    async fn times_end_when_they_are_over() {
        let over = Unwatched.sleep(Duration::ZERO);
        over.await;
        let mut later = Unwatched.sleep(Duration::from_secs(60));
        assert!(later.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
}
