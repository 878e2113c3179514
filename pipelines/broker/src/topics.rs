//! The topics: which exist, their ids, settings and partitions.
//!
//! Invariant: a topic is in the journal before a client can see it, and its partitions are open before
//! it is in the map. Changes come one at a time; look-ups never wait for one.
//!
//! Folder: `{data}/topics/{name}.{id}/{partition}/`. The id in the name keeps a topic that is made anew
//! from finding the records of its namesake, whatever moment a deletion was killed at.

use crate::journal::{Facts, Journal, Subject, TopicFact, json};
use crate::log::Log;
use crate::partition::Partition;
use crate::settings::Settings;
use crate::{Config, StartError};
use kafka_protocol::ResponseError;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use uuid::Uuid;

/// Bounds what Metadata answers and how many files can be open.
const PARTITIONS_MAX: usize = 10_000;
const PARTITIONS_OF_TOPIC_MAX: i32 = 1_000;
const NAME_MAX: usize = 249;

/// One topic.
#[derive(Debug, Clone)]
pub(crate) struct Topic {
    pub name: String,
    pub id: Uuid,
    /// What a client set; everything else is at its default.
    pub set: BTreeMap<String, String>,
    pub settings: Settings,
    pub partitions: Vec<Arc<Partition>>,
}

impl Topic {
    pub(crate) fn partition(&self, index: i32) -> Option<&Arc<Partition>> {
        self.partitions.get(usize::try_from(index).ok()?)
    }

    fn fact(&self) -> Vec<u8> {
        let partitions = i32::try_from(self.partitions.len()).unwrap_or(i32::MAX);
        json(&TopicFact { id: self.id, partitions, settings: self.set.clone() })
    }
}

/// An error for the client: the protocol's code and what to read.
pub(crate) type Refusal = (ResponseError, String);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Topics {
    dir: PathBuf,
    segment_bytes: u64,
    map: RwLock<Map>,
    changing: Mutex<()>,
    journal: Arc<Journal>,
}

#[derive(Debug, Default)]
struct Map {
    by_name: BTreeMap<String, Arc<Topic>>,
    names: HashMap<Uuid, String>,
}

