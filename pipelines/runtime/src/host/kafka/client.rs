//! What all clients of one cluster share: where it is, how it is spoken to, and which settings are not for the user.
//!
//! librdkafka's properties pass through, so that TLS, SASL and tuning need nothing of ours. A short list is refused:
//! on these the promises rest.

use super::registry::{Registry, RegistrySettings};
use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    types::RDKafkaErrorCode,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tracing::{debug, error, info, warn};

/// Properties that the promises own, each with the reason.
const REFUSED: &[(&str, &str)] = &[
    ("bootstrap.servers", "give it as bootstrap_servers, which every command reads"),
    ("metadata.broker.list", "give the brokers as bootstrap_servers, which every command reads"),
    ("group.id", "the group is {prefix}{pipeline}.{step}, so that every process of a stage finds the others"),
    ("group.instance.id", "a static member that is gone holds its partitions until the session times out"),
    ("enable.auto.commit", "an offset is committed only after all that its record became is acknowledged"),
    ("enable.auto.offset.store", "an offset is stored only after all that its record became is acknowledged"),
    (
        "auto.offset.reset",
        "a stage without a committed offset starts at the earliest record, or it would lose some",
    ),
    (
        "partition.assignment.strategy",
        "partitions are drained one by one, which only cooperative-sticky allows",
    ),
    ("enable.partition.eof", "tables use it to know that they are read whole"),
    ("acks", "a message counts as written when all replicas have it"),
    ("request.required.acks", "a message counts as written when all replicas have it"),
    ("enable.idempotence", "without it a retry of the client may write a message twice"),
    ("transactional.id", "there are no transactions here"),
    ("partitioner", "records of one job must meet at one partition number, also beside Java clients"),
    ("allow.auto.create.topics", "topics are made by `forebay topics apply` only, with their settings"),
];

/// Where the cluster is and how it is spoken to.
#[derive(Clone, Debug, Default)]
pub struct KafkaSettings {
    /// `host:port`, joined by commas.
    pub bootstrap_servers: String,
    /// librdkafka's properties.
    pub properties: BTreeMap<String, String>,
    /// The schema registry beside it, where there is one.
    pub registry: Option<RegistrySettings>,
}

/// A property that is not the user's to set, or that librdkafka does not take.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// On the list of those that the promises own.
    #[error("kafka property {property} cannot be set: {reason}")]
    Refused {
        /// The property.
        property: String,
        /// Why.
        reason: &'static str,
    },
    /// librdkafka does not take it.
    #[error(
        "kafka property {property} = {value:?} is not accepted: {reason}; see CONFIGURATION.md of librdkafka"
    )]
    NotAccepted {
        /// The property.
        property: String,
        /// Its value.
        value: String,
        /// librdkafka's words.
        reason: String,
    },
    /// The client could not be made.
    #[error("could not make a Kafka client")]
    Client(#[source] KafkaError),
}

/// Whether a property's name, be it misspelt, sounds like that of a secret: its value is never shown.
pub fn may_be_secret(property: &str) -> bool {
    let words = ["pass", "pwd", "secret", "token", "bearer", "jaas", "key", "sasl"];
    words.iter().any(|word| property.to_ascii_lowercase().contains(word))
}

/// Nobody answers.
#[derive(Debug, thiserror::Error)]
#[error("could not reach Kafka at {bootstrap_servers} within {} s; check that the broker runs and that the address, TLS and SASL settings are right", waited.as_secs())]
pub struct UnreachableError {
    bootstrap_servers: String,
    waited: Duration,
    #[source]
    source: Option<KafkaError>,
}

/// A cluster, ready to make clients of.
#[derive(Clone, Debug)]
pub struct Kafka {
    config: ClientConfig,
    bootstrap_servers: String,
    registry: Option<Arc<Registry>>,
}

