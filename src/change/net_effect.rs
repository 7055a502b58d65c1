//! Reduces many changes of a row to at most one delete and one insert.
//!
//! For a keyed table the batch keeps, per key that a row has *now*, the key that the row had before
//! the batch (its origin, if any) and its present value. The origins of rows that are gone wait in
//! a list of their own. Then
//!
//! - deletes = origins of changed rows + origins of rows that are gone: rows that stand in the
//!   target, each once;
//! - inserts = present values, each key once.
//!
//! Deletes run before inserts, so swapped keys (`id = id + 1`) and a key that is deleted and
//! inserted again need no special handling (traps 52, 53). A TRUNCATE drops all changes before it
//! (trap 60). A change that does not fit (an update of a row that the batch has seen deleted, an
//! insert of a key that is taken) can only mean that the copy and the source differ: rhei pauses
//! the table and guesses nothing.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable, hash_table::Entry};

use super::{
    Remedy, RowCounts,
    arena::{Arena, Slice},
};
use crate::pgoutput::tuple::{Field, Tuple, write_field};

/// A change that does not fit the changes that the batch has seen of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NetEffectError {
    #[error("an insert of a key that is already there")]
    DuplicateKey,
    #[error("an update or delete of a row that is not there")]
    NoSuchRow,
    #[error(
        "an inserted row lacks the value of a TOASTed column, as when an update moves a row into a \
         row filter"
    )]
    MissingToastValue,
    #[error("an update or delete on a table that has no replica identity")]
    NoIdentity,
    #[error("a change whose key is missing on the wire")]
    KeyMissing,
    #[error("an old row that is not whole although the table has REPLICA IDENTITY FULL")]
    OldRowMissing,
}

impl NetEffectError {
    /// Returns how the table is brought back. A value that is missing in the stream is at the
    /// source; any other change that does not fit means that the copy differs, and the operator has
    /// to examine that.
    pub fn remedy(self) -> Remedy {
        if self == Self::MissingToastValue { Remedy::CopyAgain } else { Remedy::Operator }
    }
}

/// The part of the old row that one UPDATE or DELETE carries, in the order of the table's columns.
#[derive(Debug, Clone, Copy)]
pub enum OldRow {
    Absent,
    /// The row holds only the replica identity's columns.
    Key(Slice),
    Full(Slice),
}

impl OldRow {
    fn row(self) -> Option<Slice> {
        match self {
            Self::Absent => None,
            Self::Key(row) | Self::Full(row) => Some(row),
        }
    }
}

/// The net effect of a batch on one table.
#[derive(Debug)]
pub struct NetEffect {
    rows: Rows,
    /// The transaction that ran the last TRUNCATE.
    pub truncated: Option<u32>,
    pub counts: RowCounts,
}

#[derive(Debug)]
enum Rows {
    Keyed(KeyedRows),
    WholeRow(WholeRows),
    AppendOnly(Vec<Slice>),
}

/// The rows of a table that has a key.
#[derive(Debug)]
struct KeyedRows {
    columns: usize,
    key: Vec<usize>,
    hasher: DefaultHashBuilder,
    index: Index,
    states: Vec<RowState>,
    /// The origins of rows that are gone.
    gone: Vec<Slice>,
    /// The key that [`Self::read_key`] has read.
    scratch: Vec<u8>,
}

/// The rows of a table without a key, and by how many each became more or less.
#[derive(Debug)]
struct WholeRows {
    columns: usize,
    hasher: DefaultHashBuilder,
    index: Index,
    rows: Vec<(Slice, i64)>,
}

/// The positions of rows, by the hash of their keys. A part of the hash is stored beside each
/// position, so that neither growing the index nor, as a rule, a comparison has to fetch the key.
type Index = HashTable<(u32, u32)>;

/// Returns the stored part of a hash, and the hash that orders the table, which follows from the
/// part.
fn hash_of(hasher: &DefaultHashBuilder, bytes: &[u8]) -> (u32, u64) {
    let part = hasher.hash_one(bytes) as u32;
    (part, mix(part))
}

