//! A worker has one connection to the source and one to the target, and copies, decodes and loads a
//! chunk at a time, so that all cores are used by one table as well as by many.

use std::{
    ops::ControlFlow,
    sync::{Arc, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arrow::record_batch::RecordBatch;
use tokio::sync::mpsc;

use super::{
    CopyOutcome,
    chunk_queue::{ChunkJob, Next, RoundProgress, SharedRound},
    load_pipe::{BatchSender, Loaded, load_pipe},
    snapshot::import_for_copy,
};
use crate::{
    change::{Nulled, Pause, Remedy, TableSpec},
    error::error_chain,
    olap::{CopyLoader, TargetError},
    pipeline::{EngineError, Event, error_policy},
    source::{
        SourceError,
        copy_binary::CopyReader,
        wire::{WireError, copy_client::CopyClient},
    },
    types::schema_of,
};

/// One row group of DuckDB; a load wants at least two of them.
const BATCH_ROWS: usize = 122_880;

/// How often a chunk is tried before the copy of its table is given up.
const ATTEMPTS: u32 = 5;
/// How long a worker waits before it tries a chunk again; doubled each time.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// How long a worker leaves the chunks of a table alone that another session has locked,
const LOCKED_PAUSE: Duration = Duration::from_secs(1);
/// and how often it asks for a chunk when the tables of all chunks are locked.
const LOCKED_STEP: Duration = Duration::from_millis(200);
/// A worker ends when other sessions have locked the tables of all its chunks for this time. The
/// next round copies these tables.
const MAX_LOCK: Duration = Duration::from_secs(5);
const LOCKED_WARNING: Duration = Duration::from_secs(60);

/// The log says that a chunk is stuck when it has brought nothing for this time,
const SILENCE: Duration = Duration::from_secs(30);
/// and after this number of such times the chunk is tried again on another connection.
const SILENCES: u32 = 20;

/// The end of a chunk.
enum Ended {
    /// The chunk is done, failed or was cancelled; and the outcome that this has for the copy of
    /// its table.
    Over(Option<CopyOutcome>),
    /// The table of the chunk is locked.
    PutOff,
}

/// Why tables are not copied together.
#[derive(Debug)]
enum Unbundled {
    TooLarge,
    NoConnection,
    /// The copy of the single table meets the error once more, and names the table.
    #[expect(dead_code, reason = "the debug log shows it")]
    Source(SourceError),
}

impl From<SourceError> for Unbundled {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<WireError> for Unbundled {
    fn from(error: WireError) -> Self {
        Self::Source(error.into())
    }
}

/// The result of one attempt at a chunk.
enum Attempt {
    Done {
        rows: u64,
        nulled: Vec<Nulled>,
    },
    Ended(CopyOutcome),
    /// The job was cancelled: the copy of the table is not wanted any more.
    Cancelled,
    /// Another attempt may succeed.
    Retry(SourceError),
    /// Another transaction was in the way; another attempt will tell whether the job is cancelled.
    Conflict(TargetError),
    /// Another session has locked the table.
    Locked(SourceError),
}

/// A worker with one connection to the source and one to the target.
pub(super) struct Worker<L> {
    number: usize,
    work: Arc<SharedRound>,
    /// Receives the tables whose copies are over.
    done: mpsc::UnboundedSender<(usize, CopyOutcome)>,
    client: Option<CopyClient>,
    loader: Option<L>,
}

impl<L: CopyLoader> Worker<L> {
    pub fn new(
        number: usize,
        work: Arc<SharedRound>,
        done: mpsc::UnboundedSender<(usize, CopyOutcome)>,
        loader: L,
    ) -> Self {
        Self { number, work, done, client: None, loader: Some(loader) }
    }

    fn table(&self, at: usize) -> Option<(Arc<TableSpec>, MutexGuard<'_, RoundProgress>)> {
        let spec = Arc::clone(self.work.specs.get(at)?);
        Some((spec, self.work.state.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn is_over(&self, at: usize) -> bool {
        self.table(at)
            .is_none_or(|(_, state)| state.tables.get(at).is_none_or(|table| table.is_over))
    }

    /// Takes chunks until none are left.
    pub async fn run(mut self) -> Result<(), EngineError> {
        let work = Arc::clone(&self.work);
        let mut locked_since = None;

        while !work.stop.is_cancelled() {
            let mut chunks = match work.next_chunk().await {
                Next::Chunks(chunks) => chunks,
                // The next round resumes what is left, and copies other tables first.
                Next::AllLocked
                    if locked_since.get_or_insert_with(Instant::now).elapsed() > MAX_LOCK =>
                {
                    break;
                }
                Next::AllLocked => {
                    tokio::select! {
                        () = work.stop.cancelled() => {}
                        () = tokio::time::sleep(LOCKED_STEP) => {}
                    }
                    continue;
                }
                Next::None => break,
            };

            if chunks.len() > 1 && self.copy_all(&chunks).await? {
                locked_since = None;
                continue;
            }

            // The chunks go one by one, so that an error concerns only the table that it is about.
            while let Some(chunk) = chunks.pop() {
                if work.stop.is_cancelled() {
                    break;
                }

                if self.is_over(chunk.table) {
                    let job = chunk.job;
                    self.fail_job(job, "cancelled", "its table ended").await?;
                    continue;
                }

                self.begin(chunk.table);
                let Ended::Over(copied) = self.copy(&chunk).await? else {
                    // The chunks of other tables go first.
                    work.queue.lock().await.push_back(vec![chunk]);
                    continue;
                };

                locked_since = None;
                if let Some(copied) = copied {
                    self.over(chunk.table, copied);
                }
            }
        }

        Ok(())
    }

    /// Ends the copy of the table: no more chunks of the table are copied.
    fn over(&self, at: usize, copied: CopyOutcome) {
        if let Some((_, mut state)) = self.table(at)
            && let Some(table) = state.tables.get_mut(at)
        {
            table.is_over = true;
        }

        let _ = self.done.send((at, copied));
    }

    /// Copies a bundle in one round trip to the source and one transaction of the target. Returns
    /// `false` when one of its tables cannot be copied this way, and nothing of the bundle was
    /// copied.
    async fn copy_all(&mut self, chunks: &[ChunkJob]) -> Result<bool, EngineError> {
        let jobs: Vec<u64> = chunks.iter().map(|chunk| chunk.job).collect();
        chunks.iter().for_each(|chunk| self.begin(chunk.table));

        let specs: Vec<Arc<TableSpec>> =
            chunks.iter().filter_map(|chunk| self.work.specs.get(chunk.table).cloned()).collect();

        let since = Instant::now();
        let (batches, nulled) = match self.read_all(chunks, &specs).await {
            Ok(read) => read,
            Err(why) => {
                tracing::debug!(?why, tables = specs.len(), "copying small tables one by one");
                return Ok(false);
            }
        };

        let rows: Vec<u64> = batches.iter().map(|batch| batch.num_rows() as u64).collect();
        let loads: Vec<_> = specs
            .iter()
            .zip(&jobs)
            .zip(batches)
            .map(|((spec, job), batch)| (Arc::clone(spec), *job, vec![batch]))
            .collect();

        let reading = since.elapsed();
        let Some(mut taken) = self.loader.take() else { return Err(self.missing_loader()) };
        let load = tokio::task::spawn_blocking(move || {
            let loaded = taken.load_all(&loads, reading);
            (taken, loaded)
        });

        let (returned, loaded) = load.await.map_err(|lost| EngineError::lost("a load", lost))?;
        self.loader = Some(returned);

        match loaded {
            Ok(()) => {}
            Err(error) if error.wants_reopening() => return Err(error.into()),
            Err(_) => return Ok(false),
        }

        for ((chunk, rows), nulled) in chunks.iter().zip(rows).zip(nulled) {
            if let Some(copied) = self.chunk_done(chunk.table, rows, nulled) {
                self.over(chunk.table, copied);
            }
        }

        Ok(true)
    }

    /// Reads all rows of the tables of a bundle, and which of their values became NULL.
    async fn read_all(
        &mut self,
        chunks: &[ChunkJob],
        specs: &[Arc<TableSpec>],
    ) -> Result<(Vec<RecordBatch>, Vec<Vec<Nulled>>), Unbundled> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => connect(&self.work, self.number).await.map_err(|_| Unbundled::NoConnection)?,
        };

        let mut readers: Vec<CopyReader> =
            specs.iter().map(|spec| CopyReader::new(Arc::clone(spec))).collect();
        let queries: Vec<&str> = chunks.iter().map(|chunk| chunk.query.as_str()).collect();

        client.execute("SAVEPOINT rhei_copy").await.map_err(SourceError::from)?;
        let (mut bytes, mut sizes) = (0, vec![0; specs.len()]);

        let most_bytes = self.work.batch_bytes;
        let read = client.copy_each(&queries, |at, piece| {
            bytes += piece.len();
            sizes.get_mut(at).into_iter().for_each(|size| *size += piece.len() as u64);
            // Values that are kept out of line (TOAST) are not in the pages that were counted.
            if bytes > most_bytes {
                return Err(Unbundled::TooLarge);
            }
            readers
                .get_mut(at)
                .map_or(Ok(()), |reader| Ok(reader.push(piece).map_err(SourceError::from)?))
        });

        tokio::time::timeout(SILENCE, read)
            .await
            .map_err(|_| SourceError::from(WireError::Silent(SILENCE)))??;

        client
            .execute("ROLLBACK TO SAVEPOINT rhei_copy; RELEASE SAVEPOINT rhei_copy")
            .await
            .map_err(SourceError::from)?;

        self.client = Some(client);
        if let Some(limiter) = &self.work.rate_limiter {
            limiter.take(bytes).await;
        }

        let (mut batches, mut nulled) = (Vec::new(), Vec::new());
        for ((reader, spec), size) in readers.iter_mut().zip(specs).zip(sizes) {
            reader.finish().map_err(SourceError::from)?;
            let schema = schema_of(
                spec.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)),
            );

            let batch = reader.take_batch(&schema).map_err(SourceError::from)?;
            let rows = batch.num_rows() as u64;
            self.work.context.copy_progress.add(spec.oid, rows, size);
            self.work.context.meter.copied(&spec.source, rows, size);
            batches.push(batch);
            nulled.push(reader.take_nulled());
        }

        let _ = self.work.context.events.send(Event::CopyProgress);
        Ok((batches, nulled))
    }

    /// Leaves the chunks of a table alone for a while, because another session has locked the
    /// table.
    fn put_off(&self, at: usize) {
        let Some((spec, mut state)) = self.table(at) else { return };
        let Some(table) = state.tables.get_mut(at) else { return };

        let now = Instant::now();
        table.locked_until = Some(now + LOCKED_PAUSE);
        if table.said_locked.is_none_or(|said| now.duration_since(said) >= LOCKED_WARNING) {
            table.said_locked = Some(now);
            tracing::warn!(
                event = "copy_blocked",
                table = %spec.source,
                "the rest of the table waits to be copied: another session at the source has \
                 locked it"
            );
        }
    }

    fn begin(&self, at: usize) {
        let Some((spec, mut state)) = self.table(at) else { return };
        let Some(table) = state.tables.get_mut(at) else { return };
        if !std::mem::replace(&mut table.is_started, true) {
            let estimated_rows = self.work.estimates.get(at).copied().unwrap_or_default();
            let event = Event::CopyStarted { table: spec.source.to_string(), estimated_rows };
            let _ = self.work.context.events.send(event);
        }
    }

    /// Copies a chunk, with all its attempts. Returns the outcome for the copy of its table, if the
    /// chunk is the last one of the table or has failed.
    async fn copy(&mut self, chunk: &ChunkJob) -> Result<Ended, EngineError> {
        let (job, mut pause, mut attempt) = (chunk.job, RETRY_AFTER, 0);

        loop {
            match self.attempt(chunk).await? {
                Attempt::Done { rows, nulled } => {
                    return Ok(Ended::Over(self.chunk_done(chunk.table, rows, nulled)));
                }
                Attempt::Cancelled => break,
                // A source transaction larger than memory may keep the job for minutes, and cancel
                // it then.
                Attempt::Conflict(error) => {
                    tracing::debug!(error = error_chain(&error), "a chunk met another transaction");
                    tokio::select! {
                        () = self.work.stop.cancelled() => break,
                        () = tokio::time::sleep(RETRY_AFTER) => {}
                    }
                }
                Attempt::Locked(error) => {
                    self.fail_job(job, "pending", &error_chain(&error)).await?;
                    self.put_off(chunk.table);
                    return Ok(Ended::PutOff);
                }
                Attempt::Ended(copied) => {
                    let why = match &copied {
                        CopyOutcome::Failed(pause) => pause.reason.clone(),
                        CopyOutcome::Changed | CopyOutcome::Done => {
                            "the table changed its shape".to_owned()
                        }
                    };

                    self.fail_job(job, "failed", &why).await?;
                    return Ok(Ended::Over(Some(copied)));
                }
                Attempt::Retry(error) => {
                    attempt += 1;
                    let why = error_chain(&error);
                    let is_last = attempt >= ATTEMPTS;
                    self.fail_job(job, if is_last { "failed" } else { "pending" }, &why).await?;

                    let Some(spec) = self.work.specs.get(chunk.table) else { break };
                    if is_last && error_policy::of_source(&error).is_waited_for() {
                        return Err(error.into());
                    }

                    if is_last {
                        let reason = format!("{why}; {}", spec.copy_hint());
                        return Ok(Ended::Over(Some(CopyOutcome::Failed(Pause::new(reason)))));
                    }

                    tracing::warn!(
                        event = "chunk_retried",
                        table = %spec.source,
                        attempt,
                        error = why,
                        "a chunk is tried again"
                    );
                    self.client = None;
                    tokio::select! {
                        () = self.work.stop.cancelled() => break,
                        () = tokio::time::sleep(pause) => pause *= 2,
                    }
                }
            }
        }

        Ok(Ended::Over(None))
    }

    /// Records that a job could not be done, however long another transaction keeps its row.
    async fn fail_job(
        &mut self,
        job: u64,
        status: &'static str,
        why: &str,
    ) -> Result<(), EngineError> {
        loop {
            let noted = why.to_owned();
            match self.on_blocking_thread(move |loader| loader.fail_job(job, status, &noted)).await
            {
                Err(EngineError::Target(error))
                    if error.is_conflict() && !self.work.stop.is_cancelled() => {}
                noted => return noted,
            }
        }
    }

    /// Adds a chunk to its table. Returns `Done` when it was the last one.
    fn chunk_done(&self, at: usize, rows: u64, nulled: Vec<Nulled>) -> Option<CopyOutcome> {
        let (spec, mut state) = self.table(at)?;
        let table = state.tables.get_mut(at)?;
        table.rows += rows;
        table.chunks_left = table.chunks_left.saturating_sub(1);
        Nulled::add(&mut table.nulled, nulled);

        self.work.context.copy_progress.chunk_done(spec.oid);
        if table.chunks_left > 0 {
            return None;
        }

        let events = &self.work.context.events;
        for nulled in std::mem::take(&mut table.nulled) {
            let _ = events.send(Event::Nulled { table: spec.source.to_string(), nulled });
        }
        let _ =
            events.send(Event::CopyFinished { table: spec.source.to_string(), rows: table.rows });

        Some(CopyOutcome::Done)
    }

    async fn attempt(&mut self, chunk: &ChunkJob) -> Result<Attempt, EngineError> {
        let job = chunk.job;
        let Some(spec) = self.work.specs.get(chunk.table).cloned() else {
            return Ok(Attempt::Cancelled);
        };

        if let ControlFlow::Break(ended) = self.begin_job(job).await? {
            return Ok(ended);
        }

        // The connection is put back only when all went well: a transaction that has failed is of
        // no more use.
        let mut client = match self.connection().await? {
            ControlFlow::Continue(client) => client,
            ControlFlow::Break(ended) => return Ok(ended),
        };

        let Some(mut taken) = self.loader.take() else { return Err(self.missing_loader()) };
        let (batches, rows) = load_pipe();
        let table = Arc::clone(&spec);
        let load = tokio::task::spawn_blocking(move || {
            let loaded = rows.load(&mut taken, &table, job);
            (taken, loaded)
        });

        let copied = copy_rows(&self.work, &mut client, &chunk.query, &spec, &batches).await;
        let nulled = match copied {
            Ok(nulled) => {
                batches.finish().await;
                nulled
            }
            Err(error) => {
                batches.fail(error).await;
                Vec::new()
            }
        };

        let (returned, loaded) = load.await.map_err(|lost| EngineError::lost("a load", lost))?;
        self.loader = Some(returned);
        if matches!(loaded, Loaded::Rows(_)) {
            self.client = Some(client);
        }

        classify(&spec, loaded, nulled)
    }

    /// Marks the job as running.
    async fn begin_job(&mut self, job: u64) -> Result<ControlFlow<Attempt>, EngineError> {
        match self.on_blocking_thread(move |loader| loader.begin(job)).await {
            Err(EngineError::Target(error)) if error.is_conflict() => {
                Ok(ControlFlow::Break(Attempt::Conflict(error)))
            }
            Ok(true) => Ok(ControlFlow::Continue(())),
            Ok(false) => Ok(ControlFlow::Break(Attempt::Cancelled)),
            Err(error) => Err(error),
        }
    }

    /// Takes the connection to the source, or makes one.
    async fn connection(&mut self) -> Result<ControlFlow<Attempt, CopyClient>, EngineError> {
        if let Some(client) = self.client.take() {
            return Ok(ControlFlow::Continue(client));
        }

        match connect(&self.work, self.number).await {
            Ok(client) => Ok(ControlFlow::Continue(client)),
            Err(EngineError::Source(error)) if error_policy::of_source(&error).is_waited_for() => {
                Ok(ControlFlow::Break(Attempt::Retry(error)))
            }
            Err(error) => Err(error),
        }
    }

    fn missing_loader(&self) -> EngineError {
        EngineError::Bug { what: "a loader", why: "it was not given back".to_owned() }
    }

    /// Runs a call of the loader where it may block.
    async fn on_blocking_thread<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&L) -> Result<R, TargetError> + Send + 'static,
    ) -> Result<R, EngineError> {
        let Some(taken) = self.loader.take() else { return Err(self.missing_loader()) };

        let called = tokio::task::spawn_blocking(move || {
            let done = work(&taken);
            (taken, done)
        });

        let (returned, done) = called.await.map_err(|lost| EngineError::lost("a loader", lost))?;
        self.loader = Some(returned);
        Ok(done?)
    }
}