impl Kafka {
    /// Checks the settings; connects to nothing yet.
    pub fn new(settings: &KafkaSettings) -> Result<Self, SettingsError> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &settings.bootstrap_servers);
        config.set("client.id", "forebay");
        config.set_log_level(RDKafkaLogLevel::Notice);
        for (property, value) in &settings.properties {
            if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| refused == property) {
                return Err(SettingsError::Refused { property: property.clone(), reason });
            }
            config.set(property, value);
            // Whoever asks for librdkafka's debug contexts wants to see them; FOREBAY_LOG has the last word.
            if property == "debug" {
                config.set_log_level(RDKafkaLogLevel::Debug);
            }
        }
        config.create_native_config().map_err(|error| match error {
            KafkaError::ClientConfig(_, reason, property, value) => {
                let value = if may_be_secret(&property) { "(hidden)".to_owned() } else { value };
                SettingsError::NotAccepted { property, value, reason }
            }
            error => SettingsError::Client(error),
        })?;
        let registry = settings.registry.clone().map(|settings| Arc::new(Registry::new(settings)));
        Ok(Self { config, bootstrap_servers: settings.bootstrap_servers.clone(), registry })
    }

    /// The schema registry beside it, where there is one.
    pub fn registry(&self) -> Option<&Arc<Registry>> {
        self.registry.as_ref()
    }

    /// Where the cluster is.
    pub fn bootstrap_servers(&self) -> &str {
        &self.bootstrap_servers
    }

    /// The settings that all clients start from.
    pub fn config(&self) -> ClientConfig {
        self.config.clone()
    }

    /// The settings of a member of a consumer group.
    pub fn group_config(&self, group: &str) -> ClientConfig {
        let mut config = self.config();
        let kip_848 = is_kip_848(&config);
        // Defaults first, so that what the user passed through wins.
        let mut default = |name: &str, value: &str| {
            if config.get(name).is_none() {
                config.set(name, value);
            }
        };
        default("max.poll.interval.ms", "60000");
        // Small prefetch: what librdkafka holds counts against no budget of ours.
        default("queued.min.messages", "1000");
        default("queued.max.messages.kbytes", "4096");
        // Twice the largest message; of one partition a little at a time, since a pause throws it away. What is larger than
        // that comes alone.
        default("fetch.max.bytes", "8388608");
        default("max.partition.fetch.bytes", "262144");
        default("fetch.queue.backoff.ms", "20");
        default("fetch.wait.max.ms", "100");
        // A flood is noticed by its lag, which these tell.
        default("statistics.interval.ms", "500");
        if kip_848 {
            // Of every topic the same share, and equal numbers at one member: the uniform assignor counts partitions of
            // all channels alike, and one member may get all live ones.
            default("group.remote.assignor", "range");
        } else {
            default("session.timeout.ms", "10000");
            // A partition that moves stands still until its new owner hears of it.
            default("heartbeat.interval.ms", "1000");
            config.set("partition.assignment.strategy", "cooperative-sticky");
        }
        config.set("group.id", group);
        config.set("enable.auto.commit", "false");
        config.set("enable.auto.offset.store", "false");
        config.set("auto.offset.reset", "earliest");
        config
    }

    /// The settings of a reader without a group, which assigns partitions to itself.
    pub fn reader_config(&self) -> ClientConfig {
        let mut config = self.config();
        // librdkafka wants a group id for any consumer; nothing is ever committed under this one.
        config.set("group.id", "forebay-reader");
        config.set("enable.auto.commit", "false");
        config.set("enable.auto.offset.store", "false");
        config.set("auto.offset.reset", "earliest");
        config.set("enable.partition.eof", "true");
        config.set("fetch.wait.max.ms", "100");
        // Of many partitions read at once as much as librdkafka may hold is held, a quarter of what it would.
        if config.get("queued.max.messages.kbytes").is_none() {
            config.set("queued.max.messages.kbytes", "16384");
        }
        config
    }

    /// The settings of a producer whose messages are written once and never lost, for who takes a message that is acknowledged
    /// without an offset for one that is not written (see [`KafkaSink`](super::KafkaSink)).
    pub fn producer_config(&self) -> ClientConfig {
        let mut config = self.config();
        let mut default = |name: &str, value: &str| {
            if config.get(name).is_none() {
                config.set(name, value);
            }
        };
        // Seven hops share a budget of 10 ms, and librdkafka waits in whole milliseconds. Below saturation this also costs
        // less processor time than a wait; tests/bench has the figures.
        default("linger.ms", "0");
        default("queue.buffering.max.kbytes", "65536");
        default("message.max.bytes", &forebay_schemas::topics::DERIVED_MESSAGE_BYTES_MAX.to_string());
        config.set("acks", "all");
        config.set("enable.idempotence", "true");
        // As the Java client does, so that records of one key meet whoever wrote them.
        config.set("partitioner", "murmur2_random");
        config
    }

    /// The same for everybody else, who writes little: one request to a broker at a time, so that none can overtake another.
    pub fn producer_config_in_turn(&self) -> ClientConfig {
        let mut config = self.producer_config();
        config.remove("max.in.flight");
        config.set("max.in.flight.requests.per.connection", "1");
        config
    }

    /// The id of the cluster; fails where nobody answers in time. Blocks.
    pub fn cluster_id(&self, wait: Duration) -> Result<String, UnreachableError> {
        let unreachable = |source| UnreachableError {
            bootstrap_servers: self.bootstrap_servers.clone(),
            waited: wait,
            source,
        };
        let reader: BaseConsumer<LogContext> =
            self.reader_config().create_with_context(LogContext).map_err(|error| unreachable(Some(error)))?;
        reader.client().fetch_cluster_id(wait).ok_or_else(|| unreachable(None))
    }
}

