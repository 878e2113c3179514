//! The log alone: restarts after writes cut anywhere, damage, retention, compaction, look-ups by time.

#![expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "small numbers made here")]

use super::batch::{self, Header};
use super::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use tempfile::TempDir;

const NOW: i64 = 1_000_000;

fn settings(segment_bytes: u64) -> Settings {
    Settings { retention_ms: None, ..Settings::new(segment_bytes) }
}

fn compacted(segment_bytes: u64) -> Settings {
    Settings { delete: false, compact: true, dirty_ratio: 0.0, ..settings(segment_bytes) }
}

fn open(dir: &TempDir, settings: &Settings) -> Log {
    Log::open(dir.path(), settings.clone(), 0, NOW).expect("the log opens")
}

/// A batch of an idempotent producer.
fn from_producer(producer: i64, epoch: i16, sequence: i32, values: &[&str]) -> Bytes {
    let records: Vec<_> = values.iter().map(|v| (None, Some(v.as_bytes()), NOW)).collect();
    let mut bytes = batch::build(&records);
    bytes[43..51].copy_from_slice(&producer.to_be_bytes());
    bytes[51..53].copy_from_slice(&epoch.to_be_bytes());
    bytes[53..57].copy_from_slice(&sequence.to_be_bytes());
    let crc = crc32c::crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.into()
}

fn keyed(records: &[(&str, Option<&str>, i64)]) -> Bytes {
    let records: Vec<_> =
        records.iter().map(|(k, v, t)| (Some(k.as_bytes()), v.map(str::as_bytes), *t)).collect();
    batch::build(&records).into()
}

fn append(log: &mut Log, bytes: &Bytes, now: i64) -> i64 {
    log.append(bytes, now).expect("the batch is stored").base
}

/// Every record from `offset` on, a fetch at a time, as a consumer would.
fn read(log: &Log, mut offset: i64) -> Vec<batch::Record> {
    let mut found: Vec<batch::Record> = Vec::new();
    while let Some(slice) = log.slice(offset).expect("the offset is in range") {
        let mut rest = slice.read(200, true).expect("the segment can be read");
        assert!(!rest.is_empty(), "a fetch at {offset} below the end {} found nothing", log.end());
        while !rest.is_empty() {
            let header = Header::parse(&rest).expect("whole batches");
            let whole = rest.split_to(usize::try_from(header.bytes).unwrap());
            batch::check(&whole).expect("right checksum");
            found.extend(batch::records(&whole).unwrap().into_iter().filter(|r| r.offset >= offset));
            offset = offset.max(header.last() + 1);
        }
    }
    found
}

fn values(log: &Log) -> Vec<(i64, String)> {
    let value = |r: batch::Record| String::from_utf8(r.value.unwrap_or_default().to_vec()).unwrap();
    read(log, log.start()).into_iter().map(|r| (r.offset, value(r))).collect()
}

fn last_file(dir: &TempDir) -> PathBuf {
    segment::path(dir.path(), *list(dir.path()).unwrap().last().unwrap())
}

/// What a kill in the middle of a `write(2)` leaves behind whole batches.
#[derive(Debug, Clone)]
enum Torn {
    Nothing,
    /// A prefix of the batch that was being written.
    Prefix(prop::sample::Index),
    /// The file was made longer, but these bytes never reached it.
    Zeroes(usize),
    /// As after a power cut: the right length, the wrong content.
    Garbled(prop::sample::Index),
}

#[derive(Debug, Clone)]
struct Life {
    /// Producer (three of them) and number of records of each batch.
    batches: Vec<(i64, usize)>,
    torn: Torn,
}

fn life() -> impl Strategy<Value = Life> {
    let torn = prop_oneof![
        1 => Just(Torn::Nothing),
        4 => any::<prop::sample::Index>().prop_map(Torn::Prefix),
        1 => (1..200usize).prop_map(Torn::Zeroes),
        2 => any::<prop::sample::Index>().prop_map(Torn::Garbled),
    ];
    (prop::collection::vec((0..3i64, 1..6usize), 0..12), torn)
        .prop_map(|(batches, torn)| Life { batches, torn })
}

