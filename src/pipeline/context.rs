//! What the parts of a running pipeline share.

use std::sync::Arc;

use tokio::sync::{RwLock, mpsc::UnboundedSender};

use super::{
    Event, Options, activity::IdleTimer, copy_progress::CopyProgress, latency::Latency,
    left_out::LeftOut, recopies::Recopies, settled::SettledLsn, slot_history::SlotHistory,
};

/// Read for cycles, write for whatever changes the shape of tables or rewrites the file.
pub type DdlLock = Arc<RwLock<()>>;

/// The settings of a pipeline, and what its parts share while it runs. A clone shares the same.
#[derive(Debug, Clone)]
pub struct Context {
    pub options: Arc<Options>,
    /// Whoever changes the shape of tables, or the file itself, waits for cycles, and they for it.
    pub ddl_lock: DdlLock,
    /// What was done about slots that were lost.
    pub slot_lost: SlotHistory,
    /// When rows last changed.
    pub activity: IdleTimer,
    /// How far copies are.
    pub board: CopyProgress,
    /// How long changes take to arrive.
    pub latency: Latency,
    /// Changes that are left out of the copy.
    pub left_out: LeftOut,
    /// Copies that were made again.
    pub recopies: Recopies,
    /// Up to where everything is in the copy, also what the stream never mentions.
    pub settled: SettledLsn,
    /// Where progress goes; who listens draws it.
    pub events: UnboundedSender<Event>,
}

impl Context {
    /// Of a pipeline that begins. `board` is shared with whoever draws the progress of copies.
    pub fn new(options: Options, board: CopyProgress, events: UnboundedSender<Event>) -> Self {
        Self {
            options: Arc::new(options),
            ddl_lock: DdlLock::default(),
            slot_lost: SlotHistory::default(),
            activity: IdleTimer::default(),
            board,
            latency: Latency::default(),
            left_out: LeftOut::default(),
            recopies: Recopies::default(),
            settled: SettledLsn::default(),
            events,
        }
    }
}
