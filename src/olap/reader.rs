//! Readers beside the one writer: each sees the target as it was between two transactions of the
//! writer, for as long as the reader lives.

use std::{panic::AssertUnwindSafe, sync::Arc};

use arrow::record_batch::RecordBatch;

use super::{
    DuckDb, ReadTarget, Readers, TargetError, TargetReader, connection::TargetConnection, state,
};
use crate::error::panic_message;

/// A connection of its own with an open transaction. A file is neither reopened nor rewritten while
/// a reader lives.
pub struct Reader {
    connection: TargetConnection,
    /// Shows that this reader is alive.
    _alive: Arc<()>,
}

impl ReadTarget for DuckDb {
    type Reader = Reader;

    fn readers(&mut self, count: usize) -> Result<Option<Readers<Reader>>, TargetError> {
        self.ensure_attached()?;

        let mut readers = Vec::with_capacity(count);
        let mut seen = None;
        for _ in 0..count {
            let connection = self.new_connection()?;
            // So a UUID arrives as its 16 bytes: printing and parsing its text costs more than
            // reading it.
            connection.execute_batch(
                "SET SESSION arrow_lossless_conversion = true; BEGIN TRANSACTION READ ONLY",
            )?;

            // DuckDB takes the snapshot of an attached file with the first read from it.
            seen = state::read_pipeline(&connection)?.map(|pipeline| pipeline.checkpoint);
            readers.push(Reader { connection, _alive: self.alive() });
        }

        Ok(seen.map(|checkpoint| Readers { checkpoint, readers }))
    }
}

impl TargetReader for Reader {
    fn select(
        &mut self,
        sql: &str,
        each: &mut dyn FnMut(RecordBatch) -> Result<(), TargetError>,
    ) -> Result<(), TargetError> {
        let mut statement = self.connection.prepare(sql)?;
        let mut rows = statement.stream_arrow([])?;

        // The iterator has no way to return an error: it panics when DuckDB fails in the middle.
        let mut next = || {
            std::panic::catch_unwind(AssertUnwindSafe(|| rows.next()))
                .map_err(|panic| TargetError::Rows { source: panic_message(&*panic).into() })
        };
        while let Some(batch) = next()? {
            each(batch)?;
        }
        Ok(())
    }
}