/// A hundred logs, each killed and opened ten times.
#[test]
fn a_thousand_restarts_with_torn_tails_lose_nothing_acknowledged() {
    let mut runner = TestRunner::new(Config { cases: 100, ..Config::default() });
    let lives = prop::collection::vec(life(), 10);
    runner
        .run(&(lives, 500..4000u64), |(lives, segment_bytes)| {
            let dir = TempDir::new().unwrap();
            let settings = settings(segment_bytes);
            let mut acknowledged: Vec<(i64, String)> = Vec::new();
            let mut sequences: HashMap<i64, i32> = HashMap::new();
            let mut latest: HashMap<i64, (Bytes, i64)> = HashMap::new();
            for (n, life) in lives.iter().enumerate() {
                let mut log = open(&dir, &settings);
                prop_assert_eq!(log.end(), acknowledged.len() as i64);
                for (producer, (bytes, base)) in &latest {
                    // The client never saw the answer and sends the batch again.
                    let again = log.append(bytes, NOW).unwrap();
                    prop_assert_eq!(again, Appended { base: *base, append_ms: -1, new: false });
                    let skipped = from_producer(*producer, 0, sequences[producer] + 1, &["gap"]);
                    prop_assert!(matches!(log.append(&skipped, NOW), Err(AppendError::OutOfOrder)));
                }
                for (b, (producer, count)) in life.batches.iter().enumerate() {
                    let texts: Vec<String> =
                        (0..*count).map(|r| format!("life {n} batch {b} record {r}")).collect();
                    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                    let sequence = sequences.entry(*producer).or_default();
                    let bytes = from_producer(*producer, 0, *sequence, &texts);
                    *sequence += *count as i32;
                    let base = append(&mut log, &bytes, NOW);
                    prop_assert_eq!(base, acknowledged.len() as i64);
                    acknowledged
                        .extend(texts.iter().enumerate().map(|(i, t)| (base + i as i64, (*t).to_owned())));
                    latest.insert(*producer, (bytes, base));
                }
                let end = log.end();
                drop(log);
                tear(&dir, &life.torn, end);
            }
            prop_assert_eq!(values(&open(&dir, &settings)), acknowledged);
            Ok(())
        })
        .unwrap();
}

fn tear(dir: &TempDir, torn: &Torn, end: i64) {
    let mut unacknowledged = from_producer(9, 0, 0, &["never acknowledged"; 4]).to_vec();
    batch::set_base(&mut unacknowledged, end);
    let tail = match torn {
        Torn::Nothing => return,
        Torn::Prefix(at) => unacknowledged[..at.index(unacknowledged.len())].to_vec(),
        Torn::Zeroes(n) => vec![0; *n],
        Torn::Garbled(at) => {
            // Behind the base offset and leader epoch, which the checksum does not cover.
            let at = 16 + at.index(unacknowledged.len() - 16);
            unacknowledged[at] ^= 0x5a;
            unacknowledged
        }
    };
    let Some(base) = list(dir.path()).unwrap().last().copied() else { return };
    let path = segment::path(dir.path(), base);
    fs::OpenOptions::new().append(true).open(path).unwrap().write_all(&tail).unwrap();
}

#[test]
fn damage_with_data_behind_it_is_an_error_that_names_the_byte() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &settings(1 << 20));
    let batch = keyed(&[("k", Some("v"), NOW)]);
    for _ in 0..3 {
        append(&mut log, &batch, NOW);
    }
    drop(log);
    let path = last_file(&dir);
    let mut bytes = fs::read(&path).unwrap();
    bytes[batch.len() + 63] ^= 1;
    fs::write(&path, &bytes).unwrap();

    let error = Log::open(dir.path(), settings(1 << 20), 0, NOW).unwrap_err();
    let OpenError::Damaged { path: named, position, fault } = error else { panic!("{error}") };
    assert_eq!((named, position, fault), (path.clone(), batch.len() as u64, Fault::Checksum));
    assert_eq!(fs::read(&path).unwrap(), bytes, "nothing was cut");
}

#[test]
fn a_short_segment_with_another_behind_it_is_damage_and_not_a_torn_tail() {
    let dir = TempDir::new().unwrap();
    let small = settings(100);
    let mut log = open(&dir, &small);
    for _ in 0..3 {
        append(&mut log, &keyed(&[("k", Some("v"), NOW)]), NOW);
    }
    drop(log);
    let first = segment::path(dir.path(), 0);
    let bytes = fs::read(&first).unwrap();
    fs::write(&first, &bytes[..bytes.len() - 1]).unwrap();

    let error = Log::open(dir.path(), small, 0, NOW).unwrap_err();
    assert!(matches!(error, OpenError::Damaged { path, position: 0, .. } if path == first));
}

