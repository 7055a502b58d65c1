//! Tables as the catalogs show them.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, Row};

use super::{
    CatalogError, Naming, PublishedTable, QualifiedName, ReplicaIdentity, members,
    types::{TypeParts, type_parts},
    xmin,
};

/// A table as the catalogs describe it.
#[derive(Debug, Clone)]
pub struct SourceTable {
    pub oid: u32,
    pub name: QualifiedName,
    /// `pg_class.relkind`: `r` or `p`, or `f` for a foreign partition that is published by itself.
    pub kind: u8,
    pub replica_identity: ReplicaIdentity,
    pub estimated_rows: u64,
    /// The row filters of the publications, as one condition.
    pub row_filter: Option<String>,
    /// The published columns, in the order of `attnum`.
    pub columns: Vec<SourceColumn>,
    /// The tables that hold the rows: the table itself, or its leaf partitions.
    pub leaves: Vec<LeafTable>,
    /// The foreign or unlogged tables among the partitions, or the table itself, as SQL names them:
    /// their rows are not in the WAL.
    pub leaves_without_wal: Vec<String>,
    pub can_select: bool,
    /// The columns of the key, by `attnum`, in the order of the index; empty when the table has no
    /// key.
    pub identity_index: Vec<i16>,
    pub primary_key: Vec<i16>,
    /// A deferrable key cannot identify rows (trap 53).
    pub is_primary_key_immediate: bool,
    /// The properties of the table that the wire never reports.
    pub fingerprint: Fingerprint,
}

/// What can change the rows of a table, or what the stream brings of them, without a message of the
/// stream (traps 41, 44, 46, 61, 66, 67, 70 and 71). It is stored as it was when the table was
/// copied, and compared with what the catalogs show later.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The `relfilenode` of each table that holds rows (the table itself, or its leaf partitions),
    /// by oid. A rewrite assigns a new `relfilenode`; so do TRUNCATE, VACUUM FULL and CLUSTER.
    pub files: BTreeMap<u32, u32>,
    /// The rows of pg_inherits that tie each leaf partition to its root. A leaf that was detached
    /// and attached again has other rows.
    pub inherits: BTreeMap<u32, String>,
    /// The `xmin` of the row in pg_attribute of each column that is not dropped, by `attnum`. The
    /// `xmin` changes with each ALTER of the column, also when a second ALTER reverts the first
    /// one, and does not change with VACUUM FULL.
    pub attributes: BTreeMap<i16, u32>,
    /// For a partition tree, a hash of the `xmin` values of the columns of all its leaves.
    pub leaf_attributes: String,
    /// The highest `attnum` ever assigned: columns above it are new.
    pub last_attnum: i16,
    /// The oid of the index of the primary key if that key is immediate, else 0.
    pub key_index: u32,
    /// The labels of the enums that the columns use, by the label's oid. Renaming a label changes
    /// old rows (trap 70).
    pub labels: BTreeMap<u32, EnumLabel>,
    /// The composites that the columns use, by the oid in pg_class: adding or dropping a field
    /// changes how old rows print.
    pub composites: BTreeMap<u32, CompositeFields>,
    pub row_filter: Option<String>,
    /// The rows of pg_publication_rel that name the table or a root of it. A table that left its
    /// publication and came back has another row (trap 41). A table that is named cannot be made
    /// UNLOGGED for a while; see `classify`.
    #[serde(rename = "listed")]
    pub publication_rows: String,
    /// The rows of pg_publication_namespace that name its schema (`FOR TABLES IN SCHEMA`).
    pub schema: String,
    /// Oid and `xmin` of the publications that publish the table. Options that were changed and
    /// changed back leave another `xmin`, and the changes in between never arrived (trap 41).
    pub publications: String,
}

/// How publications bring a table: changes that were made before this was so are not in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    publication_rows: String,
    schema: String,
    publications: String,
}

impl Membership {
    /// Returns whether publications bring the table by its schema, or with all tables, and not by
    /// its name.
    pub fn is_by_rule(&self) -> bool {
        self.publication_rows.is_empty()
    }
}

