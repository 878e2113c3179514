//! What calls cost, from tables of prices in LiteLLM's form (`model_prices_and_context_window.json`).
//!
//! A price is a whole number of atto-dollars (10⁻¹⁸ USD), taken from the digits of the table. Of several tables the one that
//! holds from the latest day on, and not from a day to come, is asked first. An entry is found by the endpoint
//! (`http://gpu-1:8000`), else by the model that is asked for, else by the name that the model gave itself.
//!
//! Invariant: no float touches money, and a cost is rounded once, at its end, half up to a nano-dollar. What has no price
//! costs null and never 0.

mod table;

use crate::limits::rfc3339;
use forebay_operator::Clock;
use forebay_schemas::{NanoUsd, Usage};
use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
    time::{Duration, UNIX_EPOCH},
};
pub use table::Error;
use table::{Entry, Table};

/// Of how many models without a price anybody is warned.
const WARNED_MAX: usize = 256;
/// Atto-dollars in a nano-dollar.
const ATTO_PER_NANO: u128 = 1_000_000_000;

/// The prices of models.
pub struct Prices {
    /// With the moment from which each holds, in milliseconds since 1970; oldest first.
    tables: Vec<(i64, Table)>,
    warned: Mutex<HashSet<String>>,
    clock: Clock,
}

/// By which of its prices a call is paid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tariff {
    /// Answered at once.
    #[default]
    Live,
    /// Answered within a day, by a batch API.
    Batches,
}

impl Prices {
    /// None yet.
    pub fn new(clock: Clock) -> Self {
        Self { tables: Vec::new(), warned: Mutex::default(), clock }
    }

    /// The same with the table of a file, which holds from a day on (`2026-12-01`, from midnight UTC) or always.
    pub fn with_table(mut self, file: &str, text: &str, from: Option<&str>) -> Result<Self, Error> {
        let from_ms = match from {
            None => 0,
            Some(day) => {
                let midnight = rfc3339(&format!("{day}T00:00:00Z"))
                    .ok_or_else(|| Error::Day { file: file.to_owned(), day: day.to_owned() })?;
                let since = midnight.duration_since(UNIX_EPOCH).unwrap_or_default();
                i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
            }
        };
        self.tables.push((from_ms, table::read(file, text)?));
        // Of two from the same day the later one given wins: the sort keeps their order.
        self.tables.sort_by_key(|(from_ms, _)| *from_ms);
        Ok(self)
    }

    /// The price now, by the first of these names that has one.
    fn entry(&self, names: &[&str]) -> Option<&Entry> {
        let now_ms = self.clock.now_ms();
        let current = self.tables.iter().rev().filter(|(from_ms, _)| *from_ms <= now_ms);
        names.iter().find_map(|name| current.clone().find_map(|(_, table)| table.get(*name)))
    }

    /// What an answer cost that took these tokens.
    pub fn of(&self, names: &[&str], usage: Usage, tariff: Tariff) -> Option<NanoUsd> {
        Some(nano(self.entry(names)?.tokens(usage, tariff)?))
    }

    /// What this share of a server's time cost, where it is paid by its time.
    pub(crate) fn of_time(&self, names: &[&str], share: Duration) -> Option<NanoUsd> {
        let atto_per_second = self.entry(names)?.second?;
        Some(nano(atto_per_second.saturating_mul(share.as_nanos()) / 1_000_000_000))
    }

    /// Whether a server is paid by its time.
    pub(crate) fn is_by_time(&self, names: &[&str]) -> bool {
        self.entry(names).is_some_and(|entry| entry.second.is_some())
    }

    /// Warns of a model without a price, once.
    pub(crate) fn warn(&self, model: &str) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.len() < WARNED_MAX && warned.insert(model.to_owned()) {
            tracing::warn!(model, "the model has no price; its calls have no cost");
        }
    }
}

/// An amount of money, written as a decimal number of dollars.
pub fn dollars(text: &str) -> Option<NanoUsd> {
    table::atto(text).map(nano)
}

