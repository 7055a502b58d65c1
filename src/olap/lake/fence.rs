//! One process writes a copy in a lake, and each of its commits has a known outcome.
//!
//! No lock guards a lake: a lock in the catalog can be lost with its connection, or stay behind. So
//! the row of the pipeline names its writer and the attempt that wrote it, and every transaction of
//! the writer replaces the row as it left it. DuckLake lets one of two transactions commit that
//! replace the same row. Three things follow:
//!
//! - A process that begins puts its own name there. Whatever an earlier process still has under way
//!   then fails at its commit, or comes before that and is seen. The row of the writer in
//!   `_rhei.jobs` does the same to its loaders, which add rows to that table with each chunk.
//! - When the answer to a commit is lost, the row says whether the commit happened.
//! - When the row is neither as it was nor as this attempt would have left it, an earlier attempt
//!   whose answer was lost has come through after all, or another process has taken over. Nothing
//!   that was planned before holds then, and the session begins again with what the lake has.
//!
//! A process that begins does not take over from one that is alive: it watches the row for as long
//! as a writer may be silent.

use std::time::{Duration, Instant};

use duckdb::params;

use crate::olap::{TargetError, connection::TargetConnection, jobs, state};

/// The longest time for which a writer that is alive leaves its row as it is, unless it works on a
/// large transaction.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// A writer whose row stays as it is for this long is taken for dead.
const SILENCE: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(250);

/// What the row of the pipeline says of its writer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark {
    writer: Option<String>,
    attempt: u64,
}

/// The writer's side of the row.
#[derive(Debug)]
pub struct Fence {
    /// The name of this process: host, process id, and a number that no other process has.
    name: String,
    /// What this process knows to be in the lake; none before the row exists.
    known: Option<Mark>,
    /// The attempt that is under way, or was last.
    attempt: u64,
    /// The transaction that is open has replaced the row.
    is_put: bool,
    /// When the row was last replaced.
    put_at: Instant,
    /// The last writer had left the copy to the next one.
    was_released: bool,
}

/// What became of a commit whose answer was lost, or that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is in the lake.
    Committed,
    /// Nothing of it is in the lake.
    Refused,
}

impl Fence {
    /// Takes over the copy in a lake, if there is one.
    ///
    /// # Errors
    /// Another process writes the copy.
    pub fn take_over(connection: &TargetConnection) -> Result<Self, TargetError> {
        let mut fence = Self {
            name: name_of_this_process(),
            known: None,
            attempt: 0,
            is_put: false,
            put_at: Instant::now(),
            was_released: true,
        };

        let Some(mark) = read(connection)? else { return Ok(fence) };
        fence.was_released = mark.writer.is_none();
        fence.known = Some(fence.wait_for_silence(connection, mark)?);
        fence.begin();
        let taken = connection
            .execute_batch("BEGIN TRANSACTION")
            .map_err(TargetError::from)
            .and_then(|()| fence.put_same_row(connection))
            .and_then(|()| jobs::put_writer(connection, &fence.name))
            .and_then(|()| connection.commit());
        if let Err(error) = taken {
            let _ = connection.execute_batch("ROLLBACK");
            return match fence.outcome(connection)? {
                Outcome::Committed => Ok(fence),
                Outcome::Refused => Err(error),
            };
        }
        fence.committed();
        Ok(fence)
    }

    /// Waits until the writer of the row has ended, and returns the row as it is then.
    ///
    /// # Errors
    /// The writer is alive.
    fn wait_for_silence(
        &self,
        connection: &TargetConnection,
        mut mark: Mark,
    ) -> Result<Mark, TargetError> {
        let since = Instant::now();
        let mut has_told = false;
        loop {
            let Some(writer) = mark.writer.clone() else { return Ok(mark) };
            if has_ended(&writer) || since.elapsed() > SILENCE {
                return Ok(mark);
            }

            match read(connection)? {
                Some(now) if now == mark => {}
                Some(now) if now.writer.is_none() => mark = now,
                _ => return Err(TargetError::LakeInUse { holder: shown(&writer) }),
            }

            if !std::mem::replace(&mut has_told, true) {
                tracing::info!(
                    event = "lake_waits_for_writer",
                    writer = shown(&writer),
                    seconds = SILENCE.as_secs(),
                    "waiting for a sign of life of the process that wrote the lake last; without \
                     one, this process takes over"
                );
            }
            std::thread::sleep(STEP);
        }
    }

