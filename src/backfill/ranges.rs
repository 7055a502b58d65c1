//! Ranges of pages that are copied, each in one piece.

use std::collections::BTreeMap;

use crate::{
    change::TableSpec,
    pipeline::Context,
    source::{
        catalog::SourceTable,
        quote::{quote_identifier, quote_table},
    },
};

/// Pages of 8 KiB in one chunk: from 16 to 128 MiB of heap. A chunk is a transaction in the target,
/// and small chunks leave small row groups there.
const PAGE_BYTES: u64 = 8192;

const MIN_PAGES: u64 = 2048;

const MAX_PAGES: u64 = 16384;

const CHUNKS_PER_WORKER: u64 = 4;

/// Pages of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pages {
    pub(super) first: u64,
    /// None: the range goes to the end, wherever that is.
    pub(super) next: Option<u64>,
}

/// A range of pages of a table that holds rows.
#[derive(Debug, Clone)]
pub(super) struct Range {
    pub leaf: u32,
    pub(super) leaf_name: String,
    pub(super) pages: Pages,
    pub query: String,
}

impl Range {
    /// Returns whether the range is all of its table or partition.
    pub fn is_whole_leaf(&self) -> bool {
        self.pages == Pages { first: 0, next: None }
    }
}

/// Returns the COPY statements that together read each page of the table once that is not `done`.
pub(super) fn ranges(
    table: &SourceTable,
    spec: &TableSpec,
    done: &BTreeMap<u32, Vec<Pages>>,
    context: &Context,
) -> Vec<Range> {
    let columns: Vec<String> = spec
        .columns
        .iter()
        .map(|column| column.mapping.copy_select(&quote_identifier(&column.name)))
        .collect();
    let columns = columns.join(", ");

    let filter = table.row_filter.as_ref().map(|filter| format!("({filter})"));
    let all = table.pages();

    // Each worker gets several ranges, so that all workers are busy to the end.
    let size = match context.options.chunk_bytes {
        Some(bytes) => (bytes / PAGE_BYTES).max(1),
        None => (all / (context.options.workers.max(1) as u64 * CHUNKS_PER_WORKER))
            .clamp(MIN_PAGES, MAX_PAGES),
    };

    let mut ranges = Vec::new();
    for leaf in &table.leaves {
        let from = quote_table(&leaf.name);
        let none = Vec::new();

        for pages in
            missing_ranges(done.get(&leaf.oid).unwrap_or(&none), leaf.pages.unwrap_or(0), size)
        {
            let mut conditions = Vec::new();
            if pages.first > 0 {
                conditions.push(format!("ctid >= '({},0)'", pages.first));
            }

            if let Some(next) = pages.next {
                conditions.push(format!("ctid < '({next},0)'"));
            }

            conditions.extend(filter.clone());
            let filter = if conditions.is_empty() {
                String::new()
            } else {
                format!(" WHERE {}", conditions.join(" AND "))
            };

            let query = format!(
                "COPY (SELECT {columns} FROM ONLY {from}{filter}) TO STDOUT (FORMAT binary)"
            );

            ranges.push(Range { leaf: leaf.oid, leaf_name: leaf.name.to_string(), pages, query });
        }
    }
    ranges
}

