//! Owners of one ledger partition, and all that can happen to them, at random moments of virtual time: they crash between
//! any two steps, stand still, are given up by the group without hearing of it, and wait for acknowledgements that come
//! late or never; the log is compacted under them. Some calls are given up by their clients. Some records come twice, and the
//! second may come when the first is done.
//!
//! Oracle: a call is sent a second time only if each earlier sending was closed as failed, or is told of as ambiguous by
//! whoever sends; and each time under another number. A call whose record is over is closed in the log, unless its owner crashed.
//! The residual that is promised no better, an owner that stands still between its look at the clock and the socket, is made
//! to happen too and counted apart.

use super::book::{AMBIGUOUS_MAX, Asker, Book, Next, Terms, Times, Verdict};
use forebay_schemas::{Attempt, CallId, EntryKind, LedgerEntry, RequestId, Tenant};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Seeds of a run; `FOREBAY_SEEDS` says otherwise.
const SEEDS: u64 = 500;

/// Seeds that once failed.
const FAILED: &[u64] = &[1, 16, 2_485, 5_957, 10_572];

const TICK_MS: u64 = 25;
const SESSION_MS: u64 = 4_000;

/// Which call the record at each offset makes.
const CALLS: [i64; 8] = [0, 1, 0, 2, 1, 3, 4, 3];
const RECORDS: i64 = 8;

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// How long the log takes: mostly little, now and then longer than a lease.
    fn log_ms(&mut self) -> u64 {
        if self.one_in(40) { self.below(6_000) } else { self.below(60) }
    }
}

/// What an owner waits for to be acknowledged.
struct Sent {
    entry: LedgerEntry,
    sent: u64,
    appended_at: u64,
    acknowledged_at: u64,
    offset: Option<i64>,
    /// The record whose task waits for it.
    record: Option<i64>,
}

/// Where a record is.
#[derive(Clone, Debug, PartialEq)]
enum Task {
    Asks,
    Starting {
        number: i32,
        term: u64,
        told: BTreeSet<String>,
    },
    /// It looked at the clock and stood still before the socket.
    Stuck {
        number: i32,
        told: BTreeSet<String>,
        looked_at: u64,
    },
    Calling {
        number: i32,
        until: u64,
        fails: bool,
    },
    Closing {
        over: bool,
    },
    Finished,
}

/// When a read began, since when all that it gives was there, when it is answered, what it gives, and the next offset.
type Reading = (u64, u64, u64, Vec<(i64, LedgerEntry)>, i64);

struct Owner {
    book: Book,
    /// The clocks of two machines differ.
    clock_ms: u64,
    tasks: BTreeMap<i64, Task>,
    sent: VecDeque<Sent>,
    reading: Option<Reading>,
    stalled_until: u64,
    /// When it hears that the partition is not its own any more.
    hears_at: Option<u64>,
    crashed: bool,
}

#[derive(Clone)]
struct Sending {
    attempt: String,
    number: i32,
    failed: bool,
}

#[derive(Default)]
struct Seen {
    sendings: usize,
    given_up: usize,
    ambiguous: usize,
    residual: usize,
    dead: usize,
}

struct World {
    dice: Dice,
    now: u64,
    log: Vec<Option<LedgerEntry>>,
    /// When its last entry came.
    last_entry_at: u64,
    owners: Vec<Owner>,
    /// Who the group says it is, or when somebody will be.
    assigned: Result<usize, u64>,
    comes_at: BTreeMap<i64, u64>,
    committed: i64,
    replay_from: Option<i64>,
    finished: BTreeSet<i64>,
    /// By their call.
    sendings: BTreeMap<i64, Vec<Sending>>,
    /// Tries that the log says were started and not how they ended: owner, record, number.
    open: BTreeSet<(String, i64, i32)>,
    seen: Seen,
}

fn call_of(record: i64) -> i64 {
    CALLS[usize::try_from(record).unwrap()]
}

