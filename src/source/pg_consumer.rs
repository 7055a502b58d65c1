//! `PgConsumer` reads the live stream. Socket reading and feedback are tasks of their own (traps
//! 23, 24); the task of the consumer decodes.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    BatchLimits, CdcConsumer, Delivery, LsnBarrier, SourceError, SourcePosition, StreamFigures,
    connection::SourceOptions,
    spool::{Replay, Routed, Spool},
    wire::{
        ReplicationClient, ServerMessage,
        feedback::Feedback,
        stream::{StreamMessage, StreamReader},
    },
};
use crate::{
    Lsn,
    change::{ChangeBatch, TableSpec, assemble::Assembler},
    checkpoint::DurableLsn,
    failpoint::reached,
    pgoutput::{
        message::{Message, StreamCommit},
        table_description::Secret,
    },
};

/// How often the consumer asks the server for its position when keepalives are requested.
const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(20);

/// The consumer reads this many messages before other tasks get a turn.
const YIELD_EVERY: u32 = 2048;

/// Reads one slot from a checkpoint on. A consumer cannot be used again after an error: make a new
/// one from the checkpoint.
pub struct PgConsumer {
    reader: StreamReader,
    feedback: Feedback,
    assembler: Assembler,
    /// A Begin, or the end of a streamed transaction, that belongs to the next batch.
    held: Option<StreamMessage>,
    spool: Spool,
    /// A committed transaction that is being read back; the server's next messages come after it.
    replay: Option<Replay>,
    /// The relations that must be described again.
    described: Vec<Vec<u8>>,
    /// Whether the server requested a reply since the last batch.
    reply_requested: bool,
    position: SourcePosition,
    hold: LsnBarrier,
    figures: StreamFigures,
}

/// The options of the stream to read.
pub struct StreamOptions {
    pub slot: String,
    pub publications: Vec<String>,
    /// The server that was found to belong to the copy. The consumer reads no other server's
    /// stream.
    pub system_id: String,
    pub timeline: u32,
    pub checkpoint: Lsn,
    pub tables: Vec<Arc<TableSpec>>,
    /// The secret of rhei's event trigger at the source: with it, the consumer asks for logical
    /// messages.
    pub ddl_secret: Option<Secret>,
    pub hold: LsnBarrier,
    /// Where the stream tells how far it is.
    pub figures: StreamFigures,
    /// The number of bytes that may wait to be decoded.
    pub queue_bytes: usize,
    /// The folder that holds transactions that have not ended.
    pub spool_folder: PathBuf,
    /// Whether the server must send each transaction only after it has ended.
    pub no_streaming_in_progress: bool,
}

impl PgConsumer {
    /// Connects and starts the stream at the checkpoint.
    pub async fn start(
        source: &SourceOptions,
        options: StreamOptions,
    ) -> Result<Self, SourceError> {
        let mut client = ReplicationClient::connect(source, "stream").await?;

        // An address may lead to another server by now, and several addresses may lead to several
        // servers. A server would stream from the checkpoint whatever history it has (trap 36).
        let found = client.identify_system().await?;
        if (&found.system_id, found.timeline) != (&options.system_id, options.timeline) {
            let (system_id, timeline) = (options.system_id, options.timeline);
            return Err(SourceError::AnotherServer { system_id, timeline, found });
        }

        let (reader, feedback) = client
            .start_replication(
                &options.slot,
                options.checkpoint,
                &options.publications,
                options.ddl_secret.is_some(),
                (options.queue_bytes, options.figures.clone()),
                !options.no_streaming_in_progress,
            )
            .await?;

        options.figures.begin(options.checkpoint);
        Ok(Self {
            reader,
            feedback,
            assembler: Assembler::new(options.checkpoint, options.tables)
                .with_schema_checks()
                .believing(options.ddl_secret),
            held: None,
            spool: Spool::new(options.spool_folder),
            replay: None,
            described: Vec::new(),
            reply_requested: false,
            position: SourcePosition {
                acknowledged: options.checkpoint,
                ..SourcePosition::default()
            },
            hold: options.hold,
            figures: options.figures,
        })
    }

