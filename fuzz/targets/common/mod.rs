//! What the targets share: memory that is counted, bytes that are cut into pieces, tables of every
//! type, seeds.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use rhei::internals::{
    Lsn,
    change::{ColumnSpec, Key, TableSpec},
    pgoutput::{QualifiedName, ReplicaIdentity},
    types::{ColumnType, FieldInfo, Mapping, TypeCatalog, TypeInfo, map_column},
};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    let held = HELD.fetch_add(bytes, Relaxed).wrapping_add(bytes);
    PEAK.fetch_max(held, Relaxed);
}

// SAFETY: every call goes on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        grown(bytes);
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(place, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `work` on so many bytes of input. It may hold `fixed` bytes, and `factor` more for each
/// byte of the input.
pub fn within_memory<T>(input: usize, fixed: usize, factor: usize, work: impl FnOnce() -> T) -> T {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    let taken = PEAK.load(Relaxed).saturating_sub(before);
    assert!(taken <= fixed + factor * input, "{taken} bytes of memory for {input} bytes of input");
    result
}

/// Takes the next byte; zero at the end.
pub fn byte(input: &mut &[u8]) -> u8 {
    let Some((&first, rest)) = input.split_first() else { return 0 };
    *input = rest;
    first
}

/// Takes the next two bytes as a number.
pub fn word(input: &mut &[u8]) -> usize {
    usize::from(byte(input)) << 8 | usize::from(byte(input))
}

/// Takes a piece: its length, then its bytes, or as many as there are.
pub fn piece<'a>(input: &mut &'a [u8]) -> &'a [u8] {
    let length = word(input).min(input.len());
    let (piece, rest) = input.split_at(length);
    *input = rest;
    piece
}

/// The other direction of [`piece`], for seeds.
pub fn pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        bytes.extend(u16::try_from(piece.len()).unwrap().to_be_bytes());
        bytes.extend(piece);
    }
    bytes
}

/// Cuts `whole` into pieces whose lengths follow from `seed`, most of them short.
pub fn cut(whole: &[u8], seed: u8) -> impl Iterator<Item = &[u8]> {
    let state = Cell::new(u32::from(seed) | 1);
    let mut rest = whole;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let next = state.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.set(next);
        let (first, after) = rest.split_at((1 + (next >> 24) as usize % 23).min(rest.len()));
        rest = after;
        Some(first)
    })
}

/// With RHEI_FUZZ_SEEDS, writes the seeds into that folder and ends the process.
pub fn write_seeds(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    let Some(folder) = std::env::var_os("RHEI_FUZZ_SEEDS") else { return };
    let folder = std::path::PathBuf::from(folder);
    std::fs::create_dir_all(&folder).unwrap();
    for (number, seed) in seeds().into_iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number:04}")), seed).unwrap();
    }
    std::process::exit(0);
}

pub const FIXTURE: &[u8] = include_bytes!("../../../fixtures/streams/every_kind.pgoutput");

const ENUM: u32 = 90_000;
const COMPOSITE: u32 = 90_001;
const RANGE: u32 = 90_002;
const DOMAIN: u32 = 90_003;
const HSTORE: u32 = 90_004;
const CITEXT: u32 = 90_005;
const NESTED: u32 = 90_006;
const ARRAYS: u32 = 91_000;

fn info(oid: u32, name: &str, kind: u8) -> TypeInfo {
    TypeInfo {
        oid,
        schema: "public".to_owned(),
        name: name.to_owned(),
        kind,
        category: if kind == b'e' { b'E' } else { b'U' },
        element_oid: 0,
        delimiter: b',',
        base_oid: 0,
        base_typmod: -1,
        base_ndims: 0,
        range_of: 0,
        fields: Vec::new(),
    }
}

fn catalog() -> TypeCatalog {
    let field = |name: &str, type_oid: u32, ndims: i32| FieldInfo {
        name: name.to_owned(),
        type_oid,
        typmod: -1,
        ndims,
    };
    let mut types = vec![
        info(ENUM, "mood", b'e'),
        TypeInfo {
            fields: vec![
                field("a", 23, 0),
                field("b", 25, 0),
                field("c", 91_000, 1),
                field("d", 1186, 0),
            ],
            ..info(COMPOSITE, "pair", b'c')
        },
        TypeInfo { range_of: 1114, ..info(RANGE, "tsrange", b'r') },
        TypeInfo { base_oid: ARRAYS + 1, base_ndims: 2, ..info(DOMAIN, "table", b'd') },
        info(HSTORE, "hstore", b'b'),
        info(CITEXT, "citext", b'b'),
        TypeInfo { range_of: 1700, ..info(NESTED, "numrange", b'r') },
    ];
    for (number, element) in ELEMENTS.iter().enumerate() {
        types.push(TypeInfo {
            element_oid: *element,
            category: b'A',
            ..info(ARRAYS + number as u32, "_t", b'b')
        });
    }
    TypeCatalog { types: types.into_iter().map(|info| (info.oid, info)).collect(), money_scale: 2 }
}

