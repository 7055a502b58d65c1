//! COPY .. TO STDOUT on rhei's own wire: tokio-postgres hands over row by row, with an allocation
//! and a wake-up for each row.

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::io::AsyncReadExt;

use super::{Frame, ReplicationClient, ServerMessage, WireError, client::Mode};
use crate::source::connection::{SourceOptions, sql::DISABLE_TRANSACTION_TIMEOUT};

/// An ordinary session for COPY: rows are read where the socket put them. The session is not
/// cancel-safe: a session whose future was dropped midway cannot be used again.
pub struct CopyClient(ReplicationClient);

impl CopyClient {
    pub async fn connect(source: &SourceOptions, purpose: &str) -> Result<Self, WireError> {
        let mut client = ReplicationClient::connect_as(source, purpose, Mode::Sql).await?;
        client.simple_query(DISABLE_TRANSACTION_TIMEOUT).await?;
        client.frames.expect_rows();
        Ok(Self(client))
    }

    /// Runs statements whose results do not matter.
    pub async fn execute(&mut self, sql: &str) -> Result<(), WireError> {
        self.0.simple_query(sql).await.map(|_| ())
    }

    /// Begins a COPY .. TO STDOUT.
    pub async fn copy_out(&mut self, query: &str) -> Result<(), WireError> {
        let mut out = BytesMut::new();
        frontend::query(query, &mut out)?;
        self.0.send(&out).await?;

        match self.0.receive().await {
            Ok(Frame { tag: b'H', .. }) => Ok(()),
            Ok(Frame { tag, .. }) => Err(WireError::Unexpected { tag, during: "copying" }),
            Err(error) => {
                self.drain_to_ready().await?;
                Err(error)
            }
        }
    }

    /// Runs several COPY .. TO STDOUT in one round trip, and shows each row that arrives to `each`,
    /// with the index of its statement.
    ///
    /// # Errors
    /// Also the errors of `each`. The session cannot be used again after an error.
    pub async fn copy_each<E: From<WireError>>(
        &mut self,
        queries: &[&str],
        mut each: impl FnMut(usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut out = BytesMut::new();
        frontend::query(&queries.join("; "), &mut out).map_err(WireError::from)?;
        self.0.send(&out).await?;

        let (mut at, mut is_done) = (0, false);
        let mut show = |tag: u8, body: &[u8]| match tag {
            b'd' => each(at, body).map(|()| false),
            b'C' => {
                at += 1;
                Ok(false)
            }
            b'Z' => {
                is_done = true;
                Ok(true)
            }
            b'E' => Err(WireError::Server(ServerMessage::read(body)).into()),
            b'H' | b'c' | b'N' | b'S' => Ok(false),
            tag => Err(WireError::Unexpected { tag, during: "copying" }.into()),
        };

        while !self.0.frames.drain(&mut show)? {
            if self.0.socket.read_buf(self.0.frames.buffer()).await.map_err(WireError::from)? == 0 {
                return Err(WireError::Closed.into());
            }
        }

        debug_assert!(is_done);
        Ok(())
    }

    /// Shows the rows that have arrived of the copy to `each`, and waits when none have. Returns
    /// `false` when the copy is complete.
    ///
    /// # Errors
    /// Also the errors of `each`; the session cannot be used again after an error.
    pub async fn next_rows<E: From<WireError>>(
        &mut self,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut is_done = false;
        let mut show = |tag: u8, body: &[u8]| match tag {
            b'd' => each(body).map(|()| false),
            // CopyDone is followed by CommandComplete and ReadyForQuery.
            b'c' | b'C' => Ok(false),
            b'Z' => {
                is_done = true;
                Ok(true)
            }
            b'E' => Err(WireError::Server(ServerMessage::read(body)).into()),
            b'N' | b'S' => Ok(false),
            tag => Err(WireError::Unexpected { tag, during: "copying" }.into()),
        };

        if self.0.frames.drain(&mut show)? {
            return Ok(false);
        }

        let read = self.0.socket.read_buf(self.0.frames.buffer()).await.map_err(WireError::from)?;
        if read == 0 {
            return Err(WireError::Closed.into());
        }

        self.0.frames.drain(&mut show)?;
        Ok(!is_done)
    }

    async fn drain_to_ready(&mut self) -> Result<(), WireError> {
        while self.0.receive().await?.tag != b'Z' {}
        Ok(())
    }
}
