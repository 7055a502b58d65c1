//! One Postgres type = one row of the mapping + one decoder.
//!
//! [`map_column`] decides, from the catalog's description of a type and an optional override, how a
//! column is staged (Arrow), stored (DuckDB) and decoded (text from the stream, binary from COPY).
//! `builder` decodes one column; both formats give the same cell. What has no decoder of its own is
//! kept as the text that the server prints, which loses nothing.

mod builder;
mod conversion;
pub mod datetime;
pub mod numeric;
mod text;
mod variant;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use serde::{Deserialize, Serialize};

pub use builder::ColumnBuilder;
pub use conversion::{InPlace, Typed, in_place};

/// `pg_type`, as far as a value's text and binary form depend on it.
#[derive(Debug, Clone)]
pub struct TypeInfo {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// `typtype`: `b` base, `c` composite, `d` domain, `e` enum, `p` pseudo, `r` range, `m`
    /// multirange.
    pub kind: u8,
    /// `typcategory`; `A` for arrays.
    pub category: u8,
    /// `typelem` of a true array type (`typsubscript = array_subscript_handler`), else 0.
    pub element_oid: u32,
    /// `typdelim` of this type as an element (`;` for box, `,` for all others).
    pub delimiter: u8,
    /// `typbasetype` of a domain, else 0.
    pub base_oid: u32,
    /// `typtypmod` of a domain, else -1.
    pub base_typmod: i32,
    /// `typndims` of a domain over an array, else 0.
    pub base_ndims: i32,
    /// `rngsubtype` of a range, else 0.
    pub range_of: u32,
    /// Attributes of a composite, in order.
    pub fields: Vec<FieldInfo>,
}

/// One attribute of a composite type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldInfo {
    pub name: String,
    pub type_oid: u32,
    pub typmod: i32,
    pub ndims: i32,
}

/// The types that the published columns use, and all that those are made of.
#[derive(Debug, Clone, Default)]
pub struct TypeCatalog {
    pub types: HashMap<u32, TypeInfo>,
    /// Digits after the point of `money` under the pinned `lc_monetary=C` (2).
    pub money_scale: u8,
}

impl TypeCatalog {
    /// What is left of a type without its domains and arrays.
    pub fn leaf_of(&self, mut type_oid: u32) -> u32 {
        // No more steps than there are types, so that a type over itself ends too.
        for _ in 0..self.types.len() {
            match self.types.get(&type_oid) {
                Some(info) if info.kind == b'd' => type_oid = info.base_oid,
                Some(info) if info.element_oid != 0 => type_oid = info.element_oid,
                _ => break,
            }
        }
        type_oid
    }

    /// Whether values of a type hold values of `part`, however deep.
    pub fn is_made_of(&self, type_oid: u32, part: u32) -> bool {
        let (mut open, mut seen) = (vec![type_oid], HashSet::new());
        while let Some(oid) = open.pop() {
            if oid == part {
                return true;
            }
            if let Some(info) = self.types.get(&oid).filter(|_| seen.insert(oid)) {
                open.extend([info.base_oid, info.element_oid, info.range_of]);
                open.extend(info.fields.iter().map(|field| field.type_oid));
            }
        }
        false
    }
}

/// What `map_column` needs to know of a column.
#[derive(Debug, Clone, Copy)]
pub struct ColumnType<'a> {
    pub type_oid: u32,
    pub typmod: i32,
    /// `attndims`: declared dimensions, 0 when the column is no array.
    pub ndims: i32,
    /// `columns.NAME.type` of the settings: a DuckDB type.
    pub override_type: Option<&'a str>,
}

/// An override that the column's type cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("type {from} cannot be stored as {wanted}\nhint: possible are {possible}")]
pub struct MappingError {
    pub from: String,
    pub wanted: String,
    pub possible: String,
}

