-- What `rhei verify` found, and what it repaired.
CREATE TABLE _rhei.verifications (
    finished_at TIMESTAMPTZ NOT NULL,
    lsn VARCHAR NOT NULL,
    source_schema VARCHAR NOT NULL,
    source_name VARCHAR NOT NULL,
    verdict VARCHAR NOT NULL,
    reason VARCHAR,
    part UINTEGER NOT NULL,
    parts UINTEGER NOT NULL,
    source_rows UBIGINT NOT NULL,
    copy_rows UBIGINT NOT NULL,
    missing UBIGINT NOT NULL,
    extra UBIGINT NOT NULL,
    different UBIGINT NOT NULL,
    repaired UBIGINT NOT NULL,
    seconds DOUBLE NOT NULL,
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);

CREATE TABLE _rhei.repairs (
    repaired_at TIMESTAMPTZ NOT NULL,
    lsn VARCHAR NOT NULL,
    source_schema VARCHAR NOT NULL,
    source_name VARCHAR NOT NULL,
    action VARCHAR NOT NULL,
    row_text VARCHAR NOT NULL,
    pipeline_id UINTEGER NOT NULL DEFAULT 1
);
