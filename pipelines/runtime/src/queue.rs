//! In which order records that wait are given to the operator.
//!
//! Two lanes: of ten records, eight are of requests that somebody waits for, two of the backfill; where one lane is
//! empty, the other has all. Within a lane, where the step's queue is fair, tenants take turns by deficit round robin
//! (Shreedhar and Varghese, 1995) on estimated tokens; else who came first is served first.
//!
//! Sans-IO, and invariant: what was put in comes out once, and nobody with records waits for ever.

use crate::message::{Incoming, Partition};
use bytes::Bytes;
use forebay_plan::Channel;
use forebay_schemas::{Claim, Lane, header};
use std::collections::{HashMap, HashSet, VecDeque};

/// Of so many records in a row one is of the backfill lane, where both lanes have some.
const BACKFILL_TURN: u32 = 5;

/// Estimated tokens that a tenant may send each time that it is its turn.
const QUANTUM: usize = 1_024;

/// Bytes of text to a token, roughly.
const TOKEN_BYTES: usize = 4;

/// Tokens that an answer has, roughly: a short question is not free.
const ANSWER_TOKENS: usize = 256;

/// A record that waits for the operator.
#[derive(Debug)]
pub struct Waiting {
    /// The record.
    pub incoming: Incoming,
    /// Whose it is, where tenants take turns; else nobody's.
    pub tenant: Bytes,
    /// Whether its key's turn is its own already.
    pub has_turn: bool,
}

/// Records that wait for the operator.
#[derive(Debug)]
pub struct Queue {
    /// Those whose key's turn it is: they hold up what lies behind them.
    first: VecDeque<Waiting>,
    live: Backlogs,
    backfill: Backlogs,
    turn: u32,
}

impl Queue {
    /// An empty queue.
    pub fn new() -> Self {
        Self { first: VecDeque::new(), live: Backlogs::default(), backfill: Backlogs::default(), turn: 0 }
    }

    /// Puts a record in.
    pub fn push(&mut self, waiting: Waiting) {
        if waiting.has_turn {
            return self.first.push_back(waiting);
        }
        match lane(&waiting.incoming) {
            Lane::Interactive => self.live.push(waiting),
            Lane::Backfill => self.backfill.push(waiting),
        }
    }

    /// The record whose turn it is.
    pub fn pop(&mut self) -> Option<Waiting> {
        if let Some(first) = self.first.pop_front() {
            return Some(first);
        }
        if self.live.is_empty() || self.backfill.is_empty() {
            return self.live.pop().or_else(|| self.backfill.pop());
        }
        self.turn = (self.turn + 1) % BACKFILL_TURN;
        if self.turn == 0 { self.backfill.pop() } else { self.live.pop() }
    }

    /// Takes out the records of these partitions.
    pub fn take_out(&mut self, gone: &HashSet<Partition>) -> Vec<Waiting> {
        let mut out = Vec::new();
        let (kept, taken) = std::mem::take(&mut self.first)
            .into_iter()
            .partition(|waiting| !gone.contains(&waiting.incoming.partition));
        self.first = kept;
        out.extend::<VecDeque<_>>(taken);
        for backlogs in [&mut self.live, &mut self.backfill] {
            backlogs.take_out(&mut out, |waiting| gone.contains(&waiting.incoming.partition));
        }
        out
    }

    /// Takes out the live records of this partition whose tenants have more than their share of `records_max`.
    pub fn take_flood(&mut self, partition: &Partition, records_max: usize) -> Vec<Waiting> {
        let over: HashSet<Bytes> = self
            .live
            .turns
            .iter()
            .filter(|tenant| self.is_over_share(tenant, records_max))
            .cloned()
            .collect();
        let mut out = Vec::new();
        self.live.take_out(&mut out, |waiting| {
            let Waiting { incoming, tenant, .. } = waiting;
            incoming.partition == *partition && incoming.channel == Channel::Live && over.contains(tenant)
        });
        out
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.live.is_empty() && self.backfill.is_empty()
    }

    /// How many records wait, and their bytes.
    pub fn size(&self) -> (usize, usize) {
        let first: usize = self.first.iter().map(|waiting| waiting.incoming.held.bytes()).sum();
        let (live, backfill) = (&self.live, &self.backfill);
        (self.first.len() + live.records + backfill.records, first + live.bytes + backfill.bytes)
    }

