//! Looks at the source, at the file and at the process now and then, and keeps what was seen last:
//! an answer never waits for any of them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use arrow::array::{Array, StringArray};
use tokio::time::{sleep, timeout};

use super::{
    ObserveOptions,
    heads::Heads,
    process::Process,
    samples::{EVERY_SECONDS, Sample, Samples},
    status,
};
use crate::{
    error::error_chain,
    olap::{
        Memory, OlapEngine, Space, StoredState, StoredVerification, TargetError, TargetReader,
        names,
    },
    pipeline::{Context, EngineError, Writer},
    source::{
        catalog::{self, SlotWatch},
        connection::{SqlClient, connect_sql},
    },
};

/// The time between two looks at the source, and how long one may take.
const SOURCE_EVERY: Duration = Duration::from_secs(2);
const SOURCE_TIMEOUT: Duration = Duration::from_secs(20);

/// The least time between two looks at the file. A look that takes long makes the pause longer, so
/// that looks take at most a hundredth of the writer's time.
const FILE_EVERY: Duration = Duration::from_secs(10);
const FILE_SHARE: u32 = 100;
/// How soon a look follows when copies begin or end, and while tables wait for their first copy.
const FILE_SOON: Duration = Duration::from_secs(1);
/// The time between two counts of deleted rows, which scan tables.
const DEAD_ROWS_EVERY: Duration = Duration::from_secs(300);

/// What was seen of the source.
#[derive(Debug, Clone, Default)]
pub struct SourceSeen {
    /// When the source last answered.
    pub at: Option<Instant>,
    pub at_unix: Option<f64>,
    /// The slot as of then; none when there is no such slot.
    pub slot: Option<SlotWatch>,
    /// Why the last look failed.
    pub error: Option<String>,
}

/// What was seen of the file.
#[derive(Debug)]
pub struct FileSeen {
    pub at: Instant,
    pub at_unix: f64,
    pub state: Option<StoredState>,
    pub space: Space,
    pub memory: Memory,
    pub verified: Vec<StoredVerification>,
    /// The number of jobs by status.
    pub jobs: BTreeMap<String, u64>,
}

/// What is known of a pipeline that runs, for all answers.
#[derive(Debug)]
pub struct Watched {
    pub context: Context,
    pub options: ObserveOptions,
    pub process: Process,
    source: Mutex<SourceSeen>,
    heads: Mutex<Heads>,
    file: Mutex<Option<Arc<FileSeen>>>,
    dead_rows: Mutex<Option<u64>>,
    samples: Mutex<Samples>,
}

fn lock<T>(place: &Mutex<T>) -> MutexGuard<'_, T> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the time of the clock, in seconds since 1970.
pub fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl Watched {
    pub fn new(context: Context, options: ObserveOptions) -> Self {
        Self {
            context,
            options,
            process: Process::default(),
            source: Mutex::default(),
            heads: Mutex::default(),
            file: Mutex::default(),
            dead_rows: Mutex::default(),
            samples: Mutex::default(),
        }
    }

    pub fn source(&self) -> SourceSeen {
        lock(&self.source).clone()
    }

    pub fn heads(&self) -> MutexGuard<'_, Heads> {
        lock(&self.heads)
    }

    pub fn file(&self) -> Option<Arc<FileSeen>> {
        lock(&self.file).clone()
    }

    /// Returns the deleted rows that still stand in the file, as counted last.
    pub fn dead_rows(&self) -> Option<u64> {
        *lock(&self.dead_rows)
    }

    pub fn samples(&self) -> MutexGuard<'_, Samples> {
        lock(&self.samples)
    }

    fn saw_source(&self, slot: Option<SlotWatch>) {
        let now = Instant::now();
        if let Some(slot) = &slot {
            self.heads().push(now, slot.head);
        }
        *lock(&self.source) =
            SourceSeen { at: Some(now), at_unix: Some(unix_now()), slot, error: None };
    }
}

