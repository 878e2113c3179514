//! What is known of the endpoints of a pool, and which of them a call goes to.
//!
//! The best is the one with the most of `3 · prefix affinity + 2 · (1 − queue) + 2 · (1 − KV cache in use)`, the weights of
//! Kubernetes' inference gateway. The queue is the longer of what the endpoint says and what we ourselves have under way
//! there, as all who poll alone run to the same endpoint at once (llm-d #298). Affinity is not followed to where too
//! much waits (SGLang's cache-aware router has the same two thresholds).
//!
//! Invariant: a call goes only where breaker and throttle let it pass and fewer than the endpoint's share run; and where its
//! last try did not go, as long as there is such a place. Sans-IO.

mod status;

use super::{prefix::Seen, watch::Load};
use crate::{
    CallError, Class, Health, Limits, Reply,
    breaker::{Breaker, Passage},
    retry::Jitter,
    shared::{Ask as Asked, Slice},
    throttle::{Caps, Reserved, Throttle},
};
pub use status::{Ended, Left, ModelStatus, Status};
use std::{collections::HashMap, time::Duration};
use tokio::time::Instant;

/// Models that are told apart at one endpoint. Clients name them, so there is a limit; beyond it they share a fate.
const MODELS_MAX: usize = 64;
const WEIGHT_AFFINITY: f64 = 3.0;
const WEIGHT_QUEUE: f64 = 2.0;
const WEIGHT_KV: f64 = 2.0;
/// Requests that wait in an engine, and KV cache in use, above which it gets none while others may take it.
const QUEUE_MAX: f64 = 5.0;
const KV_MAX: f64 = 0.8;
/// What an endpoint says of itself counts for so long; then it is taken to be full.
const STALE_AFTER: Duration = Duration::from_secs(3);
/// How many more calls than at the idlest endpoint, and how many times as many, are too many to follow affinity.
const AFFINITY_CALLS_MORE: usize = 8;
const AFFINITY_CALLS_TIMES: f64 = 1.5;
/// How long an endpoint none of whose keys is good is left alone.
const DEAD_FOR: Duration = Duration::from_secs(60);

/// What a call asks of a pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask<'a> {
    pub(super) model: &'a str,
    pub(super) blocks: &'a [u64],
    pub(super) tokens: u64,
    /// Where it was tried already.
    pub(super) tried: &'a [usize],
    /// Whether it may only go elsewhere, and only to an endpoint in good health.
    pub(super) is_hedge: bool,
}

/// Why no endpoint takes a call now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Refusal {
    /// None is ready yet.
    Cold,
    /// Some are up and have no room, perhaps until this moment.
    Busy(Option<Instant>),
    /// None is up, perhaps until this moment.
    Down(Option<Instant>),
}

/// The right to send one call to one endpoint; to be given back by [`Board::ended`] or [`Board::given_up`].
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) endpoint: usize,
    pub(super) model: String,
    reserved: Reserved,
    tokens: u64,
    is_probe: bool,
}

/// One model at one endpoint.
struct Lane {
    breaker: Breaker,
    throttle: Throttle,
}

struct Site {
    name: String,
    origin: String,
    caps: Caps,
    is_shared: bool,
    lanes: HashMap<String, Lane>,
    running: usize,
    tokens: u64,
    ended: Ended,
    /// What it said last of how it fares; nothing of an endpoint that never did, as cloud services do not.
    load: Option<(Load, Instant)>,
    seen: Seen,
    /// Not yet where it starts cold.
    is_ready: bool,
    dead_until: Option<Instant>,
}

impl Site {
    fn lane(&mut self, model: &str, jitter: &Jitter) -> &mut Lane {
        let is_known = self.lanes.contains_key(model) || self.lanes.len() < MODELS_MAX;
        let (caps, is_shared, jitter) = (self.caps, self.is_shared, jitter.clone());
        let throttle = || if is_shared { Throttle::shared(caps) } else { Throttle::new(caps) };
        let lane = || Lane { breaker: Breaker::new(jitter), throttle: throttle() };
        self.lanes.entry(if is_known { model } else { "" }.to_owned()).or_insert_with(lane)
    }

