//! Rows as Arrow, by DuckDB itself.
#![allow(unsafe_code, reason = "DuckDB's C API; each block says why it is sound")]

use std::{
    ffi::{CStr, CString},
    ptr,
    sync::Arc,
};

use arrow::{
    array::StructArray,
    datatypes::{Schema, SchemaRef},
    ffi::{FFI_ArrowArray, FFI_ArrowSchema, from_ffi},
    record_batch::RecordBatch,
};
use duckdb::ffi;

use super::statement::{Chunk, ErrorKind, Rows, StatementError};

/// How the rows of one result become Arrow.
pub struct ArrowForm {
    options: ffi::duckdb_arrow_options,
    raw: FFI_ArrowSchema,
    schema: SchemaRef,
}

impl Drop for ArrowForm {
    fn drop(&mut self) {
        // SAFETY: the options are destroyed once, here.
        unsafe { ffi::duckdb_destroy_arrow_options(&mut self.options) }
    }
}

impl ArrowForm {
    /// Returns the form of a result whose columns have these names.
    ///
    /// # Errors
    /// DuckDB has no Arrow type for a column.
    pub fn of<'a>(
        rows: &mut Rows<'_>,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Self, StatementError> {
        let names: Vec<CString> =
            names.map(|name| CString::new(name).unwrap_or_default()).collect();
        let mut names: Vec<*const _> = names.iter().map(|name| name.as_ptr()).collect();

        // SAFETY: the result is alive; types are destroyed once, after the call; names live until
        // then; DuckDB fills in the schema, or leaves it empty and returns an error.
        let (options, raw, failed) = unsafe {
            let result = rows.raw();
            let options = ffi::duckdb_result_get_arrow_options(result);
            let mut types: Vec<_> = (0..names.len() as u64)
                .map(|at| ffi::duckdb_column_logical_type(result, at))
                .collect();
            let mut raw = FFI_ArrowSchema::empty();
            let failed = ffi::duckdb_to_arrow_schema(
                options,
                types.as_mut_ptr(),
                names.as_mut_ptr(),
                names.len() as u64,
                ptr::from_mut(&mut raw).cast(),
            );
            for of in &mut types {
                ffi::duckdb_destroy_logical_type(of);
            }
            (options, raw, failed)
        };

        // From here on the options are destroyed with the form.
        let mut form = Self { options, raw, schema: Arc::new(Schema::empty()) };
        // SAFETY: the error is read and destroyed once.
        unsafe { check(failed) }?;
        form.schema = Arc::new(Schema::try_from(&form.raw).map_err(unreadable)?);
        Ok(form)
    }

    /// Returns the schema of every batch.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Returns the rows of a chunk of this result.
    pub fn batch(&self, chunk: &Chunk<'_>) -> Result<RecordBatch, StatementError> {
        let mut array = FFI_ArrowArray::empty();
        // SAFETY: the chunk is alive and stays as it is; DuckDB fills in the array, which owns its
        // memory, or returns an error; the array has the types of the schema.
        let data = unsafe {
            let to = ptr::from_mut(&mut array).cast();
            check(ffi::duckdb_data_chunk_to_arrow(self.options, chunk.raw(), to))?;
            from_ffi(array, &self.raw).map_err(unreadable)?
        };
        let (_, columns, _) = StructArray::from(data).into_parts();
        RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(unreadable)
    }
}

fn unreadable(error: arrow::error::ArrowError) -> StatementError {
    StatementError::new(ErrorKind::NotImplemented, format!("no Arrow can be made of it: {error}"))
}

/// # Safety
/// The error is null, or DuckDB's, and is not used again.
unsafe fn check(mut failed: ffi::duckdb_error_data) -> Result<(), StatementError> {
    // SAFETY: the caller vouches for the error; its text belongs to it.
    unsafe {
        if failed.is_null() || !ffi::duckdb_error_data_has_error(failed) {
            ffi::duckdb_destroy_error_data(&mut failed);
            return Ok(());
        }
        let message = CStr::from_ptr(ffi::duckdb_error_data_message(failed));
        let message = message.to_string_lossy().into_owned();
        ffi::duckdb_destroy_error_data(&mut failed);
        Err(StatementError::new(ErrorKind::NotImplemented, message))
    }
}
