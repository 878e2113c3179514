//! The record batch (magic 2) as bytes: header fields, checksum, the few rewrites a broker may do.
//!
//! Invariant: records are never decoded to store or serve them. Only look-ups by time, compaction and
//! the key check of compacted topics walk the records, and compaction keeps each kept record byte for
//! byte (a decoder that puts headers in a map would lose repeated header names).
//!
//! ```text
//!  0 base offset i64 │ 8 length i32 (from 12 on) │ 12 leader epoch i32 │ 16 magic │ 17 crc u32 (of 21 on)
//! 21 attributes i16 │ 23 last offset delta i32 │ 27 base timestamp i64 │ 35 max timestamp i64
//! 43 producer id i64 │ 51 producer epoch i16 │ 53 base sequence i32 │ 57 record count i32 │ 61 records
//! ```
//! The checksum leaves out base offset and leader epoch, so the broker may set both without a new one.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use kafka_protocol::compression::{self as codec, Compressor, Decompressor};

/// Bytes before the first record.
pub(crate) const HEADER: usize = 61;
/// Bytes up to and with the length field: enough to know how long the batch is.
pub(crate) const PREFIX: usize = 12;

const LOG_APPEND_TIME: i16 = 0x08;
const TRANSACTIONAL: i16 = 0x10;
const CONTROL: i16 = 0x20;
const COMPRESSION: i16 = 0x07;

/// Why bytes are not a batch that can be stored or read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("shorter than its header or its stated length")]
    Short,
    #[error("magic byte is not 2")]
    Magic,
    #[error("checksum does not match")]
    Checksum,
    #[error("record count and offsets disagree")]
    Count,
    #[error("records could not be decoded")]
    Records,
}

/// The header's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub base: i64,
    pub bytes: u64,
    pub crc: u32,
    pub attributes: i16,
    pub last_delta: i32,
    pub base_timestamp: i64,
    pub max_timestamp: i64,
    pub producer: i64,
    pub epoch: i16,
    pub sequence: i32,
    pub count: i32,
}

impl Header {
    /// Reads the header; refuses one whose length or offsets cannot be true.
    pub(crate) fn parse(mut bytes: &[u8]) -> Result<Header, Fault> {
        if bytes.len() < HEADER {
            return Err(Fault::Short);
        }
        let base = bytes.get_i64();
        let length = bytes.get_i32();
        bytes.get_i32();
        if bytes.get_u8() != 2 {
            return Err(Fault::Magic);
        }
        let header = Header {
            base,
            bytes: u64::try_from(length).map_err(|_| Fault::Short)? + PREFIX as u64,
            crc: bytes.get_u32(),
            attributes: bytes.get_i16(),
            last_delta: bytes.get_i32(),
            base_timestamp: bytes.get_i64(),
            max_timestamp: bytes.get_i64(),
            producer: bytes.get_i64(),
            epoch: bytes.get_i16(),
            sequence: bytes.get_i32(),
            count: bytes.get_i32(),
        };
        if header.bytes < HEADER as u64 {
            return Err(Fault::Short);
        }
        if header.base < 0 || header.last_delta < 0 || header.count < 0 {
            return Err(Fault::Count);
        }
        Ok(header)
    }

    /// Offset of the last record, whether or not compaction left it.
    pub(crate) fn last(&self) -> i64 {
        self.base.saturating_add(i64::from(self.last_delta))
    }

    pub(crate) fn last_sequence(&self) -> i32 {
        advance(self.sequence, self.last_delta)
    }

    pub(crate) fn log_append_time(&self) -> bool {
        self.attributes & LOG_APPEND_TIME != 0
    }

    pub(crate) fn transactional(&self) -> bool {
        self.attributes & TRANSACTIONAL != 0
    }

    pub(crate) fn control(&self) -> bool {
        self.attributes & CONTROL != 0
    }
}

/// Sequence numbers wrap from `i32::MAX` to 0, never through the negatives.
pub(crate) fn advance(sequence: i32, by: i32) -> i32 {
    let sum = i64::from(sequence) + i64::from(by);
    i32::try_from(sum % (i64::from(i32::MAX) + 1)).unwrap_or(0)
}

/// Checks that `bytes` are exactly one whole batch with a right checksum.
pub(crate) fn check(bytes: &[u8]) -> Result<Header, Fault> {
    let header = Header::parse(bytes)?;
    if header.bytes != bytes.len() as u64 {
        return Err(Fault::Short);
    }
    if crc32c::crc32c(&bytes[21..]) != header.crc {
        return Err(Fault::Checksum);
    }
    Ok(header)
}

