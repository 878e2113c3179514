//! The key-value store of a process of its own: a table in a [`Database`], with the entries in demand in memory.
//!
//! Invariant: memory never holds an older value than the file once a write is acknowledged. The fill after a miss and
//! the update after a commit take turns on each key, and the fill reads the file within its turn.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use moka::ops::compute::{CompResult, Op};
use moka::sync::Cache;
use redb::{ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};

use super::{KeyValue, check_entries, check_entry, check_key, check_keys};
use crate::clock::{ttl_ms, unix_ms};
use crate::{Answer, Clock, Database, Error, wall_clock};

/// The time that never comes.
const NEVER_MS: u64 = u64::MAX;
/// Each write removes at most so many expired entries, so that no write pays for many.
const SWEPT_PER_WRITE_MAX: usize = 16;
/// `clear` removes in steps of so many, so that other writes get their turn.
const CLEARED_PER_STEP_MAX: usize = 4096;

/// How an embedded store is kept.
#[derive(Clone)]
pub struct Options {
    /// Memory for entries in demand.
    pub cache_bytes: u64,
    /// Times to live are counted by it.
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_bytes: 64 * 1024 * 1024, clock: wall_clock() }
    }
}

/// A named table of a [`Database`].
pub struct Embedded {
    store: Arc<Store>,
}

struct Store {
    database: Database,
    entries: String,
    expiries: String,
    cache: Cache<String, Entry>,
    written: Written,
    clock: Clock,
}

/// What an entry takes in the cache beside its key and value: measured with 400,000 of them in moka 0.12 and glibc's allocator, 470.
const ENTRY_BYTES: usize = 470;

#[derive(Clone)]
struct Entry {
    value: Bytes,
    expires_ms: u64,
}

/// A key and what it is now.
type Change = (String, Option<Entry>);

impl Embedded {
    /// Opens the table `name`, made if it is not there. Tables of one database do not see each other's keys.
    pub async fn open(database: &Database, name: &str, options: Options) -> Result<Self, Error> {
        database.claim(&format!("key-value {name}"))?;
        let cache = Cache::builder()
            .max_capacity(options.cache_bytes)
            .weigher(|key: &String, entry: &Entry| {
                u32::try_from(key.len() + entry.value.len() + ENTRY_BYTES).unwrap_or(u32::MAX)
            })
            .build();
        let store = Arc::new(Store {
            database: database.clone(),
            entries: format!("key-value/{name}/entries"),
            expiries: format!("key-value/{name}/expiries"),
            cache,
            written: Written::default(),
            clock: options.clock,
        });
        let this = Self { store };
        // So that a read finds a table, also an empty one.
        this.store.write(0, |_| Ok(((), Vec::new()))).await?;
        let store = Arc::clone(&this.store);
        database.read(move |redb| store.load(redb)).await?;
        Ok(this)
    }
}

