//! A target as a test or a benchmark without a server finds it.

use std::{collections::BTreeSet, sync::Arc};

use rhei::internals::{
    Checkpoint, Lsn,
    change::TableSpec,
    olap::{CopyTarget, DuckDb, NewCopy, Phase, Pipeline, TargetState},
};

/// A pipeline that stands at `lsn`.
pub fn pipeline(lsn: Lsn) -> Pipeline {
    Pipeline {
        slot: "test".to_owned(),
        publications: vec!["test".to_owned()],
        publication_fingerprint: String::new(),
        system_id: "1".to_owned(),
        database: "d".to_owned(),
        database_oid: 1,
        timeline: 1,
        phase: Phase::Running,
        checkpoint: Checkpoint { lsn, commit_time_us: None },
    }
}

/// Begins copies of tables without a chunk.
pub fn begin_empty_copies(target: &mut DuckDb, lsn: Lsn, specs: &[Arc<TableSpec>]) {
    target.put_state(&pipeline(lsn), &[]).unwrap();
    let new = |spec: &Arc<TableSpec>| NewCopy {
        spec: Arc::clone(spec),
        is_resumed: false,
        long_columns: BTreeSet::new(),
        jobs: Vec::new(),
    };
    target.begin_copies(&specs.iter().map(new).collect::<Vec<_>>()).unwrap();
}
