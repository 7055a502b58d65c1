//! Which tables of the source the settings choose, and under which names.

use std::collections::{BTreeMap, BTreeSet};

use super::{is_name_for, target_name};
use crate::{
    Lsn,
    olap::{StoredTable, TableState, lake::CatalogKind},
    pgoutput::QualifiedName,
    pipeline::{EngineError, Options, options::TableSettings},
    source::{
        catalog::{self, SourceTable},
        connection::SqlClient,
    },
    types::TypeCatalog,
};

/// Returns whether the settings choose a table.
pub fn is_wanted(options: &Options, table: &QualifiedName) -> bool {
    let is_included =
        options.tables.is_empty() || options.tables.iter().any(|pattern| pattern.matches(table));
    is_included
        && !options.exclude.iter().any(|pattern| pattern.matches(table))
        && !is_of_catalog(options, table)
}

/// Returns whether a table may be one of the lake's own catalog, in the database of the source.
/// Each commit to the lake changes those, so that the next commit would have to follow.
fn is_of_catalog(options: &Options, table: &QualifiedName) -> bool {
    let lake = options.target.lake.as_ref();
    lake.is_some_and(|lake| lake.catalog_kind() == CatalogKind::Postgres)
        && table.schema == "public"
        && table.name.starts_with("ducklake_")
}

/// Keeps the tables that the settings choose and that have a column which is published. Tables
/// without columns have no rows that could differ.
pub fn retain_wanted(options: &Options, tables: &mut Vec<SourceTable>) {
    tables.retain(|table| is_wanted(options, &table.name) && !table.columns.is_empty());
}

pub fn no_matching_tables(options: &Options) -> EngineError {
    let patterns: Vec<String> = options.tables.iter().map(ToString::to_string).collect();
    let asked = if patterns.is_empty() { "any table".to_owned() } else { patterns.join(", ") };
    EngineError::NoTable { asked, publications: options.publications.join(", ") }
}

/// Returns the stored row of a table of which nothing is copied yet.
pub fn pending_row(table: &SourceTable, target: QualifiedName) -> StoredTable {
    StoredTable {
        oid: table.oid,
        source: table.name.clone(),
        target,
        state: TableState::Pending,
        copy_lsn: Lsn::ZERO,
        copy_xids: None,
        epoch: 0,
        replica_identity: table.replica_identity,
        whole_row_key: false,
        fingerprint: String::new(),
        columns: Vec::new(),
        excluded: Vec::new(),
        copied_rows: 0,
        has_shadow: false,
        truncated_by: None,
    }
}

/// Returns the name that each published table is to have. A name that a table has is kept as long
/// as the settings still want it. Of tables whose names differ by letter case only, the one in
/// lower case keeps its name, and then the oldest.
pub fn target_names(
    options: &Options,
    published: &[(u32, QualifiedName)],
    stored: &BTreeMap<u32, StoredTable>,
) -> BTreeMap<u32, QualifiedName> {
    let wanted =
        |name: &QualifiedName| table_settings(options, name).target.unwrap_or_else(|| name.clone());

    let kept = |oid: u32, name: &QualifiedName| {
        let stored = stored.get(&oid).filter(|stored| stored.state != TableState::Dropped)?;
        is_name_for(&stored.target, &wanted(name)).then(|| stored.target.clone())
    };

    let mut by_rank: Vec<&(u32, QualifiedName)> = published.iter().collect();
    by_rank.sort_by_key(|(oid, name)| {
        let wanted = wanted(name).to_string();
        (wanted.to_ascii_lowercase() != wanted, *oid)
    });

    let mut names: BTreeMap<u32, QualifiedName> = BTreeMap::new();
    let mut taken = BTreeSet::new();

    for (oid, name) in &by_rank {
        if let Some(name) = kept(*oid, name) {
            names.insert(*oid, target_name(&name, &mut taken));
        }
    }

    for (oid, name) in by_rank {
        names.entry(*oid).or_insert_with(|| target_name(&wanted(name), &mut taken));
    }
    names
}

pub fn names_of(tables: &[SourceTable]) -> Vec<(u32, QualifiedName)> {
    tables.iter().map(|table| (table.oid, table.name.clone())).collect()
}

/// Returns the settings of a table.
pub fn table_settings(options: &Options, table: &QualifiedName) -> TableSettings {
    let mut settings = options.table_settings.get(&table.to_string()).cloned().unwrap_or_default();

    if let Some(lake) = &options.target.lake {
        settings.in_lake = Some(lake.layouts.get(table).cloned().unwrap_or_default());
        let target = settings.target.get_or_insert_with(|| table.clone());
        // The schema of that name belongs to the state.
        if target.schema.eq_ignore_ascii_case("_rhei") {
            target.schema.push_str("_source");
        }
        target.schema.insert_str(0, &lake.schema_prefix);
    }
    settings
}

pub async fn wanted_tables(
    options: &Options,
    sql: &SqlClient,
) -> Result<Vec<SourceTable>, EngineError> {
    let mut published = catalog::published_tables(sql, &options.publications).await?;

    for table in published.iter().filter(|table| is_wanted(options, &table.name)) {
        if table.columns.is_empty() {
            tracing::warn!(
                event = "table_without_columns",
                table = %table.name,
                "the table has no column that is published, so it is not copied"
            );
        }
    }

    for table in published.iter().filter(|table| is_of_catalog(options, &table.name)) {
        tracing::warn!(
            event = "table_of_catalog",
            table = %table.name,
            "the table is not copied into the lake: tables named public.ducklake_* may be those of \
             the lake's own catalog"
        );
    }

    retain_wanted(options, &mut published);
    Ok(published)
}

pub async fn types_of(sql: &SqlClient, tables: &[SourceTable]) -> Result<TypeCatalog, EngineError> {
    let oids: BTreeSet<u32> = tables
        .iter()
        .flat_map(|table| table.columns.iter().map(|column| column.type_oid))
        .collect();
    Ok(catalog::types(sql, &oids.into_iter().collect::<Vec<_>>()).await?)
}
