//! Copies of tables: the first copy, and later ones. Several workers COPY BINARY ctid ranges under
//! one snapshot, into a shadow per table, while the stream goes on.
//!
//! `snapshot` takes a snapshot and holds it, `plan` decides what is copied and which chunks of an
//! earlier try are still good, `worker` copies, `board` shows the progress, and `round` runs one
//! round of copies.
//!
//! Why a copy is exact. A snapshot that a slot exported at LSN X sees exactly the transactions with
//! `commit_lsn < X` (traps 11-15). All workers import the snapshot, so disjoint ctid ranges that
//! cover the table give each row once (trap 16; ranges mean nothing across snapshots of a table
//! that was rewritten). Changes from X on are kept beside the shadow (`olap::pending`) in the
//! transactions of the checkpoint, and merged into the shadow at the end.
//!
//! Why chunks of an older snapshot stay good. The shadow of a keyed table may hold a row as of any
//! of the snapshots, twice, or not at all, as long as every row that changed since the *oldest*
//! snapshot is among the kept changes, which replace whatever the shadow has under the key of the
//! row. A row that did not change stands where it stood, and so is in exactly one chunk, as long as
//! the table's file is the same. Values that kept changes leave open (unchanged TOAST) are fetched
//! at each new snapshot, so that no value is looked for under a key that another row has by then.
//!
//! Each chunk commits with its row of `_rhei.jobs`; a crash leaves whole chunks, and no part of a
//! chunk that was not complete.

mod chunk_queue;
mod event;
mod fetch;
mod load_pipe;
mod long_columns;
mod plain;
mod plan;
mod ranges;
mod round;
#[cfg(test)]
mod samples;
mod snapshot;
mod standing;
mod worker;

pub use chunk_queue::RateLimiter;
pub use event::{CopyEvent, CopyOutcome, TableCopyPlan};
pub use fetch::{copy_rows, fetch_rows, is_fetchable};
pub use plain::plain_copy;
pub use round::{CopyRound, run};
pub use snapshot::{SlotWithSnapshot, Snapshot, create_slot, release_locks, watch_locks};
pub use standing::{HeldStanding, Standing, stand, stand_held};
