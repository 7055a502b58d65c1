//! Finds columns with long values by a sample of the source.
//!
//! DuckDB 1.5.5 takes DICT_FSST for nearly all strings, which writes documents at 40 MB/s. ZSTD is
//! ten times faster there and makes a third of the size, but reads short values that recur ten
//! times slower, so ZSTD is for long values only; and DuckDB can be told when a table is made, and
//! not later.

use std::collections::{HashMap, HashSet};

use tokio_postgres::types::Oid;

use crate::{
    change::ColumnSpec,
    pipeline::EngineError,
    source::{
        catalog::SourceTable,
        connection::SqlClient,
        quote::{quote_identifier, quote_table},
    },
};

/// The mean length from which on values are long, in bytes as PostgreSQL keeps them: compressed,
/// from 2 kB on.
const LONG_BYTES: f64 = 2000.0;
/// The number of rows of a table in the sample.
const SAMPLE_ROWS: u32 = 1000;
/// The sample waits no longer than this: neither for a session that holds a lock on the table, nor
/// for the end of pages that hold only dead rows.
const TIMEOUT: &str = "SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = '5s'";

/// Returns whether DuckDB can keep a column by ZSTD, and PostgreSQL out of line. DuckDB refuses to
/// give such a column a type that ZSTD is not for; no column of these types is followed in place
/// when its type changes ([`crate::types::in_place`]).
pub(super) fn may_be_long(column: &ColumnSpec) -> bool {
    ["VARCHAR", "BLOB", "JSON"].contains(&column.mapping.target_type.as_str())
}

/// Finds the columns with long values, by `attnum`, per table. A table that cannot be sampled has
/// none.
pub(super) async fn find_long_columns(
    client: &SqlClient,
    tables: &[SourceTable],
) -> Result<HashMap<Oid, Vec<i16>>, EngineError> {
    let mut found = HashMap::new();
    let leaves: Vec<Oid> =
        tables.iter().flat_map(|table| table.leaves.iter().map(|leaf| leaf.oid)).collect();

    let rows = client
        .query(
            "SELECT oid FROM pg_class WHERE oid = ANY($1) AND reltoastrelid <> 0 AND \
             pg_relation_size(reltoastrelid) > 0",
            &[&leaves],
        )
        .await?;
    let has_toast = rows.iter().map(|row| row.try_get(0)).collect::<Result<HashSet<Oid>, _>>()?;

    for table in tables {
        let Some(leaf) = table.leaves.iter().find(|leaf| has_toast.contains(&leaf.oid)) else {
            continue;
        };

        let columns: Vec<_> = table.columns.iter().filter(|column| column.toastable).collect();
        if columns.is_empty() {
            continue;
        }

        let list = |of: &dyn Fn(String) -> String| {
            columns
                .iter()
                .map(|column| of(quote_identifier(&column.name)))
                .collect::<Vec<_>>()
                .join(", ")
        };

        // The source need not read the values: the length of a value that is kept out of line
        // stands in its row.
        let sql = format!(
            "SELECT ARRAY[{}]::float8[] FROM (SELECT {} FROM ONLY {} LIMIT {SAMPLE_ROWS}) sample",
            list(&|name| format!("coalesce(avg(pg_catalog.pg_column_size({name})), 0)")),
            list(&|name| name),
            quote_table(&leaf.name)
        );

        client.batch_execute(&format!("BEGIN READ ONLY; {TIMEOUT}")).await?;
        let sampled = client.query_one(&sql, &[]).await;
        client.batch_execute("ROLLBACK").await?;

        let means: Vec<f64> = match sampled {
            Ok(row) => row.try_get(0)?,
            Err(error) if error.as_db_error().is_some() => {
                tracing::debug!(
                    table = %table.name,
                    error = %error,
                    "the table's columns were not sampled"
                );
                continue;
            }
            Err(error) => return Err(error.into()),
        };

        let long = columns.iter().zip(means).filter(|(_, mean)| *mean >= LONG_BYTES);
        found.insert(table.oid, long.map(|(column, _)| column.attnum).collect());
    }

    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backfill::samples::{column, planned, table},
        source::catalog::SourceTable,
    };

    #[test]
    fn texts_documents_and_bytes_may_be_long() {
        for (name, type_oid, expected) in [
            ("text", 25, true),
            ("varchar", 1043, true),
            ("bytea", 17, true),
            ("jsonb", 3802, true),
            ("int8", 20, false),
            ("uuid", 2950, false),
            ("timestamp", 1114, false),
        ] {
            let columns = vec![column(1, "id", 23), column(2, "c", type_oid)];
            let spec = planned(&SourceTable { columns, ..table(1) });
            assert_eq!(may_be_long(&spec.columns[1]), expected, "{name}");
        }
    }
}
