//! The replication protocol: rhei's own CopyBoth on `postgres-protocol`, because tokio-postgres has
//! no CopyBoth.
//!
//! [`FrameReader`] owns bytes and knows no socket. [`ReplicationClient`] sends commands and reads
//! their answers; once the stream has begun the client splits into [`StreamReader`], whose task
//! only reads, and [`Feedback`], whose task is the only writer (traps 23, 24).

use std::{io, time::Duration};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::{
    Frame, FrameReader, ServerMessage, WireError,
    feedback::Feedback,
    frame::{HEADER_BYTES, MAX_ANSWER_BYTES},
    socket::{Socket, keep_alive, negotiate_tls},
    stream::StreamReader,
};
use crate::{
    Lsn,
    source::{
        StreamFigures,
        connection::{ConnectError, SourceOptions, options::Address, sql::SESSION_SETTINGS, tls},
    },
};

/// A replication connection that takes commands.
pub struct ReplicationClient {
    pub(super) socket: Socket,
    pub(super) frames: FrameReader,
    parameters: std::collections::HashMap<String, String>,
    pub(super) address: String,
    /// The process that answers, as the other side named it when the session began.
    pub(super) backend_pid: Option<i32>,
}

/// What a connection is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::source) enum Mode {
    Replication,
    Sql,
}

/// The answer of IDENTIFY_SYSTEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentifySystem {
    pub system_id: String,
    pub timeline: u32,
    pub wal_position: Lsn,
    pub database: Option<String>,
}

/// The answer of CREATE_REPLICATION_SLOT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedSlot {
    pub name: String,
    /// The snapshot sees exactly the transactions with `commit_lsn` before this LSN, and the stream
    /// starts at this LSN.
    pub consistent_point: Lsn,
    /// The server drops the snapshot with the next command on this connection (trap 11).
    pub snapshot: Option<String>,
}

/// How long the server keeps a slot, and which servers keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// The server keeps the slot for as long as the connection lives.
    Temporary,
    Permanent,
    /// The standbys keep the slot too (PostgreSQL 17 and newer).
    Failover,
}

/// One row of a simple query, as text.
pub type Row = Vec<Option<String>>;

impl ReplicationClient {
    pub async fn connect(source: &SourceOptions, purpose: &str) -> Result<Self, WireError> {
        Self::connect_as(source, purpose, Mode::Replication).await
    }

    /// Tries the addresses in order. A standby is taken only when no address leads to a primary.
    pub(in crate::source) async fn connect_as(
        source: &SourceOptions,
        purpose: &str,
        mode: Mode,
    ) -> Result<Self, WireError> {
        let (mut standby, mut last) = (None, None);

        for address in source.addresses() {
            let attempt = tokio::time::timeout(
                source.connect_timeout(),
                Self::connect_to(source, &address, purpose, mode),
            );
            match attempt.await {
                Ok(Ok(client))
                    if client
                        .parameters
                        .get("in_hot_standby")
                        .is_some_and(|is_one| is_one == "on") =>
                {
                    standby.get_or_insert(client);
                }
                Ok(Ok(client)) => return client.set_client_encoding().await,
                Ok(Err(error)) => last = Some(error),
                Err(_) => {
                    let (address, after) = (address.to_string(), source.connect_timeout());
                    last = Some(ConnectError::TimedOut { address, after }.into());
                }
            }
        }

        match standby {
            Some(client) => client.set_client_encoding().await,
            None => Err(last.unwrap_or_else(|| ConnectError::NoSource.into())),
        }
    }

    /// Sets the client encoding to SQL_ASCII for a database in SQL_ASCII: the server cannot convert
    /// its text, and invalid bytes would block the slot (trap 74).
    async fn set_client_encoding(mut self) -> Result<Self, WireError> {
        if self.parameters.get("server_encoding").is_some_and(|encoding| encoding == "SQL_ASCII") {
            self.simple_query("SET client_encoding = 'SQL_ASCII'").await?;
        }
        Ok(self)
    }