/// How a value is decoded. Stored in `_rhei.columns`, so that a copy is read as it was written even
/// when the type is gone at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Bool,
    Int2,
    Int4,
    Int8,
    /// oid, xid, cid.
    #[serde(rename = "uint4")]
    UInt4,
    /// xid8.
    #[serde(rename = "uint8")]
    UInt8,
    Float4,
    Float8,
    /// numeric that fits DuckDB's DECIMAL.
    Decimal {
        precision: u8,
        scale: i8,
    },
    /// numeric as DOUBLE, on request.
    NumericDouble,
    Money {
        scale: i8,
    },
    Date,
    Timestamp {
        with_zone: bool,
    },
    Time,
    Interval,
    Uuid,
    Bytes,
    /// Text that COPY BINARY sends as it is.
    Text,
    /// jsonb: text after a version byte.
    Jsonb,
    /// What only the type's output function can print.
    Printed,
    /// Printed, then cast by DuckDB from this type: VARIANT and TIMETZ have no Arrow form.
    Cast {
        from: String,
    },
    List {
        element: Box<Mapping>,
        delimiter: u8,
    },
    /// A composite as STRUCT, on request.
    Struct {
        fields: Vec<(String, Mapping)>,
    },
    /// A range as STRUCT, on request.
    Range {
        bound: Box<Mapping>,
    },
    /// hstore as MAP, on request.
    Hstore,
}

/// How one column is staged, stored and decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The column's type in DuckDB, as it is written in CREATE TABLE.
    pub target_type: String,
    kind: Kind,
}

/// A value that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not what the server prints for this type: a broken server or our mistake.
    #[error("\"{shown}\" is not a value of {expected}")]
    Malformed { expected: &'static str, shown: String },
    #[error(
        "{what} cannot be stored as {target_type}\nhint: set type = \"VARCHAR\" for this column in \
         its [tables.\"..\".columns] section, or [sync] on_unrepresentable = \"null\""
    )]
    NotRepresentable { what: String, target_type: String },
    #[error("a value is not valid UTF-8")]
    NotUtf8,
}

impl ValueError {
    fn malformed(expected: &'static str, bytes: &[u8]) -> Self {
        const SHOWN: usize = 40;
        let shown = String::from_utf8_lossy(bytes.get(..SHOWN).unwrap_or(bytes)).into_owned();
        Self::Malformed { expected, shown }
    }

    /// On one line, with the row it is of.
    pub fn at(&self, row: &str) -> String {
        format!("{}{row}", self.to_string().lines().next().unwrap_or_default())
    }

    /// A legal value that the target's type has no room for: what `[sync] on_unrepresentable` is
    /// about.
    pub fn is_unrepresentable(&self) -> bool {
        matches!(self, Self::NotRepresentable { .. })
    }
}

fn mapping(target_type: impl Into<String>, kind: Kind) -> Mapping {
    Mapping { target_type: target_type.into(), kind }
}

/// The mapping of a column.
///
/// # Errors
/// The override is not one that the type can have.
pub fn map_column(column: &ColumnType<'_>, catalog: &TypeCatalog) -> Result<Mapping, MappingError> {
    let (oid, typmod, ndims) =
        without_domains(column.type_oid, column.typmod, column.ndims, catalog);
    let natural = natural(oid, typmod, ndims, catalog, DEEPEST);
    let Some(wanted) = column.override_type else { return Ok(natural) };
    let folded = wanted.trim().to_uppercase();
    if folded == natural.target_type {
        return Ok(natural);
    }
    let (chosen, possible) = on_request(&folded, oid, &natural, catalog);
    chosen.ok_or_else(|| {
        let named = catalog.types.get(&column.type_oid).map(|info| info.name.clone());
        MappingError {
            from: named.unwrap_or_else(|| format!("with oid {oid}")),
            wanted: wanted.to_owned(),
            possible: possible.join(", "),
        }
    })
}

