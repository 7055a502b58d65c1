//! One Postgres type = one row of the mapping + one decoder.
//!
//! [`map_column`] decides, from the catalog's description of a type and an optional override, how a
//! column is staged (Arrow), stored (DuckDB) and decoded (text from the stream, binary from COPY).
//! `builder` decodes one column; both formats give the same cell. A type without a decoder of its
//! own is stored as the text that the server prints, which loses nothing.

mod builder;
mod catalog;
mod conversion;
pub mod datetime;
mod error;
mod mapping;
pub mod numeric;
pub mod pg_print;
mod text;
mod variant;

use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};

use self::mapping::Kind;

pub use builder::ColumnBuilder;
pub use catalog::{FieldInfo, TypeCatalog, TypeInfo};
pub use conversion::{InPlace, Typed, in_place};
pub use error::ValueError;
pub use mapping::Mapping;

/// The properties of a column that `map_column` reads.
#[derive(Debug, Clone, Copy)]
pub struct ColumnType<'a> {
    pub type_oid: u32,
    pub typmod: i32,
    /// The value of `attndims`: declared dimensions, 0 when the column is no array.
    pub ndims: i32,
    /// The setting `columns.NAME.type`: a DuckDB type.
    pub override_type: Option<&'a str>,
}

/// An override that the column's type does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("type {from} cannot be stored as {wanted}\nhint: possible are {possible}")]
pub struct MappingError {
    pub from: String,
    pub wanted: String,
    pub possible: String,
}

fn mapping(target_type: impl Into<String>, kind: Kind) -> Mapping {
    Mapping { target_type: target_type.into(), kind }
}

