//! Reads an output log: what was asked, which tier answered, what it took and how good it was.
//!
//! A line is a JSON object, or one that `kcat -J` put around it, and is told by its fields:
//!
//! | Line | Is told by | Gives |
//! |---|---|---|
//! | a request | `prompt` or `messages` | what was asked, under `tenant` and `id` |
//! | a row of `outcomes` | `request_id` and `cache_status` | the tier (`tier`, else `model_served`), `billed_nano_usd`, `verdict`, `passages` |
//! | a result | `id` and `status` | the same, less exactly: `model`, `cost_nano_usd` |
//! | a row of `attempts` | `attempt_id` | the tiers that were asked (`tier`, else `model`), and what each took |
//! | an audit or a label | `request_id` and `quality` | how good the answer was, 0 to 1; the mean of several |
//!
//! Invariant: what cannot be used is counted by its reason, and what cannot be read is an error with its file and line.

use crate::console::wrong;
use anyhow::Context as _;
use forebay_calls::tiers::classifier::{Features, Sight, mixed};
use forebay_schemas::{Attempt, Message, Record as _, Request, Role};
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{BufRead as _, BufReader},
    path::PathBuf,
};

/// The most requests of a log: some gigabytes of features.
const REQUESTS_MAX: usize = 500_000;
/// Of ten requests so many are held out.
const HELD_OUT_OF_TEN: u64 = 4;

/// What one tier made of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub tier: usize,
    /// What its tries took, in nano-dollars.
    pub cost: f64,
    /// How good its answer was, 0 to 1; 0 where the next tier was asked.
    pub quality: f64,
    /// Whether the next tier was asked.
    pub escalated: bool,
}

/// A request and what became of it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub features: Features,
    pub answers: Vec<Answer>,
    /// Whether it is kept for measuring, and nothing is learned from it.
    pub is_held_out: bool,
}

/// All that a log says.
#[derive(Debug, Default)]
pub struct Log {
    pub asked: Vec<Asked>,
    /// How many have a quality that somebody gave; the verdict tells that of the others.
    pub judged: usize,
    /// How many were left out, by the reason.
    pub left_out: BTreeMap<&'static str, usize>,
}

type Key = (String, String);

/// All lines about one request.
#[derive(Default)]
struct Lines {
    request: Option<Request>,
    outcome: Option<Outcome>,
    /// The tries of each tier by their ids, as a row may lie there twice, and what each took.
    attempts: BTreeMap<usize, BTreeMap<String, Option<i64>>>,
    /// Whether its tries say of which tiers they are: then its row does so too, but for an answer of none.
    has_tiers: bool,
    qualities: Vec<f64>,
}

/// The row of a request, or its result.
struct Outcome {
    generation: i64,
    /// Rows say more than results.
    is_row: bool,
    tier: Option<usize>,
    names_tier: bool,
    cost: Option<i64>,
    is_hit: bool,
    status: String,
    passages: usize,
}

impl Outcome {
    fn of(value: &Value, is_row: bool, tier_of: impl Fn([&str; 2]) -> Option<usize>) -> Self {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
        let integer = |name: &str| value.get(name).and_then(Value::as_i64);
        let (model, cost, cache) = match is_row {
            true => ("model_served", "billed_nano_usd", "cache_status"),
            false => ("model", "cost_nano_usd", "cache"),
        };
        Self {
            generation: integer("generation").unwrap_or(0),
            is_row,
            tier: tier_of(["tier", model]),
            names_tier: !text("tier").is_empty(),
            cost: integer(cost),
            is_hit: text(cache) == "hit",
            status: text("status").to_owned(),
            passages: integer("passages").and_then(|count| usize::try_from(count).ok()).unwrap_or(0),
        }
    }
}

/// Reads these files; `tiers` are the names of the models, the cheapest first.
pub fn read(files: &[PathBuf], tiers: &[String], seed: u64) -> anyhow::Result<Log> {
    let mut requests: HashMap<Key, Lines> = HashMap::new();
    for path in files {
        let name = path.display();
        let file = File::open(path).map_err(|fault| wrong(format!("could not read log {name}: {fault}")))?;
        for (number, line) in (1..).zip(BufReader::new(file).lines()) {
            let line = line.with_context(|| format!("could not read log {name} at line {number}"))?;
            if line.trim().is_empty() {
                continue;
            }
            take(&line, tiers, &mut requests).map_err(|fault| wrong(format!("{name}:{number}: {fault}")))?;
            if requests.len() > REQUESTS_MAX {
                return Err(wrong(format!("{name}:{number}: the log has more than {REQUESTS_MAX} requests")));
            }
        }
    }
    let mut log = Log::default();
    // In one order, whatever the map's.
    let requests: BTreeMap<_, _> = requests.into_iter().collect();
    for (_, lines) in requests {
        let was_judged = !lines.qualities.is_empty();
        match lines.asked(seed) {
            Ok(asked) => {
                log.asked.push(asked);
                log.judged += usize::from(was_judged);
            }
            Err(reason) => *log.left_out.entry(reason).or_default() += 1,
        }
    }
    Ok(log)
}

