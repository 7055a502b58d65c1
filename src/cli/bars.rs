//! What the lines of progress say: a bar for each table that rows arrive of, as many as there is
//! room for, and one for all tables together.

use std::time::Duration;

use super::screen::{Size, pad, shorten};
use crate::pipeline::copy_progress::{Figures, Overview};

/// The most tables that are shown at a time, also on a high terminal.
const MAX_TABLES: usize = 8;
/// A name, and the bars with it, grow no further on a wide terminal.
const MAX_NAME_WIDTH: usize = 60;

/// How much is said in a line; a narrow terminal has no room for all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Detail {
    Short,
    Medium,
    Full,
}

impl Detail {
    fn of(columns: usize) -> Detail {
        match columns {
            ..80 => Detail::Short,
            80..120 => Detail::Medium,
            _ => Detail::Full,
        }
    }

    fn bar_width(self) -> usize {
        match self {
            Detail::Short => 10,
            Detail::Medium => 20,
            Detail::Full => 30,
        }
    }

    fn number(self, number: u64) -> String {
        if self == Detail::Full { thousands(number) } else { compact(number) }
    }

    /// Returns the rows that are copied, of how many, how fast, and how long it will take.
    fn figures(self, figures: &Figures) -> String {
        let rows = self.number(figures.rows);
        let mut text = match expected_rows(figures) {
            Some(expected) if self == Detail::Short => format!("{rows}/{}", self.number(expected)),
            Some(expected) => format!("{rows} of {} rows", self.number(expected)),
            None => format!("{rows} rows"),
        };

        if self > Detail::Short {
            text += &format!(", {:.1} MB/s", figures.megabytes_per_second);
        }
        if let (Some(seconds), Some(_)) = (figures.seconds_left, expected_rows(figures)) {
            text += &format!(", {} left", duration(seconds));
        }
        text
    }
}

/// Returns the number of rows that a table is expected to have; none when it is unknown or has
/// turned out to be too small.
fn expected_rows(figures: &Figures) -> Option<u64> {
    let expected = figures.estimated_rows;
    (expected > 0 && figures.rows <= expected).then_some(expected)
}

/// Returns the lines for a terminal of this size; none when nothing is being copied.
pub fn lines(overview: &Overview, size: Size) -> Vec<String> {
    if overview.tables_left == 0 && overview.copying.is_empty() {
        return Vec::new();
    }

    let detail = Detail::of(size.columns);
    let (done, left) = (detail.number(overview.tables_done as u64), overview.tables_left as u64);
    let left = detail.number(left);
    let total = match detail {
        Detail::Short => format!("{done} done, {left} left"),
        _ => format!("{done} tables done, {left} left"),
    };

    // The log has at least as much room as the bars.
    let most = (size.rows / 2).saturating_sub(1).min(MAX_TABLES);
    let shown = overview.copying.iter().take(most).map(|(name, figures)| (name, figures));
    let rows: Vec<(&str, &Figures, String)> = shown
        .chain([(&total, &overview.total)])
        .map(|(name, figures)| (name.as_str(), figures, detail.figures(figures)))
        .collect();

    let widest = rows.iter().map(|(.., text)| text.chars().count()).max().unwrap_or_default();
    let room = size.columns.saturating_sub(1 + detail.bar_width() + 2 + widest);
    let name_width = rows.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or_default();
    let name_width = name_width.max(16).min(room).min(MAX_NAME_WIDTH);

    rows.into_iter()
        .map(|(name, figures, text)| {
            let name = pad(&shorten(name, name_width), name_width);
            format!("{name} {} {text}", bar(figures, detail.bar_width()))
        })
        .collect()
}

/// Draws how much is done, `width` cells wide. One that nothing is known of stays empty.
fn bar(figures: &Figures, width: usize) -> String {
    let done = expected_rows(figures).map_or(0.0, |all| figures.rows as f64 / all as f64);
    let full = ((done * width as f64) as usize).min(width);
    format!("{}{}", "█".repeat(full), "░".repeat(width - full))
}

/// Returns a number with three digits or fewer and its magnitude, as `12.3M`.
fn compact(number: u64) -> String {
    const MAGNITUDES: [(f64, &str); 4] = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let number = number as f64;
    match MAGNITUDES.iter().find(|(size, _)| number >= *size) {
        Some((size, sign)) if number < 100.0 * size => format!("{:.1}{sign}", number / size),
        Some((size, sign)) => format!("{:.0}{sign}", number / size),
        None => format!("{number}"),
    }
}

/// Returns a number with commas between its thousands.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Returns a time in its two largest units at most.
fn duration(seconds: f64) -> String {
    let seconds = Duration::try_from_secs_f64(seconds.ceil().max(0.0)).map_or(0, |it| it.as_secs());
    match seconds {
        ..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use unicode_width::UnicodeWidthStr;

    use super::*;

    fn figures(rows: u64, estimated_rows: u64, seconds_left: Option<f64>) -> Figures {
        Figures {
            rows,
            estimated_rows,
            megabytes_per_second: 12.34,
            seconds_left,
            ..Figures::default()
        }
    }

    fn overview() -> Overview {
        Overview {
            copying: vec![
                ("public.orders".to_owned(), figures(1_250_000, 2_500_000, Some(200.0))),
                ("public.events".to_owned(), figures(7, 0, Some(0.0))),
            ],
            tables: 1003,
            tables_done: 1,
            tables_left: 1002,
            total: figures(1_250_007, 5_000_028, Some(4000.0)),
        }
    }

    #[test]
    fn a_narrow_terminal_has_short_figures() {
        let lines = lines(&overview(), Size { columns: 60, rows: 24 });
        let expected = [
            "public.orders         █████░░░░░ 1.2M/2.5M, 3m20s left",
            "public.events         ░░░░░░░░░░ 7 rows",
            "1 done, 1.0k left     ██░░░░░░░░ 1.3M/5.0M, 1h06m left",
        ];
        assert_eq!(lines.iter().map(|line| normal(line)).collect::<Vec<_>>(), expected.map(normal));
    }

    /// Blanks do not matter here.
    fn normal(line: &str) -> String {
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_wide_terminal_has_all_digits() {
        let lines = lines(&overview(), Size { columns: 250, rows: 24 });
        assert_eq!(
            normal(&lines[2]),
            "1 tables done, 1,002 left ███████░░░░░░░░░░░░░░░░░░░░░░░ 1,250,007 of 5,000,028 \
             rows, 12.3 MB/s, 1h06m left"
        );
    }

    #[test]
    fn lines_fit_every_terminal_and_leave_room_for_the_log() {
        let mut overview = overview();
        let huge = figures(u64::MAX / 2, u64::MAX, Some(1e9));
        let name = "a_schema_with_a_long_name.a_table_whose_name_is_as_long_as_names_can_be".into();
        overview.copying = vec![(name, huge); 1000];

        for columns in 60..=250 {
            for rows in [1, 2, 5, 24, 100] {
                let lines = lines(&overview, Size { columns, rows });
                assert!(lines.len() <= 9 && lines.len() <= rows.max(2) / 2, "{}", lines.len());
                for line in lines {
                    assert!(line.width() < columns, "{columns}: {line}");
                }
            }
        }
    }

    #[test]
    fn nothing_is_shown_when_nothing_is_left() {
        let ended = Overview { copying: Vec::new(), tables_left: 0, ..overview() };
        assert!(lines(&ended, Size { columns: 80, rows: 24 }).is_empty());
    }
}
