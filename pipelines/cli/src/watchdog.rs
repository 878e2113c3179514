//! Ends a process that stands still, for whoever started it to start it anew.
//!
//! It has a thread of its own, since what it watches may be the very runtime that everything else runs on.

use crate::console::say;
use forebay_telemetry::Health;
use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant},
};

/// How often it looks.
const EVERY: Duration = Duration::from_secs(1);

/// A gap between two looks after which this process was stopped itself (SIGSTOP, a paused machine), so that everybody
/// has been silent and must be given time to speak again.
const GAP_MAX: Duration = Duration::from_secs(5);

/// How long it gives.
const GRACE: Duration = Duration::from_secs(35);

/// The exit code of a process that stood still: EX_SOFTWARE of sysexits.h.
const EXIT: i32 = 70;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watchdog(
    #[expect(dead_code, reason = "held, not read: the thread ends when it is dropped")] Sender<()>,
);

impl Watchdog {
    /// Watches these components.
    pub fn start(health: Health) -> std::io::Result<Self> {
        let (held, dropped) = channel();
        thread::Builder::new().name("watchdog".to_owned()).spawn(move || watch(&health, &dropped))?;
        Ok(Self(held))
    }
}

fn watch(health: &Health, dropped: &Receiver<()>) {
    let (mut last, mut trusted_from) = (Instant::now(), Instant::now());
    while dropped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
        let now = Instant::now();
        if now.duration_since(last) > GAP_MAX {
            trusted_from = now + GRACE;
        }
        last = now;
        let report = health.liveness();
        if !report.ok && now >= trusted_from {
            for component in report.components.iter().filter(|component| !component.ok) {
                let reason = component.reason.as_deref().unwrap_or("not well");
                say(format_args!(
                    "error: {} stands still: {reason}; ending, to be started anew",
                    component.name
                ));
            }
            std::process::exit(EXIT);
        }
    }
}
