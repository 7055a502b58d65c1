//! Cells of DuckDB as clients of PostgreSQL read them, in text and in binary.

use bytes::{BufMut, BytesMut};
use duckdb::ffi;
use pgwire::api::Type;

use crate::{
    olap::{Cells, Column, Interval, SqlType},
    serve::pg_type,
    types::pg_print as print,
};

/// The days and microseconds from 1970-01-01, from which DuckDB counts, to 2000-01-01, from which
/// PostgreSQL counts.
const DAYS_TO_2000: i32 = 10_957;
const MICROS_TO_2000: i64 = 946_684_800_000_000;

/// The greatest offset of a time with a zone, in seconds, from which DuckDB subtracts the offset.
const MAX_OFFSET: i64 = 15 * 3600 + 59 * 60 + 59;

/// A value that PostgreSQL's form of its type has no room for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    #[error("a date or time is out of the range that PostgreSQL's binary form has")]
    OutOfRange,
    #[error("a list of lists of different lengths has no binary form: ask for text")]
    Jagged,
}

/// Appends the text of a value that is not NULL.
pub fn text(column: &Column<'_>, at: usize, to: &mut String) {
    match &column.cells {
        Cells::Boolean(values) => to.push(if values[at] != 0 { 't' } else { 'f' }),
        Cells::TinyInt(values) => print::put(to, values[at]),
        Cells::SmallInt(values) => print::put(to, values[at]),
        Cells::Integer(values) => print::put(to, values[at]),
        Cells::BigInt(values) => print::put(to, values[at]),
        Cells::UTinyInt(values) => print::put(to, values[at]),
        Cells::USmallInt(values) => print::put(to, values[at]),
        Cells::UInteger(values) => print::put(to, values[at]),
        Cells::UBigInt(values) => print::put(to, values[at]),
        Cells::HugeInt(values) => print::put(to, wide(&values[at])),
        Cells::UHugeInt(values) => print::put(to, unsigned(&values[at])),
        Cells::Float(values) => print::float4(values[at], to),
        Cells::Double(values) => print::float8(values[at], to),
        Cells::Decimal16(values, scale) => print::decimal(values[at].into(), *scale, to),
        Cells::Decimal32(values, scale) => print::decimal(values[at].into(), *scale, to),
        Cells::Decimal64(values, scale) => print::decimal(values[at].into(), *scale, to),
        Cells::Decimal128(values, scale) => print::decimal(wide(&values[at]), *scale, to),
        Cells::Text(values) | Cells::Json(values) => {
            to.push_str(&String::from_utf8_lossy(values.get(at)));
        }
        Cells::Blob(values) => print::bytes(values.get(at), to),
        Cells::Bit(values) => {
            bits(values.get(at)).for_each(|bit| to.push(if bit { '1' } else { '0' }));
        }
        Cells::Date(values) => print::date(values[at], to),
        Cells::Time(values) => print::clock(values[at], to),
        Cells::TimeTz(values) => time_tz(values[at], to),
        Cells::TimestampTz(values) => print::timestamp(values[at], true, to),
        Cells::Interval(values) => {
            let Interval { months, days, micros } = values[at];
            print::interval(months, days, micros, to);
        }
        Cells::Uuid(values) => uuid_text(&values[at], to),
        Cells::Enum8(..) | Cells::Enum16(..) | Cells::Enum32(..) => {
            to.push_str(label(column, at));
        }
        Cells::List(..) | Cells::Array(..) => array_text(column, at, to),
        Cells::Vector(entries, items) => vector_text(&entries[at], items, to),
        Cells::Struct(fields) => record_text(fields, at, to),
        Cells::Map(..) => json(column, at, to),
        Cells::Null => {}
        Cells::Timestamp(_)
        | Cells::TimestampSeconds(_)
        | Cells::TimestampMillis(_)
        | Cells::TimestampNanos(_) => print::timestamp(micros(column, at), false, to),
    }
}

