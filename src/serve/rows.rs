//! Rows on their way from the thread that reads them to the client that wants them.
//!
//! A client that reads slowly, or keeps a portal or cursor open, stops the thread: what it has not
//! read yet is bounded. When the session wants to run something else meanwhile, the thread reads on
//! to the end, and what has no room in memory goes into a file without a name.

use std::{
    collections::VecDeque,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::BytesMut;
use tokio::sync::Notify;

use super::error::SqlError;

/// How much a client may leave unread before the thread waits, and how much of a result that is
/// read to its end stays in memory.
const MAX_UNREAD: usize = 1 << 20;
const MAX_IN_MEMORY: usize = 8 << 20;
/// The largest part of a result that is written to a file.
const MAX_SPOOLED: u64 = 16 << 30;

/// Rows of one statement, each as the client gets it.
pub struct RowQueue {
    /// Tells this statement from others of the process.
    pub number: u64,
    state: Mutex<State>,
    has_room: Condvar,
    has_rows: Notify,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Vec<BytesMut>>,
    bytes: usize,
    spool: Option<Spool>,
    end: Option<Result<(), SqlError>>,
    /// The session needs its thread, which reads on without waiting for the client.
    is_urgent: bool,
    /// The client has closed the result, or its connection has ended.
    is_abandoned: bool,
}

/// What became of rows that were handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    Room,
    /// The queue is full: [`RowQueue::wait_for_room`] before the next rows.
    Full,
    /// The result is abandoned: the thread can stop reading.
    Abandoned,
}

impl RowQueue {
    pub fn new() -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            state: Mutex::default(),
            has_room: Condvar::new(),
            has_rows: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over rows; called by the thread that reads. They are taken also when the queue is full
    /// afterwards. `folder` is where a file without a name is made when that is needed.
    pub fn push(&self, rows: Vec<BytesMut>, folder: &Path) -> Result<Pushed, SqlError> {
        let mut state = self.lock();
        if state.is_abandoned {
            return Ok(Pushed::Abandoned);
        }

        let bytes: usize = rows.iter().map(BytesMut::len).sum();
        if state.spool.is_some() || state.is_urgent && state.bytes + bytes > MAX_IN_MEMORY {
            let failed = |error: std::io::Error| {
                SqlError::new(
                    "58030",
                    format!("the rest of an open result cannot be kept: {error}"),
                )
            };
            let spool = match &mut state.spool {
                Some(spool) => spool,
                none => none.insert(Spool::new(folder).map_err(failed)?),
            };
            spool.write(&rows).map_err(failed)?;
            if spool.written > MAX_SPOOLED {
                return Err(SqlError::new("53400", "the rest of an open result is too large"));
            }
        } else {
            state.bytes += bytes;
            state.waiting.push_back(rows);
        }

        let is_full = !state.is_urgent && state.bytes >= MAX_UNREAD;
        drop(state);
        self.has_rows.notify_one();
        Ok(if is_full { Pushed::Full } else { Pushed::Room })
    }