fn mix(part: u32) -> u64 {
    u64::from(part).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// A row that exists at the end of the batch so far.
#[derive(Debug, Clone, Copy)]
struct RowState {
    key: Slice,
    /// The key that the row had before the batch.
    origin: Option<Slice>,
    /// The fields are `Unchanged` only where the origin row has to supply them.
    tuple: Slice,
    is_there: bool,
}

/// The remaining changes of a batch on one table.
#[derive(Debug, Default)]
pub struct Survivors {
    /// The keys (see [`key_tuple`]) of the rows to delete.
    pub deleted_keys: Vec<Slice>,
    /// The whole rows to delete, and the number of each.
    pub deleted_rows: Vec<(Slice, i64)>,
    /// The complete rows to insert.
    pub inserts: Vec<Slice>,
    /// The rows to insert that lack values, and the key of the row that has these values.
    pub patches: Vec<(Slice, Slice)>,
}

/// Reads the fields of a key that `write_key` wrote: the key is a tuple of the key's columns.
pub fn key_tuple(bytes: &[u8], key_columns: usize) -> Tuple<'_> {
    Tuple::trusted(bytes, key_columns)
}

/// Writes the key columns of a row as a tuple of their own. The function falls back to `old` where
/// the new row leaves a TOASTed key column out (trap 50). Key columns are NOT NULL (trap 55).
fn write_key(
    out: &mut Vec<u8>,
    key: &[usize],
    tuple: Tuple<'_>,
    old: Option<Tuple<'_>>,
) -> Result<(), NetEffectError> {
    out.clear();
    for &column in key {
        let field = match tuple.field(column) {
            Some(Field::Unchanged) => old.and_then(|old| old.field(column)),
            field => field,
        };

        match field {
            Some(field @ Field::Text(_)) => write_field(out, field),
            _ => return Err(NetEffectError::KeyMissing),
        }
    }
    Ok(())
}

impl NetEffect {
    /// The bytes of bookkeeping beside the arena for one change, for the memory budget.
    pub const ROW_BYTES: usize = size_of::<RowState>() + 16;

    /// Makes an empty net effect for a table of this key: rows by key, whole rows as a multiset, or
    /// append-only rows.
    pub fn new(key: &super::Key, columns: usize) -> Self {
        let rows = match key {
            super::Key::Columns(key) => Rows::Keyed(KeyedRows {
                columns,
                key: key.clone(),
                hasher: DefaultHashBuilder::default(),
                index: HashTable::new(),
                states: Vec::new(),
                gone: Vec::new(),
                scratch: Vec::new(),
            }),
            super::Key::WholeRow => Rows::WholeRow(WholeRows {
                columns,
                hasher: DefaultHashBuilder::default(),
                index: HashTable::new(),
                rows: Vec::new(),
            }),
            super::Key::AppendOnly => Rows::AppendOnly(Vec::new()),
        };

        Self { rows, truncated: None, counts: RowCounts::default() }
    }

    pub fn insert(&mut self, arena: &mut Arena, new: Slice) -> Result<(), NetEffectError> {
        self.counts.inserted += 1;
        if new.has_unchanged_toast() {
            return Err(NetEffectError::MissingToastValue);
        }

        match &mut self.rows {
            Rows::Keyed(rows) => rows.insert(arena, new),
            Rows::WholeRow(rows) => {
                rows.add(arena, new, 1);
                Ok(())
            }
            Rows::AppendOnly(rows) => {
                rows.push(new);
                Ok(())
            }
        }
    }

    pub fn update(
        &mut self,
        arena: &mut Arena,
        old: OldRow,
        new: Slice,
    ) -> Result<(), NetEffectError> {
        self.counts.updated += 1;

        match &mut self.rows {
            Rows::Keyed(rows) => rows.update(arena, old, new, self.truncated.is_some()),
            Rows::WholeRow(rows) => rows.update(arena, old, new),
            Rows::AppendOnly(_) => Err(NetEffectError::NoIdentity),
        }
    }

    pub fn delete(&mut self, arena: &mut Arena, old: OldRow) -> Result<(), NetEffectError> {
        self.counts.deleted += 1;

        match &mut self.rows {
            Rows::Keyed(rows) => rows.delete(arena, old, self.truncated.is_some()),
            Rows::WholeRow(rows) => {
                let OldRow::Full(old) = old else { return Err(NetEffectError::OldRowMissing) };
                rows.add(arena, old, -1);
                Ok(())
            }
            Rows::AppendOnly(_) => Err(NetEffectError::NoIdentity),
        }
    }

