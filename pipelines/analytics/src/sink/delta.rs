//! The protocol's log as a Delta table.
//!
//! Invariant: files are created and never overwritten, and none is deleted here. One that no version names is swept by `vacuum`;
//! one whose commit was not answered may be named by a version that is not seen yet.

use super::flush::{Commit, Log, Part};
use crate::{
    decode::{self, Decoder, Message, Reject, runs},
    encode::{Encoded, LARGE_BYTES, encode},
    lake,
    table::{DATE, Table},
};
use arrow::error::ArrowError;
use deltalake_core::{
    DeltaTable, DeltaTableError,
    kernel::{
        Action, Add, Transaction,
        transaction::{CommitBuilder, CommitProperties},
    },
    protocol::{DeltaOperation, SaveMode},
    table::state::DeltaTableState,
};
use forebay_runtime::{
    drive::{SendError, Sink},
    host::kafka::Registry,
    message::Outgoing,
};
use forebay_schemas::{DeadLetter, NanoUsd, RequestId, Tenant};
use futures::future::join_all;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tracing::warn;

/// What stands as the step of a dead letter whose record could not become a row.
pub const STAGE: &str = "sink";

/// So many bytes of messages become rows together: of a column all texts together must stay below 2 GiB.
const RUN_BYTES_MAX: usize = 1 << 30;

/// What cannot be mended by looking again at once.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Our own declaration of a table.
    #[error(transparent)]
    Decode(#[from] decode::Error),
    /// Rows that could not be written as Parquet.
    #[error("could not write rows of table {table} as Parquet")]
    Encode {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: ArrowError,
    },
    /// The store took no file.
    #[error(
        "could not write file {path} of table {table}; check that the store can be reached and written to"
    )]
    Put {
        /// The table.
        table: &'static str,
        /// The file.
        path: String,
        /// What happened.
        #[source]
        source: tables_store::Error,
    },
    /// The log could not be read or written.
    #[error("could not {doing} the log of table {table}; check that the store can be reached and written to")]
    Log {
        /// What was tried.
        doing: &'static str,
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: Box<DeltaTableError>,
    },
    /// A message that is no row could not be set aside.
    #[error(
        "could not write a dead letter for a message that table {table} cannot take; check that Kafka can be reached, and that topic dead-letters takes messages of 16 KiB"
    )]
    Letter {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: SendError,
    },
    /// The store, or the log of dead letters, did not answer in time.
    #[error("could not bring rows into table {table} within {} s; check that the store and Kafka can be reached", waited.as_secs())]
    Slow {
        /// The table.
        table: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// The work was cut off.
    #[error("writing rows of table {table} was cut off")]
    CutOff {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: tokio::task::JoinError,
    },
}

/// Where messages go that are no rows.
#[derive(Clone)]
pub struct Letters {
    /// Writes them.
    pub sink: Arc<dyn Sink>,
    /// The full name of the topic of dead letters.
    pub topic: Arc<str>,
    /// The id of the cluster, from which ids of messages are derived that do not say theirs.
    pub cluster: Arc<str>,
}

/// What a log counted since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Files that were written.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Messages that were set aside.
    pub rejects: u64,
}

/// A Delta table, as the protocol sees it.
pub struct DeltaLog {
    kind: Table,
    table: DeltaTable,
    /// The full name of the topic.
    topic: Arc<str>,
    decoder: Arc<Mutex<Decoder>>,
    letters: Letters,
    now_ms: fn() -> i64,
    counted: Counted,
    run_bytes_max: usize,
}

/// How much of a message goes into its letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copied {
    Whole,
    WithoutValue,
    HeadersAlone,
}

impl DeltaLog {
    /// The log of a table that is filled from `topic`, whose rows may have schemas of a registry.
    pub fn new(
        kind: Table,
        table: DeltaTable,
        topic: Arc<str>,
        letters: Letters,
        registry: Option<Arc<Registry>>,
        now_ms: fn() -> i64,
    ) -> Result<Self, Error> {
        let decoder = Arc::new(Mutex::new(Decoder::new(kind)?.with_registry(registry)));
        let (counted, run_bytes_max) = (Counted::default(), RUN_BYTES_MAX);
        Ok(Self { kind, table, topic, decoder, letters, now_ms, counted, run_bytes_max })
    }

    /// The table itself, for who looks after its files.
    pub fn table(&self) -> DeltaTable {
        self.table.clone()
    }

    /// Which table.
    pub const fn kind(&self) -> Table {
        self.kind
    }

    /// What was counted since this was last asked.
    pub fn counted(&mut self) -> Counted {
        std::mem::take(&mut self.counted)
    }

