//! Writes rows and shapes at random, so that the [`INVARIANTS`] hold after each commit: an unknown
//! outcome is as good as a known one.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use super::Primary;
use crate::bed::Session;

/// Published by name; those of the schema `made` come and go.
pub const TABLES: [&str; 9] =
    ["a", "b", "ledger", "counter", "notes", "moving", "reloaded", "side", "shape"];
/// Leaves the publication now and then, so only what each row says by itself holds in its copy.
pub const LEAVING: &str = "side";

pub const SCHEMA: &str = "
    CREATE TABLE a (id int PRIMARY KEY, balance bigint NOT NULL);
    CREATE TABLE b (id int PRIMARY KEY, balance bigint NOT NULL);
    CREATE TABLE ledger (at int, amount bigint); ALTER TABLE ledger REPLICA IDENTITY FULL;
    CREATE TABLE counter (id int PRIMARY KEY, entries bigint, total bigint, generation int);
    CREATE TABLE notes (id int PRIMARY KEY, body text, digest text, touched int);
    ALTER TABLE notes ALTER body SET STORAGE EXTERNAL;
    CREATE TABLE moving (id int PRIMARY KEY, tag int NOT NULL UNIQUE);
    CREATE TABLE reloaded (id int PRIMARY KEY, generation int);
    CREATE TABLE side (id int PRIMARY KEY, mirror int);
    CREATE TABLE shape (id int PRIMARY KEY, v text);
    CREATE SCHEMA made;
    INSERT INTO a SELECT i, 0 FROM generate_series(1, 30) i; INSERT INTO b SELECT i, 0 FROM \
    generate_series(1, 30) i;
    INSERT INTO a SELECT i, i - 115 FROM generate_series(101, 129) i;
    INSERT INTO counter VALUES (1, 0, 0, 0);
    INSERT INTO notes SELECT i, repeat(md5(i::text), 200), md5(repeat(md5(i::text), 200)), 0 FROM \
    generate_series(0, 19) i;
    INSERT INTO moving SELECT tag + 1, tag FROM generate_series(0, 39) tag;
    INSERT INTO reloaded SELECT i, 0 FROM generate_series(1, 25) i;
    INSERT INTO side SELECT i, -i FROM generate_series(1, 50) i;
    INSERT INTO shape SELECT i, 'v' FROM generate_series(1, 50) i";

/// Two texts that are equal at every commit of the source, in SQL that both sides speak.
pub struct Invariant {
    pub name: &'static str,
    pub tables: &'static [&'static str],
    pub sql: &'static str,
}

pub const INVARIANTS: [Invariant; 7] = [
    Invariant {
        name: "no balance is lost between two tables",
        tables: &["a", "b"],
        sql: "SELECT CAST(sum(balance) AS varchar) || '/' || CAST(count(*) AS varchar), '0/89' \
              FROM (SELECT balance FROM public.a UNION ALL SELECT balance FROM public.b) both_",
    },
    Invariant {
        name: "each account is in one of two tables",
        tables: &["a", "b"],
        sql: "SELECT CAST(count(*) AS varchar) || '/' || CAST(count(DISTINCT id) AS varchar), \
              '29/29' \
              FROM (SELECT id FROM public.a WHERE id > 100 UNION ALL SELECT id FROM public.b WHERE \
              id > 100) both_",
    },
    Invariant {
        name: "the ledger is what the counter says",
        tables: &["ledger", "counter"],
        sql: "SELECT (SELECT CAST(count(*) AS varchar) || '/' || CAST(coalesce(sum(amount), 0) AS \
              varchar) FROM public.ledger), \
              (SELECT CAST(entries AS varchar) || '/' || CAST(total AS varchar) FROM \
              public.counter)",
    },
    Invariant {
        name: "each note has its digest",
        tables: &["notes"],
        sql: "SELECT CAST(count(*) AS varchar) || '/' || CAST(count(CASE WHEN md5(body) = digest \
              THEN 1 END) AS varchar), \
              '20/20' FROM public.notes",
    },
    Invariant {
        name: "keys move and come back",
        tables: &["moving"],
        sql: "SELECT CAST(count(*) AS varchar) || '/' || CAST(sum(abs(id)) AS varchar) || '/' || \
              CAST(count(DISTINCT tag) AS varchar), '40/820/40' FROM public.moving",
    },
    Invariant {
        name: "a reload is whole",
        tables: &["reloaded", "counter"],
        sql: "SELECT CAST(count(*) AS varchar) || '/' || CAST(min(generation) AS varchar) || '/' \
              || \
              CAST(max(generation) AS varchar), (SELECT '25/' || CAST(generation AS varchar) || \
              '/' || \
              CAST(generation AS varchar) FROM public.counter) FROM public.reloaded",
    },
    Invariant {
        name: "each row mirrors its key",
        tables: &["side"],
        sql: "SELECT CAST(count(*) AS varchar), '0' FROM public.side WHERE id + mirror <> 0",
    },
];

