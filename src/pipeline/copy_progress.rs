//! The progress of copies, for all displays: bars, logs, `status`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use serde::Serialize;

use crate::change::TableSpec;

/// Shared by workers, which write, and displays, which read.
#[derive(Debug, Clone, Default)]
pub struct CopyProgress {
    copies: Arc<Mutex<Copies>>,
    is_paused: Arc<AtomicBool>,
    is_stream_late: Arc<AtomicBool>,
}

/// The copies that are under way, and what became of those that began with them.
#[derive(Debug, Clone, Default)]
struct Copies {
    tables: BTreeMap<u32, TableProgress>,
    /// The tables that have ended since there was no copy under way, added up. It keeps the total
    /// from going backwards when a table ends.
    ended: Option<TableProgress>,
    tables_begun: usize,
    tables_done: usize,
}

#[derive(Debug, Clone)]
struct TableProgress {
    table: String,
    began: Instant,
    /// When the first rows arrived; none while the table waits for its turn.
    started: Option<Instant>,
    estimated_rows: u64,
    /// Rows of an earlier round.
    resumed_rows: u64,
    rows: u64,
    bytes: u64,
    chunks: usize,
    chunks_done: usize,
}

/// The progress of one copy, or of all copies together.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Figures {
    pub rows: u64,
    /// The number of rows in the source's statistics, which may be off.
    pub estimated_rows: u64,
    /// Bytes as they came over the wire.
    pub bytes: u64,
    pub chunks: usize,
    pub chunks_done: usize,
    pub seconds: f64,
    pub megabytes_per_second: f64,
    /// None until the copy has rows to estimate from.
    pub seconds_left: Option<f64>,
}

/// What a display shows of all copies since there was none under way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overview {
    /// The tables that rows arrive of, in the order in which they started.
    pub copying: Vec<(String, Figures)>,
    pub tables: usize,
    /// The tables of which all chunks are loaded.
    pub tables_done: usize,
    /// The tables that are copied or wait for their turn. A table that failed is neither done nor
    /// left.
    pub tables_left: usize,
    /// All tables together, including those that have ended.
    pub total: Figures,
}

impl CopyProgress {
    fn lock(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_paused(&self, is_paused: bool) {
        self.is_paused.store(is_paused, Ordering::Relaxed);
    }

    /// Returns whether copies are paused, as the operator asked.
    pub fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    /// Records whether the stream's last cycle took longer than it should: then copies use
    /// resources that the stream needs.
    pub fn set_stream_late(&self, is_late: bool) {
        self.is_stream_late.store(is_late, Ordering::Relaxed);
    }

    pub fn is_stream_late(&self) -> bool {
        self.is_stream_late.load(Ordering::Relaxed)
    }

    /// Records that the copy of a table begins, or goes on with rows that an earlier round has
    /// copied.
    pub fn begin(&self, spec: &TableSpec, estimated_rows: u64, chunks: usize, resumed_rows: u64) {
        let copying = TableProgress {
            table: spec.source.to_string(),
            estimated_rows,
            resumed_rows,
            chunks,
            ..TableProgress::new(Instant::now())
        };

        let mut copies = self.lock();
        if copies.tables.is_empty() {
            *copies = Copies::default();
        }
        copies.tables_begun += 1;
        copies.tables.insert(spec.oid, copying);
    }

    pub fn add(&self, oid: u32, rows: u64, bytes: u64) {
        if let Some(copying) = self.lock().tables.get_mut(&oid) {
            copying.started.get_or_insert_with(Instant::now);
            copying.rows += rows;
            copying.bytes += bytes;
        }
    }

    pub fn chunk_done(&self, oid: u32) {
        if let Some(copying) = self.lock().tables.get_mut(&oid) {
            copying.chunks_done += 1;
        }
    }

    /// Records that the copy of a table has ended, whether it succeeded or not.
    pub fn end(&self, oid: u32) {
        let mut copies = self.lock();
        let Some(copying) = copies.tables.remove(&oid) else { return };

        copies.tables_done += usize::from(copying.is_done());
        let total = copies.ended.take().unwrap_or_else(|| TableProgress::new(copying.began));
        copies.ended = Some(total.plus(&copying.as_ended()));
    }

    /// Returns the progress by table, and in total; none when nothing is being copied.
    pub fn progress(&self) -> Option<(BTreeMap<String, Figures>, Figures)> {
        let all = self.lock().tables.clone();
        let first = all.values().map(|copying| copying.began).min()?;

        let total = all.values().fold(TableProgress::new(first), TableProgress::plus);
        let tables =
            all.values().map(|copying| (copying.table.clone(), copying.progress())).collect();
        Some((tables, total.progress()))
    }

    /// Returns what a display shows; after the last copy has ended still how it ended. None before
    /// the first copy.
    pub fn overview(&self) -> Option<Overview> {
        let copies = self.lock().clone();
        let Copies { tables, ended, tables_begun, tables_done } = copies;

        let began = tables.values().chain(&ended).map(|copying| copying.began).min()?;
        let total =
            tables.values().chain(&ended).fold(TableProgress::new(began), TableProgress::plus);

        let (done, left): (Vec<_>, Vec<_>) = tables.values().partition(|it| it.is_done());
        let mut copying: Vec<_> =
            left.iter().filter_map(|table| Some((table.started?, *table))).collect();
        copying.sort_by_key(|(started, _)| *started);

        Some(Overview {
            copying: copying
                .into_iter()
                .map(|(_, copying)| (copying.table.clone(), copying.progress()))
                .collect(),
            tables: tables_begun,
            tables_done: tables_done + done.len(),
            tables_left: left.len(),
            total: total.progress(),
        })
    }
}

impl TableProgress {
    fn new(began: Instant) -> Self {
        Self {
            table: String::new(),
            began,
            started: None,
            estimated_rows: 0,
            resumed_rows: 0,
            rows: 0,
            bytes: 0,
            chunks: 0,
            chunks_done: 0,
        }
    }

