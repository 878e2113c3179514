//! One redb file that several stores share, and the one order in which it is written.
//!
//! Writes that arrive while a commit is under way share the next one. A commit is kept in memory until a *durable*
//! commit, one with an fsync, follows: at most [`Options::durable_every`] later, or when [`Database::flush`] asks.
//!
//! Invariant: after kill -9 or a power cut the file is as it was after some earlier write, at most `durable_every`
//! old: every write up to there is whole, and nothing after it is there. That is enough, because the truth of what is
//! kept here is a topic and the position reached in it is written here too, with or after what was read: it goes
//! back together with it, and the lost part is read again. What cannot be read again is followed by a `flush`.
//!
//! No thread waits for work: the writer that finds no commit under way leads one on a thread for blocking work, and
//! goes on until nobody waits. (Tokio also knows then that something is going on: a test's clock does not run ahead.)

use std::any::Any;
use std::collections::HashSet;
use std::error::Error as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use redb::{Durability, WriteTransaction};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::spawn_blocking;
use tracing::error;

use crate::Error;

/// What may wait for a commit, in KiB; further writers wait for room.
const QUEUE_KIB_MAX: u32 = 64 * 1024;

/// The most one write may carry.
pub(crate) const WRITE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How a database is kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// The longest time that an acknowledged write may be lost by kill -9 or a power cut.
    pub durable_every: Duration,
    /// Memory for pages of the file.
    pub page_cache_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { durable_every: Duration::from_millis(200), page_cache_bytes: 64 * 1024 * 1024 }
    }
}

/// A handle to an open database; clones share it. The last one dropped closes it with a durable commit.
#[derive(Clone)]
pub struct Database {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    durable_every: Duration,
    /// Empty once closed.
    redb: RwLock<Option<redb::Database>>,
    queue: Mutex<Queue>,
    room: Arc<Semaphore>,
    /// The names of the stores opened in here.
    claimed: Mutex<HashSet<String>>,
    /// The first error of the file. redb refuses to go on after one, and later calls should name the cause.
    broken: OnceLock<Error>,
}

#[derive(Default)]
struct Queue {
    jobs: Vec<Box<dyn Job>>,
    /// Someone is committing, and looks here again before it stops.
    led: bool,
    /// Commits in memory have a durable one coming.
    flush_due: bool,
}

/// A write that waits for its commit.
trait Job: Send {
    fn is_durable(&self) -> bool;
    fn run(&mut self, transaction: &WriteTransaction) -> Result<(), redb::Error>;
    fn finish(self: Box<Self>, committed: Result<(), Error>);
}

