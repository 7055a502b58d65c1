//! The status page in a browser (headless Chromium), under load and when things go wrong.
//!
//! `RHEI_BLESS=1` keeps the pictures of the first test for the documentation;
//! `RHEI_PAGE_SECONDS` has it gather a longer history first.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{Observed, SHOP, SOON, busy_run, has_tool};
use crate::{
    bed::{Cluster, ClusterOptions, temp_dir, wait_until},
    following::{Following, from_env},
    tidy::root,
};

/// What a browser made of the page.
struct Seen {
    /// The document, after its scripts have run.
    dom: String,
    /// What the page and the browser wrote to the console.
    console: Vec<String>,
    /// The addresses that the page asked.
    asked: Vec<String>,
}

/// How the browser looks at the page.
#[derive(Clone, Copy)]
struct Look {
    width: u32,
    height: u32,
    is_dark: bool,
}

const DESKTOP: Look = Look { width: 1200, height: 1480, is_dark: false };
const DARK: Look = Look { is_dark: true, ..DESKTOP };
const PHONE: Look = Look { width: 390, height: 844, is_dark: false };

impl Look {
    fn browser(self, folder: &Path) -> Command {
        let mut browser = Command::new("chromium");
        let scheme = if self.is_dark { 0 } else { 1 };
        browser.args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]).args([
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-extensions",
            "--enable-logging=stderr",
            "--lang=en",
            // A name would have to be looked up, which leaves a trace in the log of the network.
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        ]);
        browser.arg(format!("--window-size={},{}", self.width, self.height));
        browser.arg(format!("--blink-settings=preferredColorScheme={scheme}"));
        browser.arg(format!("--user-data-dir={}", folder.join("profile").display()));
        browser
    }

    /// Opens the page, lets its scripts run, and returns what became of it.
    #[track_caller]
    fn open(self, url: &str) -> Seen {
        let folder = temp_dir();
        let network = folder.path().join("network.json");
        let output = self
            .browser(folder.path())
            .arg(format!("--log-net-log={}", network.display()))
            .args(["--virtual-time-budget=3000", "--dump-dom", url])
            .output()
            .unwrap();

        let dom = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(dom.contains("</html>"), "{}\n{dom}\n{stderr}", output.status);
        let console = stderr.lines().filter(|line| line.contains(":CONSOLE")).map(str::to_owned);
        Seen { dom, console: console.collect(), asked: requests(&network, url) }
    }

    /// Takes a picture of the page.
    #[track_caller]
    fn picture(self, url: &str, to: &Path) {
        let folder = temp_dir();
        let output = self
            .browser(folder.path())
            .arg(format!("--screenshot={}", to.display()))
            .args(["--virtual-time-budget=3000", url])
            .output()
            .unwrap();
        let picture = fs::read(to).unwrap_or_else(|error| {
            panic!("{error}\n{}", String::from_utf8_lossy(&output.stderr));
        });
        assert!(picture.starts_with(b"\x89PNG"), "{}", to.display());
        let side = |at: usize| u32::from_be_bytes(picture[at..at + 4].try_into().unwrap());
        assert_eq!((side(16), side(20)), (self.width, self.height), "{}", to.display());
        // An empty page compresses to less.
        assert!(picture.len() > 20_000, "{} has {} bytes", to.display(), picture.len());
    }
}

/// The addresses that the page at `url` asked, or tried to, by the browser's own log of the
/// network. What the browser asks for itself has another initiator.
fn requests(log: &Path, url: &str) -> Vec<String> {
    let text = fs::read_to_string(log).unwrap();
    let parsed: Value = serde_json::from_str(&text).unwrap_or_else(|_| {
        // The browser may end in the middle of its last line.
        let whole = text.trim_end().trim_end_matches(',');
        serde_json::from_str(&format!("{whole}]}}")).unwrap()
    });
    let events = parsed["events"].as_array().unwrap().iter();
    let mut urls: Vec<String> = events
        .map(|event| &event["params"])
        .filter(|params| {
            let initiator = params["initiator"].as_str().unwrap_or_default();
            url.trim_end_matches('/') == initiator
        })
        .filter_map(|params| params["url"].as_str())
        .filter(|url| !url.starts_with("data:"))
        .map(str::to_owned)
        .collect();
    urls.sort();
    urls.dedup();
    urls
}

