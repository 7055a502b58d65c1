//! Decodes COPY BINARY, which arrives in pieces of any size, into Arrow.

use std::sync::Arc;

use arrow::{
    datatypes::SchemaRef, record_batch::RecordBatch, util::display::array_value_to_string,
};

use super::wire::frame::MAX_MESSAGE_BYTES;
use crate::{
    change::{Nulled, TableSpec, columns::note_nulled},
    types::{ColumnBuilder, ValueError},
};

/// The bytes are no COPY BINARY, or hold a value that rhei cannot store.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("the copy does not begin as COPY BINARY does")]
    Header,
    #[error("a copied row has {found} columns, expected {expected}")]
    ColumnCount { found: i16, expected: usize },
    #[error("a copied field has an impossible length ({0})")]
    FieldLength(i32),
    #[error("a copied row is longer than {limit} bytes")]
    RowTooLong { limit: usize },
    #[error("the copy was cut short: its end never came")]
    NoTrailer,
    #[error("the copy goes on after its end")]
    AfterTrailer,
    #[error("column \"{column}\" of table {table}{row}: {source}")]
    Value { table: String, column: String, row: String, source: Box<ValueError> },
    #[error("copied columns do not fit together")]
    Arrow(#[from] arrow::error::ArrowError),
}

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// Takes bytes as they arrive, and returns record batches.
#[derive(Debug)]
pub struct CopyReader {
    columns: Vec<ColumnBuilder>,
    table: Arc<TableSpec>,
    nulled: Vec<Nulled>,
    /// The beginning of a row whose end has not arrived.
    partial: Vec<u8>,
    longest_row: usize,
    has_header: bool,
    has_trailer: bool,
    rows: usize,
    bytes: usize,
}

impl CopyReader {
    /// Makes a reader for rows with the columns of `table`, in its order.
    pub fn new(table: Arc<TableSpec>) -> Self {
        Self {
            columns: table
                .columns
                .iter()
                .map(|column| ColumnBuilder::new(&column.mapping, 1024))
                .collect(),
            nulled: Vec::new(),
            table,
            partial: Vec::new(),
            longest_row: MAX_MESSAGE_BYTES,
            has_header: false,
            has_trailer: false,
            rows: 0,
            bytes: 0,
        }
    }

    /// Returns the number of whole rows that wait for [`Self::take_batch`].
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the size of those rows in bytes, as they arrived.
    pub fn buffered_bytes(&self) -> usize {
        self.bytes
    }

