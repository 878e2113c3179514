//! One segment: a file of raw record batches, one after the other, named after its first offset.
//!
//! Invariant: bytes `[0, self.bytes)` are whole batches with rising offsets. What lies behind (a write
//! that a full disk or a kill cut short) is never served and is overwritten or cut.
//!
//! Memory: 24 bytes of index per [`INDEX_EVERY`] bytes of log, 1.5 MiB per GiB. Only the segment that
//! is appended to keeps its file open, so open files do not grow with the log.

use super::batch::{self, Fault, HEADER, Header};
use crate::clock::to_ms;
use bytes::Bytes;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A look-up walks at most this many bytes of headers.
pub(crate) const INDEX_EVERY: u64 = 16 << 10;
/// No batch is longer: a length beyond it is damage, not data. The server's request limit is the same.
pub(crate) const BATCH_BYTES_MAX: u64 = 100 << 20;

#[derive(Debug, Clone, Copy)]
struct Entry {
    offset: i64,
    position: u64,
    /// Of all batches before this one in the segment; never falls, so time can be searched like offsets.
    max_timestamp_before: i64,
}

/// Where the segment that begins at `base` is kept.
pub(crate) fn path(dir: &Path, base: i64) -> PathBuf {
    dir.join(format!("{base:020}.log"))
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Segment {
    pub path: PathBuf,
    pub base: i64,
    /// Length of the whole batches in it.
    pub bytes: u64,
    /// The offset after its last batch; `base` when empty.
    pub next: i64,
    /// -1 when empty.
    pub max_timestamp: i64,
    /// Wall time of its last append, by the file's own clock: tombstones are kept from here on.
    pub modified_ms: i64,
    /// Wall time from which `segment.ms` counts.
    pub since_ms: i64,
    index: Vec<Entry>,
    file: Option<Arc<File>>,
}

/// What stands behind the whole, right batches of a segment.
#[derive(Debug)]
pub(crate) struct Bad {
    pub fault: Fault,
    pub file_bytes: u64,
    /// A right batch stands further on: this is damage in the middle, not a write that was cut short.
    pub data_follows: bool,
}

impl Segment {
    /// A segment without records. Its file is made by the first append, so idle partitions hold none open.
    pub(crate) fn new(dir: &Path, base: i64, now_ms: i64) -> Segment {
        Segment {
            path: path(dir, base),
            base,
            bytes: 0,
            next: base,
            max_timestamp: -1,
            modified_ms: now_ms,
            since_ms: now_ms,
            index: Vec::new(),
            file: None,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Reads a segment file whole, checks every checksum and tells `visit` each header.
    pub(crate) fn recover(
        path: &Path,
        base: i64,
        mut visit: impl FnMut(&Header),
    ) -> io::Result<(Segment, Option<Bad>)> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        let mut segment =
            Segment { path: path.to_owned(), ..Segment::new(path, base, to_ms(meta.modified()?)) };
        let mut reader = BufReader::with_capacity(1 << 20, &file);
        let mut buffer = Vec::new();
        while segment.bytes < meta.len() {
            let whole = read_batch(&mut reader, &mut buffer, meta.len() - segment.bytes)?;
            match whole.and_then(|()| batch::check(&buffer)) {
                Ok(header) if header.base >= segment.next => {
                    visit(&header);
                    segment.note(&header);
                }
                other => {
                    let fault = other.err().unwrap_or(Fault::Count);
                    let data_follows = finds_batch(&file, segment.bytes + 1, meta.len(), segment.next)?;
                    let bad = Bad { fault, file_bytes: meta.len(), data_follows };
                    return Ok((segment, Some(bad)));
                }
            }
        }
        Ok((segment, None))
    }

    /// Cuts the file to the whole batches.
    pub(crate) fn cut(&self) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(&self.path)?;
        file.set_len(self.bytes)?;
        file.sync_data()
    }

    /// Writes one batch whose base offset is set. A write that fails leaves the segment as it was.
    pub(crate) fn append(&mut self, batch: &[u8], header: &Header, now_ms: i64) -> io::Result<()> {
        let file = self.writer()?;
        if let Err(error) = file.write_all_at(batch, self.bytes) {
            // A full disk took a part: give it back. If that fails too, the bytes lie beyond
            // `self.bytes`, where the next append overwrites them and recovery cuts them.
            let _ = file.set_len(self.bytes);
            return Err(error);
        }
        if self.is_empty() {
            self.since_ms = now_ms;
        }
        self.modified_ms = now_ms;
        self.note(header);
        Ok(())
    }

    fn note(&mut self, header: &Header) {
        if self.index.last().is_none_or(|e| self.bytes - e.position >= INDEX_EVERY) {
            self.index.push(Entry {
                offset: header.base,
                position: self.bytes,
                max_timestamp_before: self.max_timestamp,
            });
        }
        self.bytes += header.bytes;
        self.next = header.last().saturating_add(1);
        self.max_timestamp = self.max_timestamp.max(header.max_timestamp);
    }

    /// Makes the file, so that the segment's name is there to be found.
    pub(crate) fn create(&mut self) -> io::Result<()> {
        self.writer().map(drop)
    }

    fn writer(&mut self) -> io::Result<Arc<File>> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&self.path)?;
        let file = Arc::new(file);
        self.file = Some(Arc::clone(&file));
        Ok(file)
    }

    /// The open file of the segment that is appended to.
    pub(crate) fn open_file(&self) -> Option<Arc<File>> {
        self.file.clone()
    }

    /// Lets go of the file; returns it if there is something to sync.
    pub(crate) fn close(&mut self) -> Option<Arc<File>> {
        self.file.take()
    }

    /// A view for readers that stays good when the segment grows, is compacted or deleted.
    pub(crate) fn view(&self) -> io::Result<View> {
        let file = match &self.file {
            Some(file) => Arc::clone(file),
            None => Arc::new(File::open(&self.path)?),
        };
        Ok(View { file, end: self.bytes })
    }

    /// Where to begin to walk for the batch that holds `offset`.
    pub(crate) fn position_before(&self, offset: i64) -> u64 {
        let after = self.index.partition_point(|e| e.offset <= offset);
        after.checked_sub(1).and_then(|i| self.index.get(i)).map_or(0, |e| e.position)
    }

    /// Where to begin to walk for the first batch stamped at or after `timestamp`.
    pub(crate) fn position_before_time(&self, timestamp: i64) -> u64 {
        let after = self.index.partition_point(|e| e.max_timestamp_before < timestamp);
        after.checked_sub(1).and_then(|i| self.index.get(i)).map_or(0, |e| e.position)
    }
}

