//! How long transactions of other processes have been open, so that no snapshot expires that one of
//! them needs.
//!
//! A transaction that deletes rows is checked at its commit against every snapshot that came since
//! it began. DuckLake 1.0 does not notice that such a snapshot has expired, and then loses the
//! deletions in silence. Readers need none of the older snapshots: PostgreSQL shows them the
//! catalog as it was.

use std::time::Duration;

use super::{CatalogKind, LakeOptions};
use crate::olap::{TargetError, connection::TargetConnection, names::CATALOG};

/// How far the clocks of writers and of the catalog may be apart.
const CLOCKS: Duration = Duration::from_secs(60);

/// Returns how old a snapshot has to be for no open transaction to need it; `None` when the open
/// transactions cannot be seen. A DuckDB file has no other user than this process.
pub(super) fn needed_for(
    connection: &TargetConnection,
    options: &LakeOptions,
) -> Result<Option<Duration>, TargetError> {
    match options.catalog_kind() {
        CatalogKind::Postgres => {}
        CatalogKind::DuckDb => return Ok(Some(Duration::ZERO)),
        CatalogKind::Sqlite | CatalogKind::MotherDuck => return Ok(None),
    }

    // PostgreSQL shows the sessions of other roles to members of pg_read_all_stats alone.
    let (hidden, seconds): (u64, Option<f64>) = connection.query_row(
        &format!(
            "SELECT * FROM postgres_query('__ducklake_metadata_{CATALOG}', \
             'SELECT count(*) FILTER (WHERE backend_type IS NULL AND usesysid IS NOT NULL), \
             extract(epoch FROM clock_timestamp() - min(xact_start) \
             FILTER (WHERE backend_type = ''client backend''))::float8 FROM pg_stat_activity \
             WHERE datname = current_database() AND pid <> pg_backend_pid()')"
        ),
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    if hidden > 0 {
        return Ok(None);
    }
    let open = seconds.map(|seconds| Duration::from_secs_f64(seconds.max(0.0)) + CLOCKS);
    Ok(Some(open.unwrap_or_default()))
}
