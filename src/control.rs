//! A running replicator answers questions on a unix socket beside its file, since no other process
//! can open the file in the meantime. Both ends of the socket are here. One connection carries one
//! question (a line) and one answer (a JSON document).

use std::{
    collections::BTreeMap,
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{UnixListener, UnixStream, unix::WriteHalf},
    sync::{mpsc::UnboundedSender, oneshot},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Lsn,
    checkpoint::reachable_target,
    engine::{command::Command, publication},
    olap::{
        OlapEngine, Phase, Space, StoredState, StoredTable, StoredVerification, TableState,
        TargetError,
    },
    pgoutput::QualifiedName,
    pipeline::{
        Context, EngineError, Writer, copy_progress::CopyProgress, latency::Latency,
        left_out::LeftOut, new_tables::Unpublished, settled::SettledLsn,
    },
    verify,
};

/// Returns the path of the socket on which the replicator of a file listens.
pub fn socket_path(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".rhei.sock");
    target.with_file_name(name)
}

/// What the process is asked to do that is no concern of the engine. The answer goes to whoever
/// asked.
#[derive(Debug)]
pub enum Steer {
    /// Read the settings again.
    Reload(oneshot::Sender<Value>),
    /// Log by this filter from now on.
    Log(String, oneshot::Sender<Value>),
}

/// Where requests go that the socket does not answer by itself.
#[derive(Debug, Clone)]
pub struct Requests {
    /// To the engine.
    pub commands: UnboundedSender<Command>,
    /// To the process.
    pub steer: UnboundedSender<Steer>,
}

impl Requests {
    async fn steer(&self, ask: impl FnOnce(oneshot::Sender<Value>) -> Steer) -> Value {
        let (sender, answer) = oneshot::channel();
        // The receiver is gone only when the replicator is about to end.
        let _ = self.steer.send(ask(sender));
        answer.await.unwrap_or_else(|_| json!({ "error": "the replicator is about to end" }))
    }
}

/// Listens until it is dropped, and then removes its socket.
pub struct Control {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Control {
    /// Begins to listen. The caller holds the lock of the file, so a socket that is there is left
    /// over from a crash. Without a socket the replicator works all the same; then the reason is
    /// logged.
    pub fn listen<T: OlapEngine + 'static>(
        context: &Context,
        writer: Writer<T>,
        requests: Requests,
    ) -> Option<Self> {
        let path = socket_path(&context.options.target.path);
        let _ = std::fs::remove_file(&path);

        let bound = UnixListener::bind(&path).and_then(|listener| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        });

        let listener = match bound {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(
                    event = "socket_failed",
                    socket = %path.display(),
                    error = %error,
                    "`rhei status` cannot ask this replicator"
                );
                return None;
            }
        };

        let context = context.clone();
        let last = LastStatus::default();

        let task = tokio::spawn(async move {
            // This makes a status known when the first question comes in the middle of a long step.
            tokio::spawn(status(context.clone(), writer.clone(), last.clone()));

            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(
                    client,
                    context.clone(),
                    writer.clone(),
                    requests.clone(),
                    last.clone(),
                ));
            }
        });

        Some(Self { path, task })
    }
}

/// How long a question may take. A client that sends nothing delays only its own answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// A question is one line, and not longer than this.
const MAX_REQUEST_BYTES: u64 = 64 << 10;

/// How long an answer waits for the writer. A merge, a file checkpoint or a large batch may keep
/// the writer for longer.
const WRITER_PATIENCE: Duration = Duration::from_millis(800);

/// The last status that was asked for, which is the answer while the writer is busy.
#[derive(Debug, Clone, Default)]
struct LastStatus {
    remembered: Arc<Mutex<Option<Remembered>>>,
    /// One question at a time waits for the writer: each question occupies a thread while it waits.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug)]
struct Remembered {
    at: Instant,
    status: Value,
    tables: Vec<QualifiedName>,
}

impl LastStatus {
    fn remember(&self, status: &Value, state: Option<StoredState>) {
        let tables = state.into_iter().flat_map(|state| state.tables);
        let names = tables
            .filter(|table| table.state != TableState::Dropped)
            .map(|table| table.source)
            .collect();

        let remembered = Remembered { at: Instant::now(), status: status.clone(), tables: names };
        *self.remembered.lock().unwrap_or_else(PoisonError::into_inner) = Some(remembered);
    }

