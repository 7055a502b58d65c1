//! What goes wrong, in which order. The plan comes from the seed alone; what a fault hits is
//! decided when it comes.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use super::{Chaos, PUBLICATION, SLOT, writer};
use crate::bed::{Cluster, Cut, cluster::shell, wait_until};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillRhei,
    StopRhei,
    TerminateRhei,
    /// `pg_terminate_backend` for each of rhei's.
    TerminateBackends,
    /// SIGKILL, after which the server restarts all of itself.
    KillWalsender,
    StopWalsender,
    ImmediateShutdown,
    KillPostgres,
    Delay,
    Cut,
    Reset,
    Truncate,
    HalfOpen,
    Refuse,
    LeavePublication,
    SetPublication,
    DropSlot,
    InvalidateSlot,
    Promote,
    DiskFull,
    JumpClock,
    /// All connections to the catalog of a lake.
    CutCatalog,
    /// The same, and no new one is made for a while.
    LoseCatalog,
    /// The next commit to a lake happens or not, and its answer is lost.
    LoseAnswer,
}

const WEIGHTS: [(Kind, u32); 21] = [
    (Kind::KillRhei, 6),
    (Kind::StopRhei, 4),
    (Kind::TerminateRhei, 3),
    (Kind::TerminateBackends, 3),
    (Kind::KillWalsender, 1),
    (Kind::StopWalsender, 2),
    (Kind::ImmediateShutdown, 1),
    (Kind::KillPostgres, 2),
    (Kind::Delay, 2),
    (Kind::Cut, 3),
    (Kind::Reset, 3),
    (Kind::Truncate, 3),
    (Kind::HalfOpen, 2),
    (Kind::Refuse, 2),
    (Kind::LeavePublication, 2),
    (Kind::SetPublication, 2),
    (Kind::DropSlot, 1),
    (Kind::InvalidateSlot, 1),
    (Kind::Promote, 1),
    (Kind::DiskFull, 2),
    (Kind::JumpClock, 1),
];

/// The faults that only a lake meets. A seed plans the same for a file with or without them.
const WEIGHTS_OF_LAKE: [(Kind, u32); 3] =
    [(Kind::CutCatalog, 4), (Kind::LoseCatalog, 3), (Kind::LoseAnswer, 6)];

/// After so many of those that lose the slot the others are passed over: rhei begins anew three
/// times an hour and then stops, as it should.
const MOST_LOSSES: u64 = 3;

/// After a pause, a fault of this strength (0 to 999).
#[derive(Debug, Clone, Copy)]
pub struct Step {
    pub after: Duration,
    pub kind: Kind,
    pub strength: u64,
}

pub fn plan(seed: u64, is_lake: bool) -> impl Iterator<Item = Step> {
    let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
    let of_lake: &[(Kind, u32)] = if is_lake { &WEIGHTS_OF_LAKE } else { &[] };
    let weights = [&WEIGHTS, of_lake].concat();
    std::iter::from_fn(move || {
        let after = Duration::from_millis(dice.random_range(500..3000));
        let strength = dice.random_range(0..1000);
        let mut at = dice.random_range(0..weights.iter().map(|(_, weight)| weight).sum());
        let chosen = weights.iter().find(|(_, weight)| {
            let is_here = at < *weight;
            at = at.saturating_sub(*weight);
            is_here
        });
        chosen.map(|(kind, _)| Step { after, kind: *kind, strength })
    })
}

/// What ends a fault that lasts.
#[derive(Debug, Clone)]
pub enum Heal {
    StartRhei,
    Continue(u32),
    StartPostgres,
    NoDelay,
    NoSwallowing,
    NoRefusing,
    Publish,
    FreeDisk,
    CatalogUp,
}