/// Appends the binary form of a value that is not NULL, as the type's send function makes it.
pub fn binary(
    column: &Column<'_>,
    of: &SqlType,
    at: usize,
    to: &mut BytesMut,
) -> Result<(), EncodeError> {
    match &column.cells {
        Cells::Boolean(values) => to.put_u8(u8::from(values[at] != 0)),
        Cells::TinyInt(values) => to.put_i16(values[at].into()),
        Cells::SmallInt(values) => to.put_i16(values[at]),
        Cells::UTinyInt(values) => to.put_i16(values[at].into()),
        Cells::Integer(values) => to.put_i32(values[at]),
        Cells::USmallInt(values) => to.put_i32(values[at].into()),
        Cells::BigInt(values) => to.put_i64(values[at]),
        Cells::UInteger(values) => to.put_u32(values[at]),
        Cells::UBigInt(values) => numeric(false, values[at].into(), 0, to),
        Cells::HugeInt(values) => signed_numeric(wide(&values[at]), 0, to),
        Cells::UHugeInt(values) => numeric(false, unsigned(&values[at]), 0, to),
        Cells::Float(values) => to.put_f32(values[at]),
        Cells::Double(values) => to.put_f64(values[at]),
        Cells::Decimal16(values, scale) => signed_numeric(values[at].into(), *scale, to),
        Cells::Decimal32(values, scale) => signed_numeric(values[at].into(), *scale, to),
        Cells::Decimal64(values, scale) => signed_numeric(values[at].into(), *scale, to),
        Cells::Decimal128(values, scale) => signed_numeric(wide(&values[at]), *scale, to),
        Cells::Text(values) | Cells::Json(values) | Cells::Blob(values) => {
            to.put_slice(values.get(at));
        }
        Cells::Bit(values) => put_bits(values.get(at), to),
        Cells::Date(values) => to.put_i32(pg_date(values[at])?),
        Cells::Time(values) => to.put_i64(values[at]),
        Cells::TimeTz(values) => {
            let (micros, offset) = split_time_tz(values[at]);
            to.put_i64(micros);
            // PostgreSQL counts to the west.
            to.put_i32(i32::try_from(-offset).map_err(|_| EncodeError::OutOfRange)?);
        }
        Cells::TimestampTz(values) => to.put_i64(pg_timestamp(values[at])?),
        Cells::Timestamp(_)
        | Cells::TimestampSeconds(_)
        | Cells::TimestampMillis(_)
        | Cells::TimestampNanos(_) => to.put_i64(pg_timestamp(micros(column, at))?),
        Cells::Interval(values) => {
            let Interval { months, days, micros } = values[at];
            to.put_i64(micros);
            to.put_i32(days);
            to.put_i32(months);
        }
        Cells::Uuid(values) => to.put_u128(uuid(&values[at])),
        Cells::Enum8(..) | Cells::Enum16(..) | Cells::Enum32(..) => {
            to.put_slice(label(column, at).as_bytes());
        }
        Cells::List(..) | Cells::Vector(..) | Cells::Array(..) => {
            array_binary(column, of, at, to)?;
        }
        Cells::Struct(fields) => record_binary(fields, of, at, to)?,
        Cells::Map(..) => {
            let mut object = String::new();
            json(column, at, &mut object);
            to.put_slice(object.as_bytes());
        }
        Cells::Null => {}
    }
    Ok(())
}

fn wide(value: &ffi::duckdb_hugeint) -> i128 {
    i128::from(value.upper) << 64 | i128::from(value.lower)
}

fn unsigned(value: &ffi::duckdb_uhugeint) -> u128 {
    u128::from(value.upper) << 64 | u128::from(value.lower)
}

/// DuckDB inverts the first bit, so that UUIDs sort as signed numbers do.
fn uuid(value: &ffi::duckdb_hugeint) -> u128 {
    wide(value).cast_unsigned() ^ 1 << 127
}

fn uuid_text(value: &ffi::duckdb_hugeint, to: &mut String) {
    let digits = format!("{:032x}", uuid(value));
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part));
    to.push_str(&parts.map(Option::unwrap_or_default).join("-"));
}

/// Returns the label of an enum's value.
fn label<'a>(column: &Column<'a>, at: usize) -> &'a str {
    let (code, labels): (usize, &'a [String]) = match &column.cells {
        Cells::Enum8(codes, labels) => (codes[at].into(), labels),
        Cells::Enum16(codes, labels) => (codes[at].into(), labels),
        Cells::Enum32(codes, labels) => (codes[at] as usize, labels),
        _ => return "",
    };
    labels.get(code).map_or("", String::as_str)
}

