//! The ledger of paid calls: an answer that was paid for and recorded is never paid for again.
//!
//! Each input topic of a step that makes paid calls has a compacted topic beside it, with the same partitions. Around
//! each try of a call stand `started` and `done` or `failed`, each acknowledged before what depends on it. Whoever
//! takes a partition over reads what is unfinished there, answers from it, and makes a call again only where the one
//! before failed or nobody can be making it any more; then it says so ([`book`] is the protocol).
//!
//! A call goes on when its partition is given up: its answer still comes into the ledger, for the next owner.
//!
//! Invariant: a call is sent only by an operator that holds the turn which [`Ledgers::of`] gave it.

pub mod book;
#[cfg(test)]
mod simulation;

use crate::{
    crash::crash_point,
    drive::SendError,
    fence,
    message::{Incoming, Partition},
};
use book::{Asker, Book, Next, Terms, Times, Verdict};
use forebay_operator::{Clock, Failure, Found, Known, Ledger, Turn};
use forebay_schemas::{
    Attempt, CallId, EntryKind, LedgerEntry, retry::Retry, topics::DERIVED_MESSAGE_BYTES_MAX,
};
use forebay_telemetry::{Health, StepMeter};
use futures::future::BoxFuture;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

/// The largest answer that is kept. What is larger is paid for, refused, and never asked for again.
pub const ANSWER_BYTES_MAX: usize = DERIVED_MESSAGE_BYTES_MAX - 64 * 1024;

/// How long to wait before a log that could not be read is read again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Where ledgers are kept.
pub trait Log: Send + Sync + 'static {
    /// Writes an entry at a partition of a ledger; gives its offset once all replicas have it. Waits for a log that is
    /// away.
    fn append(&self, at: &Partition, entry: &LedgerEntry) -> BoxFuture<'static, Result<i64, SendError>>;

    /// Reads on from an offset: to the end of the partition, or so many entries, or as much as is good at once.
    fn read(
        &self,
        at: &Partition,
        from: i64,
        entries_max: usize,
    ) -> BoxFuture<'static, Result<Chunk, String>>;

    /// The committed offset of a partition of the input, 0 where there is none, and what stands beside it.
    fn committed(&self, input: &Partition) -> BoxFuture<'static, Result<(i64, String), String>>;
}

/// What was read.
#[derive(Debug)]
pub struct Chunk {
    /// Entries with their offsets.
    pub entries: Vec<(i64, LedgerEntry)>,
    /// The next offset to read.
    pub next: i64,
    /// Whether the partition ended there.
    pub at_end: bool,
    /// How long all of it had been there, at least, when it was given, by a clock of this process: reading much takes a
    /// while, and who has listened before knows of more.
    pub age: Duration,
}

/// A clock for leases: it only has to go on, also while the machine is suspended.
#[derive(Clone, Copy, Debug)]
pub enum LeaseClock {
    /// CLOCK_BOOTTIME.
    Boot,
    /// Runs with tokio's clock from this moment on, for tests.
    Virtual(Instant),
}

