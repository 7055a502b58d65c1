-- What rhei keeps of itself in the target. Always written in the transaction of the data it describes. This is the layout of a
-- new file or lake; migrations/ brings older ones to it. rhei makes the schema `_rhei` before.

-- One row. Replaced by DELETE and INSERT, never by UPDATE: an updated row blocks CHECKPOINT under an open reader.
CREATE TABLE IF NOT EXISTS _rhei.pipeline (
    format_version INTEGER NOT NULL,
    rhei_version VARCHAR NOT NULL,
    slot VARCHAR NOT NULL,
    publications VARCHAR NOT NULL,              -- JSON array of names
    publication_fingerprint VARCHAR NOT NULL,
    system_id VARCHAR NOT NULL,
    database VARCHAR NOT NULL,
    database_oid UINTEGER NOT NULL,
    timeline UINTEGER NOT NULL,
    phase VARCHAR NOT NULL,                     -- creating, running, plain_copy
    checkpoint_lsn VARCHAR NOT NULL,            -- as PostgreSQL prints pg_lsn
    checkpoint_time TIMESTAMPTZ,                -- commit time of the last applied source transaction
    written_at TIMESTAMPTZ NOT NULL,
    pipeline_id UINTEGER NOT NULL DEFAULT 1,    -- of every row of _rhei: a file holds one pipeline so far
    writer VARCHAR,                             -- of a lake: the process that writes it; NULL after it has ended
    attempt UBIGINT                             -- of a lake: the transaction of that process which wrote this row
);

CREATE TABLE IF NOT EXISTS _rhei.tables (
    oid UINTEGER NOT NULL,
    source_schema VARCHAR NOT NULL,
    source_name VARCHAR NOT NULL,
    target_schema VARCHAR NOT NULL,
    target_name VARCHAR NOT NULL,
    state VARCHAR NOT NULL,                     -- pending, copying, catching_up, live, resync, error, dropped
    error VARCHAR,
    copy_lsn VARCHAR NOT NULL,
    epoch UINTEGER NOT NULL,
    replica_identity VARCHAR NOT NULL,          -- d, n, f, i as in pg_class.relreplident
    whole_row_key BOOLEAN NOT NULL,
    fingerprint VARCHAR NOT NULL,               -- JSON; what the catalogs said of the table beside its columns
    excluded VARCHAR NOT NULL,                  -- JSON array of column names
    copied_rows UBIGINT NOT NULL,
    is_ours BOOLEAN NOT NULL,                   -- the table of this name in the target was put there by rhei
    has_shadow BOOLEAN NOT NULL,                -- a copy is on its way; changes are kept in _rhei.pending_<oid>
    remedy VARCHAR,                             -- of a paused table: operator, or allow_nulls ([sync] on_unrepresentable)
    copy_xids VARCHAR,                          -- which transactions before copy_lsn are in the copy, as pg_snapshot; NULL: all
    truncated_by UINTEGER,                      -- xid of the last TRUNCATE that was applied since the fingerprint was stored
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);

CREATE TABLE IF NOT EXISTS _rhei.columns (
    table_oid UINTEGER NOT NULL,
    attnum SMALLINT NOT NULL,
    name VARCHAR NOT NULL,
    type_oid UINTEGER NOT NULL,
    typmod INTEGER NOT NULL,
    not_null BOOLEAN NOT NULL,
    key_position UINTEGER,
    target_name VARCHAR NOT NULL,
    target_type VARCHAR NOT NULL,
    mapping VARCHAR NOT NULL,                   -- JSON; how values are decoded
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);

-- Cycles that changed something, newest last; the oldest are pruned.
CREATE TABLE IF NOT EXISTS _rhei.cycles (
    finished_at TIMESTAMPTZ NOT NULL,
    checkpoint_lsn VARCHAR NOT NULL,
    source_transactions UBIGINT NOT NULL,
    inserted UBIGINT NOT NULL,
    updated UBIGINT NOT NULL,
    deleted UBIGINT NOT NULL,
    truncated UBIGINT NOT NULL,
    target_deleted_rows UBIGINT NOT NULL,
    target_inserted_rows UBIGINT NOT NULL,
    duration_ms UBIGINT NOT NULL,
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);

-- The durable job queue: chunks of copies. A job is done in the transaction that holds its rows.
CREATE TABLE IF NOT EXISTS _rhei.jobs (
    id UBIGINT NOT NULL,
    table_oid UINTEGER NOT NULL,
    type VARCHAR NOT NULL,
    payload VARCHAR NOT NULL,
    status VARCHAR NOT NULL,                    -- pending, running, done, failed, cancelled
    attempts UINTEGER NOT NULL,
    priority INTEGER NOT NULL,                  -- lower ones are taken first
    error VARCHAR,                              -- of the last attempt
    rows UBIGINT,                               -- that it loaded
    created_at TIMESTAMPTZ NOT NULL,
    started_at TIMESTAMPTZ,
    finished_at TIMESTAMPTZ,
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);

-- The results of verifications, one row for each table, newest last; the oldest are pruned.
CREATE TABLE IF NOT EXISTS _rhei.verifications (
    finished_at TIMESTAMPTZ NOT NULL,
    lsn VARCHAR NOT NULL,                       -- both sides were compared as of this position
    source_schema VARCHAR NOT NULL,
    source_name VARCHAR NOT NULL,
    verdict VARCHAR NOT NULL,                   -- equal, different, not_verified
    reason VARCHAR,
    part UINTEGER NOT NULL,                     -- of the rows, from 0 on: --sample compares one part at a time
    parts UINTEGER NOT NULL,
    source_rows UBIGINT NOT NULL,
    copy_rows UBIGINT NOT NULL,
    missing UBIGINT NOT NULL,
    extra UBIGINT NOT NULL,
    different UBIGINT NOT NULL,
    repaired UBIGINT NOT NULL,                  -- rows that a repair replaced, after which the table was equal; the verdict is that of before
    seconds DOUBLE NOT NULL,
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);

-- Rows that `rhei verify --repair` replaced, as text.
CREATE TABLE IF NOT EXISTS _rhei.repairs (
    repaired_at TIMESTAMPTZ NOT NULL,
    lsn VARCHAR NOT NULL,                       -- the checkpoint at that moment
    source_schema VARCHAR NOT NULL,
    source_name VARCHAR NOT NULL,
    action VARCHAR NOT NULL,                    -- deleted, inserted
    row_text VARCHAR NOT NULL,
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);
