//! Replication slots as the catalogs show them.

use tokio_postgres::Client;

use super::CatalogError;
use crate::Lsn;

/// The properties of a replication slot that matter to rhei.
#[derive(Debug, Clone)]
pub struct SlotInfo {
    pub database: Option<String>,
    pub plugin: Option<String>,
    pub active: bool,
    pub active_pid: Option<i32>,
    pub temporary: bool,
    pub confirmed_flush_lsn: Option<Lsn>,
    pub wal_status: Option<String>,
    /// The WAL that the server keeps for the slot, in bytes.
    pub held_bytes: Option<u64>,
}

pub async fn slot(client: &Client, name: &str) -> Result<Option<SlotInfo>, CatalogError> {
    let row = client
        .query_opt(
            "SELECT database::text, plugin::text, active, active_pid, temporary, \
             confirmed_flush_lsn::text, wal_status, \
             CASE WHEN pg_is_in_recovery() THEN NULL ELSE (pg_current_wal_lsn() - \
             restart_lsn)::bigint END \
             FROM pg_replication_slots WHERE slot_name = $1::text",
            &[&name],
        )
        .await?;

    let Some(row) = row else { return Ok(None) };
    let confirmed: Option<String> = row.try_get(5)?;
    Ok(Some(SlotInfo {
        database: row.try_get(0)?,
        plugin: row.try_get(1)?,
        active: row.try_get(2)?,
        active_pid: row.try_get(3)?,
        temporary: row.try_get(4)?,
        confirmed_flush_lsn: confirmed.and_then(|text| text.parse().ok()),
        wal_status: row.try_get(6)?,
        held_bytes: row.try_get::<_, Option<i64>>(7)?.map(i64::unsigned_abs),
    }))
}

/// How far the server has come, and what a slot makes it keep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotWatch {
    /// The end of the WAL that is written.
    pub head: Lsn,
    /// How far the server has sent WAL to the connection that uses the slot.
    pub sent: Option<Lsn>,
    /// Whether a connection uses the slot.
    pub active: bool,
    pub wal_status: Option<String>,
    pub held_bytes: Option<u64>,
    /// The WAL that may still be written before the server may throw away what the slot needs;
    /// none: it never does.
    pub left_bytes: Option<u64>,
    /// `max_slot_wal_keep_size`; none: no limit.
    pub limit_bytes: Option<u64>,
}

/// Reads the position of the server and the state of a slot. Returns `None` when there is no such
/// slot.
pub async fn watch_slot(client: &Client, name: &str) -> Result<Option<SlotWatch>, CatalogError> {
    let row = client
        .query_opt(
            "SELECT pg_current_wal_lsn()::text, sender.sent_lsn::text, slot.active, \
             slot.wal_status, (pg_current_wal_lsn() - slot.restart_lsn)::bigint, \
             slot.safe_wal_size::bigint, \
             pg_size_bytes(current_setting('max_slot_wal_keep_size')) \
             FROM pg_replication_slots slot LEFT JOIN pg_stat_replication sender \
             ON sender.pid = slot.active_pid WHERE slot.slot_name = $1::text",
            &[&name],
        )
        .await?;

    let Some(row) = row else { return Ok(None) };
    let lsn = |text: Option<String>| text.and_then(|text| text.parse::<Lsn>().ok());
    let bytes = |bytes: Option<i64>| bytes.map(|bytes| u64::try_from(bytes).unwrap_or_default());
    let limit = bytes(row.try_get::<_, Option<i64>>(6)?.filter(|limit| *limit >= 0));

    Ok(Some(SlotWatch {
        head: lsn(row.try_get(0)?).unwrap_or_default(),
        sent: lsn(row.try_get(1)?),
        active: row.try_get(2)?,
        wal_status: row.try_get(3)?,
        held_bytes: bytes(row.try_get(4)?),
        left_bytes: bytes(row.try_get::<_, Option<i64>>(5)?.filter(|_| limit.is_some())),
        limit_bytes: limit,
    }))
}

/// Returns whether standbys keep the slot too. The query needs PostgreSQL 17 or newer.
pub async fn is_failover_slot(client: &Client, name: &str) -> Result<bool, CatalogError> {
    let query = "SELECT failover FROM pg_replication_slots WHERE slot_name = $1::text";
    let row = client.query_opt(query, &[&name]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?.unwrap_or(false))
}

/// Returns the transactions that the creation of a slot waits for (trap 12): the oldest
/// transactions that have written, and prepared ones.
pub async fn open_transactions(client: &Client) -> Result<Vec<String>, CatalogError> {
    let rows = client
        .query(
            "SELECT format('pid %s (%s, %s, open for %s s)', pid, usename, \
             coalesce(nullif(application_name, ''), state), \
             extract(epoch FROM now() - xact_start)::int) FROM pg_stat_activity \
             WHERE backend_xid IS NOT NULL \
             UNION ALL SELECT format('prepared transaction %L of %s', gid, owner) FROM \
             pg_prepared_xacts LIMIT 5",
            &[],
        )
        .await?;

    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}
