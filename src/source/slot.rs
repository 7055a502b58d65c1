//! Creates slot and publication, and judges them. The judgements are pure; each refusal gives the
//! reason and the remedy.

use tokio_postgres::Client;

use super::{
    catalog::{PublicationInfo, ServerInfo, SlotInfo},
    quote::{quote_identifier, quote_literal, quote_table},
};
use crate::{Lsn, pgoutput::QualifiedName};

const BY_ITSELF: &str = "; [source] on_slot_lost = \"resync\" has rhei do so by itself";

/// Source and copy do not belong together, or the source is not set up.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error("the source is PostgreSQL {version}, and rhei needs 14 or newer")]
    TooOld { version: String },
    #[error(
        "the source has wal_level = {wal_level}, and logical replication needs logical\nhint: \
         ALTER SYSTEM SET wal_level = logical; then restart the source. `rhei backfill --no-slot` \
         copies without it"
    )]
    WalLevel { wal_level: String },
    #[error("the source is a standby in recovery\nhint: name the primary in the source URL")]
    InRecovery,
    #[error(
        "standbys cannot keep a slot of PostgreSQL {version}, and [source] failover_slot asks for \
         it\nhint: it takes PostgreSQL 17 or newer; without failover_slot the slot is lost in a \
         failover"
    )]
    NoFailover { version: String },
    #[error("publication {} does not exist at the source\nhint: create it, or name one publication \
             that rhei may create in [source] publication", .names.join(", "))]
    PublicationMissing { names: Vec<String> },
    #[error(
        "publication \"{name}\" does not exist, and rhei may not create it: {reason}\nhint: let \
         the tables' owner run: {sql}"
    )]
    PublicationRefused { name: String, reason: String, sql: String },
    #[error(
        "publication {name} leaves out {missing}, so the copy would silently differ\nhint: ALTER \
         PUBLICATION {} SET (publish = 'insert, update, delete, truncate')", quote_identifier(.name)
    )]
    PublicationPartial { name: String, missing: String },
    #[error(
        "{} is in two publications with different column lists: decoding fails at its first \
         change\nhint: ALTER PUBLICATION .. SET TABLE with one list, in all of {}; if changes were \
         made meanwhile, copy again with `rhei backfill \
         --force`", .tables.join(", "), .publications.join(", ")
    )]
    ColumnLists { tables: Vec<String>, publications: Vec<String> },
    #[error(
        "the publication was dropped and made again since the last cycle\ndetail: Changes between \
         may never arrive here.\nhint: copy again with `rhei backfill --force`"
    )]
    PublicationRemade,
    #[error(
        "replication slot \"{slot}\" does not exist any more\ndetail: It was dropped, so the \
         changes since {checkpoint} are gone.\nhint: copy again with `rhei backfill --force`, \
         which makes a new slot{BY_ITSELF}"
    )]
    Missing { slot: String, checkpoint: Lsn },
    #[error(
        "replication slot \"{slot}\" exists already, and this copy did not make it\nhint: choose \
         another name in [source] slot, or drop it: SELECT pg_drop_replication_slot('{slot}')"
    )]
    NotOurs { slot: String },
    #[error(
        "replication slot \"{slot}\" belongs to {found}, not to this database's pgoutput\nhint: \
         choose another name in [source] slot"
    )]
    Foreign { slot: String, found: String },
    #[error("replication slot \"{slot}\" is in use by another connection (server process \
             {})\nhint: stop the other rhei, or give this copy a slot of its own in [source] \
             slot", .pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string()))]
    Active { slot: String, pid: Option<i32> },
    #[error(
        "replication slot \"{slot}\" is lost: the server has removed WAL that this copy \
         needs\nhint: copy again with `rhei backfill --force`{BY_ITSELF}\nhint: raise \
         max_slot_wal_keep_size so that it does not happen again"
    )]
    Lost { slot: String },
    #[error(
        "replication slot \"{slot}\" has moved past this copy (slot {confirmed}, copy \
         {checkpoint})\ndetail: The copy is older than the slot, as after restoring a backup, or \
         the slot was dropped and made again. The changes between are no longer on the \
         server.\nhint: copy again with `rhei backfill --force`{BY_ITSELF}\nhint: or give this \
         file a slot of its own in [source] slot"
    )]
    MovedPast { slot: String, confirmed: Lsn, checkpoint: Lsn },
    #[error(
        "the source's WAL ends at {flush}, before this copy's checkpoint {checkpoint}\ndetail: The \
         source was restored to an earlier moment, so the copy holds what it has forgotten.\nhint: \
         copy again with `rhei backfill --force`{BY_ITSELF}"
    )]
    SourceBehind { flush: Lsn, checkpoint: Lsn },
    #[error(
        "the source is another cluster (system identifier {found}, this copy's is {known})\nhint: \
         check the source URL; to copy the new cluster, use another target, or `rhei backfill \
         --force`"
    )]
    OtherCluster { known: String, found: String },
    #[error(
        "the source is another database ({found}, this copy is of {known})\nhint: check the source \
         URL, or use another target"
    )]
    OtherDatabase { known: String, found: String },
    #[error(
        "the source has left this copy's history: timeline {timeline} branched off timeline \
         {known} at {switch}, before the checkpoint {checkpoint}\ndetail: After a failover the new \
         primary never had some transactions that are in the copy.\nhint: copy again with `rhei \
         backfill --force`{BY_ITSELF}"
    )]
    Diverged { known: u32, timeline: u32, switch: Lsn, checkpoint: Lsn },
    #[error(
        "the source is on timeline {timeline}, which does not descend from this copy's timeline \
         {known}\nhint: check the source URL; copy again with `rhei backfill --force`{BY_ITSELF}"
    )]
    Unrelated { known: u32, timeline: u32 },
    #[error(
        "the source is on timeline {timeline}, and this copy has followed timeline {known} \
         already: it is an old primary that is back\nhint: check the source URL, and end that \
         server or make it a standby; the slot and this copy are in order"
    )]
    OldPrimary { known: u32, timeline: u32 },
}