impl Fingerprint {
    /// Returns how publications bring the table.
    pub fn membership(&self) -> Membership {
        Membership {
            publication_rows: self.publication_rows.clone(),
            schema: self.schema.clone(),
            publications: self.publications.clone(),
        }
    }
}

/// A label of an enum, as its row in pg_enum describes it. Two labels are equal when their rows are
/// equal: later changes of the type do not matter.
#[derive(Debug, Clone, Eq, Serialize, Deserialize)]
pub struct EnumLabel {
    pub type_oid: u32,
    pub name: String,
    /// The `xmin` of the row: RENAME VALUE assigns another one.
    pub xmin: u32,
    /// Whether the label was created with its type and was never renamed. A label that was added
    /// later cannot be distinguished from a renamed one.
    pub is_original: bool,
}

impl PartialEq for EnumLabel {
    fn eq(&self, other: &Self) -> bool {
        (self.type_oid, &self.name, self.xmin) == (other.type_oid, &other.name, other.xmin)
    }
}

/// The fields of a composite type, as their rows in pg_attribute describe them. Two composites are
/// equal when their rows are equal.
#[derive(Debug, Clone, Eq, Serialize, Deserialize)]
pub struct CompositeFields {
    /// The number, name, type and `xmin` of each field.
    pub fields: String,
    /// Whether all fields were created with the type and none was changed since.
    pub is_original: bool,
}

impl PartialEq for CompositeFields {
    fn eq(&self, other: &Self) -> bool {
        self.fields == other.fields
    }
}

#[derive(Debug, Clone)]
pub struct SourceColumn {
    pub attnum: i16,
    pub name: String,
    pub type_oid: u32,
    pub typmod: i32,
    /// The value of `attndims`.
    pub ndims: i32,
    pub not_null: bool,
    /// Whether `attstorage` allows TOAST.
    pub toastable: bool,
    /// Whether the column is `GENERATED ALWAYS AS (..) STORED`.
    pub is_generated: bool,
    /// The `xmin` of the row in pg_attribute: each ALTER of the column assigns another one.
    pub xmin: u32,
    /// The value that rows hold which are older than the column (trap 66), by the oid of each table
    /// that holds rows: in the server's text (`attmissingval`); `None` is NULL.
    pub missing: BTreeMap<u32, Option<String>>,
}

#[derive(Debug, Clone)]
pub struct LeafTable {
    pub oid: u32,
    pub name: QualifiedName,
    /// The value of `relfilenode`.
    pub file: u32,
    /// The `xmin` of the row in pg_class: the transaction that assigned the file, or has changed
    /// another property of the table since. VACUUM, ANALYZE and CREATE INDEX change that row in
    /// place.
    pub changed_by: u32,
    /// See [`Fingerprint::inherits`].
    pub inherits: String,
    /// The size in pages of 8 KiB; none before [`measure`] has counted them.
    pub pages: Option<u64>,
    pub can_select: bool,
}

impl SourceTable {
    /// Stores the page counts that [`measure`] returned.
    pub fn measured(&mut self, pages: &HashMap<u32, u64>) {
        for leaf in &mut self.leaves {
            leaf.pages = pages.get(&leaf.oid).copied().or(leaf.pages);
        }
    }

    /// Returns the pages of 8 KiB of heap, over all leaves that were measured.
    pub fn pages(&self) -> u64 {
        self.leaves.iter().filter_map(|leaf| leaf.pages).sum()
    }
}

/// The columns that identify a row, by `attnum`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceKey {
    Columns(Vec<i16>),
    WholeRow,
    AppendOnly,
}

/// Returns the columns of the replica identity (traps 49, 53, 54); with FULL the primary key if it
/// is immediate, else the whole row.
pub fn key_of(table: &SourceTable) -> SourceKey {
    let primary_key = || table.is_primary_key_immediate && !table.primary_key.is_empty();
    match table.replica_identity {
        ReplicaIdentity::Default if primary_key() => SourceKey::Columns(table.primary_key.clone()),
        ReplicaIdentity::Index if !table.identity_index.is_empty() => {
            SourceKey::Columns(table.identity_index.clone())
        }
        ReplicaIdentity::Full if primary_key() => SourceKey::Columns(table.primary_key.clone()),
        ReplicaIdentity::Full => SourceKey::WholeRow,
        ReplicaIdentity::Default | ReplicaIdentity::Index | ReplicaIdentity::Nothing => {
            SourceKey::AppendOnly
        }
    }
}

