//! Chunks that wait for a worker, and the progress of each table.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::{
    change::{Nulled, TableSpec},
    pipeline::Context,
};

/// One job: a range of pages of one table that holds rows.
pub(super) struct ChunkJob {
    /// The index of the table in the round.
    pub table: usize,
    pub query: String,
    pub job: u64,
}

/// The state that all workers share.
pub(super) struct SharedRound {
    pub context: Context,
    pub snapshots: Vec<String>,
    pub specs: Vec<Arc<TableSpec>>,
    pub estimates: Vec<u64>,
    /// Bundles: one chunk, or the chunks of several small tables, which are copied together.
    pub queue: tokio::sync::Mutex<VecDeque<Vec<ChunkJob>>>,
    pub state: Mutex<RoundProgress>,
    pub rate_limiter: Option<RateLimiter>,
    /// Bytes of rows, as they come, in one record batch. All batches together are half of the
    /// memory that the settings allow; the stream has the other half.
    pub batch_bytes: usize,
    /// Held by the worker whose turn it is.
    pub turn: tokio::sync::Mutex<()>,
    pub stop: CancellationToken,
}

impl SharedRound {
    /// Takes the first bundle from the queue whose tables are not locked.
    pub(super) async fn next_chunk(&self) -> Next {
        let mut queue = self.queue.lock().await;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);

        take_free(&mut queue, &state, Instant::now())
    }
}

/// Takes the first bundle from the queue whose tables are not locked.
fn take_free(queue: &mut VecDeque<Vec<ChunkJob>>, progress: &RoundProgress, now: Instant) -> Next {
    let is_free = |chunks: &Vec<ChunkJob>| {
        let until = |chunk: &ChunkJob| {
            progress.tables.get(chunk.table).and_then(|table| table.locked_until)
        };
        chunks.iter().filter_map(until).all(|until| until <= now)
    };

    match queue.iter().position(is_free) {
        Some(at) => queue.remove(at).map_or(Next::None, Next::Chunks),
        None if queue.is_empty() => Next::None,
        None => Next::AllLocked,
    }
}

/// Returns the value of [`SharedRound::batch_bytes`].
pub(super) fn batch_bytes(memory_limit: usize, workers: usize) -> usize {
    (memory_limit / 2 / (workers * BATCHES_HELD).max(1)).clamp(MIN_BATCH_BYTES, MAX_BATCH_BYTES)
}

/// The progress of the tables.
pub(super) struct RoundProgress {
    pub(super) tables: Vec<TableRoundProgress>,
}

#[derive(Default)]
pub(super) struct TableRoundProgress {
    pub(super) is_started: bool,
    pub(super) chunks_left: usize,
    pub(super) rows: u64,
    pub(super) nulled: Vec<Nulled>,
    /// The other chunks of the table are not begun any more.
    pub(super) is_over: bool,
    /// Another session has locked the table: its chunks are not tried again before this.
    pub(super) locked_until: Option<Instant>,
    /// When the log named the table as locked last.
    pub(super) said_locked: Option<Instant>,
}

impl RoundProgress {
    /// Creates the progress of tables with these numbers of chunks.
    pub fn new(chunks: Vec<usize>) -> Self {
        let table =
            |chunks_left| TableRoundProgress { chunks_left, ..TableRoundProgress::default() };
        Self { tables: chunks.into_iter().map(table).collect() }
    }
}

/// Keeps all workers together under a number of bytes a second.
pub struct RateLimiter {
    pub(super) bytes_per_second: f64,
    /// The time at which the bytes that were taken so far are paid for.
    pub(super) free_at: tokio::sync::Mutex<tokio::time::Instant>,
}

impl RateLimiter {
    /// Returns a limiter for this number of bytes a second, at least one.
    pub fn new(bytes_per_second: u64) -> Self {
        let bytes_per_second = bytes_per_second.max(1);
        let free_at = tokio::sync::Mutex::new(tokio::time::Instant::now());
        Self { bytes_per_second: bytes_per_second as f64, free_at }
    }

    /// Returns the number of bytes that may be taken in a second.
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second as u64
    }

    /// Takes a number of bytes, and waits until all bytes that were taken are paid for.
    pub async fn take(&self, bytes: usize) {
        let mut free_at = self.free_at.lock().await;

        let now = tokio::time::Instant::now();
        *free_at = self.paid_at(*free_at, now, bytes);
        let until = *free_at;
        drop(free_at);

        // Short debts are not worth a sleep each.
        if until.duration_since(now) > Duration::from_millis(20) {
            tokio::time::sleep_until(until).await;
        }
    }

    /// Returns when these bytes are paid for, if all bytes before them are paid for at `free_at`.
    fn paid_at(
        &self,
        free_at: tokio::time::Instant,
        now: tokio::time::Instant,
        bytes: usize,
    ) -> tokio::time::Instant {
        free_at.max(now) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second)
    }
}

