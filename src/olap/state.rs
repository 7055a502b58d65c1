//! `_rhei.pipeline` and `_rhei.cycles`: the state that the file stores.

use duckdb::params;

use super::{
    Phase, Pipeline, StoredState, TargetError,
    connection::TargetConnection,
    lake::Fence,
    migrations::{self, FORMAT_VERSION},
    names,
    tables::Tables,
};
use crate::{Checkpoint, Lsn, pgoutput::QualifiedName};

const SCHEMA: &str = include_str!("../../schemas/state.sql");
/// The id of the pipeline in the rows of `_rhei`. One file holds the copy of one source.
pub(super) const PIPELINE_ID: u32 = 1;

/// The number of cycles that are kept.
const KEPT_CYCLES: u64 = 1000;
/// The microseconds from 1970 to 2000.
const EPOCH_2000_US: i64 = 946_684_800_000_000;

/// The work of a cycle, for `_rhei.cycles`.
pub(super) struct Cycle {
    pub source_transactions: u64,
    pub counts: crate::change::RowCounts,
    pub deleted_rows: u64,
    pub inserted_rows: u64,
    pub duration_ms: u64,
}

/// Makes `_rhei` if it is missing.
pub(super) fn create(connection: &TargetConnection) -> Result<(), TargetError> {
    let schema = names::quoted(connection.state_schema());
    connection.execute_batch(&format!("CREATE SCHEMA IF NOT EXISTS {schema}"))?;
    Ok(connection.execute_batch(&connection.sql(SCHEMA))?)
}

/// Returns whether rhei has ever written to the file.
pub(super) fn exists(connection: &TargetConnection) -> Result<bool, TargetError> {
    let query = "SELECT count(*) FROM duckdb_tables() WHERE database_name = current_database() AND \
                 schema_name = ? AND table_name = 'pipeline'";
    let state = connection.state_schema();
    Ok(connection.query_row(query, [state], |row| row.get::<_, i64>(0))? > 0)
}

/// Returns the format of a file and the version of the rhei that wrote it, if `_rhei` is there.
pub(super) fn format(connection: &TargetConnection) -> Result<Option<(i32, String)>, TargetError> {
    if !exists(connection)? {
        return Ok(None);
    }

    let mut statement = connection
        .prepare(&connection.sql("SELECT format_version, rhei_version FROM _rhei.pipeline"))?;
    let mut rows = statement.query([])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    Ok(Some((row.get(0)?, row.get(1)?)))
}

/// Reads everything but the tables.
pub(super) fn read_pipeline(
    connection: &TargetConnection,
) -> Result<Option<Pipeline>, TargetError> {
    match format(connection)? {
        None => return Ok(None),
        Some((FORMAT_VERSION, _)) => {}
        Some((found, written_by)) => return Err(migrations::unreadable(found, written_by)),
    }

    let mut statement = connection.prepare(&connection.sql(
        "SELECT slot, publications, publication_fingerprint, system_id, database, database_oid, \
         timeline, phase, checkpoint_lsn, epoch_us(checkpoint_time) FROM _rhei.pipeline",
    ))?;
    let mut rows = statement.query([])?;
    let Some(row) = rows.next()? else { return Ok(None) };

    let phase: String = row.get(7)?;
    let pipeline = Pipeline {
        slot: row.get(0)?,
        publications: from_json(&row.get::<_, String>(1)?)?,
        publication_fingerprint: row.get(2)?,
        system_id: row.get(3)?,
        database: row.get(4)?,
        database_oid: row.get(5)?,
        timeline: row.get(6)?,
        phase: match phase.as_str() {
            "creating" => Phase::Creating,
            "running" => Phase::Running,
            "plain_copy" => Phase::PlainCopy,
            other => return Err(corrupt(format!("phase \"{other}\" is unknown"))),
        },
        checkpoint: Checkpoint {
            lsn: lsn(&row.get::<_, String>(8)?)?,
            commit_time_us: row.get::<_, Option<i64>>(9)?.map(|time| time - EPOCH_2000_US),
        },
    };

    Ok(Some(pipeline))
}

