//! Tells of what budgets spend: at the end of each minute, on the topic `alerts`, from where [`webhook`] posts it.
//!
//! Every process that calls a model reads the counters and watches. Where they share counters, one of them tells: it holds a counter
//! of the minute that has room for one, and settles it once its alerts are on their topic. The one that told the last minute asks
//! first; the others wait for a while, and so take over from one that is gone, and know by then what it knew. Who has alerts that
//! another one is to tell asks once more, when that one has told them or lost its hold.
//!
//! Who has told a minute keeps what it knows by then in the key-value store, for a process that starts later: beside the counters where
//! these are shared, in its data folder where it counts for itself.
//!
//! Invariant: no call waits for anything here, and whatever is away, a bounded number of alerts waits for it. An alert is told at least
//! once while a process is there; told twice, as by one that was cut off in between, both have one id.

mod webhook;

use crate::config::Config;
use anyhow::Context as _;
use bytes::Bytes;
use forebay_operator::{BoxError, Clock};
use forebay_operators::budgets::{
    Budgets,
    watch::{PARTS_MAX, Watch},
};
use forebay_runtime::{
    crash::crash_point,
    host::kafka::{Kafka, LastingContext, looked_after},
};
use forebay_schemas::{Alert, Record as _, topics};
use forebay_stores::{
    Counters, Database, Error as StoreError, KeyValue,
    counters::{Hold, Line},
    key_value::{Embedded, EmbeddedOptions, Redis, RedisOptions},
};
use forebay_telemetry::{AlertMeter, Lost};
use futures::future::join_all;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

const MINUTE_MS: i64 = 60_000;
/// After the minute has ended: a timer may be early by a little.
const READ_AFTER_MS: i64 = 200;
/// How long reading the counters may take.
const READ_MAX: Duration = Duration::from_secs(20);
/// How long the others leave a minute to the one that told the last.
const FOLLOW_AFTER: Duration = Duration::from_secs(20);
/// How long a minute is held for telling; shorter than the others wait.
const TELL_HOLD: Duration = Duration::from_secs(15);
/// After which who was too late asks again: longer than [`TELL_HOLD`].
const ASK_AGAIN: Duration = Duration::from_secs(16);
/// How long the topic may take.
const TOPIC_MAX: Duration = Duration::from_secs(10);
/// How long it is known which minute was told.
const TOLD_KEEP: Duration = Duration::from_secs(10 * 60);
/// How long what a process knew is there for the next one: as long as it would know it of a budget that is not used.
const KNOWN_KEEP: Duration = Duration::from_secs(24 * 60 * 60);
/// How long keeping it or finding it may take.
const KNOWN_MAX: Duration = Duration::from_secs(10);
/// The most alerts that wait for the topic: those of ten minutes at the worst.
const WAITING_MAX: usize = 10_000;

/// Watches what a process spends.
struct Watcher {
    budgets: Arc<Budgets>,
    watch: Watch,
    clock: Clock,
    turns: Turns,
    memory: Memory,
    /// Whether others see the same counters.
    is_shared: bool,
    producer: FutureProducer<LastingContext>,
    context: LastingContext,
    topic: String,
    meter: AlertMeter,
}

/// Watches until `stop`.
pub fn start(
    budgets: Arc<Budgets>,
    memory: Memory,
    config: &Config,
    kafka: &Kafka,
    meter: AlertMeter,
    clock: Clock,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut producer = looked_after(kafka.producer_config_in_turn());
    // What took longer is tried again with the next minute.
    producer.set("message.timeout.ms", TOPIC_MAX.as_millis().to_string());
    if let Some(hook) = &config.alerts.webhook {
        webhook::start(hook.clone(), config, kafka, meter.clone(), clock, stop.clone())?;
    }
    let context = LastingContext::to(kafka);
    let watcher = Watcher {
        watch: Watch::new(budgets.all().to_vec(), config.alerts.rules.clone()),
        clock,
        turns: Turns {
            counters: Arc::clone(budgets.counters()),
            owner: format!("{:016x}", rand::random::<u64>()),
        },
        memory,
        is_shared: config.key_value.is_some(),
        producer: producer.create_with_context(context.clone()).context("alerts")?,
        context,
        topic: config.topic(topics::ALERTS.name),
        meter,
        budgets,
    };
    tokio::spawn(async move { stop.run_until_cancelled(watcher.run()).await });
    Ok(())
}

