//! The hashes of cells: over Arrow, column by column, what `hash_record_extended(ROW(..), 0)` adds
//! up at the source.
//!
//! What an array arrives as is checked once per batch, so the loops over rows hold no errors for
//! it. An array of another type than the rule selected is an error, never a panic: DuckDB or its
//! settings may be other than expected.

use std::ops::AddAssign;

use arrow::{
    array::{
        Array, BinaryArray, Date32Array, Decimal128Array, FixedSizeBinaryArray, Float32Array,
        Float64Array, Int8Array, Int16Array, Int32Array, Int64Array, StringArray, StructArray,
        Time64MicrosecondArray, TimestampMicrosecondArray, UInt32Array, UInt64Array,
    },
    datatypes::DataType,
};

use super::{
    lookup3::{combine, hash_bytes, hash_f64, hash_i64, hash_numeric, hash_u32},
    pg_text,
};
use crate::types::datetime;

/// The days and microseconds from 1970-01-01, from which DuckDB counts, to 2000-01-01, from which
/// PostgreSQL counts.
const DAYS_TO_2000: i32 = 10_957;
const MICROS_TO_2000: i64 = 946_684_800_000_000;

/// A column that cannot be hashed, because DuckDB returned something else than was selected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HashError {
    #[error("column \"{column}\" of the copy cannot be hashed")]
    Column { column: String, source: CellError },
    #[error("the copy returned {found} columns where {expected} were selected")]
    Columns { found: usize, expected: usize },
}

/// What is wrong with a column's values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CellError {
    #[error("DuckDB returned it as {found}, which no rule expects")]
    Type { found: DataType },
    #[error("a value is not a {expected}")]
    Value { expected: &'static str },
}

/// The number of rows and the sum of their hashes, which two equal tables have in common. The order
/// of the rows does not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HashSum {
    pub count: u64,
    /// The hashes are signed, as PostgreSQL's `bigint` is.
    pub sum: i128,
}

impl HashSum {
    pub(super) fn of(hashes: &[u64]) -> Self {
        let sum = hashes.iter().map(|hash| i128::from(hash.cast_signed())).sum();
        Self { count: hashes.len() as u64, sum }
    }
}

impl AddAssign for HashSum {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.sum += other.sum;
    }
}

/// How the cells of a column are hashed. Each entry states the elements of `ROW(..)` at the source,
/// where `c` is the column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CellHash {
    /// `c` of type boolean. A reader gets a byte for it.
    Bool,
    /// `c` of a type of 16 or 32 bits.
    Word,
    /// `c, c >> 32`. The hash of `c` alone is the same for -1 and 4294967295.
    Long,
    /// `c` of type bigint.
    Folded,
    /// `c, c = 0`. The hash of a zero is that of NULL.
    Float,
    /// `c, c < 0`. The hash of a numeric has no sign.
    Numeric,
    /// `cash_send(c)`. The type has no hash.
    Money,
    /// `xid8send(c)`. The hash of `c` has the weakness of [`Self::Long`].
    Xid8,
    /// `c` of type date.
    Date,
    /// `c` of type timestamp or timestamptz.
    Timestamp,
    /// `c` of type time.
    Time,
    /// `timetz_send(c)`. The copy holds the text that DuckDB prints.
    TimeTz,
    /// `interval_send(c)`. The hash of `c` is the same for 30 days and a month.
    Interval,
    /// `c` of type uuid.
    Uuid,
    /// `c` of type text or bytea.
    Bytes,
    /// The text of an array.
    Array { delimiter: u8 },
    /// The text of an hstore.
    Hstore,
}

