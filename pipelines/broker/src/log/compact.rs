//! Log compaction: of each key only the last record stays; a tombstone goes after its time.
//!
//! Invariants: offsets do not change; the segment that is appended to is never touched; a record younger
//! than `min.compaction.lag.ms` is neither dropped nor a reason to drop another. A kill at any moment
//! leaves a log that opens with the same last value for every key: a rewritten segment is complete and
//! synced before it takes its place by rename, and segments merged into it are removed only after.
//!
//! Memory: one batch at a time, and [`KEYS_MAX`] keys as 16-byte hashes (48 MiB). A pass that meets
//! more keys compacts the records up to there, and the next pass goes on from there.
//!
//! The rewriting runs without the log's lock, between [`Log::plan_compaction`] and [`Log::finish_compaction`].

use super::batch::{self, Header, Record};
use super::segment::{Segment, View};
use super::{Log, Settings};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

const KEYS_MAX: usize = 1_000_000;

#[derive(Debug)]
struct Input {
    view: View,
    path: PathBuf,
    base: i64,
    bytes: u64,
    next: i64,
    modified_ms: i64,
}

/// The segments to go over, and what is known of them.
#[derive(Debug)]
pub(crate) struct Plan {
    inputs: Vec<Input>,
    dir: PathBuf,
    settings: Settings,
    cleaned_to: i64,
    producer_bases: HashSet<i64>,
    now_ms: i64,
    keys_max: usize,
}

/// Segments rewritten beside the old ones, to be put in their place.
#[derive(Debug)]
pub(crate) struct Rewritten {
    outputs: Vec<Output>,
    cleaned_to: i64,
}

#[derive(Debug)]
struct Output {
    segment: Segment,
    inputs: Vec<PathBuf>,
}

