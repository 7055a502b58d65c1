//! Proves that a copy is equal to its source.
//!
//! Both sides stand at one LSN ([`crate::backfill::stand`]), where several lanes compare a table
//! each while the stream goes on: `table` compares it by what `source_side` and `copy_side` read,
//! `repair` mends the rows that differ, and `report` says what was found. `shape` is what both
//! sides know of a table.
//!
//! Both sides have the same number for a row. PostgreSQL hashes a whole row without printing it:
//! `hash_record_extended(ROW(..), 0)`. This module computes that number over rows of DuckDB, so
//! that a count and a sum on both sides say whether two tables are equal: two different tables have
//! one sum by an accident of 1 in 2^64, or of 1 in 2^32 where a single date or time differs. The
//! hashes protect from accidents, not from malice.
//! `hash_rule` decides for each column what both sides hash, `row_hash` hashes the columns of a
//! batch, `pg_text` prints values as PostgreSQL does where both sides hash text, and `lookup3`
//! holds the hash functions that all of it is made of.
//!
//! The source's expressions run in a session of `source::connection::connect_sql`, which pins all
//! settings that the text of values depends on.

mod copy_side;
mod hash_rule;
mod lookup3;
mod pg_text;
mod repair;
mod report;
mod row_hash;
mod sessions;
mod shape;
mod source_side;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};

use crate::{
    backfill::{HeldStanding, RateLimiter, Snapshot, Standing, stand, stand_held},
    error::error_chain,
    failpoint::reached,
    olap::{OlapEngine, StoredTable, StoredVerification, TableState},
    pgoutput::QualifiedName,
    pipeline::{Context, EngineError, Writer, tables::from_stored},
    source::{
        catalog::{self, Fingerprint},
        connection::SqlClient,
    },
};

use self::{
    sessions::Sessions,
    shape::Shape,
    source_side::SourceSide,
    table::{Compared, ComparisonError, compare},
};

pub use hash_rule::{ColumnRule, RuleKind, SourceTypes, TableRule};
pub use report::{
    ColumnDifference, RepairReport, Report, RowDifference, RowVerdict, TableReport, TableVerdict,
};
pub use row_hash::{CellError, HashError, HashSum};
pub use shape::Part;

/// How long tables are compared at one LSN. The snapshot keeps VACUUM at the source from removing
/// rows, so a verification that takes longer goes on at another LSN.
const MAX_SNAPSHOT_AGE: Duration = Duration::from_secs(600);

/// How often a table is compared that was rewritten or locked meanwhile, and how often a repair is
/// tried whose hold on the stream was lost.
const MAX_TRIES: u32 = 3;

/// What is to be verified.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Request {
    /// The tables to compare, as `schema.table` at the source; none: all of them.
    pub tables: Vec<String>,
    /// The report holds the values that differ.
    pub shows_values: bool,
    /// Rows that differ are replaced by those of the source.
    #[serde(default)]
    pub repairs: bool,
    /// Of each table one of this number of parts of its rows is compared, the next one each time;
    /// 0 or 1: all rows.
    #[serde(default)]
    pub parts: u32,
    /// The most bytes of tables a second that the source reads for this.
    #[serde(default)]
    pub rate_limit_bytes: Option<u64>,
}

/// Compares tables of the copy with the source, each as of one LSN, and repairs what differs if
/// that is asked for. The results are kept in the target. A session has to follow the stream
/// meanwhile.
///
/// # Errors
/// The source or the target broke, or the copy has no table of a name that was asked for.
pub async fn verify<T: OlapEngine + 'static>(
    context: &Context,
    writer: &Writer<T>,
    request: &Request,
) -> Result<Report, EngineError> {
    let began = Instant::now();
    let limiter = request.rate_limit_bytes.map(RateLimiter::new);
    let next_parts = next_parts(writer, request.parts).await?;
    let run = Run { context, writer, request, limiter, next_parts };

    let mut outcomes = run.compare_all(None).await?;
    if request.repairs {
        run.repair_all(&mut outcomes).await?;
    }

    outcomes.sort_by(|one, other| one.report.table.cmp(&other.report.table));
    let rows: Vec<StoredVerification> =
        outcomes.iter().map(|outcome| outcome.report.stored(outcome.name.clone())).collect();
    let tables = outcomes.into_iter().map(|outcome| outcome.report).collect();
    let report = Report { tables, seconds: began.elapsed().as_secs_f64() };
    report.log();

    writer.call(move |target| target.put_verifications(&rows)).await?;
    Ok(report)
}

