//! The changes of a column's type that stored values go through in place.
//!
//! PostgreSQL rewrites no row when the old value's bytes are a value of the new type. The two need
//! not print alike: `cidr` becomes `inet` and loses its netmask, `oid` becomes `regclass` and
//! prints a name. So only the changes that [`in_place`] lists are done in place, and tests prove
//! every entry of the list against the output of servers (`tests/it/type_pairs.rs`). For every
//! other change the table is copied again.

use super::{Kind, Mapping, TypeCatalog};

/// A column's type at the source, and how its values are stored.
#[derive(Debug, Clone, Copy)]
pub struct Typed<'a> {
    pub type_oid: u32,
    pub mapping: &'a Mapping,
}

/// How stored values become values of the new type, where the source did not rewrite the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InPlace {
    /// The stored values are values of the new type already.
    AsStored,
    /// DuckDB converts the values; the source prints rows of the old type as it prints rows of the
    /// new type.
    Converted,
    /// DuckDB converts the values, and the source prints rows of the old type differently: a row
    /// that arrived before the change, in the same transaction, cannot be read as a row of the new
    /// type.
    Reprinted,
}

const BIT: u32 = 1560;
const VARBIT: u32 = 1562;
const TEXT: u32 = 25;
const VARCHAR: u32 = 1043;
const BPCHAR: u32 = 1042;
const NUMERIC: u32 = 1700;
const TIMESTAMP: u32 = 1114;
const TIMESTAMPTZ: u32 = 1184;
/// The oids below are the server's own types, which are the same in every database.
const FIRST_USER_OID: u32 = 16384;

/// Returns how stored values of `before` become exactly those of `after`, in a table that was not
/// rewritten, or `None` when that is not proven. With `has_nulled`, values that the target could
/// not represent are stored as NULL, and the new type may be able to represent them.
pub fn in_place(
    before: Typed<'_>,
    after: Typed<'_>,
    catalog: &TypeCatalog,
    has_nulled: bool,
) -> Option<InPlace> {
    let from = without_domains(before.type_oid, catalog)?;
    let to = without_domains(after.type_oid, catalog)?;
    let is_stored_alike = before.mapping == after.mapping;

    if from == to && is_stored_alike {
        return Some(InPlace::AsStored);
    }
    let is_relabelled = |family: &[u32]| family.contains(&from) && family.contains(&to);
    if is_stored_alike
        && (is_text(from, catalog) && is_text(to, catalog) || is_relabelled(&[BIT, VARBIT]))
    {
        return Some(InPlace::AsStored);
    }

    match (&before.mapping.kind, &after.mapping.kind) {
        (Kind::Decimal { precision, scale }, Kind::Decimal { precision: wider, scale: same })
            if from == NUMERIC && to == NUMERIC && scale == same && precision <= wider =>
        {
            Some(InPlace::Converted)
        }
        // DECIMAL cannot represent NaN, and text can.
        (Kind::Decimal { .. }, Kind::Printed)
            if from == NUMERIC && to == NUMERIC && !has_nulled =>
        {
            Some(InPlace::Converted)
        }
        // The server skips the rewrite only where both values are one instant: in a session whose
        // zone is UTC.
        (Kind::Timestamp { .. }, Kind::Timestamp { .. })
            if is_relabelled(&[TIMESTAMP, TIMESTAMPTZ]) =>
        {
            Some(InPlace::Reprinted)
        }
        (
            Kind::List { element: inner, delimiter },
            Kind::List { element: outer, delimiter: same },
        ) if delimiter == same => {
            let inner = Typed { type_oid: element_of(from, catalog)?, mapping: inner };
            let outer = Typed { type_oid: element_of(to, catalog)?, mapping: outer };
            in_place(inner, outer, catalog, has_nulled).filter(|found| *found == InPlace::AsStored)
        }
        _ => None,
    }
}

/// Returns the type at the end of a chain of domains, or none for a user's type that the catalogs
/// no longer know.
fn without_domains(mut type_oid: u32, catalog: &TypeCatalog) -> Option<u32> {
    // The loop takes no more steps than there are types, so that it also ends for a domain over
    // itself.
    for _ in 0..=catalog.types.len() {
        match catalog.types.get(&type_oid) {
            Some(info) if info.kind == b'd' => type_oid = info.base_oid,
            Some(_) => return Some(type_oid),
            None => return (type_oid < FIRST_USER_OID).then_some(type_oid),
        }
    }
    None
}

fn element_of(type_oid: u32, catalog: &TypeCatalog) -> Option<u32> {
    catalog.types.get(&type_oid).map(|info| info.element_oid).filter(|&element| element != 0)
}

/// Returns whether the values of a type are their text. `name` is not such a type: its length is
/// fixed, so the server rewrites the rows.
fn is_text(type_oid: u32, catalog: &TypeCatalog) -> bool {
    [TEXT, VARCHAR, BPCHAR].contains(&type_oid)
        || catalog.types.get(&type_oid).is_some_and(|info| info.name == "citext")
}

impl Mapping {
    /// Returns SQL that turns a stored value into one of `after`, where [`in_place`] or the
    /// settings allow the exact conversion. The SQL means the same in every session and on every
    /// host, since DuckDB's log holds it and runs it again after a crash.
    pub fn conversion(&self, after: &Self, column: &str) -> String {
        let cast = format!("CAST({column} AS {})", after.target_type);
        match (&self.kind, &after.kind) {
            // DuckDB prints no digit before the point where no digit fits; the server prints a 0.
            (Kind::Decimal { precision, scale }, Kind::Printed)
                if i16::from(*precision) == i16::from(*scale) =>
            {
                format!(
                    "CASE WHEN {column} < 0 THEN '-0' || substr({cast}, 2) WHEN {column} >= 0 THEN \
                     '0' || {cast} END"
                )
            }
            // A cast would use the zone of the session, and AT TIME ZONE is milliseconds off for
            // distant years. The conversion by number is exact; infinity has no number.
            (Kind::Timestamp { with_zone: from }, Kind::Timestamp { with_zone: to })
                if from != to =>
            {
                let made = if *to { "make_timestamptz" } else { "make_timestamp" };
                format!("coalesce({made}(epoch_us({column})), {column} AT TIME ZONE 'UTC')")
            }
            _ => cast,
        }
    }
}
