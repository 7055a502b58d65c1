//! The crash matrix: rhei dies at each place of `rhei::failpoint`, and at pairs of them, is started
//! again, and ends equal.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::process::ExitStatusExt,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rhei::internals::failpoint::{ALL, UPKEEP};

use crate::{
    bed::{lake::Kind, oracle::query_copy},
    following::{Following, from_env},
};

const TABLES: [&str; 5] = ["public.k", "public.nk", "public.big", "public.cut", "public.late"];

/// Where to die, after coming by so often.
type Death = (&'static str, u32);

/// One life of a copy: its commands are repeated until they end well.
struct Story {
    following: Following,
    deaths: Vec<Death>,
    died: Vec<Death>,
}

impl Story {
    /// Everything that a copy goes through, as short as it can be.
    fn tell(deaths: &[Death]) -> Vec<Death> {
        let mut following = Following::new("crash");
        let slot = following.slot().to_owned();
        let rhei = following.rhei.clone().deadline(Duration::from_secs(60)).config(&format!(
            "[source]\nslot = \"{slot}\"\npublication = \"{slot}\"\n[sync]\nmemory_limit = \
             \"64kB\"\n[backfill]\nchunk_size = \"1MB\"\n"
        ));
        following.rhei = rhei;
        let mut story = Story { following, deaths: deaths.to_vec(), died: Vec::new() };
        story.deaths.reverse();
        let name = story.following.db.name().to_owned();
        story
            .following
            .db
            .execute(&format!("ALTER DATABASE \"{name}\" SET logical_decoding_work_mem = '64kB'"));
        story.following.db.execute(
            "CREATE TABLE k (id int PRIMARY KEY, n int, v text); ALTER TABLE k ALTER v SET STORAGE \
             EXTERNAL;
             CREATE TABLE nk (n int, v text); ALTER TABLE nk REPLICA IDENTITY FULL;
             CREATE TABLE big (id int PRIMARY KEY, v text); CREATE TABLE cut (id int PRIMARY KEY);
             INSERT INTO k SELECT i, 0, CASE WHEN i % 10 = 0 THEN repeat('long', 1000) ELSE \
             'short' END FROM generate_series(1, 300) i;
             INSERT INTO nk SELECT i % 7, 'twice' FROM generate_series(1, 100) i; INSERT INTO cut \
             SELECT generate_series(1, 50);
             INSERT INTO big SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 4000) i",
        );
        story.until_done(&["sync"]);
        story.write();
        story.following.db.execute(
            "BEGIN; TRUNCATE cut; INSERT INTO cut SELECT generate_series(40, 60); COMMIT;
             INSERT INTO big SELECT i, repeat(md5(i::text), 20) FROM generate_series(4001, 6000) i",
        );
        story.until_done(&["sync"]);
        story.following.db.execute(&format!(
            "ALTER TABLE k ADD COLUMN added text DEFAULT 'new'; UPDATE k SET added = 'newer' WHERE \
             id < 10;
             CREATE TABLE late (id int PRIMARY KEY, v text); INSERT INTO late SELECT i, 'late' \
             FROM generate_series(1, 500) i;
             ALTER PUBLICATION \"{slot}\" ADD TABLE late; DELETE FROM late WHERE id = 7",
        ));
        story.until_done(&["sync"]);
        story.write();
        story.until_done(&["backfill", "--table", "public.k", "--force"]);
        story.until_done(&["compact"]);
        story.write();
        story.until_done(&["sync"]);
        // Nothing for us.
        story
            .following
            .db
            .execute("CREATE TABLE unpublished AS SELECT generate_series(1, 1000) AS i");
        story.until_done(&["sync"]);
        story.following.assert_same(&TABLES);
        story.following.rhei.run_ok(["verify"]);
        let states =
            query_copy(story.following.copy(), "SELECT DISTINCT state::VARCHAR FROM _rhei.tables");
        assert_eq!(states, [[Some("live".to_owned())]], "{deaths:?}");
        let left = query_copy(
            story.following.copy(),
            "SELECT table_name FROM duckdb_tables() WHERE table_name LIKE '%__rhei_%' OR \
             table_name LIKE 'pending_%'",
        );
        assert!(left.is_empty(), "{deaths:?} left {left:?}");
        story.died
    }

    fn write(&self) {
        self.following.db.execute(
            "UPDATE k SET n = n + 1 WHERE id % 3 = 0; UPDATE k SET id = id + 10000 WHERE id IN \
             (20, 21); DELETE FROM k WHERE id > 10000;
             INSERT INTO k (id, n, v) SELECT 20, count(*), repeat('again', 1000) FROM k; INSERT \
             INTO k (id, n, v) VALUES (21, 0, NULL);
             DELETE FROM nk WHERE ctid = (SELECT min(ctid) FROM nk); UPDATE nk SET v = v || 'x' \
             WHERE n = 3; INSERT INTO nk VALUES (3, 'x');
             UPDATE big SET v = 'touched' WHERE id % 500 = 1",
        );
    }

    /// Each time that rhei dies the source moves on before it is started again.
    fn until_done(&mut self, command: &[&str]) {
        loop {
            let mut rhei = self.following.rhei.clone();
            if let Some((place, skipped)) = self.deaths.last() {
                let action = if *skipped == 0 {
                    "1*return".to_owned()
                } else {
                    format!("{skipped}*off->1*return")
                };
                rhei = rhei.env("FAILPOINTS", &format!("{place}={action}"));
            }
            let output = rhei.run(command);
            if output.code().is_some() {
                output.assert_code(0);
                return;
            }
            self.died.extend(self.deaths.pop());
            assert!(self.died.len() < 10, "it dies by itself\n{}", output.stderr);
            self.write();
        }
    }
}

