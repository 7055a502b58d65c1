//! A table as a Relation message of the stream describes it.

use std::fmt;

/// A schema (namespace) and a name, exactly as PostgreSQL spells them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QualifiedName {
    pub schema: String,
    pub name: String,
}

impl QualifiedName {
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
    Default,
    Nothing,
    Full,
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
    pub oid: u32,
    pub name: QualifiedName,
    pub replica_identity: ReplicaIdentity,
    pub columns: Vec<RelationColumn>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    pub name: String,
    pub type_oid: u32,
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
