//! Against real Postgres servers and real DuckDB files, through the binary. One test binary:
//! linking DuckDB once per file would cost minutes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failing unwrap is a failing test")]

mod backfill;
#[allow(dead_code, reason = "the bed offers more than each test of the day needs")]
mod bed;
mod bed_works;
mod chaos;
mod compacting;
mod connections;
mod copying;
mod crashes;
mod ddl_trigger;
mod demo;
mod documented;
mod equal_values;
mod every_value;
mod exactness;
mod failover;
mod following;
mod formats;
mod histories;
mod lake;
mod lake_dangers;
mod library;
mod lifecycle;
mod locks;
mod log_events;
mod migrations;
mod new_tables;
mod observe;
mod pgbench_runs;
mod pipeline;
mod publications;
mod publishing;
mod readiness;
mod recorded;
mod refusals;
mod rows;
mod schema_changes;
mod security;
mod serve;
mod service;
mod settled;
mod standing;
mod steering;
mod storm;
mod supervision;
mod terminal;
mod tidy;
mod type_pairs;
mod values;
mod variants;
mod verify;
mod verify_hash;
mod workloads;
