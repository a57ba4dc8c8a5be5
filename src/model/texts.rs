//! Requests with texts or tokens on their way to runs: read, divided into parts of about one length, and put together.
//!
//! What is short is read by the thread that received it, and the rest by turns at the desk, on threads of its own.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    ModelVersion, Pending, Piece, Refused,
    batcher::{Cost, Lengths, ShapeKey},
    desk::Seat,
    executor::Visit,
    schedule::Urgency,
};
use crate::{
    error::{Code, Error},
    metrics::DropReason,
    tensor::Tensor,
    text::{self, Encoded, Front, Reading, Wish},
};

/// Bytes of tokens that an I/O thread checks and divides by itself.
const QUICK_TOKENS: usize = 64 << 10;

/// Runs of parts, in the order in which they are to be queued. With the last one goes the seat that counts for the rest.
struct Seated<I> {
    runs: I,
    seat: Option<Seat>,
}

/// Texts of which some or all are tokens.
enum Read {
    Some(Box<Reading>),
    All(Encoded),
}

impl ModelVersion {
    /// Runs tokens that a client sent, with what it has left out.
    pub(super) async fn run_tokens(
        &self,
        front: &Arc<Front>,
        inputs: Vec<Tensor>,
        urgency: &Urgency,
        wish: &Wish,
    ) -> Result<Vec<Tensor>, Refused> {
        let Some(visit) = self.queue.enter() else { return Err(Refused::Draining(inputs)) };
        let of_model = |error: Error| Refused::Error(error.of_model(self.name.as_str()));
        self.check_texts(inputs.first().map_or(0, Tensor::rows)).map_err(of_model)?;
        let (limits, reader, given) = (self.text_limits(urgency), Arc::clone(front), inputs.clone());
        let wish = wish.clone();
        let divide = move || {
            reader.check(&given, &limits)?;
            Ok(reader.split(reader.complete(&given), &wish, &limits))
        };
        let bytes = inputs.iter().map(Tensor::byte_len).sum::<usize>();
        let (parts, seat) = if bytes <= QUICK_TOKENS {
            (divide().map_err(of_model)?, None)
        } else {
            let mut seat = self.sit(bytes + front.bytes_of_ids(&inputs), urgency).map_err(of_model)?;
            let dividing = async {
                let turn = self.turn(&mut seat).await?;
                aside(move || {
                    let _turn = turn;
                    divide()
                })
                .await
            };
            let _pending = Pending::new(self);
            let parts = match self.in_time(limits.deadline, dividing).await {
                Ok(parts) => parts,
                Err(error) => return Err(self.unread(error, inputs)),
            };
            seat.has_read();
            (parts, Some(seat))
        };
        // Its successor may not know of what was put in.
        self.run_parts(&parts, urgency, &visit, seat).await.map_err(|refused| refused.with(inputs))
    }

    /// What texts of a request there is room and time for.
    fn text_limits(&self, urgency: &Urgency) -> text::Limits {
        let level = self.schedule.level(urgency.priority);
        text::Limits {
            // More are divided, where tensors of other models are refused; and where rows are not independent, each runs alone.
            rows: if self.batching.enabled { self.max_batch_size.unwrap_or(usize::MAX) } else { 1 },
            tokens: self.batching.group * self.batching.row,
            bytes: self.max_bytes,
            deadline: self.levels[level].place(level, urgency, Instant::now()).deadline,
        }
    }

    fn check_texts(&self, rows: usize) -> Result<(), Error> {
        let most = self.max_rows;
        if rows <= most {
            return Ok(());
        }
        Err(Error::invalid(format!("a request may have {most} rows at most (queue.max_rows), got {rows}")))
    }

    /// Runs parts of one request, and puts the answers together. While not all of them are in the queue, they are counted
    /// where the request has its `seat`.
    async fn run_parts(
        &self,
        parts: &Encoded,
        urgency: &Urgency,
        visit: &Visit<'_>,
        seat: Option<Seat>,
    ) -> Result<Vec<Tensor>, Refused> {
        let piece = |(index, part)| Piece { part, visit, follows: index > 0 };
        let pieces: Vec<Piece<'_>> = parts.parts.iter().enumerate().map(piece).collect();
        let runs: Vec<_> =
            pieces.iter().map(|piece| self.run(piece.part.inputs.clone(), urgency, Some(piece))).collect();
        let at_once = self.parts_at_once(urgency);
        let runs = stream::iter(Seated { runs: runs.into_iter(), seat }).buffered(at_once);
        let outputs = runs.try_collect().await.map_err(|refused| match refused {
            // Its successor has time for it.
            Refused::Error(error) if error.code == Code::NotReady && self.queue.is_abandoned() => {
                Refused::Draining(Vec::new())
            }
            refused => refused,
        })?;
        Ok(parts.assemble(outputs))
    }

