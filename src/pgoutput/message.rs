//! Decodes pgoutput text from `&[u8]` to [`Message`] with a checked cursor, without allocation
//! except for Relation and Truncate.
//!
//! No bytes may be left after a message, and an unknown tag is an error: a message that rhei does
//! not understand could be a lost change.

use super::{
    QualifiedName, ReplicaIdentity,
    relation::{Relation, RelationColumn},
    tuple::{Tuple, TupleError},
};
use crate::Lsn;

/// One message of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// `commit_lsn` is the field that the protocol calls `final_lsn`.
    Begin {
        commit_lsn: Lsn,
        commit_time_us: i64,
        xid: u32,
    },
    Commit {
        commit_lsn: Lsn,
        end_lsn: Lsn,
        commit_time_us: i64,
    },
    /// The transaction came to this server from another server; the LSN is that server's and may be
    /// 0/0 (trap 81).
    Origin {
        lsn: Lsn,
        name: &'a str,
    },
    Relation(Relation),
    /// A Type message announces a type that is not built in; for a domain it names the base type
    /// (trap 72).
    Type {
        oid: u32,
        schema: &'a str,
        name: &'a str,
    },
    Insert {
        relation: u32,
        new: Tuple<'a>,
    },
    Update {
        relation: u32,
        old: OldTuple<'a>,
        new: Tuple<'a>,
    },
    Delete {
        relation: u32,
        old: OldTuple<'a>,
    },
    Truncate {
        relations: Vec<u32>,
        cascade: bool,
        restart_identity: bool,
    },
    /// A message of `pg_logical_emit_message`; messages that are not transactional arrive outside
    /// of any transaction (trap 78).
    Logical {
        transactional: bool,
        lsn: Lsn,
        prefix: &'a str,
        content: &'a [u8],
    },
}

