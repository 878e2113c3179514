//! Writes each message of a sole writer once, though the records that it comes from may be delivered again.
//!
//! A record is delivered again after a crash, a lost partition, or because its own writer crashed before committing.
//! Deterministic ids make the copies recognisable; this room recognises them: it remembers, for each partition, what
//! was written last, reads that back from the log when a partition becomes ours, and lets no second copy pass.
//!
//! Works because a record and what it becomes lie at the same partition number: equal keys, equal partition counts.
//!
//! Invariant: of the last [`REMEMBERED_MAX`] messages of a partition no (tenant, id, generation) is written twice by
//! the partition's owner. Residual: a process that was cut off beyond its session with a message on its way; what it
//! wrote twice is found when the partition is next read back.
//!
//! Sans-IO: reading back is the host's.

use crate::message::Outgoing;
use forebay_schemas::{Headers, header};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

/// How many messages of each partition are remembered: more than all steps together may have unfinished in one partition,
/// so that whatever is delivered again after a crash, at whichever step, is recognised.
pub const REMEMBERED_MAX: usize = 20_000;

/// What a message is about: a hash of topic, tenant, id and generation.
type Identity = [u8; 16];

/// A hash of what was asked; absent where the message does not say.
type Payload = Option<[u8; 8]>;

/// What a sole writer has written of late.
#[derive(Debug, Default)]
pub struct Once {
    topics: Vec<Arc<str>>,
    partitions: Mutex<HashMap<i32, Remembered>>,
    /// Up to which offset of each partition of a topic repeats were told of: a partition may be read back often.
    told: Mutex<HashMap<(Arc<str>, i32), i64>>,
}

/// What is kept of a message as it is read back: its headers are twenty times as long, and half a million may be read at once.
#[derive(Clone, Debug)]
pub struct Written {
    topic: Arc<str>,
    offset: i64,
    identity: Identity,
    payload: Payload,
}

impl Written {
    /// A message that lies there.
    pub fn at(topic: Arc<str>, offset: i64, headers: &Headers) -> Self {
        let (identity, payload) = (identity(&topic, headers), payload(headers));
        Self { topic, offset, identity, payload }
    }
}

#[derive(Debug, Default)]
struct Remembered {
    payloads: BTreeMap<Identity, Payload>,
    /// The order of arrival, to forget the oldest.
    order: VecDeque<Identity>,
}

/// What is known of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Nothing: it may be written.
    New,
    /// It was written already.
    Written,
    /// Another message was written under its identity: somebody used one id for two requests.
    Conflicts,
}

impl Once {
    /// A memory for the messages of these topics.
    pub fn new(topics: Vec<Arc<str>>) -> Self {
        Self { topics, partitions: Mutex::default(), told: Mutex::default() }
    }

    /// The topics whose messages are remembered.
    pub fn topics(&self) -> &[Arc<str>] {
        &self.topics
    }

    /// Whether messages of this topic are written once.
    pub fn covers(&self, topic: &str) -> bool {
        self.topics.iter().any(|covered| **covered == *topic)
    }

    /// Replaces what is remembered of a partition by what was read back from the log, each topic's oldest first. Gives topic
    /// and offset of those that say once more what was written before, each once.
    pub fn restore(
        &self,
        partition: i32,
        messages: impl IntoIterator<Item = Written>,
    ) -> Vec<(Arc<str>, i64)> {
        let (mut remembered, mut repeats) = (Remembered::default(), Vec::new());
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for Written { topic, offset, identity, payload } in messages {
            let is_repeat = remembered.payloads.contains_key(&identity);
            remembered.remember(identity, payload, self.bound());
            let told = told.entry((Arc::clone(&topic), partition)).or_insert(-1);
            if is_repeat && offset > *told {
                *told = offset;
                repeats.push((topic, offset));
            }
        }
        self.lock().insert(partition, remembered);
        repeats
    }

    /// Whether this message may be written.
    pub fn judge(&self, partition: i32, message: &Outgoing) -> Known {
        let (identity, payload) = (identity(&message.topic, &message.headers), payload(&message.headers));
        self.lock().get(&partition).map_or(Known::New, |remembered| remembered.judge(&identity, payload))
    }

    /// Whether this message may be written; one that may counts as written from now on.
    pub fn admit(&self, partition: i32, message: &Outgoing) -> Known {
        let (identity, payload) = (identity(&message.topic, &message.headers), payload(&message.headers));
        let bound = self.bound();
        let mut partitions = self.lock();
        let remembered = partitions.entry(partition).or_default();
        let known = remembered.judge(&identity, payload);
        if known == Known::New {
            remembered.remember(identity, payload, bound);
        }
        known
    }

