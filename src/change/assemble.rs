//! Reads the stream as a grammar: Begin, row changes, Commit. Whole source transactions are folded
//! into the net effect of the batch; a transaction that breaks off leaves no trace.
//!
//! Only this module decides which changes count: by the skip rule of `checkpoint`, by the
//! `copy_lsn` of each table (trap 15), and by the tables that are paused.
//!
//! A Relation message tells neither how columns correspond to older ones nor which values older
//! rows hold (traps 63-67), so each message is a question ([`Assembler::schema_query`]) to a caller
//! that can read the catalogs, and the assembler reads no further before the [`SchemaResolution`].
//! Without such a caller (a recorded stream), a relation that looks the same is the same, and one
//! that looks different pauses its table.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use hashbrown::HashMap;

use super::{
    ChangeBatch, Remedy, SchemaChange, TableFailure, TableSpec,
    arena::{Arena, Slice},
    columns,
    followed::{
        Described, Follow, SchemaQuery, SchemaResolution, TrackedTable, Untracked, fit,
        fit_or_stale, project,
    },
    net_effect::{NetEffect, NetEffectError, OldRow},
    transaction::{Change, OpenTransaction},
};
use crate::{
    Lsn,
    checkpoint::already_applied,
    pgoutput::{
        message::{Message, OldTuple},
        relation::Relation,
        table_description::{self, Description, Secret},
        tuple::{self, Tuple, write_field},
    },
};

/// The messages do not follow each other as the protocol requires, because of a broken server or an
/// error in rhei: no change of the open transaction was applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    #[error("a transaction begins inside another one (commit LSN {0})")]
    BeginInside(Lsn),
    #[error("a commit at {0} without a begin")]
    CommitOutside(Lsn),
    #[error("begin and commit of one transaction disagree: commit LSN {begin} and {commit}")]
    CommitLsn { begin: Lsn, commit: Lsn },
    #[error("a transaction ends at {end_lsn}, before its commit record at {commit_lsn}")]
    EndBeforeCommit { commit_lsn: Lsn, end_lsn: Lsn },
    #[error("source transactions came out of order: {next} after {last}")]
    OutOfOrder { last: Lsn, next: Lsn },
    #[error("a row change outside of any transaction")]
    ChangeOutside,
    #[error("a row of relation {0}, which the server never described")]
    UnknownRelation(u32),
    #[error("a row of relation {oid} with {found} columns, expected {expected}")]
    ColumnCount { oid: u32, found: usize, expected: usize },
    #[error("the descriptions of the source's relations take more than {limit} bytes of memory")]
    TooManyRelations { limit: usize },
}

/// The limit of a batch, whatever the settings allow: with the message that exceeds it, which may
/// add another GiB, each column still fits the 2 GiB that Arrow's offsets can count.
const MAX_BATCH_BYTES: usize = 512 << 20;

/// The memory limit for descriptions of relations. A million tables of ten columns need less.
const DESCRIBED_BYTES: usize = 1 << 30;

/// Turns messages into change batches. The assembler knows no socket and no clock.
#[derive(Debug)]
pub struct Assembler {
    /// The assembler knows nothing of the stream before this LSN.
    started_at: Lsn,
    checkpoint: Lsn,
    tables: HashMap<u32, TrackedTable>,
    described: HashMap<u32, Described>,
    open: Option<OpenTransaction>,
    last_commit: Lsn,
    arena: Arena,
    effects: BTreeMap<u32, NetEffect>,
    pending_rows: u64,
    end_lsn: Lsn,
    commit_times_us: Vec<i64>,
    source_transactions: u64,
    /// The oids of untracked relations, so that a relation that is described repeatedly is stored
    /// once.
    untracked: BTreeSet<u32>,
    descriptions: HashMap<u32, Description>,
    secret: Option<Secret>,
    /// About how many bytes `described` and `descriptions` take.
    described_bytes: usize,
    described_limit: usize,
    schema_changes: Vec<SchemaChange>,
    /// Whether relations become questions.
    checks_schema: bool,
    question: Option<SchemaQuery>,
    /// An answer that waits until the batch before it is taken.
    held: Option<(Relation, Box<SchemaChange>)>,
    /// Whether the last batch was a part of a transaction.
    is_parted: bool,
}