/// The one rounding.
fn nano(atto: u128) -> NanoUsd {
    let nano = atto.saturating_add(ATTO_PER_NANO / 2) / ATTO_PER_NANO;
    NanoUsd(i64::try_from(nano).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = r#"{
        "sample_spec": {"input_cost_per_token": 0.0, "max_tokens": "a text"},
        "small": {
            "input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07, "mode": "chat",
            "cache_read_input_token_cost": 7.5e-08, "cache_creation_input_token_cost": 1.9e-07,
            "cache_creation_input_token_cost_above_1hr": 1, "input_cost_per_token_batches": 7.5e-08,
            "output_cost_per_token_batches": 3e-07
        },
        "long": {
            "input_cost_per_token": 1e-06, "input_cost_per_token_above_200k_tokens": 2e-06,
            "output_cost_per_token": 0.00001, "output_cost_per_reasoning_token": 2e-5
        },
        "odd": {"input_cost_per_token": 3.3333e-10, "output_cost_per_token": null},
        "picture": {"input_cost_per_image": 0.04},
        "http://gpu-1:8000": {"input_cost_per_second": 0.0005, "output_cost_per_second": 0.0}
    }"#;

    fn prices() -> Prices {
        Prices::new(Clock::System).with_table("t.json", TABLE, None).unwrap()
    }

    #[track_caller]
    fn check(name: &str, usage: Usage, tariff: Tariff, expected: Option<i64>) {
        assert_eq!(prices().of(&[name], usage, tariff).map(|cost| cost.0), expected, "{name}");
    }

    #[test]
    fn tokens_are_paid_by_their_kind() {
        let cached = |prompt, cached| Usage { cached_tokens: Some(cached), ..Usage::of(prompt, 0) };
        check("small", Usage::of(1_000, 100), Tariff::Live, Some(150_000 + 60_000));
        check("small", cached(1_000, 400), Tariff::Live, Some(600 * 150 + 400 * 75));
        check("small", cached(100, 400), Tariff::Live, Some(100 * 75));
        let written = Usage { cached_write_tokens: Some(500), ..cached(1_000, 400) };
        check("small", written, Tariff::Live, Some(100 * 150 + 400 * 75 + 500 * 190));
        check("long", written, Tariff::Live, Some(1_000 * 1_000));
        check("small", Usage::of(1_000, 100), Tariff::Batches, Some(75_000 + 30_000));
        check("long", Usage::of(200_000, 0), Tariff::Live, Some(200_000_000));
        check("long", Usage::of(200_001, 1), Tariff::Live, Some(400_002_000 + 10_000));
        let thought = Usage { reasoning_tokens: Some(3), ..Usage::of(0, 10) };
        check("long", thought, Tariff::Live, Some(7 * 10_000 + 3 * 20_000));
    }

    #[test]
    fn what_has_no_price_costs_null() {
        check("unknown", Usage::of(1, 1), Tariff::Live, None);
        check("picture", Usage::of(1, 1), Tariff::Live, None);
        check("sample_spec", Usage::of(1, 1), Tariff::Live, None);
        check("odd", Usage::of(1, 1), Tariff::Live, None);
    }

    #[test]
    fn a_cost_is_rounded_once_and_half_up() {
        check("odd", Usage::of(1, 0), Tariff::Live, Some(0));
        check("odd", Usage::of(3, 0), Tariff::Live, Some(1));
        // 0.33333 × 1,000 = 333.33, and not 1,000 times a rounded 0.
        check("odd", Usage::of(1_000, 0), Tariff::Live, Some(333));
        assert_eq!((nano(499_999_999), nano(500_000_000)), (NanoUsd(0), NanoUsd(1)));
    }

    #[test]
    fn a_server_is_paid_by_the_second() {
        let cost = prices().of_time(&["http://gpu-1:8000", "small"], Duration::from_millis(1_500));
        assert_eq!(cost, Some(NanoUsd(750_000)));
        assert!(!prices().is_by_time(&["http://gpu-2:8000", "small"]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_price_holds_from_its_day_on() {
        const HOUR: Duration = Duration::from_secs(3_600);
        // 2026-11-30, 23:30 UTC.
        let prices = Prices::new(Clock::starting_at(1_796_081_400_000))
            .with_table("new.json", r#"{"m": {"input_cost_per_token": 2e-9}}"#, Some("2026-12-01"))
            .unwrap()
            .with_table(
                "old.json",
                r#"{"m": {"input_cost_per_token": 1e-9}, "n": {"input_cost_per_token": 5e-9}}"#,
                None,
            )
            .unwrap();
        let cost = |model: &str| prices.of(&[model], Usage::of(1, 0), Tariff::Live).map(|cost| cost.0);
        assert_eq!((cost("m"), cost("n")), (Some(1), Some(5)));
        tokio::time::advance(HOUR).await;
        assert_eq!((cost("m"), cost("n")), (Some(2), Some(5)), "what the new table leaves out stays");
    }

    #[test]
    fn a_wrong_table_is_told_of_with_its_place() {
        let refused = |text: &str| {
            Prices::new(Clock::System).with_table("t.json", text, None).err().unwrap().to_string()
        };
        assert_eq!(
            refused("{\"m\": {\n  \"input_cost_per_token\": -1e-7}}"),
            "t.json:2:27: input_cost_per_token of \"m\" is -1e-7; a price is a number of dollars from 0 on, below 1000000"
        );
        assert!(refused("{\"m\": {\"input_cost_per_token\": \"1e-7\"}}").starts_with("t.json:1:32: "));
        assert!(refused("{\"m\": {\"input_cost_per_token\": 1e9}}").contains("below 1000000"));
        assert!(refused("{\"m\": 3}").starts_with("t.json:1:7: \"m\" is 3; "));
        assert!(refused("{\"m\": {}").starts_with("t.json:1:8: "));
        let day = Prices::new(Clock::System).with_table("t.json", "{}", Some("1.12.2026")).err().unwrap();
        assert_eq!(day.to_string(), "t.json holds from \"1.12.2026\" on; write a day such as 2026-12-01");
    }
}
