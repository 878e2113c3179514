//! Writes messages, acknowledged by all replicas, through the one producer of a process.
//!
//! Invariant: a message is given up only where the topic can never take it. A broker that is away is waited for. What counts
//! as written has an offset.

use super::{
    client::{Kafka, SettingsError, log, say},
    lifeline::{Lifeline, looked_after},
    registry::Registry,
};
use crate::{
    drive::{SendError, Sink},
    message::Outgoing,
};
use futures::future::BoxFuture;
use rdkafka::{
    ClientContext, Message as _,
    config::RDKafkaLogLevel,
    error::{KafkaError, KafkaResult},
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer, ProducerContext},
    types::RDKafkaErrorCode,
};
use std::{
    ops::Deref,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long to wait before a message that could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// How long to wait for room in the producer's queue.
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(5);

/// How long the thread that hears of acknowledgements waits at a time.
const LISTEN: Duration = Duration::from_secs(1);

/// Messages on their way that may be lost; more are lost at once. While a broker is away these are all that wait for it, so the
/// producer's queue has room for what must not be lost.
const LOSSY_MAX: usize = 4096;

/// The producer of a process.
#[derive(Clone)]
pub struct KafkaSink {
    producer: Arc<Listened>,
    /// Which rows have another framing on their topic.
    registry: Option<Arc<Registry>>,
    /// Messages on their way that may be lost.
    lossy: Arc<AtomicUsize>,
    /// Given when the process ends and nobody waits for a broker any more.
    closed: CancellationToken,
}

impl KafkaSink {
    /// A producer; connects in the background.
    pub fn new(kafka: &Kafka, closed: CancellationToken) -> Result<Self, SettingsError> {
        let acknowledgements =
            Acknowledgements { lifeline: Lifeline::to(kafka), has_ended: AtomicBool::new(false) };
        let config = looked_after(kafka.producer_config());
        let producer = config.create_with_context(acknowledgements).and_then(Listened::to);
        let producer = producer.map_err(SettingsError::Client)?;
        let (registry, lossy) = (kafka.registry().cloned(), Arc::default());
        Ok(Self { producer: Arc::new(producer), registry, lossy, closed })
    }

    /// Writes a message that may be lost; never waits. Whether it is on its way: it is lost where too many are, where the
    /// producer's queue is full, or where it is closed.
    pub fn send_best_effort(&self, message: &Outgoing) -> bool {
        LossyPlace::take(&self.lossy)
            .is_some_and(|place| self.enqueue(message, None, Sent::Lossy(place)).is_ok())
    }

    /// Waits until nothing is on its way, or for a bounded time.
    pub fn flush(&self, wait: Duration) {
        if let Err(fault) = self.producer.flush(wait) {
            warn!(error = %fault, "messages were still on their way when the producer was closed");
        }
    }

    /// Writes a message at a partition of the caller's choice, however often that takes; gives its offset. It is on its way
    /// when this returns, before anybody waits for it.
    pub(super) fn append(
        &self,
        message: Outgoing,
        partition: i32,
    ) -> BoxFuture<'static, Result<i64, SendError>> {
        let this = self.clone();
        let try_to_append = move |message: &Outgoing| {
            let on_its_way = Arc::new(Try::of(1));
            let sent = Sent::Awaited { of: Arc::clone(&on_its_way), place: 0 };
            if let Err(fault) = this.enqueue(message, Some(partition), sent) {
                on_its_way.settle(0, Err(fault));
            }
            on_its_way
        };
        let (this, mut on_its_way) = (self.clone(), try_to_append(&message));
        Box::pin(async move {
            loop {
                let Some((_, fault)) = on_its_way.settled().await.pop() else {
                    return Ok(on_its_way.offset.load(Ordering::Acquire));
                };
                let wait = this.judge(&message, &fault)?;
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = this.closed.cancelled() => return Err(SendError::Closed),
                }
                on_its_way = try_to_append(&message);
            }
        })
    }

    fn enqueue(&self, message: &Outgoing, partition: Option<i32>, sent: Sent) -> Result<(), KafkaError> {
        let mut headers = OwnedHeaders::new_with_capacity(message.headers.len());
        for (name, value) in &message.headers {
            headers = headers.insert(Header { key: name, value: value.as_deref() });
        }
        let mut record =
            BaseRecord::<[u8], [u8], _>::with_opaque_to(&message.topic, Box::new(sent)).headers(headers);
        record.key = message.key.as_deref();
        let body = message.value.as_deref();
        let framed = body.and_then(|body| self.registry.as_ref()?.framed(&message.topic, body));
        record.payload = framed.as_deref().or(body);
        record.partition = partition;
        self.producer.send(record).map_err(|(fault, _)| fault)
    }

    /// Writes those messages of a list, and gives back what was not written: its place in the list, and why.
    async fn try_to_write(&self, messages: &[Outgoing], places: &[usize]) -> Vec<(usize, KafkaError)> {
        let on_their_way = Arc::new(Try::of(places.len()));
        for &place in places {
            let sent = Sent::Awaited { of: Arc::clone(&on_their_way), place };
            if let Err(fault) = self.enqueue(&messages[place], None, sent) {
                on_their_way.settle(place, Err(fault));
            }
        }
        on_their_way.settled().await
    }

    /// How long to wait before trying again; an error where that is of no use.
    fn judge(&self, message: &Outgoing, fault: &KafkaError) -> Result<Duration, SendError> {
        let topic = message.topic.to_string();
        match fault.rdkafka_error_code() {
            Some(RDKafkaErrorCode::QueueFull) => Ok(QUEUE_FULL_WAIT),
            Some(RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessageSize) => {
                let bytes = message.value.as_ref().map_or(0, Vec::len);
                Err(SendError::TooLarge { topic, bytes })
            }
            Some(RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight) => Err(SendError::Closed),
            _ => match self.producer.client().fatal_error() {
                Some((code, reason)) => Err(SendError::Fatal { topic, reason: format!("{code}: {reason}") }),
                None => {
                    warn!(topic, error = %fault, "could not write a message; will try again");
                    Ok(RETRY_AFTER)
                }
            },
        }
    }
}