/// Returns the part of each table that is next, by the table's name at the source.
async fn next_parts<T: OlapEngine + 'static>(
    writer: &Writer<T>,
    parts: u32,
) -> Result<BTreeMap<String, u32>, EngineError> {
    if parts <= 1 {
        return Ok(BTreeMap::new());
    }

    let last = writer.call(move |target| target.last_parts(parts)).await?;
    Ok(last.into_iter().map(|(table, part)| (table.to_string(), (part + 1) % parts)).collect())
}

/// One verification.
struct Run<'a, T> {
    context: &'a Context,
    writer: &'a Writer<T>,
    request: &'a Request,
    limiter: Option<RateLimiter>,
    next_parts: BTreeMap<String, u32>,
}

/// What became of one table.
struct Outcome {
    oid: u32,
    name: QualifiedName,
    report: TableReport,
    /// The hashes of the keys of the rows that differ.
    keys: BTreeSet<u64>,
    has_more: bool,
    /// The table was not compared for a reason that may be gone soon.
    may_heal: bool,
}

/// A table that is ready to be compared.
struct Prepared {
    shape: Arc<Shape>,
    files: Vec<catalog::TableFile>,
    row_filter: Option<String>,
}

impl<T: OlapEngine + 'static> Run<'_, T> {
    /// Compares the tables that were asked for, or those of them with these oids. A table that was
    /// rewritten or locked meanwhile is compared again.
    async fn compare_all(&self, only: Option<&BTreeSet<u32>>) -> Result<Vec<Outcome>, EngineError> {
        let mut outcomes = self.compare_once(only).await?;

        for _ in 1..MAX_TRIES {
            let heals = outcomes.iter().filter(|outcome| outcome.may_heal);
            let again: BTreeSet<u32> = heals.map(|outcome| outcome.oid).collect();
            if again.is_empty() {
                break;
            }
            outcomes.retain(|outcome| !outcome.may_heal);
            outcomes.extend(self.compare_once(Some(&again)).await?);
        }
        Ok(outcomes)
    }

    /// Compares each of the tables once, at as many LSNs as it takes.
    async fn compare_once(
        &self,
        only: Option<&BTreeSet<u32>>,
    ) -> Result<Vec<Outcome>, EngineError> {
        let mut outcomes = Vec::new();
        let mut left: Option<BTreeSet<u32>> = only.cloned();

        loop {
            let lanes = self.context.options.workers.max(1);
            let standing = stand(self.context, self.writer, lanes).await?;
            let tables = chosen(&standing.tables, self.request)?;
            let is_left = |oid| left.as_ref().is_none_or(|left| left.contains(&oid));
            let queue: VecDeque<&StoredTable> =
                tables.into_iter().filter(|table| is_left(table.oid)).collect();

            let queue = Mutex::new(queue);
            let sessions = self.sessions(&standing.snapshot, lanes).await?;
            let lanes = standing.readers.into_iter().map(|reader| {
                Box::pin(self.lane(&sessions, reader, &queue, standing.lsn.to_string()))
            });
            outcomes.extend(try_join_all(lanes).await?.into_iter().flatten());

            let queue = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
            if queue.is_empty() {
                return Ok(outcomes);
            }
            left = Some(queue.into_iter().map(|table| table.oid).collect());
        }
    }

    /// Connects sessions that see the snapshot.
    async fn sessions(&self, snapshot: &Snapshot, count: usize) -> Result<Sessions, EngineError> {
        let first = snapshot.session(self.context, "verify").await?;
        refuse_other_hashes(&first).await?;

        let mut others = Vec::new();
        for _ in 1..count {
            others.push(snapshot.session(self.context, "verify").await?);
        }
        // A test changes tables here.
        tokio::task::block_in_place(|| reached("verify.standing"));
        Ok(Sessions::new(first, others))
    }

    /// Compares one table of the queue after the other, until the snapshot is old.
    async fn lane(
        &self,
        sessions: &Sessions,
        mut reader: T::Reader,
        queue: &Mutex<VecDeque<&StoredTable>>,
        lsn: String,
    ) -> Result<Vec<Outcome>, EngineError> {
        let began = Instant::now();
        let mut outcomes = Vec::new();
        while began.elapsed() < MAX_SNAPSHOT_AGE {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(stored) = next else { break };

            let (mut outcome, back) = self.compare_table(sessions, reader, stored).await?;
            outcome.report.lsn.clone_from(&lsn);
            outcomes.push(outcome);

            let Some(back) = back else { break };
            reader = back;
        }
        Ok(outcomes)
    }

