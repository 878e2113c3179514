//! What waits for one table: of each of its topic's partitions, what was read and is not in the table yet.
//!
//! Invariant: a message goes into its part only while the partition is ours and read from where the table ends; what comes before
//! the partition was set there is dropped, since it comes again. What was read of a topic before it was made anew waits beside what is
//! read of the new one, each under its own name.

use super::{
    delta::{DeltaLog, Error},
    flush::{Fault, Flushed, Log as _, Part, flush},
};
use crate::{decode::Message, table::Table};
use deltalake_core::{DeltaTable, kernel::Add};
use forebay_runtime::message::Incoming;
use forebay_telemetry::{TableFlush, TableMeter};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tracing::{debug, error};

/// How long to wait after a flush that failed, doubled with each that follows.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// How long a flush may take. A store that does not answer must not keep partitions that others wait for.
const FLUSH_MAX: Duration = Duration::from_secs(60);

/// What a message takes beside its bytes.
const OVERHEAD: usize = 160;

/// Where a partition of ours stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It is not known yet where the table ends.
    Unknown,
    /// It is being set to where the table ends.
    Seeking { next: i64, began: bool },
    /// It is read; the first message may show that some are missing before it.
    Reading { next: i64, first: bool },
}

/// Messages that a topic forgot before they were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The partition.
    pub partition: i32,
    /// What should have come next.
    pub expected: i64,
    /// What came.
    pub found: i64,
}

/// What waits for one table.
pub struct Lane {
    log: DeltaLog,
    meter: TableMeter,
    parts: Vec<Part<Add>>,
    places: BTreeMap<i32, Place>,
    /// Bytes that wait.
    bytes: usize,
    /// Whether a topic went back, as one does that was made anew.
    went_back: bool,
    /// Since when the oldest waits here, and when it was written to its topic.
    oldest: Option<(Instant, i64)>,
    /// After a flush that failed: when to try again, and how long to wait after the next.
    pause: Option<(Instant, Duration)>,
}

impl Lane {
    pub fn new(log: DeltaLog, meter: TableMeter) -> Self {
        let (parts, places) = (Vec::new(), BTreeMap::new());
        Self { log, meter, parts, places, bytes: 0, went_back: false, oldest: None, pause: None }
    }

    /// These partitions are ours; nothing of them is taken before [`Self::find`] has said where they begin.
    pub fn take_on(&mut self, partitions: impl Iterator<Item = i32>) {
        self.places.extend(partitions.map(|partition| (partition, Place::Unknown)));
    }

    /// A partition is no longer ours, nor is what waits of it. What waits of a topic that it belonged to before is nobody else's: it stays
    /// until it is written.
    pub fn give_up(&mut self, partition: i32) {
        let is_read = self.places.remove(&partition).is_some_and(|place| place != Place::Unknown);
        if let (true, Some(last)) = (is_read, self.parts.iter().rposition(|part| part.partition == partition))
        {
            self.parts.remove(last);
        }
        self.count();
    }

    /// The partitions of which it is not known yet where the table ends.
    pub fn has_unknown(&self) -> bool {
        self.places.values().any(|place| *place == Place::Unknown)
    }

    /// Whether all partitions of ours are read from where the table ends.
    pub fn is_set(&self) -> bool {
        self.places.values().all(|place| matches!(place, Place::Reading { .. }))
    }

    /// Looks up where the table ends, of all partitions where that is not known; gives where each is to be read from.
    pub async fn find(&mut self, application: impl Fn(i32) -> String) -> Result<Vec<(i32, i64)>, Error> {
        let version = self.log.newest().await?;
        let unknown = self.places.iter().filter(|(_, place)| **place == Place::Unknown);
        let unknown: Vec<i32> = unknown.map(|(partition, _)| *partition).collect();
        let mut starts = Vec::with_capacity(unknown.len());
        for partition in unknown {
            let application = application(partition);
            let offset = self.log.offset(&version, &application).await?;
            let next = offset.map_or(0, |offset| offset.saturating_add(1));
            // What waits under another name was read before the topic was made anew, and is nowhere else any more.
            let is_kept = |part: &Part<Add>| part.application != application && part.last().is_some();
            self.parts.retain(|part| part.partition != partition || is_kept(part));
            self.parts.push(Part::new(application, partition));
            self.places.insert(partition, Place::Seeking { next, began: offset.is_some() });
            starts.push((partition, next));
        }
        Ok(starts)
    }

