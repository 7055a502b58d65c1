//! What a pipeline reports while it runs, for progress displays and logs.

#![deny(missing_docs)]

use std::time::Duration;

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
        /// The open transactions, at most five, as text for people.
        what: String,
    },
    /// The first chunk of a table is about to be copied.
    CopyStarted {
        /// The name of the table at the source.
        table: String,
        /// The rows of the table by the source's statistics; 0 when the source has none.
        estimated_rows: u64,
    },
    /// The progress of copies has changed.
    CopyProgress,
    /// Every chunk of a table is loaded; the changes that came meanwhile are still to be merged.
    CopyFinished {
        /// The name of the table at the source.
        table: String,
        /// The rows that were loaded since the copy was begun or resumed.
        rows: u64,
    },
    /// A table cannot be copied and is paused; the other tables go on.
    CopyFailed {
        /// The name of the table at the source.
        table: String,
        /// The cause, often with what the operator can do.
        reason: String,
    },
    /// The changes that came during the copy of the table are in the copy.
    WentLive {
        /// The name of the table at the source.
        table: String,
    },
    /// No copy is under way any more.
    AllLive,
    /// Values that DuckDB has no room for became NULL, as the settings allow.
    Nulled {
        /// The name of the table at the source.
        table: String,
        /// The column, the number of values, and the first of them.
        nulled: Nulled,
    },
    /// A cycle has ended, whether it had something to apply or not.
    Cycle(CycleReport),
    /// A session has ended for a reason that may heal, and the next one begins after a pause.
    Pausing {
        /// How long the source is left alone.
        pause: Duration,
    },
    /// A stream has begun or begun again at this checkpoint.
    Streaming {
        /// The position from which the source was asked to send.
        checkpoint: Lsn,
    },
}

/// What one cycle did. Every count is of what its name says: source rows unless the name says
/// target.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CycleReport {
    /// Source transactions that were read, including those that changed no followed table.
    pub source_transactions: u64,
    /// Inserts of rows at the source, before changes were reduced to their net effect.
    pub inserted: u64,
    /// Updates of rows, counted in the same way.
    pub updated: u64,
    /// Deletes of rows, counted in the same way.
    pub deleted: u64,
    /// TRUNCATEs of tables.
    pub truncated: u64,
    /// Rows that left target tables; an updated row leaves and enters its table.
    pub target_deleted_rows: u64,
    /// Rows that entered target tables.
    pub target_inserted_rows: u64,
    /// Rows of `_rhei.cycles` that retention dropped.
    pub pruned: u64,
    /// WAL that the source may recycle since this cycle, as far as this slot is concerned.
    pub wal_released_bytes: u64,
    /// The checkpoint after the cycle; it stays where it was when nothing was committed.
    pub checkpoint: Lsn,
    /// Bytes of WAL from the end of the last batch to the source's end, as last heard.
    pub lag_bytes: u64,
    /// Milliseconds that the cycle took, including the wait for changes; 0 when it applied nothing.
    pub duration_ms: u64,
    /// Tables that cannot go on: each is paused or copied again, as its remedy says.
    #[serde(skip)]
    pub paused: Vec<TableFailure>,
}
