//! The transactions that a snapshot of the server sees.

use std::collections::BTreeSet;

/// The transactions that a snapshot of the server sees, as `pg_current_snapshot()` prints them:
/// `xmin:xmax:xip,..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XidSnapshot {
    /// Every transaction before this number has ended.
    oldest: u64,
    /// No transaction from this number on has ended.
    next: u64,
    /// The transactions between the two numbers that had not ended.
    in_progress: BTreeSet<u64>,
}

impl XidSnapshot {
    /// Reads the text, and returns none when it is not in the form that the server prints.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (oldest, next) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let in_progress = parts.next()?.split(',').filter(|xid| !xid.is_empty());
        let in_progress = in_progress.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        Some(Self { oldest, next, in_progress })
    }

    /// Returns the text that [`Self::parse`] reads.
    pub fn text(&self) -> String {
        let in_progress: Vec<String> = self.in_progress.iter().map(ToString::to_string).collect();
        format!("{}:{}:{}", self.oldest, self.next, in_progress.join(","))
    }

    /// Returns whether the changes of a committed transaction are visible. The stream names
    /// transactions by the low 32 bits of their number; a transaction that the stream can still
    /// send is less than 2^31 transactions away. 0 is no transaction.
    ///
    /// A walsender sends a transaction as soon as its commit record is flushed. With a synchronous
    /// standby the transaction becomes visible only after the standby's answer (trap 9).
    pub fn sees(&self, xid: u32) -> bool {
        if xid == 0 {
            return true;
        }

        let distance = xid.wrapping_sub(self.next as u32) as i32;
        let full = self.next.wrapping_add_signed(i64::from(distance));
        full < self.oldest || (full < self.next && !self.in_progress.contains(&full))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_sees_what_had_ended_before_it_in_every_epoch() {
        for epoch in [0_u64, 1 << 32, 7 << 32] {
            let at = |xid: u64| epoch + xid;
            let text = format!("{}:{}:{},{}", at(1000), at(1010), at(1000), at(1005));
            let snapshot = XidSnapshot::parse(&text).unwrap();
            assert_eq!(snapshot.text(), text);
            let seen: Vec<u32> = (995..1015).filter(|&xid| snapshot.sees(xid)).collect();
            assert_eq!(
                seen,
                [995, 996, 997, 998, 999, 1001, 1002, 1003, 1004, 1006, 1007, 1008, 1009]
            );
        }
    }

    #[test]
    fn numbers_that_wrapped_are_told_from_those_to_come() {
        // 3 is the first ordinary number of a new epoch.
        let next = (5_u64 << 32) + 10;
        let snapshot = XidSnapshot::parse(&format!("{next}:{next}:")).unwrap();
        assert!(
            snapshot.sees(u32::MAX)
                && snapshot.sees(9)
                && !snapshot.sees(10)
                && !snapshot.sees(1000)
        );

        let next = (5_u64 << 32) - 2;
        let snapshot = XidSnapshot::parse(&format!("{next}:{next}:")).unwrap();
        assert!(!snapshot.sees(u32::MAX) && !snapshot.sees(9) && snapshot.sees(u32::MAX - 2));
    }

    #[test]
    fn what_is_no_snapshot_is_not_read_as_one() {
        for text in ["", "1", "1:2", "a:b:", "1:2:x"] {
            assert_eq!(XidSnapshot::parse(text), None, "{text}");
        }
    }
}