/// What the target comes by: a lake has an upkeep, where a file has file checkpoints and is
/// rewritten.
fn places() -> Vec<&'static str> {
    if Kind::of_all_tests().is_none() {
        return ALL.to_vec();
    }
    let is_of_file = |place: &&str| place.starts_with("tidy.") || place.starts_with("compact.");
    ALL.into_iter().filter(|place| !is_of_file(place)).chain(UPKEEP).collect()
}

/// Tells stories side by side. Returns how often each death came to pass.
fn tell_all(stories: &[Vec<Death>]) -> BTreeMap<Death, usize> {
    let (next, died) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while let Some(deaths) = stories.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let happened = Story::tell(deaths);
                    let mut died = died.lock().unwrap();
                    for death in happened {
                        *died.entry(death).or_default() += 1;
                    }
                }
            });
        }
    });
    died.into_inner().unwrap()
}

#[test]
fn a_death_at_each_place_loses_nothing_and_repeats_nothing() {
    let places = places();
    let stories: Vec<Vec<Death>> = places.iter().map(|place| vec![(*place, 0)]).collect();
    let died = tell_all(&stories);
    for place in places {
        println!("died at {place}");
        assert!(died.contains_key(&(place, 0)), "nothing comes by {place}");
    }
    println!("{} places, all ended equal", died.len());
}

#[test]
fn deaths_at_pairs_of_places_lose_nothing_and_repeat_nothing() {
    let (pairs, seed) = (from_env("RHEI_TEST_PAIRS", 12), from_env("RHEI_TEST_SEED", 20_261_121));
    println!("RHEI_TEST_PAIRS={pairs} RHEI_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let places = places();
    let mut death = || (places[random.random_range(0..places.len())], random.random_range(0..4));
    let stories: Vec<Vec<Death>> = (0..pairs).map(|_| vec![death(), death()]).collect();
    let died = tell_all(&stories);
    println!(
        "{} pairs, all ended equal; {} deaths came to pass:",
        stories.len(),
        died.values().sum::<usize>()
    );
    for ((place, skipped), times) in died {
        println!("  {place} after {skipped}: {times}");
    }
}

/// DuckDB makes a file of 12 kB in several writes.
#[test]
fn a_death_while_the_file_is_made_leaves_nothing_in_the_way() {
    let following = Following::new("half_made");
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 10)",
    );
    for bytes in [0, 4096, 8192] {
        let died = following.rhei.clone().longest_file(bytes).run(["sync"]);
        assert_eq!(died.status.signal(), Some(libc::SIGXFSZ), "{bytes} bytes: {}", died.stderr);
    }

    following.sync();

    following.assert_same(&["public.t"]);
    let files = std::fs::read_dir(following.folder.path()).unwrap();
    let files: BTreeSet<_> =
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!files.iter().any(|file| file.contains("creating")), "{files:?}");
}