/// Returns the tables of the publications.
pub async fn published_tables(
    client: &Client,
    names: &[String],
) -> Result<Vec<SourceTable>, CatalogError> {
    describe(client, members(client, names, None).await?, names).await
}

/// Returns the tables of the publications that have these oids.
pub async fn published_among(
    client: &Client,
    names: &[String],
    oids: &[u32],
) -> Result<Vec<SourceTable>, CatalogError> {
    describe(client, members(client, names, Some(oids)).await?, names).await
}

/// Returns all tables that could be copied, for a copy without a publication.
pub async fn all_tables(client: &Client) -> Result<Vec<SourceTable>, CatalogError> {
    let rows = client.query(&format!("SELECT c.oid {CANDIDATES}"), &[]).await?;
    let member = |row: Row| Ok::<_, CatalogError>(PublishedTable::unpublished(row.try_get(0)?));
    let members = rows.into_iter().map(member).collect::<Result<Vec<_>, _>>()?;
    describe(client, members, &[]).await
}

/// The permanent ordinary tables and roots of partition trees that belong to users and have
/// columns.
pub(super) const CANDIDATES: &str = "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p' \
     AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema' \
     AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid \
     = c.oid AND d.deptype = 'e') \
     AND EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT \
     a.attisdropped)";

/// Returns the names of the tables that a new publication could hold.
pub async fn candidate_tables(client: &Client) -> Result<Vec<QualifiedName>, CatalogError> {
    let rows = client
        .query(&format!("SELECT n.nspname::text, c.relname::text {CANDIDATES} ORDER BY 1, 2"), &[])
        .await?;

    rows.iter()
        .map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }))
        .collect()
}

/// Returns the tables of users whose changes are not in the WAL.
pub async fn unlogged_tables(client: &Client) -> Result<Vec<QualifiedName>, CatalogError> {
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text FROM pg_class c \
             JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind = 'r' AND c.relpersistence = 'u' AND n.nspname NOT LIKE 'pg\\_%' \
             ORDER BY 1, 2",
            &[],
        )
        .await?;

    rows.iter()
        .map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }))
        .collect()
}

pub(super) async fn describe(
    client: &Client,
    members: Vec<PublishedTable>,
    publications: &[String],
) -> Result<Vec<SourceTable>, CatalogError> {
    let oids: Vec<u32> = members.iter().map(|member| member.oid).collect();
    let members: HashMap<u32, PublishedTable> =
        members.into_iter().map(|member| (member.oid, member)).collect();

    let mut parts = TableParts::read(client, publications, &oids).await?;
    let rows = table_rows(client, &oids).await?;

    let mut tables = Vec::with_capacity(rows.len());
    for row in &rows {
        let oid: u32 = row.try_get(0)?;
        let Some(member) = members.get(&oid) else { continue };
        tables.push(parts.describe(member, row)?);
    }

    Ok(tables)
}

/// Reads from pg_class and pg_index what describes a table as a whole.
async fn table_rows(client: &Client, oids: &[u32]) -> Result<Vec<Row>, CatalogError> {
    let rows = client
        .query(
            &format!(
                "SELECT c.oid, n.nspname::text, c.relname::text, c.relkind, c.relreplident, \
                 c.relnatts, \
             {READABLE}, \
             (SELECT i.indkey::int2[] FROM pg_index i WHERE i.indrelid = c.oid AND \
             i.indisreplident LIMIT 1), \
             (SELECT i.indkey::int2[] FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary \
             LIMIT 1), \
             (SELECT i.indimmediate FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary \
             LIMIT 1), \
             (SELECT i.indexrelid FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary \
             AND i.indimmediate) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY($1) \
             ORDER BY 2, 3"
            ),
            &[&oids],
        )
        .await?;

    Ok(rows)
}

