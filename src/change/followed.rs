//! How the relations of the stream relate to the followed tables: which rows are taken, and how.

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
    /// How its rows are handled.
    pub follow: Follow,
    /// Rows and TRUNCATEs of the relation that were passed over since they were last reported.
    pub ignored: u64,
    /// The commit LSN of the last source transaction that changed the relation, whether its changes
    /// were taken or not.
    pub seen: Lsn,
}

#[derive(Debug)]
pub(super) enum Follow {
    /// The relation is no table that is followed now. Its changes are counted and reported as
    /// untracked.
    Untracked,
    /// The relation belongs to a paused table, which only another copy brings back.
    Paused,
    /// The relation differs from its table in this, and was described before the table was copied:
    /// the server describes the newer shape before the first row that the copy does not hold. A row
    /// that arrives without such a description pauses the table.
    Stale(String),
    /// Rows are stored as they arrive.
    AsIs,
    /// Some columns are left out: these are the indexes of the wire columns that are kept, in the
    /// order of the table's columns.
    Project(Vec<usize>),
}

/// A table that this consumer follows.
#[derive(Debug)]
pub(super) struct TrackedTable {
    pub spec: Arc<TableSpec>,
    /// Why the table is paused; its rows are ignored from then on.
    pub failure: Option<(String, Remedy)>,
    pub reported: bool,
}

/// Converts a row to another shape: dropped columns are left out, and new columns get the value
/// that older rows hold.
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

/// Returns whether a relation looks like the table as it is followed.
pub fn fits(spec: &TableSpec, relation: &Relation) -> bool {
    fit(spec, relation).is_ok()
}

pub(super) fn fit_or_stale(spec: &TableSpec, relation: &Relation) -> Follow {
    fit(spec, relation).unwrap_or_else(Follow::Stale)
}

/// Returns how the rows of a relation become rows of a table, or the difference between the two.
/// The table's name does not matter here.
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
        // With REPLICA IDENTITY FULL the wire flags every column; the key then comes from the
        // catalog (trap 49).
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
        // Only the columns that rows carry matter: default and index both send the key's columns.
        let sends_old_rows = |identity| matches!(identity, ReplicaIdentity::Full);
        if matches!(spec.key, Key::WholeRow)
            || sends_old_rows(relation.replica_identity) && spec.key == Key::AppendOnly
        {
            return Err("its replica identity is another".to_owned());
        }
    }

    Ok(if kept.len() == relation.columns.len() { Follow::AsIs } else { Follow::Project(kept) })
}

/// The meaning of a Relation message.
#[derive(Debug)]
pub enum SchemaResolution {
    /// The table has the shape in which it is followed.
    Same,
    /// The table has another shape, and so have its rows from here on.
    SchemaChange(Box<SchemaChange>),
    /// Only another copy makes the table equal to the source, for this reason; no row of the table
    /// counts before that copy.
    Copy(String),
}

/// A relation that is not followed, and whose changes were passed over.
#[derive(Debug, Clone)]
pub struct Untracked {
    pub relation: Relation,
    pub changes: u64,
    /// The commit LSN of the last of these changes.
    pub last_change: Lsn,
}

/// A Relation message that waits for its [`SchemaResolution`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemaQuery {
    pub relation: Relation,
    /// The commit LSN of the transaction in which the relation was described.
    pub commit_lsn: Lsn,
    /// The number of that transaction at the source; 0 between transactions.
    pub xid: u32,
    /// The description of the table that the source's event trigger sent at this position of the
    /// stream, if it sent one.
    pub description: Option<Description>,
    /// Whether the open transaction holds rows of the table in its old shape.
    pub has_open_rows: bool,
    /// Whether some of these rows were delivered already, as parts of the transaction.
    pub has_parts: bool,
}