impl SlotError {
    /// Returns the SQL after which the error is gone, if there is such SQL.
    pub fn sql(&self) -> Option<String> {
        match self {
            Self::WalLevel { .. } => Some("ALTER SYSTEM SET wal_level = logical".to_owned()),
            Self::PublicationRefused { sql, .. } => {
                Some(sql.strip_suffix(';').unwrap_or(sql).to_owned())
            }
            Self::PublicationPartial { name, .. } => Some(format!(
                "ALTER PUBLICATION {} SET (publish = 'insert, update, delete, truncate')",
                quote_identifier(name)
            )),
            Self::NotOurs { slot } | Self::Foreign { slot, .. } => {
                Some(format!("SELECT pg_drop_replication_slot({})", quote_literal(slot)))
            }
            _ => None,
        }
    }

    /// Returns whether the error may pass by itself (traps 30-33).
    pub fn is_transient(&self) -> bool {
        // The server may be a standby that is about to be promoted, or an old primary that is about
        // to be ended.
        matches!(self, Self::Active { .. } | Self::InRecovery | Self::OldPrimary { .. })
    }

    /// Returns whether the slot can no longer serve this copy, so that only another copy of every
    /// table with a new slot helps. A slot or a cluster that belongs to another pipeline is not
    /// lost.
    pub fn is_lost(&self) -> bool {
        matches!(
            self,
            Self::Missing { .. }
                | Self::Lost { .. }
                | Self::MovedPast { .. }
                | Self::SourceBehind { .. }
                | Self::Diverged { .. }
                | Self::Unrelated { .. }
        )
    }
}

pub fn check_server(server: &ServerInfo) -> Result<(), SlotError> {
    if server.version_num < 140_000 {
        return Err(SlotError::TooOld { version: server.version.clone() });
    }
    // Slots on standbys need the primary's help (trap 39).
    if server.in_recovery {
        return Err(SlotError::InRecovery);
    }
    if !has_logical_wal(server) {
        return Err(SlotError::WalLevel { wal_level: server.wal_level.clone() });
    }
    Ok(())
}

/// Returns whether the server writes WAL that can be decoded, or does so from the first logical
/// slot on, as PostgreSQL 19 does with `wal_level = replica` (trap 86).
fn has_logical_wal(server: &ServerInfo) -> bool {
    match server.wal_level.as_str() {
        "logical" => true,
        "replica" => server.version_num >= 190_000,
        _ => false,
    }
}

pub fn check_failover(is_wanted: bool, server: &ServerInfo) -> Result<(), SlotError> {
    if is_wanted && server.version_num < 170_000 {
        return Err(SlotError::NoFailover { version: server.version.clone() });
    }
    Ok(())
}

/// Refuses an operation that a publication leaves out: the copy would differ silently (trap 42).
pub fn check_publication(info: &PublicationInfo) -> Result<(), SlotError> {
    for publication in &info.publications {
        let operations = [
            (publication.insert, "insert"),
            (publication.update, "update"),
            (publication.delete, "delete"),
            (publication.truncate, "truncate"),
        ];

        let missing: Vec<&str> =
            operations.iter().filter(|(is_on, _)| !is_on).map(|(_, name)| *name).collect();

        if !missing.is_empty() {
            let (name, missing) = (publication.name.clone(), missing.join(", "));
            return Err(SlotError::PublicationPartial { name, missing });
        }
    }
    Ok(())
}