impl KeyValue for Embedded {
    fn get(&self, key: &str) -> Answer<'_, Option<Bytes>> {
        if let Err(error) = check_key(key) {
            return async { Err(error) }.boxed();
        }
        if !self.store.written.may_hold(key) {
            return async { Ok(None) }.boxed();
        }
        if let Some(entry) = self.store.cache.get(key) {
            let value = self.store.live(entry);
            return async { Ok(value) }.boxed();
        }
        let (store, key) = (Arc::clone(&self.store), key.to_owned());
        async move { self.store.database.read(move |redb| store.read_through(redb, &key)).await }.boxed()
    }

    fn get_many(&self, keys: &[String]) -> Answer<'_, Vec<Option<Bytes>>> {
        if let Err(error) = check_keys(keys) {
            return async { Err(error) }.boxed();
        }
        let (store, keys) = (Arc::clone(&self.store), keys.to_vec());
        async move {
            let all = move |redb: &redb::Database| {
                keys.iter()
                    .map(|key| match store.cache.get(key) {
                        Some(entry) => Ok(store.live(entry)),
                        None => store.read_through(redb, key),
                    })
                    .collect()
            };
            self.store.database.read(all).await
        }
        .boxed()
    }

    fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Answer<'_, ()> {
        let key = key.to_owned();
        async move {
            check_entry(&key, &value)?;
            let (bytes, entry) = (value.len(), self.store.entry(value, ttl));
            let put = move |tables: &mut Tables| {
                tables.put(&key, &entry)?;
                Ok(((), vec![(key, Some(entry))]))
            };
            self.store.write(bytes, put).await
        }
        .boxed()
    }

    fn set_if_absent(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Answer<'_, bool> {
        let key = key.to_owned();
        async move {
            check_entry(&key, &value)?;
            let (bytes, entry) = (value.len(), self.store.entry(value, ttl));
            let put = move |tables: &mut Tables| {
                if tables.live(&key)?.is_some() {
                    return Ok((false, Vec::new()));
                }
                tables.put(&key, &entry)?;
                Ok((true, vec![(key, Some(entry))]))
            };
            self.store.write(bytes, put).await
        }
        .boxed()
    }

    fn delete(&self, key: &str) -> Answer<'_, bool> {
        let key = key.to_owned();
        async move {
            check_key(&key)?;
            let delete = move |tables: &mut Tables| {
                let was_there = tables.live(&key)?.is_some();
                tables.remove(&key)?;
                Ok((was_there, vec![(key, None)]))
            };
            self.store.write(0, delete).await
        }
        .boxed()
    }

    fn delete_if(&self, key: &str, expected: &[u8]) -> Answer<'_, bool> {
        let (key, expected) = (key.to_owned(), expected.to_vec());
        async move {
            check_key(&key)?;
            let delete = move |tables: &mut Tables| {
                if tables.live(&key)?.is_none_or(|value| value != expected) {
                    return Ok((false, Vec::new()));
                }
                tables.remove(&key)?;
                Ok((true, vec![(key, None)]))
            };
            self.store.write(0, delete).await
        }
        .boxed()
    }

    fn set_many(&self, entries: Vec<(String, Option<Bytes>)>) -> Answer<'_, ()> {
        async move {
            let bytes = check_entries(&entries)?;
            let put = move |tables: &mut Tables| {
                let mut changes = Vec::with_capacity(entries.len());
                for (key, value) in entries {
                    let entry = value.map(|value| Entry { value, expires_ms: NEVER_MS });
                    match &entry {
                        Some(entry) => tables.put(&key, entry)?,
                        None => tables.remove(&key)?,
                    }
                    changes.push((key, entry));
                }
                Ok(((), changes))
            };
            self.store.write(bytes, put).await
        }
        .boxed()
    }

    fn clear(&self, prefix: &str) -> Answer<'_, u64> {
        let prefix = prefix.to_owned();
        async move {
            let mut cleared = 0;
            loop {
                let prefix = prefix.clone();
                let (live, more) = self.store.write(0, move |tables| tables.clear_step(&prefix)).await?;
                cleared += live;
                if !more {
                    return Ok(cleared);
                }
            }
        }
        .boxed()
    }

    fn flush(&self) -> Answer<'_, ()> {
        self.store.database.flush().boxed()
    }
}

impl Store {
    fn entry(&self, value: Bytes, ttl: Option<Duration>) -> Entry {
        let expires_ms = ttl.map_or(NEVER_MS, |ttl| self.now_ms().saturating_add(ttl_ms(ttl)));
        Entry { value, expires_ms }
    }

    fn now_ms(&self) -> u64 {
        unix_ms((self.clock)())
    }

    fn live(&self, entry: Entry) -> Option<Bytes> {
        (entry.expires_ms > self.now_ms()).then_some(entry.value)
    }

    fn load(&self, redb: &redb::Database) -> Result<(), redb::Error> {
        for row in redb.begin_read()?.open_table(entries(&self.entries))?.iter()? {
            self.written.add(row?.0.value());
        }
        Ok(())
    }

