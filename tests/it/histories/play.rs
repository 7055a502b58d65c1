//! What a history does: statements that are valid in the model's schema.

use std::ops::Range;

use rand::RngExt;

use super::{
    Done, History, LEAVES, Lost, PUBLICATION,
    model::{
        Column, Identity, Key, Kind, Leaf, MOOD, Partitions, Publishing, Role, Table, World,
        qualified,
    },
};
use crate::bed::cluster::quote;

/// Under publish_via_partition_root the stream says nothing of a truncated leaf (trap 61).
const TRUNCATE_LEAVES_UNDER_ROOT: bool = true;

/// To DuckDB, four of them are equal to another one.
const INTERVALS: &str =
    "ARRAY['1 mon', '30 days', '720:00:00', '1 day', '24:00:00', '-1 mon 30 days']::interval[]";

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
    (4, History::twins),
    (4, History::truncate),
    (3, History::touch),
    (6, History::add_column),
    (3, History::add_generated),
    (1, History::drop_generated),
    (1, History::drop_identity),
    (4, History::drop_column),
    (3, History::rename_column),
    (2, History::swap_columns),
    (3, History::replace_column),
    (9, History::retype),
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
    (2, History::publish_one),
    (1, History::unpublish),
    (2, History::add_label),
    (2, History::rename_label),
    (4, History::cross_partitions),
    (3, History::attach),
    (2, History::detach),
    (2, History::drop_leaf),
    (2, History::truncate_leaf),
];

