//! `_rhei`: what the file says of itself. The only place that touches that schema.

use duckdb::{Connection, params};

use super::{Phase, Pipeline, StoredColumn, StoredState, StoredTable, TableState, TargetError, ddl, jobs, pending};
use crate::{
    Checkpoint, Lsn,
    change::{Pause, QualifiedName, Remedy, ReplicaIdentity, TableSpec},
};

/// Version of the layout of `_rhei`. A newer one is refused, since its meaning is not known here.
pub const FORMAT_VERSION: i32 = 4;
const SCHEMA: &str = include_str!("../../schemas/state.sql");
/// Cycles that are kept.
const KEPT_CYCLES: u64 = 1000;
/// Microseconds from 1970 to 2000.
const EPOCH_2000_US: i64 = 946_684_800_000_000;

/// What a cycle did, for `_rhei.cycles`.
pub(super) struct Cycle {
    pub source_transactions: u64,
    pub counts: crate::change::RowCounts,
    pub deleted_rows: u64,
    pub inserted_rows: u64,
    pub duration_ms: u64,
}

/// Makes `_rhei` where it is missing.
pub(super) fn create(connection: &Connection) -> Result<(), TargetError> {
    Ok(connection.execute_batch(SCHEMA)?)
}

/// Whether rhei has ever written to the file.
pub(super) fn exists(connection: &Connection) -> Result<bool, TargetError> {
    let query = "SELECT count(*) FROM duckdb_tables() WHERE database_name = current_database() AND schema_name = '_rhei' AND table_name = 'pipeline'";
    Ok(connection.query_row(query, [], |row| row.get::<_, i64>(0))? > 0)
}

pub(super) fn read(connection: &Connection) -> Result<Option<StoredState>, TargetError> {
    if !exists(connection)? {
        return Ok(None);
    }
    let mut statement = connection.prepare(
        "SELECT format_version, rhei_version, slot, publications, publication_fingerprint, system_id, database, database_oid, \
         timeline, phase, checkpoint_lsn, epoch_us(checkpoint_time) FROM _rhei.pipeline",
    )?;
    let mut rows = statement.query([])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let found: i32 = row.get(0)?;
    if found > FORMAT_VERSION {
        return Err(TargetError::NewerFormat { found, written_by: row.get(1)?, known: FORMAT_VERSION });
    }
    if found < FORMAT_VERSION {
        return Err(TargetError::OlderFormat { found, written_by: row.get(1)? });
    }
    let phase: String = row.get(9)?;
    let pipeline = Pipeline {
        slot: row.get(2)?,
        publications: from_json(&row.get::<_, String>(3)?)?,
        publication_fingerprint: row.get(4)?,
        system_id: row.get(5)?,
        database: row.get(6)?,
        database_oid: row.get(7)?,
        timeline: row.get(8)?,
        phase: match phase.as_str() {
            "creating" => Phase::Creating,
            "running" => Phase::Running,
            "plain_copy" => Phase::PlainCopy,
            other => return Err(corrupt(format!("phase \"{other}\" is unknown"))),
        },
        checkpoint: Checkpoint {
            lsn: lsn(&row.get::<_, String>(10)?)?,
            commit_time_us: row.get::<_, Option<i64>>(11)?.map(|time| time - EPOCH_2000_US),
        },
    };
    drop(rows);
    Ok(Some(StoredState { pipeline, tables: tables(connection)? }))
}

