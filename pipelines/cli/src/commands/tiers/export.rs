//! `forebay tiers log`: what was asked, answered and called, as the lines that `forebay tiers calibrate` reads.
//!
//! Invariant: a request comes from `endings`, where every request ends that was read, and has the id that its rows have.

use crate::{
    args::TiersLog,
    config::Config,
    console::{out, say},
    embedded::{Embedded, cluster},
    letters,
    scan::{self, Reader},
};
use anyhow::Context as _;
use forebay_operator::Clock;
use forebay_runtime::host::kafka::{Kafka, headers, registry};
use forebay_schemas::{Attempt, Ending, Envelope, Headers, Outcome, Record, topics};
use rdkafka::{Message as _, message::BorrowedMessage};
use serde_json::{Value, json};
use std::{ops::ControlFlow, process::ExitCode};

/// Prints it.
pub async fn run(args: TiersLog, config: Config) -> anyhow::Result<ExitCode> {
    let kafka = cluster(&config, Embedded::Find).await?.kafka;
    let since_ms = letters::since_ms(args.since, Clock::System);
    let names =
        [topics::ENDINGS.name, topics::OUTCOMES.name, topics::ATTEMPTS.name].map(|name| config.topic(name));
    let unreadable = tokio::task::spawn_blocking(move || {
        let reader = scan::reader(&kafka)?;
        let [endings, outcomes, attempts] = names;
        let mut unreadable = each(&reader, &endings, since_ms, |message| Ok(request(message)))?;
        let forms = Outcome::forms()?;
        unreadable += each(&reader, &outcomes, since_ms, |message| {
            Ok(Outcome::decode(&row(&kafka, message, &forms)?).ok().map(|row| json!(row)))
        })?;
        let forms = Attempt::forms()?;
        unreadable += each(&reader, &attempts, since_ms, |message| {
            Ok(Attempt::decode(&row(&kafka, message, &forms)?).ok().map(|row| json!(row)))
        })?;
        anyhow::Ok(unreadable)
    })
    .await
    .context("reading the log")??;
    if unreadable > 0 {
        say(format_args!(
            "forebay: {unreadable} records are left out: they hold no request, or cannot be read"
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a line of each record; how many gave none. Blocks.
fn each(
    reader: &Reader,
    topic: &str,
    since_ms: Option<i64>,
    line: impl Fn(&BorrowedMessage<'_>) -> anyhow::Result<Option<Value>>,
) -> anyhow::Result<u64> {
    let mut without = 0;
    for stretch in scan::stretches(reader, topic, since_ms)? {
        let _ = scan::visit(reader, topic, stretch, |message| {
            match line(message)? {
                Some(line) => out(line),
                None => without += 1,
            }
            Ok(ControlFlow::Continue(()))
        })?;
    }
    Ok(without)
}

/// The bytes of a row, as they were made.
fn row(kafka: &Kafka, message: &BorrowedMessage<'_>, forms: &[(Vec<u8>, Value)]) -> anyhow::Result<Vec<u8>> {
    let body = message.payload().unwrap_or_default();
    Ok(registry::plain(kafka.registry().map(AsRef::as_ref), body, forms)?)
}

/// The request that ended, under the id that it was given.
fn request(message: &BorrowedMessage<'_>) -> Option<Value> {
    let headers: Headers = headers(message);
    let envelope = Envelope::read(&headers).ok()??;
    let ending = Ending::decode(message.payload()?).ok()?;
    let mut request = json!(ending.request?);
    let fields = request.as_object_mut()?;
    fields.insert("id".to_owned(), json!(envelope.id));
    fields.insert("tenant".to_owned(), json!(envelope.tenant));
    Some(request)
}
