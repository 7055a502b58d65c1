//! What the parts of a running pipeline share.

#![deny(missing_docs)]

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::{RwLock, mpsc::UnboundedSender};

use super::{
    Event, Options, activity::IdleTimer, copy_progress::CopyProgress, latency::Latency,
    left_out::LeftOut, meter::Meter, new_tables::Unpublished, pulse::Pulse, recopies::Recopies,
    settled::SettledLsn, slot_history::SlotHistory,
};
use crate::{Lsn, source::LsnBarrier};

/// The lock that cycles take for reading, and that every task which changes the shape of tables or
/// rewrites the file takes for writing.
pub type DdlLock = Arc<RwLock<()>>;

/// The settings of a pipeline, and what its parts share while it runs. A clone shares the same
/// state.
#[derive(Debug, Clone)]
pub struct Context {
    /// The settings, which stay the same while the pipeline runs.
    pub options: Arc<Options>,
    /// A task that changes the shape of tables, or the file itself, waits for cycles, and cycles
    /// wait for the task.
    pub ddl_lock: DdlLock,
    /// What was done about slots that were lost.
    pub slot_lost: SlotHistory,
    /// When rows last changed.
    pub activity: IdleTimer,
    /// The progress of copies.
    pub copy_progress: CopyProgress,
    /// How long changes take to arrive in the copy.
    pub latency: Latency,
    /// Changes that are left out of the copy.
    pub left_out: LeftOut,
    /// Tables that the settings choose and that no publication holds.
    pub unpublished: Unpublished,
    /// What the pipeline has done, in numbers.
    pub meter: Meter,
    /// Copies that were made again.
    pub recopies: Recopies,
    /// The position up to which everything is in the copy, also what the stream never mentions.
    pub settled: SettledLsn,
    /// Where the stream is held while another task reads the source and the copy at one LSN.
    pub barrier: LsnBarrier,
    /// Whether the engine makes progress.
    pub pulse: Pulse,
    /// How far the checkpoint is, and how far a task wants it although the stream brings no change.
    pub checkpoint: CheckpointWatch,
    /// Receives the events of the pipeline; a display draws them.
    pub events: UnboundedSender<Event>,
}

impl Context {
    /// Creates the context of a pipeline that begins. What happens in the pipeline is sent to
    /// `events`.
    pub fn new(options: Options, events: UnboundedSender<Event>) -> Self {
        Self {
            options: Arc::new(options),
            ddl_lock: DdlLock::default(),
            slot_lost: SlotHistory::default(),
            activity: IdleTimer::default(),
            copy_progress: CopyProgress::default(),
            latency: Latency::default(),
            left_out: LeftOut::default(),
            unpublished: Unpublished::default(),
            meter: Meter::default(),
            recopies: Recopies::default(),
            settled: SettledLsn::default(),
            barrier: LsnBarrier::default(),
            pulse: Pulse::default(),
            checkpoint: CheckpointWatch::default(),
            events,
        }
    }
}

/// The checkpoint of a running session, for tasks that wait for it. An idle position that a task
/// wants is saved at once.
#[derive(Debug, Clone, Default)]
pub struct CheckpointWatch {
    reached: Arc<AtomicU64>,
    wanted: Arc<AtomicU64>,
}

impl CheckpointWatch {
    /// Asks for a checkpoint at `lsn`; an LSN of zero asks for none.
    pub fn want(&self, lsn: Lsn) {
        self.wanted.store(lsn.0, Ordering::Release);
    }

    /// Asks for a checkpoint at `lsn` beside what others ask for.
    pub fn want_at_least(&self, lsn: Lsn) {
        self.wanted.fetch_max(lsn.0, Ordering::AcqRel);
    }

    /// Returns whether a task waits for a later checkpoint than this one.
    pub fn is_wanted_after(&self, checkpoint: Lsn) -> bool {
        self.wanted.load(Ordering::Acquire) > checkpoint.0
    }

    /// Records the checkpoint after a cycle.
    pub fn set_reached(&self, checkpoint: Lsn) {
        self.reached.store(checkpoint.0, Ordering::Release);
    }

    /// Returns the checkpoint after the last cycle; zero before the first one.
    pub fn reached(&self) -> Lsn {
        Lsn(self.reached.load(Ordering::Acquire))
    }
}