    /// Sends the last acknowledgement and leaves the slot.
    pub async fn shutdown(self) -> Result<(), SourceError> {
        self.feedback.shutdown().await?;
        Ok(())
    }

    /// Takes one message in. Returns `true` when the batch ends before it.
    fn take(&mut self, message: StreamMessage) -> Result<bool, SourceError> {
        let hold = self.hold.get();

        match &message {
            StreamMessage::Data { payload } => {
                if let Some(commit) = StreamCommit::decode(payload)? {
                    if let Some(stop_at) = hold.filter(|stop_at| commit.commit_lsn >= *stop_at) {
                        self.assembler.advance_to(stop_at);
                        self.held = Some(message);
                        return Ok(true);
                    }

                    let StreamCommit { xid, commit_lsn, commit_time_us, .. } = commit;
                    self.replay = Some(self.spool.commit(&commit)?);
                    reached("spool.committed");
                    self.assembler.push(Message::Begin { commit_lsn, commit_time_us, xid })?;
                    return Ok(false);
                }

                if self.spool.take(payload)? == Routed::Spooled {
                    return Ok(false);
                }

                let decoded = Message::decode(payload)?;
                if let (Message::Begin { commit_lsn, .. }, Some(stop_at)) = (&decoded, hold)
                    && *commit_lsn >= stop_at
                {
                    self.assembler.advance_to(stop_at);
                    self.held = Some(message);
                    return Ok(true);
                }

                self.assembler.push(decoded)?;
                Ok(false)
            }
            StreamMessage::Keepalive { wal_end, reply_requested } => {
                self.position.head = self.position.head.max(*wal_end);
                self.figures.raise_sent(*wal_end);
                self.reply_requested |= *reply_requested;

                if self.assembler.is_between_transactions() && !self.spool.is_open() {
                    if let Some(stop_at) = hold.filter(|stop_at| wal_end >= stop_at) {
                        self.assembler.advance_to(stop_at);
                        self.held = Some(message);
                        return Ok(true);
                    }
                    self.assembler.advance_to(*wal_end);
                }
                Ok(false)
            }
            StreamMessage::Notice(notice) => {
                check_notice(notice)?;
                Ok(false)
            }
        }
    }

    /// Takes the next message of a transaction that is being read back. Returns `false` when there
    /// is none.
    fn replay_next(&mut self) -> Result<bool, SourceError> {
        if let Some(replay) = &mut self.replay {
            let read = replay.next_message().map_err(|source| self.spool.failed(source))?;
            if let Some(message) = read {
                self.assembler.push(Message::decode(message)?)?;
                return Ok(true);
            }

            let StreamCommit { commit_lsn, end_lsn, commit_time_us, .. } = replay.commit;
            self.described = replay.described_later();
            self.replay = None;
            self.assembler.push(Message::Commit { commit_lsn, end_lsn, commit_time_us })?;
            return Ok(true);
        }

        // Relations are taken one at a time, since each may be a question.
        let Some(relation) = self.described.pop() else { return Ok(false) };
        self.assembler.push(Message::decode(&relation)?)?;
        Ok(true)
    }

    /// Returns whether the batch ends when no message waits: complete transactions are delivered
    /// once the time is up. The consumer waits for the end of a transaction that has begun, since a
    /// batch ends at a source commit.
    fn may_end_batch(&self, limits: &BatchLimits, started: Instant) -> bool {
        let is_there = limits.until.is_some_and(|until| self.assembler.end_lsn() >= until)
            || limits.stop_after_one && self.assembler.pending_transactions() > 0;
        let is_over = is_there || started.elapsed() >= limits.linger;
        self.assembler.is_between_transactions() && (is_over || self.reply_requested)
    }

    /// Waits for the next message. Returns none when the limits have to be checked again.
    async fn wait(
        &mut self,
        limits: &BatchLimits,
        started: Instant,
    ) -> Result<Option<StreamMessage>, SourceError> {
        let left = limits.linger.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        let wait = left.min(if limits.request_keepalives {
            KEEPALIVE_INTERVAL
        } else {
            Duration::from_secs(1)
        });

        match tokio::time::timeout(wait, self.reader.next()).await {
            Err(_) => Ok(None),
            Ok(Ok(Some(message))) => Ok(Some(message)),
            Ok(Ok(None)) => Err(SourceError::StreamEnded),
            Ok(Err(error)) => Err(error.into()),
        }
    }

