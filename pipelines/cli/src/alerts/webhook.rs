//! Posts alerts to a webhook, from their topic.
//!
//! Processes share the topic as one consumer group, and how far it is posted is stored there behind each alert. So whoever is ended or
//! killed anywhere takes no post with it: the next to come, which may be the same process started again, goes on where it was.
//!
//! Invariant: an alert on the topic is posted at least once, and each time under one key; but for those that the webhook does not take
//! within [`TRIES_MAX`] tries, and those that are older than [`NEWS_MAX`] when their turn comes. Both are counted.

use crate::config::{Config, alerts::Webhook};
use anyhow::Context as _;
use forebay_operator::Clock;
use forebay_runtime::{
    crash::crash_point,
    host::kafka::{Kafka, LastingContext, looked_after},
};
use forebay_schemas::{Alert, Record as _, topics};
use forebay_telemetry::{AlertMeter, Lost};
use rdkafka::{
    Message as _,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::KafkaResult,
    message::BorrowedMessage,
};
use reqwest::{StatusCode, header::AUTHORIZATION};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long the webhook may take for one try. With all tries and pauses an alert takes 40 s at most, and a member of a group may be silent
/// for a minute.
const TRY_MAX: Duration = Duration::from_secs(5);
const TRIES_MAX: u32 = 5;
/// How long to wait before the second try; twice as long before each further one.
const PAUSE: Duration = Duration::from_secs(1);
/// What is older is no news: a webhook that is new is not told of the last month.
const NEWS_MAX_MS: i64 = 24 * 60 * 60 * 1_000;
/// How long one look for an alert waits; so long this goes on when the process ends.
const POLL: Duration = Duration::from_millis(100);
/// How long to wait after the topic could not be read.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// What posts.
struct Poster {
    reader: BaseConsumer<LastingContext>,
    client: reqwest::Client,
    webhook: Webhook,
    meter: AlertMeter,
    clock: Clock,
    runtime: Handle,
    stop: CancellationToken,
}

/// Posts until `stop`, on a thread of its own.
pub fn start(
    webhook: Webhook,
    config: &Config,
    kafka: &Kafka,
    meter: AlertMeter,
    clock: Clock,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let group = looked_after(kafka.group_config(&config.topic("alerts.webhook")));
    let reader: BaseConsumer<LastingContext> =
        group.create_with_context(LastingContext::to(kafka)).context("alerts.webhook")?;
    reader.subscribe(&[&config.topic(topics::ALERTS.name)]).context("alerts.webhook")?;
    let client = reqwest::Client::builder().timeout(TRY_MAX).build().context("alerts.webhook")?;
    let poster = Poster { reader, client, webhook, meter, clock, runtime: Handle::current(), stop };
    std::thread::Builder::new().name("webhook".to_owned()).spawn(move || poster.run())?;
    Ok(())
}

impl Poster {
    fn run(self) {
        let mut is_behind = false;
        while !self.stop.is_cancelled() {
            self.reader.context().mend(self.reader.client());
            match self.reader.poll(POLL) {
                None => {}
                Some(Ok(message)) => self.take(&message, &mut is_behind),
                Some(Err(fault)) => {
                    warn!(error = %fault, "could not read alerts for the webhook; will try again");
                    self.wait(tokio::time::sleep(READ_AGAIN));
                }
            }
        }
    }

    /// What comes of it; nothing where the process ends first.
    fn wait<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(self.stop.run_until_cancelled(work))
    }

    /// Posts an alert, and stores that it is done with, unless the process ends first.
    fn take(&self, message: &BorrowedMessage<'_>, is_behind: &mut bool) {
        let was_behind = std::mem::take(is_behind);
        let written_ms = message.timestamp().to_millis().unwrap_or(i64::MAX);
        match message.payload().map(Alert::decode) {
            Some(Ok(_)) if written_ms < self.clock.now_ms() - NEWS_MAX_MS => {
                *is_behind = true;
                self.meter.lost(1, Lost::Late);
                if !was_behind {
                    warn!(
                        "alerts of more than a day ago are not posted any more; they are on their topic only"
                    );
                }
            }
            Some(Ok(alert)) => {
                let Some(posted) = self.wait(post(&self.client, &self.webhook, &alert)) else { return };
                if let Err(fault) = posted {
                    // Whoever knows the address may post there, so only its host is said.
                    let host = self.webhook.url.host_str().unwrap_or_default();
                    warn!(
                        host,
                        id = alert.id,
                        error = fault,
                        tries_max = TRIES_MAX,
                        "the webhook did not take an alert; it is on its topic only"
                    );
                    self.meter.lost(1, Lost::Webhook);
                }
                crash_point("alerts.posted");
            }
            Some(Err(_)) | None => {
                let (partition, offset) = (message.partition(), message.offset());
                warn!(topic = message.topic(), partition, offset, "a message is no alert; it is not posted");
            }
        }
        if let Err(fault) = self.store(message) {
            warn!(error = %fault, "could not store how far alerts are posted; the last may be posted again");
        }
    }

    fn store(&self, message: &BorrowedMessage<'_>) -> KafkaResult<()> {
        // Stored and not committed by its number: a member that has lost the partition meanwhile is refused that.
        self.reader.store_offset_from_message(message)?;
        self.reader.commit_consumer_state(CommitMode::Sync)
    }
}

/// Posts an alert, again where that may help.
async fn post(client: &reqwest::Client, webhook: &Webhook, alert: &Alert) -> Result<(), String> {
    let mut pause = PAUSE;
    for tried in 1.. {
        let mut request = client.post(webhook.url.clone()).json(alert).header("idempotency-key", key(alert));
        if let Some(key) = &webhook.key {
            request = request.header(AUTHORIZATION, key.bearer());
        }
        let (fault, may_help) = match request.send().await {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            Ok(answer) => (format!("it answered {}", answer.status()), may_help(answer.status())),
            Err(fault) => (fault.without_url().to_string(), true),
        };
        if !may_help || tried == TRIES_MAX {
            return Err(fault);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    Ok(())
}

/// What tells posts apart of which one may be a repetition.
fn key(alert: &Alert) -> String {
    format!("{}-{}-{}", alert.id, alert.state.as_str(), alert.seen_at)
}

/// Whether the same would be answered otherwise a little later.
fn may_help(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_be_mended_is_posted_again() {
        let may = |status: u16| may_help(StatusCode::from_u16(status).unwrap());
        assert_eq!(
            [500, 503, 408, 429, 400, 401, 404, 302].map(may),
            [true, true, true, true, false, false, false, false]
        );
    }
}