pub(super) fn tables(connection: &Connection) -> Result<Vec<StoredTable>, TargetError> {
    let mut statement = connection.prepare(
        "SELECT oid, source_schema, source_name, target_schema, target_name, state, error, copy_lsn, epoch, replica_identity, \
         whole_row_key, fingerprint, excluded, copied_rows, has_shadow, remedy FROM _rhei.tables ORDER BY source_schema, source_name, oid",
    )?;
    let mut rows = statement.query([])?;
    let mut tables = Vec::new();
    while let Some(row) = rows.next()? {
        let (word, error): (String, Option<String>) = (row.get(5)?, row.get(6)?);
        let identity: String = row.get(9)?;
        let identity = identity.bytes().next().and_then(ReplicaIdentity::from_code);
        tables.push(StoredTable {
            oid: row.get(0)?,
            source: QualifiedName { schema: row.get(1)?, name: row.get(2)? },
            target: QualifiedName { schema: row.get(3)?, name: row.get(4)? },
            state: match word.as_str() {
                "pending" => TableState::Pending,
                "copying" => TableState::Copying,
                "catching_up" => TableState::CatchingUp,
                "live" => TableState::Live,
                "resync" => TableState::Resync,
                "error" => {
                    let remedy = remedy_of(row.get::<_, Option<String>>(15)?.as_deref())?;
                    TableState::Error(Pause { reason: error.unwrap_or_default(), remedy })
                }
                "dropped" => TableState::Dropped,
                other => return Err(corrupt(format!("table state \"{other}\" is unknown"))),
            },
            copy_lsn: lsn(&row.get::<_, String>(7)?)?,
            epoch: row.get(8)?,
            replica_identity: identity.ok_or_else(|| corrupt("a replica identity is unknown".to_owned()))?,
            whole_row_key: row.get(10)?,
            fingerprint: row.get(11)?,
            columns: Vec::new(),
            excluded: from_json(&row.get::<_, String>(12)?)?,
            copied_rows: row.get(13)?,
            has_shadow: row.get(14)?,
        });
    }
    drop(rows);
    let mut statement = connection.prepare(
        "SELECT table_oid, attnum, name, type_oid, typmod, not_null, key_position, target_name, mapping \
         FROM _rhei.columns ORDER BY table_oid, attnum",
    )?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let oid: u32 = row.get(0)?;
        let column = StoredColumn {
            attnum: row.get(1)?,
            name: row.get(2)?,
            type_oid: row.get(3)?,
            typmod: row.get(4)?,
            not_null: row.get(5)?,
            key_position: row.get(6)?,
            target_name: row.get(7)?,
            mapping: serde_json::from_str(&row.get::<_, String>(8)?).map_err(|error| corrupt(error.to_string()))?,
        };
        if let Some(table) = tables.iter_mut().find(|table| table.oid == oid) {
            table.columns.push(column);
        }
    }
    Ok(tables)
}

pub(super) fn put_pipeline(connection: &Connection, pipeline: &Pipeline) -> Result<(), TargetError> {
    let phase = match pipeline.phase {
        Phase::Creating => "creating",
        Phase::Running => "running",
        Phase::PlainCopy => "plain_copy",
    };
    connection.execute("DELETE FROM _rhei.pipeline", [])?;
    connection.execute(
        "INSERT INTO _rhei.pipeline VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, make_timestamptz(?), now())",
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
        ],
    )?;
    Ok(())
}

/// Replaces the row by itself with another checkpoint. One statement to read, two to write; never UPDATE.
pub(super) fn put_checkpoint(
    connection: &Connection,
    pipeline: &mut Pipeline,
    checkpoint: &Checkpoint,
) -> Result<(), TargetError> {
    pipeline.checkpoint = *checkpoint;
    put_pipeline(connection, pipeline)
}

