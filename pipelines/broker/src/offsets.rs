//! Committed offsets: in memory to be read, in the journal to be kept.
//!
//! Invariant: journal and memory change under one lock, in the same order. Offsets stay until their
//! topic, their group or they themselves are deleted; they do not expire.

use crate::journal::{Journal, OffsetFact, Subject, json};
use crate::log::AppendError;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// As in Kafka (`offset.metadata.max.bytes`).
pub(crate) const METADATA_BYTES_MAX: usize = 4096;
/// About 200 MiB at the utmost.
const OFFSETS_MAX: usize = 1_000_000;

type OfGroup = BTreeMap<(String, i32), OffsetFact>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Offsets {
    groups: Mutex<BTreeMap<String, OfGroup>>,
    journal: Arc<Journal>,
}

/// Why offsets were not stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommitError {
    #[error("the broker keeps {OFFSETS_MAX} committed offsets at most")]
    TooMany,
    #[error(transparent)]
    Journal(#[from] AppendError),
}

impl Offsets {
    pub(crate) fn new(groups: BTreeMap<String, OfGroup>, journal: Arc<Journal>) -> Offsets {
        Offsets { groups: Mutex::new(groups), journal }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, OfGroup>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores all of the offsets or none.
    pub(crate) fn commit(
        &self,
        group: &str,
        offsets: Vec<((String, i32), OffsetFact)>,
    ) -> Result<(), CommitError> {
        let mut groups = self.lock();
        if groups.values().map(BTreeMap::len).sum::<usize>() + offsets.len() > OFFSETS_MAX {
            return Err(CommitError::TooMany);
        }
        let facts: Vec<_> = offsets.iter().map(|(at, fact)| (subject(group, at), Some(json(fact)))).collect();
        self.journal.write(&facts)?;
        groups.entry(group.to_owned()).or_default().extend(offsets);
        Ok(())
    }

    /// Everything a group committed.
    pub(crate) fn of_group(&self, group: &str) -> OfGroup {
        self.lock().get(group).cloned().unwrap_or_default()
    }

    /// Groups with committed offsets.
    pub(crate) fn groups(&self) -> Vec<String> {
        self.lock().iter().filter(|(_, o)| !o.is_empty()).map(|(g, _)| g.clone()).collect()
    }

    /// Forgets offsets that `which` picks.
    pub(crate) fn forget(&self, which: impl Fn(&str, &str, i32) -> bool) -> Result<usize, AppendError> {
        let mut groups = self.lock();
        let picked: Vec<(String, (String, i32))> = groups
            .iter()
            .flat_map(|(group, of)| of.keys().map(move |at| (group, at)))
            .filter(|(group, (topic, partition))| which(group, topic, *partition))
            .map(|(group, at)| (group.clone(), at.clone()))
            .collect();
        let facts: Vec<_> = picked.iter().map(|(group, at)| (subject(group, at), None)).collect();
        self.journal.write(&facts)?;
        for (group, at) in &picked {
            if let Some(of) = groups.get_mut(group) {
                of.remove(at);
            }
        }
        groups.retain(|_, of| !of.is_empty());
        Ok(picked.len())
    }
}

fn subject(group: &str, (topic, partition): &(String, i32)) -> Subject {
    Subject::Offset { group: group.to_owned(), topic: topic.clone(), partition: *partition }
}