    fn get(&self) -> Option<Value> {
        let last = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().map(|last| {
            let mut status = last.status.clone();
            status["seconds_old"] = json!(last.at.elapsed().as_secs_f64());
            status
        })
    }

    fn table(&self, name: &str) -> Option<QualifiedName> {
        let last = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref()?.tables.iter().find(|table| table.to_string() == name).cloned()
    }
}

fn busy() -> Value {
    json!({
        "error": "the replicator is in the middle of a long step (a merge, a file checkpoint or a \
                  large batch); ask again"
    })
}

/// Returns the answer of the writer within [`WRITER_PATIENCE`]. A question that takes longer goes
/// on, and its answer is forgotten.
async fn soon<R: Send + 'static>(
    last: &LastStatus,
    question: impl Future<Output = Result<R, EngineError>> + Send + 'static,
) -> Option<Result<R, EngineError>> {
    let turn = Arc::clone(&last.turn);
    let asked = tokio::spawn(async move {
        let _turn = turn.lock().await;
        question.await
    });

    tokio::time::timeout(WRITER_PATIENCE, asked).await.ok()?.ok()
}

/// Reads one line, `status`, `jobs`, `pause`, `resume`, `compact`, `verify JSON`,
/// `publish JSON`, `wait LSN`, `settle LSN`, `resync SCHEMA.TABLE`, `reload` or `log FILTER`, and
/// answers it.
async fn serve<T: OlapEngine + 'static>(
    mut client: UnixStream,
    context: Context,
    writer: Writer<T>,
    requests: Requests,
    last: LastStatus,
) {
    let ask = &requests.commands;
    let mut question = String::new();
    let (read, mut write) = client.split();
    let mut read = BufReader::new(read.take(MAX_REQUEST_BYTES));

    if !matches!(tokio::time::timeout(TIMEOUT, read.read_line(&mut question)).await, Ok(Ok(_))) {
        return;
    }

    let answer = match question.trim_end().split_once(' ').unwrap_or((question.trim_end(), "")) {
        ("status", _) => {
            let answer = soon(&last, status(context.clone(), writer.clone(), last.clone())).await;
            answer.unwrap_or_else(|| Ok(last.get().unwrap_or_else(busy)))
        }
        ("jobs", _) => {
            let writer = writer.clone();
            let jobs = soon(&last, async move { writer.call(|target| target.jobs()).await }).await;
            jobs.map_or_else(|| Ok(busy()), |jobs| jobs.map(|jobs| json!(jobs)))
        }
        // The receiver is gone only when the replicator is about to end.
        ("pause", _) => Ok(json!({ "asked": ask.send(Command::Pause(true)).is_ok() })),
        ("resume", _) => Ok(json!({ "asked": ask.send(Command::Pause(false)).is_ok() })),
        ("reload", _) => Ok(requests.steer(Steer::Reload).await),
        ("log", filter) => {
            let filter = filter.to_owned();
            Ok(requests.steer(|answer| Steer::Log(filter, answer)).await)
        }
        ("compact", _) => {
            let _shape = context.ddl_lock.write().await;
            writer.call(|target| target.compact()).await.map(|compacted| json!(compacted))
        }
        ("publish", options) => tokio::select! {
            published = published(&writer, options) => published,
            () = closed(&write) => return,
        },
        ("verify", request) => tokio::select! {
            report = Box::pin(verified(&context, &writer, request)) => report,
            // No client waits for the report any more.
            () = closed(&write) => return,
        },
        ("wait", lsn) => tokio::select! {
            reached = waited(&context, lsn) => reached,
            () = closed(&write) => return,
        },
        ("settle", lsn) => tokio::select! {
            settled = settled(&context, lsn) => settled,
            () = closed(&write) => return,
        },
        ("resync", table) => resync(table, &writer, ask, &last).await,
        (other, _) => Ok(json!({ "error": format!("it does not know \"{other}\"") })),
    };

    let answer =
        answer.unwrap_or_else(|error| json!({ "error": crate::error::error_chain(&error) }));

    // A client that went away is no concern.
    let _ = write.write_all(answer.to_string().as_bytes()).await;
}

