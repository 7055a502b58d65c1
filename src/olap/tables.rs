//! `_rhei.tables` and `_rhei.columns`, kept in memory: this process is the only writer of the file.
//! A change is made here first and written with the transaction that it belongs to; after a
//! transaction failed, everything is read from the file again.
//!
//! Rows are replaced by DELETE and INSERT, never updated: an UPDATE would block CHECKPOINT under an
//! open reader.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use duckdb::params;

use super::{
    StoredColumn, StoredTable, TableState, TargetError,
    connection::TargetConnection,
    names::{self, lower},
    pending,
    state::{PIPELINE_ID, corrupt, from_json, lsn, to_json},
};
use crate::{
    change::{Pause, Remedy, TableSpec, xids::XidSnapshot},
    pgoutput::{QualifiedName, ReplicaIdentity},
};

/// A table, and whether rhei put the table of its name into the target.
#[derive(Debug, Clone)]
struct Row {
    table: StoredTable,
    is_ours: bool,
}

/// The parts of a table's row that have to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Dirty {
    Row,
    RowAndColumns,
}

/// The tables of a file.
#[derive(Debug, Default)]
pub(super) struct Tables {
    rows: BTreeMap<u32, Row>,
    dirty: BTreeMap<u32, Dirty>,
    /// The names in the target, in lower case, and how many rows say that rhei put the table there.
    ours: HashMap<(String, String), usize>,
    /// The oids of the tables that have a table of pending changes (see `pending`).
    pending: BTreeSet<u32>,
    /// The names of tables that rhei did not make. No table can be added while this process has the
    /// file locked.
    foreign: HashSet<(String, String)>,
}

impl Tables {
    pub fn read(connection: &TargetConnection) -> Result<Self, TargetError> {
        let mut tables = Self::default();
        for (table, is_ours) in read_rows(connection)? {
            tables.insert(Row { table, is_ours });
        }

        read_columns(connection, &mut tables.rows)?;
        tables.read_foreign(connection)?;
        tables.pending = pending::kept_tables(connection)?;
        Ok(tables)
    }

    /// Returns the tables of a file that rhei has not written to yet.
    pub fn of_new_file(connection: &TargetConnection) -> Result<Self, TargetError> {
        let mut tables = Self::default();
        tables.read_foreign(connection)?;
        Ok(tables)
    }

    fn read_foreign(&mut self, connection: &TargetConnection) -> Result<(), TargetError> {
        let shadows = self.rows.values().filter(|row| row.table.has_shadow);
        let shadows: HashSet<_> =
            shadows.map(|row| lower(&names::shadow_of(&row.table.target))).collect();

        let mut statement = connection.prepare(
            "SELECT lower(table_schema), lower(table_name) FROM information_schema.tables \
             WHERE table_catalog = current_database() AND table_schema <> ?",
        )?;

        let mut rows = statement.query([connection.state_schema()])?;
        while let Some(row) = rows.next()? {
            let name = (row.get(0)?, row.get(1)?);
            if !self.ours.contains_key(&name) && !shadows.contains(&name) {
                self.foreign.insert(name);
            }
        }
        Ok(())
    }

    /// Returns whether the table has a table of pending changes, which may be empty.
    pub fn has_pending(&self, oid: u32) -> bool {
        self.pending.contains(&oid)
    }

    /// Notes that the table of pending changes was made, or dropped.
    pub fn set_pending(&mut self, oid: u32, is_there: bool) {
        if is_there {
            self.pending.insert(oid);
        } else {
            self.pending.remove(&oid);
        }
    }

    /// Returns whether the target has a table of this name that rhei did not make.
    pub fn is_foreign(&self, target: &QualifiedName) -> bool {
        !self.is_ours(target) && self.foreign.contains(&lower(target))
    }

    /// Returns the tables in the order of their names, which is the order for people.
    pub fn list(&self) -> Vec<StoredTable> {
        let mut tables: Vec<StoredTable> =
            self.rows.values().map(|row| row.table.clone()).collect();
        let key = |table: &StoredTable| {
            (table.source.schema.clone(), table.source.name.clone(), table.oid)
        };
        tables.sort_by_cached_key(key);
        tables
    }

