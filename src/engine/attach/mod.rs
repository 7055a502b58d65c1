//! Proves, before the first change is read, that this file, this slot and this cluster belong
//! together, or makes it so.
//!
//! Order of what is written, and what a crash between any two steps leaves:
//!
//! 1. The publication, when it is missing. A crash leaves an unused publication.
//! 2. The intent: pipeline row with phase `creating`. A crash leaves an intent; the next start
//!    drops the slot, if it is there, and begins again. A slot of that name without this intent is
//!    never touched.
//! 3. The slot, which exports its snapshot. Same as 2.
//! 4. Pipeline row with phase `running`, checkpoint = the slot's consistent point, all tables
//!    `pending`. A crash loses the snapshot, not the slot: the tables are copied under a new
//!    snapshot, and what the stream holds of them from before is skipped (`copy_lsn`).
//!
//! Copies begin beside the stream (`super::copies`): their shadows and the changes of their tables
//! are recorded in the transactions of the checkpoint, so a crash loses no more than the chunks
//! that were not done.

mod create;
mod resume;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use self::{
    create::{create, is_ours},
    resume::resume,
};
use super::new_tables::add_new_tables;
use crate::{
    backfill::SlotWithSnapshot,
    change::{Pause, TableSpec},
    failpoint::reached,
    olap::{OlapEngine, Phase, Pipeline, StoredState, StoredTable, TableState},
    pgoutput::{QualifiedName, table_description::Secret},
    pipeline::{
        Context, EngineError, Writer,
        tables::{
            self,
            selection::{is_wanted, no_matching_tables, pending_row},
        },
    },
    source::{
        catalog::{self, PublicationInfo, SourceTable},
        connection::{
            ConnectError, SourceOptions, SqlClient, connect_sql, is_pooled_by_transaction,
        },
        ddl_trigger::{self, DdlTrigger},
        slot,
        wire::{IdentifySystem, ReplicationClient},
    },
};

/// How long a slot may stay busy after its last reader died (trap 30).
pub(super) const SLOT_BUSY: Duration = Duration::from_secs(10);

/// A pipeline that is ready to stream.
pub struct Attached {
    /// The pipeline as the file stores it; the stream begins at its checkpoint.
    pub pipeline: Pipeline,
    /// Tables to follow, those that are being copied included.
    pub tables: Vec<Arc<TableSpec>>,
    /// The tables to follow whose shadows are being filled,
    pub copying: BTreeMap<u32, Arc<TableSpec>>,
    /// and those whose shadows hold every chunk.
    pub catching_up: BTreeMap<u32, Arc<TableSpec>>,
    /// Tables that need a copy which no task is making.
    pub pending_copies: BTreeSet<u32>,
    /// The slot, when it was just made.
    pub snapshot_slot: Option<SlotWithSnapshot>,
    /// Paused tables (oid, name) with their reasons.
    pub in_error: Vec<(u32, QualifiedName, String)>,
    /// By table: the last transaction whose TRUNCATE was applied since the fingerprint of the table
    /// was stored.
    pub truncated: BTreeMap<u32, u32>,
    /// The secret with which the source signs descriptions of its tables, which it sends after each
    /// change.
    pub ddl_secret: Option<Secret>,
}

/// Which tables to copy although their copies are good.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Recopy {
    /// Good copies stay as they are; only tables without one are copied.
    #[default]
    None,
    /// These tables, by name.
    Tables(Vec<QualifiedName>),
    /// All tables, with a new slot: the way out of a lost slot, a foreign cluster, a restored file.
    All,
    /// All tables, with a new slot, but never of another cluster: the settings ask for it, and no
    /// operator has looked at the cluster.
    AllOfSameCluster,
}

impl Recopy {
    /// Returns the request that copies more: what an operator asked for outlasts what was found
    /// meanwhile.
    pub fn widen(self, found: Self) -> Self {
        match (&self, &found) {
            (_, Self::None) | (Self::All, _) | (Self::AllOfSameCluster, Self::Tables(_)) => self,
            _ => found,
        }
    }

    /// Returns whether all tables are to be copied, with a new slot.
    fn is_of_all(&self) -> bool {
        matches!(self, Self::All | Self::AllOfSameCluster)
    }
}

/// The source, seen through two connections.
pub(super) struct Source {
    pub(super) sql: SqlClient,
    pub(super) replication: ReplicationClient,
    pub(super) identity: IdentifySystem,
    pub(super) server: catalog::ServerInfo,
}