    /// Compares one table. The reader does not come back when the comparison broke off.
    async fn compare_table(
        &self,
        sessions: &Sessions,
        reader: T::Reader,
        stored: &StoredTable,
    ) -> Result<(Outcome, Option<T::Reader>), EngineError> {
        let name = stored.source.to_string();
        let not_verified = |reason: String, may_heal| Outcome {
            oid: stored.oid,
            name: stored.source.clone(),
            report: TableReport::not_verified(name.clone(), reason),
            keys: BTreeSet::new(),
            has_more: false,
            may_heal,
        };

        if let Some(reason) = not_comparable(stored) {
            return Ok((not_verified(reason, false), Some(reader)));
        }
        let Some(prepared) = self.prepare(sessions, stored).await? else {
            let reason = "the source has no such table any more".to_owned();
            return Ok((not_verified(reason, false), Some(reader)));
        };

        let (began, part) = (Instant::now(), prepared.shape.part);
        let source = self.source_side(sessions, &prepared);
        match compare(&source, &prepared.shape, reader, self.request.shows_values).await {
            Ok(Compared { mut report, keys, has_more, reader }) => {
                report.part = part;
                report.seconds = began.elapsed().as_secs_f64();
                let (oid, name) = (stored.oid, stored.source.clone());
                let outcome = Outcome { oid, name, report, keys, has_more, may_heal: false };
                Ok((outcome, Some(reader)))
            }
            Err(error @ ComparisonError::Rewritten) => {
                Ok((not_verified(error.to_string(), true), None))
            }
            Err(error) => match error.refused() {
                Some(refused) => {
                    let reason = format!("the source refused to read it: {}", error_chain(refused));
                    Ok((not_verified(reason, true), None))
                }
                None => Err(error.into()),
            },
        }
    }

    fn source_side<'a>(&'a self, sessions: &'a Sessions, prepared: &'a Prepared) -> SourceSide<'a> {
        SourceSide {
            sessions,
            shape: &prepared.shape,
            files: &prepared.files,
            row_filter: prepared.row_filter.as_deref(),
            limiter: self.limiter.as_ref(),
            activity: &self.context.activity,
        }
    }

    /// Decides how a table is compared. `None`: the source has no such table.
    async fn prepare(
        &self,
        sessions: &Sessions,
        stored: &StoredTable,
    ) -> Result<Option<Prepared>, EngineError> {
        let sql = sessions.take().await;
        let Some(files) = catalog::files_of(&sql, stored.oid).await? else { return Ok(None) };
        let spec = Arc::new(from_stored(stored, self.context.options.null_unrepresentable));

        let oids: BTreeSet<u32> = spec.columns.iter().map(|column| column.type_oid).collect();
        let types = catalog::types(&sql, &oids.into_iter().collect::<Vec<_>>()).await?;
        let is_utf8 = catalog::server(&sql).await?.encoding == "UTF8";

        let row_filter = serde_json::from_str::<Fingerprint>(&spec.fingerprint)
            .ok()
            .and_then(|fingerprint| fingerprint.row_filter);

        let number = self.next_parts.get(&stored.source.to_string()).copied().unwrap_or_default();
        let part = Part { number, of: self.request.parts };
        let part = Some(part).filter(|part| part.of > 1);
        let shape = Shape::new(spec, SourceTypes { catalog: &types, is_utf8 }, part);
        Ok(Some(Prepared { shape: Arc::new(shape), files, row_filter }))
    }

    /// Repairs the tables that differ, and compares them again.
    async fn repair_all(&self, outcomes: &mut [Outcome]) -> Result<(), EngineError> {
        let mut repaired: BTreeMap<u32, RepairReport> = BTreeMap::new();
        for outcome in outcomes.iter_mut() {
            if outcome.report.verdict != TableVerdict::Different {
                continue;
            }

            if outcome.has_more || outcome.keys.len() > repair::MAX_REPAIRED {
                outcome.report.repair = Some(RepairReport::refused(format!(
                    "more than {} rows differ: copy the table again with `rhei resync {}`",
                    repair::MAX_REPAIRED,
                    outcome.report.table
                )));
                continue;
            }
            let report = self.repair_table(outcome).await?;
            repaired.insert(outcome.oid, report);
        }

        let oids: BTreeSet<u32> = repaired.keys().copied().collect();
        if oids.is_empty() {
            return Ok(());
        }

        let again = self.compare_all(Some(&oids)).await?;
        for (oid, mut report) in repaired {
            let now = again.iter().find(|outcome| outcome.oid == oid);
            report.verdict = now.map_or(TableVerdict::NotVerified, |now| now.report.verdict);
            if let Some(outcome) = outcomes.iter_mut().find(|outcome| outcome.oid == oid) {
                outcome.report.repair = Some(report);
            }
        }
        Ok(())
    }

    async fn repair_table(&self, outcome: &Outcome) -> Result<RepairReport, EngineError> {
        for _ in 0..MAX_TRIES {
            // The stream is held until the claim is dropped.
            let held = stand_held(self.context, self.writer, 1).await?;
            let HeldStanding { standing, checkpoint, claim: _claim } = held;
            let Standing { lsn, snapshot, tables, .. } = standing;

            let stored = tables.iter().find(|table| table.oid == outcome.oid);
            let Some(stored) = stored.filter(|stored| not_comparable(stored).is_none()) else {
                return Ok(RepairReport::refused("the table is being copied".to_owned()));
            };

            let sessions = self.sessions(&snapshot, 1).await?;
            let Some(prepared) = self.prepare(&sessions, stored).await? else {
                return Ok(RepairReport::refused("the source has no such table".to_owned()));
            };

            let source = self.source_side(&sessions, &prepared);
            let mended = repair::repair(
                (self.context, self.writer),
                checkpoint..=lsn,
                &source,
                &prepared.shape,
                outcome.keys.clone(),
            );
            match mended.await {
                Ok(Some(repaired)) => return Ok(RepairReport::new(repaired)),
                // The next try stands elsewhere.
                Ok(None) | Err(ComparisonError::Rewritten) => {}
                // The rows are too large.
                Err(ComparisonError::Failed(EngineError::Setup(reason))) => {
                    return Ok(RepairReport::refused(format!(
                        "{reason}: copy the table again with `rhei resync {}`",
                        outcome.report.table
                    )));
                }
                Err(error) => match error.refused() {
                    Some(refused) => return Ok(RepairReport::refused(error_chain(refused))),
                    None => return Err(error.into()),
                },
            }
        }

        Ok(RepairReport::refused("the table changed all the time".to_owned()))
    }
}