impl Assembler {
    /// Starts at `checkpoint`, with tables that are followed from there (or from their `copy_lsn`).
    pub fn new(checkpoint: Lsn, tables: impl IntoIterator<Item = Arc<TableSpec>>) -> Self {
        let followed = |spec: Arc<TableSpec>| {
            (spec.oid, TrackedTable { spec, failure: None, reported: false })
        };
        Self {
            started_at: checkpoint,
            checkpoint,
            tables: tables.into_iter().map(followed).collect(),
            described: HashMap::new(),
            open: None,
            last_commit: Lsn::ZERO,
            arena: Arena::default(),
            effects: BTreeMap::new(),
            pending_rows: 0,
            end_lsn: checkpoint,
            commit_times_us: Vec::new(),
            source_transactions: 0,
            untracked: BTreeSet::new(),
            descriptions: HashMap::new(),
            secret: None,
            described_bytes: 0,
            described_limit: DESCRIBED_BYTES,
            schema_changes: Vec::new(),
            checks_schema: false,
            question: None,
            held: None,
            is_parted: false,
        }
    }

    /// Turns every relation into a [`SchemaQuery`].
    pub fn with_schema_checks(mut self) -> Self {
        self.checks_schema = true;
        self
    }

    /// Accepts the descriptions that are signed with this secret; without it the assembler accepts
    /// none.
    pub fn believing(mut self, secret: Option<Secret>) -> Self {
        self.secret = secret;
        self
    }

    /// Returns the question that must be answered before the next message is pushed.
    pub fn schema_query(&self) -> Option<&SchemaQuery> {
        self.question.as_ref()
    }

    /// Answers [`Self::question`]. After a new shape, the batch so far must be taken first
    /// ([`Self::must_end_batch`]), since it holds rows of the old shape.
    pub fn answer(&mut self, answer: SchemaResolution) {
        let Some(question) = self.question.take() else { return };
        match answer {
            SchemaResolution::Same => self.apply_description(question.relation),
            SchemaResolution::SchemaChange(reshape) => {
                self.held = Some((question.relation, reshape))
            }
            SchemaResolution::Copy(reason) => {
                self.fail(question.relation.oid, &reason, Remedy::CopyAltered);
                self.describe_as(question.relation, Follow::Paused);
            }
        }
    }

    /// Returns whether a new shape waits while the batch so far has the old one.
    pub fn must_end_batch(&self) -> bool {
        self.held.is_some() && (self.source_transactions > 0 || !self.effects.is_empty())
    }

    /// Takes up the shape that was held back for the batch before it.
    pub fn continue_after_change(&mut self) {
        if let Some((relation, reshape)) = self.held.take() {
            let oid = reshape.after.oid;
            self.adopt(*reshape);
            debug_assert_eq!(relation.oid, oid);
            self.apply_description(relation);
        }
    }

    /// Gives a table another shape between transactions, without a question: the catalogs have
    /// changed and no further row of the table will arrive in the old shape. The batch so far must
    /// have been taken.
    pub fn reshape(&mut self, reshape: SchemaChange) {
        debug_assert!(self.open.is_none() && self.effects.is_empty());
        let oid = reshape.after.oid;
        self.adopt(reshape);

        // The server may have described this shape already, and will not repeat it (a new key under
        // REPLICA IDENTITY FULL); otherwise it describes the shape before the table's next row.
        if let Some(described) = self.described.remove(&oid) {
            let followed = self.tables.get(&oid);
            let follow = followed
                .map_or(Follow::Untracked, |it| fit_or_stale(&it.spec, &described.relation));
            self.described.insert(oid, Described { follow, ..described });
        }
    }

    /// Returns whether a change of the table in a source transaction with `commit_lsn >= since` may
    /// have passed.
    pub fn may_have_missed(&self, oid: u32, since: Lsn) -> bool {
        self.started_at > since
            || self.described.get(&oid).is_some_and(|described| described.seen >= since)
    }

    /// Follows a table from its `copy_lsn` on. No change of the table at or after that LSN may have
    /// passed ([`Self::may_have_missed`]).
    pub fn track(&mut self, spec: Arc<TableSpec>) {
        let oid = spec.oid;

        // The server does not repeat the description of a relation, unless the relation has changed
        // since.
        if let Some(described) = self.described.get_mut(&oid) {
            described.follow = fit_or_stale(&spec, &described.relation);
        }
        self.tables.insert(oid, TrackedTable { spec, failure: None, reported: false });
    }

