//! A change batch becomes statements: stage, read unchanged TOAST, DELETE USING, INSERT. All tables
//! in one transaction.
//!
//! Staged keys are unique and each must hit exactly one row. DuckDB would let any other number pass
//! in silence, so the counts are compared; a difference means that the copy has diverged, and
//! nothing of the batch is kept.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use arrow::{
    array::UInt64Array,
    compute::take_record_batch,
    datatypes::{DataType, Schema},
    record_batch::RecordBatch,
};
use duckdb::Connection;

use super::{
    Applied, DuckDb, RowStream, TableState, TargetError,
    arrow_scan::{BatchView, Database},
    ddl, jobs, pending,
    state::{self, Cycle},
};
use crate::{
    Checkpoint,
    change::{
        COUNT_COLUMN, ChangeBatch, ColumnOrigin, ColumnSpec, Deletes, ORIGIN_PREFIX,
        PATTERN_COLUMN, Patch, Pause, Remedy, Reshape, RowCounts, TableChanges, TableSpec,
    },
    checkpoint::DurableLsn,
    failpoint::reached,
    types::ColumnBuilder,
};

/// Name of the staging table; made and dropped inside the transaction, so that an error leaves none
/// behind.
pub(super) const STAGE: &str = "_rhei_stage";
const PATCHED: &str = "_rhei_patched";

/// Views by which DuckDB reads batches where they lie, by table. They are made before a transaction
/// begins, since it sees what the in-memory database held when it first looked there; and kept,
/// since making one takes as long as applying a few rows.
#[derive(Default)]
pub(super) struct Views(BTreeMap<(u32, Rows), BatchView>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rows {
    Inserts,
    Keys,
}

impl Views {
    /// Views are small, but tables that come and go would leave many behind.
    const MOST: usize = 4096;

    /// Makes those that a batch uses.
    pub(super) fn prepare<'a>(
        &mut self,
        database: &Arc<Database>,
        changes: impl Iterator<Item = &'a TableChanges>,
    ) -> Result<(), TargetError> {
        let changes: Vec<&TableChanges> = changes.collect();
        let is_new =
            |changes: &&&TableChanges| !self.0.contains_key(&(changes.table.oid, Rows::Inserts));
        // With more tables than that, rows are staged; views that are there are used.
        let mut room = Self::MOST.saturating_sub(self.0.len());
        if changes.iter().filter(is_new).count() > room && changes.len() <= Self::MOST / 2 {
            self.0.clear();
            room = Self::MOST;
        }
        for changes in changes {
            let keys = match &changes.deletes {
                Deletes::ByKey(keys) => keys.as_slice(),
                Deletes::Rows(_) => &[],
            };
            for (rows, batches) in [(Rows::Inserts, changes.inserts.as_slice()), (Rows::Keys, keys)]
            {
                if let Some(first) = batches.first()
                    && self.get(&changes.table, rows, first).is_none()
                    && room > 0
                {
                    room -= 1;
                    self.0.insert(
                        (changes.table.oid, rows),
                        BatchView::new(database, first.schema())?,
                    );
                }
            }
        }
        Ok(())
    }

    fn get(&self, spec: &TableSpec, rows: Rows, batch: &RecordBatch) -> Option<&BatchView> {
        self.0.get(&(spec.oid, rows)).filter(|view| view.schema() == batch.schema_ref())
    }

    /// Has `run` read the rows under the name that it gets. A table that comes up in a later part
    /// of a transaction has no view, and its rows are staged.
    fn read<R>(
        &self,
        connection: &Connection,
        (spec, rows): (&TableSpec, Rows),
        batches: &[RecordBatch],
        run: impl FnOnce(&str) -> Result<R, TargetError>,
    ) -> Result<R, TargetError> {
        if let Some(view) = batches.first().and_then(|first| self.get(spec, rows, first)) {
            view.put(batches.iter().cloned());
            return run(&view.name());
        }
        let all: Vec<usize> = (0..spec.columns.len()).collect();
        let columns = match rows {
            Rows::Inserts => all.as_slice(),
            Rows::Keys => spec.key_columns(),
        };
        stage(connection, &stage_columns(spec, columns, ""), batches)?;
        let done = run(STAGE)?;
        connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
        Ok(done)
    }
}

