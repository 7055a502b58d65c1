//! Decodes text forms without arithmetic of their own: numbers, uuid, bytea, arrays.

use std::str::FromStr;

use super::{ColumnBuilder, Kind, ValueError};

/// Parses the numbers that Rust parses as PostgreSQL prints them: integers, and floats with `NaN`,
/// `Infinity`, `-0`, `1e-45`.
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

/// Reads `\x` and hexadecimal digits, as pinned by `bytea_output = hex`.
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

/// Reads `{1,NULL,"a\"b",{..}}`, also with bounds in front, which DuckDB does not have. Items go
/// into `element`; when the value turns out malformed, the caller appends NULL instead, which
/// covers the items appended before.
pub(super) fn array(
    value: &[u8],
    delimiter: u8,
    element: &mut ColumnBuilder,
    target_type: &str,
) -> Result<(), ValueError> {
    let malformed = || ValueError::malformed("array", value);

    // In `[0:1]={5,6}` the lower bounds are dropped.
    let body = match value.first() {
        Some(b'[') => {
            let equals = value.iter().position(|&byte| byte == b'=').ok_or_else(malformed)?;
            value.get(equals + 1..).ok_or_else(malformed)?
        }
        _ => value,
    };

    let inner =
        body.strip_prefix(b"{").and_then(|body| body.strip_suffix(b"}")).ok_or_else(malformed)?;

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

/// Returns the index of the brace that closes the brace at the front; braces in quotes do not
/// count.
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

/// Returns a quoted item without its quotes and escapes, and the bytes that follow.
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

/// Returns the fields of `(1,"x,y",)`; an empty field is NULL.
pub(super) fn record(value: &[u8]) -> Result<Vec<Option<Vec<u8>>>, ValueError> {
    let malformed = || ValueError::malformed("a composite", value);
    let inner =
        value.strip_prefix(b"(").and_then(|body| body.strip_suffix(b")")).ok_or_else(malformed)?;

    let mut fields = Vec::new();
    let mut rest = Some(inner);

    while let Some(bytes) = rest {
        let (field, after) = bare_or_quoted(bytes).ok_or_else(malformed)?;
        fields.push(field);

        rest = match after.split_first() {
            None => None,
            Some((b',', after)) => Some(after),
            Some(_) => return Err(malformed()),
        };
    }

    Ok(fields)
}

/// The parts of a range. Both bounds are `None` in an empty range; a missing bound is unbounded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub lower: Option<Vec<u8>>,
    pub upper: Option<Vec<u8>>,
    pub is_lower_inclusive: bool,
    pub is_upper_inclusive: bool,
    pub is_empty: bool,
}

/// Reads `[1,6)`, `(,"2024-01-01 00:00:00"]`, `empty`.
pub(super) fn range(value: &[u8]) -> Result<Range, ValueError> {
    let malformed = || ValueError::malformed("a range", value);
    if value == b"empty" {
        return Ok(Range { is_empty: true, ..Range::default() });
    }

    let (open, rest) = value.split_first().ok_or_else(malformed)?;
    let (close, inner) = rest.split_last().ok_or_else(malformed)?;

    let is_bracket = |byte: u8, inclusive: u8, exclusive: u8| match byte {
        _ if byte == inclusive => Ok(true),
        _ if byte == exclusive => Ok(false),
        _ => Err(malformed()),
    };

    let (lower, after) = bare_or_quoted(inner).ok_or_else(malformed)?;
    let after = after.strip_prefix(b",").ok_or_else(malformed)?;
    let (upper, after) = bare_or_quoted(after).ok_or_else(malformed)?;
    if !after.is_empty() {
        return Err(malformed());
    }

    Ok(Range {
        lower,
        upper,
        is_lower_inclusive: is_bracket(*open, b'[', b'(')?,
        is_upper_inclusive: is_bracket(*close, b']', b')')?,
        is_empty: false,
    })
}

type BareOrQuoted<'a> = (Option<Vec<u8>>, &'a [u8]);

