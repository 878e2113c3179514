//! Processes that a test starts, and the ports they listen on.
//!
//! Invariant: a process started here is gone when its [`Running`] is, and what it wrote is printed if the test panics.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::wait_for;

/// The binary `forebay` of the profile that the test was built with. `tests/run` builds it; a bare `cargo test -p forebay-tests`
/// does not, and finds the last one built.
///
/// # Panics
/// When it has not been built.
#[track_caller]
pub fn forebay() -> PathBuf {
    // A test lies in target/PROFILE/deps/, the binary in target/PROFILE/.
    let path = std::env::current_exe().ok().and_then(|test| {
        Some(test.parent()?.parent()?.join("forebay").with_extension(std::env::consts::EXE_EXTENSION))
    });
    match path {
        Some(path) if path.is_file() => path,
        _ => panic!(
            "could not find the binary at {path:?}; `cargo build --workspace --bins --tests` builds it"
        ),
    }
}

/// A TCP port of the loopback address on which nothing listens, given out once by this process.
///
/// It lies below the range from which the kernel takes ports for outgoing connections, so that no connection of another test
/// takes it before the process that it is meant for has bound it.
///
/// # Panics
/// When all are taken.
pub fn free_port() -> u16 {
    const FIRST: u16 = 10_000;
    const COUNT: u32 = 10_000;
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let given = given.get_or_insert_default();
    // Each process begins elsewhere: two test binaries that run at once seldom ask for the same port.
    let begin = std::process::id().wrapping_mul(7919);
    let free = (0..COUNT)
        .filter_map(|step| u16::try_from(begin.wrapping_add(step) % COUNT).ok())
        .map(|offset| FIRST + offset)
        .find(|port| !given.contains(port) && TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    let Some(port) = free else { panic!("could not find a free port from {FIRST} on") };
    given.insert(port);
    port
}

/// A process that ends with the test. Its output goes to files, so that it never blocks on a pipe that nobody reads.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    output: tempfile::TempDir,
}

impl Running {
    /// Starts `command`; `name` is what messages call it.
    ///
    /// # Panics
    /// When it could not be started.
    #[track_caller]
    pub fn start(name: &str, command: &mut Command) -> Self {
        let mut start = || -> io::Result<Self> {
            let output = tempfile::tempdir()?;
            let child = command
                .stdin(Stdio::null())
                .stdout(File::create(output.path().join("stdout"))?)
                .stderr(File::create(output.path().join("stderr"))?)
                .spawn()?;
            Ok(Self { name: name.to_owned(), child, output })
        };
        start().unwrap_or_else(|error| panic!("could not start {name} ({command:?}): {error}"))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        self.written("stdout")
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        self.written("stderr")
    }

    fn written(&self, stream: &str) -> String {
        let bytes = std::fs::read(self.output.path().join(stream)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends a signal: [`Signal::TERM`] asks it to end, [`Signal::KILL`] is a crash.
    ///
    /// # Panics
    /// When it could not be sent.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let sent = kill_process(Pid::from_child(&self.child), signal);
        if let Err(error) = sent {
            panic!("could not send {signal:?} to {}: {error}", self.name);
        }
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Goes on only while it still runs.
    ///
    /// # Panics
    /// When it has ended by itself; says how, and its last words.
    #[track_caller]
    pub fn must_run(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait() {
            panic!("{} has ended, {status}: {}", self.name, last_lines(&self.stderr(), 10));
        }
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// When it has not within `limit`.
    #[track_caller]
    pub fn ended(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("{} to end", self.name);
        wait_for(&what, limit, || self.child.try_wait().ok().flatten())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let ended = self.child.try_wait().ok().flatten();
        // Both only fail if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            #[expect(
                clippy::print_stderr,
                reason = "the harness shows it below the panic of the test it belongs to"
            )]
            for (stream, text) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
                let by_itself = ended.map(|status| format!(", which had ended by itself: {status}"));
                let by_itself = by_itself.unwrap_or_default();
                eprintln!("--- end of {stream} of {}{by_itself} ---\n{}", self.name, last_lines(&text, 60));
            }
        }
    }
}

fn last_lines(text: &str, count: usize) -> &str {
    let start = text.rmatch_indices('\n').nth(count).map_or(0, |(at, _)| at + 1);
    &text[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Running {
        Running::start("sh", Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn ports_differ_and_can_be_bound() {
        let ports: HashSet<u16> = (0..50).map(|_| free_port()).collect();
        assert_eq!(ports.len(), 50);
        for port in ports {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a free port can be bound");
        }
    }

    #[test]
    fn a_process_is_gone_when_its_guard_is() {
        let running = shell("exec sleep 100");
        let pid = Pid::from_child(&running.child);
        rustix::process::test_kill_process(pid).expect("it runs");
        drop(running);
        rustix::process::test_kill_process(pid).expect_err("it is gone");
    }

    #[test]
    fn its_streams_are_kept_apart_and_its_end_is_seen() {
        let mut running = shell("echo out; echo err >&2; exit 3");
        assert_eq!(running.ended(LIMIT).code(), Some(3));
        assert_eq!((running.stdout().as_str(), running.stderr().as_str()), ("out\n", "err\n"));
        assert!(!running.is_alive());
    }

    #[test]
    fn a_signal_reaches_it() {
        let mut running = shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done");
        wait_for("the trap", LIMIT, || running.stdout().contains("ready").then_some(()));
        running.signal(Signal::TERM);
        assert_eq!(running.ended(LIMIT).code(), Some(7));
    }

    #[test]
    fn last_lines_are_the_last() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(last_lines("a\n", 2), "a\n");
        assert_eq!(last_lines("", 2), "");
    }
}
