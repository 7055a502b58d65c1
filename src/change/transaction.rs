//! A source transaction that is still open: the changes it has made so far.

use std::collections::BTreeSet;

use super::{SchemaChange, arena::Slice, net_effect::OldRow};
use crate::Lsn;

/// A transaction that has begun and is not committed yet.
#[derive(Debug)]
pub(super) struct OpenTransaction {
    pub(super) commit_lsn: Lsn,
    pub(super) xid: u32,
    /// Whether the target holds the transaction already, so that its changes are read and dropped.
    pub(super) skip: bool,
    pub(super) changes: Vec<Change>,
    /// The shapes that tables took inside the transaction.
    pub(super) schema_changes: Vec<SchemaChange>,
    /// The tables whose rows were already delivered in parts.
    pub(super) parted: BTreeSet<u32>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    Insert {
        table: u32,
        new: Slice,
    },
    Update {
        table: u32,
        old: OldRow,
        new: Slice,
    },
    Delete {
        table: u32,
        old: OldRow,
    },
    Truncate {
        table: u32,
    },
    /// The table cannot be followed from here on.
    Fail {
        table: u32,
    },
}

impl Change {
    pub(super) fn table(&self) -> u32 {
        let (Self::Insert { table, .. }
        | Self::Update { table, .. }
        | Self::Delete { table, .. }
        | Self::Truncate { table }
        | Self::Fail { table }) = *self;
        table
    }

    /// Returns every row that the change holds.
    pub(super) fn rows(&mut self) -> impl Iterator<Item = &mut Slice> {
        let (new, old) = match self {
            Self::Insert { new, .. } => (Some(new), None),
            Self::Update { new, old, .. } => (Some(new), Some(old)),
            Self::Delete { old, .. } => (None, Some(old)),
            Self::Truncate { .. } | Self::Fail { .. } => (None, None),
        };

        let old = old.and_then(|old| match old {
            OldRow::Key(row) | OldRow::Full(row) => Some(row),
            OldRow::Absent => None,
        });
        new.into_iter().chain(old)
    }
}
