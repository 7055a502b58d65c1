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

    let rows = fetch(holder, spec, is_partitioned, keys).await;

    // The rollback also clears a refused statement: the transaction goes on.
    release_locks(holder).await?;
    rows
}

async fn fetch(
    holder: &SqlClient,
    spec: &Arc<TableSpec>,
    is_partitioned: bool,
    keys: &[Vec<String>],
) -> Result<Vec<RecordBatch>, EngineError> {
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
    let query = format!(
        "COPY (SELECT {} FROM {}{} WHERE ({}) IN ({})) TO STDOUT (FORMAT binary)",
        columns.join(", "),
        if is_partitioned { "" } else { "ONLY " },
        quote_table(&spec.source),
        key.join(", "),
        tuples.join(", ")
    );

    // Arrow counts the bytes of a column in one batch by 31 bits.
    const MAX_BATCH_BYTES: usize = 64 << 20;
    let schema =
        schema_of(spec.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)));

    let mut batches = Vec::new();
    let mut reader = CopyReader::new(Arc::clone(spec));
    let mut stream = Box::pin(holder.copy_out(&query).await?);

    while let Some(piece) = stream.next().await {
        reader.push(&piece?).map_err(SourceError::from)?;
        if reader.buffered_bytes() >= MAX_BATCH_BYTES {
            batches.push(reader.take_batch(&schema).map_err(SourceError::from)?);
        }
    }

    reader.finish().map_err(SourceError::from)?;
    batches.push(reader.take_batch(&schema).map_err(SourceError::from)?);
    Ok(batches)
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