impl Chaos {
    /// False when there was nothing that it could hit.
    pub fn inject(&mut self, step: Step) -> bool {
        let strength = step.strength;
        let ms = Duration::from_millis;
        let primary = self.primary.get();
        if matches!(step.kind, Kind::DropSlot | Kind::InvalidateSlot | Kind::Promote) {
            if self.losses >= MOST_LOSSES || !primary.is_running() {
                return false;
            }
            self.losses += 1;
        }
        match step.kind {
            Kind::KillRhei => {
                let Some(running) = self.running.take() else { return false };
                let ended = running.kill9();
                self.keep(&ended.stderr);
                self.picture("killed");
                self.start_rhei();
            }
            Kind::StopRhei => {
                let Some(running) = &self.running else { return false };
                let pid = running.pid();
                running.signal("STOP");
                wait_until(ms(10_000), "all threads of rhei have stopped", || is_stopped(pid));
                self.picture("stopped");
                self.heal_in(ms(100 + strength * 6), Heal::Continue(pid));
            }
            Kind::TerminateRhei => return self.terminate_rhei(),
            Kind::TerminateBackends => return !self.at_source(TERMINATE).is_empty(),
            Kind::KillWalsender => {
                let Some(pid) = self.walsender() else { return false };
                return shell(&format!("kill -9 {pid}"));
            }
            Kind::StopWalsender => {
                let Some(pid) = self.walsender() else { return false };
                if !shell(&format!("kill -STOP {pid}")) {
                    return false;
                }
                self.heal_in(ms(100 + strength * 8), Heal::Continue(pid));
            }
            Kind::ImmediateShutdown | Kind::KillPostgres => {
                if !primary.is_running() {
                    return false;
                }
                if step.kind == Kind::KillPostgres {
                    primary.kill9()
                } else {
                    primary.stop_immediate()
                }
                self.heal_in(ms(strength * 3), Heal::StartPostgres);
            }
            Kind::Delay => {
                self.proxy.delay(ms(1 + strength / 5));
                self.heal_in(ms(500 + strength * 3), Heal::NoDelay);
            }
            Kind::Cut => self.proxy.cut(),
            Kind::Reset => self.proxy.reset(),
            Kind::Truncate => self.proxy.truncate(strength * strength / 10),
            Kind::HalfOpen => {
                self.proxy.swallow(true);
                // Some for longer than rhei's patience with a silent stream.
                self.heal_in(ms(strength * 12), Heal::NoSwallowing);
            }
            Kind::Refuse => {
                self.proxy.refuse(true);
                self.proxy.cut();
                self.heal_in(ms(strength * 4), Heal::NoRefusing);
            }
            Kind::LeavePublication => {
                let leaving = writer::LEAVING;
                let left = primary
                    .maintenance()
                    .try_query(&format!("ALTER PUBLICATION {PUBLICATION} DROP TABLE {leaving}"));
                self.heal_in(ms(strength * 4), Heal::Publish);
                return left.is_ok();
            }
            Kind::SetPublication => {
                let others: Vec<&str> =
                    writer::TABLES.into_iter().filter(|table| *table != writer::LEAVING).collect();
                let set = super::published(primary.major(), &others);
                let set = primary
                    .maintenance()
                    .try_query(&format!("ALTER PUBLICATION {PUBLICATION} SET {set}"));
                self.heal_in(ms(strength * 4), Heal::Publish);
                return set.is_ok();
            }
            Kind::DropSlot => {
                let active = format!(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE \
                     slot_name = '{SLOT}' AND active"
                );
                let drop = format!(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE \
                     slot_name = '{SLOT}' AND NOT active"
                );
                let end = Instant::now() + ms(3000);
                while Instant::now() < end {
                    self.at_source(&active);
                    if !self.at_source(&drop).is_empty() {
                        return true;
                    }
                }
                return false;
            }
            Kind::InvalidateSlot => {
                // More WAL than the slot may hold, while nobody reads it.
                self.proxy.refuse(true);
                self.proxy.cut();
                self.at_source("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'");
                self.at_source("SELECT pg_reload_conf()");
                for _ in 0..4 {
                    self.at_source(
                        "CREATE TABLE filler AS SELECT repeat('x', 500) FROM \
                                    generate_series(1, 40000)",
                    );
                    self.at_source("DROP TABLE filler");
                    self.at_source("SELECT pg_switch_wal()");
                    self.at_source("CHECKPOINT");
                }
                self.at_source("ALTER SYSTEM RESET max_slot_wal_keep_size");
                self.at_source("SELECT pg_reload_conf()");
                self.heal_in(ms(1), Heal::NoRefusing);
                let status = format!(
                    "SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
                );
                return self.at_source(&status) == [[Some("lost".to_owned())]];
            }
            Kind::Promote => {
                // A walsender that is stopped would keep the server from shutting down.
                for (_, heal) in &self.heals {
                    if let Heal::Continue(pid) = heal {
                        shell(&format!("kill -CONT {pid} 2>/dev/null"));
                    }
                }
                let standby = primary.standby();
                primary.kill9();
                standby.promote();
                self.proxy.forward_to(standby.port());
                self.proxy.reset();
                self.primary.set(standby);
            }
            Kind::DiskFull => {
                if !self.is_small_disk {
                    return false;
                }
                let ballast = fs::File::create(self.folder.path().join("ballast"));
                let piece = [0; 64 << 10];
                while ballast.as_ref().is_ok_and(|mut file| file.write_all(&piece).is_ok()) {}
                self.heal_in(ms(500 + strength * 4), Heal::FreeDisk);
            }
            Kind::JumpClock => {
                let Some(clock) = &self.clock else { return false };
                fs::write(clock, format!("{:+}s\n", strength as i64 * 20 - 10_000)).unwrap();
            }
            Kind::CutCatalog | Kind::LoseCatalog => {
                let Some(catalog) = &self.catalog else { return false };
                catalog.down();
                let lasts = if step.kind == Kind::LoseCatalog { strength * 6 } else { 0 };
                self.heal_in(ms(lasts), Heal::CatalogUp);
            }
            Kind::LoseAnswer => {
                let Some(catalog) = &self.catalog else { return false };
                catalog.arm("INSERT INTO", strength.is_multiple_of(2));
            }
        }
        true
    }

