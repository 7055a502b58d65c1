//! Random histories of rows and schemas: whatever the source does, each sync leaves an equal copy.
//!
//! A model of the schema, and only of the schema, says which statements are valid; which rows they hit is decided at
//! the server. The same seed gives the same statements. What fails prints its script, and is played alone by
//! `RHEI_TEST_SEED=base RHEI_TEST_HISTORY=n make test TEST=random_histories`.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use crate::bed::{
    Cluster, ClusterOptions, Db, Rhei, Session, cluster::quote, compare, oracle::Pair, temp_dir, wait_until,
};

const SOON: Duration = Duration::from_secs(120);
const SEED: u64 = 20_261_127;
const PUBLICATION: &str = "histories";
const MOOD: &str = "public.mood";
/// Under publish_via_partition_root the stream says nothing of a truncated leaf (trap 61).
const TRUNCATE_LEAVES_UNDER_ROOT: bool = true;

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn random_histories_are_equal_after_every_sync() {
    let histories = from_env("RHEI_TEST_HISTORIES").unwrap_or(200);
    let seed = from_env("RHEI_TEST_SEED").unwrap_or(SEED);
    let range = from_env("RHEI_TEST_HISTORY").map_or(0..histories, |only| only..only + 1);
    println!("RHEI_TEST_HISTORIES={histories} RHEI_TEST_SEED={seed}: histories {range:?}");
    let cluster = quiet_cluster();
    let next = AtomicU64::new(range.start);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let history = next.fetch_add(1, Ordering::Relaxed);
                    // The scripts of a few tell more than those of all.
                    if history >= range.end || failed.lock().unwrap().len() >= 3 {
                        break;
                    }
                    let play = || History::new(&cluster, seed + history).play();
                    if catch_unwind(AssertUnwindSafe(play)).is_err() {
                        failed.lock().unwrap().push(history);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "replay with RHEI_TEST_SEED={seed} and RHEI_TEST_HISTORY= one of {failed:?}");
}

#[test]
fn a_random_history_is_followed_by_a_run_in_the_background() {
    let seed = from_env("RHEI_TEST_SEED").unwrap_or(SEED);
    println!("RHEI_TEST_SEED={seed}");
    let cluster = quiet_cluster();
    let mut history = History::new(&cluster, seed);
    history.in_background = true;
    history.begin();
    let mut running = history.rhei.spawn(["run"]);
    running.wait_for_log("all tables are live", SOON);
    for _ in 0..60 {
        history.transaction();
    }
    let ended = running.stop(SOON);
    history.script.extend(ended.stderr.lines().map(|line| format!("-- {line}")));
    ended.assert_code(0);
    history.sync();
}

/// Of its own, because autovacuum moves rows at moments that no seed decides.
fn quiet_cluster() -> Cluster {
    Cluster::start(ClusterOptions::default().conf("autovacuum = off"))
}

/// A deadlock with the replicator took our transaction.
struct Lost;

type Done = Result<(), Lost>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Int,
    Bigint,
    /// numeric(precision,3).
    Decimal(u8),
    Numeric,
    Text,
    /// text of STORAGE EXTERNAL and 12,800 bytes.
    Big,
    Varchar,
    Timestamptz,
    Bool,
    Jsonb,
    Uuid,
    List,
    Mood,
}

impl Kind {
    const ALL: [Kind; 14] = [
        Kind::Int,
        Kind::Int,
        Kind::Bigint,
        Kind::Decimal(12),
        Kind::Numeric,
        Kind::Text,
        Kind::Big,
        Kind::Varchar,
        Kind::Timestamptz,
        Kind::Bool,
        Kind::Jsonb,
        Kind::Uuid,
        Kind::List,
        Kind::Mood,
    ];

    fn sql(self) -> String {
        match self {
            Kind::Int => "int".to_owned(),
            Kind::Bigint => "bigint".to_owned(),
            Kind::Decimal(precision) => format!("numeric({precision},3)"),
            Kind::Numeric => "numeric".to_owned(),
            Kind::Text | Kind::Big => "text".to_owned(),
            Kind::Varchar => "varchar(10)".to_owned(),
            Kind::Timestamptz => "timestamptz".to_owned(),
            Kind::Bool => "bool".to_owned(),
            Kind::Jsonb => "jsonb".to_owned(),
            Kind::Uuid => "uuid".to_owned(),
            Kind::List => "text[]".to_owned(),
            Kind::Mood => MOOD.to_owned(),
        }
    }
}

/// Only plain columns are dropped, filled with anything, or lose their NOT NULL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// A number; unique in the table unless rows were duplicated.
    Id,
    /// The second column of a key.
    Second,
    /// What the table is, or was, partitioned by.
    Part,
    Plain,
}

#[derive(Debug, Clone)]
struct Column {
    name: String,
    kind: Kind,
    role: Role,
    not_null: bool,
    has_default: bool,
}

impl Column {
    fn is_plain(&self) -> bool {
        self.role == Role::Plain
    }

    fn definition(&self) -> String {
        format!("{} {}{}", quote(&self.name), self.kind.sql(), if self.not_null { " NOT NULL" } else { "" })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    /// With no key, or none that counts: INSERT and TRUNCATE only.
    Default,
    Full,
    Index,
}

impl Identity {
    fn keyword(self) -> &'static str {
        match self {
            Identity::Full => "FULL",
            Identity::Default | Identity::Index => "DEFAULT",
        }
    }
}

#[derive(Debug, Clone)]
struct Key {
    /// None when the server chose the name.
    constraint: Option<String>,
    is_deferrable: bool,
}

#[derive(Debug, Clone)]
struct Leaf {
    schema: String,
    name: String,
    constraint: Option<String>,
    value: u64,
}

impl Leaf {
    fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }
}

#[derive(Debug, Clone)]
struct Partitions {
    by_range: bool,
    leaves: Vec<Leaf>,
    next: u64,
}

impl Partitions {
    fn bound(&self, value: u64) -> String {
        match self.by_range {
            true => format!("FOR VALUES FROM ({value}) TO ({})", value + 1),
            false => format!("FOR VALUES IN ({value})"),
        }
    }
}

#[derive(Debug, Clone)]
struct Table {
    schema: String,
    name: String,
    columns: Vec<Column>,
    identity: Identity,
    key: Option<Key>,
    unique_index: Option<String>,
    partitions: Option<Partitions>,
}