    /// How many parts of a request are in the queue at a time. More than keep the executors busy would only fill it, and
    /// those for which it has no room would be refused, and the request with them, though nobody else has anything there.
    fn parts_at_once(&self, urgency: &Urgency) -> usize {
        let level = &self.levels[self.schedule.level(urgency.priority)];
        let of_level = if level.max_size == 0 { usize::MAX } else { level.max_size };
        (2 * self.instances).min(self.max_requests).min(of_level).max(1)
    }

    /// Has text encoded, and the parts of it run, each with whatever else is of its length.
    pub(super) async fn run_text(
        &self,
        front: &Arc<Front>,
        text: Vec<Tensor>,
        urgency: &Urgency,
        wish: &Wish,
    ) -> Result<Vec<Tensor>, Refused> {
        let Some(visit) = self.queue.enter() else { return Err(Refused::Draining(text)) };
        let start = Instant::now();
        let (encoded, seat) = match self.encode(front, &text, wish, urgency).await {
            Ok(encoded) => encoded,
            Err(error) => return Err(self.unread(error, text)),
        };
        self.metrics.tokenized(start.elapsed());
        match self.run_parts(&encoded, urgency, &visit, seat).await {
            Ok(outputs) => {
                if let Some(tokens) = &wish.tokens {
                    tokens.fetch_add(encoded.tokens as u64, Ordering::Relaxed);
                }
                Ok(outputs)
            }
            // Its successor may have another tokenizer.
            Err(refused) => Err(refused.with(text)),
        }
    }

    /// The tokens of texts; many of them are no work for a thread that others wait for, and have a seat.
    async fn encode(
        &self,
        front: &Arc<Front>,
        text: &[Tensor],
        wish: &Wish,
        urgency: &Urgency,
    ) -> Result<(Encoded, Option<Seat>), Error> {
        let Some(texts) = text.first() else { return Err(Error::internal("no text to encode")) };
        self.check_texts(texts.rows())?;
        let limits = self.text_limits(urgency);
        if front.is_quick(texts, wish) {
            return Ok((front.encode(texts, wish, &limits)?, None));
        }
        let _pending = Pending::new(self);
        let mut seat = self.sit(front.bytes_of_texts(texts), urgency)?;
        let mut reading = Box::new(front.reading(texts.clone(), wish.clone(), limits));
        let encoding = async {
            loop {
                let turn = self.turn(&mut seat).await?;
                let read = move || {
                    let all = reading.read_on();
                    drop(turn);
                    Ok(if all? { Read::All(reading.finish()?) } else { Read::Some(reading) })
                };
                match aside(read).await? {
                    Read::All(encoded) => return Ok(encoded),
                    Read::Some(rest) => reading = rest,
                }
            }
        };
        let encoded = self.in_time(limits.deadline, encoding).await?;
        seat.has_read();
        Ok((encoded, Some(seat)))
    }

    /// A place for a request of so many bytes to wait where others do: what the queue would not take anyway gets none.
    ///
    /// # Errors
    /// As those of the queue.
    fn sit(&self, bytes: usize, urgency: &Urgency) -> Result<Seat, Error> {
        let level = self.schedule.level(urgency.priority);
        // No part of it is smaller.
        let cost = Cost {
            rows: 1,
            lengths: Lengths::NONE,
            follows: false,
            bytes: 1,
            shape: ShapeKey::new(),
            alone: false,
            place: self.levels[level].place(level, urgency, Instant::now()),
            client: urgency.client,
        };
        self.queue.check(&cost)?;
        let seat = self.desk.sit(urgency.client, bytes);
        seat.inspect_err(|_| self.metrics.dropped(DropReason::Overloaded))
    }

    /// A turn to read, as long as anything can still come of it.
    async fn turn(&self, seat: &mut Seat) -> Result<Option<OwnedSemaphorePermit>, Error> {
        let turn = seat.turn().await;
        if self.queue.is_abandoned() {
            return Err(Error::new(Code::NotReady, "the version went away while its texts waited to become tokens"));
        }
        turn.inspect_err(|_| self.metrics.dropped(DropReason::Overloaded))
    }

    /// What a request is refused with that was not read because of `error`; its successor has time for it.
    fn unread(&self, error: Error, inputs: Vec<Tensor>) -> Refused {
        if error.code == Code::NotReady && self.queue.is_abandoned() {
            return Refused::Draining(inputs);
        }
        Refused::Error(error.of_model(self.name.as_str()))
    }
}

impl<I: ExactSizeIterator> Iterator for Seated<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        let run = self.runs.next();
        if self.runs.len() == 0 {
            self.seat = None;
        }
        run
    }
}

/// Does what would keep an I/O thread from its connections on another one.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Error::internal(format!("texts were given up: {error}"))))
}
