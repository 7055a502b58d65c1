//! Stub.

pub struct DuckDb;
