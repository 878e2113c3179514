//! Finds a partition that stands still in silence: nobody pauses it, its broker is there, and yet it is not read.
//!
//! librdkafka has had such stalls (librdkafka #3567, rust-rdkafka #638), and a consumer group does not see them: the
//! member still beats. What it says of itself every few seconds shows them, in three forms: a partition that never
//! becomes active; records that are there and are not handed over; a broker that is no longer asked.
//!
//! Sans-IO, and invariant: a partition that may rightly stand still is no stall. It may while it is paused, while its
//! broker is away, and while there is nothing to hand over: the end that counts is the last stable offset, so neither
//! an open transaction of a client nor the marks that transactions leave are waited for.

use crate::message::Partition;
use rdkafka::Statistics;
use std::{
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
    /// How often its broker was asked for records.
    pub asked: i64,
}

/// All partitions that are read.
pub(super) fn looks(statistics: &Statistics) -> Vec<Look> {
    let broker = |id: i32| statistics.brokers.values().find(|broker| broker.nodeid == id);
    let mut looks = Vec::new();
    for (topic, of_topic) in &statistics.topics {
        for (number, of_partition) in of_topic.partitions.iter().filter(|(number, _)| **number >= 0) {
            let leader = broker(of_partition.leader);
            let fetched = (of_partition.ls_offset - of_partition.next_offset).max(0);
            looks.push(Look {
                topic: topic.clone(),
                number: *number,
                is_served: leader.is_some_and(|leader| leader.state == "UP"),
                is_active: of_partition.fetch_state == "active",
                left: fetched + of_partition.fetchq_cnt,
                position: (of_partition.next_offset, of_partition.app_offset),
                asked: leader.and_then(|leader| leader.req.get("Fetch").copied()).unwrap_or(0),
            });
        }
    }
    looks
}

/// Since when each partition stands still.
#[derive(Debug, Default)]
pub(super) struct Watch {
    looked: Option<Instant>,
    still: HashMap<Partition, (Look, Instant)>,
}

impl Watch {
    /// Takes in what was seen of the partitions that are ours and not paused. The reason, where one stands still for
    /// too long.
    pub fn look(&mut self, now: Instant, looks: Vec<(Partition, Look)>) -> Option<String> {
        if self.looked.replace(now).is_none_or(|last| now.duration_since(last) > LOOK_EVERY_MAX) {
            self.still.clear();
        }
        let mut still = HashMap::with_capacity(looks.len());
        for (partition, look) in looks {
            let before = self.still.remove(&partition);
            let since = match before {
                Some((before, since)) if before.stands_still(&look) => since,
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

    fn look(left: i64, position: i64, asked: i64) -> Look {
        Look {
            topic: "requests".to_owned(),
            number: 0,
            is_served: true,
            is_active: true,
            left,
            position: (position, position),
            asked,
        }
    }

    /// Looks every five seconds; after how many seconds a stall is found.
    fn found(looks: impl Fn(i64) -> Option<Look>) -> Option<i64> {
        let (mut watch, start) = (Watch::default(), Instant::now());
        (0..=24_i64).map(|step| step * 5).find(|&second| {
            let now = start + Duration::from_secs(second.unsigned_abs());
            let partition = Partition { topic: "requests".into(), number: 0 };
            watch.look(now, looks(second).map(|look| (partition, look)).into_iter().collect()).is_some()
        })
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
        let (mut watch, start) = (Watch::default(), Instant::now());
        let partition = || Partition { topic: "requests".into(), number: 0 };
        assert_eq!(watch.look(start, vec![(partition(), look(0, 3, 1))]), None);
        assert_eq!(watch.look(start + Duration::from_secs(40), vec![(partition(), look(7, 3, 2))]), None);
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
