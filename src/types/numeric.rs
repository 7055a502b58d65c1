//! Decodes numeric and money.

use super::ValueError;

/// The precision of DuckDB's widest DECIMAL.
const WIDEST: u8 = 38;

/// Returns precision and scale of the DECIMAL that holds every finite value of `numeric(p,s)` with
/// this typmod, or none when the type is unconstrained or too wide. A negative scale, and a scale
/// above the precision, are legal since PostgreSQL 15.
pub fn decimal_of(typmod: i32) -> Option<(u8, i8)> {
    if typmod < 4 {
        return None;
    }

    let bits = typmod - 4;
    let precision = (bits >> 16) & 0xFFFF;
    let scale = ((bits & 0x7FF) ^ 1024) - 1024;

    let (precision, scale) = match scale {
        ..0 => (precision - scale, 0),
        _ if scale > precision => (scale, scale),
        _ => (precision, scale),
    };

    (precision <= i32::from(WIDEST))
        .then_some((u8::try_from(precision).ok()?, i8::try_from(scale).ok()?))
}

fn too_wide(target_type: &str) -> ValueError {
    ValueError::NotRepresentable {
        what: "a number with more digits than fit".to_owned(),
        target_type: target_type.to_owned(),
    }
}

fn special(what: &str, target_type: &str) -> ValueError {
    ValueError::NotRepresentable { what: what.to_owned(), target_type: target_type.to_owned() }
}

/// Returns `value` if it fits `precision` digits.
fn checked(value: i128, precision: u8, target_type: &str) -> Result<i128, ValueError> {
    let limit = 10_i128.checked_pow(u32::from(precision)).unwrap_or(i128::MAX);
    if value > -limit && value < limit { Ok(value) } else { Err(too_wide(target_type)) }
}

/// Reads `-123.45` as an integer of 10^-scale.
pub fn from_text(
    value: &[u8],
    precision: u8,
    scale: i8,
    target_type: &str,
) -> Result<i128, ValueError> {
    let malformed = || ValueError::malformed("numeric", value);
    match value {
        b"NaN" | b"Infinity" | b"-Infinity" => {
            return Err(special(&String::from_utf8_lossy(value), target_type));
        }
        _ => {}
    }

    let (is_negative, digits) = match value.split_first() {
        Some((b'-', rest)) => (true, rest),
        Some(_) => (false, value),
        None => return Err(malformed()),
    };

    let (mut total, mut after_point, mut has_digits) = (0_i128, None::<i32>, false);
    let scale = i32::from(scale);

    for &byte in digits {
        match byte {
            b'.' if after_point.is_none() => after_point = Some(0),
            b'0'..=b'9' => {
                has_digits = true;
                if let Some(places) = &mut after_point {
                    if *places == scale {
                        // The text has more places than the type: only zeros lose nothing.
                        if byte == b'0' { continue } else { return Err(too_wide(target_type)) }
                    }
                    *places += 1;
                }

                let digit = i128::from(byte - b'0');
                let next = total.checked_mul(10).and_then(|total| total.checked_add(digit));
                total = next.ok_or_else(|| too_wide(target_type))?;
            }
            _ => return Err(malformed()),
        }
    }

    if !has_digits {
        return Err(malformed());
    }

    for _ in after_point.unwrap_or(0)..scale {
        total = total.checked_mul(10).ok_or_else(|| too_wide(target_type))?;
    }

    checked(if is_negative { -total } else { total }, precision, target_type)
}

