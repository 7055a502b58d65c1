//! Text forms without arithmetic of their own: numbers, uuid, bytea, arrays.

use std::str::FromStr;

use super::{ColumnBuilder, Kind, ValueError};

/// Whatever Rust parses as PostgreSQL prints it: integers, and floats with `NaN`, `Infinity`, `-0`, `1e-45`.
pub(super) fn number<T: FromStr>(value: &[u8], expected: &'static str) -> Result<T, ValueError> {
    let text = std::str::from_utf8(value).map_err(|_| ValueError::NotUtf8)?;
    text.parse().map_err(|_| ValueError::malformed(expected, value))
}

fn hex_digit(byte: u8) -> Option<u8> {
    (byte as char).to_digit(16).map(|digit| digit as u8)
}

pub(super) fn uuid(value: &[u8]) -> Result<[u8; 16], ValueError> {
    let mut bytes = [0; 16];
    let mut digits = value.iter().filter(|&&byte| byte != b'-').map(|&byte| hex_digit(byte));
    for byte in &mut bytes {
        let (Some(Some(high)), Some(Some(low))) = (digits.next(), digits.next()) else {
            return Err(ValueError::malformed("uuid", value));
        };
        *byte = high << 4 | low;
    }
    if digits.next().is_some() { Err(ValueError::malformed("uuid", value)) } else { Ok(bytes) }
}

/// `\x` and hexadecimal digits, as pinned by `bytea_output = hex`.
pub(super) fn bytea(value: &[u8]) -> Result<Vec<u8>, ValueError> {
    let malformed = || ValueError::malformed("bytea", value);
    let digits = value.strip_prefix(b"\\x").ok_or_else(malformed)?;
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(malformed());
    }
    let pair = |[high, low]: &[u8; 2]| Some(hex_digit(*high)? << 4 | hex_digit(*low)?);
    pairs.iter().map(pair).collect::<Option<Vec<u8>>>().ok_or_else(malformed)
}

/// `{1,NULL,"a\"b",{..}}`, also with bounds in front, which DuckDB does not have. Items go into `element`; when the value
/// turns out wrong, the caller's column is given up, so items that went in before do no harm.
pub(super) fn array(
    value: &[u8],
    delimiter: u8,
    element: &mut ColumnBuilder,
    target_type: &str,
) -> Result<(), ValueError> {
    let malformed = || ValueError::malformed("array", value);
    // `[0:1]={5,6}`: lower bounds are dropped.
    let body = match value.first() {
        Some(b'[') => {
            let equals = value.iter().position(|&byte| byte == b'=').ok_or_else(malformed)?;
            value.get(equals + 1..).ok_or_else(malformed)?
        }
        _ => value,
    };
    let inner = body.strip_prefix(b"{").and_then(|body| body.strip_suffix(b"}")).ok_or_else(malformed)?;
    let is_nested = matches!(element.kind, Kind::List { .. });
    let mut rest = inner;
    while !rest.is_empty() {
        let (item, after) = match rest.first() {
            Some(b'{') if is_nested => {
                let end = matching_brace(rest).ok_or_else(malformed)?;
                let (item, after) = rest.split_at_checked(end + 1).ok_or_else(malformed)?;
                element.push_text(Some(item))?;
                (None, after)
            }
            Some(b'{') => {
                return Err(ValueError::NotRepresentable {
                    what: "an array with more dimensions than its column declares".to_owned(),
                    target_type: target_type.to_owned(),
                });
            }
            _ if is_nested => {
                return Err(ValueError::NotRepresentable {
                    what: "an array with fewer dimensions than its column declares".to_owned(),
                    target_type: target_type.to_owned(),
                });
            }
            Some(b'"') => {
                let (item, after) = quoted(rest).ok_or_else(malformed)?;
                (Some(Some(item)), after)
            }
            _ => {
                let end = rest.iter().position(|&byte| byte == delimiter).unwrap_or(rest.len());
                let (item, after) = rest.split_at_checked(end).ok_or_else(malformed)?;
                (Some((!item.eq_ignore_ascii_case(b"NULL")).then(|| item.to_vec())), after)
            }
        };
        if let Some(item) = item {
            element.push_text(item.as_deref())?;
        }
        rest = match after.split_first() {
            None => after,
            Some((byte, next)) if *byte == delimiter && !next.is_empty() => next,
            Some(_) => return Err(malformed()),
        };
    }
    Ok(())
}

/// Index of the brace that closes the one at the front; braces in quotes do not count.
fn matching_brace(bytes: &[u8]) -> Option<usize> {
    let (mut depth, mut is_quoted, mut is_escaped) = (0_usize, false, false);
    for (at, &byte) in bytes.iter().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => is_quoted = !is_quoted,
            b'{' if !is_quoted => depth += 1,
            b'}' if !is_quoted => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

/// A quoted item without its quotes and escapes, and what follows.
fn quoted(bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut item = Vec::new();
    let mut rest = bytes.strip_prefix(b"\"")?;
    loop {
        let (&byte, after) = rest.split_first()?;
        rest = after;
        match byte {
            b'"' => return Some((item, rest)),
            b'\\' => {
                let (&escaped, after) = rest.split_first()?;
                item.push(escaped);
                rest = after;
            }
            other => item.push(other),
        }
    }
}
