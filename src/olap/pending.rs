//! `_rhei.pending_<oid>`: the changes of the rows of a table while the table was being copied.
//!
//! The stream never waits for a copy. This table keeps the changes of a source table whose shadow
//! is still being loaded. The transaction of the checkpoint writes them, and a merge moves them
//! into the shadow when the last chunk is in it. The first change makes this table: most source
//! tables do not change while they are copied.
//!
//! **Keyed tables.** The table has one row per key that changed since the snapshot: the present
//! values of the row, or a mark that the row is gone. Merging is then delete by key and insert, in
//! any order and in steps of any size. It does not matter whether the shadow holds a row as it was
//! before a change, after the change, twice or not at all: for that reason chunks of two snapshots
//! fit together. A value that the wire left out (unchanged TOAST, trap 51) is taken from this table
//! if the row is already here; otherwise the value stays open, and the row names the key (origin)
//! under which the snapshot of the shadow has the value.
//!
//! **Tables without a key** are multisets: this table has the inserted rows (`n` = 1) and the
//! deleted rows (`n` < 0), in any order.
//!
//! Columns are named by position, so that no column name of the source can collide.

use std::collections::BTreeSet;

use arrow::record_batch::RecordBatch;

use super::{
    TargetError, apply,
    connection::TargetConnection,
    names,
    stage::{self, STAGE},
};
use crate::change::{
    COUNT_COLUMN, ColumnSpec, Deletes, Key, ORIGIN_PREFIX, PATTERN_COLUMN, Patch, TableChanges,
    TableSpec,
};

const PATCHED: &str = "_rhei_pending_patched";
const STEP: &str = "_rhei_pending_step";

/// Returns the full name of the table of pending changes.
fn name(connection: &TargetConnection, oid: u32) -> String {
    let state = names::quoted(connection.state_schema());
    format!("{}.{state}.pending_{oid}", names::CATALOG)
}

/// Drops the table of pending changes.
pub(super) fn drop_table(connection: &TargetConnection, oid: u32) -> Result<(), TargetError> {
    Ok(connection.execute_batch(&format!("DROP TABLE IF EXISTS {}", name(connection, oid)))?)
}

/// Returns the oids of the tables that have a table of pending changes.
pub(super) fn kept_tables(connection: &TargetConnection) -> Result<BTreeSet<u32>, TargetError> {
    let mut statement = connection.prepare(
        "SELECT substr(table_name, 9)::UINTEGER FROM duckdb_tables() \
         WHERE database_name = current_database() \
         AND schema_name = ? AND regexp_full_match(table_name, 'pending_[0-9]+')",
    )?;
    let oids = statement.query_map([connection.state_schema()], |row| row.get(0))?;
    Ok(oids.collect::<Result<_, _>>()?)
}

/// Makes an empty table of pending changes; no such table exists yet.
pub(super) fn create_table(
    connection: &TargetConnection,
    spec: &TableSpec,
) -> Result<(), TargetError> {
    let mut columns: Vec<String> = spec
        .columns
        .iter()
        .enumerate()
        .map(|(at, column)| format!("c{at} {}", column.mapping.target_type))
        .collect();

    if is_keyed(spec) {
        columns.push("gone BOOLEAN".to_owned());
        // The indexes of the columns whose values the shadow has to supply.
        columns.push("open UINTEGER[]".to_owned());
        for (at, column) in key(spec) {
            columns.push(format!("o{at} {}", column.mapping.target_type));
        }
    } else {
        columns.push("n BIGINT".to_owned());
    }

    let name = name(connection, spec.oid);
    Ok(connection.execute_batch(&format!("CREATE TABLE {name} ({})", columns.join(", ")))?)
}

/// Returns the number of pending changes of each of these tables, which all have such a table.
pub(super) fn pending_rows(
    connection: &TargetConnection,
    tables: impl Iterator<Item = u32>,
) -> Result<Vec<u64>, TargetError> {
    apply::counts(connection, tables.map(|oid| name(connection, oid)))
}

fn is_keyed(spec: &TableSpec) -> bool {
    matches!(spec.key, Key::Columns(_))
}

fn key(spec: &TableSpec) -> impl Iterator<Item = (usize, &ColumnSpec)> {
    spec.key_columns().iter().filter_map(|&at| Some((at, spec.columns.get(at)?)))
}

fn all(spec: &TableSpec) -> Vec<usize> {
    (0..spec.columns.len()).collect()
}

