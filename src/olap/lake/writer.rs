//! The one writer of a copy in a lake: begins and commits its transactions.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    CatalogKind, Fence, LakeOptions, Outcome, inlining, know_folder, secrets, space, upkeep::Upkeep,
};
use crate::olap::{
    Pipeline, Space, TargetError,
    compact::sibling,
    connection::TargetConnection,
    names::{CATALOG, literal},
    state::{self, Cycle},
};

/// How old the figures of a lake may be.
const SPACE_AGE: Duration = Duration::from_secs(20);

/// How often a transaction is tried that met another one, and how long it waits before each new
/// try.
const CONFLICTS: u32 = 50;
const CONFLICT_PAUSE: Duration = Duration::from_millis(20);
/// How often work is tried that failed for a reason that may pass: the catalog or the store did not
/// answer.
const FAILURES: u32 = 3;
const FAILURE_PAUSE: Duration = Duration::from_millis(300);

/// How old the credentials may be that the aws extension has found: those of a role end after an
/// hour or more.
const CREDENTIALS_AGE: Duration = Duration::from_secs(300);

/// A lake that this process writes.
pub struct Lake {
    pub options: Arc<LakeOptions>,
    pub fence: Fence,
    /// Tables wait for another copy, of which the session does not know: every call fails until it
    /// begins again.
    pub has_moved: bool,
    /// What the open transaction says of itself in its snapshot.
    description: Option<String>,
    /// It is not known what became of a transaction; the lake has to be read again.
    is_unsure: bool,
    /// How often parts of a large transaction, which cannot be tried again here, have failed.
    failures: u32,
    pub upkeep: Upkeep,
    pub shared: Arc<Shared>,
    /// The turn of the transaction that is open.
    taken: Option<TurnTaken>,
    /// When the credentials of the store were looked for; none when that is due.
    credentials_at: Option<Instant>,
    /// The figures, and when they were read: reading them asks the catalog several times.
    space: Option<(Instant, Space)>,
    /// Locked, so that no other process of this machine works for the same copy.
    _lock: File,
}

impl Lake {
    /// Takes over the copy in a lake. `path`: what rhei keeps on this machine is named after it.
    ///
    /// # Errors
    /// Another process writes the copy, or the folder of the data is not mounted.
    pub fn take_over(
        connection: &TargetConnection,
        options: &Arc<LakeOptions>,
        path: &Path,
    ) -> Result<Self, TargetError> {
        let lock = lock(sibling(path, ".lock"))?;
        let is_marked = know_folder(connection)?;
        if state::exists(connection)? {
            inlining::of_state(connection)?;
        }

        let fence = Fence::take_over(connection)?;
        let turn = matches!(options.catalog_kind(), CatalogKind::Sqlite | CatalogKind::DuckDb)
            .then(Arc::default);
        let shared = Shared {
            writer: fence.name().to_owned(),
            turn,
            may_lack_files: AtomicBool::new(!is_marked || !fence.was_released()),
        };
        Ok(Self {
            options: Arc::clone(options),
            fence,
            shared: Arc::new(shared),
            has_moved: false,
            description: None,
            is_unsure: false,
            failures: 0,
            upkeep: Upkeep::new(),
            taken: None,
            credentials_at: Some(Instant::now()),
            space: None,
            _lock: lock,
        })
    }

    /// Begins a transaction.
    pub fn begin(&mut self, connection: &TargetConnection) -> Result<(), TargetError> {
        self.renew_credentials(connection);
        self.taken = None;
        self.taken = self.shared.turn();
        connection.execute_batch("BEGIN TRANSACTION").inspect_err(|_| self.taken = None)?;
        self.fence.begin();
        self.description = None;
        Ok(())
    }

    /// Looks for the credentials of the store again, if they may have ended and no setting names
    /// them.
    fn renew_credentials(&mut self, connection: &TargetConnection) {
        let is_fresh = self.credentials_at.is_some_and(|at| at.elapsed() < CREDENTIALS_AGE);
        if is_fresh || self.options.s3.key.is_some() {
            return;
        }
        self.credentials_at = Some(Instant::now());
        if let Err(error) = secrets::put_for_store(connection, &self.options) {
            tracing::warn!(
                event = "lake_credentials_kept",
                error = crate::error::error_chain(&error),
                "no new credentials for the store of the lake were found; the earlier ones stay"
            );
        }
    }