    /// Whether a topic went back since this was last asked.
    pub fn went_back(&mut self) -> bool {
        std::mem::take(&mut self.went_back)
    }

    /// The partitions that are read under another name than their topic has now. One that is being set is read before it is looked at:
    /// set a second time meanwhile, it would be taken for set at the first.
    pub fn outdated(&self, application: impl Fn(i32) -> String) -> Vec<i32> {
        let is_another = |partition: &i32| {
            self.current(*partition).is_some_and(|part| part.application != application(*partition))
        };
        self.reading().filter(is_another).collect()
    }

    /// The partitions that are ours and read from where the table ends.
    fn reading(&self) -> impl Iterator<Item = i32> + '_ {
        let read = self.places.iter().filter(|(_, place)| matches!(place, Place::Reading { .. }));
        read.map(|(partition, _)| *partition)
    }

    /// What waits of a partition, under the name under which it is read.
    pub fn waiting(&self, partition: i32) -> &[Message] {
        self.current(partition).map_or(&[], |part| part.messages.as_slice())
    }

    /// The topic was made anew: of what waits so many messages are of the one before, and what follows them comes again.
    pub fn begin_anew(&mut self, partition: i32, before: usize) {
        if let Some(part) = self.parts.iter_mut().rev().find(|part| part.partition == partition) {
            part.truncate(before);
        }
        self.places.insert(partition, Place::Unknown);
        self.count();
    }

    /// The part into which messages of a partition go: the last one of it.
    fn current(&self, partition: i32) -> Option<&Part<Add>> {
        self.parts.iter().rev().find(|part| part.partition == partition)
    }

    /// A partition is read from where the table ends, from now on.
    pub fn found(&mut self, partition: i32) {
        if let Some(place) = self.places.get_mut(&partition)
            && let Place::Seeking { next, began } = *place
        {
            *place = Place::Reading { next, first: began };
        }
    }

    /// Takes a message; tells where some are missing before it.
    pub fn take(&mut self, incoming: Incoming) -> Option<Gap> {
        let partition = incoming.partition.number;
        let place = self.places.get_mut(&partition)?;
        let Place::Reading { next, first } = *place else { return None };
        let Incoming { offset, timestamp_ms, key, value, headers, .. } = incoming;
        if offset < next {
            self.went_back = true;
            debug!(partition, offset, next, "a message comes once more; its row is known");
            return None;
        }
        *place = Place::Reading { next: offset.saturating_add(1), first: false };
        let part = self.parts.iter_mut().rev().find(|part| part.partition == partition)?;
        let message = Message { offset, timestamp_ms, key, value, headers };
        self.bytes += size(&message);
        part.push(message);
        let (since, written) = self.oldest.unwrap_or_else(|| (Instant::now(), timestamp_ms));
        self.oldest = Some((since, written.min(timestamp_ms)));
        (first && offset > next).then_some(Gap { partition, expected: next, found: offset })
    }

    /// Bytes that wait.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether what waits should be written by now.
    pub fn is_due(&self, wait_max: Duration, now: Instant) -> bool {
        let paused = self.pause.is_some_and(|(until, _)| now < until);
        !paused && self.oldest.is_some_and(|(since, _)| now.duration_since(since) >= wait_max)
    }

    /// Whether anything waits.
    pub const fn is_empty(&self) -> bool {
        self.oldest.is_none()
    }

    /// Whether a flush may be tried, or one that failed is to be waited after.
    pub fn may_flush(&self, now: Instant) -> bool {
        !self.is_empty() && self.pause.is_none_or(|(until, _)| now >= until)
    }

    /// Whether a partition is read up to `end`, or is not ours; `low` is where its topic begins.
    pub fn has_read(&self, partition: i32, low: i64, end: i64) -> bool {
        match self.places.get(&partition) {
            Some(Place::Reading { next, .. } | Place::Seeking { next, .. }) => (*next).max(low) >= end,
            Some(Place::Unknown) => false,
            None => true,
        }
    }

    /// The table, where it is ours to look after its files: whoever reads partition 0 does.
    pub fn kept_here(&self) -> Option<(Table, DeltaTable)> {
        self.places.contains_key(&0).then(|| (self.log.kind(), self.log.table()))
    }

    /// The partitions that are ours.
    pub fn partitions(&self) -> impl Iterator<Item = i32> + '_ {
        self.places.keys().copied()
    }

    /// Counts messages that their topic forgot.
    pub fn lost(&self, messages: u64) {
        self.meter.lost(messages);
    }

    /// Writes what waits; gives how far each partition has come, as its next offset.
    pub async fn flush(&mut self, now_ms: fn() -> i64) -> Vec<(i32, i64)> {
        let end = |partition: i32| Some((partition, self.current(partition)?.last()?.saturating_add(1)));
        let ends: Vec<(i32, i64)> = self.reading().filter_map(end).collect();
        let written = self.oldest.map(|(_, written)| written);
        let table = self.log.kind().name();
        // Cut off, it is as after a crash: its rows are in the table or are not, and the next flush finds out.
        let done = tokio::time::timeout(FLUSH_MAX, flush(&mut self.log, &mut self.parts)).await;
        let done = done.unwrap_or_else(|_| Err(Fault::Store(Error::Slow { table, waited: FLUSH_MAX })));
        let counted = self.log.counted();
        let Flushed { committed, dropped, conflicts, versions } =
            done.as_ref().ok().copied().unwrap_or_default();
        self.meter.flushed(TableFlush {
            rows: committed as u64,
            repeated: dropped as u64,
            conflicts: conflicts as u64,
            versions: versions as u64,
            files: counted.files,
            bytes: counted.bytes,
            rejected: counted.rejects,
        });
        let fault = match done {
            Ok(_) => {
                self.count();
                self.pause = None;
                if let (true, Some(written)) = (committed > 0, written) {
                    let age = u64::try_from(now_ms().saturating_sub(written)).unwrap_or_default();
                    self.meter.fresh(Duration::from_millis(age));
                }
                debug!(
                    table,
                    rows = committed,
                    repeated = dropped,
                    conflicts,
                    files = counted.files,
                    "rows are in their table"
                );
                let waits = |partition| {
                    self.parts.iter().any(|part| part.partition == partition && part.last().is_some())
                };
                return ends.into_iter().filter(|(partition, _)| !waits(*partition)).collect();
            }
            Err(Fault::Store(fault) | Fault::Tries(fault)) => fault,
        };
        let pause = self.pause.map_or(PAUSE_MIN, |(_, pause)| (pause * 2).min(PAUSE_MAX));
        self.pause = Some((Instant::now() + pause, pause));
        let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
        error!(table, error = %fault, cause, waiting_bytes = self.bytes, again_in_s = pause.as_secs_f64(),
            "could not write rows into their table; they are kept and tried again");
        Vec::new()
    }

    /// Counts anew what waits.
    fn count(&mut self) {
        let messages = || self.parts.iter().flat_map(|part| &part.messages);
        self.bytes = messages().map(size).sum();
        let written = messages().map(|message| message.timestamp_ms).min();
        let since = self.oldest.map(|(since, _)| since);
        self.oldest = since.zip(written);
    }
}