/// Reads one batch into `buffer`. The inner error is what is wrong with the bytes.
fn read_batch(reader: &mut impl Read, buffer: &mut Vec<u8>, left: u64) -> io::Result<Result<(), Fault>> {
    if left < HEADER as u64 {
        return Ok(Err(Fault::Short));
    }
    buffer.resize(HEADER, 0);
    reader.read_exact(buffer)?;
    let header = match Header::parse(buffer) {
        Ok(header) => header,
        Err(fault) => return Ok(Err(fault)),
    };
    if header.bytes > left || header.bytes > BATCH_BYTES_MAX {
        return Ok(Err(Fault::Short));
    }
    buffer.resize(usize::try_from(header.bytes).unwrap_or(usize::MAX), 0);
    reader.read_exact(&mut buffer[HEADER..])?;
    Ok(Ok(()))
}

/// Whether a right batch with an offset of at least `offset` begins anywhere in `[from, to)`.
fn finds_batch(file: &File, from: u64, to: u64, offset: i64) -> io::Result<bool> {
    const CHUNK: u64 = 1 << 20;
    let mut position = from;
    let mut chunk = Vec::new();
    while position + HEADER as u64 <= to {
        let want = (to - position).min(CHUNK);
        chunk.resize(usize::try_from(want).unwrap_or(0), 0);
        file.read_exact_at(&mut chunk, position)?;
        for (i, window) in chunk.windows(HEADER).enumerate() {
            // The magic byte first: it rules out nearly all places for one comparison.
            if window[16] != 2 {
                continue;
            }
            let at = position + i as u64;
            let Ok(header) = Header::parse(window) else { continue };
            if header.base < offset || header.bytes > (to - at).min(BATCH_BYTES_MAX) {
                continue;
            }
            let mut whole = vec![0; usize::try_from(header.bytes).unwrap_or(0)];
            file.read_exact_at(&mut whole, at)?;
            if batch::check(&whole).is_ok() {
                return Ok(true);
            }
        }
        // Windows overlap by one header, so that none is missed at the seam.
        position += want - (HEADER as u64 - 1).min(want - 1);
        if want < CHUNK {
            break;
        }
    }
    Ok(false)
}