    pub fn get(&self, oid: u32) -> Option<&StoredTable> {
        self.rows.get(&oid).map(|row| &row.table)
    }

    /// Returns the tables that are being copied, and whether their shadows are loaded.
    pub fn copying(&self) -> BTreeMap<u32, bool> {
        let tables = self.rows.values().map(|row| &row.table).filter(|table| table.has_shadow);
        tables.map(|table| (table.oid, table.state == TableState::CatchingUp)).collect()
    }

    /// Returns whether rhei put the table of this name there.
    pub fn is_ours(&self, target: &QualifiedName) -> bool {
        self.ours.contains_key(&lower(target))
    }

    /// Returns whether the table of this name is the copy of another table, which was dropped at
    /// the source and whose copy is only kept.
    pub fn is_kept_by_another(&self, target: &QualifiedName, oid: u32) -> bool {
        let name = lower(target);
        self.rows.values().any(|row| {
            row.table.state == TableState::Dropped
                && row.table.oid != oid
                && lower(&row.table.target) == name
        })
    }

    fn insert(&mut self, row: Row) {
        self.remove(row.table.oid);
        if row.is_ours {
            *self.ours.entry(lower(&row.table.target)).or_default() += 1;
        }
        self.rows.insert(row.table.oid, row);
    }

    fn remove(&mut self, oid: u32) -> Option<Row> {
        let row = self.rows.remove(&oid)?;
        if row.is_ours {
            let name = lower(&row.table.target);
            match self.ours.get_mut(&name) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(self.ours.remove(&name)),
            }
        }
        Some(row)
    }

    fn touch(&mut self, oid: u32, dirty: Dirty) {
        let known = self.dirty.entry(oid).or_insert(dirty);
        *known = (*known).max(dirty);
    }

    /// Replaces a table's row and columns, or adds them.
    pub fn put(&mut self, table: StoredTable) {
        let (oid, is_ours) = (table.oid, self.is_ours(&table.target));
        self.insert(Row { table, is_ours });
        self.touch(oid, Dirty::RowAndColumns);
    }

    /// Replaces the row and the columns of a table that takes another shape, and keeps its state.
    pub fn put_shape(&mut self, spec: &TableSpec) {
        let Some(stored) = self.get(spec.oid) else { return };
        let (state, copied_rows, has_shadow) =
            (stored.state.clone(), stored.copied_rows, stored.has_shadow);
        self.put(StoredTable { copied_rows, has_shadow, ..StoredTable::of(spec, state) });
    }

    fn change(&mut self, oid: u32, change: impl FnOnce(&mut Row)) {
        let Some(mut row) = self.remove(oid) else { return };
        change(&mut row);
        self.insert(row);
        self.touch(oid, Dirty::Row);
    }

    /// Moves a table to another state.
    pub fn set_state(&mut self, oid: u32, state: TableState, copied: Option<u64>) {
        self.change(oid, |row| {
            row.table.state = state;
            row.table.copied_rows = copied.unwrap_or(row.table.copied_rows);
        });
    }

    /// Notes that the shadow has become the table.
    pub fn set_live(&mut self, oid: u32) {
        self.change(oid, |row| {
            row.is_ours = true;
            (row.table.state, row.table.has_shadow) = (TableState::Live, false);
        });
    }

    /// Notes that rhei put the table into the target.
    pub fn set_managed(&mut self, oid: u32) {
        self.change(oid, |row| row.is_ours = true);
    }

    /// Notes a TRUNCATE, which explains why the table has another file until the shape of the table
    /// is stored again.
    pub fn set_truncated(&mut self, oid: u32, xid: u32) {
        self.change(oid, |row| row.table.truncated_by = Some(xid));
    }

    /// Notes that the shadow is gone.
    pub fn set_shadowless(&mut self, oid: u32) {
        self.change(oid, |row| row.table.has_shadow = false);
    }

    /// Forgets other tables of these names whose copies are only kept, since the copies are
    /// replaced or dropped. Returns whether such tables existed.
    pub fn forget_dropped_namesakes<'a>(
        &mut self,
        tables: impl IntoIterator<Item = (&'a QualifiedName, u32)>,
    ) -> bool {
        let owners: HashMap<(String, String), u32> =
            tables.into_iter().map(|(name, oid)| (lower(name), oid)).collect();

        let is_kept = |row: &&Row| {
            row.table.state == TableState::Dropped
                && owners
                    .get(&lower(&row.table.target))
                    .is_some_and(|owner| *owner != row.table.oid)
        };

        let others: Vec<u32> =
            self.rows.values().filter(is_kept).map(|row| row.table.oid).collect();

        for &other in &others {
            self.remove(other);
            self.touch(other, Dirty::RowAndColumns);
        }

        !others.is_empty()
    }

    /// Writes what has changed, as a part of the transaction that is open.
    pub fn write(&mut self, connection: &TargetConnection) -> Result<(), TargetError> {
        let dirty = std::mem::take(&mut self.dirty);
        if dirty.is_empty() {
            return Ok(());
        }

        let oids: Vec<u32> = dirty.keys().copied().collect();
        let with_columns: Vec<u32> = dirty
            .iter()
            .filter(|(_, dirty)| **dirty == Dirty::RowAndColumns)
            .map(|(oid, _)| *oid)
            .collect();

        delete_stored(connection, &oids, &with_columns)?;
        self.append_rows(connection, &oids)?;
        self.append_columns(connection, &with_columns)
    }

    /// Appends the rows of those of these tables that are known.
    fn append_rows(&self, connection: &TargetConnection, oids: &[u32]) -> Result<(), TargetError> {
        let mut rows = connection.appender_to_catalog_and_db(
            "tables",
            names::CATALOG,
            connection.state_schema(),
        )?;
        for row in oids.iter().filter_map(|oid| self.rows.get(oid)) {
            let table = &row.table;
            let (error, remedy) = stored_pause(&table.state);
            rows.append_row(params![
                table.oid,
                table.source.schema,
                table.source.name,
                table.target.schema,
                table.target.name,
                table.state.as_str(),
                error,
                table.copy_lsn.to_string(),
                table.epoch,
                char::from(table.replica_identity.code()).to_string(),
                table.whole_row_key,
                table.fingerprint,
                to_json(&table.excluded),
                table.copied_rows,
                row.is_ours,
                table.has_shadow,
                remedy,
                table.copy_xids.as_ref().map(|xids| xids.text()),
                table.truncated_by,
                PIPELINE_ID,
            ])?;
        }
        rows.flush()?;
        Ok(())
    }

    /// Appends the columns of those of these tables that are known.
    fn append_columns(
        &self,
        connection: &TargetConnection,
        oids: &[u32],
    ) -> Result<(), TargetError> {
        let mut columns = connection.appender_to_catalog_and_db(
            "columns",
            names::CATALOG,
            connection.state_schema(),
        )?;
        for table in oids.iter().filter_map(|oid| self.get(*oid)) {
            for column in &table.columns {
                columns.append_row(params![
                    table.oid,
                    column.attnum,
                    column.name,
                    column.type_oid,
                    column.typmod,
                    column.not_null,
                    column.key_position,
                    column.target_name,
                    column.mapping.target_type,
                    serde_json::to_string(&column.mapping)
                        .map_err(|error| corrupt(error.to_string()))?,
                    PIPELINE_ID,
                ])?;
            }
        }
        columns.flush()?;
        Ok(())
    }
}

