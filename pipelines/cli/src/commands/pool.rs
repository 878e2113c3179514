//! `forebay pool status`: how the model servers of a running process stand.

use crate::{
    args::Pool,
    config::{self, ADMIN_DEFAULT, Config},
    console::{out, say},
    models::FRESH_MS,
};
use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use serde_json::Value;
use std::{process::ExitCode, time::Duration};

/// How long the admin port may take to answer from its memory.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Asks the admin port.
pub async fn run(pool: Pool, config: Config) -> anyhow::Result<ExitCode> {
    let Pool::Status(args) = pool;
    let admin = config::address("admin", config.admin.as_deref().unwrap_or(ADMIN_DEFAULT))?;
    let client = reqwest::Client::builder().timeout(ANSWER_MAX).no_proxy().build()?;
    let asked =
        client.get(format!("http://{admin}/pool")).send().await.and_then(|answer| answer.error_for_status());
    let answer = asked.map_err(reqwest::Error::without_url).with_context(|| {
        format!("could not ask the admin port at {admin}; name that of a running process by --admin")
    })?;
    let text = answer.text().await.map_err(reqwest::Error::without_url)?;
    let endpoints: Vec<Value> = serde_json::from_str(&text)
        .with_context(|| format!("the admin port at {admin} speaks of no pool"))?;
    if args.json {
        endpoints.iter().for_each(out);
        return Ok(ExitCode::SUCCESS);
    }
    if endpoints.is_empty() {
        say("forebay: this process uses no pool: it has one model URL and no settings under pool, or none");
        return Ok(ExitCode::SUCCESS);
    }
    out(table(&endpoints));
    Ok(ExitCode::SUCCESS)
}

fn table(endpoints: &[Value]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "endpoint", "name", "model", "ready", "breaker", "limits", "share", "running", "limit", "tokens",
        "rpm left", "tpm left", "paused", "waiting", "kv",
    ]);
    for endpoint in endpoints {
        // What an endpoint said too long ago is not shown as if it were so.
        let is_fresh = endpoint["scraped_ms_ago"].as_u64().is_some_and(|ago| ago <= FRESH_MS);
        let number = |name: &str| endpoint[name].as_f64().filter(|_| is_fresh);
        let percent = |part: f64| format!("{:.0}%", part * 100.0);
        let whole = |count: f64| format!("{count:.0}");
        let missing = || "-".to_owned();
        let nothing = Vec::new();
        for model in endpoint["models"].as_array().unwrap_or(&nothing) {
            table.add_row([
                endpoint["endpoint"].as_str().unwrap_or_default().to_owned(),
                endpoint["name"].as_str().unwrap_or_default().to_owned(),
                model["model"].as_str().unwrap_or_default().to_owned(),
                if endpoint["is_ready"] == true { "yes" } else { "no" }.to_owned(),
                model["breaker"].as_str().unwrap_or_default().to_owned(),
                model["limits"].as_str().unwrap_or_default().to_owned(),
                model["share"].as_f64().map_or_else(missing, percent),
                format!("{}/{}", endpoint["running"], endpoint["outstanding_max"]),
                model["limit"].as_f64().map_or_else(missing, whole),
                endpoint["tokens"].to_string(),
                model["left"]["requests"].as_f64().map_or_else(missing, whole),
                model["left"]["tokens"].as_f64().map_or_else(missing, whole),
                model["paused_ms"].as_f64().map_or_else(missing, |ms| format!("{:.1} s", ms / 1_000.0)),
                number("waiting").map_or_else(missing, whole),
                number("kv_used").map_or_else(missing, percent),
            ]);
        }
    }
    for column in table.column_iter_mut().skip(6) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_endpoint_is_a_line_a_model() {
        let model = json!({"model": "m", "breaker": "ramp", "limits": "away", "share": 0.4, "limit": 45.2,
            "left": {"requests": 17.0, "tokens": 230_000.0}, "paused_ms": 2_500});
        let endpoint = json!({
            "name": "mini", "endpoint": "http://h:1", "is_ready": true, "running": 3, "outstanding_max": 64, "tokens": 4096,
            "waiting": null, "kv_used": 0.25, "scraped_ms_ago": 10, "models": [model],
        });
        let shown = table(&[endpoint]).to_string();
        for word in [
            "http://h:1",
            "mini",
            "ramp",
            "away",
            "40%",
            "3/64",
            "45",
            "4096",
            "17",
            "230000",
            "2.5 s",
            "-",
            "25%",
        ] {
            assert!(shown.contains(word), "{word}\n{shown}");
        }
    }
}
