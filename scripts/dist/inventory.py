#!/usr/bin/env python3
"""What is in a rhei binary: an SBOM (CycloneDX 1.5), and the licences of all that is linked.

    inventory.py sbom TARGET [CARGO OPTION ...]       to standard output
    inventory.py licences TARGET [CARGO OPTION ...]

Both are made of `cargo metadata` and of what lies in the registry's folder, so nothing is asked of the network. Crates that
only the build needs are marked as excluded; crates of tests are left out. SOURCE_DATE_EPOCH is the time in the SBOM.
"""
import datetime
import hashlib
import json
import os
import pathlib
import subprocess
import sys

DUCKDB = "1.5.5"
HERE = pathlib.Path(__file__).parent
# Some crates of a repository leave the text to the repository; these kinds have no text of their own, or one per author.
TEXT_NAMES = ("license", "licence", "copying", "notice", "unlicense", "copyright")


def crates(target, options):
    """The packages that rhei is made of, and whether each is linked: [(package, is_linked)]."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target, *options]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]

    linked, built = set(), set()
    open_ids = [(root, True)]
    while open_ids:
        crate, is_linked = open_ids.pop()
        seen = linked if is_linked else built
        if crate in seen:
            continue
        seen.add(crate)
        is_macro = any("proc-macro" in kind["kind"] for kind in packages[crate]["targets"])
        for dependency in nodes[crate]["deps"]:
            kinds = {kind["kind"] for kind in dependency["dep_kinds"]}
            if None in kinds:
                open_ids.append((dependency["pkg"], is_linked and not is_macro))
            if "build" in kinds:
                open_ids.append((dependency["pkg"], False))

    ids = sorted(linked | built, key=lambda crate: (packages[crate]["name"], packages[crate]["version"]))
    return packages[root], nodes, [(packages[crate], crate in linked) for crate in ids if crate != root]


def is_macro(package):
    return any("proc-macro" in target["kind"] for target in package["targets"])


def checksums():
    """The SHA-256 of each crate, from Cargo.lock."""
    found, name, version = {}, "", ""
    for line in (HERE.parent.parent / "Cargo.lock").read_text().splitlines():
        key, _, value = line.partition(" = ")
        value = value.strip('"')
        if key == "name":
            name = value
        elif key == "version":
            version = value
        elif key == "checksum":
            found[name, version] = value
    return found


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"


def sbom(root, nodes, found, is_bundled):
    sums = checksums()
    by_id = {package["id"]: purl(package) for package, _ in found} | {root["id"]: purl(root)}
    components = []
    for package, is_linked in found:
        component = {
            "type": "library",
            "bom-ref": purl(package),
            "name": package["name"],
            "version": package["version"],
            "scope": "required" if is_linked and not is_macro(package) else "excluded",
            "purl": purl(package),
            "licenses": [{"expression": (package["license"] or "NOASSERTION").replace("/", " OR ")}],
        }
        checksum = sums.get((package["name"], package["version"]))
        if checksum:
            component["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        if package["repository"]:
            component["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
        components.append(component)

    duckdb = {
        "type": "library",
        "bom-ref": f"pkg:github/duckdb/duckdb@v{DUCKDB}",
        "name": "duckdb",
        "version": DUCKDB,
        "scope": "required",
        "purl": f"pkg:github/duckdb/duckdb@v{DUCKDB}",
        "licenses": [{"expression": "MIT"}],
    }
    library = pathlib.Path(os.environ.get("DUCKDB_LIB_DIR", "/nonexistent")) / "libduckdb.so"
    if not is_bundled and library.exists():
        duckdb["hashes"] = [{"alg": "SHA-256", "content": hashlib.sha256(library.read_bytes()).hexdigest()}]
    components.append(duckdb)

    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    moment = datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc)
    edges = [
        {"ref": by_id[crate], "dependsOn": sorted({by_id[to] for to in nodes[crate]["dependencies"] if to in by_id})}
        for crate in sorted(by_id, key=by_id.get)
    ]
    for edge in edges:
        if edge["ref"].startswith("pkg:cargo/libduckdb-sys@"):
            edge["dependsOn"].append(duckdb["bom-ref"])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                "bom-ref": purl(root),
                "name": root["name"],
                "version": root["version"],
                "purl": purl(root),
                "licenses": [{"expression": root["license"]}],
            },
        },
        "components": components,
        "dependencies": edges,
    }


def texts_of(package):
    """The licence files of a package: [(name, text)]."""
    folder = pathlib.Path(package["manifest_path"]).parent
    names = sorted(path for path in folder.iterdir() if path.name.lower().startswith(TEXT_NAMES) and path.is_file())
    if package["license_file"]:
        names.append(folder / package["license_file"])
    return [(path.name, path.read_text(errors="replace").strip()) for path in dict.fromkeys(names) if path.exists()]


def licences(root, found):
    """All licences, each text once, with the crates that it is of."""
    by_text, without = {}, []
    for package, is_linked in found:
        if not is_linked or is_macro(package):
            continue
        title = f"{package['name']} {package['version']} ({package['license']})"
        texts = texts_of(package)
        for _, text in texts:
            by_text.setdefault("\n".join(text.split()), (text, []))[1].append(title)
        if not texts:
            authors = ", ".join(package["authors"]) or "its authors"
            without.append(f"{title}, by {authors}; {package['repository'] or 'no repository'}")

    rule = "=" * 100
    print(f"Licences of what is linked into rhei {root['version']}. rhei itself is under Apache-2.0: see LICENSE.")
    print("A crate under several licences is used under any of them.\n")
    print("Crates whose packages hold no text of their licence; the text of its kind is below:")
    for line in without:
        print(f"  {line}")
    for text, titles in sorted(by_text.values(), key=lambda entry: entry[1]):
        print(f"\n{rule}")
        print("\n".join(dict.fromkeys(titles)))
        print(f"{rule}\n\n{text}")
    print(f"\n{rule}\nDuckDB {DUCKDB} and what is linked into it\n{rule}\n")
    print((HERE / "duckdb-licences.txt").read_text().strip())


def main():
    what, target, *options = sys.argv[1:]
    root, nodes, found = crates(target, options)
    if what == "sbom":
        json.dump(sbom(root, nodes, found, "bundled" in " ".join(options)), sys.stdout, indent=1, ensure_ascii=False)
        print()
    elif what == "licences":
        licences(root, found)
    else:
        sys.exit(__doc__)


main()
