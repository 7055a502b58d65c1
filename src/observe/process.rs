//! What the operating system says of this process. On systems without /proc only its start is
//! known.

use std::fs;

use super::watch::unix_now;

/// This process.
#[derive(Debug)]
pub struct Process {
    /// When it began to be watched, in seconds since 1970.
    pub started_at: f64,
}

impl Default for Process {
    fn default() -> Self {
        Self { started_at: unix_now() }
    }
}

impl Process {
    /// Returns the memory that is in RAM.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kilobytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
        Some(kilobytes * 1024)
    }

    /// Returns the CPU time that was used.
    pub fn cpu_seconds(&self) -> Option<u64> {
        /// `USER_HZ`, which is the same on all of Linux's common architectures.
        const TICKS: u64 = 100;

        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name of the process may hold anything, also spaces and parentheses.
        let (_, fields) = stat.rsplit_once(") ")?;
        let mut times = fields.split(' ').skip(11).map(str::parse::<u64>);
        let (user, system) = (times.next()?.ok()?, times.next()?.ok()?);
        Some((user + system) / TICKS)
    }

    /// Returns the number of open file descriptors.
    pub fn open_files(&self) -> Option<usize> {
        Some(fs::read_dir("/proc/self/fd").ok()?.count())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn linux_says_what_the_process_uses() {
        let process = Process::default();
        assert!(process.resident_bytes().is_some_and(|bytes| bytes > 1 << 20));
        assert!(process.open_files().is_some_and(|files| files >= 3));
        assert!(process.cpu_seconds().is_some());
    }
}
