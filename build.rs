//! Tells the linker where the binary finds libduckdb at run time, and the binary what it was built
//! from.

use std::{env, path::Path, process::Command};

fn main() {
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    find_libduckdb(is_release);

    println!("cargo:rustc-env=RHEI_COMMIT={}", commit(is_release));
    println!("cargo:rustc-env=RHEI_TARGET={}", env::var("TARGET").unwrap_or_default());
}

/// An installed binary finds the library in `lib/rhei` beside its own `bin`. What stays on the machine
/// that built it finds the library where it is kept; a binary for release does not name that place,
/// which may be somebody else's on another machine.
fn find_libduckdb(is_release: bool) {
    println!("cargo:rerun-if-env-changed=DUCKDB_LIB_DIR");
    println!("cargo:rustc-link-arg-bins=-Wl,-rpath,{}", beside_bin());

    let Ok(folder) = env::var("DUCKDB_LIB_DIR") else { return };
    if is_release {
        for kind in ["tests", "benches", "examples"] {
            println!("cargo:rustc-link-arg-{kind}=-Wl,-rpath,{folder}");
        }
    } else {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}

fn beside_bin() -> &'static str {
    match env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("macos") => "@executable_path/../lib/rhei",
        _ => "$ORIGIN/../lib/rhei",
    }
}

/// `RHEI_COMMIT`, or for a release the commit of the clone that this package is in; `unknown`
/// outside of a clone. A build for development does not ask git: each commit would build everything
/// again.
fn commit(is_release: bool) -> String {
    println!("cargo:rerun-if-env-changed=RHEI_COMMIT");
    match env::var("RHEI_COMMIT") {
        Ok(commit) if !commit.is_empty() => return commit,
        _ if !is_release => return "unknown (a build for development)".to_owned(),
        _ => {}
    }

    let folder = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let top = git(&["rev-parse", "--show-toplevel"]);
    // An unpacked archive may lie inside of another project's clone.
    let is_ours = top.is_some_and(|top| same(Path::new(&top), Path::new(&folder)));
    let described = || git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    let Some(commit) = is_ours.then(described).flatten() else { return "unknown".to_owned() };

    for file in ["logs/HEAD", "index"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    commit
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn same(one: &Path, other: &Path) -> bool {
    one.canonicalize().ok().is_some_and(|one| other.canonicalize().is_ok_and(|other| one == other))
}
