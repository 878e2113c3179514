//! Prices for `cost`, from tables in LiteLLM's form (`model_prices_and_context_window.json`), as the calls that were billed use
//! them: live rates, those above so many tokens included.
//!
//! Invariant: a price is a whole number of atto-dollars (10⁻¹⁸ USD) taken from the digits of the table, no float touches it, and a
//! cost is rounded once, half up to a nano-dollar. A price that is known is read exactly or the table is refused.

use arrow::compute::kernels::cast_utils::parse_decimal;
use arrow::datatypes::Decimal128Type;
use serde_json::value::RawValue;
use std::collections::{BTreeMap, HashMap};

/// No token costs so many dollars; whoever writes more has mixed up units.
const DOLLARS_MAX: i128 = 1_000_000;
const ATTO_PER_DOLLAR: i128 = 10i128.pow(18);
const ATTO_PER_NANO: i128 = 10i128.pow(9);
/// LiteLLM's own explanation of the fields, which looks like a model.
const EXPLANATION: &str = "sample_spec";

/// Why a table of prices cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not JSON of the form.
    #[error("{file} is no table of prices; it must map each model to a map of its prices, as LiteLLM's does")]
    Form {
        /// The file.
        file: String,
        /// What and where.
        #[source]
        source: serde_json::Error,
    },
    /// A price is none.
    #[error(
        "{file}: {field} of {model:?} is {given}; a price is a number of dollars from 0 on, below {DOLLARS_MAX}"
    )]
    Price {
        /// The file.
        file: String,
        /// The model.
        model: String,
        /// The field of it.
        field: String,
        /// What is written there.
        given: String,
    },
}

/// The prices of models, each from a moment on.
#[derive(Debug, Default)]
pub struct Prices {
    /// With the moment from which each holds, in µs since 1970; oldest first.
    tables: Vec<(i64, HashMap<String, Entry>)>,
    /// The texts that they were read from, each with its moment, in the order of giving: two processes with one hash have the same prices.
    texts: blake3::Hasher,
}

/// Tokens of one call, or the sum of many alike.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tokens {
    pub input: i64,
    pub cached_read: i64,
    pub cached_write: i64,
    pub output: i64,
}

#[derive(Debug, Default)]
struct Entry {
    live: Rates,
    /// Instead of the live ones, for inputs of more than so many tokens.
    above: BTreeMap<i64, Rates>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    input: Option<i128>,
    cached_read: Option<i128>,
    cached_write: Option<i128>,
    output: Option<i128>,
}

impl Prices {
    /// The same with the table of a file, which holds from a moment on, in µs since 1970. Of two from the same moment the later one
    /// given wins.
    pub fn with_table(mut self, file: &str, text: &str, from_us: i64) -> Result<Self, Error> {
        self.tables.push((from_us, read(file, text)?));
        // The length keeps apart what is of one table and what of the next.
        self.texts
            .update(&from_us.to_le_bytes())
            .update(&(text.len() as u64).to_le_bytes())
            .update(text.as_bytes());
        self.tables.sort_by_key(|(from_us, _)| *from_us);
        Ok(self)
    }

    /// By which processes tell whether they have the same prices.
    pub(crate) fn hash(&self) -> blake3::Hash {
        self.texts.finalize()
    }

    /// What these tokens cost at a moment, in nano-USD; none where a kind that was used has no price.
    pub(super) fn of(&self, model: &str, tokens: Tokens, at_us: i64) -> Option<i64> {
        let current = self.tables.iter().rev().filter(|(from_us, _)| *from_us <= at_us);
        let mut entries = current.filter_map(|(_, table)| table.get(model));
        let atto = entries.next()?.cost(tokens)?;
        i64::try_from(atto.checked_add(ATTO_PER_NANO / 2)?.div_euclid(ATTO_PER_NANO)).ok()
    }
}

impl Entry {
    fn cost(&self, tokens: Tokens) -> Option<i128> {
        let above = self.above.range(..tokens.input).next_back().map(|(_, rates)| *rates).unwrap_or_default();
        let rates = above.or(self.live);
        let cached_read = tokens.cached_read.min(tokens.input);
        let cached_write = tokens.cached_write.min(tokens.input - cached_read);
        let kinds = [
            (tokens.input - cached_read - cached_write, rates.input),
            (cached_read, rates.cached_read.or(rates.input)),
            (cached_write, rates.cached_write.or(rates.input)),
            (tokens.output, rates.output),
        ];
        let mut sum = 0i128;
        for (tokens, rate) in kinds.into_iter().filter(|(tokens, _)| *tokens > 0) {
            sum = sum.checked_add(rate?.checked_mul(tokens.into())?)?;
        }
        Some(sum)
    }

    /// The place of a field's price; none where the field is no price of `cost`.
    fn rate(&mut self, field: &str) -> Option<&mut Option<i128>> {
        let above = field.strip_suffix("k_tokens").and_then(|field| field.split_once("_above_"));
        let (of, above) = match above {
            Some((of, thousands)) => (of, Some(thousands.parse::<i64>().ok()?.checked_mul(1_000)?)),
            None => (field, None),
        };
        let kind: fn(&mut Rates) -> &mut Option<i128> = match of {
            "input_cost_per_token" => |rates| &mut rates.input,
            "cache_read_input_token_cost" => |rates| &mut rates.cached_read,
            "cache_creation_input_token_cost" => |rates| &mut rates.cached_write,
            "output_cost_per_token" => |rates| &mut rates.output,
            _ => return None,
        };
        let rates = match above {
            Some(tokens) => self.above.entry(tokens).or_default(),
            None => &mut self.live,
        };
        Some(kind(rates))
    }
}