/// Looks at the source for as long as it is not dropped, through a connection of its own.
pub async fn watch_source(watched: Arc<Watched>) {
    let mut client = None;
    loop {
        let error = match timeout(SOURCE_TIMEOUT, look_at_source(&watched, &mut client)).await {
            Ok(Ok(slot)) => {
                watched.saw_source(slot);
                None
            }
            Ok(Err(error)) => Some(error_chain(&error)),
            Err(_) => Some(format!("no answer within {} s", SOURCE_TIMEOUT.as_secs())),
        };

        if let Some(error) = error {
            client = None;
            lock(&watched.source).error = Some(error);
        }
        sleep(SOURCE_EVERY).await;
    }
}

async fn look_at_source(
    watched: &Watched,
    client: &mut Option<SqlClient>,
) -> Result<Option<SlotWatch>, EngineError> {
    let options = &watched.context.options;
    let client = match client {
        Some(client) => client,
        None => client.insert(connect_sql(&options.source, "observe").await?),
    };
    Ok(catalog::watch_slot(client, &options.slot).await?)
}

/// Looks at the file for as long as it is not dropped.
pub async fn watch_file<T: OlapEngine + 'static>(watched: Arc<Watched>, writer: Writer<T>) {
    let mut dead_rows_at: Option<Instant> = None;
    loop {
        let began = Instant::now();
        // A look that fails leaves what was seen before; the engine meets the same error.
        if let Ok(seen) = look_at_file(&writer).await {
            *lock(&watched.file) = Some(Arc::new(seen));
        }
        let at_least = if is_settling_in(&watched) { FILE_SOON } else { FILE_EVERY };
        let pause = at_least.max(began.elapsed() * FILE_SHARE);

        if dead_rows_at.is_none_or(|at| at.elapsed() >= DEAD_ROWS_EVERY) {
            // A file without tables is looked at again soon.
            if let Ok(Some(dead)) = count_dead_rows(&writer).await {
                dead_rows_at = Some(Instant::now());
                *lock(&watched.dead_rows) = Some(dead);
            }
        }

        let copying = copied_tables(&watched);
        let since = Instant::now();
        while since.elapsed() < pause {
            sleep(FILE_SOON).await;
            if copied_tables(&watched) != copying {
                break;
            }
        }
    }
}

/// Returns whether some table has no copy yet, or nothing is known of tables.
fn is_settling_in(watched: &Watched) -> bool {
    let Some(file) = watched.file() else { return true };
    file.state.is_none() || status::tables(&file).any(status::is_first_copy)
}

fn copied_tables(watched: &Watched) -> usize {
    watched.context.copy_progress.progress().map_or(0, |(tables, _)| tables.len())
}

async fn look_at_file<T: OlapEngine + 'static>(
    writer: &Writer<T>,
) -> Result<FileSeen, EngineError> {
    let look = |target: &mut T| {
        let state = target.state()?;
        let (mut verified, mut jobs) = (Vec::new(), BTreeMap::new());
        if state.is_some() {
            verified = target.verifications()?;
            for job in target.jobs()? {
                *jobs.entry(job.status).or_insert(0) += 1;
            }
        }

        Ok::<_, TargetError>(FileSeen {
            space: target.space()?,
            memory: target.memory()?,
            at: Instant::now(),
            at_unix: unix_now(),
            state,
            verified,
            jobs,
        })
    };
    writer.call(look).await
}

