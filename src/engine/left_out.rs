//! Relations whose changes the stream brings and that are left out of the copy, each for a known
//! reason.

use super::{SyncEngine, cycle::with_deadline, schema::Place};
use crate::{
    Lsn,
    change::followed::Untracked,
    olap::OlapEngine,
    pgoutput::{QualifiedName, relation::Relation},
    pipeline::{EngineError, left_out::Reason},
    source::CdcConsumer,
};

/// Reports a table of the copy that is not published any more.
pub(super) fn warn_unpublished(table: &QualifiedName) {
    tracing::warn!(
        event = "table_unpublished",
        %table,
        "no longer published; its copy is kept as it is"
    );
}

impl<C: CdcConsumer, T: OlapEngine + 'static> SyncEngine<C, T> {
    /// Returns whether the copy of a table is known to hold what was committed at `commit_lsn`.
    fn is_in_copy(&self, oid: u32, commit_lsn: Lsn) -> bool {
        let spec = self.catalogs.as_ref().and_then(|catalogs| catalogs.spec(oid));
        spec.is_some_and(|spec| commit_lsn < spec.copy_lsn && spec.copy_xids.is_none())
    }

    /// Finds out what the relations are whose changes came and were not taken: a relation is left
    /// out only if the reason is known. Returns a reason to attach again when one of the relations
    /// is a table to copy, or a part of one.
    pub(super) async fn place_untracked(&mut self) -> Result<Option<String>, EngineError> {
        let untracked = self.consumer.take_untracked();

        let Some(catalogs) = self.catalogs.as_mut().filter(|_| !untracked.is_empty()) else {
            return Ok(None);
        };

        let relations: Vec<&Relation> =
            untracked.iter().map(|untracked| &untracked.relation).collect();
        let Some(places) = with_deadline(catalogs.places(&relations)).await? else {
            self.consumer.put_back_untracked(untracked);
            return Ok(None);
        };

        let is_in_copy = |oid, commit_lsn| self.is_in_copy(oid, commit_lsn);
        let Consequences { left_out, copies, reasons } =
            Consequences::of(&untracked, &places, is_in_copy);

        for (relation, reason, changes) in left_out {
            self.left_out.add(relation, reason, changes);
        }
        self.copy_again(copies).await?;
        Ok((!reasons.is_empty()).then(|| reasons.join("; ")))
    }
}

/// What follows from changes that were passed over.
#[derive(Debug, Default, PartialEq, Eq)]
struct Consequences<'a> {
    /// Relations that are left out of the copy, and how many of their changes.
    left_out: Vec<(&'a QualifiedName, Reason, u64)>,
    /// Tables to copy again, with the reason.
    copies: Vec<(u32, String)>,
    /// Reasons to attach again.
    reasons: Vec<String>,
}

impl<'a> Consequences<'a> {
    /// Judges relations by their places, which are in the same order. `is_in_copy` returns whether
    /// the copy of a table is known to hold what was committed at a position.
    fn of(
        untracked: &'a [Untracked],
        places: &[Place],
        is_in_copy: impl Fn(u32, Lsn) -> bool,
    ) -> Self {
        let mut found = Self::default();

        for (Untracked { relation, changes, last_change }, place) in untracked.iter().zip(places) {
            match *place {
                Place::AwaitsCopy => {}
                Place::LeftOut(reason) => found.left_out.push((&relation.name, reason, *changes)),
                Place::New => found.reasons.push(format!("table {} is new", relation.name)),
                // The copy of the table holds the changes that came before it.
                Place::PartOf(root) if is_in_copy(root, *last_change) => {}
                Place::PartOf(root) => {
                    let why = format!("rows came for its partition {} alone", relation.name);
                    if !found.copies.iter().any(|(oid, _)| *oid == root) {
                        found.copies.push((root, why));
                    }
                }
            }
        }

        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::ReplicaIdentity;

    /// The root of a partition tree, whose copy holds what was committed before this position.
    const ROOT: u32 = 10;
    const COPIED_AT: Lsn = Lsn(100);

    /// A name, the places of relations with their last changes, and what follows.
    type Case<'a> = (&'a str, &'a [(Place, Lsn)], &'a [&'a str]);

    fn untracked(oid: u32, last_change: Lsn) -> Untracked {
        let name = QualifiedName::new("public", format!("t{oid}"));
        let replica_identity = ReplicaIdentity::Default;
        let relation = Relation { oid, name, replica_identity, columns: Vec::new() };
        Untracked { relation, changes: 3, last_change }
    }

    /// What follows from changes of relations, as text. Relations are numbered from 1.
    fn told(cases: &[(Place, Lsn)]) -> Vec<String> {
        let numbered = (1..).zip(cases);
        let untracked: Vec<Untracked> =
            numbered.map(|(oid, (_, last_change))| untracked(oid, *last_change)).collect();
        let places: Vec<Place> = cases.iter().map(|(place, _)| *place).collect();

        let is_in_copy = |oid: u32, commit_lsn: Lsn| oid == ROOT && commit_lsn < COPIED_AT;
        let Consequences { left_out, copies, reasons } =
            Consequences::of(&untracked, &places, is_in_copy);

        let left_out = left_out
            .into_iter()
            .map(|(relation, reason, changes)| format!("{relation}: {changes} {reason:?}"));
        let copies = copies.into_iter().map(|(oid, why)| format!("copy {oid}: {why}"));
        left_out.chain(copies).chain(reasons).collect()
    }

    #[test]
    fn a_change_that_was_passed_over_is_left_out_only_for_a_known_reason() {
        let (before, after) = (Lsn(99), Lsn(100));
        let alone = "copy 10: rows came for its partition public.t1 alone";

        let cases: &[Case<'_>] = &[
            ("nothing", &[], &[]),
            ("a paused table", &[(Place::AwaitsCopy, after)], &[]),
            (
                "a table that the settings exclude",
                &[(Place::LeftOut(Reason::Excluded), after)],
                &["public.t1: 3 Excluded"],
            ),
            (
                "a table that is published no more",
                &[(Place::LeftOut(Reason::NotPublished), after)],
                &["public.t1: 3 NotPublished"],
            ),
            ("a new table", &[(Place::New, after)], &["table public.t1 is new"]),
            ("a partition, before the copy", &[(Place::PartOf(ROOT), before)], &[]),
            ("a partition, at the copy", &[(Place::PartOf(ROOT), after)], &[alone]),
            (
                "a partition of a table without a copy",
                &[(Place::PartOf(11), before)],
                &["copy 11: rows came for its partition public.t1 alone"],
            ),
            (
                "two partitions of one table",
                &[(Place::PartOf(ROOT), after), (Place::PartOf(ROOT), after)],
                &[alone],
            ),
            (
                "all at once",
                &[
                    (Place::PartOf(ROOT), after),
                    (Place::New, after),
                    (Place::LeftOut(Reason::Excluded), after),
                    (Place::New, before),
                ],
                &[
                    "public.t3: 3 Excluded",
                    alone,
                    "table public.t2 is new",
                    "table public.t4 is new",
                ],
            ),
        ];

        for (name, relations, expected) in cases {
            assert_eq!(told(relations), *expected, "{name}");
        }
    }
}
