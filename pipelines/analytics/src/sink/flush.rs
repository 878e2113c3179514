//! The protocol by which rows come into a table exactly once.
//!
//! A table's log keeps for each partition of its topic, under the name of an *application*, the offset of the last row that is
//! in the table. Rows and that offset are committed in one version of the table or not at all. So:
//!
//! 1. Write the rows into files that nobody reads yet.
//! 2. Read the newest version. Drop what is at or below its offset: somebody has committed it. Where that was a part of what a
//!    file holds, write the rest anew.
//! 3. Commit files and offsets on top of that very version. Whoever else committed for the same application since then makes
//!    this fail; an answer that was lost may have been a success. Both go back to 2, which finds out.
//!
//! The consumer group only shares partitions out. It may be wrong about who owns one, and about how far that one has come.
//!
//! Invariant: an offset in the log never passes a row that is neither in the table nor rejected, and no row is there twice; with
//! any number of writers, each crashing or standing still between any two of its steps.

use crate::decode::Message;
use forebay_runtime::crash::crash_point;
use std::future::Future;

/// How often a commit is tried before its rows are kept for the next flush. Each failure means that another writer has committed,
/// or that the store did not answer.
pub const TRIES_MAX: usize = 16;

/// A table's log, as much of it as the protocol needs.
pub trait Log: Send + Sync {
    /// A version of the table.
    type Version: Send + Sync;
    /// A file that is written and may be added to the table.
    type File: Clone + Send + Sync;
    /// What cannot be mended by looking again.
    type Error: Send;

    /// Writes rows into files that no version knows. Who else writes the same rows writes other files.
    fn write(
        &mut self,
        part: &Part<Self::File>,
    ) -> impl Future<Output = Result<Vec<Self::File>, Self::Error>> + Send;

    /// The newest version.
    fn newest(&mut self) -> impl Future<Output = Result<Self::Version, Self::Error>> + Send;

    /// The offset of the last row of an application that is in this version.
    fn offset(
        &self,
        version: &Self::Version,
        application: &str,
    ) -> impl Future<Output = Result<Option<i64>, Self::Error>> + Send;

    /// Adds files and sets offsets in one version, if no other writer has set one of these offsets since `on`.
    fn commit(
        &mut self,
        on: Self::Version,
        files: Vec<Self::File>,
        offsets: Vec<(String, i64)>,
    ) -> impl Future<Output = Commit<Self::Error>> + Send;
}

/// What became of a commit.
#[derive(Debug)]
pub enum Commit<E> {
    /// It is a version of the table.
    Done,
    /// Another writer was first, or nobody knows: look again.
    LookAgain(E),
}

/// Rows of one partition that wait for their table.
#[derive(Clone, Debug)]
pub struct Part<F> {
    /// Cluster, id of the topic, and partition: under this name the table keeps its offset.
    pub application: String,
    /// The partition's number.
    pub partition: i32,
    /// What was read of it, in order, each offset higher than the one before.
    pub messages: Vec<Message>,
    /// The files that hold exactly these rows, once they are written.
    files: Option<Vec<F>>,
}

/// What a flush came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Messages whose rows are in the table by this flush.
    pub committed: usize,
    /// Messages that somebody had committed already.
    pub dropped: usize,
    /// Commits that had to look again.
    pub conflicts: usize,
    /// Versions that were made.
    pub versions: usize,
}

/// A flush that gave up; its parts are kept.
#[derive(Debug)]
pub enum Fault<E> {
    /// The store does not do what it must.
    Store(E),
    /// Other writers were always first, or no answer ever came.
    Tries(E),
}

impl<F> Part<F> {
    /// Nothing yet of a partition.
    pub const fn new(application: String, partition: i32) -> Self {
        Self { application, partition, messages: Vec::new(), files: None }
    }

    /// Adds what was read next.
    pub fn push(&mut self, message: Message) {
        self.files = None;
        self.messages.push(message);
    }

    /// The last offset that was read, be it of a row or not.
    pub fn last(&self) -> Option<i64> {
        self.messages.last().map(|message| message.offset)
    }

    /// Keeps so many of the first messages.
    pub fn truncate(&mut self, messages: usize) {
        if messages < self.messages.len() {
            self.messages.truncate(messages);
            self.files = None;
        }
    }

    /// Drops what is at or below `offset`; how many messages that were.
    fn cut(&mut self, offset: Option<i64>) -> usize {
        let Some(offset) = offset else { return 0 };
        let known = self.messages.partition_point(|message| message.offset <= offset);
        if known > 0 {
            self.messages.drain(..known);
            self.files = None;
        }
        known
    }
}