/// Adds the hashes of a column's cells to those of its rows.
pub(super) fn add_column(
    rows: &mut [u64],
    array: &dyn Array,
    hash: CellHash,
) -> Result<(), CellError> {
    match hash {
        CellHash::Bool => {
            let cells = typed::<Int8Array>(array)?.iter();
            add(rows, cells, |cell| [hash_u32((cell != 0).into())]);
        }
        CellHash::Word => return add_words(rows, array),
        CellHash::Long => {
            let cells = typed::<Int64Array>(array)?.iter();
            add(rows, cells, |cell| [hash_i64(cell), hash_i64(cell >> 32)]);
        }
        CellHash::Folded => {
            let cells = typed::<Int64Array>(array)?.iter();
            add(rows, cells, |cell| [hash_i64(cell)]);
        }
        CellHash::Float => return add_floats(rows, array),
        CellHash::Numeric => return add_numbers(rows, array),
        CellHash::Money => {
            let cells = typed::<Decimal128Array>(array)?.iter();
            add(rows, cells, |cell| [money(cell)]);
        }
        CellHash::Xid8 => {
            let cells = typed::<UInt64Array>(array)?.iter();
            add(rows, cells, |cell| [hash_bytes(&cell.to_be_bytes())]);
        }
        CellHash::Date => {
            let cells = typed::<Date32Array>(array)?.iter();
            add(rows, cells, |cell| [hash_u32(pg_date(cell).cast_unsigned())]);
        }
        CellHash::Timestamp => {
            let cells = typed::<TimestampMicrosecondArray>(array)?.iter();
            add(rows, cells, |cell| [hash_i64(pg_timestamp(cell))]);
        }
        CellHash::Time => {
            let cells = typed::<Time64MicrosecondArray>(array)?.iter();
            add(rows, cells, |cell| [hash_i64(cell)]);
        }
        CellHash::TimeTz => {
            let cells = typed::<StringArray>(array)?.iter();
            return try_add(rows, cells, |cell| Ok(hash_bytes(&timetz(cell)?)));
        }
        CellHash::Interval => return add_intervals(rows, array),
        CellHash::Uuid => {
            let cells = typed::<FixedSizeBinaryArray>(array)?.iter();
            add(rows, cells, |cell| [hash_bytes(cell)]);
        }
        CellHash::Bytes => return add_bytes(rows, array),
        CellHash::Array { delimiter } => {
            let mut rows = rows.iter_mut();
            return pg_text::arrays(array, delimiter, |text| add_text(rows.next(), text));
        }
        CellHash::Hstore => {
            let mut rows = rows.iter_mut();
            return pg_text::hstores(array, |text| add_text(rows.next(), text));
        }
    }
    Ok(())
}

/// Returns an array as the type that a rule expects.
pub(super) fn typed<A: Array + 'static>(array: &dyn Array) -> Result<&A, CellError> {
    let wrong = || CellError::Type { found: array.data_type().clone() };
    array.as_any().downcast_ref().ok_or_else(wrong)
}

/// Adds `N` elements of `ROW(..)` for each cell; the hash of NULL is 0.
fn add<T, const N: usize>(
    rows: &mut [u64],
    cells: impl Iterator<Item = Option<T>>,
    hash: impl Fn(T) -> [u64; N],
) {
    for (row, cell) in rows.iter_mut().zip(cells) {
        *row = cell.map_or([0; N], &hash).into_iter().fold(*row, combine);
    }
}

fn try_add<T>(
    rows: &mut [u64],
    cells: impl Iterator<Item = Option<T>>,
    hash: impl Fn(T) -> Result<u64, CellError>,
) -> Result<(), CellError> {
    for (row, cell) in rows.iter_mut().zip(cells) {
        *row = combine(*row, cell.map_or(Ok(0), &hash)?);
    }
    Ok(())
}

fn add_text(row: Option<&mut u64>, text: Option<&str>) {
    if let Some(row) = row {
        *row = combine(*row, text.map_or(0, |text| hash_bytes(text.as_bytes())));
    }
}

/// The types smallint, integer, oid, xid and cid: `hashint2extended`, `hashint4extended` and
/// `hashoidextended` of `access/hash/hashfunc.c` hash one word.
fn add_words(rows: &mut [u64], array: &dyn Array) -> Result<(), CellError> {
    match array.data_type() {
        DataType::Int16 => {
            let cells = typed::<Int16Array>(array)?.iter();
            add(rows, cells, |cell| [hash_u32(i32::from(cell).cast_unsigned())]);
        }
        DataType::UInt32 => add(rows, typed::<UInt32Array>(array)?.iter(), |cell| [hash_u32(cell)]),
        _ => {
            let cells = typed::<Int32Array>(array)?.iter();
            add(rows, cells, |cell| [hash_u32(cell.cast_unsigned())]);
        }
    }
    Ok(())
}

/// `hashfloat4extended` hashes the value as `double precision`.
fn add_floats(rows: &mut [u64], array: &dyn Array) -> Result<(), CellError> {
    let both = |value: f64| [hash_f64(value), hash_u32((value == 0.0).into())];
    if *array.data_type() == DataType::Float32 {
        add(rows, typed::<Float32Array>(array)?.iter(), |cell| both(cell.into()));
    } else {
        add(rows, typed::<Float64Array>(array)?.iter(), both);
    }
    Ok(())
}

