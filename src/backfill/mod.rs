//! The first copy of tables, and copies again: COPY BINARY of ctid ranges by several workers under one exported
//! snapshot, streamed into a shadow per table.
//!
//! Why it is exact. The snapshot was made by slot creation, which waited for every transaction that was open then, so
//! it sees exactly the transactions with `commit_lsn < copy_lsn` (traps 11-15). All workers import the same snapshot,
//! so disjoint ctid ranges that cover the table give each row once (trap 16; ranges mean nothing across snapshots).
//! The rows of one table commit together in its shadow; a crash before `finish_copy` leaves a shadow that the next
//! copy drops, never a half table that looks live.

use std::{collections::VecDeque, future::Future, sync::Arc};

use arrow::record_batch::RecordBatch;
use futures_util::StreamExt;
use tokio::sync::{Mutex, mpsc};
use tokio_postgres::error::SqlState;

use crate::{
    change::{Nulled, TableSpec},
    engine::{EngineError, Event, Options, Writer, with_causes},
    source::{
        SourceError,
        catalog::{SourceTable, quote_identifier, quote_literal, quote_table},
        connect::{SqlClient, connect_sql},
        copy::CopyReader,
    },
    target::OlapEngine,
    types::schema_of,
};

/// Pages of 8 KiB in one chunk: 64 MiB of heap.
const CHUNK_PAGES: u64 = 8192;
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

/// Copies the tables one after the other into their shadows, each with all workers. Small tables come first.
///
/// # Errors
/// The source or the target broke. Tables that were finished before stay in their shadows, which nobody trusts until
/// `finish_copy`.
pub async fn copy_tables<T, F>(
    options: &Options,
    snapshot: &str,
    tables: &[CopyTable],
    writer: &Writer<T>,
    current: impl Fn(u32) -> F,
) -> Result<Vec<Copied>, EngineError>
where
    T: OlapEngine + 'static,
    F: Future<Output = Result<Option<SourceTable>, EngineError>>,
{
    let guard = import_snapshot(options, snapshot, "copy").await?;
    let mut workers = Vec::new();
    for number in 0..options.workers.max(1) {
        workers.push(Arc::new(import_snapshot(options, snapshot, &format!("copy {}", number + 1)).await?));
    }
    let specs: Vec<Arc<TableSpec>> = tables.iter().map(|table| Arc::clone(&table.spec)).collect();
    writer.call(move |target| target.start_copy(&specs.iter().map(Arc::as_ref).collect::<Vec<_>>())).await?;

    let mut order: Vec<usize> = (0..tables.len()).collect();
    order.sort_by_key(|&at| tables.get(at).map_or(0, |table| table.source.size_bytes));
    let mut outcomes: Vec<Option<Copied>> = tables.iter().map(|_| None).collect();
    for at in order {
        let (Some(table), Some(outcome)) = (tables.get(at), outcomes.get_mut(at)) else { continue };
        // Held while the table is copied, and no longer: DDL on it waits that long, and all who come after it.
        *outcome = Some(if guard_table(&guard, table, &current).await? {
            let copied = copy_table(options, table, &workers, writer).await?;
            guard.batch_execute("ROLLBACK TO SAVEPOINT rhei_guard; RELEASE SAVEPOINT rhei_guard").await?;
            copied
        } else {
            tracing::info!(table = %table.spec.source, "changed while it waited for its copy; it is copied again");
            Copied::Changed
        });
    }
    Ok(outcomes.into_iter().flatten().collect())
}

