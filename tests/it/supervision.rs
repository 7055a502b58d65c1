//! What `run` does about bugs of its own, and about a disk that is full.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    bed::{Cluster, ClusterOptions, Running, lake::Kind, wait_until},
    following::Following,
};

const SOON: Duration = Duration::from_secs(60);

fn with_rows(name: &str) -> Following {
    let following = Following::new(name);
    following.db.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM \
         generate_series(1, 100) i",
    );
    following
}

#[test]
fn a_run_goes_on_after_panics_wherever_they_happen_and_loses_nothing() {
    for (at, place) in
        ["apply.committing", "apply.committed", "chunk.loading", "merge.swapping", "copy.planned"]
            .iter()
            .enumerate()
    {
        let following = with_rows(&format!("panic_{at}"));
        let rhei =
            following.rhei.clone().env("FAILPOINTS", &format!("{place}=2*panic(on purpose)"));
        let mut running = rhei.spawn(["run"]);
        running.wait_for_log("on purpose", SOON);
        following
            .db
            .execute("INSERT INTO t VALUES (0, 'later'); UPDATE t SET v = 'x' WHERE id = 1");
        running.wait_for_log("all tables are live", SOON);
        running.stop(SOON).assert_code(0);
        following.sync();
        following.assert_same(&["public.t"]);
    }
}

#[test]
fn a_run_that_meets_a_bug_again_and_again_stops_loudly_and_nothing_is_lost() {
    let following = with_rows("panics");
    following.sync();
    following.db.execute("INSERT INTO t VALUES (0, 'later')");
    let settings = fs::read_to_string(following.folder.path().join("rhei.toml")).unwrap();
    let rhei = following
        .rhei
        .clone()
        .config(&format!("{settings}[supervisor]\nrestart = {{ max = 2, within = \"1m\" }}\n"));
    let ended = rhei.env("FAILPOINTS", "apply.committing=panic(on purpose)").run(["run"]);
    ended.assert_code(1);
    assert!(
        ended.stderr.contains("error: a call to DuckDB met a bug: on purpose"),
        "{}",
        ended.stderr
    );
    assert_eq!(ended.stderr.matches("going on from the checkpoint").count(), 2, "{}", ended.stderr);
    following.sync();
    following.assert_same(&["public.t"]);
}

#[test]
fn an_acknowledgement_that_takes_long_is_said() {
    let following = with_rows("slow_acknowledgement");
    following.sync();
    let output =
        following.rhei.clone().env("FAILPOINTS", "feedback.sending=1*sleep(2100)").run_ok(["sync"]);
    assert!(output.stderr.contains("an acknowledgement took long to send"), "{}", output.stderr);
}