impl Watcher {
    async fn run(mut self) {
        let (mut waiting, mut is_teller) = (Vec::new(), !self.is_shared);
        let mut since_ms = match self.go_on().await {
            Some(read_ms) => read_ms,
            None => {
                let now_ms = self.clock.now_ms();
                self.read(now_ms, now_ms).await;
                now_ms
            }
        };
        loop {
            let rest_ms = MINUTE_MS - self.clock.now_ms().rem_euclid(MINUTE_MS) + READ_AFTER_MS;
            tokio::time::sleep(Duration::from_millis(rest_ms.unsigned_abs())).await;
            self.context.mend(self.producer.client());
            let now_ms = self.clock.now_ms();
            let Some(alerts) = self.read(since_ms, now_ms).await else { continue };
            since_ms = now_ms;
            waiting.extend(alerts);
            if let Some(over) = waiting.len().checked_sub(WAITING_MAX).filter(|over| *over > 0) {
                warn!(lost = over, "too many alerts wait for their topic");
                waiting.drain(..over);
                self.meter.lost(over, Lost::Topic);
            }
            if !is_teller {
                tokio::time::sleep(FOLLOW_AFTER).await;
            }
            match self.take_turn(now_ms.div_euclid(MINUTE_MS), &waiting).await {
                Ok(Turn::Told) => {
                    is_teller = true;
                    waiting.clear();
                    self.keep(now_ms.div_euclid(MINUTE_MS)).await;
                }
                Ok(Turn::NotOurs) => {
                    is_teller = false;
                    waiting.clear();
                }
                Ok(Turn::Failed) => {}
                Err(fault) => {
                    warn!(error = %fault, waiting = waiting.len(), "could not find out who tells of what is spent; alerts wait");
                }
            }
        }
    }

    /// Goes on from what was known when the last minute was told, and answers when that was read.
    async fn go_on(&mut self) -> Option<i64> {
        let kept = tokio::time::timeout(KNOWN_MAX, self.memory.kept()).await;
        match kept.map_err(BoxError::from).and_then(|kept| kept.map_err(BoxError::from)) {
            Ok(kept) => self.watch.go_on(&kept, self.is_shared),
            Err(fault) => {
                warn!(error = %fault, "could not find what was usual before; averages begin anew");
                None
            }
        }
    }

    /// Keeps what is known, after all of it was told.
    async fn keep(&self, minute: i64) {
        let kept = async {
            let parts = self.watch.kept().map_err(BoxError::from)?;
            self.memory.keep(minute, parts).await.map_err(BoxError::from)
        };
        let kept = tokio::time::timeout(KNOWN_MAX, kept).await;
        if let Err(fault) = kept.map_err(BoxError::from).and_then(|kept| kept) {
            warn!(error = %fault, "could not keep what is usual; a process that starts now goes on from what was kept before");
        }
    }

    /// Reads the counters; nothing where that is not possible, and the next reading stands for this minute too.
    async fn read(&mut self, since_ms: i64, now_ms: i64) -> Option<Vec<Alert>> {
        let read = tokio::time::timeout(READ_MAX, self.budgets.standings(since_ms, now_ms)).await;
        let fault: BoxError = match read {
            Ok(Ok(standings)) => {
                let alerts = self.watch.read(now_ms, &standings);
                if self.watch.left_out() > 0 {
                    warn!(left_out = self.watch.left_out(), "more budgets than can be watched");
                }
                return Some(alerts);
            }
            Ok(Err(fault)) => fault.into(),
            Err(late) => late.into(),
        };
        warn!(error = %fault, "could not read what budgets have spent");
        self.meter.lost(1, Lost::Counters);
        None
    }