/// Returns `a.<prefix>0 = b.<prefix>0 AND ..`, over the key columns.
fn on(spec: &TableSpec, left: impl Fn(usize) -> String, right: impl Fn(usize) -> String) -> String {
    key(spec)
        .map(|(at, _)| format!("{} = {}", left(at), right(at)))
        .collect::<Vec<_>>()
        .join(" AND ")
}

/// Returns the expression of a staged value of the column, as the column stores it.
fn staged(spec: &TableSpec, at: usize, prefix: &str) -> String {
    spec.columns.get(at).map_or_else(String::new, |column| {
        column
            .mapping
            .stage_expr(&format!("s.{}", names::quoted(&format!("{prefix}{}", column.target_name))))
    })
}

fn target_column(spec: &TableSpec, at: usize) -> String {
    spec.columns.get(at).map_or_else(String::new, |column| names::quoted(&column.target_name))
}

fn listed(open: &[usize]) -> String {
    let open: Vec<String> = open.iter().map(ToString::to_string).collect();
    format!("[{}]::UINTEGER[]", open.join(", "))
}

/// Keeps the changes of one batch. `is_loaded`: the shadow has every chunk, so no value has to stay
/// open.
pub(super) fn capture(
    connection: &TargetConnection,
    changes: &TableChanges,
    is_loaded: bool,
) -> Result<(), TargetError> {
    let spec = changes.table.as_ref();
    if is_keyed(spec) {
        capture_keyed(connection, spec, changes, is_loaded)
    } else {
        capture_rows(connection, spec, changes)
    }
}

fn capture_rows(
    connection: &TargetConnection,
    spec: &TableSpec,
    changes: &TableChanges,
) -> Result<(), TargetError> {
    let values: Vec<String> = all(spec).into_iter().map(|at| staged(spec, at, "")).collect();
    let values = values.join(", ");

    if let Deletes::Rows(batches) = &changes.deletes
        && stage::total(batches) > 0
    {
        let mut columns = stage::stage_columns(spec, &all(spec), "");
        columns.push((names::quoted(COUNT_COLUMN), "BIGINT".to_owned()));
        stage::stage(connection, &columns, batches)?;
        connection.execute_batch(&format!(
            "INSERT INTO {} SELECT {values}, -s.{} FROM {STAGE} s; DROP TABLE {STAGE};",
            name(connection, spec.oid),
            names::quoted(COUNT_COLUMN)
        ))?;
    }

    if stage::total(&changes.inserts) > 0 {
        stage::stage(connection, &stage::stage_columns(spec, &all(spec), ""), &changes.inserts)?;
        connection.execute_batch(&format!(
            "INSERT INTO {} SELECT {values}, 1 FROM {STAGE} s; DROP TABLE {STAGE};",
            name(connection, spec.oid)
        ))?;
    }

    Ok(())
}

fn capture_keyed(
    connection: &TargetConnection,
    spec: &TableSpec,
    changes: &TableChanges,
    is_loaded: bool,
) -> Result<(), TargetError> {
    // The unchanged values are read before any row is deleted, under the keys that the rows had
    // before the batch.
    if let Some(patch) = &changes.patch {
        read_patched(&PatchedRows { connection, spec, patch, is_loaded })?;
    }

    if let Deletes::ByKey(batches) = &changes.deletes
        && stage::total(batches) > 0
    {
        capture_deletes(connection, spec, batches)?;
    }

    if stage::total(&changes.inserts) > 0 {
        capture_inserts(connection, spec, &changes.inserts)?;
    }

    if changes.patch.is_some() {
        capture_patched(connection, spec)?;
    }

    Ok(())
}

/// Makes the temporary table of the patched rows.
fn read_patched(rows: &PatchedRows<'_>) -> Result<(), TargetError> {
    let connection = rows.connection;
    stage::stage_patch(connection, rows.spec, rows.patch)?;
    connection.execute_batch(&format!(
        "CREATE TEMP TABLE {PATCHED} AS {}; DROP TABLE {STAGE};",
        rows.select()
    ))?;

    let found: u64 = connection.query_row(
        &format!("SELECT count(*) FILTER (NOT lost) FROM {PATCHED}"),
        [],
        |row| row.get(0),
    )?;

    let expected = rows.patch.rows.num_rows() as u64;
    if found != expected {
        return Err(TargetError::Diverged { what: "rows with unchanged values", expected, found });
    }
    Ok(())
}

/// The staged rows of a patch (`s`), with their unchanged values. These come from the pending
/// changes (`p`); or else from the shadow (`t`) if it is loaded, and stay open if it is not.
struct PatchedRows<'a> {
    connection: &'a TargetConnection,
    spec: &'a TableSpec,
    patch: &'a Patch,
    /// The shadow has every chunk.
    is_loaded: bool,
}