/// Returns the microseconds of a timestamp of any unit. The infinities stay what they are.
fn micros(column: &Column<'_>, at: usize) -> i64 {
    let scaled = |value: i64, by: i64| match value {
        i64::MAX | i64::MIN => value,
        _ if value == -i64::MAX => value,
        _ => value.saturating_mul(by),
    };
    match &column.cells {
        Cells::Timestamp(values) => values[at],
        Cells::TimestampSeconds(values) => scaled(values[at], 1_000_000),
        Cells::TimestampMillis(values) => scaled(values[at], 1_000),
        Cells::TimestampNanos(values) => match values[at] {
            i64::MAX => i64::MAX,
            value if value == -i64::MAX => value,
            value => value.div_euclid(1_000),
        },
        _ => 0,
    }
}

/// Returns microseconds since midnight, and the offset to the east in seconds.
fn split_time_tz(value: u64) -> (i64, i64) {
    let (micros, offset) = (value >> 24, value & 0xFF_FFFF);
    (micros.cast_signed(), MAX_OFFSET - offset.cast_signed())
}

/// Appends a time with a zone (`timetz_out`): the offset with as many parts as it needs.
fn time_tz(value: u64, to: &mut String) {
    let (micros, offset) = split_time_tz(value);
    print::clock(micros, to);

    let size = offset.unsigned_abs();
    let (hours, minutes, seconds) = (size / 3600, size / 60 % 60, size % 60);
    print::put(to, format_args!("{}{hours:02}", if offset < 0 { '-' } else { '+' }));
    if minutes != 0 || seconds != 0 {
        print::put(to, format_args!(":{minutes:02}"));
    }
    if seconds != 0 {
        print::put(to, format_args!(":{seconds:02}"));
    }
}

fn pg_date(days: i32) -> Result<i32, EncodeError> {
    match days {
        i32::MAX => Ok(i32::MAX),
        _ if days <= -i32::MAX => Ok(i32::MIN),
        _ => days.checked_sub(DAYS_TO_2000).ok_or(EncodeError::OutOfRange),
    }
}

fn pg_timestamp(micros: i64) -> Result<i64, EncodeError> {
    match micros {
        i64::MAX => Ok(i64::MAX),
        _ if micros <= -i64::MAX => Ok(i64::MIN),
        _ => micros.checked_sub(MICROS_TO_2000).ok_or(EncodeError::OutOfRange),
    }
}

/// Returns the bits of a BIT: DuckDB fills up the first byte with ones, and counts them in front.
fn bits(value: &[u8]) -> impl Iterator<Item = bool> + '_ {
    let (&unused, bytes) = value.split_first().unwrap_or((&0, &[]));
    let all = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1));
    all.skip(unused.into())
}

/// Appends the number of bits, and the bits from the first byte's highest on (`varbit_send`).
fn put_bits(value: &[u8], to: &mut BytesMut) {
    let all: Vec<bool> = bits(value).collect();
    to.put_i32(i32::try_from(all.len()).unwrap_or(i32::MAX));
    for byte in all.chunks(8) {
        let packed = byte.iter().zip((0..8).rev()).map(|(&bit, shift)| u8::from(bit) << shift);
        to.put_u8(packed.sum());
    }
}

fn signed_numeric(value: i128, scale: u8, to: &mut BytesMut) {
    numeric(value < 0, value.unsigned_abs(), scale, to);
}

/// Appends a number as `numeric_send` does: groups of four digits, their weight, sign and scale.
fn numeric(is_negative: bool, size: u128, scale: u8, to: &mut BytesMut) {
    // The groups begin at the point, so the lowest one may have fewer than four digits.
    let missing = (4 - u32::from(scale) % 4) % 4;
    let after_point = (u32::from(scale) + missing) / 4;

    let mut groups: Vec<i16> = Vec::new();
    let mut rest = size;
    if missing > 0 {
        let base = 10_u128.pow(4 - missing);
        groups.push((rest % base * 10_u128.pow(missing)) as i16);
        rest /= base;
    }
    while rest > 0 {
        groups.push((rest % 10_000) as i16);
        rest /= 10_000;
    }
    while groups.last() == Some(&0) {
        groups.pop();
    }

    let weight = groups.len() as i16 - 1 - after_point as i16;
    let significant = groups.iter().position(|&group| group != 0).unwrap_or(groups.len());
    let groups = groups.get(significant..).unwrap_or_default();
    to.put_i16(groups.len() as i16);
    to.put_i16(if groups.is_empty() { 0 } else { weight });
    to.put_u16(if is_negative && size > 0 { 0x4000 } else { 0 });
    to.put_i16(scale.into());
    groups.iter().rev().for_each(|&group| to.put_i16(group));
}

