//! The files that hold the rows of a table, as a snapshot sees them and as they are now.

use tokio_postgres::Client;

use super::CatalogError;
use crate::source::quote::quote_identifier;

/// A table or a leaf partition that holds rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFile {
    /// The oid of the table or partition.
    pub oid: u32,
    /// What a query reads it from: `ONLY "schema"."name"`.
    pub from: String,
    /// The number of its file (`pg_class.relfilenode`).
    pub file: u32,
}

/// Returns the files that hold the rows of a table as the session's snapshot sees them: that of the
/// table itself, or those of its leaf partitions. `None`: the snapshot sees no such table. Takes no
/// lock on any of them.
pub async fn files_of(client: &Client, oid: u32) -> Result<Option<Vec<TableFile>>, CatalogError> {
    const QUERY: &str = "WITH RECURSIVE tree(oid) AS ( \
           SELECT $1::oid \
           UNION ALL SELECT i.inhrelid FROM tree \
           JOIN pg_catalog.pg_class parent ON parent.oid = tree.oid AND parent.relkind = 'p' \
           JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending) \
         SELECT c.oid, n.nspname::text, c.relname::text, c.relfilenode, c.relkind = 'p' \
         FROM tree JOIN pg_catalog.pg_class c ON c.oid = tree.oid \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace ORDER BY c.oid";

    let rows = client.query(QUERY, &[&oid]).await?;
    if rows.is_empty() {
        return Ok(None);
    }

    let mut files = Vec::new();
    for row in rows {
        let is_partitioned: bool = row.try_get(4)?;
        if is_partitioned {
            continue;
        }

        let (schema, name): (String, String) = (row.try_get(1)?, row.try_get(2)?);
        files.push(TableFile {
            oid: row.try_get(0)?,
            from: format!("ONLY {}.{}", quote_identifier(&schema), quote_identifier(&name)),
            file: row.try_get(3)?,
        });
    }
    Ok(Some(files))
}

/// Returns how many pages of 8 KiB a table has, if it still has its file. After a rewrite or a
/// TRUNCATE, an older snapshot sees the table as empty (trap 60), so rows that a snapshot read are
/// all of them only when this holds while the lock of that reading is still held.
pub async fn pages_of(client: &Client, file: &TableFile) -> Result<Option<u64>, CatalogError> {
    // The functions read the newest state of the catalogs, whatever the snapshot is.
    let query = "SELECT pg_catalog.pg_relation_size($1::oid) / \
                        pg_catalog.current_setting('block_size')::int8 \
                 WHERE pg_catalog.pg_relation_filenode($1::oid) IS NOT DISTINCT FROM $2::oid";
    let row = client.query_opt(query, &[&file.oid, &file.file]).await?;
    let pages = row.map(|row| row.try_get::<_, Option<i64>>(0)).transpose()?.flatten();
    Ok(pages.map(i64::unsigned_abs))
}
