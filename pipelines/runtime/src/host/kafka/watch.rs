//! Finds a partition that stands still in silence: nobody pauses it, its broker is there, and yet it is not read.
//!
//! librdkafka has had such stalls (librdkafka #3567, rust-rdkafka #638), and a consumer group does not see them: the
//! member still beats. What it says of itself every few seconds shows them, in three forms: a partition that never
//! becomes active; records that are there and are not handed over; a broker that is no longer asked.
//!
//! Sans-IO, and invariant: a partition that may rightly stand still is no stall. It may while it is paused, while its
//! broker is away, and while there is nothing to hand over: the end that counts is the last stable offset, so neither
//! an open transaction of a client nor the marks that transactions leave are waited for. And it may while others go on before it:
//! librdkafka keeps what it has fetched of all partitions in one queue, and while that is long it fetches nothing. A slow
//! stage takes minutes for the tens of thousands of small records that such a queue holds.

use super::lifeline::is_broker;
use crate::message::Partition;
use serde::Deserialize;
use std::{
    borrow::Cow,
    collections::HashMap,
    time::{Duration, Instant},
};

/// How long a partition may stand still.
const STILL_MAX: Duration = Duration::from_secs(30);

/// After so long without a look, this process stood still itself, and nothing is known of the others.
const LOOK_EVERY_MAX: Duration = Duration::from_secs(15);

/// What librdkafka says of one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// The topic.
    pub topic: String,
    /// The partition's number.
    pub number: i32,
    /// Whether the broker that leads it is connected.
    pub is_served: bool,
    /// Whether it is being fetched.
    pub is_active: bool,
    /// How many records it still has to give, as far as is known.
    pub left: i64,
    /// The offsets that are fetched and handed over next.
    pub position: (i64, i64),
    /// How many records, and bytes, are fetched of it and wait to be handed over.
    pub queued: (i64, i64),
    /// How often its broker was asked for records.
    pub asked: i64,
    /// How many records of it are not committed yet, where that is known.
    pub lag: Option<i64>,
}

/// Of what librdkafka says of itself (its STATISTICS.md) the little that is looked at: the binding's own type takes all of it, which
/// was a sixth of what a process takes that has nothing to do.
#[derive(Deserialize)]
struct Statistics<'a> {
    #[serde(borrow)]
    brokers: HashMap<Cow<'a, str>, OfBroker<'a>>,
    #[serde(borrow)]
    topics: HashMap<Cow<'a, str>, OfTopic<'a>>,
}

#[derive(Deserialize)]
struct OfBroker<'a> {
    nodeid: i32,
    #[serde(borrow)]
    state: Cow<'a, str>,
    #[serde(borrow)]
    source: Cow<'a, str>,
    #[serde(default)]
    req: Requests,
}

#[derive(Default, Deserialize)]
struct Requests {
    #[serde(rename = "Fetch", default)]
    fetch: i64,
}

#[derive(Deserialize)]
struct OfTopic<'a> {
    #[serde(borrow)]
    partitions: HashMap<i32, OfPartition<'a>>,
}

#[derive(Deserialize)]
struct OfPartition<'a> {
    leader: i32,
    #[serde(borrow)]
    fetch_state: Cow<'a, str>,
    fetchq_cnt: i64,
    fetchq_size: i64,
    next_offset: i64,
    app_offset: i64,
    ls_offset: i64,
    consumer_lag: i64,
}

