//! What a pipeline is told, what it shares while it runs, and what it tells.

use std::{collections::BTreeMap, time::Duration};

use super::{
    CycleReport, DdlLock, latency, left_out, recopies, settled, slot_lost, supervisor, tables,
};
use crate::{
    Lsn, backfill,
    change::Nulled,
    config::{Supervision, TablePattern},
    source::connect::SourceOptions,
    target::duckdb::TargetOptions,
};

/// What a pipeline needs to know of the settings.
#[derive(Debug, Clone)]
pub struct Options {
    pub source: SourceOptions,
    pub target: TargetOptions,
    pub publications: Vec<String>,
    pub slot: String,
    /// Standbys keep the slot too (PostgreSQL 17 and newer).
    pub failover_slot: bool,
    pub slot_lost: slot_lost::SlotLost,
    pub tables: Vec<TablePattern>,
    pub exclude: Vec<TablePattern>,
    pub table_settings: BTreeMap<String, tables::TableSettings>,
    pub interval: Duration,
    pub max_batch_rows: u64,
    pub memory_limit_bytes: usize,
    /// `[sync] on_unrepresentable = "null"`.
    pub null_unrepresentable: bool,
    pub trust_widening: bool,
    /// How often the catalogs are looked at.
    pub catalog_interval: Duration,
    pub workers: usize,
    /// Bytes a second that all copy workers together take from the source at most.
    pub rate_limit_bytes: Option<u64>,
    /// Heap bytes of one chunk; none: by the size of the table.
    pub chunk_bytes: Option<u64>,
    /// After how long a snapshot that is held is warned about.
    pub snapshot_warning: Duration,
    /// Who changes shapes, or the file itself, waits for cycles, and they for him.
    pub ddl_lock: DdlLock,
    pub supervision: Supervision,
    /// When rows last changed.
    pub activity: supervisor::Activity,
    /// How far copies are.
    pub board: backfill::board::Board,
    /// How long changes take to arrive.
    pub latency: latency::Latency,
    /// Changes that are left out of the copy.
    pub left_out: left_out::LeftOut,
    /// Copies that were made again.
    pub recopies: recopies::Recopies,
    /// Up to where everything is in the copy, also what the stream never mentions.
    pub settled: settled::SettledLsn,
    /// Where progress goes; who listens draws it.
    pub events: tokio::sync::mpsc::UnboundedSender<Event>,
}

/// What happens on the way, for progress displays and logs.
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
    /// The board has moved on.
    CopyProgress,
    CopyFinished {
        table: String,
        rows: u64,
    },
    CopyFailed {
        table: String,
        reason: String,
    },
    /// What changed while it was copied is in it.
    WentLive {
        table: String,
    },
    /// No copy is on its way any more.
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