    /// Stops following a table and drops its changes that were read and not taken yet.
    pub fn untrack(&mut self, oid: u32) {
        self.tables.remove(&oid);
        self.effects.remove(&oid);
        self.schema_changes.retain(|reshape| reshape.after.oid != oid);

        if let Some(open) = &mut self.open {
            open.schema_changes.retain(|reshape| reshape.after.oid != oid);
        }
        if let Some(described) = self.described.get_mut(&oid) {
            described.follow = Follow::Untracked;
        }
    }

    fn adopt(&mut self, reshape: SchemaChange) {
        let oid = reshape.after.oid;

        // A table that failed in the batch before takes no new shape: its copy stands still.
        let Some(followed) =
            self.tables.get_mut(&oid).filter(|followed| followed.failure.is_none())
        else {
            return;
        };

        followed.spec = Arc::clone(&reshape.after);
        let width = reshape.before.columns.len();
        let Some(open) = &mut self.open else {
            self.schema_changes.push(reshape);
            return;
        };

        for change in open.changes.iter_mut().filter(|change| change.table() == oid) {
            for row in change.rows() {
                let bytes = project(&Tuple::trusted(self.arena.get(*row), width), &reshape.columns);
                *row = self.arena.store_row(Tuple::trusted(&bytes, reshape.columns.len()));
            }
        }

        open.schema_changes.push(reshape);
    }

    /// Compares a relation with the table that it belongs to.
    fn apply_description(&mut self, relation: Relation) {
        let oid = relation.oid;
        let follow = match self.tables.get(&oid) {
            Some(followed) if followed.failure.is_none() => match fit(&followed.spec, &relation) {
                Ok(follow) => follow,
                Err(difference) => {
                    self.fail(
                        oid,
                        &format!("the table changed its shape: {difference}"),
                        Remedy::Operator,
                    );
                    Follow::Paused
                }
            },
            Some(_) => Follow::Paused,
            None => Follow::Untracked,
        };

        self.describe_as(relation, follow);
    }

    /// Marks the table as one that cannot be followed from here on.
    fn fail(&mut self, oid: u32, why: &str, remedy: Remedy) {
        let Some(followed) =
            self.tables.get_mut(&oid).filter(|followed| followed.failure.is_none())
        else {
            return;
        };

        let reason = if remedy.is_copy() {
            why.to_owned()
        } else {
            format!("{why}; {}", followed.spec.recopy_hint())
        };
        followed.failure = Some((reason, remedy));

        match &mut self.open {
            Some(open) => open.changes.push(Change::Fail { table: oid }),
            None => {
                self.effects.remove(&oid);
            }
        }
    }

    fn describe_as(&mut self, relation: Relation, follow: Follow) {
        let oid = relation.oid;
        let (seen, ignored) = self
            .described
            .get(&oid)
            .map_or((Lsn::ZERO, 0), |described| (described.seen, described.ignored));
        self.described.insert(oid, Described { relation, follow, ignored, seen });
    }

    /// Returns whether no transaction is open, so that a batch may end here.
    pub fn is_between_transactions(&self) -> bool {
        self.open.is_none()
    }

    /// Returns whether the batch has to be taken: it is full and no transaction is open, or the
    /// open transaction alone exceeds the memory limit and is delivered in parts.
    pub fn is_due(&self, max_rows: u64, max_bytes: usize) -> bool {
        let is_large = self.bytes() >= max_bytes.min(MAX_BATCH_BYTES);
        is_large || self.open.is_none() && self.pending_rows >= max_rows
    }

    /// Returns whether every change that was read has been in a batch.
    pub fn has_no_open_work(&self) -> bool {
        self.open.is_none() && self.source_transactions == 0
    }

    /// Returns the row changes of whole transactions that wait for [`Self::take_batch`].
    pub fn pending_rows(&self) -> u64 {
        self.pending_rows
    }

    /// Returns the source transactions that wait for [`Self::take_batch`].
    pub fn pending_transactions(&self) -> u64 {
        self.source_transactions
    }