    fn fault(&self, doing: &'static str) -> impl FnOnce(DeltaTableError) -> Error + use<> {
        let table = self.kind.name();
        move |source| Error::Log { doing, table, source: Box::new(source) }
    }

    /// Decoding, sorting and compressing are work, and nobody else's rows should wait for it.
    async fn encode(
        &self,
        messages: Vec<Message>,
    ) -> Result<(Vec<Encoded>, Vec<Reject>, Vec<Message>), Error> {
        let (kind, decoder, bytes_max) = (self.kind, Arc::clone(&self.decoder), self.run_bytes_max);
        let work = move || {
            let mut decoder = decoder.lock().unwrap_or_else(PoisonError::into_inner);
            let (mut files, mut rejects) = (Vec::new(), Vec::new());
            for run in runs(&messages, bytes_max) {
                let rows = decoder.read(&messages[run.clone()])?;
                let encoded = encode(kind, &rows.batch);
                files.extend(encoded.map_err(|source| Error::Encode { table: kind.name(), source })?);
                let of_all = |reject: Reject| Reject { index: run.start + reject.index, ..reject };
                rejects.extend(rows.rejects.into_iter().map(of_all));
            }
            Ok((files, rejects, messages))
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|source| Error::CutOff { table: kind.name(), source })?
    }

    /// Sets messages aside that are no rows. Before their offsets are committed, so that a crash repeats a letter rather
    /// than losing one; letters of one key are one letter.
    async fn set_aside(
        &mut self,
        partition: i32,
        rejects: &[Reject],
        messages: &[Message],
    ) -> Result<(), Error> {
        self.counted.rejects += rejects.len() as u64;
        let aside =
            rejects.iter().filter_map(|Reject { index, reason }| Some((messages.get(*index)?, reason)));
        // Each for itself, or nobody knew which of them is too large.
        let sent = join_all(aside.clone().map(|(message, reason)| {
            warn!(topic = %self.topic, partition, offset = message.offset, reason,
                "a message is no row of its table; it goes to the dead letters");
            self.letters.sink.send(vec![self.letter(partition, message, reason, Copied::Whole)])
        }));
        for ((message, reason), sent) in aside.zip(sent.await) {
            match sent {
                Err(SendError::TooLarge { .. }) => self.set_aside_in_part(partition, message, reason).await,
                sent => sent,
            }
            .map_err(|source| Error::Letter { table: self.kind.name(), source })?;
        }
        Ok(())
    }

    /// As much of a message as the topic of dead letters takes. What is left out is where it was, for as long as its topic keeps it.
    async fn set_aside_in_part(
        &self,
        partition: i32,
        message: &Message,
        reason: &str,
    ) -> Result<(), SendError> {
        // Whole once more: what goes to the broker together is refused together.
        let mut sent = Ok(());
        for copied in [Copied::Whole, Copied::WithoutValue, Copied::HeadersAlone] {
            sent = self.letters.sink.send(vec![self.letter(partition, message, reason, copied)]).await;
            if !matches!(sent, Err(SendError::TooLarge { .. })) {
                break;
            }
            warn!(topic = %self.topic, partition, offset = message.offset, bytes = message.bytes(), ?copied,
                "a dead letter is larger than its topic takes; it goes there with less of the message");
        }
        sent
    }

    fn letter(&self, partition: i32, message: &Message, reason: &str, copied: Copied) -> Outgoing {
        let Letters { topic, cluster, .. } = &self.letters;
        let Message { offset, timestamp_ms, .. } = *message;
        let mut letter = DeadLetter {
            schema: self.kind.name().to_owned(),
            id: RequestId::derived(cluster, &self.topic, partition, offset, timestamp_ms),
            tenant: Tenant::default(),
            generation: 0,
            stage: STAGE.to_owned(),
            pipeline: String::new(),
            topic: self.topic.to_string(),
            partition,
            offset,
            timestamp_ms,
            class: "undecodable".to_owned(),
            code: "undecodable".to_owned(),
            message: reason.to_owned(),
            attempts: 1,
            since_ms: timestamp_ms,
            call_id: String::new(),
            deadline_at_ms: None,
            paid_nano_usd: NanoUsd::default(),
            redrives: 0,
            body: None,
        };
        let (mut key, mut value) = (message.key.as_ref(), message.value.as_ref());
        if copied != Copied::Whole {
            let bytes = [key, value].into_iter().flatten().map(|part| part.len()).sum();
            letter.body = Some(DeadLetter::omitted(bytes, &letter.source()));
            value = None;
        }
        if copied == Copied::HeadersAlone {
            key = None;
        }
        Outgoing {
            topic: Arc::clone(topic),
            key: Some(letter.message_key().into_bytes()),
            value: value.map(|value| value.to_vec()),
            headers: letter.write(key),
        }
    }
}

