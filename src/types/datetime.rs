//! Reads dates, times and intervals, as `DateStyle = ISO`, `IntervalStyle = postgres` and
//! `TimeZone = UTC` print them.

use super::ValueError;

/// The days from 1970-01-01 to 2000-01-01, from which PostgreSQL counts.
const DAYS_TO_2000: i32 = 10_957;
const MICROS_TO_2000: i64 = 946_684_800_000_000;
const MICROS_PER_DAY: i64 = 86_400_000_000;
/// DuckDB's infinities are the greatest value and its negative, not the least value.
const INFINITE_DATE: i32 = i32::MAX;
const INFINITE_TIME: i64 = i64::MAX;

/// Months, days and microseconds, which neither PostgreSQL nor DuckDB converts into each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interval {
    pub months: i32,
    pub days: i32,
    pub micros: i64,
}

fn out_of_range(what: &str, target_type: &str) -> ValueError {
    ValueError::NotRepresentable { what: what.to_owned(), target_type: target_type.to_owned() }
}

/// Takes digits from the front of the input.
fn digits(input: &[u8]) -> Option<(i64, &[u8])> {
    let length = input.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = input.split_at_checked(length)?;
    if number.is_empty() || number.len() > 18 {
        return None;
    }
    Some((number.iter().fold(0, |total, byte| total * 10 + i64::from(byte - b'0')), rest))
}

fn after(input: &[u8], byte: u8) -> Option<&[u8]> {
    input.strip_prefix(&[byte])
}

/// Returns the days since 1970 of a date of the proleptic Gregorian calendar; year 0 is 1 BC.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Reads `2024-01-31`, without BC, and returns year, month, day and the rest.
fn civil(input: &[u8]) -> Option<(i64, i64, i64, &[u8])> {
    let (year, rest) = digits(input)?;
    let (month, rest) = digits(after(rest, b'-')?)?;
    let (day, rest) = digits(after(rest, b'-')?)?;
    ((1..=12).contains(&month) && (1..=31).contains(&day) && year < 10_000_000)
        .then_some((year, month, day, rest))
}

/// Reads `24:00:00.5`, and returns microseconds and the rest. The hours of an interval have no
/// limit, so the caller checks the range.
fn clock(input: &[u8]) -> Option<(i128, &[u8])> {
    let (hours, rest) = digits(input)?;
    let (minutes, rest) = digits(after(rest, b':')?)?;
    let (seconds, rest) = digits(after(rest, b':')?)?;

    let (micros, rest) = match after(rest, b'.') {
        Some(fraction) => {
            let length = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let (number, rest) = digits(fraction)?;
            let missing = 6_usize.checked_sub(length)?;
            (number * 10_i64.pow(u32::try_from(missing).ok()?), rest)
        }
        None => (0, rest),
    };

    (minutes < 60 && seconds <= 60).then_some(())?;
    let seconds = i128::from(hours) * 3600 + i128::from(minutes * 60 + seconds);
    Some((seconds * 1_000_000 + i128::from(micros), rest))
}

fn is_bc(rest: &[u8]) -> Option<bool> {
    match rest {
        b"" => Some(false),
        b" BC" => Some(true),
        _ => None,
    }
}

fn year_of(year: i64, is_bc: bool) -> i64 {
    if is_bc { 1 - year } else { year }
}

/// Reads a date as days since 1970.
pub fn date(value: &[u8], target_type: &str) -> Result<i32, ValueError> {
    match value {
        b"infinity" => return Ok(INFINITE_DATE),
        b"-infinity" => return Ok(-INFINITE_DATE),
        _ => {}
    }

    let read = || {
        let (year, month, day, rest) = civil(value)?;
        Some(days_from_civil(year_of(year, is_bc(rest)?), month, day))
    };

    let days = read().ok_or_else(|| ValueError::malformed("date", value))?;
    finite_date(days, target_type)
}