    /// Returns the bytes that are held, including those of the open transaction.
    pub fn bytes(&self) -> usize {
        let open = self.open.as_ref().map_or(0, |open| open.changes.len() * size_of::<Change>());
        let times = self.commit_times_us.len() * size_of::<i64>();
        self.arena.len() + open + times + self.pending_rows as usize * NetEffect::ROW_BYTES
    }

    /// Returns the end of the last source transaction that arrived whole, or the position up to
    /// which the server has shown that it holds no further changes for rhei.
    pub fn end_lsn(&self) -> Lsn {
        self.end_lsn
    }

    /// Records that the server has sent everything before `wal_end`: with no transaction open,
    /// `wal_end` may become the checkpoint (traps 25, 26). Inside a transaction it proves nothing.
    pub fn advance_to(&mut self, wal_end: Lsn) {
        if self.is_between_transactions() && wal_end > self.end_lsn {
            self.end_lsn = wal_end;
        }
    }

    /// Returns the untracked relations whose changes arrived since the last call, with the number
    /// of changes. The caller compares them with the catalogs: only a relation that is known to be
    /// left out of the copy may be forgotten.
    pub fn take_untracked(&mut self) -> Vec<Untracked> {
        let untracked = std::mem::take(&mut self.untracked);
        let taken = untracked.into_iter().filter_map(|oid| {
            let described = self.described.get_mut(&oid)?;
            let changes = std::mem::take(&mut described.ignored);
            let (relation, last_change) = (described.relation.clone(), described.seen);
            matches!(described.follow, Follow::Untracked).then_some(Untracked {
                relation,
                changes,
                last_change,
            })
        });

        taken.collect()
    }

    /// Puts the relations back to report them later, since the catalogs cannot be read now.
    pub fn put_back_untracked(&mut self, untracked: Vec<Untracked>) {
        for Untracked { relation, changes, .. } in untracked {
            if let Some(described) = self.described.get_mut(&relation.oid) {
                described.ignored += changes;
                self.untracked.insert(relation.oid);
            }
        }
    }

    /// Takes the next message.
    ///
    /// # Errors
    /// The messages do not follow each other as the protocol requires.
    pub fn push(&mut self, message: Message<'_>) -> Result<(), AssembleError> {
        match message {
            Message::Begin { commit_lsn, xid, .. } => self.begin(commit_lsn, xid),
            Message::Commit { commit_lsn, end_lsn, commit_time_us } => {
                self.commit(commit_lsn, end_lsn, commit_time_us)
            }
            Message::Relation(relation) => {
                let older = self
                    .described
                    .get(&relation.oid)
                    .map_or(0, |described| described.relation.bytes());
                self.remember(relation.bytes(), older)?;
                self.describe(relation);
                Ok(())
            }
            Message::Insert { relation, new } => {
                let Some(new) = self.row(relation, new)? else { return Ok(()) };
                self.change(Change::Insert { table: relation, new })
            }
            Message::Update { relation, old, new } => {
                let Some(new) = self.row(relation, new)? else { return Ok(()) };
                let old = self.old_row(relation, old)?;
                self.change(Change::Update { table: relation, old, new })
            }
            Message::Delete { relation, old } => {
                let old = self.old_row(relation, old)?;
                if matches!(old, OldRow::Absent) {
                    Ok(())
                } else {
                    self.change(Change::Delete { table: relation, old })
                }
            }
            Message::Truncate { relations, .. } => {
                for table in relations {
                    if self.follows(table)? {
                        self.change(Change::Truncate { table })?;
                    }
                }
                Ok(())
            }
            // The messages of rhei's own trigger are transactional, so they are in the stream at
            // the position of the change.
            Message::Logical {
                transactional: true,
                prefix: table_description::PREFIX,
                content,
                ..
            } => {
                let (Some(open), Some(secret)) = (&self.open, &self.secret) else { return Ok(()) };
                if let Some(description) = Description::read(content, open.xid, secret) {
                    let bytes = description.bytes();
                    let older = self.descriptions.insert(description.oid, description);
                    self.remember(bytes, older.map_or(0, |older| older.bytes()))?;
                }
                Ok(())
            }
            Message::Origin { .. } | Message::Type { .. } | Message::Logical { .. } => Ok(()),
        }
    }

