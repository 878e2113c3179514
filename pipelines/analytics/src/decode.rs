//! From messages to the rows of a table.
//!
//! Avro rows are read by arrow-avro, many at a time, and so that one that cannot be read takes no other with it; JSON rows by
//! their records. Rows that were written before the last columns came read null there. A topic may hold rows of both framings, and with
//! Confluent's those of later versions too, as far as their columns are ours.
//!
//! Invariant: every message is accounted for. It becomes a row, or it is rejected with the reason, or it is known to be no row.

use crate::table::Table;
use arrow::{
    array::{
        Array as _, ArrayRef, BooleanArray, Date32Array, RecordBatch, TimestampMicrosecondArray,
        new_null_array,
    },
    compute::{concat_batches, filter_record_batch},
    datatypes::SchemaRef,
    error::ArrowError,
};
use arrow_avro::{
    codec::Tz,
    reader::{Decoder as AvroDecoder, ReaderBuilder},
    schema::{AvroSchema, Fingerprint, FingerprintAlgorithm, SchemaStore},
};
use bytes::Bytes;
use forebay_runtime::host::kafka::{
    Registry, RegistryError,
    registry::{fits, frame, number},
};
use forebay_schemas::{
    Attempt, Audit, DeadLetter, Headers, Label, Outcome, Payload, Record, dead_letter::Redriven,
};
use serde::Serialize;
use std::{collections::BTreeMap, error::Error as _, ops::Range, sync::Arc};

/// So many rows are decoded at a time: enough that what is done once for all of them does not count.
const ROWS_AT_ONCE: usize = 4_096;

/// The bytes before an Avro row: two that are always the same, and the fingerprint of its schema.
const HEADER_BYTES: usize = 10;
/// The most numbers of schemas that are held by name of what is wrong with them; beyond, they are asked for anew.
const FOREIGN_MAX: usize = 1_000;

const DAY_US: i64 = 86_400_000_000;
/// The last day that tools write with four digits: beyond, a partition's name is read by none.
const TIME_US_MAX: i64 = 253_402_300_799_999_999;

/// A message of a table's topic.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Its offset.
    pub offset: i64,
    /// Its timestamp, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers; of dead letters only.
    pub headers: Headers,
}

impl Message {
    /// What it holds.
    pub fn bytes(&self) -> usize {
        let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
        let headers = self.headers.iter().map(|(name, value)| name.len() + length(value));
        length(&self.key) + length(&self.value) + headers.sum::<usize>()
    }
}

/// Runs of messages that are read together: each of no more bytes than this, or of one message that has more.
pub fn runs(messages: &[Message], bytes_max: usize) -> Vec<Range<usize>> {
    let (mut runs, mut start, mut bytes) = (Vec::new(), 0, 0_usize);
    for (index, message) in messages.iter().enumerate() {
        bytes += message.bytes();
        if bytes > bytes_max && index > start {
            runs.push(start..index);
            (start, bytes) = (index, message.bytes());
        }
    }
    if start < messages.len() {
        runs.push(start..messages.len());
    }
    runs
}

/// A message that is no row, though it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    /// Which of the messages.
    pub index: usize,
    /// Why.
    pub reason: String,
}

/// What messages became.
#[derive(Debug)]
pub struct Rows {
    /// The rows, with the columns of the table, in the order of their messages.
    pub batch: RecordBatch,
    /// The offset of each row's message.
    pub offsets: Vec<i64>,
    /// Messages that should have been rows.
    pub rejects: Vec<Reject>,
}

/// A fault in our own declaration of a table, or in what reads it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The Avro form of a row.
    #[error("could not prepare reading the rows of table {table}")]
    Form {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: ArrowError,
    },
    /// The columns do not fit together.
    #[error("could not put the columns of table {table} together")]
    Columns {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: ArrowError,
    },
    /// The declaration of a row.
    #[error("could not read the declaration of table {table}")]
    Declaration {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: forebay_schemas::EncodeError,
    },
    /// Nobody says which schema a row has.
    #[error("could not find out the schema of a row of table {table}")]
    Registry {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: RegistryError,
    },
}

/// Reads the messages of one table's topic.
pub struct Decoder {
    table: Table,
    forms: Vec<Form>,
    registry: Option<Arc<Registry>>,
    /// Why rows with these numbers of schemas are none of ours.
    foreign: BTreeMap<u32, String>,
}

/// What messages became, before their days are known.
#[derive(Default)]
struct Gathered {
    batches: Vec<RecordBatch>,
    offsets: Vec<i64>,
    rejects: Vec<Reject>,
}

