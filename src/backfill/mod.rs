//! The first copy of tables, and copies again: COPY BINARY of ctid ranges by several workers under one exported
//! snapshot, streamed into a shadow per table.
//!
//! Why it is exact. The snapshot was made by slot creation, which waited for every transaction that was open then, so
//! it sees exactly the transactions with `commit_lsn < copy_lsn` (traps 11-15). All workers import the same snapshot,
//! so disjoint ctid ranges that cover the table give each row once (trap 16; ranges mean nothing across snapshots).
//! Each chunk commits with its row of `_rhei.jobs` in the shadow of its table; a crash before `finish_copy` leaves a shadow
//! that the next copy drops, never a half table that looks live.
//!
//! A worker has one connection to the source and one to the target, and copies, decodes and loads a chunk at a time, so
//! that all cores are used by one table as well as by many.

use std::{collections::VecDeque, future::Future, sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;
use futures_util::StreamExt;
use serde_json::json;
use tokio::sync::{Mutex, mpsc};
use tokio_postgres::error::SqlState;

use crate::{
    change::{Nulled, QualifiedName, TableSpec},
    engine::{EngineError, Event, Options, Writer, with_causes},
    source::{
        SourceError,
        catalog::{SourceTable, quote_identifier, quote_literal, quote_table},
        connect::{SqlClient, connect_sql},
        copy::CopyReader,
    },
    target::{Loader, NewJob, OlapEngine, TargetError},
    types::schema_of,
};

/// Pages of 8 KiB in one chunk: from 16 to 128 MiB of heap. A chunk is a transaction in the target, and small ones leave
/// small row groups there.
const FEWEST_PAGES: u64 = 2048;
const MOST_PAGES: u64 = 16384;
const CHUNKS_PER_WORKER: u64 = 4;
/// One row group of DuckDB; a load wants at least two of them.
const BATCH_ROWS: usize = 122_880;
/// Wide rows end a batch earlier, so that memory is bounded in bytes.
const BATCH_BYTES: usize = 32 << 20;
/// Record batches between the workers and DuckDB.
const QUEUED_BATCHES: usize = 2;

/// A table to copy: how it is planned, and where it lies at the source.
pub struct CopyTable {
    pub spec: Arc<TableSpec>,
    pub source: SourceTable,
}

/// What became of a table.
pub enum Copied {
    Done {
        rows: u64,
    },
    /// This table cannot be copied; the others can.
    Failed {
        reason: String,
    },
    /// Its shape or its file changed after the snapshot was taken: what the snapshot shows of it means nothing.
    Changed,
}

/// A session that sees the snapshot. It must live until the last importer has imported (trap 11).
pub async fn import_snapshot(options: &Options, snapshot: &str, purpose: &str) -> Result<SqlClient, EngineError> {
    let client = connect_sql(&options.source, purpose).await?;
    client.batch_execute("BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ").await?;
    client.batch_execute(&format!("SET TRANSACTION SNAPSHOT {}", quote_literal(snapshot))).await?;
    Ok(client)
}

/// How often a chunk is tried before its table is given up.
const ATTEMPTS: u32 = 5;
/// Before a chunk is tried again; doubled each time.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// One job: a range of pages of one table that holds rows.
struct Chunk {
    /// Index into the tables.
    table: usize,
    query: String,
    job: u64,
}

/// How far the copy of a table is, shared by the workers.
#[derive(Default)]
struct Progress {
    state: std::sync::Mutex<TableProgress>,
}

#[derive(Default)]
struct TableProgress {
    is_started: bool,
    chunks_left: usize,
    rows: u64,
    nulled: Vec<Nulled>,
    /// Why it ended early. Its other chunks are not begun any more.
    ended: Option<Copied>,
}

impl Progress {
    fn lock(&self) -> std::sync::MutexGuard<'_, TableProgress> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Copies the tables into their shadows. All workers take chunks from one queue, those of small tables first.
/// `current` tells what a table looks like by now.
///
/// # Errors
/// The source or the target broke. What was loaded stays in the shadows, which nobody trusts until `finish_copy`.
pub async fn copy_tables<T, F>(
    options: &Options,
    snapshots: &[String],
    tables: &[CopyTable],
    writer: &Writer<T>,
    current: impl Fn(u32) -> F,
) -> Result<Vec<Copied>, EngineError>
where
    T: OlapEngine + 'static,
    F: Future<Output = Result<Option<SourceTable>, EngineError>>,
{
    let specs: Vec<Arc<TableSpec>> = tables.iter().map(|table| Arc::clone(&table.spec)).collect();
    writer.call(move |target| target.start_copy(&specs.iter().map(Arc::as_ref).collect::<Vec<_>>())).await?;

    let mut order: Vec<(usize, &CopyTable)> = tables.iter().enumerate().collect();
    order.sort_by_key(|(_, table)| table.source.size_bytes);
    let progress: Arc<Vec<Progress>> = Arc::new(tables.iter().map(|_| Progress::default()).collect());
    let (mut queue, mut jobs) = (VecDeque::new(), Vec::new());
    for (priority, (at, table)) in order.into_iter().enumerate() {
        let ranges = chunks(table, options.workers.max(1));
        if let Some(progress) = progress.get(at) {
            progress.lock().chunks_left = ranges.len();
        }
        for range in ranges {
            jobs.push(NewJob {
                kind: "copy_chunk",
                payload: json!({
                    "table": table.spec.source.to_string(),
                    "from": range.leaf.to_string(),
                    "pages": [range.first_page, range.next_page],
                    "copy_lsn": table.spec.copy_lsn.to_string(),
                }),
                priority: i32::try_from(priority).unwrap_or(i32::MAX),
            });
            queue.push_back(Chunk { table: at, query: range.query, job: 0 });
        }
    }
    let ids = writer.call(move |target| target.add_jobs(&jobs)).await?;
    for (chunk, id) in queue.iter_mut().zip(ids) {
        chunk.job = id;
    }
    let queue = Arc::new(Mutex::new(queue));
    // A table whose last chunk is done is looked at once more before it counts.
    let pace = options.rate_limit_bytes.map(|limit| Arc::new(Pace::new(limit)));
    let (done, mut tables_done) = mpsc::unbounded_channel::<usize>();
    let mut workers = tokio::task::JoinSet::new();
    for number in 1..=options.workers.max(1) {
        let worker = Worker {
            number,
            options: options.clone(),
            snapshots: snapshots.to_vec(),
            specs: tables.iter().map(|table| Arc::clone(&table.spec)).collect(),
            estimates: tables.iter().map(|table| table.source.estimated_rows).collect(),
            queue: Arc::clone(&queue),
            progress: Arc::clone(&progress),
            pace: pace.clone(),
            done: done.clone(),
        };
        let loader = writer.call(|target| target.loader()).await?;
        workers.spawn(worker.run(loader));
    }
    drop(done);
    let began = tokio::time::Instant::now();
    let mut warnings = tokio::time::interval_at(began + options.snapshot_warning, options.snapshot_warning);
    loop {
        let at = tokio::select! {
            done = tables_done.recv() => match done {
                Some(at) => at,
                None => break,
            },
            Some(ended) = workers.join_next() => {
                let ended = ended.map_err(|_| EngineError::TaskLost { what: "a copy worker" }).and_then(|ended| ended);
                if let Err(error) = ended {
                    // The others finish what they have begun, and begin nothing more.
                    queue.lock().await.clear();
                    while workers.join_next().await.is_some() {}
                    return Err(error);
                }
                continue;
            }
            _ = warnings.tick() => {
                tracing::warn!(
                    minutes = began.elapsed().as_secs() / 60,
                    "the copy still holds its snapshot: VACUUM at the source cannot remove rows that it sees, and the slot keeps WAL"
                );
                continue;
            }
        };
        let (Some(table), Some(progress)) = (tables.get(at), progress.get(at)) else { continue };
        if progress.lock().ended.is_some() {
            continue;
        }
        let now = match current(table.source.oid).await {
            Ok(now) => now,
            Err(error) => {
                queue.lock().await.clear();
                while workers.join_next().await.is_some() {}
                return Err(error);
            }
        };
        let is_same = now.is_some_and(|now| is_same(&table.source, &now));
        let name = table.spec.source.to_string();
        let mut progress = progress.lock();
        progress.ended = Some(if is_same {
            for nulled in std::mem::take(&mut progress.nulled) {
                let _ = options.events.send(Event::Nulled { table: name.clone(), nulled });
            }
            let _ = options.events.send(Event::CopyFinished { table: name, rows: progress.rows });
            Copied::Done { rows: progress.rows }
        } else {
            tracing::info!(table = name, "changed while it was copied; it is copied again");
            Copied::Changed
        });
    }
    while let Some(ended) = workers.join_next().await {
        ended.map_err(|_| EngineError::TaskLost { what: "a copy worker" })??;
    }
    // Without rows or leaves there are no chunks, and nothing to wait for.
    Ok(progress.iter().map(|progress| progress.lock().ended.take().unwrap_or(Copied::Done { rows: 0 })).collect())
}

/// Whether a table is what it was when the snapshot was taken. A snapshot does not protect from DDL: COPY reads the
/// table's newest shape, finds it empty after TRUNCATE or a rewrite, and another table under a name that was reused.
fn is_same(then: &SourceTable, now: &SourceTable) -> bool {
    let columns = |table: &SourceTable| -> Vec<_> {
        let of = |column: &crate::source::catalog::SourceColumn| {
            (column.attnum, column.name.clone(), column.type_oid, column.typmod, column.is_generated)
        };
        table.columns.iter().map(of).collect()
    };
    let (was, is) = (&then.fingerprint, &now.fingerprint);
    then.name == now.name
        && columns(then) == columns(now)
        && was.files == is.files
        && was.inherits == is.inherits
        && was.composites == is.composites
        && was.labels.iter().all(|(oid, label)| is.labels.get(oid).is_none_or(|now| now == label))
}

/// One connection to the source, one to the target.
struct Worker {
    number: usize,
    options: Options,
    snapshots: Vec<String>,
    specs: Vec<Arc<TableSpec>>,
    estimates: Vec<u64>,
    queue: Arc<Mutex<VecDeque<Chunk>>>,
    progress: Arc<Vec<Progress>>,
    pace: Option<Arc<Pace>>,
    done: mpsc::UnboundedSender<usize>,
}

/// Keeps all workers together under so many bytes a second.
struct Pace {
    bytes_per_second: f64,
    /// When the bytes that were taken so far are paid for.
    free_at: Mutex<tokio::time::Instant>,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second as f64, free_at: Mutex::new(tokio::time::Instant::now()) }
    }

    async fn take(&self, bytes: usize) {
        let mut free_at = self.free_at.lock().await;
        let now = tokio::time::Instant::now();
        *free_at = (*free_at).max(now) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        let until = *free_at;
        drop(free_at);
        // Short debts are not worth a sleep each.
        if until.duration_since(now) > Duration::from_millis(20) {
            tokio::time::sleep_until(until).await;
        }
    }
}

