//! All integration tests are one binary: linking DuckDB once per file would cost minutes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod bed;
mod bed_works;
