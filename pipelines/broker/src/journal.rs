//! What the broker knows besides records: its cluster id, topics, committed offsets, deleted records.
//!
//! Invariant: a fact is in the journal before anyone is told of it. The journal is a compacted log like
//! any other (same checksums, same recovery, same compaction), of facts as JSON, the last of each key
//! being the one that holds.

use crate::StartError;
use crate::clock::wall_ms;
use crate::log::{AppendError, Log, OpenError, batch};
use crate::partition::Partition;
use crate::settings::Settings;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use uuid::Uuid;

const SEGMENT_BYTES: u64 = 4 << 20;

/// What a fact is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Subject {
    Cluster,
    /// Producer ids below the value have been handed out.
    ProducerIds,
    Topic(String),
    /// Records of a partition below the value have been deleted on request.
    Start(Uuid, i32),
    Offset {
        group: String,
        topic: String,
        partition: i32,
    },
}

/// A topic as it is remembered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TopicFact {
    pub id: Uuid,
    pub partitions: i32,
    pub settings: BTreeMap<String, String>,
}

/// A committed offset as it is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OffsetFact {
    pub offset: i64,
    pub leader_epoch: i32,
    pub metadata: Option<String>,
}

/// Everything the journal says, as of the last word on each subject.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub cluster: Option<Uuid>,
    pub producer_ids: i64,
    pub topics: BTreeMap<String, TopicFact>,
    pub starts: BTreeMap<(Uuid, i32), i64>,
    pub offsets: BTreeMap<String, BTreeMap<(String, i32), OffsetFact>>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Journal {
    pub partition: Partition,
}

impl Journal {
    /// Opens the journal in `dir` and reads it whole, a batch at a time.
    pub(crate) fn open(dir: &Path) -> Result<(Journal, Facts), StartError> {
        let mut settings = Settings::new(SEGMENT_BYTES);
        (settings.delete, settings.compact) = (false, true);
        settings.message_bytes_max = u64::MAX;
        // A delete needs no reader to hear of it: whoever opens the journal reads it whole.
        settings.tombstone_ms = 0;
        let log = Log::open(dir, settings, 0, wall_ms())?;
        let unreadable = |source| StartError::Io { path: dir.to_owned(), source };
        let mut facts = Facts::default();
        let mut offset = log.start();
        while let Ok(Some(slice)) = log.slice(offset) {
            let bytes = slice.read(1 << 20, true).map_err(unreadable)?;
            let mut rest = bytes;
            if rest.is_empty() {
                break;
            }
            while let Ok(header) = batch::Header::parse(&rest) {
                let whole =
                    rest.split_to(usize::try_from(header.bytes).unwrap_or(rest.len()).min(rest.len()));
                for record in batch::records(&whole).map_err(|e| unreadable(io::Error::other(e)))? {
                    facts.learn(record.key.as_deref(), record.value.as_deref()).map_err(unreadable)?;
                }
                offset = header.last() + 1;
            }
        }
        Ok((Journal { partition: Partition::new(log) }, facts))
    }

    /// Writes facts as one batch: all of them hold after a restart, or none.
    pub(crate) fn write(&self, facts: &[(Subject, Option<Vec<u8>>)]) -> Result<(), AppendError> {
        if facts.is_empty() {
            return Ok(());
        }
        let now_ms = wall_ms();
        let keys: Vec<Vec<u8>> = facts.iter().map(|(s, _)| json(s)).collect();
        let records: Vec<_> = facts
            .iter()
            .zip(&keys)
            .map(|((_, value), key)| (Some(key.as_slice()), value.as_deref(), now_ms))
            .collect();
        let batch = Bytes::from(batch::build(&records));
        match self.partition.append(&batch, now_ms) {
            Some(Err(error)) => Err(error),
            // The journal is never deleted.
            Some(Ok(_)) | None => Ok(()),
        }
    }
}

/// A fact's bytes.
pub(crate) fn json(value: &impl Serialize) -> Vec<u8> {
    // These types have string keys and no map that could refuse; an empty value would be read as a delete.
    serde_json::to_vec(value).unwrap_or_default()
}

impl Facts {
    fn learn(&mut self, subject: Option<&[u8]>, value: Option<&[u8]>) -> io::Result<()> {
        let subject: Subject = serde_json::from_slice(subject.unwrap_or_default())?;
        match (subject, value) {
            (Subject::Cluster, value) => self.cluster = value.map(serde_json::from_slice).transpose()?,
            (Subject::ProducerIds, Some(v)) => self.producer_ids = serde_json::from_slice(v)?,
            (Subject::ProducerIds, None) => {}
            (Subject::Topic(name), Some(v)) => {
                self.topics.insert(name, serde_json::from_slice(v)?);
            }
            (Subject::Topic(name), None) => {
                self.topics.remove(&name);
            }
            (Subject::Start(topic, partition), Some(v)) => {
                self.starts.insert((topic, partition), serde_json::from_slice(v)?);
            }
            (Subject::Start(topic, partition), None) => {
                self.starts.remove(&(topic, partition));
            }
            (Subject::Offset { group, topic, partition }, Some(v)) => {
                let of_group = self.offsets.entry(group).or_default();
                of_group.insert((topic, partition), serde_json::from_slice(v)?);
            }
            (Subject::Offset { group, topic, partition }, None) => {
                if let Some(of_group) = self.offsets.get_mut(&group) {
                    of_group.remove(&(topic, partition));
                }
            }
        }
        Ok(())
    }
}

impl From<OpenError> for StartError {
    fn from(error: OpenError) -> StartError {
        match error {
            OpenError::Damaged { path, position, fault } => {
                StartError::DamagedSegment { path, position, reason: fault.to_string() }
            }
            OpenError::Io { path, source } => StartError::Io { path, source },
        }
    }
}