    async fn connect_to(
        source: &SourceOptions,
        address: &Address,
        purpose: &str,
        mode: Mode,
    ) -> Result<Self, WireError> {
        let unreachable = |error: io::Error| ConnectError::Unreachable {
            address: address.to_string(),
            detail: error.to_string(),
        };

        let mut binding = None;
        let socket = match address {
            Address::Unix(path) => {
                Socket::Unix(UnixStream::connect(path).await.map_err(unreachable)?)
            }
            Address::Tcp { host, connect_to, port } => {
                let stream =
                    TcpStream::connect((connect_to.as_str(), *port)).await.map_err(unreachable)?;
                keep_alive(&stream, source).map_err(unreachable)?;
                match negotiate_tls(source, host, stream, address).await? {
                    Socket::Tls(stream) => {
                        binding = tls::server_end_point(&stream);
                        Socket::Tls(stream)
                    }
                    plain => plain,
                }
            }
        };

        let is_tls = matches!(socket, Socket::Tls(_));
        let mut client = Self {
            socket,
            frames: FrameReader::new(MAX_ANSWER_BYTES),
            parameters: std::collections::HashMap::new(),
            address: address.to_string(),
            backend_pid: None,
        };

        client.start_up(source, purpose, mode).await?;
        client.authenticate(source, is_tls, binding).await?;
        Ok(client)
    }

    async fn start_up(
        &mut self,
        source: &SourceOptions,
        purpose: &str,
        mode: Mode,
    ) -> Result<(), WireError> {
        let application_name = format!("rhei/{purpose}");

        // Of a setting that is given twice the server takes the last one, and these settings decide
        // whether a value arrives whole.
        let mut options = source.options().unwrap_or_default().to_owned();

        // `row_security` and `search_path` shape queries only, but settings that equal those of the
        // SQL sessions are easier to trust.
        for (name, value) in SESSION_SETTINGS {
            options.push_str(&format!(" -c {name}={value}"));
        }

        let mut out = BytesMut::new();
        let parameters = [
            ("user", source.user()),
            ("database", source.database()),
            ("client_encoding", "UTF8"),
            ("application_name", &application_name),
            ("options", options.trim()),
        ];
        let replication = (mode == Mode::Replication).then_some(("replication", "database"));

        frontend::startup_message(parameters.into_iter().chain(replication), &mut out)?;
        self.send(&out).await
    }

    pub(in crate::source) async fn send(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.socket.write_all(bytes).await?;
        self.socket.flush().await?;
        Ok(())
    }

    /// Returns the next frame that is neither a notice nor a parameter. An ErrorResponse becomes an
    /// error.
    pub(in crate::source) async fn receive(&mut self) -> Result<Frame, WireError> {
        loop {
            let Some(frame) = self.frames.next_frame()? else {
                if self.socket.read_buf(self.frames.buffer()).await? == 0 {
                    return Err(WireError::Closed);
                }
                continue;
            };

            match frame.tag {
                b'E' => return Err(WireError::Server(ServerMessage::read(&frame.body))),
                b'N' => {
                    tracing::debug!("the source says: {}", ServerMessage::read(&frame.body).message)
                }
                b'S' => {
                    let mut parts = frame
                        .body
                        .split(|&byte| byte == 0)
                        .map(|part| String::from_utf8_lossy(part).into_owned());
                    if let (Some(name), Some(value)) = (parts.next(), parts.next())
                        && matches!(
                            name.as_str(),
                            "server_encoding" | "server_version" | "in_hot_standby"
                        )
                    {
                        self.parameters.insert(name, value);
                    }
                }
                _ => return Ok(frame),
            }
        }
    }

    /// Runs one command or query by the simple protocol; walsenders know no other protocol.
    pub async fn simple_query(&mut self, query: &str) -> Result<Vec<Row>, WireError> {
        let mut out = BytesMut::new();
        frontend::query(query, &mut out)?;
        self.send(&out).await?;

        let mut rows = Vec::new();
        let mut failure = None;
        let mut left = MAX_ANSWER_BYTES;

        loop {
            match self.receive().await {
                Ok(frame) => match frame.tag {
                    b'D' => {
                        let too_long = WireError::LongAnswer { limit: MAX_ANSWER_BYTES };
                        left = left.checked_sub(HEADER_BYTES + frame.body.len()).ok_or(too_long)?;
                        rows.push(data_row(&frame.body)?);
                    }
                    b'T' | b'C' | b'I' => {}
                    b'Z' => return failure.map_or(Ok(rows), Err),
                    tag => return Err(WireError::Unexpected { tag, during: "answering a query" }),
                },
                // After an error the server sends ReadyForQuery, unless the server goes away.
                Err(error @ WireError::Server(_)) => failure = Some(error),
                Err(error) => return Err(failure.unwrap_or(error)),
            }
        }
    }

