//! What a pipeline reports while it runs, for progress displays and logs.

use serde::Serialize;

use crate::{
    Lsn,
    change::{Nulled, TableFailure},
};

/// What happens while a pipeline runs, for progress displays and logs.
#[derive(Debug, Clone)]
pub enum Event {
    /// Slot creation waits for transactions of the source that are still open (trap 12).
    WaitingForTransactions {
        what: String,
    },
    CopyStarted {
        table: String,
        estimated_rows: u64,
    },
    /// The progress of copies has changed.
    CopyProgress,
    CopyFinished {
        table: String,
        rows: u64,
    },
    CopyFailed {
        table: String,
        reason: String,
    },
    /// The changes that came during the copy of the table are in the copy.
    WentLive {
        table: String,
    },
    /// No copy is under way any more.
    AllLive,
    /// Values that DuckDB has no room for became NULL, as the settings allow.
    Nulled {
        table: String,
        nulled: Nulled,
    },
    Cycle(CycleReport),
    /// A stream has begun or begun again at this checkpoint.
    Streaming {
        checkpoint: Lsn,
    },
}

/// What one cycle did. Every count is of what its name says: source rows unless the name says
/// target.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CycleReport {
    pub source_transactions: u64,
    /// Row changes of the source before they were reduced.
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    /// TRUNCATEs of tables.
    pub truncated: u64,
    /// Rows that left and entered target tables.
    pub target_deleted_rows: u64,
    pub target_inserted_rows: u64,
    /// Rows of history tables and finished jobs that retention dropped.
    pub pruned: u64,
    /// WAL that the source may recycle since this cycle, as far as this slot is concerned.
    pub wal_released_bytes: u64,
    pub checkpoint: Lsn,
    /// WAL between the checkpoint and the source's end as last heard.
    pub lag_bytes: u64,
    pub duration_ms: u64,
    /// Tables that were paused, with the reason.
    #[serde(skip)]
    pub paused: Vec<TableFailure>,
}
