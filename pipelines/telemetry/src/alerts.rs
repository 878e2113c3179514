//! What is told of spending, as metrics.
//!
//! Invariant: labels are words of the code.

use crate::instruments as declared;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Meter},
};

/// Counts alerts.
#[derive(Clone)]
pub struct AlertMeter {
    told: Counter<u64>,
    lost: Counter<u64>,
}

/// Where an alert was lost, or the minute that might have had one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Too many waited for the topic.
    Topic,
    /// The webhook did not take it.
    Webhook,
    /// It was no news any more when it could be posted.
    Late,
    /// The counters could not be read.
    Counters,
}

impl AlertMeter {
    pub(crate) fn new(meter: &Meter) -> Self {
        Self { told: declared::ALERTS.counter(meter), lost: declared::ALERTS_LOST.counter(meter) }
    }

    /// An alert is on its topic.
    pub fn told(&self, kind: &'static str, state: &'static str) {
        self.told.add(1, &[KeyValue::new("kind", kind), KeyValue::new("state", state)]);
    }

    /// So many were lost.
    pub fn lost(&self, count: usize, why: Lost) {
        let why = match why {
            Lost::Topic => "topic",
            Lost::Webhook => "webhook",
            Lost::Late => "late",
            Lost::Counters => "counters",
        };
        self.lost.add(u64::try_from(count).unwrap_or(u64::MAX), &[KeyValue::new("why", why)]);
    }
}
