//! `RecordedConsumer` reads a stream that was recorded from a real server, for deterministic tests
//! and benchmarks.
//!
//! The file is a list of pgoutput messages, each a length (`u32`, big-endian) and that many bytes:
//! the rows that `pg_logical_slot_peek_binary_changes` returns. The messages go through the same
//! [`Assembler`] as the live stream.

use std::{path::Path, sync::Arc};

use super::{
    BatchLimits, CdcConsumer, Delivery, SourceError, SourcePosition,
    recording::{RecordedError, split},
};
use crate::{
    Lsn,
    change::{TableSpec, assemble::Assembler},
    checkpoint::DurableLsn,
    pgoutput::message::Message,
};

/// Replays a recording from the beginning, and skips transactions before the checkpoint as the live
/// stream does.
#[derive(Debug)]
pub struct RecordedConsumer {
    messages: Vec<Vec<u8>>,
    next: usize,
    assembler: Assembler,
    acknowledged: std::sync::Mutex<Lsn>,
}

impl RecordedConsumer {
    pub fn open(
        path: &Path,
        checkpoint: Lsn,
        tables: Vec<Arc<TableSpec>>,
    ) -> Result<Self, RecordedError> {
        let recording = std::fs::read(path)
            .map_err(|source| RecordedError::Read { path: path.display().to_string(), source })?;
        Ok(Self::new(split(&recording)?, checkpoint, tables))
    }

    pub fn new(messages: Vec<Vec<u8>>, checkpoint: Lsn, tables: Vec<Arc<TableSpec>>) -> Self {
        let assembler = Assembler::new(checkpoint, tables);
        Self { messages, next: 0, assembler, acknowledged: std::sync::Mutex::new(checkpoint) }
    }
}

impl CdcConsumer for RecordedConsumer {
    async fn next_batch(&mut self, limits: &BatchLimits) -> Result<Delivery, SourceError> {
        self.fill(limits).await?;

        // A transaction that is incomplete at the end of the recording leaves no trace.
        let is_something_left = self.assembler.is_due(limits.max_rows, limits.max_bytes)
            || self.assembler.is_between_transactions()
                && self.assembler.pending_transactions() > 0;

        Ok(if is_something_left {
            Delivery::Batch(self.assembler.take_batch())
        } else {
            Delivery::Ended
        })
    }

    async fn fill(&mut self, limits: &BatchLimits) -> Result<(), SourceError> {
        while let Some(bytes) = self.messages.get(self.next) {
            if self.assembler.is_due(limits.max_rows, limits.max_bytes) {
                break;
            }
            let message = Message::decode(bytes)?;
            self.assembler.push(message)?;
            self.next += 1;
        }
        Ok(())
    }

    fn assembler(&mut self) -> &mut Assembler {
        &mut self.assembler
    }

    fn acknowledge(&self, durable: DurableLsn) {
        if let Ok(mut acknowledged) = self.acknowledged.lock() {
            *acknowledged = durable.lsn().max(*acknowledged);
        }
    }

    fn position(&self) -> SourcePosition {
        let acknowledged = self.acknowledged.lock().map_or(Lsn::ZERO, |acknowledged| *acknowledged);
        let decoded = self.assembler.end_lsn();
        let has_no_open_work = self.assembler.has_no_open_work();
        SourcePosition {
            head: decoded,
            decoded,
            acknowledged,
            has_no_open_work,
            reply_requested: false,
        }
    }
}
