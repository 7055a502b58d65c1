//! One Postgres type = one row of the mapping + one decoder.
//!
//! [`map_column`] decides, from the catalog's description of a type and an optional override, how a column is
//! staged (Arrow), stored (DuckDB) and decoded (text from the stream, binary from COPY). [`ColumnBuilder`] decodes
//! one column; both formats give the same cell. What has no decoder of its own is kept as the text that the server
//! prints, which loses nothing.

pub mod datetime;
pub mod numeric;
mod text;

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::{
        Array, ArrayRef, BinaryBuilder, BooleanBuilder, Date32Builder, Decimal128Builder, FixedSizeBinaryBuilder,
        Float32Builder, Float64Builder, Int16Builder, Int32Builder, Int64Builder, ListArray, StringBuilder,
        StructArray, Time64MicrosecondBuilder, TimestampMicrosecondBuilder, UInt32Builder, UInt64Builder,
    },
    buffer::{NullBuffer, OffsetBuffer},
    datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit},
};

/// `pg_type`, as far as a value's text and binary form depend on it.
#[derive(Debug, Clone)]
pub struct TypeInfo {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    /// `typtype`: `b` base, `c` composite, `d` domain, `e` enum, `p` pseudo, `r` range, `m` multirange.
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
}

/// The types that the published columns use, and all that those are made of.
#[derive(Debug, Clone, Default)]
pub struct TypeCatalog {
    pub types: HashMap<u32, TypeInfo>,
    /// Digits after the point of `money` under the pinned `lc_monetary=C` (2).
    pub money_scale: u8,
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

/// How a value is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Bool,
    Int2,
    Int4,
    Int8,
    /// oid, xid, cid.
    UInt4,
    /// xid8.
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
    List {
        element: Box<Mapping>,
        delimiter: u8,
    },
}

/// How one column is staged, stored and decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
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
        "{what} cannot be stored as {target_type}\nhint: set type = \"VARCHAR\" for this column in its [tables.\"..\".columns] section"
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
}

fn mapping(target_type: impl Into<String>, kind: Kind) -> Mapping {
    Mapping { target_type: target_type.into(), kind }
}

/// The mapping of a column.
///
/// # Errors
/// The override is not one that the type can have.
pub fn map_column(column: &ColumnType<'_>, catalog: &TypeCatalog) -> Result<Mapping, MappingError> {
    let (mut oid, mut typmod, mut ndims) = (column.type_oid, column.typmod, column.ndims);
    // A domain is stored as what it is made of, however deep.
    while let Some(domain) = catalog.types.get(&oid).filter(|info| info.kind == b'd') {
        (oid, typmod, ndims) = (domain.base_oid, domain.base_typmod, domain.base_ndims);
    }
    let natural = natural(oid, typmod, ndims, catalog);
    let Some(wanted) = column.override_type else { return Ok(natural) };
    let folded = wanted.trim().to_uppercase();
    if folded == natural.target_type {
        return Ok(natural);
    }
    let as_text = match natural.kind {
        Kind::Text | Kind::Printed => natural.kind.clone(),
        // Both forms of json are text on the stream; the binary form of jsonb is not.
        Kind::Jsonb => Kind::Jsonb,
        _ => Kind::Printed,
    };
    match (folded.as_str(), oid) {
        ("VARCHAR" | "TEXT", _) => Ok(mapping("VARCHAR", as_text)),
        ("DOUBLE", NUMERIC) => Ok(mapping("DOUBLE", Kind::NumericDouble)),
        (_, NUMERIC) if decimal_type(&folded).is_some() => {
            let (precision, scale) = decimal_type(&folded).unwrap_or_default();
            Ok(mapping(format!("DECIMAL({precision},{scale})"), Kind::Decimal { precision, scale }))
        }
        _ => {
            let possible = if oid == NUMERIC {
                "VARCHAR, DOUBLE and DECIMAL(p,s)".to_owned()
            } else {
                format!("{} and VARCHAR", natural.target_type)
            };
            let from =
                catalog.types.get(&column.type_oid).map_or_else(|| format!("with oid {oid}"), |info| info.name.clone());
            Err(MappingError { from, wanted: wanted.to_owned(), possible })
        }
    }
}

const NUMERIC: u32 = 1700;

fn decimal_type(text: &str) -> Option<(u8, i8)> {
    let inner = text.strip_prefix("DECIMAL(")?.strip_suffix(')')?;
    let (precision, scale) = inner.split_once(',')?;
    let (precision, scale): (u8, i8) = (precision.trim().parse().ok()?, scale.trim().parse().ok()?);
    ((1..=38).contains(&precision) && (0..=precision as i8).contains(&scale)).then_some((precision, scale))
}

