//! Record batches that DuckDB reads where they lie, by the Arrow stream of its C API. All unsafe code of rhei is here, but
//! for a socket option in `source::stream`.
//!
//! The duckdb crate copies each value of a record batch into DuckDB's vectors with a call of its own. DuckDB's own scan of
//! an Arrow stream takes fixed-width columns as they are and points to strings. It makes a view of the stream, which lives
//! in the in-memory database that every connection of [`Database`] sees, so all else goes through ordinary connections.
#![allow(unsafe_code, reason = "DuckDB's C API; each block says why it is sound")]

use std::{
    collections::VecDeque,
    ffi::{CStr, CString},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use arrow::{
    array::RecordBatchReader, datatypes::SchemaRef, error::ArrowError, ffi_stream::FFI_ArrowArrayStream,
    record_batch::RecordBatch,
};
use duckdb::{Connection, ffi};

/// DuckDB did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("DuckDB: {0}")]
pub struct RawError(String);

/// An in-memory DuckDB, closed with its last user.
pub struct Database {
    raw: ffi::duckdb_database,
}

// SAFETY: a duckdb_database may be used by any number of threads at a time; it is only closed when nobody has it.
unsafe impl Send for Database {}
// SAFETY: as above.
unsafe impl Sync for Database {}

impl Database {
    /// Opens one with these settings.
    pub fn open(settings: &[(&str, String)]) -> Result<Self, RawError> {
        // SAFETY: the config is created before it is used and destroyed once; all strings outlive their calls; `error` is
        // set by DuckDB or stays null, and is freed once.
        unsafe {
            let mut config: ffi::duckdb_config = ptr::null_mut();
            if ffi::duckdb_create_config(&mut config) != ffi::DuckDBSuccess {
                return Err(RawError("no configuration".to_owned()));
            }
            for (name, value) in settings {
                let is_set = match (CString::new(*name), CString::new(value.as_str())) {
                    (Ok(name), Ok(value)) => {
                        ffi::duckdb_set_config(config, name.as_ptr(), value.as_ptr()) == ffi::DuckDBSuccess
                    }
                    _ => false,
                };
                if !is_set {
                    ffi::duckdb_destroy_config(&mut config);
                    return Err(RawError(format!("it does not take {name} = {value}")));
                }
            }
            let mut raw: ffi::duckdb_database = ptr::null_mut();
            let mut error = ptr::null_mut();
            let opened = ffi::duckdb_open_ext(c":memory:".as_ptr(), &mut raw, config, &mut error);
            ffi::duckdb_destroy_config(&mut config);
            if opened == ffi::DuckDBSuccess {
                return Ok(Self { raw });
            }
            let text = if error.is_null() {
                "it does not start".to_owned()
            } else {
                let text = CStr::from_ptr(error).to_string_lossy().into_owned();
                ffi::duckdb_free(error.cast());
                text
            };
            Err(RawError(text))
        }
    }

    /// A connection. The database must outlive it.
    pub fn connect(&self) -> Result<Connection, duckdb::Error> {
        // SAFETY: the handle is open, and `open_from_raw` does not close it.
        unsafe { Connection::open_from_raw(self.raw) }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // SAFETY: closed once, here.
        unsafe { ffi::duckdb_close(&mut self.raw) }
    }
}

/// What the view reads next.
type Waiting = Arc<Mutex<VecDeque<RecordBatch>>>;

/// A view of record batches, in the in-memory database. To be read whole: all columns, in their order, without a condition,
/// since the stream takes no notice of what DuckDB would like to leave out.
pub struct BatchView {
    connection: ffi::duckdb_connection,
    name: String,
    schema: SchemaRef,
    waiting: Waiting,
    /// Our own, by its address, which the view has.
    stream: *mut FFI_ArrowArrayStream,
    /// Outlives the connection.
    _database: Arc<Database>,
}

// SAFETY: the connection and the stream are used by one thread at a time: through `&mut self`, or by DuckDB during a scan,
// which the caller waits for.
unsafe impl Send for BatchView {}

impl BatchView {
    /// Makes a view of batches with this schema, under a name that no other has.
    pub fn new(database: &Arc<Database>, schema: SchemaRef) -> Result<Self, RawError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("rhei_rows_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let waiting = Waiting::default();
        let reader = Reader { schema: Arc::clone(&schema), waiting: Arc::clone(&waiting) };
        let stream = Box::into_raw(Box::new(FFI_ArrowArrayStream::new(Box::new(reader))));
        let mut connection: ffi::duckdb_connection = ptr::null_mut();
        // SAFETY: the database is open.
        let connected = unsafe { ffi::duckdb_connect(database.raw, &mut connection) };
        let view = Self { connection, name, schema, waiting, stream, _database: Arc::clone(database) };
        if connected != ffi::DuckDBSuccess {
            return Err(RawError("no connection".to_owned()));
        }
        let name = CString::new(view.name.as_str()).map_err(|error| RawError(error.to_string()))?;
        // SAFETY: connection and stream are alive; the stream stays at its address until the view is gone (see Drop). DuckDB
        // takes a pointer to an ArrowArrayStream here, whatever the type's name says.
        let made = unsafe { ffi::duckdb_arrow_scan(view.connection, name.as_ptr(), view.stream.cast()) };
        if made == ffi::DuckDBSuccess { Ok(view) } else { Err(RawError("it makes no view of Arrow data".to_owned())) }
    }

    /// What the view is called.
    pub fn name(&self) -> String {
        format!("memory.main.{}", self.name)
    }

    /// Of the batches.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next scan of the view gives the rows of these batches, once.
    pub fn put(&self, batches: impl IntoIterator<Item = RecordBatch>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.clear();
        waiting.extend(batches);
    }
}

impl Drop for BatchView {
    fn drop(&mut self) {
        // SAFETY: connection (which may be null), result and stream are given back once, the stream after the view that
        // has its address. Names are our own, without quotes.
        unsafe {
            if let (Ok(sql), false) =
                (CString::new(format!("DROP VIEW IF EXISTS {}", self.name())), self.connection.is_null())
            {
                let mut result = std::mem::zeroed();
                ffi::duckdb_query(self.connection, sql.as_ptr(), &mut result);
                ffi::duckdb_destroy_result(&mut result);
            }
            ffi::duckdb_disconnect(&mut self.connection);
            drop(Box::from_raw(self.stream));
        }
    }
}

struct Reader {
    schema: SchemaRef,
    waiting: Waiting,
}

impl Iterator for Reader {
    type Item = Result<RecordBatch, ArrowError>;

    /// None ends a scan, not the stream: the next scan goes on with what was put there meanwhile.
    fn next(&mut self) -> Option<Self::Item> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front().map(Ok)
    }
}

impl RecordBatchReader for Reader {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }
}