impl LeaseClock {
    fn now_ms(self) -> u64 {
        match self {
            Self::Boot => fence::now_ms(),
            Self::Virtual(since) => u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// What the ledgers of a stage are made of.
pub struct Parts {
    /// Where they are kept.
    pub log: Arc<dyn Log>,
    /// From the full name of each input topic to that of its ledger.
    pub topics: BTreeMap<Arc<str>, Arc<str>>,
    /// How many ambiguous tries of a call are followed by another.
    pub ambiguous_max: usize,
    /// How many calls of a partition are remembered whose records are done: as many as this step and those before it may
    /// have unfinished, so that whatever is delivered again after a crash is recognised.
    pub finished_max: usize,
    /// A hash of the step's settings, recorded with each call.
    pub config: String,
    /// The times of a lease.
    pub terms: Terms,
    /// The clock of leases.
    pub lease_clock: LeaseClock,
    /// Wall time, for people.
    pub clock: Clock,
    /// What is counted.
    pub meter: StepMeter,
    /// Who is ready: nobody is while a ledger is not read.
    pub health: Health,
    /// The name under which that is told.
    pub name: String,
}

/// What all ledgers of a stage share.
struct Shared {
    parts: Parts,
    unread: Unread,
}

/// Ledgers of ours that are not read yet. As long as there are any the stage is not ready.
struct Unread {
    count: Mutex<usize>,
    health: Health,
    name: String,
}

impl Unread {
    fn new(health: Health, name: String) -> Self {
        Self { count: Mutex::default(), health, name }
    }

    fn one_more(&self) {
        self.change(|count| count.saturating_add(1));
    }

    fn one_less(&self) {
        self.change(|count| count.saturating_sub(1));
    }

    fn change(&self, change: impl FnOnce(usize) -> usize) {
        // Told under the lock: whoever counts last must be the last to tell too.
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = change(*count);
        let ready = if *count > 0 { Err(format!("{count} ledgers are not read yet")) } else { Ok(()) };
        self.health.set_ready(&self.name, ready);
    }
}

impl std::ops::Deref for Shared {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.parts
    }
}

/// The ledgers of a stage: one for each partition that it reads.
pub struct Ledgers {
    shared: Arc<Shared>,
    accounts: Mutex<HashMap<Partition, Arc<Account>>>,
    /// Ends with this: a stage that is gone renews no lease.
    life: CancellationToken,
    _life: DropGuard,
}

impl Ledgers {
    /// Ledgers for a stage that has no partition yet.
    pub fn new(parts: Parts) -> Self {
        let life = CancellationToken::new();
        let _life = life.clone().drop_guard();
        let unread = Unread::new(parts.health.clone(), parts.name.clone());
        let shared = Arc::new(Shared { parts, unread });
        Self { shared, accounts: Mutex::default(), life, _life }
    }

    /// A partition of the input is ours: its ledger is read.
    pub fn assigned(&self, input: &Partition) {
        let Some(topic) = self.shared.topics.get(&input.topic) else { return };
        let at = Partition { topic: Arc::clone(topic), number: input.number };
        let owner = format!("{:016x}", rand::random::<u64>());
        let Parts { ambiguous_max, finished_max, terms, .. } = self.shared.parts;
        let book = Book::new(&owner, ambiguous_max, finished_max, terms);
        self.shared.unread.one_more();
        let account = Arc::new(Account {
            shared: Arc::clone(&self.shared),
            input: input.clone(),
            at,
            owner: owner.into(),
            book: Mutex::new(book),
            reading: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            wake: Notify::new(),
        });
        self.accounts().insert(input.clone(), Arc::clone(&account));
        let life = self.life.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = account.keep() => {}
                () = life.cancelled() => {}
            }
        });
    }

    /// A partition is given up, drained or lost. Calls that are under way go on into the ledger.
    pub fn given_up(&self, input: &Partition) {
        let Some(account) = self.accounts().remove(input) else { return };
        let has_written = {
            let mut book = account.book();
            if !book.is_caught_up() {
                account.shared.unread.one_less();
            }
            book.release();
            book.has_written()
        };
        account.tell();
        if has_written {
            tokio::spawn(async move {
                let released =
                    LedgerEntry::of_lease(EntryKind::Released, &account.owner, account.now_wall_ms());
                // The end of the process loses it; then the next owner waits for the lease to end.
                let _ = account.append(released).await;
            });
        }
    }

    /// What is to stand beside a committed offset of the input: from where its ledger must be read.
    pub fn metadata(&self, input: &Partition, offset: i64) -> Option<String> {
        let account = self.account(input)?;
        let from = account.book().committed(offset);
        Some(format!("ledger={from}"))
    }

    /// Whether this record, or another copy of it, may have made calls here already, so that it must be finished here; or makes
    /// them elsewhere, where it must follow. `first` is the first call that it makes.
    pub fn may_have_paid(&self, incoming: &Incoming, first: Option<&CallId>) -> bool {
        let Some(account) = self.account(&incoming.partition) else { return false };
        let book = account.book();
        book.calls_of(incoming.offset).is_none_or(|calls| !calls.is_empty())
            || first.is_some_and(|first| book.knows(first))
    }

    /// The ledger of one record. `first` is the first call that it makes, where that can be told before it is read.
    pub fn of(&self, incoming: &Incoming, first: Option<CallId>) -> Arc<RecordLedger> {
        let bytes = incoming.value.as_deref().unwrap_or_default();
        Arc::new(RecordLedger {
            account: self.account(&incoming.partition),
            source_offset: incoming.offset,
            redriven: Retry::read(&incoming.headers)
                .is_ok_and(|retry| retry.is_some_and(|retry| retry.redrives > 0)),
            first,
            input: blake3::hash(bytes).to_hex()[..16].to_owned(),
            told: Mutex::default(),
            dropped: Mutex::default(),
        })
    }

    fn account(&self, input: &Partition) -> Option<Arc<Account>> {
        self.accounts().get(input).cloned()
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<Partition, Arc<Account>>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From where a ledger must be read, as [`Ledgers::metadata`] wrote it. Anything else means from the start.
fn replay_from(metadata: &str) -> i64 {
    metadata.strip_prefix("ledger=").and_then(|from| from.parse().ok()).unwrap_or(0)
}

/// One assignment of one partition.
struct Account {
    shared: Arc<Shared>,
    input: Partition,
    at: Partition,
    owner: Arc<str>,
    book: Mutex<Book>,
    /// One read at a time: a log gives a partition to one reader.
    reading: tokio::sync::Mutex<()>,
    /// Told after every change of the book.
    changed: Notify,
    /// Wakes whoever keeps the book.
    wake: Notify,
}

impl Account {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.shared.lease_clock.now_ms()
    }

    fn now_wall_ms(&self) -> i64 {
        self.shared.clock.now_ms()
    }

    fn tell(&self) {
        self.changed.notify_waiters();
        self.wake.notify_one();
    }

    /// Writes an entry of ours and notes that it is there.
    fn append(self: &Arc<Self>, entry: LedgerEntry) -> BoxFuture<'static, Result<(), SendError>> {
        let (this, sent) = (Arc::clone(self), self.now());
        let written = self.shared.log.append(&self.at, &entry);
        Box::pin(async move {
            let offset = written.await?;
            this.shared.meter.ledger_written(entry.kind.as_str());
            this.book().acknowledged(entry, sent, offset, this.now());
            this.tell();
            Ok(())
        })
    }

    /// Reads the log and renews the lease, as the book says, for as long as there is something to keep.
    async fn keep(self: Arc<Self>) {
        while !self.book().is_over() {
            match self.shared.log.committed(&self.input).await {
                Ok((committed, metadata)) => {
                    self.book().begin_at(replay_from(&metadata), committed);
                    break;
                }
                Err(fault) => {
                    self.complain("could not find from where to read a ledger; will try again", &fault).await
                }
            }
        }
        loop {
            let next = {
                let mut book = self.book();
                if book.is_over() {
                    return;
                }
                book.next(self.now())
            };
            match next {
                Next::Read => self.read().await,
                Next::Renew => {
                    let renewed = LedgerEntry::of_lease(EntryKind::Renewed, &self.owner, self.now_wall_ms());
                    match self.append(renewed).await {
                        Ok(()) => {}
                        Err(SendError::Closed) => return,
                        Err(fault) => {
                            self.complain("could not renew the lease of a ledger; will try again", &fault)
                                .await
                        }
                    }
                }
                Next::Rest(None) => self.wake.notified().await,
                Next::Rest(Some(until)) => {
                    let rest = Duration::from_millis(until.saturating_sub(self.now()));
                    // Woken or not, the book says what comes next.
                    let _ = tokio::time::timeout(rest, self.wake.notified()).await;
                }
            }
        }
    }

    /// The entry that answered a call, read from the log; nothing where it could not be read yet.
    async fn recorded(&self, call: &CallId, offset: i64) -> Option<LedgerEntry> {
        let read = {
            let _one_at_a_time = self.reading.lock().await;
            self.shared.log.read(&self.at, offset, 1).await
        };
        match read {
            Ok(chunk) => {
                let mut entries = chunk.entries.into_iter();
                let found = entries
                    .find(|(_, entry)| entry.kind == EntryKind::Done && entry.call_id.as_ref() == Some(call));
                if found.is_none() {
                    self.complain("a recorded answer is not where it was", &call.as_str()).await;
                }
                found.map(|(_, entry)| entry)
            }
            Err(fault) => {
                self.complain("could not read a recorded answer; will try again", &fault).await;
                None
            }
        }
    }

    async fn read(&self) {
        let _one_at_a_time = self.reading.lock().await;
        let (began, from) = (self.now(), self.book().position());
        match self.shared.log.read(&self.at, from, usize::MAX).await {
            Ok(Chunk { entries, next, at_end, age }) => {
                let now = self.now();
                let there_at = now.saturating_sub(age.as_millis().try_into().unwrap_or(0));
                let (is_first, position) = {
                    let mut book = self.book();
                    let was_caught_up = book.is_caught_up() || book.is_released();
                    book.read(entries, next, at_end, Times { began, there_at, now });
                    (!was_caught_up && book.is_caught_up(), book.position())
                };
                if is_first {
                    self.shared.unread.one_less();
                    info!(ledger = %self.at, position, "a ledger is read");
                }
                self.changed.notify_waiters();
            }
            Err(fault) => self.complain("could not read a ledger; will try again", &fault).await,
        }
    }

    async fn complain(&self, what: &str, fault: &(dyn std::fmt::Display + Sync)) {
        warn!(ledger = %self.at, error = %fault, "{what}");
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// The ledger as one reading of one record sees it.
pub struct RecordLedger {
    /// Absent where the partition is ours no more.
    account: Option<Arc<Account>>,
    source_offset: i64,
    /// Whether it was redriven from dead letters.
    redriven: bool,
    /// The first call that it makes, known to all copies of the record.
    first: Option<CallId>,
    input: String,
    /// Attempt ids whose rows this reading has told.
    told: Mutex<HashSet<String>>,
    /// Tries that were begun and dropped without a word. Their calls count as under way until it is said what became of them.
    dropped: Mutex<Vec<Dropped>>,
}

/// A try that was begun and dropped without a word.
#[derive(Clone)]
struct Dropped {
    call: CallId,
    /// As it was begun.
    row: Attempt,
}

impl RecordLedger {
    /// Waits until no call of the record is under way.
    pub async fn heard_out(&self) {
        let Some(account) = &self.account else { return };
        loop {
            let changed = account.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !account.book().is_running(self.source_offset) {
                return;
            }
            changed.await;
        }
    }

    /// Says what became of tries that the operator dropped. Where its request was taken back or came too late, under this
    /// code, they are closed as failed, with the rows that it recorded of them; else nobody knows whether they were paid for.
    /// Gives rows about tries of which it recorded none.
    pub async fn drop_calls(&self, stop: Option<&str>, recorded: &[Attempt]) -> Vec<Attempt> {
        let mut more = Vec::new();
        while let Some((account, Dropped { call, row })) = self.account.as_ref().zip(self.first_dropped()) {
            if let Some(code) = stop {
                let known = recorded.iter().rfind(|known| known.attempt_id == row.attempt_id).cloned();
                let row = known.unwrap_or_else(|| {
                    let (status, error_code) = ("cancelled".to_owned(), Some(code.to_owned()));
                    more.push(Attempt { status, error_code, ..row.clone() });
                    more[more.len() - 1].clone()
                });
                let closed = self.entry(account, EntryKind::Failed, &call, Some(row.attempt));
                let closed = LedgerEntry { code: Some(code.to_owned()), row: Some(row), ..closed };
                if let Err(fault) = account.append(closed).await {
                    warn!(call = call.as_str(), ledger = %account.at, error = %fault,
                        "could not close a call that was given up; it may look as if it went on");
                }
            }
            self.let_go(&call);
        }
        more
    }

    fn first_dropped(&self) -> Option<Dropped> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner).first().cloned()
    }

    /// Its tries of this call that were dropped are not under way any more.
    fn let_go(&self, call: &CallId) {
        let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        let before = dropped.len();
        dropped.retain(|one| one.call != *call);
        let Some(account) = self.account.as_ref().filter(|_| dropped.len() < before) else { return };
        account.book().ended(call);
        account.tell();
    }

    /// Notes that the record goes to another topic, where its calls are made from now on. Before it goes: delivered here
    /// again, or come here twice, it may only go there again, or both would pay.
    pub async fn moves_to(&self, topic: &str) -> Result<(), SendError> {
        let Some(account) = &self.account else { return Err(SendError::Closed) };
        let mut calls = account.book().calls_of(self.source_offset).unwrap_or_default();
        calls.extend(self.first.clone().filter(|first| !calls.contains(first)));
        let moved = LedgerEntry {
            source_offset: Some(self.source_offset),
            to: Some(topic.to_owned()),
            ..LedgerEntry::of_lease(EntryKind::Moved, &account.owner, account.now_wall_ms())
        };
        crash_point("move");
        for call in &calls {
            account.append(LedgerEntry { call_id: Some(call.clone()), ..moved.clone() }).await?;
        }
        if calls.is_empty() {
            account.append(moved).await?;
        }
        crash_point("moved");
        Ok(())
    }

    /// The topic that the record or another copy of it went to already, where one did, as soon as that can be told.
    pub async fn moved_to(&self) -> Option<String> {
        let Some(account) = &self.account else { return std::future::pending().await };
        loop {
            let changed = account.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let book = account.book();
                if book.is_caught_up() {
                    let gone = || self.first.as_ref().and_then(|first| book.went_to(first));
                    return book.moved_to(self.source_offset).or_else(gone);
                }
            }
            changed.await;
        }
    }

    /// Rows about all calls that the record has made here, those left out that this reading has told of.
    pub fn rows_of_all(&self) -> Vec<Attempt> {
        let Some(account) = &self.account else { return Vec::new() };
        let calls = account.book().calls_of(self.source_offset).unwrap_or_default();
        calls.iter().flat_map(|call| self.rows(account, call)).collect()
    }

    fn asker(&self) -> Asker<'_> {
        Asker { source_offset: self.source_offset, input: &self.input, redriven: self.redriven }
    }

    fn entry(
        &self,
        account: &Arc<Account>,
        kind: EntryKind,
        call: &CallId,
        attempt: Option<i32>,
    ) -> LedgerEntry {
        LedgerEntry {
            call_id: Some(call.clone()),
            attempt,
            source_offset: Some(self.source_offset),
            input: Some(self.input.clone()),
            config: Some(account.shared.config.clone()),
            ..LedgerEntry::of_lease(kind, &account.owner, account.now_wall_ms())
        }
    }

    /// Rows about tries that are over, those left out that were told of.
    fn rows(&self, account: &Account, call: &CallId) -> Vec<Attempt> {
        let rows = account.book().rows(call);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<_> = rows.into_iter().filter(|row| told.insert(row.attempt_id.clone())).collect();
        let ambiguous = new.iter().filter(|row| row.status == "ambiguous").count();
        if ambiguous > 0 {
            account.shared.meter.ledger_ambiguous(ambiguous);
            warn!(call = call.as_str(), ledger = %account.at, ambiguous,
                "a call was under way when its owner vanished; it may have been paid for");
        }
        new
    }
}