impl History {
    pub fn transaction(&mut self) {
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
            if self.chance(6) {
                // Triggers do not fire, the event trigger among them.
                self.run("SET LOCAL session_replication_role = replica".to_owned())?;
                self.operation()?;
                self.run("SET LOCAL session_replication_role = origin".to_owned())?;
                continue;
            }
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

    /// Shapes that are changed in place, mostly.
    pub fn change_shapes(&mut self) {
        let before = self.world.clone();
        let done = self.try_change_shapes();
        if matches!(done, Err(Lost)) {
            self.script.push("-- deadlock".to_owned());
            self.session.execute("ROLLBACK");
            self.world = before;
        }
    }

    fn try_change_shapes(&mut self) -> Done {
        const CHANGES: [fn(&mut History) -> Done; 5] = [
            History::retype,
            History::retype,
            History::add_column,
            History::rename_column,
            History::replace_column,
        ];
        self.run("BEGIN".to_owned())?;
        for _ in 0..self.between(1..4) {
            CHANGES[self.pick(CHANGES.len())](self)?;
        }
        self.run("COMMIT".to_owned())
    }

    /// What may not run inside a transaction, or need not.
    fn maintain(&mut self) -> Done {
        match self.pick(6) {
            0 => return self.rename_used_label(),
            1 => return self.unlog(),
            _ => {}
        }
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

    /// A refused statement is a mistake of this file, except for a deadlock with the replicator,
    /// and for what PostgreSQL refuses by a bug of its own (18351 and 19519): to rewrite a table
    /// that holds a dead row whose long values it has vacuumed already. The table is as it was
    /// then.
    #[track_caller]
    pub fn run(&mut self, sql: String) -> Done {
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
            Err(message) => {
                panic!("seed {}: {message}\nin: {}", self.seed, self.script[self.script.len() - 1])
            }
        }
    }

    // Dice.

    pub fn pick(&mut self, below: usize) -> usize {
        self.dice.random_range(0..below)
    }

    pub fn between(&mut self, range: Range<usize>) -> usize {
        self.dice.random_range(range)
    }

    pub fn chance(&mut self, percent: usize) -> bool {
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
        let found: Vec<usize> =
            tables.filter(|(_, table)| wanted(table)).map(|(at, _)| at).collect();
        (!found.is_empty()).then(|| found[self.pick(found.len())])
    }

    /// A table, and a column in it.
    fn pick_column(&mut self, wanted: impl Fn(&Table, &Column) -> bool) -> Option<(usize, usize)> {
        let tables = self.world.tables.iter().enumerate();
        let found: Vec<(usize, usize)> = tables
            .flat_map(|(at, table)| {
                let columns = table.columns.iter().enumerate();
                columns
                    .filter(|(_, column)| wanted(table, column))
                    .map(move |(c, _)| (at, c))
                    .collect::<Vec<_>>()
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
        Column {
            name: self.name("c"),
            kind,
            role,
            not_null,
            has_default: false,
            is_identity: false,
        }
    }

    /// A value that follows from `from`, an expression that differs from row to row.
    fn value(&mut self, column: &Column, from: &str) -> String {
        let salt = self.pick(1_000_000);
        let hash = format!("md5(({from})::text || '{salt}')");
        let number = format!("('x' || left({hash}, 7))::bit(28)::int");
        let value = match column.kind {
            Kind::Int => format!("{number} % 1000"),
            Kind::Bigint => format!("{number}::bigint * 7919"),
            Kind::Decimal(_) | Kind::Numeric => {
                format!("round(({number} % 1000000)::numeric / 1000, 3)")
            }
            Kind::Fraction(_) => format!("round(({number} % 1999 - 999)::numeric / 1000, 3)"),
            Kind::Double => format!("{number}::float8 / 7"),
            Kind::Text => format!("'t' || left({hash}, 1 + {number} % 20)"),
            Kind::Big => format!("repeat({hash}, 400)"),
            Kind::Varchar(length) => format!("left({hash}, {length})"),
            Kind::Char(length) => format!("left({hash}, {number} % {length})"),
            Kind::Bit(length) => format!("('x' || left({hash}, 8))::bit(32)::bit({length})"),
            Kind::Varbit(length) => {
                format!("('x' || left({hash}, 8))::bit(32)::bit({length})::varbit({length})")
            }
            Kind::Timestamp => {
                format!("timestamp '2020-03-29 00:00:00' + {number} * interval '1 millisecond'")
            }
            Kind::Stamps(false) => {
                format!("ARRAY[timestamp '2020-03-29 00:00' + {number} * interval '1 s', NULL]")
            }
            Kind::Stamps(true) => {
                format!("ARRAY[timestamptz '2020-03-29 00:00Z' + {number} * interval '1 s', NULL]")
            }
            Kind::Interval => format!("({INTERVALS})[1 + {number} % 6]"),
            Kind::Bytea => format!("decode({hash}, 'hex')"),
            Kind::Cidr | Kind::Inet => format!(
                "('10.1.' || {number} % 250 || CASE {number} % 3 WHEN 0 THEN '.0/24' WHEN 1 THEN \
                 '.7/32' ELSE '.9' END)::{}",
                column.kind.sql()
            ),
            Kind::Small => format!("{number} % 1000"),
            Kind::Smalls => format!("ARRAY[{number} % 10, NULL, 3]::public.small[]"),
            Kind::Words => format!("ARRAY[left({hash}, 3), NULL]::public.words"),
            Kind::Timestamptz => {
                format!(
                    "timestamptz '2020-01-01 00:00:00+00' + {number} * interval '1 millisecond'"
                )
            }
            Kind::Bool => format!("{number} % 2 = 0"),
            Kind::Jsonb => format!("jsonb_build_object('n', {number}, 'h', {hash})"),
            Kind::Uuid => format!("{hash}::uuid"),
            Kind::List => format!(
                "CASE {number} % 4 WHEN 0 THEN '{{}}'::text[] ELSE ARRAY[left({hash}, 3), NULL, 'a \
                 \"b', ''] END"
            ),
            Kind::Mood => format!("{}[1 + {number} % {}]", self.labels(), self.world.labels.len()),
            Kind::Moods => format!(
                "ARRAY[{labels}[1 + {number} % {count}], NULL, {labels}[1 + {number} % 7 % \
                 {count}]]",
                labels = self.labels(),
                count = self.world.labels.len()
            ),
        };
        match column.not_null {
            true => format!("({value})"),
            false => format!("(CASE WHEN {number} % 7 = 0 THEN NULL ELSE {value} END)"),
        }
    }

    /// An array of all moods.
    fn labels(&self) -> String {
        let labels = self.world.labels.iter().map(|label| format!("'{label}'")).collect::<Vec<_>>();
        format!("(ARRAY[{}]::{MOOD}[])", labels.join(", "))
    }

    /// A condition for a few rows, chosen by their contents.
    fn some_rows(&mut self, table: &Table) -> String {
        if self.chance(30) {
            return format!("{} % 3 = {}", table.id(), self.pick(3));
        }
        let (salt, limit) = (self.pick(1_000_000), self.between(1..5));
        format!(
            "(tableoid, ctid) IN (SELECT r.tableoid, r.ctid FROM {} AS r ORDER BY md5(r::text || \
             '{salt}'), r.ctid \
             LIMIT {limit})",
            table.qualified()
        )
    }

    // Rows.

    fn insert(&mut self) -> Done {
        let at = self.pick(self.world.tables.len());
        self.insert_into(at)
    }

    pub fn insert_into(&mut self, at: usize) -> Done {
        let table = self.world.tables[at].clone();
        let rows = if self.chance(10) { 40 } else { self.between(1..9) };
        let values = table.leaves().iter().map(|leaf| leaf.value.to_string()).collect::<Vec<_>>();
        if !values.is_empty() && self.chance(25) {
            let leaf = &table.leaves()[self.pick(values.len())];
            return self.insert_rows(
                &leaf.qualified(),
                &table.columns,
                &leaf.value.to_string(),
                rows,
            );
        }
        let part = match values.len() {
            0 => "g % 4".to_owned(),
            leaves => format!("(ARRAY[{}])[1 + g % {leaves}]", values.join(", ")),
        };
        let mut columns = Vec::new();
        for column in table.columns {
            let may_miss = column.is_plain() && (!column.not_null || column.has_default);
            let is_missing = may_miss && self.chance(20);
            if !is_missing && column.role != Role::Generated {
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
                Role::Generated | Role::Plain => self.value(column, &format!("{first} + g")),
            });
        }
        let names = columns.iter().map(|column| quote(&column.name)).collect::<Vec<_>>().join(", ");
        let values = values.join(", ");
        self.run(format!(
            "INSERT INTO {name} ({names}) SELECT {values} FROM generate_series(1, {rows}) AS g"
        ))
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
        self.run(format!(
            "UPDATE {} SET {} = {value} WHERE {rows}",
            table.qualified(),
            quote(&table.columns[c].name)
        ))
    }

    fn change_keys(&mut self) -> Done {
        let Some(at) = self.pick_table(Table::can_change) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let id = table.id();
        let mut sets = vec![format!("{id} = {id} + 1000000")];
        if let Some(second) = table.of_role(Role::Second).filter(|_| self.chance(50)) {
            sets.push(format!("{second} = {second} || 'x'"));
        }
        if let Some(big) =
            table.columns.iter().find(|column| column.kind == Kind::Big).filter(|_| self.chance(30))
        {
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
        let is_free =
            table.unique_index.is_none() && (table.key.is_none() || table.is_deferrable());
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
            "WITH gone AS (DELETE FROM {name} WHERE {rows} RETURNING *) INSERT INTO {name} \
             ({columns}) \
             SELECT {columns} FROM gone",
            columns = table.given_columns()
        ))
    }

    fn duplicate(&mut self) -> Done {
        let Some(at) = self.pick_table(|table| !table.is_unique()) else { return Ok(()) };
        let (name, columns) =
            (self.world.tables[at].qualified(), self.world.tables[at].given_columns());
        self.run(format!("INSERT INTO {name} ({columns}) SELECT {columns} FROM {name} LIMIT 5"))
    }

    /// Rows without a key that differ by an interval alone, which many would take for equal; then
    /// some of them go.
    fn twins(&mut self) -> Done {
        let can = |table: &Table, column: &Column| {
            !table.is_unique() && table.can_change() && column.kind == Kind::Interval
        };
        let Some((at, c)) = self.pick_column(can) else { return Ok(()) };
        let table = &self.world.tables[at];
        let (name, columns, span) =
            (table.qualified(), table.given_columns(), quote(&table.columns[c].name));
        let other = format!(
            "CASE {span}::text WHEN '1 mon' THEN interval '30 days' WHEN '30 days' THEN \
             '720:00:00' WHEN '720:00:00' \
             THEN '1 mon' WHEN '1 day' THEN '24:00:00' WHEN '24:00:00' THEN '1 day' ELSE {span} END"
        );
        let values = columns.replace(&span, &other);
        self.run(format!("INSERT INTO {name} ({columns}) SELECT {values} FROM {name} LIMIT 6"))?;
        let which = ["30 days", "1 mon", "24:00:00", "720:00:00"][self.pick(4)];
        let some = format!(
            "(tableoid, ctid) IN (SELECT tableoid, ctid FROM {name} WHERE {span}::text = '{which}' \
             ORDER BY ctid LIMIT 2)"
        );
        match self.pick(3) {
            0 => Ok(()),
            1 => self.run(format!("DELETE FROM {name} WHERE {some}")),
            _ => self.run(format!("UPDATE {name} SET {span} = '7 days' WHERE {some}")),
        }
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
        let Some((at, c)) =
            self.pick_column(|table, column| table.can_change() && column.role != Role::Generated)
        else {
            return Ok(());
        };
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
        let is_partitioned = self.world.tables[at].partitions.is_some();
        if !is_partitioned && self.chance(8) {
            return self.add_identity(at, column);
        }
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
            self.run(format!(
                "ALTER TABLE {table} ALTER COLUMN {} DROP DEFAULT",
                quote(&column.name)
            ))?;
            column.has_default = false;
        }
        self.world.tables[at].columns.push(column);
        Ok(())
    }

