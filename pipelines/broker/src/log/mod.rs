//! One partition's log: segments on disk, appended at the end, read anywhere, shortened from the front.
//!
//! Invariants: offsets rise and are never given twice, over restarts, retention and compaction. A batch
//! that `append` returned for is in the file (written with `write(2)`), so a kill of the process loses
//! nothing; when it is on the disk is the fsync policy's business (the `flush` module).
//!
//! Opening reads every segment whole and checks every checksum, about a second per GiB. A write that was
//! cut short at the end of the log is cut off; damage with data behind it is an error that names the
//! place, because cutting there would throw away good records.

pub(crate) mod batch;
pub(crate) mod compact;
pub(crate) mod producers;
pub(crate) mod segment;
#[cfg(test)]
mod tests;

use crate::settings::Settings;
use batch::{Fault, Header};
use bytes::Bytes;
use producers::{Producers, Verdict};
use segment::{Bad, Segment, View};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("segment {path} is damaged at byte {position}: {fault}")]
    Damaged { path: PathBuf, position: u64, fault: Fault },
    #[error("could not read {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Why a batch was not stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppendError {
    #[error("batch is damaged: {0}")]
    Corrupt(Fault),
    #[error("batch is not acceptable: {0}")]
    Invalid(&'static str),
    #[error("batch of {bytes} bytes is larger than max.message.bytes={max}")]
    TooLarge { bytes: u64, max: u64 },
    #[error("sequence number is not the next one")]
    OutOfOrder,
    #[error("sequence number was stored long ago")]
    StoredLongAgo,
    #[error("producer epoch is stale")]
    StaleEpoch,
    #[error("could not write {path}")]
    Storage {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Where a batch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Appended {
    pub base: i64,
    /// -1 on a CreateTime topic.
    pub append_ms: i64,
    /// False if it was there before: nothing to wake anyone for.
    pub new: bool,
}

/// What `read` needs after the lock is let go.
#[derive(Debug)]
pub(crate) struct Slice {
    view: View,
    from: u64,
    offset: i64,
}

impl Slice {
    /// Whole batches of at most `bytes_max` bytes; the first whatever its size if `at_least_one`.
    pub(crate) fn read(&self, bytes_max: u64, at_least_one: bool) -> io::Result<Bytes> {
        self.view.read(self.from, self.offset, bytes_max, at_least_one)
    }
}

/// A question by time, answerable without the log's lock.
#[derive(Debug)]
pub(crate) struct TimeQuery {
    views: Vec<(View, u64)>,
    timestamp: i64,
    start: i64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Log {
    dir: PathBuf,
    pub settings: Settings,
    /// Never empty; the last one is appended to.
    segments: Vec<Segment>,
    start: i64,
    producers: Producers,
    /// Offsets below have been compacted in this process's life.
    cleaned_to: i64,
    /// Files written to since they were last synced, beside the open one.
    unsynced: Vec<Arc<File>>,
    dirty: bool,
    scratch: Vec<u8>,
}

impl Log {
    /// Opens or makes the log in `dir`, whose records below `start` were deleted.
    pub(crate) fn open(dir: &Path, settings: Settings, start: i64, now_ms: i64) -> Result<Log, OpenError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { path, source }
        };
        fs::create_dir_all(dir).map_err(io(dir))?;
        let mut producers = Producers::default();
        let mut segments: Vec<Segment> = Vec::new();
        let mut torn: Option<(usize, Bad)> = None;
        for base in list(dir).map_err(io(dir))? {
            let path = segment::path(dir, base);
            if segments.last().is_some_and(|s| base < s.next) {
                // A merge wrote this segment's records into the one before and was killed before it
                // could remove this file.
                tracing::warn!(path = %path.display(), "removing a segment that compaction had merged");
                fs::remove_file(&path).map_err(io(&path))?;
                continue;
            }
            let (segment, bad) =
                Segment::recover(&path, base, |header| producers.note(header)).map_err(io(&path))?;
            // Only what nothing follows can be a write that was cut short.
            let middle = bad.as_ref().is_some_and(|b| b.data_follows).then_some(segments.len());
            let middle = middle.or(torn.as_ref().filter(|_| !segment.is_empty()).map(|t| t.0));
            torn = bad.map(|b| (segments.len(), b)).or(torn);
            segments.push(segment);
            if let (Some(at), Some((_, bad))) = (middle, torn.as_ref()) {
                let (path, position) = (segments[at].path.clone(), segments[at].bytes);
                return Err(OpenError::Damaged { path, position, fault: bad.fault });
            }
        }
        if let Some((at, bad)) = torn {
            let (path, position) = (&segments[at].path, segments[at].bytes);
            segments[at].cut().map_err(io(path))?;
            tracing::warn!(path = %path.display(), position, bytes = bad.file_bytes - position,
                reason = %bad.fault, "cut off a write that was never finished");
        }
        let next = segments.last().map_or(start, |s| s.next);
        if segments.is_empty() || next < start {
            // Without a file at offset 0 there is nothing to remember; later offsets must be on disk.
            let mut segment = Segment::new(dir, start.max(next), now_ms);
            if segment.base > 0 {
                segment.create().map_err(io(&segment.path))?;
            }
            segments.push(segment);
        }
        let first = segments.first().map_or(start, |s| s.base);
        Ok(Log {
            dir: dir.to_owned(),
            settings,
            segments,
            start: start.max(first),
            producers,
            cleaned_to: 0,
            unsynced: Vec::new(),
            dirty: false,
            scratch: Vec::new(),
        })
    }

    /// The first offset that can be read.
    pub(crate) fn start(&self) -> i64 {
        self.start
    }

    /// The offset the next record will get.
    pub(crate) fn end(&self) -> i64 {
        self.active().next
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn highest_producer(&self) -> i64 {
        self.producers.highest()
    }

    /// Bytes on disk.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.bytes).sum()
    }

    fn active(&self) -> &Segment {
        // `segments` is never empty: `open` and `roll` push, and nothing removes the last one.
        &self.segments[self.segments.len() - 1]
    }

    /// Stores one batch as a producer sent it, once.
    pub(crate) fn append(&mut self, bytes: &Bytes, now_ms: i64) -> Result<Appended, AppendError> {
        let header = batch::check(bytes).map_err(AppendError::Corrupt)?;
        self.accept(bytes, &header)?;
        if header.producer >= 0 {
            match self.producers.judge(&header) {
                Verdict::Append => {}
                Verdict::Stored { base, append_ms } => return Ok(Appended { base, append_ms, new: false }),
                Verdict::StoredLongAgo => return Err(AppendError::StoredLongAgo),
                Verdict::OutOfOrder => return Err(AppendError::OutOfOrder),
                Verdict::StaleEpoch => return Err(AppendError::StaleEpoch),
            }
        }
        let active = self.active();
        let full = active.bytes + header.bytes > self.settings.segment_bytes;
        let old = now_ms.saturating_sub(active.since_ms) > self.settings.segment_ms;
        if !active.is_empty() && (full || old) {
            self.roll(now_ms)?;
        }
        let base = self.end();
        // One reused buffer: the request's bytes are shared with its frame and cannot be written to.
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch.extend_from_slice(bytes);
        batch::set_base(&mut scratch, base);
        match (self.settings.log_append_time, header.log_append_time()) {
            (true, _) => batch::set_append_time(&mut scratch, now_ms),
            (false, true) => batch::clear_append_time(&mut scratch),
            (false, false) => {}
        }
        let stored = Header::parse(&scratch).map_err(AppendError::Corrupt)?;
        let last = self.segments.len() - 1;
        if self.segments[last].open_file().is_none() {
            self.sync_name();
        }
        let written = self.segments[last].append(&scratch, &stored, now_ms);
        if scratch.capacity() <= 4 << 20 {
            self.scratch = scratch;
        }
        written.map_err(|source| AppendError::Storage { path: self.segments[last].path.clone(), source })?;
        self.producers.note(&stored);
        self.dirty = true;
        let append_ms = if self.settings.log_append_time { now_ms } else { -1 };
        Ok(Appended { base, append_ms, new: true })
    }

    fn accept(&self, bytes: &Bytes, header: &Header) -> Result<(), AppendError> {
        let max = self.settings.message_bytes_max;
        if header.bytes > max {
            return Err(AppendError::TooLarge { bytes: header.bytes, max });
        }
        if header.transactional() || header.control() {
            return Err(AppendError::Invalid("transactions are not supported"));
        }
        if header.count < 1 || header.count - 1 != header.last_delta {
            return Err(AppendError::Corrupt(Fault::Count));
        }
        if header.producer >= 0 && (header.sequence < 0 || header.epoch < 0) {
            return Err(AppendError::Invalid("a producer id needs a sequence number and an epoch"));
        }
        if self.settings.compact {
            let records = batch::records(bytes).map_err(AppendError::Corrupt)?;
            if records.iter().any(|r| r.key.is_none()) {
                return Err(AppendError::Invalid("a compacted topic takes no record without a key"));
            }
        }
        Ok(())
    }

    /// Begins a new segment. Its empty file is made at once: its name is what remembers the next
    /// offset when all before it has been deleted.
    fn roll(&mut self, now_ms: i64) -> Result<(), AppendError> {
        let mut segment = Segment::new(&self.dir, self.end(), now_ms);
        segment.create().map_err(|source| AppendError::Storage { path: segment.path.clone(), source })?;
        let last = self.segments.len() - 1;
        self.unsynced.extend(self.segments[last].close());
        self.segments.push(segment);
        self.sync_name();
        Ok(())
    }

    /// A new file is safe from a power cut once its folder is on disk too.
    fn sync_name(&mut self) {
        self.unsynced.extend(File::open(&self.dir).map(Arc::new));
    }

    /// Files that hold bytes not yet known to be on disk; the caller syncs them, without the lock.
    pub(crate) fn take_unsynced(&mut self) -> Vec<Arc<File>> {
        let mut files = std::mem::take(&mut self.unsynced);
        if std::mem::take(&mut self.dirty) {
            files.extend(self.active().open_file());
        }
        files
    }

    /// Undoes `take_unsynced` after a sync that failed.
    pub(crate) fn put_back_unsynced(&mut self, files: Vec<Arc<File>>) {
        self.unsynced.extend(files);
    }

    /// Where to read from `offset`; `None` at the end. Refuses an offset that is not there.
    pub(crate) fn slice(&self, offset: i64) -> Result<Option<Slice>, SliceError> {
        if offset < self.start || offset > self.end() {
            return Err(SliceError::OutOfRange);
        }
        let first = self.segments.partition_point(|s| s.next <= offset);
        // Compaction may leave a segment that ends before its successor's base: the first with data is meant.
        let Some(segment) = self.segments[first..].iter().find(|s| !s.is_empty()) else { return Ok(None) };
        let view =
            segment.view().map_err(|source| SliceError::Storage { path: segment.path.clone(), source })?;
        Ok(Some(Slice { view, from: segment.position_before(offset), offset }))
    }

    /// Asks for the first record stamped at or after `timestamp`.
    pub(crate) fn at_time(&self, timestamp: i64) -> io::Result<TimeQuery> {
        let views = self
            .segments
            .iter()
            .filter(|s| s.max_timestamp >= timestamp && s.next > self.start && !s.is_empty())
            .map(|s| Ok((s.view()?, s.position_before_time(timestamp))))
            // Two segments at most: the first may hold such a record only below the log's start.
            .take(2)
            .collect::<io::Result<_>>()?;
        Ok(TimeQuery { views, timestamp, start: self.start })
    }

    /// Asks for the record with the highest timestamp.
    pub(crate) fn at_latest_time(&self) -> io::Result<TimeQuery> {
        let latest = self.segments.iter().map(|s| s.max_timestamp).max().unwrap_or(-1);
        self.at_time(latest.max(0))
    }

    /// Forgets the records below `offset`; their segments go at the next upkeep.
    pub(crate) fn delete_below(&mut self, offset: i64) {
        self.start = self.start.max(offset.min(self.end()));
    }

    /// Drops whole segments from the front: deleted records, then by age, then by size.
    /// Returns whether the start moved.
    pub(crate) fn retain(&mut self, now_ms: i64) -> bool {
        let before = self.start;
        let idle = now_ms.saturating_sub(self.active().since_ms) > self.settings.segment_ms;
        let expired = |s: &Segment, settings: &Settings| {
            settings.delete
                && settings.retention_ms.is_some_and(|ms| now_ms.saturating_sub(s.max_timestamp) > ms)
        };
        let deleted = self.start == self.end();
        if !self.active().is_empty()
            && (idle || deleted || expired(self.active(), &self.settings))
            && let Err(error) = self.roll(now_ms)
        {
            tracing::error!(error = &error as &dyn std::error::Error, "could not begin a new segment");
            return false;
        }
        let mut bytes: u64 = self.segments.iter().map(|s| s.bytes).sum();
        while self.segments.len() > 1 {
            let (first, following) = (&self.segments[0], self.segments[1].base);
            let too_much = self.settings.delete
                && self.settings.retention_bytes.is_some_and(|max| bytes - first.bytes >= max);
            if !(following <= self.start || expired(first, &self.settings) || too_much) {
                break;
            }
            if let Err(error) = fs::remove_file(&first.path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::error!(path = %first.path.display(), %error, "could not delete an expired segment");
                break;
            }
            bytes -= first.bytes;
            self.start = self.start.max(following);
            self.segments.remove(0);
        }
        self.start != before
    }
}

/// Why there is nothing to read at an offset.
#[derive(Debug)]
pub(crate) enum SliceError {
    OutOfRange,
    Storage { path: PathBuf, source: io::Error },
}

impl TimeQuery {
    /// Offset and timestamp of the record, if there is one.
    pub(crate) fn answer(&self) -> io::Result<Option<(i64, i64)>> {
        for (view, from) in &self.views {
            let mut batches = view.batches(*from);
            while let Some((position, header)) = batches.next()? {
                if header.max_timestamp < self.timestamp || header.last() < self.start || header.count == 0 {
                    continue;
                }
                let records = batch::records(&view.batch(position, &header)?).map_err(io::Error::other)?;
                let found = records.iter().find(|r| r.timestamp >= self.timestamp && r.offset >= self.start);
                if let Some(record) = found {
                    return Ok(Some((record.offset, record.timestamp)));
                }
            }
        }
        Ok(None)
    }
}

/// Base offsets of the segments in `dir`, rising; removes what an interrupted compaction left.
fn list(dir: &Path) -> io::Result<Vec<i64>> {
    let mut bases = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("cleaned") => fs::remove_file(&path)?,
            Some("log") => bases.extend(path.file_stem().and_then(|s| s.to_str()?.parse::<i64>().ok())),
            _ => {}
        }
    }
    bases.sort_unstable();
    Ok(bases)
}
