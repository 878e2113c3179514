//! An Apache Kafka of a test's own, which may be killed and started again.
//!
//! Invariant: over all its lives it has the same folder and the same port, so that clients find what is back.

use crate::{Running, free_port, product::DRAIN, services, wait_for};
use rustix::process::Signal;
use std::time::Duration;

/// How long a start may take on a machine that does much else, also behind a crash.
const START: Duration = Duration::from_secs(60);

/// One broker.
#[derive(Debug)]
pub struct Broker {
    folder: tempfile::TempDir,
    ports: (u16, u16),
    properties: Vec<String>,
    process: Running,
}

impl Broker {
    /// A broker with these properties (`NAME=VALUE`); nothing where Apache Kafka is missing.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn start(properties: &[&str]) -> Option<Self> {
        let ports = (free_port(), free_port());
        let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("could not make a folder: {error}"));
        let process = run(&folder, ports, properties)?;
        let properties = properties.iter().map(|&property| property.to_owned()).collect();
        Some(Self { folder, ports, properties, process })
    }

    /// Where it is.
    pub fn servers(&self) -> String {
        format!("127.0.0.1:{}", self.ports.0)
    }

    /// Ends it as a crash does.
    #[track_caller]
    pub fn kill(&mut self) {
        self.process.signal(Signal::KILL);
        self.process.ended(DRAIN);
    }

    /// Starts it again, on what it left.
    #[track_caller]
    pub fn restart(&mut self) {
        let properties: Vec<_> = self.properties.iter().map(String::as_str).collect();
        if let Some(process) = run(&self.folder, self.ports, &properties) {
            self.process = process;
        }
    }
}

#[track_caller]
fn run(folder: &tempfile::TempDir, ports: (u16, u16), properties: &[&str]) -> Option<Running> {
    let mut command = services::kafka_command(folder.path(), ports.0, ports.1, properties)?;
    let mut process = Running::start("Apache Kafka", &mut command);
    wait_for("Apache Kafka to be up", START, || {
        assert!(process.is_alive(), "Apache Kafka ended");
        let said = [process.stdout(), process.stderr()];
        said.iter().any(|said| said.contains("Kafka Server started")).then_some(())
    });
    Some(process)
}