    fn add_identity(&mut self, at: usize, column: Column) -> Done {
        let kind = if self.chance(50) { Kind::Int } else { Kind::Bigint };
        let column =
            Column { kind, not_null: true, has_default: true, is_identity: true, ..column };
        let (table, name) = (self.world.tables[at].qualified(), quote(&column.name));
        self.run(format!(
            "ALTER TABLE {table} ADD COLUMN {name} {} GENERATED BY DEFAULT AS IDENTITY",
            kind.sql()
        ))?;
        self.world.tables[at].columns.push(column);
        Ok(())
    }

    fn drop_identity(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, column| column.is_identity) else { return Ok(()) };
        let (table, name) =
            (self.world.tables[at].qualified(), quote(&self.world.tables[at].columns[c].name));
        let column = &mut self.world.tables[at].columns[c];
        (column.is_identity, column.has_default) = (false, false);
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {name} DROP IDENTITY"))
    }

    fn generated(&mut self, table: &Table) -> (Column, String) {
        let column = self.column(Kind::Int, Role::Generated, false);
        let definition =
            format!("{} GENERATED ALWAYS AS ({} % 1000) STORED", column.definition(), table.id());
        (column, definition)
    }

    fn add_generated(&mut self) -> Done {
        let Some(at) = self.pick_table(|table| table.partitions.is_none()) else { return Ok(()) };
        let table = self.world.tables[at].clone();
        let (column, definition) = self.generated(&table);
        self.run(format!("ALTER TABLE {} ADD COLUMN {definition}", table.qualified()))?;
        self.world.tables[at].columns.push(column);
        Ok(())
    }

    /// The column goes, or is one like any other from then on.
    fn drop_generated(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, column| column.role == Role::Generated) else {
            return Ok(());
        };
        let (table, name) =
            (self.world.tables[at].qualified(), quote(&self.world.tables[at].columns[c].name));
        if self.chance(50) {
            self.world.tables[at].columns.remove(c);
            return self.run(format!("ALTER TABLE {table} DROP COLUMN {name}"));
        }
        self.world.tables[at].columns[c].role = Role::Plain;
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {name} DROP EXPRESSION"))
    }

    /// Compressed, the big values would fit into their rows.
    fn store_outside(&mut self, table: &str, columns: &[Column]) -> Done {
        for column in columns.iter().filter(|column| column.kind == Kind::Big) {
            self.run(format!(
                "ALTER TABLE {table} ALTER COLUMN {} SET STORAGE EXTERNAL",
                quote(&column.name)
            ))?;
        }
        Ok(())
    }

    fn drop_column(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, column| column.is_plain()) else { return Ok(()) };
        let column = self.world.tables[at].columns.remove(c);
        self.run(format!(
            "ALTER TABLE {} DROP COLUMN {}",
            self.world.tables[at].qualified(),
            quote(&column.name)
        ))
    }

    fn rename_column(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, _| true) else { return Ok(()) };
        let new = self.name("c");
        self.run_rename_column(at, c, new)
    }

    fn run_rename_column(&mut self, at: usize, c: usize, new: String) -> Done {
        let table = &mut self.world.tables[at];
        let old = std::mem::replace(&mut table.columns[c].name, new.clone());
        let sql = format!(
            "ALTER TABLE {} RENAME COLUMN {} TO {}",
            table.qualified(),
            quote(&old),
            quote(&new)
        );
        self.run(sql)
    }

    fn swap_columns(&mut self) -> Done {
        let several = |table: &Table, column: &Column| {
            column.is_plain() && table.columns.iter().filter(|column| column.is_plain()).count() > 1
        };
        let (Some((at, one)), between) = (self.pick_column(several), self.name("c")) else {
            return Ok(());
        };
        let columns = self.world.tables[at].columns.iter().enumerate();
        let others: Vec<usize> =
            columns.filter(|(c, column)| *c != one && column.is_plain()).map(|(c, _)| c).collect();
        let other = others[self.pick(others.len())];
        let names = [one, other].map(|c| self.world.tables[at].columns[c].name.clone());
        let [first, second] = names;
        self.run_rename_column(at, one, between)?;
        self.run_rename_column(at, other, first)?;
        self.run_rename_column(at, one, second)
    }

    /// Dropped and added under the same name (trap 65).
    fn replace_column(&mut self) -> Done {
        let plain = |_: &Table, column: &Column| column.is_free() && !column.not_null;
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
            Role::Plain => !column.is_identity && !column.kind.others().is_empty(),
            Role::Id => {
                let is_used = table.partitions.is_some()
                    || table.unique_index.is_some()
                    || table.has(Role::Generated);
                column.kind == Kind::Int && !is_used
            }
            Role::Second | Role::Part | Role::Generated => false,
        };
        let Some((at, c)) = self.pick_column(can) else { return Ok(()) };
        let table = self.world.tables[at].qualified();
        let column = self.world.tables[at].columns[c].clone();
        let name = quote(&column.name);
        let (kind, value) = match column.role {
            Role::Id => (Kind::Bigint, ""),
            _ => {
                let others = column.kind.others();
                others[self.pick(others.len())]
            }
        };
        if column.has_default {
            self.run(format!("ALTER TABLE {table} ALTER COLUMN {name} DROP DEFAULT"))?;
        }
        let using = if value.is_empty() {
            String::new()
        } else {
            format!(" USING {}", value.replace("{}", &name))
        };
        let is_elsewhere = column.kind.depends_on_zone() && self.chance(20);
        if is_elsewhere {
            self.run("SET LOCAL TimeZone = 'Asia/Tokyo'".to_owned())?;
        }
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {name} TYPE {}{using}", kind.sql()))?;
        if is_elsewhere {
            self.run("SET LOCAL TimeZone = 'UTC'".to_owned())?;
        }
        let column = &mut self.world.tables[at].columns[c];
        (column.kind, column.has_default) = (kind, false);
        Ok(())
    }

    fn set_not_null(&mut self) -> Done {
        let can = |table: &Table, column: &Column| {
            table.can_change() && column.is_free() && !column.not_null
        };
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
        let can = |_: &Table, column: &Column| column.is_free() && column.not_null;
        let Some((at, c)) = self.pick_column(can) else { return Ok(()) };
        let (table, column) =
            (self.world.tables[at].qualified(), self.world.tables[at].columns[c].clone());
        self.world.tables[at].columns[c].not_null = false;
        self.run(format!("ALTER TABLE {table} ALTER COLUMN {} DROP NOT NULL", quote(&column.name)))
    }

    fn set_default(&mut self) -> Done {
        let Some((at, c)) = self.pick_column(|_, column| column.is_free()) else { return Ok(()) };
        let table = self.world.tables[at].qualified();
        let column = Column { not_null: true, ..self.world.tables[at].columns[c].clone() };
        let value = self.value(&column, "0");
        self.world.tables[at].columns[c].has_default = true;
        self.run(format!(
            "ALTER TABLE {table} ALTER COLUMN {} SET DEFAULT {value}",
            quote(&column.name)
        ))
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
            table.can_change()
                && table.partitions.is_none()
                && has_name
                && !table.has(Role::Generated)
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
            "UPDATE {table} AS u SET {name} = s.n FROM (SELECT ctid AS place, {first} + \
             row_number() OVER () AS n \
             FROM {table}) AS s WHERE u.ctid = s.place"
        ))?;
        if let Some(constraint) = old.key.as_ref().and_then(|key| key.constraint.as_ref()) {
            self.run(format!("ALTER TABLE {table} DROP CONSTRAINT {}", quote(constraint)))?;
        }
        let constraint = format!("pk_{}", self.fresh());
        self.run(format!(
            "ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL, ADD CONSTRAINT {constraint} \
             PRIMARY KEY ({name})"
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
            table.partitions.is_none()
                && table.key.as_ref().is_some_and(|key| key.constraint.is_some())
        };
        let Some(at) = self.pick_table(can) else { return Ok(()) };
        let table = self.world.tables[at].qualified();
        let Some(constraint) = self.world.tables[at].key.take().and_then(|key| key.constraint)
        else {
            return Ok(());
        };
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
                self.run(format!(
                    "CREATE UNIQUE INDEX {index} ON {} ({})",
                    table.qualified(),
                    table.id()
                ))?;
                index
            }
        };
        self.run(format!(
            "ALTER TABLE {} REPLICA IDENTITY USING INDEX {index}",
            table.qualified()
        ))?;
        self.world.tables[at].unique_index = Some(index);
        Ok(())
    }

    fn drop_table(&mut self) -> Done {
        if self.world.tables.len() < 3 {
            return Ok(());
        }
        let at = self.pick(self.world.tables.len());
        if self.is_last_named(at) {
            return Ok(());
        }
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
        let (schema, name) =
            (self.world.tables[at].schema.clone(), self.world.tables[at].name.clone());
        self.run_drop_table(at)?;
        self.world.free_names.retain(|free| *free != name);
        self.create_named(schema, name)?;
        self.insert_into(self.world.tables.len() - 1)
    }

    pub fn create(&mut self) -> Done {
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
        let mut table = Table {
            schema,
            name,
            columns,
            identity,
            key: None,
            unique_index: None,
            partitions: None,
            is_named: false,
        };
        let mut parts: Vec<String> = table.columns.iter().map(Column::definition).collect();
        if !is_partitioned && self.chance(20) {
            let (column, definition) = self.generated(&table);
            parts.push(definition);
            table.columns.push(column);
        }
        if has_key {
            let deferrable = if is_deferrable { " DEFERRABLE" } else { "" };
            parts.push(format!(
                "CONSTRAINT {constraint} PRIMARY KEY ({}){deferrable}",
                table.key_columns()
            ));
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
        let is_first = !self.world.tables.iter().any(|table| table.is_named);
        if self.publishing.names_tables() && (is_first || self.chance(80)) {
            self.publish(at)?;
        }
        if is_partitioned {
            self.add_leaf(at)?;
            self.attach_to(at)?;
        }
        Ok(())
    }

    // Publications.

    fn publish(&mut self, at: usize) -> Done {
        let name = self.world.tables[at].qualified();
        self.world.tables[at].is_named = true;
        self.run(format!("ALTER PUBLICATION {PUBLICATION} ADD TABLE {name}"))
    }

    fn publish_one(&mut self) -> Done {
        if !self.publishing.names_tables() {
            return Ok(());
        }
        match self.pick_table(|table| !table.is_named) {
            Some(at) => self.publish(at),
            None => Ok(()),
        }
    }

    /// Its changes from here on are lost, whether it comes back or not.
    fn unpublish(&mut self) -> Done {
        let Some(at) = self.pick_table(|table| table.is_named) else { return Ok(()) };
        if self.is_last_named(at) {
            return Ok(());
        }
        self.world.tables[at].is_named = false;
        self.run(format!(
            "ALTER PUBLICATION {PUBLICATION} DROP TABLE {}",
            self.world.tables[at].qualified()
        ))?;
        Ok(())
    }

    /// Without it nothing would be published.
    fn is_last_named(&self, at: usize) -> bool {
        self.world.tables[at].is_named
            && self.world.tables.iter().filter(|table| table.is_named).count() == 1
    }

    /// The stream has a gap then. PostgreSQL refuses it to tables that a publication names.
    fn unlog(&mut self) -> Done {
        if self.publishing.names_tables() {
            return Ok(());
        }
        let Some(at) = self.pick_table(|table| table.can_change() && table.partitions.is_none())
        else {
            return Ok(());
        };
        let table = self.world.tables[at].clone();
        let name = table.qualified();
        let rows = self.some_rows(&table);
        self.run(format!("ALTER TABLE {name} SET UNLOGGED"))?;
        self.run(format!("DELETE FROM {name} WHERE {rows}"))?;
        self.run(format!("ALTER TABLE {name} SET LOGGED"))
    }

    // Enums.

    /// A label that is added, used and renamed before anybody looks.
    fn rename_used_label(&mut self) -> Done {
        let can = |table: &Table, column: &Column| {
            matches!(column.kind, Kind::Mood | Kind::Moods)
                && table.can_change()
                && column.is_plain()
        };
        let Some((at, c)) = self.pick_column(can) else { return Ok(()) };
        let (first, second) = (format!("mood {}", self.fresh()), format!("mood {}", self.fresh()));
        self.run(format!("ALTER TYPE {MOOD} ADD VALUE '{first}'"))?;
        let table = self.world.tables[at].clone();
        let column = quote(&table.columns[c].name);
        let value = if table.columns[c].kind == Kind::Mood {
            format!("'{first}'")
        } else {
            format!("'{{\"{first}\"}}'")
        };
        let rows = self.some_rows(&table);
        self.run(format!("UPDATE {} SET {column} = {value} WHERE {rows}", table.qualified()))?;
        self.run(format!("ALTER TYPE {MOOD} RENAME VALUE '{first}' TO '{second}'"))?;
        self.world.labels.push(second);
        Ok(())
    }

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

    fn keep_leaf(&mut self, at: usize, leaf: Leaf) -> Done {
        let name = leaf.qualified();
        let is_to_be_named = self.publishing == Publishing::RootsAndNamedLeaves && self.chance(50);
        self.world.tables[at].partitions.as_mut().expect("a partitioned table").leaves.push(leaf);
        match is_to_be_named {
            true => self.run(format!("ALTER PUBLICATION {LEAVES} ADD TABLE {name}")),
            false => Ok(()),
        }
    }

    fn add_leaf(&mut self, at: usize) -> Done {
        let root = self.world.tables[at].clone();
        let (leaf, bound) = self.new_leaf(at);
        let name = leaf.qualified();
        self.run(format!("CREATE TABLE {name} PARTITION OF {} {bound}", root.qualified()))?;
        if root.identity == Identity::Full {
            self.run(format!("ALTER TABLE {name} REPLICA IDENTITY FULL"))?;
        }
        self.keep_leaf(at, leaf)
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
        self.keep_leaf(at, leaf)
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
        // 14 goes on decoding the rows of a partition that was detached as those of its former
        // root, and fails once their shapes differ ("could not convert row type"): a bug of the
        // server, for which there is no way around.
        if self.via_root && self.major == 14 {
            return Ok(());
        }
        let Some((at, leaf)) = self.take_leaf() else { return Ok(()) };
        let root = self.world.tables[at].clone();
        self.run(format!(
            "ALTER TABLE {} DETACH PARTITION {}",
            root.qualified(),
            leaf.qualified()
        ))?;
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
            is_named: false,
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
