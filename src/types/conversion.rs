//! Which changes of a column's type stored values go through in place.
//!
//! PostgreSQL rewrites no row when the old value's bytes are a value of the new type. That does not
//! mean that they print alike: `cidr` becomes `inet` and loses its netmask, `oid` becomes
//! `regclass` and prints a name. So in place is only what [`in_place`] lists, and every entry of it
//! is proven against what servers print (`tests/it/type_pairs.rs`). Everything else is copied
//! again.

use super::{Kind, Mapping, TypeCatalog};

/// A column's type at the source, and how its values are stored.
#[derive(Debug, Clone, Copy)]
pub struct Typed<'a> {
    pub type_oid: u32,
    pub mapping: &'a Mapping,
}

/// How stored values become those of the new type, where the source did not rewrite the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InPlace {
    /// They are those of the new type already.
    AsStored,
    /// DuckDB converts them; the source prints rows of the old type as it prints those of the new
    /// one.
    Converted,
    /// DuckDB converts them, and the source prints rows of the old type otherwise: a row that came
    /// before the change, in the same transaction, cannot be read as one of the new type.
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
/// Types below are the server's own, and are what they are in every database.
const FIRST_USER_OID: u32 = 16384;

/// Whether stored values of `before` become exactly those of `after`, in a table that was not
/// rewritten. `None`: that is not proven. `has_nulled`: values that the target has no room for are
/// stored as NULL, and may have room now.
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
        // NaN has no room in DECIMAL, and has in text.
        (Kind::Decimal { .. }, Kind::Printed)
            if from == NUMERIC && to == NUMERIC && !has_nulled =>
        {
            Some(InPlace::Converted)
        }
        // The server does without a rewrite only where both are one instant: in a session whose
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

/// The type that a chain of domains ends at. None: a type of a user that the catalogs no longer
/// know.
fn without_domains(mut type_oid: u32, catalog: &TypeCatalog) -> Option<u32> {
    // No more steps than there are types, so that a domain over itself ends too.
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

/// Types whose values are their text. `name` is not among them: it is of a fixed length, so the
/// server rewrites.
fn is_text(type_oid: u32, catalog: &TypeCatalog) -> bool {
    [TEXT, VARCHAR, BPCHAR].contains(&type_oid)
        || catalog.types.get(&type_oid).is_some_and(|info| info.name == "citext")
}

impl Mapping {
    /// SQL that turns a stored value into one of `after`, where [`in_place`] or the settings say
    /// that this is exact. It means the same in every session and on every host, since DuckDB's log
    /// holds it and runs it again after a crash.
    pub fn conversion(&self, after: &Self, column: &str) -> String {
        let cast = format!("CAST({column} AS {})", after.target_type);
        match (&self.kind, &after.kind) {
            // DuckDB prints no digit before the point where there cannot be one; the server prints
            // a 0.
            (Kind::Decimal { precision, scale }, Kind::Printed)
                if i16::from(*precision) == i16::from(*scale) =>
            {
                format!(
                    "CASE WHEN {column} < 0 THEN '-0' || substr({cast}, 2) WHEN {column} >= 0 THEN \
                     '0' || {cast} END"
                )
            }
            // A cast would be by the zone of the session, and AT TIME ZONE is milliseconds off
            // where years are many. By number it is exact; infinity has none.
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
