//! The topics of a pipeline on a cluster: what is there, what is wanted, what would have to change.

use super::client::{Kafka, LogContext};
use forebay_schemas::topics::{Cleanup, DERIVED_MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX};
use rdkafka::{
    admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication},
    error::KafkaError,
    types::RDKafkaErrorCode,
};
use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

const WAIT: Duration = Duration::from_secs(30);

/// How often to look whether what was made is there.
const SEEN_EVERY: Duration = Duration::from_millis(100);

/// A topic as a pipeline wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its full name.
    pub name: String,
    /// How many partitions.
    pub partitions: i32,
    /// Its settings, under Kafka's names.
    pub settings: BTreeMap<&'static str, String>,
}

impl Wanted {
    /// A topic with the settings that its content asks for.
    pub fn new(name: String, partitions: i32, cleanup: Cleanup, from_clients: bool) -> Self {
        let mut settings = BTreeMap::new();
        // Headers grow on the way, a prompt gains its passages, and a dead letter holds a whole record.
        let bytes = if from_clients { MESSAGE_BYTES_MAX } else { DERIVED_MESSAGE_BYTES_MAX };
        settings.insert("max.message.bytes", bytes.to_string());
        match cleanup {
            Cleanup::Compact => {
                settings.insert("cleanup.policy", "compact".to_owned());
            }
            Cleanup::CompactAfter { hours } => {
                settings.insert("cleanup.policy", "compact".to_owned());
                settings.insert("min.compaction.lag.ms", (u64::from(hours) * 3_600_000).to_string());
            }
            Cleanup::Delete { hours } => {
                settings.insert("cleanup.policy", "delete".to_owned());
                settings.insert("retention.ms", (u64::from(hours) * 3_600_000).to_string());
            }
        }
        if from_clients {
            // Deadlines count from the record's timestamp: a client's clock must not shift them.
            settings.insert("message.timestamp.type", "LogAppendTime".to_owned());
        }
        Self { name, partitions, settings }
    }
}

impl Wanted {
    fn is_compacted(&self) -> bool {
        self.settings.get("cleanup.policy").is_some_and(|policy| policy == "compact")
    }
}

/// What would have to be done about a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is as it should be.
    Keep(String),
    /// It is not there.
    Create(Wanted),
    /// It has too few partitions. Records of one key may then lie in two partitions.
    AddPartitions {
        /// Its full name.
        name: String,
        /// How many it has.
        from: i32,
        /// How many it should have.
        to: i32,
    },
    /// It has too few partitions, and is compacted: its keys would move, and what they meant before would stay behind.
    CannotGrow {
        /// Its full name.
        name: String,
        /// How many it has.
        has: i32,
        /// How many are wanted.
        wanted: i32,
    },
    /// It has more partitions than is wanted; Kafka cannot take any away.
    TooMany {
        /// Its full name.
        name: String,
        /// How many it has.
        has: i32,
        /// How many are wanted.
        wanted: i32,
    },
}

impl Change {
    /// The topic and the partitions that it has once this is done, where something is.
    fn made(&self) -> Option<(&str, i32)> {
        match self {
            Self::Create(wanted) => Some((&wanted.name, wanted.partitions)),
            Self::AddPartitions { name, to, .. } => Some((name, *to)),
            Self::Keep(_) | Self::CannotGrow { .. } | Self::TooMany { .. } => None,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep(name) => write!(f, "  = {name}"),
            Self::Create(Wanted { name, partitions, settings }) => {
                let settings: Vec<_> = settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
                write!(f, "  + {name}  {partitions} partitions  {}", settings.join(" "))
            }
            Self::AddPartitions { name, from, to } => write!(f, "  ~ {name}  {from} → {to} partitions"),
            Self::CannotGrow { name, has, wanted } => {
                write!(f, "  ! {name}  has {has} partitions and is compacted; make it anew to have {wanted}")
            }
            Self::TooMany { name, has, wanted } => {
                write!(
                    f,
                    "  ! {name}  has {has} partitions, {wanted} are wanted; make it anew or ask for {has}"
                )
            }
        }
    }
}

/// Why topics could not be seen or made.
#[derive(Debug, thiserror::Error)]
pub enum TopicsError {
    /// The cluster did not say what it has.
    #[error(
        "could not read the topics of {bootstrap_servers}; check that the broker runs and that the address, TLS and SASL settings are right"
    )]
    Read {
        /// Where the cluster is.
        bootstrap_servers: String,
        /// What happened.
        #[source]
        source: KafkaError,
    },
    /// The cluster did not make or change a topic.
    #[error("could not make topic {topic}: {reason}")]
    Change {
        /// Its full name.
        topic: String,
        /// The broker's reason.
        reason: String,
    },
}

/// Full name → number of partitions, of all topics of a cluster. Blocks.
pub fn existing(kafka: &Kafka, wait: Duration) -> Result<BTreeMap<String, i32>, TopicsError> {
    let read = |source| TopicsError::Read { bootstrap_servers: kafka.bootstrap_servers().to_owned(), source };
    let admin: AdminClient<LogContext> = kafka.config().create_with_context(LogContext).map_err(read)?;
    let metadata = admin.inner().fetch_metadata(None, wait).map_err(read)?;
    let count = |topic: &rdkafka::metadata::MetadataTopic| {
        i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX)
    };
    Ok(metadata.topics().iter().map(|topic| (topic.name().to_owned(), count(topic))).collect())
}