impl PatchedRows<'_> {
    /// Returns the query for the rows, in the columns of the table of pending changes. The column
    /// `lost` marks the rows whose unchanged values are neither in the shadow nor among the kept
    /// changes.
    fn select(&self) -> String {
        let spec = self.spec;
        let columns = spec.columns.iter().enumerate();

        let mut values: Vec<String> =
            columns.map(|(at, column)| format!("{} AS c{at}", self.value(at, column))).collect();
        values.push("false AS gone".to_owned());
        values.push(format!("{} AS open", self.open()));
        values.extend(key(spec).map(|(at, _)| {
            let origin = staged(spec, at, ORIGIN_PREFIX);
            format!("CASE WHEN p.gone IS NULL THEN {origin} ELSE p.o{at} END AS o{at}")
        }));

        let pending = name(self.connection, spec.oid);
        let from_pending = on(spec, |at| format!("p.c{at}"), |at| staged(spec, at, ORIGIN_PREFIX));
        format!(
            "SELECT {}, {} AS lost FROM {STAGE} s \
             LEFT JOIN {pending} p ON NOT p.gone AND {from_pending} {}",
            values.join(", "),
            self.lost(),
            self.join_shadow()
        )
    }

    /// Returns the value of a column.
    fn value(&self, at: usize, column: &ColumnSpec) -> String {
        let unchanged = if self.is_loaded {
            let stored = target_column(self.spec, at);
            format!("CASE WHEN p.gone IS NULL THEN t.{stored} ELSE p.c{at} END")
        } else {
            format!("p.c{at}")
        };

        stage::patched_value(self.patch, column, at, &unchanged)
    }

    /// Returns the indexes of the columns that stay open. A value that the wire left out is open
    /// unless the pending row has it.
    fn open(&self) -> String {
        if self.is_loaded {
            return listed(&[]);
        }

        let patterns: String = self
            .patch
            .patterns
            .iter()
            .enumerate()
            .map(|(pattern, lacks)| format!(" WHEN {pattern} THEN {}", listed(lacks)))
            .collect();
        let lacks = format!("CASE s.{}{patterns} END", names::quoted(PATTERN_COLUMN));

        format!("CASE WHEN p.gone IS NULL THEN {lacks} ELSE list_intersect(p.open, {lacks}) END")
    }

    /// Returns the join with the rows of a loaded shadow that are not pending.
    fn join_shadow(&self) -> String {
        if !self.is_loaded {
            return String::new();
        }

        let spec = self.spec;
        let shadow = names::table(&names::shadow_of(&spec.target));
        let matched = on(
            spec,
            |at| format!("t.{}", target_column(spec, at)),
            |at| staged(spec, at, ORIGIN_PREFIX),
        );
        format!("LEFT JOIN {shadow} t ON p.gone IS NULL AND {matched}")
    }

    /// Returns the condition that a row is neither pending nor in the shadow. While the shadow is
    /// not loaded, no row is lost: its values stay open.
    fn lost(&self) -> String {
        match (self.is_loaded, self.spec.key_columns().first()) {
            (true, Some(&first)) => {
                format!("p.gone IS NULL AND t.{} IS NULL", target_column(self.spec, first))
            }
            _ => "false".to_owned(),
        }
    }
}

/// Marks the rows under these keys as gone.
fn capture_deletes(
    connection: &TargetConnection,
    spec: &TableSpec,
    batches: &[RecordBatch],
) -> Result<(), TargetError> {
    stage::stage(connection, &stage::stage_columns(spec, spec.key_columns(), ""), batches)?;
    delete_staged_keys(connection, spec)?;

    let keys: Vec<String> =
        key(spec).map(|(at, _)| format!("{} AS c{at}", staged(spec, at, ""))).collect();

    connection.execute_batch(&format!(
        "INSERT INTO {} BY NAME SELECT {}, true AS gone, {} AS open FROM {STAGE} s; DROP TABLE \
         {STAGE};",
        name(connection, spec.oid),
        keys.join(", "),
        listed(&[]),
    ))?;
    Ok(())
}

