//! A replica: an engine under real time, and all that an endpoint has of its own.
//!
//! The engine keeps its own time to the microsecond; its task wakes when something is due, up to a millisecond late as
//! tokio's timers are, and tells what happened meanwhile. So answers are seen late by that much, and nothing drifts.
//!
//! Invariant: whoever holds a [`Ticket`] hears of its end, and a ticket that is dropped gives its job up.

use crate::{
    Shared,
    engine::{Engine, Id, Job, Pace, Told, What},
    limits::{Limits, Verdict},
    metrics::{Metrics, Served, Standing},
    settings::Settings,
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, watch};

/// An endpoint.
pub struct Replica {
    /// Its number, from 0.
    pub number: usize,
    /// What it shares with the others.
    pub shared: Arc<Shared>,
    core: Mutex<Core>,
    wake: Notify,
    limits: Mutex<Limits>,
    metrics: Mutex<Metrics>,
    birth: Mutex<Birth>,
}

struct Core {
    engine: Engine,
    waiters: HashMap<Id, watch::Sender<Progress>>,
    told: Vec<Told>,
    /// When the task looks again.
    alarm_us: Option<u64>,
}

/// When it began, and until when it warms up; not known before the first call.
struct Birth {
    at_us: u64,
    warm_us: Option<u64>,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// When it left the queue.
    pub admitted_us: Option<u64>,
    /// Tokens of the prompt that the KV cache knew.
    pub cached: u32,
    /// When its first token was written.
    pub first_us: Option<u64>,
    /// Tokens written.
    pub written: u32,
    /// When it was done.
    pub done_us: Option<u64>,
}

impl Progress {
    fn take(&mut self, told: Told) {
        match told.what {
            // One that was put out is admitted again; its place in the queue was the first.
            What::Admitted(cached) if self.admitted_us.is_none() => {
                (self.admitted_us, self.cached) = (Some(told.at), cached);
            }
            What::Admitted(_) => {}
            What::Written(tokens) => {
                self.first_us.get_or_insert(told.at);
                self.written = tokens;
            }
            What::Done => self.done_us = Some(told.at),
        }
    }
}

/// A job under way.
pub struct Ticket {
    replica: Arc<Replica>,
    id: Id,
    progress: Progress,
    /// None once it is done.
    updates: Option<watch::Receiver<Progress>>,
}

impl Ticket {
    /// How far it is.
    pub fn progress(&mut self) -> Progress {
        if let Some(updates) = &self.updates {
            self.progress = *updates.borrow();
        }
        self.progress
    }

    /// Waits until more than so many tokens are written, or it is done.
    pub async fn beyond(&mut self, tokens: u32) -> Progress {
        if let Some(updates) = &mut self.updates {
            let is_beyond = |progress: &Progress| progress.written > tokens || progress.done_us.is_some();
            // The sender goes only after it has told of the end.
            if let Ok(progress) = updates.wait_for(is_beyond).await {
                self.progress = *progress;
            }
        }
        self.progress
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.progress().done_us.is_none() {
            self.replica.give_up(self.id);
        }
    }
}

impl Replica {
    /// A replica that begins now.
    pub fn new(number: usize, shared: Arc<Shared>) -> Self {
        let settings = shared.settings();
        let engine = Engine::new(pace(&settings, number), settings.kv_blocks, settings.block_tokens);
        let core = Core { engine, waiters: HashMap::new(), told: Vec::new(), alarm_us: None };
        let birth = Birth { at_us: shared.clock.now_us(), warm_us: None };
        Self {
            number,
            core: Mutex::new(core),
            wake: Notify::new(),
            limits: Mutex::default(),
            metrics: Mutex::default(),
            birth: Mutex::new(birth),
            shared,
        }
    }

    /// How fast it is beside the others.
    pub fn speed(&self, settings: &Settings) -> f64 {
        speed(settings, self.number)
    }

    /// Goes on with these settings.
    pub fn obey(&self, settings: &Settings) {
        locked(&self.core).engine.set_pace(pace(settings, self.number));
    }

    /// Begins anew: cold, and with nothing in its KV cache. Calls under way go on.
    pub fn restart(&self) {
        locked(&self.core).engine.forget();
        *locked(&self.birth) = Birth { at_us: self.shared.clock.now_us(), warm_us: None };
    }

    /// Whether it has been up for long enough.
    pub fn is_healthy(&self, settings: &Settings) -> bool {
        let up_us = self.shared.clock.now_us().saturating_sub(locked(&self.birth).at_us);
        u128::from(up_us) >= settings.cold.as_micros()
    }

