//! How far everybody has come: used to wait until nothing is left to do.

use anyhow::Context as _;
use forebay_plan::Plan;
use forebay_runtime::host::kafka::{Kafka, LogContext, TableReader};
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use std::{collections::BTreeMap, time::Duration};
use tokio_util::sync::CancellationToken;

const WAIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);

/// Watches the groups of a pipeline and the tables of this process.
pub struct Watch {
    /// One client for each group: committed offsets are asked for in a group's name.
    groups: Vec<(BaseConsumer<LogContext>, Vec<String>)>,
    reader: BaseConsumer<LogContext>,
    tables: Vec<TableReader>,
}

impl Watch {
    /// A watch over all steps of a pipeline.
    pub fn new(kafka: &Kafka, plan: &Plan, prefix: &str, tables: Vec<TableReader>) -> anyhow::Result<Self> {
        let mut groups = Vec::new();
        for step in &plan.steps {
            let mut config = kafka.reader_config();
            config.set("group.id", plan.consumer_group(prefix, step));
            let topics = step.from.iter().map(|topic| format!("{prefix}{topic}")).collect();
            groups.push((config.create_with_context(LogContext)?, topics));
        }
        Ok(Self { groups, reader: kafka.reader_config().create_with_context(LogContext)?, tables })
    }

    /// Waits until no group has anything left to read and every table has read all, in this order: the order of a
    /// request's way, looked at again until one look finds nothing. False where `shutdown` came first.
    pub async fn quiet(self: &std::sync::Arc<Self>, shutdown: &CancellationToken) -> anyhow::Result<bool> {
        loop {
            let this = std::sync::Arc::clone(self);
            // Asking blocks.
            let left =
                tokio::task::spawn_blocking(move || this.left()).await.context("watching offsets")??;
            if left == 0 {
                return Ok(true);
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = shutdown.cancelled() => return Ok(false),
            }
        }
    }

    /// How many records are still to be read, by all.
    fn left(&self) -> anyhow::Result<i64> {
        let mut left = 0;
        for (group, topics) in &self.groups {
            for topic in topics {
                let ends = ends(&self.reader, topic)?;
                let mut list = TopicPartitionList::new();
                for partition in ends.keys() {
                    list.add_partition(topic, *partition);
                }
                let committed = group.committed_offsets(list, WAIT)?;
                for element in committed.elements() {
                    let (low, high) = ends.get(&element.partition()).copied().unwrap_or_default();
                    let reached = match element.offset() {
                        Offset::Offset(offset) => offset,
                        _ => low,
                    };
                    left += (high - reached).max(0);
                }
            }
        }
        for table in &self.tables {
            let positions = table.positions();
            for (partition, (low, high)) in ends(&self.reader, table.topic())? {
                left += (high - positions.get(&partition).copied().unwrap_or(low)).max(0);
            }
        }
        Ok(left)
    }
}

/// The first and the next offset of each partition of a topic. Blocks.
pub fn ends(reader: &BaseConsumer<LogContext>, topic: &str) -> anyhow::Result<BTreeMap<i32, (i64, i64)>> {
    let metadata =
        reader.fetch_metadata(Some(topic), WAIT).with_context(|| format!("looking at topic {topic}"))?;
    let mut ends = BTreeMap::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        let marks = reader
            .fetch_watermarks(topic, partition.id(), WAIT)
            .with_context(|| format!("looking at {topic}/{}", partition.id()))?;
        ends.insert(partition.id(), marks);
    }
    Ok(ends)
}