fn size(message: &Message) -> usize {
    OVERHEAD + message.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::delta::tests::Place as Folder;
    use forebay_runtime::{
        budget::Budget,
        message::{Channel, Partition},
    };
    use forebay_telemetry::{Settings, Telemetry};
    use std::sync::atomic::Ordering;

    async fn lane(folder: &Folder) -> Lane {
        let telemetry = Telemetry::start(Settings::new("test", "0")).unwrap();
        Lane::new(folder.log().await, telemetry.table("labels"))
    }

    fn incoming(offset: i64) -> Incoming {
        Incoming {
            partition: Partition { topic: "x-labels".into(), number: 0 },
            channel: Channel::Live,
            offset,
            timestamp_ms: 5,
            key: None,
            value: Some(format!(r#"{{"request_id": "r-{offset}", "wrong": true}}"#).into()),
            headers: Vec::new(),
            held: Budget::new(1 << 20).take(0),
        }
    }

    async fn read_from_the_end_of_the_table(lane: &mut Lane) -> i64 {
        lane.take_on(std::iter::once(0));
        let starts = lane.find(|partition| format!("c/t/{partition}")).await.unwrap();
        // What was on its way from where the group had left off comes before the partition is set, and comes again.
        assert_eq!(lane.take(incoming(0)), None);
        assert!(lane.is_empty());
        lane.found(0);
        starts[0].1
    }

    #[tokio::test]
    async fn a_partition_is_read_from_where_its_table_ends_and_nothing_twice() {
        let folder = Folder::new();
        let mut lane = lane(&folder).await;
        assert_eq!(read_from_the_end_of_the_table(&mut lane).await, 0);
        // A new table on an old topic: where it begins is no loss.
        assert_eq!(lane.take(incoming(7)), None);
        assert_eq!(lane.take(incoming(8)), None);
        assert_eq!(lane.flush(|| 6).await, [(0, 9)]);
        assert!(lane.is_empty() && lane.bytes() == 0);
        lane.give_up(0);
        assert_eq!(lane.take(incoming(9)), None, "it is not ours");
        assert_eq!(read_from_the_end_of_the_table(&mut lane).await, 9);
        assert_eq!(lane.take(incoming(8)), None, "it is known");
        assert!(lane.is_empty());
        assert_eq!(lane.take(incoming(9)), None);
        assert!(lane.has_read(0, 0, 10) && !lane.has_read(0, 0, 11) && lane.has_read(0, 11, 11));
        lane.flush(|| 6).await;
        assert_eq!(folder.rows().await, (3, 3));
    }

    #[tokio::test]
    async fn a_topic_that_was_made_anew_begins_under_another_name_and_what_was_read_before_stays() {
        let folder = Folder::new();
        let mut lane = lane(&folder).await;
        read_from_the_end_of_the_table(&mut lane).await;
        (0..5).for_each(|offset| _ = lane.take(incoming(offset)));
        lane.flush(|| 6).await;
        (5..8).for_each(|offset| _ = lane.take(incoming(offset)));
        assert!(!lane.went_back() && lane.outdated(|partition| format!("c/t/{partition}")).is_empty());
        // It begins again at 0; that 6 and 7 are of the new one, whoever compares finds out.
        assert_eq!(lane.take(incoming(0)), None);
        assert!(lane.went_back() && !lane.went_back());
        assert_eq!(lane.outdated(|partition| format!("c/anew/{partition}")), [0]);
        assert_eq!(lane.waiting(0).iter().map(|message| message.offset).collect::<Vec<_>>(), [5, 6, 7]);
        lane.begin_anew(0, 1);
        assert!(lane.has_unknown() && !lane.is_empty());
        // What is nowhere else any more stays also where the partition goes and comes.
        lane.give_up(0);
        lane.take_on(std::iter::once(0));
        assert_eq!(lane.take(incoming(9)), None, "it is not known yet where the new one begins");
        let again = |offset: i64| Incoming {
            value: Some(format!(r#"{{"request_id": "new-{offset}", "wrong": true}}"#).into()),
            ..incoming(offset)
        };
        // Also where the old rows are not written before the new ones come.
        let starts = lane.find(|partition| format!("c/anew/{partition}")).await.unwrap();
        assert_eq!(starts, [(0, 0)]);
        lane.found(0);
        (0..9).for_each(|offset| _ = lane.take(again(offset)));
        assert_eq!(lane.flush(|| 6).await, [(0, 9)]);
        assert_eq!(folder.rows().await, (6 + 9, 6 + 9));
        lane.give_up(0);
        // Each has its end, so that nothing comes a second time.
        lane.take_on(std::iter::once(0));
        assert_eq!(lane.find(|partition| format!("c/t/{partition}")).await.unwrap(), [(0, 6)]);
        lane.give_up(0);
        lane.take_on(std::iter::once(0));
        assert_eq!(lane.find(|partition| format!("c/anew/{partition}")).await.unwrap(), [(0, 9)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flush_that_nobody_answers_is_cut_off_and_its_rows_are_kept() {
        let folder = Folder::new();
        let mut lane = lane(&folder).await;
        read_from_the_end_of_the_table(&mut lane).await;
        lane.take(incoming(0));
        lane.take(Incoming { value: Some("{".into()), ..incoming(1) });
        folder.kept.1.store(true, Ordering::Relaxed);
        let before = Instant::now();
        assert_eq!(lane.flush(|| 6).await, []);
        assert!(!lane.is_empty() && !lane.may_flush(before));
        folder.kept.1.store(false, Ordering::Relaxed);
        assert_eq!(lane.flush(|| 6).await, [(0, 2)]);
        assert_eq!(folder.rows().await, (1, 1));
    }

    #[tokio::test]
    async fn what_the_topic_forgot_before_it_was_read_is_told_once() {
        let folder = Folder::new();
        let mut lane = lane(&folder).await;
        read_from_the_end_of_the_table(&mut lane).await;
        lane.take(incoming(0));
        lane.flush(|| 6).await;
        lane.give_up(0);
        assert_eq!(read_from_the_end_of_the_table(&mut lane).await, 1);
        assert_eq!(lane.take(incoming(5)), Some(Gap { partition: 0, expected: 1, found: 5 }));
        assert_eq!(lane.take(incoming(9)), None, "aborted messages leave gaps that are no loss");
    }
}