/// Refuses `tables` that two of the publications publish with different columns (trap 19).
pub fn check_column_lists(
    tables: &[QualifiedName],
    publications: &[String],
) -> Result<(), SlotError> {
    if tables.is_empty() {
        return Ok(());
    }
    let tables = tables.iter().map(ToString::to_string).collect();
    Err(SlotError::ColumnLists { tables, publications: publications.to_vec() })
}

/// Refuses a publication of the same name with another oid: it was dropped in between (trap 41).
pub fn check_fingerprint(known: &str, found: &str) -> Result<(), SlotError> {
    let publications = |text: &str| {
        text.lines()
            .filter(|line| line.starts_with("publication "))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };

    if publications(known) == publications(found) {
        Ok(())
    } else {
        Err(SlotError::PublicationRemade)
    }
}

/// The cluster and database that a copy belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Cluster<'a> {
    pub system_id: &'a str,
    pub database: &'a str,
    pub database_oid: u32,
}

/// Refuses another cluster and another database (trap 35).
pub fn check_cluster(known: &Cluster<'_>, found: &Cluster<'_>) -> Result<(), SlotError> {
    if known.system_id != found.system_id {
        return Err(SlotError::OtherCluster {
            known: known.system_id.to_owned(),
            found: found.system_id.to_owned(),
        });
    }

    if known.database_oid != found.database_oid {
        return Err(SlotError::OtherDatabase {
            known: known.database.to_owned(),
            found: found.database.to_owned(),
        });
    }

    Ok(())
}

/// Refuses an old primary: timelines only grow, so a server on a lower timeline is an old primary,
/// and its slots do not matter to this pipeline.
pub fn check_age(known: u32, timeline: u32) -> Result<(), SlotError> {
    if timeline < known { Err(SlotError::OldPrimary { known, timeline }) } else { Ok(()) }
}

/// Verifies that the copy's timeline is an ancestor that the server left no earlier than the
/// checkpoint (trap 36). `history` holds lines of `timeline`, switch LSN and reason.
pub fn check_timeline(
    known: u32,
    checkpoint: Lsn,
    timeline: u32,
    history: &str,
) -> Result<(), SlotError> {
    let switch = history.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let number: u32 = words.next()?.parse().ok()?;
        (number == known).then(|| words.next()?.parse::<Lsn>().ok()).flatten()
    });

    match switch {
        None => Err(SlotError::Unrelated { known, timeline }),
        Some(switch) if checkpoint > switch => {
            Err(SlotError::Diverged { known, timeline, switch, checkpoint })
        }
        Some(_) => Ok(()),
    }
}

/// Verifies that the slot still has all changes that this copy needs (traps 2, 4, 32-34).
pub fn check_slot(
    found: Option<&SlotInfo>,
    slot: &str,
    database: &str,
    checkpoint: Lsn,
    flush: Lsn,
) -> Result<(), SlotError> {
    let slot = || slot.to_owned();
    let Some(found) = found else { return Err(SlotError::Missing { slot: slot(), checkpoint }) };

    if found.database.as_deref() != Some(database)
        || found.plugin.as_deref() != Some("pgoutput")
        || found.temporary
    {
        let of = found.database.as_ref().map_or_else(
            || "physical replication".to_owned(),
            |name| format!("database \"{name}\""),
        );

        let plugin = found.plugin.as_deref().unwrap_or("no plugin");
        return Err(SlotError::Foreign { slot: slot(), found: format!("{of} ({plugin})") });
    }

    if found.wal_status.as_deref() == Some("lost") {
        return Err(SlotError::Lost { slot: slot() });
    }
    if found.active {
        return Err(SlotError::Active { slot: slot(), pid: found.active_pid });
    }

    // Rhei acknowledges only what is durable in this copy, so a slot that is ahead has served
    // another copy, or a later state of this one.
    if let Some(confirmed) = found.confirmed_flush_lsn
        && confirmed > checkpoint
    {
        return Err(SlotError::MovedPast { slot: slot(), confirmed, checkpoint });
    }

    if checkpoint > flush {
        return Err(SlotError::SourceBehind { flush, checkpoint });
    }
    Ok(())
}

/// Returns the statement that creates the publication. Partition trees are published as their
/// roots.
pub fn publication_sql(name: &str, tables: &[QualifiedName]) -> String {
    let tables: Vec<String> = tables.iter().map(quote_table).collect();
    format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)",
        quote_identifier(name),
        tables.join(", ")
    )
}