/// What other queries than [`table_rows`] return of the tables, by oid.
struct TableParts {
    columns: HashMap<u32, Vec<SourceColumn>>,
    types: HashMap<u32, TypeParts>,
    trees: HashMap<u32, Tree>,
    naming: Naming,
}

impl TableParts {
    async fn read(
        client: &Client,
        publications: &[String],
        oids: &[u32],
    ) -> Result<Self, CatalogError> {
        let columns = columns_of(client, oids).await?;
        let types = type_parts(client, &columns).await?;
        let trees = trees_of(client, oids).await?;
        let naming = Naming::read(client, publications, oids).await?;
        Ok(Self { columns, types, trees, naming })
    }

    /// Describes a table by its row of [`table_rows`], and takes out its parts.
    fn describe(
        &mut self,
        member: &PublishedTable,
        row: &Row,
    ) -> Result<SourceTable, CatalogError> {
        let mut columns = self.columns.remove(&member.oid).unwrap_or_default();
        let tree = self.trees.remove(&member.oid).unwrap_or_default();
        let replica_identity = replica_identity(row)?;
        let fingerprint = self.fingerprint(member, row, &columns, &tree)?;
        columns.retain(|column| member.brings(column));

        Ok(SourceTable {
            oid: member.oid,
            name: QualifiedName { schema: row.try_get(1)?, name: row.try_get(2)? },
            kind: row.try_get::<_, i8>(3)? as u8,
            replica_identity,
            estimated_rows: tree.estimated_rows,
            row_filter: member.row_filter.clone(),
            columns,
            can_select: row.try_get(6)?,
            identity_index: row.try_get::<_, Option<Vec<i16>>>(7)?.unwrap_or_default(),
            primary_key: row.try_get::<_, Option<Vec<i16>>>(8)?.unwrap_or_default(),
            is_primary_key_immediate: row.try_get::<_, Option<bool>>(9)?.unwrap_or_default(),
            fingerprint,
            leaves_without_wal: tree.without_wal,
            leaves: tree.leaves,
        })
    }

    /// Returns the fingerprint of a table; `columns` holds also the columns that no publication
    /// brings.
    fn fingerprint(
        &mut self,
        member: &PublishedTable,
        row: &Row,
        columns: &[SourceColumn],
        tree: &Tree,
    ) -> Result<Fingerprint, CatalogError> {
        let leaves = &tree.leaves;
        let types = self.types.remove(&member.oid).unwrap_or_default();

        Ok(Fingerprint {
            files: leaves.iter().map(|leaf| (leaf.oid, leaf.file)).collect(),
            inherits: leaves.iter().map(|leaf| (leaf.oid, leaf.inherits.clone())).collect(),
            attributes: columns.iter().map(|column| (column.attnum, column.xmin)).collect(),
            leaf_attributes: tree.leaf_attributes.clone(),
            last_attnum: row.try_get(5)?,
            key_index: row.try_get::<_, Option<u32>>(10)?.unwrap_or_default(),
            labels: types.labels,
            composites: types.composites,
            row_filter: member.row_filter.clone(),
            publication_rows: self.naming.publication_rows(member.oid),
            schema: self.naming.schema(member.oid),
            publications: member.publications(),
        })
    }
}

fn replica_identity(row: &Row) -> Result<ReplicaIdentity, CatalogError> {
    let code = row.try_get::<_, i8>(4)? as u8;
    ReplicaIdentity::from_code(code).ok_or_else(|| CatalogError::UnexpectedAnswer {
        what: "a replica identity",
        found: char::from(code).to_string(),
    })
}