/// What goes from the source to the load of a chunk.
enum Piece {
    Rows(RecordBatch),
    /// That was all of it. Without this the chunk is not whole.
    End,
    Failed(SourceError),
}

/// What came of one attempt at a chunk.
enum Attempt {
    Done {
        rows: u64,
        nulled: Vec<Nulled>,
    },
    Ended(Copied),
    /// Another attempt may succeed.
    Retry(SourceError),
}

impl Worker {
    async fn run(self, loader: Loader) -> Result<(), EngineError> {
        let mut client = None;
        let mut loader = Some(loader);
        loop {
            let Some(chunk) = self.queue.lock().await.pop_front() else { return Ok(()) };
            let (Some(spec), Some(progress)) = (self.specs.get(chunk.table), self.progress.get(chunk.table)) else {
                continue;
            };
            let name = spec.source.to_string();
            let is_first = {
                let mut state = progress.lock();
                !std::mem::replace(&mut state.is_started, true)
            };
            if is_first {
                let estimated_rows = self.estimates.get(chunk.table).copied().unwrap_or_default();
                let _ = self.options.events.send(Event::CopyStarted { table: name.clone(), estimated_rows });
            }
            let mut pause = RETRY_AFTER;
            for attempt in 1.. {
                if progress.lock().ended.is_some() {
                    on_thread(&mut loader, move |loader| loader.give_up(chunk.job, "cancelled", "its table ended"))
                        .await?;
                    break;
                }
                match self.attempt(&chunk, spec, &mut client, &mut loader).await? {
                    Attempt::Done { rows, nulled } => {
                        let is_last = {
                            let mut state = progress.lock();
                            state.rows += rows;
                            Nulled::add(&mut state.nulled, nulled);
                            state.chunks_left = state.chunks_left.saturating_sub(1);
                            state.chunks_left == 0
                        };
                        if is_last {
                            let _ = self.done.send(chunk.table);
                        }
                        break;
                    }
                    Attempt::Ended(copied) => {
                        let why = match &copied {
                            Copied::Failed { reason } => reason.clone(),
                            Copied::Changed | Copied::Done { .. } => "the table changed its shape".to_owned(),
                        };
                        if let Copied::Failed { reason } = &copied {
                            let _ = self
                                .options
                                .events
                                .send(Event::CopyFailed { table: name.clone(), reason: reason.clone() });
                        }
                        progress.lock().ended = Some(copied);
                        on_thread(&mut loader, move |loader| loader.give_up(chunk.job, "failed", &why)).await?;
                        break;
                    }
                    Attempt::Retry(error) => {
                        let why = with_causes(&error);
                        let is_over = attempt >= ATTEMPTS;
                        let status = if is_over { "failed" } else { "pending" };
                        on_thread(&mut loader, {
                            let why = why.clone();
                            move |loader| loader.give_up(chunk.job, status, &why)
                        })
                        .await?;
                        if is_over {
                            return Err(error.into());
                        }
                        tracing::warn!(table = name, attempt, error = why, "a chunk is tried again");
                        client = None;
                        tokio::time::sleep(pause).await;
                        pause *= 2;
                    }
                }
            }
        }
    }