    fn bound(&self) -> usize {
        REMEMBERED_MAX * self.topics.len().max(1)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, Remembered>> {
        self.partitions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Remembered {
    fn judge(&self, identity: &Identity, payload: Payload) -> Known {
        match self.payloads.get(identity) {
            None => Known::New,
            // Where either does not say what was asked, they are taken for the same.
            Some(Some(written)) if payload.is_some_and(|payload| payload != *written) => Known::Conflicts,
            Some(_) => Known::Written,
        }
    }

    fn remember(&mut self, identity: Identity, payload: Payload, bound: usize) {
        if self.payloads.insert(identity, payload).is_none() {
            self.order.push_back(identity);
        }
        while self.order.len() > bound {
            if let Some(oldest) = self.order.pop_front() {
                self.payloads.remove(&oldest);
            }
        }
    }
}

fn identity(topic: &str, headers: &Headers) -> Identity {
    let mut hash = blake3::Hasher::new_derive_key("forebay written once v1");
    let value = |name: &str| {
        let found = headers.iter().find(|(known, _)| known == name);
        found.and_then(|(_, value)| value.as_deref()).unwrap_or_default()
    };
    for part in [topic.as_bytes(), value(header::TENANT), value(header::ID), value(header::GENERATION)] {
        hash.update(&(part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let mut identity = Identity::default();
    hash.finalize_xof().fill(&mut identity);
    identity
}

fn payload(headers: &Headers) -> Payload {
    let value = headers.iter().find(|(name, _)| name == header::PAYLOAD)?.1.as_deref()?;
    let mut payload = [0; 8];
    // Hexadecimal digits; whatever else stands there is compared as it is.
    let bytes = value.get(..16)?;
    for (slot, pair) in payload.iter_mut().zip(bytes.chunks(2)) {
        *slot = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok())?;
    }
    Some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn message(id: &str, payload: &str) -> Outgoing {
        let header = |name: &str, value: &str| (name.to_owned(), Some(Bytes::from(value.to_owned())));
        let headers =
            vec![header(header::ID, id), header(header::TENANT, "default"), header(header::PAYLOAD, payload)];
        Outgoing { topic: "results".into(), key: Some(id.into()), value: None, headers }
    }

    /// A log as it is read back.
    fn read_back(log: &[Outgoing]) -> impl Iterator<Item = Written> {
        let written = |(offset, message): (i64, &Outgoing)| {
            Written::at(Arc::clone(&message.topic), offset, &message.headers)
        };
        (0..).zip(log).map(written)
    }

    fn once() -> Once {
        Once::new(vec!["results".into()])
    }

    const A: &str = "00000000000000aa";
    const B: &str = "00000000000000bb";

    #[test]
    fn a_second_copy_does_not_pass_and_another_request_under_its_id_is_told_apart() {
        let once = once();
        assert_eq!(once.admit(0, &message("x", A)), Known::New);
        assert_eq!(once.admit(0, &message("x", A)), Known::Written);
        assert_eq!(once.admit(0, &message("x", B)), Known::Conflicts);
        assert_eq!(once.admit(0, &message("x", "")), Known::Written);
        assert_eq!(once.admit(0, &message("y", A)), Known::New);
    }

    #[test]
    fn what_was_read_back_counts_and_what_was_not_written_does_not() {
        let once = once();
        once.admit(3, &message("lost on its way", A));
        let written = message("written", A);
        assert_eq!(once.restore(3, read_back(std::slice::from_ref(&written))), []);
        assert_eq!(once.admit(3, &written), Known::Written);
        assert_eq!(once.admit(3, &message("lost on its way", A)), Known::New);
    }

    #[test]
    fn what_lies_twice_on_the_log_is_told_of_once() {
        let once = once();
        let [x, y] = ["x", "y"].map(|id| message(id, A));
        let mut log = vec![x.clone(), y.clone(), x.clone()];
        assert_eq!(once.restore(3, read_back(&log)), [("results".into(), 2)]);
        assert_eq!(once.restore(3, read_back(&log)), [], "it is known");
        assert_eq!(once.restore(4, read_back(&log)), [("results".into(), 2)], "partitions are apart");
        log.extend([y, x.clone(), x]);
        let places = once.restore(3, read_back(&log));
        assert_eq!(places, [("results".into(), 3), ("results".into(), 4), ("results".into(), 5)]);
    }

    #[test]
    fn the_oldest_is_forgotten_first() {
        let once = once();
        for number in 0..=REMEMBERED_MAX {
            once.admit(0, &message(&number.to_string(), A));
        }
        assert_eq!(once.admit(0, &message("1", A)), Known::Written);
        assert_eq!(once.admit(0, &message("0", A)), Known::New);
    }

    proptest! {
        /// A writer that crashes at any moment and reads back writes each id once.
        #[test]
        fn each_id_is_written_once_over_any_crashes(
            deliveries in proptest::collection::vec((0u8..20, any::<bool>()), 1..200),
        ) {
            let mut log: Vec<Outgoing> = Vec::new();
            let mut once = once();
            for (id, crashes) in deliveries {
                let message = message(&id.to_string(), A);
                if once.admit(0, &message) == Known::New && !crashes {
                    log.push(message);
                } else if crashes {
                    once = self::once();
                    prop_assert!(once.restore(0, read_back(&log)).is_empty());
                }
            }
            let mut ids: Vec<_> = log.iter().map(|message| message.key.clone()).collect();
            ids.sort();
            let count = ids.len();
            ids.dedup();
            prop_assert_eq!(ids.len(), count);
        }
    }
}