fn add_numbers(rows: &mut [u64], array: &dyn Array) -> Result<(), CellError> {
    let numbers: &Decimal128Array = typed(array)?;
    let scale = pg_text::scale_of(numbers.scale())?;
    let both = |cell| [hash_numeric(cell, scale), hash_u32((cell < 0).into())];
    add(rows, numbers.iter(), both);
    Ok(())
}

/// Text in UTF-8 and bytes have one hash (`hashtext` with a deterministic collation,
/// `hashvarlena`).
fn add_bytes(rows: &mut [u64], array: &dyn Array) -> Result<(), CellError> {
    if *array.data_type() == DataType::Binary {
        add(rows, typed::<BinaryArray>(array)?.iter(), |cell| [hash_bytes(cell)]);
    } else {
        add(rows, typed::<StringArray>(array)?.iter(), |cell| [hash_bytes(cell.as_bytes())]);
    }
    Ok(())
}

fn add_intervals(rows: &mut [u64], array: &dyn Array) -> Result<(), CellError> {
    let intervals = Intervals::of(array)?;
    let cells = (0..array.len()).map(|at| (!intervals.is_null(at)).then_some(at));
    try_add(rows, cells, |at| {
        let (months, days, micros) = intervals.value(at)?;
        let (micros, days, months) =
            (micros.to_be_bytes(), days.to_be_bytes(), months.to_be_bytes());
        // The order of `interval_send` of `utils/adt/timestamp.c`.
        Ok(hash_bytes(&[micros.as_slice(), &days, &months].concat()))
    })
}

/// Intervals, which are selected as months, days and microseconds: an interval of Arrow counts
/// nanoseconds, for which not every interval has room.
pub(super) struct Intervals<'a> {
    whole: &'a StructArray,
    months: &'a Int64Array,
    days: &'a Int64Array,
    micros: &'a Int64Array,
}

impl<'a> Intervals<'a> {
    pub fn of(array: &'a dyn Array) -> Result<Self, CellError> {
        let whole: &StructArray = typed(array)?;
        let part = |name: &str| {
            let column = whole.column_by_name(name);
            typed(column.ok_or_else(|| CellError::Type { found: whole.data_type().clone() })?)
        };
        Ok(Self { whole, months: part("months")?, days: part("days")?, micros: part("micros")? })
    }

    pub fn is_null(&self, at: usize) -> bool {
        self.whole.is_null(at)
    }

    /// Returns months, days and microseconds.
    pub fn value(&self, at: usize) -> Result<(i32, i32, i64), CellError> {
        let narrow = |value: i64| {
            i32::try_from(value).map_err(|_| CellError::Value { expected: "part of an interval" })
        };
        let (months, days) = (self.months.value(at), self.days.value(at));
        Ok((narrow(months)?, narrow(days)?, self.micros.value(at)))
    }
}

/// The hash of `cash_send` of `utils/adt/cash.c`. A DECIMAL has room for numbers that no money has;
/// their hash is that of other bytes.
fn money(value: i128) -> u64 {
    match i64::try_from(value) {
        Ok(value) => hash_bytes(&value.to_be_bytes()),
        Err(_) => hash_bytes(&value.to_be_bytes()),
    }
}

/// Returns PostgreSQL's number of a date: the infinities are the ends of the range, where DuckDB
/// has the greatest value and its negative. The sum wraps, since the copy may hold any number.
fn pg_date(days: i32) -> i32 {
    match days {
        i32::MAX => i32::MAX,
        _ if days == -i32::MAX => i32::MIN,
        _ => days.wrapping_sub(DAYS_TO_2000),
    }
}

/// Returns PostgreSQL's number of a timestamp. See [`pg_date`].
fn pg_timestamp(micros: i64) -> i64 {
    match micros {
        i64::MAX => i64::MAX,
        _ if micros == -i64::MAX => i64::MIN,
        _ => micros.wrapping_sub(MICROS_TO_2000),
    }
}

/// Returns the bytes of `timetz_send` (`utils/adt/date.c`) for DuckDB's text, `12:00:00.5-03:30`:
/// microseconds, and seconds west of Greenwich.
fn timetz(text: &str) -> Result<[u8; 12], CellError> {
    let wrong = || CellError::Value { expected: "time with time zone" };
    let (time, zone) =
        text.find(['+', '-']).and_then(|at| text.split_at_checked(at)).ok_or_else(wrong)?;
    let micros = datetime::time(time.as_bytes()).map_err(|_| wrong())?;

    let is_east = zone.starts_with('+');
    let mut seconds = 0;
    let mut unit = 3600;
    for part in zone.get(1..).unwrap_or_default().split(':') {
        let part: u8 = part.parse().map_err(|_| wrong())?;
        seconds += i32::from(part) * unit;
        unit /= 60;
    }

    let west = if is_east { -seconds } else { seconds };
    let [a, b, c, d, e, f, g, h] = micros.to_be_bytes();
    let [i, j, k, l] = west.to_be_bytes();
    Ok([a, b, c, d, e, f, g, h, i, j, k, l])
}

