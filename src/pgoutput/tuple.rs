//! A row as the wire carries it: field after field, each null, unchanged, or text. The row is
//! checked once, then read without checks.

/// One field of a [`Tuple`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field<'a> {
    Null,
    /// A TOASTed value that the statement did not touch; the wire leaves it out (trap 51).
    Unchanged,
    Text(&'a [u8]),
}

/// A row in pgoutput's form without the leading count: per field a kind byte `n`, `u` or `t`, and
/// after `t` a length (`u32`, big-endian) and that many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple<'a> {
    bytes: &'a [u8],
    fields: usize,
    /// Whether the row has unchanged fields, where this is known.
    has_unchanged: Option<bool>,
}

/// The bytes are no tuple.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TupleError {
    #[error("row ends in the middle of a field")]
    Short,
    #[error("row has a field of unknown kind {:?}", *.0 as char)]
    Kind(u8),
}

impl<'a> Tuple<'a> {
    /// Takes `fields` fields from the front of `input`, and returns the tuple and the rest.
    pub fn split(input: &'a [u8], fields: usize) -> Result<(Self, &'a [u8]), TupleError> {
        let mut rest = input;
        let mut has_unchanged = false;
        for _ in 0..fields {
            let (field, after) = split_field(rest)?;
            has_unchanged |= field == Field::Unchanged;
            rest = after;
        }
        let bytes = input.get(..input.len() - rest.len()).ok_or(TupleError::Short)?;
        Ok((Self { bytes, fields, has_unchanged: Some(has_unchanged) }, rest))
    }

    /// Makes a tuple of bytes that [`Tuple::split`] or a [`TupleWriter`] made before.
    pub(crate) fn trusted(bytes: &'a [u8], fields: usize) -> Self {
        Self { bytes, fields, has_unchanged: None }
    }

    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.fields
    }

    pub fn is_empty(&self) -> bool {
        self.fields == 0
    }

    pub fn fields(&self) -> Fields<'a> {
        Fields { rest: self.bytes, left: self.fields }
    }

    pub fn field(&self, index: usize) -> Option<Field<'a>> {
        self.fields().nth(index)
    }

    pub fn has_unchanged(&self) -> bool {
        self.has_unchanged.unwrap_or_else(|| self.fields().any(|field| field == Field::Unchanged))
    }
}

fn split_field(input: &[u8]) -> Result<(Field<'_>, &[u8]), TupleError> {
    let (&kind, rest) = input.split_first().ok_or(TupleError::Short)?;
    match kind {
        b'n' => Ok((Field::Null, rest)),
        b'u' => Ok((Field::Unchanged, rest)),
        b't' => {
            let (length, rest) = rest.split_first_chunk::<4>().ok_or(TupleError::Short)?;
            let length = u32::from_be_bytes(*length) as usize;
            let (text, rest) = rest.split_at_checked(length).ok_or(TupleError::Short)?;
            Ok((Field::Text(text), rest))
        }
        other => Err(TupleError::Kind(other)),
    }
}

/// The fields of a [`Tuple`], in order.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Fields<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Field<'a>> {
        self.left = self.left.checked_sub(1)?;
        let (field, rest) = split_field(self.rest).ok()?;
        self.rest = rest;
        Some(field)
    }
}

/// Appends a field in the form that [`Tuple`] reads.
pub(crate) fn write_field(out: &mut Vec<u8>, field: Field<'_>) {
    match field {
        Field::Null => out.push(b'n'),
        Field::Unchanged => out.push(b'u'),
        Field::Text(text) => {
            out.push(b't');
            // A field came from a message, whose length is a u32 itself.
            out.extend_from_slice(&(text.len() as u32).to_be_bytes());
            out.extend_from_slice(text);
        }
    }
}
