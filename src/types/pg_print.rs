//! Prints values as PostgreSQL's output functions print them.
//!
//! The text is that of the type's output function under `DateStyle = ISO`, `TimeZone = UTC`,
//! `IntervalStyle = postgres`, `bytea_output = hex` and `extra_float_digits = 3`. DuckDB's own text
//! of dates before Christ, intervals, floats, bytes and lists is another.

use std::fmt::Write;

/// Appends what a type prints as Rust does. Writing to a string cannot fail.
pub fn put(to: &mut String, value: impl std::fmt::Display) {
    let _ = write!(to, "{value}");
}

/// Appends an item of an array, in quotes where `array_out` sets them.
pub fn array_item(item: &str, delimiter: u8, to: &mut String) {
    let is_special = |byte: u8| {
        byte == delimiter
            || matches!(byte, b'"' | b'\\' | b'{' | b'}' | b' ' | b'\t' | b'\n' | b'\r')
            || matches!(byte, 0x0B | 0x0C)
    };

    if item.is_empty() || item.eq_ignore_ascii_case("NULL") || item.bytes().any(is_special) {
        in_quotes(item, to);
    } else {
        to.push_str(item);
    }
}

pub fn in_quotes(text: &str, to: &mut String) {
    to.push('"');
    for sign in text.chars() {
        if matches!(sign, '"' | '\\') {
            to.push('\\');
        }
        to.push(sign);
    }
    to.push('"');
}

/// A decimal of DuckDB prints all digits of its scale, as PostgreSQL does for `numeric(p,s)`.
pub fn decimal(value: i128, scale: u8, to: &mut String) {
    let digits = format!("{:0width$}", value.unsigned_abs(), width = usize::from(scale) + 1);
    let (whole, fraction) = digits.split_at(digits.len() - usize::from(scale));

    if value < 0 {
        to.push('-');
    }
    to.push_str(whole);
    if scale > 0 {
        to.push('.');
        to.push_str(fraction);
    }
}

pub fn bytes(value: &[u8], to: &mut String) {
    to.push_str("\\x");
    for byte in value {
        put(to, format_args!("{byte:02x}"));
    }
}

/// Appends a date (`EncodeDateOnly` of `utils/adt/datetime.c`) from DuckDB's days since 1970.
pub fn date(days: i32, to: &mut String) {
    match days {
        i32::MAX => to.push_str("infinity"),
        ..=NEGATIVE_INFINITE_DATE => to.push_str("-infinity"),
        _ => {
            let is_bc = civil(days.into(), to);
            to.push_str(if is_bc { " BC" } else { "" });
        }
    }
}

/// DuckDB's infinities are the greatest value and its negative.
const NEGATIVE_INFINITE_DATE: i32 = -i32::MAX;
const NEGATIVE_INFINITE_TIMESTAMP: i64 = -i64::MAX;
const MICROS_PER_DAY: i64 = 86_400_000_000;

/// Appends a timestamp (`EncodeDateTime`) from DuckDB's microseconds since 1970.
pub fn timestamp(micros: i64, with_zone: bool, to: &mut String) {
    match micros {
        i64::MAX => to.push_str("infinity"),
        ..=NEGATIVE_INFINITE_TIMESTAMP => to.push_str("-infinity"),
        _ => {
            let is_bc = civil(micros.div_euclid(MICROS_PER_DAY), to);
            to.push(' ');
            clock(micros.rem_euclid(MICROS_PER_DAY), to);
            to.push_str(if with_zone { "+00" } else { "" });
            to.push_str(if is_bc { " BC" } else { "" });
        }
    }
}

/// Appends year, month and day of a day since 1970, and returns whether the year is before Christ.
/// The algorithm is `civil_from_days` by Howard Hinnant.
fn civil(days: i64, to: &mut String) -> bool {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);

    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);

    // Year 0 is 1 BC.
    let is_bc = year <= 0;
    put(to, format_args!("{:04}-{month:02}-{day:02}", if is_bc { 1 - year } else { year }));
    is_bc
}

/// Appends a time of day; a fraction has no zeros at its end (`AppendSeconds`).
pub fn clock(micros: i64, to: &mut String) {
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    put(to, format_args!("{hours:02}:{minutes:02}:{:02}", seconds % 60));

    if fraction != 0 {
        let digits = format!("{fraction:06}");
        to.push('.');
        to.push_str(digits.trim_end_matches('0'));
    }
}

