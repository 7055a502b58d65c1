//! Rows on their way from the thread that reads them to the client that wants them.
//!
//! A client that reads slowly, or keeps a portal or cursor open, stops the thread: what it has not
//! read yet is bounded. When the session wants to run something else meanwhile, the thread reads on
//! to the end, and what has no room in memory goes into a file without a name. All such files of
//! the process share one limit.

use std::{
    collections::VecDeque,
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::PathBuf,
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
/// Where results are kept that have no room in memory.
pub struct SpoolSpace {
    folder: PathBuf,
    max_bytes: u64,
    used_bytes: AtomicU64,
}

impl SpoolSpace {
    /// `max_bytes` is the limit of all results together.
    pub fn new(folder: PathBuf, max_bytes: u64) -> Arc<Self> {
        Arc::new(Self { folder, max_bytes, used_bytes: AtomicU64::new(0) })
    }

    /// Takes a part of the space. Returns `false` when there is not as much left.
    fn take(&self, bytes: u64) -> bool {
        let taken = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.max_bytes);
        self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }
}

/// Rows of one statement, each as the client gets it.
pub struct RowQueue {
    /// Tells this statement from others of the process.
    pub number: u64,
    /// How many rows were handed over.
    pub rows: AtomicU64,
    space: Arc<SpoolSpace>,
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
    pub fn new(space: Arc<SpoolSpace>) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            rows: AtomicU64::new(0),
            space,
            state: Mutex::default(),
            has_room: Condvar::new(),
            has_rows: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over rows; called by the thread that reads. They are taken also when the queue is full
    /// afterwards.
    ///
    /// # Errors
    /// The rows have to be kept in a file, which has no room for them.
    pub fn push(&self, rows: Vec<BytesMut>) -> Result<Pushed, SqlError> {
        let mut state = self.lock();
        if state.is_abandoned {
            return Ok(Pushed::Abandoned);
        }

        let bytes: usize = rows.iter().map(BytesMut::len).sum();
        if state.spool.is_some() || state.is_urgent && state.bytes + bytes > MAX_IN_MEMORY {
            let spool = state.spool.clone();
            drop(state);
            self.keep_in_file(spool, &rows)?;
            state = self.lock();
        } else {
            state.bytes += bytes;
            state.waiting.push_back(rows);
        }

        let is_full = !state.is_urgent && state.bytes >= MAX_UNREAD;
        drop(state);
        self.has_rows.notify_one();
        Ok(if is_full { Pushed::Full } else { Pushed::Room })
    }

    /// Appends rows to the file. Only the thread that reads does so, and the client does not see
    /// them before they are counted as written, so that the disk is waited for without a lock.
    fn keep_in_file(&self, spool: Option<Spool>, rows: &[BytesMut]) -> Result<(), SqlError> {
        let failed = |error: std::io::Error| {
            SqlError::new("58030", format!("the rest of an open result cannot be kept: {error}"))
        };
        let mut spool = match spool {
            Some(spool) => spool,
            None => Spool::new(&self.space).map_err(failed)?,
        };

        let block = block_of(rows);
        if !spool.file.space.take(block.len() as u64) {
            return Err(SqlError::new("53400", "there is no room for the rest of an open result")
                .hint("rhei.toml, [serve] spool_limit, sets the room for all of them"));
        }
        spool.file.taken.fetch_add(block.len() as u64, Ordering::Relaxed);
        spool.file.file.write_all_at(&block, spool.written).map_err(failed)?;

        spool.written += block.len() as u64;
        let mut state = self.lock();
        spool.read = state.spool.as_ref().map_or(0, |stored| stored.read);
        state.spool = (!state.is_abandoned).then_some(spool);
        Ok(())
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
        state.spool = None;
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

    /// Returns the next rows; `None` after the last ones. One caller at a time.
    pub async fn next(&self) -> Option<Result<Vec<BytesMut>, SqlError>> {
        loop {
            match self.try_next() {
                Next::Rows(rows) => return Some(Ok(rows)),
                Next::InFile(spool) => return Some(self.read_file(spool).await),
                Next::End(end) => return end.map(Err),
                Next::Later => self.has_rows.notified().await,
            }
        }
    }

    fn try_next(&self) -> Next {
        let mut state = self.lock();
        if let Some(rows) = state.waiting.pop_front() {
            state.bytes -= rows.iter().map(BytesMut::len).sum::<usize>();
            self.has_room.notify_all();
            return Next::Rows(rows);
        }
        if let Some(spool) = &state.spool
            && spool.read < spool.written
        {
            return Next::InFile(spool.clone());
        }

        match &mut state.end {
            None => Next::Later,
            // The error comes once.
            Some(end) => Next::End(std::mem::replace(end, Ok(())).err()),
        }
    }

    /// Reads the next rows from the file, which may have to wait for the disk.
    async fn read_file(&self, spool: Spool) -> Result<Vec<BytesMut>, SqlError> {
        let reading = tokio::task::spawn_blocking(move || spool.read());
        let failed = |error: &dyn std::fmt::Display| {
            let message = format!("the rest of an open result cannot be read: {error}");
            SqlError::new("58030", message)
        };
        let (rows, read) =
            reading.await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;

        if let Some(spool) = &mut self.lock().spool {
            spool.read = read;
        }
        Ok(rows)
    }
}

/// What a client gets next.
enum Next {
    Rows(Vec<BytesMut>),
    InFile(Spool),
    End(Option<SqlError>),
    Later,
}

/// Rows in a file, and how far they are written and read.
#[derive(Clone)]
struct Spool {
    file: Arc<SpoolFile>,
    written: u64,
    read: u64,
}

/// A file that has no name, so that nothing is left of it after a crash.
struct SpoolFile {
    file: File,
    space: Arc<SpoolSpace>,
    /// What the file has taken of the space, in bytes.
    taken: AtomicU64,
}

impl Drop for SpoolFile {
    fn drop(&mut self) {
        self.space.used_bytes.fetch_sub(*self.taken.get_mut(), Ordering::Relaxed);
    }
}

impl Spool {
    fn new(space: &Arc<SpoolSpace>) -> std::io::Result<Self> {
        let file = tempfile::tempfile_in(&space.folder)?;
        let file = SpoolFile { file, space: Arc::clone(space), taken: AtomicU64::new(0) };
        Ok(Self { file: Arc::new(file), written: 0, read: 0 })
    }

