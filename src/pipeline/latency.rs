//! How long it takes from a commit at the source until readers of the copy can see it, for each
//! transaction, and how long single commits into DuckDB take.
//!
//! Both ends are clocks: where source and copy are different machines, the difference of their
//! clocks is included.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Microseconds from 1970 to 2000, where PostgreSQL's times begin.
const TO_2000: i64 = 946_684_800_000_000;
const MAX_LATENCY: Duration = Duration::from_secs(24 * 3600);
const MINUTE: Duration = Duration::from_secs(60);
/// Upper ends of the buckets that are shown, in milliseconds.
const BUCKETS_MS: [u64; 12] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 30_000];

/// Shared by the engine, which measures, and displays.
#[derive(Debug, Clone, Default)]
pub struct Latency(Arc<Mutex<Option<Measured>>>, Arc<OnceLock<Exported>>);

/// What takes each single value, in seconds.
#[derive(Debug)]
struct Exported {
    arrivals: metrics::Histogram,
    pauses: metrics::Histogram,
}

#[derive(Debug)]
struct Measured {
    arrivals: Windowed,
    pauses: Windowed,
}

/// Values since the start, and over one to two minutes; in microseconds.
#[derive(Debug)]
struct Windowed {
    whole: Histogram<u32>,
    minute: Histogram<u32>,
    minute_before: Histogram<u32>,
    began: Instant,
}

impl Windowed {
    fn new() -> Option<Self> {
        // Two digits are enough; the bounds are within what a histogram can have.
        let empty = || Histogram::new_with_max(MAX_LATENCY.as_micros() as u64, 2).ok();
        Some(Self {
            whole: empty()?,
            minute: empty()?,
            minute_before: empty()?,
            began: Instant::now(),
        })
    }
}

impl Windowed {
    fn record(&mut self, values: impl Iterator<Item = u64>) {
        if self.began.elapsed() >= MINUTE {
            std::mem::swap(&mut self.minute, &mut self.minute_before);
            self.minute.reset();
            self.began = Instant::now();
        }

        for micros in values {
            self.whole.saturating_record(micros);
            self.minute.saturating_record(micros);
        }
    }

    fn last_minutes(&self) -> Histogram<u32> {
        let mut last_minutes = self.minute.clone();
        // Both histograms have the same bounds.
        let _ = last_minutes.add(&self.minute_before);
        last_minutes
    }
}

impl Latency {
    fn measure(&self, what: impl FnOnce(&mut Measured)) {
        let mut measured = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if measured.is_none() {
            *measured = Windowed::new()
                .zip(Windowed::new())
                .map(|(arrivals, pauses)| Measured { arrivals, pauses });
        }

        if let Some(measured) = measured.as_mut() {
            what(measured);
        }
    }

    /// Has each single value recorded from now on, in seconds: times from commit to visible, and
    /// times of commits into the target. Only the first call does.
    pub fn distribute(&self, arrivals: metrics::Histogram, pauses: metrics::Histogram) {
        let _ = self.1.set(Exported { arrivals, pauses });
    }

    /// Returns half-way and 99 % of the times from commit to visible over the last one to two
    /// minutes, in seconds.
    pub fn last_minutes(&self) -> Option<(f64, f64)> {
        let measured = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = measured.as_ref()?.arrivals.last_minutes();
        let quantile = |at: f64| recent.value_at_quantile(at) as f64 / 1e6;
        (!recent.is_empty()).then(|| (quantile(0.5), quantile(0.99)))
    }

    /// Records that transactions which committed at these times (microseconds since 2000) can be
    /// seen as of now.
    pub fn record(&self, commit_times_us: &[i64]) {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_micros();
        let now = i64::try_from(now).unwrap_or(i64::MAX) - TO_2000;
        let micros =
            |committed: &i64| u64::try_from(now.saturating_sub(*committed)).unwrap_or_default();

        if let Some(exported) = self.1.get() {
            let seconds = commit_times_us.iter().map(|committed| micros(committed) as f64 / 1e6);
            seconds.for_each(|seconds| exported.arrivals.record(seconds));
        }
        self.measure(|measured| measured.arrivals.record(commit_times_us.iter().map(micros)));
    }

    /// Records that the stream has waited for this time for the target to write and commit.
    pub fn paused(&self, pause: Duration) {
        let micros = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
        if let Some(exported) = self.1.get() {
            exported.pauses.record(pause.as_secs_f64());
        }
        self.measure(|measured| measured.pauses.record(std::iter::once(micros)));
    }

    /// Returns the times from commit to visible, for `rhei status --json`; null when there was
    /// nothing to measure.
    pub fn describe(&self) -> Value {
        let measured = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Measured { arrivals, .. }) =
            measured.as_ref().filter(|measured| !measured.arrivals.whole.is_empty())
        else {
            return Value::Null;
        };

        json!({
            "last_minutes": figures(&arrivals.last_minutes()),
            "since_start": figures(&arrivals.whole),
        })
    }

    /// Returns how long single commits into DuckDB took, for `rhei status --json`.
    pub fn describe_pauses(&self) -> Value {
        let measured = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Measured { pauses, .. }) = measured.as_ref() else { return Value::Null };
        let figures = |of: &Histogram<u32>| {
            let ms = |micros: u64| micros as f64 / 1000.0;

            json!({
                "commits": of.len(),
                "p50_ms": ms(of.value_at_quantile(0.5)),
                "p99_ms": ms(of.value_at_quantile(0.99)),
                "max_ms": ms(of.max()),
            })
        };
        json!({
            "last_minutes": figures(&pauses.last_minutes()),
            "since_start": figures(&pauses.whole),
        })
    }
}

fn figures(histogram: &Histogram<u32>) -> Value {
    let ms = |micros: u64| micros as f64 / 1000.0;
    let quantile = |at: f64| ms(histogram.value_at_quantile(at));

    let buckets: Vec<Value> = std::iter::once(0)
        .chain(BUCKETS_MS)
        .zip(BUCKETS_MS.into_iter().map(Some).chain([None]))
        .map(|(from, to)| {
            let to_micros = to.map_or(MAX_LATENCY.as_micros() as u64, |to| to * 1000);
            let from_micros = if from == 0 { 0 } else { from * 1000 + 1 };
            let transactions = histogram.count_between(from_micros, to_micros);

            json!({ "up_to_ms": to, "transactions": transactions })
        })
        .collect();
    json!({
        "transactions": histogram.len(),
        "p50_ms": quantile(0.5),
        "p90_ms": quantile(0.9),
        "p99_ms": quantile(0.99),
        "max_ms": ms(histogram.max()),
        "buckets": buckets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_comes_back_as_quantiles() {
        let latency = Latency::default();
        assert_eq!(latency.describe(), Value::Null);

        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros()
            as i64
            - TO_2000;
        let mut times = vec![now - 30_000; 98];
        // One clock is ahead of this machine's, and one transaction took long to arrive.
        times.extend([now + 10_000_000, now - 4_000_000]);
        latency.record(&times);

        let figures = &latency.describe()["since_start"];
        assert_eq!(figures["transactions"], 100);

        let p50 = figures["p50_ms"].as_f64().unwrap();
        assert!((30.0..300.0).contains(&p50), "{figures}");
        assert!(figures["max_ms"].as_f64().unwrap() >= 3900.0, "{figures}");

        let buckets = figures["buckets"].as_array().unwrap();
        let counted: u64 =
            buckets.iter().map(|bucket| bucket["transactions"].as_u64().unwrap()).sum();
        assert_eq!((counted, buckets[0]["transactions"].as_u64()), (100, Some(1)), "{figures}");
    }
}
