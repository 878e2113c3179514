//! Reads a table of prices: from a model's name to what it costs.
//!
//! The form is LiteLLM's, and says much else of a model that is no business of ours, so names that are not known are passed
//! over. Invariant: a price that is known is read exactly, or the whole table is refused with the place of the fault.

use super::Tariff;
use forebay_schemas::Usage;
use serde_json::value::RawValue;
use std::collections::{BTreeMap, HashMap};

/// Digits after the point that a price may have: atto-dollars.
const DECIMALS: i32 = 18;
/// No token and no second costs so many dollars; whoever writes more has mixed up units.
const DOLLARS_MAX: u128 = 1_000_000;
/// LiteLLM's own explanation of the fields, which looks like a model.
const EXPLANATION: &str = "sample_spec";

/// Why a table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something in it is not as it must be.
    #[error("{file}:{line}:{column}: {fault}")]
    Entry {
        /// The file.
        file: String,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// What is wrong there.
        fault: String,
    },
    /// The day from which it holds is none.
    #[error("{file} holds from {day:?} on; write a day such as 2026-12-01")]
    Day {
        /// The file.
        file: String,
        /// What was given.
        day: String,
    },
}

pub(super) type Table = HashMap<String, Entry>;

/// What one model costs, in atto-dollars.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Entry {
    live: Rates,
    batches: Rates,
    /// Instead of the live ones, for prompts of more than so many tokens.
    above: BTreeMap<u64, Rates>,
    /// A second of a server.
    pub(super) second: Option<u128>,
}

/// The price of a token of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rates {
    input: Option<u128>,
    cached: Option<u128>,
    cache_write: Option<u128>,
    output: Option<u128>,
    reasoning: Option<u128>,
}

impl Rates {
    /// The same, with `other` where it says nothing.
    fn or(self, other: Self) -> Self {
        Self {
            input: self.input.or(other.input),
            cached: self.cached.or(other.cached),
            cache_write: self.cache_write.or(other.cache_write),
            output: self.output.or(other.output),
            reasoning: self.reasoning.or(other.reasoning),
        }
    }
}

impl Entry {
    /// What so many tokens cost; none where a kind that was used has no price.
    pub(super) fn tokens(&self, usage: Usage, tariff: Tariff) -> Option<u128> {
        let above = self.above.range(..usage.prompt_tokens).next_back().map(|(_, rates)| *rates);
        let live = above.unwrap_or_default().or(self.live);
        let rates = match tariff {
            Tariff::Live => live,
            Tariff::Batches => self.batches.or(live),
        };
        let cached = usage.cached_tokens.unwrap_or(0).min(usage.prompt_tokens);
        let written = usage.cached_write_tokens.unwrap_or(0).min(usage.prompt_tokens - cached);
        let reasoning = usage.reasoning_tokens.unwrap_or(0).min(usage.completion_tokens);
        let kinds = [
            (usage.prompt_tokens - cached - written, rates.input),
            (cached, rates.cached.or(rates.input)),
            (written, rates.cache_write.or(rates.input)),
            (usage.completion_tokens - reasoning, rates.output),
            (reasoning, rates.reasoning.or(rates.output)),
        ];
        let mut sum = 0u128;
        for (tokens, rate) in kinds.into_iter().filter(|(tokens, _)| *tokens > 0) {
            sum = sum.saturating_add(rate?.saturating_mul(tokens.into()));
        }
        Some(sum)
    }

