//! Rows that are fetched by their keys, as a snapshot sees them.

use std::sync::Arc;

use arrow::record_batch::RecordBatch;
use futures_util::StreamExt;

use super::{
    plan::LOCK_PATIENCE,
    snapshot::{release_locks, watch_locks},
};
use crate::{
    change::TableSpec,
    pipeline::EngineError,
    source::{
        SourceError,
        connection::SqlClient,
        copy_binary::CopyReader,
        quote::{quote_identifier, quote_literal, quote_table},
    },
    types::schema_of,
};

/// Returns the rows with these keys (texts, in the order of the key columns), as the snapshot of
/// `holder` sees them.
///
/// # Errors
/// [`SourceError::is_locked`]: another session has locked the table.
pub async fn fetch_rows(
    holder: &SqlClient,
    spec: &Arc<TableSpec>,
    is_partitioned: bool,
    keys: &[Vec<String>],
) -> Result<Vec<RecordBatch>, EngineError> {
    watch_locks(holder).await?;
    // The stream is held in the meantime.
    holder
        .batch_execute(&format!("SET LOCAL lock_timeout = '{}ms'", LOCK_PATIENCE.as_millis()))
        .await?;

    let query = query(spec, is_partitioned, keys);
    let rows = copy_rows(holder, spec, &query, usize::MAX).await;

    // The rollback also clears a refused statement: the transaction goes on.
    release_locks(holder).await?;
    rows
}

/// Returns the rows that a `COPY (..) TO STDOUT (FORMAT binary)` of all columns of a table reads.
///
/// # Errors
/// [`EngineError::Setup`]: the rows have more than `max_bytes`.
pub async fn copy_rows(
    holder: &SqlClient,
    spec: &Arc<TableSpec>,
    query: &str,
    max_bytes: usize,
) -> Result<Vec<RecordBatch>, EngineError> {
    // Arrow counts the bytes of a column in one batch by 31 bits.
    const MAX_BATCH_BYTES: usize = 64 << 20;
    let schema =
        schema_of(spec.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)));

    let mut batches = Vec::new();
    let mut reader = CopyReader::new(Arc::clone(spec));
    let mut stream = Box::pin(holder.copy_out(query).await?);

    let mut bytes = 0;
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        bytes += piece.len();
        if bytes > max_bytes {
            return Err(EngineError::Setup(format!(
                "the rows of {} that have to be read have more than {max_bytes} bytes, which is \
                 all that [sync] memory_limit allows",
                spec.source
            )));
        }

        reader.push(&piece).map_err(SourceError::from)?;
        if reader.buffered_bytes() >= MAX_BATCH_BYTES {
            batches.push(reader.take_batch(&schema).map_err(SourceError::from)?);
        }
    }

    reader.finish().map_err(SourceError::from)?;
    batches.push(reader.take_batch(&schema).map_err(SourceError::from)?);
    Ok(batches)
}

/// Returns the statement that reads the rows with these keys.
fn query(spec: &TableSpec, is_partitioned: bool, keys: &[Vec<String>]) -> String {
    let columns: Vec<String> = spec
        .columns
        .iter()
        .map(|column| column.mapping.copy_select(&quote_identifier(&column.name)))
        .collect();

    let key: Vec<String> = spec
        .key_columns()
        .iter()
        .filter_map(|&at| spec.columns.get(at))
        .map(|column| quote_identifier(&column.name))
        .collect();

    let tuple = |key: &Vec<String>| {
        let parts: Vec<String> = key.iter().map(|part| quote_literal(part)).collect();
        format!("({})", parts.join(", "))
    };

    let tuples: Vec<String> = keys.iter().map(tuple).collect();
    format!(
        "COPY (SELECT {} FROM {}{} WHERE ({}) IN ({})) TO STDOUT (FORMAT binary)",
        columns.join(", "),
        if is_partitioned { "" } else { "ONLY " },
        quote_table(&spec.source),
        key.join(", "),
        tuples.join(", ")
    )
}

/// Returns whether rows of the table can be fetched by a key that went through DuckDB: the text of
/// the key there is one that PostgreSQL reads as the same value.
pub fn is_fetchable(spec: &TableSpec) -> bool {
    const INT8: u32 = 20;
    const INT2: u32 = 21;
    const INT4: u32 = 23;
    const TEXT: u32 = 25;
    const OID: u32 = 26;
    const VARCHAR: u32 = 1043;
    const UUID: u32 = 2950;

    let key = spec.key_columns();
    !key.is_empty()
        && key.iter().filter_map(|&at| spec.columns.get(at)).all(|column| {
            [INT8, INT2, INT4, TEXT, OID, VARCHAR, UUID].contains(&column.type_oid)
                && ["BIGINT", "SMALLINT", "INTEGER", "VARCHAR", "UINTEGER", "UUID"]
                    .contains(&column.mapping.target_type.as_str())
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backfill::samples::{column, planned, table},
        change::Key,
        source::catalog::SourceTable,
    };

    /// Returns a table whose first column, the key, is of this type.
    fn keyed_by(type_oid: u32) -> TableSpec {
        let columns = vec![column(1, "id", type_oid), column(2, "note", 25)];
        planned(&SourceTable { columns, ..table(1) })
    }

    #[test]
    fn rows_are_fetched_by_keys_whose_text_means_the_same_on_both_sides() {
        for (name, type_oid, expected) in [
            ("smallint", 21, true),
            ("integer", 23, true),
            ("bigint", 20, true),
            ("oid", 26, true),
            ("text", 25, true),
            ("varchar", 1043, true),
            ("uuid", 2950, true),
            ("char, which is padded", 1042, false),
            ("bytea", 17, false),
            ("numeric", 1700, false),
            ("double precision", 701, false),
            ("timestamptz", 1184, false),
        ] {
            assert_eq!(is_fetchable(&keyed_by(type_oid)), expected, "{name}");
        }
    }

    #[test]
    fn rows_are_fetched_only_by_a_key_of_which_every_part_is_safe() {
        let by = |key| is_fetchable(&TableSpec { key, ..keyed_by(701) });
        // The first column is a double, and the second one a text.
        assert!(by(Key::Columns(vec![1])));
        assert!(!by(Key::Columns(vec![1, 0])));
        assert!(!by(Key::WholeRow) && !by(Key::AppendOnly));
    }

    #[test]
    fn the_keys_of_fetched_rows_are_quoted_and_stand_in_the_order_of_the_key() {
        let spec = TableSpec { key: Key::Columns(vec![1, 0]), ..planned(&table(1)) };
        let key = |note: &str, id: &str| vec![note.to_owned(), id.to_owned()];
        let keys = [key("it's", "1"), key("b", "2")];

        let from = |from: &str| {
            format!(
                "COPY (SELECT \"id\", \"note\" FROM {from}\"public\".\"t1\" WHERE \
                 (\"note\", \"id\") IN (('it''s', '1'), ('b', '2'))) TO STDOUT (FORMAT binary)"
            )
        };
        assert_eq!(query(&spec, false, &keys), from("ONLY "));
        // The rows of a partitioned table are in its partitions.
        assert_eq!(query(&spec, true, &keys), from(""));
    }
}
