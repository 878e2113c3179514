//! Whether a process lives and whether it is ready.
//!
//! *Alive* means that restarting would not help: every thread that must turn has turned within its time. *Ready* means
//! that all that must be there before work begins is there. A model that is away concerns neither: it is waited for.
//!
//! Invariant: what was expected and fell silent is never forgotten. Only [`Health::retire`] takes a component out.

use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How long a component may be silent of which nobody said how long: no poll for so long is a stall.
pub const BEAT_AGE_MAX: Duration = Duration::from_secs(30);

/// The health of a process. A clone is the same.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Why each component is not ready; `None` where it is.
    readiness: BTreeMap<String, Option<String>>,
    beats: BTreeMap<String, Beat>,
    /// What only a restart can mend.
    broken: BTreeMap<String, String>,
    stopping: bool,
}

struct Beat {
    last: Instant,
    age_max: Duration,
}

/// Whether a component is ready: `true`, `false`, or `Err` with the reason why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness(Result<(), String>);

impl From<bool> for Readiness {
    fn from(ready: bool) -> Self {
        Self(if ready { Ok(()) } else { Err("not ready".to_owned()) })
    }
}

impl<R: Into<String>> From<Result<(), R>> for Readiness {
    fn from(ready: Result<(), R>) -> Self {
        Self(ready.map_err(Into::into))
    }
}

/// What one question about health is answered with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether all is well.
    pub ok: bool,
    /// What was looked at, by name.
    pub components: Vec<Component>,
}

/// One part of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Component {
    /// Its name, such as `consumer infer`.
    pub name: String,
    /// Whether it is well.
    pub ok: bool,
    /// What is wrong, where something is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Health {
    /// A process of which nothing is expected yet: alive and not ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// A component is ready, or is not. Name all components before the first becomes ready.
    pub fn set_ready(&self, component: &str, ready: impl Into<Readiness>) {
        let Readiness(ready) = ready.into();
        self.with(|state| state.readiness.insert(component.to_owned(), ready.err()));
    }

    /// From now on a component must beat at least this often. Say it before the thread starts that beats, so that one
    /// which never turns is found too.
    pub fn expect_beat(&self, component: &str, age_max: Duration) {
        let beat = Beat { last: Instant::now(), age_max };
        self.with(|state| state.beats.insert(component.to_owned(), beat));
    }

    /// A component turns. One that nobody expected is expected from now on, every [`BEAT_AGE_MAX`].
    pub fn beat(&self, component: &str) {
        let now = Instant::now();
        self.with(|state| match state.beats.get_mut(component) {
            Some(beat) => beat.last = now,
            None => drop(state.beats.insert(component.to_owned(), Beat { last: now, age_max: BEAT_AGE_MAX })),
        });
    }

    /// Something broke that only a restart can mend: the process is no longer alive.
    pub fn broken(&self, component: &str, reason: impl Into<String>) {
        let reason = reason.into();
        self.with(|state| state.broken.insert(component.to_owned(), reason));
    }

    /// A component ended as it should, after its last beat: nothing is expected of it any more.
    pub fn retire(&self, component: &str) {
        self.with(|state| {
            state.readiness.remove(component);
            state.beats.remove(component);
        });
    }

    /// The process begins to end: it is never ready again.
    pub fn stopping(&self) {
        self.with(|state| state.stopping = true);
    }

    /// Whether restarting would help.
    pub fn liveness(&self) -> Report {
        let now = Instant::now();
        self.with(|state| {
            let broken = state.broken.iter().map(|(name, reason)| Component::new(name, Some(reason.clone())));
            let beats = state.beats.iter().map(|(name, beat)| Component::new(name, beat.overdue(now)));
            Report::new(broken.chain(beats).collect())
        })
    }

    /// Whether work can begin.
    pub fn readiness(&self) -> Report {
        self.with(|state| {
            let mut components: Vec<Component> =
                state.readiness.iter().map(|(name, reason)| Component::new(name, reason.clone())).collect();
            if components.is_empty() {
                components.push(Component::new("process", Some("starting".to_owned())));
            }
            if state.stopping {
                components.push(Component::new("process", Some("stopping".to_owned())));
            }
            Report::new(components)
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").field("live", &self.liveness()).field("ready", &self.readiness()).finish()
    }
}

impl Beat {
    fn overdue(&self, now: Instant) -> Option<String> {
        let age = now.saturating_duration_since(self.last);
        let (seconds, allowed) = (age.as_secs(), self.age_max.as_secs_f64());
        (age > self.age_max).then(|| format!("silent for {seconds} s, {allowed} s are allowed"))
    }
}

impl Report {
    fn new(components: Vec<Component>) -> Self {
        Self { ok: components.iter().all(|component| component.ok), components }
    }
}

impl Component {
    fn new(name: &str, reason: Option<String>) -> Self {
        Self { name: name.to_owned(), ok: reason.is_none(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn reasons(report: &Report) -> Vec<String> {
        let reason = |c: &Component| Some(format!("{}: {}", c.name, c.reason.as_ref()?));
        report.components.iter().filter_map(reason).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_consumer_that_falls_silent_is_not_alive_until_it_beats_again() {
        let health = Health::new();
        health.expect_beat("consumer infer", Duration::from_secs(30));
        advance(Duration::from_secs(30)).await;
        assert!(health.liveness().ok);
        advance(Duration::from_secs(11)).await;
        assert_eq!(reasons(&health.liveness()), ["consumer infer: silent for 41 s, 30 s are allowed"]);
        health.beat("consumer infer");
        assert!(health.liveness().ok);
    }

    #[tokio::test(start_paused = true)]
    async fn who_beats_once_is_expected_to_go_on() {
        let health = Health::new();
        health.beat("consumer infer");
        advance(BEAT_AGE_MAX + Duration::from_millis(1)).await;
        assert_eq!(reasons(&health.liveness()), ["consumer infer: silent for 30 s, 30 s are allowed"]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_retired_component_may_be_silent() {
        let health = Health::new();
        health.expect_beat("consumer infer", Duration::from_secs(30));
        health.retire("consumer infer");
        advance(Duration::from_secs(3600)).await;
        assert_eq!(health.liveness(), Report { ok: true, components: Vec::new() });
    }

    #[tokio::test(start_paused = true)]
    async fn what_broke_stays_broken() {
        let health = Health::new();
        health.expect_beat("consumer infer", Duration::from_secs(30));
        health.broken("consumer infer", "partition prompts/3 stalled at offset 90");
        health.beat("consumer infer");
        health.retire("consumer infer");
        assert_eq!(reasons(&health.liveness()), ["consumer infer: partition prompts/3 stalled at offset 90"]);
    }

    #[test]
    fn a_process_is_ready_when_all_its_parts_are() {
        let health = Health::new();
        assert_eq!(reasons(&health.readiness()), ["process: starting"]);
        health.set_ready("table chunks", Err("read up to offset 7 of 90"));
        health.set_ready("assignment infer", true);
        assert_eq!(reasons(&health.readiness()), ["table chunks: read up to offset 7 of 90"]);
        health.set_ready("table chunks", true);
        assert!(health.readiness().ok);
        health.set_ready("assignment infer", false);
        assert_eq!(reasons(&health.readiness()), ["assignment infer: not ready"]);
    }

    #[test]
    fn a_process_that_ends_is_alive_and_never_ready_again() {
        let health = Health::new();
        health.set_ready("assignment infer", true);
        health.stopping();
        health.set_ready("assignment infer", true);
        assert_eq!(reasons(&health.readiness()), ["process: stopping"]);
        assert!(health.liveness().ok);
    }
}
