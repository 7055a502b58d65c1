//! What the relations of the stream are to the tables that are followed: which rows are taken, and
//! how.

use std::sync::Arc;

use super::{ColumnOrigin, Key, Remedy, SchemaChange, TableSpec};
use crate::{
    Lsn,
    pgoutput::{
        ReplicaIdentity,
        relation::Relation,
        table_description::Description,
        tuple::{Field, Tuple, write_field},
    },
};

/// A relation as this connection described it last.
#[derive(Debug)]
pub(super) struct Described {
    pub relation: Relation,
    /// What to do with its rows.
    pub follow: Follow,
    /// Rows and TRUNCATEs of the relation that were passed over since they were last reported.
    pub ignored: u64,
    /// Commit LSN of the last source transaction that changed it, whether anybody wanted it or not.
    pub seen: Lsn,
}

#[derive(Debug)]
pub(super) enum Follow {
    /// The relation is no table that is followed now. Its changes are counted and reported as
    /// untracked.
    Untracked,
    /// Of a table that is paused, which only another copy brings back.
    Paused,
    /// It differs from its table in this, and was described before the table was copied: the server
    /// describes the newer shape before the first row that the copy does not hold. A row that comes
    /// without that pauses the table.
    Stale(String),
    /// Rows are stored as they come.
    AsIs,
    /// Columns are left out: indexes of the wire columns that are kept, in the order of the table's
    /// columns.
    Project(Vec<usize>),
}

/// A table that this consumer follows.
#[derive(Debug)]
pub(super) struct TrackedTable {
    pub spec: Arc<TableSpec>,
    /// Why it is paused; its rows are ignored from then on.
    pub failure: Option<(String, Remedy)>,
    pub reported: bool,
}

/// A row in another shape: columns that went are left out, new ones hold what older rows do.
pub(super) fn project(row: &Tuple<'_>, columns: &[ColumnOrigin]) -> Vec<u8> {
    let fields: Vec<Field<'_>> = row.fields().collect();
    let mut bytes = Vec::with_capacity(row.bytes().len());
    for column in columns {
        write_field(
            &mut bytes,
            match column {
                ColumnOrigin::Kept(at) => fields.get(*at).copied().unwrap_or(Field::Null),
                ColumnOrigin::Added(Some(text)) => Field::Text(text.as_bytes()),
                ColumnOrigin::Added(None) => Field::Null,
            },
        );
    }
    bytes
}

/// Whether a relation looks like the table as it is followed.
pub fn fits(spec: &TableSpec, relation: &Relation) -> bool {
    fit(spec, relation).is_ok()
}

pub(super) fn fit_or_stale(spec: &TableSpec, relation: &Relation) -> Follow {
    fit(spec, relation).unwrap_or_else(Follow::Stale)
}

/// How the rows of a relation become rows of a table, or in what they differ. The table's name does
/// not matter here.
pub(super) fn fit(spec: &TableSpec, relation: &Relation) -> Result<Follow, String> {
    let mut kept = Vec::with_capacity(spec.columns.len());
    let mut wanted = spec.columns.iter().enumerate().peekable();
    for (at, column) in relation.columns.iter().enumerate() {
        if spec.excluded.contains(&column.name) {
            continue;
        }
        let Some((index, expected)) = wanted.next() else {
            return Err(format!("column \"{}\" is new", column.name));
        };
        if expected.name != column.name {
            return Err(format!(
                "column \"{}\" stands where \"{}\" was",
                column.name, expected.name
            ));
        }
        if (expected.type_oid, expected.typmod) != (column.type_oid, column.typmod) {
            return Err(format!("column \"{}\" has another type", column.name));
        }
        let was_key = spec.key_columns().contains(&index);
        // With REPLICA IDENTITY FULL the wire flags every column; the key is the catalog's then
        // (trap 49).
        let is_full = relation.replica_identity == ReplicaIdentity::Full;
        if !is_full && was_key != column.is_key {
            return Err(format!("column \"{}\" joined or left the replica identity", column.name));
        }
        kept.push(at);
    }
    if let Some((_, missing)) = wanted.next() {
        return Err(format!("column \"{}\" is gone", missing.name));
    }
    if relation.replica_identity != spec.replica_identity {
        // Only what the rows carry matters: default and index both send the key's columns.
        let sends_old_rows = |identity| matches!(identity, ReplicaIdentity::Full);
        if matches!(spec.key, Key::WholeRow)
            || sends_old_rows(relation.replica_identity) && spec.key == Key::AppendOnly
        {
            return Err("its replica identity is another".to_owned());
        }
    }
    Ok(if kept.len() == relation.columns.len() { Follow::AsIs } else { Follow::Project(kept) })
}

/// What a Relation message turned out to mean.
#[derive(Debug)]
pub enum SchemaResolution {
    /// The table as it is followed.
    Same,
    /// The table in another shape; rows from here on have it.
    SchemaChange(Box<SchemaChange>),
    /// A table that only another copy makes equal to the source, for this reason; no row of it
    /// counts before that.
    Copy(String),
}

/// A relation that is not followed, and whose changes were passed over.
#[derive(Debug, Clone)]
pub struct Untracked {
    pub relation: Relation,
    pub changes: u64,
    /// Commit LSN of the last of them.
    pub last_change: Lsn,
}

/// A Relation message that waits for its [`SchemaResolution`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemaQuery {
    pub relation: Relation,
    /// Of the transaction that it is asked in.
    pub commit_lsn: Lsn,
    /// Of that transaction at the source; 0 between transactions.
    pub xid: u32,
    /// What the source's event trigger said of the table at this place of the stream, if it has
    /// one.
    pub description: Option<Description>,
    /// The open transaction holds rows of the table in its old shape.
    pub has_open_rows: bool,
    /// And some of them went out already, as parts of it.
    pub has_parts: bool,
}