/// The part of the old row that an UPDATE or DELETE carries. `Key` does not mean that the key
/// changed (trap 50).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldTuple<'a> {
    Absent,
    /// The tuple holds the replica identity's columns; all other columns are null.
    Key(Tuple<'a>),
    /// The tuple holds the whole old row (REPLICA IDENTITY FULL), TOASTed values included.
    Full(Tuple<'a>),
}

/// The bytes are no pgoutput message, because of a broken server or an error in rhei: rhei applies
/// nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("pgoutput message '{}' ends too early", tag_text(*tag))]
    Short { tag: u8 },
    #[error("pgoutput message '{}' has {left} bytes too many", tag_text(*tag))]
    Trailing { tag: u8, left: usize },
    #[error("unknown pgoutput message '{}' (0x{tag:02x}): this server speaks a protocol that this \
             rhei does not know", tag_text(*tag))]
    UnknownTag { tag: u8 },
    #[error("empty pgoutput message")]
    Empty,
    #[error("pgoutput message '{}' holds text that is not UTF-8", tag_text(*tag))]
    NotUtf8 { tag: u8 },
    #[error("pgoutput message '{}' has {what} '{}' where that is not \
             allowed", tag_text(*tag), tag_text(*found))]
    Unexpected { tag: u8, what: &'static str, found: u8 },
    #[error("pgoutput message '{}' holds a row that cannot be read", tag_text(*tag))]
    Tuple { tag: u8, source: TupleError },
}

fn tag_text(tag: u8) -> std::ascii::EscapeDefault {
    std::ascii::escape_default(tag)
}

impl<'a> Message<'a> {
    /// Reads one message, the payload of one XLogData.
    ///
    /// # Errors
    /// The bytes are cut off, too many, or of no known kind.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let (&tag, rest) = bytes.split_first().ok_or(DecodeError::Empty)?;
        let mut cursor = Cursor { tag, rest };

        let message = match tag {
            b'B' => Self::Begin {
                commit_lsn: cursor.lsn()?,
                commit_time_us: cursor.i64()?,
                xid: cursor.u32()?,
            },
            b'C' => Self::commit(&mut cursor)?,
            b'O' => Self::Origin { lsn: cursor.lsn()?, name: cursor.text()? },
            b'R' => Self::Relation(cursor.relation()?),
            b'Y' => Self::Type { oid: cursor.u32()?, schema: cursor.text()?, name: cursor.text()? },
            b'I' => Self::insert(&mut cursor)?,
            b'U' => Self::update(&mut cursor)?,
            b'D' => Self::delete(&mut cursor)?,
            b'T' => Self::truncate(&mut cursor)?,
            b'M' => Self::logical(&mut cursor)?,
            unknown => return Err(DecodeError::UnknownTag { tag: unknown }),
        };

        cursor.end(message)
    }

    fn commit(cursor: &mut Cursor<'a>) -> Result<Self, DecodeError> {
        let _flags = cursor.u8()?;
        Ok(Self::Commit {
            commit_lsn: cursor.lsn()?,
            end_lsn: cursor.lsn()?,
            commit_time_us: cursor.i64()?,
        })
    }

    #[inline]
    fn insert(cursor: &mut Cursor<'a>) -> Result<Self, DecodeError> {
        let relation = cursor.u32()?;
        cursor.expect("tuple kind", b'N')?;
        Ok(Self::Insert { relation, new: cursor.tuple()? })
    }

    #[inline]
    fn update(cursor: &mut Cursor<'a>) -> Result<Self, DecodeError> {
        let relation = cursor.u32()?;
        let (old, next) = match cursor.u8()? {
            b'K' => (OldTuple::Key(cursor.tuple()?), cursor.u8()?),
            b'O' => (OldTuple::Full(cursor.tuple()?), cursor.u8()?),
            other => (OldTuple::Absent, other),
        };

        if next != b'N' {
            let tag = cursor.tag;
            return Err(DecodeError::Unexpected { tag, what: "tuple kind", found: next });
        }
        Ok(Self::Update { relation, old, new: cursor.tuple()? })
    }

    #[inline]
    fn delete(cursor: &mut Cursor<'a>) -> Result<Self, DecodeError> {
        let relation = cursor.u32()?;
        let old = match cursor.u8()? {
            b'K' => OldTuple::Key(cursor.tuple()?),
            b'O' => OldTuple::Full(cursor.tuple()?),
            found => {
                let tag = cursor.tag;
                return Err(DecodeError::Unexpected { tag, what: "tuple kind", found });
            }
        };
        Ok(Self::Delete { relation, old })
    }

    fn truncate(cursor: &mut Cursor<'a>) -> Result<Self, DecodeError> {
        let count = cursor.u32()? as usize;
        let flags = cursor.u8()?;

        // The capacity comes from the bytes that are present, not from the count that they claim.
        let mut relations = Vec::with_capacity(count.min(cursor.rest.len() / 4));
        for _ in 0..count {
            relations.push(cursor.u32()?);
        }

        Ok(Self::Truncate { relations, cascade: flags & 1 != 0, restart_identity: flags & 2 != 0 })
    }

    fn logical(cursor: &mut Cursor<'a>) -> Result<Self, DecodeError> {
        let flags = cursor.u8()?;
        let lsn = cursor.lsn()?;
        let prefix = cursor.text()?;
        let length = cursor.u32()? as usize;
        let content = cursor.take(length)?;
        Ok(Self::Logical { transactional: flags & 1 != 0, lsn, prefix, content })
    }
}

/// The messages that frame pieces of a transaction that the server streams before it has ended
/// (protocol 2). Between Start and Stop each message carries the number of its (sub)transaction
/// after its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Streamed {
    Start {
        xid: u32,
    },
    Stop,
    /// A subtransaction was rolled back, or the whole transaction: then both numbers are equal.
    Abort {
        xid: u32,
        subxid: u32,
    },
}

