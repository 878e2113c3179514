//! The real services that `tests/run` starts, as a test asks for them.
//!
//! Invariant: where a service is missing, its tests are skipped with a line that says so. In CI (the variable `CI` is set) they
//! panic instead, so that no run is green for want of a service; but not under `tests/run --quick`, which asked for that.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `HOST:PORT` of a real Apache Kafka: one broker, topics are not created by being named.
pub fn kafka() -> Option<String> {
    service("Apache Kafka", "FOREBAY_TEST_KAFKA")
}

/// URL of a real Redis. Its keys are shared by all tests of a run: use a prefix of your own.
pub fn redis() -> Option<String> {
    service("Redis", "FOREBAY_TEST_REDIS")
}

/// A Python interpreter that can `import kafka` (kafka-python), and what else stands in `tests/clients/requirements.txt`.
pub fn python() -> Option<PathBuf> {
    service("a Python client", "FOREBAY_TEST_PYTHON").map(PathBuf::from)
}

/// The program `kcat`.
pub fn kcat() -> Option<PathBuf> {
    service("kcat", "FOREBAY_TEST_KCAT").map(PathBuf::from)
}

/// A command that runs an Apache Kafka of the test's own in the foreground, with its data in `folder`. It is ready once it has
/// written "Kafka Server started" to its standard error. `properties` (`NAME=VALUE`) win over those of `tests/services/kafka`.
pub fn kafka_command(folder: &Path, port: u16, controller_port: u16, properties: &[&str]) -> Option<Command> {
    service("Apache Kafka", "FOREBAY_TEST_KAFKA_JARS")?;
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/services/kafka"));
    command.arg(folder).arg(port.to_string()).arg(controller_port.to_string()).args(properties);
    Some(command)
}

/// A command that runs a schema registry of the test's own in the foreground, at `http://127.0.0.1:{port}/apis/ccompat/v7`.
pub fn registry_command(port: u16) -> Option<Command> {
    service("a schema registry", "FOREBAY_TEST_REGISTRY_JARS")?;
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/services/registry"));
    command.arg(port.to_string());
    Some(command)
}

fn service(what: &str, variable: &str) -> Option<String> {
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let found = set(variable);
    if found.is_none() {
        let ci = set("CI").is_some_and(|value| value != "0" && value != "false");
        if must_have(ci, set("FOREBAY_TEST_QUICK").is_some()) {
            panic!("{variable} is not set: in CI a test must not skip {what}; tests/run starts it");
        }
        // Past the capture of the test harness, which would keep the line of a test that passes to itself.
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        // A closed standard error is no reason for a test to break.
        let _ = writeln!(std::io::stderr(), "skipped: {test} needs {what}; tests/run starts it");
    }
    found
}

const fn must_have(ci: bool, quick: bool) -> bool {
    ci && !quick
}

#[cfg(test)]
mod tests {
    use super::must_have;

    #[test]
    fn only_a_full_run_in_ci_must_have_its_services() {
        assert!(must_have(true, false));
        assert!(!must_have(true, true));
        assert!(!must_have(false, false));
    }
}
