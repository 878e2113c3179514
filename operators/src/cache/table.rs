//! The copy of `cache` in which `cache_lookup` looks.
//!
//! Invariant: entries and the position that they bring the copy to are stored together, so a position never runs ahead
//! of what was read. An entry is stored as it stands on the topic; whether it is too old is judged when it is looked up.

use super::entry_key;
use crate::store_failure::store_failure;
use bytes::Bytes;
use forebay_operator::{Change, Failure, Table};
use forebay_schemas::{CacheEntry, Record as _};
use forebay_stores::{KeyValue, key_value};
use futures::future::BoxFuture;
use std::{collections::BTreeMap, sync::Arc};

/// The most entries that are stored in one step.
const ENTRIES_MAX: usize = 1000;
/// The most bytes that are stored in one step, but for one entry.
const ENTRIES_BYTES_MAX: usize = 8 * 1024 * 1024;

const POSITIONS: &str = "position/";
const ENTRIES: &str = "entry/";

/// The table of `CacheEntry` over a key-value store.
pub struct CacheTable(Arc<dyn KeyValue>);

impl CacheTable {
    /// A table in this store, which nothing else writes to.
    pub fn new(store: Arc<dyn KeyValue>) -> Self {
        Self(store)
    }

    /// Stores what has been gathered, and where it leads.
    async fn store(&self, batch: &mut Batch) -> Result<(), Failure> {
        let Batch { mut entries, positions, .. } = std::mem::take(batch);
        entries.extend(positions.into_iter().map(|(partition, next)| {
            (format!("{POSITIONS}{partition}"), Some(Bytes::from(next.to_string())))
        }));
        self.0.set_many(entries).await.map_err(failure)
    }
}

#[derive(Default)]
struct Batch {
    entries: Vec<(String, Option<Bytes>)>,
    bytes: usize,
    positions: BTreeMap<i32, i64>,
}

impl Table for CacheTable {
    fn record(&self) -> &'static str {
        CacheEntry::NAME
    }

    fn position(&self, partition: i32) -> BoxFuture<'_, Result<Option<i64>, Failure>> {
        Box::pin(async move {
            let value = self.0.get(&format!("{POSITIONS}{partition}")).await.map_err(failure)?;
            let text = value.as_deref().and_then(|value| std::str::from_utf8(value).ok());
            // What is no number was not written by us: read from the start.
            Ok(text.and_then(|text| text.parse().ok()))
        })
    }

    fn clear(&self) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async move {
            // Positions first: entries without a position are read again, a position without its entries is a loss.
            for prefix in [POSITIONS, ENTRIES] {
                self.0.clear(prefix).await.map_err(failure)?;
            }
            Ok(())
        })
    }

    fn apply(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<Vec<(Change, String)>, Failure>> {
        Box::pin(async move {
            let mut passed_over = Vec::new();
            let mut batch = Batch::default();
            for change in changes {
                batch.positions.insert(change.partition, change.offset.saturating_add(1));
                match fault(&change) {
                    Some(reason) => passed_over.push((change, reason)),
                    None => {
                        batch.bytes += change.value.as_ref().map_or(0, Bytes::len);
                        batch.entries.push((entry_key(&change.key), change.value));
                    }
                }
                if batch.entries.len() >= ENTRIES_MAX || batch.bytes >= ENTRIES_BYTES_MAX {
                    self.store(&mut batch).await?;
                }
            }
            self.store(&mut batch).await?;
            Ok(passed_over)
        })
    }
}

fn failure(error: forebay_stores::Error) -> Failure {
    store_failure("cache", error)
}

/// Why a change cannot be taken in.
fn fault(change: &Change) -> Option<String> {
    let length = entry_key(&change.key).len();
    if length > key_value::KEY_BYTES_MAX {
        return Some(format!("the key has {length} bytes, over the limit of {}", key_value::KEY_BYTES_MAX));
    }
    let value = change.value.as_ref()?;
    if value.len() > key_value::VALUE_BYTES_MAX {
        return Some(format!("the entry has {} bytes, over {}", value.len(), key_value::VALUE_BYTES_MAX));
    }
    match CacheEntry::decode(value) {
        Ok(entry) if entry.key == change.key => None,
        Ok(_) => Some("the entry has another key than its record".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use forebay_schemas::Kept;

    fn change(offset: i64, key: &str, value: Option<&str>) -> Change {
        let value = value.map(|value| Bytes::from(value.to_owned()));
        Change { partition: 3, offset, key: key.to_owned(), value }
    }

    #[tokio::test]
    async fn the_copy_follows_the_topic_and_remembers_how_far() {
        let world = samples::World::new().await;
        let table = CacheTable::new(world.resources.cache.clone());
        assert_eq!(table.position(3).await.unwrap(), None);
        let entry = |key: &str| {
            let kept = Kept {
                answer: samples::completion().answer,
                retrieval: None,
                chunks: Vec::new(),
                made_at_ms: 0,
            };
            let entry = CacheEntry { key: key.to_owned(), content: Some(kept) };
            String::from_utf8(entry.encode().unwrap().unwrap()).unwrap()
        };
        let changes = vec![
            change(0, "a", Some(&entry("a"))),
            change(1, "b", Some(&entry("b"))),
            change(2, "a", None),
            change(5, "c", Some("nonsense")),
            change(6, "d", Some(&entry("a"))),
        ];
        let passed_over = table.apply(changes).await.unwrap();
        let reasons: Vec<_> =
            passed_over.iter().map(|(change, reason)| (change.offset, reason.as_str())).collect();
        assert_eq!(
            reasons,
            [(5, "could not read a CacheEntry"), (6, "the entry has another key than its record")]
        );
        assert_eq!(table.position(3).await.unwrap(), Some(7));
        let kept = world.resources.cache.get_many(&["a", "b"].map(entry_key)).await.unwrap();
        assert_eq!((kept[0].is_some(), kept[1].is_some()), (false, true));
        table.clear().await.unwrap();
        assert_eq!(table.position(3).await.unwrap(), None);
        assert_eq!(world.resources.cache.get(&entry_key("b")).await.unwrap(), None);
    }
}