    /// Drops all rows that exist now, including those of this batch. `xid` is the transaction of
    /// the TRUNCATE.
    pub fn truncate(&mut self, xid: u32) {
        self.counts.truncates += 1;
        self.truncated = Some(xid);

        match &mut self.rows {
            Rows::Keyed(KeyedRows { index, states, gone, .. }) => {
                index.clear();
                states.clear();
                gone.clear();
            }
            Rows::WholeRow(WholeRows { index, rows, .. }) => {
                index.clear();
                rows.clear();
            }
            Rows::AppendOnly(rows) => rows.clear(),
        }
    }

    /// Copies the bytes that the net effect refers to into another arena.
    pub fn copy_from(&mut self, from: &Arena, arena: &mut Arena) {
        match &mut self.rows {
            Rows::Keyed(KeyedRows { states, gone, .. }) => {
                for state in states.iter_mut() {
                    if !state.is_there {
                        // The state only keeps its position, since the index stores positions.
                        (state.key, state.origin, state.tuple) =
                            (Slice::NOTHING, None, Slice::NOTHING);
                        continue;
                    }

                    state.key = arena.copy_from(from, state.key);
                    state.origin = state.origin.map(|origin| arena.copy_from(from, origin));
                    state.tuple = arena.copy_from(from, state.tuple);
                }

                gone.iter_mut().for_each(|key| *key = arena.copy_from(from, *key));
            }
            Rows::WholeRow(WholeRows { rows, .. }) => {
                rows.iter_mut().for_each(|(row, _)| *row = arena.copy_from(from, *row))
            }
            Rows::AppendOnly(rows) => {
                rows.iter_mut().for_each(|row| *row = arena.copy_from(from, *row))
            }
        }
    }

    /// Returns the remaining changes.
    ///
    /// # Errors
    /// After a TRUNCATE the batch deleted more equal rows than it inserted.
    pub fn survivors(self) -> Result<Survivors, NetEffectError> {
        let mut left = Survivors::default();

        match self.rows {
            Rows::Keyed(KeyedRows { states, gone, .. }) => {
                left.deleted_keys = gone;
                for state in states.into_iter().filter(|state| state.is_there) {
                    left.deleted_keys.extend(state.origin);
                    match state.origin {
                        _ if !state.tuple.has_unchanged_toast() => left.inserts.push(state.tuple),
                        Some(origin) => left.patches.push((state.tuple, origin)),
                        // Only rows from before the batch can have open values.
                        None => return Err(NetEffectError::MissingToastValue),
                    }
                }
            }
            Rows::WholeRow(WholeRows { rows, .. }) => {
                for (row, count) in rows {
                    match count {
                        1.. => left.inserts.extend(std::iter::repeat_n(row, count as usize)),
                        0 => {}
                        ..0 if self.truncated.is_some() => return Err(NetEffectError::NoSuchRow),
                        ..0 => left.deleted_rows.push((row, -count)),
                    }
                }
            }
            Rows::AppendOnly(rows) => left.inserts = rows,
        }

        Ok(left)
    }
}

impl KeyedRows {
    #[inline]
    fn insert(&mut self, arena: &mut Arena, new: Slice) -> Result<(), NetEffectError> {
        self.read_key(arena, new)?;
        self.put(arena, None, new)
    }

    #[inline]
    fn update(
        &mut self,
        arena: &mut Arena,
        old: OldRow,
        new: Slice,
        is_truncated: bool,
    ) -> Result<(), NetEffectError> {
        self.read_key(arena, old.row().unwrap_or(new))?;
        let taken = self.take(arena);
        if taken.is_none() && is_truncated {
            return Err(NetEffectError::NoSuchRow);
        }

        let merged = if new.has_unchanged_toast() {
            self.merge_unchanged(arena, old, new, taken)
        } else {
            new
        };

        if let Some(state) = taken {
            arena.mark_garbage(state.tuple);
        }

        let origin = match taken {
            Some(state) => state.origin,
            None => Some(arena.store(&self.scratch)),
        };

        self.read_key(arena, merged)?;
        self.put(arena, origin, merged)
    }

