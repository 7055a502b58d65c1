//! What a process and a machine have used, from /proc.

use std::time::Duration;

/// CPU-seconds of a process so far (its number, or `self`); none when it is gone.
pub fn process_cpu(pid: &str) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit(") ").next()?.split_whitespace().skip(11);
    let ticks = words.next()?.parse::<f64>().ok()? + words.next()?.parse::<f64>().ok()?;
    Some(ticks / 100.0)
}

/// CPU-seconds so far of a process, of its children, and of those that it has already waited for: a
/// server from its postmaster.
pub fn family_cpu(parent: u32) -> f64 {
    let ticks = |pid: &str, words: usize| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields: Vec<&str> =
            stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
        let is_child = fields.get(1) == Some(&parent.to_string().as_str());
        let used = fields
            .iter()
            .skip(11)
            .take(words)
            .filter_map(|field| field.parse::<f64>().ok())
            .sum::<f64>();
        (is_child, used / 100.0)
    };
    let processes = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let children = processes.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    // Of the parent also what its children took that have ended.
    let own = ticks(&parent.to_string(), 4).1;
    own + children
        .map(|pid| ticks(&pid, 2))
        .filter(|(is_child, _)| *is_child)
        .map(|(_, used)| used)
        .sum::<f64>()
}

/// Busy seconds of all cores since boot.
pub fn machine_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let ticks: Vec<u64> = stat
        .lines()
        .next()
        .unwrap()
        .split_whitespace()
        .skip(1)
        .map(|word| word.parse().unwrap())
        .collect();
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

/// Lines that are printed and, in the end, written down.
#[derive(Default)]
pub struct Report(Vec<String>);

impl Report {
    pub fn say(&mut self, line: String) {
        println!("{line}");
        self.0.push(line);
    }

    /// As [`write_section`].
    pub fn write(mut self, title: &str, server: &str) {
        self.0.insert(0, "```text".to_owned());
        self.0.push("```".to_owned());
        write_section(title, server, &self.0);
    }
}

/// Replaces one section of the file that RHEI_BENCH_DOCS names, if it does: what was measured, on
/// which machine, and when.
pub fn write_section(title: &str, server: &str, body: &[String]) {
    let Some(path) = std::env::var_os("RHEI_BENCH_DOCS") else { return };
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1))
        .unwrap_or("?");
    let memory = read("/proc/meminfo");
    let memory: f64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let date = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let date = date.split('T').next().unwrap_or_default();
    let machine = format!(
        "{model}, {cores} cores, {:.0} GiB; PostgreSQL {server}; {date}",
        memory / 1024.0 / 1024.0
    );
    let section = format!("## {title}\n\n{machine}\n\n{}\n", body.join("\n"));
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let mut parts: Vec<String> = text.split("\n## ").map(str::to_owned).collect();
    let head = parts.remove(0);
    let mut sections: Vec<String> =
        parts.into_iter().map(|part| format!("## {}\n", part.trim_end())).collect();
    match sections.iter_mut().find(|other| other.starts_with(&format!("## {title}\n"))) {
        Some(other) => *other = section,
        None => sections.push(section),
    }
    std::fs::write(path, format!("{}\n\n{}", head.trim_end(), sections.join("\n"))).unwrap();
}
