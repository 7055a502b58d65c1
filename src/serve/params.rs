//! The values of parameters, from the forms that clients send into those that DuckDB takes.

use pgwire::api::Type;
use tokio_postgres::types::Kind;

use super::error::SqlError;
use crate::{olap::Value, types::pg_print as print};

const DAYS_TO_2000: i32 = 10_957;
const MICROS_TO_2000: i64 = 946_684_800_000_000;

/// Returns the value of a parameter. Most values are text that a cast in the statement reads.
pub fn value(of: &Type, bytes: Option<&[u8]>, is_binary: bool) -> Result<Value, SqlError> {
    let Some(bytes) = bytes else { return Ok(Value::Null) };
    if is_binary { of_binary(of, bytes) } else { of_text(of, utf8(bytes)?) }
}

fn wrong(of: &Type) -> SqlError {
    SqlError::new("22P03", format!("incorrect binary data for a parameter of type {}", of.name()))
}

fn utf8(bytes: &[u8]) -> Result<&str, SqlError> {
    std::str::from_utf8(bytes)
        .map_err(|_| SqlError::new("22021", "a parameter holds text that is not UTF-8"))
}

fn of_text(of: &Type, text: &str) -> Result<Value, SqlError> {
    Ok(match *of {
        Type::NUMERIC => number(text),
        Type::BYTEA => Value::Blob(bytea(text)?),
        Type::DATE | Type::TIMESTAMP | Type::TIMESTAMPTZ => Value::Text(with_era(text)),
        _ if is_array(of) => Value::Text(list_of(text)?),
        _ => Value::Text(text.to_owned()),
    })
}

fn is_array(of: &Type) -> bool {
    of.name().starts_with('_')
}

/// DuckDB writes the era in parentheses, after the date.
fn with_era(text: &str) -> String {
    match text.strip_suffix(" BC").map(|rest| rest.split_once(' ').unwrap_or((rest, ""))) {
        Some((date, time)) => format!("{date} (BC) {time}").trim_end().to_owned(),
        None => text.to_owned(),
    }
}

/// A number keeps its digits: DuckDB gets it with its own precision and scale. What is no decimal
/// of 38 digits stays text.
fn number(text: &str) -> Value {
    let trimmed = text.trim();
    let digits = trimmed.trim_start_matches(['-', '+']);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let joined = format!("{whole}{fraction}");
    let is_plain = !joined.is_empty() && joined.bytes().all(|byte| byte.is_ascii_digit());

    match joined.parse::<i128>() {
        Ok(size) if is_plain && joined.len() <= 38 => Value::Decimal {
            value: if trimmed.starts_with('-') { -size } else { size },
            width: joined.len().max(fraction.len() + 1).clamp(1, 38) as u8,
            scale: fraction.len() as u8,
        },
        _ => Value::Text(text.to_owned()),
    }
}

fn bytea(text: &str) -> Result<Vec<u8>, SqlError> {
    let wrong = || SqlError::new("22P02", "invalid hexadecimal data of a parameter of type bytea");
    let Some(digits) = text.strip_prefix("\\x") else { return Ok(text.as_bytes().to_vec()) };
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return Err(wrong());
    }

    let byte = |pair: &[u8; 2]| {
        let pair = std::str::from_utf8(pair).ok()?;
        u8::from_str_radix(pair, 16).ok()
    };
    pairs.iter().map(|pair| byte(pair).ok_or_else(wrong)).collect()
}

fn fixed<const N: usize>(of: &Type, bytes: &[u8]) -> Result<[u8; N], SqlError> {
    bytes.try_into().map_err(|_| wrong(of))
}

