//! What was paid for, and what it is explained by: the calls that a model server has counted beside the rows on `attempts`.
//!
//! Oracle: a model is called for a call id once, and again only after a try that failed or is told of as ambiguous:
//! calls ≤ ok + failed + ambiguous, for each question by itself. Fewer calls than that are no fault: what was told of may never
//! have been sent. An answered request that no cache answered has one try that is ok.

use crate::{
    Client,
    model::{ModelServer, last_said},
};
use forebay_schemas::{Attempt, Record as _};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// What the rows and the model server say, side by side.
#[derive(Debug, Default)]
pub struct Account {
    /// Calls that the model server has counted.
    pub calls: usize,
    /// Tries that were answered.
    pub ok: usize,
    /// Tries that were not: refused, broken, taken back.
    pub failed: usize,
    /// Tries of which nobody knows how they ended.
    pub ambiguous: usize,
    /// Requests whose call was under way at more crashes than it is tried again after.
    pub given_up: usize,
    /// Calls that no row explains, and whatever else cannot be.
    pub unexplained: Vec<String>,
}

impl Account {
    /// The account of requests, each with its result by its id, and of what each of them asked.
    pub fn of<'a>(
        client: &Client,
        model: &ModelServer,
        requests: impl IntoIterator<Item = (&'a str, &'a Value, String)>,
        limit: Duration,
    ) -> Self {
        let mut calls = BTreeMap::<String, usize>::new();
        for call in model.calls() {
            // Passages stand above the question.
            let asked = last_said(&call).lines().last().unwrap_or_default();
            *calls.entry(asked.to_owned()).or_default() += 1;
        }
        let mut account = Self { calls: calls.values().sum(), ..Self::default() };
        // A row that came twice is one row.
        let mut rows = BTreeMap::new();
        for record in client.read("attempts").to_the_end(limit) {
            let Ok(row) = Attempt::decode(record.value.as_deref().unwrap_or_default()) else {
                account.unexplained.push(format!("no row: {record:?}"));
                continue;
            };
            let before = rows.insert(row.attempt_id.clone(), row.clone());
            if before.is_some_and(|before| before.status != row.status) {
                account.unexplained.push(format!("told otherwise before: {row:?}"));
            }
        }
        let mut of_requests = BTreeMap::<&str, Vec<&Attempt>>::new();
        for row in rows.values() {
            of_requests.entry(&row.request_id).or_default().push(row);
        }
        let mut tries_of = BTreeMap::<String, usize>::new();
        for (id, result, asked) in requests {
            let tries = of_requests.remove(id).unwrap_or_default();
            account.add(id, result, &tries);
            *tries_of.entry(asked).or_default() += tries.len();
        }
        for (asked, made) in calls {
            let tries = tries_of.get(&asked).copied().unwrap_or(0);
            if made > tries {
                account.unexplained.push(format!("{asked:?}: {made} calls, {tries} tries in rows"));
            }
        }
        account
    }

    fn add(&mut self, id: &str, result: &Value, tries: &[&Attempt]) {
        let of = |status: &str| tries.iter().filter(|row| row.status == status).count();
        let (ok, ambiguous) = (of("ok"), of("ambiguous"));
        let failed = tries.len() - ok - ambiguous;
        let call_ids: BTreeSet<_> = tries.iter().map(|row| &row.call_id).collect();
        let is_answered = result["status"] == "answered";
        let is_fine = match (is_answered, result["cache"] == "hit") {
            (true, false) => ok == 1,
            // A copy of it may have missed.
            (true, true) => ok <= 1,
            (false, _) => result["error"]["code"] == "call_ambiguous" && (ok, ambiguous) == (0, 3),
        };
        if !is_fine || call_ids.len() > 1 {
            self.unexplained.push(format!(
                "{id}: {ok} ok, {failed} failed, {ambiguous} ambiguous of calls {call_ids:?}: {result}"
            ));
        }
        self.ok += ok;
        self.failed += failed;
        self.ambiguous += ambiguous;
        self.given_up += usize::from(!is_answered);
    }
}