/// Converts days since 2000, as COPY BINARY sends them.
pub fn date_from_days(days: i32, target_type: &str) -> Result<i32, ValueError> {
    match days {
        i32::MAX => Ok(INFINITE_DATE),
        i32::MIN => Ok(-INFINITE_DATE),
        _ => finite_date(i64::from(days) + i64::from(DAYS_TO_2000), target_type),
    }
}

/// Refuses a date that would become an infinity; PostgreSQL's last date is far from it.
fn finite_date(days: i64, target_type: &str) -> Result<i32, ValueError> {
    match i32::try_from(days) {
        Ok(days) if days != INFINITE_DATE && days > -INFINITE_DATE => Ok(days),
        _ => Err(out_of_range("a date this far away", target_type)),
    }
}

/// Reads a timestamp as microseconds since 1970, with or without a zone.
pub fn timestamp(value: &[u8], target_type: &str) -> Result<i64, ValueError> {
    match value {
        b"infinity" => return Ok(INFINITE_TIME),
        b"-infinity" => return Ok(-INFINITE_TIME),
        _ => {}
    }

    let read = || {
        let (year, month, day, rest) = civil(value)?;
        let (micros, rest) = clock(after(rest, b' ')?)?;
        let micros = within_a_day(micros)?;

        // The offset is `+00`, `-03:30`, or `+01:23:45` in old zones.
        let (offset, rest) = match rest.split_first() {
            Some((sign @ (b'+' | b'-'), zone)) => {
                let number = |digits: Option<(i64, _)>| digits.filter(|(number, _)| *number < 60);
                let (mut seconds, mut rest) =
                    number(digits(zone)).map(|(hours, rest)| (hours * 3600, rest))?;

                for unit in [60, 1] {
                    if let Some(next) = after(rest, b':') {
                        let (number, next) = number(digits(next))?;
                        (seconds, rest) = (seconds + number * unit, next);
                    }
                }

                (if *sign == b'-' { -seconds } else { seconds }, rest)
            }
            _ => (0, rest),
        };

        let days = days_from_civil(year_of(year, is_bc(rest)?), month, day);
        Some((days, micros - offset * 1_000_000))
    };

    let (days, micros) = read().ok_or_else(|| ValueError::malformed("timestamp", value))?;
    let total = i128::from(days) * i128::from(MICROS_PER_DAY) + i128::from(micros);
    finite(total, target_type)
}

/// Converts microseconds since 2000, as COPY BINARY sends them.
pub fn timestamp_from_micros(micros: i64, target_type: &str) -> Result<i64, ValueError> {
    match micros {
        i64::MAX => Ok(INFINITE_TIME),
        i64::MIN => Ok(-INFINITE_TIME),
        _ => finite(i128::from(micros) + i128::from(MICROS_TO_2000), target_type),
    }
}

/// Refuses a timestamp out of DuckDB's range: PostgreSQL's last year is 294276, DuckDB's is 294247.
fn finite(micros: i128, target_type: &str) -> Result<i64, ValueError> {
    match i64::try_from(micros) {
        Ok(micros) if micros != INFINITE_TIME && micros > -INFINITE_TIME => Ok(micros),
        _ => Err(out_of_range("a timestamp after the year 294246", target_type)),
    }
}

/// Reads a time as microseconds since midnight; `24:00:00` is a valid time.
pub fn time(value: &[u8]) -> Result<i64, ValueError> {
    let read = || {
        let (micros, rest) = clock(value)?;
        within_a_day(micros).filter(|_| rest.is_empty())
    };
    read().ok_or_else(|| ValueError::malformed("time", value))
}

/// Converts microseconds since midnight, as COPY BINARY sends them.
pub fn time_from_binary(value: &[u8; 8]) -> Result<i64, ValueError> {
    within_a_day(i64::from_be_bytes(*value).into())
        .ok_or_else(|| ValueError::malformed("time", value))
}

/// Refuses a number that is no time, since DuckDB accepts any number as a time.
fn within_a_day(micros: i128) -> Option<i64> {
    i64::try_from(micros).ok().filter(|micros| (0..=MICROS_PER_DAY).contains(micros))
}

