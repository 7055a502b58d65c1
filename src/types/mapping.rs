//! How a column is staged, stored and decoded.

use std::{collections::HashMap, sync::Arc};

use arrow::datatypes::{DataType, Field, Fields, TimeUnit};
use serde::{Deserialize, Serialize};

use super::quoted;

/// How a value is decoded. The kind is stored in `_rhei.columns`, so that a copy is read as it was
/// written even when the type no longer exists at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Bool,
    Int2,
    Int4,
    Int8,
    /// The types oid, xid, cid.
    #[serde(rename = "uint4")]
    UInt4,
    /// The type xid8.
    #[serde(rename = "uint8")]
    UInt8,
    Float4,
    Float8,
    /// A numeric that fits DuckDB's DECIMAL.
    Decimal {
        precision: u8,
        scale: i8,
    },
    /// A numeric as DOUBLE, on request.
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
    /// Text that COPY BINARY sends unchanged.
    Text,
    /// A jsonb, which is text after a version byte.
    Jsonb,
    /// A value that only the type's output function can print.
    Printed,
    /// A printed value that DuckDB casts from this type: VARIANT and TIMETZ have no Arrow form.
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
    /// An hstore as MAP, on request.
    Hstore,
}

/// How one column is staged, stored and decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The column's type in DuckDB, as CREATE TABLE spells it.
    pub target_type: String,
    pub(super) kind: Kind,
}

impl Mapping {
    /// Returns the Arrow type under which values are staged.
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

    /// Returns the Arrow field under which values are staged.
    pub fn field(&self, name: &str) -> Field {
        let field = Field::new(name, self.arrow_type(), true);
        let extension = match &self.kind {
            // Without the extension a UUID would arrive as BLOB (trap 77).
            Kind::Uuid => "arrow.uuid",
            // The value was JSON at the source, so DuckDB need not parse it to accept it.
            Kind::Cast { from } if from == "JSON" => "arrow.json",
            Kind::Text | Kind::Jsonb if self.target_type == "JSON" => "arrow.json",
            _ => return field,
        };

        field.with_metadata(HashMap::from([(
            "ARROW:extension:name".to_owned(),
            extension.to_owned(),
        )]))
    }

    /// Returns the mapping that keeps the text of each value, as the source prints it.
    pub fn as_text(&self) -> Self {
        let kind = match self.kind {
            // Both forms of json are text on the stream; the binary form of jsonb is not.
            Kind::Text | Kind::Printed | Kind::Jsonb => self.kind.clone(),
            _ => Kind::Printed,
        };
        Self { target_type: "VARCHAR".to_owned(), kind }
    }

    /// Returns whether a Parquet file that DuckDB writes holds every value of the type: it has
    /// milliseconds in an INTERVAL and none below zero, no zone in a TIMETZ, and not every number
    /// of a VARIANT as it was written.
    pub fn is_exact_in_parquet(&self) -> bool {
        const INEXACT: [&str; 6] =
            ["INTERVAL", "TIME WITH TIME ZONE", "TIMETZ", "HUGEINT", "BIT", "VARIANT"];
        !INEXACT.iter().any(|inexact| self.target_type.contains(inexact))
    }

    /// Returns whether a staged value is the target's value without conversion.
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

    /// Returns the type of a staging column. Intervals differ from the target: as Arrow intervals,
    /// NULLs would arrive as zero (trap 77).
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

    /// Returns SQL that turns a staging column into the target's type.
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
            // The field `months` is never NULL inside a value.
            Kind::Interval => format!(
                "CASE WHEN {column}.months IS NULL THEN NULL \
                 ELSE to_months({column}.months) + to_days({column}.days) + \
                 to_microseconds({column}.micros) END"
            ),
            Kind::Cast { .. } => format!("CAST({column} AS {})", self.target_type),
            Kind::Hstore => format!("map_from_entries({column})"),
            Kind::List { element, .. } => {
                // Each nested list needs a variable name of its own.
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

    /// Returns whether rhei decodes COPY BINARY's form of the type.
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

    /// Returns the expression that COPY selects. Where only the output function can print the type,
    /// the expression is its text: `format('%s')` calls that function, a cast to text would not
    /// (trap 22).
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

    /// Returns whether every value has one exact counterpart in `other` when a plain cast rewrites
    /// the source's table, which `[sync] trust_widening` allows.
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

pub(super) fn interval_fields() -> Fields {
    Fields::from(vec![
        Field::new("months", DataType::Int32, true),
        Field::new("days", DataType::Int32, true),
        Field::new("micros", DataType::Int64, true),
    ])
}

pub(super) const RANGE_FLAGS: [&str; 3] = ["lower_inclusive", "upper_inclusive", "is_empty"];

pub(super) fn range_fields(bound: &Mapping) -> Fields {
    let flags = RANGE_FLAGS.iter().map(|name| Field::new(*name, DataType::Boolean, true));
    [bound.field("lower"), bound.field("upper")].into_iter().chain(flags).collect()
}

pub(super) fn entry_fields() -> Fields {
    Fields::from(vec![
        Field::new("key", DataType::Utf8, true),
        Field::new("value", DataType::Utf8, true),
    ])
}
