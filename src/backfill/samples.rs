//! Tables as the catalogs describe them, for tests.

use std::collections::BTreeMap;

use crate::{
    change::TableSpec,
    pgoutput::{QualifiedName, ReplicaIdentity},
    pipeline::{
        Context, Options,
        options::TableSettings,
        tables::{self, PlanOptions},
    },
    source::catalog::{Fingerprint, LeafTable, SourceColumn, SourceTable},
    types::TypeCatalog,
};

pub(super) const INT4: u32 = 23;
pub(super) const TEXT: u32 = 25;

pub(super) fn context(options: Options) -> Context {
    Context::new(options, tokio::sync::mpsc::unbounded_channel().0)
}

pub(super) fn column(attnum: i16, name: &str, type_oid: u32) -> SourceColumn {
    SourceColumn {
        attnum,
        name: name.to_owned(),
        type_oid,
        typmod: -1,
        ndims: 0,
        not_null: attnum == 1,
        toastable: type_oid == TEXT,
        is_generated: false,
        xmin: 700,
        missing: BTreeMap::new(),
    }
}

pub(super) fn leaf(oid: u32, pages: u64) -> LeafTable {
    LeafTable {
        oid,
        name: QualifiedName::new("public", format!("t{oid}")),
        file: oid,
        changed_by: 700,
        inherits: String::new(),
        pages: Some(pages),
        can_select: true,
    }
}

/// Returns the table `CREATE TABLE t.. (id int PRIMARY KEY, note text)`, in a publication of all
/// tables.
pub(super) fn table(oid: u32) -> SourceTable {
    SourceTable {
        oid,
        name: QualifiedName::new("public", format!("t{oid}")),
        kind: b'r',
        replica_identity: ReplicaIdentity::Default,
        estimated_rows: 0,
        row_filter: None,
        columns: vec![column(1, "id", INT4), column(2, "note", TEXT)],
        leaves: vec![leaf(oid, 10)],
        leaves_without_wal: Vec::new(),
        can_select: true,
        identity_index: Vec::new(),
        primary_key: vec![1],
        is_primary_key_immediate: true,
        fingerprint: Fingerprint {
            files: BTreeMap::from([(oid, oid)]),
            attributes: BTreeMap::from([(1, 700), (2, 700)]),
            last_attnum: 2,
            key_index: 90_000 + oid,
            publications: "16499 600".to_owned(),
            ..Fingerprint::default()
        },
    }
}

/// Returns the table as it is planned for a copy.
pub(super) fn planned(table: &SourceTable) -> TableSpec {
    let settings = TableSettings::default();
    let options = PlanOptions { settings: &settings, null_unrepresentable: false, before: None };
    tables::plan(table, &TypeCatalog::default(), options).unwrap()
}
