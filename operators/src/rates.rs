//! Keeps the limits of an endpoint in a store, for all processes that send there.
//!
//! It stands here, as it joins calls with stores. A rate is named by what the settings call the endpoint and by the model, so
//! processes with the same settings mean the same rate.

use forebay_calls::shared::{Ask, Left, SLICE, Shared, Slice, Unreachable};
use forebay_stores::{Rates, rates};
use futures::future::BoxFuture;
use std::sync::Arc;

// A slice that is used for longer than it counts would let more through than the limit.
const _: () = assert!(SLICE.as_millis() <= rates::SLICE.as_millis());

/// See the module.
pub struct SharedRates {
    rates: Arc<dyn Rates>,
    endpoint: String,
    /// Tells this process from others.
    sharer: String,
}

impl SharedRates {
    /// The rates of an endpoint, by its name in the settings. `sharer` is no other process's.
    pub fn new(rates: Arc<dyn Rates>, endpoint: String, sharer: String) -> Self {
        Self { rates, endpoint, sharer }
    }

    /// Clients name models, and may do so at any length.
    fn name(&self, model: &str) -> String {
        blake3::hash(format!("{}\n{model}", self.endpoint).as_bytes()).to_hex()[..32].to_owned()
    }

    async fn taken(&self, model: &str, ask: &Ask) -> Result<Slice, forebay_stores::Error> {
        let heard = |left: Option<Left>| {
            left.map(|Left { level, full, refills, reset }| rates::Heard { level, full, refills, reset })
        };
        let back =
            ask.back.iter().map(|(second, amount)| rates::Back { second: *second, amount: (*amount).into() });
        let ask = rates::Ask {
            limits: ask.limits.into(),
            need: ask.need.into(),
            want: ask.want.into(),
            back: back.collect(),
            beyond: ask.beyond.into(),
            heard: ask.heard.map(heard).into(),
            pause: ask.pause,
        };
        let slice = self.rates.take(&self.name(model), &self.sharer, &ask).await?;
        Ok(Slice {
            amount: [slice.amount.requests, slice.amount.tokens],
            second: slice.second,
            is_limited: slice.is_limited,
            wait: slice.wait,
            pause: slice.pause,
            sharers: slice.sharers,
        })
    }
}

impl Shared for SharedRates {
    fn take<'a>(&'a self, model: &'a str, ask: &'a Ask) -> BoxFuture<'a, Result<Slice, Unreachable>> {
        Box::pin(async move { self.taken(model, ask).await.map_err(|error| Unreachable(Box::new(error))) })
    }
}