    /// Waits until the client has read some rows, the session needs its thread, or `is_over`.
    /// Returns `false` when nothing of this happened within the time.
    pub fn wait_for_room(&self, within: Duration, is_over: impl Fn() -> bool) -> bool {
        const STEP: Duration = Duration::from_millis(100);
        let since = Instant::now();
        let mut state = self.lock();

        while state.bytes >= MAX_UNREAD && !state.is_urgent && !state.is_abandoned {
            if is_over() {
                return true;
            }
            if since.elapsed() >= within {
                return false;
            }
            state =
                self.has_room.wait_timeout(state, STEP).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Says that there are no more rows; called by the thread that reads.
    pub fn finish(&self, end: Result<(), SqlError>) {
        self.lock().end = Some(end);
        self.has_rows.notify_one();
    }

    /// Lets the thread read to the end, whatever the client does.
    pub fn read_to_end(&self) {
        self.lock().is_urgent = true;
        self.has_room.notify_all();
    }

    /// Discards the rows, and has the thread stop reading. Returns whether it still reads.
    pub fn abandon(&self) -> bool {
        let mut state = self.lock();
        state.is_abandoned = true;
        state.waiting.clear();
        state.bytes = 0;
        self.has_room.notify_all();
        state.end.is_none()
    }

    pub fn is_abandoned(&self) -> bool {
        self.lock().is_abandoned
    }

    pub fn has_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Returns the next rows; `None` after the last ones.
    pub async fn next(&self) -> Option<Result<Vec<BytesMut>, SqlError>> {
        loop {
            if let Some(next) = self.try_next() {
                return next;
            }
            self.has_rows.notified().await;
        }
    }

    /// Returns the next rows, or the end, if either is there.
    #[allow(clippy::option_option, reason = "the outer one is about now, the inner one the end")]
    fn try_next(&self) -> Option<Option<Result<Vec<BytesMut>, SqlError>>> {
        let mut state = self.lock();
        if let Some(rows) = state.waiting.pop_front() {
            state.bytes -= rows.iter().map(BytesMut::len).sum::<usize>();
            self.has_room.notify_all();
            return Some(Some(Ok(rows)));
        }

        if let Some(spool) = &mut state.spool {
            match spool.read() {
                Ok(rows) if rows.is_empty() => {}
                Ok(rows) => return Some(Some(Ok(rows))),
                Err(error) => {
                    let message = format!("the rest of an open result cannot be read: {error}");
                    return Some(Some(Err(SqlError::new("58030", message))));
                }
            }
        }

        match &mut state.end {
            None => None,
            Some(Ok(())) => Some(None),
            // The error comes once.
            Some(failed) => match std::mem::replace(failed, Ok(())) {
                Ok(()) => Some(None),
                Err(error) => Some(Some(Err(error))),
            },
        }
    }
}

/// Rows in a file that has no name, so that nothing is left of it after a crash.
struct Spool {
    file: File,
    written: u64,
    read: u64,
}

impl Spool {
    fn new(folder: &Path) -> std::io::Result<Self> {
        Ok(Self { file: tempfile::tempfile_in(folder)?, written: 0, read: 0 })
    }

    fn write(&mut self, rows: &[BytesMut]) -> std::io::Result<()> {
        let mut block = Vec::new();
        for row in rows {
            block.extend_from_slice(&(row.len() as u64).to_be_bytes());
            block.extend_from_slice(row);
        }
        self.file.seek(SeekFrom::Start(self.written))?;
        self.file.write_all(&block)?;
        self.written += block.len() as u64;
        Ok(())
    }

    /// Returns about a megabyte of rows, or none when all that were written are read.
    fn read(&mut self) -> std::io::Result<Vec<BytesMut>> {
        let mut rows = Vec::new();
        let mut bytes = 0;
        self.file.seek(SeekFrom::Start(self.read))?;

        let mut from = std::io::BufReader::new(&self.file);
        while self.read < self.written && bytes < MAX_UNREAD {
            let mut length = [0; 8];
            from.read_exact(&mut length)?;
            let length = u64::from_be_bytes(length);

            let mut row = BytesMut::zeroed(length as usize);
            from.read_exact(&mut row)?;
            self.read += 8 + length;
            bytes += row.len();
            rows.push(row);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: u32) -> BytesMut {
        let mut row = BytesMut::zeroed(100_000);
        row[..4].copy_from_slice(&number.to_be_bytes());
        row
    }

    async fn numbers(queue: &RowQueue) -> Vec<u32> {
        let mut found = Vec::new();
        while let Some(rows) = queue.next().await {
            for row in rows.unwrap() {
                assert_eq!(row.len(), 100_000);
                found.push(u32::from_be_bytes(row[..4].try_into().unwrap()));
            }
        }
        found
    }

    #[tokio::test]
    async fn a_result_that_is_read_to_its_end_keeps_its_order_in_memory_and_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let queue = RowQueue::new();
        let mut number = 0;
        while queue.push(vec![row(number)], folder.path()).unwrap() == Pushed::Room {
            number += 1;
        }
        assert!(number < 20, "a client that does not read stops the thread");
        assert!(!queue.wait_for_room(Duration::from_millis(1), || false));

        queue.read_to_end();
        for number in number + 1..200 {
            assert_eq!(queue.push(vec![row(number)], folder.path()).unwrap(), Pushed::Room);
        }
        assert!(queue.lock().bytes < MAX_IN_MEMORY + 200_000);
        queue.finish(Ok(()));
        assert_eq!(numbers(&queue).await, (0..200).collect::<Vec<_>>());
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_abandoned_result_takes_no_more_rows_and_an_error_comes_once() {
        let folder = tempfile::tempdir().unwrap();
        let queue = RowQueue::new();
        queue.finish(Err(SqlError::new("57014", "cancelled")));
        assert_eq!(queue.next().await.unwrap().unwrap_err().code, "57014");
        assert!(queue.next().await.is_none());

        assert!(!queue.abandon());
        assert_eq!(queue.push(vec![row(1)], folder.path()).unwrap(), Pushed::Abandoned);
    }
}