    pub async fn identify_system(&mut self) -> Result<IdentifySystem, WireError> {
        const DURING: &str = "identifying the system";
        const SYNTAX_ERROR: &str = "42601";

        let rows = match self.simple_query("IDENTIFY_SYSTEM").await {
            Err(WireError::Server(message)) if message.code == SYNTAX_ERROR => {
                let detail =
                    "A session that asks for replication gets one that knows only SQL.".to_owned();
                return Err(ConnectError::Pooler { address: self.address.clone(), detail }.into());
            }
            rows => rows?,
        };
        let mut values = rows.into_iter().next().unwrap_or_default().into_iter();

        let mut value = || values.next().flatten();
        let short = || WireError::Short { during: DURING };

        Ok(IdentifySystem {
            system_id: value().ok_or_else(short)?,
            timeline: value().and_then(|text| text.parse().ok()).ok_or_else(short)?,
            wal_position: value().and_then(|text| text.parse().ok()).ok_or_else(short)?,
            database: value(),
        })
    }

    /// Returns the address of the other side, for messages.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns whether something stands between rhei and the server that gives sessions numbers of
    /// its own, as poolers and proxies do.
    pub async fn is_behind_proxy(&mut self) -> Result<bool, WireError> {
        let rows = self.simple_query("SELECT pg_catalog.pg_backend_pid()").await?;
        let pid = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten();
        let pid: Option<i32> = pid.and_then(|text| text.parse().ok());
        Ok(pid.is_none() || pid != self.backend_pid)
    }

    /// Returns the history of a timeline as the server keeps it: lines of parent, switch LSN,
    /// reason.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<String, WireError> {
        let rows = self.simple_query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = rows.into_iter().next().and_then(|row| row.into_iter().nth(1)).flatten();
        content.ok_or(WireError::Short { during: "reading the timeline's history" })
    }

    /// Creates a slot that exports its snapshot, with the keywords that every server version
    /// accepts where such keywords exist. The command waits for all open transactions (trap 12).
    pub async fn create_slot(
        &mut self,
        name: &str,
        keep: SlotKind,
    ) -> Result<CreatedSlot, WireError> {
        let name = identifier(name);
        let rows = self
            .simple_query(&match keep {
                SlotKind::Temporary => {
                    format!(
                        "CREATE_REPLICATION_SLOT {name} TEMPORARY LOGICAL pgoutput \
                             EXPORT_SNAPSHOT"
                    )
                }
                SlotKind::Permanent => format!(
                    "CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput \
                     EXPORT_SNAPSHOT"
                ),
                SlotKind::Failover => {
                    format!(
                        "CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput (SNAPSHOT 'export', \
                             FAILOVER)"
                    )
                }
            })
            .await?;

        let short = || WireError::Short { during: "creating a slot" };
        let mut values = rows.into_iter().next().unwrap_or_default().into_iter();
        Ok(CreatedSlot {
            name: values.next().flatten().ok_or_else(short)?,
            consistent_point: values
                .next()
                .flatten()
                .and_then(|text| text.parse().ok())
                .ok_or_else(short)?,
            snapshot: values.next().flatten(),
        })
    }

    /// Makes the standbys keep a slot that exists already.
    pub async fn make_failover(&mut self, name: &str) -> Result<(), WireError> {
        self.simple_query(&format!("ALTER_REPLICATION_SLOT {} (FAILOVER)", identifier(name)))
            .await?;
        Ok(())
    }

    pub async fn drop_slot(&mut self, name: &str) -> Result<(), WireError> {
        self.simple_query(&format!("DROP_REPLICATION_SLOT {}", identifier(name))).await?;
        Ok(())
    }

    /// Starts the stream at `start`, which must not be before `confirmed_flush_lsn` (trap 2). Up to
    /// `queue_bytes` bytes may wait between the socket and the decoder.
    pub async fn start_replication(
        mut self,
        slot: &str,
        start: Lsn,
        publications: &[String],
        with_messages: bool,
        queue: (usize, StreamFigures),
        in_progress: bool,
    ) -> Result<(StreamReader, Feedback), WireError> {
        let timeout = self.simple_query("SHOW wal_sender_timeout").await?;
        let timeout =
            timeout.into_iter().flatten().flatten().next().and_then(|text| interval_setting(&text));

        // With `in_progress`, the server sends transactions before they have ended once it holds
        // too much of them (trap 79). Protocol 4 came with PostgreSQL 16 and describes them the
        // same way.
        let version = self.parameters.get("server_version").map_or("", String::as_str);
        let major =
            version.split(|character: char| !character.is_ascii_digit()).next().unwrap_or_default();
        let protocol = if major.parse().is_ok_and(|major: u32| major >= 16) { 4 } else { 2 };

        let mut out = BytesMut::new();
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {start} (proto_version '{protocol}', \
             publication_names {}{}{})",
            identifier(slot),
            publication_names(publications),
            if in_progress { ", streaming 'on'" } else { "" },
            if with_messages { ", messages 'true'" } else { "" }
        );
        frontend::query(&command, &mut out)?;
        self.send(&out).await?;

        let frame = self.receive().await?;
        if frame.tag != b'W' {
            return Err(WireError::Unexpected { tag: frame.tag, during: "starting the stream" });
        }

        self.frames.expect_rows();
        let socket = self.socket.handle();
        let (read, write) = tokio::io::split(self.socket);

        let feedback = Feedback::start(write, start, timeout);
        let reader =
            StreamReader::start(read, socket, self.frames, feedback.liveness(), timeout, queue);

        Ok((reader, feedback))
    }
}

