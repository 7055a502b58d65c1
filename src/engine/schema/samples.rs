//! A table as the catalogs and the stream describe it, for tests.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    change::TableSpec,
    pgoutput::{
        QualifiedName, ReplicaIdentity,
        relation::{Relation, RelationColumn},
    },
    pipeline::{
        options::TableSettings,
        tables::{self, PlanOptions},
    },
    source::catalog::{
        CompositeFields, EnumLabel, Fingerprint, LeafTable, SourceColumn, SourceTable,
    },
    types::{FieldInfo, TypeCatalog, TypeInfo},
};

/// The oid of [`orders`].
pub(in crate::engine) const ORDERS: u32 = 16400;
/// An enum, and the oids of its labels.
pub(in crate::engine) const MOOD: u32 = 16390;
pub(in crate::engine) const SAD: u32 = 16391;
pub(in crate::engine) const OK: u32 = 16392;
/// A composite, and its oid in pg_class.
pub(in crate::engine) const PAIR: u32 = 16395;
pub(in crate::engine) const PAIR_CLASS: u32 = 16394;
/// A domain over integer.
pub(in crate::engine) const AMOUNT: u32 = 16398;

pub(in crate::engine) const INT4: u32 = 23;
pub(in crate::engine) const INT8: u32 = 20;
pub(in crate::engine) const OID: u32 = 26;
pub(in crate::engine) const TEXT: u32 = 25;
pub(in crate::engine) const VARCHAR: u32 = 1043;
pub(in crate::engine) const NUMERIC: u32 = 1700;
pub(in crate::engine) const TIMESTAMP: u32 = 1114;
pub(in crate::engine) const TIMESTAMPTZ: u32 = 1184;

/// Returns the `typmod` of `numeric(precision,scale)`.
pub(in crate::engine) fn numeric(precision: i32, scale: i32) -> i32 {
    ((precision << 16) | scale) + 4
}

/// Returns a column without a default: older rows have NULL.
pub(in crate::engine) fn column(attnum: i16, name: &str, type_oid: u32) -> SourceColumn {
    SourceColumn {
        attnum,
        name: name.to_owned(),
        type_oid,
        typmod: -1,
        ndims: 0,
        not_null: false,
        toastable: true,
        is_generated: false,
        xmin: 700,
        missing: BTreeMap::from([(ORDERS, None)]),
    }
}

/// Returns the table `CREATE TABLE orders (id int PRIMARY KEY, n int, code varchar(10), price
/// numeric(10,2), note text, at timestamp, m mood, p pair)`, in a publication that names it.
pub(in crate::engine) fn orders() -> SourceTable {
    let columns = vec![
        SourceColumn { not_null: true, ..column(1, "id", INT4) },
        column(2, "n", INT4),
        SourceColumn { typmod: 14, ..column(3, "code", VARCHAR) },
        SourceColumn { typmod: numeric(10, 2), ..column(4, "price", NUMERIC) },
        column(5, "note", TEXT),
        column(6, "at", TIMESTAMP),
        column(7, "m", MOOD),
        column(8, "p", PAIR),
    ];

    let label = |name: &str| EnumLabel {
        type_oid: MOOD,
        name: name.to_owned(),
        xmin: 700,
        is_original: true,
    };
    let fields = CompositeFields { fields: "1 a 23 700, 2 b 25 700".to_owned(), is_original: true };

    let fingerprint = Fingerprint {
        files: BTreeMap::from([(ORDERS, ORDERS)]),
        inherits: BTreeMap::from([(ORDERS, String::new())]),
        attributes: columns.iter().map(|column| (column.attnum, column.xmin)).collect(),
        last_attnum: 8,
        key_index: 16405,
        labels: BTreeMap::from([(SAD, label("sad")), (OK, label("ok"))]),
        composites: BTreeMap::from([(PAIR_CLASS, fields)]),
        publication_rows: "16500 600".to_owned(),
        publications: "16499 600".to_owned(),
        ..Fingerprint::default()
    };

    SourceTable {
        oid: ORDERS,
        name: QualifiedName::new("public", "orders"),
        kind: b'r',
        replica_identity: ReplicaIdentity::Default,
        estimated_rows: 0,
        row_filter: None,
        columns,
        leaves: vec![leaf(ORDERS)],
        leaves_without_wal: Vec::new(),
        can_select: true,
        identity_index: Vec::new(),
        primary_key: vec![1],
        is_primary_key_immediate: true,
        fingerprint,
    }
}

/// Returns a table that holds rows, in the file that it was made with.
pub(in crate::engine) fn leaf(oid: u32) -> LeafTable {
    LeafTable {
        oid,
        name: QualifiedName::new("public", format!("leaf_{oid}")),
        file: oid,
        changed_by: 700,
        inherits: String::new(),
        pages: None,
        can_select: true,
    }
}

/// Returns the types that the columns of the tables have.
pub(in crate::engine) fn types() -> TypeCatalog {
    let info = |oid: u32, name: &str, kind: u8, base_oid: u32, fields: Vec<FieldInfo>| TypeInfo {
        oid,
        schema: "public".to_owned(),
        name: name.to_owned(),
        kind,
        category: b'U',
        element_oid: 0,
        delimiter: b',',
        base_oid,
        base_typmod: -1,
        base_ndims: 0,
        range_of: 0,
        fields,
    };
    let field = |name: &str, type_oid: u32| FieldInfo {
        name: name.to_owned(),
        type_oid,
        typmod: -1,
        ndims: 0,
    };

    let types = [
        info(MOOD, "mood", b'e', 0, Vec::new()),
        info(PAIR, "pair", b'c', 0, vec![field("a", INT4), field("b", TEXT)]),
        info(AMOUNT, "amount", b'd', INT4, Vec::new()),
    ];
    TypeCatalog { types: types.into_iter().map(|info| (info.oid, info)).collect(), money_scale: 2 }
}

/// Returns a table as it is followed after a copy.
pub(in crate::engine) fn followed(table: &SourceTable) -> Arc<TableSpec> {
    let settings = TableSettings::default();
    let options = PlanOptions { settings: &settings, null_unrepresentable: false, before: None };
    Arc::new(tables::plan(table, &types(), options).unwrap())
}

/// Returns a table as the stream describes it.
pub(in crate::engine) fn relation(table: &SourceTable) -> Relation {
    let is_key = |column: &SourceColumn| match table.replica_identity {
        ReplicaIdentity::Default => table.primary_key.contains(&column.attnum),
        ReplicaIdentity::Index => table.identity_index.contains(&column.attnum),
        ReplicaIdentity::Full => true,
        ReplicaIdentity::Nothing => false,
    };

    let column = |column: &SourceColumn| RelationColumn {
        name: column.name.clone(),
        type_oid: column.type_oid,
        typmod: column.typmod,
        is_key: is_key(column),
    };

    Relation {
        oid: table.oid,
        name: table.name.clone(),
        replica_identity: table.replica_identity,
        columns: table.columns.iter().map(column).collect(),
    }
}