/// Whether groups are joined by the protocol of KIP-848.
pub(super) fn is_kip_848(config: &ClientConfig) -> bool {
    config.get("group.protocol").is_some_and(|protocol| protocol.eq_ignore_ascii_case("consumer"))
}

/// Says what librdkafka says, in our log. The context of every client that needs none of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogContext;

impl ClientContext for LogContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }
    fn error(&self, fault: KafkaError, reason: &str) {
        say(&fault, reason);
    }
}

impl rdkafka::consumer::ConsumerContext for LogContext {}

pub(super) fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        // Each commit of a rebalance is refused, several a second; whoever committed is told too, and says it once.
        RDKafkaLogLevel::Warning if facility == "COMMITFAIL" => debug!(facility, message, "librdkafka"),
        RDKafkaLogLevel::Emerg
        | RDKafkaLogLevel::Alert
        | RDKafkaLogLevel::Critical
        | RDKafkaLogLevel::Error => {
            error!(facility, message, "librdkafka");
        }
        RDKafkaLogLevel::Warning => warn!(facility, message, "librdkafka"),
        RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => info!(facility, message, "librdkafka"),
        RDKafkaLogLevel::Debug => debug!(facility, message, "librdkafka"),
    }
}

pub(super) fn say(fault: &KafkaError, reason: &str) {
    // The end of a partition is no error: readers ask to be told of it.
    if fault.rdkafka_error_code() == Some(RDKafkaErrorCode::PartitionEOF) {
        return;
    }
    // A broker that stays away is told of by every client many times a second; what else it says is never held back.
    if let Some(code) = fault.rdkafka_error_code().filter(|code| LASTING.contains(code)) {
        let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = said.iter().any(|(known, at)| *known == code && at.elapsed() < SAID_EVERY);
        if recent {
            return;
        }
        said.retain(|(known, _)| *known != code);
        said.push((code, Instant::now()));
    }
    warn!(error = %fault, reason, "Kafka client");
}

/// Errors that come again and again while a broker is away, and how often each is said aloud.
const LASTING: [RDKafkaErrorCode; 3] =
    [RDKafkaErrorCode::AllBrokersDown, RDKafkaErrorCode::BrokerTransportFailure, RDKafkaErrorCode::Resolve];
const SAID_EVERY: Duration = Duration::from_secs(10);
/// When each of them was said last; at most as many as there are.
static SAID: Mutex<Vec<(RDKafkaErrorCode, Instant)>> = Mutex::new(Vec::new());

/// A topic's name, shared by all who name it.
pub(super) fn shared_name(names: &[Arc<str>], name: &str) -> Arc<str> {
    names.iter().find(|known| ***known == *name).map_or_else(|| Arc::from(name), Arc::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(property: &str, value: &str) -> String {
        let properties = BTreeMap::from([(property.to_owned(), value.to_owned())]);
        let bootstrap_servers = "127.0.0.1:1".to_owned();
        let settings = KafkaSettings { bootstrap_servers, properties, registry: None };
        Kafka::new(&settings).expect_err(property).to_string()
    }

    #[test]
    fn properties_that_the_promises_own_are_refused_with_the_reason() {
        assert!(refusal("acks", "1").contains("all replicas"));
        assert!(refusal("group.id", "mine").contains("{prefix}{pipeline}.{step}"));
    }

    #[test]
    fn a_property_that_librdkafka_does_not_know_is_named() {
        assert!(refusal("sesion.timeout.ms", "1").contains("sesion.timeout.ms"));
        assert!(refusal("session.timeout.ms", "soon").contains("soon"));
        let secret = refusal("sasl.pasword", "canary");
        assert!(secret.contains("sasl.pasword") && !secret.contains("canary"), "{secret}");
    }
}
