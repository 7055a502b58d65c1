//! A bounded history for the status page: how lag, throughput, latency and memory went.

use std::collections::VecDeque;

use serde_json::{Value, json};

/// How often a sample is taken, and how many are kept: six hours.
pub const EVERY_SECONDS: u64 = 5;
const MAX_SAMPLES: usize = 4320;

/// What a sample holds; none where it was not known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sample {
    /// Seconds since 1970.
    pub at: u64,
    pub lag_seconds: Option<f64>,
    pub lag_bytes: Option<u64>,
    /// Row changes of the source that were applied in a second, since the sample before.
    pub changes: Option<f64>,
    /// Rows that copies have read in a second, since the sample before.
    pub copied: Option<f64>,
    /// Seconds from commit to visible over the last one to two minutes: half-way, and 99 %.
    pub latency_p50: Option<f64>,
    pub latency_p99: Option<f64>,
    pub resident_bytes: Option<u64>,
    pub duckdb_bytes: Option<u64>,
    pub buffer_bytes: u64,
}

/// The history. Each sample has a number, so that a page asks only for those that it does not have.
#[derive(Debug, Default)]
pub struct Samples {
    kept: VecDeque<Sample>,
    /// The number of the next sample.
    next: u64,
}

impl Samples {
    /// Adds a sample; the oldest one goes when there are too many.
    pub fn push(&mut self, sample: Sample) {
        if self.kept.len() == MAX_SAMPLES {
            self.kept.pop_front();
        }
        self.kept.push_back(sample);
        self.next += 1;
    }

    /// Returns the samples from a number on, column by column.
    pub fn describe(&self, from: u64) -> Value {
        let first = self.next - self.kept.len() as u64;
        let skipped = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX);
        let new: Vec<&Sample> = self.kept.iter().skip(skipped).collect();

        let rounded = |value: Option<f64>| value.map(|value| (value * 1e4).round() / 1e4);
        let column = |of: &dyn Fn(&Sample) -> Value| new.iter().map(|sample| of(sample)).collect();
        let column = |of: &dyn Fn(&Sample) -> Value| -> Vec<Value> { column(of) };

        json!({
            "every_seconds": EVERY_SECONDS,
            "next": self.next,
            "at": column(&|sample| json!(sample.at)),
            "lag_seconds": column(&|sample| json!(rounded(sample.lag_seconds))),
            "lag_bytes": column(&|sample| json!(sample.lag_bytes)),
            "changes": column(&|sample| json!(rounded(sample.changes))),
            "copied": column(&|sample| json!(rounded(sample.copied))),
            "latency_p50": column(&|sample| json!(rounded(sample.latency_p50))),
            "latency_p99": column(&|sample| json!(rounded(sample.latency_p99))),
            "resident_bytes": column(&|sample| json!(sample.resident_bytes)),
            "duckdb_bytes": column(&|sample| json!(sample.duckdb_bytes)),
            "buffer_bytes": column(&|sample| json!(sample.buffer_bytes)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_is_bounded_and_a_page_gets_what_it_does_not_have() {
        let mut samples = Samples::default();
        let at = |samples: &Samples, from| samples.describe(from)["at"].as_array().unwrap().len();
        assert_eq!(at(&samples, 0), 0);

        for number in 0..MAX_SAMPLES as u64 + 10 {
            samples.push(Sample { at: number, ..Sample::default() });
        }
        assert_eq!(at(&samples, 0), MAX_SAMPLES);
        let next = samples.describe(0)["next"].as_u64().unwrap();
        assert_eq!((next, at(&samples, next - 3), at(&samples, next)), (4330, 3, 0));
        // A page of a process that has ended asks for more than there is.
        assert_eq!(at(&samples, next + 100), 0);
        assert_eq!(samples.describe(next - 1)["at"][0], 4329);
    }
}