    /// Reads the file and remembers what it says, unless a write has just told memory better.
    fn read_through(&self, redb: &redb::Database, key: &str) -> Result<Option<Bytes>, redb::Error> {
        let fill = |held: Option<moka::Entry<String, Entry>>| {
            if held.is_some() {
                return Ok(Op::Nop);
            }
            let table = redb.begin_read()?.open_table(entries(&self.entries))?;
            let read = table.get(key)?.map(|found| {
                let (expires_ms, value) = found.value();
                Entry { value: Bytes::copy_from_slice(value), expires_ms }
            });
            Ok::<_, redb::Error>(read.map_or(Op::Nop, Op::Put))
        };
        Ok(match self.cache.entry_by_ref(key).and_try_compute_with(fill)? {
            CompResult::Inserted(entry) | CompResult::Unchanged(entry) | CompResult::ReplacedWith(entry) => {
                self.live(entry.into_value())
            }
            CompResult::StillNone(_) | CompResult::Removed(_) => None,
        })
    }

    /// Runs `work` on the tables and, once it is committed, brings memory in line with what it says it changed.
    async fn write<T: Send + 'static>(
        self: &Arc<Self>,
        bytes: usize,
        work: impl FnOnce(&mut Tables) -> Result<(T, Vec<Change>), redb::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (store, this) = (Arc::clone(self), Arc::clone(self));
        let work = move |transaction: &WriteTransaction| {
            let mut tables = Tables::open(&store, transaction)?;
            let done = work(&mut tables)?;
            tables.sweep()?;
            Ok(done)
        };
        let after = move |(done, changes): (T, Vec<Change>)| {
            for (key, entry) in changes {
                if entry.is_some() {
                    this.written.add(&key);
                }
                this.cache.entry(key).and_compute_with(|_| entry.map_or(Op::Remove, Op::Put));
            }
            done
        };
        self.database.write(bytes, work, after).await
    }
}

/// Bits that tell which keys may be in the file: 4 MiB. At a million keys they are right about 97 of 100 that are not.
const WRITTEN_BITS: u64 = 1 << 25;

/// Which keys were ever written, by hash. Most that are looked up never were: those are answered here, without
/// the way to a thread that may block. A key that is removed keeps its bit until the store is opened anew.
struct Written {
    bits: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl Default for Written {
    fn default() -> Self {
        let bits = (0..WRITTEN_BITS / u64::from(u64::BITS)).map(|_| AtomicU64::new(0)).collect();
        Self { bits, hasher: RandomState::new() }
    }
}

impl Written {
    /// False only where the key is not in the file.
    fn may_hold(&self, key: &str) -> bool {
        let (word, bit) = self.place(key);
        word.is_none_or(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    fn add(&self, key: &str) {
        if let (Some(word), bit) = self.place(key) {
            word.fetch_or(bit, Ordering::Release);
        }
    }

    fn place(&self, key: &str) -> (Option<&AtomicU64>, u64) {
        let bit = self.hasher.hash_one(key) % WRITTEN_BITS;
        let word = usize::try_from(bit / u64::from(u64::BITS)).ok().and_then(|word| self.bits.get(word));
        (word, 1 << (bit % u64::from(u64::BITS)))
    }
}

fn entries(name: &str) -> TableDefinition<'_, &'static str, (u64, &'static [u8])> {
    TableDefinition::new(name)
}

/// The tables within a transaction. `expiries` holds exactly one row for each entry that expires.
struct Tables<'t> {
    entries: Table<'t, &'static str, (u64, &'static [u8])>,
    expiries: Table<'t, (u64, &'static str), ()>,
    now_ms: u64,
}

impl<'t> Tables<'t> {
    fn open(store: &Store, transaction: &'t WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self {
            entries: transaction.open_table(entries(&store.entries))?,
            expiries: transaction.open_table(TableDefinition::new(&store.expiries))?,
            now_ms: store.now_ms(),
        })
    }