/// Returns the items of a list: their column, and where they stand.
fn items<'a, 'b>(column: &'b Column<'a>, at: usize) -> Option<(&'b Column<'a>, usize, usize)> {
    match &column.cells {
        Cells::List(entries, items) | Cells::Vector(entries, items) => {
            let entry = entries[at];
            let start = entry.offset as usize;
            Some((items, start, start + entry.length as usize))
        }
        Cells::Array(size, items) => Some((items, at * size, (at + 1) * size)),
        _ => None,
    }
}

/// Appends a list as `array_out` prints an array.
fn array_text(column: &Column<'_>, at: usize, to: &mut String) {
    let Some((items, start, end)) = items(column, at) else { return };
    let is_nested = matches!(items.cells, Cells::List(..) | Cells::Array(..));
    let mut item = String::new();

    to.push('{');
    for at in start..end {
        if at > start {
            to.push(',');
        }
        if items.is_null(at) {
            to.push_str("NULL");
        } else if is_nested {
            array_text(items, at, to);
        } else {
            item.clear();
            text(items, at, &mut item);
            print::array_item(&item, b',', to);
        }
    }
    to.push('}');
}

/// Appends numbers as `int2vectorout` prints them.
fn vector_text(entry: &ffi::duckdb_list_entry, items: &Column<'_>, to: &mut String) {
    let start = entry.offset as usize;
    for at in start..start + entry.length as usize {
        to.push_str(if at > start { " " } else { "" });
        text(items, at, to);
    }
}