/// Decides what the end of a load means for the attempt at its chunk.
fn classify(spec: &TableSpec, loaded: Loaded, nulled: Vec<Nulled>) -> Result<Attempt, EngineError> {
    match loaded {
        Loaded::Rows(rows) => Ok(Attempt::Done { rows, nulled }),
        Loaded::Cancelled => Ok(Attempt::Cancelled),
        Loaded::TargetFailed(error) => of_target_failure(spec, error),
        Loaded::SourceFailed(error) => of_source_failure(spec, error),
    }
}

fn of_target_failure(spec: &TableSpec, error: TargetError) -> Result<Attempt, EngineError> {
    // The transaction that took the shadow away also cancels the job, and may not have ended.
    if error.is_conflict() {
        return Ok(Attempt::Conflict(error));
    }

    // DuckDB does not take the rows of the table, and the other tables are not concerned.
    if error.table().is_some() {
        let reason = format!("{}; {}", error_chain(&error), spec.recopy_hint());
        let remedy = error.remedy();
        return Ok(Attempt::Ended(CopyOutcome::Failed(Pause { reason, remedy })));
    }

    Err(error.into())
}

fn of_source_failure(spec: &TableSpec, error: SourceError) -> Result<Attempt, EngineError> {
    if error.is_locked() {
        Ok(Attempt::Locked(error))
    } else if error.is_about_values() {
        let reason = format!("{}; {}", error_chain(&error), spec.copy_hint());
        let remedy = if error.is_unrepresentable() { Remedy::AllowNulls } else { Remedy::Operator };
        Ok(Attempt::Ended(CopyOutcome::Failed(Pause { reason, remedy })))
    } else if is_gone(&error) {
        Ok(Attempt::Ended(CopyOutcome::Changed))
    } else if is_forbidden(&error) {
        let reason = format!(
            "{}; `rhei check` says which right is missing, and the next start copies the table",
            error_chain(&error)
        );
        Ok(Attempt::Ended(CopyOutcome::Failed(Pause { reason, remedy: Remedy::NextStart })))
    } else if matches!(error, SourceError::Wire(WireError::Server(_)))
        || error_policy::of_source(&error).is_waited_for()
    {
        Ok(Attempt::Retry(error))
    } else {
        Err(error.into())
    }
}

