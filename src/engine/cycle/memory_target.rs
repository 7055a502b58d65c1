//! A target in memory that remembers what it applied and refuses what a test wants: a second
//! engine, which knows nothing of DuckDB.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use arrow::record_batch::RecordBatch;

use crate::{
    Checkpoint, Lsn,
    change::{ChangeBatch, Pause, TableSpec},
    checkpoint::DurableLsn,
    olap::{
        Applied, Compacted, Compaction, Memory, NewJob, Pipeline, Publisher, Space, StoredJob,
        StoredState, StoredTable, StoredVerification, TargetError,
        engine::{
            ApplyTarget, CopyLoader, CopyTarget, FileMaintenance, NewCopy, ReadTarget, Readers,
            Repair, Repaired, RowStream, TargetReader, TargetState,
        },
    },
    pgoutput::QualifiedName,
};

/// A batch as the target got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) end_lsn: Lsn,
    pub(super) changed: Vec<u32>,
    pub(super) failed: Vec<u32>,
}

/// What happened to the target.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// The answers to the next calls of `apply`; `None`, or no more answers: the batch is applied.
    pub(super) refusals: VecDeque<Option<TargetError>>,
    pub(super) committed: Vec<Seen>,
    /// The parts of a source transaction that has not ended.
    pub(super) open: Vec<Seen>,
    pub(super) checkpoint: Option<Lsn>,
    pub(super) rolled_back: u32,
    pub(super) abandoned: Vec<u32>,
    /// Each `apply` waits for a word from here first.
    pub(super) gate: Option<mpsc::Receiver<()>>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct MemoryTarget(pub(super) Arc<Mutex<Events>>);

impl ApplyTarget for MemoryTarget {
    fn apply(
        &mut self,
        batch: &ChangeBatch,
        checkpoint: &Checkpoint,
    ) -> Result<Applied, TargetError> {
        let mut events = self.0.lock().unwrap();
        if let Some(gate) = &events.gate {
            gate.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        if let Some(Some(refused)) = events.refusals.pop_front() {
            events.open.clear();
            return Err(refused);
        }

        let seen = Seen {
            end_lsn: batch.end_lsn,
            changed: batch.tables.iter().map(|changes| changes.table.oid).collect(),
            failed: batch.failed.iter().map(|failure| failure.oid).collect(),
        };
        events.open.push(seen);

        if !batch.is_part {
            let open = std::mem::take(&mut events.open);
            events.committed.extend(open);
            events.checkpoint = Some(checkpoint.lsn);
        }

        Ok(Applied {
            durable: DurableLsn::committed(events.checkpoint.unwrap_or(Lsn::ZERO)),
            deleted_rows: 0,
            inserted_rows: batch.tables.len() as u64,
            pruned: 0,
        })
    }

    fn roll_back(&mut self) -> Result<(), TargetError> {
        let mut events = self.0.lock().unwrap();
        events.open.clear();
        events.rolled_back += 1;
        Ok(())
    }

    fn repair(&mut self, _: Repair<'_>) -> Result<Option<Repaired>, TargetError> {
        Ok(None)
    }

    fn holds_other_values(
        &mut self,
        _table: &TableSpec,
        _columns: &[usize],
        _allowed: &[String],
    ) -> Result<bool, TargetError> {
        Ok(false)
    }
}

impl TargetState for MemoryTarget {
    fn state(&mut self) -> Result<Option<StoredState>, TargetError> {
        Ok(None)
    }

    fn put_state(&mut self, _: &Pipeline, _: &[StoredTable]) -> Result<(), TargetError> {
        Ok(())
    }

    fn put_tables(&mut self, _: &[StoredTable]) -> Result<(), TargetError> {
        Ok(())
    }

    fn put_shapes(&mut self, _: &[Arc<TableSpec>]) -> Result<(), TargetError> {
        Ok(())
    }

    fn rename(&mut self, _: &[(QualifiedName, StoredTable)]) -> Result<(), TargetError> {
        Ok(())
    }

    fn put_verifications(&mut self, _: &[StoredVerification]) -> Result<(), TargetError> {
        Ok(())
    }

    fn verifications(&mut self) -> Result<Vec<StoredVerification>, TargetError> {
        Ok(Vec::new())
    }

    fn last_parts(&mut self, _: u32) -> Result<Vec<(QualifiedName, u32)>, TargetError> {
        Ok(Vec::new())
    }
}

impl CopyTarget for MemoryTarget {
    type Loader = NoLoader;

