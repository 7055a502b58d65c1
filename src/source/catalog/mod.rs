//! Every question to the source's catalogs, for PostgreSQL 14 to 18. The only place that quotes the
//! source's identifiers. Queries run with `search_path = pg_catalog`, so what the server prints is
//! schema-qualified.

mod publication;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, error::SqlState};

use self::publication::{Member, Naming, members};
use crate::{
    Lsn,
    change::xids::XidSnapshot,
    checkpoint::reachable_target,
    pgoutput::{QualifiedName, ReplicaIdentity},
    types::{FieldInfo, TypeCatalog, TypeInfo},
};

pub use self::publication::{
    PublicationInfo, ancestors, conflicting_column_lists, publication, published_names,
};

/// A question that the source did not answer, or not as expected.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("the source refused a question to its catalogs")]
    Query(#[from] tokio_postgres::Error),
    #[error("the source answered {what} in a form that rhei does not know: {found}")]
    Answer { what: &'static str, found: String },
}

impl CatalogError {
    /// Somebody holds a lock on a table of the publication (VACUUM FULL, an ALTER in an open
    /// transaction), and listing it would wait for that.
    pub fn is_locked(&self) -> bool {
        let Self::Query(error) = self else { return false };
        error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
    }
}

pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub fn quote_literal(text: &str) -> String {
    if text.contains('\\') {
        return format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"));
    }
    format!("'{}'", text.replace('\'', "''"))
}

pub fn quote_table(name: &QualifiedName) -> String {
    format!("{}.{}", quote_identifier(&name.schema), quote_identifier(&name.name))
}

/// Begins a moment in which all questions are answered from one state of the catalogs: a table is
/// described by several of them. Ends with [`end_moment`]. Returns what that state holds.
pub async fn begin_moment(client: &Client) -> Result<XidSnapshot, CatalogError> {
    client.batch_execute("BEGIN READ ONLY ISOLATION LEVEL REPEATABLE READ").await?;
    current_snapshot(client).await
}

/// Which transactions the next statement sees, or all of a transaction that keeps its snapshot.
pub async fn current_snapshot(client: &Client) -> Result<XidSnapshot, CatalogError> {
    let row = client.query_one("SELECT pg_current_snapshot()::text", &[]).await?;
    let text: String = row.try_get(0)?;
    XidSnapshot::parse(&text).ok_or(CatalogError::Answer { what: "a snapshot", found: text })
}

/// Forgets a moment in which a question failed.
pub async fn break_moment(client: &Client) -> Result<(), CatalogError> {
    Ok(client.batch_execute("ROLLBACK").await?)
}

pub async fn end_moment(client: &Client) -> Result<(), CatalogError> {
    Ok(client.batch_execute("COMMIT").await?)
}

/// A transaction becomes visible within this after its commit record is flushed, unless it waits
/// for synchronous standbys: a backend has little left to do in between.
pub const VISIBLE_AFTER_FLUSH: Duration = Duration::from_secs(1);

/// A position of the source's WAL that was read `age` ago, or the end of the flushed WAL where that
/// is before it and no commit lies between the two.
///
/// WAL records that belong to no commit stay in memory until the next flush, on an idle source up
/// to 15 seconds, and a walsender sends only what is flushed. A commit is flushed before it becomes
/// visible or, with `synchronous_commit = off`, within three times `wal_writer_delay`.
pub async fn flushed(client: &Client, position: Lsn, age: Duration) -> Result<Lsn, CatalogError> {
    let flushed = reachable_target(wal_flush_lsn(client).await?);
    let holds_all_commits = age >= wal_writer_delay(client).await? * 3;
    Ok(if holds_all_commits { position.min(flushed) } else { position })
}

/// What the server is, and what this role may do there.
#[derive(Debug, Clone)]
pub struct ServerInfo {
    /// As `server_version_num`: 150018 is 15.18.
    pub version_num: i32,
    pub version: String,
    pub wal_level: String,
    pub database: String,
    pub database_oid: u32,
    pub encoding: String,
    pub in_recovery: bool,
    pub max_slots: i64,
    pub used_slots: i64,
    pub max_senders: i64,
    pub used_senders: i64,
    pub user: String,
    pub is_superuser: bool,
    pub can_replicate: bool,
    pub can_create_in_database: bool,
}

pub async fn server(client: &Client) -> Result<ServerInfo, CatalogError> {
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_setting('server_version'), \
             current_setting('wal_level'), current_database()::text, d.oid, \
             current_setting('server_encoding'), \
             pg_is_in_recovery(), current_setting('max_replication_slots')::bigint, \
             (SELECT count(*) FROM pg_replication_slots), \
             current_setting('max_wal_senders')::bigint, \
             (SELECT count(*) FROM pg_stat_replication), current_user::text, r.rolsuper, \
             r.rolreplication, \
             has_database_privilege(d.oid, 'CREATE') \
             FROM pg_database d, pg_roles r WHERE d.datname = current_database() AND r.rolname = \
             current_user",
            &[],
        )
        .await?;
    Ok(ServerInfo {
        version_num: row.try_get(0)?,
        version: row.try_get(1)?,
        wal_level: row.try_get(2)?,
        database: row.try_get(3)?,
        database_oid: row.try_get(4)?,
        encoding: row.try_get(5)?,
        in_recovery: row.try_get(6)?,
        max_slots: row.try_get(7)?,
        used_slots: row.try_get(8)?,
        max_senders: row.try_get(9)?,
        used_senders: row.try_get(10)?,
        user: row.try_get(11)?,
        is_superuser: row.try_get(12)?,
        can_replicate: row.try_get(13)?,
        can_create_in_database: row.try_get(14)?,
    })
}