/// All partitions that are read, and whether a broker is known.
pub(super) fn looks(statistics: &[u8]) -> serde_json::Result<(Vec<Look>, bool)> {
    let Statistics { brokers, topics } = serde_json::from_slice(statistics)?;
    let knows_one = brokers.values().any(|broker| is_broker(&broker.source));
    let mut looks = Vec::new();
    for (topic, OfTopic { partitions }) in topics {
        // −1 stands for messages whose partition is not chosen yet.
        for (number, of) in partitions.into_iter().filter(|(number, _)| *number >= 0) {
            let leader = brokers.values().find(|broker| broker.nodeid == of.leader);
            looks.push(Look {
                topic: topic.clone().into_owned(),
                number,
                is_served: leader.is_some_and(|leader| leader.state == "UP"),
                is_active: of.fetch_state == "active",
                left: (of.ls_offset - of.next_offset).max(0) + of.fetchq_cnt,
                position: (of.next_offset, of.app_offset),
                queued: (of.fetchq_cnt, of.fetchq_size),
                asked: leader.map_or(0, |leader| leader.req.fetch),
                // −1 means that the partition is not ours, or nothing was fetched yet.
                lag: (of.consumer_lag >= 0).then_some(of.consumer_lag),
            });
        }
    }
    Ok((looks, knows_one))
}

/// Since when each partition stands still.
#[derive(Debug)]
pub(super) struct Watch {
    /// With so many records, or bytes, in its queue librdkafka fetches nothing.
    enough: (i64, i64),
    looked: Option<Instant>,
    still: HashMap<Partition, (Look, Instant)>,
}

impl Watch {
    /// Of a consumer that fetches nothing while it has so many records or bytes.
    pub fn new(enough: (i64, i64)) -> Self {
        Self { enough, looked: None, still: HashMap::new() }
    }

    /// Takes in what was seen of the partitions that are ours and not paused. The reason, where one stands still for
    /// too long.
    pub fn look(&mut self, now: Instant, looks: Vec<(Partition, Look)>) -> Option<String> {
        if self.looked.replace(now).is_none_or(|last| now.duration_since(last) > LOOK_EVERY_MAX) {
            self.still.clear();
        }
        let mut still = HashMap::with_capacity(looks.len());
        let queued = |of: fn(&Look) -> i64| looks.iter().map(|(_, look)| of(look)).sum::<i64>();
        let has_enough =
            queued(|look| look.queued.0) >= self.enough.0 || queued(|look| look.queued.1) >= self.enough.1;
        let handed_over = |(partition, look): &(Partition, Look)| {
            self.still.get(partition).is_some_and(|(before, _)| before.position.1 != look.position.1)
        };
        let goes_on = looks.iter().any(handed_over);
        for (partition, look) in looks {
            let before = self.still.remove(&partition);
            let waits_its_turn = goes_on && (look.queued.0 > 0 || has_enough);
            let since = match before {
                Some((before, since)) if before.stands_still(&look) && !waits_its_turn => since,
                _ => now,
            };
            still.insert(partition, (look, since));
        }
        self.still = still;
        let mut stalls = self.still.iter().filter(|(_, (_, since))| now.duration_since(*since) >= STILL_MAX);
        let (partition, (look, _)) = stalls.next()?;
        Some(format!(
            "partition {partition} stands still at offset {} for {} s with {} records to give, and nobody paused it; \
             restart the process, and tell what the log says before",
            look.position.1,
            STILL_MAX.as_secs(),
            look.left
        ))
    }
}