    fn begin(&mut self, commit_lsn: Lsn, xid: u32) -> Result<(), AssembleError> {
        if self.open.is_some() {
            return Err(AssembleError::BeginInside(commit_lsn));
        }
        if commit_lsn < self.last_commit {
            return Err(AssembleError::OutOfOrder { last: self.last_commit, next: commit_lsn });
        }

        let skip = already_applied(commit_lsn, self.checkpoint);
        let (changes, schema_changes, parted) = (Vec::new(), Vec::new(), BTreeSet::new());
        self.open =
            Some(OpenTransaction { commit_lsn, xid, skip, changes, schema_changes, parted });
        Ok(())
    }

    fn commit(
        &mut self,
        commit_lsn: Lsn,
        end_lsn: Lsn,
        commit_time_us: i64,
    ) -> Result<(), AssembleError> {
        let Some(open) = self.open.take() else {
            return Err(AssembleError::CommitOutside(commit_lsn));
        };

        if open.commit_lsn != commit_lsn {
            return Err(AssembleError::CommitLsn { begin: open.commit_lsn, commit: commit_lsn });
        }
        if end_lsn < commit_lsn {
            return Err(AssembleError::EndBeforeCommit { commit_lsn, end_lsn });
        }

        self.last_commit = commit_lsn;
        if open.skip {
            return Ok(());
        }

        self.schema_changes.extend(open.schema_changes);
        self.fold_all(open.changes, commit_lsn, open.xid);
        self.source_transactions += 1;
        self.end_lsn = self.end_lsn.max(end_lsn);
        self.commit_times_us.push(commit_time_us);
        Ok(())
    }

    fn remember(&mut self, bytes: usize, older: usize) -> Result<(), AssembleError> {
        self.described_bytes = (self.described_bytes + bytes).saturating_sub(older);
        let limit = self.described_limit;
        if self.described_bytes > limit {
            Err(AssembleError::TooManyRelations { limit })
        } else {
            Ok(())
        }
    }

    fn fold_all(&mut self, mut changes: Vec<Change>, commit_lsn: Lsn, xid: u32) {
        for at in 0..changes.len() {
            let Some(change) = changes.get(at).copied() else { break };
            self.fold(change, commit_lsn, xid);

            // Each update of a row that leaves a long value out copies that value from the row
            // before: a series of small messages may take much memory.
            if self.arena.wants_compaction() {
                let before = std::mem::take(&mut self.arena);
                for row in changes.iter_mut().skip(at + 1).flat_map(Change::rows) {
                    *row = self.arena.copy_from(&before, *row);
                }
                for effect in self.effects.values_mut() {
                    effect.copy_from(&before, &mut self.arena);
                }
            }
        }
    }

    fn fold(&mut self, change: Change, commit_lsn: Lsn, xid: u32) {
        let oid = change.table();
        let Some(followed) = self.tables.get_mut(&oid) else { return };
        if followed.failure.is_some() && !matches!(change, Change::Fail { .. }) {
            return;
        }

        let spec = &followed.spec;
        // The copy holds the change already (trap 15).
        if spec.has_copied(commit_lsn, xid) {
            return;
        }

        let effect = self
            .effects
            .entry(oid)
            .or_insert_with(|| NetEffect::new(&spec.key, spec.columns.len()));

        let arena = &mut self.arena;
        let folded = match change {
            Change::Insert { new, .. } => effect.insert(arena, new),
            Change::Update { old, new, .. } => effect.update(arena, old, new),
            Change::Delete { old, .. } => effect.delete(arena, old),
            Change::Truncate { .. } => {
                effect.truncate(xid);
                Ok(())
            }
            Change::Fail { .. } => {
                self.effects.remove(&oid);
                return;
            }
        };

        self.pending_rows += 1;
        if let Err(error) = folded {
            followed.failure = Some(net_effect_failure(spec, error, commit_lsn));
            self.effects.remove(&oid);
        }
    }