/// Locks a table against DDL, and looks whether it still is what the snapshot says. A snapshot does not protect from
/// that: COPY reads the table's newest shape, and finds it empty after TRUNCATE or a rewrite.
async fn guard_table<F>(guard: &SqlClient, table: &CopyTable, current: &impl Fn(u32) -> F) -> Result<bool, EngineError>
where
    F: Future<Output = Result<Option<SourceTable>, EngineError>>,
{
    let only = if table.source.kind == b'r' { "ONLY " } else { "" };
    let name = quote_table(&table.source.name);
    let lock = format!("SAVEPOINT rhei_guard; LOCK TABLE {only}{name} IN ACCESS SHARE MODE");
    if let Err(error) = guard.batch_execute(&lock).await {
        // Dropped, or called otherwise by now.
        let is_gone = error.code().is_some_and(|code| {
            *code == SqlState::UNDEFINED_TABLE
                || *code == SqlState::INVALID_SCHEMA_NAME
                || *code == SqlState::UNDEFINED_OBJECT
        });
        if !is_gone {
            return Err(error.into());
        }
        guard.batch_execute("ROLLBACK TO SAVEPOINT rhei_guard; RELEASE SAVEPOINT rhei_guard").await?;
        return Ok(false);
    }
    let shape = |table: &SourceTable| {
        let columns = table
            .columns
            .iter()
            .map(|column| (column.attnum, column.name.clone(), column.type_oid, column.typmod, column.is_generated));
        (table.name.clone(), columns.collect::<Vec<_>>(), table.fingerprint.files.clone())
    };
    let is_same = current(table.source.oid).await?.is_some_and(|now| shape(&now) == shape(&table.source));
    if !is_same {
        guard.batch_execute("ROLLBACK TO SAVEPOINT rhei_guard; RELEASE SAVEPOINT rhei_guard").await?;
    }
    Ok(is_same)
}

async fn copy_table<T: OlapEngine + 'static>(
    options: &Options,
    table: &CopyTable,
    workers: &[Arc<SqlClient>],
    writer: &Writer<T>,
) -> Result<Copied, EngineError> {
    let name = table.spec.source.to_string();
    let estimated_rows = table.source.estimated_rows;
    let _ = options.events.send(Event::CopyStarted { table: name.clone(), estimated_rows });
    let queue = Arc::new(Mutex::new(chunks(table)));
    let (batches, mut rows) = mpsc::channel::<Result<RecordBatch, SourceError>>(QUEUED_BATCHES);
    let mut tasks = tokio::task::JoinSet::new();
    let nulled: Arc<std::sync::Mutex<Vec<Nulled>>> = Arc::default();
    for worker in workers {
        let (worker, queue, batches) = (Arc::clone(worker), Arc::clone(&queue), batches.clone());
        let nulled = Arc::clone(&nulled);
        let (spec, events) = (Arc::clone(&table.spec), options.events.clone());
        tasks.spawn(async move {
            let copied = async {
                // Given back with all its locks when the table is done.
                worker.batch_execute("SAVEPOINT rhei_copy").await?;
                loop {
                    let Some(query) = queue.lock().await.pop_front() else { break };
                    let of_chunk = copy_chunk(&worker, &query, &spec, &batches, &events).await?;
                    if let Ok(mut nulled) = nulled.lock() {
                        Nulled::add(&mut nulled, of_chunk);
                    }
                }
                Ok(worker.batch_execute("ROLLBACK TO SAVEPOINT rhei_copy; RELEASE SAVEPOINT rhei_copy").await?)
            };
            if let Err(error) = copied.await {
                // Nobody listens only when the load has ended with an error of its own.
                let _ = batches.send(Err(error)).await;
            }
        });
    }
    drop(batches);
    let source_error = Arc::new(std::sync::Mutex::new(None));
    let seen = Arc::clone(&source_error);
    let stream = std::iter::from_fn(move || rows.blocking_recv()).map(move |batch| {
        batch.map_err(|error| {
            let text = with_causes(&error);
            if let Ok(mut seen) = seen.lock() {
                *seen = Some(error);
            }
            text.into()
        })
    });
    let spec = Arc::clone(&table.spec);
    let loaded = writer.call(move |target| target.load(&spec, Box::new(stream))).await;
    if loaded.is_ok() {
        // Every one of them has given its rows away; what is left is to give the locks back.
        while tasks.join_next().await.is_some() {}
    }
    tasks.shutdown().await;
    for nulled in nulled.lock().map(|mut nulled| std::mem::take(&mut *nulled)).unwrap_or_default() {
        let _ = options.events.send(Event::Nulled { table: name.clone(), nulled });
    }
    let source_error = source_error.lock().ok().and_then(|mut seen| seen.take());
    match (source_error, loaded) {
        (Some(error), _) if error.is_about_values() => {
            let reason = format!("{}; then copy it with `rhei backfill --table {name}`", with_causes(&error));
            let _ = options.events.send(Event::CopyFailed { table: name, reason: reason.clone() });
            Ok(Copied::Failed { reason })
        }
        (Some(error), _) => Err(error.into()),
        (None, Err(error)) => Err(error),
        (None, Ok(rows)) => {
            let _ = options.events.send(Event::CopyFinished { table: name, rows });
            Ok(Copied::Done { rows })
        }
    }
}