/// The type table: lossless, whatever the value, or refused when it comes.
fn natural(oid: u32, typmod: i32, ndims: i32, catalog: &TypeCatalog) -> Mapping {
    let named = |name: &str| mapping("VARCHAR", if name == "citext" { Kind::Text } else { Kind::Printed });
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
        // text, varchar, bpchar (padding kept), name, xml, unknown.
        25 | 1043 | 1042 | 19 | 142 | 705 => mapping("VARCHAR", Kind::Text),
        // int2vector and oidvector are arrays to the catalog, but print without braces.
        22 | 30 => mapping("VARCHAR", Kind::Printed),
        114 => mapping("JSON", Kind::Text),
        3802 => mapping("JSON", Kind::Jsonb),
        _ => match catalog.types.get(&oid) {
            // Labels are sent as they are.
            Some(info) if info.kind == b'e' => mapping("VARCHAR", Kind::Text),
            Some(info) if info.element_oid != 0 => {
                let element = ColumnType { type_oid: info.element_oid, typmod, ndims: 0, override_type: None };
                let delimiter = catalog.types.get(&info.element_oid).map_or(b',', |element| element.delimiter);
                let mut list = map_column(&element, catalog).unwrap_or_else(|_| mapping("VARCHAR", Kind::Printed));
                for _ in 0..ndims.clamp(1, 6) {
                    list =
                        mapping(format!("{}[]", list.target_type), Kind::List { element: Box::new(list), delimiter });
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
            Kind::Text | Kind::Jsonb | Kind::Printed => DataType::Utf8,
            Kind::List { element, .. } => DataType::List(Arc::new(element.field("item"))),
        }
    }

    /// The Arrow field under which values are staged.
    pub fn field(&self, name: &str) -> Field {
        let field = Field::new(name, self.arrow_type(), true);
        match self.kind {
            // Without it a UUID would arrive as BLOB (trap 77).
            Kind::Uuid => {
                field.with_metadata(HashMap::from([("ARROW:extension:name".to_owned(), "arrow.uuid".to_owned())]))
            }
            _ => field,
        }
    }

    fn holds_interval(&self) -> bool {
        match &self.kind {
            Kind::Interval => true,
            Kind::List { element, .. } => element.holds_interval(),
            _ => false,
        }
    }

    /// Type of a staging column. Only intervals differ from the target: as Arrow intervals, NULLs would arrive as zero
    /// (trap 77).
    pub fn stage_type(&self) -> String {
        match &self.kind {
            Kind::Interval => "STRUCT(months INTEGER, days INTEGER, micros BIGINT)".to_owned(),
            Kind::List { element, .. } if element.holds_interval() => format!("{}[]", element.stage_type()),
            _ => self.target_type.clone(),
        }
    }

    /// SQL that turns a staging column into the target's type.
    pub fn stage_expr(&self, column: &str) -> String {
        match &self.kind {
            // `months` is never NULL inside a value.
            Kind::Interval => format!(
                "CASE WHEN {column}.months IS NULL THEN NULL ELSE to_months({column}.months) + to_days({column}.days) + \
                 to_microseconds({column}.micros) END"
            ),
            Kind::List { element, .. } if element.holds_interval() => {
                format!("list_transform({column}, lambda e: {})", element.stage_expr("e"))
            }
            _ => column.to_owned(),
        }
    }

    /// Whether COPY BINARY's form of the type is decoded here.
    pub fn has_binary(&self) -> bool {
        !matches!(self.kind, Kind::Printed | Kind::List { .. } | Kind::NumericDouble)
    }

    /// What COPY selects. Where only the output function can print the type, its text: `format('%s')` calls it, a cast
    /// to text would not (trap 22).
    pub fn copy_select(&self, column: &str) -> String {
        if self.has_binary() {
            column.to_owned()
        } else {
            // `IS NULL` would also be true of a row of NULLs.
            format!("CASE WHEN {column} IS NOT DISTINCT FROM NULL THEN NULL ELSE pg_catalog.format('%s', {column}) END")
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

/// The Arrow schema of a table's columns.
pub fn schema_of<'a>(columns: impl Iterator<Item = (&'a str, &'a Mapping)>) -> SchemaRef {
    Arc::new(Schema::new(columns.map(|(name, mapping)| mapping.field(name)).collect::<Vec<_>>()))
}

/// Decodes the values of one column into one Arrow array.
#[derive(Debug)]
pub struct ColumnBuilder {
    target_type: String,
    kind: Kind,
    values: Values,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per column, and it stays where it is")]
enum Values {
    Bool(BooleanBuilder),
    Int2(Int16Builder),
    Int4(Int32Builder),
    Int8(Int64Builder),
    UInt4(UInt32Builder),
    UInt8(UInt64Builder),
    Float4(Float32Builder),
    Float8(Float64Builder),
    Decimal(Decimal128Builder),
    Date(Date32Builder),
    Timestamp(TimestampMicrosecondBuilder),
    Time(Time64MicrosecondBuilder),
    Interval { months: Int32Builder, days: Int32Builder, micros: Int64Builder, valid: Vec<bool> },
    Fixed(FixedSizeBinaryBuilder),
    Bytes(BinaryBuilder),
    Text(StringBuilder),
    List { field: Arc<Field>, ends: Vec<i32>, valid: Vec<bool>, element: Box<ColumnBuilder> },
}

impl ColumnBuilder {
    /// For about `capacity` values.
    pub fn new(mapping: &Mapping, capacity: usize) -> Self {
        let values = match &mapping.kind {
            Kind::Bool => Values::Bool(BooleanBuilder::with_capacity(capacity)),
            Kind::Int2 => Values::Int2(Int16Builder::with_capacity(capacity)),
            Kind::Int4 => Values::Int4(Int32Builder::with_capacity(capacity)),
            Kind::Int8 => Values::Int8(Int64Builder::with_capacity(capacity)),
            Kind::UInt4 => Values::UInt4(UInt32Builder::with_capacity(capacity)),
            Kind::UInt8 => Values::UInt8(UInt64Builder::with_capacity(capacity)),
            Kind::Float4 => Values::Float4(Float32Builder::with_capacity(capacity)),
            Kind::Float8 | Kind::NumericDouble => Values::Float8(Float64Builder::with_capacity(capacity)),
            Kind::Decimal { .. } | Kind::Money { .. } => {
                Values::Decimal(Decimal128Builder::with_capacity(capacity).with_data_type(mapping.arrow_type()))
            }
            Kind::Date => Values::Date(Date32Builder::with_capacity(capacity)),
            Kind::Timestamp { .. } => Values::Timestamp(
                TimestampMicrosecondBuilder::with_capacity(capacity).with_data_type(mapping.arrow_type()),
            ),
            Kind::Time => Values::Time(Time64MicrosecondBuilder::with_capacity(capacity)),
            Kind::Interval => Values::Interval {
                months: Int32Builder::with_capacity(capacity),
                days: Int32Builder::with_capacity(capacity),
                micros: Int64Builder::with_capacity(capacity),
                valid: Vec::with_capacity(capacity),
            },
            Kind::Uuid => Values::Fixed(FixedSizeBinaryBuilder::with_capacity(capacity, 16)),
            Kind::Bytes => Values::Bytes(BinaryBuilder::with_capacity(capacity, capacity * 16)),
            Kind::Text | Kind::Jsonb | Kind::Printed => {
                Values::Text(StringBuilder::with_capacity(capacity, capacity * 16))
            }
            Kind::List { element, .. } => Values::List {
                field: Arc::new(element.field("item")),
                ends: Vec::with_capacity(capacity),
                valid: Vec::with_capacity(capacity),
                element: Box::new(ColumnBuilder::new(element, capacity)),
            },
        };
        Self { target_type: mapping.target_type.clone(), kind: mapping.kind.clone(), values }
    }

    pub fn push_null(&mut self) {
        match &mut self.values {
            Values::Bool(builder) => builder.append_null(),
            Values::Int2(builder) => builder.append_null(),
            Values::Int4(builder) => builder.append_null(),
            Values::Int8(builder) => builder.append_null(),
            Values::UInt4(builder) => builder.append_null(),
            Values::UInt8(builder) => builder.append_null(),
            Values::Float4(builder) => builder.append_null(),
            Values::Float8(builder) => builder.append_null(),
            Values::Decimal(builder) => builder.append_null(),
            Values::Date(builder) => builder.append_null(),
            Values::Timestamp(builder) => builder.append_null(),
            Values::Time(builder) => builder.append_null(),
            Values::Interval { months, days, micros, valid } => {
                months.append_null();
                days.append_null();
                micros.append_null();
                valid.push(false);
            }
            Values::Fixed(builder) => builder.append_null(),
            Values::Bytes(builder) => builder.append_null(),
            Values::Text(builder) => builder.append_null(),
            Values::List { ends, valid, element, .. } => {
                ends.push(i32::try_from(element.len()).unwrap_or(i32::MAX));
                valid.push(false);
            }
        }
    }

    pub fn len(&self) -> usize {
        use arrow::array::ArrayBuilder;
        match &self.values {
            Values::Bool(builder) => builder.len(),
            Values::Int2(builder) => builder.len(),
            Values::Int4(builder) => builder.len(),
            Values::Int8(builder) => builder.len(),
            Values::UInt4(builder) => builder.len(),
            Values::UInt8(builder) => builder.len(),
            Values::Float4(builder) => builder.len(),
            Values::Float8(builder) => builder.len(),
            Values::Decimal(builder) => builder.len(),
            Values::Date(builder) => builder.len(),
            Values::Timestamp(builder) => builder.len(),
            Values::Time(builder) => builder.len(),
            Values::Interval { valid, .. } | Values::List { valid, .. } => valid.len(),
            Values::Fixed(builder) => builder.len(),
            Values::Bytes(builder) => builder.len(),
            Values::Text(builder) => builder.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends a value in the server's text form.
    ///
    /// # Errors
    /// It is no such value, or the target's type cannot hold it. Nothing was appended.
    pub fn push_text(&mut self, value: Option<&[u8]>) -> Result<(), ValueError> {
        let Some(value) = value else {
            self.push_null();
            return Ok(());
        };
        let (kind, target_type) = (&self.kind, self.target_type.as_str());
        match &mut self.values {
            Values::Bool(builder) => builder.append_value(match value {
                b"t" => true,
                b"f" => false,
                _ => return Err(ValueError::malformed("boolean", value)),
            }),
            Values::Int2(builder) => builder.append_value(text::number(value, "smallint")?),
            Values::Int4(builder) => builder.append_value(text::number(value, "integer")?),
            Values::Int8(builder) => builder.append_value(text::number(value, "bigint")?),
            Values::UInt4(builder) => builder.append_value(text::number(value, "oid")?),
            Values::UInt8(builder) => builder.append_value(text::number(value, "xid8")?),
            Values::Float4(builder) => builder.append_value(text::number(value, "real")?),
            Values::Float8(builder) => builder.append_value(text::number(value, "double precision")?),
            Values::Decimal(builder) => builder.append_value(match kind {
                Kind::Decimal { precision, scale } => numeric::from_text(value, *precision, *scale, target_type)?,
                _ => numeric::money_from_text(value, scale_of(kind))?,
            }),
            Values::Date(builder) => builder.append_value(datetime::date(value, target_type)?),
            Values::Timestamp(builder) => builder.append_value(datetime::timestamp(value, target_type)?),
            Values::Time(builder) => builder.append_value(datetime::time(value)?),
            Values::Interval { months, days, micros, valid } => {
                let interval = datetime::interval(value)?;
                months.append_value(interval.months);
                days.append_value(interval.days);
                micros.append_value(interval.micros);
                valid.push(true);
            }
            Values::Fixed(builder) => {
                let uuid = text::uuid(value)?;
                builder.append_value(uuid).map_err(|_| ValueError::malformed("uuid", value))?;
            }
            Values::Bytes(builder) => builder.append_value(text::bytea(value)?),
            Values::Text(builder) => builder.append_value(std::str::from_utf8(value).map_err(|_| ValueError::NotUtf8)?),
            Values::List { ends, valid, element, .. } => {
                let Kind::List { delimiter, .. } = kind else { return Err(ValueError::malformed("array", value)) };
                text::array(value, *delimiter, element, target_type)?;
                ends.push(i32::try_from(element.len()).map_err(|_| ValueError::malformed("array", value))?);
                valid.push(true);
            }
        }
        Ok(())
    }

    /// Appends a field of COPY BINARY; text for those that [`Mapping::copy_select`] had printed.
    ///
    /// # Errors
    /// As [`Self::push_text`].
    pub fn push_binary(&mut self, value: Option<&[u8]>) -> Result<(), ValueError> {
        let Some(value) = value else {
            self.push_null();
            return Ok(());
        };
        fn fixed<const N: usize>(value: &[u8], expected: &'static str) -> Result<[u8; N], ValueError> {
            value.try_into().map_err(|_| ValueError::malformed(expected, value))
        }
        let (kind, target_type) = (&self.kind, self.target_type.as_str());
        match (&mut self.values, kind) {
            (_, Kind::List { .. } | Kind::NumericDouble | Kind::Printed | Kind::Text) => {
                return self.push_text(Some(value));
            }
            (Values::Bool(builder), _) => builder.append_value(fixed::<1>(value, "boolean")? != [0]),
            (Values::Int2(builder), _) => builder.append_value(i16::from_be_bytes(fixed(value, "smallint")?)),
            (Values::Int4(builder), _) => builder.append_value(i32::from_be_bytes(fixed(value, "integer")?)),
            (Values::Int8(builder), _) => builder.append_value(i64::from_be_bytes(fixed(value, "bigint")?)),
            (Values::UInt4(builder), _) => builder.append_value(u32::from_be_bytes(fixed(value, "oid")?)),
            (Values::UInt8(builder), _) => builder.append_value(u64::from_be_bytes(fixed(value, "xid8")?)),
            (Values::Float4(builder), _) => builder.append_value(f32::from_be_bytes(fixed(value, "real")?)),
            (Values::Float8(builder), _) => builder.append_value(f64::from_be_bytes(fixed(value, "double precision")?)),
            (Values::Decimal(builder), Kind::Decimal { precision, scale }) => {
                builder.append_value(numeric::from_binary(value, *precision, *scale, target_type)?);
            }
            (Values::Decimal(builder), _) => {
                builder.append_value(i128::from(i64::from_be_bytes(fixed(value, "money")?)));
            }
            (Values::Date(builder), _) => {
                builder.append_value(datetime::date_from_days(i32::from_be_bytes(fixed(value, "date")?), target_type)?);
            }
            (Values::Timestamp(builder), _) => builder.append_value(datetime::timestamp_from_micros(
                i64::from_be_bytes(fixed(value, "timestamp")?),
                target_type,
            )?),
            (Values::Time(builder), _) => builder.append_value(i64::from_be_bytes(fixed(value, "time")?)),
            (Values::Interval { months, days, micros, valid }, _) => {
                let interval = datetime::interval_from_binary(&fixed(value, "interval")?, target_type)?;
                months.append_value(interval.months);
                days.append_value(interval.days);
                micros.append_value(interval.micros);
                valid.push(true);
            }
            (Values::Fixed(builder), _) => {
                builder.append_value(fixed::<16>(value, "uuid")?).map_err(|_| ValueError::malformed("uuid", value))?;
            }
            (Values::Bytes(builder), _) => builder.append_value(value),
            (Values::Text(builder), _) => {
                // jsonb: one version byte, then text.
                let Some((1, text)) = value.split_first() else { return Err(ValueError::malformed("jsonb", value)) };
                builder.append_value(std::str::from_utf8(text).map_err(|_| ValueError::NotUtf8)?);
            }
            (Values::List { .. }, _) => return Err(ValueError::malformed("array", value)),
        }
        Ok(())
    }

    /// The array of what was appended; begins anew.
    pub fn finish(&mut self) -> ArrayRef {
        match &mut self.values {
            Values::Bool(builder) => Arc::new(builder.finish()),
            Values::Int2(builder) => Arc::new(builder.finish()),
            Values::Int4(builder) => Arc::new(builder.finish()),
            Values::Int8(builder) => Arc::new(builder.finish()),
            Values::UInt4(builder) => Arc::new(builder.finish()),
            Values::UInt8(builder) => Arc::new(builder.finish()),
            Values::Float4(builder) => Arc::new(builder.finish()),
            Values::Float8(builder) => Arc::new(builder.finish()),
            Values::Decimal(builder) => Arc::new(builder.finish()),
            Values::Date(builder) => Arc::new(builder.finish()),
            Values::Timestamp(builder) => Arc::new(builder.finish()),
            Values::Time(builder) => Arc::new(builder.finish()),
            Values::Interval { months, days, micros, valid } => {
                let nulls = NullBuffer::from(std::mem::take(valid));
                let columns: Vec<ArrayRef> =
                    vec![Arc::new(months.finish()), Arc::new(days.finish()), Arc::new(micros.finish())];
                Arc::new(StructArray::new(interval_fields(), columns, Some(nulls)))
            }
            Values::Fixed(builder) => Arc::new(builder.finish()),
            Values::Bytes(builder) => Arc::new(builder.finish()),
            Values::Text(builder) => Arc::new(builder.finish()),
            Values::List { field, ends, valid, element } => {
                let offsets: Vec<i32> = std::iter::once(0).chain(std::mem::take(ends)).collect();
                let nulls = NullBuffer::from(std::mem::take(valid));
                let items = element.finish();
                // Ends only grow, and the last is the number of items.
                debug_assert_eq!(offsets.last().copied(), i32::try_from(items.len()).ok());
                Arc::new(ListArray::new(Arc::clone(field), OffsetBuffer::new(offsets.into()), items, Some(nulls)))
            }
        }
    }
}

fn scale_of(kind: &Kind) -> i8 {
    match kind {
        Kind::Money { scale } | Kind::Decimal { scale, .. } => *scale,
        _ => 0,
    }
}