/// The numbers are what a server of PostgreSQL 15 prints.
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, NullArray};

    use super::*;

    fn hashes(array: ArrayRef, hash: CellHash) -> Vec<i64> {
        let mut rows = vec![0; array.len()];
        add_column(&mut rows, array.as_ref(), hash).unwrap();
        rows.into_iter().map(u64::cast_signed).collect()
    }

    #[test]
    fn dates_count_from_2000_and_have_other_infinities() {
        let days = vec![Some(19_782), Some(i32::MAX), Some(-i32::MAX), Some(-735_160), None];
        let expected = [
            8_051_018_284_886_573_209,
            -9_109_110_466_470_504_941,
            1_977_219_185_673_256_887,
            -1_399_449_866_377_390_411,
            0,
        ];
        assert_eq!(hashes(Arc::new(Date32Array::from(days)), CellHash::Date), expected);
        assert_eq!(pg_timestamp(-i64::MAX), i64::MIN);
        assert_eq!(pg_timestamp(i64::MAX), i64::MAX);
        assert_eq!(pg_timestamp(1_704_067_200_000_000), 0x0002_b0d5_d4e9_4000);
    }

    #[test]
    fn a_uuid_hashes_by_its_bytes() {
        let bytes: [u8; 16] = std::array::from_fn(|at| 0x11 * at as u8);
        let uuids = FixedSizeBinaryArray::try_from_iter([bytes].into_iter()).unwrap();
        let expected = [4_462_459_420_613_485_749];
        assert_eq!(hashes(Arc::new(uuids), CellHash::Uuid), expected);
    }

    #[test]
    fn a_time_with_zone_has_the_bytes_that_timetz_send_gives() {
        let bytes = timetz("00:00:00-15:59:59").unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xe0, 0xff]);
        assert_eq!(timetz("00:00:00+01").unwrap()[8..], (-3600_i32).to_be_bytes());
        for text in ["", "00:00:00", "00:00:00+", "1+1", "00:00:00+999"] {
            assert!(timetz(text).is_err(), "{text}");
        }
    }

    #[test]
    fn zero_is_not_null_and_a_sign_counts() {
        let floats = Float64Array::from(vec![Some(0.0), Some(-0.0), None]);
        let [zero, negative_zero, null] = hashes(Arc::new(floats), CellHash::Float)[..] else {
            unreachable!()
        };
        assert_eq!(zero, negative_zero);
        assert_ne!(zero, null);

        let numbers = Decimal128Array::from(vec![1, -1]).with_precision_and_scale(5, 2).unwrap();
        let hashed = hashes(Arc::new(numbers), CellHash::Numeric);
        assert_ne!(hashed[0], hashed[1]);

        let longs = Int64Array::from(vec![-1, 4_294_967_295, 1, 4_294_967_296]);
        let hashed = hashes(Arc::new(longs), CellHash::Long);
        assert_ne!(hashed[0], hashed[1]);
        assert_ne!(hashed[2], hashed[3]);
    }

    #[test]
    fn another_type_than_was_selected_is_an_error() {
        let rules = [
            CellHash::Bool,
            CellHash::Word,
            CellHash::Long,
            CellHash::Float,
            CellHash::Numeric,
            CellHash::Money,
            CellHash::Xid8,
            CellHash::Date,
            CellHash::Timestamp,
            CellHash::Time,
            CellHash::TimeTz,
            CellHash::Interval,
            CellHash::Uuid,
            CellHash::Bytes,
            CellHash::Array { delimiter: b',' },
            CellHash::Hstore,
        ];
        for rule in rules {
            let error = add_column(&mut [0], &NullArray::new(1), rule).unwrap_err();
            assert_eq!(error, CellError::Type { found: DataType::Null }, "{rule:?}");
        }
    }

    #[test]
    fn sums_are_of_signed_hashes() {
        let mut sum = HashSum::of(&[u64::MAX, 5]);
        assert_eq!(sum, HashSum { count: 2, sum: 4 });
        sum += HashSum::of(&[1 << 63]);
        assert_eq!(sum, HashSum { count: 3, sum: 4 - (1 << 63) });
    }
}