/// Returns whether the source does not let this role read the table: another attempt changes
/// nothing.
fn is_forbidden(error: &SourceError) -> bool {
    const INSUFFICIENT_PRIVILEGE: &str = "42501";
    matches!(error, SourceError::Wire(WireError::Server(message))
        if message.code == INSUFFICIENT_PRIVILEGE)
}

/// Returns whether the table, or a column of it, is not there any more.
fn is_gone(error: &SourceError) -> bool {
    let SourceError::Wire(WireError::Server(message)) = error else { return false };
    // The codes stand for undefined table, undefined column, invalid schema name, wrong object
    // type.
    ["42P01", "42703", "3F000", "42809"].contains(&message.code.as_str())
}

/// Copies the rows of a chunk to the load, and returns which of their values became NULL. The
/// savepoint is given back with its locks when the chunk is done: DDL does not wait for the whole
/// copy.
async fn copy_rows(
    work: &SharedRound,
    client: &mut CopyClient,
    query: &str,
    spec: &Arc<TableSpec>,
    batches: &BatchSender,
) -> Result<Vec<Nulled>, SourceError> {
    client.execute("SAVEPOINT rhei_copy").await?;
    let nulled = read_chunk(work, client, query, spec, batches).await?;
    client.execute("ROLLBACK TO SAVEPOINT rhei_copy; RELEASE SAVEPOINT rhei_copy").await?;
    Ok(nulled)
}