/// Checks the source and the file, creates what is missing, and finds out what has to be copied.
/// `is_active` returns whether a task is making the copy of a table.
///
/// # Errors
/// A refusal says what does not belong together and what to do.
pub async fn attach<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    again: &Recopy,
    is_active: impl Fn(u32) -> bool,
) -> Result<Attached, EngineError> {
    let source = connect(context).await?;
    add_new_tables(context, &source.sql).await?;
    let stored = writer.call(|target| target.state()).await?;

    match stored {
        Some(state) if state.pipeline.phase == Phase::Running && !again.is_of_all() => {
            verify(context, &source, &state.pipeline).await?;

            let mut source = source;
            slot::check_failover(context.options.failover_slot, &source.server)?;
            if context.options.failover_slot
                && !catalog::is_failover_slot(&source.sql, &context.options.slot).await?
            {
                source.replication.make_failover(&context.options.slot).await?;
                tracing::info!(
                    event = "failover_slot_enabled",
                    slot = context.options.slot,
                    "standbys may keep the slot from now on"
                );
            }

            resume(context, source, writer, state.pipeline, state.tables, again, is_active).await
        }
        stored => {
            let before = stored.as_ref().map(|state| &state.pipeline);
            if let Some(before) =
                before.filter(|before| has_to_stay_with_cluster(before.phase, again))
            {
                verify_cluster(&source, before)?;
                slot::check_age(before.timeline, source.identity.timeline)?;
            }

            create(context, source, writer, stored, again).await
        }
    }
}

/// Returns whether a new slot may be made only in the cluster that the file is a copy of. A plain
/// copy belongs to no cluster, and an operator who wants all tables again has looked at the
/// cluster.
fn has_to_stay_with_cluster(before: Phase, again: &Recopy) -> bool {
    before != Phase::PlainCopy && *again != Recopy::All
}

/// Judges what [`attach`] would meet, without changing anything at the source: whether the cluster
/// and the slot belong to the file, whose state is `stored`.
///
/// # Errors
/// The error that `attach` would end with.
pub async fn examine(
    context: &Context,
    mut replication: ReplicationClient,
    stored: Option<&StoredState>,
) -> Result<(), EngineError> {
    let sql = connect_sql(&context.options.source, "check").await?;
    let server = catalog::server(&sql).await?;
    slot::check_server(&server)?;
    slot::check_failover(context.options.failover_slot, &server)?;

    let identity = replication.identify_system().await?;
    refuse_pooler(&context.options.source, &mut replication).await?;
    let source = Source { sql, replication, identity, server };

    let Some(state) = stored else { return refuse_slot_of_others(context, &source, None).await };
    let pipeline = &state.pipeline;
    match pipeline.phase {
        Phase::Running => {
            verify(context, &source, pipeline).await?;
            let info = catalog::publication(&source.sql, &context.options.publications).await?;
            let names = || context.options.publications.clone();
            let info =
                info.ok_or_else(|| slot::SlotError::PublicationMissing { names: names() })?;
            Ok(slot::check_fingerprint(&pipeline.publication_fingerprint, &info.fingerprint)?)
        }
        Phase::Creating => {
            verify_cluster(&source, pipeline)?;
            slot::check_age(pipeline.timeline, source.identity.timeline)?;
            refuse_slot_of_others(context, &source, Some(pipeline)).await
        }
        Phase::PlainCopy => refuse_slot_of_others(context, &source, Some(pipeline)).await,
    }
}

/// Refuses a slot that is there and that this file has not made.
async fn refuse_slot_of_others(
    context: &Context,
    source: &Source,
    before: Option<&Pipeline>,
) -> Result<(), EngineError> {
    let slot = &context.options.slot;
    let is_there = catalog::slot(&source.sql, slot).await?.is_some();
    if is_there && !is_ours(before, slot, &source.identity.system_id) {
        return Err(slot::SlotError::NotOurs { slot: slot.clone() }.into());
    }
    Ok(())
}

pub(super) async fn connect(context: &Context) -> Result<Source, EngineError> {
    let sql = connect_sql(&context.options.source, "control").await?;

    let server = catalog::server(&sql).await?;
    slot::check_server(&server)?;

    let mut replication = ReplicationClient::connect(&context.options.source, "control").await?;
    let identity = replication.identify_system().await?;
    refuse_pooler(&context.options.source, &mut replication).await?;
    Ok(Source { sql, replication, identity, server })
}

/// Refuses a pooler that gives the statements of one session to several.
pub async fn refuse_pooler(
    source: &SourceOptions,
    replication: &mut ReplicationClient,
) -> Result<(), EngineError> {
    if replication.is_behind_proxy().await? && is_pooled_by_transaction(source).await? {
        return Err(ConnectError::Pooler {
            address: replication.address().to_owned(),
            detail: "The statements of one session reach several sessions of the server."
                .to_owned(),
        }
        .into());
    }
    Ok(())
}