    fn batch(&mut self) -> ChangeBatch {
        self.position.reply_requested = std::mem::take(&mut self.reply_requested);
        self.position.decoded = self.assembler.end_lsn();
        self.position.head = self.position.head.max(self.position.decoded);
        self.publish();
        self.assembler.take_batch()
    }

    /// Tells those who watch the stream how far it is.
    fn publish(&self) {
        self.figures.raise_decoded(self.assembler.end_lsn());
        self.figures.set_held(self.assembler.bytes() as u64, self.spool.file_bytes());
    }
}

/// Stops the stream when a publication is missing: PostgreSQL 18 only warns and skips the changes
/// (trap 41). The text is in the language of the server; no other notice of a walsender has this
/// SQLSTATE.
fn check_notice(notice: &ServerMessage) -> Result<(), SourceError> {
    if notice.code == "55000" {
        return Err(SourceError::PublicationSkipped { message: notice.message.clone() });
    }
    tracing::warn!(
        event = "source_notice",
        code = notice.code,
        "the source says: {}",
        notice.message
    );
    Ok(())
}

impl CdcConsumer for PgConsumer {
    async fn next_batch(&mut self, limits: &BatchLimits) -> Result<Delivery, SourceError> {
        self.fill(limits).await?;
        Ok(match self.assembler.schema_query() {
            Some(question) => Delivery::SchemaQuery(question.clone()),
            None => Delivery::Batch(self.batch()),
        })
    }

    async fn fill(&mut self, limits: &BatchLimits) -> Result<(), SourceError> {
        let started = Instant::now();
        if self.assembler.schema_query().is_some() || self.assembler.must_end_batch() {
            return Ok(());
        }

        self.assembler.continue_after_change();

        if let Some(held) = self.held.take()
            && self.take(held)?
        {
            return Ok(());
        }

        let mut messages = 0_u32;
        loop {
            messages = messages.wrapping_add(1);
            // Other tasks on this thread, and tasks that wait beside it, get their turn also while
            // many messages are ready.
            if messages.is_multiple_of(YIELD_EVERY) {
                self.publish();
                tokio::task::yield_now().await;
            }

            if self.assembler.schema_query().is_some()
                || self.assembler.is_due(limits.max_rows, limits.max_bytes)
            {
                return Ok(());
            }

            if self.replay_next()? {
                continue;
            }

            let message = match self.reader.try_next()? {
                Some(message) => message,
                None => {
                    if limits.request_keepalives {
                        self.feedback.request_reply();
                    }
                    if self.may_end_batch(limits, started) {
                        return Ok(());
                    }

                    let Some(message) = self.wait(limits, started).await? else { continue };
                    message
                }
            };

            if self.take(message)? {
                return Ok(());
            }
        }
    }

    fn assembler(&mut self) -> &mut Assembler {
        &mut self.assembler
    }

    fn acknowledge(&self, durable: DurableLsn) {
        self.figures.raise_acknowledged(durable.lsn());
        self.feedback.acknowledge(durable);
    }

    fn position(&self) -> SourcePosition {
        SourcePosition {
            acknowledged: self.feedback.acknowledged(),
            has_no_open_work: self.assembler.has_no_open_work(),
            ..self.position
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publication_that_is_skipped_ends_the_stream_in_every_language() {
        let notice = |code: &str, message: &str| ServerMessage {
            code: code.to_owned(),
            message: message.to_owned(),
            ..ServerMessage::default()
        };
        for message in [
            "skipped loading publication \"rhei\"",
            "Laden der Publikation »rhei« wurde übersprungen",
            "",
        ] {
            let checked = check_notice(&notice("55000", message));
            assert!(
                matches!(checked, Err(SourceError::PublicationSkipped { .. })),
                "{message}: {checked:?}"
            );
        }
        assert!(check_notice(&notice("01000", "the publication is fine")).is_ok());
    }
}
