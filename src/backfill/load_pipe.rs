//! The pipe of a chunk: a task reads the rows from the source, and a blocking thread loads them
//! into the target.
//!
//! The pipe has room for one batch that is not loaded. The next batch is made only when that one is
//! loaded, so that memory is bounded. A load that has not seen the end of its chunk fails: an error
//! of the source ends the load, and so does a reader that was stopped.

use std::sync::{Arc, Mutex};

use arrow::{datatypes::SchemaRef, record_batch::RecordBatch};
use tokio::sync::{Semaphore, mpsc};

use crate::{
    change::TableSpec,
    error::error_chain,
    olap::{CopyLoader, TargetError},
    source::{SourceError, copy_binary::CopyReader},
};

/// Makes the two ends of the pipe of one chunk.
pub(super) fn load_pipe() -> (BatchSender, LoadRows) {
    let (send, pieces) = mpsc::channel(1);
    let room = Arc::new(Semaphore::new(1));

    let rows = LoadRows {
        pieces,
        room: Arc::clone(&room),
        is_first: true,
        is_over: false,
        failure: Arc::default(),
    };
    (BatchSender { send, room }, rows)
}

/// The items that go from the source to the load of a chunk.
enum LoadItem {
    Rows(RecordBatch),
    /// The chunk is complete. A chunk that ends without this item is not whole.
    End,
    Failed(SourceError),
}

/// Sends record batches to the load.
pub(super) struct BatchSender {
    send: mpsc::Sender<LoadItem>,
    /// Room for one batch that is not loaded.
    room: Arc<Semaphore>,
}

impl BatchSender {
    /// Sends the rows that were read, once the load is ready for them. Returns `false` when the
    /// load has ended by itself.
    pub async fn put(
        &self,
        reader: &mut CopyReader,
        schema: &SchemaRef,
    ) -> Result<bool, SourceError> {
        tokio::select! {
            room = self.room.acquire() => {
                room.map(tokio::sync::SemaphorePermit::forget).unwrap_or_default();
            }
            () = self.send.closed() => return Ok(false),
        }

        Ok(self.send.send(LoadItem::Rows(reader.take_batch(schema)?)).await.is_ok())
    }

    /// Ends the load: the chunk is complete.
    pub async fn finish(self) {
        let _ = self.send.send(LoadItem::End).await;
    }

    /// Ends the load, and with it the transaction. The receiver is gone only when the load has
    /// failed by itself.
    pub async fn fail(self, error: SourceError) {
        let _ = self.send.send(LoadItem::Failed(error)).await;
    }
}

/// The rows of a chunk, as the load takes them.
pub(super) struct LoadRows {
    pieces: mpsc::Receiver<LoadItem>,
    room: Arc<Semaphore>,
    is_first: bool,
    is_over: bool,
    /// The error of the source that ended the load; the load itself sees only its text.
    failure: Arc<Mutex<Option<SourceError>>>,
}

/// The end of a load.
pub(super) enum Loaded {
    /// The number of rows of the chunk, which is in the shadow.
    Rows(u64),
    SourceFailed(SourceError),
    /// The job was cancelled, and the load failed for that or another reason.
    Cancelled,
    TargetFailed(TargetError),
}

impl LoadRows {
    /// Loads the chunk of the job; blocks until its rows have come and are loaded.
    pub fn load(self, loader: &mut impl CopyLoader, table: &Arc<TableSpec>, job: u64) -> Loaded {
        let failure = Arc::clone(&self.failure);
        let loaded = loader.load(table, job, Box::new(self));
        let is_cancelled = loaded.is_err() && loader.is_cancelled(job).unwrap_or(false);

        let failure = failure.lock().ok().and_then(|mut seen| seen.take());
        match (failure, loaded) {
            (Some(error), _) => Loaded::SourceFailed(error),
            (None, Ok(rows)) => Loaded::Rows(rows),
            (None, Err(_)) if is_cancelled => Loaded::Cancelled,
            (None, Err(error)) => Loaded::TargetFailed(error),
        }
    }
}