impl Database {
    /// Opens the file at `path`, or makes it and its folder, and holds an exclusive lock on it until it is closed.
    ///
    /// All pages are checked, which reads the file once: redb otherwise trusts a file and may panic later.
    pub async fn open(path: impl Into<PathBuf>, options: Options) -> Result<Self, Error> {
        let path = path.into();
        let closed = Error::Closed { path: path.clone() };
        spawn_blocking(move || {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
            }
            Self::create(path, &options, |builder, path| builder.create(path))
        })
        .await
        .unwrap_or(Err(closed))
    }

    fn create(
        path: PathBuf,
        options: &Options,
        create: impl FnOnce(&redb::Builder, &Path) -> Result<redb::Database, redb::DatabaseError>,
    ) -> Result<Self, Error> {
        let mut builder = redb::Builder::new();
        builder.set_cache_size(options.page_cache_bytes).set_check_integrity_on_open(true);
        // A damaged header can still lead redb into an assertion of its own.
        let redb = catch_unwind(AssertUnwindSafe(|| create(&builder, &path)))
            .map_err(|panic| Error::Damaged {
                path: path.clone(),
                source: panic_message(panic.as_ref()).into(),
            })?
            .map_err(|error| Error::redb(&path, error.into()))?;
        Ok(Self {
            shared: Arc::new(Shared {
                path,
                durable_every: options.durable_every,
                redb: RwLock::new(Some(redb)),
                queue: Mutex::default(),
                room: Arc::new(Semaphore::new(QUEUE_KIB_MAX as usize)),
                claimed: Mutex::default(),
                broken: OnceLock::new(),
            }),
        })
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Returns once every write acknowledged before the call survives a crash.
    pub async fn flush(&self) -> Result<(), Error> {
        self.submit(0, true, |_| Ok(()), |()| ()).await
    }

    /// Makes all durable and gives the lock back; the stores in here answer [`Error::Closed`] from then on.
    pub async fn close(&self) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        spawn_blocking(move || {
            let redb = shared.redb.write().unwrap_or_else(PoisonError::into_inner).take();
            redb.map_or(Ok(()), |redb| redb.close().map_err(|error| shared.error(error.into())))
        })
        .await
        .unwrap_or_else(|_| Err(self.shared.closed()))
    }

    /// Reserves `name` for one store.
    pub(crate) fn claim(&self, name: &str) -> Result<(), Error> {
        if lock(&self.shared.claimed).insert(name.to_owned()) {
            return Ok(());
        }
        Err(Error::Opened { path: self.shared.path.clone(), name: name.to_owned() })
    }

    /// Reads off the async threads.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&redb::Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let shared = Arc::clone(&self.shared);
        spawn_blocking(move || shared.with_redb(work)).await.unwrap_or_else(|_| Err(self.shared.closed()))
    }

    /// Runs `work` in a transaction that it may share with others, and answers after its commit.
    ///
    /// `bytes` is about what it writes. `after` is called between the commit and the answer, in the order of commits:
    /// the place to bring memory in line with the file. An error of `work` fails all that share the commit, so it may
    /// only be the file's; what is merely refused belongs into its `T`. If the caller goes away, the write still happens.
    pub(crate) async fn write<T: Send + 'static, R: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error> + Send + 'static,
        after: impl FnOnce(T) -> R + Send + 'static,
    ) -> Result<R, Error> {
        self.submit(bytes, false, work, after).await
    }

    async fn submit<T: Send + 'static, R: Send + 'static>(
        &self,
        bytes: usize,
        durable: bool,
        work: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error> + Send + 'static,
        after: impl FnOnce(T) -> R + Send + 'static,
    ) -> Result<R, Error> {
        if let Some(error) = self.shared.broken.get() {
            return Err(error.clone());
        }
        let kib = u32::try_from(bytes / 1024 + 1).unwrap_or(QUEUE_KIB_MAX).min(QUEUE_KIB_MAX);
        let room = Arc::clone(&self.shared.room).acquire_many_owned(kib).await;
        let room = room.map_err(|_| self.shared.closed())?;
        let (answer, answered) = oneshot::channel();
        let job = Box::new(Write { durable, work: Some(work), done: None, after, answer, _room: room });
        let lead = {
            let mut queue = lock(&self.shared.queue);
            queue.jobs.push(job);
            !std::mem::replace(&mut queue.led, true)
        };
        if lead {
            let leader = Leader { shared: Arc::clone(&self.shared), done: false };
            spawn_blocking(move || leader.lead());
        }
        answered.await.unwrap_or_else(|_| Err(self.shared.closed()))
    }
}

impl Shared {
    fn with_redb<T>(&self, work: impl FnOnce(&redb::Database) -> Result<T, redb::Error>) -> Result<T, Error> {
        let redb = self.redb.read().unwrap_or_else(PoisonError::into_inner);
        let redb = redb.as_ref().ok_or_else(|| self.closed())?;
        work(redb).map_err(|error| self.error(error))
    }

    fn commit(self: &Arc<Self>, mut jobs: Vec<Box<dyn Job>>) {
        let durable = jobs.iter().any(|job| job.is_durable());
        let committed = self.with_redb(|redb| {
            let mut transaction = redb.begin_write()?;
            transaction.set_durability(if durable { Durability::Immediate } else { Durability::None })?;
            for job in &mut jobs {
                job.run(&transaction)?;
            }
            Ok(transaction.commit()?)
        });
        if let Err(error) = &committed {
            // Whoever was first named the cause; what follows is "previous i/o error".
            let _ = self.broken.set(error.clone());
        } else if !durable {
            self.flush_later();
        }
        for job in jobs {
            job.finish(committed.clone());
        }
    }

    fn flush_later(self: &Arc<Self>) {
        if std::mem::replace(&mut lock(&self.queue).flush_due, true) {
            return;
        }
        let (shared, durable_every) = (Arc::downgrade(self), self.durable_every);
        // Outside a runtime (the last moments of a process) the close makes it durable.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            tokio::time::sleep(durable_every).await;
            let Some(shared) = shared.upgrade() else { return };
            lock(&shared.queue).flush_due = false;
            // An error stays in `broken` and is the next writer's answer; but it may be long until one comes.
            if let Err(failure) = (Database { shared }).flush().await {
                let cause = failure.source().map(ToString::to_string).unwrap_or_default();
                error!(error = %failure, cause, "could not keep what the store was given; it takes nothing more");
            }
        });
    }

    fn error(&self, error: redb::Error) -> Error {
        self.broken.get().cloned().unwrap_or_else(|| Error::redb(&self.path, error))
    }

    fn closed(&self) -> Error {
        self.broken.get().cloned().unwrap_or_else(|| Error::Closed { path: self.path.clone() })
    }
}