/// Writes until `is_over`, across restarts of the server. Counts what was committed for certain.
pub fn write(primary: &Primary, seed: u64, is_over: &AtomicBool, committed: &AtomicU64) {
    let mut writer = Writer { dice: Xoshiro256PlusPlus::seed_from_u64(seed) };
    let mut session: Option<Session> = None;
    while !is_over.load(Relaxed) {
        let connected = session.take().ok_or(()).or_else(|()| {
            let session = primary.get().maintenance().try_session()?;
            session.try_query(
                "SET lock_timeout = '3s'; SET deadlock_timeout = '100ms'; SET search_path = public",
            )?;
            Ok::<_, String>(session)
        });
        if let Ok(connected) = connected {
            let transaction = writer.transaction();
            let is_done = connected.try_query(&transaction).is_ok();
            committed.fetch_add(u64::from(is_done && transaction.ends_with("COMMIT")), Relaxed);
            // What failed for its contents is taken back; what failed for the connection needs
            // another one.
            session = (is_done || connected.try_query("ROLLBACK").is_ok()).then_some(connected);
        }
        // The pace of the load.
        std::thread::sleep(Duration::from_millis(if session.is_some() {
            writer.dice.random_range(0..40)
        } else {
            50
        }));
    }
}

struct Writer {
    dice: Xoshiro256PlusPlus,
}

impl Writer {
    fn below(&mut self, end: u32) -> u32 {
        self.dice.random_range(0..end)
    }

    fn transaction(&mut self) -> String {
        let mut statements = vec!["BEGIN".to_owned()];
        for _ in 0..=self.below(3) {
            if self.below(10) == 0 {
                let lost = [
                    "TRUNCATE reloaded",
                    "DELETE FROM ledger WHERE ctid IN (SELECT ctid FROM ledger LIMIT 300)",
                    "UPDATE a SET balance = 7",
                    "INSERT INTO side VALUES (0, 9)",
                ];
                let lost = lost[self.below(4) as usize];
                statements.push(format!("SAVEPOINT s; {lost}; ROLLBACK TO s"));
            }
            statements.push(self.rows());
        }
        if self.below(60) == 0 {
            statements.push(self.shape());
            if self.below(3) == 0 {
                statements.push(self.rows());
            }
        }
        statements.push(if self.below(20) == 0 { "ROLLBACK" } else { "COMMIT" }.to_owned());
        statements.join("; ")
    }