    /// Notes that no transaction is open any more.
    pub fn ended(&mut self) {
        self.taken = None;
    }

    /// Has the snapshot of the open transaction say what it applies.
    pub fn describe(&mut self, cycle: &Cycle) {
        let counts = cycle.counts;
        let described = json!({
            "source_transactions": cycle.source_transactions,
            "inserted": counts.inserted,
            "updated": counts.updated,
            "deleted": counts.deleted,
            "truncated": counts.truncates,
        });
        self.description = Some(described.to_string());
    }

    /// Commits the open transaction, whose checkpoint its snapshot names. After an error nothing of
    /// the transaction is in the lake, unless the error says that this is not known.
    pub fn commit(
        &mut self,
        connection: &TargetConnection,
        pipeline: Option<&Pipeline>,
    ) -> Result<(), TargetError> {
        if let Some(pipeline) = pipeline {
            if !self.fence.is_put() {
                state::put_pipeline(connection, pipeline, Some(&mut self.fence))?;
            }
            connection.execute_batch(&format!(
                "CALL {CATALOG}.set_commit_message('rhei', {}, extra_info => {})",
                literal(&pipeline.checkpoint.lsn.to_string()),
                literal(self.description.as_deref().unwrap_or("{}")),
            ))?;
        }

        let Err(error) = connection.commit() else {
            self.fence.committed();
            self.failures = 0;
            return Ok(());
        };

        // In most cases the COMMIT has ended the transaction.
        let _ = connection.execute_batch("ROLLBACK");
        match self.fence.outcome(connection) {
            Ok(Outcome::Committed) => {
                tracing::info!(
                    event = "lake_commit_found",
                    error = crate::error::error_chain(&error),
                    "the answer to a commit was lost; the commit is in the lake"
                );
                self.failures = 0;
                self.shared.doubt_files();
                Ok(())
            }
            Ok(Outcome::Refused) => {
                // The catalog may still be at it.
                if !is_conflict_of_lake(&error) {
                    self.shared.doubt_files();
                }
                Err(error)
            }
            Err(unknown) => {
                self.doubt();
                Err(unknown)
            }
        }
    }

    /// Returns whether the work of a transaction that failed is done again, and waits for the
    /// moment to do so. `tries`: how often it has failed.
    pub fn is_tried_again(error: &TargetError, tries: u32) -> bool {
        let pause = if error.is_conflict() && tries < CONFLICTS {
            CONFLICT_PAUSE
        } else if may_pass(error) && tries < FAILURES {
            FAILURE_PAUSE
        } else {
            return false;
        };

        tracing::debug!(error = crate::error::error_chain(error), "trying a transaction again");
        std::thread::sleep(pause);
        true
    }

    /// Returns the error of a part of a large transaction. As long as the reason may pass, a new
    /// session begins with the first part.
    pub fn of_part(&mut self, error: TargetError) -> TargetError {
        self.failures += 1;
        if may_pass(&error) && self.failures < FAILURES {
            return TargetError::LakeInterrupted { source: Box::new(error) };
        }
        error
    }

    /// Returns the figures of the lake, which may be some seconds old.
    pub fn space(&mut self, connection: &TargetConnection) -> Result<Space, TargetError> {
        if let Some((_, space)) = self.space.filter(|(at, _)| at.elapsed() < SPACE_AGE) {
            return Ok(space);
        }
        let space = space(connection, &self.options)?;
        self.space = Some((Instant::now(), space));
        Ok(space)
    }

    /// Has the figures read again.
    pub fn forget_space(&mut self) {
        self.space = None;
    }

    /// Returns whether the lake has to be read again before anything else.
    pub fn is_unsure(&self) -> bool {
        self.is_unsure
    }

    /// Has the state read again before anything else, and the files looked at: what failed may have
    /// read a file that is gone.
    pub fn read_again(&mut self) {
        self.has_moved = false;
        self.credentials_at = None;
        self.doubt();
    }

    /// Has state and files looked at before anything else: a commit may have come through, or not.
    pub fn doubt(&mut self) {
        self.is_unsure = true;
        self.shared.doubt_files();
    }

