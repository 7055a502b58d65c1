//! When a long run verifies its copy by itself.

#![deny(missing_docs)]

use std::{str::FromStr, time::Duration};

const MINUTES_OF_A_DAY: u32 = 24 * 60;

/// The settings of verifications that begin by themselves.
#[derive(Debug, Clone, Default)]
pub struct VerificationSchedule {
    /// The time from the end of one verification to the beginning of the next one; none: no
    /// verification begins by itself.
    pub interval: Option<Duration>,
    /// The share of the rows of each table that one verification compares.
    pub sample: Share,
    /// The time of the day at which a verification may begin; none: at any time.
    pub window: Option<Window>,
    /// The most bytes of tables a second that the source reads for a verification.
    pub rate_limit_bytes: Option<u64>,
}

/// The share of a table's rows that one verification compares: one of a number of equal parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u32);

impl Share {
    /// Returns the number of parts, of which one is compared; at least 1.
    pub fn parts(self) -> u32 {
        self.0.max(1)
    }
}

impl Default for Share {
    fn default() -> Self {
        Self(1)
    }
}

impl FromStr for Share {
    type Err = String;

    /// Parses a percentage, as `5%` or `0.1`. A share that is not the whole divided by a number is
    /// made a little larger.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').unwrap_or(text).trim();
        let percent: f64 =
            number.parse().map_err(|_| "it has to be a number and a % sign".to_owned())?;
        if !(0.001..=100.0).contains(&percent) {
            return Err("it has to be between 0.001% and 100%".to_owned());
        }
        Ok(Self((100.0 / percent).floor() as u32))
    }
}

/// A time of the day in UTC, which may go over midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The minutes of the day at which the window begins and ends.
    from: u32,
    until: u32,
}

impl Window {
    /// Returns whether a moment is in the window, by its seconds since 1970.
    pub fn has(self, seconds: u64) -> bool {
        let minute = (seconds / 60 % u64::from(MINUTES_OF_A_DAY)) as u32;
        if self.from <= self.until {
            (self.from..self.until).contains(&minute)
        } else {
            !(self.until..self.from).contains(&minute)
        }
    }
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "it has to be two times like 02:00-05:00".to_owned();
        let (from, until) = text.split_once('-').ok_or_else(wrong)?;
        let minute = |text: &str| {
            let (hours, minutes) = text.trim().split_once(':').ok_or_else(wrong)?;
            let (hours, minutes): (u32, u32) =
                (hours.parse().map_err(|_| wrong())?, minutes.parse().map_err(|_| wrong())?);
            match (hours, minutes) {
                (0..=23, 0..=59) | (24, 0) => Ok(hours * 60 + minutes),
                _ => Err(wrong()),
            }
        };

        let window = Self { from: minute(from)?, until: minute(until)? };
        if window.from == window.until {
            return Err("it has to have a length".to_owned());
        }
        Ok(window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_one_of_equal_parts_and_not_smaller_than_asked() {
        for (text, parts) in [("100%", 1), ("50 %", 2), ("5", 20), ("30%", 3), ("0.1%", 1000)] {
            assert_eq!(text.parse::<Share>().unwrap().parts(), parts, "{text}");
        }
        for text in ["0%", "101%", "", "%", "a lot", "nan", "-5%"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_window_may_go_over_midnight() {
        let at = |hours: u64, minutes: u64| 86_400 * 20_000 + hours * 3600 + minutes * 60;
        for (text, inside, outside) in [
            ("02:00-05:00", at(2, 0), at(5, 0)),
            ("23:30-00:15", at(0, 14), at(0, 15)),
            ("23:30-00:15", at(23, 30), at(23, 29)),
            ("22:00-24:00", at(23, 59), at(0, 0)),
        ] {
            let window: Window = text.parse().unwrap();
            assert!(window.has(inside), "{text}");
            assert!(!window.has(outside), "{text}");
        }
        for text in ["02:00", "2-5", "25:00-03:00", "02:60-03:00", "02:00-02:00", ""] {
            assert!(text.parse::<Window>().is_err(), "{text}");
        }
    }
}