/// The mapping that an override asks for, and all that could be asked for.
fn on_request(
    wanted: &str,
    oid: u32,
    natural: &Mapping,
    catalog: &TypeCatalog,
) -> (Option<Mapping>, Vec<String>) {
    let as_text = match natural.kind {
        // Both forms of json are text on the stream; the binary form of jsonb is not.
        Kind::Text | Kind::Printed | Kind::Jsonb => natural.kind.clone(),
        _ => Kind::Printed,
    };
    let mut possible = vec![natural.target_type.clone()];
    if natural.target_type != "VARCHAR" {
        possible.push("VARCHAR".to_owned());
    }
    if matches!(wanted, "VARCHAR" | "TEXT") {
        return (Some(mapping("VARCHAR", as_text)), possible);
    }
    let info = catalog.types.get(&oid);
    let richer: Option<(&str, Mapping)> = match (oid, info) {
        (NUMERIC, _) => {
            possible.push("DECIMAL(p,s)".to_owned());
            if let Some((precision, scale)) = decimal_type(wanted) {
                let decimal = mapping(
                    format!("DECIMAL({precision},{scale})"),
                    Kind::Decimal { precision, scale },
                );
                return (Some(decimal), possible);
            }
            Some(("DOUBLE", mapping("DOUBLE", Kind::NumericDouble)))
        }
        (JSON | JSONB, _) => {
            Some(("VARIANT", mapping("VARIANT", Kind::Cast { from: "JSON".to_owned() })))
        }
        (TIMETZ, _) => Some((
            "TIMETZ",
            mapping("TIME WITH TIME ZONE", Kind::Cast { from: "VARCHAR".to_owned() }),
        )),
        (_, Some(info)) if info.kind == b'c' && !info.fields.is_empty() => {
            let fields: Vec<(String, Mapping)> = info
                .fields
                .iter()
                .map(|field| {
                    (
                        field.name.clone(),
                        inner(field.type_oid, field.typmod, field.ndims, catalog, DEEPEST),
                    )
                })
                .collect();
            let list = fields
                .iter()
                .map(|(name, field)| format!("{} {}", quoted(name), field.target_type));
            let target_type = format!("STRUCT({})", list.collect::<Vec<_>>().join(", "));
            Some(("STRUCT", mapping(target_type, Kind::Struct { fields })))
        }
        (_, Some(info)) if info.kind == b'r' && info.range_of != 0 => {
            let bound = inner(info.range_of, -1, 0, catalog, DEEPEST);
            let of = &bound.target_type;
            let target_type = format!(
                "STRUCT(\"lower\" {of}, \"upper\" {of}, lower_inclusive BOOLEAN, upper_inclusive \
                 BOOLEAN, is_empty BOOLEAN)"
            );
            Some(("STRUCT", mapping(target_type, Kind::Range { bound: Box::new(bound) })))
        }
        (_, Some(info)) if info.name == "hstore" => {
            Some(("MAP", mapping("MAP(VARCHAR, VARCHAR)", Kind::Hstore)))
        }
        _ => None,
    };
    let chosen = richer.and_then(|(word, richer)| {
        possible.push(word.to_owned());
        (word == wanted || richer.target_type.to_uppercase() == wanted).then_some(richer)
    });
    (chosen, possible)
}

/// How often an array may be the element of another, by a domain in between. What is deeper is kept
/// as text. No server has a type that is made of itself, but the catalogs of a broken one might say
/// so.
const DEEPEST: u8 = 4;

/// A domain is stored as what it is made of, however deep.
fn without_domains(
    mut oid: u32,
    mut typmod: i32,
    mut ndims: i32,
    catalog: &TypeCatalog,
) -> (u32, i32, i32) {
    // No more steps than there are types, so that a domain over itself ends too.
    for _ in 0..catalog.types.len() {
        let Some(domain) = catalog.types.get(&oid).filter(|info| info.kind == b'd') else { break };
        (oid, typmod, ndims) = (domain.base_oid, domain.base_typmod, domain.base_ndims);
    }
    (oid, typmod, ndims)
}

/// The natural mapping of what a type is made of.
fn inner(type_oid: u32, typmod: i32, ndims: i32, catalog: &TypeCatalog, depth: u8) -> Mapping {
    let (oid, typmod, ndims) = without_domains(type_oid, typmod, ndims, catalog);
    natural(oid, typmod, ndims, catalog, depth)
}

const NUMERIC: u32 = 1700;
const JSON: u32 = 114;
const JSONB: u32 = 3802;
const TIMETZ: u32 = 1266;

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn decimal_type(text: &str) -> Option<(u8, i8)> {
    let inner = text.strip_prefix("DECIMAL(")?.strip_suffix(')')?;
    let (precision, scale) = inner.split_once(',')?;
    let (precision, scale): (u8, i8) = (precision.trim().parse().ok()?, scale.trim().parse().ok()?);
    ((1..=38).contains(&precision) && (0..=precision as i8).contains(&scale))
        .then_some((precision, scale))
}