/// Appends a STRUCT as `record_out` prints a row.
fn record_text(fields: &[Column<'_>], at: usize, to: &mut String) {
    let mut value = String::new();
    to.push('(');
    for (number, field) in fields.iter().enumerate() {
        if number > 0 {
            to.push(',');
        }
        if field.is_null(at) {
            continue;
        }

        value.clear();
        text(field, at, &mut value);
        let is_special =
            |sign: char| matches!(sign, '"' | '\\' | '(' | ')' | ',') || sign.is_whitespace();
        if !value.is_empty() && !value.contains(is_special) {
            to.push_str(&value);
            continue;
        }
        to.push('"');
        for sign in value.chars() {
            if matches!(sign, '"' | '\\') {
                to.push(sign);
            }
            to.push(sign);
        }
        to.push('"');
    }
    to.push(')');
}

/// Appends a value as JSON; a MAP has no other form that clients know.
fn json(column: &Column<'_>, at: usize, to: &mut String) {
    if column.is_null(at) {
        return to.push_str("null");
    }

    let quoted = |value: &str, to: &mut String| {
        to.push_str(&serde_json::Value::from(value).to_string());
    };
    let mut value = String::new();
    match &column.cells {
        Cells::Map(entries, keys, values) => {
            let entry = entries[at];
            let start = entry.offset as usize;
            to.push('{');
            for at in start..start + entry.length as usize {
                to.push_str(if at > start { ", " } else { "" });
                value.clear();
                text(keys, at, &mut value);
                quoted(&value, to);
                to.push_str(": ");
                json(values, at, to);
            }
            to.push('}');
        }
        Cells::List(..) | Cells::Vector(..) | Cells::Array(..) => {
            let Some((items, start, end)) = items(column, at) else { return };
            to.push('[');
            for at in start..end {
                to.push_str(if at > start { ", " } else { "" });
                json(items, at, to);
            }
            to.push(']');
        }
        Cells::Boolean(values) => to.push_str(if values[at] != 0 { "true" } else { "false" }),
        Cells::TinyInt(_)
        | Cells::SmallInt(_)
        | Cells::Integer(_)
        | Cells::BigInt(_)
        | Cells::UTinyInt(_)
        | Cells::USmallInt(_)
        | Cells::UInteger(_)
        | Cells::UBigInt(_)
        | Cells::HugeInt(_)
        | Cells::UHugeInt(_)
        | Cells::Decimal16(..)
        | Cells::Decimal32(..)
        | Cells::Decimal64(..)
        | Cells::Decimal128(..)
        | Cells::Json(_) => text(column, at, to),
        _ => {
            text(column, at, &mut value);
            quoted(&value, to);
        }
    }
}

/// Appends a list as `array_send` does: dimensions, whether an item is NULL, the items' type, the
/// length of each dimension, and the items of all of them.
fn array_binary(
    column: &Column<'_>,
    of: &SqlType,
    at: usize,
    to: &mut BytesMut,
) -> Result<(), EncodeError> {
    let mut lengths = Vec::new();
    measure(column, at, 0, &mut lengths)?;
    // No item at all has no dimension.
    if lengths.contains(&0) {
        lengths.clear();
    }

    to.put_i32(lengths.len() as i32);
    let flag_at = to.len();
    to.put_i32(0);
    to.put_u32(pg_type::leaf(of).oid());
    for length in &lengths {
        to.put_i32(*length as i32);
        to.put_i32(1);
    }

    let mut has_null = false;
    if !lengths.is_empty() {
        put_items(column, of, at, to, &mut has_null)?;
    }
    if has_null && let Some(flag) = to.get_mut(flag_at..flag_at + 4) {
        flag.copy_from_slice(&1_i32.to_be_bytes());
    }
    Ok(())
}

/// Finds the length of each dimension; lists on one level have to have one length.
fn measure(
    column: &Column<'_>,
    at: usize,
    depth: usize,
    lengths: &mut Vec<usize>,
) -> Result<(), EncodeError> {
    let Some((items, start, end)) = items(column, at) else { return Ok(()) };
    match lengths.get(depth) {
        None => lengths.push(end - start),
        Some(length) if *length == end - start => {}
        Some(_) => return Err(EncodeError::Jagged),
    }
    if !matches!(items.cells, Cells::List(..) | Cells::Array(..)) {
        return Ok(());
    }

    for at in start..end {
        if items.is_null(at) {
            return Err(EncodeError::Jagged);
        }
        measure(items, at, depth + 1, lengths)?;
    }
    Ok(())
}

fn put_items(
    column: &Column<'_>,
    of: &SqlType,
    at: usize,
    to: &mut BytesMut,
    has_null: &mut bool,
) -> Result<(), EncodeError> {
    let (SqlType::List(item_type) | SqlType::Vector(item_type) | SqlType::Array(item_type, _)) = of
    else {
        return Ok(());
    };
    let Some((items, start, end)) = items(column, at) else { return Ok(()) };

    for at in start..end {
        if matches!(items.cells, Cells::List(..) | Cells::Array(..)) {
            put_items(items, item_type, at, to, has_null)?;
        } else {
            *has_null |= items.is_null(at);
            put_field(items, item_type, at, to)?;
        }
    }
    Ok(())
}

/// Appends a STRUCT as `record_send` does.
fn record_binary(
    fields: &[Column<'_>],
    of: &SqlType,
    at: usize,
    to: &mut BytesMut,
) -> Result<(), EncodeError> {
    let SqlType::Struct(types) = of else { return Ok(()) };
    to.put_i32(fields.len() as i32);
    for (field, (_, of)) in fields.iter().zip(types) {
        let (oid, _): (Type, i32) = pg_type::of_result(of);
        to.put_u32(oid.oid());
        put_field(field, of, at, to)?;
    }
    Ok(())
}

/// Appends a value with its length, or -1 for NULL.
pub fn put_field(
    column: &Column<'_>,
    of: &SqlType,
    at: usize,
    to: &mut BytesMut,
) -> Result<(), EncodeError> {
    if column.is_null(at) {
        to.put_i32(-1);
        return Ok(());
    }

    let length_at = to.len();
    to.put_i32(0);
    binary(column, of, at, to)?;
    let length = (to.len() - length_at - 4) as i32;
    if let Some(place) = to.get_mut(length_at..length_at + 4) {
        place.copy_from_slice(&length.to_be_bytes());
    }
    Ok(())
}