/// Keeps the present values of these rows.
fn capture_inserts(
    connection: &TargetConnection,
    spec: &TableSpec,
    batches: &[RecordBatch],
) -> Result<(), TargetError> {
    stage::stage(connection, &stage::stage_columns(spec, &all(spec), ""), batches)?;
    delete_staged_keys(connection, spec)?;

    let values: Vec<String> =
        all(spec).into_iter().map(|at| format!("{} AS c{at}", staged(spec, at, ""))).collect();

    connection.execute_batch(&format!(
        "INSERT INTO {} BY NAME SELECT {}, false AS gone, {} AS open FROM {STAGE} s; DROP TABLE \
         {STAGE};",
        name(connection, spec.oid),
        values.join(", "),
        listed(&[]),
    ))?;
    Ok(())
}

/// Moves the patched rows from the temporary table to the pending changes.
fn capture_patched(connection: &TargetConnection, spec: &TableSpec) -> Result<(), TargetError> {
    let pending = name(connection, spec.oid);
    let matched = on(spec, |at| format!("p.c{at}"), |at| format!("s.c{at}"));

    connection.execute_batch(&format!(
        "DELETE FROM {pending} p USING {PATCHED} s WHERE {matched};
         INSERT INTO {pending} BY NAME SELECT * EXCLUDE (lost) FROM {PATCHED}; DROP TABLE \
         {PATCHED};"
    ))?;
    Ok(())
}

/// Removes the pending changes of the keys that are staged.
fn delete_staged_keys(connection: &TargetConnection, spec: &TableSpec) -> Result<(), TargetError> {
    let matched = on(spec, |at| format!("p.c{at}"), |at| staged(spec, at, ""));
    connection.execute_batch(&format!(
        "DELETE FROM {} p USING {STAGE} s WHERE {matched}",
        name(connection, spec.oid)
    ))?;
    Ok(())
}

/// Replaces open values with the values of the shadow, which has every chunk.
///
/// # Errors
/// A row that should have these values is missing from the shadow, or is there twice: the copy
/// cannot be finished.
pub(super) fn resolve_from_shadow(
    connection: &TargetConnection,
    spec: &TableSpec,
) -> Result<(), TargetError> {
    if !is_keyed(spec) {
        return Ok(());
    }

    let pending = name(connection, spec.oid);
    let expected = open_rows(connection, spec)?;
    if expected == 0 {
        return Ok(());
    }

    let values: Vec<String> = (0..spec.columns.len())
        .map(|at| {
            format!(
                "CASE WHEN list_contains(p.open, {at}) THEN t.{} ELSE p.c{at} END AS c{at}",
                target_column(spec, at)
            )
        })
        .collect();

    let matched = on(spec, |at| format!("t.{}", target_column(spec, at)), |at| format!("p.o{at}"));
    connection.execute_batch(&format!(
        "CREATE TEMP TABLE {STEP} AS SELECT {}, false AS gone, {} AS open FROM {pending} p \
         JOIN {} t ON {matched} \
         WHERE len(p.open) > 0;",
        values.join(", "),
        listed(&[]),
        names::table(&names::shadow_of(&spec.target)),
    ))?;

    let found: u64 =
        connection.query_row(&format!("SELECT count(*) FROM {STEP}"), [], |row| row.get(0))?;
    if found != expected {
        return Err(TargetError::Diverged { what: "rows with unchanged values", expected, found });
    }

    connection.execute_batch(&format!(
        "DELETE FROM {pending} WHERE len(open) > 0; INSERT INTO {pending} BY NAME SELECT * FROM \
         {STEP}; DROP TABLE {STEP};"
    ))?;
    Ok(())
}

/// Returns the number of rows that have open values.
pub(super) fn open_rows(
    connection: &TargetConnection,
    spec: &TableSpec,
) -> Result<u64, TargetError> {
    if !is_keyed(spec) {
        return Ok(0);
    }
    let sql = format!("SELECT count(*) FROM {} WHERE len(open) > 0", name(connection, spec.oid));
    Ok(connection.query_row(&sql, [], |row| row.get(0))?)
}

/// Returns the keys of rows that have open values, as text that PostgreSQL reads, in the order of
/// the key columns.
pub(super) fn keys_with_unchanged_toast(
    connection: &TargetConnection,
    spec: &TableSpec,
    most: usize,
) -> Result<Vec<Vec<String>>, TargetError> {
    let keys: Vec<String> = key(spec).map(|(at, _)| format!("c{at}::VARCHAR")).collect();
    let width = keys.len();

    let mut statement = connection.prepare(&format!(
        "SELECT {} FROM {} WHERE len(open) > 0 LIMIT {most}",
        keys.join(", "),
        name(connection, spec.oid)
    ))?;

    let mut rows = statement.query([])?;
    let mut all = Vec::new();
    while let Some(row) = rows.next()? {
        all.push((0..width).map(|at| row.get(at)).collect::<Result<Vec<String>, _>>()?);
    }
    Ok(all)
}

