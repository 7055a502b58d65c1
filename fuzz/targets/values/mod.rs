//! One column: whatever comes, each value makes one row, one that is refused makes NULL, and the
//! array is sound.

use std::sync::LazyLock;

use arrow::array::{Array, Decimal128Array, Time64MicrosecondArray};
use rhei::internals::types::{ColumnBuilder, Mapping, ValueError};

use crate::common::{byte, mappings, piece, pieces, within_memory};

static MAPPINGS: LazyLock<Vec<Mapping>> = LazyLock::new(mappings);

pub fn decode(
    bytes: &[u8],
    push: impl Fn(&mut ColumnBuilder, Option<&[u8]>) -> Result<(), ValueError>,
) {
    let mappings = &*MAPPINGS;
    let mut rest = bytes;
    let mapping = &mappings[usize::from(byte(&mut rest)) % mappings.len()];
    within_memory(bytes.len(), 64 << 10, 200, || {
        let mut column = ColumnBuilder::new(mapping, 4);
        let mut is_null = Vec::new();
        while !rest.is_empty() {
            // A length of 65535 stands for NULL.
            let value = if rest.starts_with(&[255, 255]) {
                rest = &rest[2..];
                None
            } else {
                Some(piece(&mut rest))
            };
            let pushed = push(&mut column, value);
            if let Err(error) = &pushed {
                assert!(!error.to_string().is_empty());
            }
            is_null.push(value.is_none() || pushed.is_err());
            assert_eq!(column.len(), is_null.len());
        }
        let array = column.finish();
        assert_eq!(array.len(), is_null.len());
        assert_eq!(array.data_type(), &mapping.arrow_type());
        array.to_data().validate_full().expect("a sound array");
        for (row, is_null) in is_null.iter().enumerate() {
            assert_eq!(array.is_null(row), *is_null, "row {row} of {}", mapping.target_type);
        }
        if let Some(decimals) = array.as_any().downcast_ref::<Decimal128Array>()
            && let arrow::datatypes::DataType::Decimal128(precision, _) = mapping.arrow_type()
        {
            decimals.validate_decimal_precision(precision).expect(
                "no more digits than the type \
                 has",
            );
        }
        if let Some(times) = array.as_any().downcast_ref::<Time64MicrosecondArray>() {
            assert!(
                times.iter().flatten().all(|micros| (0..=86_400_000_000).contains(&micros)),
                "a time beyond its day"
            );
        }
        assert!(column.is_empty());
    });
}

/// Values of every kind for every mapping: most do not fit, and that is to be found out too.
pub fn seeds(binary: bool) -> Vec<Vec<u8>> {
    const TEXTS: [&str; 58] = [
        "t",
        "f",
        "-32768",
        "2147483647",
        "-9223372036854775808",
        "18446744073709551615",
        "NaN",
        "Infinity",
        "1e-45",
        "-12345678.91",
        "0.00",
        "$1,234.56",
        "-$0.05",
        "1970-01-01",
        "4713-01-01 BC",
        "infinity",
        "-infinity",
        "5874897-12-31",
        "24:00:00",
        "23:59:59.999999",
        "1970-01-01 00:00:00.000001",
        "0044-03-15 12:00:00 BC",
        "2024-06-01 12:00:00.5+02",
        "1970-01-01 01:23:45+01:23:45",
        "294276-12-31 23:59:59.999999-15:59",
        "1 year 2 mons -3 days +04:05:06.7",
        "-178000000 years",
        "00:00:00",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        "\\x00ff80",
        "{}",
        "{1,NULL,-3}",
        "{\"NULL\",NULL,\"a,b\",\"q\\\"q\",\"\"}",
        "{{1,2},{3,4}}",
        "[0:1]={5,6}",
        "{{{{{{1}}}}}}",
        "{t,f}",
        "{1970-01-01,infinity}",
        "{\"2024-01-01 00:00:00+00\"}",
        "{\"1 day\",NULL}",
        "{\"(1,x,{1},)\"}",
        "(1,\"x,y\",\"{1,2}\",\"1 day\")",
        "(,,,)",
        "[1,6)",
        "empty",
        "(,3]",
        "[\"2024-01-01 00:00:00\",)",
        "\"a\"=>\"1\", \"b\\\"c\"=>NULL",
        "ä€𝄞",
        "",
        "{\"a\": [1, null]}",
        "1 2 3",
        "{1.50,NULL}",
        "{\"\\\\\\\\x00ff\"}",
        "{\"{\\\\\"a\\\\\": 1}\"}",
        "12:00:00+02",
        "[1.5,2.5]",
        "sad",
    ];
    let words =
        |words: &[u16]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
    let binaries = vec![
        vec![1],
        vec![0, 7],
        23_i32.to_be_bytes().to_vec(),
        i32::MAX.to_be_bytes().to_vec(),
        i32::MIN.to_be_bytes().to_vec(),
        86_400_000_000_i64.to_be_bytes().to_vec(),
        i64::MAX.to_be_bytes().to_vec(),
        i64::MIN.to_be_bytes().to_vec(),
        1.5_f64.to_be_bytes().to_vec(),
        [1_i64.to_be_bytes().as_slice(), &2_i32.to_be_bytes(), &3_i32.to_be_bytes()].concat(),
        vec![255; 16],
        b"\x01{\"a\": 1}".to_vec(),
        words(&[0, 0, 0, 2]),
        words(&[3, 1, 0, 2, 1, 2345, 6700]),
        words(&[1, 0xFFFF, 0x4000, 2, 500]),
        words(&[0, 0, 0xC000, 0]),
        words(&[0, 0, 0xD000, 0]),
        words(&[0, 0, 0xF000, 0]),
        words(&[10, 6, 0, 10, 9999, 9999, 9999, 9999, 9999, 9999, 9999, 9999, 9999, 9000]),
    ];
    let mut seeds = Vec::new();
    for number in 0..MAPPINGS.len() as u8 {
        for texts in TEXTS.chunks(8) {
            let texts = pieces(texts.iter().map(|text| text.as_bytes()));
            seeds.push([[number].as_slice(), &texts, &[255, 255]].concat());
        }
        if binary {
            seeds.push(
                [[number].as_slice(), &pieces(binaries.iter().map(Vec::as_slice)), &[255, 255]]
                    .concat(),
            );
        }
    }
    seeds
}
