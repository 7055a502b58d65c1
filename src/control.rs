//! A running replicator answers questions on a unix socket beside its file, since nobody else can open the file
//! meanwhile. Both ends are here. One connection, one answer: a JSON document.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

use crate::{
    engine::Writer,
    target::{OlapEngine, Phase, StoredState, TableState},
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
    pub fn listen<T: OlapEngine + 'static>(target: &Path, writer: Writer<T>) -> Option<Self> {
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
            while let Ok((mut client, _)) = listener.accept().await {
                let answer = match writer.call(|target| target.state()).await {
                    Ok(Some(state)) => describe(&state),
                    Ok(None) => json!({ "error": "nothing was copied yet" }),
                    Err(error) => json!({ "error": crate::engine::with_causes(&error) }),
                };
                // A client that went away is no concern.
                let _ = client.write_all(answer.to_string().as_bytes()).await;
            }
        });
        Some(Self { path, task })
    }
}

/// Asks the replicator of a file. None: nobody answers.
pub async fn ask(target: &Path) -> Option<Value> {
    let mut stream = UnixStream::connect(socket_path(target)).await.ok()?;
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