    /// Returns about a megabyte of rows, and how far the file is read then.
    fn read(&self) -> std::io::Result<(Vec<BytesMut>, u64)> {
        let (mut rows, mut bytes, mut read) = (Vec::new(), 0, self.read);
        let mut from = std::io::BufReader::new(FileFrom { file: &self.file.file, at: read });

        while read < self.written && bytes < MAX_UNREAD {
            let mut length = [0; 8];
            from.read_exact(&mut length)?;
            let length = u64::from_be_bytes(length);

            let mut row = BytesMut::zeroed(length as usize);
            from.read_exact(&mut row)?;
            read += 8 + length;
            bytes += row.len();
            rows.push(row);
        }
        Ok((rows, read))
    }
}

/// Returns rows as they are in a file: each after its length.
fn block_of(rows: &[BytesMut]) -> Vec<u8> {
    let mut block = Vec::with_capacity(rows.iter().map(|row| row.len() + 8).sum());
    for row in rows {
        block.extend_from_slice(&(row.len() as u64).to_be_bytes());
        block.extend_from_slice(row);
    }
    block
}

/// A file from a place on, which other threads use meanwhile.
struct FileFrom<'a> {
    file: &'a File,
    at: u64,
}

impl Read for FileFrom<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read_at(to, self.at)?;
        self.at += count as u64;
        Ok(count)
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

    fn queue(folder: &std::path::Path, max_bytes: u64) -> Arc<RowQueue> {
        RowQueue::new(SpoolSpace::new(folder.to_owned(), max_bytes))
    }

    #[tokio::test]
    async fn a_result_that_is_read_to_its_end_keeps_its_order_in_memory_and_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let queue = queue(folder.path(), 1 << 30);
        let mut number = 0;
        while queue.push(vec![row(number)]).unwrap() == Pushed::Room {
            number += 1;
        }
        assert!(number < 20, "a client that does not read stops the thread");
        assert!(!queue.wait_for_room(Duration::from_millis(1), || false));

        queue.read_to_end();
        for number in number + 1..200 {
            assert_eq!(queue.push(vec![row(number)]).unwrap(), Pushed::Room);
        }
        assert!(queue.lock().bytes < MAX_IN_MEMORY + 200_000);
        queue.finish(Ok(()));
        assert_eq!(numbers(&queue).await, (0..200).collect::<Vec<_>>());
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }

    #[tokio::test]
    async fn rows_are_read_from_a_file_that_is_still_written() {
        let folder = tempfile::tempdir().unwrap();
        let queue = queue(folder.path(), 1 << 30);
        queue.read_to_end();
        let writing = Arc::clone(&queue);
        let writer = std::thread::spawn(move || {
            for number in 0..400 {
                writing.push(vec![row(number)]).unwrap();
            }
            writing.finish(Ok(()));
        });
        assert_eq!(numbers(&queue).await, (0..400).collect::<Vec<_>>());
        writer.join().unwrap();
    }

    #[test]
    fn open_results_share_one_limit_and_give_their_room_back() {
        let folder = tempfile::tempdir().unwrap();
        let space = SpoolSpace::new(folder.path().to_owned(), 10 << 20);
        let fill = |queue: &RowQueue| {
            queue.read_to_end();
            (0..1000).find_map(|number| queue.push(vec![row(number)]).err())
        };

        let first = RowQueue::new(Arc::clone(&space));
        assert_eq!(fill(&first).unwrap().code, "53400");
        let second = RowQueue::new(Arc::clone(&space));
        assert!(fill(&second).is_some());
        assert!(space.used_bytes.load(Ordering::Relaxed) > 9 << 20);

        first.abandon();
        drop(second);
        assert_eq!(space.used_bytes.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn an_abandoned_result_takes_no_more_rows_and_an_error_comes_once() {
        let folder = tempfile::tempdir().unwrap();
        let queue = queue(folder.path(), 1 << 30);
        queue.finish(Err(SqlError::new("57014", "cancelled")));
        assert_eq!(queue.next().await.unwrap().unwrap_err().code, "57014");
        assert!(queue.next().await.is_none());

        assert!(!queue.abandon());
        assert_eq!(queue.push(vec![row(1)]).unwrap(), Pushed::Abandoned);
    }
}
