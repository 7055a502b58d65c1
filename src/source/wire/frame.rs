//! Messages of the protocol as frames of bytes: no I/O.

use std::{io, time::Duration};

use bytes::{Buf, Bytes, BytesMut};

use crate::source::connection::ConnectError;

/// A message longer than PostgreSQL can make one is refused before memory is allocated for it.
pub(in crate::source) const MAX_MESSAGE_BYTES: usize = (1 << 30) + (1 << 20);

/// The limit of a whole answer to a command. The longest answer is the history of a timeline, with
/// some dozen bytes for each failover.
pub(super) const MAX_ANSWER_BYTES: usize = 16 << 20;

/// The replication connection broke, or the server sent a message that the protocol forbids.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the connection to the source broke")]
    Io(#[from] io::Error),
    #[error("the source closed the connection")]
    Closed,
    #[error("the source has not answered for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the source refused: {0}")]
    Server(ServerMessage),
    #[error(
        "the source sent a message of {bytes} bytes, more than the {limit} that a message may have"
    )]
    TooLong { bytes: usize, limit: usize },
    #[error(
        "the source's answer to a command is longer than the {limit} bytes that an answer may have"
    )]
    LongAnswer { limit: usize },
    #[error("the source sent a message with an impossible length ({0})")]
    BadLength(i32),
    #[error("the source sent an unexpected message '{}' while \
             {during}", std::ascii::escape_default(*.tag))]
    Unexpected { tag: u8, during: &'static str },
    #[error("the source sent a message that ends too early while {during}")]
    Short { during: &'static str },
    #[error(
        "the source asks for the authentication method {0}, which rhei does not speak\nhint: use \
         scram-sha-256 for this role"
    )]
    Authentication(&'static str),
    #[error(
        "the source accepts rhei without having proven that it knows the password\nhint: another \
         server may answer at this address; sslmode=verify-full has the server prove who it is"
    )]
    Unproven,
}

/// An ErrorResponse or NoticeResponse.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerMessage {
    /// SQLSTATE.
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl std::fmt::Display for ServerMessage {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} (SQLSTATE {})", self.message, self.code)?;
        self.detail.iter().try_for_each(|detail| write!(out, "\ndetail: {detail}"))?;
        self.hint.iter().try_for_each(|hint| write!(out, "\nhint: {hint}"))
    }
}

impl ServerMessage {
    /// Reads the body of such a message and leaves out fields of unknown kinds.
    pub fn read(body: &[u8]) -> Self {
        let mut message = Self::default();
        for field in body.split(|&byte| byte == 0) {
            let Some((&kind, text)) = field.split_first() else { continue };
            let text = String::from_utf8_lossy(text).into_owned();
            match kind {
                b'C' => message.code = text,
                b'M' => message.message = text,
                b'D' => message.detail = Some(text),
                b'H' => message.hint = Some(text),
                _ => {}
            }
        }
        message
    }
}

/// One message of the server: its tag and its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub tag: u8,
    pub body: Bytes,
}

/// Cuts bytes into frames. A partial frame is a normal value, not an error.
#[derive(Debug)]
pub struct FrameReader {
    buffer: BytesMut,
    limit: usize,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self::new(MAX_MESSAGE_BYTES)
    }
}

impl FrameReader {
    pub fn new(limit: usize) -> Self {
        Self { buffer: BytesMut::with_capacity(256 << 10), limit }
    }

    /// Raises the limit: from now on rows may arrive, and messages may be as long as PostgreSQL can
    /// make one.
    pub(in crate::source) fn expect_rows(&mut self) {
        self.limit = MAX_MESSAGE_BYTES;
    }

    /// Shows all whole frames to `each` where they lie in the buffer, then drops them. `Ok(true)`
    /// from `each` ends the loop early.
    pub(in crate::source) fn drain<E: From<WireError>>(
        &mut self,
        mut each: impl FnMut(u8, &[u8]) -> Result<bool, E>,
    ) -> Result<bool, E> {
        let mut taken = 0;
        let mut ended = Ok(false);

        while let Some((tag, body)) =
            whole_frame(self.buffer.get(taken..).unwrap_or_default(), self.limit)?
        {
            taken += HEADER_BYTES + body.len();
            ended = each(tag, body);
            if !matches!(ended, Ok(false)) {
                break;
            }
        }

        self.buffer.advance(taken);
        ended
    }

    /// Returns the buffer that takes bytes from the socket. Reserving more room never moves frames
    /// that are cut already.
    pub fn buffer(&mut self) -> &mut BytesMut {
        self.buffer.reserve(128 << 10);
        &mut self.buffer
    }

    /// Returns the next whole frame, or none when more bytes are needed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let Some((tag, body)) = whole_frame(&self.buffer, self.limit)? else { return Ok(None) };
        let bytes = body.len();
        self.buffer.advance(HEADER_BYTES);
        Ok(Some(Frame { tag, body: self.buffer.split_to(bytes).freeze() }))
    }

    pub(in crate::source) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Returns all whole frames in one piece.
    pub(in crate::source) fn whole_frames(&mut self) -> Result<Option<Bytes>, WireError> {
        let mut taken = 0;
        while let Some((_, body)) =
            whole_frame(self.buffer.get(taken..).unwrap_or_default(), self.limit)?
        {
            taken += HEADER_BYTES + body.len();
        }
        Ok((taken > 0).then(|| self.buffer.split_to(taken).freeze()))
    }
}

pub(in crate::source) const HEADER_BYTES: usize = 5;

/// Returns tag and body of the frame that the bytes begin with, or none when more bytes are needed.
/// Memory is allocated as bytes arrive, not as the length field promises them.
pub(in crate::source) fn whole_frame(
    bytes: &[u8],
    limit: usize,
) -> Result<Option<(u8, &[u8])>, WireError> {
    let Some((&tag, rest)) = bytes.split_first() else { return Ok(None) };
    let Some((length, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };

    let length = i32::from_be_bytes(*length);
    let bytes = usize::try_from(length).ok().and_then(|length| length.checked_sub(4));
    let bytes = bytes.ok_or(WireError::BadLength(length))?;

    if bytes > limit {
        return Err(WireError::TooLong { bytes, limit });
    }
    Ok(rest.get(..bytes).map(|body| (tag, body)))
}