/// Commits what waits until nothing does.
struct Leader {
    shared: Arc<Shared>,
    done: bool,
}

impl Leader {
    fn lead(mut self) {
        while let Some(jobs) = self.next() {
            self.shared.commit(jobs);
        }
    }

    /// What arrived during the last commit; nothing ends the lead, under the same lock that a writer looks under.
    fn next(&mut self) -> Option<Vec<Box<dyn Job>>> {
        let mut queue = lock(&self.shared.queue);
        if queue.jobs.is_empty() {
            queue.led = false;
            self.done = true;
            return None;
        }
        Some(std::mem::take(&mut queue.jobs))
    }
}

impl Drop for Leader {
    /// A panic in redb, or a runtime that ended before the lead began: nobody may wait for ever.
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if std::thread::panicking() {
            let _ = self.shared.broken.set(Error::Closed { path: self.shared.path.clone() });
        }
        let abandoned = {
            let mut queue = lock(&self.shared.queue);
            queue.led = false;
            std::mem::take(&mut queue.jobs)
        };
        drop(abandoned);
    }
}

struct Write<W, T, A, R> {
    durable: bool,
    work: Option<W>,
    done: Option<T>,
    after: A,
    answer: oneshot::Sender<Result<R, Error>>,
    _room: OwnedSemaphorePermit,
}

impl<W, T, A, R> Job for Write<W, T, A, R>
where
    W: FnOnce(&WriteTransaction) -> Result<T, redb::Error> + Send,
    T: Send,
    A: FnOnce(T) -> R + Send,
    R: Send,
{
    fn is_durable(&self) -> bool {
        self.durable
    }

    fn run(&mut self, transaction: &WriteTransaction) -> Result<(), redb::Error> {
        if let Some(work) = self.work.take() {
            self.done = Some(work(transaction)?);
        }
        Ok(())
    }

    fn finish(self: Box<Self>, committed: Result<(), Error>) {
        let answer = match (committed, self.done) {
            (Ok(()), Some(done)) => Ok((self.after)(done)),
            (Err(error), _) => Err(error),
            // Not run: the sender is dropped, which the writer reads as closed.
            (Ok(()), None) => return,
        };
        // The caller may have gone away.
        let _ = self.answer.send(answer);
    }
}