    fn live(&self, key: &str) -> Result<Option<Vec<u8>>, redb::Error> {
        let Some(found) = self.entries.get(key)? else { return Ok(None) };
        let (expires_ms, value) = found.value();
        Ok((expires_ms > self.now_ms).then(|| value.to_vec()))
    }

    fn put(&mut self, key: &str, entry: &Entry) -> Result<(), redb::Error> {
        let before = self.entries.insert(key, (entry.expires_ms, entry.value.as_ref()))?;
        let before_ms = before.map_or(NEVER_MS, |before| before.value().0);
        self.forget_expiry(before_ms, key)?;
        if entry.expires_ms != NEVER_MS {
            self.expiries.insert((entry.expires_ms, key), ())?;
        }
        Ok(())
    }

    fn remove(&mut self, key: &str) -> Result<(), redb::Error> {
        let before = self.entries.remove(key)?;
        let before_ms = before.map_or(NEVER_MS, |before| before.value().0);
        self.forget_expiry(before_ms, key)
    }

    fn forget_expiry(&mut self, expires_ms: u64, key: &str) -> Result<(), redb::Error> {
        if expires_ms != NEVER_MS {
            self.expiries.remove((expires_ms, key))?;
        }
        Ok(())
    }

    /// Frees the space of some that have expired. Memory needs no word of it: it sees for itself that they have.
    fn sweep(&mut self) -> Result<(), redb::Error> {
        let mut expired = Vec::new();
        for row in self.expiries.range(..(self.now_ms.saturating_add(1), ""))?.take(SWEPT_PER_WRITE_MAX) {
            expired.push(row?.0.value().1.to_owned());
        }
        expired.iter().try_for_each(|key| self.remove(key))
    }