    /// Whether a tenant has more in the live lane than its share of `records_max`: half of it while it is alone, less
    /// where others wait too. Half stays for those who are not seen yet.
    pub fn is_over_share(&self, tenant: &Bytes, records_max: usize) -> bool {
        let waiting = self.live.tenants.get(tenant).map_or(0, |backlog| backlog.records.len());
        let others = self.live.turns.len() - usize::from(waiting > 0);
        waiting >= (records_max / (2 + others)).max(1)
    }
}

/// The lane that a record is in.
fn lane(incoming: &Incoming) -> Lane {
    let marked =
        || value(incoming, header::LANE).is_some_and(|lane| *lane == *Lane::Backfill.as_str().as_bytes());
    match incoming.channel {
        Channel::Live => Lane::Interactive,
        Channel::Backfill => Lane::Backfill,
        Channel::Retry | Channel::Overflow if marked() => Lane::Backfill,
        Channel::Retry | Channel::Overflow => Lane::Interactive,
    }
}

fn value<'i>(incoming: &'i Incoming, header: &str) -> Option<&'i Bytes> {
    incoming.headers.iter().find(|(name, _)| name == header).and_then(|(_, value)| value.as_ref())
}

/// The backlogs of one lane. Invariant: a tenant stands in `turns` once, while it has records.
#[derive(Debug, Default)]
struct Backlogs {
    tenants: HashMap<Bytes, Backlog>,
    turns: VecDeque<Bytes>,
    records: usize,
    bytes: usize,
}

#[derive(Debug, Default)]
struct Backlog {
    records: VecDeque<Waiting>,
    /// Estimated tokens that it may still send in this turn.
    deficit: usize,
}

impl Backlogs {
    fn is_empty(&self) -> bool {
        self.records == 0
    }

    fn push(&mut self, waiting: Waiting) {
        self.records += 1;
        self.bytes += waiting.incoming.held.bytes();
        let backlog = self.tenants.entry(waiting.tenant.clone()).or_default();
        if backlog.records.is_empty() {
            self.turns.push_back(waiting.tenant.clone());
        }
        backlog.records.push_back(waiting);
    }

    fn pop(&mut self) -> Option<Waiting> {
        loop {
            let tenant = self.turns.front()?;
            let Some(backlog) = self.tenants.get_mut(tenant) else {
                self.turns.pop_front();
                continue;
            };
            let cost = backlog.records.front().map_or(0, tokens);
            // Alone, nobody is waited for.
            if backlog.deficit < cost && self.turns.len() > 1 {
                backlog.deficit += QUANTUM;
                self.turns.rotate_left(1);
                continue;
            }
            backlog.deficit = backlog.deficit.saturating_sub(cost);
            let popped = backlog.records.pop_front();
            if backlog.records.is_empty() {
                self.tenants.remove(&self.turns.pop_front()?);
            }
            let popped = popped?;
            self.records -= 1;
            self.bytes -= popped.incoming.held.bytes();
            return Some(popped);
        }
    }

    fn take_out(&mut self, out: &mut Vec<Waiting>, wanted: impl Fn(&Waiting) -> bool) {
        for backlog in self.tenants.values_mut() {
            let (kept, taken) = std::mem::take(&mut backlog.records)
                .into_iter()
                .partition::<VecDeque<_>, _>(|waiting| !wanted(waiting));
            backlog.records = kept;
            self.records -= taken.len();
            self.bytes -= taken.iter().map(|waiting| waiting.incoming.held.bytes()).sum::<usize>();
            out.extend(taken);
        }
        self.tenants.retain(|_, backlog| !backlog.records.is_empty());
        self.turns.retain(|tenant| self.tenants.contains_key(tenant));
    }
}