/// Returns the publication, and makes it when it is missing and may be made.
pub(super) async fn publication(
    context: &Context,
    sql: &SqlClient,
) -> Result<PublicationInfo, EngineError> {
    if catalog::publication(sql, &context.options.publications).await?.is_none() {
        let [name] = context.options.publications.as_slice() else {
            return Err(slot::SlotError::PublicationMissing {
                names: context.options.publications.clone(),
            }
            .into());
        };

        let candidates = catalog::candidate_tables(sql).await?;
        let chosen: Vec<QualifiedName> =
            candidates.into_iter().filter(|table| is_wanted(&context.options, table)).collect();
        if chosen.is_empty() {
            // The publication would hold the first table that comes, and no later table.
            return Err(EngineError::Setup(no_matching_tables(&context.options).to_string()));
        }

        let what = "creating the publication waits for a table that another session has locked";
        warn_when_stalled(what, slot::create_publication(sql, name, &chosen)).await?;
        reached("publication.created");
        tracing::info!(
            event = "publication_created",
            publication = name,
            tables = chosen.len(),
            "publication created"
        );
    }

    let Some(info) = catalog::publication(sql, &context.options.publications).await? else {
        return Err(slot::SlotError::PublicationMissing {
            names: context.options.publications.clone(),
        }
        .into());
    };

    slot::check_publication(&info)?;
    check_column_lists(context, sql).await?;
    Ok(info)
}

/// Refuses tables that the publications bring with different columns: the server finds the conflict
/// only when it decodes a change of such a table, and its slot cannot go on from there (trap 19).
pub(super) async fn check_column_lists(
    context: &Context,
    sql: &SqlClient,
) -> Result<(), EngineError> {
    let tables = catalog::conflicting_column_lists(sql, &context.options.publications).await?;
    Ok(slot::check_column_lists(&tables, &context.options.publications)?)
}

/// Verifies a file that rhei made against the source: the same cluster, the same history, a slot
/// that still has all WAL that this copy needs.
pub(super) async fn verify(
    context: &Context,
    source: &Source,
    pipeline: &Pipeline,
) -> Result<(), EngineError> {
    if pipeline.slot != context.options.slot {
        return Err(EngineError::Setup(format!(
            "{} follows slot \"{}\", but the settings name \"{}\"\nhint: name the old slot in \
             [source] slot, or give the new one a file of its own",
            context.options.target, pipeline.slot, context.options.slot
        )));
    }

    verify_cluster(source, pipeline)?;
    slot::check_age(pipeline.timeline, source.identity.timeline)?;

    if context.slot_lost.take_has_no_wal() {
        return Err(slot::SlotError::Lost { slot: context.options.slot.clone() }.into());
    }

    let flush = catalog::wal_flush_lsn(&source.sql).await?;
    let checkpoint = pipeline.checkpoint.lsn;

    if source.identity.timeline != pipeline.timeline {
        let mut history = ReplicationClient::connect(&context.options.source, "timeline").await?;
        let history = history.timeline_history(source.identity.timeline).await?;
        slot::check_timeline(pipeline.timeline, checkpoint, source.identity.timeline, &history)?;
    }

    let waiting_since = tokio::time::Instant::now();
    loop {
        let found = catalog::slot(&source.sql, &context.options.slot).await?;

        match slot::check_slot(
            found.as_ref(),
            &context.options.slot,
            &source.server.database,
            checkpoint,
            flush,
        ) {
            Err(error @ slot::SlotError::Active { .. }) => {
                // The walsender of a reader that was killed lingers for a moment (trap 30).
                if waiting_since.elapsed() >= SLOT_BUSY {
                    return Err(error.into());
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            judged => return Ok(judged?),
        }
    }
}

pub(super) fn verify_cluster(source: &Source, pipeline: &Pipeline) -> Result<(), slot::SlotError> {
    let found = slot::Cluster {
        system_id: &source.identity.system_id,
        database: &source.server.database,
        database_oid: source.server.database_oid,
    };

    let known = slot::Cluster {
        system_id: &pipeline.system_id,
        database: &pipeline.database,
        database_oid: pipeline.database_oid,
    };

    slot::check_cluster(&known, &found)
}

pub(super) fn pending(table: &SourceTable, targets: &BTreeMap<u32, QualifiedName>) -> StoredTable {
    pending_row(table, targets.get(&table.oid).cloned().unwrap_or_else(|| table.name.clone()))
}

/// Waits for `work`, and logs now and then what it waits for.
pub(in crate::engine) async fn warn_when_stalled<F: Future>(what: &str, work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(Duration::from_secs(3)) => {
                tracing::warn!(event = "waiting", "{what}")
            }
        }
    }
}