fn of_binary(of: &Type, bytes: &[u8]) -> Result<Value, SqlError> {
    let printed = |print: &dyn Fn(&mut String)| {
        let mut text = String::new();
        print(&mut text);
        Value::Text(with_era(&text))
    };

    Ok(match *of {
        Type::BOOL => Value::Boolean(fixed::<1>(of, bytes)? != [0]),
        Type::INT2 => Value::BigInt(i16::from_be_bytes(fixed(of, bytes)?).into()),
        Type::INT4 => Value::BigInt(i32::from_be_bytes(fixed(of, bytes)?).into()),
        Type::INT8 => Value::BigInt(i64::from_be_bytes(fixed(of, bytes)?)),
        Type::OID => Value::BigInt(u32::from_be_bytes(fixed(of, bytes)?).into()),
        Type::FLOAT4 => Value::Float(f32::from_be_bytes(fixed(of, bytes)?)),
        Type::FLOAT8 => Value::Double(f64::from_be_bytes(fixed(of, bytes)?)),
        Type::NUMERIC => number(&numeric(of, bytes)?),
        Type::BYTEA => Value::Blob(bytes.to_vec()),
        Type::JSONB => Value::Text(utf8(bytes.get(1..).unwrap_or_default())?.to_owned()),
        Type::UUID => {
            let digits = format!("{:032x}", u128::from_be_bytes(fixed(of, bytes)?));
            Value::Text(digits)
        }
        Type::DATE => {
            let days = match i32::from_be_bytes(fixed(of, bytes)?) {
                i32::MAX => i32::MAX,
                i32::MIN => -i32::MAX,
                days => days.checked_add(DAYS_TO_2000).ok_or_else(|| wrong(of))?,
            };
            printed(&|to| print::date(days, to))
        }
        Type::TIMESTAMP | Type::TIMESTAMPTZ => {
            let micros = match i64::from_be_bytes(fixed(of, bytes)?) {
                i64::MAX => i64::MAX,
                i64::MIN => -i64::MAX,
                micros => micros.checked_add(MICROS_TO_2000).ok_or_else(|| wrong(of))?,
            };
            printed(&|to| print::timestamp(micros, *of == Type::TIMESTAMPTZ, to))
        }
        Type::TIME => {
            let micros = i64::from_be_bytes(fixed(of, bytes)?);
            printed(&|to| print::clock(micros, to))
        }
        Type::INTERVAL => {
            let bytes: [u8; 16] = fixed(of, bytes)?;
            let [micros, rest] = [0..8, 8..16].map(|part| bytes.get(part).unwrap_or_default());
            let (days, months) = rest.split_at(4);
            Value::Text(format!(
                "{} months {} days {} microseconds",
                i32::from_be_bytes(fixed(of, months)?),
                i32::from_be_bytes(fixed(of, days)?),
                i64::from_be_bytes(fixed(of, micros)?)
            ))
        }
        _ if is_array(of) => Value::Text(list_of_binary(of, bytes)?),
        _ => Value::Text(utf8(bytes)?.to_owned()),
    })
}

/// Reads what `numeric_send` writes.
fn numeric(of: &Type, bytes: &[u8]) -> Result<String, SqlError> {
    const NEGATIVE: i16 = 0x4000;
    let parts: Vec<i16> =
        bytes.as_chunks::<2>().0.iter().map(|pair| i16::from_be_bytes(*pair)).collect();
    let [_, weight, sign, scale, groups @ ..] = parts.as_slice() else { return Err(wrong(of)) };
    if ![0, NEGATIVE].contains(sign) {
        return Ok("NaN".to_owned());
    }

    let group = |at: i32| {
        let place = usize::try_from(i32::from(*weight) - at).ok();
        place.and_then(|place| groups.get(place)).copied().unwrap_or_default()
    };
    let mut text = String::from(if *sign == NEGATIVE { "-" } else { "" });
    let whole: String =
        (0..=i32::from(*weight)).rev().map(|at| format!("{:04}", group(at))).collect();
    let whole = whole.trim_start_matches('0');
    text.push_str(if whole.is_empty() { "0" } else { whole });

    let scale = usize::try_from(*scale).unwrap_or_default();
    if scale > 0 {
        let places = i32::try_from(scale.div_ceil(4)).unwrap_or_default();
        let fraction: String = (1..=places).map(|at| format!("{:04}", group(-at))).collect();
        text.push('.');
        text.push_str(fraction.get(..scale).unwrap_or(&fraction));
    }
    Ok(text)
}

/// Returns the text of a LIST for the text of an array: `{1,NULL,"a b"}` is `[1, NULL, "a b"]`.
fn list_of(text: &str) -> Result<String, SqlError> {
    let malformed = || SqlError::new("22P02", "malformed array literal of a parameter");
    // Bounds, as in `[0:1]={1,2}`, do not matter here.
    let start = text.find('{').ok_or_else(malformed)?;
    let mut signs = text.get(start..).unwrap_or_default().chars().peekable();
    let (mut list, mut depth) = (String::new(), 0_usize);

    while let Some(sign) = signs.next() {
        match sign {
            '{' => {
                depth += 1;
                list.push('[');
            }
            '}' => {
                depth = depth.checked_sub(1).ok_or_else(malformed)?;
                list.push(']');
            }
            ',' => list.push_str(", "),
            '"' => {
                let mut item = String::new();
                loop {
                    match signs.next().ok_or_else(malformed)? {
                        '"' => break,
                        '\\' => item.push(signs.next().ok_or_else(malformed)?),
                        other => item.push(other),
                    }
                }
                put_item(&item, &mut list);
            }
            _ if sign.is_whitespace() => {}
            _ => {
                let mut item = String::from(sign);
                while let Some(next) = signs.next_if(|next| !matches!(next, ',' | '}' | '{')) {
                    item.push(next);
                }
                let item = item.trim_end();
                if item.eq_ignore_ascii_case("null") {
                    list.push_str("NULL");
                } else {
                    put_item(item, &mut list);
                }
            }
        }
    }
    if depth == 0 { Ok(list) } else { Err(malformed()) }
}