impl Sink for KafkaSink {
    fn send(&self, messages: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>> {
        Box::pin(async move {
            let mut places: Vec<_> = (0..messages.len()).collect();
            let mut too_large = None;
            loop {
                let refused = self.try_to_write(&messages, &places).await;
                let mut wait = None;
                places.clear();
                for (place, fault) in refused {
                    match self.judge(&messages[place], &fault) {
                        Ok(needed) => {
                            wait = wait.max(Some(needed));
                            places.push(place);
                        }
                        // Told when all others are written: the row about a call that was paid for is among them.
                        Err(fault @ SendError::TooLarge { .. }) => _ = too_large.get_or_insert(fault),
                        Err(fault) => return Err(fault),
                    }
                }
                let Some(wait) = wait else { return too_large.map_or(Ok(()), Err) };
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = self.closed.cancelled() => return Err(SendError::Closed),
                }
            }
        })
    }
}

/// A producer, and a thread that hears what became of its messages. The thread ends a little after this.
///
/// The binding has such a thread too, which waits a tenth of a second at a time and spins the last millisecond of it away, as
/// librdkafka is asked for what is left in whole milliseconds (rust-rdkafka 0.39): a quarter of what an idle process took.
struct Listened(Arc<BaseProducer<Acknowledgements>>);

impl Listened {
    fn to(producer: BaseProducer<Acknowledgements>) -> KafkaResult<Self> {
        let this = Self(Arc::new(producer));
        let producer = Arc::clone(&this.0);
        let listen = move || {
            while producer.context().is_wanted() {
                producer.poll(LISTEN);
                producer.context().lifeline.mend(producer.client());
            }
        };
        std::thread::Builder::new()
            .name("acknowledgements".to_owned())
            .spawn(listen)
            .map_err(|fault| KafkaError::ClientCreation(fault.to_string()))?;
        Ok(this)
    }
}

impl Deref for Listened {
    type Target = BaseProducer<Acknowledgements>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Drop for Listened {
    fn drop(&mut self) {
        self.context().has_ended.store(true, Ordering::Relaxed);
    }
}

/// One try to write some messages. Whoever waits for it is woken once, by the last answer: a wake-up of another thread
/// costs more than all else that an acknowledgement does.
struct Try {
    /// Messages that are neither acknowledged nor refused.
    unsettled: AtomicUsize,
    refused: Mutex<Vec<(usize, KafkaError)>>,
    /// Of the message that was acknowledged last.
    offset: AtomicI64,
    done: Notify,
}

impl Try {
    fn of(messages: usize) -> Self {
        let (unsettled, offset) = (AtomicUsize::new(messages), AtomicI64::new(-1));
        Self { unsettled, refused: Mutex::default(), offset, done: Notify::new() }
    }