/// The type table: lossless, whatever the value, or refused when it comes.
fn natural(oid: u32, typmod: i32, ndims: i32, catalog: &TypeCatalog, depth: u8) -> Mapping {
    let named =
        |name: &str| mapping("VARCHAR", if name == "citext" { Kind::Text } else { Kind::Printed });
    match oid {
        16 => mapping("BOOLEAN", Kind::Bool),
        21 => mapping("SMALLINT", Kind::Int2),
        23 => mapping("INTEGER", Kind::Int4),
        20 => mapping("BIGINT", Kind::Int8),
        26 | 28 | 29 => mapping("UINTEGER", Kind::UInt4),
        5069 => mapping("UBIGINT", Kind::UInt8),
        700 => mapping("FLOAT", Kind::Float4),
        701 => mapping("DOUBLE", Kind::Float8),
        NUMERIC => match numeric::decimal_of(typmod) {
            Some((precision, scale)) => {
                mapping(format!("DECIMAL({precision},{scale})"), Kind::Decimal { precision, scale })
            }
            None => mapping("VARCHAR", Kind::Printed),
        },
        790 => {
            let scale = i8::try_from(catalog.money_scale).unwrap_or(2);
            mapping(format!("DECIMAL(19,{scale})"), Kind::Money { scale })
        }
        1082 => mapping("DATE", Kind::Date),
        1114 => mapping("TIMESTAMP", Kind::Timestamp { with_zone: false }),
        1184 => mapping("TIMESTAMP WITH TIME ZONE", Kind::Timestamp { with_zone: true }),
        1083 => mapping("TIME", Kind::Time),
        1186 => mapping("INTERVAL", Kind::Interval),
        2950 => mapping("UUID", Kind::Uuid),
        17 => mapping("BLOB", Kind::Bytes),
        // text, varchar, bpchar (padding kept), name, unknown. Not xml: its binary form adds an
        // encoding.
        25 | 1043 | 1042 | 19 | 705 => mapping("VARCHAR", Kind::Text),
        // int2vector and oidvector are arrays to the catalog, but print without braces.
        22 | 30 => mapping("VARCHAR", Kind::Printed),
        JSON => mapping("JSON", Kind::Text),
        JSONB => mapping("JSON", Kind::Jsonb),
        _ => match catalog.types.get(&oid) {
            // Labels are sent as they are.
            Some(info) if info.kind == b'e' => mapping("VARCHAR", Kind::Text),
            Some(info) if info.element_oid != 0 && depth > 0 => {
                let delimiter =
                    catalog.types.get(&info.element_oid).map_or(b',', |element| element.delimiter);
                let mut list = inner(info.element_oid, typmod, 0, catalog, depth - 1);
                for _ in 0..ndims.clamp(1, 6) {
                    list = mapping(
                        format!("{}[]", list.target_type),
                        Kind::List { element: Box::new(list), delimiter },
                    );
                }
                list
            }
            Some(info) => named(&info.name),
            None => mapping("VARCHAR", Kind::Printed),
        },
    }
}

impl Mapping {
    /// The Arrow type under which values are staged.
    pub fn arrow_type(&self) -> DataType {
        match &self.kind {
            Kind::Bool => DataType::Boolean,
            Kind::Int2 => DataType::Int16,
            Kind::Int4 => DataType::Int32,
            Kind::Int8 => DataType::Int64,
            Kind::UInt4 => DataType::UInt32,
            Kind::UInt8 => DataType::UInt64,
            Kind::Float4 => DataType::Float32,
            Kind::Float8 | Kind::NumericDouble => DataType::Float64,
            Kind::Decimal { precision, scale } => DataType::Decimal128(*precision, *scale),
            Kind::Money { scale } => DataType::Decimal128(19, *scale),
            Kind::Date => DataType::Date32,
            Kind::Timestamp { with_zone } => {
                DataType::Timestamp(TimeUnit::Microsecond, with_zone.then(|| "UTC".into()))
            }
            Kind::Time => DataType::Time64(TimeUnit::Microsecond),
            Kind::Interval => DataType::Struct(interval_fields()),
            Kind::Uuid => DataType::FixedSizeBinary(16),
            Kind::Bytes => DataType::Binary,
            Kind::Text | Kind::Jsonb | Kind::Printed | Kind::Cast { .. } => DataType::Utf8,
            Kind::List { element, .. } => DataType::List(Arc::new(element.field("item"))),
            Kind::Struct { fields } => {
                DataType::Struct(fields.iter().map(|(name, field)| field.field(name)).collect())
            }
            Kind::Range { bound } => DataType::Struct(range_fields(bound)),
            Kind::Hstore => {
                DataType::List(Arc::new(Field::new("item", DataType::Struct(entry_fields()), true)))
            }
        }
    }

