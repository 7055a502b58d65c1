//! All queries on the source's catalogs, for PostgreSQL 14 to 18. The queries run with
//! `search_path = pg_catalog`, so the server prints schema-qualified names.

mod files;
mod publication;
pub mod readiness;
mod slot;
mod tables;
mod types;

use std::{collections::BTreeSet, time::Duration};

use tokio_postgres::{Client, error::SqlState};

use self::publication::{Naming, PublishedTable, members};
use crate::{
    Lsn,
    change::xids::XidSnapshot,
    checkpoint::reachable_target,
    pgoutput::{QualifiedName, ReplicaIdentity},
};

pub use self::files::{TableFile, files_of, pages_of};
pub use self::publication::{
    Publication, PublicationInfo, PublicationRights, UnpublishedTable, ancestors,
    conflicting_column_lists, publication, published_names, unpublished,
};
pub use self::slot::{SlotInfo, SlotWatch, is_failover_slot, open_transactions, slot, watch_slot};
pub use self::tables::{
    CompositeFields, EnumLabel, Fingerprint, LeafTable, Membership, SourceColumn, SourceKey,
    SourceTable, all_tables, candidate_tables, key_of, locked_among, measure,
    parse_singleton_array, published_among, published_tables, unlogged_tables, written_among,
};
pub use self::types::types;

/// A catalog query that the source did not answer, or answered in an unexpected form.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("the source refused a question to its catalogs")]
    Query(#[from] tokio_postgres::Error),
    #[error("the source answered {what} in a form that rhei does not know: {found}")]
    UnexpectedAnswer { what: &'static str, found: String },
}

impl CatalogError {
    /// Returns whether another session holds a lock on a table of the publication (VACUUM FULL, an
    /// ALTER in an open transaction), so that describing the table would wait for the lock.
    pub fn is_locked(&self) -> bool {
        let Self::Query(error) = self else { return false };
        error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
    }
}

/// Begins a transaction in which all catalog queries are answered from one state of the catalogs,
/// since describing a table takes several queries. [`end_snapshot`] ends the transaction. Returns
/// the transactions that the snapshot sees.
pub async fn begin_snapshot(client: &Client) -> Result<XidSnapshot, CatalogError> {
    client.batch_execute("BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ").await?;
    current_snapshot(client).await
}

/// Returns the transactions that the next statement sees, or that all statements see within a
/// transaction that keeps its snapshot.
pub async fn current_snapshot(client: &Client) -> Result<XidSnapshot, CatalogError> {
    let row = client.query_one("SELECT pg_current_snapshot()::text", &[]).await?;
    let text: String = row.try_get(0)?;
    XidSnapshot::parse(&text)
        .ok_or(CatalogError::UnexpectedAnswer { what: "a snapshot", found: text })
}

/// Rolls back the transaction of a snapshot after a query in it failed.
pub async fn abort_snapshot(client: &Client) -> Result<(), CatalogError> {
    Ok(client.batch_execute("ROLLBACK").await?)
}

pub async fn end_snapshot(client: &Client) -> Result<(), CatalogError> {
    Ok(client.batch_execute("COMMIT").await?)
}

/// A transaction becomes visible within this time after its commit record is flushed, unless the
/// transaction waits for synchronous standbys: a backend has little left to do in between.
pub const VISIBLE_AFTER_FLUSH: Duration = Duration::from_secs(1);

/// Returns `position`, a position of the source's WAL that was read `age` ago, or the end of the
/// flushed WAL where that end is before `position` and no commit lies between the two.
///
/// WAL records that belong to no commit stay in memory until the next flush, on an idle source up
/// to 15 seconds, and a walsender sends only what is flushed. A commit is flushed before it becomes
/// visible or, with `synchronous_commit = off`, within three times `wal_writer_delay`.
pub async fn flushed(client: &Client, position: Lsn, age: Duration) -> Result<Lsn, CatalogError> {
    let flushed = reachable_target(wal_flush_lsn(client).await?);
    let holds_all_commits = age >= wal_writer_delay(client).await? * 3;
    Ok(if holds_all_commits { position.min(flushed) } else { position })
}

/// The server's version and settings, and the privileges of this role.
#[derive(Debug, Clone)]
pub struct ServerInfo {
    /// The number in `server_version_num`: 150018 is 15.18.
    pub version_num: i32,
    pub version: String,
    pub wal_level: String,
    pub database: String,
    pub database_oid: u32,
    pub encoding: String,
    pub in_recovery: bool,
    pub max_slots: i64,
    pub used_slots: i64,
    pub max_senders: i64,
    pub used_senders: i64,
    pub user: String,
    pub is_superuser: bool,
    /// The attribute REPLICATION, or what stands for it on Amazon RDS.
    pub can_replicate: bool,
    pub can_create_in_database: bool,
}

pub async fn server(client: &Client) -> Result<ServerInfo, CatalogError> {
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_setting('server_version'), \
             current_setting('wal_level'), current_database()::text, d.oid, \
             current_setting('server_encoding'), \
             pg_is_in_recovery(), current_setting('max_replication_slots')::bigint, \
             (SELECT count(*) FROM pg_replication_slots), \
             current_setting('max_wal_senders')::bigint, \
             (SELECT count(*) FROM pg_stat_replication), current_user::text, r.rolsuper, \
             r.rolreplication OR EXISTS (SELECT FROM pg_roles m WHERE m.rolname = \
             'rds_replication' AND pg_has_role(r.oid, m.oid, 'MEMBER')), \
             has_database_privilege(d.oid, 'CREATE') \
             FROM pg_database d, pg_roles r WHERE d.datname = current_database() AND r.rolname = \
             current_user",
            &[],
        )
        .await?;
    Ok(ServerInfo {
        version_num: row.try_get(0)?,
        version: row.try_get(1)?,
        wal_level: row.try_get(2)?,
        database: row.try_get(3)?,
        database_oid: row.try_get(4)?,
        encoding: row.try_get(5)?,
        in_recovery: row.try_get(6)?,
        max_slots: row.try_get(7)?,
        used_slots: row.try_get(8)?,
        max_senders: row.try_get(9)?,
        used_senders: row.try_get(10)?,
        user: row.try_get(11)?,
        is_superuser: row.try_get(12)?,
        can_replicate: row.try_get(13)?,
        can_create_in_database: row.try_get(14)?,
    })
}