#[test]
fn after_the_advised_truncate_the_log_opens_and_later_segments_are_kept() {
    let dir = TempDir::new().unwrap();
    let small = settings(100);
    let mut log = open(&dir, &small);
    for v in ["a", "b", "c"] {
        append(&mut log, &keyed(&[("k", Some(v), NOW)]), NOW);
    }
    drop(log);
    fs::OpenOptions::new().write(true).open(segment::path(dir.path(), 1)).unwrap().set_len(0).unwrap();
    assert_eq!(values(&open(&dir, &small)), [(0, "a".into()), (2, "c".into())]);
}

#[test]
fn a_producer_is_held_to_its_epoch_and_order() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &settings(1 << 20));
    append(&mut log, &from_producer(7, 0, 0, &["a", "b"]), NOW);
    let stored = log.append(&from_producer(7, 0, 0, &["a", "b"]), NOW).unwrap();
    assert_eq!(stored, Appended { base: 0, append_ms: -1, new: false });
    let mut refused =
        |epoch, sequence| log.append(&from_producer(7, epoch, sequence, &["x"]), NOW).unwrap_err();
    assert!(matches!(refused(0, 3), AppendError::OutOfOrder));
    assert!(matches!(refused(1, 2), AppendError::OutOfOrder));
    append(&mut log, &from_producer(7, 1, 0, &["c"]), NOW);
    let stale = log.append(&from_producer(7, 0, 2, &["d"]), NOW).unwrap_err();
    assert!(matches!(stale, AppendError::StaleEpoch));
    assert_eq!(values(&log).len(), 3);
}

#[test]
fn only_the_last_five_batches_of_a_producer_can_be_answered_with_their_offset() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &settings(1 << 20));
    for sequence in 0..7 {
        append(&mut log, &from_producer(7, 0, sequence, &["x"]), NOW);
    }
    assert_eq!(log.append(&from_producer(7, 0, 2, &["x"]), NOW).unwrap().base, 2);
    let long_ago = log.append(&from_producer(7, 0, 1, &["x"]), NOW).unwrap_err();
    assert!(matches!(long_ago, AppendError::StoredLongAgo));
}

#[test]
fn sequence_numbers_wrap_to_zero() {
    assert_eq!(batch::advance(i32::MAX, 1), 0);
    assert_eq!(batch::advance(i32::MAX - 1, 3), 1);
}

#[test]
fn what_is_not_one_right_batch_is_refused_and_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &Settings { message_bytes_max: 200, ..settings(1 << 20) });
    let good = keyed(&[("k", Some("v"), NOW)]);
    let mut garbled = good.to_vec();
    garbled[65] ^= 1;
    let twice = [good.clone(), good.clone()].concat();
    let large = keyed(&[("k", Some(&"v".repeat(200)), NOW)]);
    let mut refused = |bytes: Vec<u8>| log.append(&bytes.into(), NOW).unwrap_err().to_string();
    assert_eq!(refused(garbled), "batch is damaged: checksum does not match");
    assert_eq!(refused(twice), "batch is damaged: shorter than its header or its stated length");
    assert_eq!(refused(Vec::new()), "batch is damaged: shorter than its header or its stated length");
    assert_eq!(refused(large.to_vec()), "batch of 271 bytes is larger than max.message.bytes=200");
    assert_eq!(log.end(), 0);
}

#[test]
fn a_log_append_time_topic_stamps_the_batch_and_keeps_its_checksum_right() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &Settings { log_append_time: true, ..settings(1 << 20) });
    let appended = log.append(&keyed(&[("k", Some("v"), 1), ("k", Some("w"), 2)]), 777).unwrap();
    assert_eq!(appended.append_ms, 777);
    assert!(read(&log, 0).iter().all(|r| r.timestamp == 777));
    drop(log);
    assert_eq!(open(&dir, &settings(1 << 20)).end(), 2);
}

