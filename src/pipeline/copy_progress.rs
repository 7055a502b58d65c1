//! The progress of copies, for all displays: bars, logs, `status`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use serde::Serialize;

use crate::change::TableSpec;

/// Shared by workers, which write, and displays, which read.
#[derive(Debug, Clone, Default)]
pub struct CopyProgress {
    copies: Arc<Mutex<BTreeMap<u32, TableProgress>>>,
    is_paused: Arc<AtomicBool>,
    is_stream_late: Arc<AtomicBool>,
}

#[derive(Debug, Clone)]
struct TableProgress {
    table: String,
    began: Instant,
    estimated_rows: u64,
    /// Rows of an earlier round.
    resumed_rows: u64,
    rows: u64,
    bytes: u64,
    chunks: usize,
    chunks_done: usize,
}

/// The progress of one copy, or of all copies together.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Figures {
    pub rows: u64,
    /// The number of rows in the source's statistics, which may be off.
    pub estimated_rows: u64,
    /// Bytes as they came over the wire.
    pub bytes: u64,
    pub chunks: usize,
    pub chunks_done: usize,
    pub seconds: f64,
    pub megabytes_per_second: f64,
    /// None until the copy has rows to estimate from.
    pub seconds_left: Option<f64>,
}

impl CopyProgress {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, TableProgress>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_paused(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::Relaxed);
    }

    /// Returns whether copies are paused, as the operator asked.
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    /// Records whether the stream's last cycle took longer than it should: then copies use
    /// resources that the stream needs.
    pub fn set_stream_late(&self, is_late: bool) {
        self.is_stream_late.store(is_late, Ordering::Relaxed);
    }

    pub fn is_stream_late(&self) -> bool {
        self.is_stream_late.load(Ordering::Relaxed)
    }

    /// Records that the copy of a table begins, or goes on with rows that an earlier round has
    /// copied.
    pub fn begin(&self, spec: &TableSpec, estimated_rows: u64, chunks: usize, resumed_rows: u64) {
        let (table, began) = (spec.source.to_string(), Instant::now());
        let copying = TableProgress {
            table,
            began,
            estimated_rows,
            resumed_rows,
            rows: 0,
            bytes: 0,
            chunks,
            chunks_done: 0,
        };
        self.lock().insert(spec.oid, copying);
    }

    pub fn add(&self, oid: u32, rows: u64, bytes: u64) {
        if let Some(copying) = self.lock().get_mut(&oid) {
            copying.rows += rows;
            copying.bytes += bytes;
        }
    }

    pub fn chunk_done(&self, oid: u32) {
        if let Some(copying) = self.lock().get_mut(&oid) {
            copying.chunks_done += 1;
        }
    }

    pub fn end(&self, oid: u32) {
        self.lock().remove(&oid);
    }

    /// Returns the progress by table, and in total; none when nothing is being copied.
    pub fn progress(&self) -> Option<(BTreeMap<String, Figures>, Figures)> {
        let all = self.lock().clone();
        let first = all.values().map(|copying| copying.began).min()?;

        let total = all.values().fold(
            TableProgress {
                table: String::new(),
                began: first,
                estimated_rows: 0,
                resumed_rows: 0,
                rows: 0,
                bytes: 0,
                chunks: 0,
                chunks_done: 0,
            },
            |total, copying| TableProgress {
                estimated_rows: total.estimated_rows
                    + copying.estimated_rows.max(copying.resumed_rows + copying.rows),
                resumed_rows: total.resumed_rows + copying.resumed_rows,
                rows: total.rows + copying.rows,
                bytes: total.bytes + copying.bytes,
                chunks: total.chunks + copying.chunks,
                chunks_done: total.chunks_done + copying.chunks_done,
                ..total
            },
        );

        let tables =
            all.values().map(|copying| (copying.table.clone(), copying.progress())).collect();
        Some((tables, total.progress()))
    }
}

impl TableProgress {
    fn progress(&self) -> Figures {
        let seconds = self.began.elapsed().as_secs_f64();
        let rows = self.resumed_rows + self.rows;
        let left = self.estimated_rows.saturating_sub(rows) as f64;
        Figures {
            rows,
            estimated_rows: self.estimated_rows,
            bytes: self.bytes,
            chunks: self.chunks,
            chunks_done: self.chunks_done,
            seconds,
            megabytes_per_second: if seconds > 0.0 {
                self.bytes as f64 / 1e6 / seconds
            } else {
                0.0
            },
            seconds_left: (self.rows > 0).then(|| left * seconds / self.rows as f64),
        }
    }
}