async fn lsn(client: &Client, expression: &str) -> Result<Lsn, CatalogError> {
    let row = client.query_one(&format!("SELECT ({expression})::text"), &[]).await?;
    let text: String = row.try_get(0)?;
    parse_lsn(text)
}

fn parse_lsn(text: String) -> Result<Lsn, CatalogError> {
    text.parse().map_err(|_| CatalogError::Answer { what: "an LSN", found: text })
}

/// End of the WAL that was written, flushed or not: nothing visible was committed after it.
pub async fn wal_insert_lsn(client: &Client) -> Result<Lsn, CatalogError> {
    lsn(client, "pg_current_wal_insert_lsn()").await
}

pub async fn wal_flush_lsn(client: &Client) -> Result<Lsn, CatalogError> {
    lsn(client, "pg_current_wal_flush_lsn()").await
}

pub async fn wal_writer_delay(client: &Client) -> Result<Duration, CatalogError> {
    let query =
        "SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_writer_delay'";
    let milliseconds: i64 = client.query_one(query, &[]).await?.try_get(0)?;
    Ok(Duration::from_millis(milliseconds.unsigned_abs()))
}

/// `IDENTIFY_SYSTEM.systemid`, for roles that may read it by SQL.
pub async fn system_id(client: &Client) -> Result<String, CatalogError> {
    let row =
        client.query_one("SELECT system_identifier::text FROM pg_control_system()", &[]).await?;
    Ok(row.try_get(0)?)
}

/// A table as it stands in the catalogs.
#[derive(Debug, Clone)]
pub struct SourceTable {
    pub oid: u32,
    pub name: QualifiedName,
    /// `pg_class.relkind`: `r` or `p`, or `f` for a foreign partition that is published by itself.
    pub kind: u8,
    pub replica_identity: ReplicaIdentity,
    pub estimated_rows: u64,
    /// The publications' row filters as one condition.
    pub row_filter: Option<String>,
    /// The columns that are published, in the order of `attnum`.
    pub columns: Vec<SourceColumn>,
    /// The tables that hold the rows: itself, or its leaf partitions.
    pub leaves: Vec<LeafTable>,
    /// Those of its partitions, or itself, that are foreign tables or unlogged ones, as SQL names
    /// them: their rows are not in the WAL.
    pub leaves_without_wal: Vec<String>,
    pub can_select: bool,
    /// Columns of the key, by `attnum`, in the order of the index; empty when there is none.
    pub identity_index: Vec<i16>,
    pub primary_key: Vec<i16>,
    /// A deferrable key cannot identify rows (trap 53).
    pub is_primary_key_immediate: bool,
    /// What the wire never says.
    pub fingerprint: Fingerprint,
}