#[test]
fn a_fetch_begins_at_the_batch_that_holds_the_offset() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &settings(150));
    for n in 0..50 {
        let texts: Vec<String> = (0..3).map(|r| format!("{n}.{r}")).collect();
        let texts: Vec<_> = texts.iter().map(|t| ("k", Some(t.as_str()), NOW)).collect();
        append(&mut log, &keyed(&texts), NOW);
    }
    for offset in 0..150 {
        assert_eq!(read(&log, offset).first().map(|r| r.offset), Some(offset));
    }
    assert!(log.slice(150).unwrap().is_none());
    assert!(matches!(log.slice(151), Err(SliceError::OutOfRange)));
    assert!(matches!(log.slice(-1), Err(SliceError::OutOfRange)));
}

#[test]
fn a_fetch_of_a_later_partition_leaves_out_a_batch_that_does_not_fit() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &settings(1 << 20));
    let batch = keyed(&[("k", Some("v"), NOW)]);
    append(&mut log, &batch, NOW);
    append(&mut log, &batch, NOW);
    let bytes = |max, at_least_one| log.slice(0).unwrap().unwrap().read(max, at_least_one).unwrap().len();
    assert_eq!(bytes(10, false), 0);
    assert_eq!(bytes(10, true), batch.len());
    assert_eq!(bytes(2 * batch.len() as u64 - 1, false), batch.len());
    assert_eq!(bytes(1000, false), 2 * batch.len());
}

#[test]
fn a_look_up_by_time_finds_the_first_record_at_or_after_it() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &settings(200));
    // Timestamps neither rise within a batch nor from batch to batch.
    let times = [[10, 30, 20], [25, 5, 15], [40, 50, 45], [41, 60, 12]];
    for batch in times {
        append(&mut log, &keyed(&batch.map(|t| ("k", Some("v"), t))), NOW);
    }
    let at = |log: &Log, time| log.at_time(time).unwrap().answer().unwrap();
    let flat: Vec<i64> = times.concat();
    for time in 0..70 {
        let want = flat.iter().position(|t| *t >= time).map(|i| (i as i64, flat[i]));
        assert_eq!(at(&log, time), want, "at {time}");
    }
    assert_eq!(log.at_latest_time().unwrap().answer().unwrap(), Some((10, 60)));
    log.delete_below(2);
    assert_eq!(at(&log, 0), Some((2, 20)), "deleted records are not found");
}

#[test]
fn deleted_records_are_gone_and_their_segments_go_at_the_next_upkeep() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &settings(100));
    for v in ["a", "b", "c", "d"] {
        append(&mut log, &keyed(&[("k", Some(v), NOW)]), NOW);
    }
    log.delete_below(2);
    assert_eq!(values(&log), [(2, "c".into()), (3, "d".into())]);
    log.retain(NOW);
    assert_eq!(list(dir.path()).unwrap(), [2, 3]);
    log.delete_below(4);
    log.retain(NOW);
    assert_eq!((log.start(), log.end(), log.bytes()), (4, 4, 0));
    drop(log);
    let mut log = open(&dir, &settings(100));
    assert_eq!(append(&mut log, &keyed(&[("k", Some("e"), NOW)]), NOW), 4, "no offset is given twice");
}

#[test]
fn retention_by_time_drops_expired_segments_from_the_front() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &Settings { retention_ms: Some(100), ..settings(100) });
    for (v, time) in [("a", 10), ("b", 20), ("c", 150)] {
        append(&mut log, &keyed(&[("k", Some(v), time)]), time);
    }
    assert!(!log.retain(110));
    assert!(log.retain(125));
    assert_eq!(values(&log), [(2, "c".into())]);
    assert!(log.retain(251), "the segment that is appended to expires too");
    assert_eq!((log.start(), log.end()), (3, 3));
}

#[test]
fn retention_by_size_keeps_at_least_that_much() {
    let dir = TempDir::new().unwrap();
    let batch = keyed(&[("k", Some("v"), NOW)]);
    let bytes = batch.len() as u64;
    let mut log = open(&dir, &Settings { retention_bytes: Some(2 * bytes), ..settings(100) });
    for _ in 0..5 {
        append(&mut log, &batch, NOW);
    }
    log.retain(NOW);
    assert_eq!((log.start(), log.bytes()), (3, 2 * bytes));
}

fn compact(log: &mut Log, now: i64) {
    if let Some(plan) = log.plan_compaction(now).unwrap() {
        let rewritten = plan.run().unwrap();
        log.finish_compaction(rewritten).unwrap();
    }
}

/// Seals what was appended, as a full segment would.
fn seal(log: &mut Log) {
    log.roll(NOW).unwrap();
}