/// One form of an Avro row: the present one, or one without some of its last columns, or one that a registry knows.
struct Form {
    header: Vec<u8>,
    schema: AvroSchema,
    decoder: AvroDecoder,
}

impl Form {
    fn of(header: Vec<u8>, schema: AvroSchema) -> Result<Self, ArrowError> {
        let decoder = Self::decoder(&header, &schema)?;
        Ok(Self { header, schema, decoder })
    }

    fn decoder(header: &[u8], schema: &AvroSchema) -> Result<AvroDecoder, ArrowError> {
        let store = match number(header) {
            Some(number) => {
                let mut store = SchemaStore::new_with_type(FingerprintAlgorithm::Id);
                store.set(Fingerprint::Id(number), schema.clone())?;
                store
            }
            None => {
                let mut fingerprint = [0; 8];
                if let Some(bytes) = header.get(2..HEADER_BYTES) {
                    fingerprint.copy_from_slice(bytes);
                }
                let mut store = SchemaStore::new();
                // Not computed there: of logical types its canonical form differs from the specification's.
                store.set(Fingerprint::Rabin(u64::from_le_bytes(fingerprint)), schema.clone())?;
                store
            }
        };
        let builder = ReaderBuilder::new().with_writer_schema_store(store).with_tz(Tz::Utc);
        builder.with_batch_size(ROWS_AT_ONCE).build_decoder()
    }

    /// All rows, or nothing where one of them cannot be read; then what was read of it is forgotten.
    fn read<'a>(
        &mut self,
        bodies: impl Iterator<Item = &'a [u8]>,
    ) -> Result<Option<RecordBatch>, ArrowError> {
        let mut count = 0;
        let mut whole = true;
        for body in bodies {
            count += 1;
            // Less is read of a body that is cut short, and more than one row where something follows it.
            whole = self.decoder.decode(body).is_ok_and(|read| read == body.len());
            if !whole {
                break;
            }
        }
        if whole
            && let Ok(Some(batch)) = self.decoder.flush()
            && batch.num_rows() == count
        {
            return Ok(Some(batch));
        }
        self.decoder = Self::decoder(&self.header, &self.schema)?;
        Ok(None)
    }
}

impl Decoder {
    /// A decoder for the topic of this table.
    pub fn new(table: Table) -> Result<Self, Error> {
        let forms = match table {
            Table::Outcomes => Outcome::forms(),
            Table::Attempts => Attempt::forms(),
            Table::Audits | Table::Labels | Table::Payloads | Table::DeadLetters => Ok(Vec::new()),
            Table::OutcomesHourly | Table::AttemptsHourly => Ok(Vec::new()),
        };
        let forms = forms.map_err(|source| Error::Declaration { table: table.name(), source })?;
        let form = |(header, schema): (Vec<u8>, serde_json::Value)| {
            Form::of(header, AvroSchema::new(schema.to_string()))
                .map_err(|source| Error::Form { table: table.name(), source })
        };
        let forms = forms.into_iter().map(form).collect::<Result<_, _>>()?;
        Ok(Self { table, forms, registry: None, foreign: BTreeMap::new() })
    }

    /// The same, which asks this registry for schemas that it does not know.
    pub fn with_registry(mut self, registry: Option<Arc<Registry>>) -> Self {
        self.registry = registry;
        self
    }

    /// Reads messages, in their order.
    pub fn read(&mut self, messages: &[Message]) -> Result<Rows, Error> {
        let Gathered { batches, offsets, mut rejects } = match self.table {
            Table::Outcomes => self.avro(messages, why_not::<Outcome>)?,
            Table::Attempts => self.avro(messages, why_not::<Attempt>)?,
            Table::Audits => self.json(messages, |message| {
                let mut row = Audit::decode(value(message)?).map_err(|error| told(&error))?;
                row.audited_at = row.audited_at.or(Some(written_at(message)));
                Ok(Some(row))
            })?,
            Table::Labels => self.json(messages, |message| {
                let mut row = Label::decode(value(message)?).map_err(|error| told(&error))?;
                row.labelled_at = row.labelled_at.or(Some(written_at(message)));
                Ok(Some(row))
            })?,
            Table::Payloads => self.json(messages, |message| {
                let mut row = Payload::decode(value(message)?).map_err(|error| told(&error))?;
                row.ended_at = row.ended_at.or(Some(written_at(message)));
                Ok(Some(row))
            })?,
            Table::DeadLetters => self.json(messages, Letter::read)?,
            Table::OutcomesHourly | Table::AttemptsHourly => {
                self.json(messages, |_| Err::<Option<Label>, _>("a roll-up is made of a table".to_owned()))?
            }
        };
        let batch =
            concat_batches(&self.table.schema_of_files(), &batches).map_err(|source| self.columns(source))?;
        let (batch, offsets) = self.dated(batch, offsets, messages, &mut rejects)?;
        rejects.sort_unstable_by_key(|reject| reject.index);
        Ok(Rows { batch, offsets, rejects })
    }

