//! The only writer on a replication socket.
//!
//! It tells the server what is durable, and keeps the session alive. It has a timer of its own and depends neither on
//! the reader nor on whoever applies changes: a client that only sends stays alive for ever, one that is only busy is
//! cut off after `wal_sender_timeout` (traps 23, 24). `flush` and `apply` are the durable checkpoint and nothing
//! else: only a [`DurableLsn`] gets here (trap 3). Until the first one they are 0/0, which moves nothing.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncWriteExt, WriteHalf},
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tracing::debug;

use super::{
    tls::Socket,
    wire::{Delivery, WireError, status_update},
};
use crate::{Lsn, checkpoint::DurableLsn};

/// At most one status in this time: a server that shuts down pings in a tight loop (trap 25).
const MIN_GAP: Duration = Duration::from_millis(10);
const MAX_INTERVAL: Duration = Duration::from_secs(10);
/// Time for the last words at a shutdown.
const FAREWELL: Duration = Duration::from_secs(2);
/// Microseconds from the Unix epoch to PostgreSQL's.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// What the reader task knows of the peer.
#[derive(Debug)]
pub(super) struct Liveness {
    born: Instant,
    /// Milliseconds after `born`.
    heard_at: AtomicU64,
    /// The reader waits for room in the queue; then it cannot hear, and silence means nothing.
    blocked: AtomicBool,
    answer_wanted: AtomicBool,
    wake: Notify,
}

impl Liveness {
    pub(super) fn new() -> Self {
        Self {
            born: Instant::now(),
            heard_at: AtomicU64::new(0),
            blocked: AtomicBool::new(false),
            answer_wanted: AtomicBool::new(false),
            wake: Notify::new(),
        }
    }

    pub(super) fn heard(&self) {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard_at.store(now, Ordering::Relaxed);
    }

    pub(super) fn set_blocked(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Relaxed);
        self.heard();
    }

    pub(super) fn answer_wanted(&self) {
        self.answer_wanted.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    fn silence(&self) -> Duration {
        if self.blocked.load(Ordering::Relaxed) {
            return Duration::ZERO;
        }
        self.born.elapsed().saturating_sub(Duration::from_millis(self.heard_at.load(Ordering::Relaxed)))
    }
}

/// Positions that only grow.
#[derive(Debug, Default)]
struct Positions {
    received: AtomicU64,
    durable: AtomicU64,
    acknowledged: AtomicU64,
    ping: AtomicBool,
}

/// Says what is durable and what was received. The writing itself is done by a task; nothing here waits.
pub struct Feedback {
    positions: Arc<Positions>,
    liveness: Arc<Liveness>,
    budget: Arc<Semaphore>,
    stop: Option<oneshot::Sender<()>>,
    writer: JoinHandle<Result<(), WireError>>,
    reader: JoinHandle<()>,
}

impl fmt::Debug for Feedback {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Feedback").field("positions", &self.positions).finish_non_exhaustive()
    }
}

impl Feedback {
    /// Tells the server that all up to here is durable, soon. Going back has no effect.
    pub fn acknowledge(&self, durable: DurableLsn) {
        let before = self.positions.durable.fetch_max(durable.lsn().0, Ordering::Relaxed);
        if before < durable.lsn().0 {
            self.liveness.wake.notify_one();
        }
    }

    /// Notes how far the stream was read; goes out with the next status.
    pub fn received(&self, lsn: Lsn) {
        self.positions.received.fetch_max(lsn.0, Ordering::Relaxed);
    }

    /// Asks the server how far it is; the answer is a keepalive. Several at once become one.
    pub fn ping(&self) {
        self.positions.ping.store(true, Ordering::Relaxed);
        self.liveness.wake.notify_one();
    }

    /// Answers a keepalive that requested it, with the positions of now. The reader also sees to that by itself.
    pub fn answer(&self) {
        self.liveness.answer_wanted();
    }

    /// What the server was told to be durable.
    pub fn acknowledged(&self) -> Lsn {
        Lsn(self.positions.acknowledged.load(Ordering::Relaxed))
    }

    /// Sends the last status and Terminate, and closes the socket. No CopyDone: in the middle of a transaction the
    /// server would answer it and then send the rest all the same (trap 29).
    pub async fn shutdown(mut self) -> Result<(), WireError> {
        // The reader now throws away what comes, until the server has closed.
        self.budget.close();
        drop(self.stop.take());
        let outcome = match timeout(FAREWELL, &mut self.writer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Err(WireError::Closed),
        };
        if timeout(FAREWELL, &mut self.reader).await.is_err() {
            debug!("the source did not close the connection in time");
        }
        outcome
    }
}