/// The COPY statements that together read the table once.
fn chunks(table: &CopyTable) -> VecDeque<String> {
    let columns: Vec<String> =
        table.spec.columns.iter().map(|column| column.mapping.copy_select(&quote_identifier(&column.name))).collect();
    let columns = columns.join(", ");
    let filter = table.source.row_filter.as_ref().map(|filter| format!("({filter})"));
    let mut queries = VecDeque::new();
    for leaf in &table.source.leaves {
        let from = format!("{}.{}", quote_identifier(&leaf.name.schema), quote_identifier(&leaf.name.name));
        let mut first_page = 0;
        loop {
            let next_page = first_page + CHUNK_PAGES;
            let is_last = next_page >= leaf.pages;
            let mut conditions = Vec::new();
            if first_page > 0 {
                conditions.push(format!("ctid >= '({first_page},0)'"));
            }
            // The last range is open: the table may have grown before the snapshot was taken.
            if !is_last {
                conditions.push(format!("ctid < '({next_page},0)'"));
            }
            conditions.extend(filter.clone());
            let filter =
                if conditions.is_empty() { String::new() } else { format!(" WHERE {}", conditions.join(" AND ")) };
            queries.push_back(format!("COPY (SELECT {columns} FROM ONLY {from}{filter}) TO STDOUT (FORMAT binary)"));
            if is_last {
                break;
            }
            first_page = next_page;
        }
    }
    queries
}

async fn copy_chunk(
    client: &SqlClient,
    query: &str,
    spec: &Arc<TableSpec>,
    batches: &mpsc::Sender<Result<RecordBatch, SourceError>>,
    events: &mpsc::UnboundedSender<Event>,
) -> Result<Vec<Nulled>, SourceError> {
    let schema = schema_of(spec.columns.iter().map(|column| (column.target_name.as_str(), &column.mapping)));
    let mut reader = CopyReader::new(Arc::clone(spec));
    let mut stream = Box::pin(client.copy_out(query).await?);
    let mut bytes = 0;
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        bytes += piece.len() as u64;
        reader.push(&piece)?;
        if reader.rows() >= BATCH_ROWS || reader.buffered_bytes() >= BATCH_BYTES {
            let rows = reader.rows() as u64;
            if batches.send(Ok(reader.take_batch(&schema)?)).await.is_err() {
                return Ok(Vec::new());
            }
            let _ = events.send(Event::CopyProgress { table: spec.source.to_string(), rows, bytes });
            bytes = 0;
        }
    }
    // Without the trailer the copy was cut short.
    reader.finish()?;
    let rows = reader.rows() as u64;
    if rows > 0 && batches.send(Ok(reader.take_batch(&schema)?)).await.is_ok() {
        let _ = events.send(Event::CopyProgress { table: spec.source.to_string(), rows, bytes });
    }
    Ok(reader.take_nulled())
}