/// What can change the rows of a table, or what we are told of them, without a word on the wire
/// (postgres.md 2.11). Kept as it was when the table was copied, and compared with what is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Of each table that holds rows (itself, or its leaf partitions), by oid: `relfilenode`. A
    /// rewrite gives a new one; so do TRUNCATE, VACUUM FULL and CLUSTER.
    pub files: BTreeMap<u32, u32>,
    /// Of each leaf partition: the rows of pg_inherits that tie it to its root. A leaf that was
    /// detached and attached again has others.
    pub inherits: BTreeMap<u32, String>,
    /// `xmin` of the row in pg_attribute of each column that is alive, by `attnum`. It changes with
    /// each ALTER of the column, also when a second one takes the first one back, and not with
    /// VACUUM FULL.
    pub attributes: BTreeMap<i16, u32>,
    /// Of a partition tree: a hash of the same of all its leaves.
    pub leaf_attributes: String,
    /// The highest `attnum` ever given out: columns above it are new.
    pub last_attnum: i16,
    /// Oid of the index of its primary key, if that is immediate, else 0.
    pub key_index: u32,
    /// Labels of the enums that its columns use, by the label's oid. A renamed label changes old
    /// rows (trap 70).
    pub labels: BTreeMap<u32, EnumLabel>,
    /// The composites that its columns use, by the oid in pg_class: adding or dropping a field
    /// changes how old rows print.
    pub composites: BTreeMap<u32, CompositeFields>,
    pub row_filter: Option<String>,
    /// The rows of pg_publication_rel that name it or a root of it. A table that left its
    /// publication and came back has another one (trap 41). One that is named cannot be made
    /// UNLOGGED for a while; see `judge`.
    pub listed: String,
    /// Likewise for its schema (`FOR TABLES IN SCHEMA`).
    pub schema: String,
    /// Oid and `xmin` of the publications that bring it. Options that were changed and changed back
    /// leave another `xmin`, and changes between that never came (trap 41).
    pub publications: String,
}

/// A label of an enum, as its row in pg_enum says it. Equal are those whose row is the same: what
/// became of its type says nothing.
#[derive(Debug, Clone, Eq, Serialize, Deserialize)]
pub struct EnumLabel {
    pub type_oid: u32,
    pub name: String,
    /// Of the row: RENAME VALUE gives it another one.
    pub xmin: u32,
    /// It came with its type, and was never renamed. One that was added later cannot be told from a
    /// renamed one.
    pub is_original: bool,
}

impl PartialEq for EnumLabel {
    fn eq(&self, other: &Self) -> bool {
        (self.type_oid, &self.name, self.xmin) == (other.type_oid, &other.name, other.xmin)
    }
}

/// The fields of a composite type, as their rows in pg_attribute say it. Equal are those whose rows
/// are the same.
#[derive(Debug, Clone, Eq, Serialize, Deserialize)]
pub struct CompositeFields {
    /// Number, name, type and `xmin` of each.
    pub fields: String,
    /// All of them came with the type, and none was changed since.
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
    /// `attndims`.
    pub ndims: i32,
    pub not_null: bool,
    /// `attstorage` is one that TOASTs.
    pub toastable: bool,
    /// `GENERATED ALWAYS AS (..) STORED`.
    pub is_generated: bool,
    /// Of its row in pg_attribute: each ALTER of the column gives it another one.
    pub xmin: u32,
    /// What rows hold that are older than the column (trap 66), by the oid of each table that holds
    /// rows: in the server's text (`attmissingval`); `None` is NULL.
    pub missing: BTreeMap<u32, Option<String>>,
}

