//! What every connection works on.

use crate::clock::wall_ms;
use crate::coordinator::Coordinator;
use crate::groups::Groups;
use crate::journal::{Facts, Journal, Subject, json};
use crate::log::AppendError;
use crate::offsets::Offsets;
use crate::partition::Partition;
use crate::topics::Topics;
use crate::{Config, Fsync, StartError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use uuid::Uuid;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Shared {
    pub config: Config,
    cluster: Uuid,
    pub journal: Arc<Journal>,
    pub topics: Topics,
    pub offsets: Offsets,
    pub coordinator: Coordinator,
    pub producer_ids: ProducerIds,
}

impl Shared {
    /// Opens everything on the data folder, checking every checksum. Blocks.
    pub(crate) fn open(config: Config) -> Result<Shared, StartError> {
        let (journal, facts) = Journal::open(&config.data.join("journal"))?;
        let journal = Arc::new(journal);
        let refused = |error: AppendError| StartError::Io {
            path: config.data.join("journal"),
            source: std::io::Error::other(error),
        };
        let cluster = facts.cluster.unwrap_or_else(Uuid::now_v7);
        if facts.cluster.is_none() {
            journal.write(&[(Subject::Cluster, Some(json(&cluster)))]).map_err(refused)?;
        }
        let topics = Topics::open(&config, Arc::clone(&journal), &facts, wall_ms())?;
        let in_logs = topics
            .all()
            .iter()
            .flat_map(|t| &t.partitions)
            .map(|p| p.with(|log| log.highest_producer()))
            .max();
        let Facts { producer_ids, offsets, .. } = facts;
        // A power cut may have taken the journal's last word, so the logs are asked too.
        let first = producer_ids.max(in_logs.map_or(0, |highest| highest + 1));
        Ok(Shared {
            cluster,
            topics,
            offsets: Offsets::new(offsets, Arc::clone(&journal)),
            coordinator: Coordinator::new(Groups::new(config.group_wait, || Uuid::now_v7().to_string())),
            producer_ids: ProducerIds { range: Mutex::new((first, first)), journal: Arc::clone(&journal) },
            journal,
            config,
        })
    }

    /// The cluster id as clients show it.
    pub(crate) fn cluster_id(&self) -> String {
        self.cluster.simple().to_string()
    }

    fn partitions(&self) -> Vec<Arc<Partition>> {
        self.topics.all().iter().flat_map(|t| t.partitions.clone()).collect()
    }

    /// Syncs everything written so far.
    pub(crate) async fn flush(&self) -> std::io::Result<()> {
        // Records before offsets: a group that reads something again does less harm than an offset that
        // points beyond the records.
        for partition in self.partitions() {
            partition.flush().await?;
        }
        self.journal.partition.flush().await
    }

    /// Syncs at the policy's interval; runs as long as the broker.
    pub(crate) async fn flush_at_intervals(&self) {
        let Fsync::Interval(every) = self.config.fsync else { return };
        let mut ticks = interval(every.max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.flush().await {
                tracing::error!(%error, "could not sync written records to disk; will try again");
            }
        }
    }

    /// Retention and compaction, a partition at a time; runs as long as the broker.
    pub(crate) async fn keep_up(self: Arc<Self>) {
        let mut ticks = interval(self.config.upkeep_every.max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let shared = Arc::clone(&self);
            // Reads and writes whole segments: not for the threads that answer requests.
            let _ = tokio::task::spawn_blocking(move || shared.upkeep()).await;
        }
    }

    fn upkeep(&self) {
        let journal = std::iter::once(&self.journal.partition);
        for partition in self.partitions().iter().map(Arc::as_ref).chain(journal) {
            if let Err(error) = partition.upkeep(wall_ms()) {
                let log = partition.with(|log| log.dir().display().to_string());
                tracing::error!(log, %error, "could not compact; will try again");
            }
        }
    }
}

/// Ids of idempotent producers; each is given once, ever.
#[derive(Debug)]
pub(crate) struct ProducerIds {
    /// The next one, and the end of what the journal says is given.
    range: Mutex<(i64, i64)>,
    journal: Arc<Journal>,
}

impl ProducerIds {
    pub(crate) fn next(&self) -> Result<i64, AppendError> {
        const BLOCK: i64 = 1000;
        let mut range = self.range.lock().unwrap_or_else(PoisonError::into_inner);
        let (next, end) = *range;
        if next >= end {
            let end = next + BLOCK;
            self.journal.write(&[(Subject::ProducerIds, Some(json(&end)))])?;
            *range = (next, end);
        }
        range.0 += 1;
        Ok(next)
    }
}