    fn columns(&self, source: ArrowError) -> Error {
        Error::Columns { table: self.table.name(), source }
    }

    /// Rows in runs of one form each, which are decoded together.
    fn avro(&mut self, messages: &[Message], why_not: fn(&[u8]) -> String) -> Result<Gathered, Error> {
        self.learn(messages)?;
        let mut gathered = Gathered::default();
        let mut start = 0;
        while start < messages.len() {
            let form = self.form(&messages[start]);
            let run = messages[start..].iter().take(ROWS_AT_ONCE);
            let end = start + run.take_while(|message| self.form(message) == form).count();
            match form {
                Some(form) => self.run(form, messages, start..end, why_not, &mut gathered)?,
                None => gathered.rejects.extend((start..end).map(|index| {
                    let reason = match messages[index].value.as_deref() {
                        Some(body) => self.why_foreign(body).unwrap_or_else(|| why_not(body)),
                        None => nothing(),
                    };
                    Reject { index, reason }
                })),
            }
            start = end;
        }
        Ok(gathered)
    }

    /// Finds out which forms numbers of a registry are. What it does not answer is no word on any row: these messages are read again.
    fn learn(&mut self, messages: &[Message]) -> Result<(), Error> {
        let Some(registry) = self.registry.clone() else { return Ok(()) };
        let table = self.table.name();
        for message in messages {
            let Some(number) = message.value.as_deref().and_then(number) else { continue };
            if self.form(message).is_some() {
                continue;
            }
            let schema = registry.schema(number).map_err(|source| Error::Registry { table, source })?;
            let ours = match self.table {
                Table::Outcomes => Outcome::avro(),
                _ => Attempt::avro(),
            };
            let fault = match &schema {
                Some(schema) => fits(schema, &ours).err(),
                None => Some("the registry has none of that number".to_owned()),
            };
            match (schema, fault) {
                (Some(schema), None) => {
                    let schema = AvroSchema::new(schema.to_string());
                    let form = Form::of(frame(number).to_vec(), schema);
                    self.forms.push(form.map_err(|source| Error::Form { table, source })?);
                }
                (_, fault) => {
                    if self.foreign.len() >= FOREIGN_MAX {
                        self.foreign.clear();
                    }
                    self.foreign.insert(number, fault.unwrap_or_default());
                }
            }
        }
        Ok(())
    }

    /// Why a row with Confluent's framing is none of ours; nothing where it has another.
    fn why_foreign(&self, body: &[u8]) -> Option<String> {
        let number = number(body)?;
        let begins = format!("it has Confluent's framing, with the schema of number {number}");
        Some(match (&self.registry, self.foreign.get(&number)) {
            (None, _) => format!("{begins}, and no registry is named by avro.schema_registry"),
            (_, Some(fault)) => format!("{begins}: {fault}"),
            (_, None) => format!("{begins}, and its bytes are no row of that"),
        })
    }

    fn form(&self, message: &Message) -> Option<usize> {
        let body = message.value.as_deref()?;
        self.forms.iter().position(|form| body.starts_with(&form.header))
    }

    fn run(
        &mut self,
        form: usize,
        messages: &[Message],
        run: Range<usize>,
        why_not: fn(&[u8]) -> String,
        gathered: &mut Gathered,
    ) -> Result<(), Error> {
        let body = |index: usize| messages[index].value.as_deref().unwrap_or_default();
        let faulty = |source| Error::Form { table: self.table.name(), source };
        let stored = self.table.schema_of_files();
        if let Some(batch) = self.forms[form].read(run.clone().map(body)).map_err(faulty)? {
            gathered.batches.push(padded(&batch, &stored).map_err(|source| self.columns(source))?);
            gathered.offsets.extend(run.map(|index| messages[index].offset));
            return Ok(());
        }
        // One of them cannot be read: each for itself, to find which.
        for index in run {
            match self.forms[form].read(std::iter::once(body(index))).map_err(faulty)? {
                Some(batch) => {
                    gathered.batches.push(padded(&batch, &stored).map_err(|source| self.columns(source))?);
                    gathered.offsets.push(messages[index].offset);
                }
                None => {
                    let reason = self.why_foreign(body(index)).unwrap_or_else(|| why_not(body(index)));
                    gathered.rejects.push(Reject { index, reason });
                }
            }
        }
        Ok(())
    }