/// The chunks that a worker copies next.
pub(super) enum Next {
    Chunks(Vec<ChunkJob>),
    /// Another session has locked the tables of all chunks that are left.
    AllLocked,
    None,
}

/// Wide rows end a batch earlier, so that memory is bounded in bytes; see
/// [`SharedRound::batch_bytes`].
pub(super) const MAX_BATCH_BYTES: usize = 32 << 20;

pub(super) const MIN_BATCH_BYTES: usize = 1 << 20;

/// Record batches of one worker: one is read while the other is loaded.
pub(super) const BATCHES_HELD: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_batches_together_are_half_of_the_memory() {
        const MIB: usize = 1 << 20;
        let cases = [
            (256 * MIB, 4, 16 * MIB),
            (1024 * MIB, 4, MAX_BATCH_BYTES),
            (16 * MIB, 16, MIN_BATCH_BYTES),
            (32 * MIB, 0, 16 * MIB),
        ];

        for (memory_limit, workers, expected) in cases {
            let found = batch_bytes(memory_limit, workers);
            assert_eq!(found, expected, "{memory_limit} bytes for {workers} workers");
        }
    }

    fn chunk(table: usize, job: u64) -> ChunkJob {
        ChunkJob { table, query: String::new(), job }
    }

    /// Takes from a queue of bundles, given as tables and jobs, while the tables with these numbers
    /// are locked until `until`. Returns the jobs, or what there is instead.
    fn take(
        queue: &[&[(usize, u64)]],
        locked: &[usize],
        until: Instant,
        now: Instant,
    ) -> Result<Vec<u64>, &'static str> {
        let bundle =
            |jobs: &&[(usize, u64)]| jobs.iter().map(|&(at, job)| chunk(at, job)).collect();
        let mut queue = queue.iter().map(bundle).collect();

        let mut progress = RoundProgress::new(vec![1; 3]);
        locked.iter().for_each(|&at| progress.tables[at].locked_until = Some(until));

        match take_free(&mut queue, &progress, now) {
            Next::Chunks(chunks) => Ok(chunks.iter().map(|chunk| chunk.job).collect()),
            Next::AllLocked => Err("all are locked"),
            Next::None => Err("none is left"),
        }
    }

    #[test]
    fn chunks_of_locked_tables_are_passed_over() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let queue: &[&[(usize, u64)]] = &[&[(0, 1)], &[(0, 2), (1, 3)], &[(2, 4)]];

        for (locked, expected) in [
            (&[][..], Ok(vec![1])),
            (&[1], Ok(vec![1])),
            // The second bundle has a chunk of the locked table.
            (&[0], Ok(vec![4])),
            (&[0, 2], Err("all are locked")),
        ] {
            assert_eq!(take(queue, locked, later, now), expected, "locked are {locked:?}");
        }
        assert_eq!(take(&[], &[], later, now), Err("none is left"));
    }

    #[test]
    fn a_locked_table_is_tried_again_when_its_time_has_come() {
        let (now, queue): (Instant, &[&[(usize, u64)]]) = (Instant::now(), &[&[(0, 1)]]);
        let moment = Duration::from_millis(1);
        assert_eq!(take(queue, &[0], now + moment, now), Err("all are locked"));
        assert_eq!(take(queue, &[0], now, now), Ok(vec![1]));
    }

    #[test]
    fn bytes_are_paid_for_one_after_the_other_and_idle_time_is_not_saved_up() {
        let now = tokio::time::Instant::now();
        let (second, limiter) = (Duration::from_secs(1), RateLimiter::new(1000));

        for (name, free_at, bytes, expected) in [
            ("nothing is owed", now, 1000, now + second),
            ("half of the bytes", now, 500, now + second / 2),
            ("other bytes are owed", now + second, 1000, now + 2 * second),
        ] {
            assert_eq!(limiter.paid_at(free_at, now, bytes), expected, "{name}");
        }
        let long_after = now + 10 * second;
        assert_eq!(limiter.paid_at(now, long_after, 1000), long_after + second);
    }
}