impl Topics {
    /// Opens the partitions of every topic the journal names, checking their checksums.
    pub(crate) fn open(
        config: &Config,
        journal: Arc<Journal>,
        facts: &Facts,
        now_ms: i64,
    ) -> Result<Topics, StartError> {
        let dir = config.data.join("topics");
        let io = |source| StartError::Io { path: dir.clone(), source };
        fs::create_dir_all(&dir).map_err(io)?;
        let mut map = Map::default();
        for (name, fact) in &facts.topics {
            // A setting of a later version must not keep the broker from starting on its data.
            let settings = Settings::parse(&fact.settings, config.segment_bytes).unwrap_or_else(|reason| {
                tracing::warn!(
                    topic = name,
                    reason,
                    "topic has a setting that is not understood; using defaults"
                );
                Settings::new(config.segment_bytes)
            });
            let partitions = (0..fact.partitions)
                .map(|index| {
                    let start = facts.starts.get(&(fact.id, index)).copied().unwrap_or(0);
                    open(&folder(&dir, name, fact.id), index, settings.clone(), start, now_ms)
                })
                .collect::<Result<_, _>>()?;
            let set = fact.settings.clone();
            map.insert(Topic { name: name.clone(), id: fact.id, set, settings, partitions });
        }
        clear(&dir, &map).map_err(io)?;
        Ok(Topics {
            dir,
            segment_bytes: config.segment_bytes,
            map: RwLock::new(map),
            changing: Mutex::new(()),
            journal,
        })
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<Topic>> {
        self.read(|map| map.by_name.get(name).cloned())
    }

    pub(crate) fn by_id(&self, id: Uuid) -> Option<Arc<Topic>> {
        self.read(|map| map.by_name.get(map.names.get(&id)?).cloned())
    }

    pub(crate) fn all(&self) -> Vec<Arc<Topic>> {
        self.read(|map| map.by_name.values().cloned().collect())
    }

    fn read<T>(&self, f: impl FnOnce(&Map) -> T) -> T {
        f(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, topic: Topic) {
        self.map.write().unwrap_or_else(PoisonError::into_inner).insert(topic);
    }

    fn alone(&self) -> std::sync::MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a topic, or with `validate_only` says whether it could be made.
    pub(crate) fn create(
        &self,
        name: &str,
        partitions: i32,
        set: BTreeMap<String, String>,
        validate_only: bool,
        now_ms: i64,
    ) -> Result<Topic, Refusal> {
        let _alone = self.alone();
        check_name(name)?;
        if self.get(name).is_some() {
            return Err((ResponseError::TopicAlreadyExists, format!("topic {name} already exists")));
        }
        let settings =
            Settings::parse(&set, self.segment_bytes).map_err(|r| (ResponseError::InvalidConfig, r))?;
        self.check_partitions(partitions, usize::try_from(partitions).unwrap_or(0))?;
        let id = Uuid::now_v7();
        let mut topic = Topic { name: name.to_owned(), id, set, settings, partitions: Vec::new() };
        if validate_only {
            return Ok(topic);
        }
        topic.partitions = self.open_partitions(&topic, 0..partitions, now_ms)?;
        self.remember(Subject::Topic(name.to_owned()), Some(topic.fact()))?;
        self.put(topic.clone());
        tracing::info!(topic = name, partitions, "topic created");
        Ok(topic)
    }

    /// Adds partitions up to `count`.
    pub(crate) fn grow(
        &self,
        name: &str,
        count: i32,
        validate_only: bool,
        now_ms: i64,
    ) -> Result<(), Refusal> {
        let _alone = self.alone();
        let topic = self.get(name).ok_or_else(|| unknown(name))?;
        let have = i32::try_from(topic.partitions.len()).unwrap_or(i32::MAX);
        if count <= have {
            let reason = format!("topic {name} has {have} partitions; {count} would not be more");
            return Err((ResponseError::InvalidPartitions, reason));
        }
        self.check_partitions(count, usize::try_from(count - have).unwrap_or(0))?;
        if validate_only {
            return Ok(());
        }
        let mut grown = Topic::clone(&topic);
        grown.partitions.extend(self.open_partitions(&topic, have..count, now_ms)?);
        self.remember(Subject::Topic(name.to_owned()), Some(grown.fact()))?;
        self.put(grown);
        Ok(())
    }

    /// Replaces what was set on a topic by what `change` makes of it.
    pub(crate) fn alter(
        &self,
        name: &str,
        validate_only: bool,
        change: impl FnOnce(&Topic, &mut BTreeMap<String, String>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let _alone = self.alone();
        let topic = self.get(name).ok_or_else(|| unknown(name))?;
        let mut altered = Topic::clone(&topic);
        change(&topic, &mut altered.set)?;
        altered.settings = Settings::parse(&altered.set, self.segment_bytes)
            .map_err(|r| (ResponseError::InvalidConfig, r))?;
        if validate_only {
            return Ok(());
        }
        self.remember(Subject::Topic(name.to_owned()), Some(altered.fact()))?;
        for partition in &altered.partitions {
            partition.with(|log| log.settings = altered.settings.clone());
        }
        self.put(altered);
        Ok(())
    }

    /// Deletes a topic and its records.
    pub(crate) fn delete(&self, name: &str) -> Result<Arc<Topic>, Refusal> {
        let _alone = self.alone();
        let topic = self.get(name).ok_or_else(|| unknown(name))?;
        self.remember(Subject::Topic(name.to_owned()), None)?;
        self.map.write().unwrap_or_else(PoisonError::into_inner).remove(&topic);
        for partition in &topic.partitions {
            partition.delete();
        }
        // Renamed first, so that a kill in the middle leaves something the next start knows to be waste.
        let (folder, waste) =
            (folder(&self.dir, name, topic.id), self.dir.join(format!("{}.deleted", topic.id)));
        if let Err(error) = fs::rename(&folder, &waste).and_then(|()| fs::remove_dir_all(&waste)) {
            tracing::error!(path = %folder.display(), %error, "could not remove the files of a deleted topic");
        }
        tracing::info!(topic = name, "topic deleted");
        Ok(topic)
    }

    /// Writes a fact and syncs it: losing a topic to a power cut would take its records along.
    fn remember(&self, subject: Subject, value: Option<Vec<u8>>) -> Result<(), Refusal> {
        self.journal.write(&[(subject, value)]).map_err(|error| storage(&error))?;
        let files = self.journal.partition.with(Log::take_unsynced);
        let synced = files.iter().try_for_each(|f| f.sync_data());
        synced.map_err(|error| {
            self.journal.partition.with(|log| log.put_back_unsynced(files));
            storage(&error)
        })
    }

    fn open_partitions(
        &self,
        topic: &Topic,
        indexes: std::ops::Range<i32>,
        now_ms: i64,
    ) -> Result<Vec<Arc<Partition>>, Refusal> {
        let folder = folder(&self.dir, &topic.name, topic.id);
        let partitions = indexes
            .map(|index| open(&folder, index, topic.settings.clone(), 0, now_ms))
            .collect::<Result<_, _>>()
            .map_err(|error| storage(&error))?;
        // Their names must be on disk before the journal says that they exist.
        let synced = [&folder, &self.dir].into_iter().try_for_each(|d| fs::File::open(d)?.sync_all());
        synced.map_err(|error| storage(&error))?;
        Ok(partitions)
    }

    fn check_partitions(&self, of_topic: i32, new: usize) -> Result<(), Refusal> {
        if !(1..=PARTITIONS_OF_TOPIC_MAX).contains(&of_topic) {
            let reason = format!("{of_topic} partitions; want 1 to {PARTITIONS_OF_TOPIC_MAX}");
            return Err((ResponseError::InvalidPartitions, reason));
        }
        let have: usize = self.read(|map| map.by_name.values().map(|t| t.partitions.len()).sum());
        if have + new > PARTITIONS_MAX {
            let reason = format!("the broker has {have} partitions; it takes {PARTITIONS_MAX} at most");
            return Err((ResponseError::PolicyViolation, reason));
        }
        Ok(())
    }
}

impl Map {
    fn insert(&mut self, topic: Topic) {
        self.names.insert(topic.id, topic.name.clone());
        self.by_name.insert(topic.name.clone(), Arc::new(topic));
    }

    fn remove(&mut self, topic: &Topic) {
        self.names.remove(&topic.id);
        self.by_name.remove(&topic.name);
    }
}

/// Names are Kafka's: they become part of a folder's name.
pub(crate) fn check_name(name: &str) -> Result<(), Refusal> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > NAME_MAX || matches!(name, "." | "..") || !name.chars().all(fine) {
        let reason =
            format!("topic name {name:?}; want 1 to {NAME_MAX} of letters, digits, '.', '_' and '-'");
        return Err((ResponseError::InvalidTopicException, reason));
    }
    Ok(())
}

pub(crate) fn unknown(name: &str) -> Refusal {
    (ResponseError::UnknownTopicOrPartition, format!("topic {name} does not exist"))
}

/// Logs what the client is not told in full, and gives the code for it.
pub(crate) fn storage(error: &(dyn std::error::Error + 'static)) -> Refusal {
    // Logs in JSON hold an error without its source, and that is where the operating system speaks.
    let cause = error.source().map(tracing::field::display);
    tracing::error!(error, cause, "could not write; is the disk full?");
    (ResponseError::KafkaStorageError, "the broker could not write to its data folder; see its log".into())
}

/// A name may have 249 bytes, as may a folder: a long one is cut, the id tells namesakes apart.
fn folder(dir: &Path, name: &str, id: Uuid) -> PathBuf {
    dir.join(format!("{}.{id}", &name[..name.len().min(200)]))
}

fn open(
    folder: &Path,
    index: i32,
    settings: Settings,
    start: i64,
    now_ms: i64,
) -> Result<Arc<Partition>, crate::log::OpenError> {
    Log::open(&folder.join(index.to_string()), settings, start, now_ms)
        .map(|log| Arc::new(Partition::new(log)))
}

/// Removes what a killed deletion left; a folder that is nobody's is only named.
fn clear(dir: &Path, map: &Map) -> std::io::Result<()> {
    let known: Vec<PathBuf> = map.by_name.values().map(|t| folder(dir, &t.name, t.id)).collect();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deleted") {
            fs::remove_dir_all(&path)?;
        } else if !known.contains(&path) {
            tracing::warn!(path = %path.display(), "no topic owns this folder; delete it if it is not needed");
        }
    }
    Ok(())
}