    /// Returns the changes folded since the last call as one batch. The batch ends at a source
    /// commit, and the open transaction stays. Where only an open transaction is due
    /// ([`Self::is_due`]), the batch is a part of that transaction, and the next batch continues
    /// it.
    pub fn take_batch(&mut self) -> ChangeBatch {
        let is_part = self.source_transactions == 0 && self.held.is_none() && self.open.is_some();
        if is_part && let Some(mut open) = self.open.take() {
            self.schema_changes.append(&mut open.schema_changes);
            let changes = std::mem::take(&mut open.changes);
            open.parted.extend(changes.iter().map(Change::table));
            self.fold_all(changes, open.commit_lsn, open.xid);
            self.open = Some(open);
        }

        let mut tables = Vec::with_capacity(self.effects.len());
        for (oid, effect) in std::mem::take(&mut self.effects) {
            let Some(followed) = self.tables.get_mut(&oid) else { continue };
            match columns::build(&followed.spec, effect, &self.arena) {
                Ok(changes) => tables.push(changes),
                Err(error) => {
                    let reason = format!("{error}; {}", followed.spec.recopy_hint());
                    followed.failure = Some((reason, error.remedy()));
                }
            }
        }

        let mut failed = Vec::new();
        // A failure inside the open transaction belongs to the batch that holds that transaction.
        let fails_in_open = |oid: u32| {
            let is_it = |change: &Change| matches!(change, Change::Fail { table } if *table == oid);
            self.open.as_ref().is_some_and(|open| open.changes.iter().any(is_it))
        };

        for followed in self.tables.values_mut().filter(|followed| !followed.reported) {
            if let Some((reason, remedy)) =
                followed.failure.as_ref().filter(|_| !fails_in_open(followed.spec.oid))
            {
                followed.reported = true;
                let (oid, table) = (followed.spec.oid, followed.spec.source.clone());
                failed.push(TableFailure { oid, table, reason: reason.clone(), remedy: *remedy });
            }
        }

        let before = std::mem::take(&mut self.arena);
        if let Some(open) = &mut self.open {
            for row in open.changes.iter_mut().flat_map(Change::rows) {
                *row = self.arena.copy_from(&before, *row);
            }
        }

        self.pending_rows = 0;
        self.checkpoint = self.end_lsn;
        ChangeBatch {
            is_part,
            continues: std::mem::replace(&mut self.is_parted, is_part),
            end_lsn: self.end_lsn,
            commit_times_us: std::mem::take(&mut self.commit_times_us),
            source_transactions: std::mem::take(&mut self.source_transactions),
            schema_changes: std::mem::take(&mut self.schema_changes),
            tables,
            failed,
        }
    }

    /// Takes up the description of a relation, which the server sends before the relation's first
    /// row and may repeat at any time (trap 63).
    fn describe(&mut self, relation: Relation) {
        let oid = relation.oid;
        let Some(followed) = self.tables.get(&oid) else {
            self.describe_as(relation, Follow::Untracked);
            return;
        };

        // Inside a transaction that the copy already holds, the shape may be an old one: a shape
        // that fits is accepted, and the server describes the relation again after a change of it.
        let is_past = match &self.open {
            Some(open) => open.skip || followed.spec.has_copied(open.commit_lsn, open.xid),
            // The server repeats a description from before the last commit, for a transaction that
            // arrived in pieces in the meantime.
            None => self.last_commit.max(self.checkpoint) < followed.spec.copy_lsn,
        };

        if followed.failure.is_some() {
            self.describe_as(relation, Follow::Paused);
        } else if let (true, Err(difference)) = (is_past, fit(&followed.spec, &relation)) {
            self.describe_as(relation, Follow::Stale(difference));
        } else if self.checks_schema && !is_past {
            let has_open_rows = self
                .open
                .as_ref()
                .is_some_and(|open| open.changes.iter().any(|change| change.table() == oid));

            // A description answers one question: a later relation may follow a change that was not
            // described.
            let description = self.descriptions.remove(&oid);
            let bytes = description.as_ref().map_or(0, Description::bytes);
            self.described_bytes = self.described_bytes.saturating_sub(bytes);

            let has_parts = self.open.as_ref().is_some_and(|open| open.parted.contains(&oid));
            // Between transactions a relation is only described again, and must be looked up.
            let (commit_lsn, xid) =
                self.open.as_ref().map_or((Lsn(u64::MAX), 0), |open| (open.commit_lsn, open.xid));

            self.question = Some(SchemaQuery {
                relation,
                commit_lsn,
                xid,
                description,
                has_open_rows,
                has_parts,
            });
        } else {
            self.apply_description(relation);
        }
    }

