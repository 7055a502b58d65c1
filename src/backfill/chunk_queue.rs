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

        let now = Instant::now();
        let is_free = |chunks: &Vec<ChunkJob>| {
            let until = |chunk: &ChunkJob| {
                state.tables.get(chunk.table).and_then(|table| table.locked_until)
            };
            chunks.iter().filter_map(until).all(|until| until <= now)
        };

        match queue.iter().position(is_free) {
            Some(at) => queue.remove(at).map_or(Next::None, Next::Chunks),
            None if queue.is_empty() => Next::None,
            None => Next::AllLocked,
        }
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
pub(super) struct RateLimiter {
    pub(super) bytes_per_second: f64,
    /// The time at which the bytes that were taken so far are paid for.
    pub(super) free_at: tokio::sync::Mutex<tokio::time::Instant>,
}

impl RateLimiter {
    pub fn new(bytes_per_second: u64) -> Self {
        let free_at = tokio::sync::Mutex::new(tokio::time::Instant::now());
        Self { bytes_per_second: bytes_per_second as f64, free_at }
    }

    pub(super) async fn take(&self, bytes: usize) {
        let mut free_at = self.free_at.lock().await;

        let now = tokio::time::Instant::now();
        *free_at =
            (*free_at).max(now) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        let until = *free_at;
        drop(free_at);

        // Short debts are not worth a sleep each.
        if until.duration_since(now) > Duration::from_millis(20) {
            tokio::time::sleep_until(until).await;
        }
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
}