/// A small file system of its own, unmounted with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None where mounting is not permitted.
    fn mount(folder: &Path, megabytes: u32) -> Option<Self> {
        let path = folder.join("small");
        fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(&path)
            .output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(path));
        }
        println!("skipped: a file system cannot be mounted here");
        None
    }

    /// Leaves no more than so many bytes.
    fn fill(&self, left: u64) {
        let mut filler = fs::File::create(self.0.join("filler")).unwrap();
        while filler.write_all(&[7; 4096]).is_ok() {}
        let length = filler.metadata().unwrap().len();
        filler.set_len(length.saturating_sub(left)).unwrap();
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// With its target on a small disk.
fn on_small_disk(name: &str, megabytes: u32) -> Option<(Following, SmallDisk)> {
    let mut following = Following::of(Cluster::shared().database(name));
    let disk = SmallDisk::mount(following.folder.path(), megabytes)?;
    following.rhei = following.rhei.target("small/copy.duckdb");
    following.db.execute("CREATE TABLE t (id int PRIMARY KEY, v text)");
    Some((following, disk))
}

const FULL: &str = "the target's disk does not take what is written";
const OPENED_AGAIN: &str = "opened the target again without what DuckDB had in memory";

#[test]
fn a_disk_that_fills_up_while_changes_are_applied_is_waited_for() {
    let Some((following, disk)) = on_small_disk("full_apply", 40) else { return };
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    disk.fill(200_000);
    following.db.execute(
        "INSERT INTO t SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 10000) i",
    );
    running.wait_for_log(FULL, SOON);
    following
        .db
        .execute("UPDATE t SET v = 'short' WHERE id % 2 = 0; DELETE FROM t WHERE id % 5 = 0");
    let mark = running.log_mark();
    disk.make_room();
    running.wait_for_log_after(mark, "applied", SOON);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

#[test]
fn a_disk_that_fills_up_while_tables_are_copied_is_waited_for() {
    let Some((following, disk)) = on_small_disk("full_copy", 60) else { return };
    following.db.execute(
        "INSERT INTO t SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 40000) i",
    );
    disk.fill(3_000_000);
    let mut running = following.run();
    running.wait_for_log(FULL, SOON);
    following.db.execute("UPDATE t SET v = 'short' WHERE id % 100 = 0");
    disk.make_room();
    running.wait_for_log("all tables are live", SOON);
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// DuckDB invalidates a database whose file checkpoint failed, until it is opened again.
#[test]
fn a_disk_that_fills_up_before_a_file_checkpoint_is_waited_for() {
    let Some((following, disk)) = on_small_disk("full_checkpoint", 60) else { return };
    following.db.execute("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 1000) i");
    following.sync();
    let mut running = following.run();
    running.wait_for_log("following the source", SOON);
    let before = fs::metadata(following.copy()).unwrap().len();
    following.db.execute(
        "INSERT INTO t SELECT i, repeat(md5(i::text), 10) FROM generate_series(1001, 10000) i",
    );
    wait_until(SOON, "the changes are in the log", || {
        fs::metadata(following.copy().with_extension("duckdb.wal"))
            .is_ok_and(|log| log.len() > 2_000_000)
    });
    disk.fill(20_000);
    running.wait_for_log("file checkpoint", SOON);
    following.db.execute("INSERT INTO t VALUES (0, 'later')");
    disk.make_room();
    wait_until(SOON, "the file checkpoint", || {
        fs::metadata(following.copy()).is_ok_and(|file| file.len() > before)
    });
    running.stop(SOON).assert_code(0);
    following.sync();
    following.assert_same(&["public.t"]);
}

/// DuckDB 1.5.5 keeps the rows of a commit that failed as deleted ones behind the last row of the
/// table, and a file checkpoint makes them so for good: rows that come to these places are gone.
#[test]
fn a_commit_that_a_full_disk_has_refused_takes_no_later_row_away() {
    let Some((following, disk)) = on_small_disk("refused_commit", 60) else { return };
    following.db.execute(
        "INSERT INTO t SELECT i, 'v' FROM generate_series(1, 45) i;
         CREATE TABLE big (id int PRIMARY KEY, v text)",
    );
    let mut running = following.run();
    running.wait_for_log("all tables are live", SOON);
    let mark = running.log_mark();
    following
        .db
        .execute("BEGIN; ALTER TABLE t ADD COLUMN e int; DELETE FROM t WHERE id % 3 = 0; COMMIT");
    running.wait_for_log_after(mark, "another shape", SOON);

    disk.fill(200_000);
    following.db.execute(
        "BEGIN; ALTER TABLE t ADD COLUMN f int;
         INSERT INTO t SELECT i, 'w', i, i FROM generate_series(101, 130) i;
         INSERT INTO big SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 10000) i;
         COMMIT",
    );
    running.wait_for_log_after(mark, FULL, SOON);
    disk.make_room();
    running.wait_for_log_after(mark, OPENED_AGAIN, SOON);
    following.wait_settled(&mut running);
    running.assert_no_copies_since(mark);
    running.stop(SOON).assert_code(0);
    following.assert_same(&["public.t", "public.big"]);
}

/// The catalog is opened again after a failed commit, as every other DuckDB file is.
#[test]
fn a_full_disk_under_a_lake_whose_catalog_is_a_duckdb_file_is_waited_for() {
    let Some((mut following, disk)) = on_small_disk("full_catalog", 60) else { return };
    following.rhei = following.rhei.lake(Kind::DuckDb).env("RHEI_TARGET_KEEP_SNAPSHOTS", "1s");
    following.db.execute("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 45) i");
    following.sync();
    let fails = |running: &mut Running, round: u32| {
        let mark = running.log_mark();
        disk.fill(0);
        following.db.execute(&format!(
            "BEGIN; DELETE FROM t WHERE id % 7 = {round};
             INSERT INTO t SELECT i, 'w' FROM generate_series(10{round}00, 10{round}29) i;
             UPDATE t SET v = v || '{round}' WHERE id % 2 = 0; COMMIT",
        ));
        running.wait_for_log_after(mark, "going on from the checkpoint", SOON);
        disk.make_room();
    };

    for round in 0..2 {
        let mut running = following.run();
        running.wait_for_log("following the source", SOON);
        for change in 0..5 {
            following.db.execute(&format!("UPDATE t SET v = '{change}' WHERE id = 1"));
            following.rhei.run_ok(["wait", "--now"]);
        }
        following.rhei.run_ok(["compact"]);
        fails(&mut running, 3 * round + 1);
        running.stop(SOON).assert_code(0);

        let mut running = following.run();
        running.wait_for_log("following the source", SOON);
        following.rhei.run_ok(["wait", "--now"]);
        fails(&mut running, 3 * round + 2);
        running.wait_for_log(OPENED_AGAIN, SOON);
        following.rhei.run_ok(["wait", "--now"]);
        following.db.execute(&format!(
            "ALTER TABLE t ADD COLUMN c{round} int DEFAULT {round};
             INSERT INTO t (id, v) VALUES (-{round} - 1, 'late')"
        ));
        following.rhei.run_ok(["wait", "--now"]);
        running.assert_no_copies_since(0);
        running.stop(SOON).assert_code(0);
        following.assert_same(&["public.t"]);
    }
}

#[test]
fn a_sync_opens_a_lake_again_when_the_disk_of_its_catalog_has_room() {
    let Some((mut following, disk)) = on_small_disk("full_catalog_sync", 60) else { return };
    following.rhei = following.rhei.lake(Kind::DuckDb);
    following.db.execute("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 45) i");
    following.sync();

    // Few enough rows for the catalog, and too wide for what is left of the disk.
    disk.fill(300_000);
    following.db.execute(
        "INSERT INTO t SELECT i, (SELECT string_agg(md5(n::text), '') FROM \
         generate_series(1, 1000) n) FROM generate_series(101, 180) i",
    );
    let mut syncing = following.rhei.spawn(["sync"]);
    syncing.wait_for_log("the lake could not be used", SOON);
    disk.make_room();
    syncing.wait_for_log(OPENED_AGAIN, SOON);
    let synced = syncing.wait(SOON);
    synced.assert_code(0);
    assert!(synced.copies().is_empty(), "{}", synced.stderr);
    following.assert_same(&["public.t"]);
}

#[test]
fn a_disk_that_cannot_be_written_is_refused_and_nothing_is_lost() {
    let Some((following, disk)) = on_small_disk("read_only", 40) else { return };
    following.sync();
    let remount = |how: &str| {
        let remounted =
            Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(&disk.0).status();
        assert!(remounted.unwrap().success());
    };
    remount("ro");
    following.db.execute("INSERT INTO t VALUES (1, 'v')");
    let failed = following.rhei.run(["sync"]);
    failed.assert_code(1);
    assert!(failed.stderr.contains("cannot be written"), "{}", failed.stderr);
    remount("rw");
    following.sync();
    following.assert_same(&["public.t"]);
}

#[test]
fn sync_says_that_the_disk_is_full_and_goes_on_when_it_is_called_again() {
    let Some((following, disk)) = on_small_disk("full_sync", 40) else { return };
    following.sync();
    disk.fill(200_000);
    following.db.execute(
        "INSERT INTO t SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 10000) i",
    );
    let failed = following.rhei.run(["sync"]);
    failed.assert_code(1);
    assert!(
        failed.stderr.contains(FULL) && failed.stderr.contains("hint: make room"),
        "{}",
        failed.stderr
    );
    disk.make_room();
    following.sync();
    following.assert_same(&["public.t"]);
}

/// PostgreSQL 15 crashes when it decodes a row of a partition whose DETACH CONCURRENTLY is pending,
/// and all its sessions end with each attempt.
#[test]
fn a_source_that_crashes_over_what_comes_next_is_left_alone() {
    if Cluster::shared().major() != 15 {
        return;
    }
    let cluster = Cluster::start(ClusterOptions::default());
    let following = Following::of(cluster.database("crashing"));
    following.db.execute(
        "CREATE TABLE root (id int PRIMARY KEY, v int) PARTITION BY RANGE (id);
         CREATE TABLE low PARTITION OF root FOR VALUES FROM (0) TO (100);
         CREATE TABLE high PARTITION OF root FOR VALUES FROM (100) TO (200);
         CREATE PUBLICATION rhei FOR ALL TABLES WITH (publish_via_partition_root = true)",
    );
    let mut run = following.run();
    run.wait_for_log("all tables are live", SOON);
    let reader = following.db.session();
    reader.execute("BEGIN; SELECT * FROM root");
    let detacher = following.db.session();
    detacher.execute("SET statement_timeout = '500ms'");
    assert!(detacher.try_query("ALTER TABLE root DETACH PARTITION low CONCURRENTLY").is_err());
    // The server may crash before it has answered: the commit is what it crashes over.
    let _ = following.db.session().try_query("INSERT INTO low VALUES (1, 1)");
    run.wait_for_log("is left alone for longer and longer", SOON);
    let crashes = cluster.log().matches("was terminated by signal").count();
    assert!((3..=4).contains(&crashes), "{crashes} crashes\n{}", run.logs());
    run.stop(SOON).assert_code(0);
}