fn tokens(waiting: &Waiting) -> usize {
    let incoming = &waiting.incoming;
    // What lies at the object store leaves its message empty.
    let is_empty = incoming.value.as_ref().is_some_and(Bytes::is_empty);
    let elsewhere = if is_empty { Claim::read(&incoming.headers).ok().flatten() } else { None };
    let bytes = elsewhere.map_or(0, |claim| claim.bytes).saturating_add(incoming.len());
    ANSWER_TOKENS + bytes / TOKEN_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use proptest::prelude::*;
    use std::{collections::BTreeMap, sync::Arc};

    fn record(tenant: &str, channel: Channel, offset: i64, bytes: usize) -> Waiting {
        let partition = Partition { topic: "prompts".into(), number: i32::from(tenant.len() > 5) };
        let headers = Vec::new();
        let held = Budget::new(usize::MAX).take(bytes);
        let (key, value) = (None, Some(vec![0; bytes].into()));
        let incoming = Incoming { partition, channel, offset, timestamp_ms: 0, key, value, headers, held };
        Waiting { incoming, tenant: Bytes::copy_from_slice(tenant.as_bytes()), has_turn: false }
    }

    fn drain(queue: &mut Queue) -> Vec<Waiting> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn of_ten_records_eight_are_somebodys_and_none_waits_while_there_is_room() {
        let mut queue = Queue::new();
        for offset in 0..20 {
            queue.push(record("a", Channel::Backfill, offset, 10));
            queue.push(record("a", Channel::Live, offset, 10));
        }
        let order = drain(&mut queue);
        let backfill = |records: &[Waiting]| {
            records.iter().filter(|one| one.incoming.channel == Channel::Backfill).count()
        };
        assert_eq!(backfill(&order[..10]), 2);
        assert_eq!(backfill(&order[..20]), 4);
        assert_eq!(order.len(), 40);
    }

    #[test]
    fn a_flood_does_not_make_another_tenant_wait() {
        let mut queue = Queue::new();
        (0..1_000).for_each(|offset| queue.push(record("flood", Channel::Live, offset, 4_000)));
        (0..10).for_each(|offset| queue.push(record("small", Channel::Live, offset, 4_000)));
        let order = drain(&mut queue);
        let small = |waiting: &Waiting| waiting.tenant == "small";
        let last = order.iter().rposition(small).unwrap();
        assert!(last < 30, "its ten were over after {last}");
        assert_eq!(order.len(), 1_010);
    }

    #[test]
    fn a_flood_is_taken_out_where_it_holds_a_partition_up() {
        let mut queue = Queue::new();
        (0..60).for_each(|offset| queue.push(record("flood", Channel::Live, offset, 1)));
        (0..3).for_each(|offset| queue.push(record("flood", Channel::Overflow, offset, 1)));
        (0..5).for_each(|offset| queue.push(record("small", Channel::Live, offset, 1)));
        let partition = Partition { topic: "prompts".into(), number: 0 };
        assert_eq!(queue.take_flood(&partition, 1_000).len(), 0, "within its share");
        let flood = queue.take_flood(&partition, 100);
        assert!(flood.len() == 60 && flood.iter().all(|waiting| waiting.tenant == "flood"));
        assert_eq!((queue.size().0, queue.take_flood(&partition, 100).len()), (8, 0));
    }

    #[test]
    fn half_of_the_queue_is_for_those_who_are_not_seen_yet() {
        let mut queue = Queue::new();
        (0..49).for_each(|offset| queue.push(record("flood", Channel::Live, offset, 1)));
        let (flood, other) = (Bytes::from("flood"), Bytes::from("b"));
        assert!(!queue.is_over_share(&flood, 100));
        queue.push(record("flood", Channel::Live, 49, 1));
        assert!(queue.is_over_share(&flood, 100));
        assert!(!queue.is_over_share(&other, 100));
    }

    proptest! {
        /// However it is filled and emptied: each record comes out once, and those of a tenant in their order.
        #[test]
        fn what_was_put_in_comes_out_once_and_in_its_tenants_order(
            steps in proptest::collection::vec((0usize..4, 1usize..40_000, any::<bool>(), any::<bool>()), 1..300),
            taken: bool,
        ) {
            let tenants = ["a", "b", "c", "long name"];
            let mut queue = Queue::new();
            let mut next = BTreeMap::<_, i64>::new();
            let mut out = Vec::new();
            for (who, bytes, backfill, pops) in steps {
                let channel = if backfill { Channel::Backfill } else { Channel::Live };
                let offset = next.entry((tenants[who], channel)).or_default();
                queue.push(record(tenants[who], channel, *offset, bytes));
                *offset += 1;
                if pops {
                    out.extend(queue.pop());
                }
            }
            let gone = HashSet::from([Partition { topic: Arc::from("prompts"), number: 1 }]);
            let taken = if taken { queue.take_out(&gone) } else { Vec::new() };
            prop_assert!(taken.iter().all(|waiting| gone.contains(&waiting.incoming.partition)));
            out.extend(std::iter::from_fn(|| queue.pop()));
            prop_assert_eq!(queue.size(), (0, 0));
            let mut seen = BTreeMap::<_, i64>::new();
            for waiting in out.iter().chain(&taken) {
                let key = (waiting.tenant.clone(), waiting.incoming.channel);
                let expected = seen.entry(key).or_default();
                prop_assert_eq!(waiting.incoming.offset, *expected);
                *expected += 1;
            }
            let total: i64 = next.values().sum();
            prop_assert_eq!(i64::try_from(out.len() + taken.len()).unwrap(), total);
        }
    }
}