    /// The Arrow field under which values are staged.
    pub fn field(&self, name: &str) -> Field {
        let field = Field::new(name, self.arrow_type(), true);
        let extension = match &self.kind {
            // Without it a UUID would arrive as BLOB (trap 77).
            Kind::Uuid => "arrow.uuid",
            // It was JSON at the source, so DuckDB need not parse it to believe it.
            Kind::Cast { from } if from == "JSON" => "arrow.json",
            Kind::Text | Kind::Jsonb if self.target_type == "JSON" => "arrow.json",
            _ => return field,
        };
        field.with_metadata(HashMap::from([(
            "ARROW:extension:name".to_owned(),
            extension.to_owned(),
        )]))
    }

    /// Whether a staged value is the target's value as it is.
    pub fn is_staged_as_it_is(&self) -> bool {
        match &self.kind {
            Kind::Interval | Kind::Cast { .. } | Kind::Hstore => false,
            Kind::List { element, .. } | Kind::Range { bound: element } => {
                element.is_staged_as_it_is()
            }
            Kind::Struct { fields } => fields.iter().all(|(_, field)| field.is_staged_as_it_is()),
            _ => true,
        }
    }

    /// Type of a staging column. Intervals differ from the target: as Arrow intervals, NULLs would
    /// arrive as zero (trap 77).
    pub fn stage_type(&self) -> String {
        match &self.kind {
            Kind::Interval => "STRUCT(months INTEGER, days INTEGER, micros BIGINT)".to_owned(),
            Kind::Cast { from } => from.clone(),
            Kind::Hstore => "STRUCT(key VARCHAR, value VARCHAR)[]".to_owned(),
            _ if self.is_staged_as_it_is() => self.target_type.clone(),
            Kind::List { element, .. } => format!("{}[]", element.stage_type()),
            Kind::Range { bound } => {
                let of = bound.stage_type();
                format!(
                    "STRUCT(\"lower\" {of}, \"upper\" {of}, lower_inclusive BOOLEAN, \
                     upper_inclusive BOOLEAN, is_empty BOOLEAN)"
                )
            }
            Kind::Struct { fields } => {
                let list = fields
                    .iter()
                    .map(|(name, field)| format!("{} {}", quoted(name), field.stage_type()));
                format!("STRUCT({})", list.collect::<Vec<_>>().join(", "))
            }
            _ => self.target_type.clone(),
        }
    }

    /// SQL that turns a staging column into the target's type.
    pub fn stage_expr(&self, column: &str) -> String {
        let part = |name: &str| format!("struct_extract({column}, '{}')", name.replace('\'', "''"));
        let packed = |parts: Vec<String>| {
            format!(
                "CASE WHEN {column} IS NULL THEN NULL ELSE struct_pack({}) END",
                parts.join(", ")
            )
        };
        match &self.kind {
            _ if self.is_staged_as_it_is() => column.to_owned(),
            // `months` is never NULL inside a value.
            Kind::Interval => format!(
                "CASE WHEN {column}.months IS NULL THEN NULL ELSE to_months({column}.months) + \
                 to_days({column}.days) + \
                 to_microseconds({column}.micros) END"
            ),
            Kind::Cast { .. } => format!("CAST({column} AS {})", self.target_type),
            Kind::Hstore => format!("map_from_entries({column})"),
            Kind::List { element, .. } => {
                // Nested lists need a name of their own each.
                let item = format!("e{}", self.target_type.matches("[]").count());
                format!("list_transform({column}, lambda {item}: {})", element.stage_expr(&item))
            }
            Kind::Struct { fields } => packed(
                fields
                    .iter()
                    .map(|(name, field)| {
                        format!("{} := {}", quoted(name), field.stage_expr(&part(name)))
                    })
                    .collect(),
            ),
            Kind::Range { bound } => packed(
                ["lower", "upper"]
                    .iter()
                    .map(|name| format!("{} := {}", quoted(name), bound.stage_expr(&part(name))))
                    .chain(RANGE_FLAGS.iter().map(|name| format!("{name} := {}", part(name))))
                    .collect(),
            ),
            _ => column.to_owned(),
        }
    }