impl Iterator for LoadRows {
    type Item = Result<RecordBatch, Box<dyn std::error::Error + Send + Sync>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }

        // The batch before this one is loaded.
        if !std::mem::take(&mut self.is_first) {
            self.room.add_permits(1);
        }

        match self.pieces.blocking_recv() {
            Some(LoadItem::Rows(batch)) => Some(Ok(batch)),
            Some(LoadItem::End) => None,
            Some(LoadItem::Failed(error)) => {
                self.is_over = true;
                let text = error_chain(&error);
                if let Ok(mut seen) = self.failure.lock() {
                    *seen = Some(error);
                }
                Some(Err(text.into()))
            }
            // The task that read was stopped: the rows that came are not the whole chunk.
            None => {
                self.is_over = true;
                Some(Err("the copy was stopped".into()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use arrow::datatypes::Schema;

    use super::*;
    use crate::{
        backfill::samples::{planned, table},
        olap::engine::RowStream,
        source::wire::WireError,
    };

    /// Counts the batches of a chunk, and fails when they do.
    struct Counting {
        is_cancelled: bool,
    }

    impl CopyLoader for Counting {
        fn begin(&self, _: u64) -> Result<bool, TargetError> {
            Ok(true)
        }

        fn is_cancelled(&self, _: u64) -> Result<bool, TargetError> {
            Ok(self.is_cancelled)
        }

        fn load(
            &mut self,
            _: &Arc<TableSpec>,
            _: u64,
            rows: RowStream,
        ) -> Result<u64, TargetError> {
            let mut count = 0;
            for batch in rows {
                batch.map_err(|error| TargetError::saying(&error.to_string()))?;
                count += 1;
            }
            Ok(count)
        }

        fn load_all(
            &mut self,
            _: &[(Arc<TableSpec>, u64, Vec<RecordBatch>)],
            _: Duration,
        ) -> Result<(), TargetError> {
            Ok(())
        }

        fn fail_job(&self, _: u64, _: &str, _: &str) -> Result<(), TargetError> {
            Ok(())
        }
    }

    fn loaded(rows: LoadRows, is_cancelled: bool) -> Loaded {
        rows.load(&mut Counting { is_cancelled }, &Arc::new(planned(&table(1))), 1)
    }

    fn batch() -> LoadItem {
        LoadItem::Rows(RecordBatch::new_empty(Arc::new(Schema::empty())))
    }

    fn wait<F: Future>(work: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    #[test]
    fn a_chunk_whose_reader_was_stopped_is_not_whole() {
        let (batches, rows) = load_pipe();
        batches.send.blocking_send(batch()).unwrap_or_default();
        drop(batches);

        let Loaded::TargetFailed(error) = loaded(rows, false) else { panic!("it was loaded") };
        assert!(error_chain(&error).contains("the copy was stopped"), "{}", error_chain(&error));
    }

    #[test]
    fn a_chunk_is_loaded_once_its_end_has_come() {
        let (batches, rows) = load_pipe();
        wait(batches.finish());
        assert!(matches!(loaded(rows, false), Loaded::Rows(0)));
    }

    #[test]
    fn an_error_of_the_source_is_told_before_what_the_load_made_of_it() {
        for is_cancelled in [false, true] {
            let (batches, rows) = load_pipe();
            wait(batches.fail(WireError::Closed.into()));
            let ended = loaded(rows, is_cancelled);
            let is_told =
                matches!(ended, Loaded::SourceFailed(SourceError::Wire(WireError::Closed)));
            assert!(is_told, "cancelled: {is_cancelled}");
        }
    }

    #[test]
    fn a_load_that_failed_because_its_job_is_not_wanted_is_no_error() {
        let (batches, rows) = load_pipe();
        drop(batches);
        assert!(matches!(loaded(rows, true), Loaded::Cancelled));
    }

    #[test]
    fn room_for_another_batch_is_made_when_the_one_before_is_loaded() {
        let (batches, mut rows) = load_pipe();
        wait(async {
            batches.room.acquire().await.map(tokio::sync::SemaphorePermit::forget).unwrap();
            batches.send.send(batch()).await.unwrap_or_default();
        });

        assert!(rows.next().is_some_and(|batch| batch.is_ok()));
        assert_eq!(batches.room.available_permits(), 0, "the batch is being loaded");

        let room = Arc::clone(&batches.room);
        wait(batches.finish());
        assert!(rows.next().is_none());
        assert_eq!(room.available_permits(), 1, "the batch is loaded");
    }
}