    /// Removes the first few that begin with `prefix`; returns how many were live, and whether there are more.
    fn clear_step(&mut self, prefix: &str) -> Result<((u64, bool), Vec<Change>), redb::Error> {
        let (mut live, mut keys) = (0, Vec::new());
        for row in self.entries.range(prefix..)? {
            let (key, value) = row?;
            if !key.value().starts_with(prefix) || keys.len() == CLEARED_PER_STEP_MAX {
                break;
            }
            live += u64::from(value.value().0 > self.now_ms);
            keys.push(key.value().to_owned());
        }
        keys.iter().try_for_each(|key| self.remove(key))?;
        let more = keys.len() == CLEARED_PER_STEP_MAX;
        Ok(((live, more), keys.into_iter().map(|key| (key, None)).collect()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::UNIX_EPOCH;

    use redb::ReadableTableMetadata;

    use super::*;
    use crate::database;

    async fn rows(store: &Store) -> (u64, u64) {
        let (entries_name, expiries_name) = (store.entries.clone(), store.expiries.clone());
        let read = move |redb: &redb::Database| {
            let expiries: TableDefinition<(u64, &str), ()> = TableDefinition::new(&expiries_name);
            let transaction = redb.begin_read()?;
            let entries = transaction.open_table(entries(&entries_name))?.len()?;
            Ok((entries, transaction.open_table(expiries)?.len()?))
        };
        store.database.read(read).await.expect("readable")
    }

    #[tokio::test]
    async fn what_was_never_written_is_told_without_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("store");
        let open = || Database::open(path.clone(), database::Options::default());
        let database = open().await.expect("opens");
        let embedded = Embedded::open(&database, "t", Options::default()).await.expect("opens");
        embedded.set("written", Bytes::from_static(b"v"), None).await.expect("writable");
        drop(embedded);
        database.close().await.expect("closes");

        let database = open().await.expect("opens again");
        let embedded = Embedded::open(&database, "t", Options::default()).await.expect("opens again");
        assert!(embedded.store.written.may_hold("written"), "as the file says");
        embedded.set("younger", Bytes::from_static(b"v"), None).await.expect("writable");
        assert!(embedded.store.written.may_hold("younger"));
        let known = (0..1000).filter(|number| embedded.store.written.may_hold(&format!("never {number}")));
        assert!(known.count() < 10);
    }

    #[tokio::test]
    async fn writes_free_the_space_of_what_has_expired_a_little_each() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("store");
        let database = Database::open(path, database::Options::default()).await.expect("opens");
        let now_s = Arc::new(AtomicU64::new(1_000));
        let clock: Clock = {
            let now_s = Arc::clone(&now_s);
            Arc::new(move || UNIX_EPOCH + Duration::from_secs(now_s.load(Ordering::SeqCst)))
        };
        let options = Options { clock, ..Options::default() };
        let embedded = Embedded::open(&database, "t", options).await.expect("opens");
        let value = Bytes::from_static(b"v");
        for number in 0..40 {
            let ttl = Some(Duration::from_secs(10));
            embedded.set(&format!("short {number}"), value.clone(), ttl).await.expect("writable");
        }
        // Set again with another time to live, or none: no row of the old one may stay.
        embedded.set("short 0", value.clone(), Some(Duration::from_secs(99))).await.expect("writable");
        embedded.set("short 1", value.clone(), None).await.expect("writable");
        assert_eq!(rows(&embedded.store).await, (40, 39));

        now_s.store(1_010, Ordering::SeqCst);
        embedded.set("a", value.clone(), None).await.expect("writable");
        assert_eq!(rows(&embedded.store).await, (41 - 16, 39 - 16));
        for _ in 0..5 {
            embedded.set("a", value.clone(), None).await.expect("writable");
        }
        assert_eq!(rows(&embedded.store).await, (3, 1));
        assert_eq!(embedded.get("short 0").await.expect("readable"), Some(value.clone()));
        assert_eq!(embedded.get("short 1").await.expect("readable"), Some(value));
    }

    /// Memory forgets all the time, so that readers fill it while a writer updates it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_late_reader_does_not_put_an_old_value_back_into_memory() {
        const LAST: u64 = 3_000;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("store");
        let database = Database::open(path, database::Options::default()).await.expect("opens");
        let embedded = Embedded::open(&database, "t", Options::default()).await.expect("opens");
        let embedded = Arc::new(embedded);
        let acknowledged = Arc::new(AtomicU64::new(0));
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let (embedded, acknowledged) = (Arc::clone(&embedded), Arc::clone(&acknowledged));
                tokio::spawn(async move {
                    while acknowledged.load(Ordering::SeqCst) < LAST {
                        embedded.get("n").await.expect("readable");
                        // What is in memory never waits, and a task that never waits cannot be ended.
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        for number in 1..=LAST {
            embedded.store.cache.invalidate("n");
            let value = Bytes::copy_from_slice(&number.to_be_bytes());
            embedded.set("n", value.clone(), None).await.expect("writable");
            for _ in 0..3 {
                assert_eq!(embedded.get("n").await.expect("readable").as_ref(), Some(&value));
                tokio::task::yield_now().await;
            }
            acknowledged.store(number, Ordering::SeqCst);
        }
        for reader in readers {
            reader.await.expect("no reader fails");
        }
    }

    #[tokio::test]
    async fn a_prefix_of_more_keys_than_one_step_is_cleared_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("store");
        let database = Database::open(path, database::Options::default()).await.expect("opens");
        let embedded = Embedded::open(&database, "t", Options::default()).await.expect("opens");
        let many = (0..2 * CLEARED_PER_STEP_MAX).map(|number| (format!("p{number}"), Some(Bytes::new())));
        embedded.set_many(many.collect()).await.expect("writable");
        embedded.set("q", Bytes::new(), None).await.expect("writable");
        assert_eq!(embedded.clear("p").await.expect("writable"), 8192);
        assert_eq!(rows(&embedded.store).await, (1, 0));
    }
}