impl Rates {
    /// The same, with `other` where it says nothing.
    fn or(self, other: Self) -> Self {
        Self {
            input: self.input.or(other.input),
            cached_read: self.cached_read.or(other.cached_read),
            cached_write: self.cached_write.or(other.cached_write),
            output: self.output.or(other.output),
        }
    }
}

fn read(file: &str, text: &str) -> Result<HashMap<String, Entry>, Error> {
    let models: BTreeMap<String, BTreeMap<String, &RawValue>> =
        serde_json::from_str(text).map_err(|source| Error::Form { file: file.to_owned(), source })?;
    let mut table = HashMap::with_capacity(models.len());
    for (model, fields) in models {
        if model == EXPLANATION {
            continue;
        }
        let mut entry = Entry::default();
        for (field, raw) in fields.into_iter().filter(|(_, raw)| raw.get() != "null") {
            let Some(rate) = entry.rate(&field) else { continue };
            *rate = Some(atto(raw.get()).ok_or_else(|| Error::Price {
                file: file.to_owned(),
                model: model.clone(),
                field: field.clone(),
                given: raw.get().chars().take(40).collect(),
            })?);
        }
        table.insert(model, entry);
    }
    Ok(table)
}

/// A decimal number of dollars as atto-dollars; digits beyond those are cut off.
fn atto(number: &str) -> Option<i128> {
    let atto = parse_decimal::<Decimal128Type>(number, 38, 18).ok()?;
    (0..DOLLARS_MAX * ATTO_PER_DOLLAR).contains(&atto).then_some(atto)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = r#"{
        "sample_spec": {"input_cost_per_token": 0.0, "max_tokens": "a text"},
        "small": {
            "input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07, "mode": "chat",
            "cache_read_input_token_cost": 7.5e-08, "cache_creation_input_token_cost": 1.9e-07,
            "cache_creation_input_token_cost_above_1hr": 1, "input_cost_per_token_batches": 7.5e-08
        },
        "long": {"input_cost_per_token": 1e-06, "input_cost_per_token_above_200k_tokens": 2e-06, "output_cost_per_token": 0.00001},
        "odd": {"input_cost_per_token": 3.3333e-10, "output_cost_per_token": null}
    }"#;

    #[track_caller]
    fn check(model: &str, [input, cached_read, cached_write, output]: [i64; 4], expected: Option<i64>) {
        let prices = Prices::default().with_table("t.json", TABLE, 0).unwrap();
        let tokens = Tokens { input, cached_read, cached_write, output };
        assert_eq!(prices.of(model, tokens, 0), expected, "{model}");
    }

    /// The same numbers as the billing of calls is tested with.
    #[test]
    fn tokens_are_paid_by_their_kind_as_calls_are() {
        check("small", [1_000, 0, 0, 100], Some(150_000 + 60_000));
        check("small", [1_000, 400, 0, 0], Some(600 * 150 + 400 * 75));
        check("small", [100, 400, 0, 0], Some(100 * 75));
        check("small", [1_000, 400, 500, 0], Some(100 * 150 + 400 * 75 + 500 * 190));
        check("long", [1_000, 400, 500, 0], Some(1_000 * 1_000));
        check("long", [200_000, 0, 0, 0], Some(200_000_000));
        check("long", [200_001, 0, 0, 1], Some(400_002_000 + 10_000));
        check("odd", [1_000, 0, 0, 0], Some(333));
        check("odd", [1, 0, 0, 0], Some(0));
        check("odd", [3, 0, 0, 0], Some(1));
    }

    #[test]
    fn what_has_no_price_costs_nothing_that_is_known() {
        check("unknown", [1, 0, 0, 0], None);
        check("sample_spec", [1, 0, 0, 0], None);
        check("odd", [1, 0, 0, 1], None);
    }

    #[test]
    fn a_price_holds_from_its_moment_on_and_what_a_new_table_leaves_out_stays() {
        let prices = Prices::default()
            .with_table("new", r#"{"m": {"input_cost_per_token": 2e-9}}"#, 100)
            .and_then(|prices| {
                let old = r#"{"m": {"input_cost_per_token": 1e-9}, "n": {"input_cost_per_token": 5e-9}}"#;
                prices.with_table("old", old, 0)
            })
            .unwrap();
        let one = Tokens { input: 1, ..Tokens::default() };
        let cost = |model, at| prices.of(model, one, at);
        assert_eq!(
            [cost("m", 99), cost("m", 100), cost("n", 100), cost("m", -1)],
            [Some(1), Some(2), Some(5), None]
        );
    }

    #[test]
    fn a_wrong_table_is_refused_with_file_model_and_value() {
        let refused = |text| Prices::default().with_table("t.json", text, 0).unwrap_err().to_string();
        assert_eq!(
            refused(r#"{"m": {"input_cost_per_token": -1e-7}}"#),
            "t.json: input_cost_per_token of \"m\" is -1e-7; a price is a number of dollars from 0 on, below 1000000"
        );
        assert!(refused(r#"{"m": {"input_cost_per_token": "1e-7"}}"#).contains("\"1e-7\""));
        assert!(refused(r#"{"m": {"input_cost_per_token": 1000000}}"#).contains("below 1000000"));
        assert!(refused(r#"{"m": 3}"#).starts_with("t.json is no table of prices"));
    }
}
