//! When the source's end was where: from it follows how many seconds a position lies behind.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::Lsn;

/// Looks that are kept. When there are more, every second one of the older half is forgotten.
const MAX_LOOKS: usize = 4096;

/// The time over which the speed of the source's WAL is measured.
const SPEED_WINDOW: Duration = Duration::from_secs(600);

/// Looks at the source's end, oldest first.
#[derive(Debug, Default)]
pub struct Heads(VecDeque<(Instant, Lsn)>);

impl Heads {
    /// Records a look.
    pub fn push(&mut self, at: Instant, head: Lsn) {
        // Another server has taken over, or one that was restored.
        if self.last().is_some_and(|last| head < last) {
            self.0.clear();
        }

        // Of looks that found the same position, the first and the last one say everything.
        let is_same = |back: usize| {
            let index = self.0.len().checked_sub(back);
            index.and_then(|index| self.0.get(index)).is_some_and(|(_, lsn)| *lsn == head)
        };
        if is_same(1) && is_same(2) {
            self.0.pop_back();
        }
        self.0.push_back((at, head));

        if self.0.len() > MAX_LOOKS {
            let mut number = 0;
            self.0.retain(|_| {
                number += 1;
                number > MAX_LOOKS / 2 || number % 2 == 1
            });
        }
    }

    /// Returns the source's end at the last look.
    pub fn last(&self) -> Option<Lsn> {
        self.0.back().map(|(_, head)| *head)
    }

    /// Returns for how long the source has been ahead of a position; nothing when it is not. It is
    /// at least that long if the position is older than all looks. `None` before the first look.
    pub fn behind(&self, position: Lsn, now: Instant) -> Option<Duration> {
        let (_, head) = self.0.back()?;
        if position >= *head {
            return Some(Duration::ZERO);
        }

        let after = self.0.partition_point(|(_, head)| *head <= position);
        let (end, end_head) = self.0.get(after)?;
        let left = match after.checked_sub(1).and_then(|before| self.0.get(before)) {
            // The WAL between two looks is taken to have come evenly.
            Some((begin, begin_head)) => {
                let share = position.bytes_since(*begin_head) as f64
                    / end_head.bytes_since(*begin_head) as f64;
                *begin + end.duration_since(*begin).mul_f64(share.clamp(0.0, 1.0))
            }
            None => *end,
        };
        Some(now.saturating_duration_since(left))
    }

    /// Returns the bytes of WAL that the source has lately written in a second.
    pub fn bytes_per_second(&self) -> Option<f64> {
        let (end, end_head) = self.0.back()?;
        let recent = |(at, _): &&(Instant, Lsn)| end.duration_since(*at) <= SPEED_WINDOW;
        let (begin, begin_head) = self.0.iter().find(recent)?;

        let seconds = end.duration_since(*begin).as_secs_f64();
        (seconds > 0.0).then(|| end_head.bytes_since(*begin_head) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_behind_since_the_source_left_it() {
        let began = Instant::now();
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        let mut heads = Heads::default();
        assert_eq!(heads.behind(Lsn(1), began), None);

        for (seconds, head) in [(0, 100), (10, 200), (20, 200), (30, 200), (40, 400)] {
            heads.push(at(seconds), Lsn(head));
        }
        assert_eq!(heads.0.len(), 4, "{heads:?}");

        for (position, seconds) in
            [(400, 0), (500, 0), (300, 15), (200, 20), (150, 45), (100, 50), (50, 50)]
        {
            let behind = heads.behind(Lsn(position), at(50)).unwrap();
            assert_eq!(behind, Duration::from_secs(seconds), "position {position}");
        }
        assert_eq!(heads.bytes_per_second(), Some(7.5));
    }

    #[test]
    fn many_looks_stay_within_the_limit_and_reach_back_to_the_first() {
        let began = Instant::now();
        let mut heads = Heads::default();
        for number in 0..20_000 {
            heads.push(began + Duration::from_secs(number), Lsn(number * 10));
        }
        assert!(heads.0.len() <= MAX_LOOKS);

        let now = began + Duration::from_secs(20_000);
        assert_eq!(heads.behind(Lsn(0), now), Some(Duration::from_secs(20_000)));
        assert_eq!(heads.behind(Lsn(199_980), now), Some(Duration::from_secs(2)));
    }
}