/// Appends an interval (`EncodeInterval`, `INTSTYLE_POSTGRES`).
pub fn interval(months: i32, days: i32, micros: i64, to: &mut String) {
    let parts = [(months / 12, "year"), (months % 12, "mon"), (days, "day")];
    let (mut is_first, mut is_after_negative) = (true, false);

    for (value, unit) in parts.into_iter().filter(|(value, _)| *value != 0) {
        to.push_str(if is_first { "" } else { " " });
        to.push_str(if is_after_negative && value > 0 { "+" } else { "" });
        put(to, format_args!("{value} {unit}{}", if value == 1 { "" } else { "s" }));
        (is_first, is_after_negative) = (false, value < 0);
    }

    if is_first || micros != 0 {
        to.push_str(if is_first { "" } else { " " });
        let sign = if micros < 0 { "-" } else { "+" };
        to.push_str(if micros < 0 || is_after_negative { sign } else { "" });

        let size = micros.unsigned_abs();
        // The least value has no positive counterpart, and hours have no limit.
        let (hours, rest) = (size / 3_600_000_000, size % 3_600_000_000);
        let mut within_the_hour = String::new();
        clock(rest.cast_signed(), &mut within_the_hour);
        put(to, format_args!("{hours:02}{}", within_the_hour.trim_start_matches("00")));
    }
}

/// Appends a `double precision` (`float8out` of `utils/adt/float.c`).
pub fn float8(value: f64, to: &mut String) {
    let size = value.abs();
    let nearest = |digits: usize| format!("{size:.*e}", digits - 1);
    let shortest = strictly_shortest(
        format!("{size:e}"),
        Binary { mantissa_bits: 52, bits: size.to_bits(), bias: 1075 },
        nearest,
        |text| text.parse() == Ok(size),
    );
    float(value.is_nan(), value.is_infinite(), value.is_sign_negative(), &shortest, 15, to);
}

/// Appends a `real` (`float4out`).
pub fn float4(value: f32, to: &mut String) {
    let size = value.abs();
    let nearest = |digits: usize| format!("{size:.*e}", digits - 1);
    let shortest = strictly_shortest(
        format!("{size:e}"),
        Binary { mantissa_bits: 23, bits: size.to_bits().into(), bias: 150 },
        nearest,
        |text| text.parse() == Ok(size),
    );
    float(value.is_nan(), value.is_infinite(), value.is_sign_negative(), &shortest, 6, to);
}

/// A positive float as a whole number and a power of two.
struct Binary {
    mantissa_bits: u32,
    bits: u64,
    bias: i64,
}

impl Binary {
    /// Returns the mantissa and the power of two it is multiplied by; none for zero and numbers
    /// that are not normal.
    fn normal(&self) -> Option<(u64, i64)> {
        let biased = i64::try_from(self.bits >> self.mantissa_bits).ok().filter(|&it| it > 0)?;
        let fraction = self.bits & ((1 << self.mantissa_bits) - 1);
        Some((fraction | 1 << self.mantissa_bits, biased - self.bias))
    }

    /// Returns whether the number may lie exactly between two decimals that are both short enough:
    /// its own decimal ends in a 5 then, after at most 18 digits and so at most 25 places.
    fn may_be_half_way(&self) -> bool {
        const MAX_PLACES: i64 = 25;
        let Some((mantissa, power)) = self.normal() else { return false };
        let places = -(power + i64::from(mantissa.trailing_zeros()));
        (1..=MAX_PLACES).contains(&places)
    }

    /// Returns whether a decimal lies exactly between this number and one of its neighbours. That
    /// is possible only for large numbers: a number with a fraction has fewer digits than the point
    /// between it and a neighbour.
    fn is_half_way(&self, decimal: &str) -> bool {
        let Some((digits, exponent)) = parts(decimal) else { return false };
        let places = i32::try_from(digits.len()).unwrap_or_default() - 1;
        let (digits, exponent): (u128, i32) =
            (digits.parse().unwrap_or_default(), exponent - places);

        // With 5^24 the number would have more factors of five than fit its mantissa.
        let fives = u32::try_from(exponent).ok().filter(|&fives| fives < 24);
        let (Some(fives), Some((mantissa, power))) = (fives, self.normal()) else { return false };
        let (is_power_of_two, mantissa) = (mantissa.is_power_of_two(), u128::from(mantissa));

        // Both sides without the common power of two: the points between neighbours are at a half
        // above, at a half below, and below a power of two at a quarter.
        let odd = digits * 5_u128.pow(fives);
        let shift = power - 2 - i64::from(exponent);
        let below = if is_power_of_two { 4 * mantissa - 1 } else { 4 * mantissa - 2 };
        [4 * mantissa + 2, below].into_iter().any(|point| is_shifted(odd, point, shift))
    }
}