    /// Takes the next piece of the copy.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), CopyError> {
        if self.partial.is_empty() {
            let taken = self.read(piece)?;
            let rest = piece.get(taken..).unwrap_or_default();
            self.refuse_longer(rest.len())?;
            self.partial.extend_from_slice(rest);
        } else {
            let mut whole = std::mem::take(&mut self.partial);
            whole.extend_from_slice(piece);
            let taken = self.read(&whole)?;
            whole.drain(..taken);
            self.refuse_longer(whole.len())?;
            self.partial = whole;
        }
        Ok(())
    }

    /// Refuses a partial row that is too long: the server sends each row as one message, so no row
    /// can be longer than a message.
    fn refuse_longer(&self, partial: usize) -> Result<(), CopyError> {
        let limit = self.longest_row;
        if partial > limit { Err(CopyError::RowTooLong { limit }) } else { Ok(()) }
    }

    /// Reads whole rows, and returns how many bytes they took.
    fn read(&mut self, bytes: &[u8]) -> Result<usize, CopyError> {
        let mut rest = bytes;
        if !self.has_header {
            let Some((signature, after)) = rest.split_at_checked(SIGNATURE.len()) else {
                return Ok(0);
            };
            if signature != SIGNATURE {
                return Err(CopyError::Header);
            }

            let Some((_flags, after)) = after.split_first_chunk::<4>() else { return Ok(0) };
            let Some((extension, after)) = after.split_first_chunk::<4>() else { return Ok(0) };
            let Some((_, after)) = after.split_at_checked(u32::from_be_bytes(*extension) as usize)
            else {
                return Ok(0);
            };

            self.has_header = true;
            rest = after;
        }

        loop {
            if self.has_trailer {
                return if rest.is_empty() {
                    Ok(bytes.len())
                } else {
                    Err(CopyError::AfterTrailer)
                };
            }

            let Some(after) = self.row(rest)? else { return Ok(bytes.len() - rest.len()) };
            rest = after;
        }
    }

    /// Reads one row, or the trailer. Returns none when the row is not whole yet.
    fn row<'a>(&mut self, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, CopyError> {
        let Some((count, fields)) = bytes.split_first_chunk::<2>() else { return Ok(None) };
        let count = i16::from_be_bytes(*count);

        if count == -1 {
            self.has_trailer = true;
            return Ok(Some(fields));
        }

        if usize::try_from(count) != Ok(self.columns.len()) {
            return Err(CopyError::ColumnCount { found: count, expected: self.columns.len() });
        }

        // The row must be whole before any value is appended, so that columns never differ in
        // length.
        let mut rest = fields;
        for _ in 0..count {
            let Some((_, after)) = field(rest)? else { return Ok(None) };
            rest = after;
        }

        let mut values = fields;
        for (at, column) in self.columns.iter_mut().enumerate() {
            let Some((value, after)) = field(values)? else { return Ok(None) };
            values = after;
            let Err(source) = column.push_binary(value) else { continue };

            let name =
                self.table.columns.get(at).map_or_else(String::new, |column| column.name.clone());
            let row = row_text(&self.table, fields);

            let is_key = self.table.key_columns().contains(&at);
            if self.table.null_unrepresentable && source.is_unrepresentable() && !is_key {
                note_nulled(&mut self.nulled, &name, || source.at(&row));
                continue;
            }

            return Err(CopyError::Value {
                table: self.table.source.to_string(),
                column: name,
                row,
                source: source.into(),
            });
        }

        self.rows += 1;
        self.bytes += bytes.len() - rest.len();
        Ok(Some(rest))
    }

    /// Returns the rows so far as one batch.
    pub fn take_batch(&mut self, schema: &SchemaRef) -> Result<RecordBatch, CopyError> {
        let arrays = self.columns.iter_mut().map(ColumnBuilder::finish).collect();
        self.columns = self
            .table
            .columns
            .iter()
            .map(|column| ColumnBuilder::new(&column.mapping, self.rows))
            .collect();
        (self.rows, self.bytes) = (0, 0);
        Ok(RecordBatch::try_new(schema.clone(), arrays)?)
    }

    /// Returns the values that became NULL since the last call, as the settings allow.
    pub fn take_nulled(&mut self) -> Vec<Nulled> {
        std::mem::take(&mut self.nulled)
    }

    /// Ends the copy after its last piece.
    ///
    /// # Errors
    /// The trailer never arrived: the rows that were read are not the whole copy.
    pub fn finish(&self) -> Result<(), CopyError> {
        if self.has_trailer && self.partial.is_empty() { Ok(()) } else { Err(CopyError::NoTrailer) }
    }
}

type FieldAndRest<'a> = (Option<&'a [u8]>, &'a [u8]);

fn field(bytes: &[u8]) -> Result<Option<FieldAndRest<'_>>, CopyError> {
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    match i32::from_be_bytes(*length) {
        -1 => Ok(Some((None, rest))),
        length => {
            let length = usize::try_from(length).map_err(|_| CopyError::FieldLength(length))?;
            Ok(rest.split_at_checked(length).map(|(value, rest)| (Some(value), rest)))
        }
    }
}