    /// Returns whether a TRUNCATE of a relation counts in the open transaction.
    fn follows(&mut self, oid: u32) -> Result<bool, AssembleError> {
        let Some(open) = &self.open else { return Err(AssembleError::ChangeOutside) };
        let Some(described) = self.described.get_mut(&oid) else {
            return Err(AssembleError::UnknownRelation(oid));
        };
        described.seen = open.commit_lsn;
        if open.skip {
            return Ok(false);
        }

        let is_followed = matches!(described.follow, Follow::AsIs | Follow::Project(_));
        if !is_followed {
            self.pass_over(oid);
        }
        Ok(is_followed)
    }

    /// Passes over a change. The change is in a copy, or a later copy brings it, or the relation is
    /// reported as untracked.
    fn pass_over(&mut self, oid: u32) {
        let (Some(open), Some(described)) = (&self.open, self.described.get_mut(&oid)) else {
            return;
        };

        match &described.follow {
            Follow::AsIs | Follow::Project(_) | Follow::Paused => {}
            Follow::Untracked => {
                described.ignored += 1;
                self.untracked.insert(oid);
            }
            Follow::Stale(difference) => {
                let is_in_copy = self
                    .tables
                    .get(&oid)
                    .is_some_and(|it| it.spec.has_copied(open.commit_lsn, open.xid));
                if !is_in_copy {
                    let why = format!(
                        "the stream describes the table otherwise than the catalogs: {difference}"
                    );
                    described.follow = Follow::Paused;
                    self.fail(oid, &why, Remedy::CopyAgain);
                }
            }
        }
    }

    fn change(&mut self, change: Change) -> Result<(), AssembleError> {
        match &mut self.open {
            Some(open) if !open.skip => open.changes.push(change),
            Some(_) => {}
            None => return Err(AssembleError::ChangeOutside),
        }
        Ok(())
    }

    /// Stores a row, reduced to the columns that are kept. Returns `None` when no table takes the
    /// row.
    fn row(&mut self, oid: u32, tuple: Tuple<'_>) -> Result<Option<Slice>, AssembleError> {
        let Some(open) = &self.open else { return Err(AssembleError::ChangeOutside) };
        let Some(described) = self.described.get_mut(&oid) else {
            return Err(AssembleError::UnknownRelation(oid));
        };
        described.seen = open.commit_lsn;

        let expected = described.relation.columns.len();
        if tuple.len() != expected {
            return Err(AssembleError::ColumnCount { oid, found: tuple.len(), expected });
        }
        if open.skip {
            return Ok(None);
        }

        Ok(match &described.follow {
            Follow::AsIs => Some(self.arena.store_row(tuple)),
            Follow::Project(kept) => {
                let mut bytes = Vec::with_capacity(tuple.bytes().len());
                // The tuple is split once, since it has no index of its fields.
                let fields: Vec<tuple::Field<'_>> = tuple.fields().collect();

                for &column in kept {
                    write_field(
                        &mut bytes,
                        fields.get(column).copied().unwrap_or(tuple::Field::Null),
                    );
                }

                Some(self.arena.store_row(Tuple::trusted(&bytes, kept.len())))
            }
            Follow::Untracked | Follow::Paused | Follow::Stale(_) => {
                self.pass_over(oid);
                None
            }
        })
    }

    fn old_row(&mut self, oid: u32, old: OldTuple<'_>) -> Result<OldRow, AssembleError> {
        Ok(match old {
            OldTuple::Absent => OldRow::Absent,
            OldTuple::Key(tuple) => self.row(oid, tuple)?.map_or(OldRow::Absent, OldRow::Key),
            OldTuple::Full(tuple) => self.row(oid, tuple)?.map_or(OldRow::Absent, OldRow::Full),
        })
    }
}

fn net_effect_failure(
    spec: &TableSpec,
    error: NetEffectError,
    commit_lsn: Lsn,
) -> (String, Remedy) {
    let reason = format!(
        "the source transaction committed at {commit_lsn} holds {error}; {}",
        spec.recopy_hint()
    );
    (reason, error.remedy())
}

#[cfg(test)]
mod tests;
