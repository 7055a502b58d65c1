//! Finds JSON values that DuckDB's cast from JSON to VARIANT would change, before they are loaded.
//! The cast (1.5.5, tried value by value) keeps integers of 64 bits, and turns every other number
//! into the nearest double. Numbers out of range become infinite or zero, names that differ by case
//! alone are an error of the whole statement, and objects that are nested some thousand deep
//! overflow the stack of the thread.

use std::{borrow::Cow, collections::HashSet};

use super::ValueError;

/// The limit for the depth of arrays and objects. DuckDB takes more before it crashes: some
/// thousand with 8 MB of stack.
const MAX_DEPTH: usize = 200;

/// The number of characters of a number or a name that a message shows.
const SHOWN: usize = 40;

/// Verifies that a VARIANT can hold this JSON value exactly.
///
/// # Errors
/// A VARIANT cannot hold the value, or the text is no JSON.
pub(super) fn check(json: &str) -> Result<(), ValueError> {
    let malformed = || ValueError::malformed("json", json.as_bytes());

    // The names in each open object; none for an array.
    let mut open: Vec<Option<HashSet<String>>> = Vec::new();
    let mut rest = json;

    while let Some(&first) = rest.as_bytes().first() {
        match first {
            b'{' | b'[' => {
                if open.len() >= MAX_DEPTH {
                    return Err(refused(format!("JSON that is nested more than {MAX_DEPTH} deep")));
                }

                open.push((first == b'{').then(HashSet::new));
                rest = after(rest, 1);
            }
            b'}' | b']' => {
                open.pop();
                rest = after(rest, 1);
            }
            b'"' => {
                let length = string_length(rest).ok_or_else(malformed)?;
                let inner = rest.get(1..length - 1).ok_or_else(malformed)?;
                let text = unescaped(inner)?.ok_or_else(malformed)?;

                rest = after(rest, length);
                let is_name = rest.trim_start_matches(BLANKS).starts_with(':');

                if is_name
                    && let Some(Some(names)) = open.last_mut()
                    && !names.insert(text.to_ascii_lowercase())
                {
                    let name = shortened(&text);
                    return Err(refused(format!(
                        "JSON with the name \"{name}\" twice in one object, but for case,"
                    )));
                }
            }
            b'-' | b'0'..=b'9' => {
                let length = rest.find(|one: char| !is_of_number(one)).unwrap_or(rest.len());
                let number = rest.get(..length).ok_or_else(malformed)?;
                if !is_kept(number).ok_or_else(malformed)? {
                    return Err(refused(format!("the number {} of JSON", shortened(number))));
                }

                rest = after(rest, length);
            }
            // These bytes are separators, blanks, and the letters of true, false and null.
            byte if byte.is_ascii() => rest = after(rest, 1),
            _ => return Err(malformed()),
        }
    }

    Ok(())
}

const BLANKS: [char; 4] = [' ', '\t', '\n', '\r'];

fn after(text: &str, bytes: usize) -> &str {
    text.get(bytes..).unwrap_or_default()
}

fn refused(what: String) -> ValueError {
    ValueError::NotRepresentable { what, target_type: "VARIANT".to_owned() }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}..", text.get(..at).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// Returns the length in bytes of the string that the text begins with, both quotes included.
fn string_length(text: &str) -> Option<usize> {
    let mut at = 1;
    loop {
        let found =
            text.as_bytes().get(at..)?.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
        at += found;
        match text.as_bytes().get(at)? {
            b'"' => return Some(at + 1),
            _ => at += 2,
        }
    }
}

/// Returns the content of a string, or none when an escape is broken. The error is a half of a
/// surrogate pair, which is no character.
fn unescaped(inner: &str) -> Result<Option<Cow<'_, str>>, ValueError> {
    if !inner.contains('\\') {
        return Ok(Some(Cow::Borrowed(inner)));
    }

    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;

    while let Some((plain, escaped)) = rest.split_once('\\') {
        text.push_str(plain);
        let Some(kind) = escaped.chars().next() else { return Ok(None) };
        rest = after(escaped, kind.len_utf8());

        text.push(match kind {
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let Some(mut code) = code_unit(rest) else { return Ok(None) };
                rest = after(rest, 4);

                if (0xd800..0xdc00).contains(&code)
                    && let Some(low) = rest.strip_prefix("\\u").and_then(code_unit)
                    && (0xdc00..0xe000).contains(&low)
                {
                    code = 0x1_0000 + ((code - 0xd800) << 10) + (low - 0xdc00);
                    rest = after(rest, 6);
                }

                match char::from_u32(code) {
                    Some(character) => character,
                    None => return Err(refused("JSON with half of a surrogate pair".to_owned())),
                }
            }
            other => other,
        });
    }

    text.push_str(rest);
    Ok(Some(Cow::Owned(text)))
}