/// What a transaction has done so far: one batch, or several parts of a source transaction.
#[derive(Debug)]
pub(super) struct Progress {
    started: Instant,
    counts: RowCounts,
    pub(super) deleted_rows: u64,
    pub(super) inserted_rows: u64,
    /// A table that is being copied was truncated, or failed.
    pub(super) ends_a_copy: bool,
}

impl Default for Progress {
    fn default() -> Self {
        let (deleted_rows, inserted_rows, ends_a_copy) = (0, 0, false);
        Self {
            started: Instant::now(),
            counts: RowCounts::default(),
            deleted_rows,
            inserted_rows,
            ends_a_copy,
        }
    }
}

/// The rows of a batch; the first part of the transaction of [`super::OlapEngine::apply`].
pub(super) fn apply(
    target: &mut DuckDb,
    batch: &ChangeBatch,
    progress: &mut Progress,
) -> Result<(), TargetError> {
    // ALTER comes before any other statement on a table of this transaction (trap 69).
    for reshape in &batch.reshapes {
        bring_into_shape(&target.connection, reshape)
            .map_err(|source| source.of(&reshape.after))?;
        target.tables()?.put_shape(&reshape.after);
        reached("apply.reshaped");
    }
    for changes in &batch.tables {
        progress.counts += changes.counts;
        if let Some(xid) = changes.truncate {
            target.tables()?.set_truncated(changes.table.oid, xid);
        }
        if let Some(&is_loaded) = target.copying.get(&changes.table.oid) {
            progress.ends_a_copy |= changes.truncate.is_some();
            keep_for_later(target, changes, is_loaded)
                .map_err(|source| source.of(&changes.table))?;
            if changes.truncate.is_some() {
                target.tables()?.set_state(changes.table.oid, TableState::CatchingUp, Some(0));
            }
            continue;
        }
        let (deleted, inserted) = apply_table(&target.connection, changes, &target.views)
            .map_err(|source| source.of(&changes.table))?;
        progress.deleted_rows += deleted;
        progress.inserted_rows += inserted;
    }
    for failure in &batch.failed {
        let state = match failure.remedy {
            remedy @ (Remedy::Operator | Remedy::AllowNulls) => {
                TableState::Error(Pause { reason: failure.reason.clone(), remedy })
            }
            Remedy::CopyAgain | Remedy::CopyAltered => TableState::Resync,
        };
        if target.copying.contains_key(&failure.oid) {
            progress.ends_a_copy = true;
            target.drop_shadows(&[failure.oid])?;
        }
        target.tables()?.set_state(failure.oid, state, None);
    }
    Ok(())
}

/// The checkpoint and the record of the cycle; its second part.
pub(super) fn conclude(
    target: &mut DuckDb,
    batch: &ChangeBatch,
    checkpoint: &Checkpoint,
    progress: &Progress,
) -> Result<Applied, TargetError> {
    let Some(mut pipeline) = target.pipeline.clone() else {
        return Err(TargetError::Corrupt {
            reason: "changes came before the pipeline was set up".to_owned(),
        });
    };
    let before = pipeline.checkpoint.lsn;
    if checkpoint.lsn < before {
        return Err(TargetError::Backwards { from: before, to: checkpoint.lsn });
    }
    let Progress { started, counts, deleted_rows, inserted_rows, .. } = *progress;
    state::put_checkpoint(&target.connection, &mut pipeline, checkpoint)?;
    let mut pruned = 0;
    if !batch.is_idle() || counts != RowCounts::default() {
        let duration_ms = started.elapsed().as_millis() as u64;
        let source_transactions = batch.source_transactions;
        let cycle = Cycle { source_transactions, counts, deleted_rows, inserted_rows, duration_ms };
        pruned = state::put_cycle(&target.connection, checkpoint, &cycle)?;
    }
    target.pipeline = Some(pipeline);
    // Handed out by `OlapEngine::apply` only after COMMIT has returned.
    Ok(Applied {
        durable: DurableLsn::committed(checkpoint.lsn),
        deleted_rows,
        inserted_rows,
        pruned,
    })
}