impl Drop for RecordLedger {
    fn drop(&mut self) {
        while let Some(Dropped { call, .. }) = self.first_dropped() {
            self.let_go(&call);
        }
    }
}

impl RecordLedger {
    /// The same, with those of the record's other calls that nobody here is making. Nobody asks for a hedge again once its
    /// call is answered, so a crash in between would leave it untold.
    fn rows_with_others(&self, account: &Account, call: &CallId) -> Vec<Attempt> {
        let others = {
            let book = account.book();
            let made = book.calls_of(self.source_offset).unwrap_or_default();
            made.into_iter().filter(|other| other != call && !book.is_making(other)).collect::<Vec<_>>()
        };
        let rows = self.rows(account, call).into_iter();
        rows.chain(others.iter().flat_map(|other| self.rows(account, other))).collect()
    }

    /// What an entry says that answered the call for a record which is done.
    fn replayed<'a>(&self, account: &Account, call: &CallId, entry: LedgerEntry) -> Known<'a> {
        if entry.input.is_some_and(|input| input != self.input) {
            return Known::Refused(differs(call));
        }
        let Some(answer) = entry.answer else { return Known::Refused(too_large()) };
        account.shared.meter.ledger_replayed();
        Known::Answered(serde_json::to_vec(&answer).unwrap_or_default())
    }
}