async fn read_chunk(
    work: &SharedRound,
    client: &mut CopyClient,
    query: &str,
    spec: &Arc<TableSpec>,
    batches: &BatchSender,
) -> Result<Vec<Nulled>, SourceError> {
    let schema =
        schema_of(spec.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)));

    let mut reader = CopyReader::new(Arc::clone(spec));
    // The query waits for the lock of the table.
    warn_when_stalled(spec, async { Ok(client.copy_out(query).await?) }).await?;

    let mut bytes = 0;
    let report = |rows: usize, bytes: u64| {
        work.context.copy_progress.add(spec.oid, rows as u64, bytes);
        work.context.meter.copied(&spec.source, rows as u64, bytes);
        let _ = work.context.events.send(Event::CopyProgress);
    };

    loop {
        let mut arrived = 0;
        let is_more = {
            // The stream goes first: while it is late, workers take turns at reading. A worker that
            // waits for its load has no turn: the load may wait for that of another worker.
            let _turn = if work.context.copy_progress.is_stream_late() {
                Some(work.turn.lock().await)
            } else {
                None
            };

            let read = client.next_rows(|piece| {
                arrived += piece.len();
                reader.push(piece).map_err(SourceError::from)
            });
            warn_when_stalled(spec, read).await?
        };

        bytes += arrived as u64;
        if let Some(limiter) = &work.rate_limiter {
            limiter.take(arrived).await;
        }

        if !is_more {
            break;
        }

        if reader.rows() >= BATCH_ROWS || reader.buffered_bytes() >= work.batch_bytes {
            let rows = reader.rows();
            if !batches.put(&mut reader, &schema).await? {
                return Ok(Vec::new());
            }
            report(rows, std::mem::take(&mut bytes));
        }
    }

    // Without the trailer the copy was cut short.
    reader.finish()?;
    let rows = reader.rows();
    if rows > 0 && batches.put(&mut reader, &schema).await? {
        report(rows, bytes);
    }

    Ok(reader.take_nulled())
}