/// Appends an item in quotes, as DuckDB's cast from text reads it.
fn put_item(item: &str, list: &mut String) {
    list.push('"');
    for sign in item.chars() {
        if matches!(sign, '"' | '\\') {
            list.push('\\');
        }
        list.push(sign);
    }
    list.push('"');
}

/// Reads what `array_send` writes.
fn list_of_binary(of: &Type, bytes: &[u8]) -> Result<String, SqlError> {
    let mut rest = bytes;
    let mut next = |len: usize| {
        let (taken, left) = rest.split_at_checked(len).ok_or_else(|| wrong(of))?;
        rest = left;
        Ok::<_, SqlError>(taken)
    };
    let word = |bytes: &[u8]| Ok::<_, SqlError>(i32::from_be_bytes(fixed(of, bytes)?));

    let dimensions = word(next(4)?)?;
    next(4)?;
    let item_oid = word(next(4)?)?.cast_unsigned();
    // The client's own word for it must not lead to arrays in arrays.
    let Kind::Array(item_type) = of.kind() else { return Err(wrong(of)) };
    if item_type.oid() != item_oid {
        return Err(wrong(of));
    }
    let mut lengths = Vec::new();
    for _ in 0..dimensions {
        lengths.push(usize::try_from(word(next(4)?)?).map_err(|_| wrong(of))?);
        next(4)?;
    }
    if lengths.is_empty() {
        return Ok("[]".to_owned());
    }
    if lengths.len() > 1 {
        return Err(SqlError::new("0A000", "an array parameter has one dimension here"));
    }

    let mut items = Vec::new();
    for _ in 0..lengths.first().copied().unwrap_or_default() {
        let length = word(next(4)?)?;
        let Ok(length) = usize::try_from(length) else {
            items.push("NULL".to_owned());
            continue;
        };
        let item = match of_binary(item_type, next(length)?)? {
            Value::Null => "NULL".to_owned(),
            Value::Boolean(value) => value.to_string(),
            Value::BigInt(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Double(value) => value.to_string(),
            Value::Decimal { value, scale, .. } => {
                let mut text = String::new();
                print::decimal(value, scale, &mut text);
                text
            }
            Value::Text(text) => {
                let mut item = String::new();
                put_item(&text, &mut item);
                item
            }
            Value::Blob(_) => {
                return Err(SqlError::new("0A000", "an array of bytea is no parameter"));
            }
        };
        items.push(item);
    }
    Ok(format!("[{}]", items.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_keeps_its_scale() {
        let decimal = |value, width, scale| Value::Decimal { value, width, scale };
        assert_eq!(number("1.50"), decimal(150, 3, 2));
        assert_eq!(number("-0.005"), decimal(-5, 4, 3));
        assert_eq!(number("7"), decimal(7, 1, 0));
        assert_eq!(number("NaN"), Value::Text("NaN".to_owned()));
        assert_eq!(number("1e5"), Value::Text("1e5".to_owned()));

        let sent = [0_i16, 2, 1, 0, 2, 1, 2345, 6700].iter().skip(1).flat_map(|g| g.to_be_bytes());
        assert_eq!(numeric(&Type::NUMERIC, &sent.collect::<Vec<_>>()).unwrap(), "12345.67");
    }

    #[test]
    fn arrays_become_lists() {
        for (array, list) in [
            ("{}", "[]"),
            ("{1,NULL, 2}", "[\"1\", NULL, \"2\"]"),
            ("{\"a \\\"b\\\\\",null}", "[\"a \\\"b\\\\\", NULL]"),
            ("[0:1]={{1},{2}}", "[[\"1\"], [\"2\"]]"),
        ] {
            assert_eq!(list_of(array).unwrap(), list);
        }
        for array in ["1", "{", "{\"a", "}"] {
            assert!(list_of(array).is_err(), "{array}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_value_or_an_error(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..40),
            is_binary in proptest::bool::ANY,
        ) {
            for of in [Type::INT8, Type::NUMERIC, Type::INTERVAL, Type::INT4_ARRAY, Type::DATE,
                Type::TIMESTAMPTZ, Type::UUID, Type::BYTEA, Type::TEXT, Type::JSONB] {
                let _ = value(&of, Some(&bytes), is_binary);
            }
        }
    }
}
