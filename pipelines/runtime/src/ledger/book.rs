//! What one owner knows of one ledger partition, and what it may do: the protocol, without its log.
//!
//! An owner is one assignment of one partition to one process. It may send a call only while it holds the *lease*, and
//! it holds that as long as each entry of its own is acknowledged within the ttl, less a margin, of the one before. Who
//! takes over reads on until the others have been silent for a ttl on its own clock, then writes a claim and reads up to
//! it. Whoever lost the thread does the same, and finds the claim. So no clocks are compared, and of two that take
//! each other for gone the log shows one to the other before it sends.
//!
//! Invariants: a call is sent while no other try of it may be under way, or after that try was closed as failed or is
//! told of as *ambiguous*. What is kept is what records at or beyond the committed offset need, and how the last calls before
//! it ended: of a record that is done a copy may come.
//! Residual: an owner that stands still between its last look at the clock and the write to the socket.
//!
//! Sans-IO: nothing here reads, writes or waits. Moments are milliseconds of a clock that goes on while the machine is
//! suspended.

use forebay_schemas::{Attempt, CallId, EntryKind, LedgerEntry};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

/// The times of a lease, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// How long an owner that is not heard is taken to be alive.
    pub ttl_ms: u64,
    /// How much earlier it must itself stop to send: covers the way from its look at the clock to the socket.
    pub margin_ms: u64,
    /// How often it says that it is alive, while it has calls.
    pub renew_every_ms: u64,
    /// How long after its last call it goes on to say so: an idle partition writes nothing.
    pub idle_after_ms: u64,
    /// How often the log is looked at while somebody else is waited for.
    pub look_every_ms: u64,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            ttl_ms: 3_000,
            margin_ms: 1_000,
            renew_every_ms: 1_000,
            idle_after_ms: 10_000,
            look_every_ms: 100,
        }
    }
}

/// How many ambiguous tries of one call are followed by another, where they are tried again.
pub const AMBIGUOUS_MAX: usize = 2;

/// How many tries of one call are remembered: an outage makes many.
const TRIES_MAX: usize = 32;

/// The times of one read of the log.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// When it began.
    pub began: u64,
    /// When all that it gave was there already: what is read late is not heard late.
    pub there_at: u64,
    /// When it was given.
    pub now: u64,
}

/// What to do next about the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Read on from [`Book::position`].
    Read,
    /// Write that we are alive.
    Renew,
    /// Nothing before this moment, or until something is asked.
    Rest(Option<u64>),
}

/// Who asks about a call.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// The record that makes it.
    pub source_offset: i64,
    /// A hash of what it says.
    pub input: &'a str,
    /// Whether somebody had it tried once more after it was given up: ambiguous tries before it count no more.
    pub redriven: bool,
}

/// What may be done about a call.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Nothing yet: the lease is not ours, or somebody may be making it.
    Wait,
    /// It was answered. `None` where the answer was too large to be kept.
    Answered(Option<Value>),
    /// It was answered for a record that is done; the answer stands in the entry at this offset.
    Recorded(i64),
    /// It was answered, but for another record.
    Differs,
    /// It may have been paid for too often already.
    Ambiguous,
    /// It may be sent, as the try of this number.
    Go(i32),
    /// The partition is ours no more.
    Gone,
}

/// How a try is closed.
#[derive(Clone, Debug, PartialEq)]
enum Closed {
    Failed,
    Done,
}

#[derive(Clone, Debug)]
struct Try {
    owner: Arc<str>,
    number: i32,
    /// The record that made it.
    source_offset: i64,
    /// As it stands in the ledger; absent where it was never sent.
    row: Option<Attempt>,
    closed: Option<Closed>,
}

#[derive(Debug)]
struct Answer {
    offset: i64,
    input: Option<String>,
    value: Option<Value>,
}

/// One call.
#[derive(Debug)]
struct Call {
    /// The highest offset of a record that makes it.
    source_offset: i64,
    /// Its first entry.
    first: i64,
    tries: Vec<Try>,
    answer: Option<Answer>,
    /// Whether this owner is making it, or about to.
    running: bool,
    /// Under which offset it stands among those whose records are done, where it does.
    over: Option<i64>,
}