    /// Until when a call that comes now waits for the warming up; the first call begins it.
    pub fn warm_us(&self, settings: &Settings) -> u64 {
        let now_us = self.shared.clock.now_us();
        let warm_us = u64::try_from(settings.first_call.as_micros()).unwrap_or(u64::MAX);
        *locked(&self.birth).warm_us.get_or_insert(now_us.saturating_add(warm_us))
    }

    /// Whether the rate limits let a call of this key through.
    pub fn admit(&self, key: u64, tokens: u32, settings: &Settings) -> Verdict {
        let now_us = self.shared.clock.now_us();
        locked(&self.limits).admit(now_us, key, tokens, settings.per_minute)
    }

    /// Takes a job in; none where too many wait.
    pub fn submit(self: &Arc<Self>, job: Job, queue_max: usize) -> Option<Ticket> {
        let now_us = self.shared.clock.now_us();
        let mut core = locked(&self.core);
        let core = &mut *core;
        let id = core.engine.submit(now_us, job, &mut core.told);
        let mut progress = Progress::default();
        for told in core.told.iter().filter(|told| told.id == id) {
            progress.take(*told);
        }
        if progress.admitted_us.is_none() && core.engine.waiting() > queue_max {
            core.engine.cancel(now_us, id, &mut core.told);
            core.tell();
            return None;
        }
        core.tell();
        let updates = progress.done_us.is_none().then(|| {
            let (sender, updates) = watch::channel(progress);
            core.waiters.insert(id, sender);
            updates
        });
        if core.is_alarm_late() {
            self.wake.notify_one();
        }
        Some(Ticket { replica: Arc::clone(self), id, progress, updates })
    }

    fn give_up(&self, id: Id) {
        let mut core = locked(&self.core);
        let core = &mut *core;
        core.waiters.remove(&id);
        core.engine.cancel(self.shared.clock.now_us(), id, &mut core.told);
        core.tell();
        if core.is_alarm_late() {
            self.wake.notify_one();
        }
    }

    /// Lets the engine go on as time passes. Never ends.
    pub async fn drive(self: Arc<Self>) {
        loop {
            let alarm_us = {
                let mut core = locked(&self.core);
                let core = &mut *core;
                core.engine.advance(self.shared.clock.now_us(), &mut core.told);
                core.tell();
                core.alarm_us = core.engine.next();
                core.alarm_us
            };
            match alarm_us {
                None => self.wake.notified().await,
                Some(at_us) => tokio::select! {
                    () = tokio::time::sleep_until(self.shared.clock.instant(at_us)) => {}
                    () = self.wake.notified() => {}
                },
            }
        }
    }

    /// Notes a call that the engine served.
    pub fn served(&self, served: &Served) {
        locked(&self.metrics).served(served);
    }

    /// What `/metrics` says.
    pub fn metrics(&self, model: &str) -> String {
        let standing = {
            let mut core = locked(&self.core);
            let core = &mut *core;
            core.engine.advance(self.shared.clock.now_us(), &mut core.told);
            core.tell();
            Standing {
                running: core.engine.running(),
                waiting: core.engine.waiting(),
                kv_usage: core.engine.kv_usage(),
                counts: core.engine.counts(),
            }
        };
        locked(&self.metrics).text(model, standing)
    }
}

impl Core {
    /// Hands on what the engine told.
    fn tell(&mut self) {
        for told in self.told.drain(..) {
            if let Some(waiter) = self.waiters.get(&told.id) {
                waiter.send_modify(|progress| progress.take(told));
                if told.what == What::Done {
                    self.waiters.remove(&told.id);
                }
            }
        }
    }

    /// Whether something is due before the task looks again.
    fn is_alarm_late(&self) -> bool {
        let due = self.engine.next();
        due.is_some_and(|due| self.alarm_us.is_none_or(|alarm| due < alarm))
    }
}

fn speed(settings: &Settings, number: usize) -> f64 {
    settings.speeds.get(number % settings.speeds.len().max(1)).copied().unwrap_or(1.0)
}

fn pace(settings: &Settings, number: usize) -> Pace {
    let speed = speed(settings, number);
    let mut pace = settings.pace.clone();
    pace.prefill_per_s *= speed;
    pace.decode_per_s *= speed;
    pace
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here is left half done by a panic: each holder changes it by calls that do not.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
