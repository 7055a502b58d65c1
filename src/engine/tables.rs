//! From what the source has to what is copied: one [`TableSpec`] per table, and back from what is
//! stored.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Lsn,
    change::{ColumnSpec, Key, TableSpec},
    pgoutput::QualifiedName,
    source::catalog::{self, Fingerprint, SourceColumn, SourceTable},
    target::{StoredTable, ddl::SHADOW_ENDING},
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
    /// Tables with a higher one are copied first.
    pub copy_priority: i32,
}

/// A table that cannot be copied as it is set up. Concerns this table only.
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
    /// The table as it is copied now: columns keep the names that they have.
    pub before: Option<&'a TableSpec>,
}

/// Decides how a table is copied and followed. Its target is called as the settings say, or like
/// the source.
pub fn plan(
    table: &SourceTable,
    types: &TypeCatalog,
    options: PlanOptions<'_>,
) -> Result<TableSpec, TablePlanError> {
    let settings = options.settings;
    let name = || table.name.clone();
    if let Some(without_wal) = table.leaves_without_wal.first().cloned() {
        return Err(TablePlanError::WithoutWal { table: name(), without_wal });
    }
    let named = settings.exclude_columns.iter().chain(settings.column_types.keys());
    for column in named {
        if !table.columns.iter().any(|known| known.name == *column) {
            return Err(TablePlanError::NoSuchColumn { table: name(), column: column.clone() });
        }
    }
    let kept: Vec<_> = table
        .columns
        .iter()
        .filter(|column| !settings.exclude_columns.contains(&column.name))
        .collect();
    if kept.is_empty() {
        return Err(TablePlanError::NoColumns { table: name() });
    }
    let target_names = column_names(&kept, options.before);
    let mut columns: Vec<ColumnSpec> = Vec::with_capacity(kept.len());
    for (column, target_name) in kept.iter().zip(target_names) {
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
            target_name,
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
                        let column =
                            column.map_or_else(|| attnum.to_string(), |column| column.name.clone());
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
        fingerprint: fingerprint_text(&table.fingerprint),
        null_unrepresentable: options.null_unrepresentable,
        copy_lsn: Lsn::ZERO,
        copy_xids: None,
    })
}

/// A fingerprint as it is stored.
pub fn fingerprint_text(fingerprint: &Fingerprint) -> String {
    // A map of numbers and texts always has a JSON form.
    serde_json::to_string(fingerprint).unwrap_or_default()
}

/// DuckDB does not tell `"Id"` from `id` (trap 59), and `rowid` is its own: the column that came
/// first keeps its name, others get their `attnum` behind it, which never changes. Columns that
/// have a name keep it.
fn column_names(columns: &[&SourceColumn], before: Option<&TableSpec>) -> Vec<String> {
    let folded = |name: &str| name.to_ascii_lowercase();
    let mut taken = BTreeSet::from(["rowid".to_owned()]);
    let kept = |column: &SourceColumn| {
        let before = before?
            .columns
            .iter()
            .find(|old| old.attnum == column.attnum && old.name == column.name)?;
        Some(before.target_name.clone())
    };
    let mut names: Vec<Option<String>> = columns.iter().map(|column| kept(column)).collect();
    taken.extend(names.iter().flatten().map(|name| folded(name)));
    for (name, column) in names.iter_mut().zip(columns) {
        if name.is_some() {
            continue;
        }
        let mut wanted = column.name.clone();
        if taken.contains(&folded(&wanted)) {
            wanted = format!("{wanted}_{}", column.attnum);
        }
        while !taken.insert(folded(&wanted)) {
            wanted.push('_');
        }
        *name = Some(wanted);
    }
    names.into_iter().flatten().collect()
}

/// What a table is called in the target: as it is now, when nobody wants another name, else as it
/// wants to be; and where that is taken (DuckDB's names do not tell case apart, trap 59), with a
/// number behind it. `taken` holds the names of the tables before it, folded; ask in the order of
/// the tables' age (oid), so that the older one keeps its name.
pub fn target_name(wanted: &QualifiedName, taken: &mut BTreeSet<String>) -> QualifiedName {
    let folded =
        |name: &QualifiedName| format!("{}.{}", name.schema, name.name).to_ascii_lowercase();
    let mut name = wanted.clone();
    // rhei's own schema.
    if name.schema.eq_ignore_ascii_case("_rhei") {
        name.schema.push_str("_source");
    }
    let base = name.name.clone();
    let mut number = 1;
    while !taken.insert(folded(&name)) {
        number += 1;
        name.name = format!("{base}_{number}");
    }
    name
}

/// The table as it was planned when it was copied: what the stream is compared with.
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

/// Whether `name` is what [`target_name`] may have made of `wanted`.
pub fn is_name_for(name: &QualifiedName, wanted: &QualifiedName) -> bool {
    let first = target_name(wanted, &mut BTreeSet::new());
    let number =
        name.name.strip_prefix(&first.name).map(|rest| rest.strip_prefix('_').unwrap_or(rest));
    name.schema == first.schema
        && number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        && (name.name.len() == first.name.len()
            || name.name.as_bytes().get(first.name.len()) == Some(&b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_differ_by_case_are_told_apart_by_a_stable_rule() {
        let column = |attnum, name: &str| SourceColumn {
            attnum,
            name: name.to_owned(),
            type_oid: 23,
            typmod: -1,
            ndims: 0,
            not_null: false,
            toastable: false,
            is_generated: false,
            xmin: 0,
            missing: BTreeMap::new(),
        };
        let columns = [
            column(1, "Id"),
            column(2, "id"),
            column(4, "ID"),
            column(5, "id_2"),
            column(6, "rowid"),
        ];
        let names = column_names(&columns.iter().collect::<Vec<_>>(), None);
        assert_eq!(names, ["Id", "id_2", "ID_4", "id_2_5", "rowid_6"]);

        let mut taken = BTreeSet::new();
        let names = ["public.T", "public.t", "Public.t", "_rhei.tables"].map(|name| {
            let (schema, name) = name.split_once('.').unwrap();
            target_name(&QualifiedName::new(schema, name), &mut taken).to_string()
        });
        assert_eq!(names, ["public.T", "public.t_2", "Public.t_3", "_rhei_source.tables"]);
    }
}
