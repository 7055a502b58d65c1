//! What a round reports to the task that follows the stream.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::ranges::Range;
use crate::{
    Lsn,
    change::{Pause, TableSpec},
    olap::{NewCopy, NewJob, StoredTable},
    pgoutput::QualifiedName,
    source::{catalog::SourceTable, connection::SqlClient},
};

/// The outcome of the copy of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyOutcome {
    Done,
    /// This table cannot be copied; the others can.
    Failed(Pause),
    /// The shape or the file of the table changed after the snapshot was taken: the rows that the
    /// snapshot shows of the table mean nothing.
    Changed,
}

/// What a round reports to the task that follows the stream.
pub enum CopyEvent {
    /// The snapshot is there, and the tables that are to be copied under it are planned. The stream
    /// is held at `since` until this event is answered.
    Planned {
        lsn: Lsn,
        /// The snapshot sees every transaction with `commit_lsn` before this.
        since: Lsn,
        tables: Vec<TableCopyPlan>,
        /// Tables that cannot be copied as they are set up.
        refused: Vec<StoredTable>,
        /// A session that sees the snapshot.
        holder: Arc<SqlClient>,
        /// Per table the ids of its jobs, or none when it has to wait for another round.
        adopted: oneshot::Sender<Vec<Option<Vec<u64>>>>,
    },
    /// Another session at the source has locked these tables; the round copies the others.
    Locked(BTreeMap<u32, QualifiedName>),
    /// Copies of these tables were interrupted and can go on only under the snapshot of a slot,
    /// which would have to wait for transactions; the round copies the other tables.
    Postponed(BTreeSet<u32>),
    /// The outcomes of the copies of tables, by oid.
    Ended(Vec<(u32, CopyOutcome)>),
}

/// A table to copy.
#[derive(Debug, Clone)]
pub struct TableCopyPlan {
    pub spec: Arc<TableSpec>,
    /// The table at the source.
    pub source: SourceTable,
    /// The chunks of an earlier try stay; `spec` is the shape of that try.
    pub is_resumed: bool,
    pub(super) ranges: Vec<Range>,
    /// Tables with a lower number are copied first.
    pub(super) priority: i32,
    /// Names in DuckDB of columns with long values.
    pub(super) long_columns: BTreeSet<String>,
    /// Rows that are in the shadow already.
    pub(super) done_rows: u64,
    /// The position of the snapshot of this try.
    pub(super) snapshot: Lsn,
}

impl TableCopyPlan {
    /// Returns the copy as the target records it.
    pub fn new_copy(&self) -> NewCopy {
        let job = |range: &Range| NewJob {
            kind: "copy_chunk",
            payload: serde_json::to_value(ChunkPayload {
                table: self.spec.source.to_string(),
                from: range.leaf_name.clone(),
                leaf: range.leaf,
                pages: (range.pages.first, range.pages.next),
                copy_lsn: self.spec.copy_lsn.to_string(),
                snapshot_lsn: self.snapshot.to_string(),
            })
            .unwrap_or_default(),
            priority: self.priority,
        };

        let jobs = self.ranges.iter().map(job).collect();
        let long_columns = self.long_columns.clone();
        NewCopy { spec: Arc::clone(&self.spec), is_resumed: self.is_resumed, long_columns, jobs }
    }
}

/// The payload of a chunk's job.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ChunkPayload {
    pub(super) table: String,
    /// The table or leaf partition, by name and by oid.
    pub(super) from: String,
    pub(super) leaf: u32,
    /// The first page, and the page after the last one; none: the range goes to the end.
    pub(super) pages: (u64, Option<u64>),
    /// The oldest snapshot of this shadow, with which the shadow was begun.
    pub(super) copy_lsn: String,
    pub(super) snapshot_lsn: String,
}