    /// Stores a row that lacks values again, with those that are known.
    ///
    /// A value that the wire left out comes from the old row when that row is whole, else from an
    /// earlier write of this batch (`taken`), else it stays open and the target supplies it (trap
    /// 51). A TOASTed key column is in `old` in either form (trap 50).
    fn merge_unchanged(
        &self,
        arena: &mut Arena,
        old: OldRow,
        new: Slice,
        taken: Option<RowState>,
    ) -> Slice {
        let tuple = Tuple::trusted(arena.get(new), self.columns);
        let mut old_fields =
            old.row().map(|row| Tuple::trusted(arena.get(row), self.columns).fields());
        let mut before_fields =
            taken.map(|state| Tuple::trusted(arena.get(state.tuple), self.columns).fields());

        let mut merged = Vec::with_capacity(tuple.bytes().len() + 256);
        for (column, field) in tuple.fields().enumerate() {
            let of_old = old_fields.as_mut().and_then(Iterator::next);
            let of_before = before_fields.as_mut().and_then(Iterator::next);
            let supplied = match field {
                Field::Unchanged => match old {
                    OldRow::Full(_) => of_old,
                    OldRow::Key(_) if self.key.contains(&column) => of_old,
                    _ => of_before,
                },
                other => Some(other),
            };
            write_field(&mut merged, supplied.unwrap_or(Field::Unchanged));
        }

        arena.mark_garbage(new);
        arena.store_row(Tuple::trusted(&merged, self.columns))
    }

    #[inline]
    fn delete(
        &mut self,
        arena: &mut Arena,
        old: OldRow,
        is_truncated: bool,
    ) -> Result<(), NetEffectError> {
        let old = old.row().ok_or(NetEffectError::KeyMissing)?;
        self.read_key(arena, old)?;

        match self.take(arena) {
            Some(state) => {
                arena.mark_garbage(state.tuple);
                self.gone.extend(state.origin);
            }
            None if is_truncated => return Err(NetEffectError::NoSuchRow),
            None => self.gone.push(arena.store(&self.scratch)),
        }
        Ok(())
    }

    /// Reads the key of a row, for [`Self::take`] and [`Self::put`].
    #[inline]
    fn read_key(&mut self, arena: &Arena, row: Slice) -> Result<(), NetEffectError> {
        let tuple = Tuple::trusted(arena.get(row), self.columns);
        write_key(&mut self.scratch, &self.key, tuple, None)
    }

    /// Removes the row whose key was read from the batch, and returns it.
    fn take(&mut self, arena: &Arena) -> Option<RowState> {
        let Self { hasher, index, states, scratch, .. } = self;
        let key = scratch.as_slice();

        let (part, hash) = hash_of(hasher, key);
        let is_same = |&(other, at): &(u32, u32)| {
            other == part
                && states.get(at as usize).is_some_and(|state| arena.get(state.key) == key)
        };

        let ((_, at), _) = index.find_entry(hash, is_same).ok()?.remove();
        let state = states.get_mut(at as usize)?;
        state.is_there = false;
        Some(*state)
    }

    /// Stores a row under the key that was read, which must be free.
    fn put(
        &mut self,
        arena: &mut Arena,
        origin: Option<Slice>,
        tuple: Slice,
    ) -> Result<(), NetEffectError> {
        let Self { hasher, index, states, scratch, .. } = self;
        let key = scratch.as_slice();

        let (part, hash) = hash_of(hasher, key);
        let is_same = |&(other, at): &(u32, u32)| {
            other == part
                && states.get(at as usize).is_some_and(|state| arena.get(state.key) == key)
        };

        match index.entry(hash, is_same, |&(part, _)| mix(part)) {
            Entry::Occupied(_) => Err(NetEffectError::DuplicateKey),
            Entry::Vacant(vacant) => {
                vacant.insert((part, states.len() as u32));
                // A row that keeps its key shares the bytes of the key with the origin.
                let key = match origin {
                    Some(origin) if arena.get(origin) == key => origin,
                    _ => arena.store(key),
                };

                states.push(RowState { key, origin, tuple, is_there: true });
                Ok(())
            }
        }
    }
}

