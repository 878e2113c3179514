//! The binary `forebay` as a test runs it: with settings of the test's own and nothing else.
//!
//! Invariant: no setting comes from the environment of whoever runs the tests, and every port is a free one.

use crate::{
    client::{Client, must},
    process::{Running, forebay},
    wait::{wait_for, wait_for_ok},
};
use rustix::process::Signal;
use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
    time::Duration,
};

/// How long a start may take on a machine that does much else.
const START: Duration = Duration::from_secs(60);

/// How long stages may take to end: what is promised, and a little for the machine.
pub const DRAIN: Duration = Duration::from_secs(12);

/// How long any other process may take: a bound to hang on. `up` and `demo` wait for their sink of tables too, behind their stages.
pub const END: Duration = Duration::from_secs(60);

/// `forebay ARGUMENTS` on a data folder.
pub fn command(data: &Path, arguments: &[&str]) -> Command {
    command_of(&forebay(), data, arguments)
}

/// The same with a binary of another version.
pub fn command_of(binary: &Path, data: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FOREBAY_")) {
        command.env_remove(name);
    }
    command.args(arguments).arg("--data").arg(data);
    command
}

/// What a command that ended by itself left.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; −1 where a signal ended it.
    pub code: i32,
    /// What was asked for.
    pub stdout: String,
    /// What was said besides.
    pub stderr: String,
}

/// Runs a command to its end.
///
/// # Panics
/// When that takes longer than `limit`.
#[track_caller]
pub fn finish(command: &mut Command, limit: Duration) -> Finished {
    let mut running = Running::start("forebay", command);
    let code = running.ended(limit).code().unwrap_or(-1);
    Finished { code, stdout: running.stdout(), stderr: running.stderr() }
}

/// Stages at work: `forebay up`, or `forebay run`.
#[derive(Debug)]
pub struct Up {
    /// The process.
    pub process: Running,
    /// Where its broker is.
    pub servers: String,
    /// Where its metrics and health are: `HOST:PORT`.
    pub admin: String,
}

impl Up {
    /// `forebay up` with an embedded broker, both on free ports, and more arguments.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn start(data: &Path, arguments: &[&str]) -> Self {
        let mut all = vec!["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        all.extend(arguments);
        Self::wait("forebay up", &mut command(data, &all))
    }

    /// Starts a command that comes up, and waits until it has said so and is ready.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn wait(name: &str, command: &mut Command) -> Self {
        Self::of(name, Running::start(name, command))
    }

    /// Waits until a process that was started before is up and ready.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn of(name: &str, mut process: Running) -> Self {
        let (servers, admin) = wait_for(&format!("{name} to be up"), START, || {
            let said = process.stderr();
            let after = |what: &str| {
                let line = said.lines().find(|line| line.starts_with(what))?;
                line.get(what.len()..)?.split_whitespace().next().map(str::to_owned)
            };
            assert!(process.is_alive(), "{name} ended: {said}");
            // The last line of what it says when it is up.
            said.contains("\n  stop ").then_some(())?;
            let admin = after("  metrics  http://")?.trim_end_matches("/metrics").to_owned();
            Some((after("  broker   ")?, admin))
        });
        let up = Self { process, servers, admin };
        wait_for_ok(&format!("{name} to be ready"), START, || match up.get("/readyz") {
            (200, _) => Ok(()),
            (_, body) => Err(body),
        });
        up
    }

    /// A client of its broker, without a prefix.
    pub fn client(&self) -> Client {
        Client::new(&self.servers, "")
    }

    /// `GET` of its admin port: status and body.
    ///
    /// # Panics
    /// When nobody answers.
    #[track_caller]
    pub fn get(&self, path: &str) -> (u16, String) {
        get(&self.admin, path)
    }

    /// Asks it to end by SIGTERM; it must drain, and say that all is well.
    ///
    /// # Panics
    /// When it has not.
    #[track_caller]
    pub fn drain(mut self) {
        self.process.signal(Signal::TERM);
        let status = self.process.ended(END);
        assert_eq!(status.code(), Some(0), "the end after SIGTERM");
    }

    /// Ends it as a crash does.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn kill(mut self) {
        self.process.signal(Signal::KILL);
        self.process.ended(END);
    }
}

#[track_caller]
fn get(address: &str, path: &str) -> (u16, String) {
    let mut stream = must("connect to the admin port", TcpStream::connect(address));
    must("bound a read", stream.set_read_timeout(Some(START)));
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    must("ask", stream.write_all(request.as_bytes()));
    let mut answer = String::new();
    must("read an answer", stream.read_to_string(&mut answer));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no answer: {answer:?}")), body.to_owned())
}