async fn status<T: OlapEngine + 'static>(
    context: Context,
    writer: Writer<T>,
    last: LastStatus,
) -> Result<Value, EngineError> {
    let look = |target: &mut T| {
        Ok::<_, TargetError>((target.state()?, target.space()?, target.verifications()?))
    };
    let (state, space, verified) = writer.call(look).await?;

    let status = match &state {
        Some(state) => describe(state, space, &verified, &Figures::of(&context)),
        None => json!({ "error": "nothing was copied yet" }),
    };

    last.remember(&status, state);
    Ok(status)
}

/// Waits until the client has closed its end. A client that only ends its question still waits for
/// the answer.
async fn closed(write: &WriteHalf<'_>) {
    const LOOK: Duration = Duration::from_secs(1);
    while write.ready(Interest::WRITABLE).await.is_ok_and(|ready| !ready.is_write_closed()) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Compares the copy with the source while the stream goes on.
async fn verified<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    request: &str,
) -> Result<Value, EngineError> {
    match serde_json::from_str(request) {
        Ok(request) => Ok(json!(verify::verify(context, writer, &request).await?)),
        Err(error) => Ok(json!({ "error": format!("the request makes no sense: {error}") })),
    }
}

/// Publishes the copy while the stream goes on.
async fn published<T: OlapEngine + 'static>(
    writer: &Writer<T>,
    options: &str,
) -> Result<Value, EngineError> {
    let Ok(options) = serde_json::from_str(options) else {
        return Ok(json!({ "error": "the request to publish makes no sense" }));
    };
    let publisher = writer.call(|target| target.publisher()).await?;
    Ok(json!(publication::publish(publisher, options, None, &CancellationToken::new()).await?))
}

/// Waits until the checkpoint has reached a position of the source's WAL.
async fn waited(context: &Context, lsn: &str) -> Result<Value, EngineError> {
    const STEP: Duration = Duration::from_millis(5);
    let Ok(lsn) = lsn.parse::<Lsn>() else {
        return Ok(json!({ "error": format!("\"{lsn}\" is no LSN") }));
    };

    // Other waiting tasks repeat their request, so this one may be withdrawn.
    struct Wanted<'a>(&'a Context);
    impl Drop for Wanted<'_> {
        fn drop(&mut self) {
            self.0.checkpoint.want(Lsn::ZERO);
        }
    }

    let goal = reachable_target(lsn);
    let _wanted = Wanted(context);
    while context.checkpoint.reached() < goal {
        context.checkpoint.want_at_least(goal);
        tokio::time::sleep(STEP).await;
    }
    Ok(json!({ "reached": context.checkpoint.reached().to_string() }))
}

/// Waits until everything before a position of the source's WAL is in the copy.
async fn settled(context: &Context, lsn: &str) -> Result<Value, EngineError> {
    const STEP: Duration = Duration::from_millis(20);
    let Ok(lsn) = lsn.parse::<Lsn>() else {
        return Ok(json!({ "error": format!("\"{lsn}\" is no LSN") }));
    };

    loop {
        match context.settled.get() {
            Some(settled) if settled >= lsn => {
                return Ok(json!({ "settled": settled.to_string() }));
            }
            _ => tokio::time::sleep(STEP).await,
        }
    }
}

/// Asks the session to copy a table again.
async fn resync<T: OlapEngine + 'static>(
    name: &str,
    writer: &Writer<T>,
    ask: &UnboundedSender<Command>,
    last: &LastStatus,
) -> Result<Value, EngineError> {
    let its_writer = writer.clone();
    let known =
        match soon(last, async move { its_writer.call(|target| target.state()).await }).await {
            Some(state) => {
                let tables = state?.into_iter().flat_map(|state| state.tables);
                let mut tables = tables.filter(|table| table.state != TableState::Dropped);
                tables.find(|table| table.source.to_string() == name).map(|table| table.source)
            }
            None => last.table(name),
        };

    let Some(table) = known else {
        return Ok(json!({ "error": format!("there is no table {name} in this copy") }));
    };

    let _ = ask.send(Command::Resync(table));
    Ok(json!({ "resync": name }))
}

