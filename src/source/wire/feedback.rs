//! The only writer on the replication socket: a timer and one number, the durable LSN.
//!
//! This task depends neither on the reader nor on the apply, so the source receives a status in
//! time however long an apply takes, and however many bytes wait in between (traps 23, 24). The
//! task can acknowledge only a [`DurableLsn`]. `write` is the received LSN, `flush` and `apply` are
//! the durable LSN. A status with `flush = 0/0` would be legal and would move nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{BufMut, BytesMut};
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncWriteExt, WriteHalf},
    sync::{Notify, watch},
};

use super::{WireError, socket::Socket};
use crate::{Lsn, checkpoint::DurableLsn, failpoint::reached};

/// The longest pause between two statuses.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// The task sends statuses no faster than this, since a server that shuts down asks in a tight loop
/// (trap 25).
const THROTTLE: Duration = Duration::from_millis(10);

/// A status that takes longer than this to write is logged.
const SLOW: Duration = Duration::from_secs(2);

/// The handle of the writing task.
pub struct Feedback {
    durable: watch::Sender<Lsn>,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<Result<(), WireError>>,
}

#[derive(Default)]
struct Shared {
    request_reply: Notify,
    stop: Notify,
    /// Counts the messages of the server, so that the writing task notices its silence.
    activity: AtomicU64,
}

/// Tells the writing task that the server is alive.
#[derive(Clone)]
pub struct Liveness(Arc<Shared>);

impl Liveness {
    pub fn record_activity(&self) {
        self.0.activity.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Feedback {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Feedback {
    pub(super) fn start(write: WriteHalf<Socket>, start: Lsn, timeout: Option<Duration>) -> Self {
        let (durable, watch) = watch::channel(start);
        let shared = Arc::new(Shared::default());
        let pause = timeout.map_or(MAX_PAUSE, |timeout| MAX_PAUSE.min(timeout / 3));

        let task = tokio::spawn(write_statuses(write, watch, Arc::clone(&shared), pause));
        Self { durable, shared, task }
    }

    pub(super) fn liveness(&self) -> Liveness {
        Liveness(Arc::clone(&self.shared))
    }

    /// Tells the source which LSN is durable; the status is sent at once. The acknowledged LSN
    /// never goes back.
    pub fn acknowledge(&self, durable: DurableLsn) {
        self.durable.send_if_modified(|known| {
            let is_newer = durable.lsn() > *known;
            if is_newer {
                *known = durable.lsn();
            }
            is_newer
        });
    }

    /// Returns the highest LSN that was handed to [`Self::acknowledge`].
    pub fn acknowledged(&self) -> Lsn {
        *self.durable.borrow()
    }

    /// Asks the server to report its position.
    pub fn request_reply(&self) {
        self.shared.request_reply.notify_one();
    }

    /// Sends the last acknowledgement, then Terminate, and no CopyDone: after CopyDone the server
    /// would first send the rest of an open transaction (trap 29).
    pub async fn shutdown(mut self) -> Result<(), WireError> {
        self.shared.stop.notify_one();
        match tokio::time::timeout(Duration::from_secs(10), &mut self.task).await {
            Ok(Ok(ended)) => ended,
            // A server that is gone needs no Terminate; the next start acknowledges again.
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }
}

async fn write_statuses(
    mut write: WriteHalf<Socket>,
    mut durable: watch::Receiver<Lsn>,
    shared: Arc<Shared>,
    pause: Duration,
) -> Result<(), WireError> {
    let mut timer = tokio::time::interval(pause);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);

    let mut heard_before = u64::MAX;
    let mut last_sent = Instant::now().checked_sub(THROTTLE).unwrap_or_else(Instant::now);

    loop {
        let mut is_last = false;
        let mut asks = false;

        tokio::select! {
            biased;
            () = shared.stop.notified() => is_last = true,
            changed = durable.changed() => is_last = changed.is_err(),
            () = shared.request_reply.notified() => asks = true,
            _ = timer.tick() => {
                // The server was silent since the last tick: ask it for a reply, so that the
                // reader's limit means something (trap 27).
                let heard = shared.activity.load(Ordering::Relaxed);
                asks = heard == heard_before;
                heard_before = heard;
            }
        }

        if !is_last {
            tokio::time::sleep(THROTTLE.saturating_sub(last_sent.elapsed())).await;
        }

        let lsn = *durable.borrow_and_update();
        let mut out = BytesMut::new();
        frontend::CopyData::new(status(lsn, asks && !is_last))?.write(&mut out);
        if is_last {
            frontend::terminate(&mut out);
        }

        let began = Instant::now();
        reached("feedback.sending");
        write.write_all(&out).await?;
        write.flush().await?;

        if began.elapsed() > SLOW {
            let seconds = began.elapsed().as_secs_f64();
            tracing::warn!(
                event = "acknowledgement_slow",
                %lsn,
                seconds,
                "an acknowledgement took long to send; the source keeps its WAL until it has it"
            );
        }

        reached("feedback.sent");
        last_sent = Instant::now();
        if is_last {
            write.shutdown().await?;
            return Ok(());
        }
    }
}

/// Builds a standby status update. `write` could be more than the durable LSN, but no part of the
/// server needs to know.
fn status(durable: Lsn, asks: bool) -> bytes::Bytes {
    let mut out = BytesMut::with_capacity(34);
    out.put_u8(b'r');
    for _ in 0..3 {
        out.put_u64(durable.0);
    }

    out.put_i64(microseconds_since_2000());
    out.put_u8(u8::from(asks));
    out.freeze()
}

fn microseconds_since_2000() -> i64 {
    const UNIX_TO_2000: Duration = Duration::from_secs(946_684_800);
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.saturating_sub(UNIX_TO_2000).as_micros()).unwrap_or_default()
}