/// A lock whose holder panicked is taken all the same: what it guards is changed in single steps.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn panic_message(panic: &(dyn Any + Send)) -> Box<dyn std::error::Error + Send + Sync> {
    let message = panic.downcast_ref::<String>().cloned();
    let message = message.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    message.unwrap_or_else(|| "the storage engine panicked".to_owned()).into()
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;
    use redb::backends::InMemoryBackend;
    use redb::{ReadableDatabase, ReadableTableMetadata, StorageBackend, TableDefinition};

    use super::*;

    const NUMBERS: TableDefinition<u64, &[u8]> = TableDefinition::new("numbers");

    async fn put(database: &Database, number: u64) -> Result<(), Error> {
        let insert = move |transaction: &WriteTransaction| {
            transaction.open_table(NUMBERS)?.insert(number, [7; 10_000].as_slice())?;
            Ok(())
        };
        database.write(8, insert, |()| ()).await
    }

    async fn count(database: &Database) -> Result<u64, Error> {
        database.read(|redb| Ok(redb.begin_read()?.open_table(NUMBERS)?.len()?)).await
    }

    /// Memory that counts its fsyncs, and whose space can run out.
    #[derive(Debug, Clone, Default)]
    struct Disk {
        memory: Arc<InMemoryBackend>,
        syncs: Arc<AtomicUsize>,
        full: Arc<AtomicUsize>,
    }

    impl StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            self.memory.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.memory.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.memory.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.syncs.fetch_add(1, Ordering::SeqCst);
            self.memory.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            if self.full.load(Ordering::SeqCst) == 1 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.memory.write(offset, data)
        }
    }

    fn open_on(disk: Disk) -> Database {
        let options = Options { durable_every: Duration::from_secs(3600), ..Options::default() };
        let create = |builder: &redb::Builder, _: &Path| builder.create_with_backend(disk);
        Database::create("/data/store".into(), &options, create).expect("an empty disk opens")
    }

    #[tokio::test]
    async fn many_that_wait_share_a_commit() {
        let disk = Disk::default();
        let database = open_on(disk.clone());
        let before = disk.syncs.load(Ordering::SeqCst);
        let durable = |number| {
            let database = database.clone();
            async move {
                put(&database, number).await?;
                database.flush().await
            }
        };
        for done in join_all((0..500).map(durable)).await {
            done.expect("a disk with space takes all");
        }
        assert_eq!(count(&database).await.expect("readable"), 500);
        let syncs = disk.syncs.load(Ordering::SeqCst) - before;
        assert!((1..=100).contains(&syncs), "500 flushes took {syncs} fsyncs");
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_is_made_durable_without_anyone_asking() {
        let disk = Disk::default();
        let database = open_on(disk.clone());
        put(&database, 1).await.expect("a disk with space takes it");
        let before = disk.syncs.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_secs(3599)).await;
        assert_eq!(disk.syncs.load(Ordering::SeqCst), before);
        tokio::time::sleep(Duration::from_secs(2)).await;
        // Queued behind the flush that time has brought about.
        put(&database, 2).await.expect("a disk with space takes it");
        assert!(disk.syncs.load(Ordering::SeqCst) > before);
    }

    #[tokio::test]
    async fn a_full_disk_is_named_to_all_who_wait_and_all_who_come_after() {
        let disk = Disk::default();
        let database = open_on(disk.clone());
        put(&database, 1).await.expect("a disk with space takes it");
        database.flush().await.expect("a disk with space takes it");
        disk.full.store(1, Ordering::SeqCst);
        put(&database, 2).await.expect("memory takes it");
        let flushed = join_all((0..10).map(|_| database.flush())).await;
        let after = [put(&database, 3).await, database.flush().await];
        for answer in flushed.into_iter().chain(after) {
            let error = answer.expect_err("there is no space");
            assert!(matches!(error, Error::Full { .. }), "{error:?}");
            assert_eq!(error.to_string(), "no space left for store /data/store; free some, then restart");
        }
    }

    /// What is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_disk_is_told_though_no_writer_comes_any_more() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let disk = Disk::default();
        let database = open_on(disk.clone());
        put(&database, 1).await.expect("a disk with space takes it");
        database.flush().await.expect("a disk with space takes it");
        disk.full.store(1, Ordering::SeqCst);
        put(&database, 2).await.expect("memory takes it");
        tokio::time::sleep(Duration::from_secs(3601)).await;
        let answer = put(&database, 3).await;
        assert!(matches!(answer, Err(Error::Full { .. })), "{answer:?}");
        let said = String::from_utf8(lock(&log.0).clone()).expect("text");
        assert!(said.contains("no space left for store /data/store; free some, then restart"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }

    #[tokio::test]
    async fn a_second_opener_is_told_who_has_it_until_the_first_closes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("data/store");
        let first = Database::open(&path, Options::default()).await.expect("a new file opens");
        put(&first, 1).await.expect("writable");
        let error = Database::open(&path, Options::default()).await.err().expect("it is locked");
        assert!(matches!(&error, Error::Locked { path: named } if *named == path), "{error:?}");
        assert!(error.to_string().contains("in use by another process; stop that one"), "{error}");
        first.close().await.expect("closes");
        assert!(matches!(put(&first, 2).await, Err(Error::Closed { .. })));
        assert!(matches!(count(&first).await, Err(Error::Closed { .. })));
        let second = Database::open(&path, Options::default()).await.expect("it is free");
        assert_eq!(count(&second).await.expect("readable"), 1);
    }

    #[tokio::test]
    async fn damage_anywhere_is_told_and_never_a_panic() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("store");
        let database = Database::open(&path, Options::default()).await.expect("a new file opens");
        for number in 0..50 {
            put(&database, number).await.expect("writable");
        }
        database.close().await.expect("closes");
        let sound = std::fs::read(&path).expect("readable");

        let half = sound.len() / 2;
        let cut = sound[..half].to_vec();
        let mut header = sound.clone();
        header[..512].fill(0xAA);
        let text = b"not a database at all, but quite long enough to be looked into".repeat(200);
        let mut values = sound.clone();
        let in_values =
            sound.windows(64).position(|window| window == [7; 64]).expect("values are in the file");
        values[in_values + 9] ^= 1;
        for (what, bytes) in [("cut", cut), ("header", header), ("text", text), ("value", values)] {
            std::fs::write(&path, bytes).expect("writable");
            let opened = Database::open(&path, Options::default()).await;
            let error = opened.err().unwrap_or_else(|| panic!("{what}: opened"));
            assert!(
                matches!(&error, Error::Damaged { path: named, .. } if *named == path),
                "{what}: {error:?}"
            );
            assert!(error.to_string().contains("is damaged; move it away and start again"), "{error}");
        }
    }

    #[tokio::test]
    async fn one_name_is_opened_once() {
        let database = open_on(Disk::default());
        database.claim("cache").expect("free");
        database.claim("leases").expect("free");
        assert!(matches!(database.claim("cache"), Err(Error::Opened { name, .. }) if name == "cache"));
    }
}