    /// Queue and KV cache in use, from 0 to 1. What is stale counts as full; who says nothing at all, as empty.
    fn said(&self, now: Instant) -> (f64, f64) {
        match &self.load {
            Some((load, at)) if now.duration_since(*at) <= STALE_AFTER => {
                ((load.waiting / QUEUE_MAX).min(1.0), load.kv_used.clamp(0.0, 1.0))
            }
            Some(_) => (1.0, 1.0),
            None => (0.0, 0.0),
        }
    }

    fn is_full(&self, now: Instant) -> bool {
        let is_full = |(load, at): &(Load, Instant)| {
            now.duration_since(*at) > STALE_AFTER || load.waiting > QUEUE_MAX || load.kv_used > KV_MAX
        };
        self.load.as_ref().is_some_and(is_full)
    }
}

/// See the module.
pub(super) struct Board {
    sites: Vec<Site>,
    jitter: Jitter,
    /// Where to begin to look, so that equals take turns.
    next: usize,
    limited_at: Option<Instant>,
}

/// Where a call stands with one endpoint.
enum Standing {
    Free,
    Cold,
    Busy(Option<Instant>),
    Down(Option<Instant>),
}

impl Board {
    pub(super) fn new(jitter: Jitter) -> Self {
        Self { sites: Vec::new(), jitter, next: 0, limited_at: None }
    }

    pub(super) fn add(&mut self, [name, origin]: [&str; 2], caps: Caps, is_ready: bool, is_shared: bool) {
        self.sites.push(Site {
            name: name.to_owned(),
            origin: origin.to_owned(),
            caps,
            is_shared,
            lanes: HashMap::new(),
            running: 0,
            tokens: 0,
            ended: Ended::default(),
            load: None,
            seen: Seen::default(),
            is_ready,
            dead_until: None,
        });
    }

    fn standing(&mut self, index: usize, ask: &Ask<'_>, now: Instant) -> Standing {
        let (site, jitter) = (&mut self.sites[index], &self.jitter);
        if !site.is_ready {
            return Standing::Cold;
        }
        if let Some(until) = site.dead_until.filter(|&until| now < until) {
            return Standing::Down(Some(until));
        }
        let (running, outstanding) = (site.running, site.caps.outstanding);
        let lane = site.lane(ask.model, jitter);
        let share = match lane.breaker.passage(now) {
            Passage::Nothing(until) => return Standing::Down(until),
            Passage::Probe if ask.is_hedge => return Standing::Down(None),
            Passage::Part(part) if ask.is_hedge && part < 1.0 => return Standing::Down(None),
            Passage::Part(part) => part,
            Passage::Probe => 1.0,
        };
        if let Err(until) = lane.throttle.admits(ask.tokens, now) {
            return Standing::Busy(until);
        }
        // At least one: a share of a small number is still a way back.
        match running as f64 >= (outstanding as f64 * share).max(1.0) {
            true => Standing::Busy(None),
            false => Standing::Free,
        }
    }

    /// Chooses an endpoint and reserves there what the call may take.
    pub(super) fn choose(&mut self, ask: &Ask<'_>, now: Instant) -> Result<Ticket, Refusal> {
        let standings: Vec<_> = (0..self.sites.len()).map(|index| self.standing(index, ask, now)).collect();
        let is_up = |index: &usize| matches!(standings[*index], Standing::Free | Standing::Busy(_));
        let mut open: Vec<usize> = (0..self.sites.len()).filter(is_up).collect();
        let untried = |index: &usize| !ask.tried.contains(index);
        if ask.is_hedge || open.iter().any(untried) {
            open.retain(untried);
        }
        if open.is_empty() {
            return Err(refusal(&standings));
        }
        let mut free: Vec<usize> =
            open.iter().copied().filter(|&index| matches!(standings[index], Standing::Free)).collect();
        if free.is_empty() {
            let until = |index: &usize| match standings[*index] {
                Standing::Busy(until) => until,
                _ => None,
            };
            return Err(Refusal::Busy(open.iter().filter_map(until).min()));
        }
        if free.iter().any(|&index| !self.sites[index].is_full(now)) {
            free.retain(|&index| !self.sites[index].is_full(now));
        }
        let index = self.best(&free, ask, now);
        Ok(self.reserve(index, ask, now))
    }

