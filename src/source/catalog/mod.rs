//! Every question to the source's catalogs, for PostgreSQL 14 to 18.
//! Queries run with `search_path = pg_catalog`, so what the server prints is
//! schema-qualified.

mod publication;
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

pub use self::publication::{
    PublicationInfo, ancestors, conflicting_column_lists, publication, published_names,
};
pub use self::slot::{SlotInfo, is_failover_slot, open_transactions, slot};
pub use self::tables::{
    CompositeFields, EnumLabel, Fingerprint, LeafTable, SourceColumn, SourceKey, SourceTable,
    all_tables, candidate_tables, key_of, locked_among, measure, parse_singleton_array,
    published_among, published_tables, unlogged_tables,
};
pub use self::types::types;

/// A question that the source did not answer, or not as expected.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("the source refused a question to its catalogs")]
    Query(#[from] tokio_postgres::Error),
    #[error("the source answered {what} in a form that rhei does not know: {found}")]
    SchemaResolution { what: &'static str, found: String },
}

impl CatalogError {
    /// Somebody holds a lock on a table of the publication (VACUUM FULL, an ALTER in an open
    /// transaction), and listing it would wait for that.
    pub fn is_locked(&self) -> bool {
        let Self::Query(error) = self else { return false };
        error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
    }
}

/// Begins a moment in which all questions are answered from one state of the catalogs: a table is
/// described by several of them. Ends with [`end_snapshot`]. Returns what that state holds.
pub async fn begin_snapshot(client: &Client) -> Result<XidSnapshot, CatalogError> {
    client.batch_execute("BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ").await?;
    current_snapshot(client).await
}

/// Which transactions the next statement sees, or all of a transaction that keeps its snapshot.
pub async fn current_snapshot(client: &Client) -> Result<XidSnapshot, CatalogError> {
    let row = client.query_one("SELECT pg_current_snapshot()::text", &[]).await?;
    let text: String = row.try_get(0)?;
    XidSnapshot::parse(&text)
        .ok_or(CatalogError::SchemaResolution { what: "a snapshot", found: text })
}

/// Forgets a moment in which a question failed.
pub async fn abort_snapshot(client: &Client) -> Result<(), CatalogError> {
    Ok(client.batch_execute("ROLLBACK").await?)
}

pub async fn end_snapshot(client: &Client) -> Result<(), CatalogError> {
    Ok(client.batch_execute("COMMIT").await?)
}

/// A transaction becomes visible within this after its commit record is flushed, unless it waits
/// for synchronous standbys: a backend has little left to do in between.
pub const VISIBLE_AFTER_FLUSH: Duration = Duration::from_secs(1);

/// A position of the source's WAL that was read `age` ago, or the end of the flushed WAL where that
/// is before it and no commit lies between the two.
///
/// WAL records that belong to no commit stay in memory until the next flush, on an idle source up
/// to 15 seconds, and a walsender sends only what is flushed. A commit is flushed before it becomes
/// visible or, with `synchronous_commit = off`, within three times `wal_writer_delay`.
pub async fn flushed(client: &Client, position: Lsn, age: Duration) -> Result<Lsn, CatalogError> {
    let flushed = reachable_target(wal_flush_lsn(client).await?);
    let holds_all_commits = age >= wal_writer_delay(client).await? * 3;
    Ok(if holds_all_commits { position.min(flushed) } else { position })
}

/// What the server is, and what this role may do there.
#[derive(Debug, Clone)]
pub struct ServerInfo {
    /// As `server_version_num`: 150018 is 15.18.
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
             r.rolreplication, \
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
    text.parse().map_err(|_| CatalogError::SchemaResolution { what: "an LSN", found: text })
}

/// End of the WAL that was written, flushed or not: nothing visible was committed after it.
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

/// `IDENTIFY_SYSTEM.systemid`, for roles that may read it by SQL.
pub async fn system_id(client: &Client) -> Result<String, CatalogError> {
    let row =
        client.query_one("SELECT system_identifier::text FROM pg_control_system()", &[]).await?;
    Ok(row.try_get(0)?)
}

/// A transaction's number, which SQL hands out as text only.
fn xmin(number: i64) -> u32 {
    u32::try_from(number).unwrap_or_default()
}

/// Whether commits wait for the walsender of this slot, since `synchronous_standby_names` includes
/// it.
pub async fn is_synchronous_standby(client: &Client, slot: &str) -> Result<bool, CatalogError> {
    let query = "SELECT EXISTS (SELECT 1 FROM pg_stat_replication r JOIN pg_replication_slots s ON \
                 s.active_pid = r.pid \
         WHERE s.slot_name = $1::text AND r.sync_state IN ('sync', 'quorum'))";
    Ok(client.query_one(query, &[&slot]).await?.try_get(0)?)
}

/// The end of the WAL, and the transactions that had a number and were in progress after that was
/// read, prepared ones too: a commit record before the position belongs to one of them, or to one
/// that every later snapshot sees.
pub async fn wal_insert_lsn_and_xids(
    client: &Client,
) -> Result<(Lsn, BTreeSet<u32>), CatalogError> {
    // The second question depends on the answer to the first.
    let query = "SELECT lsn::text, array(SELECT backend_xid::text FROM pg_stat_activity \
           WHERE backend_xid IS NOT NULL AND lsn IS NOT NULL) \
         || array(SELECT transaction::text FROM pg_prepared_xacts WHERE lsn IS NOT NULL) \
         FROM (SELECT pg_current_wal_insert_lsn() AS lsn OFFSET 0) AS position";
    let row = client.query_one(query, &[]).await?;
    let (lsn, xids): (String, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);
    let parsed: Option<BTreeSet<u32>> = xids.iter().map(|xid| xid.parse().ok()).collect();
    let xids = parsed.ok_or_else(|| CatalogError::SchemaResolution {
        what: "transactions",
        found: xids.join(","),
    })?;
    Ok((parse_lsn(lsn)?, xids))
}

/// Those of the transactions of which it cannot be said that they do not wait for synchronous
/// standbys. Of sessions of other roles only members of `pg_read_all_stats` are told.
pub async fn awaiting_standbys(
    client: &Client,
    xids: &BTreeSet<u32>,
) -> Result<BTreeSet<u32>, CatalogError> {
    let query = "SELECT current_setting('synchronous_standby_names') = '', array(SELECT \
                 backend_xid::text \
         FROM pg_stat_activity WHERE state IS NOT NULL AND wait_event IS DISTINCT FROM 'SyncRep' \
         AND backend_xid IS NOT NULL)";
    let row = client.query_one(query, &[]).await?;
    let (waits_for_none, not_waiting): (bool, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);
    if waits_for_none {
        return Ok(BTreeSet::new());
    }
    Ok(xids.iter().copied().filter(|xid| !not_waiting.contains(&xid.to_string())).collect())
}

/// Whether commits of the server wait for standbys before they become visible.
pub async fn has_synchronous_standbys(client: &Client) -> Result<bool, CatalogError> {
    let query = "SELECT current_setting('synchronous_standby_names') <> ''";
    Ok(client.query_one(query, &[]).await?.try_get(0)?)
}