    fn set(&mut self, field: &str, price: u128) {
        let (of, rates) = if let Some(of) = field.strip_suffix("_batches") {
            (of, &mut self.batches)
        } else if let Some((of, above)) =
            field.strip_suffix("k_tokens").and_then(|field| field.split_once("_above_"))
        {
            let Ok(thousands) = above.parse::<u64>() else { return };
            (of, self.above.entry(thousands.saturating_mul(1_000)).or_default())
        } else {
            (field, &mut self.live)
        };
        match of {
            "input_cost_per_token" => rates.input = Some(price),
            "cache_read_input_token_cost" => rates.cached = Some(price),
            // That of five minutes, which is what Forebay asks for.
            "cache_creation_input_token_cost" => rates.cache_write = Some(price),
            "output_cost_per_token" => rates.output = Some(price),
            "output_cost_per_reasoning_token" => rates.reasoning = Some(price),
            // A server's second is one price, however the table splits it.
            "input_cost_per_second" | "output_cost_per_second" => {
                self.second = Some(self.second.unwrap_or(0).saturating_add(price));
            }
            _ => {}
        }
    }
}

/// Whether a field of this name is a price that is read.
fn is_price(field: &str) -> bool {
    let mut entry = Entry::default();
    entry.set(field, 1);
    entry.second.is_some()
        || [entry.live, entry.batches]
            .iter()
            .chain(entry.above.values())
            .any(|rates| *rates != Rates::default())
}

pub(super) fn read(file: &str, text: &str) -> Result<Table, Error> {
    let wrong = |(line, column), fault| Error::Entry { file: file.to_owned(), line, column, fault };
    let models: BTreeMap<String, &RawValue> = serde_json::from_str(text)
        .map_err(|fault| wrong((fault.line(), fault.column()), format!("no table of prices: {fault}")))?;
    let mut table = Table::with_capacity(models.len());
    for (model, raw) in models {
        if model == EXPLANATION {
            continue;
        }
        let fields: BTreeMap<String, &RawValue> = serde_json::from_str(raw.get()).map_err(|_| {
            let fault = format!("{model:?} is {}; it must be a map with its prices", short(raw.get()));
            wrong(place(text, raw), fault)
        })?;
        let mut entry = Entry::default();
        for (field, raw) in fields.into_iter().filter(|(field, raw)| raw.get() != "null" && is_price(field)) {
            let price = atto(raw.get()).ok_or_else(|| {
                let given = short(raw.get());
                wrong(
                    place(text, raw),
                    format!("{field} of {model:?} is {given}; a price is a number of dollars from 0 on, below {DOLLARS_MAX}"),
                )
            })?;
            entry.set(&field, price);
        }
        if entry != Entry::default() {
            table.insert(model, entry);
        }
    }
    Ok(table)
}

/// Line and column of a part of a text.
fn place(text: &str, part: &RawValue) -> (usize, usize) {
    let offset = part.get().as_ptr().addr().saturating_sub(text.as_ptr().addr());
    let before = text.get(..offset).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or_default();
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

/// A decimal number of dollars as atto-dollars; digits beyond those are cut off.
pub(super) fn atto(number: &str) -> Option<u128> {
    let (mantissa, exponent) = match number.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (number, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Some(0);
    }
    let shift = exponent.checked_add(DECIMALS)?.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    let digits: u128 = digits.parse().ok()?;
    let scale = 10u128.checked_pow(shift.unsigned_abs());
    let atto = match scale {
        Some(scale) if shift >= 0 => digits.checked_mul(scale)?,
        Some(scale) => digits / scale,
        None if shift < 0 => 0,
        None => return None,
    };
    (atto < DOLLARS_MAX * 10u128.pow(DECIMALS.unsigned_abs())).then_some(atto)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_is_read_from_its_digits() {
        let check = |text: &str, expected: Option<u128>| assert_eq!(atto(text), expected, "{text}");
        check("0", Some(0));
        check("0.0", Some(0));
        check("1.5e-07", Some(150_000_000_000));
        check("0.00000015", Some(150_000_000_000));
        check("1E-18", Some(1));
        check("1e-19", Some(0));
        check("1e-999999", Some(0));
        check("999999", Some(999_999 * 10u128.pow(18)));
        check("1000000", None);
        check("1e99", None);
        check("-1", None);
        check("\"1\"", None);
        check("[1]", None);
    }
}