/// Reads the columns, including the generated ones: the publication decides whether the stream
/// sends those (trap 20).
pub(super) async fn columns_of(
    client: &Client,
    oids: &[u32],
) -> Result<HashMap<u32, Vec<SourceColumn>>, CatalogError> {
    let rows = client
        .query(
            "SELECT attrelid, attnum, attname::text, atttypid, atttypmod, attndims::int, \
             attnotnull, attstorage <> 'p', \
             attgenerated <> '', xmin::text::bigint \
             FROM pg_attribute WHERE attrelid = ANY($1) AND attnum > 0 AND NOT attisdropped \
             AND attgenerated <> 'v' \
             ORDER BY attrelid, attnum",
            &[&oids],
        )
        .await?;

    let mut columns: HashMap<u32, Vec<SourceColumn>> = HashMap::new();
    for row in rows {
        columns.entry(row.try_get(0)?).or_default().push(SourceColumn {
            attnum: row.try_get(1)?,
            name: row.try_get(2)?,
            type_oid: row.try_get(3)?,
            typmod: row.try_get(4)?,
            ndims: row.try_get(5)?,
            not_null: row.try_get(6)?,
            toastable: row.try_get(7)?,
            missing: BTreeMap::new(),
            is_generated: row.try_get(8)?,
            xmin: xmin(row.try_get(9)?),
        });
    }

    // A partitioned table holds no rows, so its leaves store the missing values, each leaf under
    // its own `attnum`.
    let rows = client
        .query(
            &format!(
                "WITH RECURSIVE {TREE} SELECT tree.root, a.attname::text, tree.oid, \
                 a.attmissingval::text \
                 FROM tree JOIN pg_class c ON c.oid = tree.oid AND c.relkind = 'r' \
                 JOIN pg_attribute a ON a.attrelid = tree.oid AND a.attnum > 0 AND NOT \
                 a.attisdropped"
            ),
            &[&oids],
        )
        .await?;

    for row in rows {
        let (name, leaf): (String, u32) = (row.try_get(1)?, row.try_get(2)?);
        let missing =
            row.try_get::<_, Option<String>>(3)?.and_then(|array| parse_singleton_array(&array));

        let of_table = columns.entry(row.try_get(0)?).or_default();
        if let Some(column) = of_table.iter_mut().find(|column| column.name == name) {
            column.missing.insert(leaf, missing);
        }
    }

    Ok(columns)
}

/// Returns the one element of an array as `array_out` prints it.
pub fn parse_singleton_array(array: &str) -> Option<String> {
    let inner = array.strip_prefix('{')?.strip_suffix('}')?;
    let Some(quoted) = inner.strip_prefix('"').and_then(|inner| inner.strip_suffix('"')) else {
        return (!inner.eq_ignore_ascii_case("NULL")).then(|| inner.to_owned());
    };

    let mut element = String::with_capacity(quoted.len());
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        element.push(if character == '\\' { characters.next()? } else { character });
    }

    Some(element)
}

/// The condition whether this role may read table `c` of schema `n`, or some of its columns.
///
/// Privilege functions, which read the newest state of the catalogs, return NULL for a table that
/// was dropped since the snapshot.
const READABLE: &str = "coalesce(has_schema_privilege(n.oid, 'USAGE') \
     AND (has_table_privilege(c.oid, 'SELECT') OR has_any_column_privilege(c.oid, 'SELECT')), \
     false)";

/// Each of the tables `$1` with all of its partitions, read without a lock on any of them. `links`
/// are the rows of pg_inherits between a table and its root.
const TREE: &str = "tree(root, oid, links) AS ( \
       SELECT root, root, '{}'::text[] FROM unnest($1::oid[]) AS root \
       UNION ALL SELECT tree.root, i.inhrelid, links || format('%s:%s', i.inhrelid, i.xmin) \
       FROM tree JOIN pg_class parent ON parent.oid = tree.oid AND parent.relkind = 'p' \
       JOIN pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending)";

/// The tables that hold the rows of one table: the table itself, or its leaf partitions.
#[derive(Default)]
struct Tree {
    leaves: Vec<LeafTable>,
    estimated_rows: u64,
    /// See [`Fingerprint::leaf_attributes`].
    leaf_attributes: String,
    /// See [`SourceTable::leaves_without_wal`].
    without_wal: Vec<String>,
}