/// Returns whether `odd = point * 2^shift`.
fn is_shifted(odd: u128, point: u128, shift: i64) -> bool {
    let by = u32::try_from(shift.unsigned_abs()).unwrap_or(u32::MAX);
    let (small, large) = if shift >= 0 { (point, odd) } else { (odd, point) };
    by <= small.leading_zeros() && by < u128::BITS && small << by == large
}

/// Returns the shortest decimal that lies inside the interval of a float, as the server's
/// `common/d2s.c` and `f2s.c` find it. Rust's shortest text differs in two ways: it may be an end
/// of the interval, which does not belong to the interval there (`1e23` is
/// `9.999999999999999e+22`), and of two decimals that are equally near it is the greater, not the
/// even one (`2097152.25` is `2.0971522e+06`).
fn strictly_shortest(
    shortest: String,
    binary: Binary,
    nearest: impl Fn(usize) -> String,
    is_exact: impl Fn(&str) -> bool,
) -> String {
    const MAX_DIGITS: usize = 17;
    let length = match parts(&shortest) {
        Some((digits, _)) if !digits.is_empty() => digits.len(),
        _ => return shortest,
    };
    let is_inside = |text: &String| is_exact(text) && !binary.is_half_way(text);

    // Rust rounds to even where the number of digits is given. Next to a power of two the interval
    // is wider above than below, and only the decimal above may lie inside.
    if binary.may_be_half_way() {
        let even = nearest(length);
        if is_inside(&even) {
            return even;
        }
    }
    if !binary.is_half_way(&shortest) {
        return shortest;
    }
    (length + 1..=MAX_DIGITS).map(nearest).find(is_inside).unwrap_or(shortest)
}

/// Returns the digits, without zeros at the end, and the exponent of `1.25e-7`.
fn parts(text: &str) -> Option<(String, i32)> {
    let (mantissa, exponent) = text.split_once('e')?;
    let digits = mantissa.replace('.', "");
    Some((digits.trim_end_matches('0').to_owned(), exponent.parse().ok()?))
}

/// Appends a float as `to_chars` of `common/d2s.c` does: without an exponent from 10^-4 to below
/// 10^`limit`.
fn float(
    is_nan: bool,
    is_infinite: bool,
    is_negative: bool,
    size: &str,
    limit: i32,
    to: &mut String,
) {
    if is_nan {
        return to.push_str("NaN");
    }
    to.push_str(if is_negative { "-" } else { "" });
    if is_infinite {
        return to.push_str("Infinity");
    }

    let Some((digits, exponent)) = parts(size).filter(|(digits, _)| !digits.is_empty()) else {
        return to.push('0');
    };
    let (first, rest) = digits.split_at(1);

    if exponent < -4 || exponent >= limit {
        let point = if rest.is_empty() { "" } else { "." };
        let sign = if exponent < 0 { '-' } else { '+' };
        put(to, format_args!("{first}{point}{rest}e{sign}{:02}", exponent.unsigned_abs()));
        return;
    }

    let zeros = usize::try_from(exponent.unsigned_abs()).unwrap_or_default();
    match exponent {
        ..0 => put(to, format_args!("0.{}{digits}", "0".repeat(zeros - 1))),
        _ if digits.len() <= zeros + 1 => {
            put(to, format_args!("{digits}{}", "0".repeat(zeros + 1 - digits.len())));
        }
        _ => {
            let (whole, fraction) = digits.split_at(zeros + 1);
            put(to, format_args!("{whole}.{fraction}"));
        }
    }
}
/// The texts are what a server of PostgreSQL 15 prints.
#[cfg(test)]
mod tests {
    use super::*;

    fn printed(print: impl Fn(&mut String)) -> String {
        let mut text = String::new();
        print(&mut text);
        text
    }