    /// Notes what became of a message: its offset where it is acknowledged.
    fn settle(&self, place: usize, result: Result<i64, KafkaError>) {
        match result {
            Ok(offset) => self.offset.store(offset, Ordering::Release),
            Err(fault) => {
                self.refused.lock().unwrap_or_else(PoisonError::into_inner).push((place, fault));
            }
        }
        if self.unsettled.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.notify_one();
        }
    }

    /// Waits for the answer to every message, and gives those that were refused, in their order.
    async fn settled(&self) -> Vec<(usize, KafkaError)> {
        while self.unsettled.load(Ordering::Acquire) > 0 {
            self.done.notified().await;
        }
        let mut refused = std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner));
        refused.sort_unstable_by_key(|(place, _)| *place);
        refused
    }
}

/// A message on its way.
enum Sent {
    /// Somebody waits for its answer.
    Awaited { of: Arc<Try>, place: usize },
    /// It may be lost.
    Lossy(LossyPlace),
}

/// A place among [`LOSSY_MAX`], given back when it is dropped.
struct LossyPlace(Arc<AtomicUsize>);

impl LossyPlace {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let free = |taken| (taken < LOSSY_MAX).then_some(taken + 1);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, free).ok()?;
        Some(Self(Arc::clone(taken)))
    }
}

impl Drop for LossyPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Hears from librdkafka what became of each message.
struct Acknowledgements {
    lifeline: Lifeline,
    /// Nobody writes any more; the thread that listens hears of it when its wait is over.
    has_ended: AtomicBool,
}

impl Acknowledgements {
    /// Whether anybody cares what becomes of brokers: when all has been written the embedded one may end.
    fn is_wanted(&self) -> bool {
        !self.has_ended.load(Ordering::Relaxed)
    }
}

impl ClientContext for Acknowledgements {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        if self.is_wanted() {
            log(level, facility, message);
        }
    }
    fn error(&self, fault: KafkaError, reason: &str) {
        if self.is_wanted() {
            say(&fault, reason);
        }
    }
    fn stats_raw(&self, statistics: &[u8]) {
        self.lifeline.look(statistics);
    }
}

impl ProducerContext for Acknowledgements {
    type DeliveryOpaque = Box<Sent>;

    fn delivery(&self, result: &DeliveryResult<'_>, sent: Box<Sent>) {
        let result = match result {
            Ok(message) if message.offset() >= 0 => Ok(message.offset()),
            // Nobody has said that it was written: librdkafka takes it from a later message that was. But a leader which knows nothing of
            // this producer yet takes any sequence number, also where it has just refused the one before (confluent-kafka-go #921).
            // Written once more it may lie there twice, which readers know by its id; not written it would be lost.
            Ok(_) => Err(KafkaError::MessageProduction(RDKafkaErrorCode::Inconsistent)),
            Err((fault, _)) => Err(fault.clone()),
        };
        match *sent {
            Sent::Awaited { of, place } => of.settle(place, result),
            Sent::Lossy(place) => drop(place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test]
    async fn a_try_is_settled_by_the_last_answer_and_gives_back_what_was_refused_in_order() {
        let full = || Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
        let of = Try::of(4);
        of.settle(3, full());
        of.settle(0, Ok(7));
        of.settle(1, full());
        assert!(of.settled().now_or_never().is_none());
        of.settle(2, Ok(8));
        let refused = of.settled().await;
        assert_eq!(refused.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [1, 3]);
        assert!(Try::of(0).settled().await.is_empty());
    }

    #[test]
    fn of_messages_that_may_be_lost_so_many_are_on_their_way() {
        let taken = Arc::default();
        let mut places: Vec<_> = std::iter::from_fn(|| LossyPlace::take(&taken)).collect();
        assert_eq!(places.len(), LOSSY_MAX);
        places.truncate(1);
        assert_eq!(taken.load(Ordering::Acquire), 1);
    }
}
