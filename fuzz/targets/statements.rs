//! Statements of readers: cutting, rewriting and judging end for every text, and what passes the
//! judgement is one SELECT for DuckDB too.
#![no_main]

mod common;

use libfuzzer_sys::fuzz_target;

use rhei::internals::serve::Judge;

thread_local! {
    static JUDGE: Judge = Judge::new().expect("DuckDB starts");
}

fuzz_target!(
    init: common::write_seeds(seeds),
    |bytes: &[u8]| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        if text.len() > 4096 {
            return;
        }
        JUDGE.with(|judge| {
            for statement in judge.passed(text) {
                // `None`: DuckDB does not prepare it, as when a table is not there.
                assert_ne!(judge.is_select(&statement), Some(false), "{statement}");
            }
        });
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let hostile = include_str!("../../fixtures/hostile.sql");
    let queries = include_str!("../../fixtures/demo/queries.sql");
    let lines = hostile.lines().chain(queries.split("-- name: "));
    lines.map(|statement| statement.as_bytes().to_vec()).collect()
}