impl WholeRows {
    fn update(&mut self, arena: &mut Arena, old: OldRow, new: Slice) -> Result<(), NetEffectError> {
        let OldRow::Full(old) = old else { return Err(NetEffectError::OldRowMissing) };
        let new =
            if new.has_unchanged_toast() { self.merge_unchanged(arena, old, new) } else { new };

        if old.has_unchanged_toast() || new.has_unchanged_toast() {
            return Err(NetEffectError::OldRowMissing);
        }

        self.add(arena, old, -1);
        self.add(arena, new, 1);
        Ok(())
    }

    /// Stores a row that lacks values again, with the values of the old row.
    fn merge_unchanged(&self, arena: &mut Arena, old: Slice, new: Slice) -> Slice {
        let old_tuple = Tuple::trusted(arena.get(old), self.columns);
        let new_tuple = Tuple::trusted(arena.get(new), self.columns);

        let mut merged = Vec::with_capacity(new_tuple.bytes().len() + 256);
        for (new_field, old_field) in new_tuple.fields().zip(old_tuple.fields()) {
            write_field(
                &mut merged,
                if new_field == Field::Unchanged { old_field } else { new_field },
            );
        }

        arena.mark_garbage(new);
        arena.store_row(Tuple::trusted(&merged, self.columns))
    }