impl Log for DeltaLog {
    type Version = DeltaTableState;
    type File = Add;
    type Error = Error;

    async fn write(&mut self, part: &Part<Add>) -> Result<Vec<Add>, Error> {
        let (Some(first), Some(last)) = (part.messages.first(), part.last()) else { return Ok(Vec::new()) };
        let (first, partition) = (first.offset, part.partition);
        let (encoded, rejects, messages) = self.encode(part.messages.clone()).await?;
        self.set_aside(partition, &rejects, &messages).await?;
        let mut files = Vec::with_capacity(encoded.len());
        for file in encoded {
            let name = format!("{}-{partition}-{first}-{last}-{}", self.topic, uuid::Uuid::now_v7());
            let path = file.path(&name, file.unpacked >= LARGE_BYTES);
            let add = lake::write(&self.table, &path, file, (self.now_ms)()).await;
            let add = add.map_err(|source| Error::Put { table: self.kind.name(), path, source })?;
            self.counted.files += 1;
            self.counted.bytes += u64::try_from(add.size).unwrap_or_default();
            files.push(add);
        }
        Ok(files)
    }

    async fn newest(&mut self) -> Result<DeltaTableState, Error> {
        self.table.update_state().await.map_err(self.fault("read"))?;
        self.table.snapshot().cloned().map_err(self.fault("read"))
    }

    async fn offset(&self, version: &DeltaTableState, application: &str) -> Result<Option<i64>, Error> {
        let log = self.table.log_store();
        version.transaction_version(log.as_ref(), application).await.map_err(self.fault("read"))
    }

    async fn commit(
        &mut self,
        on: DeltaTableState,
        files: Vec<Add>,
        offsets: Vec<(String, i64)>,
    ) -> Commit<Error> {
        let now = (self.now_ms)();
        let offsets = offsets.into_iter();
        let offsets = offsets
            .map(|(application, offset)| Transaction::new_with_last_update(application, offset, Some(now)));
        let properties = CommitProperties::default()
            .with_application_transactions(offsets.collect())
            // Listing a whole log to forget its oldest versions is not for every commit.
            .with_cleanup_expired_logs(Some(on.version().is_multiple_of(CLEAN_EVERY)));
        let operation = DeltaOperation::Write {
            mode: SaveMode::Append,
            partition_by: Some(vec![DATE.to_owned()]),
            predicate: None,
        };
        let commit = CommitBuilder::from(properties)
            .with_actions(files.into_iter().map(Action::Add).collect())
            .build(Some(&on), self.table.log_store(), operation);
        match commit.await {
            Ok(_) => Commit::Done,
            Err(source) => Commit::LookAgain(self.fault("write")(source)),
        }
    }
}