    async fn attempt(
        &self,
        chunk: &Chunk,
        spec: &Arc<TableSpec>,
        client: &mut Option<SqlClient>,
        loader: &mut Option<Loader>,
    ) -> Result<Attempt, EngineError> {
        let job = chunk.job;
        on_thread(loader, move |loader| loader.begin(job)).await?;
        let connected = match client {
            Some(client) => client,
            None => match self.connect().await {
                Ok(connected) => client.insert(connected),
                Err(EngineError::Source(error)) if error.is_transient() => return Ok(Attempt::Retry(error)),
                Err(error) => return Err(error),
            },
        };
        let (batches, mut pieces) = mpsc::channel::<Piece>(QUEUED_BATCHES);
        let failure = Arc::new(std::sync::Mutex::new(None));
        let seen = Arc::clone(&failure);
        let mut is_over = false;
        let stream = std::iter::from_fn(move || {
            if is_over {
                return None;
            }
            match pieces.blocking_recv() {
                Some(Piece::Rows(batch)) => Some(Ok(batch)),
                Some(Piece::End) => None,
                Some(Piece::Failed(error)) => {
                    is_over = true;
                    let text = with_causes(&error);
                    if let Ok(mut seen) = seen.lock() {
                        *seen = Some(error);
                    }
                    Some(Err(text.into()))
                }
                // Whoever read was stopped: what came is not the whole chunk.
                None => {
                    is_over = true;
                    Some(Err("the copy was stopped".into()))
                }
            }
        });
        let Some(taken) = loader.take() else { return Err(EngineError::TaskLost { what: "a loader" }) };
        let table = Arc::clone(spec);
        let load = tokio::task::spawn_blocking(move || {
            let loaded = taken.load(&table, job, Box::new(stream));
            (taken, loaded)
        });
        let copied = async {
            // Given back with its locks when the chunk is done: DDL does not wait for the whole copy.
            connected.batch_execute("SAVEPOINT rhei_copy").await?;
            let nulled = copy_chunk(connected, &chunk.query, spec, &batches, self).await?;
            connected.batch_execute("ROLLBACK TO SAVEPOINT rhei_copy; RELEASE SAVEPOINT rhei_copy").await?;
            Ok::<_, SourceError>(nulled)
        };
        let nulled = match copied.await {
            Ok(nulled) => {
                let _ = batches.send(Piece::End).await;
                nulled
            }
            Err(error) => {
                // Ends the load, and with it the transaction; nobody listens only when the load has failed by itself.
                let _ = batches.send(Piece::Failed(error)).await;
                Vec::new()
            }
        };
        drop(batches);
        let (returned, loaded) = load.await.map_err(|_| EngineError::TaskLost { what: "a load" })?;
        *loader = Some(returned);
        let failure = failure.lock().ok().and_then(|mut seen| seen.take());
        match (failure, loaded) {
            (None, Ok(rows)) => Ok(Attempt::Done { rows, nulled }),
            (None, Err(error)) => Err(error.into()),
            (Some(error), _) => {
                // A transaction that has failed is of no more use.
                *client = None;
                if error.is_about_values() {
                    let table = &spec.source;
                    let reason = format!("{}; then copy it with `rhei backfill --table {table}`", with_causes(&error));
                    Ok(Attempt::Ended(Copied::Failed { reason }))
                } else if is_gone(&error) {
                    Ok(Attempt::Ended(Copied::Changed))
                } else if error.is_transient() {
                    Ok(Attempt::Retry(error))
                } else {
                    Err(error.into())
                }
            }
        }
    }

