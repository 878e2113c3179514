//! `forebay dlq list|show|redrive`: records that no step could process.

mod list;
mod redrive;
mod show;

use crate::{
    args::Dlq,
    config::Config,
    console::{say, wrong},
    embedded::{Embedded, cluster},
    letters::Letter,
    scan::{self, Reader},
};
use forebay_runtime::host::kafka::Kafka;
use forebay_schemas::topics;
use serde_json::{Value, json};
use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

/// Does what was asked.
pub async fn run(dlq: Dlq, config: Config) -> anyhow::Result<ExitCode> {
    match dlq {
        Dlq::List(list) => list::run(list, config).await,
        Dlq::Show(show) => show::run(show, config).await,
        Dlq::Redrive(redrive) => redrive::run(redrive, config).await,
    }
}

/// A pipeline's cluster, and the full name of its dead letters' topic, which is there.
async fn open(config: &Config) -> anyhow::Result<(Kafka, String)> {
    let kafka = cluster(config, Embedded::Find).await?.kafka;
    super::up::cluster_id(&kafka).await?;
    let topic = config.topic(topics::DEAD_LETTERS.name);
    let there = super::topics::there(&kafka).await?;
    if !there.contains_key(&topic) {
        return Err(wrong(format!(
            "Kafka at {} has no topic {topic}; is --topic-prefix right? `forebay topics apply` makes the topics",
            kafka.bootstrap_servers()
        )));
    }
    Ok((kafka, topic))
}

/// Reads in a thread where that may block.
async fn blocking<T: Send + 'static>(
    kafka: &Kafka,
    read: impl FnOnce(Reader) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let reader = scan::reader(kafka)?;
    tokio::task::spawn_blocking(move || read(reader)).await?
}

/// Says that some messages of the topic are not read.
fn say_unreadable(topic: &str, unreadable: u64) {
    if unreadable > 0 {
        say(format_args!(
            "forebay: {unreadable} messages of {topic} are no dead letters and were passed over"
        ));
    }
}

/// A dead letter as JSON: its fields, its key, when it was written, and its redrive.
fn to_json(Letter { letter, key, at_ms, redriven, .. }: &Letter) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(letter)?;
    value["key"] = json!(key);
    value["dead_at_ms"] = json!(at_ms);
    value["redriven"] = redriven.as_ref().map_or(Value::Null, |(redriven, at_ms)| {
        json!({"at_ms": at_ms, "to": redriven.to.to_string(), "generation": redriven.generation})
    });
    Ok(value)
}

/// A text from elsewhere, fit for a terminal and a line.
fn line(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

/// A time for a person, to the second.
fn time(ms: i64) -> String {
    let since = Duration::from_millis(u64::try_from(ms).unwrap_or_default());
    // Beyond the year 9999 there is no such text.
    match since.as_secs() < 253_402_300_800 {
        true => humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + since).to_string(),
        false => format!("{ms} ms"),
    }
}

/// A length of time for a person: one number and its unit.
fn length(ms: i64) -> String {
    let seconds = ms.max(0) / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_elsewhere_cannot_move_the_cursor() {
        assert_eq!(line("a\u{1b}[2Jb\nc ü"), "a\\u{1b}[2Jb\\nc ü");
    }

    #[test]
    fn times_are_for_people() {
        let lengths: Vec<_> = [-1, 59_999, 60_000, 7_199_999, 172_800_000].map(length).into();
        assert_eq!(lengths, ["0s", "59s", "1m", "1h", "2d"]);
        assert_eq!(time(1_000), "1970-01-01T00:00:01Z");
        assert_eq!(time(i64::MAX), format!("{} ms", i64::MAX));
    }
}
