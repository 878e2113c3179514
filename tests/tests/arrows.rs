//! The architecture as a test: which crate may know which, and what may stand at the top of the repository.
//!
//! Invariant: a new arrow between crates, or a heavy library under an operator, does not come in unseen. Whoever adds one
//! changes a table below, and ARCHITECTURE.md with it.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "clippy exempts test functions, but not what they call"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::process::Command;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};

/// Each crate of ours with those that it may know. Dependencies of its tests count too.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("forebay-schemas", &[]),
    ("forebay-operator", &["forebay-schemas"]),
    ("forebay-calls", &["forebay-operator", "forebay-schemas"]),
    ("forebay-stores", &["forebay-operator", "forebay-schemas"]),
    ("forebay-operators", &["forebay-calls", "forebay-operator", "forebay-schemas", "forebay-stores"]),
    // Numbers in, numbers out.
    ("forebay-estimators", &[]),
    // A Kafka broker knows records as bytes only.
    ("forebay-broker", &[]),
    // Nor does a model server know who calls it.
    ("forebay-simulator", &[]),
    ("forebay-plan", &["forebay-schemas"]),
    ("forebay-telemetry", &["forebay-operator", "forebay-schemas"]),
    ("forebay-runtime", &["forebay-operator", "forebay-plan", "forebay-schemas", "forebay-telemetry"]),
    // Not an operator: whoever edits one never links this again.
    (
        "forebay-analytics",
        &["forebay-broker", "forebay-estimators", "forebay-runtime", "forebay-schemas", "forebay-telemetry"],
    ),
    ("forebay", EVERYTHING),
    ("forebay-tests", EVERYTHING),
];
const EVERYTHING: &[&str] = &["*"];

/// What must not be found anywhere below a crate, however far down. A name stands for all packages that begin with it.
const NEVER_BELOW: &[(&str, &[&str])] = &[
    // Operators run in any host, and rebuild in seconds.
    (
        "forebay-operators",
        &["rdkafka", "axum", "opentelemetry", "datafusion", "deltalake", "forebay-runtime"],
    ),
    // Whoever can add can use them: an engine of SQL, a test, a notebook.
    ("forebay-estimators", &["rdkafka", "datafusion", "deltalake", "arrow", "tokio", "serde"]),
    // The loop drives steps that it cannot name.
    ("forebay-runtime", &["forebay-operators", "forebay-calls", "forebay-stores", "datafusion", "deltalake"]),
    // Over half an hour of build: it belongs into a binary of its own.
    ("forebay", &["datafusion", "deltalake"]),
];

/// What may stand at the top of the repository, beside dotfiles.
const TOP_LEVEL: &[&str] = &[
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "deploy",
    "docker-compose.yml",
    "operators",
    "pipelines",
    "schemas",
    "tests",
];

#[test]
fn each_crate_knows_only_those_below_it() {
    let metadata = metadata();
    let table: BTreeMap<&str, &[&str]> = MAY_KNOW.iter().copied().collect();
    let ours: BTreeSet<&str> =
        metadata.workspace_packages().iter().map(|package| package.name.as_str()).collect();
    let mut faults = Vec::new();
    for package in metadata.workspace_packages() {
        let name = package.name.as_str();
        let Some(allowed) = table.get(name) else {
            faults.push(format!("{name} has no row in MAY_KNOW"));
            continue;
        };
        for dependency in &package.dependencies {
            let known = dependency.name.as_str();
            if ours.contains(known) && !allowed.contains(&known) && *allowed != EVERYTHING {
                faults.push(format!("{name} must not depend on {known}"));
            }
        }
    }
    faults.extend(
        table.keys().filter(|name| !ours.contains(*name)).map(|name| format!("{name} is no crate any more")),
    );
    check(faults);
}

#[test]
fn nothing_heavy_lies_below_an_operator_or_the_loop() {
    let metadata = metadata();
    let mut faults = Vec::new();
    for (name, banned) in NEVER_BELOW {
        for path in paths_below(&metadata, name) {
            let last = path.last().expect("a path has an end");
            if banned.iter().any(|prefix| last.starts_with(prefix)) {
                faults.push(path.join(" -> "));
            }
        }
    }
    check(faults);
}

