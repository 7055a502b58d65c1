//! Record batches that DuckDB reads in place, through the Arrow stream of its C API. All unsafe
//! code of rhei is in this module and in `session`, except for a socket option in `source::stream`.
//!
//! The duckdb crate copies each value of a record batch into DuckDB's vectors with a call of its
//! own. DuckDB's own scan of an Arrow stream takes fixed-width columns as they are and points to
//! strings. The scan is a view of the stream, which lives in the in-memory database that every
//! connection of [`Database`] sees, so all other work goes through ordinary connections.
#![allow(unsafe_code, reason = "DuckDB's C API; each block says why it is sound")]

use std::{
    collections::VecDeque,
    ffi::{CStr, CString, c_char, c_int},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use arrow::{
    array::{Array, StructArray},
    datatypes::SchemaRef,
    error::ArrowError,
    ffi::{FFI_ArrowArray, FFI_ArrowSchema},
    ffi_stream::FFI_ArrowArrayStream,
    record_batch::RecordBatch,
};
use duckdb::{Connection, ffi};

/// A call of the C API that DuckDB did not carry out.
#[derive(Debug, thiserror::Error)]
#[error("DuckDB: {0}")]
pub struct RawError(String);

impl From<ArrowError> for RawError {
    fn from(error: ArrowError) -> Self {
        Self(error.to_string())
    }
}

/// Returns the version of the DuckDB library that is loaded, as `v1.5.5`.
pub fn library_version() -> String {
    // SAFETY: DuckDB returns a constant string.
    let version = unsafe { CStr::from_ptr(ffi::duckdb_library_version()) };
    version.to_string_lossy().into_owned()
}

/// An in-memory DuckDB, which is closed with its last user.
pub struct Database {
    raw: ffi::duckdb_database,
}

// SAFETY: a duckdb_database may be used by any number of threads at a time; it is only closed when
// no user is left.
unsafe impl Send for Database {}
// SAFETY: as above.
unsafe impl Sync for Database {}

impl Database {
    /// Opens a database with these settings.
    pub fn open(settings: &[(&str, String)]) -> Result<Self, RawError> {
        // SAFETY: the config is created before it is used and destroyed once; all strings outlive
        // their calls; `error` is set by DuckDB or stays null, and is freed once.
        unsafe {
            let mut config: ffi::duckdb_config = ptr::null_mut();
            if ffi::duckdb_create_config(&mut config) != ffi::DuckDBSuccess {
                return Err(RawError("no configuration".to_owned()));
            }

            for (name, value) in settings {
                let is_set = match (CString::new(*name), CString::new(value.as_str())) {
                    (Ok(name), Ok(value)) => {
                        ffi::duckdb_set_config(config, name.as_ptr(), value.as_ptr())
                            == ffi::DuckDBSuccess
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

    /// Returns the handle. It is valid for as long as the database lives.
    pub(super) fn raw(&self) -> ffi::duckdb_database {
        self.raw
    }

    /// Opens a connection. The database must outlive the connection.
    pub fn connect(&self) -> Result<Connection, duckdb::Error> {
        // SAFETY: the handle is open, and `open_from_raw` does not close it.
        unsafe { Connection::open_from_raw(self.raw) }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // SAFETY: the database is closed once, here.
        unsafe { ffi::duckdb_close(&mut self.raw) }
    }
}

/// The batches that the view reads next.
type Waiting = Arc<Mutex<VecDeque<RecordBatch>>>;

/// A view of record batches, in the in-memory database. A statement has to read the view
/// completely: all columns, in their order, without a condition, since the stream ignores the
/// columns and rows that DuckDB does not want.
pub struct BatchView {
    connection: ffi::duckdb_connection,
    name: String,
    waiting: Waiting,
    /// The stream of this view, which refers to it by its address.
    stream: *mut FFI_ArrowArrayStream,
    /// The database, which outlives the connection.
    _database: Arc<Database>,
}

// SAFETY: the connection and the stream are used by one thread at a time: through `&mut self`, or
// by DuckDB during a scan, which the caller waits for.
unsafe impl Send for BatchView {}

impl BatchView {
    /// Makes a view of batches with this schema, under a name that no other view has.
    pub fn new(database: &Arc<Database>, schema: SchemaRef) -> Result<Self, RawError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("rhei_rows_{}", NUMBER.fetch_add(1, Ordering::Relaxed));

        let waiting = Waiting::default();
        let lent = StreamState {
            schema: FFI_ArrowSchema::try_from(schema.as_ref())?,
            waiting: Arc::clone(&waiting),
        };
        let stream = Box::into_raw(Box::new(lent.into_stream()));

        let mut connection: ffi::duckdb_connection = ptr::null_mut();
        // SAFETY: the database is open.
        let connected = unsafe { ffi::duckdb_connect(database.raw, &mut connection) };
        let view = Self { connection, name, waiting, stream, _database: Arc::clone(database) };

        if connected != ffi::DuckDBSuccess {
            return Err(RawError("no connection".to_owned()));
        }

        let name = CString::new(view.name.as_str()).map_err(|error| RawError(error.to_string()))?;
        // SAFETY: connection and stream are alive; the stream stays at its address until the view
        // is gone (see Drop). DuckDB takes a pointer to an ArrowArrayStream here, although the name
        // of the type differs.
        let made =
            unsafe { ffi::duckdb_arrow_scan(view.connection, name.as_ptr(), view.stream.cast()) };

        if made == ffi::DuckDBSuccess {
            Ok(view)
        } else {
            Err(RawError("it makes no view of Arrow data".to_owned()))
        }
    }

    /// Returns the full name of the view.
    pub fn name(&self) -> String {
        format!("memory.main.{}", self.name)
    }

    /// Puts batches into the view: the next scan returns the rows of these batches, once.
    pub fn put(&self, batches: impl IntoIterator<Item = RecordBatch>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.clear();
        waiting.extend(batches);
    }
}

impl Drop for BatchView {
    fn drop(&mut self) {
        // SAFETY: connection (which may be null), result and stream are released once, the stream
        // after the view that has its address. Names are our own, without quotes.
        unsafe {
            if let (Ok(sql), false) = (
                CString::new(format!("DROP VIEW IF EXISTS {}", self.name())),
                self.connection.is_null(),
            ) {
                let mut result = std::mem::zeroed();
                ffi::duckdb_query(self.connection, sql.as_ptr(), &mut result);
                ffi::duckdb_destroy_result(&mut result);
            }

            ffi::duckdb_disconnect(&mut self.connection);
            drop(Box::from_raw(self.stream));
        }
    }
}

/// The data behind a stream. DuckDB plans a statement and runs it again and again: for each plan it
/// asks for the schema, and never releases it. A separate schema for each request, as the arrow
/// crate would make it, would leak each time.
struct StreamState {
    schema: FFI_ArrowSchema,
    waiting: Waiting,
}

impl StreamState {
    fn into_stream(self) -> FFI_ArrowArrayStream {
        FFI_ArrowArrayStream {
            get_schema: Some(lend_schema),
            get_next: Some(next_array),
            get_last_error: Some(no_error),
            release: Some(release_stream),
            private_data: Box::into_raw(Box::new(self)).cast(),
        }
    }
}

/// Returns a copy of the schema, whose parts stay owned by the stream.
unsafe extern "C" fn lend_schema(
    stream: *mut FFI_ArrowArrayStream,
    out: *mut FFI_ArrowSchema,
) -> c_int {
    unsafe extern "C" fn keep(_: *mut FFI_ArrowSchema) {}
    // SAFETY: `private_data` is the `StreamState` of a stream that is alive, `out` is room for a
    // schema. The copy is used while the view is alive, and does not release what it points to.
    unsafe {
        let lent = (*stream).private_data.cast::<StreamState>();
        ptr::copy_nonoverlapping(&raw const (*lent).schema, out, 1);
        (*out).release = Some(keep);
    }
    0
}

/// Returns the next batch. An array that is already released ends a scan, but not the stream: the
/// next scan returns the batches that were put there meanwhile.
unsafe extern "C" fn next_array(
    stream: *mut FFI_ArrowArrayStream,
    out: *mut FFI_ArrowArray,
) -> c_int {
    // SAFETY: as above; `out` is room for an array, which DuckDB releases.
    unsafe {
        let lent = &*(*stream).private_data.cast::<StreamState>();
        let next = lent.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let array = next.map_or_else(FFI_ArrowArray::empty, |batch| {
            FFI_ArrowArray::new(&StructArray::from(batch).to_data())
        });
        ptr::write(out, array);
    }
    0
}

unsafe extern "C" fn no_error(_: *mut FFI_ArrowArrayStream) -> *const c_char {
    ptr::null()
}

unsafe extern "C" fn release_stream(stream: *mut FFI_ArrowArrayStream) {
    // SAFETY: the owner of the stream calls this once, and this marks the stream as released.
    unsafe {
        drop(Box::from_raw((*stream).private_data.cast::<StreamState>()));
        (*stream).release = None;
    }
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;

    fn resident_kb() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or_default()
    }

    #[test]
    fn planning_a_statement_again_and_again_takes_no_more_memory() {
        let database = Arc::new(Database::open(&[]).unwrap());
        let connection = database.connect().unwrap();

        let field =
            |at| Field::new(format!("column_{at}_{}", "x".repeat(1000)), DataType::Int64, true);
        let schema = Arc::new(Schema::new((0..50).map(field).collect::<Vec<_>>()));
        let view = BatchView::new(&database, schema).unwrap();

        let plan = || connection.execute_batch(&format!("SELECT * FROM {}", view.name())).unwrap();
        (0..100).for_each(|_| plan());

        let before = resident_kb();
        // The names of 50 columns take a kilobyte each; 1,000 times that are 50 MB.
        (0..1000).for_each(|_| plan());
        let grown = resident_kb().saturating_sub(before);
        assert!(grown < 20_000, "{grown} kB");
    }
}
