//! A running replicator answers questions on a unix socket beside its file, since nobody else can open the file
//! meanwhile. Both ends are here. One connection, one question (a line), one answer (a JSON document).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::Notify,
};

use crate::{
    engine::Writer,
    target::{OlapEngine, Phase, StoredState, StoredTable, TableState, TargetError},
};

/// Where the replicator of a file listens.
pub fn socket_path(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".rhei.sock");
    target.with_file_name(name)
}

/// Listens until it is dropped; removes its socket then.
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
    /// Begins to listen. The file's lock is held by the caller, so a socket that is there is left over from a crash.
    /// Without a socket the replicator works all the same; then the reason is logged.
    /// `attach_anew` is told when a table is to be copied again.
    pub fn listen<T: OlapEngine + 'static>(target: &Path, writer: Writer<T>, attach_anew: Arc<Notify>) -> Option<Self> {
        let path = socket_path(target);
        let _ = std::fs::remove_file(&path);
        let bound = UnixListener::bind(&path).and_then(|listener| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        });
        let listener = match bound {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(socket = %path.display(), error = %error, "`rhei status` cannot ask this replicator");
                return None;
            }
        };
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (writer, attach_anew) = (writer.clone(), Arc::clone(&attach_anew));
                // One that says nothing keeps nobody waiting but itself.
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(PATIENCE, serve(client, writer, attach_anew)).await;
                });
            }
        });
        Some(Self { path, task })
    }
}

/// How long a question and its answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// A question is one line, and not longer than this.
const LONGEST_QUESTION: u64 = 64 << 10;

/// Reads one line, `status`, `jobs` or `resync SCHEMA.TABLE`, and answers it.
async fn serve<T: OlapEngine + 'static>(mut client: UnixStream, writer: Writer<T>, attach_anew: Arc<Notify>) {
    let mut question = String::new();
    let (read, mut write) = client.split();
    if BufReader::new(read.take(LONGEST_QUESTION)).read_line(&mut question).await.is_err() {
        return;
    }
    let answer = match question.trim_end().split_once(' ').unwrap_or((question.trim_end(), "")) {
        ("status", _) => writer.call(|target| target.state()).await.map(|state| match state {
            Some(state) => describe(&state),
            None => json!({ "error": "nothing was copied yet" }),
        }),
        ("jobs", _) => writer.call(|target| target.jobs()).await.map(|jobs| json!(jobs)),
        ("resync", table) => resync(table.to_owned(), &writer, &attach_anew).await,
        (other, _) => Ok(json!({ "error": format!("it does not know \"{other}\"") })),
    };
    let answer = answer.unwrap_or_else(|error| json!({ "error": crate::engine::with_causes(&error) }));
    // A client that went away is no concern.
    let _ = write.write_all(answer.to_string().as_bytes()).await;
}

/// Marks a table to be copied again, and has the session begin with it.
async fn resync<T: OlapEngine + 'static>(
    name: String,
    writer: &Writer<T>,
    attach_anew: &Notify,
) -> Result<Value, crate::engine::EngineError> {
    let wanted = name.clone();
    let is_marked = writer
        .call(move |target| {
            let Some(state) = target.state()? else { return Ok(false) };
            let Some(table) = state.tables.into_iter().find(|table| table.source.to_string() == wanted) else {
                return Ok::<_, TargetError>(false);
            };
            target.note(&[StoredTable { state: TableState::Resync, ..table }])?;
            Ok(true)
        })
        .await?;
    if !is_marked {
        return Ok(json!({ "error": format!("there is no table {name} in this copy") }));
    }
    attach_anew.notify_one();
    Ok(json!({ "resync": name }))
}

/// Asks the replicator of a file. None: nobody answers.
pub async fn ask(target: &Path, question: &str) -> Option<Value> {
    let mut stream = UnixStream::connect(socket_path(target)).await.ok()?;
    stream.write_all(format!("{question}\n").as_bytes()).await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    serde_json::from_str(&text).ok()
}

/// The state of a copy, as `rhei status --json` shows it.
pub fn describe(state: &StoredState) -> Value {
    let pipeline = &state.pipeline;
    let phase = match pipeline.phase {
        Phase::Creating => "creating",
        Phase::Running => "running",
        Phase::PlainCopy => "plain_copy",
    };
    let tables: Vec<Value> = state
        .tables
        .iter()
        .map(|table| {
            let error = match &table.state {
                TableState::Error(reason) => Some(reason),
                _ => None,
            };
            json!({
                "source": table.source.to_string(), "target": table.target.to_string(), "state": table.state.word(),
                "error": error, "copied_rows": table.copied_rows, "copy_lsn": table.copy_lsn,
            })
        })
        .collect();
    json!({
        "phase": phase, "slot": pipeline.slot, "publications": pipeline.publications, "database": pipeline.database,
        "system_id": pipeline.system_id, "timeline": pipeline.timeline,
        "checkpoint": { "lsn": pipeline.checkpoint.lsn, "seconds_since_commit": seconds_since_commit(state) },
        "tables": tables,
    })
}

fn seconds_since_commit(state: &StoredState) -> Option<f64> {
    const MICROS_TO_2000: i64 = 946_684_800_000_000;
    let committed = state.pipeline.checkpoint.commit_time_us? + MICROS_TO_2000;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?.as_micros();
    Some((now as f64 - committed as f64).max(0.0) / 1_000_000.0)
}