impl Seen {
    /// The text of the element with this id, without markup.
    #[track_caller]
    fn text(&self, id: &str) -> String {
        let begin = self.dom.find(&format!(" id=\"{id}\"")).unwrap_or_else(|| panic!("no {id}"));
        let rest = &self.dom[begin..];
        let rest = &rest[rest.find('>').unwrap() + 1..];
        // Elements with an id that are read here hold no other one of their kind after them.
        let end = rest.find(" id=\"").unwrap_or(rest.len());
        let mut text = String::new();
        let mut is_markup = false;
        for sign in rest[..end].chars() {
            match sign {
                '<' => is_markup = true,
                '>' => {
                    is_markup = false;
                    text.push(' ');
                }
                _ if !is_markup => text.push(sign),
                _ => {}
            }
        }
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Nothing went wrong in the page, and it asked nobody but its own server.
    #[track_caller]
    fn assert_clean(&self, observed: &Observed) {
        assert_eq!(self.console, Vec::<String>::new());
        let own = observed.url("/");
        let others: Vec<_> = self.asked.iter().filter(|url| !url.starts_with(&own)).collect();
        assert_eq!(others, Vec::<&String>::new());
        assert!(self.asked.iter().any(|url| url.contains("/status.json")), "{:?}", self.asked);
        assert!(self.dom.contains("data-state=\"shown\""), "the script did not come to its end");
    }
}

/// Writes at the source for as long as `work` takes.
fn under_load(observed: &Observed, work: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let session = observed.following.db.session();
            let mut number = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                number += 1;
                // Busier at some times than at others.
                let rows = 20 + (number / 40 % 7) * 60;
                session.execute(&format!(
                    "INSERT INTO orders SELECT {number} * 1000 + i, 'note' FROM \
                     generate_series(2000, 2000 + {rows}) i; UPDATE customers SET name = 'n' || \
                     {number} WHERE id <= {}; DELETE FROM orders WHERE id BETWEEN {number} AND \
                     {number} + 3",
                    1 + number % 40
                ));
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        // Also when an assertion fails: the scope waits for the writer.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _over = Over(&is_over);
        work();
    });
}

#[test]
fn the_page_shows_a_copy_under_load_in_every_form_and_asks_nobody_else() {
    if !has_tool("chromium") {
        return;
    }
    let (_cluster, observed) = busy_run("shop");
    let url = observed.url("/");
    let blessed = std::env::var_os("RHEI_BLESS").is_some();
    let pictures = temp_dir();
    let folder = if blessed { root().join("docs/images") } else { pictures.path().to_owned() };
    fs::create_dir_all(&folder).unwrap();

    under_load(&observed, || {
        let history = Duration::from_secs(from_env("RHEI_PAGE_SECONDS", 1));
        let since = Instant::now();
        wait_until(history + SOON, "there is a history", || {
            let status = observed.status();
            let samples = status["samples"]["at"].as_array().unwrap();
            samples.len() >= 4 && since.elapsed() >= history
        });

        let seen = DESKTOP.open(&url);
        seen.assert_clean(&observed);
        let verdict = seen.text("verdict");
        assert!(verdict.starts_with("Caught up"), "{verdict}");
        assert!(seen.text("database").starts_with("copy of shop"), "{}", seen.text("database"));
        assert!(seen.text("notices").contains("1 table is paused"), "{}", seen.text("notices"));
        assert!(seen.text("notices").contains("public.refused"));
        assert!(seen.text("lag").ends_with(" s") || seen.text("lag").ends_with(" ms"));
        assert!(seen.text("rate").contains("rows/s"), "{}", seen.text("rate"));
        assert!(seen.text("memory").ends_with(" MB"), "{}", seen.text("memory"));
        assert!(seen.text("tables-note").starts_with("3 tables, 1 paused"));
        let table = seen.text("tables-table");
        for word in ["public.orders", "live", "public.refused", "paused", "equal,"] {
            assert!(table.contains(word), "no {word} in {table}");
        }
        assert!(seen.text("ladder").contains("in the copy"));
        assert!(seen.text("facts").contains("max_slot_wal_keep_size"));
        assert!(seen.text("log-lines").contains("the table is paused"));
        assert_eq!(seen.dom.matches("class=\"plot\"").count(), 4);
        assert!(seen.dom.matches("<path class=\"p0\" d=\"M").count() == 4, "{}", seen.dom);

        DESKTOP.picture(&url, &folder.join("status-light.png"));
        DARK.picture(&url, &folder.join("status-dark.png"));
        PHONE.picture(&url, &folder.join("status-phone.png"));
    });
    observed.stop();
}

