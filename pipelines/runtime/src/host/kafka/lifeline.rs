//! Finds a client that knows no broker any more, and tells it anew where the cluster is.
//!
//! A broker that has only just started may say that its cluster has no brokers, and librdkafka then lets go of all that it
//! knew. It begins anew from the bootstrap servers, unless its threads meet in the wrong order: then it asks nobody ever again, and
//! says nothing (librdkafka #5301, of 2.10 and later; measured here, on two busy cores: 5 of 12 clients within 25 such answers). What it says
//! of itself shows that: no broker that was named to it, nor one that it learned of.
//!
//! The Rust binding does not wrap the call that names brokers; so it is called as it is, here and nowhere else.

use super::client::{Kafka, log, say};
use rdkafka::{
    ClientConfig, ClientContext, bindings as rd, client::Client, config::RDKafkaLogLevel,
    consumer::ConsumerContext, error::KafkaError,
};
use serde::Deserialize;
use std::{
    borrow::Cow,
    collections::HashMap,
    ffi::CString,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tracing::{error, warn};

/// So often in a row it must say that it knows none: while it begins anew there is a moment without.
const LOOKS: usize = 2;

/// What is seen of one client, and how it is helped.
#[derive(Debug)]
pub struct Lifeline {
    /// How often in a row it has said that it knows no broker.
    without: AtomicUsize,
    bootstrap_servers: CString,
}

/// Of what librdkafka says of itself (its STATISTICS.md) where its brokers come from.
#[derive(Deserialize)]
struct Statistics<'a> {
    #[serde(borrow)]
    brokers: HashMap<Cow<'a, str>, OfBroker<'a>>,
}

#[derive(Deserialize)]
struct OfBroker<'a> {
    #[serde(borrow)]
    source: Cow<'a, str>,
}

impl Lifeline {
    /// For a client of this cluster.
    pub fn to(kafka: &Kafka) -> Self {
        // Settings hold no zero byte: a process is not given one.
        let bootstrap_servers = CString::new(kafka.bootstrap_servers()).unwrap_or_default();
        Self { without: AtomicUsize::new(0), bootstrap_servers }
    }

    /// Takes in what the client says of itself.
    pub fn look(&self, statistics: &[u8]) {
        match serde_json::from_slice::<Statistics<'_>>(statistics) {
            Ok(Statistics { brokers }) => self.note(brokers.values().any(|broker| is_broker(&broker.source))),
            Err(fault) => error!(error = %fault, "could not read what librdkafka says of itself"),
        }
    }

    /// Takes in whether the client says that it knows a broker.
    pub fn note(&self, knows_one: bool) {
        match knows_one {
            true => self.without.store(0, Ordering::Relaxed),
            false => _ = self.without.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Names the brokers to the client again, if it knows none.
    #[expect(unsafe_code, reason = "the binding has no safe form of brokers_add")]
    pub fn mend<C: ClientContext>(&self, client: &Client<C>) {
        if self.without.load(Ordering::Relaxed) < LOOKS {
            return;
        }
        self.without.store(0, Ordering::Relaxed);
        warn!("a Kafka client knew no broker any more; it is told again where the cluster is");
        // SAFETY: the client lives as long as the reference to it, the text as long as this, and librdkafka copies it.
        unsafe { rd::rd_kafka_brokers_add(client.native_ptr(), self.bootstrap_servers.as_ptr()) };
    }
}

/// Whether a broker that comes from there is one. Others are librdkafka's own: what stands for a group's coordinator, and for none.
pub fn is_broker(source: &str) -> bool {
    matches!(source, "configured" | "learned")
}

/// The settings of a client that is looked after: it says now and then what it knows. Whoever uses them must poll the client, as what it
/// says waits until then.
pub fn looked_after(mut config: ClientConfig) -> ClientConfig {
    if config.get("statistics.interval.ms").is_none() {
        config.set("statistics.interval.ms", "5000");
    }
    config
}

/// The context of a client that lives as long as its process, and needs no other.
#[derive(Clone, Debug)]
pub struct LastingContext(Arc<Lifeline>);

impl LastingContext {
    /// For a client of this cluster.
    pub fn to(kafka: &Kafka) -> Self {
        Self(Arc::new(Lifeline::to(kafka)))
    }

    /// Names the brokers to its client again, if that knows none. To be called now and then.
    pub fn mend<C: ClientContext>(&self, client: &Client<C>) {
        self.0.mend(client);
    }
}

impl ClientContext for LastingContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }
    fn error(&self, fault: KafkaError, reason: &str) {
        say(&fault, reason);
    }
    fn stats_raw(&self, statistics: &[u8]) {
        self.0.look(statistics);
    }
}

impl ConsumerContext for LastingContext {}
