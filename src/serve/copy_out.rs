//! The formats of `COPY .. TO STDOUT`.

use bytes::{BufMut, BytesMut};

use super::{
    command::{CopyFormat, CopyKind},
    encode::{put_field, text},
    error::SqlError,
    reader::Field,
};
use crate::olap::{Column, SqlType};

/// Signature, flags, and the length of an extension (`BinarySignature` of `commands/copyto.c`).
const BINARY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// The number of columns that no row has, at the end of the binary format.
const BINARY_END: &[u8] = &(-1_i16).to_be_bytes();

/// Returns the line of names, if it is wanted.
pub fn head(format: &CopyFormat, fields: &[Field]) -> Vec<BytesMut> {
    if !format.has_header || format.kind == CopyKind::Binary {
        return Vec::new();
    }

    let mut line = BytesMut::new();
    for (at, field) in fields.iter().enumerate() {
        if at > 0 {
            line.put_u8(format.delimiter);
        }
        put_text(format, &field.name, &mut line);
    }
    line.put_u8(b'\n');
    vec![line]
}

/// Returns the end of the binary format. With rows, [`row`] has sent its header in front of the
/// first one.
pub fn tail(format: &CopyFormat, is_empty: bool) -> Vec<BytesMut> {
    if format.kind != CopyKind::Binary {
        return Vec::new();
    }
    let header = if is_empty { BINARY_HEADER } else { &[] };
    vec![[header, BINARY_END].concat().as_slice().into()]
}

/// Appends a row. The header of the binary format comes with the first row: DuckDB's own client
/// wants both in one message.
pub fn row(
    format: &CopyFormat,
    (columns, types): (&[Column<'_>], &[SqlType]),
    (at, is_first): (usize, bool),
    to: &mut BytesMut,
) -> Result<(), SqlError> {
    if format.kind == CopyKind::Binary {
        if is_first {
            to.put_slice(BINARY_HEADER);
        }
        to.put_i16(i16::try_from(columns.len()).unwrap_or(i16::MAX));
        for (column, of) in columns.iter().zip(types) {
            put_field(column, of, at, to)?;
        }
        return Ok(());
    }

    let mut value = String::new();
    for (number, column) in columns.iter().enumerate() {
        if number > 0 {
            to.put_u8(format.delimiter);
        }
        if column.is_null(at) {
            to.put_slice(format.null.as_bytes());
            continue;
        }
        value.clear();
        text(column, at, &mut value);
        put_text(format, &value, to);
    }
    to.put_u8(b'\n');
    Ok(())
}

fn put_text(format: &CopyFormat, value: &str, to: &mut BytesMut) {
    if format.kind == CopyKind::Csv {
        return put_csv(format, value, to);
    }

    for &byte in value.as_bytes() {
        match byte {
            b'\\' => to.put_slice(b"\\\\"),
            b'\n' => to.put_slice(b"\\n"),
            b'\r' => to.put_slice(b"\\r"),
            b'\t' => to.put_slice(b"\\t"),
            0x08 => to.put_slice(b"\\b"),
            0x0B => to.put_slice(b"\\v"),
            0x0C => to.put_slice(b"\\f"),
            _ if byte == format.delimiter => to.put_slice(&[b'\\', byte]),
            _ => to.put_u8(byte),
        }
    }
}

fn put_csv(format: &CopyFormat, value: &str, to: &mut BytesMut) {
    let is_special = |&byte: &u8| {
        byte == format.delimiter || byte == format.quote || matches!(byte, b'\n' | b'\r')
    };
    // What reads like NULL or like the end of the data is no value without quotes.
    let is_plain =
        value != format.null && value != "\\." && !value.as_bytes().iter().any(is_special);
    if is_plain {
        return to.put_slice(value.as_bytes());
    }

    to.put_u8(format.quote);
    for &byte in value.as_bytes() {
        if byte == format.quote {
            to.put_u8(byte);
        }
        to.put_u8(byte);
    }
    to.put_u8(format.quote);
}
