//! `forebay ask`: one request, by an ordinary Kafka client, and its result.

use super::up::cluster_id;
use crate::{
    args::Ask,
    config::Config,
    console::{out, say, wrong},
    embedded::{Embedded, cluster},
};
use forebay_schemas::{Answer, Request, RequestId, Status, Tenant};
use std::{process::ExitCode, time::Duration};

/// Asks, waits, prints.
pub async fn run(args: Ask, config: Config) -> anyhow::Result<ExitCode> {
    let kafka = cluster(&config, Embedded::Find).await?.kafka;
    cluster_id(&kafka).await?;
    let mut client = crate::client::Client::connect(&kafka, &config).await?;
    let wait: Duration = args.wait.into();
    let id = RequestId::try_from(uuid::Uuid::now_v7().to_string()).map_err(wrong)?;
    let request = Request {
        id: Some(id.clone()),
        tenant: args.tenant.map(Tenant::try_from).transpose().map_err(wrong)?,
        prompt: Some(args.question),
        deadline_ms: u64::try_from(wait.as_millis()).ok(),
        ..Request::default()
    };
    client.ask(&request).await?;
    // A little longer than the deadline: an expiry is a result too.
    let until = tokio::time::Instant::now() + wait + Duration::from_secs(5);
    loop {
        let Ok(result) = tokio::time::timeout_at(until, client.result()).await else {
            say(format_args!("forebay: no result for {id} within {}; do the stages run?", args.wait));
            return Ok(ExitCode::FAILURE);
        };
        let (answer, raw) = result?;
        if answer.id == id {
            print(&answer, &raw, args.json);
            return Ok(if answer.status == Status::Answered { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    }
}

fn print(answer: &Answer, raw: &str, json: bool) {
    if json {
        return out(raw);
    }
    match (&answer.text, &answer.error) {
        (Some(text), _) => out(text),
        (None, Some(error)) => {
            say(format_args!("{}: {} ({})", answer.status.as_str(), error.message, error.code))
        }
        (None, None) => say(answer.status.as_str()),
    }
    for citation in &answer.citations {
        out(format_args!("  — {} bytes {}..{}", citation.document, citation.start, citation.end));
    }
}