/// Waits for the source, and warns in the log when the source sends nothing for a long time.
async fn warn_when_stalled<R>(
    spec: &TableSpec,
    read: impl Future<Output = Result<R, SourceError>>,
) -> Result<R, SourceError> {
    let mut read = std::pin::pin!(read);

    for silences in 1..=SILENCES {
        if let Ok(done) = tokio::time::timeout(SILENCE, &mut read).await {
            return done;
        }

        let seconds = SILENCE.as_secs() * u64::from(silences);
        tracing::warn!(
            event = "chunk_stuck",
            table = %spec.source,
            seconds,
            "a chunk is stuck: the source sends nothing of it"
        );
    }

    Err(WireError::Silent(SILENCE * SILENCES).into())
}

/// Connects to the source under the snapshot of the round. Any session that holds the snapshot will
/// do (trap 11).
async fn connect(work: &SharedRound, number: usize) -> Result<CopyClient, EngineError> {
    let mut failed = None;
    for snapshot in &work.snapshots {
        match import_for_copy(&work.context, snapshot, &format!("copy {number}")).await {
            Ok(client) => return Ok(client),
            // The server knows no such snapshot: the session that held it is gone.
            Err(WireError::Server(_)) => failed = Some(EngineError::SnapshotLost),
            Err(error) => failed = Some(error.into()),
        }
    }

    Err(failed.unwrap_or(EngineError::SnapshotLost))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Lsn,
        change::Key,
        pgoutput::{QualifiedName, ReplicaIdentity},
        source::{copy_binary::CopyError, wire::ServerMessage},
        types::ValueError,
    };

    fn spec() -> TableSpec {
        TableSpec {
            oid: 1,
            source: QualifiedName::new("public", "t"),
            target: QualifiedName::new("public", "t"),
            epoch: 0,
            replica_identity: ReplicaIdentity::Default,
            key: Key::Columns(vec![0]),
            columns: Vec::new(),
            excluded: Vec::new(),
            fingerprint: String::new(),
            null_unrepresentable: false,
            copy_lsn: Lsn::ZERO,
            copy_xids: None,
        }
    }

    fn of_source(error: impl Into<SourceError>) -> Loaded {
        Loaded::SourceFailed(error.into())
    }

    fn of_server(code: &str) -> Loaded {
        let code = code.to_owned();
        of_source(WireError::Server(ServerMessage { code, ..ServerMessage::default() }))
    }

    fn of_value(source: ValueError) -> Loaded {
        of_source(CopyError::Value {
            table: "public.t".to_owned(),
            column: "c".to_owned(),
            row: String::new(),
            source: Box::new(source),
        })
    }

    fn of_table(text: &str) -> Loaded {
        Loaded::TargetFailed(TargetError::Table {
            oid: 1,
            table: "public.t".to_owned(),
            source: Box::new(TargetError::saying(text)),
        })
    }

    fn named(attempt: &Result<Attempt, EngineError>) -> &'static str {
        match attempt {
            Ok(Attempt::Done { .. }) => "done",
            Ok(Attempt::Ended(CopyOutcome::Failed(pause))) => match pause.remedy {
                Remedy::AllowNulls => "failed, unless NULL is allowed",
                Remedy::NextStart => "failed, until the next start",
                _ => "failed",
            },
            Ok(Attempt::Ended(_)) => "changed",
            Ok(Attempt::Cancelled) => "cancelled",
            Ok(Attempt::Retry(_)) => "retry",
            Ok(Attempt::Conflict(_)) => "conflict",
            Ok(Attempt::Locked(_)) => "locked",
            Err(_) => "error",
        }
    }

    #[test]
    fn each_end_of_a_load_has_its_attempt() {
        const CONFLICT: &str = "TransactionContext Error: Conflict on update!";
        let unrepresentable = ValueError::NotRepresentable {
            what: "infinity".to_owned(),
            target_type: "DATE".to_owned(),
        };

        let cases = [
            (Loaded::Rows(3), "done"),
            (Loaded::Cancelled, "cancelled"),
            (Loaded::TargetFailed(TargetError::saying(CONFLICT)), "conflict"),
            (of_table(CONFLICT), "conflict"),
            (of_table("Conversion Error: no such value"), "failed"),
            (Loaded::TargetFailed(TargetError::saying("INTERNAL Error: index 1")), "error"),
            (of_server("55P03"), "locked"),
            (of_server("42P01"), "changed"),
            (of_server("42501"), "failed, until the next start"),
            (of_source(WireError::Closed), "retry"),
            (of_source(WireError::BadLength(-1)), "error"),
            (of_value(ValueError::NotUtf8), "failed"),
            (of_value(unrepresentable), "failed, unless NULL is allowed"),
        ];

        for (at, (loaded, expected)) in cases.into_iter().enumerate() {
            assert_eq!(named(&classify(&spec(), loaded, Vec::new())), expected, "case {at}");
        }
    }
}