/// Returns the mapping of a column.
///
/// # Errors
/// The type does not allow the override.
pub fn map_column(column: &ColumnType<'_>, catalog: &TypeCatalog) -> Result<Mapping, MappingError> {
    let (oid, typmod, ndims) =
        without_domains(column.type_oid, column.typmod, column.ndims, catalog);

    let natural = natural(oid, typmod, ndims, catalog, MAX_DEPTH);
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

/// Returns the mapping that an override requests, and all types that an override may request.
fn on_request(
    wanted: &str,
    oid: u32,
    natural: &Mapping,
    catalog: &TypeCatalog,
) -> (Option<Mapping>, Vec<String>) {
    let mut possible = vec![natural.target_type.clone()];
    if natural.target_type != "VARCHAR" {
        possible.push("VARCHAR".to_owned());
    }

    if matches!(wanted, "VARCHAR" | "TEXT") {
        return (Some(natural.as_text()), possible);
    }

    if oid == NUMERIC {
        possible.push("DECIMAL(p,s)".to_owned());
        if let Some((precision, scale)) = decimal_type(wanted) {
            let decimal = mapping(
                format!("DECIMAL({precision},{scale})"),
                Kind::Decimal { precision, scale },
            );
            return (Some(decimal), possible);
        }
    }

    let chosen = richer(oid, catalog).and_then(|(word, richer)| {
        possible.push(word.to_owned());
        (word == wanted || richer.target_type.to_uppercase() == wanted).then_some(richer)
    });

    (chosen, possible)
}

/// Returns the word that requests another mapping of a type than the natural one or text, and this
/// mapping.
fn richer(oid: u32, catalog: &TypeCatalog) -> Option<(&'static str, Mapping)> {
    match (oid, catalog.types.get(&oid)) {
        (NUMERIC, _) => Some(("DOUBLE", mapping("DOUBLE", Kind::NumericDouble))),
        (JSON | JSONB, _) => {
            Some(("VARIANT", mapping("VARIANT", Kind::Cast { from: "JSON".to_owned() })))
        }
        (TIMETZ, _) => Some((
            "TIMETZ",
            mapping("TIME WITH TIME ZONE", Kind::Cast { from: "VARCHAR".to_owned() }),
        )),
        (_, Some(info)) if info.kind == b'c' && !info.fields.is_empty() => {
            Some(("STRUCT", struct_of_composite(&info.fields, catalog)))
        }
        (_, Some(info)) if info.kind == b'r' && info.range_of != 0 => {
            Some(("STRUCT", struct_of_range(info.range_of, catalog)))
        }
        (_, Some(info)) if info.name == "hstore" => {
            Some(("MAP", mapping("MAP(VARCHAR, VARCHAR)", Kind::Hstore)))
        }
        _ => None,
    }
}

fn struct_of_composite(fields: &[FieldInfo], catalog: &TypeCatalog) -> Mapping {
    let fields: Vec<(String, Mapping)> = fields
        .iter()
        .map(|field| {
            (
                field.name.clone(),
                inner(field.type_oid, field.typmod, field.ndims, catalog, MAX_DEPTH),
            )
        })
        .collect();

    let list = fields.iter().map(|(name, field)| format!("{} {}", quoted(name), field.target_type));
    let target_type = format!("STRUCT({})", list.collect::<Vec<_>>().join(", "));
    mapping(target_type, Kind::Struct { fields })
}

fn struct_of_range(bound_oid: u32, catalog: &TypeCatalog) -> Mapping {
    let bound = inner(bound_oid, -1, 0, catalog, MAX_DEPTH);
    let of = &bound.target_type;
    let target_type = format!(
        "STRUCT(\"lower\" {of}, \"upper\" {of}, lower_inclusive BOOLEAN, upper_inclusive BOOLEAN, \
         is_empty BOOLEAN)"
    );
    mapping(target_type, Kind::Range { bound: Box::new(bound) })
}

/// The number of levels at which an array may be the element of another, by a domain in between. A
/// deeper array is stored as text. No server has a type that is made of itself, but the catalogs of
/// a broken server might claim one.
const MAX_DEPTH: u8 = 4;

/// Returns the base type of a domain, at any depth: a domain is stored as its base type.
fn without_domains(
    mut oid: u32,
    mut typmod: i32,
    mut ndims: i32,
    catalog: &TypeCatalog,
) -> (u32, i32, i32) {
    // The loop takes no more steps than there are types, so that it also ends for a domain over
    // itself.
    for _ in 0..catalog.types.len() {
        let Some(domain) = catalog.types.get(&oid).filter(|info| info.kind == b'd') else { break };
        (oid, typmod, ndims) = (domain.base_oid, domain.base_typmod, domain.base_ndims);
    }
    (oid, typmod, ndims)
}

/// Returns the natural mapping of an inner type.
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

/// Returns the mapping of the type table: it loses no value, or rhei refuses the value when it
/// arrives.
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
        // These are text, varchar, bpchar (padding kept), name and unknown. The type xml is not
        // among them: its binary form adds an encoding.
        25 | 1043 | 1042 | 19 | 705 => mapping("VARCHAR", Kind::Text),
        // The catalog treats int2vector and oidvector as arrays, but they print without braces.
        22 | 30 => mapping("VARCHAR", Kind::Printed),
        JSON => mapping("JSON", Kind::Text),
        JSONB => mapping("JSON", Kind::Jsonb),
        _ => match catalog.types.get(&oid) {
            // Labels are sent unchanged.
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

/// Returns the Arrow schema of a table's columns.
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
        // These are a domain over itself, two domains over each other, an array of itself, and an
        // array of a domain over the array.
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

    #[test]
    fn an_override_names_one_of_the_possible_types() {
        let cases = [
            (23, " text ", Ok("VARCHAR")),
            (23, "integer", Ok("INTEGER")),
            (23, "DOUBLE", Err("INTEGER, VARCHAR")),
            (NUMERIC, "double", Ok("DOUBLE")),
            (NUMERIC, "DECIMAL(10,2)", Ok("DECIMAL(10,2)")),
            (NUMERIC, "DECIMAL(2,10)", Err("VARCHAR, DECIMAL(p,s), DOUBLE")),
            (JSON, "VARCHAR", Ok("VARCHAR")),
            (JSONB, "variant", Ok("VARIANT")),
            (JSONB, "MAP", Err("JSON, VARCHAR, VARIANT")),
            (TIMETZ, "TIMETZ", Ok("TIME WITH TIME ZONE")),
        ];

        for (type_oid, wanted, expected) in cases {
            let override_type = Some(wanted);
            let column = ColumnType { type_oid, typmod: -1, ndims: 0, override_type };
            let mapped = map_column(&column, &TypeCatalog::default());
            let found = match &mapped {
                Ok(mapping) => Ok(mapping.target_type.as_str()),
                Err(error) => Err(error.possible.as_str()),
            };
            assert_eq!(found, expected, "{type_oid} as {wanted}");
        }
    }
}
