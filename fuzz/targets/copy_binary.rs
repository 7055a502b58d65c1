//! COPY BINARY: the same rows, or the same error, however the stream is cut.
#![no_main]

mod common;

use std::sync::{Arc, LazyLock};

use arrow::record_batch::RecordBatch;
use libfuzzer_sys::fuzz_target;

use rhei::internals::{
    change::TableSpec,
    source::copy_binary::CopyReader,
    types::{Mapping, schema_of},
};

const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// Tables of one to five columns that hold every mapping between them, and one that has no columns.
static TABLES: LazyLock<Vec<Arc<TableSpec>>> = LazyLock::new(|| {
    let mut rest: &[Mapping] = &common::mappings();
    let mut tables = vec![common::table_of(&[])];
    while !rest.is_empty() {
        let (some, after) = rest.split_at((1 + tables.len() % 5).min(rest.len()));
        tables.push(common::table_of(some));
        rest = after;
    }
    tables
});

/// The rows, and how it ended.
fn copied<'a>(
    table: &Arc<TableSpec>,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> (usize, Result<RecordBatch, String>, Result<(), String>) {
    let mut reader = CopyReader::new(Arc::clone(table));
    for piece in pieces {
        if let Err(error) = reader.push(piece) {
            return (reader.rows(), Err(error.to_string()), Ok(()));
        }
    }
    let rows = reader.rows();
    let schema = schema_of(
        table.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)),
    );
    let batch = reader.take_batch(&schema).map_err(|error| error.to_string());
    if let Ok(batch) = &batch {
        assert_eq!(batch.num_rows(), rows);
    }
    assert_eq!((reader.rows(), reader.buffered_bytes()), (0, 0));
    let nulled: u64 = reader.take_nulled().iter().map(|nulled| nulled.values).sum();
    assert!(nulled <= (rows * table.columns.len()) as u64);
    (rows, batch, reader.finish().map_err(|error| error.to_string()))
}

fuzz_target!(
    init: common::write_seeds(seeds),
    |bytes: &[u8]| {
        let mut rest = bytes;
        let (flags, number, seed) = (common::byte(&mut rest), common::byte(&mut rest), common::byte(&mut rest));
        let table = &TABLES[usize::from(number) % TABLES.len()];
        let table = if flags & 2 == 0 {
            Arc::clone(table)
        } else {
            Arc::new(TableSpec { null_unrepresentable: true, ..TableSpec::clone(table) })
        };
        // Without it, most mutations would never come past the header.
        let stream = if flags & 1 == 0 { [HEADER, rest].concat() } else { rest.to_vec() };
        common::within_memory(bytes.len(), 2 << 20, 200, || {
            let whole = copied(&table, std::iter::once(stream.as_slice()));
            let cut = copied(&table, common::cut(&stream, seed));
            // NaN differs from itself, so arrays are compared as they print.
            assert_eq!(format!("{whole:?}"), format!("{cut:?}"));
        });
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let values: [&[u8]; 14] = [
        b"\x01",
        &[0, 7],
        &[0, 0, 0, 23],
        &[0, 0, 0, 0, 0, 0, 0, 9],
        &[0; 16],
        b"text",
        b"",
        b"{1,2}",
        b"2024-01-01 00:00:00",
        &[0, 1, 0, 0, 0, 0, 0, 2, 0, 7],
        b"1 day",
        b"\x01{}",
        b"(1,x,{1},)",
        b"\"a\"=>\"1\"",
    ];
    let mut seeds = Vec::new();
    for (number, table) in TABLES.iter().enumerate() {
        let columns = table.columns.len();
        for flags in [0, 2] {
            let mut bytes = vec![flags, number as u8, 5];
            for row in 0..3 {
                bytes.extend((columns as u16).to_be_bytes());
                for column in 0..columns {
                    // The value that this column takes, where one of them is.
                    let fits = |value: &&&[u8]| {
                        rhei::internals::types::ColumnBuilder::new(
                            &table.columns[column].mapping,
                            1,
                        )
                        .push_binary(Some(value))
                        .is_ok()
                    };
                    match values.iter().filter(fits).nth(row) {
                        Some(value) => {
                            bytes.extend((value.len() as u32).to_be_bytes());
                            bytes.extend(*value);
                        }
                        None => bytes.extend([255; 4]),
                    }
                }
            }
            bytes.extend([255, 255]);
            seeds.push(bytes);
        }
    }
    seeds.push([[1, 1, 0].as_slice(), HEADER, &[255, 255]].concat());
    seeds.push([[1, 1, 0].as_slice(), b"PGCOPY\n\xff\r\n\0\0\0\0\0\xff\xff\xff\xff"].concat());
    seeds
}
