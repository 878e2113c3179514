//! How endpoints stand, for people.

use super::{Board, Site};
use crate::{Class, breaker::Passage};
use serde::Serialize;
use std::time::Duration;
use tokio::time::Instant;

impl Board {
    /// What is known of each endpoint, for people.
    pub(in crate::pool) fn status(&mut self, now: Instant) -> Vec<Status> {
        let status = |site: &mut Site| Status {
            name: site.name.clone(),
            endpoint: site.origin.clone(),
            is_ready: site.is_ready,
            running: site.running,
            outstanding_max: site.caps.outstanding,
            tokens: site.tokens,
            ended: site.ended,
            waiting: site.load.as_ref().map(|(load, _)| load.waiting),
            kv_used: site.load.as_ref().map(|(load, _)| load.kv_used),
            scraped_ms_ago: site.load.as_ref().map(|(_, at)| millis(now.duration_since(*at))),
            models: site
                .lanes
                .iter_mut()
                .map(|(model, lane)| ModelStatus {
                    model: model.clone(),
                    breaker: lane.breaker.state(now),
                    share: match lane.breaker.passage(now) {
                        Passage::Part(part) => part,
                        Passage::Probe | Passage::Nothing(_) => 0.0,
                    },
                    limit: lane.throttle.limit(),
                    limits: lane.throttle.share().map_or("own", |share| share.state()),
                    share_failures: lane.throttle.share().map_or(0, |share| share.failures()),
                    left: Left::of(lane.throttle.left(now)),
                    paused_ms: lane.throttle.paused(now).map(millis),
                })
                .collect(),
        };
        self.sites.iter_mut().map(status).collect()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// How an endpoint stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// What it is called; no other at its origin is called so.
    pub name: String,
    /// Scheme, host and port.
    pub endpoint: String,
    /// Whether it was seen to answer, where it starts cold.
    pub is_ready: bool,
    /// Calls of ours that run there.
    pub running: usize,
    /// The most that may.
    pub outstanding_max: usize,
    /// Tokens that these may take.
    pub tokens: u64,
    /// How its calls ended so far.
    pub ended: Ended,
    /// Requests that wait in its engine, as it says.
    pub waiting: Option<f64>,
    /// The part of its KV cache that is in use, as it says.
    pub kv_used: Option<f64>,
    /// How old that is.
    pub scraped_ms_ago: Option<u64>,
    /// Its models.
    pub models: Vec<ModelStatus>,
}

/// How calls of an endpoint ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ended {
    /// With an answer.
    pub ok: u64,
    /// The endpoint could not be reached, or failed.
    pub failed: u64,
    /// It took no more of us, or no key was good.
    pub limited: u64,
    /// The request was at fault.
    pub rejected: u64,
    /// Another try was faster, or nobody waited any more.
    pub given_up: u64,
}

impl Ended {
    /// One more, with an error of this class where it had one.
    pub(super) fn count(&mut self, error: Option<Class>) {
        let counter = match error {
            None => &mut self.ok,
            Some(Class::Unreachable | Class::Outage | Class::Transient | Class::Cut) => &mut self.failed,
            Some(Class::Limited | Class::Account) => &mut self.limited,
            Some(Class::Rejected) => &mut self.rejected,
            Some(Class::Lost | Class::Closed) => &mut self.given_up,
        };
        *counter += 1;
    }
}

/// How a model at an endpoint stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelStatus {
    /// The model.
    pub model: String,
    /// `closed`, `ramp`, `open` or `half_open`.
    pub breaker: &'static str,
    /// The part of its calls that it gets, from 0 to 1.
    pub share: f64,
    /// Calls at once that it was seen to bear.
    pub limit: f64,
    /// Who keeps its limits per minute: `own`, this process; `shared`, all that use the endpoint; `away`, this process for its
    /// part of them, since what they share does not answer.
    pub limits: &'static str,
    /// How often that did not answer.
    pub share_failures: u64,
    /// What may still be sent within its limits per minute.
    pub left: Left,
    /// How long nothing is sent, as refusals asked for by `Retry-After`; absent where something may be.
    pub paused_ms: Option<u64>,
}

/// What may still be sent, as far as this process knows: the less of what the settings allow in a minute and what the provider
/// says; absent where neither sets a limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Left {
    /// Requests.
    pub requests: Option<f64>,
    /// Tokens.
    pub tokens: Option<f64>,
}

impl Left {
    fn of([requests, tokens]: [Option<f64>; 2]) -> Self {
        Self { requests, tokens }
    }
}