#[test]
fn compaction_keeps_the_last_value_of_every_key_over_random_logs_and_restarts() {
    let mut runner = TestRunner::new(Config { cases: 60, ..Config::default() });
    let step = prop_oneof![
        6 => prop::collection::vec((0..12u8, prop::option::weighted(0.8, 0..100u8)), 1..6).prop_map(Some),
        2 => Just(None),
    ];
    runner
        .run(
            &(prop::collection::vec(step, 1..60), 200..1500u64, 1..20usize),
            |(steps, segment_bytes, keys_max)| {
                let dir = TempDir::new().unwrap();
                let settings = compacted(segment_bytes);
                let mut log = open(&dir, &settings);
                let mut want: BTreeMap<String, (i64, Option<String>)> = BTreeMap::new();
                for step in steps {
                    let Some(records) = step else {
                        if let Some(plan) = log.plan_compaction(NOW).unwrap() {
                            let rewritten = plan.with_keys_max(keys_max).run().unwrap();
                            log.finish_compaction(rewritten).unwrap();
                        }
                        let end = log.end();
                        drop(log);
                        log = open(&dir, &settings);
                        prop_assert_eq!(log.end(), end, "compaction gave offsets free");
                        continue;
                    };
                    let records: Vec<(String, Option<String>)> = records
                        .into_iter()
                        .map(|(k, v)| (format!("key {k}"), v.map(|v| format!("value {v}"))))
                        .collect();
                    let plain: Vec<_> =
                        records.iter().map(|(k, v)| (k.as_str(), v.as_deref(), NOW)).collect();
                    let base = append(&mut log, &keyed(&plain), NOW);
                    for (i, (key, value)) in records.into_iter().enumerate() {
                        want.insert(key, (base + i as i64, value));
                    }
                }
                let mut have = BTreeMap::new();
                let mut before = -1;
                for record in read(&log, log.start()) {
                    prop_assert!(record.offset > before, "offsets rise");
                    before = record.offset;
                    let key = String::from_utf8(record.key.unwrap().to_vec()).unwrap();
                    let value = record.value.map(|v| String::from_utf8(v.to_vec()).unwrap());
                    have.insert(key, (record.offset, value));
                }
                prop_assert_eq!(have, want);
                Ok(())
            },
        )
        .unwrap();
}

#[test]
fn compaction_drops_what_is_superseded_and_merges_the_rest() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &compacted(150));
    for n in 0..40 {
        let value = n.to_string();
        append(&mut log, &keyed(&[(["a", "b"][n % 2], Some(&value), NOW)]), NOW);
    }
    let before = log.bytes();
    seal(&mut log);
    compact(&mut log, NOW);
    assert_eq!(values(&log), [(38, "38".into()), (39, "39".into())]);
    assert!(log.bytes() < before / 10);
    assert!(list(dir.path()).unwrap().len() <= 21, "emptied segments were merged");
    compact(&mut log, NOW);
    assert_eq!(values(&log).len(), 2, "a second pass finds nothing to do");
}

#[test]
fn a_tombstone_stays_for_its_time_and_then_goes() {
    let dir = TempDir::new().unwrap();
    let settings = Settings { tombstone_ms: 1000, ..compacted(1 << 20) };
    let mut log = open(&dir, &settings);
    append(&mut log, &keyed(&[("a", Some("1"), NOW), ("a", None, NOW), ("b", Some("2"), NOW)]), NOW);
    seal(&mut log);
    compact(&mut log, NOW + 500);
    let keys =
        |log: &Log| read(log, 0).into_iter().map(|r| (r.offset, r.value.is_some())).collect::<Vec<_>>();
    assert_eq!(keys(&log), [(1, false), (2, true)]);
    append(&mut log, &keyed(&[("c", Some("3"), NOW)]), NOW + 1500);
    seal(&mut log);
    compact(&mut log, NOW + 1501);
    assert_eq!(keys(&log), [(2, true), (3, true)]);
}

#[test]
fn a_record_younger_than_the_lag_neither_goes_nor_supersedes() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, &Settings { compaction_lag_ms: 1000, ..compacted(1 << 20) });
    append(&mut log, &keyed(&[("a", Some("1"), NOW), ("a", Some("2"), NOW)]), NOW);
    seal(&mut log);
    append(&mut log, &keyed(&[("a", Some("3"), NOW + 900)]), NOW);
    seal(&mut log);
    compact(&mut log, NOW + 999);
    assert_eq!(values(&log).len(), 3);
    compact(&mut log, NOW + 1001);
    assert_eq!(values(&log), [(1, "2".into()), (2, "3".into())]);
}