    /// Adds a table to a total.
    fn plus(self, copying: &Self) -> Self {
        Self {
            estimated_rows: self.estimated_rows
                + copying.estimated_rows.max(copying.resumed_rows + copying.rows),
            resumed_rows: self.resumed_rows + copying.resumed_rows,
            rows: self.rows + copying.rows,
            bytes: self.bytes + copying.bytes,
            chunks: self.chunks + copying.chunks,
            chunks_done: self.chunks_done + copying.chunks_done,
            ..self
        }
    }

    fn is_done(&self) -> bool {
        self.chunks_done >= self.chunks
    }

    /// Nothing is left of a table that has ended, whatever the source's statistics said of it.
    fn as_ended(&self) -> Self {
        Self { estimated_rows: self.resumed_rows + self.rows, ..self.clone() }
    }

    fn progress(&self) -> Figures {
        let seconds = self.began.elapsed().as_secs_f64();
        let rows = self.resumed_rows + self.rows;
        let left = self.estimated_rows.saturating_sub(rows) as f64;
        Figures {
            rows,
            estimated_rows: self.estimated_rows,
            bytes: self.bytes,
            chunks: self.chunks,
            chunks_done: self.chunks_done,
            seconds,
            megabytes_per_second: if seconds > 0.0 {
                self.bytes as f64 / 1e6 / seconds
            } else {
                0.0
            },
            seconds_left: (self.rows > 0).then(|| left * seconds / self.rows as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures of a table of 100 rows in two chunks.
    fn begun(progress: &CopyProgress, oid: u32) {
        let copying = TableProgress {
            table: format!("public.t{oid}"),
            estimated_rows: 100,
            chunks: 2,
            ..TableProgress::new(Instant::now())
        };
        let mut copies = progress.lock();
        copies.tables_begun += 1;
        copies.tables.insert(oid, copying);
    }

    #[test]
    fn the_total_keeps_the_tables_that_have_ended() {
        let progress = CopyProgress::default();
        assert_eq!(progress.overview(), None);
        (1..=3).for_each(|oid| begun(&progress, oid));

        progress.add(2, 40, 400);
        progress.add(1, 90, 900);
        let overview = progress.overview().unwrap();
        let names: Vec<_> = overview.copying.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["public.t2", "public.t1"]);
        assert_eq!((overview.tables, overview.tables_done, overview.tables_left), (3, 0, 3));

        // One is done, one fails, and one has loaded all its chunks.
        (0..2).for_each(|_| progress.chunk_done(1));
        progress.end(1);
        progress.end(2);
        (0..2).for_each(|_| progress.chunk_done(3));
        let overview = progress.overview().unwrap();
        assert_eq!((overview.tables, overview.tables_done, overview.tables_left), (3, 2, 0));
        assert_eq!((overview.total.rows, overview.total.bytes), (130, 1300));
        assert_eq!(progress.progress().unwrap().1.rows, 0);

        progress.end(3);
        assert_eq!(progress.overview().unwrap().tables_done, 2);
        assert_eq!(progress.progress(), None);
    }
}
