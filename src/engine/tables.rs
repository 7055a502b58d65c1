//! From what the source has to what is copied: one [`TableSpec`] per table, and back from what is stored.

use std::collections::BTreeMap;

use crate::{
    Lsn,
    change::{ColumnSpec, Key, QualifiedName, TableSpec},
    source::catalog::{self, SourceTable},
    target::{StoredColumn, StoredTable, TableState, ddl::SHADOW_ENDING},
    types::{ColumnType, TypeCatalog, map_column},
};

/// `[tables."schema.table"]` of the settings.
#[derive(Debug, Clone, Default)]
pub struct TableSettings {
    /// Name in the target, as `schema.table` or `table`.
    pub target: Option<QualifiedName>,
    pub exclude_columns: Vec<String>,
    /// Column name to DuckDB type.
    pub column_types: BTreeMap<String, String>,
}

/// A table that cannot be copied as it is set up. Concerns this table only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TablePlanError {
    #[error("table {table} has no column that could be copied")]
    NoColumns { table: QualifiedName },
    #[error("table {table} has no column \"{column}\", which the settings name")]
    NoSuchColumn { table: QualifiedName, column: String },
    #[error("column \"{column}\" of table {table} is part of its replica identity and cannot be left out")]
    KeyExcluded { table: QualifiedName, column: String },
    #[error(
        "columns \"{first}\" and \"{second}\" of table {table} differ only by case, which DuckDB does not tell apart\nhint: leave one out with exclude_columns"
    )]
    ColumnCollision { table: QualifiedName, first: String, second: String },
    #[error(
        "table {table} would be called {target} in DuckDB, an ending that rhei needs for itself\nhint: give it another name with `target` in its [tables.\"..\"] section"
    )]
    ReservedName { table: QualifiedName, target: String },
    #[error("column \"{column}\" of table {table}: {reason}")]
    Type { table: QualifiedName, column: String, reason: String },
    #[error(
        "tables {first} and {second} would both become {target} in DuckDB, which does not tell case apart\nhint: give one another name with `target` in its [tables.\"..\"] section"
    )]
    TableCollision { first: String, second: String, target: String },
}

/// Decides how a table is copied and followed.
pub fn plan(table: &SourceTable, types: &TypeCatalog, settings: &TableSettings) -> Result<TableSpec, TablePlanError> {
    let name = || table.name.clone();
    let named = settings.exclude_columns.iter().chain(settings.column_types.keys());
    for column in named {
        if !table.columns.iter().any(|known| known.name == *column) {
            return Err(TablePlanError::NoSuchColumn { table: name(), column: column.clone() });
        }
    }
    let kept: Vec<_> = table.columns.iter().filter(|column| !settings.exclude_columns.contains(&column.name)).collect();
    if kept.is_empty() {
        return Err(TablePlanError::NoColumns { table: name() });
    }
    let mut columns: Vec<ColumnSpec> = Vec::with_capacity(kept.len());
    for column in &kept {
        if let Some(other) = columns.iter().find(|other| other.target_name.eq_ignore_ascii_case(&column.name)) {
            let (first, second) = (other.name.clone(), column.name.clone());
            return Err(TablePlanError::ColumnCollision { table: name(), first, second });
        }
        let column_type = ColumnType {
            type_oid: column.type_oid,
            typmod: column.typmod,
            ndims: column.ndims,
            override_type: settings.column_types.get(&column.name).map(String::as_str),
        };
        let mapping = map_column(&column_type, types).map_err(|error| TablePlanError::Type {
            table: name(),
            column: column.name.clone(),
            reason: error.to_string(),
        })?;
        columns.push(ColumnSpec {
            name: column.name.clone(),
            attnum: column.attnum,
            type_oid: column.type_oid,
            typmod: column.typmod,
            not_null: column.not_null,
            target_name: column.name.clone(),
            mapping,
        });
    }
    let target = settings.target.clone().unwrap_or_else(name);
    if target.name.to_lowercase().ends_with(SHADOW_ENDING) {
        return Err(TablePlanError::ReservedName { table: name(), target: target.name });
    }
    let key = match catalog::key_of(table) {
        catalog::SourceKey::Columns(attnums) => {
            let mut positions = Vec::with_capacity(attnums.len());
            for attnum in attnums {
                match columns.iter().position(|column| column.attnum == attnum) {
                    Some(position) => positions.push(position),
                    None => {
                        let column = table.columns.iter().find(|column| column.attnum == attnum);
                        let column = column.map_or_else(|| attnum.to_string(), |column| column.name.clone());
                        return Err(TablePlanError::KeyExcluded { table: name(), column });
                    }
                }
            }
            // In the table's order, so that the key of a row is found in one walk.
            positions.sort_unstable();
            Key::Columns(positions)
        }
        catalog::SourceKey::WholeRow => Key::WholeRow,
        catalog::SourceKey::AppendOnly => Key::AppendOnly,
    };
    Ok(TableSpec {
        oid: table.oid,
        source: name(),
        target,
        epoch: 0,
        replica_identity: table.replica_identity,
        key,
        columns,
        excluded: settings.exclude_columns.clone(),
        copy_lsn: Lsn::ZERO,
    })
}

