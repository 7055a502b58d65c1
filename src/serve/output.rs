//! What a client gets of a result: chunks become messages.

use arrow::ipc::writer::StreamWriter;
use bytes::BytesMut;

use super::{
    command::{CopyFormat, CopyKind},
    copy_out,
    encode::{put_field, text},
    error::SqlError,
    reader::Field,
};
use crate::olap::{ArrowForm, Chunk, Column, Rows, SqlType};

/// What rows are encoded as.
#[derive(Debug, Clone)]
pub enum Output {
    /// DataRow, each column in binary or in text.
    Rows {
        binary: Vec<bool>,
    },
    Copy(CopyFormat),
}

/// Turns the chunks of one result into messages.
pub struct Encoder<'a> {
    output: &'a Output,
    types: &'a [SqlType],
    is_first: bool,
    text: String,
    arrow: Option<ArrowStream>,
}

/// A stream of Arrow's IPC format. Its bytes are taken after each step.
struct ArrowStream {
    form: ArrowForm,
    writer: StreamWriter<Vec<u8>>,
}

impl ArrowStream {
    fn take(&mut self) -> Vec<BytesMut> {
        let bytes = std::mem::take(self.writer.get_mut());
        vec![bytes.as_slice().into()]
    }
}

fn arrow_failed(error: arrow::error::ArrowError) -> SqlError {
    SqlError::new("0A000", format!("the rows cannot be written as Arrow: {error}"))
}

impl<'a> Encoder<'a> {
    /// # Errors
    /// The rows are wanted as Arrow, which has no type for one of the columns.
    pub fn of(
        output: &'a Output,
        types: &'a [SqlType],
        fields: &[Field],
        rows: &mut Rows<'_>,
    ) -> Result<Self, SqlError> {
        let arrow = match output {
            Output::Copy(format) if format.kind == CopyKind::Arrow => {
                let form = ArrowForm::of(rows, fields.iter().map(|field| field.name.as_str()))?;
                let writer = StreamWriter::try_new(Vec::new(), form.schema());
                Some(ArrowStream { writer: writer.map_err(arrow_failed)?, form })
            }
            _ => None,
        };
        Ok(Self { output, types, is_first: true, text: String::new(), arrow })
    }

    /// Returns what the client gets before the first row: the header of COPY, if it has one.
    pub fn head(&mut self, fields: &[Field]) -> Vec<BytesMut> {
        match (&mut self.arrow, self.output) {
            (Some(arrow), _) => arrow.take(),
            (None, Output::Rows { .. }) => Vec::new(),
            (None, Output::Copy(format)) => copy_out::head(format, fields),
        }
    }

    /// Returns what the client gets after the last row.
    pub fn tail(&mut self) -> Result<Vec<BytesMut>, SqlError> {
        Ok(match (&mut self.arrow, self.output) {
            (Some(arrow), _) => {
                arrow.writer.finish().map_err(arrow_failed)?;
                arrow.take()
            }
            (None, Output::Rows { .. }) => Vec::new(),
            (None, Output::Copy(format)) => copy_out::tail(format, self.is_first),
        })
    }

    /// Returns the rows of a chunk, a message each; as Arrow, one message for all.
    pub fn rows(&mut self, chunk: &Chunk<'_>) -> Result<Vec<BytesMut>, SqlError> {
        if let Some(arrow) = &mut self.arrow {
            let batch = arrow.form.batch(chunk)?;
            arrow.writer.write(&batch).map_err(arrow_failed)?;
            return Ok(arrow.take());
        }

        let columns = chunk.columns();
        let mut rows = Vec::with_capacity(chunk.rows());
        let mut buffer = BytesMut::with_capacity(chunk.rows() * 64);

        for at in 0..chunk.rows() {
            match self.output {
                Output::Rows { binary } => self.row(binary, &columns, at, &mut buffer)?,
                Output::Copy(format) => {
                    let is_first = std::mem::take(&mut self.is_first);
                    copy_out::row(format, (&columns, self.types), (at, is_first), &mut buffer)?;
                }
            }
            rows.push(buffer.split());
        }
        Ok(rows)
    }

    fn row(
        &mut self,
        binary: &[bool],
        columns: &[Column<'_>],
        at: usize,
        to: &mut BytesMut,
    ) -> Result<(), SqlError> {
        for ((column, of), &is_binary) in columns.iter().zip(self.types).zip(binary) {
            if is_binary || column.is_null(at) {
                put_field(column, of, at, to)?;
                continue;
            }
            self.text.clear();
            text(column, at, &mut self.text);
            to.extend_from_slice(&(self.text.len() as u32).to_be_bytes());
            to.extend_from_slice(self.text.as_bytes());
        }
        Ok(())
    }
}