    /// Tells a minute, where nobody else does.
    async fn take_turn(&self, minute: i64, waiting: &[Alert]) -> Result<Turn, StoreError> {
        if !self.turns.take_at_last(minute, waiting.is_empty()).await? {
            return Ok(Turn::NotOurs);
        }
        let is_told = self.tell(waiting).await;
        self.turns.end(minute, is_told).await?;
        Ok(if is_told { Turn::Told } else { Turn::Failed })
    }

    /// Writes alerts to the topic.
    async fn tell(&self, alerts: &[Alert]) -> bool {
        let sent = join_all(alerts.iter().map(|alert| self.write(alert))).await;
        let faults: Vec<_> = sent.into_iter().filter_map(Result::err).collect();
        if let Some(fault) = faults.first() {
            warn!(
                error = format!("{fault:#}"),
                not_written = faults.len(),
                topic = self.topic,
                "could not write alerts; they wait"
            );
            return false;
        }
        for alert in alerts {
            let (kind, state) = (alert.kind.as_str(), alert.state.as_str());
            info!(id = alert.id, kind, state, holder = alert.holder, "alert");
            self.meter.told(kind, state);
        }
        if !alerts.is_empty() {
            crash_point("alerts.told");
        }
        true
    }

    async fn write(&self, alert: &Alert) -> anyhow::Result<()> {
        let body = alert.encode()?.unwrap_or_default();
        let record = FutureRecord::to(&self.topic).key(&alert.id).payload(&body);
        self.producer.send(record, TOPIC_MAX).await.map_err(|(fault, _)| fault)?;
        Ok(())
    }
}

/// Who tells a minute.
struct Turns {
    counters: Arc<dyn Counters>,
    /// No other process's.
    owner: String,
}

impl Turns {
    /// Whether it is for this process to tell the minute, within [`TELL_HOLD`].
    async fn take(&self, minute: i64) -> Result<bool, StoreError> {
        let (id, lines) = self.hold(minute);
        Ok(self.counters.hold(&id, &lines, TELL_HOLD).await? == Hold::Taken)
    }

    /// The same, and once more where there is something to tell: who was faster may have died before it told it.
    async fn take_at_last(&self, minute: i64, is_nothing: bool) -> Result<bool, StoreError> {
        let is_ours = self.take(minute).await?;
        if is_ours || is_nothing {
            return Ok(is_ours);
        }
        tokio::time::sleep(ASK_AGAIN).await;
        self.take(minute).await
    }

    /// It is told, and by nobody else; or it is not, and whoever comes next may tell it.
    async fn end(&self, minute: i64, is_told: bool) -> Result<(), StoreError> {
        let (id, lines) = self.hold(minute);
        self.counters.settle(&id, &lines, &[u64::from(is_told)]).await
    }

    fn hold(&self, minute: i64) -> (String, [Line; 1]) {
        let name = format!("alerts/{minute}");
        let line = Line { name, amount: 1, limit: 1, keep: TOLD_KEEP, group: None, list: None };
        (format!("{}-{minute}", self.owner), [line])
    }
}

/// What outlives a process of what it knew: the last two minutes that were told, so that one of them is whole.
pub struct Memory(Arc<dyn KeyValue>);

impl Memory {
    /// Where processes count together, or else in a database of this process.
    pub async fn open(config: &Config, database: &Database) -> anyhow::Result<Self> {
        let Some(url) = &config.key_value else {
            // Read once, at the start.
            let options = EmbeddedOptions { cache_bytes: 0, ..EmbeddedOptions::default() };
            return Ok(Self(Arc::new(Embedded::open(database, "alerts", options).await?)));
        };
        let prefix = format!("forebay:alerts:{}", config.topic_prefix);
        let options = RedisOptions { prefix, ..RedisOptions::default() };
        Ok(Self(Arc::new(Redis::connect(url, options).await.context("stores.key_value")?)))
    }