pub(super) fn put_table(connection: &Connection, table: &StoredTable) -> Result<(), TargetError> {
    let is_ours = is_ours(connection, &table.target)?;
    connection.execute("DELETE FROM _rhei.tables WHERE oid = ?", params![table.oid])?;
    connection.execute("DELETE FROM _rhei.columns WHERE table_oid = ?", params![table.oid])?;
    let (error, remedy) = stored_pause(&table.state);
    connection.execute(
        "INSERT INTO _rhei.tables VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        params![
            table.oid,
            table.source.schema,
            table.source.name,
            table.target.schema,
            table.target.name,
            table.state.word(),
            error,
            table.copy_lsn.to_string(),
            table.epoch,
            char::from(table.replica_identity.code()).to_string(),
            table.whole_row_key,
            table.fingerprint,
            to_json(&table.excluded),
            table.copied_rows,
            is_ours,
            table.has_shadow,
            remedy,
        ],
    )?;
    for column in &table.columns {
        connection.execute(
            "INSERT INTO _rhei.columns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                table.oid,
                column.attnum,
                column.name,
                column.type_oid,
                column.typmod,
                column.not_null,
                column.key_position,
                column.target_name,
                column.mapping.target_type,
                serde_json::to_string(&column.mapping).map_err(|error| corrupt(error.to_string()))?,
            ],
        )?;
    }
    Ok(())
}

/// Whether the table of this name was put there by rhei.
pub(super) fn is_ours(connection: &Connection, target: &QualifiedName) -> Result<bool, TargetError> {
    Ok(connection.query_row(
        "SELECT coalesce(bool_or(is_ours), false) FROM _rhei.tables \
         WHERE lower(target_schema) = lower(?) AND lower(target_name) = lower(?)",
        params![target.schema, target.name],
        |row| row.get(0),
    )?)
}

/// A table that takes another shape: its row and columns anew, in the state that it is in.
pub(super) fn put_shape(connection: &Connection, spec: &TableSpec) -> Result<(), TargetError> {
    let Some(stored) = tables(connection)?.into_iter().find(|table| table.oid == spec.oid) else { return Ok(()) };
    let (state, copied_rows, has_shadow) = (stored.state, stored.copied_rows, stored.has_shadow);
    put_table(connection, &StoredTable { copied_rows, has_shadow, ..StoredTable::of(spec, state) })
}

/// Forgets other tables of this name, which are only kept: their copy is replaced or dropped. Returns whether there were
/// any.
pub(super) fn give_way(connection: &Connection, target: &QualifiedName, oid: u32) -> Result<bool, TargetError> {
    let others = "SELECT oid FROM _rhei.tables WHERE state = 'dropped' AND oid <> ? \
                  AND lower(target_schema) = lower(?) AND lower(target_name) = lower(?)";
    let given = params![oid, target.schema, target.name];
    connection.execute(&format!("DELETE FROM _rhei.columns WHERE table_oid IN ({others})"), given)?;
    Ok(connection.execute(&format!("DELETE FROM _rhei.tables WHERE oid IN ({others})"), given)? > 0)
}

/// Drops what a copy on its way has gathered.
pub(super) fn drop_shadow(connection: &Connection, oid: u32) -> Result<(), TargetError> {
    let Some(stored) = tables(connection)?.into_iter().find(|table| table.oid == oid) else { return Ok(()) };
    connection.execute_batch(&ddl::drop_table(&ddl::shadow_of(&stored.target)))?;
    connection.execute_batch(&pending::drop_statement(oid))?;
    jobs::cancel(connection, oid, "its copy was given up")?;
    change_table(connection, oid, "false AS has_shadow", &[])
}

/// Whether the target has a table of this name.
pub(super) fn table_exists(connection: &Connection, name: &QualifiedName) -> Result<bool, TargetError> {
    Ok(connection.query_row(
        "SELECT count(*) > 0 FROM duckdb_tables() WHERE database_name = current_database() \
         AND lower(schema_name) = lower(?) AND lower(table_name) = lower(?)",
        params![name.schema, name.name],
        |row| row.get(0),
    )?)
}

/// Remembers that the table in the target was put there by rhei.
pub(super) fn set_ours(connection: &Connection, oid: u32) -> Result<(), TargetError> {
    change_table(connection, oid, "true AS is_ours", &[])
}