/// Reads digits of base 10,000, as COPY BINARY sends them.
pub fn from_binary(
    value: &[u8],
    precision: u8,
    scale: i8,
    target_type: &str,
) -> Result<i128, ValueError> {
    let malformed = || ValueError::malformed("numeric", value);
    let mut words = value.chunks(2).map(|pair| <[u8; 2]>::try_from(pair).map(u16::from_be_bytes));
    let mut word = || words.next().and_then(Result::ok).ok_or_else(malformed);

    let (count, weight, sign, _display_scale) = (word()?, word()?.cast_signed(), word()?, word()?);

    match sign {
        0xC000 => return Err(special("NaN", target_type)),
        0xD000 => return Err(special("Infinity", target_type)),
        0xF000 => return Err(special("-Infinity", target_type)),
        0 | 0x4000 => {}
        _ => return Err(malformed()),
    }

    let mut total = 0_i128;
    for at in 0..i32::from(count) {
        let digit = i128::from(word()?);

        // The power of ten of this digit's ones, in units of 10^-scale.
        let power = 4 * (i32::from(weight) - at) + i32::from(scale);
        let part = match u32::try_from(power) {
            Ok(power) => 10_i128.checked_pow(power).and_then(|factor| digit.checked_mul(factor)),
            Err(_) => {
                let divisor = 10_i128.checked_pow(power.unsigned_abs()).unwrap_or(i128::MAX);
                if digit % divisor != 0 {
                    return Err(too_wide(target_type));
                }
                Some(digit / divisor)
            }
        };

        total =
            part.and_then(|part| total.checked_add(part)).ok_or_else(|| too_wide(target_type))?;
    }

    if value.len() != 8 + 2 * usize::from(count) {
        return Err(malformed());
    }

    checked(if sign == 0x4000 { -total } else { total }, precision, target_type)
}

/// Reads `-$1,234.56` under `lc_monetary = C`.
pub fn money_from_text(value: &[u8], scale: i8) -> Result<i128, ValueError> {
    let plain: Vec<u8> =
        value.iter().copied().filter(|byte| !matches!(byte, b'$' | b',')).collect();
    from_text(&plain, 19, scale, "DECIMAL(19,2)").map_err(|_| ValueError::malformed("money", value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typmods_become_decimals() {
        let typmod = |precision: i32, scale: i32| ((precision << 16) | (scale & 0x7FF)) + 4;
        assert_eq!(decimal_of(typmod(10, 2)), Some((10, 2)));
        assert_eq!(decimal_of(typmod(38, 38)), Some((38, 38)));
        assert_eq!(decimal_of(typmod(39, 2)), None);
        assert_eq!(typmod(3, -2), 198_658);
        assert_eq!(decimal_of(typmod(3, -2)), Some((5, 0)));
        assert_eq!(decimal_of(typmod(3, 5)), Some((5, 5)));
        assert_eq!(decimal_of(-1), None);
    }

    #[test]
    fn text_and_binary_numbers_are_the_same() {
        // ndigits, weight, sign, dscale, digits.
        let binary =
            |words: &[u16]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
        let cases: [(&str, Vec<u8>, i128); 5] = [
            ("0.00", binary(&[0, 0, 0, 2]), 0),
            ("12345.67", binary(&[3, 1, 0, 2, 1, 2345, 6700]), 1_234_567),
            ("-0.05", binary(&[1, 0xFFFF, 0x4000, 2, 500]), -5),
            ("10000", binary(&[1, 1, 0, 0, 1]), 1_000_000),
            ("99999999.99", binary(&[3, 1, 0, 2, 9999, 9999, 9900]), 9_999_999_999),
        ];
        for (text, bytes, expected) in cases {
            assert_eq!(from_text(text.as_bytes(), 10, 2, "DECIMAL(10,2)"), Ok(expected), "{text}");
            assert_eq!(from_binary(&bytes, 10, 2, "DECIMAL(10,2)"), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_a_decimal_cannot_hold_is_refused_by_name() {
        let error = from_text(b"NaN", 5, 2, "DECIMAL(5,2)").unwrap_err().to_string();
        assert!(error.starts_with("NaN cannot be stored as DECIMAL(5,2)"), "{error}");
        assert!(from_text(b"1000.00", 5, 2, "DECIMAL(5,2)").is_err());
        for text in ["", "-", ".", "1.2.3", "1e5", " 1"] {
            assert!(from_text(text.as_bytes(), 38, 2, "DECIMAL(38,2)").is_err(), "{text:?}");
        }
    }

    #[test]
    fn money_loses_its_ornaments() {
        assert_eq!(money_from_text(b"-$1,234.56", 2), Ok(-123_456));
        assert_eq!(money_from_text(b"$0.05", 2), Ok(5));
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..40),
        ) {
            let _ = from_text(&bytes, 38, 10, "DECIMAL(38,10)");
            let _ = from_binary(&bytes, 38, 10, "DECIMAL(38,10)");
        }
    }
}
