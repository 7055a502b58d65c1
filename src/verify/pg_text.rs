//! Prints values of the copy as PostgreSQL prints them: the elements of arrays and of hstore, where
//! source and copy hash text.
//!
//! The text of one value is that of `types::pg_print`.

use arrow::{
    array::{
        Array, BinaryArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int8Array,
        Int16Array, Int32Array, Int64Array, ListArray, StringArray, StructArray,
        Time64MicrosecondArray, TimestampMicrosecondArray, UInt32Array, UInt64Array,
    },
    datatypes::{DataType, TimeUnit},
};

use super::row_hash::{CellError, Intervals, typed};
use crate::types::pg_print::{
    array_item, bytes, clock, date, decimal, float4, float8, in_quotes, interval, put, timestamp,
};

/// The values of an Arrow array, typed once for all rows.
pub(super) enum Values<'a> {
    Bool(&'a Int8Array),
    Int2(&'a Int16Array),
    Int4(&'a Int32Array),
    Int8(&'a Int64Array),
    UInt4(&'a UInt32Array),
    UInt8(&'a UInt64Array),
    Float4(&'a Float32Array),
    Float8(&'a Float64Array),
    Decimal { values: &'a Decimal128Array, scale: u8 },
    Date(&'a Date32Array),
    Timestamp { values: &'a TimestampMicrosecondArray, with_zone: bool },
    Time(&'a Time64MicrosecondArray),
    Interval(Intervals<'a>),
    Text(&'a StringArray),
    Bytes(&'a BinaryArray),
    List { lists: &'a ListArray, items: Box<Values<'a>> },
}

impl<'a> Values<'a> {
    /// Returns the values of a column, or of the items of a LIST.
    ///
    /// # Errors
    /// No column that is hashed as text arrives as this Arrow type.
    pub fn of(array: &'a dyn Array) -> Result<Self, CellError> {
        Ok(match array.data_type() {
            DataType::Int8 => Self::Bool(typed(array)?),
            DataType::Int16 => Self::Int2(typed(array)?),
            DataType::Int32 => Self::Int4(typed(array)?),
            DataType::Int64 => Self::Int8(typed(array)?),
            DataType::UInt32 => Self::UInt4(typed(array)?),
            DataType::UInt64 => Self::UInt8(typed(array)?),
            DataType::Float32 => Self::Float4(typed(array)?),
            DataType::Float64 => Self::Float8(typed(array)?),
            DataType::Decimal128(_, scale) => {
                Self::Decimal { values: typed(array)?, scale: scale_of(*scale)? }
            }
            DataType::Date32 => Self::Date(typed(array)?),
            DataType::Timestamp(TimeUnit::Microsecond, zone) => {
                Self::Timestamp { values: typed(array)?, with_zone: zone.is_some() }
            }
            DataType::Time64(TimeUnit::Microsecond) => Self::Time(typed(array)?),
            DataType::Struct(_) => Self::Interval(Intervals::of(array)?),
            DataType::Utf8 => Self::Text(typed(array)?),
            DataType::Binary => Self::Bytes(typed(array)?),
            DataType::List(_) => {
                let lists: &ListArray = typed(array)?;
                Self::List { lists, items: Box::new(Self::of(lists.values().as_ref())?) }
            }
            other => return Err(CellError::Type { found: other.clone() }),
        })
    }

    fn is_null(&self, at: usize) -> bool {
        match self {
            Self::Bool(values) => values.is_null(at),
            Self::Int2(values) => values.is_null(at),
            Self::Int4(values) => values.is_null(at),
            Self::Int8(values) => values.is_null(at),
            Self::UInt4(values) => values.is_null(at),
            Self::UInt8(values) => values.is_null(at),
            Self::Float4(values) => values.is_null(at),
            Self::Float8(values) => values.is_null(at),
            Self::Decimal { values, .. } => values.is_null(at),
            Self::Date(values) => values.is_null(at),
            Self::Timestamp { values, .. } => values.is_null(at),
            Self::Time(values) => values.is_null(at),
            Self::Interval(values) => values.is_null(at),
            Self::Text(values) => values.is_null(at),
            Self::Bytes(values) => values.is_null(at),
            Self::List { lists, .. } => lists.is_null(at),
        }
    }

    /// Appends the text of a value that is not NULL, without quotes.
    fn print(&self, at: usize, delimiter: u8, to: &mut String) -> Result<(), CellError> {
        match self {
            Self::Bool(values) => to.push(if values.value(at) != 0 { 't' } else { 'f' }),
            Self::Int2(values) => put(to, values.value(at)),
            Self::Int4(values) => put(to, values.value(at)),
            Self::Int8(values) => put(to, values.value(at)),
            Self::UInt4(values) => put(to, values.value(at)),
            Self::UInt8(values) => put(to, values.value(at)),
            Self::Float4(values) => float4(values.value(at), to),
            Self::Float8(values) => float8(values.value(at), to),
            Self::Decimal { values, scale } => decimal(values.value(at), *scale, to),
            Self::Date(values) => date(values.value(at), to),
            Self::Timestamp { values, with_zone } => timestamp(values.value(at), *with_zone, to),
            Self::Time(values) => clock(values.value(at), to),
            Self::Interval(values) => {
                let (months, days, micros) = values.value(at)?;
                interval(months, days, micros, to);
            }
            Self::Text(values) => to.push_str(values.value(at)),
            Self::Bytes(values) => bytes(values.value(at), to),
            Self::List { .. } => self.print_list(at, delimiter, to)?,
        }
        Ok(())
    }

    /// Appends a LIST as `array_out` (`utils/adt/arrayfuncs.c`) prints an array whose lower bounds
    /// are 1.
    fn print_list(&self, at: usize, delimiter: u8, to: &mut String) -> Result<(), CellError> {
        let Self::List { lists, items } = self else { return Ok(()) };
        let (start, end) = span(lists, at)?;
        let is_nested = matches!(**items, Self::List { .. });
        let mut item = String::new();

        to.push('{');
        for at in start..end {
            if at > start {
                to.push(char::from(delimiter));
            }

            if items.is_null(at) {
                to.push_str("NULL");
            } else if is_nested {
                items.print(at, delimiter, to)?;
            } else {
                item.clear();
                items.print(at, delimiter, &mut item)?;
                array_item(&item, delimiter, to);
            }
        }
        to.push('}');
        Ok(())
    }
}

/// Returns the places of a list's items.
fn span(lists: &ListArray, at: usize) -> Result<(usize, usize), CellError> {
    let place = |at: usize| lists.offsets().get(at).and_then(|&place| usize::try_from(place).ok());
    place(at).zip(place(at + 1)).ok_or(CellError::Value { expected: "list" })
}

pub(super) fn scale_of(scale: i8) -> Result<u8, CellError> {
    u8::try_from(scale).map_err(|_| CellError::Value { expected: "scale" })
}

/// Calls `each` with the text of each row's array.
pub(super) fn arrays(
    array: &dyn Array,
    delimiter: u8,
    mut each: impl FnMut(Option<&str>),
) -> Result<(), CellError> {
    let values = Values::of(array)?;
    let mut text = String::new();

    for at in 0..array.len() {
        if values.is_null(at) {
            each(None);
            continue;
        }

        text.clear();
        values.print_list(at, delimiter, &mut text)?;
        each(Some(&text));
    }
    Ok(())
}

/// Calls `each` with the text of each row's hstore, as `hstore_out` (`contrib/hstore/hstore_io.c`)
/// prints it. The rows are lists of entries.
pub(super) fn hstores(
    array: &dyn Array,
    mut each: impl FnMut(Option<&str>),
) -> Result<(), CellError> {
    let lists: &ListArray = typed(array)?;
    let entries: &StructArray = typed(lists.values().as_ref())?;
    let part = |name: &str| {
        let column = entries.column_by_name(name);
        column.ok_or_else(|| CellError::Type { found: entries.data_type().clone() })
    };
    let keys: &StringArray = typed(part("key")?.as_ref())?;
    let values: &StringArray = typed(part("value")?.as_ref())?;
    let mut text = String::new();

    for at in 0..lists.len() {
        if lists.is_null(at) {
            each(None);
            continue;
        }

        text.clear();
        let (start, end) = span(lists, at)?;
        for at in start..end {
            if at > start {
                text.push_str(", ");
            }

            in_quotes(keys.value(at), &mut text);
            text.push_str("=>");
            if values.is_null(at) {
                text.push_str("NULL");
            } else {
                in_quotes(values.value(at), &mut text);
            }
        }
        each(Some(&text));
    }
    Ok(())
}
