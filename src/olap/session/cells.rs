//! The values of one column in a chunk of a result, where DuckDB put them.
#![allow(unsafe_code, reason = "DuckDB's C API; each block says why it is sound")]

use std::{marker::PhantomData, slice};

use duckdb::ffi;

use super::SqlType;

/// One column of a chunk, or the items of a column of lists.
pub struct Column<'a> {
    /// A bit for each value; null when no value is NULL.
    validity: *const u64,
    len: usize,
    pub cells: Cells<'a>,
}

/// Values of one type. What stands where a value is NULL means nothing.
pub enum Cells<'a> {
    Boolean(&'a [u8]),
    TinyInt(&'a [i8]),
    SmallInt(&'a [i16]),
    Integer(&'a [i32]),
    BigInt(&'a [i64]),
    UTinyInt(&'a [u8]),
    USmallInt(&'a [u16]),
    UInteger(&'a [u32]),
    UBigInt(&'a [u64]),
    HugeInt(&'a [ffi::duckdb_hugeint]),
    UHugeInt(&'a [ffi::duckdb_uhugeint]),
    Float(&'a [f32]),
    Double(&'a [f64]),
    /// Decimals of up to 4, 9, 18 and 38 digits.
    Decimal16(&'a [i16], u8),
    Decimal32(&'a [i32], u8),
    Decimal64(&'a [i64], u8),
    Decimal128(&'a [ffi::duckdb_hugeint], u8),
    Text(Bytes<'a>),
    Json(Bytes<'a>),
    Blob(Bytes<'a>),
    /// The number of unused bits in the first byte, which are ones, and then the bits.
    Bit(Bytes<'a>),
    /// Days since 1970.
    Date(&'a [i32]),
    /// Microseconds since midnight.
    Time(&'a [i64]),
    /// Microseconds since midnight in the upper 40 bits; below them the greatest offset, less the
    /// offset, in seconds.
    TimeTz(&'a [u64]),
    /// Microseconds since 1970.
    Timestamp(&'a [i64]),
    TimestampSeconds(&'a [i64]),
    TimestampMillis(&'a [i64]),
    TimestampNanos(&'a [i64]),
    TimestampTz(&'a [i64]),
    Interval(&'a [Interval]),
    /// 128 bits, the first of them inverted.
    Uuid(&'a [ffi::duckdb_hugeint]),
    Enum8(&'a [u8], &'a [String]),
    Enum16(&'a [u16], &'a [String]),
    Enum32(&'a [u32], &'a [String]),
    List(&'a [ffi::duckdb_list_entry], Box<Column<'a>>),
    Vector(&'a [ffi::duckdb_list_entry], Box<Column<'a>>),
    Array(usize, Box<Column<'a>>),
    Struct(Vec<Column<'a>>),
    /// Entries of a list, and the keys and values that they are made of.
    Map(&'a [ffi::duckdb_list_entry], Box<Column<'a>>, Box<Column<'a>>),
    /// Every value is NULL.
    Null,
}

pub use duckdb::ffi::duckdb_interval as Interval;

/// Strings of a column.
pub struct Bytes<'a> {
    strings: *mut ffi::duckdb_string_t,
    len: usize,
    chunk: PhantomData<&'a ()>,
}

impl<'a> Bytes<'a> {
    /// Returns the bytes of the value at a place.
    pub fn get(&self, at: usize) -> &'a [u8] {
        assert!(at < self.len, "row {at} of {}", self.len);
        // SAFETY: there are `len` strings, which live as long as their chunk.
        unsafe {
            let string = self.strings.add(at);
            let len = ffi::duckdb_string_t_length(*string) as usize;
            let data = ffi::duckdb_string_t_data(string).cast::<u8>();
            if len == 0 { &[] } else { slice::from_raw_parts(data, len) }
        }
    }
}

impl<'a> Column<'a> {
    /// # Safety
    /// The vector has at least `len` values of this type, is flat, and lives for `'a`.
    pub(super) unsafe fn of(vector: ffi::duckdb_vector, len: usize, of: &'a SqlType) -> Self {
        // SAFETY: the caller vouches for vector, length and type; each slice has the element type
        // that DuckDB stores for the type, and nested vectors live as long as their parent.
        unsafe {
            let validity = ffi::duckdb_vector_get_validity(vector).cast_const();
            let data = Data { raw: ffi::duckdb_vector_get_data(vector), len };
            let cells = match of {
                SqlType::List(item) => Cells::List(data.slice(), Box::new(items_of(vector, item))),
                SqlType::Vector(item) => {
                    Cells::Vector(data.slice(), Box::new(items_of(vector, item)))
                }
                SqlType::Array(item, size) => {
                    let child = ffi::duckdb_array_vector_get_child(vector);
                    Cells::Array(*size, Box::new(Self::of(child, len * size, item)))
                }
                SqlType::Struct(fields) => {
                    let columns = (0..).zip(fields).map(|(at, (_, field))| {
                        Self::of(ffi::duckdb_struct_vector_get_child(vector, at), len, field)
                    });
                    Cells::Struct(columns.collect())
                }
                SqlType::Map(key, value) => {
                    let entries = ffi::duckdb_list_vector_get_child(vector);
                    let len = ffi::duckdb_list_vector_get_size(vector) as usize;
                    let part = |at, of| {
                        let child = ffi::duckdb_struct_vector_get_child(entries, at);
                        Box::new(Self::of(child, len, of))
                    };
                    Cells::Map(data.slice(), part(0, key), part(1, value))
                }
                other => data.cells(other),
            };
            Self { validity, len, cells }
        }
    }

    /// Returns whether the value at a place is NULL.
    pub fn is_null(&self, at: usize) -> bool {
        assert!(at < self.len, "row {at} of {}", self.len);
        if matches!(self.cells, Cells::Null) {
            return true;
        }
        // SAFETY: a mask has a bit for each of the `len` values.
        !self.validity.is_null() && unsafe { *self.validity.add(at / 64) >> (at % 64) & 1 == 0 }
    }
}

/// # Safety
/// As for [`Column::of`]; the vector is of lists of this item.
unsafe fn items_of<'a>(vector: ffi::duckdb_vector, item: &'a SqlType) -> Column<'a> {
    // SAFETY: the child of a list vector has as many values as the vector says.
    unsafe {
        let len = ffi::duckdb_list_vector_get_size(vector) as usize;
        Column::of(ffi::duckdb_list_vector_get_child(vector), len, item)
    }
}

/// The memory of a vector.
struct Data {
    raw: *mut std::ffi::c_void,
    len: usize,
}

impl Data {
    /// # Safety
    /// The vector holds values of `X`, and lives for `'a`.
    unsafe fn slice<'a, X>(&self) -> &'a [X] {
        if self.len == 0 || self.raw.is_null() {
            return &[];
        }
        // SAFETY: the caller vouches for the type; DuckDB aligns its vectors.
        unsafe { slice::from_raw_parts(self.raw.cast::<X>(), self.len) }
    }

    /// # Safety
    /// The vector holds values of this type, which is not nested, and lives for `'a`.
    unsafe fn cells<'a>(&self, of: &'a SqlType) -> Cells<'a> {
        let bytes = || Bytes { strings: self.raw.cast(), len: self.len, chunk: PhantomData };

        // SAFETY: each arm has the element type that DuckDB stores for the type.
        unsafe {
            match of {
                SqlType::Boolean => Cells::Boolean(self.slice()),
                SqlType::TinyInt => Cells::TinyInt(self.slice()),
                SqlType::SmallInt => Cells::SmallInt(self.slice()),
                SqlType::Integer => Cells::Integer(self.slice()),
                SqlType::BigInt => Cells::BigInt(self.slice()),
                SqlType::UTinyInt => Cells::UTinyInt(self.slice()),
                SqlType::USmallInt => Cells::USmallInt(self.slice()),
                SqlType::UInteger => Cells::UInteger(self.slice()),
                SqlType::UBigInt => Cells::UBigInt(self.slice()),
                SqlType::HugeInt => Cells::HugeInt(self.slice()),
                SqlType::UHugeInt => Cells::UHugeInt(self.slice()),
                SqlType::Float => Cells::Float(self.slice()),
                SqlType::Double => Cells::Double(self.slice()),
                SqlType::Decimal { width: ..=4, scale } => Cells::Decimal16(self.slice(), *scale),
                SqlType::Decimal { width: ..=9, scale } => Cells::Decimal32(self.slice(), *scale),
                SqlType::Decimal { width: ..=18, scale } => Cells::Decimal64(self.slice(), *scale),
                SqlType::Decimal { scale, .. } => Cells::Decimal128(self.slice(), *scale),
                SqlType::Varchar => Cells::Text(bytes()),
                SqlType::Json => Cells::Json(bytes()),
                SqlType::Blob => Cells::Blob(bytes()),
                SqlType::Bit => Cells::Bit(bytes()),
                SqlType::Date => Cells::Date(self.slice()),
                SqlType::Time => Cells::Time(self.slice()),
                SqlType::TimeTz => Cells::TimeTz(self.slice()),
                SqlType::Timestamp => Cells::Timestamp(self.slice()),
                SqlType::TimestampSeconds => Cells::TimestampSeconds(self.slice()),
                SqlType::TimestampMillis => Cells::TimestampMillis(self.slice()),
                SqlType::TimestampNanos => Cells::TimestampNanos(self.slice()),
                SqlType::TimestampTz => Cells::TimestampTz(self.slice()),
                SqlType::Interval => Cells::Interval(self.slice()),
                SqlType::Uuid => Cells::Uuid(self.slice()),
                SqlType::Enum(labels) => match labels.len() {
                    0..=0xFF => Cells::Enum8(self.slice(), labels),
                    0x100..=0xFFFF => Cells::Enum16(self.slice(), labels),
                    _ => Cells::Enum32(self.slice(), labels),
                },
                _ => Cells::Null,
            }
        }
    }
}