#[test]
fn the_page_says_that_the_source_is_away_and_that_nothing_was_measured_yet() {
    if !has_tool("chromium") {
        return;
    }
    let cluster = Cluster::start(ClusterOptions::durable());
    let following = Following::of(cluster.database("page_away"));
    let observed = Observed::of(following, SHOP, "ready_lag = \"1s\"");
    observed.wait_until_ready();
    let seen = DESKTOP.open(&observed.url("/"));
    seen.assert_clean(&observed);
    assert!(seen.text("latency-note").starts_with("no transaction lately"));
    assert!(seen.text("log-empty").contains("None since rhei began"));

    cluster.stop_fast();
    wait_until(SOON, "the stream is broken", || observed.get("/readyz").code == 503);
    let seen = DESKTOP.open(&observed.url("/"));
    seen.assert_clean(&observed);
    let verdict = seen.text("verdict");
    assert!(verdict.starts_with("Source away"), "{verdict}");
    assert!(seen.text("tables-table").contains("public.orders"), "what was known stays");
    assert!(seen.text("log-lines").contains("the stream broke"), "{}", seen.text("log-lines"));
}

#[test]
fn the_page_shows_a_first_copy_with_its_progress() {
    if !has_tool("chromium") {
        return;
    }
    let mut following = Following::new("page_copy");
    following.db.execute(SHOP);
    // The pieces of the copy are held up.
    following.rhei = following.rhei.env("FAILPOINTS", "chunk.loading=sleep(20000)");
    let observed = Observed::of(following, "SELECT 1", "");
    wait_until(SOON, "a copy is under way", || observed.status()["copy"]["copies"] == 2);
    wait_until(SOON, "the file says so", || observed.status()["tables"]["states"]["copying"] == 2);

    let seen = PHONE.open(&observed.url("/"));
    seen.assert_clean(&observed);
    assert!(seen.text("verdict").starts_with("First copy under way"), "{}", seen.text("verdict"));
    assert!(seen.text("copy").contains("Copying 2 tables"), "{}", seen.text("copy"));
    assert!(seen.text("tables-table").contains("being copied"));
    assert!(seen.dom.contains("<progress"), "{}", seen.dom);
    assert_eq!(observed.get("/readyz").code, 503);
}

#[test]
fn the_page_can_be_read_without_seeing_it() {
    let page = fs::read_to_string(root().join("src/observe/page.html")).unwrap();
    assert_eq!(page.matches("<h1>").count(), 1);
    assert!(page.contains("<html lang=\"en\">"));
    // Each table has a caption and heads; each field has a name; what changes is announced.
    assert_eq!(page.matches("<table").count(), page.matches("<caption>").count());
    assert!(!page.contains("<th>"), "each head says of what it is: scope");
    for words in [
        "role=\"status\"",
        "aria-label=\"Filter tables by name\"",
        "<legend>",
        "prefers-color-scheme: dark",
        ":focus-visible",
        "aria-pressed",
        "class=\"skip\"",
    ] {
        assert!(page.contains(words), "the page has no {words}");
    }
}

/// Contrast of text and background, as WCAG 2 defines it.
#[test]
fn every_colour_of_text_stands_out_from_what_is_behind_it() {
    let page = fs::read_to_string(root().join("src/observe/page.html")).unwrap();
    let schemes: Vec<&str> = page.match_indices(":root {").map(|(at, _)| &page[at..]).collect();
    assert_eq!(schemes.len(), 2);

    for scheme in schemes {
        let colour = |name: &str| {
            let (_, rest) = scheme.split_once(&format!("--{name}: #")).unwrap();
            let part = |at: usize| {
                let value = u8::from_str_radix(&rest[at..at + 2], 16).unwrap();
                let value = f64::from(value) / 255.0;
                if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * part(0) + 0.7152 * part(2) + 0.0722 * part(4)
        };
        let contrast = |one: &str, other: &str| {
            let (one, other) = (colour(one), colour(other));
            (one.max(other) + 0.05) / (one.min(other) + 0.05)
        };
        for (text, behind) in [
            ("text", "page"),
            ("text", "card"),
            ("soft", "page"),
            ("soft", "card"),
            ("accent", "page"),
            ("accent", "card"),
            ("good", "good-soft"),
            ("warn", "warn-soft"),
            ("bad", "bad-soft"),
            ("text", "good-soft"),
            ("text", "warn-soft"),
            ("text", "bad-soft"),
            ("text", "idle-soft"),
        ] {
            let found = contrast(text, behind);
            assert!(found >= 4.5, "{text} on {behind}: {found:.2}\n{scheme:.400}");
        }
        for line in ["second", "third"] {
            assert!(contrast(line, "card") >= 3.0, "{line}: {:.2}", contrast(line, "card"));
        }
    }
}
