//! rhei.toml and the environment: an error names what is wrong, whatever was written, and no
//! pattern takes for ever.
#![no_main]

mod common;

use std::path::Path;

use libfuzzer_sys::fuzz_target;

use rhei::internals::{
    config::{ByteSize, Config, Inputs, Span, parse},
    pgoutput::QualifiedName,
    pipeline::options::TablePattern,
};

fuzz_target!(
    init: common::write_seeds(seeds),
    |bytes: &[u8]| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        common::within_memory(bytes.len(), 1 << 20, 2000, || {
            match parse(text, Path::new("rhei.toml")) {
                Ok(settings) => {
                    for pattern in settings.source.tables.iter().chain(&settings.source.exclude) {
                        let again: TablePattern = pattern.to_string().parse().expect("what was \
                             printed can be read");
                        assert_eq!(&again, pattern);
                        for name in ["orders", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ää*"] {
                            let _ = pattern.matches(&QualifiedName::new("public", name));
                        }
                    }
                }
                Err(error) => {
                    let message = error.to_string();
                    assert!(message.contains("rhei.toml"), "{message}");
                }
            }
            // Each line by itself: a value of the environment, and what the values of the file are
            // made of.
            for line in text.lines() {
                let _ = (line.parse::<ByteSize>(), line.parse::<Span>(), line.parse::<rhei::internals::Lsn>());
                if let Ok(pattern) = line.parse::<TablePattern>() {
                    let _ = pattern.matches(&QualifiedName::new("public", "a".repeat(63)));
                }
            }
            let variables: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("RHEI_")?.split_once('=')).collect();
            if !variables.is_empty() {
                let environment = variables.iter().map(|(name, value)| (format!("RHEI_{name}"), (*value).to_owned()));
                let _ = Config::load(&Inputs { environment: environment.collect(), ..Inputs::default() });
            }
        });
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let example = include_str!("../../rhei.toml.example");
    let mut seeds = vec![example.as_bytes().to_vec(), example.replace("#: ", "").into_bytes()];
    // Sections by themselves, so that mutations come to each soon.
    seeds.extend(
        example.replace("#: ", "").split("\n[").map(|section| format!("[{section}").into_bytes()),
    );
    seeds.extend(
        [
            "RHEI_SYNC_INTERVAL=1s\nRHEI_SYNC_MEMORY_LIMIT=512MB\nRHEI_SYNC_MAX_BATCH_ROWS=10",
            "RHEI_SOURCE_PUBLICATION=p\nRHEI_SOURCE_SLOT=s\nRHEI_TARGET_THREADS=2\nRHEI_TARGET_DUCKDB_MEMORY_LIMIT=1GiB",
            "RHEI_BACKFILL_WORKERS=3\nRHEI_BACKFILL_RATE_LIMIT=50MB\nRHEI_BACKFILL_SNAPSHOT_WARNING=1h 30m",
            "public.*a*a*a*b\n18446744073709551615GiB\n16/B374D848\n99999999999999999999y",
            "[source]\npublication = [\"a\", \"b\"]\nurl = \"postgresql://u:p@h/d\"\ntabels = \
             [\"x\"]",
            "[[[[[[[[[[[[[[[[[[[[[[[[", "a = [[[[[[[[[[[[[[[[[[[[[[[[", "a.b.c.d.e.f.g.h = \
                 {a={a={a={}}}}",
        ]
        .map(|text| text.as_bytes().to_vec()),
    );
    seeds
}