#[derive(Debug, Clone)]
pub struct LeafTable {
    pub oid: u32,
    pub name: QualifiedName,
    /// `relfilenode`.
    pub file: u32,
    /// `xmin` of its row in pg_class: the transaction that gave it its file, or has changed
    /// something else of it since. VACUUM, ANALYZE and CREATE INDEX change that row in its place.
    pub changed_by: u32,
    /// See [`Fingerprint::inherits`].
    pub inherits: String,
    /// Pages of 8 KiB; none before [`measure`] has counted them.
    pub pages: Option<u64>,
    pub can_select: bool,
}

impl SourceTable {
    /// Notes what [`measure`] found.
    pub fn measured(&mut self, pages: &HashMap<u32, u64>) {
        for leaf in &mut self.leaves {
            leaf.pages = pages.get(&leaf.oid).copied().or(leaf.pages);
        }
    }

    /// Pages of 8 KiB of heap, over all leaves that were measured.
    pub fn pages(&self) -> u64 {
        self.leaves.iter().filter_map(|leaf| leaf.pages).sum()
    }
}

/// How rows are told apart, by `attnum`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceKey {
    Columns(Vec<i16>),
    WholeRow,
    AppendOnly,
}

/// Traps 49, 53, 54: the replica identity's columns; with FULL the primary key if it is immediate,
/// else the whole row.
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

/// The tables of the publications.
pub async fn published_tables(
    client: &Client,
    names: &[String],
) -> Result<Vec<SourceTable>, CatalogError> {
    describe(client, members(client, names, None).await?, names).await
}

/// Those of them with these oids.
pub async fn published_among(
    client: &Client,
    names: &[String],
    oids: &[u32],
) -> Result<Vec<SourceTable>, CatalogError> {
    describe(client, members(client, names, Some(oids)).await?, names).await
}

/// All tables that could be copied, for a copy without a publication.
pub async fn all_tables(client: &Client) -> Result<Vec<SourceTable>, CatalogError> {
    let rows = client.query(&format!("SELECT c.oid {CANDIDATES}"), &[]).await?;
    let member =
        |row: tokio_postgres::Row| Ok::<_, CatalogError>(Member::unpublished(row.try_get(0)?));
    let members = rows.into_iter().map(member).collect::<Result<Vec<_>, _>>()?;
    describe(client, members, &[]).await
}

/// Ordinary tables and roots of partition trees, of users, permanent.
const CANDIDATES: &str = "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
     WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p' \
     AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema' \
     AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid \
     = c.oid AND d.deptype = 'e')";

/// The names of what a new publication could hold.
pub async fn candidate_tables(client: &Client) -> Result<Vec<QualifiedName>, CatalogError> {
    let rows = client
        .query(&format!("SELECT n.nspname::text, c.relname::text {CANDIDATES} ORDER BY 1, 2"), &[])
        .await?;
    rows.iter()
        .map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }))
        .collect()
}

/// Tables of users whose changes are not in the WAL.
pub async fn unlogged_tables(client: &Client) -> Result<Vec<QualifiedName>, CatalogError> {
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid \
             = c.relnamespace \
             WHERE c.relkind = 'r' AND c.relpersistence = 'u' AND n.nspname NOT LIKE 'pg\\_%' \
             ORDER BY 1, 2",
            &[],
        )
        .await?;
    rows.iter()
        .map(|row| Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }))
        .collect()
}