async fn lsn(client: &Client, expression: &str) -> Result<Lsn, CatalogError> {
    let row = client.query_one(&format!("SELECT ({expression})::text"), &[]).await?;
    let text: String = row.try_get(0)?;
    parse_lsn(text)
}

fn parse_lsn(text: String) -> Result<Lsn, CatalogError> {
    text.parse().map_err(|_| CatalogError::UnexpectedAnswer { what: "an LSN", found: text })
}

/// Returns the end of the written WAL, flushed or not: nothing visible was committed after it.
pub async fn wal_insert_lsn(client: &Client) -> Result<Lsn, CatalogError> {
    lsn(client, "pg_current_wal_insert_lsn()").await
}

pub async fn wal_flush_lsn(client: &Client) -> Result<Lsn, CatalogError> {
    lsn(client, "pg_current_wal_flush_lsn()").await
}

pub async fn wal_writer_delay(client: &Client) -> Result<Duration, CatalogError> {
    let query =
        "SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_writer_delay'";
    let milliseconds: i64 = client.query_one(query, &[]).await?.try_get(0)?;
    Ok(Duration::from_millis(milliseconds.unsigned_abs()))
}

/// Returns `IDENTIFY_SYSTEM.systemid`, for roles that may read it by SQL.
pub async fn system_id(client: &Client) -> Result<String, CatalogError> {
    let row =
        client.query_one("SELECT system_identifier::text FROM pg_control_system()", &[]).await?;
    Ok(row.try_get(0)?)
}

/// Converts the number of a transaction, which SQL returns as text only.
fn xmin(number: i64) -> u32 {
    u32::try_from(number).unwrap_or_default()
}

/// Returns whether commits wait for the walsender of this slot because `synchronous_standby_names`
/// includes it.
pub async fn is_synchronous_standby(client: &Client, slot: &str) -> Result<bool, CatalogError> {
    let query = "SELECT EXISTS (SELECT 1 FROM pg_stat_replication r \
                 JOIN pg_replication_slots s ON s.active_pid = r.pid \
         WHERE s.slot_name = $1::text AND r.sync_state IN ('sync', 'quorum'))";
    Ok(client.query_one(query, &[&slot]).await?.try_get(0)?)
}

/// Returns the end of the WAL, and the transactions, prepared ones too, that had a number and were
/// in progress after that end was read: a commit record before the position belongs to one of these
/// transactions, or to one that every later snapshot sees.
pub async fn wal_insert_lsn_and_xids(
    client: &Client,
) -> Result<(Lsn, BTreeSet<u32>), CatalogError> {
    // The second part of the query depends on the answer of the first, so it runs later.
    let query = "SELECT lsn::text, array(SELECT backend_xid::text FROM pg_stat_activity \
           WHERE backend_xid IS NOT NULL AND lsn IS NOT NULL) \
         || array(SELECT transaction::text FROM pg_prepared_xacts WHERE lsn IS NOT NULL) \
         FROM (SELECT pg_current_wal_insert_lsn() AS lsn OFFSET 0) AS position";

    let row = client.query_one(query, &[]).await?;
    let (lsn, xids): (String, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);

    let parsed: Option<BTreeSet<u32>> = xids.iter().map(|xid| xid.parse().ok()).collect();
    let xids = parsed.ok_or_else(|| CatalogError::UnexpectedAnswer {
        what: "transactions",
        found: xids.join(","),
    })?;

    Ok((parse_lsn(lsn)?, xids))
}

/// Returns the transactions of `xids` that may wait for synchronous standbys. PostgreSQL shows the
/// sessions of other roles to members of `pg_read_all_stats` only.
pub async fn awaiting_standbys(
    client: &Client,
    xids: &BTreeSet<u32>,
) -> Result<BTreeSet<u32>, CatalogError> {
    let query = "SELECT current_setting('synchronous_standby_names') = '', \
                 array(SELECT backend_xid::text \
         FROM pg_stat_activity WHERE state IS NOT NULL AND wait_event IS DISTINCT FROM 'SyncRep' \
         AND backend_xid IS NOT NULL)";

    let row = client.query_one(query, &[]).await?;
    let (waits_for_none, not_waiting): (bool, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);

    if waits_for_none {
        return Ok(BTreeSet::new());
    }

    Ok(xids.iter().copied().filter(|xid| !not_waiting.contains(&xid.to_string())).collect())
}

/// Returns whether commits of the server wait for standbys before they become visible.
pub async fn has_synchronous_standbys(client: &Client) -> Result<bool, CatalogError> {
    let query = "SELECT current_setting('synchronous_standby_names') <> ''";
    Ok(client.query_one(query, &[]).await?.try_get(0)?)
}
