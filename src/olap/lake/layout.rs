//! How tables lie in a lake, and how they are altered there.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{LakeOptions, Layout, options};
use crate::{
    change::{ColumnOrigin, ColumnSpec, SchemaChange, TableSpec},
    olap::{
        TargetError,
        connection::TargetConnection,
        names::{quoted, shadow_of, table},
    },
};

/// a column, or a function of a column
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(with = "String")]
pub struct LayoutKey {
    /// The name of the column at the source.
    pub column: String,
    /// The function, and what stands before the column among its arguments.
    function: Option<(String, String)>,
}

impl TryFrom<String> for LayoutKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        const FUNCTIONS: [&str; 4] = ["year", "month", "day", "hour"];
        let refused = || {
            format!(
                "\"{text}\" is neither a column nor year, month, day or hour of a column, nor \
                 bucket(number, column)"
            )
        };

        let Some(inner) = text.trim().strip_suffix(')') else {
            let column = text.trim().to_owned();
            return if column.is_empty() {
                Err(refused())
            } else {
                Ok(Self { column, function: None })
            };
        };
        let (name, arguments) = inner.split_once('(').ok_or_else(refused)?;
        let (name, arguments) = (name.trim().to_lowercase(), arguments.trim());
        if FUNCTIONS.contains(&name.as_str()) && !arguments.is_empty() {
            return Ok(Self {
                column: arguments.to_owned(),
                function: Some((name, String::new())),
            });
        }

        let (buckets, column) = arguments.split_once(',').ok_or_else(refused)?;
        let buckets: u32 = buckets.trim().parse().map_err(|_| refused())?;
        if name != "bucket" || buckets == 0 || column.trim().is_empty() {
            return Err(refused());
        }
        Ok(Self {
            column: column.trim().to_owned(),
            function: Some((name, format!("{buckets}, "))),
        })
    }
}

impl Layout {
    /// Returns the names that the columns of the layout have at the source.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.partition_by.iter().chain(&self.sort_by).map(|key| key.column.as_str())
    }
}

impl LayoutKey {
    /// Returns the key as SQL; `None` when the table has no such column.
    fn in_target(&self, spec: &TableSpec) -> Option<String> {
        let column = spec.columns.iter().find(|column| column.name == self.column)?;
        let name = quoted(&column.target_name);
        Some(match &self.function {
            Some((function, before)) => format!("{function}({before}{name})"),
            None => name,
        })
    }
}

/// The names of DuckLake's own columns, which no column of a table may have.
pub const RESERVED: [&str; 5] = [
    "row_id",
    "begin_snapshot",
    "end_snapshot",
    "_ducklake_internal_row_id",
    "_ducklake_internal_snapshot_id",
];

/// Returns whether the type of a column is made of other types.
pub fn is_nested(column: &ColumnSpec) -> bool {
    const NESTED: [&str; 4] = ["[", "STRUCT", "MAP", "VARIANT"];
    NESTED.iter().any(|nested| column.mapping.target_type.contains(nested))
}

/// Returns whether DuckLake brings a table into another shape without reading its rows: it takes
/// wider numbers, and constants that are not nested in new columns, and drops no column that the
/// layout of the table names.
pub fn can_alter(change: &SchemaChange, layout: &Layout) -> bool {
    let is_kept = |at: usize| change.columns.contains(&ColumnOrigin::Kept(at));
    let mut dropped = change.before.columns.iter().enumerate().filter(|(at, _)| !is_kept(*at));
    if dropped.any(|(_, column)| layout.columns().any(|name| name == column.name)) {
        return false;
    }

    change.after.columns.iter().zip(&change.columns).all(|(column, origin)| match origin {
        ColumnOrigin::Kept(at) => change.before.columns.get(*at).is_some_and(|before| {
            let (was, is) = (&before.mapping.target_type, &column.mapping.target_type);
            was == is || is_wider(was, is)
        }),
        ColumnOrigin::Added(None) => true,
        ColumnOrigin::Added(Some(_)) => !is_nested(column),
    })
}

fn is_wider(was: &str, is: &str) -> bool {
    const INTEGERS: [&str; 3] = ["SMALLINT", "INTEGER", "BIGINT"];
    let rank = |kind: &str| INTEGERS.iter().position(|integer| *integer == kind);
    matches!((rank(was), rank(is)), (Some(was), Some(is)) if was < is)
}

/// Has the files of these schemas written in the encodings of Parquet 2: numbers that grow, as
/// those of keys, take a quarter of the space and are read faster.
pub fn of_schemas<'a>(
    connection: &TargetConnection,
    schemas: impl Iterator<Item = &'a str>,
) -> Result<(), TargetError> {
    let schemas: BTreeSet<&str> = schemas.collect();
    options::set(connection, "parquet_version", schemas.into_iter().map(|name| ((name, None), 2)))
}

/// Returns the statements that make an empty shadow.
pub fn create_shadow(spec: &TableSpec, options: &LakeOptions) -> String {
    let shadow = table(&shadow_of(&spec.target));
    let column = |column: &ColumnSpec| {
        format!("{} {}", quoted(&column.target_name), column.mapping.target_type)
    };
    let columns: Vec<String> = spec.columns.iter().map(column).collect();
    let mut statements = format!("CREATE TABLE {shadow} ({});", columns.join(", "));

    let Some(layout) = options.layouts.get(&spec.source) else { return statements };
    for column in layout.columns() {
        if !spec.columns.iter().any(|known| known.name == column) {
            tracing::warn!(
                event = "lake_layout_ignored",
                table = %spec.source,
                column,
                "the lake no longer partitions or sorts the files of the table by this column: the \
                 copy has no column of this name"
            );
        }
    }
    for (what, keys) in [("PARTITIONED", &layout.partition_by), ("SORTED", &layout.sort_by)] {
        let keys: Vec<String> = keys.iter().filter_map(|key| key.in_target(spec)).collect();
        if !keys.is_empty() {
            let keys = keys.join(", ");
            statements.push_str(&format!("ALTER TABLE {shadow} SET {what} BY ({keys});"));
        }
    }
    statements
}