impl Call {
    /// Whether nobody makes it any more, where all records before this offset are done.
    fn is_over(&self, committed: i64) -> bool {
        !self.running && self.source_offset < committed
    }
}

/// Another owner.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Its last entry, and when that was there at the latest.
    offset: i64,
    at: u64,
    /// It sends no more calls; those that are open go on.
    released: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Lease {
    No,
    /// Claimed by the entry at `offset`, which was sent at `at`; what lies before it is not all read.
    Claimed {
        at: u64,
        offset: i64,
        disputed: bool,
    },
    /// Ours, by an acknowledged entry that was sent at `at`.
    Held {
        at: u64,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Book {
    me: Arc<str>,
    terms: Terms,
    ambiguous_max: usize,
    /// The next offset to read.
    position: i64,
    /// When the last read began that came to the end of the log; `None` before the first.
    read_at: Option<u64>,
    /// When the log was last looked at.
    looked_at: u64,
    lease: Lease,
    /// Counts how often the lease was got.
    term: u64,
    /// My last acknowledged entry.
    mine: Option<i64>,
    /// When a call was last asked for or under way.
    wanted_at: Option<u64>,
    owners: BTreeMap<Arc<str>, Seen>,
    /// Calls of records that are not done, and the last of those that ended without an answer: what comes twice must not make
    /// again what was given up, nor number its tries anew.
    calls: HashMap<CallId, Call>,
    /// Where the answers of the last calls stand whose records are done.
    finished: HashMap<CallId, i64>,
    /// The last calls whose records are done, answered or not, by the offsets of these records, so that each owner remembers the
    /// same: what comes twice, since a step before this one crashed, may come after its first copy is done.
    order: BTreeSet<(i64, CallId)>,
    finished_max: usize,
    /// All records before this offset of the input are done.
    committed: i64,
    /// Records that went to another topic: by their offset, the entry that says so, and the topic.
    moved: BTreeMap<i64, (i64, String)>,
    /// Where the last calls went that are made on another topic since: the entry that says so, and the topic. As many as are
    /// finished are remembered, for the same reason.
    gone: HashMap<CallId, (i64, String)>,
    gone_order: VecDeque<CallId>,
    released: bool,
}

impl Book {
    /// A book of this owner. After more than `ambiguous_max` ambiguous tries a call is not made again; so many calls whose
    /// records are done are remembered.
    pub fn new(me: &str, ambiguous_max: usize, finished_max: usize, terms: Terms) -> Self {
        Self {
            me: me.into(),
            terms,
            ambiguous_max,
            position: 0,
            read_at: None,
            looked_at: 0,
            lease: Lease::No,
            term: 0,
            mine: None,
            wanted_at: None,
            owners: BTreeMap::new(),
            calls: HashMap::new(),
            finished: HashMap::new(),
            order: BTreeSet::new(),
            finished_max,
            committed: 0,
            moved: BTreeMap::new(),
            gone: HashMap::new(),
            gone_order: VecDeque::new(),
            released: false,
        }
    }

    /// The same, beginning to read at this offset, where the records before `committed` are done.
    pub fn begin_at(&mut self, position: i64, committed: i64) {
        if self.read_at.is_none() {
            (self.position, self.committed) = (position, committed);
        }
    }

    /// The owner.
    pub fn owner(&self) -> &Arc<str> {
        &self.me
    }

    /// The next offset to read.
    pub fn position(&self) -> i64 {
        self.position
    }

    /// Whether everything that the log held at the beginning is read.
    pub fn is_caught_up(&self) -> bool {
        self.read_at.is_some()
    }

    /// Whether the partition is given up.
    pub fn is_released(&self) -> bool {
        self.released
    }

    /// Whether nothing is left to do: the partition is given up and no call of ours is under way.
    pub fn is_over(&self) -> bool {
        self.released && !self.any_running()
    }

    /// Counts how often the lease was got: what was decided in another term must be decided anew.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Whether a call may be sent at this moment.
    pub fn may_send(&self, now: u64) -> bool {
        !self.released && matches!(self.lease, Lease::Held { at } if now < self.lapses_at(at))
    }

    /// What to do next about the log.
    pub fn next(&mut self, now: u64) -> Next {
        if let Lease::Held { at } = self.lease
            && now >= self.lapses_at(at)
        {
            self.lose();
        }
        if self.any_running() {
            self.wanted_at = Some(now);
        }
        if self.released {
            return match self.lease {
                Lease::Held { at } if self.any_running() => self.renew_or_rest(at, now),
                // Calls of ours go on without a lease: there is nobody left to tell.
                _ => Next::Rest(None),
            };
        }
        if self.read_at.is_none() {
            return Next::Read;
        }
        match self.lease {
            Lease::Claimed { .. } => Next::Read,
            Lease::No if !self.is_wanted(now) => Next::Rest(None),
            Lease::No if self.owners.values().any(|seen| !seen.released && !self.is_silent(seen)) => {
                self.look_or_rest(now)
            }
            Lease::No => Next::Renew,
            Lease::Held { at } if self.is_anybody_open() => match self.renew_or_rest(at, now) {
                Next::Rest(until) => match self.look_or_rest(now) {
                    Next::Rest(look) => Next::Rest(until.min(look).or(look)),
                    read => read,
                },
                renew => renew,
            },
            Lease::Held { at } => self.renew_or_rest(at, now),
        }
    }

    /// Takes in what was read: entries with their offsets, up to `position`. `at_end` where the log ended there.
    pub fn read(
        &mut self,
        entries: impl IntoIterator<Item = (i64, LedgerEntry)>,
        position: i64,
        at_end: bool,
        Times { began, there_at, now }: Times,
    ) {
        self.looked_at = now;
        for (offset, entry) in entries {
            // What is mine I know from its acknowledgement.
            if offset < self.position || *entry.owner == *self.me {
                continue;
            }
            let released = entry.kind == EntryKind::Released;
            let owner: Arc<str> = entry.owner.as_str().into();
            let seen = self.owners.entry(owner).or_insert(Seen { offset, at: there_at, released });
            (seen.offset, seen.at, seen.released) = (offset, there_at, seen.released || released);
            if let Lease::Claimed { offset: claim, disputed, .. } = &mut self.lease {
                *disputed |= offset < *claim && !seen.released;
            }
            self.apply(offset, entry);
        }
        self.position = self.position.max(position);
        if at_end {
            self.read_at = Some(began);
        }
        if let Lease::Claimed { at, offset, disputed } = self.lease
            && self.position > offset
        {
            let stands = !disputed && now < self.lapses_at(at);
            self.lease = if stands { Lease::Held { at } } else { Lease::No };
            self.term += u64::from(stands);
        }
        self.forget_owners();
    }

    /// An entry of ours, sent at `sent`, is acknowledged at this offset.
    pub fn acknowledged(&mut self, entry: LedgerEntry, sent: u64, offset: i64, now: u64) {
        match self.lease {
            Lease::Held { at } if now < self.lapses_at(at) => self.lease = Lease::Held { at: at.max(sent) },
            // Too late: this one does not belong to the chain any more.
            Lease::Held { .. } => self.lose(),
            Lease::No if entry.kind == EntryKind::Renewed && !self.released => {
                self.lease = Lease::Claimed { at: sent, offset, disputed: false };
            }
            Lease::No | Lease::Claimed { .. } => {}
        }
        self.mine = self.mine.max(Some(offset));
        self.apply(offset, entry);
    }

    /// What may be done about a call; `Go` reserves it.
    pub fn ask(&mut self, id: &CallId, asker: Asker<'_>, now: u64) -> Verdict {
        let Asker { source_offset, input, redriven } = asker;
        if self.released {
            return Verdict::Gone;
        }
        self.wanted_at = Some(now);
        if self.read_at.is_none() {
            return Verdict::Wait;
        }
        if let Some(offset) = self.finished.get(id) {
            return Verdict::Recorded(*offset);
        }
        let may_send = self.may_send(now);
        let Some(call) = self.calls.get(id) else {
            if !may_send {
                return Verdict::Wait;
            }
            let first = self.mine.unwrap_or(self.position);
            let call =
                Call { source_offset, first, tries: Vec::new(), answer: None, running: true, over: None };
            self.calls.insert(id.clone(), call);
            return Verdict::Go(0);
        };
        if let Some(answer) = &call.answer {
            let differs = answer.input.as_deref().is_some_and(|known| known != input);
            return if differs { Verdict::Differs } else { Verdict::Answered(answer.value.clone()) };
        }
        let mut open = call.tries.iter().filter(|one| one.closed.is_none());
        if !may_send || call.running || open.any(|one| self.may_be_under_way(one)) {
            return Verdict::Wait;
        }
        let counts = |one: &&Try| one.closed.is_none() && (!redriven || one.source_offset >= source_offset);
        let ambiguous = call.tries.iter().filter(counts).count();
        if ambiguous > self.ambiguous_max {
            return Verdict::Ambiguous;
        }
        let number = call.tries.iter().map(|one| one.number.saturating_add(1)).max().unwrap_or(0);
        if let Some(call) = self.calls.get_mut(id) {
            call.running = true;
            call.source_offset = call.source_offset.max(source_offset);
        }
        Verdict::Go(number)
    }

    /// Rows about the tries of a call that are over, one for each that may have been sent. Those that nobody closed are
    /// ambiguous.
    pub fn rows(&self, id: &CallId) -> Vec<Attempt> {
        let tries = self.calls.get(id).map(|call| call.tries.as_slice()).unwrap_or_default();
        let row = |one: &Try| {
            let mut row = one.row.clone()?;
            if one.closed.is_none() {
                "ambiguous".clone_into(&mut row.status);
                row.cost_nano_usd = None;
            }
            Some(row)
        };
        tries.iter().filter_map(row).collect()
    }

    /// Whether the record at this offset makes a call at this moment.
    pub fn is_running(&self, source_offset: i64) -> bool {
        self.calls.values().any(|call| call.running && call.source_offset == source_offset)
    }

    /// Whether this owner is making the call, or about to.
    pub fn is_making(&self, id: &CallId) -> bool {
        self.calls.get(id).is_some_and(|call| call.running)
    }

    /// The calls that the record at this offset is known to have made; `None` before that can be told.
    pub fn calls_of(&self, source_offset: i64) -> Option<Vec<CallId>> {
        self.read_at?;
        let made = self.calls.iter().filter(|(_, call)| call.source_offset == source_offset);
        Some(
            made.filter(|(_, call)| call.answer.is_some() || !call.tries.is_empty())
                .map(|(id, _)| id.clone())
                .collect(),
        )
    }

    /// The topic that the record at this offset went to already, where it did.
    pub fn moved_to(&self, source_offset: i64) -> Option<String> {
        self.moved.get(&source_offset).map(|(_, to)| to.clone())
    }

    /// The topic on which a call is made since a record that makes it went there.
    pub fn went_to(&self, id: &CallId) -> Option<String> {
        self.gone.get(id).map(|(_, to)| to.clone())
    }

    /// Whether a call was made here, or is made elsewhere since: of whichever copy of its record.
    pub fn knows(&self, id: &CallId) -> bool {
        let is_made = |call: &Call| call.running || call.answer.is_some() || !call.tries.is_empty();
        self.calls.get(id).is_some_and(is_made)
            || self.finished.contains_key(id)
            || self.gone.contains_key(id)
    }

    /// Whether others have heard of this owner.
    pub fn has_written(&self) -> bool {
        self.mine.is_some()
    }

    /// This owner makes the call no more: it is closed, or was given up without a word.
    pub fn ended(&mut self, id: &CallId) {
        if let Some(call) = self.calls.get_mut(id) {
            call.running = false;
        }
    }

    /// The partition is given up: no call is sent any more.
    pub fn release(&mut self) {
        self.released = true;
    }

    /// All records before this offset of the input are done: what only they needed is forgotten, but for how the last of their
    /// calls ended. Gives the offset from which whoever comes after must read.
    pub fn committed(&mut self, source_offset: i64) -> i64 {
        self.committed = self.committed.max(source_offset);
        self.finish_what_is_over();
        self.moved = self.moved.split_off(&source_offset);
        self.forget_owners();
        let calls = self.calls.values().map(|call| call.first);
        let owners = self.owners.values().map(|seen| seen.offset);
        // Before a claim stands lies what was never read; while it does, only what others still have open, which is read at once.
        let unread = (!matches!(self.lease, Lease::Held { .. })).then_some(self.position);
        // My last entry says that I am alive.
        let moved = self.moved.values().map(|(offset, _)| *offset);
        let gone = self.gone.values().map(|(offset, _)| *offset);
        let moved = moved.chain(gone).chain(self.finished.values().copied());
        calls.chain(owners).chain(moved).chain(self.mine).chain(unread).min().unwrap_or(self.position)
    }

    fn finish_what_is_over(&mut self) {
        let is_new = |call: &Call| call.is_over(self.committed) && call.over != Some(call.source_offset);
        let over = self.calls.iter().filter(|(_, call)| is_new(call));
        let over: Vec<_> = over.map(|(id, call)| (call.source_offset, id.clone())).collect();
        for (source_offset, id) in over {
            let Some(call) = self.calls.get_mut(&id) else { continue };
            if let Some(Answer { offset, .. }) = call.answer {
                self.finish(id, source_offset, offset);
            } else if call.tries.is_empty() {
                self.calls.remove(&id);
            } else {
                let before = call.over.replace(source_offset);
                before.map(|before| self.order.remove(&(before, id.clone())));
                self.order.insert((source_offset, id));
            }
        }
        self.forget_finished();
    }

    /// Its records are done, of which the last stood there, and this entry answered it.
    fn finish(&mut self, id: CallId, source_offset: i64, offset: i64) {
        let before = self.calls.remove(&id).and_then(|call| call.over);
        before.map(|before| self.order.remove(&(before, id.clone())));
        if self.finished.insert(id.clone(), offset).is_none() {
            self.order.insert((source_offset, id));
        }
    }

    fn forget_finished(&mut self) {
        while self.order.len() > self.finished_max {
            let Some((_, id)) = self.order.pop_first() else { return };
            let forgotten = match (self.finished.remove(&id), self.calls.get_mut(&id)) {
                (None, Some(call)) if call.is_over(self.committed) => {
                    let first = call.first;
                    self.calls.remove(&id);
                    Some(first)
                }
                (None, Some(call)) => {
                    call.over = None;
                    None
                }
                (answered, _) => answered,
            };
            // As long as answers of that time are remembered, and no longer: one outage must not hold the log for ever.
            while let Some(forgotten) = forgotten
                && let Some(first) = self.gone_order.front()
                && self.gone.get(first).is_none_or(|(offset, _)| *offset < forgotten)
            {
                let first = self.gone_order.pop_front();
                first.and_then(|id| self.gone.remove(&id));
            }
        }
    }

    fn go(&mut self, id: CallId, offset: i64, to: String) {
        if self.gone.insert(id.clone(), (offset, to)).is_none() {
            self.gone_order.push_back(id);
        }
        while self.gone_order.len() > self.finished_max {
            let oldest = self.gone_order.pop_front();
            oldest.and_then(|id| self.gone.remove(&id));
        }
    }

    fn lapses_at(&self, renewed_at: u64) -> u64 {
        renewed_at + self.terms.ttl_ms.saturating_sub(self.terms.margin_ms)
    }

    /// The thread is lost: others may have come since my last entry.
    fn lose(&mut self) {
        self.lease = Lease::No;
        self.position = self.mine.map_or(self.position, |mine| self.position.max(mine + 1));
    }

    fn any_running(&self) -> bool {
        self.calls.values().any(|call| call.running)
    }

    fn is_wanted(&self, now: u64) -> bool {
        self.wanted_at.is_some_and(|at| now < at + self.terms.idle_after_ms)
    }

    /// Whether an owner had not been heard for a ttl when the log was last read to its end.
    fn is_silent(&self, seen: &Seen) -> bool {
        self.read_at.is_some_and(|read_at| read_at >= seen.at + self.terms.ttl_ms)
    }

    fn may_be_under_way(&self, one: &Try) -> bool {
        // One of mine is under way only where its call is running, which the caller asks.
        self.owners.get(&one.owner).is_some_and(|seen| !self.is_silent(seen))
    }

    /// Whether an owner that may be alive is waited for.
    fn is_anybody_open(&self) -> bool {
        self.owners.values().any(|seen| !self.is_silent(seen))
    }

    fn renew_or_rest(&self, at: u64, now: u64) -> Next {
        let due = at + self.terms.renew_every_ms;
        match self.is_wanted(now) {
            true if now >= due => Next::Renew,
            true => Next::Rest(Some(due)),
            false => Next::Rest(None),
        }
    }

    fn look_or_rest(&self, now: u64) -> Next {
        let due = self.looked_at + self.terms.look_every_ms;
        if now >= due { Next::Read } else { Next::Rest(Some(due)) }
    }

    /// Owners that are silent, or that released all and have nothing open, are waited for no more.
    fn forget_owners(&mut self) {
        let open = |owner: &Arc<str>| {
            let mut tries = self.calls.values().flat_map(|call| &call.tries);
            tries.any(|one| one.owner == *owner && one.closed.is_none())
        };
        let over: Vec<_> = self
            .owners
            .iter()
            .filter(|(owner, seen)| self.is_silent(seen) || (seen.released && !open(owner)))
            .map(|(owner, _)| Arc::clone(owner))
            .collect();
        for owner in over {
            self.owners.remove(&owner);
        }
    }

    fn apply(&mut self, offset: i64, entry: LedgerEntry) {
        if let (EntryKind::Moved, Some(source_offset), Some(to)) =
            (entry.kind, entry.source_offset, &entry.to)
        {
            self.moved.entry(source_offset).or_insert_with(|| (offset, to.clone()));
            if let Some(id) = &entry.call_id {
                self.go(id.clone(), offset, to.clone());
            }
        }
        let (Some(id), owner) = (entry.call_id, Arc::from(entry.owner)) else { return };
        if let Some(source_offset) = entry.source_offset.filter(|offset| *offset < self.committed)
            && self.calls.get(&id).is_none_or(|call| call.is_over(self.committed))
        {
            if self.finished.contains_key(&id) {
                return;
            }
            if entry.kind == EntryKind::Done {
                self.finish(id, source_offset, offset);
                return self.forget_finished();
            }
        }
        let call = self.calls.entry(id).or_insert(Call {
            source_offset: 0,
            first: offset,
            tries: Vec::new(),
            answer: None,
            running: false,
            over: None,
        });
        call.first = call.first.min(offset);
        call.source_offset = call.source_offset.max(entry.source_offset.unwrap_or(0));
        let closed = match entry.kind {
            EntryKind::Moved | EntryKind::Renewed | EntryKind::Released => return,
            EntryKind::Started => None,
            EntryKind::Failed => Some(Closed::Failed),
            EntryKind::Done => {
                if call.answer.as_ref().is_none_or(|answer| offset < answer.offset) {
                    call.answer = Some(Answer { offset, input: entry.input, value: entry.answer });
                }
                Some(Closed::Done)
            }
        };
        let (number, source_offset) = (entry.attempt.unwrap_or(0), entry.source_offset.unwrap_or(0));
        match call.tries.iter_mut().find(|one| one.owner == owner && one.number == number) {
            // A start never opens again what is closed.
            Some(_) if closed.is_none() => {}
            Some(one) => (one.row, one.closed) = (entry.row, closed),
            None => call.tries.push(Try { owner, number, source_offset, row: entry.row, closed }),
        }
        if call.tries.len() > TRIES_MAX
            && let Some(at) = call.tries.iter().skip(1).position(|one| one.closed.is_some())
        {
            call.tries.remove(at + 1);
        }
    }
}