/// Deletes the stored rows of tables, and the stored columns of some of them.
fn delete_stored(
    connection: &TargetConnection,
    oids: &[u32],
    with_columns: &[u32],
) -> Result<(), TargetError> {
    let list = |oids: &[u32]| oids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");

    let rows = list(oids);
    connection.execute_batch(
        &connection.sql(&format!("DELETE FROM _rhei.tables WHERE oid IN ({rows})")),
    )?;

    if !with_columns.is_empty() {
        let columns = list(with_columns);
        connection.execute_batch(
            &connection.sql(&format!("DELETE FROM _rhei.columns WHERE table_oid IN ({columns})")),
        )?;
    }
    Ok(())
}

fn xids(text: Option<String>) -> Result<Option<Arc<XidSnapshot>>, TargetError> {
    let Some(text) = text else { return Ok(None) };
    let parsed = XidSnapshot::parse(&text)
        .ok_or_else(|| corrupt(format!("snapshot \"{text}\" makes no sense")))?;
    Ok(Some(Arc::new(parsed)))
}

fn read_rows(connection: &TargetConnection) -> Result<Vec<(StoredTable, bool)>, TargetError> {
    let mut statement = connection.prepare(&connection.sql(
        "SELECT oid, source_schema, source_name, target_schema, target_name, state, error, \
         copy_lsn, epoch, replica_identity, \
         whole_row_key, fingerprint, excluded, copied_rows, has_shadow, remedy, is_ours, \
         copy_xids, truncated_by \
         FROM _rhei.tables",
    ))?;

    let mut rows = statement.query([])?;
    let mut tables = Vec::new();
    while let Some(row) = rows.next()? {
        let (word, error): (String, Option<String>) = (row.get(5)?, row.get(6)?);
        let identity: String = row.get(9)?;
        let identity = identity.bytes().next().and_then(ReplicaIdentity::from_code);

        let table = StoredTable {
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
            copy_xids: xids(row.get::<_, Option<String>>(17)?)?,
            epoch: row.get(8)?,
            replica_identity: identity
                .ok_or_else(|| corrupt("a replica identity is unknown".to_owned()))?,
            whole_row_key: row.get(10)?,
            fingerprint: row.get(11)?,
            columns: Vec::new(),
            excluded: from_json(&row.get::<_, String>(12)?)?,
            copied_rows: row.get(13)?,
            has_shadow: row.get(14)?,
            truncated_by: row.get(18)?,
        };

        tables.push((table, row.get(16)?));
    }
    Ok(tables)
}