    /// Counts a whole row up or down.
    fn add(&mut self, arena: &Arena, row: Slice, by: i64) {
        let Self { hasher, index, rows, .. } = self;
        let bytes = arena.get(row);

        let (part, hash) = hash_of(hasher, bytes);
        let is_same = |&(other, at): &(u32, u32)| {
            other == part
                && rows.get(at as usize).is_some_and(|(other, _)| arena.get(*other) == bytes)
        };

        match index.entry(hash, is_same, |&(part, _)| mix(part)) {
            Entry::Occupied(found) => {
                if let Some((_, count)) = rows.get_mut(found.get().1 as usize) {
                    *count += by;
                }
            }
            Entry::Vacant(vacant) => {
                vacant.insert((part, rows.len() as u32));
                rows.push((row, by));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::change::{Key, arena::OPEN_BYTES};

    type Row = Vec<Option<String>>;

    fn store(arena: &mut Arena, row: &[Field<'_>]) -> Slice {
        let mut bytes = Vec::new();
        row.iter().for_each(|&field| write_field(&mut bytes, field));
        arena.store_row(Tuple::trusted(&bytes, row.len()))
    }

    fn text(value: &str) -> Field<'_> {
        Field::Text(value.as_bytes())
    }

    fn row_of(tuple: Tuple<'_>) -> Row {
        tuple
            .fields()
            .map(|field| match field {
                Field::Text(text) => Some(String::from_utf8_lossy(text).into_owned()),
                Field::Null => None,
                Field::Unchanged => Some("<unchanged>".to_owned()),
            })
            .collect()
    }

    /// Applies survivors to a naive target as `olap::apply` does: patches read first, then deletes,
    /// then inserts.
    fn apply(target: &mut BTreeMap<String, Row>, arena: &Arena, truncated: bool, left: &Survivors) {
        if truncated {
            target.clear();
        }
        let key_of = |slice: Slice| row_of(key_tuple(arena.get(slice), 1))[0].clone().unwrap();
        let patched: Vec<Row> = left
            .patches
            .iter()
            .map(|&(tuple, origin)| {
                let before = target[&key_of(origin)].clone();
                row_of(Tuple::trusted(arena.get(tuple), 3))
                    .into_iter()
                    .zip(before)
                    .map(|(new, old)| if new.as_deref() == Some("<unchanged>") { old } else { new })
                    .collect()
            })
            .collect();
        for &key in &left.deleted_keys {
            assert!(target.remove(&key_of(key)).is_some(), "a delete must hit exactly one row");
        }
        let whole = left.inserts.iter().map(|&row| row_of(Tuple::trusted(arena.get(row), 3)));
        for row in whole.chain(patched) {
            assert!(
                target.insert(row[0].clone().unwrap(), row).is_none(),
                "an insert must find its key free"
            );
        }
    }

    /// Trap 51 and 52: I+U, U+U, key change with an open value, D+I.
    #[test]
    fn an_open_value_is_read_under_the_key_that_the_row_had_before_the_batch() {
        let mut arena = Arena::default();
        let mut effect = NetEffect::new(&Key::Columns(vec![0]), 3);
        let moved = store(&mut arena, &[text("2"), text("b"), Field::Unchanged]);
        let old = store(&mut arena, &[text("1"), Field::Null, Field::Null]);
        effect.update(&mut arena, OldRow::Key(old), moved).unwrap();
        let again = store(&mut arena, &[text("2"), text("c"), Field::Unchanged]);
        effect.update(&mut arena, OldRow::Absent, again).unwrap();
        let left = effect.survivors().unwrap();
        let mut target = BTreeMap::from([(
            "1".into(),
            vec![Some("1".into()), Some("a".into()), Some("doc".into())],
        )]);
        apply(&mut target, &arena, false, &left);
        assert_eq!(
            target["2"],
            [Some("2".to_owned()), Some("c".to_owned()), Some("doc".to_owned())]
        );
        assert_eq!(target.len(), 1);
    }

    /// Trap 50: a TOASTed key sends `K` on any update and is left out of the new row.
    #[test]
    fn a_toasted_key_that_the_new_row_leaves_out_comes_from_the_old_key() {
        let mut arena = Arena::default();
        let mut effect = NetEffect::new(&Key::Columns(vec![0]), 3);
        let old = store(&mut arena, &[text("long key"), Field::Null, Field::Null]);
        let new = store(&mut arena, &[Field::Unchanged, text("2"), text("x")]);
        effect.update(&mut arena, OldRow::Key(old), new).unwrap();
        let left = effect.survivors().unwrap();
        assert_eq!(
            row_of(Tuple::trusted(arena.get(left.inserts[0]), 3))[0].as_deref(),
            Some("long key")
        );
    }

    /// The target reads those values and writes them again, however short the message was (trap
    /// 51).
    #[test]
    fn rows_that_lack_values_count_for_what_they_will_take_in_the_target() {
        let mut arena = Arena::default();
        let mut effect = NetEffect::new(&Key::Columns(vec![0]), 2);
        let update = |arena: &mut Arena, effect: &mut NetEffect, key: &str, value: Field<'_>| {
            let new = store(arena, &[text(key), value]);
            effect.update(arena, OldRow::Absent, new).unwrap();
        };
        for key in ["1", "1", "2", "1"] {
            update(&mut arena, &mut effect, key, Field::Unchanged);
        }
        assert_eq!(arena.len() / OPEN_BYTES, 2);
        update(&mut arena, &mut effect, "1", text("short"));
        assert_eq!(arena.len() / OPEN_BYTES, 1);
    }

    /// Trap 53: deferrable keys under REPLICA IDENTITY FULL pass through duplicates.
    #[test]
    fn whole_rows_may_pass_through_duplicates() {
        let mut arena = Arena::default();
        let mut effect = NetEffect::new(&Key::WholeRow, 1);
        for (from, to) in [("1", "2"), ("2", "3"), ("3", "4")] {
            let (old, new) = (store(&mut arena, &[text(from)]), store(&mut arena, &[text(to)]));
            effect.update(&mut arena, OldRow::Full(old), new).unwrap();
        }
        let left = effect.survivors().unwrap();
        let word = |slice| row_of(Tuple::trusted(arena.get(slice), 1))[0].clone().unwrap();
        assert_eq!(
            left.deleted_rows.iter().map(|&(row, n)| (word(row), n)).collect::<Vec<_>>(),
            [("1".to_owned(), 1)]
        );
        assert_eq!(left.inserts.iter().map(|&row| word(row)).collect::<Vec<_>>(), ["4".to_owned()]);
    }

    /// Trap 54: no identity, no guess.
    #[test]
    fn an_update_without_identity_is_refused() {
        let mut arena = Arena::default();
        let mut effect = NetEffect::new(&Key::AppendOnly, 1);
        let row = store(&mut arena, &[text("1")]);
        assert_eq!(effect.update(&mut arena, OldRow::Absent, row), Err(NetEffectError::NoIdentity));
        assert_eq!(effect.delete(&mut arena, OldRow::Key(row)), Err(NetEffectError::NoIdentity));
    }

    /// An update that moves a row into a row filter arrives as an INSERT with an open value (trap
    /// 48a).
    #[test]
    fn an_insert_with_an_open_value_is_refused() {
        let mut arena = Arena::default();
        let mut effect = NetEffect::new(&Key::Columns(vec![0]), 2);
        let row = store(&mut arena, &[text("20"), Field::Unchanged]);
        assert_eq!(effect.insert(&mut arena, row), Err(NetEffectError::MissingToastValue));
    }

    #[test]
    fn an_insert_of_a_key_that_is_there_is_refused() {
        let mut arena = Arena::default();
        let mut effect = NetEffect::new(&Key::Columns(vec![0]), 1);
        let row = store(&mut arena, &[text("1")]);
        effect.insert(&mut arena, row).unwrap();
        assert_eq!(effect.insert(&mut arena, row), Err(NetEffectError::DuplicateKey));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Insert(u8, u8),
        Update { from: u8, to: u8, value: u8, doc: bool, full: bool },
        Delete(u8),
        Truncate,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0..6u8, any::<u8>()).prop_map(|(key, value)| Op::Insert(key, value)),
            6 => (0..6u8, 0..6u8, any::<u8>(), any::<bool>(), any::<bool>())
                .prop_map(|(from, to, value, doc, full)| Op::Update { from, to, value, doc, full }),
            3 => (0..6u8).prop_map(Op::Delete),
            1 => Just(Op::Truncate),
        ]
    }