/// Reason and remedy of a paused table, as they are stored.
fn stored_pause(state: &TableState) -> (Option<&str>, Option<&'static str>) {
    let TableState::Error(pause) = state else { return (None, None) };
    let remedy = if pause.remedy == Remedy::AllowNulls { "allow_nulls" } else { "operator" };
    (Some(&pause.reason), Some(remedy))
}

fn remedy_of(stored: Option<&str>) -> Result<Remedy, TargetError> {
    match stored {
        Some("allow_nulls") => Ok(Remedy::AllowNulls),
        Some("operator") => Ok(Remedy::Operator),
        other => Err(corrupt(format!("the remedy of a paused table is unknown ({})", other.unwrap_or("none")))),
    }
}

/// Moves a table to another state.
pub(super) fn set_state(
    connection: &Connection,
    oid: u32,
    state: &TableState,
    copied: Option<u64>,
) -> Result<(), TargetError> {
    let (error, remedy) = stored_pause(state);
    let set = "?::VARCHAR AS state, ?::VARCHAR AS error, coalesce(?::UBIGINT, copied_rows) AS copied_rows, \
               ?::VARCHAR AS remedy";
    change_table(connection, oid, set, &[&state.word(), &error, &copied, &remedy])
}

/// The shadow has become the table.
pub(super) fn set_live(connection: &Connection, oid: u32) -> Result<(), TargetError> {
    change_table(
        connection,
        oid,
        "'live' AS state, NULL AS error, true AS is_ours, false AS has_shadow, NULL AS remedy",
        &[],
    )
}

/// Replaces the row of a table; `set` is a REPLACE list. Rows are few and rarely change, so DELETE and INSERT it is here
/// too: an UPDATE would block CHECKPOINT under an open reader.
fn change_table(connection: &Connection, oid: u32, set: &str, given: &[&dyn duckdb::ToSql]) -> Result<(), TargetError> {
    connection.execute_batch("CREATE OR REPLACE TEMP TABLE _rhei_moved AS SELECT * FROM _rhei.tables LIMIT 0")?;
    connection.execute("INSERT INTO _rhei_moved SELECT * FROM _rhei.tables WHERE oid = ?", params![oid])?;
    connection.execute("DELETE FROM _rhei.tables WHERE oid = ?", params![oid])?;
    connection.execute(&format!("INSERT INTO _rhei.tables SELECT * REPLACE ({set}) FROM _rhei_moved"), given)?;
    Ok(connection.execute_batch("DROP TABLE _rhei_moved")?)
}

/// Records a cycle; returns how many old ones were pruned.
pub(super) fn put_cycle(connection: &Connection, checkpoint: &Checkpoint, cycle: &Cycle) -> Result<u64, TargetError> {
    connection.execute(
        "INSERT INTO _rhei.cycles VALUES (now(), ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        ],
    )?;
    let kept: u64 = connection.query_row("SELECT count(*) FROM _rhei.cycles", [], |row| row.get(0))?;
    // Pruned by the hundred, so that most cycles do not pay for it.
    if kept < KEPT_CYCLES + 100 {
        return Ok(0);
    }
    let pruned = connection.execute(
        "DELETE FROM _rhei.cycles WHERE finished_at < (SELECT min(finished_at) FROM (SELECT finished_at FROM _rhei.cycles \
         ORDER BY finished_at DESC LIMIT ?))",
        params![KEPT_CYCLES],
    )?;
    Ok(pruned as u64)
}

fn corrupt(reason: String) -> TargetError {
    TargetError::Corrupt { reason }
}

fn lsn(text: &str) -> Result<Lsn, TargetError> {
    text.parse().map_err(|error: crate::lsn::ParseLsnError| corrupt(error.to_string()))
}

fn to_json(names: &[String]) -> String {
    serde_json::Value::from(names.to_vec()).to_string()
}

fn from_json(text: &str) -> Result<Vec<String>, TargetError> {
    serde_json::from_str(text).map_err(|error| corrupt(error.to_string()))
}