    /// The best of these, which are not none.
    fn best(&mut self, free: &[usize], ask: &Ask<'_>, now: Instant) -> usize {
        // Whoever may come back is asked first, or it never would while others are good. Not with a call that failed.
        let probe = free.iter().copied().find(|&index| {
            let passage = self.sites[index].lane(ask.model, &self.jitter).breaker.passage(now);
            passage == Passage::Probe && ask.tried.is_empty()
        });
        if let Some(probe) = probe {
            return probe;
        }
        let idlest = free.iter().map(|&index| self.sites[index].running).min().unwrap_or(0);
        let tokens_most = free.iter().map(|&index| self.sites[index].tokens).max().unwrap_or(0).max(1);
        let score = |index: usize| {
            let site = &self.sites[index];
            let is_too_busy = site.running > idlest + AFFINITY_CALLS_MORE
                && site.running as f64 > idlest as f64 * AFFINITY_CALLS_TIMES;
            let affinity = if is_too_busy { 0.0 } else { site.seen.part_of(ask.blocks) };
            let (queue, kv) = site.said(now);
            let queue = queue.max(site.tokens as f64 / tokens_most as f64);
            WEIGHT_AFFINITY * affinity + WEIGHT_QUEUE * (1.0 - queue) + WEIGHT_KV * (1.0 - kv)
        };
        self.next = self.next.wrapping_add(1);
        let turned = (0..free.len()).map(|offset| free[(self.next % free.len() + offset) % free.len()]);
        // The first of equals.
        turned
            .map(|index| (index, score(index)))
            .reduce(|best, other| if other.1 > best.1 { other } else { best })
            .map_or(0, |(index, _)| index)
    }

    fn reserve(&mut self, index: usize, ask: &Ask<'_>, now: Instant) -> Ticket {
        let (site, jitter) = (&mut self.sites[index], &self.jitter);
        site.running += 1;
        site.tokens = site.tokens.saturating_add(ask.tokens);
        site.seen.sees(ask.blocks);
        let lane = site.lane(ask.model, jitter);
        let is_probe = lane.breaker.sent(now);
        let reserved = lane.throttle.reserve(ask.tokens, now);
        Ticket { endpoint: index, model: ask.model.to_owned(), reserved, tokens: ask.tokens, is_probe }
    }

    fn release(&mut self, ticket: &Ticket) -> &mut Lane {
        let (site, jitter) = (&mut self.sites[ticket.endpoint], &self.jitter);
        site.running = site.running.saturating_sub(1);
        site.tokens = site.tokens.saturating_sub(ticket.tokens);
        site.lane(&ticket.model, jitter)
    }

    /// A call ended. `has_key` where another key may be good when this one is not.
    pub(super) fn ended(
        &mut self,
        ticket: Ticket,
        result: Result<&Reply, &CallError>,
        has_key: bool,
        now: Instant,
    ) {
        self.sites[ticket.endpoint].ended.count(result.err().map(|error| error.class));
        let lane = self.release(&ticket);
        let health = result.map_or_else(|error| error.class.health(), |_| Health::Good);
        lane.breaker.ended(health, ticket.is_probe, now);
        match result {
            Ok(reply) => {
                lane.throttle.succeeded(ticket.reserved, reply.ttft, now);
                lane.throttle.settle(ticket.reserved, reply.usage.map(|usage| usage.total_tokens), now);
            }
            Err(error) => {
                if error.is_overload() {
                    lane.throttle.refused(ticket.reserved, error.retry_after, now);
                }
                lane.throttle.settle(ticket.reserved, None, now);
                match error.class {
                    Class::Limited => self.limited_at = Some(now),
                    Class::Account if !has_key => {
                        self.sites[ticket.endpoint].dead_until = Some(now + DEAD_FOR)
                    }
                    _ => {}
                }
            }
        }
    }