fn code_unit(text: &str) -> Option<u32> {
    let digits =
        text.get(..4).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    u32::from_str_radix(digits, 16).ok()
}

fn is_of_number(character: char) -> bool {
    matches!(character, '-' | '+' | '.' | 'e' | 'E' | '0'..='9')
}

/// Returns whether reading the number back gives the same number: an integer of 64 bits, or a
/// double whose shortest form it is, except for zeros at its end. None means that this is no
/// number.
fn is_kept(number: &str) -> Option<bool> {
    if number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok() {
        return Some(true);
    }

    let double: f64 = number.parse().ok()?;
    let written = decimal(number);
    Some(double.is_finite() && written.is_some() && written == decimal(&format!("{double:e}")))
}

/// Returns the digits of a number without zeros at either end, and the power of ten of the last
/// digit, or none when no integer holds that power.
fn decimal(number: &str) -> Option<(String, i64)> {
    let number = number.trim_start_matches('-');
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");

    let kept = digits.trim_end_matches('0');
    if kept.trim_start_matches('0').is_empty() {
        return Some((String::new(), 0));
    }

    let exponent: i64 = exponent.parse().ok()?;
    let power = exponent.checked_sub(i64::try_from(fraction.len()).ok()?)?;
    let power = power.checked_add(i64::try_from(digits.len() - kept.len()).ok()?)?;
    Some((kept.trim_start_matches('0').to_owned(), power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_variant_keeps_is_taken() {
        for json in [
            "null",
            " [1, -2.50, true, {\"a\": {\"a\": []}, \"b\": {}}]\n",
            "9223372036854775807",
            "-9223372036854775808",
            "18446744073709551615",
            "100000000000000000000",
            "9007199254740993",
            "-0",
            "-0.0",
            "0e5",
            "0.1",
            "0.30000000000000004",
            "100.00",
            "1E+2",
            "0.10e1",
            "123456789012345.6",
            "1e22",
            "1e23",
            "5e-324",
            "1.7976931348623157e308",
            "\"1e400, \\\"x\\\": \\\\\"",
            "\"\\u0000 \\ud83d\\ude00 \\/\"",
            "{\"a\": 1, \"b\": \"a\", \"é\": 1, \"É\": 2, \"\": 3}",
            "[\"a\", \"a\"]",
        ] {
            assert_eq!(check(json), Ok(()), "{json}");
        }
        assert_eq!(check(&format!("{}{}", "[".repeat(200), "]".repeat(200))), Ok(()));
    }

    #[test]
    fn what_a_variant_would_change_is_refused() {
        for json in [
            "18446744073709551616",
            "-9223372036854775809",
            "123456789012345678901234567890123456789012",
            "1e400",
            "-1E400",
            "1e-400",
            "1e99999999999999999999",
            "1e-99999999999999999999",
            "4.9e-324",
            "123456789.123456789012345",
            "0.1234567890123456789",
            "9007199254740993.0",
            "{\"k\": [1, {\"n\": 1e400}]}",
            "{\"a\": 1, \"a\": 2}",
            "{\"a\": 1, \"A\": 2}",
            "{\"a\": 1, \"\\u0061\" : 2}",
            "[{\"x\": {\"a\": 1}, \"a\": 1, \"x\": 1}]",
            "\"\\ud800\"",
            "\"\\udc00\"",
            "\"\\ud800\\ud800\"",
            "{\"\\ud83d\": 1}",
        ] {
            let checked = check(json);
            let is_refused = checked.as_ref().is_err_and(ValueError::is_unrepresentable);
            assert!(is_refused, "{json}: {checked:?}");
        }
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = format!("{}1{}", open.repeat(201), close.repeat(201));
            assert!(check(&deep).unwrap_err().is_unrepresentable());
        }
    }

    #[test]
    fn messages_show_no_more_than_a_little_of_a_value() {
        let long = "1".repeat(1000);
        for json in [long.clone(), format!("{{\"{long}\": 1, \"{long}\": 2}}")] {
            assert!(check(&json).unwrap_err().to_string().lines().next().unwrap().len() < 150);
        }
    }

    #[test]
    fn what_is_no_json_is_no_panic() {
        for json in [
            "\"",
            "\"\\",
            "\"\\u\"",
            "\"\\u12",
            "\"a\\\"",
            "-",
            "1e",
            "1-1",
            "}",
            "]]",
            "{\"a\"",
            "é",
            "\"\\é\"",
            "+",
            "\"\\u+123\"",
        ] {
            let _ = check(json);
        }
        assert!(matches!(check("\"\\uzzzz\""), Err(ValueError::Malformed { .. })));
        assert!(matches!(check("1-1"), Err(ValueError::Malformed { .. })));
    }
}
