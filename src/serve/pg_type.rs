//! Types of DuckDB as types of PostgreSQL, for results and for parameters.
//!
//! `_pg.type_oid` of `schemas/pg_catalog.sql` says the same of the columns of tables.

use pgwire::api::Type;

use crate::olap::SqlType;

/// Returns the type that values of a type of DuckDB have for a client, and the modifier: precision
/// and scale of a number, or -1.
pub fn of_result(sql: &SqlType) -> (Type, i32) {
    let plain = |of: Type| (of, -1);
    match sql {
        SqlType::Boolean => plain(Type::BOOL),
        SqlType::TinyInt | SqlType::SmallInt | SqlType::UTinyInt => plain(Type::INT2),
        SqlType::Integer | SqlType::USmallInt => plain(Type::INT4),
        SqlType::BigInt => plain(Type::INT8),
        // What the oids of the source are stored as.
        SqlType::UInteger => plain(Type::OID),
        SqlType::UBigInt | SqlType::HugeInt | SqlType::UHugeInt => plain(Type::NUMERIC),
        SqlType::Float => plain(Type::FLOAT4),
        SqlType::Double => plain(Type::FLOAT8),
        SqlType::Decimal { width, scale } => {
            // `numeric_typmod` of `utils/adt/numeric.c`.
            (Type::NUMERIC, (i32::from(*width) << 16 | i32::from(*scale)) + 4)
        }
        SqlType::Json | SqlType::Map(..) => plain(Type::JSON),
        SqlType::Blob => plain(Type::BYTEA),
        SqlType::Bit => plain(Type::VARBIT),
        SqlType::Date => plain(Type::DATE),
        SqlType::Time => plain(Type::TIME),
        SqlType::TimeTz => plain(Type::TIMETZ),
        SqlType::Timestamp
        | SqlType::TimestampSeconds
        | SqlType::TimestampMillis
        | SqlType::TimestampNanos => plain(Type::TIMESTAMP),
        SqlType::TimestampTz => plain(Type::TIMESTAMPTZ),
        SqlType::Interval => plain(Type::INTERVAL),
        SqlType::Uuid => plain(Type::UUID),
        SqlType::Struct(_) => plain(Type::RECORD),
        SqlType::Vector(item) if **item == SqlType::SmallInt => plain(Type::INT2_VECTOR),
        SqlType::Vector(_) => plain(Type::OID_VECTOR),
        SqlType::List(item) | SqlType::Array(item, _) => plain(array_of(&leaf(item))),
        SqlType::Varchar | SqlType::Enum(_) | SqlType::Unknown | SqlType::Null | SqlType::Other => {
            plain(Type::TEXT)
        }
    }
}

/// Returns the type of the innermost items of lists in lists: an array of PostgreSQL has one type
/// for all dimensions.
pub fn leaf(item: &SqlType) -> Type {
    match item {
        SqlType::List(inner) | SqlType::Vector(inner) | SqlType::Array(inner, _) => leaf(inner),
        other => of_result(other).0,
    }
}

fn array_of(item: &Type) -> Type {
    match *item {
        Type::BOOL => Type::BOOL_ARRAY,
        Type::INT2 => Type::INT2_ARRAY,
        Type::INT4 => Type::INT4_ARRAY,
        Type::INT8 => Type::INT8_ARRAY,
        Type::OID => Type::OID_ARRAY,
        Type::NUMERIC => Type::NUMERIC_ARRAY,
        Type::FLOAT4 => Type::FLOAT4_ARRAY,
        Type::FLOAT8 => Type::FLOAT8_ARRAY,
        Type::JSON => Type::JSON_ARRAY,
        Type::BYTEA => Type::BYTEA_ARRAY,
        Type::VARBIT => Type::VARBIT_ARRAY,
        Type::DATE => Type::DATE_ARRAY,
        Type::TIME => Type::TIME_ARRAY,
        Type::TIMETZ => Type::TIMETZ_ARRAY,
        Type::TIMESTAMP => Type::TIMESTAMP_ARRAY,
        Type::TIMESTAMPTZ => Type::TIMESTAMPTZ_ARRAY,
        Type::INTERVAL => Type::INTERVAL_ARRAY,
        Type::UUID => Type::UUID_ARRAY,
        Type::RECORD => Type::RECORD_ARRAY,
        _ => Type::TEXT_ARRAY,
    }
}

/// Returns the width of a type's values in bytes, -1 where it varies (`pg_type.typlen`).
pub fn size(of: &Type) -> i16 {
    match *of {
        Type::BOOL | Type::CHAR => 1,
        Type::INT2 => 2,
        Type::INT4 | Type::FLOAT4 | Type::DATE | Type::OID => 4,
        Type::INT8 | Type::FLOAT8 | Type::TIME | Type::TIMESTAMP | Type::TIMESTAMPTZ => 8,
        Type::TIMETZ => 12,
        Type::INTERVAL | Type::UUID => 16,
        _ => -1,
    }
}

/// Returns the type of DuckDB that a parameter is cast to, so that its type, and with it that of
/// the columns, is known before it has a value. A number keeps the scale of its value, and text is
/// what DuckDB makes of it.
pub fn cast_of(parameter: &Type) -> Option<&'static str> {
    Some(match *parameter {
        Type::BOOL => "BOOLEAN",
        Type::INT2 => "SMALLINT",
        Type::INT4 => "INTEGER",
        Type::INT8 => "BIGINT",
        Type::OID => "UINTEGER",
        Type::FLOAT4 => "FLOAT",
        Type::FLOAT8 => "DOUBLE",
        Type::DATE => "DATE",
        Type::TIME => "TIME",
        Type::TIMETZ => "TIMETZ",
        Type::TIMESTAMP => "TIMESTAMP",
        Type::TIMESTAMPTZ => "TIMESTAMPTZ",
        Type::INTERVAL => "INTERVAL",
        Type::UUID => "UUID",
        Type::JSON | Type::JSONB => "JSON",
        Type::BYTEA => "BLOB",
        Type::VARBIT | Type::BIT => "BIT",
        Type::BOOL_ARRAY => "BOOLEAN[]",
        Type::INT2_ARRAY => "SMALLINT[]",
        Type::INT4_ARRAY => "INTEGER[]",
        Type::INT8_ARRAY => "BIGINT[]",
        Type::OID_ARRAY => "UINTEGER[]",
        Type::FLOAT4_ARRAY => "FLOAT[]",
        Type::FLOAT8_ARRAY => "DOUBLE[]",
        Type::DATE_ARRAY => "DATE[]",
        Type::TIMESTAMP_ARRAY => "TIMESTAMP[]",
        Type::TIMESTAMPTZ_ARRAY => "TIMESTAMPTZ[]",
        Type::UUID_ARRAY => "UUID[]",
        Type::TEXT_ARRAY | Type::VARCHAR_ARRAY => "VARCHAR[]",
        Type::NUMERIC_ARRAY => "DECIMAL(38, 9)[]",
        _ => return None,
    })
}