/// Changes of a table that is still being copied. A TRUNCATE ends its copy: whatever the snapshot
/// holds is gone, and all that there is comes by the stream.
fn keep_for_later(
    target: &mut DuckDb,
    changes: &TableChanges,
    is_loaded: bool,
) -> Result<(), TargetError> {
    let spec = &changes.table;
    if changes.truncate.is_some() {
        // A chunk that is being loaded meanwhile fails at its commit, since its table is gone.
        target.connection.execute_batch(&ddl::drop_table(&ddl::shadow_of(&spec.target)))?;
        target.connection.execute_batch(&ddl::create_shadow(spec, &BTreeSet::new()))?;
        target.drop_pending(spec.oid)?;
        jobs::cancel(&target.connection, &[spec.oid], "the table was truncated")?;
    }

    // Most tables that are copied do not change meanwhile.
    if !changes.has_rows() {
        return Ok(());
    }
    if !target.tables()?.has_pending(spec.oid) {
        target.connection.execute_batch(&pending::create_statement(spec))?;
        target.tables()?.set_pending(spec.oid, true);
    }
    pending::capture(&target.connection, changes, is_loaded || changes.truncate.is_some())
}

/// Alters a table.
fn bring_into_shape(connection: &Connection, reshape: &Reshape) -> Result<(), TargetError> {
    let variable = |at: usize| format!("_rhei_missing_{at}");
    let mut filled = BTreeMap::new();
    for (at, (column, origin)) in reshape.after.columns.iter().zip(&reshape.columns).enumerate() {
        let ColumnOrigin::Added(Some(text)) = origin else { continue };
        let mut cell = ColumnBuilder::new(&column.mapping, 1);
        match cell.push_text(Some(text.as_bytes())) {
            // NULL stands in its place, as the settings allow.
            Err(error) if error.is_unrepresentable() && reshape.after.null_unrepresentable => {
                continue;
            }
            pushed => pushed.map_err(|error| TargetError::Rows { source: error.into() })?,
        }
        let schema = Arc::new(Schema::new(vec![column.mapping.field("value")]));
        let row = RecordBatch::try_new(schema, vec![cell.finish()])
            .map_err(|error| TargetError::Rows { source: error.into() })?;
        stage(connection, &[("value".to_owned(), column.mapping.stage_type())], &[row])?;
        connection.execute_batch(&format!(
            "SET VARIABLE {} = (SELECT {} FROM {STAGE} s); DROP TABLE {STAGE};",
            variable(at),
            column.mapping.stage_expr("s.value")
        ))?;
        // DuckDB's log holds the statement, not the rows: what it names must be there when it is
        // replayed after a crash, which a variable is not. So the value itself goes into it, if its
        // text is all of it.
        let (value, kind) =
            (format!("getvariable('{}')", variable(at)), &column.mapping.target_type);
        let (text, is_whole): (String, bool) = connection.query_row(
            &format!(
                "SELECT t, CAST(t AS {kind}) IS NOT DISTINCT FROM {value} FROM (SELECT \
                 CAST({value} AS VARCHAR) AS t)"
            ),
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        filled.insert(at, is_whole.then(|| format!("CAST({} AS {kind})", ddl::literal(&text))));
    }
    for statement in ddl::reshape(reshape, |at| filled.get(&at).cloned().flatten()) {
        connection.execute_batch(&statement)?;
    }
    for (at, literal) in filled {
        if let (None, Some(column)) = (literal, reshape.after.columns.get(at)) {
            let (target, name) =
                (ddl::table(&reshape.after.target), ddl::quoted(&column.target_name));
            connection.execute_batch(&format!(
                "UPDATE {target} SET {name} = getvariable('{}')",
                variable(at)
            ))?;
        }
        connection.execute_batch(&format!("RESET VARIABLE {}", variable(at)))?;
    }
    Ok(())
}

/// Returns rows deleted and inserted.
fn apply_table(
    connection: &Connection,
    changes: &TableChanges,
    views: &Views,
) -> Result<(u64, u64), TargetError> {
    let spec = &changes.table;
    let target = ddl::table(&spec.target);
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let names = column_list(spec, &all);
    let mut deleted = 0;
    if changes.truncate.is_some() {
        deleted += connection.execute(&format!("DELETE FROM {target}"), [])? as u64;
    }
    // Read before anything is deleted, under the keys that the rows had before the batch.
    let mut patched = 0;
    if let Some(patch) = &changes.patch {
        stage_patch(connection, spec, patch)?;
        let values: Vec<String> = spec
            .columns
            .iter()
            .enumerate()
            .map(|(at, column)| {
                let name = ddl::quoted(&column.target_name);
                let value = patched_value(patch, column, at, &format!("t.{name}"));
                format!("{value} AS {name}")
            })
            .collect();
        let found = connection.execute(
            &format!(
                "CREATE TEMP TABLE {PATCHED} AS SELECT {} FROM {STAGE} s JOIN {target} t ON {}",
                values.join(", "),
                key_match(spec, ORIGIN_PREFIX)
            ),
            [],
        )? as u64;
        connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
        let found: u64 = match found {
            0 => connection
                .query_row(&format!("SELECT count(*) FROM {PATCHED}"), [], |row| row.get(0))?,
            found => found,
        };
        let expected = patch.rows.num_rows() as u64;
        if found != expected {
            return Err(TargetError::Diverged {
                what: "rows with unchanged values",
                expected,
                found,
            });
        }
        patched = found;
    }
    let (staged, rows) = match &changes.deletes {
        Deletes::ByKey(batches) => {
            (total(batches), delete_by_key(connection, spec, &target, batches, views)?)
        }
        Deletes::Rows(batches) => delete_rows(connection, spec, &target, batches)?,
    };
    if staged != rows {
        return Err(TargetError::Diverged {
            what: "rows to delete",
            expected: staged,
            found: rows,
        });
    }
    deleted += rows;
    let mut inserted = 0;
    if total(&changes.inserts) > 0 {
        inserted += views.read(connection, (spec, Rows::Inserts), &changes.inserts, |rows| {
            let values = stage_values(spec, &all);
            let insert = format!("INSERT INTO {target} ({names}) SELECT {values} FROM {rows} s");
            // Planned once: with a few rows that takes longer than running it. A DELETE is planned
            // each time, since which side of its join is the smaller one may change; and staged
            // rows are in another table each time.
            let inserted = if rows == STAGE {
                connection.execute(&insert, [])?
            } else {
                connection.prepare_cached(&insert)?.execute([])?
            };
            Ok(inserted as u64)
        })?;
    }
    if changes.patch.is_some() {
        inserted += connection
            .execute(&format!("INSERT INTO {target} ({names}) SELECT {names} FROM {PATCHED}"), [])?
            as u64;
        connection.execute_batch(&format!("DROP TABLE {PATCHED}"))?;
    }
    let expected = total(&changes.inserts) + patched;
    if inserted != expected {
        return Err(TargetError::Diverged { what: "rows to insert", expected, found: inserted });
    }
    Ok((deleted, inserted))
}

pub(super) fn total(batches: &[RecordBatch]) -> u64 {
    batches.iter().map(|batch| batch.num_rows() as u64).sum()
}

pub(super) fn bytes(batches: &[RecordBatch]) -> usize {
    batches.iter().map(RecordBatch::get_array_memory_size).sum()
}

fn delete_by_key(
    connection: &Connection,
    spec: &TableSpec,
    target: &str,
    batches: &[RecordBatch],
    views: &Views,
) -> Result<u64, TargetError> {
    if total(batches) == 0 {
        return Ok(0);
    }
    views.read(connection, (spec, Rows::Keys), batches, |keys| {
        let matched = key_match(spec, "");
        Ok(connection
            .execute(&format!("DELETE FROM {target} t USING {keys} s WHERE {matched}"), [])?
            as u64)
    })
}

/// Deletes exactly so many equal rows as each staged row says (trap 54). Returns staged and
/// deleted.
fn delete_rows(
    connection: &Connection,
    spec: &TableSpec,
    target: &str,
    batches: &[RecordBatch],
) -> Result<(u64, u64), TargetError> {
    if total(batches) == 0 {
        return Ok((0, 0));
    }
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let mut columns = stage_columns(spec, &all, "");
    columns.push((ddl::quoted(COUNT_COLUMN), "BIGINT".to_owned()));
    stage(connection, &columns, batches)?;
    let count = ddl::quoted(COUNT_COLUMN);
    let staged: i64 =
        connection.query_row(&format!("SELECT sum({count})::BIGINT FROM {STAGE}"), [], |row| {
            row.get(0)
        })?;
    let staged_value = |at: usize| {
        spec.columns.get(at).map_or_else(String::new, |column| {
            column.mapping.stage_expr(&format!("s.{}", ddl::quoted(&column.target_name)))
        })
    };
    let deleted = delete_counted(connection, spec, target, STAGE, &count, staged_value)?;
    connection.execute_batch(&format!("DROP TABLE {STAGE}"))?;
    Ok((u64::try_from(staged).unwrap_or_default(), deleted))
}

/// Deletes for each row `s` of `staged` so many rows `t` that equal it; `value` gives the
/// expression of a column of `s`. Equal rows that are staged apart are numbered together.
///
/// Rows are equal that print alike, as at the source. 0 and -0 are equal to DuckDB, and two rows to
/// the source: those that are the same to the last bit go first. The others are not refused, since
/// DuckDB keeps one of the two where a stretch of a column holds nothing else.
pub(super) fn delete_counted(
    connection: &Connection,
    spec: &TableSpec,
    target: &str,
    staged: &str,
    count: &str,
    value: impl Fn(usize) -> String,
) -> Result<u64, TargetError> {
    let (mut equal, mut bits, mut staged_bits) = (Vec::new(), Vec::new(), Vec::new());
    for (at, column) in spec.columns.iter().enumerate() {
        let (stored, staged) = (format!("t.{}", ddl::quoted(&column.target_name)), value(at));
        if ["REAL", "FLOAT", "DOUBLE"]
            .iter()
            .any(|float| column.mapping.target_type.contains(float))
        {
            bits.push(format!("{stored}::VARCHAR"));
            staged_bits.push(format!("{staged}::VARCHAR"));
        }
        equal.push(format!("{stored} IS NOT DISTINCT FROM {staged}"));
        if ddl::has_coarse_equality(&column.mapping.target_type) {
            equal.push(format!("{stored}::VARCHAR IS NOT DISTINCT FROM ({staged})::VARCHAR"));
        }
    }
    let (bits, staged_bits) =
        (format!("[{}]", bits.join(", ")), format!("[{}]", staged_bits.join(", ")));
    let deleted = connection.execute(
        &format!(
            "DELETE FROM {target} WHERE rowid IN (SELECT row FROM (SELECT row, wanted, \
             row_number() OVER (PARTITION BY equals \
             ORDER BY is_other, row) AS number FROM (SELECT t.rowid AS row, sum(s.{count}) AS \
             wanted, min(s.rowid) AS equals, \
             row_number() OVER (PARTITION BY min(s.rowid), {bits} ORDER BY t.rowid) \
             > coalesce(sum(s.{count}) FILTER ({bits} = {staged_bits}), 0) AS is_other \
             FROM {target} t JOIN {staged} s ON {} GROUP BY t.rowid, {bits})) WHERE number <= \
             wanted)",
            equal.join(" AND ")
        ),
        [],
    )?;
    Ok(deleted as u64)
}

/// `t.key = s.key AND ..`. Key columns are NOT NULL (trap 55).
fn key_match(spec: &TableSpec, prefix: &str) -> String {
    let columns = spec.key_columns().iter().filter_map(|&at| spec.columns.get(at));
    let parts: Vec<String> = columns
        .map(|column| {
            let staged = format!("s.{}", ddl::quoted(&format!("{prefix}{}", column.target_name)));
            format!(
                "t.{} = {}",
                ddl::quoted(&column.target_name),
                column.mapping.stage_expr(&staged)
            )
        })
        .collect();
    parts.join(" AND ")
}

fn column_list(spec: &TableSpec, columns: &[usize]) -> String {
    let names = columns
        .iter()
        .filter_map(|&at| spec.columns.get(at))
        .map(|column| ddl::quoted(&column.target_name));
    names.collect::<Vec<_>>().join(", ")
}

fn stage_values(spec: &TableSpec, columns: &[usize]) -> String {
    let columns = columns.iter().filter_map(|&at| spec.columns.get(at));
    let values = columns.map(|column| {
        column.mapping.stage_expr(&format!("s.{}", ddl::quoted(&column.target_name)))
    });
    values.collect::<Vec<_>>().join(", ")
}

/// How many rows each of these tables has.
pub(super) fn counts(
    connection: &Connection,
    tables: impl Iterator<Item = String>,
) -> Result<Vec<u64>, TargetError> {
    let each: Vec<String> = tables
        .enumerate()
        .map(|(at, table)| format!("SELECT {at} AS place, count(*) AS n FROM {table}"))
        .collect();
    if each.is_empty() {
        return Ok(Vec::new());
    }
    let mut statement = connection
        .prepare(&format!("SELECT n FROM ({}) ORDER BY place", each.join(" UNION ALL ")))?;
    let counts = statement.query_map([], |row| row.get(0))?;
    Ok(counts.collect::<Result<_, _>>()?)
}

/// Stages the rows of a patch, with their former keys and the number of what they lack.
pub(super) fn stage_patch(
    connection: &Connection,
    spec: &TableSpec,
    patch: &Patch,
) -> Result<(), TargetError> {
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let mut columns = stage_columns(spec, &all, "");
    columns.extend(stage_columns(spec, spec.key_columns(), ORIGIN_PREFIX));
    columns.push((ddl::quoted(PATTERN_COLUMN), "BIGINT".to_owned()));
    stage(connection, &columns, std::slice::from_ref(&patch.rows))
}

/// The value of a column in a patched row: what came, or `unchanged` in rows that lack it.
pub(super) fn patched_value(
    patch: &Patch,
    column: &ColumnSpec,
    at: usize,
    unchanged: &str,
) -> String {
    let came = column.mapping.stage_expr(&format!("s.{}", ddl::quoted(&column.target_name)));
    let lacking = patch.lacking(at);
    if lacking.is_empty() {
        came
    } else if lacking.len() == patch.patterns.len() {
        unchanged.to_owned()
    } else {
        let lacking: Vec<String> = lacking.iter().map(ToString::to_string).collect();
        format!(
            "CASE WHEN s.{} IN ({}) THEN {unchanged} ELSE CAST({came} AS {}) END",
            ddl::quoted(PATTERN_COLUMN),
            lacking.join(", "),
            column.mapping.target_type
        )
    }
}

/// Quoted name and type of staging columns.
pub(super) fn stage_columns(
    spec: &TableSpec,
    columns: &[usize],
    prefix: &str,
) -> Vec<(String, String)> {
    let columns = columns.iter().filter_map(|&at| spec.columns.get(at));
    columns
        .map(|column| {
            (ddl::quoted(&format!("{prefix}{}", column.target_name)), column.mapping.stage_type())
        })
        .collect()
}

pub(super) fn stage(
    connection: &Connection,
    columns: &[(String, String)],
    batches: &[RecordBatch],
) -> Result<(), TargetError> {
    let columns: Vec<String> =
        columns.iter().map(|(name, kind)| format!("{name} {kind}")).collect();
    connection.execute_batch(&format!("CREATE TEMP TABLE {STAGE} ({})", columns.join(", ")))?;
    let mut appender = connection.appender_to_catalog_and_db(STAGE, "temp", "main")?;
    for batch in batches {
        append(&mut appender, batch)?;
    }
    appender.flush()?;
    Ok(())
}

/// DuckDB takes a vector's worth of rows at a time, and with each of them all items of a LIST
/// column's array, so lists are cut to size first; else the cost would grow with the square of the
/// batch.
fn append(appender: &mut duckdb::Appender<'_>, batch: &RecordBatch) -> Result<(), TargetError> {
    const VECTOR_ROWS: usize = 2048;
    let is_nested = |kind: &DataType| matches!(kind, DataType::List(_) | DataType::Struct(_));
    let has_lists = batch.columns().iter().any(|column| is_nested(column.data_type()));
    if !has_lists || batch.num_rows() <= VECTOR_ROWS {
        return Ok(appender.append_record_batch(batch.clone())?);
    }
    for start in (0..batch.num_rows()).step_by(VECTOR_ROWS) {
        let end = (start + VECTOR_ROWS).min(batch.num_rows());
        let rows = UInt64Array::from_iter_values(start as u64..end as u64);
        let cut = take_record_batch(batch, &rows)
            .map_err(|error| TargetError::Rows { source: error.into() })?;
        appender.append_record_batch(cut)?;
    }
    Ok(())
}

/// Appends rows to a table's shadow; the body of [`super::Loader::load`]. DuckDB reads each batch
/// where it lies.
pub(super) fn load(
    connection: &Connection,
    spec: &TableSpec,
    rows: RowStream,
    view: &BatchView,
) -> Result<u64, TargetError> {
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    let insert = format!(
        "INSERT INTO {} ({}) SELECT {} FROM {} s",
        ddl::table(&ddl::shadow_of(&spec.target)),
        column_list(spec, &all),
        stage_values(spec, &all),
        view.name()
    );
    // Bound once: DuckDB asks for the stream's schema each time that it binds, and keeps it.
    let mut insert = connection.prepare(&insert)?;
    let mut loaded = 0;
    for batch in rows {
        let batch = batch.map_err(|source| TargetError::Rows { source })?;
        let expected = batch.num_rows() as u64;
        view.put([batch]);
        let found = insert.execute([])? as u64;
        if found != expected {
            return Err(TargetError::Diverged { what: "rows to load", expected, found });
        }
        loaded += found;
    }
    Ok(loaded)
}

/// Appends few rows to the shadow of a table. A view of them would take longer to make than this
/// takes.
pub(super) fn append_to_shadow(
    connection: &Connection,
    spec: &TableSpec,
    batches: &[RecordBatch],
) -> Result<(), TargetError> {
    if total(batches) == 0 {
        return Ok(());
    }
    let shadow = ddl::shadow_of(&spec.target);
    if spec.columns.iter().all(|column| column.mapping.stage_type() == column.mapping.target_type) {
        let mut appender =
            connection.appender_to_catalog_and_db(&shadow.name, ddl::CATALOG, &shadow.schema)?;
        for batch in batches {
            append(&mut appender, batch)?;
        }
        return Ok(appender.flush()?);
    }
    let all: Vec<usize> = (0..spec.columns.len()).collect();
    stage(connection, &stage_columns(spec, &all, ""), batches)?;
    connection.execute_batch(&format!(
        "INSERT INTO {} ({}) SELECT {} FROM {STAGE} s; DROP TABLE {STAGE};",
        ddl::table(&shadow),
        column_list(spec, &all),
        stage_values(spec, &all)
    ))?;
    Ok(())
}