async fn describe(
    client: &Client,
    members: Vec<Member>,
    publications: &[String],
) -> Result<Vec<SourceTable>, CatalogError> {
    let oids: Vec<u32> = members.iter().map(|member| member.oid).collect();
    let members: HashMap<u32, Member> =
        members.into_iter().map(|member| (member.oid, member)).collect();
    let mut columns = columns_of(client, &oids).await?;
    let mut parts = type_parts(client, &columns).await?;
    let mut trees = trees_of(client, &oids).await?;
    let naming = Naming::read(client, publications, &oids).await?;
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
             (SELECT i.indexrelid FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND \
             i.indimmediate) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY($1) \
             ORDER BY 2, 3"
            ),
            &[&oids],
        )
        .await?;
    let mut tables = Vec::with_capacity(rows.len());
    for row in rows {
        let oid: u32 = row.try_get(0)?;
        let Some(member) = members.get(&oid) else { continue };
        let mut published = columns.remove(&oid).unwrap_or_default();
        let attributes = published.iter().map(|column| (column.attnum, column.xmin)).collect();
        published.retain(|column| member.brings(column));
        let code = row.try_get::<_, i8>(4)? as u8;
        let parts_of_types = parts.remove(&oid).unwrap_or_default();
        let Tree { leaves, estimated_rows, leaf_attributes, without_wal } =
            trees.remove(&oid).unwrap_or_default();
        tables.push(SourceTable {
            oid,
            name: QualifiedName { schema: row.try_get(1)?, name: row.try_get(2)? },
            kind: row.try_get::<_, i8>(3)? as u8,
            replica_identity: ReplicaIdentity::from_code(code).ok_or_else(|| {
                CatalogError::Answer {
                    what: "a replica identity",
                    found: char::from(code).to_string(),
                }
            })?,
            estimated_rows,
            row_filter: member.row_filter.clone(),
            columns: published,
            can_select: row.try_get(6)?,
            identity_index: row.try_get::<_, Option<Vec<i16>>>(7)?.unwrap_or_default(),
            primary_key: row.try_get::<_, Option<Vec<i16>>>(8)?.unwrap_or_default(),
            is_primary_key_immediate: row.try_get::<_, Option<bool>>(9)?.unwrap_or_default(),
            fingerprint: Fingerprint {
                files: leaves.iter().map(|leaf| (leaf.oid, leaf.file)).collect(),
                inherits: leaves.iter().map(|leaf| (leaf.oid, leaf.inherits.clone())).collect(),
                attributes,
                leaf_attributes,
                last_attnum: row.try_get(5)?,
                key_index: row.try_get::<_, Option<u32>>(10)?.unwrap_or_default(),
                labels: parts_of_types.labels,
                composites: parts_of_types.composites,
                row_filter: member.row_filter.clone(),
                listed: naming.listed(oid),
                schema: naming.schema(oid),
                publications: member.publications(),
            },
            leaves_without_wal: without_wal,
            leaves,
        });
    }
    Ok(tables)
}

/// Columns, those generated included: whether the stream brings these is the publication's choice
/// (trap 20).
async fn columns_of(
    client: &Client,
    oids: &[u32],
) -> Result<HashMap<u32, Vec<SourceColumn>>, CatalogError> {
    let rows = client
        .query(
            "SELECT attrelid, attnum, attname::text, atttypid, atttypmod, attndims::int, \
             attnotnull, attstorage <> 'p', \
             attgenerated <> '', xmin::text::bigint \
             FROM pg_attribute WHERE attrelid = ANY($1) AND attnum > 0 AND NOT attisdropped AND \
             attgenerated <> 'v' \
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
    // A partitioned table holds no rows, so its leaves say what is missing, each under a number of
    // its own.
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
        let missing = row.try_get::<_, Option<String>>(3)?.and_then(|array| only_element(&array));
        let of_table = columns.entry(row.try_get(0)?).or_default();
        if let Some(column) = of_table.iter_mut().find(|column| column.name == name) {
            column.missing.insert(leaf, missing);
        }
    }
    Ok(columns)
}

