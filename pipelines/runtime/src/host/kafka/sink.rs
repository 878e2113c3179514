//! Writes messages, acknowledged by all replicas, through the one producer of a process.
//!
//! Invariant: a message is given up only where the topic can never take it. A broker that is away is waited for. What counts
//! as written has an offset.

use super::{
    client::{Kafka, SettingsError},
    producer::{Counted, Producer, Sent, Try},
    registry::Registry,
};
use crate::{
    drive::{SendError, Sink},
    message::Outgoing,
};
use futures::future::BoxFuture;
use rdkafka::{
    error::KafkaError,
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, Producer as _},
    types::RDKafkaErrorCode,
};
use std::{
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long to wait before a message that could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// How long to wait for room in the producer's queue.
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(5);

/// The producer of a process.
#[derive(Clone)]
pub struct KafkaSink {
    producer: Arc<Producer>,
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
        let producer = Producer::new(&kafka.producer_config()).map_err(SettingsError::Client)?;
        let (registry, lossy) = (kafka.registry().cloned(), Arc::default());
        Ok(Self { producer: Arc::new(producer), registry, lossy, closed })
    }

    /// Writes a message that may be lost; never waits. Whether it is on its way: it is lost where too many are, where the
    /// producer's queue is full, or where it is closed.
    pub fn send_best_effort(&self, message: &Outgoing) -> bool {
        Counted::lossy(&self.lossy)
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
            // A call waits for it.
            let hurry = Some(this.producer.hurry());
            let sent = Sent::Awaited { of: Arc::clone(&on_its_way), place: 0, hurry };
            if let Err(fault) = this.enqueue(message, Some(partition), sent) {
                on_its_way.settle(0, Err(fault));
            }
            on_its_way
        };
        let (this, mut on_its_way) = (self.clone(), try_to_append(&message));
        Box::pin(async move {
            loop {
                let Some((_, fault)) = on_its_way.settled().await.pop() else {
                    return Ok(on_its_way.offset());
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
        self.producer.send(record).map_err(|(fault, _)| fault)?;
        self.producer.sent();
        Ok(())
    }

    /// Writes those messages of a list, and gives back what was not written: its place in the list, and why.
    async fn try_to_write(&self, messages: &[Outgoing], places: &[usize]) -> Vec<(usize, KafkaError)> {
        let on_their_way = Arc::new(Try::of(places.len()));
        for &place in places {
            let sent = Sent::Awaited { of: Arc::clone(&on_their_way), place, hurry: None };
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