/// The end of a streamed transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamCommit {
    pub xid: u32,
    pub commit_lsn: Lsn,
    pub end_lsn: Lsn,
    /// Microseconds since 2000-01-01 UTC.
    pub commit_time_us: i64,
}

impl Streamed {
    /// Decodes such a message, and returns none for a message of another kind.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (&tag, rest) = bytes.split_first().ok_or(DecodeError::Empty)?;
        let mut cursor = Cursor { tag, rest };

        let message = match tag {
            b'S' => {
                let xid = cursor.u32()?;
                let _is_first = cursor.u8()?;
                Self::Start { xid }
            }
            b'E' => Self::Stop,
            b'A' => Self::Abort { xid: cursor.u32()?, subxid: cursor.u32()? },
            _ => return Ok(None),
        };

        cursor.end(message).map(Some)
    }

    /// Splits a message between Start and Stop into its transaction number, its tag, and the bytes
    /// after the two.
    pub fn split(bytes: &[u8]) -> Result<(u32, u8, &[u8]), DecodeError> {
        let (&tag, rest) = bytes.split_first().ok_or(DecodeError::Empty)?;
        let mut cursor = Cursor { tag, rest };
        Ok((cursor.u32()?, tag, cursor.rest))
    }

    /// Returns the oid of the relation that a message describes, if it describes one. The message
    /// must not carry a transaction number.
    pub fn relation(message: &[u8]) -> Option<u32> {
        let (b'R', rest) = message.split_first()? else { return None };
        rest.first_chunk().map(|oid| u32::from_be_bytes(*oid))
    }
}

impl StreamCommit {
    /// Decodes the message, and returns none for a message of another kind.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, DecodeError> {
        let Some((b'c', rest)) = bytes.split_first() else { return Ok(None) };
        let mut cursor = Cursor { tag: b'c', rest };
        let xid = cursor.u32()?;
        let _flags = cursor.u8()?;
        let (commit_lsn, end_lsn, commit_time_us) = (cursor.lsn()?, cursor.lsn()?, cursor.i64()?);
        cursor.end(Self { xid, commit_lsn, end_lsn, commit_time_us }).map(Some)
    }
}