/// Refuses a server whose hash functions give other numbers: PostgreSQL does not promise them from
/// one major version to the next.
async fn refuse_other_hashes(sql: &SqlClient) -> Result<(), EngineError> {
    let cells = [
        lookup3::hash_u32(7),
        lookup3::hash_i64(8),
        lookup3::hash_bytes(b"rhei"),
        lookup3::hash_f64(1.5),
        lookup3::hash_numeric(125, 1),
    ];
    let expected = lookup3::hash_row(cells.into_iter().fold(0, lookup3::combine)).cast_signed();

    let query = "SELECT pg_catalog.hashint4extended(0, pg_catalog.hash_record_extended(\
                 ROW(7::int4, 8::int8, 'rhei'::text COLLATE \"C\", 1.5::float8, 12.5::numeric), \
                 0))";
    let found: i64 = sql.query_one(query, &[]).await?.try_get(0)?;
    if found == expected {
        return Ok(());
    }

    Err(EngineError::Setup(
        "this server hashes values in another way than the servers that rhei knows\nhint: a newer \
         rhei may know it"
            .to_owned(),
    ))
}

/// Returns the tables that are asked for, by name.
fn chosen<'a>(
    stored: &'a [StoredTable],
    request: &Request,
) -> Result<Vec<&'a StoredTable>, EngineError> {
    let known: BTreeMap<String, &StoredTable> = stored
        .iter()
        .filter(|table| table.state != TableState::Dropped)
        .map(|table| (table.source.to_string(), table))
        .collect();

    if request.tables.is_empty() {
        return Ok(known.into_values().collect());
    }

    let asked: BTreeSet<&String> = request.tables.iter().collect();
    let find = |name: &String| {
        known.get(name).copied().ok_or_else(|| {
            EngineError::Setup(format!(
                "there is no table {name} in this copy\nhint: `rhei status` lists the tables"
            ))
        })
    };
    asked.into_iter().map(find).collect()
}

/// Returns why a table cannot be compared, if that is so.
fn not_comparable(stored: &StoredTable) -> Option<String> {
    match &stored.state {
        TableState::Live if !stored.has_shadow => None,
        TableState::Error(pause) => Some(format!("the table is paused: {}", pause.reason)),
        _ => Some("the table is being copied".to_owned()),
    }
}
