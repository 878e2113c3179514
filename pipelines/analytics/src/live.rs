//! `requests_live`: the rows of `outcomes`, and those that are on their topic and not in the table yet.
//!
//! A table's log says, in the same version as its files, up to which offset each partition of the topic is in it. So the tail begins
//! behind that offset of that very version, and ends where the partition ended when the query was planned.
//!
//! Invariant: a row is seen once, in the table or in the tail, however the sink goes on meanwhile; and every row that was acknowledged
//! before the query is seen.

use crate::kafka_table::{Form, Range, TopicTable, blocking, ranges};
use crate::table::Table;
use arrow::datatypes::SchemaRef;
use datafusion::common::{DataFusionError, Result, exec_err};
use deltalake_core::DeltaTable;
use forebay_runtime::host::kafka::{Kafka, TopicIds};
use std::{sync::Arc, time::Duration};
use tokio::sync::OnceCell;
use tracing::warn;

/// Its name in SQL.
pub const NAME: &str = "requests_live";
/// What it answers.
pub const MEANING: &str = "The rows of `outcomes` and those that are on their topic and not in the table yet, each once: what has happened up to now. \
    Its columns are those of `outcomes`. Without a Kafka it is `outcomes`, and a warning says so.";
/// The table that it continues.
pub const TABLE: Table = Table::Outcomes;
/// How long to wait for the cluster.
const KAFKA_WAIT: Duration = Duration::from_secs(10);

/// Where the rows come from that are in no table yet.
pub struct Live {
    kafka: Kafka,
    /// The full name of the topic.
    topic: String,
    cluster: OnceCell<String>,
    /// Kept, since each query asks.
    topic_ids: OnceCell<Arc<TopicIds>>,
}

impl Live {
    /// The topic of [`TABLE`], by its full name.
    pub fn new(kafka: Kafka, topic: String) -> Self {
        Self { kafka, topic, cluster: OnceCell::new(), topic_ids: OnceCell::new() }
    }

    /// The Kafka.
    pub fn kafka(&self) -> &Kafka {
        &self.kafka
    }

    /// What is on the topic and not in this version of the table, with columns of these types.
    pub async fn tail(&self, table: Option<&DeltaTable>, schema: SchemaRef) -> Result<TopicTable> {
        // Asked after the version was read: what it lacks is there by now, and what comes later is not wanted.
        let mut ranges = blocking(&self.kafka, &self.topic, ranges).await?;
        if let (Some(table), false) = (table, ranges.is_empty()) {
            let application = self.application().await?;
            let (state, log) = (table.snapshot()?, table.log_store());
            for range in &mut ranges {
                let last = state
                    .transaction_version(log.as_ref(), &format!("{application}/{}", range.partition))
                    .await?;
                behind(range, last, &self.topic);
            }
        }
        let (kafka, topic) = (self.kafka.clone(), self.topic.clone());
        Ok(TopicTable { kafka, topic, ranges, form: Form::Rows(TABLE), schema })
    }

    /// How the sink calls the topic in the log of the table, without the partition. A topic that is made anew has another id.
    async fn application(&self) -> Result<String> {
        let cluster = self.cluster.get_or_try_init(|| {
            let kafka = self.kafka.clone();
            waited(move || kafka.cluster_id(KAFKA_WAIT))
        });
        let cluster = cluster.await?.clone();
        let asked = self.topic_ids.get_or_try_init(|| {
            let kafka = self.kafka.clone();
            waited(move || TopicIds::new(&kafka).map(Arc::new))
        });
        let (asked, topic) = (Arc::clone(asked.await?), self.topic.clone());
        let ids = waited(move || asked.of(&[topic], KAFKA_WAIT)).await?;
        // Under no name it would be read from its beginning, and rows be seen twice.
        let Some(id) = ids.get(&self.topic) else {
            return exec_err!("topic {} is being made or deleted; ask again in a moment", self.topic);
        };
        Ok(format!("{cluster}/{id}"))
    }
}

/// Lets a range begin behind the last offset that is in the table.
fn behind(range: &mut Range, last: Option<i64>, topic: &str) {
    let Some(next) = last.map(|last| last.saturating_add(1)) else { return };
    if next < range.from {
        warn!(
            topic,
            partition = range.partition,
            table_ends = next,
            topic_begins = range.from,
            "messages were deleted before they came into their table; they are in no answer"
        );
    }
    range.from = range.from.max(next);
    range.to = range.to.max(range.from);
}

async fn waited<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T>
where
    T: Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    let external = |fault: Box<dyn std::error::Error + Send + Sync>| DataFusionError::External(fault);
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|fault| external(Box::new(fault)))?.map_err(|fault| external(Box::new(fault)))
}

#[cfg(test)]
mod tests;