/// Without this, a resolution that came back empty would pass the test above.
#[test]
fn the_paths_that_are_searched_exist() {
    let metadata = metadata();
    let below =
        |name, wanted: &str| paths_below(&metadata, name).iter().any(|path| path.last() == Some(&wanted));
    assert!(below("forebay-runtime", "rdkafka-sys"), "rdkafka-sys lies two steps below the runtime");
    assert!(below("forebay", "forebay-operators"), "the binary links the operators");
}

#[test]
fn every_shared_dependency_is_used() {
    let metadata = metadata();
    let manifest =
        std::fs::read_to_string(metadata.workspace_root.join("Cargo.toml")).expect("the workspace manifest");
    let used: BTreeSet<&str> = metadata
        .workspace_packages()
        .iter()
        .flat_map(|package| &package.dependencies)
        .map(|dependency| dependency.rename.as_deref().unwrap_or(&dependency.name))
        .collect();
    let shared = shared_dependencies(&manifest);
    assert!(shared.contains(&"forebay-schemas"), "could not read [workspace.dependencies]: {shared:?}");
    check(
        shared
            .iter()
            .filter(|name| !used.contains(*name))
            .map(|name| format!("no crate uses {name} of [workspace.dependencies]"))
            .collect(),
    );
}

#[test]
fn the_top_level_holds_only_its_rooms() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository");
    if !root.join(".git").exists() {
        println!("skipped: {} is no git checkout", root.display());
        return;
    }
    let listed = Command::new("git").arg("ls-files").current_dir(root).output().expect("git runs");
    assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let paths = String::from_utf8(listed.stdout).expect("paths of this repository are UTF-8");
    let top: BTreeSet<&str> = paths.lines().filter_map(|path| path.split('/').next()).collect();
    assert!(top.contains("Cargo.toml"), "git ls-files lists nothing of the repository: {top:?}");
    check(
        top.iter()
            .filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(name))
            .map(|name| format!("{name} must not stand at the top level"))
            .collect(),
    );
}

#[track_caller]
fn check(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n  {}\n", faults.join("\n  "));
}

fn metadata() -> Metadata {
    // Of this platform only: those of others need not be downloaded for a test.
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let version = String::from_utf8(rustc.stdout).expect("rustc writes UTF-8");
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc names its host");
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .other_options(["--locked".to_owned(), format!("--filter-platform={host}")])
        .exec()
        .expect("cargo metadata")
}

/// One shortest path from a crate of ours to each package that its build links or runs; dependencies of its tests do not count.
fn paths_below<'a>(metadata: &'a Metadata, name: &str) -> Vec<Vec<&'a str>> {
    let names: BTreeMap<&PackageId, &str> =
        metadata.packages.iter().map(|p| (&p.id, p.name.as_str())).collect();
    let resolve = metadata.resolve.as_ref().expect("cargo metadata resolves dependencies");
    let edges: BTreeMap<&PackageId, Vec<&PackageId>> = resolve
        .nodes
        .iter()
        .map(|node| {
            let linked = |kinds: &[cargo_metadata::DepKindInfo]| {
                kinds.iter().any(|dep| dep.kind != DependencyKind::Development)
            };
            (&node.id, node.deps.iter().filter(|dep| linked(&dep.dep_kinds)).map(|dep| &dep.pkg).collect())
        })
        .collect();

    let root = metadata.workspace_packages().into_iter().find(|package| package.name.as_str() == name);
    let root = &root.unwrap_or_else(|| panic!("{name} is no crate of the workspace")).id;
    let mut paths = BTreeMap::from([(root, vec![names[root]])]);
    let mut queue = VecDeque::from([root]);
    while let Some(package) = queue.pop_front() {
        for next in &edges[package] {
            if !paths.contains_key(next) {
                let path = paths[package].iter().copied().chain([names[next]]).collect();
                paths.insert(next, path);
                queue.push_back(next);
            }
        }
    }
    paths.remove(root);
    paths.into_values().collect()
}

/// The names in the table `[workspace.dependencies]`, which `cargo metadata` does not give. Each stands at the start of a line.
fn shared_dependencies(manifest: &str) -> Vec<&str> {
    manifest
        .lines()
        .skip_while(|line| *line != "[workspace.dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter(|line| line.starts_with(|first: char| first.is_ascii_alphanumeric()))
        .filter_map(|line| Some(line.split_once('=')?.0.trim_end()))
        .collect()
}