#[test]
fn a_producer_is_remembered_when_compaction_dropped_all_it_wrote() {
    let dir = TempDir::new().unwrap();
    let settings = compacted(1 << 20);
    let mut log = open(&dir, &settings);
    let mut bytes = keyed(&[("a", Some("1"), NOW)]).to_vec();
    bytes[43..57].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0]);
    let crc = crc32c::crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    let mine = Bytes::from(bytes);
    append(&mut log, &mine, NOW);
    append(&mut log, &keyed(&[("a", Some("2"), NOW)]), NOW);
    seal(&mut log);
    compact(&mut log, NOW);
    assert_eq!(values(&log), [(1, "2".into())]);
    drop(log);
    let again = open(&dir, &settings).append(&mine, NOW).unwrap();
    assert_eq!(again, Appended { base: 0, append_ms: -1, new: false });
}

#[test]
fn a_kill_between_the_rename_and_the_removals_of_a_merge_is_made_good_at_open() {
    let dir = TempDir::new().unwrap();
    let settings = compacted(150);
    let mut log = open(&dir, &settings);
    for n in 0..6 {
        append(&mut log, &keyed(&[(&n.to_string(), Some("v"), NOW)]), NOW);
    }
    seal(&mut log);
    let want = values(&log);
    log.settings.segment_bytes = 1 << 20;
    let kept: Vec<(PathBuf, Vec<u8>)> = list(dir.path())
        .unwrap()
        .into_iter()
        .skip(1)
        .map(|base| segment::path(dir.path(), base))
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    compact(&mut log, NOW);
    drop(log);
    for (path, bytes) in kept {
        fs::write(path, bytes).unwrap();
    }
    fs::write(dir.path().join("00000000000000000000.cleaned"), b"half").unwrap();
    let log = open(&dir, &settings);
    assert_eq!(values(&log), want);
    assert_eq!(list(dir.path()).unwrap(), [0, 6]);
}

#[test]
fn repeated_header_names_survive_compaction_in_every_codec() {
    // A record with the header "h" twice: attributes, time, offset, key "b", value "x", two headers.
    let doubled = |key: u8, delta: u8| {
        let body = [0, 0, delta * 2, 2, key, 2, b'x', 4, 2, b'h', 2, b'1', 2, b'h', 2, b'2'];
        [vec![(body.len() * 2) as u8], body.to_vec()].concat()
    };
    use bytes::BufMut;
    use kafka_protocol::compression::{Compressor, Gzip, Lz4, Snappy, Zstd};
    let payload = [doubled(b'a', 0), doubled(b'b', 1)].concat();
    for codec in 0..=4u8 {
        let mut packed = bytes::BytesMut::new();
        let put = |b: &mut bytes::BytesMut| {
            b.put_slice(&payload);
            Ok(())
        };
        match codec {
            0 => put(&mut packed),
            1 => Gzip::compress(&mut packed, put),
            2 => Snappy::compress(&mut packed, put),
            3 => Lz4::compress(&mut packed, put),
            _ => Zstd::compress(&mut packed, put),
        }
        .unwrap();
        let mut whole = batch::build(&[(None, None, NOW), (None, None, NOW)])[..batch::HEADER].to_vec();
        whole[22] = codec;
        whole.extend_from_slice(&packed);
        let length = (whole.len() - 12) as i32;
        whole[8..12].copy_from_slice(&length.to_be_bytes());
        let crc = crc32c::crc32c(&whole[21..]);
        whole[17..21].copy_from_slice(&crc.to_be_bytes());

        let kept = batch::filter(&whole.into(), |r| r.key.as_deref() == Some(b"b")).unwrap().unwrap();
        let header = batch::check(&kept).expect("right checksum");
        assert_eq!((header.count, header.last_delta, header.attributes), (1, 1, i16::from(codec)));
        let mut buffer = kept.clone();
        let decoded = kafka_protocol::records::RecordBatchDecoder::decode(&mut buffer).unwrap();
        assert_eq!(decoded.records.len(), 1);
        assert_eq!(decoded.records[0].offset, 1);
        if codec == 0 {
            assert!(kept.ends_with(&doubled(b'b', 1)), "kept byte for byte");
        }
    }
}