/// A segment's whole batches at one moment, readable without the log's lock.
#[derive(Debug, Clone)]
pub(crate) struct View {
    file: Arc<File>,
    end: u64,
}

impl View {
    /// Walks headers from `position` on.
    pub(crate) fn batches(&self, position: u64) -> Batches<'_> {
        Batches { view: self, position, buffer: Vec::new(), buffered_at: 0 }
    }

    /// One whole batch.
    pub(crate) fn batch(&self, position: u64, header: &Header) -> io::Result<Bytes> {
        self.bytes(position, header.bytes)
    }

    /// Whole batches from the one that holds `offset` on: as many as fit in `bytes_max`, and the first
    /// whatever its size if `at_least_one`.
    ///
    /// `from` is a position at or before that batch. Empty when the segment ends before `offset`.
    pub(crate) fn read(
        &self,
        from: u64,
        offset: i64,
        bytes_max: u64,
        at_least_one: bool,
    ) -> io::Result<Bytes> {
        let mut batches = self.batches(from);
        let (start, first) = loop {
            match batches.next()? {
                None => return Ok(Bytes::new()),
                Some((position, header)) if header.last() >= offset => break (position, header),
                Some(_) => {}
            }
        };
        if first.bytes > bytes_max && !at_least_one {
            return Ok(Bytes::new());
        }
        let mut bytes = self.bytes(start, bytes_max.max(first.bytes).min(self.end - start))?;
        let mut whole = 0usize;
        while let Ok(header) = Header::parse(&bytes[whole..]) {
            match usize::try_from(header.bytes) {
                Ok(n) if n <= bytes.len() - whole => whole += n,
                _ => break,
            }
        }
        bytes.truncate(whole);
        Ok(bytes)
    }

    fn bytes(&self, position: u64, bytes: u64) -> io::Result<Bytes> {
        let mut buffer = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut buffer, position)?;
        Ok(buffer.into())
    }
}

/// A walk over batch headers; reads 8 KiB at a time, whatever the batches' sizes.
pub(crate) struct Batches<'a> {
    view: &'a View,
    position: u64,
    buffer: Vec<u8>,
    buffered_at: u64,
}

impl Batches<'_> {
    /// The next batch's position and header; `None` at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<(u64, Header)>> {
        if self.position + HEADER as u64 > self.view.end {
            return Ok(None);
        }
        let buffered_to = self.buffered_at + self.buffer.len() as u64;
        if self.position < self.buffered_at || self.position + HEADER as u64 > buffered_to {
            let want = (self.view.end - self.position).min(8 << 10);
            self.buffer.resize(usize::try_from(want).unwrap_or(0), 0);
            self.view.file.read_exact_at(&mut self.buffer, self.position)?;
            self.buffered_at = self.position;
        }
        let at = usize::try_from(self.position - self.buffered_at).unwrap_or(0);
        let header = Header::parse(&self.buffer[at..]).map_err(io::Error::other)?;
        let position = self.position;
        self.position += header.bytes;
        Ok(Some((position, header)))
    }
}