impl Log {
    /// What there is to compact, if it is worth it.
    pub(crate) fn plan_compaction(&mut self, now_ms: i64) -> io::Result<Option<Plan>> {
        if !self.settings.compact {
            return Ok(None);
        }
        let young = now_ms.saturating_sub(self.settings.compaction_lag_ms);
        let sealed = self.segments.len() - 1;
        let cleanable = self.segments[..sealed]
            .iter()
            .position(|s| self.settings.compaction_lag_ms > 0 && s.max_timestamp > young)
            .unwrap_or(sealed);
        let segments = &self.segments[..cleanable];
        let total: u64 = segments.iter().map(|s| s.bytes).sum();
        let dirty: u64 = segments.iter().filter(|s| s.next > self.cleaned_to).map(|s| s.bytes).sum();
        // A tombstone that falls due waits for the next pass that new records make worth while.
        if dirty == 0 || (dirty as f64) < self.settings.dirty_ratio * total as f64 {
            return Ok(None);
        }
        let inputs = segments
            .iter()
            .filter(|s| !s.is_empty())
            .map(|s| {
                Ok(Input {
                    view: s.view()?,
                    path: s.path.clone(),
                    base: s.base,
                    bytes: s.bytes,
                    next: s.next,
                    modified_ms: s.modified_ms,
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Some(Plan {
            inputs,
            dir: self.dir.clone(),
            settings: self.settings.clone(),
            cleaned_to: self.cleaned_to,
            producer_bases: self.producers.latest_bases().into_iter().collect(),
            now_ms,
            keys_max: KEYS_MAX,
        }))
    }

    /// Puts the rewritten segments in the old ones' place.
    pub(crate) fn finish_compaction(&mut self, rewritten: Rewritten) -> io::Result<()> {
        for Output { mut segment, inputs } in rewritten.outputs {
            let (Some(first), Some(at)) =
                (inputs.first(), self.segments.iter().position(|s| Some(&s.path) == inputs.first()))
            else {
                // Retention took the old segment meanwhile.
                remove(&segment.path);
                continue;
            };
            fs::rename(&segment.path, first)?;
            File::open(&self.dir)?.sync_all()?;
            for merged in &inputs[1..] {
                fs::remove_file(merged)?;
            }
            segment.path.clone_from(first);
            let replaced = self.segments[at..].iter().take_while(|s| inputs.contains(&s.path)).count();
            // What was dropped at its end is gone, but the offsets are not free again.
            segment.next = self.segments[at + replaced - 1].next;
            self.segments.splice(at..at + replaced, [segment]);
        }
        self.cleaned_to = self.cleaned_to.max(rewritten.cleaned_to);
        Ok(())
    }
}

/// The last offset of each key, the keys as 128-bit hashes under random seeds.
struct Latest {
    seeds: (RandomState, RandomState),
    offsets: HashMap<(u64, u64), i64>,
    /// Only offsets below have been looked at.
    to: i64,
}

impl Latest {
    fn hash(&self, key: &[u8]) -> (u64, u64) {
        (self.seeds.0.hash_one(key), self.seeds.1.hash_one(key))
    }

    fn build(plan: &Plan) -> io::Result<Latest> {
        let seeds = (RandomState::new(), RandomState::new());
        let mut latest = Latest { seeds, offsets: HashMap::new(), to: plan.cleaned_to };
        for input in plan.inputs.iter().filter(|i| i.next > plan.cleaned_to) {
            let mut batches = input.view.batches(0);
            while let Some((position, header)) = batches.next()? {
                if header.count > 0 {
                    for record in records(&input.view, position, &header)?.1 {
                        let hash = latest.hash(record.key.as_deref().unwrap_or_default());
                        latest.offsets.insert(hash, record.offset);
                    }
                }
                latest.to = header.last() + 1;
                if latest.offsets.len() >= plan.keys_max {
                    return Ok(latest);
                }
            }
        }
        latest.to = plan.inputs.last().map_or(latest.to, |i| i.next);
        Ok(latest)
    }

    fn keeps(&self, record: &Record, tombstones: bool) -> bool {
        if record.offset >= self.to {
            return true;
        }
        // A key that the dirty part does not name keeps what an earlier pass left of it.
        let hash = self.hash(record.key.as_deref().unwrap_or_default());
        let superseded = self.offsets.get(&hash).is_some_and(|last| *last > record.offset);
        !superseded && (record.value.is_some() || tombstones)
    }
}

fn records(view: &View, position: u64, header: &Header) -> io::Result<(Bytes, Vec<Record>)> {
    let bytes = view.batch(position, header)?;
    let records = batch::records(&bytes).map_err(io::Error::other)?;
    Ok((bytes, records))
}

impl Plan {
    /// Reads the keys, then writes each group of segments anew beside the old ones.
    pub(crate) fn run(&self) -> io::Result<Rewritten> {
        let latest = Latest::build(self)?;
        let mut outputs = Vec::new();
        for group in self.groups(latest.to) {
            outputs.push(self.rewrite(group, &latest)?);
        }
        Ok(Rewritten { outputs, cleaned_to: latest.to })
    }

    /// Neighbours that fit in one segment become one, so that small remains do not pile up.
    fn groups(&self, to: i64) -> Vec<&[Input]> {
        let inputs = &self.inputs[..self.inputs.partition_point(|i| i.base < to)];
        let (mut groups, mut from, mut bytes) = (Vec::new(), 0, 0);
        for (at, input) in inputs.iter().enumerate() {
            if at > from && bytes + input.bytes > self.settings.segment_bytes {
                groups.push(&inputs[from..at]);
                (from, bytes) = (at, 0);
            }
            bytes += input.bytes;
        }
        if from < inputs.len() {
            groups.push(&inputs[from..]);
        }
        groups
    }

    fn rewrite(&self, group: &[Input], latest: &Latest) -> io::Result<Output> {
        let base = group.first().map_or(0, |i| i.base);
        let cleaned = self.dir.join(format!("{base:020}.cleaned"));
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(&cleaned)?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        for input in group {
            let age_ms = self.now_ms.saturating_sub(input.modified_ms);
            let tombstones = age_ms <= self.settings.tombstone_ms;
            let mut batches = input.view.batches(0);
            while let Some((position, header)) = batches.next()? {
                if let Some(kept) = self.keep(&input.view, position, &header, latest, tombstones)? {
                    writer.write_all(&kept)?;
                }
            }
        }
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        let modified_ms = group.iter().map(|i| i.modified_ms).max().unwrap_or(self.now_ms);
        // The age of tombstones counts from the last append, which a rewrite is not.
        let modified = UNIX_EPOCH + Duration::from_millis(u64::try_from(modified_ms).unwrap_or(0));
        file.set_modified(modified)?;
        file.sync_all()?;
        // Read back before it may replace anything: what goes in has been checked whole.
        let (segment, bad) = Segment::recover(&cleaned, base, |_| {})?;
        match bad {
            Some(bad) => Err(io::Error::other(format!("compaction wrote a bad batch: {}", bad.fault))),
            None => Ok(Output { segment, inputs: group.iter().map(|i| i.path.clone()).collect() }),
        }
    }

    fn keep(
        &self,
        view: &View,
        position: u64,
        header: &Header,
        latest: &Latest,
        tombstones: bool,
    ) -> io::Result<Option<Bytes>> {
        let bytes = view.batch(position, header)?;
        let kept = match header.count {
            0 => None,
            _ => batch::filter(&bytes, |r| latest.keeps(r, tombstones)).map_err(io::Error::other)?,
        };
        // Two that must not vanish: a producer's latest batch (its sequence number), and the last batch
        // of all (a reader in front of it must have something to step over).
        let last = self.inputs.last().is_some_and(|i| i.next == header.last() + 1);
        if kept.is_none() && (last || self.producer_bases.contains(&header.base)) {
            return batch::hollow(&bytes).map(Some).map_err(io::Error::other);
        }
        Ok(kept)
    }

    /// Lowers the bound on keys, to test a log with more of them.
    #[cfg(test)]
    pub(crate) fn with_keys_max(mut self, keys_max: usize) -> Plan {
        self.keys_max = keys_max;
        self
    }
}

impl Rewritten {
    /// Bytes of all rewritten segments.
    pub(crate) fn bytes(&self) -> u64 {
        self.outputs.iter().map(|o| o.segment.bytes).sum()
    }

    /// Removes what was written, when it cannot take its place.
    pub(crate) fn discard(&self) {
        for output in &self.outputs {
            remove(&output.segment.path);
        }
    }
}

fn remove(path: &Path) {
    // Opening the log removes it too; a file that stays costs space, not truth.
    let _ = fs::remove_file(path);
}
