#!/usr/bin/env bash
# Feeds bad bytes to everything that reads what a server or a user wrote: libFuzzer, on the stable toolchain.
#
#   scripts/fuzz.sh [TARGET ...]     all targets, or these
#
# RUNS          executions of each target; 20000 unless set
# SECONDS_EACH  or so many seconds of each, whichever ends first; no limit unless set
#
# What a target finds is written to fuzz/artifacts and makes this fail; it becomes a test, next to the code that was mended.
# Inputs that reached new code are kept outside the clone and are where the next run goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh

runs="${RUNS:-20000}"
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(frames pgoutput copy_binary text_values binary_values config statements)
triple="$(rustc -vV | sed -n 's/^host: //p')"
# A target folder of its own: other flags would have everything built again, here and there in turn.
export CARGO_TARGET_DIR="$CARGO_TARGET_DIR/fuzz"
corpus="${RHEI_FUZZ_CORPUS:-$RHEI_CACHE/fuzz-corpus}"

# What `cargo fuzz build --sanitizer none` passes on; coverage needs no nightly compiler, only the sanitizers do.
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
flags+=" -Cllvm-args=-sanitizer-coverage-trace-compares"
[ -z "${DUCKDB_LIB_DIR:-}" ] || flags+=" -Clink-arg=-Wl,-rpath,$DUCKDB_LIB_DIR"
# With --target, build scripts and macros are built without the flags.
# shellcheck disable=SC2086
RUSTFLAGS="$flags" cargo build --locked --release --manifest-path fuzz/Cargo.toml --target "$triple" \
  ${RHEI_CARGO_FEATURES:+--features bundled} "${targets[@]/#/--bin=}"

# Longer inputs find little more and take long.
max_len() {
  case "$1" in
    pgoutput) echo 1536 ;;
    text_values | binary_values) echo 96 ;;
    *) echo 256 ;;
  esac
}

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for target in "${targets[@]}"; do
  binary="$CARGO_TARGET_DIR/$triple/release/$target"
  mkdir -p "$corpus/$target" "fuzz/artifacts/$target"
  RHEI_FUZZ_SEEDS="$work/seeds/$target" "$binary" >"$work/$target.log" 2>&1 ||
    { cat "$work/$target.log" >&2; echo "fuzz: $target cannot write its seeds" >&2; exit 1; }
  printf 'fuzz: %s\n' "$target" >&2
  options=(-runs="$runs" -max_len="$(max_len "$target")" -len_control=20 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1)
  [ -z "${SECONDS_EACH:-}" ] || options+=(-max_total_time="$SECONDS_EACH")
  # From an empty folder, so that a file rhei.toml of somebody is not read.
  mkdir -p "$work/empty"
  artifacts="$PWD/fuzz/artifacts/$target/"
  if ! (cd "$work/empty" && exec "$binary" "${options[@]}" -artifact_prefix="$artifacts" \
    "$corpus/$target" "$work/seeds/$target") >"$work/$target.log" 2>&1 </dev/null; then
    tail -n 60 "$work/$target.log" >&2
    printf 'fuzz: %s found something, see above and %s\n' "$target" "$artifacts" >&2
    exit 1
  fi
  grep -E 'DONE|stat::(number_of_executed_units|average_exec_per_sec|peak_rss_mb)' "$work/$target.log" >&2
done
