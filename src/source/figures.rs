//! What a stream tells of itself while it runs, for those who watch it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::Lsn;

/// Positions and sizes of the stream, which its tasks write, and which anybody reads at any time,
/// also while a batch is applied. They outlive one stream; positions never fall.
#[derive(Debug, Clone, Default)]
pub struct StreamFigures(Arc<Values>);

#[derive(Debug, Default)]
struct Values {
    sent: AtomicU64,
    received: AtomicU64,
    decoded: AtomicU64,
    acknowledged: AtomicU64,
    received_bytes: AtomicU64,
    queued_bytes: AtomicU64,
    taken_bytes: AtomicU64,
    batch_bytes: AtomicU64,
    spooled_bytes: AtomicU64,
}

impl StreamFigures {
    /// Records that a stream begins, with an empty queue.
    pub(crate) fn begin(&self, checkpoint: Lsn) {
        self.0.queued_bytes.store(0, Ordering::Relaxed);
        self.0.taken_bytes.store(0, Ordering::Relaxed);
        self.set_held(0, 0);
        raise(&self.0.acknowledged, checkpoint);
        self.raise_decoded(checkpoint);
    }

    /// Records messages that wait to be decoded. `position` is that of the first of them, if it
    /// has one.
    pub(crate) fn queue(&self, bytes: usize, position: Option<Lsn>) {
        self.0.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.0.queued_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(position) = position {
            raise(&self.0.received, position);
        }
    }

    /// Records messages that wait no longer.
    pub(crate) fn take(&self, bytes: usize) {
        self.0.taken_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Records how far the server says that it has come.
    pub(crate) fn raise_sent(&self, lsn: Lsn) {
        raise(&self.0.sent, lsn);
    }

    /// Records the end of the last source transaction that arrived whole.
    pub(crate) fn raise_decoded(&self, lsn: Lsn) {
        raise(&self.0.decoded, lsn);
        raise(&self.0.received, lsn);
        raise(&self.0.sent, lsn);
    }

    /// Records what is acknowledged to the server as durable.
    pub(crate) fn raise_acknowledged(&self, lsn: Lsn) {
        raise(&self.0.acknowledged, lsn);
    }

    /// Records the bytes of the batch that is decoded, and those of transactions on disk that have
    /// not ended.
    pub(crate) fn set_held(&self, batch_bytes: u64, spooled_bytes: u64) {
        self.0.batch_bytes.store(batch_bytes, Ordering::Relaxed);
        self.0.spooled_bytes.store(spooled_bytes, Ordering::Relaxed);
    }

    /// Returns how far the server has sent WAL.
    pub fn sent(&self) -> Lsn {
        Lsn(self.0.sent.load(Ordering::Relaxed))
    }

    /// Returns about how far WAL has been received: the position of a message that began a block of
    /// up to 64 kB, or the end of a transaction that is decoded.
    pub fn received(&self) -> Lsn {
        Lsn(self.0.received.load(Ordering::Relaxed))
    }

    /// Returns the end of the last source transaction that arrived whole.
    pub fn decoded(&self) -> Lsn {
        Lsn(self.0.decoded.load(Ordering::Relaxed))
    }

    /// Returns the LSN that was acknowledged to the server as durable.
    pub fn acknowledged(&self) -> Lsn {
        Lsn(self.0.acknowledged.load(Ordering::Relaxed))
    }

    /// Returns the bytes that were received since the process began.
    pub fn received_bytes(&self) -> u64 {
        self.0.received_bytes.load(Ordering::Relaxed)
    }

    /// Returns the bytes that wait to be decoded.
    pub fn queue_bytes(&self) -> u64 {
        let taken = self.0.taken_bytes.load(Ordering::Relaxed);
        self.0.queued_bytes.load(Ordering::Relaxed).saturating_sub(taken)
    }

    /// Returns the bytes of the batch that is decoded now.
    pub fn batch_bytes(&self) -> u64 {
        self.0.batch_bytes.load(Ordering::Relaxed)
    }

    /// Returns the bytes on disk of transactions that have not ended at the source.
    pub fn spooled_bytes(&self) -> u64 {
        self.0.spooled_bytes.load(Ordering::Relaxed)
    }
}

fn raise(place: &AtomicU64, lsn: Lsn) {
    place.fetch_max(lsn.0, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rung_of_the_ladder_is_at_least_as_high_as_the_rung_after_it() {
        let figures = StreamFigures::default();
        figures.begin(Lsn(5));
        figures.queue(100, Some(Lsn(9)));
        figures.raise_decoded(Lsn(7));

        let ladder = || {
            [figures.sent(), figures.received(), figures.decoded(), figures.acknowledged()]
                .map(|lsn| lsn.0)
        };
        assert_eq!(ladder(), [7, 9, 7, 5]);
        figures.raise_sent(Lsn(12));
        figures.raise_acknowledged(Lsn(6));
        assert_eq!(ladder(), [12, 9, 7, 6]);

        figures.begin(Lsn(3));
        assert_eq!(ladder(), [12, 9, 7, 6], "positions never fall");
    }

    #[test]
    fn the_queue_holds_what_was_received_and_not_taken_and_a_new_stream_has_none() {
        let figures = StreamFigures::default();
        figures.queue(100, None);
        figures.take(60);
        assert_eq!((figures.queue_bytes(), figures.received_bytes()), (40, 100));

        figures.begin(Lsn(1));
        assert_eq!((figures.queue_bytes(), figures.received_bytes()), (0, 100));
    }
}