impl Table {
    fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    /// UPDATE and DELETE are refused at the source otherwise.
    fn can_change(&self) -> bool {
        match self.identity {
            Identity::Default => self.key.as_ref().is_some_and(|key| !key.is_deferrable),
            Identity::Full | Identity::Index => true,
        }
    }

    fn is_unique(&self) -> bool {
        self.key.is_some() || self.unique_index.is_some()
    }

    fn is_deferrable(&self) -> bool {
        self.key.as_ref().is_some_and(|key| key.is_deferrable)
    }

    /// The quoted name of the column of this role.
    fn of_role(&self, role: Role) -> Option<String> {
        self.columns.iter().find(|column| column.role == role).map(|column| quote(&column.name))
    }

    fn id(&self) -> String {
        self.of_role(Role::Id).expect("every table has an id")
    }

    fn leaves(&self) -> &[Leaf] {
        match &self.partitions {
            Some(partitions) => &partitions.leaves,
            None => &[],
        }
    }

    fn key_columns(&self) -> String {
        let key = self.columns.iter().filter(|column| !column.is_plain());
        key.map(|column| quote(&column.name)).collect::<Vec<_>>().join(", ")
    }
}

fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", quote(schema), quote(name))
}

/// What a rollback takes back.
#[derive(Debug, Clone, Default)]
struct World {
    tables: Vec<Table>,
    labels: Vec<String>,
    /// Labels that may be used only after the transaction that added them.
    fresh_labels: Vec<String>,
    /// Names that tables had once.
    free_names: Vec<String>,
    keyword_is_used: bool,
    /// Source of names and keys.
    ///
    /// Keys are changed by adding a million to some, or by negating or adding one to all. So the difference of two
    /// keys of a table is never a multiple of a million, and keys never meet.
    counter: u64,
}

struct History {
    seed: u64,
    dice: Xoshiro256PlusPlus,
    world: World,
    via_root: bool,
    in_background: bool,
    /// Every statement so far, and where `sync` ran.
    script: Vec<String>,
    session: Session,
    rhei: Rhei,
    slot: String,
    // A new database costs less than a tenth of a history, and leaves nothing of a failed one.
    db: Db,
    _folder: tempfile::TempDir,
}

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (seed, script) = (self.seed, self.script.join(";\n"));
            eprintln!("--- history of seed {seed}, via_root = {} ---\n{script};\n--- end of {seed} ---", self.via_root);
        }
    }
}

/// An operation and how often it comes.
type Weighted = (usize, fn(&mut History) -> Done);

const OPERATIONS: &[Weighted] = &[
    (16, History::insert),
    (14, History::update),
    (6, History::update_big),
    (8, History::change_keys),
    (4, History::flip_keys),
    (4, History::shift_keys),
    (7, History::delete),
    (3, History::delete_all),
    (4, History::reinsert),
    (2, History::duplicate),
    (4, History::truncate),
    (3, History::touch),
    (6, History::add_column),
    (4, History::drop_column),
    (3, History::rename_column),
    (2, History::swap_columns),
    (3, History::replace_column),
    (6, History::retype),
    (2, History::set_not_null),
    (2, History::drop_not_null),
    (2, History::set_default),
    (3, History::rename_table),
    (2, History::swap_tables),
    (1, History::move_to_schema),
    (2, History::move_key),
    (1, History::drop_key),
    (3, History::change_identity),
    (1, History::drop_table),
    (2, History::drop_and_create),
    (2, History::create),
    (2, History::add_label),
    (2, History::rename_label),
    (4, History::cross_partitions),
    (3, History::attach),
    (2, History::detach),
    (2, History::drop_leaf),
    (2, History::truncate_leaf),
];

impl History {
    fn new(cluster: &Cluster, seed: u64) -> History {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
        let via_root = dice.random_range(0..2) == 0;
        let folder = temp_dir();
        let db = cluster.database("history");
        let slot = db.name().to_owned();
        // Every other one has transactions that are larger than memory, at the source as well as here.
        let is_small = seed % 2 == 1;
        let mut url = db.url();
        if is_small {
            url.push_str("&options=-c%20logical_decoding_work_mem%3D64kB");
            if cluster.major() >= 16 {
                url.push_str("%20-c%20debug_logical_replication_streaming%3Dimmediate");
            }
        }
        let rhei = Rhei::new(folder.path()).source(url).target("copy.duckdb").config(&format!(
            "[source]\nslot = \"{slot}\"\npublication = \"{PUBLICATION}\"\n[sync]\ninterval = \"50ms\"\nmemory_limit = \"{}\"\n",
            if is_small { "64kB" } else { "512MB" }
        ));
        let session = db.session();
        session.execute("SET TimeZone = 'UTC'; SET client_min_messages = warning");
        History {
            seed,
            dice,
            world: World::default(),
            via_root,
            in_background: false,
            script: Vec::new(),
            session,
            rhei,
            slot,
            db,
            _folder: folder,
        }
    }

    fn play(mut self) {
        self.begin();
        self.sync();
        let transactions = self.between(12..26);
        let syncs: Vec<usize> = (0..self.pick(4)).map(|_| self.pick(transactions)).collect();
        for number in 0..transactions {
            self.transaction();
            if syncs.contains(&number) {
                self.sync();
            }
        }
        self.sync();
        // The server frees a slot a moment after its client has gone; the database is dropped more quickly then.
        let slot = &self.slot;
        wait_until(SOON, "the slot is free", || {
            self.db.value(&format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}' AND active"))
                == "0"
        });
    }

    /// A few tables with rows, before the first sync.
    fn begin(&mut self) {
        assert!(self.try_begin().is_ok(), "a deadlock with nobody");
    }

    fn try_begin(&mut self) -> Done {
        self.run("CREATE SCHEMA side".to_owned())?;
        self.run(format!("CREATE TYPE {MOOD} AS ENUM ('sad', 'ok', 'glad')"))?;
        self.run(format!(
            "CREATE PUBLICATION {PUBLICATION} FOR ALL TABLES WITH (publish_via_partition_root = {})",
            self.via_root
        ))?;
        self.run("SELECT setseed(0.25)".to_owned())?;
        self.world.labels = ["sad", "ok", "glad"].map(str::to_owned).to_vec();
        for _ in 0..self.between(2..4) {
            self.create()?;
            self.insert_into(self.world.tables.len() - 1)?;
        }
        Ok(())
    }