    fn json<R: Serialize>(
        &self,
        messages: &[Message],
        read: impl Fn(&Message) -> Result<Option<R>, String>,
    ) -> Result<Gathered, Error> {
        let (mut rows, mut gathered) = (Vec::new(), Gathered::default());
        for (index, message) in messages.iter().enumerate() {
            match read(message) {
                Ok(Some(row)) => {
                    rows.push(row);
                    gathered.offsets.push(message.offset);
                }
                Ok(None) => {}
                Err(reason) => gathered.rejects.push(Reject { index, reason }),
            }
        }
        if rows.is_empty() {
            return Ok(gathered);
        }
        let batch = || {
            let mut decoder = arrow::json::ReaderBuilder::new(self.table.schema_of_files())
                .with_batch_size(rows.len())
                .build_decoder()?;
            decoder.serialize(&rows)?;
            decoder.flush()
        };
        gathered.batches.extend(batch().map_err(|source| self.columns(source))?);
        Ok(gathered)
    }

    /// Adds the day of each row, and rejects those whose time has none that anyone could read.
    fn dated(
        &self,
        batch: RecordBatch,
        offsets: Vec<i64>,
        messages: &[Message],
        rejects: &mut Vec<Reject>,
    ) -> Result<(RecordBatch, Vec<i64>), Error> {
        let name = self.table.time_column();
        let times = batch.column_by_name(name);
        let times = times.and_then(|column| column.as_any().downcast_ref::<TimestampMicrosecondArray>());
        let fault = || self.columns(ArrowError::SchemaError(format!("column {name} holds no time")));
        let times = times.ok_or_else(fault)?;
        let has_day = |time: i64| (0..=TIME_US_MAX).contains(&time);
        let kept: BooleanArray = times.values().iter().map(|&time| Some(has_day(time))).collect();
        let (batch, offsets) = match kept.true_count() == kept.len() {
            true => (batch.clone(), offsets),
            false => {
                for (row, &time) in times.values().iter().enumerate().filter(|(_, time)| !has_day(**time)) {
                    let reason = format!(
                        "{name} is {time} µs since 1970, which is not between the years 1970 and 9999"
                    );
                    // Messages lie in the order of their offsets.
                    if let Ok(index) = messages.binary_search_by_key(&offsets[row], |message| message.offset)
                    {
                        rejects.push(Reject { index, reason });
                    }
                }
                let batch = filter_record_batch(&batch, &kept).map_err(|source| self.columns(source))?;
                let kept = offsets.into_iter().zip(kept.values()).filter(|(_, kept)| *kept);
                (batch, kept.map(|(offset, _)| offset).collect())
            }
        };
        let times = batch.column_by_name(name);
        let times = times.and_then(|column| column.as_any().downcast_ref::<TimestampMicrosecondArray>());
        let day = |time: &i64| i32::try_from(time.div_euclid(DAY_US)).unwrap_or(i32::MAX);
        let days: Date32Array = times.ok_or_else(fault)?.values().iter().map(day).collect::<Vec<_>>().into();
        let mut columns = batch.columns().to_vec();
        columns.push(Arc::new(days));
        let batch =
            RecordBatch::try_new(self.table.schema(), columns).map_err(|source| self.columns(source))?;
        Ok((batch, offsets))
    }
}

/// The columns of the table, by name: of what was read some are not kept, and of an older form some are not there.
pub(crate) fn padded(batch: &RecordBatch, stored: &SchemaRef) -> Result<RecordBatch, ArrowError> {
    let column = |field: &Arc<arrow::datatypes::Field>| -> ArrayRef {
        let found = batch.column_by_name(field.name());
        found.map_or_else(|| new_null_array(field.data_type(), batch.num_rows()), Arc::clone)
    };
    RecordBatch::try_new(Arc::clone(stored), stored.fields().iter().map(column).collect())
}

/// In the words of the record's own decoder, which names what it met.
fn why_not<R: Record>(body: &[u8]) -> String {
    match R::decode(body) {
        Err(error) => told(&error),
        Ok(_) => format!("could not read a {} that another decoder reads; this is a fault of ours", R::NAME),
    }
}

fn told(error: &forebay_schemas::DecodeError) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

fn nothing() -> String {
    "the message has no value".to_owned()
}

fn value(message: &Message) -> Result<&[u8], String> {
    message.value.as_deref().ok_or_else(nothing)
}

/// When a message was written, in microseconds since 1970.
const fn written_at(message: &Message) -> i64 {
    message.timestamp_ms.saturating_mul(1000)
}