/// Asks the replicator of a file. Returns `None` when no replicator answers.
pub async fn request(target: &Path, question: &str) -> Option<Value> {
    let mut stream = UnixStream::connect(socket_path(target)).await.ok()?;
    stream.write_all(format!("{question}\n").as_bytes()).await.ok()?;

    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    serde_json::from_str(&text).ok()
}

/// The figures that only a running replicator knows.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    copy_progress: CopyProgress,
    latency: Latency,
    left_out: LeftOut,
    unpublished: Unpublished,
    settled: SettledLsn,
}

impl Figures {
    /// Returns the figures of a pipeline that runs.
    pub fn of(context: &Context) -> Self {
        let (copy_progress, latency) = (context.copy_progress.clone(), context.latency.clone());
        Self {
            copy_progress,
            latency,
            left_out: context.left_out.clone(),
            unpublished: context.unpublished.clone(),
            settled: context.settled.clone(),
        }
    }
}

/// Returns the state of a copy apart from its tables, of which there may be many.
pub fn without_tables(state: &StoredState) -> StoredState {
    StoredState { pipeline: state.pipeline.clone(), tables: Vec::new() }
}

/// Returns the state of a copy, as `rhei status --json` shows it.
pub fn describe(
    state: &StoredState,
    space: Space,
    verified: &[StoredVerification],
    figures: &Figures,
) -> Value {
    let Figures { copy_progress, latency, left_out, unpublished, settled } = figures;
    let pipeline = &state.pipeline;

    let phase = match pipeline.phase {
        Phase::Creating => "creating",
        Phase::Running => "running",
        Phase::PlainCopy => "plain_copy",
    };

    let verified: BTreeMap<&QualifiedName, Value> =
        verified.iter().map(|result| (&result.table, describe_verification(result))).collect();
    let (copies, total) = copy_progress.progress().unwrap_or_default();
    let tables: Vec<Value> = state
        .tables
        .iter()
        .map(|table| {
            let error = match &table.state {
                TableState::Error(pause) => Some(&pause.reason),
                _ => None,
            };

            json!({
                "source": table.source.to_string(),
                "target": table.target.to_string(),
                "state": table.state.as_str(),
                "error": error,
                "copied_rows": table.copied_rows,
                "copy_lsn": table.copy_lsn,
                "renamed_columns": renamed_columns(table),
                "copy": copies.get(&table.source.to_string()),
                "verified": verified.get(&table.source),
            })
        })
        .collect();

    json!({
        "phase": phase,
        "slot": pipeline.slot,
        "publications": pipeline.publications,
        "database": pipeline.database,
        "system_id": pipeline.system_id,
        "timeline": pipeline.timeline,
        "checkpoint": {
            "lsn": pipeline.checkpoint.lsn,
            "seconds_since_commit": seconds_since_commit(state),
        },
        "settled_lsn": settled.get(),
        "tables": tables, "copy": (!copies.is_empty()).then_some(total),
        "paused": copy_progress.is_paused(), "commit_to_visible": latency.describe(),
        "commit_pause": latency.describe_pauses(), "file": space, "left_out": left_out.describe(),
        "not_published": unpublished.describe(),
    })
}

/// Returns the columns that have other names in the target, with these names.
fn renamed_columns(table: &StoredTable) -> BTreeMap<&str, &str> {
    let columns = table.columns.iter().filter(|column| column.target_name != column.name);
    columns.map(|column| (column.name.as_str(), column.target_name.as_str())).collect()
}

/// Returns the last verification of a table.
pub fn describe_verification(result: &StoredVerification) -> Value {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap_or_default().as_micros() as i64;
    let seconds_ago = result.finished_at_us.map(|at| (now - at).max(0) / 1_000_000);

    json!({
        "verdict": result.verdict,
        "reason": result.reason,
        "seconds_ago": seconds_ago,
        "lsn": result.lsn,
        "part": result.part,
        "parts": result.parts,
        "missing": result.missing,
        "extra": result.extra,
        "different": result.different,
        "repaired": result.repaired,
    })
}

fn seconds_since_commit(state: &StoredState) -> Option<f64> {
    const MICROS_TO_2000: i64 = 946_684_800_000_000;

    let committed = state.pipeline.checkpoint.commit_time_us? + MICROS_TO_2000;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?.as_micros();
    Some((now as f64 - committed as f64).max(0.0) / 1_000_000.0)
}