    /// Any session that holds the snapshot will do (trap 11).
    async fn connect(&self) -> Result<SqlClient, EngineError> {
        let mut failed = None;
        for snapshot in &self.snapshots {
            match import_snapshot(&self.options, snapshot, &format!("copy {}", self.number)).await {
                Ok(client) => return Ok(client),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or(EngineError::TaskLost { what: "the snapshot" }))
    }
}

/// Runs a call of the loader where it may block.
async fn on_thread(
    loader: &mut Option<Loader>,
    work: impl FnOnce(&Loader) -> Result<(), TargetError> + Send + 'static,
) -> Result<(), EngineError> {
    let Some(taken) = loader.take() else { return Err(EngineError::TaskLost { what: "a loader" }) };
    let called = tokio::task::spawn_blocking(move || {
        let done = work(&taken);
        (taken, done)
    });
    let (returned, done) = called.await.map_err(|_| EngineError::TaskLost { what: "a loader" })?;
    *loader = Some(returned);
    Ok(done?)
}

/// The table, or a column of it, is not there any more.
fn is_gone(error: &SourceError) -> bool {
    let SourceError::Query(error) = error else { return false };
    error.code().is_some_and(|code| {
        [
            SqlState::UNDEFINED_TABLE,
            SqlState::UNDEFINED_COLUMN,
            SqlState::INVALID_SCHEMA_NAME,
            SqlState::WRONG_OBJECT_TYPE,
        ]
        .contains(code)
    })
}

/// A range of pages of a table that holds rows.
struct Range {
    leaf: QualifiedName,
    first_page: u64,
    /// None: to the end, wherever that is.
    next_page: Option<u64>,
    query: String,
}

/// The COPY statements that together read the table once.
fn chunks(table: &CopyTable, workers: usize) -> Vec<Range> {
    let columns: Vec<String> =
        table.spec.columns.iter().map(|column| column.mapping.copy_select(&quote_identifier(&column.name))).collect();
    let columns = columns.join(", ");
    let filter = table.source.row_filter.as_ref().map(|filter| format!("({filter})"));
    let all: u64 = table.source.leaves.iter().map(|leaf| leaf.pages).sum();
    // Several for each worker, so that all of them are busy to the end.
    let size = (all / (workers as u64 * CHUNKS_PER_WORKER)).clamp(FEWEST_PAGES, MOST_PAGES);
    let mut ranges = Vec::new();
    for leaf in &table.source.leaves {
        let from = quote_table(&leaf.name);
        let mut first_page = 0;
        loop {
            // The last range is open: the table may have grown before the snapshot was taken.
            let next_page = Some(first_page + size).filter(|&next| next < leaf.pages);
            let mut conditions = Vec::new();
            if first_page > 0 {
                conditions.push(format!("ctid >= '({first_page},0)'"));
            }
            if let Some(next_page) = next_page {
                conditions.push(format!("ctid < '({next_page},0)'"));
            }
            conditions.extend(filter.clone());
            let filter =
                if conditions.is_empty() { String::new() } else { format!(" WHERE {}", conditions.join(" AND ")) };
            let query = format!("COPY (SELECT {columns} FROM ONLY {from}{filter}) TO STDOUT (FORMAT binary)");
            ranges.push(Range { leaf: leaf.name.clone(), first_page, next_page, query });
            match next_page {
                Some(next_page) => first_page = next_page,
                None => break,
            }
        }
    }
    ranges
}

async fn copy_chunk(
    client: &SqlClient,
    query: &str,
    spec: &Arc<TableSpec>,
    batches: &mpsc::Sender<Piece>,
    worker: &Worker,
) -> Result<Vec<Nulled>, SourceError> {
    let schema = schema_of(spec.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)));
    let mut reader = CopyReader::new(Arc::clone(spec));
    let mut stream = Box::pin(client.copy_out(query).await?);
    let mut bytes = 0;
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        bytes += piece.len() as u64;
        if let Some(pace) = &worker.pace {
            pace.take(piece.len()).await;
        }
        reader.push(&piece)?;
        if reader.rows() >= BATCH_ROWS || reader.buffered_bytes() >= BATCH_BYTES {
            let rows = reader.rows() as u64;
            if batches.send(Piece::Rows(reader.take_batch(&schema)?)).await.is_err() {
                return Ok(Vec::new());
            }
            let _ = worker.options.events.send(Event::CopyProgress { table: spec.source.to_string(), rows, bytes });
            bytes = 0;
        }
    }
    // Without the trailer the copy was cut short.
    reader.finish()?;
    let rows = reader.rows() as u64;
    if rows > 0 && batches.send(Piece::Rows(reader.take_batch(&schema)?)).await.is_ok() {
        let _ = worker.options.events.send(Event::CopyProgress { table: spec.source.to_string(), rows, bytes });
    }
    Ok(reader.take_nulled())
}