impl Drop for Feedback {
    fn drop(&mut self) {
        self.writer.abort();
        self.reader.abort();
    }
}

/// Starts the writer. `wal_sender_timeout` is what the server applies to this session, `None` when it is off.
pub(super) fn start(
    socket: WriteHalf<Socket>,
    wal_sender_timeout: Option<Duration>,
    dead_after: Option<Duration>,
    liveness: Arc<Liveness>,
    queue: mpsc::UnboundedSender<Delivery>,
    budget: Arc<Semaphore>,
    reader: JoinHandle<()>,
) -> Feedback {
    let positions = Arc::new(Positions::default());
    let (stop, stopped) = oneshot::channel();
    let writer = Writer {
        socket,
        interval: wal_sender_timeout.map_or(MAX_INTERVAL, |timeout| MAX_INTERVAL.min(timeout / 3)).max(MIN_GAP),
        dead_after,
        positions: positions.clone(),
        liveness: liveness.clone(),
        queue,
        broken: false,
    };
    let writer = tokio::spawn(writer.run(stopped));
    Feedback { positions, liveness, budget, stop: Some(stop), writer, reader }
}

struct Writer {
    socket: WriteHalf<Socket>,
    interval: Duration,
    dead_after: Option<Duration>,
    positions: Arc<Positions>,
    liveness: Arc<Liveness>,
    queue: mpsc::UnboundedSender<Delivery>,
    /// A write failed. The reader will find out why, for the server may have left an error behind.
    broken: bool,
}

impl Writer {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) -> Result<(), WireError> {
        let mut sent_at = Instant::now();
        let mut next = sent_at + self.interval;
        loop {
            tokio::select! {
                biased;
                _ = &mut stopped => return self.farewell().await,
                () = sleep_until(next) => {}
                () = self.liveness.wake.notified() => {
                    // Never later than the timer.
                    next = next.min(sent_at + MIN_GAP);
                    continue;
                }
            }
            if let Some(silence) = self.dead() {
                let _ = self.queue.send(Delivery::Failed(WireError::DeadPeer(silence)));
                return Err(WireError::DeadPeer(silence));
            }
            if !self.broken {
                let silent = self.dead_after.is_some_and(|limit| self.liveness.silence() > limit / 4);
                let ping = self.positions.ping.swap(false, Ordering::Relaxed) || silent;
                self.liveness.answer_wanted.store(false, Ordering::Relaxed);
                // A full socket must not stop the clock: the peer may be dead.
                let outcome = match self.dead_after {
                    None => self.send(ping).await,
                    Some(limit) => timeout(limit, self.send(ping))
                        .await
                        .unwrap_or_else(|_| Err(WireError::Io(std::io::ErrorKind::TimedOut.into()))),
                };
                if let Err(error) = outcome {
                    debug!(%error, "could not send a status to the source");
                    self.broken = true;
                }
            }
            sent_at = Instant::now();
            next = sent_at + self.interval;
        }
    }

    /// The silence, when it has lasted too long.
    fn dead(&self) -> Option<Duration> {
        let silence = self.liveness.silence();
        self.dead_after.filter(|limit| silence >= *limit).map(|_| silence)
    }

    async fn send(&mut self, reply_requested: bool) -> Result<(), WireError> {
        let durable = Lsn(self.positions.durable.load(Ordering::Relaxed));
        let written = durable.max(Lsn(self.positions.received.load(Ordering::Relaxed)));
        let status = status_update(written, durable, now_us(), reply_requested);
        self.socket.write_all(&status).await.map_err(WireError::Io)?;
        self.socket.flush().await.map_err(WireError::Io)?;
        self.positions.acknowledged.fetch_max(durable.0, Ordering::Relaxed);
        Ok(())
    }

    async fn farewell(&mut self) -> Result<(), WireError> {
        if self.broken {
            return Err(WireError::Closed);
        }
        self.send(false).await?;
        let mut terminate = BytesMut::new();
        frontend::terminate(&mut terminate);
        self.socket.write_all(&terminate).await.map_err(WireError::Io)?;
        self.socket.shutdown().await.map_err(WireError::Io)
    }
}

fn now_us() -> i64 {
    let since_unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_unix.as_micros()).unwrap_or(i64::MAX) - POSTGRES_EPOCH_US
}
