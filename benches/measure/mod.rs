//! What a process and a machine have used, from /proc.

use std::time::Duration;

/// CPU-seconds of a process so far (its number, or `self`); none when it is gone.
pub fn process_cpu(pid: &str) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit(") ").next()?.split_whitespace().skip(11);
    let ticks = words.next()?.parse::<f64>().ok()? + words.next()?.parse::<f64>().ok()?;
    Some(ticks / 100.0)
}

/// Busy seconds of all cores since boot.
pub fn machine_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let ticks: Vec<u64> =
        stat.lines().next().unwrap().split_whitespace().skip(1).map(|word| word.parse().unwrap()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) as f64 / 100.0
}

/// The most memory that a process has had, in MiB; none when it is gone.
pub fn peak_mib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<f64>().ok()? / 1024.0)
}

/// How often a process is looked at that may end any moment.
pub const GLANCE: Duration = Duration::from_millis(5);

/// The memory that a process has now, in MiB; none when it is gone.
pub fn resident_mib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<f64>().ok()? / 1024.0)
}
