//! Stores the bytes of rows one after another.

use crate::pgoutput::tuple::Tuple;
/// The bytes of one batch, in blocks that never move.
#[derive(Debug, Default)]
pub struct Arena {
    pub(super) blocks: Vec<Vec<u8>>,
    pub(super) bytes: usize,
    /// The part of `bytes` that no slice refers to any more.
    pub(super) wasted: usize,
    /// The number of rows that lack values, less those that no slice refers to any more.
    pub(super) open_rows: usize,
}

/// A piece of an [`Arena`].
#[derive(Debug, Clone, Copy)]
pub struct Slice {
    pub(super) block: u32,
    pub(super) start: u32,
    /// The highest bit is set for a row that lacks values.
    pub(super) length: u32,
}

pub(super) const OPEN: u32 = 1 << 31;

/// The size that the memory budget assumes for the values that a row lacks; the target reads these
/// values and writes them again. PostgreSQL stores no shorter value out of line. Many values are
/// longer, but the target may have to read all values of a table for each batch, so batches of a
/// few rows would cost more than memory that DuckDB can spill.
pub(super) const OPEN_BYTES: usize = 2 << 10;

impl Slice {
    pub(super) const NOTHING: Self = Self { block: 0, start: 0, length: 0 };

    /// Returns whether the wire left out some values of the row.
    pub fn has_unchanged_toast(self) -> bool {
        self.length & OPEN != 0
    }

    pub(super) fn length(self) -> usize {
        (self.length & !OPEN) as usize
    }
}

pub(super) const BLOCK_BYTES: usize = 1 << 20;

/// The number of wasted bytes that is acceptable, however few bytes are in use.
pub(super) const WASTED_BYTES: usize = 16 << 20;

impl Arena {
    /// Returns a block with room for `length` more bytes.
    pub(super) fn block(&mut self, length: usize) -> (u32, &mut Vec<u8>) {
        let fits = self.blocks.last().is_some_and(|block| block.capacity() - block.len() >= length);
        if !fits {
            self.blocks.push(Vec::with_capacity(length.max(BLOCK_BYTES)));
        }

        let last = self.blocks.len() - 1;
        (last as u32, &mut self.blocks[last])
    }

    /// Copies the bytes of a key into the arena. They come from one message, which is shorter than
    /// 2 GiB.
    pub fn store(&mut self, bytes: &[u8]) -> Slice {
        self.bytes += bytes.len();
        let (block, room) = self.block(bytes.len());
        let start = room.len() as u32;
        room.extend_from_slice(bytes);
        Slice { block, start, length: bytes.len() as u32 & !OPEN }
    }

    /// Copies the bytes of a row into the arena; the row itself records whether values are missing.
    pub fn store_row(&mut self, row: Tuple<'_>) -> Slice {
        let slice = self.store(row.bytes());
        self.count_open(if row.has_unchanged() {
            Slice { length: slice.length | OPEN, ..slice }
        } else {
            slice
        })
    }

    /// Copies a row from another arena.
    pub fn copy_from(&mut self, from: &Self, row: Slice) -> Slice {
        let slice = self.store(from.get(row));
        self.count_open(Slice { length: slice.length | row.length & OPEN, ..slice })
    }

    pub(super) fn count_open(&mut self, row: Slice) -> Slice {
        self.open_rows += usize::from(row.has_unchanged_toast());
        row
    }

    pub fn get(&self, slice: Slice) -> &[u8] {
        let start = slice.start as usize;
        self.blocks
            .get(slice.block as usize)
            .and_then(|block| block.get(start..start + slice.length()))
            .unwrap_or(&[])
    }

    /// Counts the bytes of a slice that is no longer referred to as wasted.
    pub(super) fn mark_garbage(&mut self, slice: Slice) {
        self.wasted += slice.length();
        self.open_rows = self.open_rows.saturating_sub(usize::from(slice.has_unchanged_toast()));
    }

    /// Returns whether more bytes are wasted than in use, and enough of them to be worth the work.
    pub fn wants_compaction(&self) -> bool {
        self.wasted > WASTED_BYTES && self.wasted > self.bytes / 2
    }

    /// Returns the stored bytes plus the bytes that applying them will take, for the memory budget.
    pub fn len(&self) -> usize {
        self.bytes + self.open_rows * OPEN_BYTES
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}