    /// Returns the name of this process.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether the last writer had left the copy to the next one.
    pub fn was_released(&self) -> bool {
        self.was_released
    }

    /// Notes that a transaction begins.
    pub fn begin(&mut self) {
        self.attempt += 1;
        self.is_put = false;
    }

    /// Returns whether the open transaction has replaced the row.
    pub fn is_put(&self) -> bool {
        self.is_put
    }

    /// Returns whether it is time to show that this process is alive.
    pub fn is_silent(&self) -> bool {
        self.known.is_some() && self.put_at.elapsed() > HEARTBEAT
    }

    /// Removes the row of the pipeline, as this process left it, so that the open transaction can
    /// write it again; returns the writer and the attempt to write.
    ///
    /// # Errors
    /// The row is not as this process left it.
    pub fn remove_row(
        &mut self,
        connection: &TargetConnection,
    ) -> Result<(&str, u64), TargetError> {
        if let Some(known) = self.known.as_ref().filter(|_| !self.is_put) {
            let removed = connection.execute(
                &connection.sql(
                    "DELETE FROM _rhei.pipeline WHERE writer IS NOT DISTINCT FROM ? \
                     AND coalesce(attempt, 0) = ?",
                ),
                params![known.writer, known.attempt],
            )?;
            if removed != 1 {
                return Err(self.lost(read(connection)?));
            }
        } else {
            let removed = connection.execute(&connection.sql("DELETE FROM _rhei.pipeline"), [])?;
            // Another process may have made the same copy meanwhile.
            if removed > 0 && !self.is_put {
                return Err(self.lost(read(connection)?));
            }
            if !self.is_put {
                jobs::put_writer(connection, &self.name)?;
            }
        }

        self.is_put = true;
        Ok((&self.name, self.attempt))
    }

    /// Replaces the row by the same row with the mark of the open transaction.
    fn put_same_row(&mut self, connection: &TargetConnection) -> Result<(), TargetError> {
        let Some(pipeline) = state::read_pipeline(connection)? else { return Ok(()) };
        state::put_pipeline(connection, &pipeline, Some(self))
    }

    /// Notes that the open transaction is committed.
    pub fn committed(&mut self) {
        if self.is_put {
            let (writer, attempt) = (Some(self.name.clone()), self.attempt);
            (self.known, self.put_at) = (Some(Mark { writer, attempt }), Instant::now());
        }
    }

    /// Finds out what became of a commit that returned an error, when no transaction is open.
    ///
    /// # Errors
    /// The lake does not answer, or it holds what neither this attempt nor the one before it left.
    pub fn outcome(&mut self, connection: &TargetConnection) -> Result<Outcome, TargetError> {
        let found = read(connection)
            .map_err(|source| TargetError::OutcomeUnknown { source: Box::new(source) })?;

        let ours = Mark { writer: Some(self.name.clone()), attempt: self.attempt };
        if found.as_ref() == Some(&ours) {
            self.is_put = true;
            self.committed();
            return Ok(Outcome::Committed);
        }
        if found == self.known {
            return Ok(Outcome::Refused);
        }
        Err(self.lost(found))
    }

    /// Takes notice of what the lake holds, after an outcome stayed unknown.
    ///
    /// # Errors
    /// The lake does not answer, or another process writes the copy now.
    pub fn resume(&mut self, connection: &TargetConnection) -> Result<(), TargetError> {
        let found = read(connection)?;
        match &found {
            Some(mark) if mark.writer.as_ref() != Some(&self.name) && self.known != found => {
                Err(self.lost(found))
            }
            _ => {
                self.known = found;
                Ok(())
            }
        }
    }

    /// Returns the error for a row that is not as this process left it.
    fn lost(&self, found: Option<Mark>) -> TargetError {
        match found.and_then(|mark| mark.writer) {
            Some(writer) if writer != self.name => TargetError::Fenced { holder: shown(&writer) },
            _ => TargetError::Moved,
        }
    }

