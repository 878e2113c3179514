//! Writes messages, acknowledged by all replicas, through the one producer of a process.
//!
//! Invariant: a message is given up only where the topic can never take it. A broker that is away is waited for.

use super::client::{Kafka, LogContext, SettingsError};
use crate::{
    drive::{SendError, Sink},
    message::Outgoing,
};
use futures::future::BoxFuture;
use rdkafka::{
    error::KafkaError,
    message::{Header, OwnedHeaders},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer},
    types::RDKafkaErrorCode,
};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long to wait before a message that could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// How long to wait for room in the producer's queue.
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(5);

/// The producer of a process.
#[derive(Clone)]
pub struct KafkaSink {
    producer: FutureProducer<LogContext>,
    /// Given when the process ends and nobody waits for a broker any more.
    closed: CancellationToken,
}

impl KafkaSink {
    /// A producer; connects in the background.
    pub fn new(kafka: &Kafka, closed: CancellationToken) -> Result<Self, SettingsError> {
        let config = kafka.producer_config();
        let producer = config.create_with_context(LogContext).map_err(SettingsError::Client)?;
        Ok(Self { producer, closed })
    }

    /// Writes a message that may be lost.
    pub fn send_best_effort(&self, message: &Outgoing) {
        // Dropping the future does not take the message back.
        let _ = self.enqueue(message);
    }

    /// Waits until nothing is on its way, or for a bounded time.
    pub fn flush(&self, wait: Duration) {
        if let Err(fault) = self.producer.flush(wait) {
            warn!(error = %fault, "messages were still on their way when the producer was closed");
        }
    }

    fn enqueue(&self, message: &Outgoing) -> Result<DeliveryFuture, KafkaError> {
        let mut headers = OwnedHeaders::new_with_capacity(message.headers.len());
        for (name, value) in &message.headers {
            headers = headers.insert(Header { key: name, value: value.as_deref() });
        }
        let mut record = FutureRecord::<[u8], [u8]>::to(&message.topic).headers(headers);
        record.key = message.key.as_deref();
        record.payload = message.value.as_deref();
        self.producer.send_result(record).map_err(|(fault, _)| fault)
    }

    /// Writes one message, however often that takes.
    async fn write(&self, message: &Outgoing, mut first: Option<DeliveryFuture>) -> Result<(), SendError> {
        loop {
            let sent = match first.take() {
                Some(sent) => Ok(sent),
                None => self.enqueue(message),
            };
            let fault = match sent {
                Ok(delivery) => match delivery.await {
                    Ok(Ok(_)) => return Ok(()),
                    Ok(Err((fault, _))) => fault,
                    Err(_) => return Err(SendError::Closed),
                },
                Err(fault) => fault,
            };
            let wait = self.judge(message, &fault)?;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.closed.cancelled() => return Err(SendError::Closed),
            }
        }
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
            // All are on their way before the first is waited for.
            let sent: Vec<_> = messages.iter().map(|message| self.enqueue(message).ok()).collect();
            for (message, delivery) in messages.iter().zip(sent) {
                self.write(message, delivery).await?;
            }
            Ok(())
        })
    }
}
