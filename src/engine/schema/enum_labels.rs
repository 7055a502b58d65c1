//! Labels of enums that came since the last look at the catalogs.
//!
//! The stream brings a label as it was called when the row was written, and says nothing of ALTER
//! TYPE .. RENAME VALUE. A label that was known before is compared by the `xmin` of its row. A
//! label that was added since may have been renamed before the first look at it: then older rows in
//! the copy have a name that the source no longer knows. Only the copy tells.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    change::TableSpec,
    source::catalog::{EnumLabel, Fingerprint},
    types::TypeCatalog,
};

/// What the copy of a table may hold in the columns of one enum.
#[derive(Debug, Clone)]
pub struct LabelCheck {
    pub table: Arc<TableSpec>,
    /// Indexes of the columns, which are the enum or arrays of it.
    pub columns: Vec<usize>,
    pub allowed: Vec<String>,
}

/// Returns the checks that prove that no label which came since `known` was renamed after rows of
/// `table` had it.
///
/// # Errors
/// No check could prove it: the enum is a part of another type.
pub fn label_checks(
    table: &Arc<TableSpec>,
    known: &Fingerprint,
    now: &Fingerprint,
    types: &TypeCatalog,
) -> Result<Vec<LabelCheck>, String> {
    let mut by_enum: BTreeMap<u32, Vec<(&EnumLabel, bool)>> = BTreeMap::new();
    for (oid, label) in &now.labels {
        let is_doubtful = !known.labels.contains_key(oid) && !label.is_original;
        by_enum.entry(label.type_oid).or_default().push((label, is_doubtful));
    }

    let mut checks = Vec::new();
    for (enum_oid, labels) in by_enum {
        let doubtful = labels.iter().filter(|(_, is_doubtful)| *is_doubtful).count();
        if doubtful == 0 {
            continue;
        }

        let mut columns = Vec::new();
        for (at, column) in table.columns.iter().enumerate() {
            if types.leaf_of(column.type_oid) == enum_oid {
                columns.push(at);
            } else if types.is_made_of(column.type_oid, enum_oid) {
                return Err(format!(
                    "column \"{}\" is made of an enum that got a label",
                    column.name
                ));
            }
        }

        // If one label is new, the source knows none of its earlier names. If several are new, one
        // may have been renamed and its old name given to another.
        let is_allowed = |is_doubtful: bool| !is_doubtful || doubtful == 1;

        let allowed = labels.iter().filter(|(_, is_doubtful)| is_allowed(*is_doubtful));
        let allowed = allowed.map(|(label, _)| label.name.clone()).collect();

        if !columns.is_empty() {
            checks.push(LabelCheck { table: Arc::clone(table), columns, allowed });
        }
    }
    Ok(checks)
}