    /// The copy must equal every table that is published now.
    #[track_caller]
    fn sync(&mut self) {
        self.script.push("-- sync".to_owned());
        let synced = self.rhei.run(["sync"]);
        // PostgreSQL itself stumbles now and then over what a transaction rewrote and took back (XX000): docs/operating.md. No
        // excuse unless the server fails in the same way without rhei.
        const STUMBLE: &str = "unexpected duplicate for tablespace";
        if synced.code() == Some(1) && synced.stderr.contains(STUMBLE) {
            let peek = format!(
                "SELECT count(*) FROM pg_logical_slot_peek_binary_changes('{}', NULL, NULL, 'proto_version', '1', \
                 'publication_names', '{PUBLICATION}')",
                self.slot
            );
            match self.db.try_query(&peek) {
                Err(error) if error.contains(STUMBLE) => {
                    println!("seed {}: the server cannot decode its own WAL; everything is copied again", self.seed);
                    self.rhei.run_ok(["backfill", "--force"]);
                }
                _ => drop(self.rhei.run_ok(["sync"])),
            }
        } else {
            synced.assert_code(0);
        }
        let published = self.db.query(&format!(
            "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = '{PUBLICATION}' ORDER BY 1, 2"
        ));
        let pairs = published.into_iter().map(|row| {
            let mut names = row.into_iter().map(|name| name.expect("a name"));
            let name = (names.next().expect("a schema"), names.next().expect("a table"));
            Pair { source: name.clone(), target: name, excluded: Vec::new() }
        });
        let differences = compare(&self.db, self.rhei.target_path(), &pairs.collect::<Vec<_>>());
        assert!(differences.is_empty(), "seed {}: the copy differs:\n{}", self.seed, differences.join("\n"));
    }

    fn transaction(&mut self) {
        let before = self.world.clone();
        let done = if self.chance(10) { self.maintain() } else { self.block(&before) };
        if matches!(done, Err(Lost)) {
            self.script.push("-- deadlock".to_owned());
            self.session.execute("ROLLBACK");
            self.world = before;
        }
    }

    fn block(&mut self, before: &World) -> Done {
        self.run("BEGIN".to_owned())?;
        for _ in 0..self.between(1..7) {
            if !self.chance(20) {
                self.operation()?;
                continue;
            }
            let inner = self.world.clone();
            self.run("SAVEPOINT inner_one".to_owned())?;
            for _ in 0..self.between(1..3) {
                self.operation()?;
            }
            if self.chance(60) {
                self.run("ROLLBACK TO SAVEPOINT inner_one".to_owned())?;
                self.world = inner;
            } else {
                self.run("RELEASE SAVEPOINT inner_one".to_owned())?;
            }
        }
        if self.chance(12) {
            self.run("ROLLBACK".to_owned())?;
            self.world = before.clone();
            return Ok(());
        }
        self.run("COMMIT".to_owned())?;
        let fresh = std::mem::take(&mut self.world.fresh_labels);
        self.world.labels.extend(fresh);
        Ok(())
    }

    /// What may not run inside a transaction, or need not.
    fn maintain(&mut self) -> Done {
        let at = self.pick(self.world.tables.len());
        let table = self.world.tables[at].clone();
        let name = table.qualified();
        let constraint = table.key.as_ref().and_then(|key| key.constraint.as_ref());
        match (self.pick(4), constraint) {
            (0, Some(constraint)) if table.partitions.is_none() => {
                self.run(format!("CLUSTER {name} USING {}", quote(constraint)))
            }
            (0 | 1, _) => self.run(format!("VACUUM FULL {name}")),
            (2, _) => self.run(format!("VACUUM {name}")),
            _ => self.run(format!("ANALYZE {name}")),
        }
    }

    fn operation(&mut self) -> Done {
        let total: usize = OPERATIONS.iter().map(|(weight, _)| weight).sum();
        let mut left = self.pick(total);
        for (weight, operation) in OPERATIONS {
            if left < *weight {
                return operation(self);
            }
            left -= weight;
        }
        Ok(())
    }

    /// A refused statement is a mistake of this file, except for a deadlock with the replicator, and for what PostgreSQL refuses by
    /// a bug of its own (18351 and 19519): to rewrite a table that holds a dead row whose long values it has vacuumed already. The
    /// table is as it was then.
    #[track_caller]
    fn run(&mut self, sql: String) -> Done {
        let result = self.session.try_query(&sql);
        let rewrites = sql.starts_with("VACUUM FULL ") || sql.starts_with("CLUSTER ");
        self.script.push(sql);
        match result {
            Ok(_) => Ok(()),
            Err(message) if self.in_background && message.contains("(40P01)") => Err(Lost),
            Err(message) if rewrites && message.contains("missing chunk number") => {
                println!("seed {}: the server does not rewrite a table: {message}", self.seed);
                Ok(())
            }
            Err(message) => panic!("seed {}: {message}\nin: {}", self.seed, self.script[self.script.len() - 1]),
        }
    }

    // Dice.

    fn pick(&mut self, below: usize) -> usize {
        self.dice.random_range(0..below)
    }

    fn between(&mut self, range: Range<usize>) -> usize {
        self.dice.random_range(range)
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.pick(100) < percent
    }

    fn fresh(&mut self) -> u64 {
        self.world.counter += 1;
        self.world.counter
    }

    /// The first of this many numbers that no key has had.
    fn fresh_keys(&mut self, count: usize) -> u64 {
        let first = self.world.counter + 1;
        self.world.counter += u64::try_from(count).unwrap();
        first
    }

    fn pick_table(&mut self, wanted: impl Fn(&Table) -> bool) -> Option<usize> {
        let tables = self.world.tables.iter().enumerate();
        let found: Vec<usize> = tables.filter(|(_, table)| wanted(table)).map(|(at, _)| at).collect();
        (!found.is_empty()).then(|| found[self.pick(found.len())])
    }

    /// A table, and a column in it.
    fn pick_column(&mut self, wanted: impl Fn(&Table, &Column) -> bool) -> Option<(usize, usize)> {
        let tables = self.world.tables.iter().enumerate();
        let found: Vec<(usize, usize)> = tables
            .flat_map(|(at, table)| {
                let columns = table.columns.iter().enumerate();
                columns.filter(|(_, column)| wanted(table, column)).map(move |(c, _)| (at, c)).collect::<Vec<_>>()
            })
            .collect();
        (!found.is_empty()).then(|| found[self.pick(found.len())])
    }

    // Words.