/// Two tables must not become one: DuckDB's names do not tell case apart (trap 59).
pub fn refuse_collisions<'a>(tables: impl Iterator<Item = &'a TableSpec>) -> Result<(), TablePlanError> {
    let mut seen: BTreeMap<String, &TableSpec> = BTreeMap::new();
    for table in tables {
        if let Some(other) = seen.insert(table.target.to_string().to_lowercase(), table) {
            return Err(TablePlanError::TableCollision {
                first: other.source.to_string(),
                second: table.source.to_string(),
                target: table.target.to_string(),
            });
        }
    }
    Ok(())
}

/// What is stored of a table.
pub fn to_stored(spec: &TableSpec, state: TableState, relfilenode: u32) -> StoredTable {
    let column = |(index, column): (usize, &ColumnSpec)| StoredColumn {
        attnum: column.attnum,
        name: column.name.clone(),
        type_oid: column.type_oid,
        typmod: column.typmod,
        not_null: column.not_null,
        key_position: spec.key_columns().iter().position(|&key| key == index).map(|position| position as u32),
        target_name: column.target_name.clone(),
        target_type: column.mapping.target_type.clone(),
    };
    StoredTable {
        oid: spec.oid,
        source: spec.source.clone(),
        target: spec.target.clone(),
        state,
        copy_lsn: spec.copy_lsn,
        epoch: spec.epoch,
        replica_identity: spec.replica_identity,
        whole_row_key: spec.key == Key::WholeRow,
        relfilenode,
        columns: spec.columns.iter().enumerate().map(column).collect(),
        excluded: spec.excluded.clone(),
        copied_rows: 0,
    }
}

/// The table as it was planned when it was copied: what the stream is compared with. `ndims` says how a column was
/// declared; it is not stored, since the stored target type decides.
pub fn from_stored(
    stored: &StoredTable,
    types: &TypeCatalog,
    now: Option<&SourceTable>,
) -> Result<TableSpec, TablePlanError> {
    let mut columns = Vec::with_capacity(stored.columns.len());
    for column in &stored.columns {
        let declared = now.and_then(|now| now.columns.iter().find(|other| other.attnum == column.attnum));
        let plain = ColumnType {
            type_oid: column.type_oid,
            typmod: column.typmod,
            ndims: declared.map_or(0, |declared| declared.ndims),
            override_type: None,
        };
        let type_error = |error: crate::types::MappingError| TablePlanError::Type {
            table: stored.source.clone(),
            column: column.name.clone(),
            reason: error.to_string(),
        };
        let mut mapping = map_column(&plain, types).map_err(type_error)?;
        if mapping.target_type != column.target_type {
            let overridden = ColumnType { override_type: Some(&column.target_type), ..plain };
            mapping = map_column(&overridden, types).map_err(type_error)?;
        }
        columns.push(ColumnSpec {
            name: column.name.clone(),
            attnum: column.attnum,
            type_oid: column.type_oid,
            typmod: column.typmod,
            not_null: column.not_null,
            target_name: column.target_name.clone(),
            mapping,
        });
    }
    let mut key: Vec<(u32, usize)> = stored
        .columns
        .iter()
        .enumerate()
        .filter_map(|(index, column)| column.key_position.map(|position| (position, index)))
        .collect();
    key.sort_unstable();
    let key = match (key.is_empty(), stored.whole_row_key) {
        (false, _) => Key::Columns(key.into_iter().map(|(_, index)| index).collect()),
        (true, true) => Key::WholeRow,
        (true, false) => Key::AppendOnly,
    };
    Ok(TableSpec {
        oid: stored.oid,
        source: stored.source.clone(),
        target: stored.target.clone(),
        epoch: stored.epoch,
        replica_identity: stored.replica_identity,
        key,
        columns,
        excluded: stored.excluded.clone(),
        copy_lsn: stored.copy_lsn,
    })
}