fn read_columns(
    connection: &TargetConnection,
    tables: &mut BTreeMap<u32, Row>,
) -> Result<(), TargetError> {
    let mut statement = connection.prepare(&connection.sql(
        "SELECT table_oid, attnum, name, type_oid, typmod, not_null, key_position, target_name, \
         mapping \
         FROM _rhei.columns ORDER BY table_oid, attnum",
    ))?;

    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let column = StoredColumn {
            attnum: row.get(1)?,
            name: row.get(2)?,
            type_oid: row.get(3)?,
            typmod: row.get(4)?,
            not_null: row.get(5)?,
            key_position: row.get(6)?,
            target_name: row.get(7)?,
            mapping: serde_json::from_str(&row.get::<_, String>(8)?)
                .map_err(|error| corrupt(error.to_string()))?,
        };

        if let Some(of) = tables.get_mut(&row.get(0)?) {
            of.table.columns.push(column);
        }
    }
    Ok(())
}

/// Returns the reason and the remedy of a paused table, as the file stores them.
fn stored_pause(state: &TableState) -> (Option<&str>, Option<&'static str>) {
    let TableState::Error(pause) = state else { return (None, None) };

    let remedy = match pause.remedy {
        Remedy::AllowNulls => "allow_nulls",
        Remedy::NextStart => "next_start",
        Remedy::Operator | Remedy::CopyAgain | Remedy::CopyAltered => "operator",
    };
    (Some(&pause.reason), Some(remedy))
}

fn remedy_of(stored: Option<&str>) -> Result<Remedy, TargetError> {
    match stored {
        Some("allow_nulls") => Ok(Remedy::AllowNulls),
        Some("next_start") => Ok(Remedy::NextStart),
        Some("operator") => Ok(Remedy::Operator),
        other => Err(corrupt(format!(
            "the remedy of a paused table is unknown ({})",
            other.unwrap_or("none")
        ))),
    }
}