/// Types that there are arrays of.
const ELEMENTS: [u32; 16] =
    [23, 25, 16, 20, 701, 1082, 1083, 1114, 1184, 1186, 2950, 17, 3802, 90_000, 90_001, 1700];

fn typmod(precision: i32, scale: i32) -> i32 {
    ((precision << 16) | (scale & 0x7FF)) + 4
}

/// Type, typmod, dimensions and override of every way to decode a value.
fn columns() -> Vec<(u32, i32, i32, Option<&'static str>)> {
    let mut columns = Vec::new();
    for oid in [
        16, 21, 23, 20, 26, 5069, 700, 701, 790, 1082, 1114, 1184, 1083, 1266, 1186, 2950, 17, 25,
        1042, 18, 22, 114, 3802, 142, 869, ENUM, COMPOSITE, RANGE, DOMAIN, HSTORE, CITEXT, 1700,
    ] {
        columns.push((oid, -1, 0, None));
    }
    for (precision, scale) in
        [(10, 2), (38, 10), (38, 38), (38, 0), (3, -2), (3, 5), (1, 0), (39, 2)]
    {
        columns.push((1700, typmod(precision, scale), 0, None));
    }
    for number in 0..ELEMENTS.len() as u32 {
        columns.push((ARRAYS + number, -1, 1, None));
    }
    for ndims in [2, 3, 6] {
        columns.push((ARRAYS, -1, ndims, None));
        columns.push((ARRAYS + 1, -1, ndims, None));
        columns.push((ARRAYS + 15, typmod(6, 2), ndims, None));
    }
    for (oid, wanted) in [
        (1700, "DOUBLE"),
        (1700, "DECIMAL(20,5)"),
        (23, "VARCHAR"),
        (1186, "VARCHAR"),
        (3802, "VARIANT"),
        (3802, "VARCHAR"),
        (114, "VARIANT"),
        (1266, "TIMETZ"),
        (COMPOSITE, "STRUCT"),
        (RANGE, "STRUCT"),
        (NESTED, "STRUCT"),
        (HSTORE, "MAP"),
    ] {
        columns.push((oid, -1, 0, Some(wanted)));
    }
    columns
}

/// Every way to decode a value.
pub fn mappings() -> Vec<Mapping> {
    let catalog = catalog();
    let mapping = |(type_oid, typmod, ndims, override_type)| {
        map_column(&ColumnType { type_oid, typmod, ndims, override_type }, &catalog).unwrap()
    };
    columns().into_iter().map(mapping).collect()
}

/// A table of columns of these types, named a, b, c ..; each is a type and whether it is part of
/// the key.
pub fn table(
    oid: u32,
    name: &str,
    identity: ReplicaIdentity,
    key: Key,
    columns: &[(&str, u32)],
) -> TableSpec {
    let catalog = catalog();
    let column = |(at, &(name, type_oid)): (usize, &(&str, u32))| ColumnSpec {
        name: name.to_owned(),
        attnum: 1 + at as i16,
        type_oid,
        typmod: -1,
        not_null: false,
        target_name: name.to_owned(),
        mapping: map_column(
            &ColumnType { type_oid, typmod: -1, ndims: 1, override_type: None },
            &catalog,
        )
        .unwrap(),
    };
    TableSpec {
        oid,
        source: QualifiedName::new("public", name),
        target: QualifiedName::new("public", name),
        epoch: 0,
        replica_identity: identity,
        key,
        columns: columns.iter().enumerate().map(column).collect(),
        excluded: Vec::new(),
        fingerprint: String::new(),
        null_unrepresentable: false,
        copy_lsn: Lsn::ZERO,
        copy_xids: None,
    }
}

/// A table of one column for each of these mappings; the first is the key.
pub fn table_of(mappings: &[Mapping]) -> Arc<TableSpec> {
    let names: Vec<String> = (0..mappings.len()).map(|number| format!("c{number}")).collect();
    let columns: Vec<(&str, u32)> = names.iter().map(|name| (name.as_str(), 25)).collect();
    let mut table = table(1, "t", ReplicaIdentity::Default, Key::Columns(vec![0]), &columns);
    for (column, mapping) in table.columns.iter_mut().zip(mappings) {
        column.mapping = mapping.clone();
    }
    Arc::new(table)
}