/// Brings what waits into the table, all partitions in one version. What a part still holds afterwards waits for the next flush.
pub async fn flush<L: Log>(log: &mut L, parts: &mut [Part<L::File>]) -> Result<Flushed, Fault<L::Error>> {
    let mut flushed = Flushed::default();
    let mut failed = None;
    for _ in 0..TRIES_MAX {
        for part in parts.iter_mut().filter(|part| !part.messages.is_empty() && part.files.is_none()) {
            part.files = Some(log.write(part).await.map_err(Fault::Store)?);
            crash_point("sink.written");
        }
        let version = log.newest().await.map_err(Fault::Store)?;
        for part in parts.iter_mut() {
            let offset = log.offset(&version, &part.application).await.map_err(Fault::Store)?;
            flushed.dropped += part.cut(offset);
        }
        let waiting = || parts.iter().filter(|part| !part.messages.is_empty());
        if waiting().next().is_none() {
            return Ok(flushed);
        }
        // Some of what a file holds is in the table already.
        if waiting().any(|part| part.files.is_none()) {
            continue;
        }
        let files = waiting().filter_map(|part| part.files.clone()).flatten().collect();
        let offsets = waiting().filter_map(|part| Some((part.application.clone(), part.last()?))).collect();
        crash_point("sink.checked");
        match log.commit(version, files, offsets).await {
            Commit::Done => {
                crash_point("sink.committed");
                flushed.versions += 1;
                for part in parts.iter_mut() {
                    flushed.committed += part.messages.len();
                    part.messages.clear();
                    part.files = None;
                }
                return Ok(flushed);
            }
            Commit::LookAgain(why) => {
                flushed.conflicts += 1;
                failed = Some(why);
            }
        }
    }
    match failed {
        Some(why) => Err(Fault::Tries(why)),
        // Only cuts, each by another writer's commit: nothing failed.
        None => Ok(flushed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::Headers;
    use futures::{FutureExt as _, future::BoxFuture, task::noop_waker};
    use proptest::{collection::vec, prelude::*};
    use std::{
        collections::BTreeMap,
        sync::{Arc, Mutex, MutexGuard, PoisonError},
        task::{Context, Poll},
    };

    /// The version that a writer read, the files that it adds, the offsets that it sets.
    type Entry = (Vec<Vec<i64>>, BTreeMap<String, i64>);

    /// A table in memory that does what Delta's conflict checker does: a commit on an older version goes through unless an
    /// application of its own has been set since.
    #[derive(Default)]
    struct Table {
        versions: Vec<Entry>,
        /// Answers to lose: of the next commits, which are made and not answered.
        lost: Vec<bool>,
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Table>>);

    impl Shared {
        fn lock(&self) -> MutexGuard<'_, Table> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn offset(&self, version: usize, application: &str) -> Option<i64> {
            let table = self.lock();
            table.versions[..version].iter().rev().find_map(|(_, offsets)| offsets.get(application).copied())
        }

        fn rows(&self) -> Vec<i64> {
            self.lock().versions.iter().flat_map(|(files, _)| files.iter().flatten().copied()).collect()
        }
    }

    /// Pending once: between any two steps the schedule may let another writer go on, or let this one crash.
    async fn step() {
        let mut waited = false;
        std::future::poll_fn(|_| {
            if std::mem::replace(&mut waited, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    impl Log for Shared {
        type Version = usize;
        type File = Vec<i64>;
        type Error = &'static str;

        async fn write(&mut self, part: &Part<Vec<i64>>) -> Result<Vec<Vec<i64>>, &'static str> {
            step().await;
            Ok(vec![part.messages.iter().map(|message| message.offset).collect()])
        }

        async fn newest(&mut self) -> Result<usize, &'static str> {
            step().await;
            Ok(self.lock().versions.len())
        }

        async fn offset(&self, version: &usize, application: &str) -> Result<Option<i64>, &'static str> {
            step().await;
            Ok(Self::offset(self, *version, application))
        }

        async fn commit(
            &mut self,
            on: usize,
            files: Vec<Vec<i64>>,
            offsets: Vec<(String, i64)>,
        ) -> Commit<&'static str> {
            step().await;
            let mut table = self.lock();
            let was_set = |(application, _): &(String, i64)| {
                table.versions[on..].iter().any(|(_, offsets)| offsets.contains_key(application))
            };
            if offsets.iter().any(was_set) {
                return Commit::LookAgain("another writer was first");
            }
            table.versions.push((files, offsets.into_iter().collect()));
            match table.lost.pop() {
                Some(true) => Commit::LookAgain("no answer"),
                _ => Commit::Done,
            }
        }
    }

    fn message(offset: i64) -> Message {
        Message { offset, timestamp_ms: 0, key: None, value: None, headers: Headers::new() }
    }

    /// A writer that reads one partition from where the table ends, so many messages at a time.
    struct Writer {
        log: Shared,
        at_once: usize,
        running: Option<BoxFuture<'static, ()>>,
    }

    impl Writer {
        /// One step; a writer that is done begins anew from where the table ends then.
        fn advance(&mut self, topic: &[i64]) {
            let running = self.running.get_or_insert_with(|| {
                let (mut log, topic, at_once) = (self.log.clone(), topic.to_vec(), self.at_once);
                async move {
                    let version = log.newest().await.unwrap();
                    let next = Log::offset(&log, &version, "app").await.unwrap();
                    let mut parts = [Part::new("app".to_owned(), 0)];
                    let unread = topic.iter().filter(|offset| next.is_none_or(|next| **offset > next));
                    unread.take(at_once).for_each(|offset| parts[0].push(message(*offset)));
                    // Where it gives up, what is left is read again.
                    let _ = flush(&mut log, &mut parts).await;
                }
                .boxed()
            });
            if running.poll_unpin(&mut Context::from_waker(&noop_waker())).is_ready() {
                self.running = None;
            }
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Turn {
        Advance(usize),
        Crash(usize),
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn whatever_two_writers_do_and_wherever_they_crash_the_table_is_the_topic(
            gaps in vec(1..4_i64, 0..30),
            at_once in (1..12_usize, 1..12_usize),
            lost in vec(any::<bool>(), 0..12),
            turns in vec(prop_oneof![
                9 => (0..2_usize).prop_map(Turn::Advance),
                1 => (0..2_usize).prop_map(Turn::Crash),
            ], 0..200),
        ) {
            // Offsets of aborted messages are missing.
            let topic: Vec<i64> = gaps.iter().scan(-1, |offset, gap| { *offset += gap; Some(*offset) }).collect();
            let table = Shared::default();
            table.lock().lost = lost;
            let writer = |at_once| Writer { log: table.clone(), at_once, running: None };
            let mut writers = [writer(at_once.0), writer(at_once.1)];
            for turn in turns {
                match turn {
                    Turn::Advance(which) => writers[which].advance(&topic),
                    Turn::Crash(which) => writers[which].running = None,
                }
                let rows = table.rows();
                prop_assert_eq!(&rows[..], &topic[..rows.len()], "each row once, and none before another");
            }
            // One of them is left alone, for as long as it takes.
            writers[1].running = None;
            for _ in 0..topic.len() * 200 + 200 {
                writers[0].advance(&topic);
            }
            prop_assert_eq!(table.rows(), topic);
        }

        #[test]
        fn what_is_known_is_cut_off_and_nothing_else(offsets in vec(1..3_i64, 0..20), known in proptest::option::of(-1..40_i64)) {
            let mut part: Part<()> = Part::new("app".to_owned(), 0);
            let offsets: Vec<i64> = offsets.iter().scan(-1, |offset, gap| { *offset += gap; Some(*offset) }).collect();
            offsets.iter().for_each(|offset| part.push(message(*offset)));
            let cut = part.cut(known);
            let left: Vec<i64> = offsets.iter().copied().filter(|offset| known.is_none_or(|known| *offset > known)).collect();
            prop_assert_eq!(cut, offsets.len() - left.len());
            prop_assert_eq!(part.messages.iter().map(|message| message.offset).collect::<Vec<_>>(), left);
        }
    }

    /// The simulated checker must be able to refuse, or the property above would say nothing of two writers.
    #[test]
    fn of_two_writers_with_one_version_the_second_is_refused_and_finds_its_rows_known() {
        let table = Shared::default();
        let mut writers = [1, 2].map(|_| Writer { log: table.clone(), at_once: 9, running: None });
        // Both have read version 0 when the first commits.
        let topic = [0, 1, 2];
        while table.rows().is_empty() {
            writers.iter_mut().for_each(|writer| writer.advance(&topic));
        }
        for _ in 0..20 {
            writers[1].advance(&topic);
        }
        assert_eq!(table.rows(), topic);
        assert_eq!(table.lock().versions.len(), 1);
    }
}
