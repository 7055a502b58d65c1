//! Plans what is copied of a table of the source, as one [`TableSpec`] per table, and reads the
//! plan back from the stored state.

use super::names;
use crate::{
    Lsn,
    change::{ColumnSpec, Key, TableSpec},
    olap::{StoredTable, lake::Layout, names::SHADOW_ENDING},
    pgoutput::QualifiedName,
    pipeline::options::TableSettings,
    source::catalog::{self, Fingerprint, SourceKey, SourceTable},
    types::{ColumnType, TypeCatalog, map_column},
};

/// A table that cannot be copied as it is set up. The error concerns this table only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TablePlanError {
    #[error("table {table} has no column that could be copied")]
    NoColumns { table: QualifiedName },
    #[error(
        "table {table} is, or has among its partitions, a foreign or unlogged table \
         ({without_wal}), whose rows are not in the source's WAL\nhint: leave it out by [source] \
         exclude; or have the publication name the other partitions one by one, without \
         publish_via_partition_root"
    )]
    WithoutWal { table: QualifiedName, without_wal: String },
    #[error("table {table} has no column \"{column}\", which the settings name")]
    NoSuchColumn { table: QualifiedName, column: String },
    #[error(
        "table {table} has no column \"{column}\" in its copy, by which partition_by or sort_by \
         lays out its files\nhint: correct its [tables.\"..\"] section"
    )]
    NoLayoutColumn { table: QualifiedName, column: String },
    #[error(
        "column \"{column}\" of table {table} is part of its replica identity and cannot be left \
         out"
    )]
    KeyExcluded { table: QualifiedName, column: String },
    #[error(
        "table {table} would be called {target} in DuckDB, an ending that rhei needs for \
         itself\nhint: give it another name with `target` in its [tables.\"..\"] section"
    )]
    ReservedName { table: QualifiedName, target: String },
    #[error("column \"{column}\" of table {table}: {reason}")]
    Type { table: QualifiedName, column: String, reason: String },
}

/// How columns and names are chosen.
#[derive(Debug, Clone, Copy)]
pub struct PlanOptions<'a> {
    pub settings: &'a TableSettings,
    pub null_unrepresentable: bool,
    /// The table as it is copied now: its columns keep the names that they have.
    pub before: Option<&'a TableSpec>,
}

/// Decides how a table is copied and followed. Its target is called as the settings say, or like
/// the source.
pub fn plan(
    table: &SourceTable,
    types: &TypeCatalog,
    options: PlanOptions<'_>,
) -> Result<TableSpec, TablePlanError> {
    if let Some(without_wal) = table.leaves_without_wal.first().cloned() {
        return Err(TablePlanError::WithoutWal { table: table.name.clone(), without_wal });
    }

    let settings = options.settings;
    refuse_unknown_columns(table, settings)?;

    let columns = planned_columns(table, types, options)?;
    let target = planned_target(table, settings)?;
    let key = planned_key(table, &columns)?;

    Ok(TableSpec {
        oid: table.oid,
        source: table.name.clone(),
        target,
        epoch: 0,
        replica_identity: table.replica_identity,
        key,
        columns,
        excluded: settings.exclude_columns.clone(),
        fingerprint: fingerprint_text(&table.fingerprint),
        null_unrepresentable: options.null_unrepresentable,
        copy_lsn: Lsn::ZERO,
        copy_xids: None,
    })
}

/// Fails for a column that the settings name and that the table does not have.
fn refuse_unknown_columns(
    table: &SourceTable,
    settings: &TableSettings,
) -> Result<(), TablePlanError> {
    let named = settings.exclude_columns.iter().chain(settings.column_types.keys());
    for column in named {
        if !table.columns.iter().any(|known| known.name == *column) {
            return Err(TablePlanError::NoSuchColumn {
                table: table.name.clone(),
                column: column.clone(),
            });
        }
    }
    Ok(())
}