    async fn keep(&self, minute: i64, parts: Vec<Vec<u8>>) -> Result<(), StoreError> {
        for (part, bytes) in parts.into_iter().enumerate() {
            self.0.set(&Self::key(minute, part), bytes.into(), Some(KNOWN_KEEP)).await?;
        }
        self.0.flush().await
    }

    /// The parts of both, and of what was there before.
    async fn kept(&self) -> Result<[Vec<Bytes>; 2], StoreError> {
        let mut both = [Vec::new(), Vec::new()];
        for (parts, minute) in both.iter_mut().zip([0, 1]) {
            while parts.len() < PARTS_MAX
                && let Some(part) = self.0.get(&Self::key(minute, parts.len())).await?
            {
                parts.push(part);
            }
        }
        Ok(both)
    }

    fn key(minute: i64, part: usize) -> String {
        format!("known/{}/{part}", minute.rem_euclid(2))
    }
}

/// What became of a minute.
enum Turn {
    /// It is on its topic.
    Told,
    /// Another process told it, or there was nothing to tell.
    NotOurs,
    /// It could not be told.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_stores::counters::Local;
    use std::time::UNIX_EPOCH;
    use tokio::time::Instant;

    fn processes() -> [Turns; 2] {
        let began = Instant::now();
        let counters: Arc<dyn Counters> =
            Arc::new(Local::new(Arc::new(move || UNIX_EPOCH + began.elapsed())));
        ["a", "b"].map(|owner| Turns { counters: Arc::clone(&counters), owner: owner.to_owned() })
    }

    #[tokio::test(start_paused = true)]
    async fn one_of_several_tells_a_minute() {
        let [a, b] = processes();
        assert!(a.take(1).await.unwrap());
        assert!(!b.take(1).await.unwrap(), "it is being told");
        a.end(1, true).await.unwrap();
        tokio::time::advance(TELL_HOLD * 2).await;
        assert!(!b.take(1).await.unwrap(), "it was told");
        assert!(b.take(2).await.unwrap(), "nobody has told the next one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_minute_that_was_not_told_is_told_by_the_next_to_come() {
        let [a, b] = processes();
        assert!(a.take(1).await.unwrap());
        a.end(1, false).await.unwrap();
        assert!(b.take(1).await.unwrap(), "its topic was away");
        assert!(a.take(2).await.unwrap());
        tokio::time::advance(FOLLOW_AFTER).await;
        assert!(b.take(2).await.unwrap(), "it died in between");
    }

    #[tokio::test]
    async fn of_what_was_known_the_last_two_minutes_are_found() {
        let (config, folder) =
            (crate::config::merge(None, |_| None, &[]).unwrap(), tempfile::tempdir().unwrap());
        let database = Database::open(folder.path().join("d.redb"), Default::default()).await.unwrap();
        let memory = Memory::open(&config, &database).await.unwrap();
        for (minute, name, count) in [(6, "a", 2), (7, "b", 2), (8, "c", 3), (9, "d", 1)] {
            let parts = (0..count).map(|part| format!("{name}{part}").into_bytes());
            memory.keep(minute, parts.collect()).await.unwrap();
        }
        let [even, odd] = memory.kept().await.unwrap();
        assert_eq!(even, ["c0", "c1", "c2"]);
        // What a shorter one leaves of a longer is told from it by when it was read.
        assert_eq!(odd, ["d0", "b1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_was_a_moment_late_tells_a_minute_in_which_the_first_one_died() {
        let [a, b] = processes();
        assert!(a.take(1).await.unwrap());
        assert!(!b.take_at_last(1, true).await.unwrap(), "it has nothing to tell");
        assert!(b.take_at_last(1, false).await.unwrap(), "nobody has told what it has");
        b.end(1, true).await.unwrap();
        assert!(!a.take_at_last(1, false).await.unwrap(), "it was told");
    }
}
