//! How the model servers of a pool stand, as gauges: read when somebody collects, and told by nobody otherwise.
//!
//! Invariant: endpoints are configured, and models at one are bounded by the pool, so the series are too.

use crate::{instruments as declared, instruments::Declared, words::PerWord};
use opentelemetry::{KeyValue, metrics::Meter};
use std::sync::Arc;

/// Models may be named by clients.
const MODELS_MAX: usize = 32;
/// What a breaker may say; whichever state it is in, the others are 0.
const STATES: [&str; 4] = ["closed", "ramp", "open", "half_open"];

/// How an endpoint stands.
#[derive(Clone, Debug, Default)]
pub struct Endpoint {
    /// What it is called; no other at its origin is called so, or one would be told in place of the other.
    pub name: String,
    /// Scheme, host and port.
    pub endpoint: String,
    /// Whether it gets calls.
    pub is_ready: bool,
    /// Calls that run there.
    pub in_flight: usize,
    /// The most that may.
    pub places: usize,
    /// Tokens that these calls may take.
    pub tokens: u64,
    /// Calls that ended, by outcome.
    pub ended: Vec<(&'static str, u64)>,
    /// Requests that wait in its engine; absent where it did not say so of late.
    pub waiting: Option<f64>,
    /// The part of its KV cache that is in use; absent where it did not say so of late.
    pub kv_used: Option<f64>,
    /// Its models.
    pub models: Vec<EndpointModel>,
}

/// How a model at an endpoint stands.
#[derive(Clone, Debug, Default)]
pub struct EndpointModel {
    /// The model.
    pub model: String,
    /// `closed`, `ramp`, `open` or `half_open`.
    pub breaker: &'static str,
    /// The part of its calls that it gets, from 0 to 1.
    pub share: f64,
    /// Calls at once that it was seen to bear.
    pub limit: f64,
}

/// Reads how all endpoints stand.
type Read = Arc<dyn Fn() -> Vec<Endpoint> + Send + Sync>;

/// Tells how the endpoints stand that `read` gives.
pub(crate) fn watch(meter: &Meter, read: impl Fn() -> Vec<Endpoint> + Send + Sync + 'static) {
    let read: Read = Arc::new(read);
    let of_endpoint = |declared: &Declared, value: fn(&Endpoint) -> Option<f64>| {
        gauge(meter, declared, &read, move |endpoint, tell| {
            if let Some(value) = value(endpoint) {
                tell(value, &name(endpoint));
            }
        });
    };
    of_endpoint(&declared::POOL_READY, |endpoint| Some(f64::from(u8::from(endpoint.is_ready))));
    of_endpoint(&declared::POOL_IN_FLIGHT, |endpoint| Some(endpoint.in_flight as f64));
    of_endpoint(&declared::POOL_PLACES, |endpoint| Some(endpoint.places as f64));
    of_endpoint(&declared::POOL_TOKENS, |endpoint| Some(endpoint.tokens as f64));
    of_endpoint(&declared::POOL_WAITING, |endpoint| endpoint.waiting);
    of_endpoint(&declared::POOL_KV, |endpoint| endpoint.kv_used);
    let words = Arc::new(PerWord::new(MODELS_MAX));
    let of_model = |declared: &Declared, value: fn(&EndpointModel) -> f64| {
        let words = Arc::clone(&words);
        gauge(meter, declared, &read, move |endpoint, tell| {
            for model in &endpoint.models {
                let [origin, name] = name(endpoint);
                tell(value(model), &[origin, name, KeyValue::new("model", words.word(&model.model))]);
            }
        });
    };
    of_model(&declared::POOL_SHARE, |model| model.share);
    of_model(&declared::POOL_LIMIT, |model| model.limit);
    gauge(meter, &declared::POOL_BREAKER, &read, move |endpoint, tell| {
        for model in &endpoint.models {
            for state in STATES {
                let [origin, name] = name(endpoint);
                let labels = [
                    origin,
                    name,
                    KeyValue::new("model", words.word(&model.model)),
                    KeyValue::new("state", state),
                ];
                tell(f64::from(u8::from(model.breaker == state)), &labels);
            }
        }
    });
    let Declared { name: counter, unit, meaning, .. } = declared::POOL_CALLS;
    let builder = meter.u64_observable_counter(counter).with_unit(unit).with_description(meaning);
    builder
        .with_callback(move |counter| {
            for endpoint in read() {
                for (outcome, calls) in &endpoint.ended {
                    let [origin, name] = name(&endpoint);
                    counter.observe(*calls, &[origin, name, KeyValue::new("outcome", *outcome)]);
                }
            }
        })
        .build();
}

/// What tells an endpoint from all others.
fn name(endpoint: &Endpoint) -> [KeyValue; 2] {
    [KeyValue::new("endpoint", endpoint.endpoint.clone()), KeyValue::new("name", endpoint.name.clone())]
}

/// A gauge of which `values` tells those of one endpoint.
fn gauge(
    meter: &Meter,
    declared: &Declared,
    read: &Read,
    values: impl Fn(&Endpoint, &dyn Fn(f64, &[KeyValue])) + Send + Sync + 'static,
) {
    let read = Arc::clone(read);
    let builder = meter.f64_observable_gauge(declared.name);
    let builder = builder.with_unit(declared.unit).with_description(declared.meaning);
    builder
        .with_callback(move |gauge| {
            for endpoint in read() {
                values(&endpoint, &|value, labels| gauge.observe(value, labels));
            }
        })
        .build();
}
