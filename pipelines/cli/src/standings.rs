//! How budgets stand, as rows of JSON: what the admin port gives of a process that counts for itself, and what commands read from
//! there, or from the store that processes share.
//!
//! Invariant: a row says whose it is, which budget, which period and what is counted, and so can be read without the settings.

use crate::{
    config::{self, ADMIN_DEFAULT, Config},
    console::wrong,
    models,
};
use anyhow::Context as _;
use forebay_operator::Clock;
use forebay_operators::budgets::{Budgets, Standing};
use forebay_telemetry::admin::Page;
use futures::FutureExt as _;
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

/// How far back the admin port looks for days and months that have ended.
const BACK_MS: i64 = 24 * 60 * 60 * 1_000;
/// How long the admin port may take to answer from its memory.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// The page of a process that counts these; empty where there are none.
pub fn page(budgets: Option<Arc<Budgets>>, clock: Clock) -> Page {
    Arc::new(move || {
        let Some(budgets) = &budgets else { return "[]".to_owned() };
        let now_ms = clock.now_ms();
        // What a process counts itself it knows at once; whoever shares counters is answered by their store.
        let read = budgets.standings(now_ms - BACK_MS, now_ms).now_or_never();
        let rows: Vec<_> = read.and_then(Result::ok).unwrap_or_default();
        Value::from(rows.iter().filter_map(|standing| row(budgets, standing)).collect::<Vec<_>>()).to_string()
    })
}

fn row(budgets: &Budgets, standing: &Standing) -> Option<Value> {
    let budget = budgets.all().get(standing.budget)?;
    let (begins_ms, ends_ms) = budget.period.span(standing.period);
    Some(json!({
        "holder": standing.subject.holder.to_string(),
        "tenant": standing.subject.tenant,
        "name": standing.subject.name,
        "budget": budget.to_string(),
        "unit": budget.unit.to_string(),
        "begins_at": begins_ms.saturating_mul(1_000),
        "ends_at": ends_ms.saturating_mul(1_000),
        "used": standing.used,
        "held": standing.held,
        "limit": budget.limit,
        "refused": standing.refused,
    }))
}

/// How all stands now, and how those periods ended that have since then: from the shared store, else from the process at the admin
/// port.
pub async fn read(config: &Config, since_ms: i64, now_ms: i64) -> anyhow::Result<Vec<Value>> {
    if let Some(counters) = models::shared_counters(config).await? {
        if config.budgets.is_empty() {
            return Err(wrong(
                "there are no budgets in these settings; name the file that has them by --config",
            ));
        }
        let budgets = Budgets::new(config.budgets.clone(), None, counters, Clock::System, String::new());
        let standings = budgets.standings(since_ms, now_ms).await.context("counters of budgets")?;
        return Ok(standings.iter().filter_map(|standing| row(&budgets, standing)).collect());
    }
    let admin = config::address("admin", config.admin.as_deref().unwrap_or(ADMIN_DEFAULT))?;
    let client = reqwest::Client::builder().timeout(ANSWER_MAX).no_proxy().build()?;
    let asked = client.get(format!("http://{admin}/budgets")).send().await;
    let answer =
        asked.and_then(|answer| answer.error_for_status()).map_err(reqwest::Error::without_url).with_context(
            || {
                format!(
                    "could not ask the admin port at {admin}; name that of a running process by --admin, or the store in which \
                     processes count together by stores.key_value"
                )
            },
        )?;
    let text = answer.text().await.map_err(reqwest::Error::without_url)?;
    serde_json::from_str(&text).with_context(|| format!("the admin port at {admin} speaks of no budgets"))
}
