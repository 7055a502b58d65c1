# Everything a developer does, in one place. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The demo says how long it took from here to its first query.
export RHEI_DEMO_STARTED_AT := $(shell date +%s)

ENV := . scripts/env.sh;
TEST ?=
# Of `make install`.
PREFIX ?= /usr/local
DESTDIR ?=
# Of `make test-lake`.
LAKE ?= lake
# Of `make chaos`.
TARGET ?= file
SECONDS ?= 60
SEED ?= 1

.PHONY: help setup build install dist dist-lake dist-check quickstart test test-lake test-matrix chaos demo demo-picture workloads bench bench-latency bench-soak bench-backfill bench-tables bench-verify bench-serve bench-lake clients fuzz fmt lint deny docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing (libduckdb, Postgres, openssl); quiet when nothing is
	@scripts/setup.sh

build: setup ## build the binary
	@$(ENV) cargo build --locked $$RHEI_CARGO_FEATURES

install: ## build for release and install into $(DESTDIR)$(PREFIX)
	@scripts/setup.sh build
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" scripts/dist.sh install

dist: ## an archive for Linux in dist/: binary, libduckdb, completions, man pages, unit, docs, licences, SBOM
	@scripts/setup.sh build
	@scripts/dist.sh

dist-lake: ## an archive of the extensions of DuckDB that a lake takes, for the same prefix
	@scripts/setup.sh
	@scripts/dist.sh lake

dist-check: ## try the archive in bare trees of Debian 12 and 13, under systemd, and as an image (root; minutes)
	@scripts/setup.sh ci
	@scripts/dist/check.sh

quickstart: ## replay docs/quickstart.md in a bare Debian, and say how long each step took (root)
	@scripts/setup.sh ci
	@scripts/quickstart.sh

test: setup ## run every test (one: make test TEST=name)
	@$(ENV) cargo test --locked $$RHEI_CARGO_FEATURES $(if $(TEST),-- $(TEST))

test-matrix: setup ## run the integration tests on Postgres 14 to 18
	@scripts/test-matrix.sh $(TEST)

# What a lake has in common with a file.
LAKE_TESTS = values:: rows:: schema_changes:: crashes:: pgbench_runs:: histories:: --skip a_death_while_the_file_is_made
test-lake: setup ## run the tests of rows, values, schemas, crashes and histories on a lake (LAKE=lake, lake-s3, lake-sqlite)
	@$(ENV) RHEI_TEST_TARGET=$(LAKE) RHEI_TEST_HISTORIES=$${RHEI_TEST_HISTORIES:-60} cargo test --locked $$RHEI_CARGO_FEATURES --test it -- \
		$(or $(TEST),$(LAKE_TESTS))

chaos: setup ## everything goes wrong for a while: make chaos SECONDS=60 SEED=n (TARGET=lake, lake-s3)
	@scripts/setup.sh chaos
	@$(ENV) RHEI_TEST_TARGET=$(TARGET) RHEI_CHAOS_CLOCK=1 RHEI_CHAOS_SECONDS=$(SECONDS) RHEI_CHAOS_SEED=$(SEED) cargo test --locked $$RHEI_CARGO_FEATURES --test it -- \
		--nocapture --exact chaos::a_minute_of_faults_leaves_both_sides_equal

workloads: setup ## the migrations of two applications, followed by a run (minutes; needs Python and a package index)
	@scripts/workloads.sh

demo: build ## throwaway Postgres, live writes, replication, queries; nothing to configure
	@$(ENV) exec "$$CARGO_TARGET_DIR/debug/rhei" demo

demo-picture: build ## the demo, and its output as docs/images/demo.svg
	@$(ENV) mkdir -p docs/images && "$$CARGO_TARGET_DIR/debug/rhei" demo 2>/dev/null | tee /dev/stderr | \
		scripts/demo-svg.py "make demo" >docs/images/demo.svg

bench: setup ## measure decoding and applying alone, then catching up against pg_recvlogical (minutes; builds for release)
	@$(ENV) cargo bench --locked $$RHEI_CARGO_FEATURES --bench stream
	@$(ENV) RHEI_BENCH_DOCS="$(CURDIR)/docs/benchmarks.md" cargo bench --locked $$RHEI_CARGO_FEATURES --bench catchup

bench-latency: setup ## measure the time from commit to visible (2 minutes)
	@$(ENV) RHEI_BENCH_DOCS="$(CURDIR)/docs/benchmarks.md" cargo bench --locked $$RHEI_CARGO_FEATURES --bench latency

bench-soak: setup ## a mixed load for half an hour: memory, file size, reads
	@$(ENV) RHEI_BENCH_DOCS="$(CURDIR)/docs/benchmarks.md" cargo bench --locked $$RHEI_CARGO_FEATURES --bench soak

bench-backfill: setup ## measure the first copy against its floor and against DuckDB's postgres extension
	@$(ENV) scripts/bench-backfill.sh

bench-tables: setup ## measure many small tables (RHEI_BENCH_TABLES="100 1000 10000"; builds for release)
	@$(ENV) RHEI_BENCH_DOCS="$(CURDIR)/docs/benchmarks.md" cargo bench --locked $$RHEI_CARGO_FEATURES --bench tables

bench-verify: setup ## measure rhei verify against the source's own hash of text, and beside the stream (builds for release)
	@$(ENV) RHEI_BENCH_DOCS="$(CURDIR)/docs/benchmarks.md" cargo bench --locked $$RHEI_CARGO_FEATURES --bench verify

bench-serve: setup ## measure readers of a copy that is written meanwhile, and what they cost (builds for release)
	@$(ENV) RHEI_BENCH_DOCS="$(CURDIR)/docs/benchmarks.md" cargo bench --locked $$RHEI_CARGO_FEATURES --bench serve

bench-lake: setup ## measure a lake against a file, then 40 minutes of mixed load (RHEI_BENCH_MINUTES; builds for release)
	@$(ENV) RHEI_BENCH_DOCS="$(CURDIR)/docs/benchmarks.md" cargo bench --locked $$RHEI_CARGO_FEATURES --bench lake

clients: setup ## install clients of Python, and hold each against the source
	@scripts/clients.sh

fuzz: setup ## bad bytes for every reader (RUNS=20000 of each; SECONDS_EACH=10 ends sooner)
	@RUNS="$(RUNS)" SECONDS_EACH="$(SECONDS_EACH)" scripts/fuzz.sh $(TEST)

fmt: ## format the code
	@cargo fmt

lint: setup ## formatting and clippy, as CI does
	@$(ENV) cargo fmt --check && cargo clippy --locked --all-targets $$RHEI_CARGO_FEATURES -- -D warnings

deny: ## licences, sources and advisories of the dependencies
	@scripts/setup.sh ci
	@scripts/deny.sh

docs: setup ## build the API documentation; warnings are errors
	@$(ENV) RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps $$RHEI_CARGO_FEATURES

clean: ## remove what the demo left and what cargo built; keeps the downloaded libraries
	@$(ENV) cargo clean
	@rm -rf demo.duckdb demo.duckdb.wal demo-pg "$${XDG_CACHE_HOME:-$$HOME/.cache}/rhei-demo"