/// Reads `1 year 2 mons -3 days +04:05:06.7`.
pub fn interval(value: &[u8]) -> Result<Interval, ValueError> {
    if matches!(value, b"infinity" | b"-infinity") {
        return Err(infinite_interval());
    }
    read_interval(value).ok_or_else(|| ValueError::malformed("interval", value))
}

fn infinite_interval() -> ValueError {
    out_of_range("an infinite interval", "INTERVAL")
}

fn read_interval(value: &[u8]) -> Option<Interval> {
    let mut interval = Interval::default();
    let mut months = 0_i64;
    let mut words = value.split(|&byte| byte == b' ');
    let mut has_words = false;

    while let Some(word) = words.next() {
        has_words = true;
        let (is_negative, number) = match word.split_first() {
            Some((b'-', rest)) => (true, rest),
            Some((b'+', rest)) => (false, rest),
            _ => (false, word),
        };

        let sign = if is_negative { -1 } else { 1 };

        if word.contains(&b':') {
            let (micros, rest) = clock(number)?;
            // The time part ends an interval.
            if !rest.is_empty() || words.next().is_some() {
                return None;
            }

            interval.micros = i64::try_from(i128::from(sign) * micros).ok()?;
            break;
        }

        let (number, rest) = digits(number)?;
        if !rest.is_empty() {
            return None;
        }

        match words.next()? {
            b"year" | b"years" => months = months.checked_add(sign * number.checked_mul(12)?)?,
            b"mon" | b"mons" => months = months.checked_add(sign * number)?,
            b"day" | b"days" => interval.days = i32::try_from(sign * number).ok()?,
            _ => return None,
        }
    }

    interval.months = i32::try_from(months).ok()?;
    has_words.then_some(interval)
}