impl Ledger for RecordLedger {
    fn find<'a>(&'a self, call: &'a CallId) -> BoxFuture<'a, Result<Found<'a>, Failure>> {
        Box::pin(async move {
            // Whoever has lost its partition waits to be dropped: anything else might lead to a call.
            let Some(account) = &self.account else { return std::future::pending().await };
            // Whoever asks again has heard of no end.
            self.let_go(call);
            let asked = Instant::now();
            loop {
                let changed = account.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                let (verdict, term) = {
                    let mut book = account.book();
                    (book.ask(call, self.asker(), account.now()), book.term())
                };
                let refused = |failure| Known::Refused(failure);
                let known = match verdict {
                    Verdict::Wait => {
                        account.wake.notify_one();
                        changed.await;
                        continue;
                    }
                    Verdict::Gone => return std::future::pending().await,
                    Verdict::Answered(Some(answer)) => {
                        account.shared.meter.ledger_replayed();
                        Known::Answered(serde_json::to_vec(&answer).unwrap_or_default())
                    }
                    Verdict::Answered(None) => refused(too_large()),
                    Verdict::Recorded(offset) => match account.recorded(call, offset).await {
                        Some(entry) => self.replayed(account, call, entry),
                        None => continue,
                    },
                    Verdict::Differs => refused(differs(call)),
                    Verdict::Ambiguous => refused(Failure::rejected(
                        "call_ambiguous",
                        format!(
                            "call {} may have been paid for already, and nobody knows its answer; see `forebay ledger show {0}`",
                            call.as_str()
                        ),
                    )),
                    Verdict::Go(attempt) => {
                        account.shared.meter.ledger_waited(asked.elapsed());
                        let (id, begun) = (call.clone(), None);
                        Known::Open { attempt, turn: Box::new(Call { of: self, account, id, begun, term }) }
                    }
                };
                return Ok(Found { rows: self.rows_with_others(account, call), known });
            }
        })
    }
}