impl Look {
    /// Whether nothing has moved from here to there that should have.
    fn stands_still(&self, later: &Self) -> bool {
        let may_stand = later.is_active && later.left == 0 && later.asked != self.asked;
        later.is_served && !may_stand && later.position == self.position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENOUGH: (i64, i64) = (1_000, 4 << 20);

    fn look(left: i64, position: i64, asked: i64) -> Look {
        Look {
            topic: "requests".to_owned(),
            number: 0,
            is_served: true,
            is_active: true,
            left,
            position: (position, position),
            queued: (0, 0),
            asked,
            lag: None,
        }
    }

    /// Looks every five seconds; after how many seconds a stall is found.
    fn found(looks: impl Fn(i64) -> Option<Look>) -> Option<i64> {
        let (mut watch, start) = (Watch::new(ENOUGH), Instant::now());
        (0..=24_i64).map(|step| step * 5).find(|&second| {
            let now = start + Duration::from_secs(second.unsigned_abs());
            let partition = Partition { topic: "requests".into(), number: 0 };
            watch.look(now, looks(second).map(|look| (partition, look)).into_iter().collect()).is_some()
        })
    }

    #[test]
    fn what_librdkafka_says_of_itself_is_read() {
        let said = br#"{"name": "one", "brokers": {"h:1/7": {"nodeid": 7, "state": "UP", "source": "learned",
                "req": {"Fetch": 9, "Metadata": 1}}, "GroupCoordinator": {"nodeid": -1, "state": "UP", "source": "logical"}}, "topics": {"requests": {"age": 1, "partitions": {
            "0": {"leader": 7, "fetch_state": "active", "fetchq_cnt": 2, "fetchq_size": 20, "next_offset": 5, "app_offset": 3,
                "ls_offset": 10, "consumer_lag": 4, "txbytes": 0},
            "-1": {"leader": -1, "fetch_state": "none", "fetchq_cnt": 0, "fetchq_size": 0, "next_offset": -1001, "app_offset": -1001,
                "ls_offset": -1001, "consumer_lag": -1}}}}}"#;
        let expected =
            Look { left: 7, position: (5, 3), queued: (2, 20), asked: 9, lag: Some(4), ..look(0, 0, 0) };
        assert_eq!(looks(said).unwrap(), (vec![expected], true));
    }

    #[test]
    fn what_is_there_and_is_not_handed_over_is_found() {
        assert_eq!(found(|second| Some(look(7, 3, second))), Some(30));
    }

    #[test]
    fn a_broker_that_is_no_longer_asked_is_found() {
        assert_eq!(found(|_| Some(look(0, 3, 9))), Some(30));
    }

    #[test]
    fn a_partition_that_does_not_become_active_is_found() {
        assert_eq!(found(|second| Some(Look { is_active: false, ..look(0, 3, second) })), Some(30));
    }

    #[test]
    fn who_stood_still_itself_begins_anew() {
        let (mut watch, start) = (Watch::new(ENOUGH), Instant::now());
        let partition = || Partition { topic: "requests".into(), number: 0 };
        assert_eq!(watch.look(start, vec![(partition(), look(0, 3, 1))]), None);
        assert_eq!(watch.look(start + Duration::from_secs(40), vec![(partition(), look(7, 3, 2))]), None);
    }

    /// Of two partitions the second goes on where it is said so; whether a stall is found in two minutes.
    fn found_beside(queued: (i64, i64), others: (i64, i64), goes_on: bool) -> bool {
        let (mut watch, start) = (Watch::new(ENOUGH), Instant::now());
        (0..=24_i64).map(|step| step * 5).any(|second| {
            let partition = |number| Partition { topic: "requests".into(), number };
            let other = Look { queued: others, ..look(9_999, if goes_on { second } else { 0 }, 2) };
            // A broker that has not been asked again: the client has enough.
            let looks = vec![(partition(0), Look { queued, ..look(7, 3, 2) }), (partition(1), other)];
            watch.look(start + Duration::from_secs(second.unsigned_abs()), looks).is_some()
        })
    }

    #[test]
    fn whoever_waits_behind_others_is_no_stall_while_these_go_on() {
        assert!(!found_beside((7, 700), (10, 1_000), true), "fetched, and behind others");
        assert!(!found_beside((0, 0), (4_000, 400_000), true), "not fetched, as there are many records");
        assert!(!found_beside((0, 0), (8, 4 << 20), true), "not fetched, as there are many bytes");
        assert!(found_beside((0, 0), (10, 1_000), true), "not fetched though there is room");
        assert!(found_beside((7, 700), (4_000, 400_000), false), "nothing is handed over");
    }

    #[test]
    fn what_may_stand_still_is_no_stall() {
        assert_eq!(found(|second| Some(look(0, 3, second))), None, "nothing to give");
        assert_eq!(found(|second| Some(look(7, second, second))), None, "it moves");
        assert_eq!(found(|second| Some(Look { is_served: false, ..look(7, 3, second) })), None, "no broker");
        assert_eq!(
            found(|second| (second % 25 != 0).then(|| look(7, 3, second))),
            None,
            "paused now and then"
        );
    }
}
