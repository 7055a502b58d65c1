# shellcheck shell=bash
# Where everything that outlives a clone is kept. Sourced by the Makefile, .ci/run and scripts/setup.sh.

export RHEI_CACHE="${RHEI_CACHE:-$HOME/.cache/rhei}"

# Outside the clone, so that a fresh clone on a machine that has built once does not build again.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$RHEI_CACHE/target}"

# Postgres refuses to run as root, so under root its trees must be where the user postgres can read them,
# which a cache under root's home is not.
if [ -z "${RHEI_PG_CACHE:-}" ]; then
  if [ "$(id -u)" = 0 ]; then RHEI_PG_CACHE=/var/cache/rhei/postgres; else RHEI_PG_CACHE="$RHEI_CACHE/postgres"; fi
fi
export RHEI_PG_CACHE

# The prebuilt libduckdb; or, when setup could not fetch it, DuckDB compiled from source.
rhei_duckdb_dir="$RHEI_CACHE/duckdb-1.5.5"
if [ -n "${DUCKDB_LIB_DIR:-}" ] || [ -f "$rhei_duckdb_dir/libduckdb.so" ] || [ -f "$rhei_duckdb_dir/libduckdb.dylib" ]; then
  export DUCKDB_LIB_DIR="${DUCKDB_LIB_DIR:-$rhei_duckdb_dir}"
  # The binaries carry an rpath; documentation tests do not.
  export LD_LIBRARY_PATH="$DUCKDB_LIB_DIR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  export RHEI_CARGO_FEATURES=""
else
  export RHEI_CARGO_FEATURES="--features bundled"
fi
# The extensions of DuckDB that a lake takes.
export RHEI_EXTENSIONS="${RHEI_EXTENSIONS:-$rhei_duckdb_dir/extensions}"
unset rhei_duckdb_dir

export PATH="$RHEI_CACHE/tools/bin:$PATH"
