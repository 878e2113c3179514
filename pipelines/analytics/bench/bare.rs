//! The least that a topic of Avro rows takes to become Parquet: rdkafka, arrow-avro and a Parquet writer, one after the other in one
//! thread, and nothing of ours between them. What `forebay sink` is measured beside; tests/bench/README.md says how.
//!
//!     bare-ingest SERVERS TOPIC FOLDER
//!
//! No sorting, days, bounds, groups or commits: rows lie in the files as they come. Its writer has the settings of `encode.rs`.
//!
//! Invariant: every message that the topic held at the start is a row of a file at the end, or it fails.

use anyhow::{Context as _, bail, ensure};
use arrow_avro::{
    codec::Tz,
    reader::{Decoder, ReaderBuilder},
    schema::{AvroSchema, Fingerprint, SchemaStore},
};
use forebay_schemas::Outcome;
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use std::{
    fs::File,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

/// As in `forebay-sql`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SILENCE_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
/// As many rows as the sink decodes at a time, has in a row group, and brings in as one file.
const BATCH_ROWS: usize = 4_096;
const ROW_GROUP_ROWS: usize = 131_072;
const FILE_ROWS: u64 = 262_144;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [servers, topic, folder] = arguments.as_slice() else { bail!("bare-ingest SERVERS TOPIC FOLDER") };
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", servers)
        .set("group.id", "bare-ingest")
        .set("enable.auto.commit", "false")
        .create()?;
    let expected = assign(&consumer, topic).with_context(|| format!("could not read topic {topic}"))?;
    let mut decoder = decoder()?;
    let mut writer: Option<ArrowWriter<File>> = None;
    let (mut read, mut written, mut files, mut heard) = (0, 0, 0, Instant::now());
    while read < expected {
        let Some(message) = consumer.poll(POLL) else {
            ensure!(heard.elapsed() < SILENCE_MAX, "{topic} fell silent after {read} of {expected} messages");
            continue;
        };
        let message = message?;
        let body = message.payload().context("a message has no value")?;
        ensure!(decoder.decode(body)? == body.len(), "a message holds more or less than a row");
        (read, heard) = (read + 1, Instant::now());
        if !decoder.batch_is_full() && read < expected {
            continue;
        }
        let Some(batch) = decoder.flush()? else { continue };
        if writer.is_none() {
            let path = Path::new(folder).join(format!("{files}.parquet"));
            let properties = WriterProperties::builder()
                .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
                .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
                .build();
            let file = File::create(&path).with_context(|| format!("could not make {}", path.display()))?;
            writer = Some(ArrowWriter::try_new(file, batch.schema(), Some(properties))?);
            files += 1;
        }
        if let Some(open) = &mut writer {
            open.write(&batch)?;
        }
        written += batch.num_rows() as u64;
        if (written >= files * FILE_ROWS || read == expected)
            && let Some(full) = writer.take()
        {
            full.close()?;
        }
    }
    ensure!(written == expected, "{written} of {expected} messages became rows");
    writeln!(std::io::stdout(), "{written} rows in {files} files")?;
    Ok(())
}

/// Reads all partitions from their beginning; how many messages they hold.
fn assign(consumer: &BaseConsumer, topic: &str) -> anyhow::Result<u64> {
    let metadata = consumer.fetch_metadata(Some(topic), SILENCE_MAX)?;
    let (mut assignment, mut messages) = (TopicPartitionList::new(), 0);
    for partition in metadata.topics().iter().flat_map(|found| found.partitions()) {
        let (low, high) = consumer.fetch_watermarks(topic, partition.id(), SILENCE_MAX)?;
        assignment.add_partition_offset(topic, partition.id(), Offset::Beginning)?;
        messages += high.saturating_sub(low).unsigned_abs();
    }
    ensure!(messages > 0, "it is empty");
    consumer.assign(&assignment)?;
    Ok(messages)
}

fn decoder() -> anyhow::Result<Decoder> {
    let forms = Outcome::forms()?;
    let (header, schema) = forms.first().context("outcomes have no form")?;
    let fingerprint: [u8; 8] = header.get(2..10).context("the header of a row is short")?.try_into()?;
    let mut store = SchemaStore::new();
    store.set(Fingerprint::Rabin(u64::from_le_bytes(fingerprint)), AvroSchema::new(schema.to_string()))?;
    let builder = ReaderBuilder::new().with_writer_schema_store(store).with_tz(Tz::Utc);
    Ok(builder.with_batch_size(BATCH_ROWS).build_decoder()?)
}