/// The one element of an array as `array_out` prints it.
pub fn only_element(array: &str) -> Option<String> {
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

/// What the types of a table's columns are made of that can change under old rows.
#[derive(Default)]
struct TypeParts {
    labels: BTreeMap<u32, EnumLabel>,
    composites: BTreeMap<u32, CompositeFields>,
}

/// A transaction's number, which SQL hands out as text only.
fn xmin(number: i64) -> u32 {
    u32::try_from(number).unwrap_or_default()
}

async fn type_parts(
    client: &Client,
    columns: &HashMap<u32, Vec<SourceColumn>>,
) -> Result<HashMap<u32, TypeParts>, CatalogError> {
    let mut parts: HashMap<u32, TypeParts> = HashMap::new();
    // Types of users only; those of the system do not change.
    const FIRST_USER_OID: u32 = 16384;
    let (mut tables, mut types): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    for (&table, columns) in columns {
        for column in columns.iter().filter(|column| column.type_oid >= FIRST_USER_OID) {
            tables.push(table);
            types.push(column.type_oid);
        }
    }
    if types.is_empty() {
        return Ok(parts);
    }
    let rows = client
        .query(
            &format!(
                "WITH RECURSIVE uses(tab, oid) AS (SELECT * FROM unnest($2::oid[], $1::oid[]) \
                 UNION \
                 SELECT uses.tab, part FROM uses JOIN pg_type t ON t.oid = uses.oid {TYPE_PARTS}) \
                 SELECT uses.tab, true, e.oid, e.enumlabel::text, e.enumtypid, \
                 e.xmin::text::bigint, e.xmin = t.xmin \
                 FROM uses JOIN pg_enum e ON e.enumtypid = uses.oid JOIN pg_type t ON t.oid = \
                 e.enumtypid \
                 UNION ALL SELECT uses.tab, false, a.attrelid, \
                 string_agg(format('%s %s %s %s', a.attnum, a.attname, a.atttypid, a.xmin), ',' \
                 ORDER BY a.attnum), \
                 0::oid, 0::bigint, bool_and(a.xmin = t.xmin) FROM uses JOIN pg_type t ON t.oid = \
                 uses.oid JOIN pg_attribute a \
                 ON a.attrelid = t.typrelid AND t.typrelid <> 0 AND a.attnum > 0 AND NOT \
                 a.attisdropped GROUP BY uses.tab, a.attrelid"
            ),
            &[&types, &tables],
        )
        .await?;
    for row in rows {
        let entry = parts.entry(row.try_get(0)?).or_default();
        let (oid, text): (u32, String) = (row.try_get(2)?, row.try_get(3)?);
        let is_original = row.try_get(6)?;
        if row.try_get(1)? {
            let (type_oid, xmin) = (row.try_get(4)?, xmin(row.try_get(5)?));
            entry.labels.insert(oid, EnumLabel { type_oid, name: text, xmin, is_original });
        } else {
            entry.composites.insert(oid, CompositeFields { fields: text, is_original });
        }
    }
    Ok(parts)
}

/// Whether this role may read table `c` of schema `n`, or some of its columns.
///
/// Functions that look at the newest state say NULL of a table that was dropped since the snapshot.
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

/// The tables that hold the rows of one table: itself, or its leaf partitions.
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
                 ',' ORDER BY a.attrelid, a.attnum)) FROM tree JOIN pg_class c ON c.oid = tree.oid \
                 AND c.relkind <> 'p' \
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

/// Pages of these tables that hold rows, by oid. Takes an ACCESS SHARE lock on each of them for a
/// moment.
///
/// # Errors
/// [`CatalogError::is_locked`], where the session limits how long it waits.
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

