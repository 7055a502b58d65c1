//! What the parts of a running pipeline share.

#![deny(missing_docs)]

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::{RwLock, mpsc::UnboundedSender};

use super::{
    Event, Options, activity::IdleTimer, copy_progress::CopyProgress, latency::Latency,
    left_out::LeftOut, recopies::Recopies, settled::SettledLsn, slot_history::SlotHistory,
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
    /// Copies that were made again.
    pub recopies: Recopies,
    /// The position up to which everything is in the copy, also what the stream never mentions.
    pub settled: SettledLsn,
    /// Where the stream is held while another task reads the source and the copy at one LSN.
    pub barrier: LsnBarrier,
    /// The LSN that the checkpoint has to reach although the stream brings no change.
    pub wanted_checkpoint: WantedCheckpoint,
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
            recopies: Recopies::default(),
            settled: SettledLsn::default(),
            barrier: LsnBarrier::default(),
            wanted_checkpoint: WantedCheckpoint::default(),
            events,
        }
    }
}

/// An LSN up to which a task waits for the checkpoint: an idle position there is saved at once.
#[derive(Debug, Clone, Default)]
pub struct WantedCheckpoint(Arc<AtomicU64>);

impl WantedCheckpoint {
    /// Asks for a checkpoint at `lsn`; an LSN of zero asks for none.
    pub fn set(&self, lsn: Lsn) {
        self.0.store(lsn.0, Ordering::Release);
    }

    /// Returns whether a task waits for a later checkpoint than this one.
    pub fn is_after(&self, checkpoint: Lsn) -> bool {
        self.0.load(Ordering::Acquire) > checkpoint.0
    }
}