    fn rows(&mut self) -> String {
        let (one, other, amount) = (self.below(30) + 1, self.below(30) + 1, self.below(1000));
        match self.below(15) {
            0..3 => format!(
                "UPDATE a SET balance = balance - {amount} WHERE id = {one}; UPDATE b SET balance \
                 = balance + {amount} WHERE id = {other}"
            ),
            3..5 => {
                let (from, to) = if self.below(2) == 0 { ("a", "b") } else { ("b", "a") };
                format!(
                    "WITH gone AS (DELETE FROM {from} WHERE id = {one} + 100 RETURNING id, \
                     balance) \
                     INSERT INTO {to} (id, balance) SELECT id, balance FROM gone"
                )
            }
            5..7 => {
                let rows = if self.below(40) == 0 { 2000 } else { self.below(4) + 1 };
                format!(
                    "INSERT INTO ledger (at, amount) SELECT i % 3, {amount} FROM \
                     generate_series(1, {rows}) i; \
                     UPDATE counter SET entries = entries + {rows}, total = total + {rows} * \
                     {amount}"
                )
            }
            7 => {
                "WITH gone AS (DELETE FROM ledger WHERE ctid IN (SELECT ctid FROM ledger LIMIT 4) \
                  RETURNING amount) \
                  UPDATE counter SET entries = entries - (SELECT count(*) FROM gone), \
                  total = total - (SELECT coalesce(sum(amount), 0) FROM gone)"
                    .to_owned()
            }
            8 => format!(
                "UPDATE notes SET body = v, digest = md5(v) FROM (SELECT repeat(md5('{amount}'), \
                 150 + {one}) AS v) s \
                 WHERE id % 100 = {other}"
            ),
            9 => format!("UPDATE notes SET touched = touched + 1 WHERE id % 100 < {other}"),
            10 => format!("UPDATE notes SET id = (id + 100) % 200 WHERE id % 100 = {other}"),
            11 => format!(
                "WITH gone AS (DELETE FROM notes WHERE id % 100 = {one} % 20 RETURNING id) INSERT \
                 INTO notes (id, body, digest, touched) \
                 SELECT id + 1000, 'short', md5('short'), 0 FROM gone; UPDATE notes SET id = id - \
                 1000 WHERE id >= 1000"
            ),
            12 => format!(
                "UPDATE moving SET id = -id WHERE tag % 7 = {one} % 7; UPDATE moving SET id = id + \
                 1000 WHERE tag < 10; \
                 DELETE FROM moving WHERE tag = {one} + 9; UPDATE moving SET id = id - 1000 WHERE \
                 tag < 10; \
                 INSERT INTO moving VALUES ({one} + 10, {one} + 9)"
            ),
            13 => format!(
                "TRUNCATE reloaded; INSERT INTO reloaded SELECT i, {amount} FROM \
                 generate_series(1, 25) i; \
                 UPDATE counter SET generation = {amount}"
            ),
            _ => format!(
                "DELETE FROM side WHERE id = {one} + 50; UPDATE side SET id = id + 50, mirror = \
                 mirror - 50 WHERE id = {one}; \
                 INSERT INTO side VALUES ({other}, -{other}) ON CONFLICT DO NOTHING; \
                 DELETE FROM shape WHERE id = {one}; INSERT INTO shape (id, v) VALUES ({one}, \
                 '{amount}')"
            ),
        }
    }

    /// Often not valid at that moment, which takes its transaction back.
    fn shape(&mut self) -> String {
        let table = ["shape", "shape", "notes", "a", "ledger"][self.below(5) as usize];
        let (column, other, number) = (self.below(4), self.below(4), self.below(100));
        match self.below(10) {
            0..3 => format!(
                "ALTER TABLE {table} ADD COLUMN IF NOT EXISTS e{column} int DEFAULT {number}"
            ),
            3 => format!("ALTER TABLE {table} DROP COLUMN IF EXISTS e{column}"),
            4 => format!("ALTER TABLE {table} RENAME COLUMN e{column} TO e{other}"),
            5 => format!("ALTER TABLE {table} ALTER COLUMN e{column} TYPE bigint"),
            6 => format!(
                "UPDATE {table} SET e{column} = {number} WHERE ctid IN (SELECT ctid FROM {table} \
                 LIMIT 500)"
            ),
            7 | 8 => format!(
                "CREATE TABLE made.t{column} (id int PRIMARY KEY, v{number} text DEFAULT 'v'); \
                 INSERT INTO made.t{column} SELECT i FROM generate_series(1, {number}) i"
            ),
            _ => format!("DROP TABLE IF EXISTS made.t{column}"),
        }
    }
}
