//! Types of DuckDB.
#![allow(unsafe_code, reason = "DuckDB's C API; each block says why it is sound")]

use std::ffi::{CStr, c_char};

use duckdb::ffi;

/// A type of DuckDB, as a session sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SqlType {
    Boolean,
    TinyInt,
    SmallInt,
    Integer,
    BigInt,
    UTinyInt,
    USmallInt,
    UInteger,
    UBigInt,
    HugeInt,
    UHugeInt,
    Float,
    Double,
    Decimal {
        width: u8,
        scale: u8,
    },
    Varchar,
    /// VARCHAR under the name JSON.
    Json,
    Blob,
    Bit,
    Date,
    /// Microseconds since midnight.
    Time,
    TimeTz,
    /// Microseconds since 1970.
    Timestamp,
    TimestampSeconds,
    TimestampMillis,
    TimestampNanos,
    TimestampTz,
    Interval,
    Uuid,
    /// The labels, in their order.
    Enum(Vec<String>),
    List(Box<SqlType>),
    /// A list that is a vector in PostgreSQL's catalogs.
    Vector(Box<SqlType>),
    /// A list of a fixed number of items.
    Array(Box<SqlType>, usize),
    Struct(Vec<(String, SqlType)>),
    Map(Box<SqlType>, Box<SqlType>),
    /// A parameter, or a column made of one, whose type the statement leaves open.
    Unknown,
    /// The value NULL without a type.
    Null,
    /// A type whose values this module does not read; they can be cast to VARCHAR.
    Other,
}

impl SqlType {
    /// Returns whether values of the type can be read.
    pub fn is_readable(&self) -> bool {
        match self {
            Self::Unknown | Self::Other => false,
            Self::List(item) | Self::Vector(item) | Self::Array(item, _) => item.is_readable(),
            Self::Struct(fields) => fields.iter().all(|(_, field)| field.is_readable()),
            Self::Map(key, value) => key.is_readable() && value.is_readable(),
            _ => true,
        }
    }

    /// Returns the type of a column of this name. DuckDB has no name for a type of lists, so that
    /// the columns of `pg_index` are known by their own.
    pub(super) fn in_column(self, name: &str) -> Self {
        const VECTORS: [&str; 4] = ["indkey", "indclass", "indcollation", "indoption"];
        match self {
            Self::List(item)
                if VECTORS.contains(&name) && matches!(*item, Self::SmallInt | Self::UInteger) =>
            {
                Self::Vector(item)
            }
            other => other,
        }
    }

    /// Takes over a logical type, and returns what it is.
    ///
    /// # Safety
    /// `raw` is null, or a logical type that only this call destroys.
    pub(super) unsafe fn take(mut raw: ffi::duckdb_logical_type) -> Self {
        if raw.is_null() {
            return Self::Other;
        }

        // SAFETY: the type is alive until it is destroyed here, once.
        unsafe {
            let found = Self::of(raw);
            ffi::duckdb_destroy_logical_type(&mut raw);
            found
        }
    }

    /// # Safety
    /// `raw` is a logical type that is alive.
    unsafe fn of(raw: ffi::duckdb_logical_type) -> Self {
        // SAFETY: `raw` is alive; each function is called for the type that it belongs to, and
        // each child type is destroyed once, by `take`.
        unsafe {
            match ffi::duckdb_get_type_id(raw) {
                ffi::DUCKDB_TYPE_DUCKDB_TYPE_DECIMAL => Self::Decimal {
                    width: ffi::duckdb_decimal_width(raw),
                    scale: ffi::duckdb_decimal_scale(raw),
                },
                ffi::DUCKDB_TYPE_DUCKDB_TYPE_VARCHAR => {
                    let alias = take_text(ffi::duckdb_logical_type_get_alias(raw));
                    if alias == "JSON" { Self::Json } else { Self::Varchar }
                }
                ffi::DUCKDB_TYPE_DUCKDB_TYPE_ENUM => {
                    let labels = (0..u64::from(ffi::duckdb_enum_dictionary_size(raw)))
                        .map(|at| take_text(ffi::duckdb_enum_dictionary_value(raw, at)));
                    Self::Enum(labels.collect())
                }
                ffi::DUCKDB_TYPE_DUCKDB_TYPE_LIST => {
                    Self::List(Box::new(Self::take(ffi::duckdb_list_type_child_type(raw))))
                }
                ffi::DUCKDB_TYPE_DUCKDB_TYPE_ARRAY => Self::Array(
                    Box::new(Self::take(ffi::duckdb_array_type_child_type(raw))),
                    ffi::duckdb_array_type_array_size(raw) as usize,
                ),
                ffi::DUCKDB_TYPE_DUCKDB_TYPE_STRUCT => {
                    let fields = (0..ffi::duckdb_struct_type_child_count(raw)).map(|at| {
                        let name = take_text(ffi::duckdb_struct_type_child_name(raw, at));
                        (name, Self::take(ffi::duckdb_struct_type_child_type(raw, at)))
                    });
                    Self::Struct(fields.collect())
                }
                ffi::DUCKDB_TYPE_DUCKDB_TYPE_MAP => Self::Map(
                    Box::new(Self::take(ffi::duckdb_map_type_key_type(raw))),
                    Box::new(Self::take(ffi::duckdb_map_type_value_type(raw))),
                ),
                id => Self::plain(id),
            }
        }
    }

    /// Returns a type that its id alone describes.
    fn plain(id: ffi::duckdb_type) -> Self {
        match id {
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_BOOLEAN => Self::Boolean,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TINYINT => Self::TinyInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_SMALLINT => Self::SmallInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_INTEGER => Self::Integer,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_BIGINT => Self::BigInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_UTINYINT => Self::UTinyInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_USMALLINT => Self::USmallInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_UINTEGER => Self::UInteger,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_UBIGINT => Self::UBigInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_HUGEINT => Self::HugeInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_UHUGEINT => Self::UHugeInt,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_FLOAT => Self::Float,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_DOUBLE => Self::Double,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_BLOB => Self::Blob,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_BIT => Self::Bit,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_DATE => Self::Date,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TIME => Self::Time,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TIME_TZ => Self::TimeTz,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TIMESTAMP => Self::Timestamp,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TIMESTAMP_S => Self::TimestampSeconds,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TIMESTAMP_MS => Self::TimestampMillis,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TIMESTAMP_NS => Self::TimestampNanos,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_TIMESTAMP_TZ => Self::TimestampTz,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_INTERVAL => Self::Interval,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_UUID => Self::Uuid,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_SQLNULL => Self::Null,
            ffi::DUCKDB_TYPE_DUCKDB_TYPE_INVALID | ffi::DUCKDB_TYPE_DUCKDB_TYPE_ANY => {
                Self::Unknown
            }
            _ => Self::Other,
        }
    }
}

/// Takes over a text of DuckDB.
///
/// # Safety
/// `text` is null, or a C string that only this call frees.
pub(super) unsafe fn take_text(text: *mut c_char) -> String {
    if text.is_null() {
        return String::new();
    }

    // SAFETY: the string is alive until it is freed here, once.
    unsafe {
        let taken = CStr::from_ptr(text).to_string_lossy().into_owned();
        ffi::duckdb_free(text.cast());
        taken
    }
}