fn call(record: i64) -> CallId {
    let id = RequestId::try_from(format!("r{}", call_of(record))).unwrap();
    CallId::new("c", &Tenant::default(), &id, 0, "infer", 0, 0)
}

fn row(owner: &str, number: i32) -> Attempt {
    Attempt {
        attempt_id: format!("{owner}/{number}"),
        call_id: String::new(),
        request_id: String::new(),
        tenant: String::new(),
        generation: 0,
        stage: String::new(),
        attempt: number,
        started_at: 0,
        duration_us: 0,
        ttft_us: None,
        provider: String::new(),
        endpoint: None,
        model: None,
        status: "ok".to_owned(),
        error_code: None,
        http_status: None,
        input_tokens: None,
        output_tokens: None,
        cost_nano_usd: Some(1),
        tier: None,
        cached_read_tokens: None,
        cached_write_tokens: None,
        reasoning_tokens: None,
        key_id: None,
        job: None,
        operation: None,
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let comes_at = (0..RECORDS).map(|record| (record, 1_000 + dice.below(30_000))).collect();
        let mut world = Self {
            dice,
            comes_at,
            now: 1_000,
            log: Vec::new(),
            last_entry_at: 1_000,
            owners: Vec::new(),
            assigned: Err(1_000),
            committed: 0,
            replay_from: None,
            finished: BTreeSet::new(),
            sendings: BTreeMap::new(),
            open: BTreeSet::new(),
            seen: Seen::default(),
        };
        world.follow_group();
        world
    }

    fn follow_group(&mut self) {
        let Err(at) = self.assigned else { return };
        if self.now < at {
            return;
        }
        let number = self.owners.len();
        let from = self.replay_from.unwrap_or(0);
        let max = if self.dice.one_in(4) { 0 } else { AMBIGUOUS_MAX };
        let tasks = (self.committed..RECORDS).map(|record| (record, Task::Asks)).collect();
        let mut book = Book::new(&format!("o{number}"), max, 3, Terms::default());
        book.begin_at(from, self.committed);
        self.owners.push(Owner {
            book,
            clock_ms: self.dice.below(1_000_000),
            tasks,
            sent: VecDeque::new(),
            reading: None,
            stalled_until: 0,
            hears_at: None,
            crashed: false,
        });
        self.assigned = Ok(number);
    }

    /// Something happens to whoever is assigned.
    fn befall(&mut self) {
        let Ok(number) = self.assigned else { return };
        let kind = self.dice.below(6);
        let (long, late) = (self.dice.below(9_000), self.dice.below(3_000));
        let owner = &mut self.owners[number];
        match kind {
            // Killed: what it had on its way may still arrive.
            0 | 1 => {
                owner.crashed = true;
                owner.sent.retain(|one| one.offset.is_none() && !self.dice.one_in(3));
                self.assigned = Err(self.now + SESSION_MS);
            }
            // It stands still; beyond a session the group gives it up, and it hears of that late.
            2 | 3 => {
                owner.stalled_until = self.now + long;
                if long > SESSION_MS {
                    owner.hears_at = Some(self.now + long + late);
                    self.assigned = Err(self.now + SESSION_MS);
                }
            }
            // Cut off from the group only: it goes on for a while.
            4 => {
                owner.hears_at = Some(self.now + late * 3);
                self.assigned = Err(self.now);
            }
            // A rebalance: it gives up in order, and its calls go on.
            _ => {
                self.commit(number);
                self.release(number);
                self.assigned = Err(self.now + late / 4);
            }
        }
    }

    fn release(&mut self, number: usize) {
        self.owners[number].book.release();
        let entry = self.entry(number, EntryKind::Released, None, None);
        self.send(number, entry, None);
    }

    fn commit(&mut self, number: usize) {
        let owner = &mut self.owners[number];
        let unfinished = owner.tasks.iter().find(|(_, task)| **task != Task::Finished);
        let reached = unfinished.map_or(RECORDS, |(record, _)| *record).max(self.committed);
        let replay_from = owner.book.committed(reached);
        // The group refuses whoever is not a member.
        if self.assigned == Ok(number) && owner.book.is_caught_up() {
            (self.committed, self.replay_from) = (reached, Some(replay_from));
        }
    }

    fn entry(
        &self,
        number: usize,
        kind: EntryKind,
        record: Option<i64>,
        attempt: Option<i32>,
    ) -> LedgerEntry {
        let owner = self.owners[number].book.owner();
        LedgerEntry {
            call_id: record.map(call),
            attempt,
            source_offset: record,
            row: attempt.map(|attempt| row(owner, attempt)),
            ..LedgerEntry::of_lease(kind, owner, 0)
        }
    }

    fn send(&mut self, number: usize, entry: LedgerEntry, record: Option<i64>) {
        let before = self.owners[number].sent.back().map_or(0, |one| one.appended_at);
        let appended_at = before.max(self.now + self.dice.log_ms());
        let acknowledged_at = appended_at + self.dice.log_ms();
        let sent = self.now + self.owners[number].clock_ms;
        let one = Sent { entry, sent, appended_at, acknowledged_at, offset: None, record };
        self.owners[number].sent.push_back(one);
    }

    fn tick(&mut self) -> Result<(), String> {
        self.now += TICK_MS;
        for number in 0..self.owners.len() {
            for at in 0..self.owners[number].sent.len() {
                let one = &mut self.owners[number].sent[at];
                if one.offset.is_none() && one.appended_at <= self.now {
                    one.offset = Some(i64::try_from(self.log.len()).unwrap());
                    self.log.push(Some(one.entry.clone()));
                    self.last_entry_at = self.now;
                    let LedgerEntry { owner, source_offset, attempt, kind, .. } = one.entry.clone();
                    if let Some(key) =
                        source_offset.zip(attempt).map(|(record, number)| (owner, record, number))
                    {
                        match kind {
                            EntryKind::Started => _ = self.open.insert(key),
                            _ => _ = self.open.remove(&key),
                        }
                    }
                }
            }
        }
        if self.dice.one_in(200) {
            self.compact();
        }
        self.follow_group();
        for number in 0..self.owners.len() {
            let owner = &self.owners[number];
            if owner.crashed || owner.stalled_until > self.now {
                continue;
            }
            if owner.hears_at.is_some_and(|at| at <= self.now) && !owner.book.is_over() {
                self.owners[number].hears_at = None;
                self.release(number);
            }
            self.follow_log(number);
            for record in self.owners[number].tasks.keys().copied().collect::<Vec<_>>() {
                self.advance(number, record)?;
            }
            if self.dice.one_in(8) && self.assigned == Ok(number) {
                self.commit(number);
            }
        }
        Ok(())
    }

    fn compact(&mut self) {
        let mut last = BTreeMap::new();
        for (offset, entry) in self.log.iter().enumerate() {
            if let Some(entry) = entry {
                last.insert(entry.message_key(), offset);
            }
        }
        for (offset, entry) in self.log.iter_mut().enumerate() {
            if entry.as_ref().is_some_and(|entry| last[&entry.message_key()] != offset) {
                *entry = None;
            }
        }
    }

    fn follow_log(&mut self, number: usize) {
        let now = self.now + self.owners[number].clock_ms;
        loop {
            let owner = &mut self.owners[number];
            let Some(first) = owner.sent.front() else { break };
            if first.acknowledged_at > self.now || first.offset.is_none() {
                break;
            }
            let Some(one) = owner.sent.pop_front() else { break };
            owner.book.acknowledged(one.entry, one.sent, one.offset.unwrap_or(0), now);
            if let Some(record) = one.record {
                self.acknowledged(number, record);
            }
        }
        let owner = &mut self.owners[number];
        if let Some((began, there_at, until, entries, position)) = owner.reading.take() {
            if until <= self.now {
                owner.book.read(entries, position, true, Times { began, there_at, now });
            } else {
                owner.reading = Some((began, there_at, until, entries, position));
                return;
            }
        }
        match owner.book.next(now) {
            Next::Read => {
                let from = usize::try_from(owner.book.position()).unwrap();
                let entries = self.log.iter().enumerate().skip(from);
                let entries =
                    entries.filter_map(|(at, one)| Some((i64::try_from(at).unwrap(), one.clone()?)));
                let end = i64::try_from(self.log.len()).unwrap();
                // Half of them have listened, now and then, to where the log ends.
                let heard_at = match self.dice.one_in(2) {
                    true => self.last_entry_at + self.dice.below(1_000) + owner.clock_ms,
                    false => now,
                };
                owner.reading =
                    Some((now, heard_at.min(now), self.now + self.dice.log_ms(), entries.collect(), end));
            }
            Next::Renew if !owner.sent.iter().any(|one| one.entry.kind == EntryKind::Renewed) => {
                let entry = self.entry(number, EntryKind::Renewed, None, None);
                self.send(number, entry, None);
            }
            Next::Renew | Next::Rest(_) => {}
        }
    }

    /// What a record's task waited for is acknowledged.
    fn acknowledged(&mut self, number: usize, record: i64) {
        let now = self.now + self.owners[number].clock_ms;
        let owner = &mut self.owners[number];
        let task = owner.tasks[&record].clone();
        let next = match task {
            Task::Starting { number: attempt, term, told } => {
                if !owner.book.may_send(now) || owner.book.term() != term {
                    owner.tasks.insert(record, Task::Closing { over: false });
                    let mut entry = self.entry(number, EntryKind::Failed, Some(record), Some(attempt));
                    entry.row = None;
                    return self.send(number, entry, Some(record));
                }
                if self.dice.one_in(50) {
                    owner.stalled_until = self.now + self.dice.below(6_000);
                }
                Task::Stuck { number: attempt, told, looked_at: self.now }
            }
            Task::Closing { over } => {
                owner.book.ended(&call(record));
                if over { Task::Finished } else { Task::Asks }
            }
            task => task,
        };
        if next == Task::Finished {
            self.finished.insert(record);
        }
        self.owners[number].tasks.insert(record, next);
    }

    fn advance(&mut self, number: usize, record: i64) -> Result<(), String> {
        let now = self.now + self.owners[number].clock_ms;
        let task = self.owners[number].tasks[&record].clone();
        let next = match task {
            Task::Asks => {
                // Records come over time, so that two owners meet over one that neither knows.
                if self.now < self.comes_at[&record] || self.dice.one_in(2) {
                    return Ok(());
                }
                let book = &mut self.owners[number].book;
                let asker = Asker { source_offset: record, input: "", redriven: false };
                match book.ask(&call(record), asker, now) {
                    Verdict::Wait | Verdict::Gone => return Ok(()),
                    Verdict::Answered(_) | Verdict::Recorded(_) => {
                        self.finished.insert(record);
                        Task::Finished
                    }
                    Verdict::Ambiguous => {
                        self.seen.dead += 1;
                        self.finished.insert(record);
                        Task::Finished
                    }
                    Verdict::Go(attempt) => {
                        let told = book.rows(&call(record));
                        let told = told.into_iter().filter(|row| row.status == "ambiguous");
                        let told: BTreeSet<_> = told.map(|row| row.attempt_id).collect();
                        self.seen.ambiguous += told.len();
                        let term = book.term();
                        let entry = self.entry(number, EntryKind::Started, Some(record), Some(attempt));
                        self.send(number, entry, Some(record));
                        Task::Starting { number: attempt, term, told }
                    }
                    Verdict::Differs => return Err("it differs".to_owned()),
                }
            }
            Task::Stuck { .. } if self.owners[number].stalled_until > self.now => return Ok(()),
            Task::Stuck { number: attempt, told, looked_at } => {
                let sendings = self.sendings.entry(call_of(record)).or_default();
                let unexplained: Vec<_> = sendings
                    .iter()
                    .filter(|one| !one.failed && !told.contains(&one.attempt))
                    .map(|one| one.attempt.clone())
                    .collect();
                let attempt_id = format!("{}/{attempt}", self.owners[number].book.owner());
                if !unexplained.is_empty() || sendings.iter().any(|one| one.number == attempt) {
                    if self.now - looked_at < Terms::default().margin_ms {
                        let call = call_of(record);
                        return Err(format!(
                            "{attempt_id} of call {call}, record {record}, is sent after {unexplained:?}"
                        ));
                    }
                    self.seen.residual += 1;
                }
                sendings.push(Sending { attempt: attempt_id, number: attempt, failed: false });
                self.seen.sendings += 1;
                let until = self.now
                    + if self.dice.one_in(5) { self.dice.below(9_000) } else { self.dice.below(400) };
                Task::Calling { number: attempt, until, fails: self.dice.one_in(4) }
            }
            Task::Calling { number: attempt, until, fails } if until <= self.now => {
                // A call that is given up ends its record, and nobody asks for it again but who has not heard of that.
                let given_up = self.dice.one_in(8);
                let kind = if fails || given_up { EntryKind::Failed } else { EntryKind::Done };
                let entry = self.entry(number, kind, Some(record), Some(attempt));
                self.seen.given_up += usize::from(given_up);
                if kind == EntryKind::Failed {
                    let id = format!("{}/{attempt}", self.owners[number].book.owner());
                    let sendings = self.sendings.entry(call_of(record)).or_default();
                    sendings.iter_mut().filter(|one| one.attempt == id).for_each(|one| one.failed = true);
                }
                self.send(number, entry, Some(record));
                Task::Closing { over: !fails || given_up }
            }
            _ => return Ok(()),
        };
        self.owners[number].tasks.insert(record, next);
        Ok(())
    }
}