/// A row of `dead_letters`.
#[derive(Serialize)]
struct Letter {
    letter: String,
    request_id: String,
    tenant: String,
    generation: i32,
    stage: String,
    pipeline: String,
    record: String,
    origin_topic: String,
    origin_partition: i32,
    origin_offset: i64,
    origin_at: i64,
    class: String,
    code: String,
    message: String,
    attempts: i32,
    since: i64,
    call_id: String,
    deadline_at: Option<i64>,
    paid_nano_usd: i64,
    redrives: i32,
    body_at: Option<String>,
    died_at: i64,
}

impl Letter {
    /// Nothing where the message is a note that a letter was redriven: that is no letter.
    fn read(message: &Message) -> Result<Option<Self>, String> {
        if Redriven::read(&message.headers).map_err(|error| error.to_string())?.is_some() {
            return Ok(None);
        }
        let letter = DeadLetter::read(&message.headers).map_err(|error| error.to_string())?;
        let count = |count: u32| i32::try_from(count).unwrap_or(i32::MAX);
        let us = |ms: i64| ms.saturating_mul(1000);
        Ok(Some(Self {
            letter: letter.message_key(),
            request_id: letter.id.as_str().to_owned(),
            tenant: letter.tenant.as_str().to_owned(),
            generation: count(letter.generation),
            stage: letter.stage,
            pipeline: letter.pipeline,
            record: letter.schema,
            origin_topic: letter.topic,
            origin_partition: letter.partition,
            origin_offset: letter.offset,
            origin_at: us(letter.timestamp_ms),
            class: letter.class,
            code: letter.code,
            message: letter.message,
            attempts: count(letter.attempts),
            since: us(letter.since_ms),
            call_id: letter.call_id,
            deadline_at: letter.deadline_at_ms.map(us),
            paid_nano_usd: letter.paid_nano_usd.0,
            redrives: count(letter.redrives),
            body_at: letter.body,
            died_at: written_at(message),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::DATE;
    use arrow::{
        array::AsArray as _,
        datatypes::{DataType, Date32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType},
    };
    use forebay_runtime::host::kafka::{Kafka, KafkaSettings, RegistrySettings};
    use proptest::{collection::vec, option, prelude::*};
    use serde_json::{Value, json};

    const OUTCOME: &[u8] = include_bytes!("../../../schemas/golden/v0.1/outcome.avro");
    const OUTCOMES: [&[u8]; 6] = [
        OUTCOME,
        include_bytes!("../../../schemas/golden/v0.1/outcome-nulls.avro"),
        include_bytes!("../../../schemas/golden/v0.1/outcome-44-columns.avro"),
        include_bytes!("../../../schemas/golden/v0.1/outcome-nulls-44-columns.avro"),
        include_bytes!("../../../schemas/golden/v0.1/outcome-without-tier.avro"),
        include_bytes!("../../../schemas/golden/v0.1/outcome-nulls-without-tier.avro"),
    ];
    const ATTEMPTS: [&[u8]; 8] = [
        include_bytes!("../../../schemas/golden/v0.1/attempt.avro"),
        include_bytes!("../../../schemas/golden/v0.1/attempt-nulls.avro"),
        include_bytes!("../../../schemas/golden/v0.1/attempt-25-columns.avro"),
        include_bytes!("../../../schemas/golden/v0.1/attempt-nulls-25-columns.avro"),
        include_bytes!("../../../schemas/golden/v0.1/attempt-23-columns.avro"),
        include_bytes!("../../../schemas/golden/v0.1/attempt-nulls-23-columns.avro"),
        include_bytes!("../../../schemas/golden/v0.1/attempt-19-columns.avro"),
        include_bytes!("../../../schemas/golden/v0.1/attempt-nulls-19-columns.avro"),
    ];

    fn message(offset: i64, value: Option<&[u8]>) -> Message {
        let value = value.map(Bytes::copy_from_slice);
        Message { offset, timestamp_ms: 1_795_500_000_123, key: None, value, headers: Headers::new() }
    }

    fn messages<'a>(bodies: impl IntoIterator<Item = &'a [u8]>) -> Vec<Message> {
        (10..).zip(bodies).map(|(offset, body)| message(offset, Some(body))).collect()
    }

    fn read(table: Table, messages: &[Message]) -> Rows {
        Decoder::new(table).unwrap().read(messages).unwrap()
    }

    /// One cell as the JSON that its record has there; times as microseconds.
    fn cell(batch: &RecordBatch, row: usize, name: &str) -> Value {
        let column = batch.column_by_name(name).unwrap();
        if column.is_null(row) {
            return Value::Null;
        }
        match column.data_type() {
            DataType::Utf8 => json!(column.as_string::<i32>().value(row)),
            DataType::Int32 => json!(column.as_primitive::<Int32Type>().value(row)),
            DataType::Int64 => json!(column.as_primitive::<Int64Type>().value(row)),
            DataType::Float64 => json!(column.as_primitive::<Float64Type>().value(row)),
            DataType::Timestamp(..) => json!(column.as_primitive::<TimestampMicrosecondType>().value(row)),
            DataType::Date32 => json!(column.as_primitive::<Date32Type>().value(row)),
            DataType::Boolean => json!(column.as_boolean().value(row)),
            other => panic!("no table has a column of type {other}"),
        }
    }

    /// The same rows with the framing of a registry that knows each form by its place, and one that is of a later version.
    #[test]
    fn rows_of_both_framings_are_the_same_rows() {
        let url = "http://127.0.0.1:1".to_owned();
        let registry = Some(RegistrySettings { url, user: None, is_written: false });
        let kafka = Kafka::new(&KafkaSettings { registry, ..KafkaSettings::default() }).unwrap();
        let registry = kafka.registry().unwrap();
        let forms = Outcome::forms().unwrap();
        for (place, (_, schema)) in forms.iter().enumerate() {
            registry.learn(u32::try_from(place).unwrap(), Some(Arc::new(schema.clone())));
        }
        let mut newer = forms[0].1.clone();
        let mood = json!({"name": "mood", "type": ["null", "string"], "default": null});
        newer["fields"].as_array_mut().unwrap().push(mood);
        registry.learn(100, Some(Arc::new(newer)));
        registry.learn(101, Some(Arc::new(json!("long"))));
        registry.learn(102, None);
        let framed = |body: &[u8]| {
            let place = forms.iter().position(|(header, _)| body.starts_with(header)).unwrap();
            [frame(u32::try_from(place).unwrap()).as_slice(), &body[HEADER_BYTES..]].concat()
        };
        let single = messages(OUTCOMES);
        let expected = Decoder::new(Table::Outcomes).unwrap().read(&single).unwrap();
        let datum = &OUTCOMES[0][HEADER_BYTES..];
        let mixed: Vec<Vec<u8>> = OUTCOMES
            .iter()
            .enumerate()
            .map(|(index, body)| if index % 2 == 0 { framed(body) } else { body.to_vec() })
            .chain([
                // "calm", as Avro writes it in a union.
                [frame(100).as_slice(), datum, b"\x02\x08calm"].concat(),
                [frame(101).as_slice(), datum].concat(),
                [frame(102).as_slice(), datum].concat(),
                framed(OUTCOMES[0])[..20].to_vec(),
            ])
            .collect();
        let mut decoder = Decoder::new(Table::Outcomes).unwrap().with_registry(Some(Arc::clone(registry)));
        let rows = decoder.read(&messages(mixed.iter().map(Vec::as_slice))).unwrap();
        let count = OUTCOMES.len();
        assert_eq!(rows.batch.slice(0, count), expected.batch);
        assert_eq!(rows.batch.slice(count, 1), expected.batch.slice(0, 1), "of a later version");
        let told: Vec<_> = rows.rejects.iter().map(|reject| (reject.index, reject.reason.as_str())).collect();
        let begins = "it has Confluent's framing, with the schema of number";
        let expected = [
            (count + 1, format!("{begins} 101: it is no record")),
            (count + 2, format!("{begins} 102: the registry has none of that number")),
            (count + 3, format!("{begins} 0, and its bytes are no row of that")),
        ];
        assert_eq!(told, expected.each_ref().map(|(index, reason)| (*index, reason.as_str())));

        // Without a registry it is said what is missing; with one that does not answer nothing is said of any row.
        let alone = framed(OUTCOMES[0]);
        let rows = read(Table::Outcomes, &messages([alone.as_slice()]));
        assert!(rows.rejects[0].reason.ends_with("no registry is named by avro.schema_registry"));
        let unknown = [frame(9_999).as_slice(), datum].concat();
        let away = decoder.read(&messages([OUTCOMES[0], unknown.as_slice()])).unwrap_err();
        assert!(matches!(away, Error::Registry { .. }), "{away}");
    }

    /// Row by row, what arrow-avro reads is what the record's own decoder reads.
    fn agree<R: Record + Serialize>(table: Table, rows: &Rows, messages: &[Message]) {
        assert_eq!(rows.batch.schema(), table.schema());
        assert_eq!(rows.batch.num_rows() + rows.rejects.len(), messages.len());
        for (row, offset) in rows.offsets.iter().enumerate() {
            let message = messages.iter().find(|message| message.offset == *offset).unwrap();
            let record = serde_json::to_value(R::decode(message.value.as_ref().unwrap()).unwrap()).unwrap();
            for column in table.columns().iter().filter(|column| column.name != DATE) {
                assert_eq!(cell(&rows.batch, row, column.name), record[column.name], "{}", column.name);
            }
            let time = record[table.time_column()].as_i64().unwrap();
            assert_eq!(cell(&rows.batch, row, DATE), json!(time.div_euclid(DAY_US)));
        }
        for reject in &rows.rejects {
            let body = messages[reject.index].value.as_deref();
            assert!(body.is_none_or(|body| R::decode(body).is_err()), "{reject:?}");
        }
    }

    #[test]
    fn every_form_that_was_ever_written_is_read() {
        let outcomes = messages(OUTCOMES);
        let rows = read(Table::Outcomes, &outcomes);
        agree::<Outcome>(Table::Outcomes, &rows, &outcomes);
        assert_eq!(rows.offsets, [10, 11, 12, 13, 14, 15]);
        let attempts = messages(ATTEMPTS);
        let rows = read(Table::Attempts, &attempts);
        agree::<Attempt>(Table::Attempts, &rows, &attempts);
        assert_eq!(rows.offsets, [10, 11, 12, 13, 14, 15, 16, 17]);
    }

    /// A row as it was written before the last columns came: null is a byte of its own, so it is cut off with them.
    fn as_written_before(form: usize, row: &Attempt) -> Vec<u8> {
        let (header, _) = Attempt::forms().unwrap().remove(form);
        let now = row.encode().unwrap().unwrap();
        [&header, &now[HEADER_BYTES..now.len() - form]].concat()
    }

    fn attempt() -> impl Strategy<Value = Attempt> {
        let text = || vec(any::<char>(), 0..9).prop_map(String::from_iter);
        let numbers = (any::<i32>(), any::<i64>(), option::of(any::<i64>()), 0..TIME_US_MAX);
        (text(), text(), option::of(text()), numbers, option::of(any::<i32>())).prop_map(
            |(id, tenant, model, (attempt, duration_us, tokens, started_at), http_status)| Attempt {
                attempt_id: id,
                tenant,
                model,
                attempt,
                duration_us,
                input_tokens: tokens,
                started_at,
                http_status,
                tier: None,
                cached_read_tokens: None,
                cached_write_tokens: None,
                reasoning_tokens: None,
                key_id: None,
                job: None,
                operation: None,
                ..Attempt::decode(ATTEMPTS[0]).unwrap()
            },
        )
    }

    #[derive(Clone, Debug)]
    enum Body {
        Of(usize, Box<Attempt>),
        CutShort(Box<Attempt>),
        Twice(Box<Attempt>),
        BeforeTime(Box<Attempt>),
        Garbage(Vec<u8>),
        Nothing,
    }

    fn body() -> impl Strategy<Value = Body> {
        prop_oneof![
            8 => (0..8_usize, attempt()).prop_map(|(form, row)| Body::Of(form, Box::new(row))),
            1 => attempt().prop_map(|row| Body::CutShort(Box::new(row))),
            1 => attempt().prop_map(|row| Body::Twice(Box::new(row))),
            1 => attempt().prop_map(|row| Body::BeforeTime(Box::new(row))),
            1 => vec(any::<u8>(), 0..40).prop_map(Body::Garbage),
            1 => Just(Body::Nothing),
        ]
    }

    proptest! {
        #[test]
        fn a_message_is_a_row_or_is_rejected_and_takes_no_other_with_it(bodies in vec(body(), 0..40)) {
            let bytes = |body: &Body| match body {
                Body::Of(form, row) => Some(as_written_before(*form, row)),
                Body::CutShort(row) => row.encode().unwrap().map(|mut body| { body.truncate(body.len() - 3); body }),
                Body::Twice(row) => row.encode().unwrap().map(|body| body.repeat(2)),
                Body::BeforeTime(row) => Attempt { started_at: -1, ..(**row).clone() }.encode().unwrap(),
                Body::Garbage(bytes) => Some(bytes.clone()),
                Body::Nothing => None,
            };
            let messages: Vec<Message> =
                (0..).zip(&bodies).map(|(offset, body)| message(offset, bytes(body).as_deref())).collect();
            let rows = read(Table::Attempts, &messages);
            let good: Vec<i64> = (0..).zip(&bodies)
                .filter(|(_, body)| matches!(body, Body::Of(..))).map(|(offset, _)| offset).collect();
            prop_assert_eq!(&rows.offsets, &good);
            let timely: Vec<Reject> = rows.rejects.iter()
                .filter(|reject| !matches!(bodies[reject.index], Body::BeforeTime(_))).cloned().collect();
            let early = rows.rejects.len() - timely.len();
            prop_assert_eq!(early, bodies.iter().filter(|body| matches!(body, Body::BeforeTime(_))).count());
            let known: Vec<Message> = messages.iter().zip(&bodies)
                .filter(|(_, body)| !matches!(body, Body::BeforeTime(_))).map(|(message, _)| message.clone()).collect();
            prop_assert_eq!(rows.batch.num_rows() + timely.len(), known.len());
            let good = messages.iter().filter(|message| good.contains(&message.offset)).cloned().collect::<Vec<_>>();
            agree::<Attempt>(Table::Attempts, &Rows { rejects: Vec::new(), ..rows }, &good);
        }
    }

    proptest! {
        #[test]
        fn messages_are_read_in_runs_that_are_no_larger_than_the_bound(sizes in vec(0..40_usize, 0..40), bytes_max in 0..100_usize) {
            let messages: Vec<Message> =
                (0..).zip(&sizes).map(|(offset, size)| message(offset, Some(&vec![b'x'; *size]))).collect();
            let runs = runs(&messages, bytes_max);
            prop_assert_eq!(runs.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..messages.len()).collect::<Vec<_>>());
            let bytes = |run: &Range<usize>| sizes[run.clone()].iter().sum::<usize>();
            prop_assert!(runs.iter().all(|run| !run.is_empty() && (bytes(run) <= bytes_max || run.len() == 1)));
            prop_assert!(runs.windows(2).all(|two| bytes(&two[0]) + sizes[two[1].start] > bytes_max), "as few as may be");
        }
    }

    #[test]
    fn what_people_leave_out_is_filled_in() {
        let label = br#"{"request_id": "order-17", "wrong": true}"#;
        let rows = read(Table::Labels, &messages([&label[..], br#"{"request_id": "order-17", "wrong": 3}"#]));
        assert_eq!((rows.batch.num_rows(), rows.rejects[0].index), (1, 1));
        assert!(rows.rejects[0].reason.contains("line 1 column"), "{}", rows.rejects[0].reason);
        assert_eq!(cell(&rows.batch, 0, "tenant"), json!("default"));
        assert_eq!(cell(&rows.batch, 0, "labelled_at"), json!(1_795_500_000_123_000_i64));
        assert_eq!(cell(&rows.batch, 0, "wrong"), json!(true));
        let audit = br#"{"request_id": "a", "tenant": "t", "judge": "j", "judge_version": "2", "flagged": true, "score": 0.25, "audited_at": 7}"#;
        let rows = read(Table::Audits, &messages([&audit[..]]));
        assert_eq!(
            (cell(&rows.batch, 0, "score"), cell(&rows.batch, 0, "audited_at")),
            (json!(0.25), json!(7))
        );
    }

    #[test]
    fn a_time_without_a_day_is_rejected_since_its_folder_could_not_be_named() {
        let label = br#"{"request_id": "a", "wrong": true, "labelled_at": 1795500000000000000}"#;
        let rows = read(Table::Labels, &messages([&label[..]]));
        assert_eq!(rows.batch.num_rows(), 0);
        assert!(rows.rejects[0].reason.contains("between the years 1970 and 9999"), "{:?}", rows.rejects);
    }

    #[test]
    fn a_letter_is_read_from_its_headers_and_the_note_beside_it_is_no_row() {
        let at =
            forebay_schemas::Source { topic: "prompts".into(), partition: 3, offset: 17, timestamp_ms: 5 };
        let note = Redriven { to: at, generation: 2, redrives: 1 };
        let letter = [
            ("forebay-dead-stage", "infer"),
            ("forebay-dead-id", "order-17"),
            ("forebay-dead-source", "prompts/3/17@5"),
            ("forebay-dead-class", "unavailable"),
        ];
        let letter = letter.map(|(name, value)| (name.to_owned(), Some(Bytes::from(value))));
        let mut messages = vec![message(0, Some(b"{}")), message(1, None), message(2, Some(b"{}"))];
        messages[0].headers = letter.into();
        messages[1].headers = note.write();
        let rows = read(Table::DeadLetters, &messages);
        assert_eq!((rows.offsets.as_slice(), rows.rejects.len()), (&[0][..], 1));
        assert_eq!(cell(&rows.batch, 0, "letter"), json!("infer/prompts/3/17"));
        assert_eq!(cell(&rows.batch, 0, "died_at"), json!(1_795_500_000_123_000_i64));
        assert!(rows.rejects[0].reason.contains("has no header forebay-dead-source"), "{:?}", rows.rejects);
    }
}
