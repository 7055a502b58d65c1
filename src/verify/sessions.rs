//! The sessions at the source that share one snapshot.

use tokio::sync::{Mutex, MutexGuard, Semaphore, SemaphorePermit};

use crate::source::connection::SqlClient;

/// Sessions that see one snapshot, each used by one caller at a time: tables and pieces of tables
/// are read side by side, by as many sessions as the settings allow.
pub(super) struct Sessions {
    first: Mutex<SqlClient>,
    others: Vec<Mutex<SqlClient>>,
    free: Semaphore,
}

/// A session that is in use until this value is dropped.
pub(super) struct Session<'a> {
    client: MutexGuard<'a, SqlClient>,
    _permit: Option<SemaphorePermit<'a>>,
}

impl std::ops::Deref for Session<'_> {
    type Target = SqlClient;

    fn deref(&self) -> &SqlClient {
        &self.client
    }
}

impl Sessions {
    /// Creates the pool of at least one session.
    pub(super) fn new(first: SqlClient, others: Vec<SqlClient>) -> Self {
        let free = Semaphore::new(1 + others.len());
        let others = others.into_iter().map(Mutex::new).collect();
        Self { first: Mutex::new(first), others, free }
    }

    /// Returns the number of sessions.
    pub(super) fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// Waits for a session that no other caller uses.
    pub(super) async fn take(&self) -> Session<'_> {
        // The semaphore is never closed.
        let permit = self.free.acquire().await.ok();
        let idle = self.others.iter().find_map(|session| session.try_lock().ok());

        let client = match idle {
            Some(client) => client,
            None => self.first.lock().await,
        };
        Session { client, _permit: permit }
    }
}