fn data_row(body: &[u8]) -> Result<Row, WireError> {
    const SHORT: WireError = WireError::Short { during: "reading a row" };
    let (count, mut rest) = body.split_first_chunk::<2>().ok_or(SHORT)?;

    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
        let length = i32::from_be_bytes(*length);
        let Ok(length) = usize::try_from(length) else {
            rest = after;
            row.push(None);
            continue;
        };

        let (value, after) = after.split_at_checked(length).ok_or(SHORT)?;
        row.push(Some(String::from_utf8_lossy(value).into_owned()));
        rest = after;
    }

    Ok(row)
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Returns an SQL literal of a list of quoted names: the server would fold unquoted names to lower
/// case, and PostgreSQL 18 silently streams nothing for a publication that it does not know (trap
/// 41).
fn publication_names(names: &[String]) -> String {
    let names: Vec<String> = names.iter().map(|name| identifier(name)).collect();
    format!("'{}'", names.join(",").replace('\'', "''"))
}

/// Reads `wal_sender_timeout` as SHOW prints it: `1min`, `60s`, `500ms`; zero switches the timeout
/// off.
fn interval_setting(text: &str) -> Option<Duration> {
    let split = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);

    let number: u64 = number.parse().ok()?;
    let milliseconds = match unit {
        "" | "ms" => number,
        "s" => number.checked_mul(1000)?,
        "min" => number.checked_mul(60_000)?,
        "h" => number.checked_mul(3_600_000)?,
        "d" => number.checked_mul(86_400_000)?,
        _ => return None,
    };
    (milliseconds > 0).then(|| Duration::from_millis(milliseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn frames_cut_at_any_byte_come_out_whole() {
        let whole = [frame(b'd', b"abc"), frame(b'c', b""), frame(b'd', &[7; 300])].concat();
        for cut in 0..=whole.len() {
            let mut reader = FrameReader::default();
            let mut seen = Vec::new();
            for part in [&whole[..cut], &whole[cut..]] {
                reader.buffer().extend_from_slice(part);
                while let Some(frame) = reader.next_frame().unwrap() {
                    seen.push((frame.tag, frame.body.len()));
                }
            }
            assert_eq!(seen, [(b'd', 3), (b'c', 0), (b'd', 300)], "cut at {cut}");
        }
    }

    /// Trap 82.
    #[test]
    fn a_hostile_length_is_refused_before_memory_is_taken() {
        let mut reader = FrameReader::new(1000);
        reader.buffer().extend_from_slice(&[b'd', 0, 0, 0x10, 0]);
        assert!(matches!(
            reader.next_frame(),
            Err(WireError::TooLong { bytes: 4092, limit: 1000 })
        ));
        for length in [0_i32, 3, -1, i32::MIN] {
            let mut reader = FrameReader::default();
            reader.buffer().extend_from_slice(b"d");
            reader.buffer().extend_from_slice(&length.to_be_bytes());
            assert!(matches!(reader.next_frame(), Err(WireError::BadLength(_))), "{length}");
        }
    }

    fn client_of(socket: UnixStream) -> ReplicationClient {
        ReplicationClient {
            socket: Socket::Unix(socket),
            frames: FrameReader::new(MAX_ANSWER_BYTES),
            parameters: std::collections::HashMap::new(),
            address: String::new(),
            backend_pid: None,
        }
    }

    /// Builds a message of the server about authentication.
    fn authentication(kind: u32, rest: &[u8]) -> Vec<u8> {
        frame(b'R', &[&kind.to_be_bytes(), rest].concat())
    }

    /// A server that knows the password can prove it, and no other server may be accepted as the
    /// source.
    #[tokio::test]
    async fn a_server_that_breaks_the_exchange_off_is_refused() {
        let environment = crate::source::connection::Environment::default();
        for channel_binding in ["prefer", "require"] {
            for steps in [1, 2] {
                let url =
                    format!("postgresql://u:hush@localhost/d?channel_binding={channel_binding}");
                let source = SourceOptions::parse(&url, &environment).unwrap();
                let (ours, mut theirs) = UnixStream::pair().unwrap();
                let server = tokio::spawn(async move {
                    theirs
                        .write_all(&authentication(10, b"SCRAM-SHA-256\0SCRAM-SHA-256-PLUS\0\0"))
                        .await
                        .unwrap();
                    let mut first = vec![0; 4096];
                    let read = theirs.read(&mut first).await.unwrap();
                    if steps == 2 {
                        let text = String::from_utf8_lossy(&first[..read]).into_owned();
                        let nonce = text.rsplit(",r=").next().unwrap();
                        let answer = format!("r={nonce}server,s=c2FsdHNhbHQ=,i=4096");
                        theirs.write_all(&authentication(11, answer.as_bytes())).await.unwrap();
                        assert!(theirs.read(&mut first).await.unwrap() > 0);
                    }
                    let lets_in = [authentication(0, b""), frame(b'Z', b"I")].concat();
                    theirs.write_all(&lets_in).await.unwrap();
                    theirs
                });
                let mut client = client_of(ours);
                let entered = client.authenticate(&source, true, Some(vec![1; 32])).await;
                assert!(
                    matches!(entered, Err(WireError::Unproven)),
                    "{channel_binding}, {steps}: {entered:?}"
                );
                drop(server.await.unwrap());
            }
        }
    }

    #[tokio::test]
    async fn an_answer_without_end_is_refused() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = client_of(ours);
        let hostile = tokio::spawn(async move {
            let row =
                [[0, 1].as_slice(), &(1_u32 << 20).to_be_bytes(), &vec![b'x'; 1 << 20]].concat();
            let both = [frame(b'S', b"some_name\0value\0"), frame(b'D', &row)].concat();
            while theirs.write_all(&both).await.is_ok() {}
        });
        let answer = client.simple_query("SELECT 1").await;
        assert!(
            matches!(answer, Err(WireError::LongAnswer { limit: MAX_ANSWER_BYTES })),
            "{answer:?}"
        );
        assert!(client.parameters.is_empty());
        drop(client);
        hostile.await.unwrap();
    }

    /// Trap 41.
    #[test]
    fn publication_names_are_quoted_twice() {
        let names = ["MyPub".to_owned(), "it's \"odd\"".to_owned()];
        assert_eq!(publication_names(&names), r#"'"MyPub","it''s ""odd"""'"#);
    }

    #[test]
    fn the_timeout_is_read_as_show_prints_it() {
        assert_eq!(interval_setting("1min"), Some(Duration::from_secs(60)));
        assert_eq!(interval_setting("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(interval_setting("0"), None);
        assert_eq!(interval_setting("18446744073709551615d"), None);
    }
}