/// How many versions lie between two looks for versions that are older than the table keeps them.
const CLEAN_EVERY: u64 = 500;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sink::flush::flush;
    use arrow::array::AsArray as _;
    use datafusion::prelude::SessionContext;
    use forebay_schemas::{Headers, Label, Record as _};
    use futures::future::BoxFuture;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use url::Url;

    /// Keeps what would be written, or never answers. Takes messages of so many bytes, where that is not 0.
    #[derive(Default)]
    pub(crate) struct Kept(Mutex<Vec<Outgoing>>, pub(crate) AtomicBool, AtomicUsize);

    impl Sink for Kept {
        fn send(&self, messages: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>> {
            if self.1.load(Ordering::Relaxed) {
                return Box::pin(std::future::pending());
            }
            let bytes = |message: &Outgoing| {
                let headers = message.headers.iter();
                let headers =
                    headers.map(|(name, value)| name.len() + value.as_ref().map_or(0, |value| value.len()));
                message.value.as_ref().map_or(0, Vec::len) + headers.sum::<usize>()
            };
            let (most, bytes_max) = (messages.iter().map(bytes).max(), self.2.load(Ordering::Relaxed));
            if let Some(bytes) = most.filter(|bytes| bytes_max > 0 && *bytes > bytes_max) {
                let topic = "dead-letters".to_owned();
                return Box::pin(async move { Err(SendError::TooLarge { topic, bytes }) });
            }
            self.0.lock().unwrap().extend(messages);
            Box::pin(async { Ok(()) })
        }
    }

    /// A folder of tables.
    pub(crate) struct Place {
        _folder: tempfile::TempDir,
        pub(crate) root: Url,
        pub(crate) kept: Arc<Kept>,
    }

    impl Place {
        pub(crate) fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let root = Url::from_directory_path(folder.path()).unwrap();
            Self { _folder: folder, root, kept: Arc::default() }
        }

        pub(crate) async fn log(&self) -> DeltaLog {
            let table = lake::open(&self.root, &lake::Options::new(), Table::Labels).await.unwrap();
            let letters =
                Letters { sink: self.kept.clone(), topic: "dead-letters".into(), cluster: "c".into() };
            DeltaLog::new(Table::Labels, table, "x-labels".into(), letters, None, || 5).unwrap()
        }

        /// How many rows there are, and how many different ones.
        pub(crate) async fn rows(&self) -> (i64, i64) {
            let table = lake::open(&self.root, &lake::Options::new(), Table::Labels).await.unwrap();
            let session = SessionContext::new();
            session.register_table("labels", table.table_provider().await.unwrap()).unwrap();
            let sql = "select count(*), count(distinct request_id) from labels";
            let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
            let count = |column: usize| {
                batches[0].column(column).as_primitive::<arrow::datatypes::Int64Type>().value(0)
            };
            (count(0), count(1))
        }
    }

    fn label(offset: i64) -> Message {
        let label = Label {
            request_id: RequestId::try_from(format!("order-{offset}")).unwrap(),
            tenant: Tenant::default(),
            generation: 0,
            wrong: false,
            quality: None,
            labeller: None,
            inclusion_probability: None,
            note: None,
            // Three days in turn.
            labelled_at: Some(offset % 3 * 86_400_000_000),
        };
        let value = label.encode().unwrap().map(Into::into);
        Message { offset, timestamp_ms: 0, key: None, value, headers: Headers::new() }
    }

    /// Rows of the first three days of 1970, in turn.
    pub(crate) fn part(partition: i32, offsets: std::ops::Range<i64>) -> Part<Add> {
        let mut part = Part::new(format!("c/t/{partition}"), partition);
        offsets.for_each(|offset| part.push(label(offset)));
        part
    }

    #[tokio::test]
    async fn of_two_writers_on_one_version_one_wins_and_the_other_finds_its_rows_known() {
        let place = Place::new();
        let (mut first, mut second) = (place.log().await, place.log().await);
        let (one, other) = (part(0, 0..50), part(0, 0..50));
        let (files, twice) = (first.write(&one).await.unwrap(), second.write(&other).await.unwrap());
        let (version, same) = (first.newest().await.unwrap(), second.newest().await.unwrap());
        assert_eq!(version.version(), same.version());
        let offsets = vec![("c/t/0".to_owned(), 49)];
        assert!(matches!(first.commit(version, files, offsets.clone()).await, Commit::Done));
        // Delta's checker looks at the application, though both only append.
        let Commit::LookAgain(fault) = second.commit(same, twice, offsets).await else {
            panic!("both were accepted")
        };
        assert!(format!("{fault:?}").contains("ConcurrentTransaction"), "{fault:?}");
        assert_eq!(place.rows().await, (50, 50));
        let flushed = flush(&mut second, &mut [other]).await.unwrap();
        assert_eq!((flushed.committed, flushed.dropped), (0, 50));
        assert_eq!(place.rows().await, (50, 50));
    }

    #[tokio::test]
    async fn writers_of_other_partitions_do_not_get_in_each_others_way() {
        let place = Place::new();
        let (mut first, mut second) = (place.log().await, place.log().await);
        let stale = second.newest().await.unwrap();
        let flushed = flush(&mut first, &mut [part(0, 0..10), part(1, 0..10)]).await.unwrap();
        assert_eq!((flushed.committed, flushed.versions), (20, 1));
        let other = part(2, 10..20);
        let files = second.write(&other).await.unwrap();
        assert_eq!(files.len(), 3, "a file a day");
        assert!(matches!(second.commit(stale, files, vec![("c/t/2".to_owned(), 19)]).await, Commit::Done));
        assert_eq!(place.rows().await, (30, 20));
    }

    #[tokio::test]
    async fn rows_that_are_known_in_part_are_written_anew_without_them() {
        let place = Place::new();
        let (mut first, mut second) = (place.log().await, place.log().await);
        flush(&mut first, &mut [part(0, 0..30)]).await.unwrap();
        let flushed = flush(&mut second, &mut [part(0, 10..50)]).await.unwrap();
        assert_eq!((flushed.committed, flushed.dropped), (20, 20));
        assert_eq!(place.rows().await, (50, 50));
        let version = first.newest().await.unwrap();
        assert_eq!(Log::offset(&first, &version, "c/t/0").await.unwrap(), Some(49));
    }

    #[tokio::test]
    async fn a_message_that_is_no_row_is_a_letter_and_stops_nobody() {
        let place = Place::new();
        let mut log = place.log().await;
        let mut bad = part(0, 0..3);
        bad.messages[1].value = Some("{".into());
        flush(&mut log, &mut [bad]).await.unwrap();
        assert_eq!(place.rows().await, (2, 2));
        assert_eq!(log.counted().rejects, 1);
        let letters = std::mem::take(&mut *place.kept.0.lock().unwrap());
        let letter = DeadLetter::read(&letters[0].headers).unwrap();
        assert_eq!((letter.topic.as_str(), letter.partition, letter.offset), ("x-labels", 0, 1));
        assert!(letter.message.contains("line 1 column 1"), "{}", letter.message);
        assert_eq!(letters[0].value.as_deref(), Some(&b"{"[..]));
    }

    #[tokio::test]
    async fn a_message_that_is_no_row_and_too_large_to_copy_is_told_of_and_stops_nobody() {
        let place = Place::new();
        let mut log = place.log().await;
        place.kept.2.store(1_500, Ordering::Relaxed);
        let mut bad = part(0, 0..5);
        bad.messages[1].value = Some("{".into());
        bad.messages[2].value = Some("x".repeat(3_000).into());
        bad.messages[3] = Message {
            key: Some("k".repeat(2_000).into()),
            value: Some("x".repeat(3_000).into()),
            ..bad.messages[3].clone()
        };
        let flushed = flush(&mut log, &mut [bad]).await.unwrap();
        assert_eq!((flushed.committed, place.rows().await), (5, (2, 2)));
        let letters = std::mem::take(&mut *place.kept.0.lock().unwrap());
        let told =
            letters.iter().map(|letter| (DeadLetter::read(&letter.headers).unwrap(), letter.value.clone()));
        let told: Vec<_> = told.map(|(letter, value)| (letter.offset, letter.body, value)).collect();
        let omitted =
            |bytes: usize, offset: i64| Some(format!("omitted, {bytes} bytes at x-labels/0/{offset}@0"));
        let expected =
            [(1, None, Some(b"{".to_vec())), (2, omitted(3_000, 2), None), (3, omitted(5_000, 3), None)];
        assert_eq!(told, expected);
        assert_eq!(log.counted().rejects, 3);
    }

    #[tokio::test]
    async fn more_than_a_column_holds_is_written_in_several_files() {
        let place = Place::new();
        let mut log = place.log().await;
        let mut large = part(0, 0..9);
        log.run_bytes_max = large.messages[0].bytes() * 3;
        large.messages[4].value = Some("{".repeat(log.run_bytes_max * 2).into());
        large.messages[8].value = Some("{".into());
        let files = log.write(&large).await.unwrap();
        // No two rows of a day are in one run; all at once they were three files.
        assert_eq!(files.len(), 7);
        let version = log.newest().await.unwrap();
        assert!(matches!(log.commit(version, files, vec![("c/t/0".to_owned(), 8)]).await, Commit::Done));
        assert_eq!(place.rows().await, (7, 7));
        let letters = std::mem::take(&mut *place.kept.0.lock().unwrap());
        let offset = |letter: &Outgoing| DeadLetter::read(&letter.headers).unwrap().offset;
        assert_eq!(letters.iter().map(offset).collect::<Vec<_>>(), [4, 8]);
    }

    #[tokio::test]
    async fn offsets_outlive_checkpoints_and_pruning_reads_what_it_must() {
        let place = Place::new();
        let mut log = place.log().await;
        flush(&mut log, &mut [part(7, 0..2)]).await.unwrap();
        for round in 0..45 {
            flush(&mut log, &mut [part(0, round * 3..round * 3 + 3)]).await.unwrap();
        }
        let mut fresh = place.log().await;
        let version = fresh.newest().await.unwrap();
        assert_eq!(Log::offset(&fresh, &version, "c/t/7").await.unwrap(), Some(1));
        assert_eq!(Log::offset(&fresh, &version, "c/t/0").await.unwrap(), Some(134));
        assert_eq!(Log::offset(&fresh, &version, "c/t/1").await.unwrap(), None);
        assert_eq!(place.rows().await, (137, 135));
    }

    #[tokio::test]
    async fn two_who_make_a_table_at_once_make_one() {
        let place = Place::new();
        let (one, other) = tokio::join!(place.log(), place.log());
        let (mut one, mut other) = (one, other);
        flush(&mut one, &mut [part(0, 0..5)]).await.unwrap();
        flush(&mut other, &mut [part(0, 0..8)]).await.unwrap();
        assert_eq!(place.rows().await, (8, 8));
    }
}