/// Gives the batch its place in the log.
pub(crate) fn set_base(batch: &mut [u8], base: i64) {
    batch[..8].copy_from_slice(&base.to_be_bytes());
    batch[12..16].copy_from_slice(&0i32.to_be_bytes());
}

/// Marks the batch as stamped by the broker; this is under the checksum, so the checksum is made anew.
pub(crate) fn set_append_time(batch: &mut [u8], now_ms: i64) {
    let attributes = i16::from_be_bytes([batch[21], batch[22]]) | LOG_APPEND_TIME;
    batch[21..23].copy_from_slice(&attributes.to_be_bytes());
    batch[35..43].copy_from_slice(&now_ms.to_be_bytes());
    seal(batch);
}

/// Takes the broker's stamp off (a producer may not set it on a CreateTime topic).
pub(crate) fn clear_append_time(batch: &mut [u8]) {
    let attributes = i16::from_be_bytes([batch[21], batch[22]]) & !LOG_APPEND_TIME;
    batch[21..23].copy_from_slice(&attributes.to_be_bytes());
    seal(batch);
}

fn seal(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// One record of a batch: what look-ups need, and the bytes it had (length prefix included).
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub offset: i64,
    pub timestamp: i64,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    raw: Bytes,
}

/// Walks the records of a whole batch, decompressing if needed. One batch in memory at a time.
pub(crate) fn records(batch: &Bytes) -> Result<Vec<Record>, Fault> {
    let header = Header::parse(batch)?;
    let mut payload = decompress(header.attributes & COMPRESSION, batch.slice(HEADER..))?;
    // No more reserved than the bytes can hold: a record takes at least seven.
    let count = usize::try_from(header.count).unwrap_or(0);
    let mut found = Vec::with_capacity(count.min(payload.len() / 7 + 1));
    for _ in 0..count {
        let whole = payload.clone();
        let length = usize::try_from(varint(&mut payload)?).map_err(|_| Fault::Records)?;
        let prefix = whole.len() - payload.len();
        let mut body = take(&mut payload, length)?;
        let raw = whole.slice(..prefix + length);
        take(&mut body, 1)?;
        let timestamp_delta = varint(&mut body)?;
        let offset_delta = varint(&mut body)?;
        let timestamp = match header.log_append_time() {
            true => header.max_timestamp,
            false => header.base_timestamp.saturating_add(timestamp_delta),
        };
        let (key, value) = (blob(&mut body)?, blob(&mut body)?);
        found.push(Record { offset: header.base.saturating_add(offset_delta), timestamp, key, value, raw });
    }
    Ok(found)
}

/// The batch with only the records that `keep` wants, at their old offsets and timestamps.
///
/// Base offset, last offset delta, base timestamp and sequence stay, so that neither a fetch from the
/// middle nor the duplicate check of an idempotent producer can tell. Returns `None` if nothing is left.
pub(crate) fn filter(batch: &Bytes, mut keep: impl FnMut(&Record) -> bool) -> Result<Option<Bytes>, Fault> {
    let all = records(batch)?;
    let kept: Vec<&Record> = all.iter().filter(|r| keep(r)).collect();
    if kept.len() == all.len() {
        return Ok(Some(batch.clone()));
    }
    if kept.is_empty() {
        return Ok(None);
    }
    rebuild(batch, &kept).map(Some)
}

/// The batch without records: it still says where its producer's sequence stood.
pub(crate) fn hollow(batch: &Bytes) -> Result<Bytes, Fault> {
    let mut hollow = rebuild(batch, &[])?.to_vec();
    // No payload, so no codec: a reader must not try to decompress nothing.
    let attributes = i16::from_be_bytes([hollow[21], hollow[22]]) & !COMPRESSION;
    hollow.truncate(HEADER);
    hollow[21..23].copy_from_slice(&attributes.to_be_bytes());
    // No record, no time: a look-up by time must not stop here.
    hollow[35..43].copy_from_slice(&(-1i64).to_be_bytes());
    set_length(&mut hollow)?;
    seal(&mut hollow);
    Ok(hollow.into())
}

fn rebuild(batch: &Bytes, kept: &[&Record]) -> Result<Bytes, Fault> {
    let header = Header::parse(batch)?;
    let mut payload = BytesMut::new();
    for record in kept {
        payload.put_slice(&record.raw);
    }
    let mut out = batch[..HEADER].to_vec();
    out.extend_from_slice(&compress(header.attributes & COMPRESSION, payload)?);
    set_length(&mut out)?;
    if let (Some(latest), false) = (kept.iter().map(|r| r.timestamp).max(), header.log_append_time()) {
        out[35..43].copy_from_slice(&latest.to_be_bytes());
    }
    let count = i32::try_from(kept.len()).map_err(|_| Fault::Count)?;
    out[57..61].copy_from_slice(&count.to_be_bytes());
    seal(&mut out);
    Ok(out.into())
}