    /// False when it has to be tried again.
    pub fn heal(&mut self, heal: &Heal) -> bool {
        let primary: Arc<Cluster> = self.primary.get();
        match heal {
            Heal::StartRhei if self.running.is_none() => self.start_rhei(),
            Heal::StartRhei => {}
            // It may have ended meanwhile.
            Heal::Continue(pid) => drop(shell(&format!("kill -CONT {pid} 2>/dev/null"))),
            Heal::StartPostgres => return primary.is_running() || primary.try_start().is_ok(),
            Heal::NoDelay => self.proxy.delay(Duration::ZERO),
            Heal::NoSwallowing => self.proxy.swallow(false),
            Heal::NoRefusing => self.proxy.refuse(false),
            Heal::Publish => {
                let leaving = writer::LEAVING;
                let is_in = format!(
                    "SELECT count(*) FROM pg_publication_tables WHERE pubname = '{PUBLICATION}' \
                     AND tablename = '{leaving}'"
                );
                let Ok(found) = primary.maintenance().try_query(&is_in) else { return false };
                let add = format!("ALTER PUBLICATION {PUBLICATION} ADD TABLE {leaving}");
                return found[0][0].as_deref() == Some("1")
                    || primary.maintenance().try_query(&add).is_ok();
            }
            Heal::FreeDisk => drop(fs::remove_file(self.folder.path().join("ballast"))),
            Heal::CatalogUp => self.catalog.iter().for_each(Cut::up),
        }
        true
    }

    fn at_source(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        self.primary.get().maintenance().try_query(sql).unwrap_or_default()
    }

    fn walsender(&self) -> Option<u32> {
        let sql = format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        self.at_source(&sql).first()?.first()?.as_ref()?.parse().ok()
    }
}

const TERMINATE: &str = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'rhei/%' AND \
                         pg_terminate_backend(pid)";

fn is_stopped(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().all(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 'Z', 'X']))
    })
}

/// A disk that is soon full, where one may mount. Unmounted when dropped.
pub struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    pub fn mount(folder: &Path, megabytes: u32) -> Option<SmallDisk> {
        let mut mount = Command::new("mount");
        let size = format!("size={megabytes}m");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| SmallDisk(folder.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The library that shows a process another time.
pub fn faketime() -> Option<String> {
    let folders = [
        "/usr/lib/x86_64-linux-gnu/faketime",
        "/usr/lib/aarch64-linux-gnu/faketime",
        "/usr/local/lib/faketime",
    ];
    let paths = folders.iter().map(|folder| format!("{folder}/libfaketimeMT.so.1"));
    paths.into_iter().find(|path| Path::new(path).exists())
}