    /// Leaves the copy to the next process, which then need not wait.
    pub fn release(&mut self, connection: &TargetConnection) -> Result<(), TargetError> {
        let Some(known) = self.known.take() else { return Ok(()) };
        if known.writer.as_ref() != Some(&self.name) {
            return Ok(());
        }

        connection.execute_batch(
            &connection.sql("CREATE OR REPLACE TEMP TABLE _rhei_pipeline AS FROM _rhei.pipeline"),
        )?;
        connection.execute_batch("BEGIN TRANSACTION")?;
        let released = connection
            .execute(
                &connection.sql("DELETE FROM _rhei.pipeline WHERE writer = ? AND attempt = ?"),
                params![known.writer, known.attempt],
            )
            .map_err(TargetError::from)
            .and_then(|removed| {
                if removed != 1 {
                    return Ok(connection.execute_batch("ROLLBACK")?);
                }
                connection.execute_batch(&connection.sql(
                    "INSERT INTO _rhei.pipeline SELECT * REPLACE (NULL AS writer) \
                     FROM _rhei_pipeline",
                ))?;
                connection.commit()
            });
        if released.is_err() {
            let _ = connection.execute_batch("ROLLBACK");
        }
        released
    }
}

/// Returns the process that writes the copy in a lake, unless it has ended: it has left the copy to
/// the next one, or is known to be gone.
pub fn writer(connection: &TargetConnection) -> Result<Option<String>, TargetError> {
    let writer = read(connection)?.and_then(|mark| mark.writer);
    Ok(writer.filter(|writer| !has_ended(writer)).map(|writer| shown(&writer)))
}

fn read(connection: &TargetConnection) -> Result<Option<Mark>, TargetError> {
    if !state::exists(connection)? {
        return Ok(None);
    }
    let mut statement = connection
        .prepare(&connection.sql("SELECT writer, coalesce(attempt, 0) FROM _rhei.pipeline"))?;
    let mut rows = statement.query([])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    Ok(Some(Mark { writer: row.get(0)?, attempt: row.get(1)? }))
}

fn host() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// Returns what process ids mean something in: the boot of a machine, and a container on it.
fn scope() -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};

    let mut hasher = DefaultHasher::new();
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .hash(&mut hasher);
    std::fs::read_link("/proc/self/ns/pid").unwrap_or_default().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn name_of_this_process() -> String {
    use std::hash::{BuildHasher, Hasher};

    let mut random = std::collections::hash_map::RandomState::new().build_hasher();
    random.write_u32(std::process::id());
    format!("{}/{}/{}/{:016x}", host(), std::process::id(), scope(), random.finish())
}

/// The parts of a writer's name: its number, its scope, its process id and its host.
fn parts(writer: &str) -> [&str; 4] {
    let mut parts = writer.rsplitn(4, '/');
    [(); 4].map(|()| parts.next().unwrap_or_default())
}

/// Returns host and process id of a writer.
pub fn shown(writer: &str) -> String {
    let [_, _, process, host] = parts(writer);
    format!("process {process} on {host}")
}

/// Returns whether a process has ended, as far as this one can see.
fn has_ended(writer: &str) -> bool {
    let [_, of, process, of_host] = parts(writer);
    if of != scope() || of_host != host() {
        return false;
    }
    // This process has another name: the program that it ran before it started itself again.
    if process == std::process::id().to_string() {
        return true;
    }
    let process = process.parse().ok().and_then(rustix::process::Pid::from_raw);
    process.is_some_and(|process| {
        rustix::process::test_kill_process(process) == Err(rustix::io::Errno::SRCH)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_ended_is_told_from_one_that_lives_and_from_one_elsewhere() {
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        let of = |host: &str, process: u32, scope: &str| {
            format!("{host}/{process}/{scope}/0123456789abcdef")
        };

        assert!(has_ended(&of(&host(), ended.id(), &scope())));
        assert!(!has_ended(&of(&host(), 1, &scope())));
        assert!(!has_ended(&of("elsewhere", ended.id(), &scope())));
        // Another container of this machine, or this one before it was started again.
        assert!(!has_ended(&of(&host(), ended.id(), "0000")));
        // This process by another name.
        assert!(has_ended(&of(&host(), std::process::id(), &scope())));
        assert_eq!(shown("a/b/7/cd/0f"), "process 7 on a/b");
    }
}