/// What would have to be done so that all wanted topics are there.
pub fn compare(wanted: Vec<Wanted>, existing: &BTreeMap<String, i32>) -> Vec<Change> {
    let change = |wanted: Wanted| match existing.get(&wanted.name) {
        None => Change::Create(wanted),
        Some(&has) if has < wanted.partitions && wanted.is_compacted() => {
            Change::CannotGrow { name: wanted.name, has, wanted: wanted.partitions }
        }
        Some(&from) if from < wanted.partitions => {
            Change::AddPartitions { name: wanted.name, from, to: wanted.partitions }
        }
        Some(&has) if has > wanted.partitions => {
            Change::TooMany { name: wanted.name, has, wanted: wanted.partitions }
        }
        Some(_) => Change::Keep(wanted.name),
    };
    wanted.into_iter().map(change).collect()
}

/// Makes the changes. `replication` of −1 is the broker's default.
pub async fn apply(kafka: &Kafka, changes: &[Change], replication: i32) -> Result<(), TopicsError> {
    let failed = |topic: &str, reason: String| TopicsError::Change { topic: topic.to_owned(), reason };
    let admin: AdminClient<LogContext> =
        kafka.config().create_with_context(LogContext).map_err(|source| TopicsError::Read {
            bootstrap_servers: kafka.bootstrap_servers().to_owned(),
            source,
        })?;
    let options = AdminOptions::new().operation_timeout(Some(WAIT)).request_timeout(Some(WAIT));
    let mut created = Vec::new();
    let mut grown = Vec::new();
    for change in changes {
        match change {
            Change::Create(wanted) => {
                let mut topic =
                    NewTopic::new(&wanted.name, wanted.partitions, TopicReplication::Fixed(replication));
                for (key, value) in &wanted.settings {
                    topic = topic.set(key, value);
                }
                created.push(topic);
            }
            Change::AddPartitions { name, to, .. } => {
                grown.push(NewPartitions::new(name, usize::try_from(*to).unwrap_or(0)));
            }
            Change::Keep(_) | Change::TooMany { .. } | Change::CannotGrow { .. } => {}
        }
    }
    let mut results = Vec::new();
    if !created.is_empty() {
        let made = admin.create_topics(&created, &options).await;
        results.extend(made.map_err(|fault| failed("(all)", fault.to_string()))?);
    }
    if !grown.is_empty() {
        let made = admin.create_partitions(&grown, &options).await;
        results.extend(made.map_err(|fault| failed("(all)", fault.to_string()))?);
    }
    for result in results {
        match result {
            // Somebody else was faster.
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((topic, code)) => return Err(failed(&topic, code.to_string())),
        }
    }
    let made: Vec<_> = changes.iter().filter_map(Change::made).collect();
    if made.is_empty() { Ok(()) } else { seen(&admin, &made).await }
}

/// Waits until the cluster shows what was made, with a leader for each partition: it says that a topic is made before it
/// is known everywhere, and whoever asks for it then is told that there is none.
async fn seen(admin: &AdminClient<LogContext>, made: &[(&str, i32)]) -> Result<(), TopicsError> {
    let until = Instant::now() + WAIT;
    loop {
        let metadata = admin.inner().fetch_metadata(None, WAIT);
        let is_there = |(name, partitions): &(&str, i32)| {
            let topics = metadata.as_ref().map(rdkafka::metadata::Metadata::topics).unwrap_or_default();
            topics.iter().find(|topic| topic.name() == *name).is_some_and(|topic| {
                let led = topic.partitions().iter().filter(|partition| partition.leader() >= 0).count();
                i32::try_from(led).is_ok_and(|led| led >= *partitions)
            })
        };
        let Some((missing, _)) = made.iter().find(|one| !is_there(one)) else { return Ok(()) };
        if Instant::now() >= until {
            let reason = format!("it is not shown with all its partitions after {} s", WAIT.as_secs());
            return Err(TopicsError::Change { topic: (*missing).to_owned(), reason });
        }
        tokio::time::sleep(SEEN_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str) -> Wanted {
        let cleanup = if name == "e" { Cleanup::Compact } else { Cleanup::Delete { hours: 1 } };
        Wanted::new(name.to_owned(), 12, cleanup, false)
    }

    #[test]
    fn a_plan_tells_what_is_there_what_is_missing_and_what_cannot_be() {
        let existing = BTreeMap::from([
            ("a".to_owned(), 12),
            ("b".to_owned(), 3),
            ("c".to_owned(), 24),
            ("e".to_owned(), 3),
        ]);
        let changes = compare(["a", "b", "c", "d", "e"].map(wanted).into(), &existing);
        let shown: Vec<_> = changes.iter().map(|change| change.to_string().chars().nth(2)).collect();
        assert_eq!(shown, [Some('='), Some('~'), Some('!'), Some('+'), Some('!')]);
    }
}