    /// Whether COPY BINARY's form of the type is decoded here.
    pub fn has_binary(&self) -> bool {
        !matches!(
            self.kind,
            Kind::Printed
                | Kind::List { .. }
                | Kind::NumericDouble
                | Kind::Cast { .. }
                | Kind::Struct { .. }
                | Kind::Range { .. }
                | Kind::Hstore
        )
    }

    /// What COPY selects. Where only the output function can print the type, its text:
    /// `format('%s')` calls it, a cast to text would not (trap 22).
    pub fn copy_select(&self, column: &str) -> String {
        if self.has_binary() {
            column.to_owned()
        } else {
            // `IS NULL` would also be true of a row of NULLs.
            format!(
                "CASE WHEN {column} IS NOT DISTINCT FROM NULL THEN NULL ELSE \
                 pg_catalog.format('%s', {column}) END"
            )
        }
    }

    /// Whether every value has one exact counterpart in `other`, were the source's table rewritten
    /// by a plain cast: what `[sync] trust_widening` is about.
    pub fn widens_to(&self, other: &Self) -> bool {
        let rank = |kind: &Kind| match kind {
            Kind::Int2 => Some(1),
            Kind::Int4 => Some(2),
            Kind::Int8 => Some(3),
            _ => None,
        };
        match (rank(&self.kind), rank(&other.kind)) {
            (Some(from), Some(to)) => from <= to,
            _ => matches!((&self.kind, &other.kind), (Kind::Float4, Kind::Float8)),
        }
    }
}

fn interval_fields() -> Fields {
    Fields::from(vec![
        Field::new("months", DataType::Int32, true),
        Field::new("days", DataType::Int32, true),
        Field::new("micros", DataType::Int64, true),
    ])
}

const RANGE_FLAGS: [&str; 3] = ["lower_inclusive", "upper_inclusive", "is_empty"];

fn range_fields(bound: &Mapping) -> Fields {
    let flags = RANGE_FLAGS.iter().map(|name| Field::new(*name, DataType::Boolean, true));
    [bound.field("lower"), bound.field("upper")].into_iter().chain(flags).collect()
}

fn entry_fields() -> Fields {
    Fields::from(vec![
        Field::new("key", DataType::Utf8, true),
        Field::new("value", DataType::Utf8, true),
    ])
}

/// The Arrow schema of a table's columns.
pub fn schema_of<'a>(columns: impl Iterator<Item = (&'a str, &'a Mapping)>) -> SchemaRef {
    Arc::new(Schema::new(columns.map(|(name, mapping)| mapping.field(name)).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_are_made_of_themselves_end_as_text() {
        let info = |oid: u32, kind: u8, base_oid: u32, element_oid: u32| TypeInfo {
            oid,
            schema: "public".to_owned(),
            name: format!("t{oid}"),
            kind,
            category: b'U',
            element_oid,
            delimiter: b',',
            base_oid,
            base_typmod: -1,
            base_ndims: 1,
            range_of: 0,
            fields: Vec::new(),
        };
        // A domain over itself, two over each other, an array of itself, an array of a domain over
        // it.
        let types = [
            info(1000, b'd', 1000, 0),
            info(1001, b'd', 1002, 0),
            info(1002, b'd', 1001, 0),
            info(1003, b'b', 0, 1003),
            info(1004, b'b', 0, 1005),
            info(1005, b'd', 1004, 0),
        ];
        let catalog = TypeCatalog {
            types: types.into_iter().map(|info| (info.oid, info)).collect(),
            money_scale: 2,
        };
        let target_type = |type_oid| {
            let column = ColumnType { type_oid, typmod: -1, ndims: 6, override_type: None };
            map_column(&column, &catalog).unwrap().target_type
        };
        assert_eq!(["VARCHAR"; 3].map(str::to_owned), [1000, 1001, 1002].map(target_type));
        for made_of_itself in [1003, 1004] {
            assert!(
                target_type(made_of_itself).starts_with("VARCHAR[]"),
                "{}",
                target_type(made_of_itself)
            );
        }
    }
}