    /// Never two that differ only by case: the number is new each time.
    fn name(&mut self, stem: &str) -> String {
        let number = self.fresh();
        match self.pick(16) {
            0 => format!("{}{number}", stem.to_uppercase()),
            1 => format!("{stem} {number}"),
            2 => format!("{stem}ü{number}"),
            3 if !self.world.keyword_is_used => {
                self.world.keyword_is_used = true;
                "select".to_owned()
            }
            _ => format!("{stem}{number}"),
        }
    }

    fn table_name(&mut self) -> String {
        if !self.world.free_names.is_empty() && self.chance(40) {
            let at = self.pick(self.world.free_names.len());
            return self.world.free_names.swap_remove(at);
        }
        self.name("t")
    }

    fn column(&mut self, kind: Kind, role: Role, not_null: bool) -> Column {
        Column { name: self.name("c"), kind, role, not_null, has_default: false }
    }

    /// A value that follows from `from`, an expression that differs from row to row.
    fn value(&mut self, column: &Column, from: &str) -> String {
        let salt = self.pick(1_000_000);
        let hash = format!("md5(({from})::text || '{salt}')");
        let number = format!("('x' || left({hash}, 7))::bit(28)::int");
        let value = match column.kind {
            Kind::Int => format!("{number} % 1000"),
            Kind::Bigint => format!("{number}::bigint * 7919"),
            Kind::Decimal(_) | Kind::Numeric => format!("round(({number} % 1000000)::numeric / 1000, 3)"),
            Kind::Text => format!("'t' || left({hash}, 1 + {number} % 20)"),
            Kind::Big => format!("repeat({hash}, 400)"),
            Kind::Varchar => format!("left({hash}, 10)"),
            Kind::Timestamptz => {
                format!("timestamptz '2020-01-01 00:00:00+00' + {number} * interval '1 millisecond'")
            }
            Kind::Bool => format!("{number} % 2 = 0"),
            Kind::Jsonb => format!("jsonb_build_object('n', {number}, 'h', {hash})"),
            Kind::Uuid => format!("{hash}::uuid"),
            Kind::List => format!(
                "CASE {number} % 4 WHEN 0 THEN '{{}}'::text[] ELSE ARRAY[left({hash}, 3), NULL, 'a \"b', ''] END"
            ),
            Kind::Mood => {
                let labels = self.world.labels.iter().map(|label| format!("'{label}'")).collect::<Vec<_>>();
                format!("(ARRAY[{}]::{MOOD}[])[1 + {number} % {}]", labels.join(", "), labels.len())
            }
        };
        match column.not_null {
            true => format!("({value})"),
            false => format!("(CASE WHEN {number} % 7 = 0 THEN NULL ELSE {value} END)"),
        }
    }

    /// A condition for a few rows, chosen by their contents.
    fn some_rows(&mut self, table: &Table) -> String {
        if self.chance(30) {
            return format!("{} % 3 = {}", table.id(), self.pick(3));
        }
        let (salt, limit) = (self.pick(1_000_000), self.between(1..5));
        format!(
            "(tableoid, ctid) IN (SELECT r.tableoid, r.ctid FROM {} AS r ORDER BY md5(r::text || '{salt}'), r.ctid \
             LIMIT {limit})",
            table.qualified()
        )
    }

    // Rows.

    fn insert(&mut self) -> Done {
        let at = self.pick(self.world.tables.len());
        self.insert_into(at)
    }

    fn insert_into(&mut self, at: usize) -> Done {
        let table = self.world.tables[at].clone();
        let rows = if self.chance(10) { 40 } else { self.between(1..9) };
        let values = table.leaves().iter().map(|leaf| leaf.value.to_string()).collect::<Vec<_>>();
        if !values.is_empty() && self.chance(25) {
            let leaf = &table.leaves()[self.pick(values.len())];
            return self.insert_rows(&leaf.qualified(), &table.columns, &leaf.value.to_string(), rows);
        }
        let part = match values.len() {
            0 => "g % 4".to_owned(),
            leaves => format!("(ARRAY[{}])[1 + g % {leaves}]", values.join(", ")),
        };
        let mut columns = Vec::new();
        for column in table.columns {
            let may_miss = column.is_plain() && (!column.not_null || column.has_default);
            let is_missing = may_miss && self.chance(20);
            if !is_missing {
                columns.push(column);
            }
        }
        self.insert_rows(&qualified(&table.schema, &table.name), &columns, &part, rows)
    }

    fn insert_rows(&mut self, name: &str, columns: &[Column], part: &str, rows: usize) -> Done {
        let first = self.fresh_keys(rows);
        let mut values = Vec::new();
        for column in columns {
            values.push(match column.role {
                Role::Id => format!("{} + g", first - 1),
                Role::Second => "'k' || g % 3".to_owned(),
                Role::Part => part.to_owned(),
                Role::Plain => self.value(column, &format!("{first} + g")),
            });
        }
        let names = columns.iter().map(|column| quote(&column.name)).collect::<Vec<_>>().join(", ");
        let values = values.join(", ");
        self.run(format!("INSERT INTO {name} ({names}) SELECT {values} FROM generate_series(1, {rows}) AS g"))
    }

    /// Some columns, never the big ones: what is in TOAST comes as unchanged.
    fn update(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let small = |column: &&Column| column.is_plain() && column.kind != Kind::Big;
        let mut columns: Vec<&Column> = table.columns.iter().filter(small).collect();
        let mut sets = Vec::new();
        for _ in 0..self.between(1..4) {
            if !columns.is_empty() {
                let column = columns.swap_remove(self.pick(columns.len()));
                sets.push(format!("{} = {}", quote(&column.name), self.value(column, &table.id())));
            }
        }
        if sets.is_empty() {
            return Ok(());
        }
        let rows = self.some_rows(&table);
        self.run(format!("UPDATE {} SET {} WHERE {rows}", table.qualified(), sets.join(", ")))
    }

    fn update_big(&mut self) -> Done {
        let big = |table: &Table, column: &Column| table.can_change() && column.kind == Kind::Big;
        let Some((at, c)) = self.pick_column(big) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let value = self.value(&table.columns[c], &table.id());
        let rows = self.some_rows(&table);
        self.run(format!("UPDATE {} SET {} = {value} WHERE {rows}", table.qualified(), quote(&table.columns[c].name)))
    }

    fn change_keys(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let id = table.id();
        let mut sets = vec![format!("{id} = {id} + 1000000")];
        if let Some(second) = table.of_role(Role::Second).filter(|_| self.chance(50)) {
            sets.push(format!("{second} = {second} || 'x'"));
        }
        if let Some(big) = table.columns.iter().find(|column| column.kind == Kind::Big).filter(|_| self.chance(30)) {
            sets.push(format!("{} = {}", quote(&big.name), self.value(big, &id)));
        }
        let rows = self.some_rows(&table);
        self.run(format!("UPDATE {} SET {} WHERE {rows}", table.qualified(), sets.join(", ")))
    }

