#!/usr/bin/env bash
# Packages rhei: the binary, libduckdb, completions, man pages, the unit, docs, licences, an SBOM.
#
#   scripts/dist.sh                  dist/rhei-VERSION-OS-ARCH.tar.gz, and its SHA-256 beside it
#   scripts/dist.sh install          the same files into $DESTDIR$PREFIX (/usr/local unless set)
#   scripts/dist.sh lake             dist/rhei-lake-VERSION-OS-ARCH.tar.gz: the extensions of DuckDB that a lake takes
#
# RHEI_DIST_PROFILE   release (the default), or dev: quicker to build, slower to run
# RHEI_DIST_BINARY    a binary that is there already, instead of building one
# RHEI_DIST_OUT       the folder of the archive; dist in the clone unless set
#
# The archive is the same, byte for byte, whenever it is made of the same binary: names are sorted, owners and times are fixed
# (SOURCE_DATE_EPOCH; that of the commit unless set).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
umask 022

say() { printf 'dist: %s\n' "$*" >&2; }
version="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)"
target="$(rustc -vV | sed -n 's/^host: //p')"
name="rhei-$version-$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)"
profile="${RHEI_DIST_PROFILE:-release}"
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}"
# shellcheck disable=SC2206
cargo_options=(--locked $RHEI_CARGO_FEATURES)

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

build() {
  local profile_option=(--release) folder=release
  [ -z "${RHEI_DIST_BINARY:-}" ] || { binary="$RHEI_DIST_BINARY"; return; }
  if [ "$profile" = dev ]; then profile_option=() folder=debug; fi
  say "building ($profile)"
  cargo build "${cargo_options[@]}" "${profile_option[@]}" --bin rhei
  binary="$CARGO_TARGET_DIR/$folder/rhei"
}

# What `cargo deny` knew when this was packaged. The database of advisories comes with it when it could be reached.
write_advisories() { # folder
  local log="$work/deny.log" database
  {
    echo "rhei $version was checked with cargo deny: deny.toml says what is allowed."
    if ! command -v cargo-deny >/dev/null; then
      echo "cargo deny was not there, so nothing was checked."
      return
    fi
    cargo deny --version
    if cargo deny --locked check bans licenses sources </dev/null >"$log" 2>&1; then grep ' ok' "$log"; else tail -n 3 "$log"; fi
    if timeout 60 cargo deny fetch db </dev/null >"$log" 2>&1; then
      if cargo deny --locked check advisories </dev/null >"$log" 2>&1; then grep ' ok' "$log"; else cat "$log"; fi
      for database in "${CARGO_HOME:-$HOME/.cargo}"/advisory-dbs/*/; do
        if [ ! -d "$database/.git" ]; then continue; fi
        echo "advisory database: $(git -C "$database" log -1 --format='%H of %cI'), in advisory-db.tar.gz"
        git -C "$database" archive --format=tar HEAD | gzip -n9 >"$1/advisory-db.tar.gz"
      done
    else
      echo "advisories NOT checked: their database could not be reached. Cargo.lock is here, so that they can be."
    fi
  } >"$1/cargo-deny.txt"
  cp Cargo.lock deny.toml "$1"
}

stage() { # folder
  local root="$1" rhei
  install -D -m 0755 "$binary" "$root/bin/rhei"
  rhei="$root/bin/rhei"
  if [ "$(uname -s)" = Linux ]; then strip --strip-debug "$rhei"; fi
  if [ -z "$RHEI_CARGO_FEATURES" ]; then
    for library in libduckdb.so libduckdb.dylib; do
      if [ -f "$DUCKDB_LIB_DIR/$library" ]; then install -D -m 0755 "$DUCKDB_LIB_DIR/$library" "$root/lib/rhei/$library"; fi
    done
  fi

  # From here on the package is used as its users will.
  mkdir -p "$root"/share/{man/man1,bash-completion/completions,zsh/site-functions,fish/vendor_completions.d,doc/rhei}
  env -u LD_LIBRARY_PATH "$rhei" man "$root/share/man/man1"
  env -u LD_LIBRARY_PATH "$rhei" completions bash >"$root/share/bash-completion/completions/rhei"
  env -u LD_LIBRARY_PATH "$rhei" completions zsh >"$root/share/zsh/site-functions/_rhei"
  env -u LD_LIBRARY_PATH "$rhei" completions fish >"$root/share/fish/vendor_completions.d/rhei.fish"

  install -D -m 0644 scripts/dist/sysusers.conf "$root/lib/sysusers.d/rhei.conf"
  mkdir -p "$root/lib/systemd/system"
  sed "s#^ExecStart=/usr/local/#ExecStart=${PREFIX:-/usr/local}/#" scripts/dist/rhei.service >"$root/lib/systemd/system/rhei.service"

  local doc="$root/share/doc/rhei"
  cp -R README.md ARCHITECTURE.md CHANGELOG.md LICENSE rhei.toml.example docs examples schemas "$doc"
  # shellcheck disable=SC2086
  python3 scripts/dist/inventory.py sbom "$target" $RHEI_CARGO_FEATURES >"$doc/rhei.cdx.json"
  # shellcheck disable=SC2086
  python3 scripts/dist/inventory.py licences "$target" $RHEI_CARGO_FEATURES >"$doc/licences.txt"
  write_advisories "$doc"
  chmod -R u=rwX,go=rX "$root"
}

# The extensions as their makers have signed them; DuckDB loads no others.
stage_extensions() { # folder
  local name
  for name in $(awk '!/^#/ { print $2 }' scripts/extensions.sha256 | sort -u); do
    [ -f "$RHEI_EXTENSIONS/$name.duckdb_extension" ] || { say "$name is missing: make setup fetches it"; exit 1; }
    install -D -m 0644 "$RHEI_EXTENSIONS/$name.duckdb_extension" "$1/lib/rhei/extensions/$name.duckdb_extension"
  done
  chmod -R u=rwX,go=rX "$1"
}

archive() { # folder
  local out="${RHEI_DIST_OUT:-dist}"
  mkdir -p "$out"
  tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=gnu \
    -C "$1" -cf - "$name" | gzip -n9 >"$out/.$name.tar.gz"
  mv "$out/.$name.tar.gz" "$out/$name.tar.gz"
  (cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
  say "$out/$name.tar.gz ($(du -h "$out/$name.tar.gz" | cut -f1))"
}

case "${1:-archive}" in
  lake)
    name="${name/rhei-/rhei-lake-}"
    stage_extensions "$work/$name"
    archive "$work"
    ;;
  archive)
    build
    stage "$work/$name"
    archive "$work"
    ;;
  install)
    build
    prefix="${PREFIX:-/usr/local}"
    stage "$work/$name"
    mkdir -p "${DESTDIR:-}$prefix"
    (cd "$work/$name" && find . -type f -exec install -D -m 0644 {} "${DESTDIR:-}$prefix/{}" \;)
    chmod 0755 "${DESTDIR:-}$prefix/bin/rhei"
    say "installed into ${DESTDIR:-}$prefix"
    ;;
  *)
    sed -n '2,14p' "$0"
    exit 2
    ;;
esac
