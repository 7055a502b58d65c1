//! `Lsn`: a position in the source's write-ahead log. No other number in rhei may be called an LSN.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A byte position in the source's WAL, ordered, and printed as PostgreSQL prints `pg_lsn`
/// (`16/B374D848`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// PostgreSQL's `InvalidXLogRecPtr`, printed `0/0`.
    pub const ZERO: Self = Self(0);

    /// Returns the bytes of WAL from `earlier` up to `self`; zero when `earlier` is not earlier.
    pub fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The text is not two hexadecimal numbers of at most 32 bits with a slash between them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid LSN \"{0}\", expected two hexadecimal numbers like 16/B374D848")]
pub struct ParseLsnError(String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let half = |part: &str| {
            let digits_only = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            digits_only.then(|| u32::from_str_radix(part, 16).ok()).flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| {
                Some(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
            })
            .ok_or_else(|| ParseLsnError(text.to_owned()))
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_reads_the_text_form_of_postgres() {
        for (text, value) in
            [("0/0", 0), ("16/B374D848", 0x16_B374_D848), ("FFFFFFFF/FFFFFFFF", u64::MAX)]
        {
            assert_eq!(text.parse::<Lsn>().unwrap(), Lsn(value));
            assert_eq!(Lsn(value).to_string(), text);
        }
    }

    #[test]
    fn refuses_what_is_not_an_lsn() {
        for text in ["", "/", "1", "1/", "/1", "1/2/3", "x/1", "1/100000000", "+1/2", " 1/2"] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?} was taken for an LSN");
        }
    }
}