/// Replaces rows with open values by the rows that the source has under their keys, at the moment
/// that the changes here have reached. `batches`, whose columns are those of the table, hold one
/// row for each of the `asked` rows with open values.
///
/// # Errors
/// A row is missing from `batches`.
pub(super) fn fill(
    connection: &TargetConnection,
    spec: &TableSpec,
    batches: &[RecordBatch],
    asked: u64,
) -> Result<(), TargetError> {
    let pending = name(connection, spec.oid);
    stage::stage(connection, &stage::stage_columns(spec, &all(spec), ""), batches)?;

    let matched = on(spec, |at| format!("p.c{at}"), |at| staged(spec, at, ""));
    let found: u64 = connection.query_row(
        &format!(
            "SELECT count(*) FROM {pending} p JOIN {STAGE} s ON {matched} WHERE len(p.open) > 0"
        ),
        [],
        |row| row.get(0),
    )?;

    if found != asked {
        return Err(TargetError::Diverged { what: "rows to fetch again", expected: asked, found });
    }

    let values: Vec<String> =
        all(spec).into_iter().map(|at| format!("{} AS c{at}", staged(spec, at, ""))).collect();

    connection.execute_batch(&format!(
        "DELETE FROM {pending} p USING {STAGE} s WHERE len(p.open) > 0 AND {matched};
         INSERT INTO {pending} BY NAME SELECT {}, false AS gone, {} AS open FROM {STAGE} s; DROP \
         TABLE {STAGE};",
        values.join(", "),
        listed(&[]),
    ))?;
    Ok(())
}

/// Merges at most `most` rows into the shadow; the deleted rows of a multiset go all at once, at
/// the end. Returns whether no pending change is left.
pub(super) fn merge(
    connection: &TargetConnection,
    spec: &TableSpec,
    most: u64,
) -> Result<bool, TargetError> {
    let (pending, shadow) =
        (name(connection, spec.oid), names::table(&names::shadow_of(&spec.target)));

    let names: Vec<String> = all(spec).into_iter().map(|at| target_column(spec, at)).collect();
    let values: Vec<String> = all(spec).into_iter().map(|at| format!("s.c{at}")).collect();
    let (names, values) = (names.join(", "), values.join(", "));

    let count = |what: &str| -> Result<u64, TargetError> {
        Ok(connection
            .query_row(&format!("SELECT count(*) FROM {pending} {what}"), [], |row| row.get(0))?)
    };

    if is_keyed(spec) {
        let is_last = count("")? <= most;
        let from_shadow =
            on(spec, |at| format!("t.{}", target_column(spec, at)), |at| format!("s.c{at}"));
        let from_pending = on(spec, |at| format!("p.c{at}"), |at| format!("s.c{at}"));

        connection.execute_batch(&format!(
            "CREATE TEMP TABLE {STEP} AS SELECT * FROM {pending} LIMIT {most};
             DELETE FROM {shadow} t USING {STEP} s WHERE {from_shadow};
             INSERT INTO {shadow} ({names}) SELECT {values} FROM {STEP} s WHERE NOT s.gone;
             DELETE FROM {pending} p USING {STEP} s WHERE {from_pending}; DROP TABLE {STEP};"
        ))?;

        return Ok(is_last);
    }

    let is_last = count("WHERE n > 0")? <= most;
    connection.execute_batch(&format!(
        "CREATE TEMP TABLE {STEP} AS SELECT rowid AS number, * FROM {pending} WHERE n > 0 LIMIT \
         {most};
         INSERT INTO {shadow} ({names}) SELECT {values} FROM {STEP} s;
         DELETE FROM {pending} WHERE rowid IN (SELECT number FROM {STEP}); DROP TABLE {STEP};"
    ))?;

    if is_last && count("")? > 0 {
        connection.execute_batch(&format!(
            "CREATE TEMP TABLE {STEP} AS SELECT * REPLACE (-n AS n) FROM {pending}"
        ))?;

        let expected: u64 =
            connection
                .query_row(&format!("SELECT sum(n)::UBIGINT FROM {STEP}"), [], |row| row.get(0))?;
        let found =
            apply::delete_counted(connection, spec, &shadow, STEP, "n", |at| format!("s.c{at}"))?;

        if found != expected {
            return Err(TargetError::Diverged { what: "rows to delete", expected, found });
        }
        connection.execute_batch(&format!("DROP TABLE {STEP}; DELETE FROM {pending};"))?;
    }

    Ok(is_last)
}