    fn begin_copies(
        &mut self,
        copies: &[NewCopy],
    ) -> Result<Vec<Result<Vec<u64>, String>>, TargetError> {
        let ids = |jobs: &[NewJob]| (1..=jobs.len() as u64).collect();
        Ok(copies.iter().map(|copy| Ok(ids(&copy.jobs))).collect())
    }

    fn done_chunks(
        &mut self,
        _oid: u32,
        _copy_lsn: Lsn,
    ) -> Result<Vec<(serde_json::Value, u64)>, TargetError> {
        Ok(Vec::new())
    }

    fn keys_with_unchanged_toast(
        &mut self,
        _table: &TableSpec,
        _most: usize,
    ) -> Result<Vec<Vec<String>>, TargetError> {
        Ok(Vec::new())
    }

    fn fill_open(
        &mut self,
        _table: &TableSpec,
        _rows: &[RecordBatch],
        _asked: usize,
    ) -> Result<(), TargetError> {
        Ok(())
    }

    fn finish_loads(&mut self, _tables: &[Arc<TableSpec>]) -> Result<(), TargetError> {
        Ok(())
    }

    fn merge(
        &mut self,
        tables: &[Arc<TableSpec>],
        _most_rows: u64,
    ) -> Result<BTreeSet<u32>, TargetError> {
        Ok(tables.iter().map(|table| table.oid).collect())
    }

    fn abandon_copies(&mut self, copies: &[(u32, Option<Pause>)]) -> Result<(), TargetError> {
        self.0.lock().unwrap().abandoned.extend(copies.iter().map(|(oid, _)| *oid));
        Ok(())
    }

    fn jobs(&mut self) -> Result<Vec<StoredJob>, TargetError> {
        Ok(Vec::new())
    }

    fn loader(&mut self) -> Result<NoLoader, TargetError> {
        Ok(NoLoader)
    }

    fn prune(&mut self) -> Result<u64, TargetError> {
        Ok(0)
    }
}

impl ReadTarget for MemoryTarget {
    type Reader = NoReader;

    fn readers(&mut self, _count: usize) -> Result<Option<Readers<NoReader>>, TargetError> {
        Ok(None)
    }
}

/// Reads nothing.
pub(super) struct NoReader;

impl TargetReader for NoReader {
    fn select(
        &mut self,
        _sql: &str,
        _each: &mut dyn FnMut(RecordBatch) -> Result<(), TargetError>,
    ) -> Result<(), TargetError> {
        Ok(())
    }
}

impl FileMaintenance for MemoryTarget {
    fn classify(&self, error: TargetError) -> TargetError {
        error
    }

    fn upkeep(&mut self) -> Result<bool, TargetError> {
        Ok(false)
    }

    fn reopen(&mut self) -> Result<(), TargetError> {
        Ok(())
    }

    fn checkpoint_file(&mut self, _compaction: Compaction) -> Result<(), TargetError> {
        Ok(())
    }

    fn space(&mut self) -> Result<Space, TargetError> {
        Err(TargetError::NotCompacted { reason: "there is no file".to_owned() })
    }

    fn memory(&mut self) -> Result<Memory, TargetError> {
        Ok(Memory::default())
    }

    fn compact(&mut self) -> Result<Compacted, TargetError> {
        Err(TargetError::NotCompacted { reason: "there is no file".to_owned() })
    }

    fn publisher(&mut self) -> Result<Publisher, TargetError> {
        Err(TargetError::NotPublished { reason: "there is no file".to_owned() })
    }
}

/// Loads nothing: each job counts as cancelled.
pub(super) struct NoLoader;

impl CopyLoader for NoLoader {
    fn begin(&self, _job: u64) -> Result<bool, TargetError> {
        Ok(false)
    }

    fn is_cancelled(&self, _job: u64) -> Result<bool, TargetError> {
        Ok(true)
    }

    fn load(
        &mut self,
        _table: &Arc<TableSpec>,
        _job: u64,
        rows: RowStream,
    ) -> Result<u64, TargetError> {
        Ok(rows.flatten().map(|batch| batch.num_rows() as u64).sum())
    }

    fn load_all(
        &mut self,
        _chunks: &[(Arc<TableSpec>, u64, Vec<RecordBatch>)],
        _reading: Duration,
    ) -> Result<(), TargetError> {
        Ok(())
    }

    fn fail_job(&self, _job: u64, _status: &str, _error: &str) -> Result<(), TargetError> {
        Ok(())
    }
}