fn differs(call: &CallId) -> Failure {
    let message = format!("call {} was paid for with another record of the same id", call.as_str());
    Failure::rejected("ledger_input_differs", message)
}

fn too_large() -> Failure {
    let message = format!(
        "the answer is larger than the {ANSWER_BYTES_MAX} bytes that a ledger keeps; ask for fewer tokens"
    );
    Failure::rejected("answer_too_large", message)
}

fn closed(fault: SendError) -> Failure {
    Failure::outage("ledger_unavailable", "the ledger of paid calls", fault)
}

/// The turn to make a call.
struct Call<'a> {
    of: &'a RecordLedger,
    account: &'a Arc<Account>,
    id: CallId,
    /// The try that is under way.
    begun: Option<Attempt>,
    /// The term of the lease in which it was decided.
    term: u64,
}

impl Call<'_> {
    fn entry(&self, kind: EntryKind, row: Option<Attempt>) -> LedgerEntry {
        let number = self.begun.as_ref().map(|row| row.attempt);
        LedgerEntry { row, ..self.of.entry(self.account, kind, &self.id, number) }
    }

    async fn append(&self, entry: LedgerEntry) -> Result<(), Failure> {
        self.account.append(entry).await.map_err(closed)
    }
}

impl Turn for Call<'_> {
    fn start(&mut self, row: Attempt) -> BoxFuture<'_, Result<bool, Failure>> {
        Box::pin(async move {
            self.begun = Some(row.clone());
            let attempt_id = row.attempt_id.clone();
            crash_point("start");
            self.append(self.entry(EntryKind::Started, Some(row))).await?;
            crash_point("call");
            {
                let book = self.account.book();
                if book.may_send(self.account.now()) && book.term() == self.term {
                    let mut told = self.of.told.lock().unwrap_or_else(PoisonError::into_inner);
                    told.insert(attempt_id);
                    return Ok(true);
                }
            }
            // Somebody else may have come meanwhile.
            let code = Some("not_sent".to_owned());
            let failed = LedgerEntry { code, ..self.entry(EntryKind::Failed, None) };
            self.begun = None;
            self.append(failed).await?;
            Ok(false)
        })
    }

    fn done(&mut self, answer: Vec<u8>, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async move {
            crash_point("done");
            let entry = self.entry(EntryKind::Done, row);
            // From here on its end is known, and on its way.
            self.begun = None;
            if answer.len() <= ANSWER_BYTES_MAX {
                let kept = LedgerEntry { answer: serde_json::from_slice(&answer).ok(), ..entry.clone() };
                match self.account.append(kept).await {
                    Err(SendError::TooLarge { .. }) => {}
                    written => return written.map_err(closed),
                }
            }
            let code = Some("answer_too_large".to_owned());
            self.append(LedgerEntry { code, ..entry }).await?;
            Err(too_large())
        })
    }

    fn failed(&mut self, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async move {
            crash_point("failed");
            let code = row.as_ref().and_then(|row| row.error_code.clone());
            let failed = LedgerEntry { code, ..self.entry(EntryKind::Failed, row) };
            self.begun = None;
            self.append(failed).await
        })
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if let Some(row) = self.begun.take() {
            let mut dropped = self.of.dropped.lock().unwrap_or_else(PoisonError::into_inner);
            return dropped.push(Dropped { call: self.id.clone(), row });
        }
        self.account.book().ended(&self.id);
        self.account.tell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn a_stage_is_ready_when_its_last_ledgers_are_read_at_once() {
        const AT_ONCE: usize = 4;
        let health = Health::new();
        let unread = Unread::new(health.clone(), "ledgers infer".to_owned());
        for round in 0..2_000 {
            (0..AT_ONCE).for_each(|_| unread.one_more());
            assert!(!health.readiness().ok);
            let barrier = Barrier::new(AT_ONCE);
            std::thread::scope(|scope| {
                for _ in 0..AT_ONCE {
                    scope.spawn(|| {
                        barrier.wait();
                        unread.one_less();
                    });
                }
            });
            assert!(health.readiness().ok, "round {round}: {:?}", health.readiness());
        }
    }
}
