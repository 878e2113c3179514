//! The clusters that the chains run on, and the topics between the hops.

use forebay_schemas::topics;
use forebay_tests::{Running, free_port, services, wait_for};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers as _,
};
use std::{path::Path, time::Duration};

/// What a request passes on its way.
pub struct Hop {
    pub from: &'static str,
    pub to: &'static [&'static str],
}

/// The hops of the pipeline `answer`, without those beside a request's way: `fill_cache`, the rows about upstream calls and
/// the following of tables are work that only Forebay does, and its figures bear it.
pub const HOPS: &[Hop] = &[
    Hop { from: topics::REQUESTS.name, to: &[topics::QUESTIONS.name] },
    Hop { from: topics::QUESTIONS.name, to: &[topics::PROMPTS.name] },
    Hop { from: topics::PROMPTS.name, to: &[topics::COMPLETIONS.name] },
    Hop { from: topics::COMPLETIONS.name, to: &[topics::ENDINGS.name] },
    Hop { from: topics::ENDINGS.name, to: &[topics::RESULTS.name, topics::OUTCOMES.name] },
];

pub const PARTITIONS: i32 = topics::PARTITIONS;

const WAIT: Duration = Duration::from_secs(30);

/// A real Apache Kafka of this run's own; nothing where its jars are not there.
pub fn kafka(folder: &Path) -> Option<(Running, String)> {
    let (port, controller) = (free_port(), free_port());
    let mut command = services::kafka_command(folder, port, controller, &[])?;
    let kafka = Running::start("Apache Kafka", &mut command);
    let is_up = || (kafka.stdout() + &kafka.stderr()).contains("Kafka Server started").then_some(());
    wait_for("Apache Kafka", Duration::from_secs(60), is_up);
    Some((kafka, format!("127.0.0.1:{port}")))
}

fn admin(at: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", at).create().expect("an admin client")
}

/// Makes the topics of a bare chain.
pub async fn make_topics(at: &str, prefix: &str) {
    let names: Vec<_> = HOPS.iter().flat_map(|hop| hop.to).chain([&topics::REQUESTS.name]).collect();
    let names: Vec<_> = names.into_iter().map(|name| format!("{prefix}{name}")).collect();
    let new = |name| {
        let topic = NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1));
        topic.set("max.message.bytes", "4194304")
    };
    let topics: Vec<_> = names.iter().map(|name| new(name)).collect();
    let options = AdminOptions::new().operation_timeout(Some(WAIT));
    for made in admin(at).create_topics(&topics, &options).await.expect("topics") {
        made.expect("a topic");
    }
}

/// Deletes all topics of a run, so that the next does not share the broker with them.
pub async fn delete_topics(at: &str, prefix: &str) {
    let admin = admin(at);
    let metadata = admin.inner().fetch_metadata(None, WAIT).expect("metadata");
    let names = metadata.topics().iter().map(rdkafka::metadata::MetadataTopic::name);
    let names: Vec<_> = names.filter(|name| name.starts_with(prefix)).collect();
    admin.delete_topics(&names, &AdminOptions::new()).await.expect("deletion");
}

/// How many records lie on a topic.
pub fn records(at: &str, topic: &str) -> i64 {
    let reader = reader(at);
    let marks = |partition| reader.fetch_watermarks(topic, partition, WAIT).expect("watermarks");
    (0..PARTITIONS).map(marks).map(|(low, high)| high - low).sum()
}

/// The mean bytes of the messages (values and headers) that each hop writes, from up to 500 of each topic.
pub fn bytes(at: &str, prefix: &str) -> Vec<usize> {
    let mean = |name: &&str| {
        let (mut count, mut sum) = (0, 0);
        let reader = reader(at);
        let topic = format!("{prefix}{name}");
        let mut list = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            list.add_partition_offset(&topic, partition, Offset::Beginning).expect("an offset");
        }
        reader.assign(&list).expect("an assignment");
        while let Some(Ok(message)) = reader.poll(Duration::from_secs(2)) {
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            let of = |header: rdkafka::message::Header<'_, &[u8]>| {
                header.key.len() + header.value.map_or(0, <[u8]>::len)
            };
            sum += message.payload_len() + headers.map(of).sum::<usize>();
            count += 1;
            if count == 500 {
                break;
            }
        }
        sum.checked_div(count).expect("a message")
    };
    HOPS.iter().flat_map(|hop| hop.to).map(mean).collect()
}

/// A consumer without a group, that the caller assigns.
pub fn reader(at: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", at).set("group.id", "bench-reader").set("enable.auto.commit", "false");
    config.set("fetch.wait.max.ms", "100").create().expect("a reader")
}