/// Returns ranges of about `size` pages that hold every page that `done` does not. The last range
/// is open, since the table may have grown before the snapshot was taken.
pub(super) fn missing_ranges(done: &[Pages], pages: u64, size: u64) -> Vec<Pages> {
    let mut done = done.to_vec();
    done.sort_by_key(|pages| pages.first);

    let mut missing = Vec::new();
    let mut first = 0;
    let mut done = done.into_iter();

    loop {
        let next_done = done.next();
        let until = next_done.map(|pages| pages.first);

        while until.is_none_or(|until| first < until) {
            // The last range is not a sliver.
            let next = Some(first + size)
                .filter(|&next| next + size / 4 < until.unwrap_or(pages))
                .or(until);
            missing.push(Pages { first, next });
            match next {
                Some(next) => first = next,
                None => return missing,
            }
        }

        match next_done {
            Some(Pages { next: Some(next), .. }) => first = first.max(next),
            _ => return missing,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        backfill::samples::{context, leaf, planned, table},
        pipeline::Options,
    };

    fn range(first: u64, next: Option<u64>) -> Pages {
        Pages { first, next }
    }

    #[test]
    fn an_empty_table_is_one_open_range() {
        assert_eq!(missing_ranges(&[], 0, 100), [range(0, None)]);
        assert_eq!(missing_ranges(&[range(0, None)], 500, 100), []);
    }

    #[test]
    fn missing_pages_are_cut_by_size_and_leave_no_sliver() {
        let cases = [
            // The last range takes up to a quarter of the size more.
            (vec![], 225, vec![range(0, Some(100)), range(100, None)]),
            (vec![], 226, vec![range(0, Some(100)), range(100, Some(200)), range(200, None)]),
            (vec![range(120, None)], 500, vec![range(0, Some(120))]),
            (vec![range(0, Some(126))], 126, vec![range(126, None)]),
            (
                vec![range(300, Some(400)), range(0, Some(100))],
                500,
                vec![range(100, Some(200)), range(200, Some(300)), range(400, None)],
            ),
        ];

        for (done, pages, expected) in cases {
            assert_eq!(missing_ranges(&done, pages, 100), expected, "{done:?} of {pages} pages");
        }
    }

    proptest! {
        /// Whatever was done before, the rest holds every other page once, and is open at the end.
        #[test]
        fn done_and_missing_ranges_are_the_table(
            cuts in proptest::collection::btree_set(1_u64..1000, 0..8),
            kept in any::<u16>(),
            size in 1_u64..400,
        ) {
            let mut all = Vec::new();
            let mut first = 0;
            for cut in cuts {
                all.push(range(first, Some(cut)));
                first = cut;
            }
            all.push(range(first, None));
            let is_kept = |(at, _): &(usize, Pages)| kept >> at & 1 == 1;
            let done: Vec<Pages> =
                all.into_iter().enumerate().filter(is_kept).map(|(_, pages)| pages).collect();

            let mut together = missing_ranges(&done, 900, size);
            together.extend(&done);
            together.sort_by_key(|pages| pages.first);

            let mut next = Some(0);
            for pages in together {
                prop_assert_eq!(Some(pages.first), next);
                next = pages.next;
                prop_assert!(next.is_none_or(|next| next > pages.first));
            }
            prop_assert_eq!(next, None);
        }
    }

    /// Returns the ranges of a table of two partitions, of which each has these pages.
    fn ranges_of(pages: u64, workers: usize, chunk_bytes: Option<u64>) -> Vec<Range> {
        let table = SourceTable { leaves: vec![leaf(7, pages), leaf(8, pages)], ..table(1) };
        let context = context(Options { workers, chunk_bytes, ..Options::sample() });
        ranges(&table, &planned(&table), &BTreeMap::new(), &context)
    }

    #[test]
    fn a_chunk_reads_its_pages_of_one_partition_and_the_rows_that_the_filter_lets_through() {
        let table = SourceTable {
            leaves: vec![leaf(7, 300), leaf(8, 0)],
            row_filter: Some("id > 1 OR note IS NULL".to_owned()),
            ..table(1)
        };
        let context = context(Options { chunk_bytes: Some(100 * PAGE_BYTES), ..Options::sample() });
        let done = BTreeMap::from([(7, vec![range(100, Some(200))])]);

        let found: Vec<String> = ranges(&table, &planned(&table), &done, &context)
            .into_iter()
            .map(|range| range.query)
            .collect();

        let query = |from: &str, pages: &str| {
            format!(
                "COPY (SELECT \"id\", \"note\" FROM ONLY \"public\".\"{from}\" WHERE \
                 {pages}(id > 1 OR note IS NULL)) TO STDOUT (FORMAT binary)"
            )
        };
        assert_eq!(
            found,
            [
                query("t7", "ctid < '(100,0)' AND "),
                query("t7", "ctid >= '(200,0)' AND "),
                query("t8", ""),
            ]
        );
    }

    #[test]
    fn chunks_are_cut_by_the_settings_or_so_that_each_worker_gets_several() {
        for (name, pages, workers, chunk_bytes, expected) in [
            ("a chunk has 16 MiB at least", 3000, 8, None, Some(2048)),
            ("four chunks for each worker", 20_000, 2, None, Some(5000)),
            ("a chunk has 128 MiB at most", 1_000_000, 1, None, Some(16_384)),
            ("the settings say how much", 20_000, 2, Some(100 * PAGE_BYTES), Some(100)),
            ("a chunk has a page at least", 20_000, 2, Some(1), Some(1)),
            ("a small partition is one chunk", 100, 2, None, None),
        ] {
            let first = ranges_of(pages, workers, chunk_bytes).first().map(|range| range.pages);
            assert_eq!(first, Some(range(0, expected)), "{name}");
        }
    }
}