/// Those of these tables on which another session holds an ACCESS EXCLUSIVE lock, or waits for one.
pub async fn locked_among(client: &Client, tables: &[u32]) -> Result<HashSet<u32>, CatalogError> {
    let rows = client
        .query(
            "SELECT DISTINCT relation FROM pg_locks WHERE locktype = 'relation' AND mode = \
             'AccessExclusiveLock' \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND \
             relation = ANY($1)",
            &[&tables],
        )
        .await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// What a type is made of: elements, bases of domains, bounds of ranges, fields of composites.
const TYPE_PARTS: &str = "CROSS JOIN LATERAL (SELECT unnest(ARRAY[t.typelem, t.typbasetype]) \
       UNION ALL SELECT rngsubtype FROM pg_range WHERE rngtypid = t.oid \
       UNION ALL SELECT rngtypid FROM pg_range WHERE rngmultitypid = t.oid \
       UNION ALL SELECT a.atttypid FROM pg_attribute a \
         WHERE a.attrelid = t.typrelid AND t.typrelid <> 0 AND a.attnum > 0 AND NOT \
         a.attisdropped) parts(part) \
     WHERE part <> 0";

/// These types, and all that they are made of.
pub async fn types(client: &Client, oids: &[u32]) -> Result<TypeCatalog, CatalogError> {
    let rows = client
        .query(
            &format!(
                "WITH RECURSIVE needed(oid) AS (SELECT unnest($1::oid[]) UNION \
                 SELECT part FROM needed JOIN pg_type t ON t.oid = needed.oid {TYPE_PARTS}) \
                 SELECT t.oid, n.nspname::text, t.typname::text, t.typtype, t.typcategory, \
                 CASE WHEN t.typlen = -1 AND t.typsubscript = 'array_subscript_handler'::regproc \
                 THEN t.typelem ELSE 0::oid END, \
                 t.typdelim, t.typbasetype, t.typtypmod, t.typndims, coalesce(r.rngsubtype, \
                 0::oid), t.typrelid \
                 FROM needed JOIN pg_type t ON t.oid = needed.oid JOIN pg_namespace n ON n.oid = \
                 t.typnamespace \
                 LEFT JOIN pg_range r ON r.rngtypid = t.oid"
            ),
            &[&oids],
        )
        .await?;
    let mut catalog = TypeCatalog { money_scale: 2, ..TypeCatalog::default() };
    let composites: Vec<u32> =
        rows.iter().map(|row| row.try_get::<_, u32>(11)).collect::<Result<_, _>>()?;
    let mut fields: HashMap<u32, Vec<FieldInfo>> = HashMap::new();
    for row in client
        .query(
            "SELECT attrelid, attname::text, atttypid, atttypmod, attndims::int FROM pg_attribute \
             WHERE attrelid = ANY($1) AND attrelid <> 0 AND attnum > 0 AND NOT attisdropped ORDER \
             BY attrelid, attnum",
            &[&composites],
        )
        .await?
    {
        fields.entry(row.try_get(0)?).or_default().push(FieldInfo {
            name: row.try_get(1)?,
            type_oid: row.try_get(2)?,
            typmod: row.try_get(3)?,
            ndims: row.try_get(4)?,
        });
    }
    for row in rows {
        let info = TypeInfo {
            oid: row.try_get(0)?,
            schema: row.try_get(1)?,
            name: row.try_get(2)?,
            kind: row.try_get::<_, i8>(3)? as u8,
            category: row.try_get::<_, i8>(4)? as u8,
            element_oid: row.try_get(5)?,
            delimiter: row.try_get::<_, i8>(6)? as u8,
            base_oid: row.try_get(7)?,
            base_typmod: row.try_get(8)?,
            base_ndims: row.try_get(9)?,
            range_of: row.try_get(10)?,
            fields: fields.remove(&row.try_get(11)?).unwrap_or_default(),
        };
        catalog.types.insert(info.oid, info);
    }
    Ok(catalog)
}

/// A replication slot, as far as it matters to us.
#[derive(Debug, Clone)]
pub struct SlotInfo {
    pub database: Option<String>,
    pub plugin: Option<String>,
    pub active: bool,
    pub active_pid: Option<i32>,
    pub temporary: bool,
    pub confirmed_flush_lsn: Option<Lsn>,
    pub wal_status: Option<String>,
    /// WAL that the server keeps for the slot, in bytes.
    pub held_bytes: Option<u64>,
}

pub async fn slot(client: &Client, name: &str) -> Result<Option<SlotInfo>, CatalogError> {
    let row = client
        .query_opt(
            "SELECT database::text, plugin::text, active, active_pid, temporary, \
             confirmed_flush_lsn::text, wal_status, \
             CASE WHEN pg_is_in_recovery() THEN NULL ELSE (pg_current_wal_lsn() - \
             restart_lsn)::bigint END \
             FROM pg_replication_slots WHERE slot_name = $1::text",
            &[&name],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    let confirmed: Option<String> = row.try_get(5)?;
    Ok(Some(SlotInfo {
        database: row.try_get(0)?,
        plugin: row.try_get(1)?,
        active: row.try_get(2)?,
        active_pid: row.try_get(3)?,
        temporary: row.try_get(4)?,
        confirmed_flush_lsn: confirmed.and_then(|text| text.parse().ok()),
        wal_status: row.try_get(6)?,
        held_bytes: row.try_get::<_, Option<i64>>(7)?.map(i64::unsigned_abs),
    }))
}

/// Whether commits wait for the walsender of this slot, since `synchronous_standby_names` includes
/// it.
pub async fn is_synchronous_standby(client: &Client, slot: &str) -> Result<bool, CatalogError> {
    let query = "SELECT EXISTS (SELECT 1 FROM pg_stat_replication r JOIN pg_replication_slots s ON \
                 s.active_pid = r.pid \
         WHERE s.slot_name = $1::text AND r.sync_state IN ('sync', 'quorum'))";
    Ok(client.query_one(query, &[&slot]).await?.try_get(0)?)
}

/// The end of the WAL, and the transactions that had a number and were in progress after that was
/// read, prepared ones too: a commit record before the position belongs to one of them, or to one
/// that every later snapshot sees.
pub async fn wal_insert_lsn_and_xids(
    client: &Client,
) -> Result<(Lsn, BTreeSet<u32>), CatalogError> {
    // The second question depends on the answer to the first.
    let query = "SELECT lsn::text, array(SELECT backend_xid::text FROM pg_stat_activity \
           WHERE backend_xid IS NOT NULL AND lsn IS NOT NULL) \
         || array(SELECT transaction::text FROM pg_prepared_xacts WHERE lsn IS NOT NULL) \
         FROM (SELECT pg_current_wal_insert_lsn() AS lsn OFFSET 0) AS position";
    let row = client.query_one(query, &[]).await?;
    let (lsn, xids): (String, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);
    let parsed: Option<BTreeSet<u32>> = xids.iter().map(|xid| xid.parse().ok()).collect();
    let xids = parsed
        .ok_or_else(|| CatalogError::Answer { what: "transactions", found: xids.join(",") })?;
    Ok((parse_lsn(lsn)?, xids))
}

/// Those of the transactions of which it cannot be said that they do not wait for synchronous
/// standbys. Of sessions of other roles only members of `pg_read_all_stats` are told.
pub async fn awaiting_standbys(
    client: &Client,
    xids: &BTreeSet<u32>,
) -> Result<BTreeSet<u32>, CatalogError> {
    let query = "SELECT current_setting('synchronous_standby_names') = '', array(SELECT \
                 backend_xid::text \
         FROM pg_stat_activity WHERE state IS NOT NULL AND wait_event IS DISTINCT FROM 'SyncRep' \
         AND backend_xid IS NOT NULL)";
    let row = client.query_one(query, &[]).await?;
    let (waits_for_none, not_waiting): (bool, Vec<String>) = (row.try_get(0)?, row.try_get(1)?);
    if waits_for_none {
        return Ok(BTreeSet::new());
    }
    Ok(xids.iter().copied().filter(|xid| !not_waiting.contains(&xid.to_string())).collect())
}

/// Whether commits of the server wait for standbys before they become visible.
pub async fn has_synchronous_standbys(client: &Client) -> Result<bool, CatalogError> {
    let query = "SELECT current_setting('synchronous_standby_names') <> ''";
    Ok(client.query_one(query, &[]).await?.try_get(0)?)
}

/// Whether standbys keep the slot too. Asked of PostgreSQL 17 and newer.
pub async fn is_failover_slot(client: &Client, name: &str) -> Result<bool, CatalogError> {
    let query = "SELECT failover FROM pg_replication_slots WHERE slot_name = $1::text";
    let row = client.query_opt(query, &[&name]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?.unwrap_or(false))
}

/// What the creation of a slot waits for (trap 12): the oldest transactions that have written, and
/// prepared ones.
pub async fn blockers(client: &Client) -> Result<Vec<String>, CatalogError> {
    let rows = client
        .query(
            "SELECT format('pid %s (%s, %s, open for %s s)', pid, usename, \
             coalesce(nullif(application_name, ''), state), \
             extract(epoch FROM now() - xact_start)::int) FROM pg_stat_activity WHERE backend_xid \
             IS NOT NULL \
             UNION ALL SELECT format('prepared transaction %L of %s', gid, owner) FROM \
             pg_prepared_xacts LIMIT 5",
            &[],
        )
        .await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}