    /// All keys negated, over a range where no other key is.
    fn flip_keys(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        let (name, id) = (self.world.tables[at].qualified(), self.world.tables[at].id());
        self.run(format!("UPDATE {name} SET {id} = 1000000000 - {id}"))?;
        if self.chance(30) {
            return self.run(format!("UPDATE {name} SET {id} = 1000000000 - {id}"));
        }
        self.run(format!("UPDATE {name} SET {id} = {id} - 1000000000"))
    }

    /// All keys plus one (trap 53): each takes the key of its neighbour.
    fn shift_keys(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        // The next new key must be beyond the highest.
        self.fresh();
        let table = &self.world.tables[at];
        let is_free = table.unique_index.is_none() && (table.key.is_none() || table.is_deferrable());
        let (name, id) = (table.qualified(), table.id());
        if is_free {
            return self.run(format!("UPDATE {name} SET {id} = {id} + 1"));
        }
        self.run(format!("UPDATE {name} SET {id} = 1000000000 + {id}"))?;
        self.run(format!("UPDATE {name} SET {id} = {id} - 999999999"))
    }

    fn delete(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let rows = self.some_rows(&table);
        self.run(format!("DELETE FROM {} WHERE {rows}", table.qualified()))
    }

    fn delete_all(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        self.run(format!("DELETE FROM {}", self.world.tables[at].qualified()))?;
        self.insert_into(at)
    }

    /// The same rows, deleted and inserted.
    fn reinsert(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let rows = if self.chance(50) { "true".to_owned() } else { self.some_rows(&table) };
        let name = table.qualified();
        self.run(format!(
            "WITH gone AS (DELETE FROM {name} WHERE {rows} RETURNING *) INSERT INTO {name} SELECT * FROM gone"
        ))
    }

    fn duplicate(&mut self) -> Done {
        let Some(at) = self.pick_table(|table| !table.is_unique()) else { return Ok(()) };
        let name = self.world.tables[at].qualified();
        self.run(format!("INSERT INTO {name} SELECT * FROM {name} LIMIT 5"))
    }

    fn truncate(&mut self) -> Done {
        let (one, other) = (self.pick(self.world.tables.len()), self.pick(self.world.tables.len()));
        let mut names = vec![self.world.tables[one].qualified()];
        if other != one && self.chance(40) {
            names.push(self.world.tables[other].qualified());
        }
        self.run(format!("TRUNCATE {}", names.join(", ")))
    }