/// Returns the columns that the settings do not leave out; there is at least one.
fn planned_columns(
    table: &SourceTable,
    types: &TypeCatalog,
    options: PlanOptions<'_>,
) -> Result<Vec<ColumnSpec>, TablePlanError> {
    let settings = options.settings;
    let kept: Vec<_> = table
        .columns
        .iter()
        .filter(|column| !settings.exclude_columns.contains(&column.name))
        .collect();
    if kept.is_empty() {
        return Err(TablePlanError::NoColumns { table: table.name.clone() });
    }

    let target_names = names::column_names(&kept, options.before, settings.in_lake.is_some());
    let mut columns: Vec<ColumnSpec> = Vec::with_capacity(kept.len());

    for (column, target_name) in kept.iter().zip(target_names) {
        let column_type = ColumnType {
            type_oid: column.type_oid,
            typmod: column.typmod,
            ndims: column.ndims,
            override_type: settings.column_types.get(&column.name).map(String::as_str),
        };

        let refused = |reason: String| TablePlanError::Type {
            table: table.name.clone(),
            column: column.name.clone(),
            reason,
        };
        let mut mapping =
            map_column(&column_type, types).map_err(|error| refused(error.to_string()))?;

        if settings.in_lake.is_some() && !mapping.is_exact_in_parquet() {
            if column_type.override_type.is_some() {
                return Err(refused(format!(
                    "no lake keeps every {}\nhint: as VARCHAR it keeps all values",
                    mapping.target_type
                )));
            }
            mapping = mapping.as_text();
        }

        columns.push(ColumnSpec {
            name: column.name.clone(),
            attnum: column.attnum,
            type_oid: column.type_oid,
            typmod: column.typmod,
            not_null: column.not_null,
            target_name,
            mapping,
        });
    }

    Ok(columns)
}

/// Returns the name that the settings want for the table in the target, or that of the source.
fn planned_target(
    table: &SourceTable,
    settings: &TableSettings,
) -> Result<QualifiedName, TablePlanError> {
    let target = settings.target.as_ref().unwrap_or(&table.name).clone();
    if target.name.to_lowercase().ends_with(SHADOW_ENDING) {
        return Err(TablePlanError::ReservedName {
            table: table.name.clone(),
            target: target.name,
        });
    }
    Ok(target)
}

/// Returns the key of the table, all of whose columns have to be among the copied `columns`.
fn planned_key(table: &SourceTable, columns: &[ColumnSpec]) -> Result<Key, TablePlanError> {
    let attnums = match catalog::key_of(table) {
        SourceKey::Columns(attnums) => attnums,
        SourceKey::WholeRow => return Ok(Key::WholeRow),
        SourceKey::AppendOnly => return Ok(Key::AppendOnly),
    };

    let mut positions = Vec::with_capacity(attnums.len());
    for attnum in attnums {
        match columns.iter().position(|column| column.attnum == attnum) {
            Some(position) => positions.push(position),
            None => {
                let column = table.columns.iter().find(|column| column.attnum == attnum);
                let column =
                    column.map_or_else(|| attnum.to_string(), |column| column.name.clone());
                return Err(TablePlanError::KeyExcluded { table: table.name.clone(), column });
            }
        }
    }

    // The positions are in the order of the table, so that the key of a row is found in one walk.
    positions.sort_unstable();
    Ok(Key::Columns(positions))
}

/// Fails when the layout of a table in a lake names a column that is not copied: for the first copy
/// of a table. One that loses such a column later is copied without it, since its rows count for
/// more than its layout.
pub fn refuse_unknown_layout(
    spec: &TableSpec,
    settings: &TableSettings,
) -> Result<(), TablePlanError> {
    let is_copied = |name: &str| spec.columns.iter().any(|column| column.name == name);
    let mut named = settings.in_lake.iter().flat_map(Layout::columns);
    match named.find(|name| !is_copied(name)) {
        Some(column) => Err(TablePlanError::NoLayoutColumn {
            table: spec.source.clone(),
            column: column.to_owned(),
        }),
        None => Ok(()),
    }
}

/// Returns a fingerprint as it is stored.
pub fn fingerprint_text(fingerprint: &Fingerprint) -> String {
    // A map of numbers and texts always has a JSON form.
    serde_json::to_string(fingerprint).unwrap_or_default()
}

/// Returns the table as it was planned when it was copied, with which the stream is compared.
pub fn from_stored(stored: &StoredTable, null_unrepresentable: bool) -> TableSpec {
    let columns: Vec<ColumnSpec> = stored
        .columns
        .iter()
        .map(|column| ColumnSpec {
            name: column.name.clone(),
            attnum: column.attnum,
            type_oid: column.type_oid,
            typmod: column.typmod,
            not_null: column.not_null,
            target_name: column.target_name.clone(),
            mapping: column.mapping.clone(),
        })
        .collect();

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

    TableSpec {
        oid: stored.oid,
        source: stored.source.clone(),
        target: stored.target.clone(),
        epoch: stored.epoch,
        replica_identity: stored.replica_identity,
        key,
        columns,
        excluded: stored.excluded.clone(),
        fingerprint: stored.fingerprint.clone(),
        null_unrepresentable,
        copy_lsn: stored.copy_lsn,
        copy_xids: stored.copy_xids.clone(),
    }
}