async fn trees_of(client: &Client, oids: &[u32]) -> Result<HashMap<u32, Tree>, CatalogError> {
    let rows = client
        .query(
            &format!(
                "WITH RECURSIVE {TREE} SELECT tree.root, n.nspname::text, c.relname::text, c.oid, \
                 c.relfilenode, \
                 greatest(c.reltuples, 0)::bigint, links, {READABLE}, \
                 c.relkind = 'r' AND c.relpersistence = 'p', format('%I.%I', n.nspname, \
                 c.relname), c.xmin::text::bigint \
                 FROM tree JOIN pg_class c ON c.oid = tree.oid AND c.relkind IN ('r', 'f') \
                 JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY 1, 2, 3"
            ),
            &[&oids],
        )
        .await?;

    let mut trees: HashMap<u32, Tree> = HashMap::new();
    for row in rows {
        let tree = trees.entry(row.try_get(0)?).or_default();
        if !row.try_get::<_, bool>(8)? {
            tree.without_wal.push(row.try_get(9)?);
            continue;
        }

        let mut links: Vec<String> = row.try_get(6)?;
        links.sort_unstable();

        tree.estimated_rows += row.try_get::<_, i64>(5)?.unsigned_abs();
        tree.leaves.push(LeafTable {
            oid: row.try_get(3)?,
            name: QualifiedName { schema: row.try_get(1)?, name: row.try_get(2)? },
            file: row.try_get(4)?,
            changed_by: xmin(row.try_get(10)?),
            inherits: links.join(","),
            pages: None,
            can_select: row.try_get(7)?,
        });
    }

    let rows = client
        .query(
            &format!(
                "WITH RECURSIVE {TREE} SELECT tree.root, md5(string_agg(format('%s:%s:%s', \
                 a.attrelid, a.attnum, a.xmin), \
                 ',' ORDER BY a.attrelid, a.attnum)) FROM tree \
                 JOIN pg_class c ON c.oid = tree.oid AND c.relkind <> 'p' \
                 JOIN pg_attribute a ON a.attrelid = tree.oid AND a.attnum > 0 WHERE tree.oid <> \
                 tree.root GROUP BY 1"
            ),
            &[&oids],
        )
        .await?;

    for row in rows {
        if let Some(tree) = trees.get_mut(&row.try_get(0)?) {
            tree.leaf_attributes = row.try_get(1)?;
        }
    }

    Ok(trees)
}

/// Returns the number of pages of these tables that hold rows, by oid. The query takes an ACCESS
/// SHARE lock on each of them for a moment.
///
/// # Errors
/// [`CatalogError::is_locked`], where the session limits how long the query waits.
pub async fn measure(client: &Client, leaves: &[u32]) -> Result<HashMap<u32, u64>, CatalogError> {
    let rows = client
        .query(
            "SELECT oid, coalesce(pg_relation_size(oid), 0) / \
             current_setting('block_size')::bigint FROM unnest($1::oid[]) oid",
            &[&leaves],
        )
        .await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get::<_, i64>(1)?.unsigned_abs()))).collect()
}

/// Returns those of `tables` that a transaction that is still open has written into, or may have:
/// the transaction keeps the lock of its first INSERT, UPDATE or DELETE until it ends.
pub async fn written_among(client: &Client, tables: &[u32]) -> Result<HashSet<u32>, CatalogError> {
    const MODES: &str = "'RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', \
                         'AccessExclusiveLock'";
    locks_among(client, tables, &format!("mode IN ({MODES}) AND granted")).await
}

/// Returns the tables on which another session holds an ACCESS EXCLUSIVE lock, or waits for one.
pub async fn locked_among(client: &Client, tables: &[u32]) -> Result<HashSet<u32>, CatalogError> {
    locks_among(client, tables, "mode = 'AccessExclusiveLock'").await
}

async fn locks_among(
    client: &Client,
    tables: &[u32],
    which: &str,
) -> Result<HashSet<u32>, CatalogError> {
    let sql = format!(
        "SELECT DISTINCT relation FROM pg_locks WHERE locktype = 'relation' AND {which} \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
         AND relation = ANY($1)"
    );
    let rows = client.query(&sql, &[&tables]).await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}