/// Returns the statement that adds a table to a publication.
pub fn add_table_sql(publication: &str, table: &QualifiedName) -> String {
    let (publication, table) = (quote_identifier(publication), quote_table(table));
    format!("ALTER PUBLICATION {publication} ADD TABLE {table}")
}

/// What rhei says of a publication that it made, by which it knows the publication again.
pub const MADE_BY_RHEI: &str = "made by rhei, which adds tables to it and drops it on request";

/// Makes the publication, and marks it as rhei's.
pub async fn create_publication(
    client: &Client,
    name: &str,
    tables: &[QualifiedName],
) -> Result<(), SlotError> {
    let sql = publication_sql(name, tables);
    let mark = quote_literal(MADE_BY_RHEI);
    // A batch is one transaction.
    let marked = format!("{sql}; COMMENT ON PUBLICATION {} IS {mark}", quote_identifier(name));

    client.batch_execute(&marked).await.map_err(|error| {
        let reason = error
            .as_db_error()
            .map_or_else(|| error.to_string(), |server| server.message().to_owned());
        SlotError::PublicationRefused { name: name.to_owned(), reason, sql: format!("{sql};") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> SlotInfo {
        SlotInfo {
            database: Some("shop".to_owned()),
            plugin: Some("pgoutput".to_owned()),
            active: false,
            active_pid: None,
            temporary: false,
            confirmed_flush_lsn: Some(Lsn(100)),
            wal_status: Some("reserved".to_owned()),
            held_bytes: None,
        }
    }

    fn judged(found: Option<&SlotInfo>, checkpoint: u64, flush: u64) -> Result<(), SlotError> {
        check_slot(found, "rhei", "shop", Lsn(checkpoint), Lsn(flush))
    }

    /// Traps 2, 4, 32, 33.
    #[test]
    fn a_slot_is_taken_only_when_it_has_all_that_the_copy_needs() {
        assert!(judged(Some(&slot()), 100, 200).is_ok());
        assert!(matches!(judged(None, 100, 200), Err(SlotError::Missing { .. })));
        assert!(matches!(judged(Some(&slot()), 99, 200), Err(SlotError::MovedPast { .. })));
        assert!(matches!(judged(Some(&slot()), 201, 200), Err(SlotError::SourceBehind { .. })));
        let of = |change: fn(&mut SlotInfo)| {
            let mut slot = slot();
            change(&mut slot);
            judged(Some(&slot), 100, 200)
        };
        assert!(matches!(
            of(|slot| slot.database = Some("other".to_owned())),
            Err(SlotError::Foreign { .. })
        ));
        assert!(matches!(
            of(|slot| slot.plugin = Some("test_decoding".to_owned())),
            Err(SlotError::Foreign { .. })
        ));
        assert!(matches!(
            of(|slot| slot.wal_status = Some("lost".to_owned())),
            Err(SlotError::Lost { .. })
        ));
        assert!(matches!(of(|slot| slot.active = true), Err(SlotError::Active { .. })));
    }

    /// Trap 36.
    #[test]
    fn a_timeline_that_branched_off_before_the_checkpoint_is_refused() {
        let history = "1\t0/1103CDC0\tno recovery target specified\n\n2\t0/20000000\tno recovery \
                       target specified\n";
        assert!(check_timeline(1, Lsn(0x1103_CDC0), 3, history).is_ok());
        assert!(matches!(
            check_timeline(1, Lsn(0x1103_CE70), 3, history),
            Err(SlotError::Diverged { .. })
        ));
        assert!(matches!(check_timeline(7, Lsn(1), 3, history), Err(SlotError::Unrelated { .. })));
    }

    /// Trap 41.
    #[test]
    fn a_remade_publication_and_a_changed_table_are_told_apart() {
        let before = "publication 7\ntable 10 1:500\ntable 11 2:500\n";
        assert!(check_fingerprint(before, "publication 8\ntable 10 1:500\n").is_err());
        let after = "publication 7\ntable 10 1:501\ntable 11 2:500\n";
        assert!(check_fingerprint(before, after).is_ok());
    }

    #[test]
    fn the_publication_names_its_tables_quoted() {
        let sql = publication_sql("My Pub", &[QualifiedName::new("a\"b", "select")]);
        assert_eq!(
            sql,
            "CREATE PUBLICATION \"My Pub\" FOR TABLE \"a\"\"b\".\"select\" WITH \
             (publish_via_partition_root = true)"
        );
    }
}