fn set_length(batch: &mut [u8]) -> Result<(), Fault> {
    let length = i32::try_from(batch.len() - PREFIX).map_err(|_| Fault::Short)?;
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

/// Key, value and timestamp of a record to build.
pub(crate) type Plain<'a> = (Option<&'a [u8]>, Option<&'a [u8]>, i64);

/// An uncompressed batch made here, for the broker's own journal and for tests.
pub(crate) fn build(records: &[Plain<'_>]) -> Vec<u8> {
    let (first, latest) =
        (records.first().map_or(-1, |r| r.2), records.iter().map(|r| r.2).max().unwrap_or(-1));
    let mut out = BytesMut::new();
    out.put_i64(0);
    out.put_i32(0);
    out.put_i32(0);
    out.put_u8(2);
    out.put_u32(0);
    out.put_i16(0);
    out.put_i32(i32::try_from(records.len().saturating_sub(1)).unwrap_or(i32::MAX));
    out.put_i64(first);
    out.put_i64(latest);
    out.put_i64(-1);
    out.put_i16(-1);
    out.put_i32(-1);
    out.put_i32(i32::try_from(records.len()).unwrap_or(i32::MAX));
    for (delta, (key, value, timestamp)) in records.iter().enumerate() {
        let mut body = BytesMut::new();
        body.put_u8(0);
        put_varint(&mut body, timestamp - first);
        put_varint(&mut body, i64::try_from(delta).unwrap_or(i64::MAX));
        put_blob(&mut body, *key);
        put_blob(&mut body, *value);
        put_varint(&mut body, 0);
        put_varint(&mut out, i64::try_from(body.len()).unwrap_or(i64::MAX));
        out.put_slice(&body);
    }
    let mut out = out.to_vec();
    // Cannot fail below 2 GiB; what is built here is bounded by the request that asked for it.
    let _ = set_length(&mut out);
    seal(&mut out);
    out
}

fn put_blob(out: &mut BytesMut, blob: Option<&[u8]>) {
    match blob {
        None => put_varint(out, -1),
        Some(b) => {
            put_varint(out, i64::try_from(b.len()).unwrap_or(i64::MAX));
            out.put_slice(b);
        }
    }
}

fn put_varint(out: &mut BytesMut, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)).cast_unsigned();
    loop {
        let [low, ..] = rest.to_le_bytes();
        rest >>= 7;
        if rest == 0 {
            return out.put_u8(low & 0x7f);
        }
        out.put_u8(low | 0x80);
    }
}

/// A zigzag variable-length integer of at most ten bytes.
fn varint(bytes: &mut Bytes) -> Result<i64, Fault> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.try_get_u8().map_err(|_| Fault::Records)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
        }
    }
    Err(Fault::Records)
}

fn blob(bytes: &mut Bytes) -> Result<Option<Bytes>, Fault> {
    match varint(bytes)? {
        -1 => Ok(None),
        n => take(bytes, usize::try_from(n).map_err(|_| Fault::Records)?).map(Some),
    }
}

fn take(bytes: &mut Bytes, n: usize) -> Result<Bytes, Fault> {
    if bytes.len() < n {
        return Err(Fault::Records);
    }
    Ok(bytes.split_to(n))
}

fn decompress(kind: i16, mut payload: Bytes) -> Result<Bytes, Fault> {
    if payload.is_empty() {
        return Ok(payload);
    }
    match kind {
        0 => Ok(payload),
        1 => codec::Gzip::decompress(&mut payload, |b| Ok(b.split_off(0))),
        2 => codec::Snappy::decompress(&mut payload, |b| Ok(b.split_off(0))),
        3 => codec::Lz4::decompress(&mut payload, |b| Ok(b.split_off(0))),
        4 => codec::Zstd::decompress(&mut payload, |b| Ok(b.split_off(0))),
        _ => return Err(Fault::Records),
    }
    .map_err(|_| Fault::Records)
}

fn compress(kind: i16, payload: BytesMut) -> Result<BytesMut, Fault> {
    let mut out = BytesMut::new();
    let put = |b: &mut BytesMut| {
        b.put_slice(&payload);
        Ok(())
    };
    match kind {
        0 => return Ok(payload),
        1 => codec::Gzip::compress(&mut out, put),
        2 => codec::Snappy::compress(&mut out, put),
        3 => codec::Lz4::compress(&mut out, put),
        4 => codec::Zstd::compress(&mut out, put),
        _ => return Err(Fault::Records),
    }
    .map_err(|_| Fault::Records)?;
    Ok(out)
}