/// Reads microseconds, days and months, as COPY BINARY sends them.
pub fn interval_from_binary(value: &[u8; 16], _target_type: &str) -> Result<Interval, ValueError> {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *value;
    let [i, j, k, l, m, n, o, p] = rest;
    let interval = Interval {
        micros: i64::from_be_bytes([a, b, c, d, e, f, g, h]),
        days: i32::from_be_bytes([i, j, k, l]),
        months: i32::from_be_bytes([m, n, o, p]),
    };

    let is_infinite = [(i64::MAX, i32::MAX), (i64::MIN, i32::MIN)].iter().any(|&(wide, narrow)| {
        (interval.micros, interval.days, interval.months) == (wide, narrow, narrow)
    });

    if is_infinite { Err(infinite_interval()) } else { Ok(interval) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_all_ages() {
        let days = |text: &str| date(text.as_bytes(), "DATE").unwrap();
        assert_eq!(days("1970-01-01"), 0);
        assert_eq!(days("2000-01-01"), DAYS_TO_2000);
        assert_eq!(days("2024-02-29"), 19_782);
        assert_eq!(days("0001-01-01"), -719_162);
        assert_eq!(days("0001-12-31 BC"), -719_163);
        assert_eq!(days("4713-01-01 BC"), -2_440_550);
        assert_eq!(
            days("5874897-12-31"),
            i32::try_from(days_from_civil(5_874_897, 12, 31)).unwrap()
        );
        assert_eq!((days("infinity"), days("-infinity")), (i32::MAX, -i32::MAX));
        assert_eq!(date_from_days(0, "DATE"), Ok(DAYS_TO_2000));
        assert_eq!(date_from_days(i32::MIN, "DATE"), Ok(-i32::MAX));
    }

    #[test]
    fn timestamps_of_all_ages_and_zones() {
        let micros = |text: &str| timestamp(text.as_bytes(), "TIMESTAMP").unwrap();
        assert_eq!(micros("1970-01-01 00:00:00"), 0);
        assert_eq!(micros("1969-12-31 23:59:59.999999"), -1);
        assert_eq!(micros("2000-01-01 00:00:00.5+00"), MICROS_TO_2000 + 500_000);
        assert_eq!(micros("1970-01-01 01:23:45+01:23:45"), 0);
        assert_eq!(micros("1970-01-01 00:00:00-00:30"), 1_800_000_000);
        assert_eq!(
            micros("0044-03-15 12:00:00 BC"),
            days_from_civil(-43, 3, 15) * MICROS_PER_DAY + MICROS_PER_DAY / 2
        );
        assert_eq!((micros("infinity"), micros("-infinity")), (i64::MAX, -i64::MAX));
        assert!(timestamp(b"294276-12-31 23:59:59", "TIMESTAMP").is_err());
        assert!(timestamp(b"2024-01-01", "TIMESTAMP").is_err());
    }

    #[test]
    fn intervals_keep_their_three_parts() {
        let of = |text: &str| interval(text.as_bytes()).unwrap();
        let all = Interval { months: 14, days: -3, micros: 14_706_700_000 };
        assert_eq!(of("1 year 2 mons -3 days +04:05:06.7"), all);
        assert_eq!(
            of("1 mon -2 days +03:04:05.6"),
            Interval { months: 1, days: -2, micros: 11_045_600_000 }
        );
        assert_eq!(of("-178000000 years").months, -2_136_000_000);
        assert_eq!(of("-00:00:01").micros, -1_000_000);
        assert_eq!(of("00:00:00"), Interval::default());
        assert_eq!(of("-2562047788:00:54.775808").micros, i64::MIN);
        for text in ["", "1", "1 fortnight", "1 day 2", "infinity", "00:00:00 1 day"] {
            assert!(interval(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_day_may_end_at_24_hours() {
        assert_eq!(time(b"24:00:00"), Ok(MICROS_PER_DAY));
        assert_eq!(time(b"00:00:00.000001"), Ok(1));
        assert!(time(b"1:2").is_err());
    }

    #[test]
    fn numbers_beyond_all_clocks_are_refused_and_do_not_overflow() {
        const MAX: &str = "999999999999999999";
        for text in [
            format!("{MAX}:00:00"),
            format!("00:{MAX}:00"),
            format!("00:00:{MAX}"),
            "24:00:01".to_owned(),
        ] {
            assert!(time(text.as_bytes()).is_err(), "{text}");
            assert!(
                timestamp(format!("2024-01-01 {text}").as_bytes(), "TIMESTAMP").is_err(),
                "{text}"
            );
            assert!(text.starts_with('2') || interval(text.as_bytes()).is_err(), "{text}");
        }
        for zone in [format!("+{MAX}"), format!("-00:{MAX}"), format!("+00:00:{MAX}")] {
            assert!(
                timestamp(format!("2024-01-01 00:00:00{zone}").as_bytes(), "TIMESTAMP").is_err(),
                "{zone}"
            );
        }
        for micros in [-1, MICROS_PER_DAY + 1, i64::MIN, i64::MAX] {
            assert!(time_from_binary(&micros.to_be_bytes()).is_err(), "{micros}");
        }
        assert_eq!(time_from_binary(&MICROS_PER_DAY.to_be_bytes()), Ok(MICROS_PER_DAY));
    }

    #[test]
    fn no_date_becomes_an_infinity() {
        assert_eq!(date(b"5881580-07-10", "DATE"), Ok(i32::MAX - 1));
        assert!(date(b"5881580-07-11", "DATE").is_err());
        assert!(date_from_days(i32::MAX - DAYS_TO_2000, "DATE").is_err());
        assert_eq!(date_from_days(i32::MAX - DAYS_TO_2000 - 1, "DATE"), Ok(i32::MAX - 1));
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..40),
            text in "[-+0-9: .a-zB]{0,30}",
        ) {
            for input in [bytes.as_slice(), text.as_bytes()] {
                let _ = (date(input, ""), timestamp(input, ""), time(input), interval(input));
            }
        }
    }
}