    /// Reads what the lake holds, after the outcome of a commit stayed unknown.
    pub fn resume(&mut self, connection: &TargetConnection) -> Result<(), TargetError> {
        self.fence.resume(connection)?;
        self.is_unsure = false;
        Ok(())
    }
}

/// What the writer and its loaders have in common.
pub struct Shared {
    /// The name of this process, as the lake has it.
    pub writer: String,
    /// Where transactions take turns; none where the catalog lets them work side by side.
    turn: Option<Arc<Turn>>,
    /// A commit has failed: files that it names may be gone although it is in the lake.
    may_lack_files: AtomicBool,
}

impl Shared {
    /// Waits for the turn of a transaction, where they take turns.
    pub fn turn(&self) -> Option<TurnTaken> {
        self.turn.as_ref().map(Turn::take)
    }

    /// Returns whether files may be gone that the lake names. The next process looks then.
    pub fn is_in_doubt(&self) -> bool {
        self.may_lack_files.load(Ordering::Relaxed)
    }

    /// Returns the same, and takes it that the caller looks.
    pub fn takes_doubt(&self) -> bool {
        self.may_lack_files.swap(false, Ordering::Relaxed)
    }

    /// Notes that files may be gone that the lake names.
    pub fn doubt_files(&self) {
        self.may_lack_files.store(true, Ordering::Relaxed);
    }
}

/// Returns whether a COMMIT failed since another transaction came before it: then nothing of it is
/// in the lake, nor on its way there.
pub fn is_conflict_of_lake(error: &TargetError) -> bool {
    match error {
        TargetError::Query(error) => error.to_string().contains("Transaction conflict"),
        _ => false,
    }
}

/// Lets one transaction of this process work at a time, where the catalog is a file. A transaction
/// that has read from a SQLite file and comes to write finds it locked by another one, and neither
/// can wait for the other. In a DuckDB file the second of two commits can fail, and after a failed
/// commit the file has to be opened again.
#[derive(Default)]
pub struct Turn {
    is_taken: Mutex<bool>,
    is_free: Condvar,
}

/// The turn, until this is dropped.
pub struct TurnTaken(Arc<Turn>);

impl Turn {
    pub fn take(self: &Arc<Self>) -> TurnTaken {
        let taken = self.is_taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self
            .is_free
            .wait_while(taken, |is_taken| *is_taken)
            .unwrap_or_else(PoisonError::into_inner);
        *taken = true;
        TurnTaken(Arc::clone(self))
    }
}

impl Drop for TurnTaken {
    fn drop(&mut self) {
        *self.0.is_taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.is_free.notify_one();
    }
}

/// Returns whether the same work may succeed a little later: the catalog or the store may have been
/// away for a moment. DuckDB reports a lost connection under several kinds of errors, and errors in
/// values under others.
pub fn may_pass(error: &TargetError) -> bool {
    const KINDS: [&str; 6] = [
        "IO Error",
        "HTTP Error",
        "Binder Error",
        "Catalog Error",
        "Invalid Error",
        "TransactionContext Error",
    ];
    match error {
        TargetError::Query(error) => crate::olap::error::is_of_kind(&error.to_string(), &KINDS),
        TargetError::Table { source, .. } => may_pass(source),
        _ => false,
    }
}

/// Returns whether the same work may succeed later: also after the lake was opened again.
pub fn may_pass_later(error: &TargetError) -> bool {
    matches!(error, TargetError::CommitFailed(_)) || may_pass(error)
}

/// Returns whether a lake that could not be opened may be opened a little later.
pub fn may_open_later(error: &TargetError) -> bool {
    matches!(error, TargetError::LakeNotOpened { .. })
        || error.is_of_lake()
        || error.is_conflict()
        || may_pass_later(error)
}

/// Locks a file for as long as it is open.
fn lock(file: PathBuf) -> Result<File, TargetError> {
    let opened = File::options().create(true).append(true).open(&file)?;
    match rustix::fs::flock(&opened, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(opened),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(TargetError::LakeLocked { lock: file }),
        Err(error) => Err(TargetError::Io(error.into())),
    }
}