/// Takes one line in.
fn take(line: &str, tiers: &[String], requests: &mut HashMap<Key, Lines>) -> Result<(), String> {
    let value: Value = serde_json::from_str(line).map_err(|fault| format!("it is no JSON: {fault}"))?;
    let value = match value.get("payload") {
        Some(Value::String(payload)) if value.get("topic").is_some() => {
            serde_json::from_str(payload).map_err(|fault| format!("its payload is no JSON: {fault}"))?
        }
        _ => value,
    };
    if !value.is_object() {
        return Err("it is no JSON object".to_owned());
    }
    let has = |name: &str| value.get(name).is_some_and(|value| !value.is_null());
    let tier_of = |names: [&str; 2]| {
        let name = names.iter().find_map(|name| value.get(*name)?.as_str())?;
        tiers.iter().position(|tier| tier == name)
    };
    if has("prompt") || has("messages") {
        let body = value.to_string();
        let request =
            Request::decode(body.as_bytes()).map_err(|fault| format!("it is no request: {fault}"))?;
        lines_of(&value, "id", requests)?.request = Some(request);
    } else if has("attempt_id") {
        let row: Attempt = serde_json::from_value(value.clone())
            .map_err(|fault| format!("it is no row of attempts: {fault}"))?;
        if let Some(tier) = tier_of(["tier", "model"]) {
            let lines = lines_of(&value, "request_id", requests)?;
            lines.has_tiers |= row.tier.is_some();
            lines.attempts.entry(tier).or_default().insert(row.attempt_id, row.cost_nano_usd);
        }
    } else if has("request_id") && has("quality") {
        let quality = value["quality"].as_f64().filter(|quality| (0.0..=1.0).contains(quality));
        let quality =
            quality.ok_or_else(|| format!("its quality is {}; it may be 0 to 1", value["quality"]))?;
        lines_of(&value, "request_id", requests)?.qualities.push(quality);
    } else if has("status") && (has("id") || has("request_id")) {
        let lines = lines_of(&value, if has("request_id") { "request_id" } else { "id" }, requests)?;
        let outcome = Outcome::of(&value, has("request_id"), tier_of);
        let known = lines.outcome.as_ref().map(|known| (known.generation, known.is_row));
        // The last generation, and of a row and a result the row.
        if known.is_none_or(|known| known <= (outcome.generation, outcome.is_row)) {
            lines.outcome = Some(outcome);
        }
    } else {
        return Err("it is no request, result, row of outcomes or attempts, and has no quality".to_owned());
    }
    Ok(())
}

/// The lines about the request that this one names.
fn lines_of<'a>(
    value: &Value,
    name: &str,
    requests: &'a mut HashMap<Key, Lines>,
) -> Result<&'a mut Lines, String> {
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let id = text(name).ok_or_else(|| format!("it has no {name}"))?;
    let tenant = text("tenant").unwrap_or("default");
    Ok(requests.entry((tenant.to_owned(), id.to_owned())).or_default())
}

impl Lines {
    /// The request, or why it cannot be used.
    fn asked(self, seed: u64) -> Result<Asked, &'static str> {
        let request = self.request.ok_or("the log does not say what was asked")?;
        let outcome = self.outcome.ok_or("the log does not say how it ended")?;
        if outcome.is_hit {
            return Err("it was answered from the cache");
        }
        let verdict = match outcome.status.as_str() {
            "answered" => 1.0,
            "blocked" => 0.0,
            _ => return Err("it has no answer"),
        };
        if outcome.is_row && self.has_tiers && !outcome.names_tier {
            return Err("none of the tiers answered it: something stood in");
        }
        // A model may name itself otherwise than it is asked for; the highest tier that was asked is the one.
        let served = outcome.tier.or_else(|| self.attempts.keys().last().copied());
        let served = served.ok_or("none of the tiers answered it")?;
        let quality = match self.qualities.len() {
            0 => verdict,
            count => self.qualities.iter().sum::<f64>() / super::curve::float(count),
        };
        let mut answers = Vec::new();
        for (tier, tries) in self.attempts.range(..served) {
            let cost = of_all(tries.values()).ok_or("what a tier took is not known")?;
            answers.push(Answer { tier: *tier, cost: of_money(cost), quality: 0.0, escalated: true });
        }
        // What a better tier took whose answer never came is part of what this answer took.
        let mut own = self.attempts.range(served..).flat_map(|(_, tries)| tries.values()).peekable();
        let cost = if own.peek().is_some() { of_all(own) } else { outcome.cost };
        let cost = of_money(cost.ok_or("what it took is not known")?);
        answers.push(Answer { tier: served, cost, quality, escalated: false });
        let question = request.question();
        let features = Features::of(Sight {
            question: &question,
            turns: turns(&request),
            passages: outcome.passages,
            has_tools: request.sampling.tools.is_some(),
            has_response_format: request.sampling.response_format.is_some(),
        });
        // By the question: one that is asked again must not be measured by what was learned from it.
        let mark = question.bytes().fold(mixed(seed), |mark, byte| mixed(mark ^ u64::from(byte)));
        Ok(Asked { features, answers, is_held_out: mark % 10 < HELD_OUT_OF_TEN })
    }
}

/// What the user and the model said, as the model's client counts it.
fn turns(request: &Request) -> usize {
    let is_turn = |message: &&Message| matches!(message.role, Role::User | Role::Assistant);
    request.messages.as_ref().map_or(1, |messages| messages.iter().filter(is_turn).count())
}

/// The sum of these costs, where all are known.
fn of_all<'a>(costs: impl Iterator<Item = &'a Option<i64>>) -> Option<i64> {
    costs.copied().try_fold(0_i64, |sum, cost| sum.checked_add(cost?))
}

#[expect(clippy::cast_precision_loss, reason = "nine digits of a cost are enough")]
fn of_money(nano_usd: i64) -> f64 {
    nano_usd as f64
}