pub(super) fn read(connection: &TargetConnection) -> Result<Option<StoredState>, TargetError> {
    let Some(pipeline) = read_pipeline(connection)? else { return Ok(None) };
    Ok(Some(StoredState { pipeline, tables: Tables::read(connection)?.list() }))
}

/// Replaces the row of the pipeline. In a lake the row also names its writer.
pub(super) fn put_pipeline(
    connection: &TargetConnection,
    pipeline: &Pipeline,
    fence: Option<&mut Fence>,
) -> Result<(), TargetError> {
    let phase = match pipeline.phase {
        Phase::Creating => "creating",
        Phase::Running => "running",
        Phase::PlainCopy => "plain_copy",
    };

    let (writer, attempt) = match fence {
        Some(fence) => {
            let (writer, attempt) = fence.remove_row(connection)?;
            (Some(writer), Some(attempt))
        }
        None => {
            connection.execute("DELETE FROM _rhei.pipeline", [])?;
            (None, None)
        }
    };

    connection.execute(
        &connection.sql(
            "INSERT INTO _rhei.pipeline VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, \
             make_timestamptz(?), now(), ?, ?, ?)",
        ),
        params![
            FORMAT_VERSION,
            env!("CARGO_PKG_VERSION"),
            pipeline.slot,
            to_json(&pipeline.publications),
            pipeline.publication_fingerprint,
            pipeline.system_id,
            pipeline.database,
            pipeline.database_oid,
            pipeline.timeline,
            phase,
            pipeline.checkpoint.lsn.to_string(),
            pipeline.checkpoint.commit_time_us.map(|time| time + EPOCH_2000_US),
            PIPELINE_ID,
            writer,
            attempt,
        ],
    )?;

    Ok(())
}

/// Returns whether the target has a table of this name.
pub(super) fn table_exists(
    connection: &TargetConnection,
    name: &QualifiedName,
) -> Result<bool, TargetError> {
    Ok(connection.query_row(
        "SELECT count(*) > 0 FROM duckdb_tables() WHERE database_name = current_database() \
         AND lower(schema_name) = lower(?) AND lower(table_name) = lower(?)",
        params![name.schema, name.name],
        |row| row.get(0),
    )?)
}

/// Records a cycle, in a file; returns how many old cycles were pruned. What the cycles of a lake
/// did, its snapshots say.
pub(super) fn put_cycle(
    connection: &TargetConnection,
    checkpoint: &Checkpoint,
    cycle: &Cycle,
) -> Result<u64, TargetError> {
    connection.execute(
        "INSERT INTO _rhei.cycles VALUES (now(), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        params![
            checkpoint.lsn.to_string(),
            cycle.source_transactions,
            cycle.counts.inserted,
            cycle.counts.updated,
            cycle.counts.deleted,
            cycle.counts.truncates,
            cycle.deleted_rows,
            cycle.inserted_rows,
            cycle.duration_ms,
            PIPELINE_ID,
        ],
    )?;

    let kept: u64 =
        connection.query_row("SELECT count(*) FROM _rhei.cycles", [], |row| row.get(0))?;
    // Old cycles are pruned a hundred at a time, so that most cycles do not pay for pruning.
    if kept < KEPT_CYCLES + 100 {
        return Ok(0);
    }

    let pruned = connection.execute(
        "DELETE FROM _rhei.cycles WHERE finished_at < (SELECT min(finished_at) \
         FROM (SELECT finished_at FROM _rhei.cycles \
         ORDER BY finished_at DESC LIMIT ?))",
        params![KEPT_CYCLES],
    )?;

    Ok(pruned as u64)
}

pub(super) fn corrupt(reason: String) -> TargetError {
    TargetError::Corrupt { reason }
}

pub(super) fn lsn(text: &str) -> Result<Lsn, TargetError> {
    text.parse().map_err(|error: crate::lsn::ParseLsnError| corrupt(error.to_string()))
}

pub(super) fn to_json(names: &[String]) -> String {
    serde_json::Value::from(names.to_vec()).to_string()
}

pub(super) fn from_json(text: &str) -> Result<Vec<String>, TargetError> {
    serde_json::from_str(text).map_err(|error| corrupt(error.to_string()))
}