impl World {
    fn check_closed(self) -> Result<Seen, String> {
        for owner in self.owners.iter().filter(|owner| !owner.crashed) {
            let over = owner.tasks.iter().filter(|(_, task)| **task == Task::Finished);
            for (record, _) in over {
                let left = |(of, at, _): &&(String, i64, i32)| **of == **owner.book.owner() && at == record;
                if let Some(open) = self.open.iter().find(left) {
                    return Err(format!("{open:?} is not closed, though its record is over"));
                }
            }
        }
        Ok(self.seen)
    }
}

fn simulate(seed: u64) -> Result<Seen, String> {
    let mut world = World::new(seed);
    let peaceful_from = world.now + 40_000;
    while world.now < peaceful_from + 60_000 {
        world.tick()?;
        if world.now < peaceful_from && world.dice.one_in(120) {
            world.befall();
        }
        if world.committed == RECORDS && world.now > peaceful_from {
            return world.check_closed();
        }
    }
    let tasks: Vec<_> =
        world.owners.last().map(|owner| format!("{:?} {:?}", owner.tasks, owner.book)).into_iter().collect();
    Err(format!("stuck: {:?} finished, committed {}; {tasks:?}", world.finished, world.committed))
}

#[test]
fn no_call_is_sent_again_unless_it_failed_or_is_told_of_as_ambiguous() {
    let seeds = std::env::var("FOREBAY_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    let (mut failed, mut all) = (Vec::new(), Seen::default());
    for seed in FAILED.iter().copied().chain(0..seeds) {
        match simulate(seed) {
            Ok(seen) => {
                all.sendings += seen.sendings;
                all.given_up += seen.given_up;
                all.ambiguous += seen.ambiguous;
                all.residual += seen.residual;
                all.dead += seen.dead;
            }
            Err(fault) => failed.push(format!("seed {seed}: {fault}")),
        }
    }
    println!(
        "{seeds} seeds: {} calls sent, {} given up by clients, {} told of as ambiguous, {} given up; {} repeats after standing still before the socket",
        all.sendings, all.given_up, all.ambiguous, all.dead, all.residual
    );
    assert!(failed.is_empty(), "{} failed: {:#?}", failed.len(), &failed[..failed.len().min(3)]);
    assert!(all.ambiguous > 0 && all.dead > 0, "nothing befell anybody");
}