struct Cursor<'a> {
    tag: u8,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Returns the message, and refuses bytes that are left over.
    fn end<T>(self, message: T) -> Result<T, DecodeError> {
        match self.rest.len() {
            0 => Ok(message),
            left => Err(DecodeError::Trailing { tag: self.tag, left }),
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) =
            self.rest.split_at_checked(length).ok_or(DecodeError::Short { tag: self.tag })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) =
            self.rest.split_first_chunk::<N>().ok_or(DecodeError::Short { tag: self.tag })?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn i32(&mut self) -> Result<i32, DecodeError> {
        self.array().map(i32::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, DecodeError> {
        self.array().map(i64::from_be_bytes)
    }

    fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        self.array().map(|bytes| Lsn(u64::from_be_bytes(bytes)))
    }

    fn text(&mut self) -> Result<&'a str, DecodeError> {
        let end = self
            .rest
            .iter()
            .position(|&byte| byte == 0)
            .ok_or(DecodeError::Short { tag: self.tag })?;
        let text = self.take(end)?;
        self.u8()?;
        std::str::from_utf8(text).map_err(|_| DecodeError::NotUtf8 { tag: self.tag })
    }

    fn expect(&mut self, what: &'static str, wanted: u8) -> Result<(), DecodeError> {
        match self.u8()? {
            found if found == wanted => Ok(()),
            found => Err(DecodeError::Unexpected { tag: self.tag, what, found }),
        }
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, DecodeError> {
        let fields = usize::from(self.u16()?);
        let (tuple, rest) = Tuple::split(self.rest, fields).map_err(|error| match error {
            TupleError::Short => DecodeError::Short { tag: self.tag },
            source @ TupleError::Kind(_) => DecodeError::Tuple { tag: self.tag, source },
        })?;
        self.rest = rest;
        Ok(tuple)
    }

    fn relation(&mut self) -> Result<Relation, DecodeError> {
        let oid = self.u32()?;
        let schema = match self.text()? {
            // The wire shortens pg_catalog to an empty string.
            "" => "pg_catalog",
            schema => schema,
        };

        let name = QualifiedName::new(schema, self.text()?);
        let code = self.u8()?;
        let replica_identity = ReplicaIdentity::from_code(code).ok_or(DecodeError::Unexpected {
            tag: self.tag,
            what: "replica identity",
            found: code,
        })?;

        let count = usize::from(self.u16()?);
        let mut columns = Vec::with_capacity(count.min(self.rest.len() / 10));
        for _ in 0..count {
            let flags = self.u8()?;
            let name = self.text()?.to_owned();
            columns.push(RelationColumn {
                name,
                type_oid: self.u32()?,
                typmod: self.i32()?,
                is_key: flags & 1 != 0,
            });
        }

        Ok(Relation { oid, name, replica_identity, columns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::tuple::Field;

    fn tuple_bytes(fields: &[Field<'_>]) -> Vec<u8> {
        let mut out = (fields.len() as u16).to_be_bytes().to_vec();
        for &field in fields {
            crate::pgoutput::tuple::write_field(&mut out, field);
        }
        out
    }

    fn insert() -> Vec<u8> {
        let mut bytes = vec![b'I', 0, 0, 0, 7, b'N'];
        bytes.extend(tuple_bytes(&[
            Field::Text(b"1"),
            Field::Null,
            Field::Unchanged,
            Field::Text("ä".as_bytes()),
        ]));
        bytes
    }

    fn relation() -> Vec<u8> {
        let mut bytes = vec![b'R', 0, 0, 0, 7];
        bytes.extend(b"public\0t\0d\0\x02");
        bytes.extend(b"\x01id\0\0\0\0\x17\xff\xff\xff\xff");
        bytes.extend(b"\x00doc\0\0\0\0\x19\xff\xff\xff\xff");
        bytes
    }

    #[test]
    fn an_insert_keeps_null_unchanged_and_text_apart() {
        let bytes = insert();
        let Ok(Message::Insert { relation: 7, new }) = Message::decode(&bytes) else {
            panic!("not an insert")
        };
        let fields: Vec<_> = new.fields().collect();
        assert_eq!(
            fields,
            [Field::Text(b"1"), Field::Null, Field::Unchanged, Field::Text("ä".as_bytes())]
        );
    }

    #[test]
    fn a_message_cut_at_any_byte_is_an_error_and_never_a_panic() {
        for whole in [insert(), relation(), b"T\0\0\0\x01\x01\0\0\0\x07".to_vec()] {
            assert!(Message::decode(&whole).is_ok());
            for length in 0..whole.len() {
                assert!(Message::decode(&whole[..length]).is_err(), "{length} bytes of {whole:?}");
            }
        }
    }

    #[test]
    fn a_byte_too_many_is_an_error() {
        let mut bytes = insert();
        bytes.push(0);
        assert_eq!(Message::decode(&bytes), Err(DecodeError::Trailing { tag: b'I', left: 1 }));
    }

    #[test]
    fn an_unknown_message_stops_the_stream() {
        let error = Message::decode(b"Zabc").unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown pgoutput message 'Z' (0x5a): this server speaks a protocol that this rhei \
             does not know"
        );
    }

    #[test]
    fn a_hostile_count_takes_no_memory() {
        assert_eq!(Message::decode(b"T\xff\xff\xff\xff\0"), Err(DecodeError::Short { tag: b'T' }));
        assert_eq!(
            Message::decode(b"M\0\0\0\0\0\0\0\0\0p\0\xff\xff\xff\xff"),
            Err(DecodeError::Short { tag: b'M' })
        );
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        ) {
            let _ = Message::decode(&bytes);
        }
    }
}
