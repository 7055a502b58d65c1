//! A table as a Relation message of the stream describes it.

#![deny(missing_docs)]

use std::fmt;

/// A schema (namespace) and a name, exactly as PostgreSQL spells them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QualifiedName {
    /// The schema of the table, without quotes.
    pub schema: String,
    /// The name of the table within its schema, without quotes.
    pub name: String,
}

impl QualifiedName {
    /// Makes a name of its parts, which are neither unquoted nor folded to lower case.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }
}

/// Prints `schema.name`, unquoted, for people.
impl fmt::Display for QualifiedName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.schema, self.name)
    }
}

/// The part of the old row that the source logs at UPDATE and DELETE (`pg_class.relreplident`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The columns of the primary key; no column when the table has no primary key.
    Default,
    /// No column: the source refuses to update or delete rows of the table while it is published.
    Nothing,
    /// All columns.
    Full,
    /// The columns of the unique index that REPLICA IDENTITY USING INDEX names.
    Index,
}

impl ReplicaIdentity {
    /// Reads the byte of the catalog and the wire: `d`, `n`, `f`, `i`.
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            b'd' => Some(Self::Default),
            b'n' => Some(Self::Nothing),
            b'f' => Some(Self::Full),
            b'i' => Some(Self::Index),
            _ => None,
        }
    }

    /// Returns the byte that [`Self::from_code`] reads.
    pub fn code(self) -> u8 {
        match self {
            Self::Default => b'd',
            Self::Nothing => b'n',
            Self::Full => b'f',
            Self::Index => b'i',
        }
    }
}

/// A Relation message: the table as the walsender describes it before its next row. The message has
/// no attnum, no NOT NULL, no default (trap 64).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// The oid of the table at the source, by which its row changes name it.
    pub oid: u32,
    /// The name of the table at this position of the stream.
    pub name: QualifiedName,
    /// The replica identity of the table at this position of the stream.
    pub replica_identity: ReplicaIdentity,
    /// The columns that are published, in the order in which tuples hold their values.
    pub columns: Vec<RelationColumn>,
}

/// A column as a Relation message describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    /// The name of the column at the source.
    pub name: String,
    /// The oid of the column's type at the source.
    pub type_oid: u32,
    /// The type modifier, such as the length of a varchar; -1 when the column has none.
    pub typmod: i32,
    /// Whether the column is part of the replica identity. With REPLICA IDENTITY FULL every column
    /// is (trap 49).
    pub is_key: bool,
}

impl Relation {
    /// Returns about how many bytes of memory the relation takes.
    pub fn bytes(&self) -> usize {
        let columns =
            self.columns.iter().map(|column| size_of::<RelationColumn>() + column.name.len());
        size_of::<Self>() + self.name.schema.len() + self.name.name.len() + columns.sum::<usize>()
    }
}