/// Counts the deleted rows that still stand in the file, beside the writer. Tables that fill no row
/// group are left out: there may be many, and there is little in them.
async fn count_dead_rows<T: OlapEngine + 'static>(
    writer: &Writer<T>,
) -> Result<Option<u64>, EngineError> {
    const LARGE: &str = "SELECT schema_name, table_name, estimated_size::VARCHAR \
                         FROM duckdb_tables() WHERE database_name = current_database() \
                         AND estimated_size >= 122880";

    let Some(readers) = writer.call(|target| target.readers(1)).await? else { return Ok(None) };
    let count = move || {
        let Some(mut reader) = readers.readers.into_iter().next() else { return Ok(None) };
        let mut dead = 0_u64;

        for table in texts(&mut reader, LARGE)? {
            let [Some(schema), Some(name), stored] = table else { continue };
            let rows = format!(
                "SELECT count(*)::VARCHAR, NULL::VARCHAR, NULL::VARCHAR FROM {}.{}",
                names::quoted(&schema),
                names::quoted(&name)
            );
            let rows = texts(&mut reader, &rows)?;
            let number = |text: Option<&String>| text.and_then(|text| text.parse::<u64>().ok());
            let rows = number(rows.first().and_then(|row| row[0].as_ref())).unwrap_or_default();
            dead += number(stored.as_ref()).unwrap_or_default().saturating_sub(rows);
        }
        Ok::<_, TargetError>(Some(dead))
    };

    let counted = tokio::task::spawn_blocking(count).await;
    Ok(counted.map_err(|lost| EngineError::lost("counting deleted rows", lost))??)
}

/// Returns the rows of a query with three columns of text.
fn texts(
    reader: &mut impl TargetReader,
    sql: &str,
) -> Result<Vec<[Option<String>; 3]>, TargetError> {
    let mut rows = Vec::new();
    reader.select(sql, &mut |batch| {
        for row in 0..batch.num_rows() {
            let text = |column: usize| {
                let texts = batch.columns().get(column)?.as_any().downcast_ref::<StringArray>()?;
                (!texts.is_null(row)).then(|| texts.value(row).to_owned())
            };
            rows.push([text(0), text(1), text(2)]);
        }
        Ok(())
    })?;
    Ok(rows)
}

/// Takes samples for as long as it is not dropped.
pub async fn take_samples(watched: Arc<Watched>, upkeep: impl Fn() + Send) {
    let mut before: Option<(Instant, u64, u64)> = None;
    let mut ticks = tokio::time::interval(Duration::from_secs(EVERY_SECONDS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);

    loop {
        ticks.tick().await;
        upkeep();

        let (single, others) = watched.context.meter.tables();
        let (mut changes, mut copied) = (0, 0);
        for table in single.values().chain([&others]) {
            let counts = &table.changes;
            changes += counts.inserted + counts.updated + counts.deleted;
            copied += table.copied_rows;
        }

        let now = Instant::now();
        let rate = |count: u64, of: fn(&(Instant, u64, u64)) -> u64| {
            let before = before.as_ref()?;
            let seconds = now.duration_since(before.0).as_secs_f64();
            Some(count.saturating_sub(of(before)) as f64 / seconds.max(0.001))
        };
        let sample = sample(&watched, rate(changes, |it| it.1), rate(copied, |it| it.2));
        watched.samples().push(sample);
        before = Some((now, changes, copied));
    }
}

fn sample(watched: &Watched, changes: Option<f64>, copied: Option<f64>) -> Sample {
    let meter = &watched.context.meter;
    let (heads, applied, now) = (watched.heads(), meter.applied(), Instant::now());
    let is_known = applied > crate::Lsn::ZERO;
    let latency = watched.context.latency.last_minutes();

    Sample {
        at: unix_now() as u64,
        lag_seconds: heads.behind(applied, now).filter(|_| is_known).map(|lag| lag.as_secs_f64()),
        lag_bytes: heads.last().filter(|_| is_known).map(|head| head.bytes_since(applied)),
        changes,
        copied,
        latency_p50: latency.map(|(half, _)| half),
        latency_p99: latency.map(|(_, most)| most),
        resident_bytes: watched.process.resident_bytes(),
        duckdb_bytes: watched.file().map(|file| file.memory.used_bytes),
        buffer_bytes: meter.stream().queue_bytes() + meter.stream().batch_bytes(),
    }
}