    /// An update that changes nothing is sent all the same (trap 57).
    fn touch(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|table, _| table.can_change()) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let column = quote(&table.columns[c].name);
        let rows = self.some_rows(&table);
        self.run(format!("UPDATE {} SET {column} = {column} WHERE {rows}", table.qualified()))
    }

    // Columns.

    fn add_column(&mut self) -> Done {
        let at = self.pick(self.world.tables.len());
        let kind = Kind::ALL[self.pick(Kind::ALL.len())];
        let mut column = self.column(kind, Role::Plain, false);
        let default = match self.pick(6) {
            0 | 1 => None,
            // The default itself is never NULL; the column may be.
            variant @ (2 | 3) => {
                column.not_null = true;
                let constant = self.value(&column, &variant.to_string());
                column.not_null = variant == 2;
                Some(constant)
            }
            _ => {
                let volatile = [
                    (Kind::Uuid, "gen_random_uuid()"),
                    (Kind::Numeric, "round(random()::numeric, 3)"),
                    (Kind::Bigint, "(random() * 1000)::bigint"),
                ];
                let (kind, expression) = volatile[self.pick(volatile.len())];
                column.kind = kind;
                column.not_null = self.chance(30);
                Some(expression.to_owned())
            }
        };
        let table = self.world.tables[at].qualified();
        let clause = default.as_ref().map(|value| format!(" DEFAULT {value}")).unwrap_or_default();
        self.run(format!("ALTER TABLE {table} ADD COLUMN {}{clause}", column.definition()))?;
        self.store_outside(&table, std::slice::from_ref(&column))?;
        column.has_default = default.is_some();
        if column.has_default && self.chance(30) {
            self.run(format!("ALTER TABLE {table} ALTER COLUMN {} DROP DEFAULT", quote(&column.name)))?;
            column.has_default = false;
        }
        self.world.tables[at].columns.push(column);
        Ok(())
    }

    /// Compressed, the big values would fit into their rows.
    fn store_outside(&mut self, table: &str, columns: &[Column]) -> Done {
        for column in columns.iter().filter(|column| column.kind == Kind::Big) {
            self.run(format!("ALTER TABLE {table} ALTER COLUMN {} SET STORAGE EXTERNAL", quote(&column.name)))?;
        }
        Ok(())
    }

    fn drop_column(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, column| column.is_plain()) else { return Ok(()) };
        let column = self.world.tables[at].columns.remove(c);
        self.run(format!("ALTER TABLE {} DROP COLUMN {}", self.world.tables[at].qualified(), quote(&column.name)))
    }

    fn rename_column(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, _| true) else { return Ok(()) };
        let new = self.name("c");
        self.run_rename_column(at, c, new)
    }

    fn run_rename_column(&mut self, at: usize, c: usize, new: String) -> Done {
        let table = &mut self.world.tables[at];
        let old = std::mem::replace(&mut table.columns[c].name, new.clone());
        let sql = format!("ALTER TABLE {} RENAME COLUMN {} TO {}", table.qualified(), quote(&old), quote(&new));
        self.run(sql)
    }

    fn swap_columns(&mut self) -> Done {
        let several = |table: &Table, column: &Column| {
            column.is_plain() && table.columns.iter().filter(|column| column.is_plain()).count() > 1
        };
        let (Some((at, one)), between) = (self.pick_column(several), self.name("c")) else { return Ok(()) };
        let columns = self.world.tables[at].columns.iter().enumerate();
        let others: Vec<usize> = columns.filter(|(c, column)| *c != one && column.is_plain()).map(|(c, _)| c).collect();
        let other = others[self.pick(others.len())];
        let names = [one, other].map(|c| self.world.tables[at].columns[c].name.clone());
        let [first, second] = names;
        self.run_rename_column(at, one, between)?;
        self.run_rename_column(at, other, first)?;
        self.run_rename_column(at, one, second)
    }

    /// Dropped and added under the same name (trap 65).
    fn replace_column(&mut self) -> Done {
        let plain = |_: &Table, column: &Column| column.is_plain() && !column.not_null;
        let Some((at, c)) = self.pick_column(plain) else { return Ok(()) };
        let table = self.world.tables[at].qualified();
        let mut column = self.world.tables[at].columns.remove(c);
        column.has_default = false;
        let (name, definition) = (quote(&column.name), column.definition());
        if self.chance(50) {
            self.run(format!("ALTER TABLE {table} DROP COLUMN {name}, ADD COLUMN {definition}"))?;
        } else {
            self.run(format!("ALTER TABLE {table} DROP COLUMN {name}"))?;
            self.run(format!("ALTER TABLE {table} ADD COLUMN {definition}"))?;
        }
        self.store_outside(&table, std::slice::from_ref(&column))?;
        self.world.tables[at].columns.push(column);
        Ok(())
    }

    fn retype(&mut self) -> Done {
        let can = |table: &Table, column: &Column| match column.role {
            Role::Plain => matches!(column.kind, Kind::Int | Kind::Varchar | Kind::Decimal(12)),
            Role::Id => column.kind == Kind::Int && table.partitions.is_none() && table.unique_index.is_none(),
            Role::Second | Role::Part => false,
        };
        let Some((at, c)) = self.pick_column(can) else { return Ok(()) };
        let table = self.world.tables[at].qualified();
        let column = self.world.tables[at].columns[c].clone();
        let name = quote(&column.name);
        let (kind, using) = match (column.kind, column.role) {
            (Kind::Int, Role::Id) => (Kind::Bigint, String::new()),
            (Kind::Int, _) => match self.pick(4) {
                0 | 1 => (Kind::Bigint, String::new()),
                2 => (Kind::Int, format!(" USING ({name} % 10000) * 100")),
                _ => (Kind::Text, format!(" USING {name}::text")),
            },
            (Kind::Varchar, _) => (Kind::Text, String::new()),
            _ => (Kind::Decimal(14), String::new()),
        };
        if column.has_default {
            self.run(format!("ALTER TABLE {table} ALTER COLUMN {name} DROP DEFAULT"))?;
        }
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {name} TYPE {}{using}", kind.sql()))?;
        let column = &mut self.world.tables[at].columns[c];
        (column.kind, column.has_default) = (kind, false);
        Ok(())
    }

    fn set_not_null(&mut self) -> Done {
        let can = |table: &Table, column: &Column| table.can_change() && column.is_plain() && !column.not_null;
        let Some((at, c)) = self.pick_column(can) else { return Ok(()) };
        let (table, id) = (self.world.tables[at].qualified(), self.world.tables[at].id());
        let column = Column { not_null: true, ..self.world.tables[at].columns[c].clone() };
        let (name, value) = (quote(&column.name), self.value(&column, &id));
        self.run(format!("UPDATE {table} SET {name} = {value} WHERE {name} IS NULL"))?;
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL"))?;
        self.world.tables[at].columns[c].not_null = true;
        Ok(())
    }

    fn drop_not_null(&mut self) -> Done {
        let can = |_: &Table, column: &Column| column.is_plain() && column.not_null;
        let Some((at, c)) = self.pick_column(can) else { return Ok(()) };
        let (table, column) = (self.world.tables[at].qualified(), self.world.tables[at].columns[c].clone());
        self.world.tables[at].columns[c].not_null = false;
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {} DROP NOT NULL", quote(&column.name)))
    }

    fn set_default(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, column| column.is_plain()) else { return Ok(()) };
        let table = self.world.tables[at].qualified();
        let column = Column { not_null: true, ..self.world.tables[at].columns[c].clone() };
        let value = self.value(&column, "0");
        self.world.tables[at].columns[c].has_default = true;
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {} SET DEFAULT {value}", quote(&column.name)))
    }

    // Tables.

    fn rename_table(&mut self) -> Done {
        let at = self.pick(self.world.tables.len());
        let new = self.table_name();
        let old = self.world.tables[at].name.clone();
        self.run_rename_table(at, new)?;
        self.world.free_names.push(old);
        Ok(())
    }

    fn run_rename_table(&mut self, at: usize, new: String) -> Done {
        let old = self.world.tables[at].qualified();
        self.run(format!("ALTER TABLE {old} RENAME TO {}", quote(&new)))?;
        self.world.tables[at].name = new;
        Ok(())
    }

    fn swap_tables(&mut self) -> Done {
        let (one, other) = (self.pick(self.world.tables.len()), self.pick(self.world.tables.len()));
        let [first, second] = [one, other].map(|at| self.world.tables[at].clone());
        if one == other || first.schema != second.schema {
            return Ok(());
        }
        let between = self.name("t");
        self.run_rename_table(one, between)?;
        self.run_rename_table(other, first.name)?;
        self.run_rename_table(one, second.name)
    }

    fn move_to_schema(&mut self) -> Done {
        // A name that the server chose for a constraint may be taken there.
        let can = |table: &Table| table.key.as_ref().is_none_or(|key| key.constraint.is_some());
        let Some(at) = self.pick_table(can) else { return Ok(()) };
        let old = self.world.tables[at].qualified();
        let new = if self.world.tables[at].schema == "public" { "side" } else { "public" };
        self.run(format!("ALTER TABLE {old} SET SCHEMA {new}"))?;
        self.world.tables[at].schema = new.to_owned();
        Ok(())
    }

    /// Another column becomes the key; the old one is like any other from then on (trap 49).
    fn move_key(&mut self) -> Done {
        let can = |table: &Table| {
            let has_name = table.key.as_ref().is_none_or(|key| key.constraint.is_some());
            table.can_change() && table.partitions.is_none() && has_name
        };
        let Some(at) = self.pick_table(can) else { return Ok(()) };
        let old = self.world.tables[at].clone();
        let table = old.qualified();
        let column = self.column(Kind::Bigint, Role::Id, true);
        let name = quote(&column.name);
        self.run(format!("ALTER TABLE {table} ADD COLUMN {name} bigint"))?;
        // More than a table has rows.
        let first = self.fresh_keys(5000);
        self.run(format!(
            "UPDATE {table} AS u SET {name} = s.n FROM (SELECT ctid AS place, {first} + row_number() OVER () AS n \
             FROM {table}) AS s WHERE u.ctid = s.place"
        ))?;
        if let Some(constraint) = old.key.as_ref().and_then(|key| key.constraint.as_ref()) {
            self.run(format!("ALTER TABLE {table} DROP CONSTRAINT {}", quote(constraint)))?;
        }
        let constraint = format!("pk_{}", self.fresh());
        self.run(format!(
            "ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL, ADD CONSTRAINT {constraint} PRIMARY KEY ({name})"
        ))?;
        if old.identity == Identity::Index {
            self.run(format!("ALTER TABLE {table} REPLICA IDENTITY DEFAULT"))?;
        }
        if let Some(index) = &old.unique_index {
            self.run(format!("DROP INDEX {}", qualified(&old.schema, index)))?;
        }
        let table = &mut self.world.tables[at];
        table.columns.iter_mut().for_each(|column| column.role = Role::Plain);
        table.columns.push(column);
        table.key = Some(Key { constraint: Some(constraint), is_deferrable: false });
        table.unique_index = None;
        if old.identity == Identity::Index {
            table.identity = Identity::Default;
        }
        Ok(())
    }

    /// From a key to the whole row.
    fn drop_key(&mut self) -> Done {
        let can = |table: &Table| {
            table.partitions.is_none() && table.key.as_ref().is_some_and(|key| key.constraint.is_some())
        };
        let Some(at) = self.pick_table(can) else { return Ok(()) };
        let table = self.world.tables[at].qualified();
        let Some(constraint) = self.world.tables[at].key.take().and_then(|key| key.constraint) else { return Ok(()) };
        self.world.tables[at].identity = Identity::Full;
        self.run(format!("ALTER TABLE {table} REPLICA IDENTITY FULL"))?;
        self.run(format!("ALTER TABLE {table} DROP CONSTRAINT {}", quote(&constraint)))
    }

    fn change_identity(&mut self) -> Done {
        let at = self.pick(self.world.tables.len());
        let old = self.world.tables[at].clone();
        let mut choices = vec![Identity::Full];
        if !old.is_deferrable() {
            choices.push(Identity::Default);
            if old.is_unique() && old.partitions.is_none() {
                choices.push(Identity::Index);
            }
        }
        let choice = choices[self.pick(choices.len())];
        self.world.tables[at].identity = choice;
        if choice == Identity::Index {
            return self.identify_by_index(at);
        }
        let keyword = choice.keyword();
        self.run(format!("ALTER TABLE {} REPLICA IDENTITY {keyword}", old.qualified()))?;
        // A partitioned table does not hand it on.
        for leaf in old.leaves() {
            self.run(format!("ALTER TABLE {} REPLICA IDENTITY {keyword}", leaf.qualified()))?;
        }
        Ok(())
    }

    fn identify_by_index(&mut self, at: usize) -> Done {
        let table = self.world.tables[at].clone();
        let index = match table.unique_index {
            Some(ref index) => index.clone(),
            None => {
                let index = format!("ix_{}", self.fresh());
                self.run(format!("CREATE UNIQUE INDEX {index} ON {} ({})", table.qualified(), table.id()))?;
                index
            }
        };
        self.run(format!("ALTER TABLE {} REPLICA IDENTITY USING INDEX {index}", table.qualified()))?;
        self.world.tables[at].unique_index = Some(index);
        Ok(())
    }

    fn drop_table(&mut self) -> Done {
        if self.world.tables.len() < 3 {
            return Ok(());
        }
        let at = self.pick(self.world.tables.len());
        self.run_drop_table(at)
    }

    fn run_drop_table(&mut self, at: usize) -> Done {
        let table = self.world.tables.swap_remove(at);
        self.run(format!("DROP TABLE {}", table.qualified()))?;
        self.world.free_names.extend(table.leaves().iter().map(|leaf| leaf.name.clone()));
        self.world.free_names.push(table.name);
        Ok(())
    }

    fn drop_and_create(&mut self) -> Done {
        let at = self.pick(self.world.tables.len());
        let (schema, name) = (self.world.tables[at].schema.clone(), self.world.tables[at].name.clone());
        self.run_drop_table(at)?;
        self.world.free_names.retain(|free| *free != name);
        self.create_named(schema, name)?;
        self.insert_into(self.world.tables.len() - 1)
    }

    fn create(&mut self) -> Done {
        // More would take the changes from each other.
        if self.world.tables.len() > 6 {
            return Ok(());
        }
        let schema = if self.chance(15) { "side" } else { "public" };
        let name = self.table_name();
        self.create_named(schema.to_owned(), name)
    }

    fn create_named(&mut self, schema: String, name: String) -> Done {
        let mut columns = Vec::new();
        for _ in 0..self.between(2..6) {
            let kind = Kind::ALL[self.pick(Kind::ALL.len())];
            let not_null = self.chance(25);
            columns.push(self.column(kind, Role::Plain, not_null));
        }
        let id = if self.chance(50) { Kind::Int } else { Kind::Bigint };
        let id = self.column(id, Role::Id, true);
        columns.insert(self.pick(columns.len() + 1), id);
        let shape = self.pick(14);
        if shape == 5 {
            let second = self.column(Kind::Text, Role::Second, true);
            columns.insert(self.pick(columns.len() + 1), second);
        }
        let is_partitioned = shape >= 11;
        if is_partitioned {
            let part = self.column(Kind::Int, Role::Part, true);
            columns.insert(self.pick(columns.len() + 1), part);
        }
        let (has_key, is_deferrable, identity) = match shape {
            6 | 7 => (false, false, Identity::Full),
            8 => (false, false, Identity::Index),
            9 => (true, true, Identity::Full),
            10 => (false, false, Identity::Default),
            1 | 11 => (true, false, Identity::Full),
            _ => (true, false, Identity::Default),
        };
        let constraint = format!("pk_{}", self.fresh());
        let mut table = Table { schema, name, columns, identity, key: None, unique_index: None, partitions: None };
        let mut parts: Vec<String> = table.columns.iter().map(Column::definition).collect();
        if has_key {
            let deferrable = if is_deferrable { " DEFERRABLE" } else { "" };
            parts.push(format!("CONSTRAINT {constraint} PRIMARY KEY ({}){deferrable}", table.key_columns()));
            table.key = Some(Key { constraint: Some(constraint), is_deferrable });
        }
        let mut suffix = String::new();
        if is_partitioned {
            let by_range = self.chance(50);
            let part = table.of_role(Role::Part).expect("it was just added");
            suffix = format!(" PARTITION BY {} ({part})", if by_range { "RANGE" } else { "LIST" });
            table.partitions = Some(Partitions { by_range, leaves: Vec::new(), next: 0 });
        }
        let name = table.qualified();
        self.run(format!("CREATE TABLE {name} ({}){suffix}", parts.join(", ")))?;
        self.store_outside(&name, &table.columns)?;
        if identity == Identity::Full {
            self.run(format!("ALTER TABLE {name} REPLICA IDENTITY FULL"))?;
        }
        self.world.tables.push(table);
        let at = self.world.tables.len() - 1;
        if identity == Identity::Index {
            self.identify_by_index(at)?;
        }
        if is_partitioned {
            self.add_leaf(at)?;
            self.attach_to(at)?;
        }
        Ok(())
    }

    // Enums.

    fn add_label(&mut self) -> Done {
        let label = format!("mood {}", self.fresh());
        self.run(format!("ALTER TYPE {MOOD} ADD VALUE '{label}'"))?;
        self.world.fresh_labels.push(label);
        Ok(())
    }

    /// Changes every old row without a word (trap 70).
    fn rename_label(&mut self) -> Done {
        let at = self.pick(self.world.labels.len());
        let new = format!("mood {}", self.fresh());
        let old = std::mem::replace(&mut self.world.labels[at], new.clone());
        self.run(format!("ALTER TYPE {MOOD} RENAME VALUE '{old}' TO '{new}'"))
    }

    // Partitions.

    /// A place for one more leaf: its name, value and bound.
    fn new_leaf(&mut self, at: usize) -> (Leaf, String) {
        let name = self.table_name();
        let schema = self.world.tables[at].schema.clone();
        let partitions = self.world.tables[at].partitions.as_mut().expect("a partitioned table");
        let value = partitions.next;
        partitions.next += 1;
        (Leaf { schema, name, constraint: None, value }, partitions.bound(value))
    }

    fn keep_leaf(&mut self, at: usize, leaf: Leaf) {
        self.world.tables[at].partitions.as_mut().expect("a partitioned table").leaves.push(leaf);
    }

    fn add_leaf(&mut self, at: usize) -> Done {
        let root = self.world.tables[at].clone();
        let (leaf, bound) = self.new_leaf(at);
        let name = leaf.qualified();
        self.run(format!("CREATE TABLE {name} PARTITION OF {} {bound}", root.qualified()))?;
        if root.identity == Identity::Full {
            self.run(format!("ALTER TABLE {name} REPLICA IDENTITY FULL"))?;
        }
        self.keep_leaf(at, leaf);
        Ok(())
    }

    fn attach(&mut self) -> Done {
        let Some(at) = self.pick_table(|table| table.partitions.is_some()) else { return Ok(()) };
        if self.chance(30) { self.add_leaf(at) } else { self.attach_to(at) }
    }

    /// A table of another column order, mostly with rows in it (trap 71).
    fn attach_to(&mut self, at: usize) -> Done {
        let root = self.world.tables[at].clone();
        let (mut leaf, bound) = self.new_leaf(at);
        let name = leaf.qualified();
        let mut parts: Vec<String> = root.columns.iter().rev().map(Column::definition).collect();
        if self.chance(50) {
            let constraint = format!("pk_{}", self.fresh());
            parts.push(format!("CONSTRAINT {constraint} PRIMARY KEY ({})", root.key_columns()));
            leaf.constraint = Some(constraint);
        }
        self.run(format!("CREATE TABLE {name} ({})", parts.join(", ")))?;
        self.store_outside(&name, &root.columns)?;
        if root.identity == Identity::Full {
            self.run(format!("ALTER TABLE {name} REPLICA IDENTITY FULL"))?;
        }
        if self.chance(70) {
            let rows = self.between(1..9);
            self.insert_rows(&name, &root.columns, &leaf.value.to_string(), rows)?;
        }
        self.run(format!("ALTER TABLE {} ATTACH PARTITION {name} {bound}", root.qualified()))?;
        self.keep_leaf(at, leaf);
        Ok(())
    }

    fn cross_partitions(&mut self) -> Done {
        let Some(at) = self.pick_table(|table| table.leaves().len() > 1) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let Some(part) = table.of_role(Role::Part) else { return Ok(()) };
        let value = table.leaves()[self.pick(table.leaves().len())].value;
        let rows = self.some_rows(&table);
        self.run(format!("UPDATE {} SET {part} = {value} WHERE {rows}", table.qualified()))
    }

    /// The table and one leaf, no longer in the model; the last leaf stays.
    fn take_leaf(&mut self) -> Option<(usize, Leaf)> {
        let at = self.pick_table(|table| table.leaves().len() > 1)?;
        let which = self.pick(self.world.tables[at].leaves().len());
        Some((at, self.world.tables[at].partitions.as_mut()?.leaves.remove(which)))
    }

    fn detach(&mut self) -> Done {
        // 14 goes on decoding the rows of a partition that was detached as those of its former root, and fails once their
        // shapes differ ("could not convert row type"): a bug of the server, for which there is no way around.
        if self.via_root && Cluster::shared().major() == 14 {
            return Ok(());
        }
        let Some((at, leaf)) = self.take_leaf() else { return Ok(()) };
        let root = self.world.tables[at].clone();
        self.run(format!("ALTER TABLE {} DETACH PARTITION {}", root.qualified(), leaf.qualified()))?;
        let mut columns = root.columns;
        // It may have them or not: this way every insert names them.
        columns.iter_mut().for_each(|column| column.has_default = false);
        let key = root.key.map(|_| Key { constraint: leaf.constraint, is_deferrable: false });
        self.world.tables.push(Table {
            schema: leaf.schema,
            name: leaf.name,
            columns,
            identity: root.identity,
            key,
            unique_index: None,
            partitions: None,
        });
        Ok(())
    }

    fn drop_leaf(&mut self) -> Done {
        let Some((_, leaf)) = self.take_leaf() else { return Ok(()) };
        self.run(format!("DROP TABLE {}", leaf.qualified()))?;
        self.world.free_names.push(leaf.name);
        Ok(())
    }

    fn truncate_leaf(&mut self) -> Done {
        if self.via_root && !TRUNCATE_LEAVES_UNDER_ROOT {
            return Ok(());
        }
        let Some(at) = self.pick_table(|table| !table.leaves().is_empty()) else { return Ok(()) };
        let which = self.pick(self.world.tables[at].leaves().len());
        let leaf = self.world.tables[at].leaves()[which].qualified();
        self.run(format!("TRUNCATE {leaf}"))
    }
}