    #[test]
    fn floats_print_as_float8out_prints_them() {
        let cases = [
            (0.0, "0"),
            (-0.0, "-0"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
            (1e14, "100000000000000"),
            (1e15, "1e+15"),
            (123_456_789_012_345.0, "123456789012345"),
            (1_234_567_890_123_456.0, "1.234567890123456e+15"),
            (-12.5, "-12.5"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (5e-324, "5e-324"),
            (1e22, "1e+22"),
            (1e23, "9.999999999999999e+22"),
            (2e23, "1.9999999999999998e+23"),
            (9_007_199_254_740_993.0, "9.007199254740992e+15"),
            (36_028_797_018_963_968.0, "3.602879701896397e+16"),
            (f64::MAX, "1.7976931348623157e+308"),
        ];
        for (value, text) in cases {
            assert_eq!(printed(|to| float8(value, to)), text);
        }
    }

    #[test]
    fn reals_print_as_float4out_prints_them() {
        let cases = [
            (0.1, "0.1"),
            (2_097_152.0 + 0.25, "2.0971522e+06"),
            (2_097_152.0 + 0.75, "2.0971528e+06"),
            (123_456.0, "123456"),
            (1e6, "1e+06"),
            (1e-45, "1e-45"),
            (16_777_216.0, "1.6777216e+07"),
            (f32::MAX, "3.4028235e+38"),
        ];
        for (value, text) in cases {
            assert_eq!(printed(|to| float4(value, to)), text);
        }
    }

    #[test]
    fn intervals_print_their_three_parts() {
        let cases = [
            ((0, 0, 0), "00:00:00"),
            ((1, -2, 11_045_600_000), "1 mon -2 days +03:04:05.6"),
            ((-1, 2, -1), "-1 mons +2 days -00:00:00.000001"),
            ((14, 1, 0), "1 year 2 mons 1 day"),
            ((0, 0, i64::MIN), "-2562047788:00:54.775808"),
            ((0, -1, 86_400_000_000), "-1 days +24:00:00"),
        ];
        for ((months, days, micros), text) in cases {
            assert_eq!(printed(|to| interval(months, days, micros, to)), text);
        }
    }

    #[test]
    fn moments_of_all_ages_print_as_iso() {
        assert_eq!(printed(|to| date(-719_163, to)), "0001-12-31 BC");
        assert_eq!(printed(|to| date(i32::MAX, to)), "infinity");
        assert_eq!(printed(|to| date(-i32::MAX, to)), "-infinity");
        assert_eq!(printed(|to| date(2_932_897, to)), "10000-01-01");
        assert_eq!(printed(|to| timestamp(-1, true, to)), "1969-12-31 23:59:59.999999+00");
        let noon = -62_135_640_000_000_000 - 366 * MICROS_PER_DAY;
        assert_eq!(printed(|to| timestamp(noon, true, to)), "0002-12-31 12:00:00+00 BC");
        assert_eq!(printed(|to| clock(MICROS_PER_DAY, to)), "24:00:00");
    }

    #[test]
    fn items_are_quoted_where_array_out_quotes_them() {
        let cases = [
            ("", "\"\""),
            ("null", "\"null\""),
            ("a,b", "\"a,b\""),
            ("a;b", "a;b"),
            ("q\"q\\", "\"q\\\"q\\\\\""),
            ("ä\u{a0}", "ä\u{a0}"),
            ("\u{b}", "\"\u{b}\""),
        ];
        for (item, text) in cases {
            assert_eq!(printed(|to| array_item(item, b',', to)), text);
        }
    }

    #[test]
    fn decimals_keep_their_scale() {
        let cases = [((5, 3), "0.005"), ((-150, 2), "-1.50"), ((0, 2), "0.00"), ((7, 0), "7")];
        for ((value, scale), text) in cases {
            assert_eq!(printed(|to| decimal(value, scale, to)), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn every_value_prints(wide in proptest::num::i64::ANY, narrow in proptest::num::i32::ANY) {
            let mut text = String::new();
            date(narrow, &mut text);
            timestamp(wide, true, &mut text);
            clock(wide, &mut text);
            interval(narrow, narrow, wide, &mut text);
            float8(f64::from_bits(wide.cast_unsigned()), &mut text);
            float4(f32::from_bits(narrow.cast_unsigned()), &mut text);
        }
    }
}
