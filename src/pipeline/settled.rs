//! The position up to which everything is in the copy, also what the stream never mentions.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::Lsn;

/// The settled position, which never falls. Shared by the session, which moves it on, and `status`.
#[derive(Debug, Clone, Default)]
pub struct SettledLsn(Arc<AtomicU64>);

impl SettledLsn {
    pub(crate) fn raise(&self, lsn: Lsn) {
        self.0.fetch_max(lsn.0, Ordering::Relaxed);
    }

    /// Returns the settled position, or `None` when nothing is settled since this process began.
    pub fn get(&self) -> Option<Lsn> {
        Some(Lsn(self.0.load(Ordering::Relaxed))).filter(|lsn| *lsn > Lsn::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settled_position_never_falls_and_is_none_at_first() {
        let settled = SettledLsn::default();
        assert_eq!(settled.get(), None);

        for (raised_to, expected) in [(0, None), (5, Some(5)), (3, Some(5)), (8, Some(8))] {
            settled.clone().raise(Lsn(raised_to));
            assert_eq!(settled.get(), expected.map(Lsn), "raised to {raised_to}");
        }
    }
}
