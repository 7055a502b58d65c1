//! Proves that a copy is equal to its source.
//!
//! Both sides stand at one LSN ([`crate::backfill::stand`]), `table` compares one table after the
//! other there, and `report` says what was found, while the stream goes on.
//!
//! Both sides have the same number for a row. PostgreSQL hashes a whole row without printing it:
//! `hash_record_extended(ROW(..), 0)`. This module computes that number over rows of DuckDB, so
//! that a count and a sum on both sides say whether two tables are equal: two different tables have
//! one sum by an accident of 1 in 2^64, or of 1 in 2^32 where a single date or time differs. The
//! hashes protect from accidents, not from malice.
//! `hash_rule` decides for each column what both sides hash, `row_hash` hashes the columns of a
//! batch, `pg_text` prints values as PostgreSQL does where both sides hash text, and `lookup3`
//! holds the hash functions that all of it is made of.
//!
//! The source's expressions run in a session of `source::connection::connect_sql`, which pins all
//! settings that the text of values depends on.

mod hash_rule;
mod lookup3;
mod pg_text;
mod report;
mod row_hash;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use serde::{Deserialize, Serialize};

use crate::{
    backfill::stand,
    error::error_chain,
    olap::{OlapEngine, StoredTable, TableState, TargetReader},
    pipeline::{Context, EngineError, Writer, tables::from_stored},
    source::{
        SourceError,
        catalog::{self, Fingerprint},
        connection::SqlClient,
    },
};

pub use hash_rule::{ColumnRule, RuleKind, SourceTypes, TableRule};
pub use report::{ColumnDifference, Report, RowDifference, RowVerdict, TableReport, TableVerdict};
pub use row_hash::{CellError, HashError, HashSum};

/// What is to be verified.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Request {
    /// The tables to compare, as `schema.table` at the source; none: all of them.
    pub tables: Vec<String>,
    /// The report holds the values that differ.
    pub shows_values: bool,
}

/// Compares tables of the copy with the source, both as of one LSN. A session has to follow the
/// stream meanwhile.
///
/// # Errors
/// The source or the target broke, or the copy has no table of a name that was asked for.
pub async fn verify<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    request: &Request,
) -> Result<Report, EngineError> {
    let began = Instant::now();
    let mut standing = stand(context, writer, 1).await?;
    let tables = chosen(&standing.tables, request)?;

    let sql = standing.snapshot.session(context, "verify").await?;
    refuse_other_hashes(&sql).await?;
    let is_utf8 = catalog::server(&sql).await?.encoding == "UTF8";

    let mut report = Report { lsn: standing.lsn, tables: Vec::new(), seconds: 0.0 };
    for stored in tables {
        let Some(reader) = standing.readers.first_mut() else { continue };
        let table = match not_comparable(stored) {
            Some(reason) => TableReport::not_verified(stored.source.to_string(), reason),
            None => compare(&sql, reader, stored, context, is_utf8, request.shows_values).await?,
        };
        report.tables.push(table);
    }

    report.seconds = began.elapsed().as_secs_f64();
    Ok(report)
}

/// Refuses a server whose hash functions give other numbers: PostgreSQL does not promise them from
/// one major version to the next.
async fn refuse_other_hashes(sql: &SqlClient) -> Result<(), EngineError> {
    let cells = [
        lookup3::hash_u32(7),
        lookup3::hash_i64(8),
        lookup3::hash_bytes(b"rhei"),
        lookup3::hash_f64(1.5),
        lookup3::hash_numeric(125, 1),
    ];
    let expected = lookup3::hash_row(cells.into_iter().fold(0, lookup3::combine)).cast_signed();

    let query = "SELECT pg_catalog.hashint4extended(0, pg_catalog.hash_record_extended(\
                 ROW(7::int4, 8::int8, 'rhei'::text COLLATE \"C\", 1.5::float8, 12.5::numeric), \
                 0))";
    let found: i64 = sql.query_one(query, &[]).await?.try_get(0)?;
    if found == expected {
        return Ok(());
    }

    Err(EngineError::Setup(
        "this server hashes values in another way than the servers that rhei knows\nhint: a newer \
         rhei may know it"
            .to_owned(),
    ))
}

/// Returns the tables that are asked for, by name.
fn chosen<'a>(
    stored: &'a [StoredTable],
    request: &Request,
) -> Result<Vec<&'a StoredTable>, EngineError> {
    let known: BTreeMap<String, &StoredTable> = stored
        .iter()
        .filter(|table| table.state != TableState::Dropped)
        .map(|table| (table.source.to_string(), table))
        .collect();

    if request.tables.is_empty() {
        return Ok(known.into_values().collect());
    }

    let asked: BTreeSet<&String> = request.tables.iter().collect();
    let find = |name: &String| {
        known.get(name).copied().ok_or_else(|| {
            EngineError::Setup(format!(
                "there is no table {name} in this copy\nhint: `rhei status` lists the tables"
            ))
        })
    };
    asked.into_iter().map(find).collect()
}

/// Returns why a table cannot be compared, if that is so.
fn not_comparable(stored: &StoredTable) -> Option<String> {
    match &stored.state {
        TableState::Live if !stored.has_shadow => None,
        TableState::Error(pause) => Some(format!("the table is paused: {}", pause.reason)),
        _ => Some("the table is being copied".to_owned()),
    }
}

async fn compare<R: TargetReader>(
    sql: &SqlClient,
    reader: &mut R,
    stored: &StoredTable,
    context: &Context,
    is_utf8: bool,
    shows_values: bool,
) -> Result<TableReport, EngineError> {
    let name = stored.source.to_string();
    let spec = Arc::new(from_stored(stored, context.options.null_unrepresentable));

    let oids: BTreeSet<u32> = spec.columns.iter().map(|column| column.type_oid).collect();
    let types = catalog::types(sql, &oids.into_iter().collect::<Vec<_>>()).await?;
    let types = SourceTypes { catalog: &types, is_utf8 };

    let filter = serde_json::from_str::<Fingerprint>(&spec.fingerprint)
        .ok()
        .and_then(|fingerprint| fingerprint.row_filter);

    let filter = filter.as_deref();
    let comparison = table::Comparison::new(sql, &spec, types, filter, shows_values).await?;
    let Some(comparison) = comparison else {
        return Ok(TableReport::not_verified(name, "the source has no such table any more"));
    };

    match comparison.run(reader).await {
        // The source's session goes on after a statement that it refused: the table was altered
        // since the snapshot, or is locked.
        Err(EngineError::Source(SourceError::Query(error))) if error.as_db_error().is_some() => {
            Ok(TableReport::not_verified(
                name,
                format!("the source refused to read it: {}", error_chain(&error)),
            ))
        }
        compared => compared,
    }
}
