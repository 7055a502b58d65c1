//! The few lines of progress that stand below the log on a terminal.
//!
//! The cursor rests at the beginning of the first of these lines. So one "erase to the end of the
//! screen" removes them all, whether or not the terminal has wrapped them again after a change of
//! its width: nothing has to be counted that only the terminal knows. A line is cut to the width
//! that the terminal has when it is drawn, so no line ever wraps by itself.
//!
//! Whatever else writes to standard error goes through [`StderrWriter`], and what is printed to
//! standard output meanwhile through [`print_above`]; both draw the lines again below.

use std::{
    io::{self, Write},
    sync::{Mutex, MutexGuard, PoisonError, TryLockError},
    time::Duration,
};

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

static SCREEN: Mutex<Screen> =
    Mutex::new(Screen { lines: Vec::new(), is_drawn: false, is_closed: false });

/// Erases from the beginning of the line of the cursor to the end of the screen.
const ERASE: &str = "\r\x1b[J";

struct Screen {
    lines: Vec<String>,
    /// Whether there is anything below the cursor to erase.
    is_drawn: bool,
    is_closed: bool,
}

/// The size of the terminal, in cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub columns: usize,
    pub rows: usize,
}

impl Size {
    /// The size of a terminal that does not know it, as some of those in CI.
    const UNKNOWN: Size = Size { columns: 80, rows: 24 };

    /// Returns the size that the terminal on standard error has now.
    pub fn now() -> Size {
        match rustix::termios::tcgetwinsize(io::stderr()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                Size { columns: size.ws_col.into(), rows: size.ws_row.into() }
            }
            _ => Size::UNKNOWN,
        }
    }
}

impl Screen {
    fn lock() -> MutexGuard<'static, Self> {
        SCREEN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what erases the lines and writes `text` and the lines below it.
    fn redraw(&mut self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        if self.is_drawn {
            out.extend_from_slice(ERASE.as_bytes());
        }
        out.extend_from_slice(text);

        let size = Size::now();
        // The last column stays empty: terminals differ in where the cursor is after it. The lines
        // never fill the screen, since what has scrolled away cannot be erased.
        let shown: Vec<&str> = self
            .lines
            .iter()
            .take(size.rows.saturating_sub(1).max(1))
            .map(|line| cut(line, size.columns.saturating_sub(1)))
            .collect();

        self.is_drawn = !shown.is_empty();
        if self.is_drawn {
            out.extend_from_slice(shown.join("\r\n").as_bytes());
            if shown.len() > 1 {
                out.extend_from_slice(format!("\x1b[{}A", shown.len() - 1).as_bytes());
            }
            out.push(b'\r');
        }
        out
    }
}

/// Shows these lines below the log instead of those that were there; none removes them.
pub fn show(lines: Vec<String>) {
    let mut screen = Screen::lock();
    if screen.is_closed || (lines.is_empty() && !screen.is_drawn) {
        return;
    }

    screen.lines = lines;
    write(&screen.redraw(b""));
}

/// Removes the lines for the rest of the process, which is about to end.
pub fn close() {
    // The hook of a panic comes here, too, perhaps from within the lock: it waits only for others.
    for _ in 0..100 {
        let mut screen = match SCREEN.try_lock() {
            Ok(screen) => screen,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
        };

        screen.is_closed = true;
        screen.lines.clear();
        return write(&screen.redraw(b""));
    }
}

/// Prints to standard output, which may be the same terminal.
pub fn print_above(text: &str) {
    let mut screen = Screen::lock();
    let lines = std::mem::take(&mut screen.lines);
    write(&screen.redraw(b""));

    println!("{text}");
    screen.lines = lines;
    write(&screen.redraw(b""));
}

fn write(bytes: &[u8]) {
    // Nobody can be told that standard error is gone.
    let _ = io::stderr().lock().write_all(bytes);
}

/// Standard error for the log: each write is whole lines, which stand above the lines of progress.
#[derive(Debug, Clone, Copy, Default)]
pub struct StderrWriter;

impl Write for StderrWriter {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let mut screen = Screen::lock();
        let out = screen.redraw(lines);
        io::stderr().lock().write_all(&out)?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the beginning of a text that is at most `width` cells wide.
fn cut(text: &str, width: usize) -> &str {
    let mut used = 0;
    let end = text.char_indices().find(|(_, sign)| {
        used += sign.width().unwrap_or_default();
        used > width
    });
    end.map_or(text, |(at, _)| text.get(..at).unwrap_or_default())
}

/// Returns a text that is at most `width` cells wide: a longer one without its middle.
pub fn shorten(text: &str, width: usize) -> String {
    let printable: String =
        text.chars().map(|sign| if sign.is_control() { '\u{fffd}' } else { sign }).collect();
    if printable.width() <= width {
        return printable;
    }

    let Some(room) = width.checked_sub(1) else { return String::new() };
    let backwards: String = printable.chars().rev().collect();
    let head = cut(&printable, room / 2);
    let tail: String = cut(&backwards, room - head.width()).chars().rev().collect();
    format!("{head}…{tail}")
}

/// Returns a text with blanks behind it, so that it is `width` cells wide.
pub fn pad(text: &str, width: usize) -> String {
    format!("{text}{}", " ".repeat(width.saturating_sub(text.width())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_loses_its_middle() {
        assert_eq!(shorten("public.orders", 13), "public.orders");
        assert_eq!(shorten("public.customer_addresses", 15), "public.…dresses");
        assert_eq!(shorten("public.orders", 0), "");
        // Signs that take two cells are not cut in half, and none moves the cursor.
        assert_eq!(shorten("注文.明細行", 8), "注…細行");
        assert_eq!(shorten("a\n\x1b[2Jb", 80), "a\u{fffd}\u{fffd}[2Jb");
    }

    #[test]
    fn a_line_is_cut_at_cells_not_bytes() {
        assert_eq!(cut("注文 ab", 4), "注文");
        assert_eq!(cut("注文 ab", 3), "注");
        assert_eq!(cut("ab", 3), "ab");
    }

    #[test]
    fn a_redraw_erases_what_is_there_and_ends_at_the_first_line() {
        let lines = vec!["one".to_owned(), "two".to_owned()];
        let mut screen = Screen { lines, is_drawn: false, is_closed: false };
        assert_eq!(screen.redraw(b""), b"one\r\ntwo\x1b[1A\r");
        assert_eq!(screen.redraw(b"log\n"), b"\r\x1b[Jlog\none\r\ntwo\x1b[1A\r");

        screen.lines.clear();
        assert_eq!(screen.redraw(b""), b"\r\x1b[J");
        assert_eq!(screen.redraw(b"log\n"), b"log\n");
    }
}