    proptest! {
        /// Trap 52: against applying one change after the other, over several batches.
        #[test]
        fn net_effect_equals_sequential_apply(
            batches in prop::collection::vec(prop::collection::vec(op(), 0..25), 1..4),
        ) {
            let mut model: BTreeMap<String, Row> = BTreeMap::new();
            let mut target = model.clone();
            for ops in batches {
                let mut arena = Arena::default();
                let mut effect = NetEffect::new(&Key::Columns(vec![0]), 3);
                for op in ops {
                    match op {
                        Op::Insert(key, value) => {
                            let (key, value) = (key.to_string(), value.to_string());
                            if model.contains_key(&key) { continue; }
                            let row = store(&mut arena, &[text(&key), text(&value), text(&value)]);
                            effect.insert(&mut arena, row).unwrap();
                            let row = vec![Some(key.clone()), Some(value.clone()), Some(value)];
                            model.insert(key, row);
                        }
                        Op::Update { from, to, value, doc, full } => {
                            let (from, to) = (from.to_string(), to.to_string());
                            let value = value.to_string();
                            let Some(before) = model.get(&from).cloned() else { continue };
                            if from != to && model.contains_key(&to) { continue; }
                            let doc_field = if doc { text(&value) } else { Field::Unchanged };
                            let new = store(&mut arena, &[text(&to), text(&value), doc_field]);
                            let old = if full {
                                let fields: Vec<_> = before
                                    .iter()
                                    .map(|value| value.as_deref().map_or(Field::Null, text))
                                    .collect();
                                OldRow::Full(store(&mut arena, &fields))
                            } else if from != to {
                                let key = [text(&from), Field::Null, Field::Null];
                                OldRow::Key(store(&mut arena, &key))
                            } else {
                                OldRow::Absent
                            };
                            effect.update(&mut arena, old, new).unwrap();
                            model.remove(&from);
                            let doc_value =
                                if doc { Some(value.clone()) } else { before[2].clone() };
                            model.insert(to.clone(), vec![Some(to), Some(value), doc_value]);
                        }
                        Op::Delete(key) => {
                            let key = key.to_string();
                            if model.remove(&key).is_none() { continue; }
                            let old = store(&mut arena, &[text(&key), Field::Null, Field::Null]);
                            effect.delete(&mut arena, OldRow::Key(old)).unwrap();
                        }
                        Op::Truncate => {
                            effect.truncate(1);
                            model.clear();
                        }
                    }
                }
                let truncated = effect.truncated.is_some();
                let left = effect.survivors().unwrap();
                apply(&mut target, &arena, truncated, &left);
                prop_assert_eq!(&target, &model);
            }
        }
    }
}
