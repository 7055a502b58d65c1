//! The test bed: throwaway Postgres clusters, the binary under test, and an oracle that compares
//! source with copy.
//!
//! Nothing here uses the code under test. Everything that waits has a deadline and shows the logs
//! when it passes.

pub mod cluster;
pub mod cut;
pub mod lake;
pub mod oracle;
pub mod pgbench;
pub mod reader;
pub mod rhei;
pub mod s3;

#[allow(unused_imports)]
pub use cluster::{Cluster, ClusterOptions, Db, Session};
#[allow(unused_imports)]
pub use cut::Cut;
#[allow(unused_imports)]
pub use lake::Lake;
#[allow(unused_imports)]
pub use oracle::{assert_same, compare};
#[allow(unused_imports)]
pub use pgbench::{Load, Pgbench};
#[allow(unused_imports)]
pub use reader::Reader;
#[allow(unused_imports)]
pub use rhei::{Output, Rhei, Running};

use std::time::{Duration, Instant};

/// Polls until `done` says so; panics with `describe` when the deadline passes.
#[track_caller]
pub fn wait_until(deadline: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !done() {
        assert!(Instant::now() < end, "waited {deadline:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder for a test's target file and settings, removed when dropped.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("rhei-test-").tempdir().unwrap()
}