/// Reads a field up to the next comma outside quotes, without quotes and escapes; an empty field is
/// `None`. In quotes a quote is doubled or escaped.
fn bare_or_quoted(bytes: &[u8]) -> Option<BareOrQuoted<'_>> {
    let (mut item, mut is_quoted, mut has_any) = (Vec::new(), false, false);
    let mut rest = bytes;

    while let Some((&byte, after)) = rest.split_first() {
        if byte == b',' && !is_quoted {
            break;
        }

        has_any = true;
        rest = after;

        match byte {
            b'\\' => {
                let (&escaped, after) = rest.split_first()?;
                item.push(escaped);
                rest = after;
            }
            b'"' if is_quoted && rest.first() == Some(&b'"') => {
                item.push(b'"');
                rest = rest.get(1..)?;
            }
            b'"' => is_quoted = !is_quoted,
            other => item.push(other),
        }
    }

    (!is_quoted).then_some((has_any.then_some(item), rest))
}

/// Returns key and value of each entry of `"a"=>"1", "b"=>NULL`.
pub(super) fn hstore(value: &[u8]) -> Result<Vec<(String, Option<String>)>, ValueError> {
    let malformed = || ValueError::malformed("hstore", value);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).map_err(|_| ValueError::NotUtf8);

    let mut entries = Vec::new();
    let mut rest = value;
    while !rest.is_empty() {
        let (key, after) = quoted(rest).ok_or_else(malformed)?;
        let after = after.strip_prefix(b"=>").ok_or_else(malformed)?;

        let (value, after) = match after.strip_prefix(b"NULL") {
            Some(after) => (None, after),
            None => {
                let (value, after) = quoted(after).ok_or_else(malformed)?;
                (Some(text(value)?), after)
            }
        };

        entries.push((text(key)?, value));
        rest = match after {
            [] => after,
            _ => after.strip_prefix(b", ").filter(|next| !next.is_empty()).ok_or_else(malformed)?,
        };
    }

    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn composites_tell_null_from_empty_and_keep_their_quotes() {
        let fields = |text: &str| {
            let fields = record(text.as_bytes()).unwrap().into_iter();
            fields
                .map(|field| field.map(|field| String::from_utf8(field).unwrap()))
                .collect::<Vec<_>>()
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(fields("(1,\"x,y\",,\"\")"), [some("1"), some("x,y"), None, some("")]);
        assert_eq!(fields(r#"("a""b\\c","(1,""z"")")"#), [some(r#"a"b\c"#), some(r#"(1,"z")"#)]);
        assert_eq!(fields("()"), [None]);
        for text in ["", "(", "(1", "(\"1)", "1,2"] {
            assert!(record(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges_have_two_bounds_or_none() {
        let whole = range(b"[\"2024-01-01 00:00:00\",)").unwrap();
        assert_eq!(
            (whole.lower.as_deref(), whole.upper.as_deref()),
            (Some(b"2024-01-01 00:00:00".as_slice()), None)
        );
        assert_eq!(
            (whole.is_lower_inclusive, whole.is_upper_inclusive, whole.is_empty),
            (true, false, false)
        );
        assert!(range(b"empty").unwrap().is_empty);
        for text in ["", "[", "[]", "[1]", "[1,2,3]", "{1,2}", "[1,\"2]"] {
            assert!(range(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn hstores_are_pairs() {
        let pairs = hstore(br#""a"=>"1", "b\"c"=>NULL, ""=>"""#).unwrap();
        let expected = [("a", Some("1")), ("b\"c", None), ("", Some(""))];
        assert_eq!(pairs, expected.map(|(key, value)| (key.to_owned(), value.map(str::to_owned))));
        assert_eq!(hstore(b"").unwrap(), []);
        for text in ["a", "\"a\"", "\"a\"=>", "\"a\"=>\"1\",", "\"a\"=>\"1\", "] {
            assert!(hstore(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn random_text_never_panics(text in "[\\[\\](){},\"\\\\a=>NUL ]{0,30}") {
            let _ = (record(text.as_bytes()), range(text.as_bytes()), hstore(text.as_bytes()));
        }
    }
}