/// Gives tables the names that they have at the source by now, or that the settings want.
pub(super) async fn rename<T: OlapEngine + 'static>(
    writer: &Writer<T>,
    targets: &BTreeMap<u32, QualifiedName>,
    published: &[SourceTable],
    by_oid: &mut BTreeMap<u32, StoredTable>,
) -> Result<(), EngineError> {
    let moves = renamed(targets, published, by_oid);
    if moves.is_empty() { Ok(()) } else { writer.call(move |target| target.rename(&moves)).await }
}

/// Puts the new names into `by_oid`. Returns the old names in the target, with the tables that had
/// them.
fn renamed(
    targets: &BTreeMap<u32, QualifiedName>,
    published: &[SourceTable],
    by_oid: &mut BTreeMap<u32, StoredTable>,
) -> Vec<(QualifiedName, StoredTable)> {
    let mut moves = Vec::new();

    for table in published {
        let (Some(stored), Some(target)) = (by_oid.get_mut(&table.oid), targets.get(&table.oid))
        else {
            continue;
        };

        if stored.state == TableState::Dropped
            || (stored.source == table.name && stored.target == *target)
        {
            continue;
        }

        tracing::info!(
            event = "table_renamed",
            from = %stored.source,
            to = %table.name,
            target = %target,
            "table renamed"
        );
        let from = std::mem::replace(&mut stored.target, target.clone());
        stored.source = table.name.clone();
        moves.push((from, stored.clone()));
    }

    moves
}

pub(super) async fn save<T: OlapEngine + 'static>(
    writer: &Writer<T>,
    pipeline: &Pipeline,
    tables: Vec<StoredTable>,
) -> Result<(), EngineError> {
    let pipeline = pipeline.clone();
    writer.call(move |target| target.put_state(&pipeline, &tables)).await
}

/// Returns the secret with which the source signs descriptions of its tables, if the source sends
/// descriptions that can be trusted.
pub(super) async fn ddl_secret(sql: &SqlClient) -> Result<Option<Secret>, EngineError> {
    let why = match ddl_trigger::look(sql).await? {
        DdlTrigger::Usable(secret) => return Ok(Some(secret)),
        DdlTrigger::Absent => return Ok(None),
        DdlTrigger::Foreign { why } => why,
        DdlTrigger::Unreadable { .. } => {
            "signs with a secret that this role may not read".to_owned()
        }
    };

    tracing::warn!(
        event = "ddl_trigger_ignored",
        reason = why,
        "the event trigger rhei_ddl is not listened to; `rhei check` says what mends it"
    );

    Ok(None)
}

/// Reads back the tables that are to be followed.
pub(super) async fn load_attached<T: OlapEngine + 'static>(
    context: &Context,
    sql: &SqlClient,
    writer: &Writer<T>,
    to_copy: BTreeSet<u32>,
) -> Result<Attached, EngineError> {
    let Some(state) = writer.call(|target| target.state()).await? else {
        return Err(EngineError::Setup(format!("{} has lost its state", context.options.target)));
    };

    let mut attached = Attached {
        pipeline: state.pipeline,
        tables: Vec::new(),
        copying: BTreeMap::new(),
        catching_up: BTreeMap::new(),
        pending_copies: to_copy,
        snapshot_slot: None,
        in_error: Vec::new(),
        truncated: BTreeMap::new(),
        ddl_secret: ddl_secret(sql).await?,
    };

    for stored in &state.tables {
        attached.take_up(stored, context.options.null_unrepresentable);
    }

    Ok(attached)
}

impl Attached {
    /// Follows a table of the file, or reports it as paused, as its state says.
    fn take_up(&mut self, stored: &StoredTable, null_unrepresentable: bool) {
        self.truncated.extend(stored.truncated_by.map(|xid| (stored.oid, xid)));

        let spec = || Arc::new(tables::from_stored(stored, null_unrepresentable));
        match &stored.state {
            _ if stored.has_shadow => {
                let spec = spec();
                let is_whole = stored.state == TableState::CatchingUp;
                let copies = if is_whole { &mut self.catching_up } else { &mut self.copying };

                copies.insert(stored.oid, Arc::clone(&spec));
                self.tables.push(spec);
            }
            TableState::Live => self.tables.push(spec()),
            TableState::Error(Pause { reason, .. }) => {
                tracing::warn!(
                    event = "table_paused",
                    table = %stored.source,
                    reason,
                    "the table is paused"
                );
                self.in_error.push((stored.oid, stored.source.clone(), reason.clone()));
            }
            TableState::Pending
            | TableState::Copying
            | TableState::CatchingUp
            | TableState::Resync
            | TableState::Dropped => {}
        }
    }
}

#[cfg(test)]
mod tests;