/// Returns ` (row id=7)`, with which the operator finds the row.
fn row_text(table: &TableSpec, fields: &[u8]) -> String {
    const MAX_CHARS: usize = 60;
    let mut parts = Vec::new();
    let mut rest = fields;

    for (at, column) in table.columns.iter().enumerate() {
        let Ok(Some((value, after))) = field(rest) else { break };
        rest = after;

        if !table.key_columns().contains(&at) {
            continue;
        }

        let mut cell = ColumnBuilder::new(&column.mapping, 1);
        let shown = match cell.push_binary(value) {
            Ok(()) => array_value_to_string(&cell.finish(), 0).unwrap_or_default(),
            Err(_) => "?".to_owned(),
        };

        parts.push(format!(
            "{}={}",
            column.name,
            shown.chars().take(MAX_CHARS).collect::<String>()
        ));
    }

    if parts.is_empty() { String::new() } else { format!(" (row {})", parts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Lsn,
        change::{ColumnSpec, Key},
        pgoutput::{QualifiedName, ReplicaIdentity},
        types::{ColumnType, TypeCatalog, map_column, schema_of},
    };

    fn table() -> Arc<TableSpec> {
        let column = |(at, type_oid): (usize, u32)| {
            let column = ColumnType { type_oid, typmod: -1, ndims: 0, override_type: None };
            ColumnSpec {
                name: ["a", "b"][at].to_owned(),
                attnum: 1 + at as i16,
                type_oid,
                typmod: -1,
                not_null: false,
                target_name: ["a", "b"][at].to_owned(),
                mapping: map_column(&column, &TypeCatalog::default()).unwrap(),
            }
        };
        Arc::new(TableSpec {
            oid: 1,
            source: QualifiedName::new("public", "t"),
            target: QualifiedName::new("public", "t"),
            epoch: 0,
            replica_identity: ReplicaIdentity::Default,
            key: Key::Columns(vec![0]),
            columns: [23, 25].into_iter().enumerate().map(column).collect(),
            excluded: Vec::new(),
            fingerprint: String::new(),
            null_unrepresentable: false,
            copy_lsn: Lsn::ZERO,
            copy_xids: None,
        })
    }

    fn copy() -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([0; 8]);
        for (id, text) in [(1_i32, Some("ä")), (2, None), (3, Some(""))] {
            bytes.extend([0, 2, 0, 0, 0, 4]);
            bytes.extend(id.to_be_bytes());
            match text {
                Some(text) => {
                    bytes.extend((text.len() as i32).to_be_bytes());
                    bytes.extend(text.as_bytes());
                }
                None => bytes.extend((-1_i32).to_be_bytes()),
            }
        }
        bytes.extend((-1_i16).to_be_bytes());
        bytes
    }

    #[test]
    fn a_copy_cut_at_any_byte_gives_the_same_rows() {
        let table = table();
        let schema =
            schema_of(table.columns.iter().map(|column| (column.name.as_str(), &column.mapping)));
        let bytes = copy();
        let mut expected = None;
        for cut in 0..=bytes.len() {
            let mut reader = CopyReader::new(Arc::clone(&table));
            reader.push(&bytes[..cut]).unwrap();
            reader.push(&bytes[cut..]).unwrap();
            reader.finish().unwrap();
            assert_eq!(reader.rows(), 3);
            let batch = reader.take_batch(&schema).unwrap();
            assert_eq!(expected.get_or_insert(batch.clone()), &batch, "cut at {cut}");
        }
    }

    #[test]
    fn a_row_that_never_ends_is_refused_before_it_fills_the_memory() {
        let mut reader = CopyReader { longest_row: 1000, ..CopyReader::new(table()) };
        reader.push(&copy()[..SIGNATURE.len() + 8]).unwrap();
        reader.push(&[0, 2, 0x7F, 0xFF, 0xFF, 0xFF]).unwrap();
        let mut pushed = 6;
        let error = loop {
            match reader.push(&[b'x'; 100]) {
                Ok(()) => pushed += 100,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, CopyError::RowTooLong { limit: 1000 }), "{error}");
        assert_eq!(pushed, 906);
    }

    #[test]
    fn a_copy_without_its_end_never_passes() {
        let bytes = copy();
        for length in 0..bytes.len() {
            let mut reader = CopyReader::new(table());
            reader.push(&bytes[..length]).unwrap();
            assert!(matches!(reader.finish(), Err(CopyError::NoTrailer)), "{length} bytes");
        }
        let mut reader = CopyReader::new(table());
        assert!(matches!(
            reader.push(&[bytes.as_slice(), b"x"].concat()),
            Err(CopyError::AfterTrailer)
        ));
    }
}