    /// A call was given up, or never sent.
    pub(super) fn given_up(&mut self, ticket: Ticket, was_sent: bool, now: Instant) {
        if was_sent {
            self.sites[ticket.endpoint].ended.count(Some(Class::Lost));
        }
        let lane = self.release(&ticket);
        lane.breaker.ended(Health::Unknown, ticket.is_probe, now);
        match was_sent {
            true => lane.throttle.settle(ticket.reserved, None, now),
            false => lane.throttle.give_back(ticket.reserved, now),
        }
    }

    /// The provider said what is left for this model.
    pub(super) fn heard(&mut self, endpoint: usize, model: &str, limits: &Limits, now: Instant) {
        let (site, jitter) = (&mut self.sites[endpoint], &self.jitter);
        site.lane(model, jitter).throttle.heard(limits, now);
    }

    /// Whether anything is to be asked of whoever keeps what processes share.
    pub(super) fn wants(&self, now: Instant) -> bool {
        let wants = |lane: &Lane| lane.throttle.share().is_some_and(|share| share.wants(now));
        self.sites.iter().any(|site| site.is_shared && site.lanes.values().any(wants))
    }

    /// What is to be asked, of which endpoint and model. `model` is asked for from the beginning, so that whoever shares is known
    /// before anybody calls.
    pub(super) fn asks(&mut self, model: &str, now: Instant) -> Vec<(usize, String, Asked)> {
        let (sites, jitter) = (&mut self.sites, &self.jitter);
        let mut asks = Vec::new();
        for (index, site) in sites.iter_mut().enumerate().filter(|(_, site)| site.is_shared) {
            site.lane(model, jitter);
            for (model, lane) in &mut site.lanes {
                asks.extend(lane.throttle.ask(now).map(|ask| (index, model.clone(), ask)));
            }
        }
        asks
    }

    /// What came of it.
    pub(super) fn answered(
        &mut self,
        (endpoint, model, ask): &(usize, String, Asked),
        answer: Option<&Slice>,
        asked_at: Instant,
        now: Instant,
    ) {
        let (site, jitter) = (&mut self.sites[*endpoint], &self.jitter);
        site.lane(model, jitter).throttle.answered(ask, answer, asked_at, now);
    }

    /// An endpoint said how it fares.
    pub(super) fn scraped(&mut self, endpoint: usize, load: Load, now: Instant) {
        self.sites[endpoint].load = Some((load, now));
    }

    /// An endpoint that started cold answers. Its calls ramp up from now on.
    pub(super) fn ready(&mut self, endpoint: usize, model: &str, now: Instant) {
        let (site, jitter) = (&mut self.sites[endpoint], &self.jitter);
        site.is_ready = true;
        site.lane(model, jitter).breaker.ramp(now);
    }

    /// Whether there is an endpoint that is up and was not tried.
    pub(super) fn has_another(&mut self, ask: &Ask<'_>, now: Instant) -> bool {
        (0..self.sites.len()).any(|index| {
            let standing = self.standing(index, ask, now);
            !ask.tried.contains(&index) && matches!(standing, Standing::Free | Standing::Busy(_))
        })
    }

    /// The part of the pool's places that are taken.
    pub(super) fn saturation(&mut self, model: &str, now: Instant) -> f64 {
        let (mut running, mut places) = (0.0, 0.0);
        for site in &mut self.sites {
            let outstanding = site.caps.outstanding as f64;
            running += site.running as f64;
            let lane = site.lane(model, &self.jitter);
            if let Passage::Part(part) = lane.breaker.passage(now) {
                places += (outstanding * part).min(lane.throttle.limit());
            }
        }
        if places > 0.0 { running / places } else { 1.0 }
    }

    /// When a call was last refused by a rate limit.
    pub(super) fn limited_at(&self) -> Option<Instant> {
        self.limited_at
    }
}

fn refusal(standings: &[Standing]) -> Refusal {
    if standings.iter().any(|standing| matches!(standing, Standing::Cold)) {
        return Refusal::Cold;
    }
    let until = |standing: &Standing| match standing {
        Standing::Down(until) => *until,
        _ => None,
    };
    Refusal::Down(standings.iter().filter_map(until).min())
}
