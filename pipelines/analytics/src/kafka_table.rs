//! Topics as tables: `kafka('topic', start, end)`, and the part of a topic that no table has yet.
//!
//! A query reads each partition up to where it ended when the query was planned, so that it ends too. Bounds on `partition`, `offset` and
//! `timestamp` are pushed down to where reading begins and stops.
//!
//! Invariant: nothing is committed and no group is joined, so reading moves nobody's place. A bound that is pushed down leaves out no
//! message that the query would keep: since clients set timestamps, only their lower bound can be looked up, and the upper one is a filter.

use crate::decode::{self, Decoder, Message};
use crate::guards::{Refused, Scope};
use crate::table::Table;
use arrow::array::{
    ArrayRef, BinaryArray, Int32Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::{DataFusionError, Result, ScalarValue, plan_err};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::simplify::SimplifyContext;
use datafusion::logical_expr::{BinaryExpr, Expr, Operator, TableProviderFilterPushDown, TableType};
use datafusion::optimizer::simplify_expressions::ExprSimplifier;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion::physical_plan::stream::RecordBatchReceiverStreamBuilder;
use datafusion::physical_plan::streaming::{PartitionStream, StreamingTableExec};
use forebay_runtime::host::kafka::{Kafka, LogContext, headers};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Message as _, Offset, TopicPartitionList};
use std::error::Error as _;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinError;

/// How long to wait for one answer of the cluster.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long a partition is asked again that is changing its leader, and how long to wait before it is, twice as long each time.
const LEADER_MAX: Duration = Duration::from_secs(10);
const LEADER_PAUSE: Duration = Duration::from_millis(100);
/// How long one poll may take; so long a query that was stopped may still read.
const POLL: Duration = Duration::from_millis(100);
/// So many messages become a batch.
const BATCH_MESSAGES: usize = 4_096;
/// A batch of large messages is smaller.
const BATCH_BYTES: usize = 4 << 20;
/// Batches that may wait between reading and the query.
const BATCHES_AHEAD: usize = 2;

/// How the function is called.
pub const CALL: &str = "kafka('topic' [, start [, end]])";
/// What it answers.
pub const MEANING: &str = "The messages of a topic, by its full name on Kafka: `partition`, `offset` (SQL wants it in double quotes behind a comma), `timestamp`, `key` and `value` (bytes; \
    CAST(value AS TEXT) where they are text), `headers` (JSON). `start` (included) and `end` (excluded) are times of messages; null is none. \
    Bounds on partition, offset and timestamp in the WHERE are pushed down. For users of all tenants.";

static COLUMNS: LazyLock<SchemaRef> = LazyLock::new(|| {
    Arc::new(Schema::new(vec![
        Field::new("partition", DataType::Int32, false),
        Field::new("offset", DataType::Int64, false),
        Field::new("timestamp", time(), true),
        Field::new("key", DataType::Binary, true),
        Field::new("value", DataType::Binary, true),
        Field::new("headers", DataType::Utf8, false),
    ]))
});

fn time() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// The offsets of one partition that are read: from the first, and before the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The partition.
    pub partition: i32,
    /// The first.
    pub from: i64,
    /// The one behind the last.
    pub to: i64,
}

/// What becomes of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A row a message, with what Kafka knows of it; of these times, in µs.
    Messages {
        /// Not older than this.
        start_us: Option<i64>,
        /// Older than this.
        end_us: Option<i64>,
    },
    /// The rows of a table. What is no row is passed over, as the sink does.
    Rows(Table),
}

/// All offsets that the partitions of a topic have now; nothing where there is no such topic. Blocks.
pub fn ranges(kafka: &Kafka, topic: &str) -> Result<Vec<Range>, KafkaError> {
    let reader = reader(kafka)?;
    let metadata = reader.fetch_metadata(Some(topic), ANSWER_MAX)?;
    let mut ranges = Vec::new();
    for found in metadata.topics().iter().filter(|found| found.name() == topic) {
        use RDKafkaErrorCode::{InvalidTopic, UnknownTopic, UnknownTopicOrPartition};
        match found.error().map(RDKafkaErrorCode::from) {
            None => {}
            Some(UnknownTopicOrPartition | UnknownTopic | InvalidTopic) => continue,
            // Not known, which is not the same as not there: its messages must not be missing in silence.
            Some(fault) => return Err(KafkaError::MetadataFetch(fault)),
        }
        for partition in found.partitions() {
            let (from, to) = reader.fetch_watermarks(topic, partition.id(), ANSWER_MAX)?;
            ranges.push(Range { partition: partition.id(), from, to });
        }
    }
    ranges.sort_by_key(|range| range.partition);
    Ok(ranges)
}

/// Moves the beginning of each range to the first message that is not older. Blocks.
fn from_time(kafka: &Kafka, topic: &str, ranges: &mut [Range], start_us: i64) -> Result<(), KafkaError> {
    let mut wanted = TopicPartitionList::new();
    for range in ranges.iter() {
        wanted.add_partition_offset(
            topic,
            range.partition,
            Offset::Offset(start_us.max(0).div_euclid(1_000)),
        )?;
    }
    let found = reader(kafka)?.offsets_for_times(wanted, ANSWER_MAX)?;
    for range in ranges {
        let Some(found) = found.find_partition(topic, range.partition) else { continue };
        found.error()?;
        match found.offset() {
            Offset::Offset(first) => range.from = range.from.max(first),
            // All are older.
            Offset::End => range.from = range.to,
            _ => {}
        }
    }
    Ok(())
}

fn reader(kafka: &Kafka) -> Result<BaseConsumer<LogContext>, KafkaError> {
    kafka.reader_config().create_with_context(LogContext)
}

/// Runs what blocks; again, for a bounded time, where a partition is changing its leader.
pub async fn patiently<T: Send + 'static>(
    kafka: &Kafka,
    topic: &str,
    work: impl Fn(&Kafka, &str) -> Result<T, KafkaError> + Clone + Send + 'static,
) -> Result<Result<T, KafkaError>, JoinError> {
    let (until, mut pause) = (tokio::time::Instant::now() + LEADER_MAX, LEADER_PAUSE);
    loop {
        let (kafka, topic, work) = (kafka.clone(), topic.to_owned(), work.clone());
        match tokio::task::spawn_blocking(move || work(&kafka, &topic)).await? {
            Err(fault) if is_passing(&fault) && tokio::time::Instant::now() < until => {
                tokio::time::sleep(pause).await;
            }
            done => return Ok(done),
        }
        pause *= 2;
    }
}

/// Whether it is said of a partition whose leader is another from now on, or is not known yet.
fn is_passing(fault: &KafkaError) -> bool {
    use RDKafkaErrorCode::{
        FencedLeaderEpoch, LeaderNotAvailable, NotLeaderForPartition, UnknownLeaderEpoch,
    };
    matches!(
        fault.rdkafka_error_code(),
        Some(NotLeaderForPartition | LeaderNotAvailable | FencedLeaderEpoch | UnknownLeaderEpoch)
    )
}

/// The same, and says what could not be done with which topic.
pub async fn blocking<T: Send + 'static>(
    kafka: &Kafka,
    topic: &str,
    work: impl Fn(&Kafka, &str) -> Result<T, KafkaError> + Clone + Send + 'static,
) -> Result<T> {
    let done = patiently(kafka, topic, work).await;
    let done = done.map_err(|fault| DataFusionError::External(Box::new(fault)))?;
    done.map_err(|fault| unread(topic, kafka.bootstrap_servers(), &fault))
}

fn unread(topic: &str, servers: &str, fault: &KafkaError) -> DataFusionError {
    DataFusionError::Execution(format!(
        "could not read topic {topic} at {servers}: {fault}; check that Kafka is up, or ask the tables, which need none"
    ))
}

/// Some offsets of a topic, as a table.
pub struct TopicTable {
    /// Where.
    pub kafka: Kafka,
    /// The full name of the topic.
    pub topic: String,
    /// What is read.
    pub ranges: Vec<Range>,
    /// What becomes of it.
    pub form: Form,
    /// With which columns; those of `form` in types that may differ.
    pub schema: SchemaRef,
}

impl fmt::Debug for TopicTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "topic {} {:?}", self.topic, self.ranges)
    }
}

#[async_trait]
impl TableProvider for TopicTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        _: &dyn Session,
        projection: Option<&Vec<usize>>,
        _: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        plan(&self.kafka, &self.topic, &self.ranges, self.form, &self.schema, projection, limit)
    }
}

fn plan(
    kafka: &Kafka,
    topic: &str,
    ranges: &[Range],
    form: Form,
    schema: &SchemaRef,
    projection: Option<&Vec<usize>>,
    limit: Option<usize>,
) -> Result<Arc<dyn ExecutionPlan>> {
    let slice = |range: &Range| {
        let (kafka, topic, schema) = (kafka.clone(), topic.to_owned(), Arc::clone(schema));
        Arc::new(Slice { kafka, topic, range: *range, form, schema }) as Arc<dyn PartitionStream>
    };
    let slices: Vec<_> = ranges.iter().filter(|range| range.from < range.to).map(slice).collect();
    if slices.is_empty() {
        // A stream of no partitions cannot be sorted: the planner takes it for several.
        let read =
            projection.map_or_else(|| Ok(Arc::clone(schema)), |read| schema.project(read).map(Arc::new))?;
        return Ok(Arc::new(EmptyExec::new(read)));
    }
    Ok(Arc::new(StreamingTableExec::try_new(Arc::clone(schema), slices, projection, [], false, limit)?))
}

/// One range, read by a thread of its own while the query runs.
#[derive(Clone)]
struct Slice {
    kafka: Kafka,
    topic: String,
    range: Range,
    form: Form,
    schema: SchemaRef,
}

impl fmt::Debug for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "topic {} {:?}", self.topic, self.range)
    }
}

impl PartitionStream for Slice {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let mut stream = RecordBatchReceiverStreamBuilder::new(Arc::clone(&self.schema), BATCHES_AHEAD);
        let (to, slice) = (stream.tx(), self.clone());
        stream.spawn_blocking(move || slice.read(&to));
        stream.build()
    }
}

impl Slice {
    /// Reads the range and sends what becomes of it; ends early where nobody listens.
    fn read(&self, to: &mpsc::Sender<Result<RecordBatch>>) -> Result<()> {
        let fault = |fault: KafkaError| unread(&self.topic, self.kafka.bootstrap_servers(), &fault);
        let reader = reader(&self.kafka).map_err(fault)?;
        let mut assignment = TopicPartitionList::new();
        let Range { partition, from, to: end } = self.range;
        assignment.add_partition_offset(&self.topic, partition, Offset::Offset(from)).map_err(fault)?;
        reader.assign(&assignment).map_err(fault)?;
        let mut decoder = match self.form {
            Form::Rows(table) => {
                let decoder =
                    Decoder::new(table).map_err(|fault| DataFusionError::External(Box::new(fault)))?;
                Some(decoder.with_registry(self.kafka.registry().cloned()))
            }
            Form::Messages { .. } => None,
        };
        let (mut messages, mut bytes, mut heard) = (Vec::new(), 0, Instant::now());
        let mut trouble = None;
        loop {
            let is_last = match reader.poll(POLL) {
                Some(Ok(message)) if message.offset() >= end => true,
                Some(Ok(message)) => {
                    heard = Instant::now();
                    bytes += message.key_len() + message.payload_len();
                    messages.push(Message {
                        offset: message.offset(),
                        timestamp_ms: message.timestamp().to_millis().unwrap_or_default(),
                        key: message.key().map(bytes::Bytes::copy_from_slice),
                        value: message.payload().map(bytes::Bytes::copy_from_slice),
                        headers: headers(&message),
                    });
                    message.offset() + 1 >= end
                }
                // The last offsets may be no messages but marks of transactions.
                Some(Err(KafkaError::PartitionEOF(_))) => true,
                // librdkafka tries again by itself.
                Some(Err(error)) => {
                    trouble = Some(error);
                    false
                }
                None => false,
            };
            if is_last || messages.len() >= BATCH_MESSAGES || bytes >= BATCH_BYTES {
                let batch = self.batch(&std::mem::take(&mut messages), decoder.as_mut())?;
                bytes = 0;
                if batch.num_rows() > 0 && to.blocking_send(Ok(batch)).is_err() {
                    return Ok(());
                }
                // Whoever reads the rows may have taken its time, which is not Kafka's.
                heard = Instant::now();
            }
            if is_last || to.is_closed() {
                return Ok(());
            }
            if heard.elapsed() > ANSWER_MAX {
                return Err(fault(trouble.unwrap_or(KafkaError::NoMessageReceived)));
            }
        }
    }

    fn batch(&self, messages: &[Message], decoder: Option<&mut Decoder>) -> Result<RecordBatch> {
        let batch = match (self.form, decoder) {
            (Form::Messages { start_us, end_us }, _) => {
                let is_wanted = |message: &&Message| {
                    let us = message.timestamp_ms.saturating_mul(1_000);
                    start_us.is_none_or(|start| us >= start) && end_us.is_none_or(|end| us < end)
                };
                as_told(self.range.partition, &messages.iter().filter(is_wanted).collect::<Vec<_>>())?
            }
            (Form::Rows(_), Some(decoder)) => {
                decoder.read(messages).map_err(|fault| undecided(&fault))?.batch
            }
            (Form::Rows(table), None) => return plan_err!("table {} has no decoder", table.name()),
        };
        let columns = batch
            .columns()
            .iter()
            .zip(self.schema.fields())
            .map(|(column, field)| cast(column, field.data_type()));
        Ok(RecordBatch::try_new(Arc::clone(&self.schema), columns.collect::<Result<_, _>>()?)?)
    }
}

/// With all causes, as who asked sees no more of an error than its words.
fn undecided(fault: &decode::Error) -> DataFusionError {
    let (mut text, mut cause) = (fault.to_string(), fault.source());
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    DataFusionError::Execution(text)
}

/// Messages with what Kafka knows of them.
fn as_told(partition: i32, messages: &[&Message]) -> Result<RecordBatch> {
    let times = messages.iter().map(|message| message.timestamp_ms.saturating_mul(1_000));
    let headers = messages.iter().map(|message| {
        let text = |value: &Option<bytes::Bytes>| match value {
            Some(value) => serde_json::Value::from(String::from_utf8_lossy(value)),
            None => serde_json::Value::Null,
        };
        let fields = message.headers.iter().map(|(name, value)| (name.clone(), text(value)));
        serde_json::Value::Object(fields.collect()).to_string()
    });
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int32Array::from(vec![partition; messages.len()])),
        Arc::new(Int64Array::from_iter_values(messages.iter().map(|message| message.offset))),
        Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC")),
        Arc::new(messages.iter().map(|message| message.key.as_deref()).collect::<BinaryArray>()),
        Arc::new(messages.iter().map(|message| message.value.as_deref()).collect::<BinaryArray>()),
        Arc::new(StringArray::from_iter_values(headers)),
    ];
    Ok(RecordBatch::try_new(Arc::clone(&COLUMNS), columns)?)
}

/// The function `kafka`.
pub struct Function {
    /// Where; nothing where there is no Kafka.
    pub kafka: Option<Kafka>,
    /// Whose rows may be seen: messages say in no common way whose they are.
    pub scope: Scope,
    /// How many messages a query may read.
    pub messages: u64,
    /// Whether others work queries out, who have no Kafka.
    pub is_far: bool,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("kafka")
    }
}

impl TableFunctionImpl for Function {
    fn call_with_args(&self, arguments: TableFunctionArgs) -> Result<Arc<dyn TableProvider>> {
        if self.scope != Scope::All {
            return Err(Refused::Topics.into());
        }
        if self.is_far {
            return Err(Refused::Local { what: "kafka()", instead: "" }.into());
        }
        let Some(kafka) = &self.kafka else {
            return plan_err!(
                "{CALL} needs a Kafka: start `forebay up` on the same data folder, or name yours by --bootstrap-servers"
            );
        };
        let (topic, times) = match arguments.exprs() {
            [Expr::Literal(topic, _), times @ ..] if times.len() <= 2 => {
                (topic.try_as_str().flatten(), times)
            }
            _ => (None, [].as_slice()),
        };
        let Some(topic) = topic else {
            return plan_err!(
                "{CALL} takes the name of a topic as text, and up to two times; such as kafka('outcomes', now() - INTERVAL '1 hour')"
            );
        };
        let [start_us, end_us] = [0, 1].map(|at| times.get(at).map(us).transpose());
        let form = Form::Messages { start_us: start_us?.flatten(), end_us: end_us?.flatten() };
        Ok(Arc::new(Asked { kafka: kafka.clone(), topic: topic.to_owned(), form, messages: self.messages }))
    }
}

/// A time that was given to the function, in µs.
fn us(expr: &Expr) -> Result<Option<i64>> {
    let context = SimplifyContext::builder().with_current_time().build();
    match ExprSimplifier::new(context).simplify(expr.clone())? {
        Expr::Literal(value, _) => match value.cast_to(&time())? {
            ScalarValue::TimestampMicrosecond(us, _) => Ok(us),
            other => plan_err!("{CALL}: {other} is no time"),
        },
        other => plan_err!(
            "{CALL}: {other} is no constant time; write one such as '2026-11-01' or now() - INTERVAL '1 hour'"
        ),
    }
}

/// A topic of which it is not known yet what is to be read.
struct Asked {
    kafka: Kafka,
    topic: String,
    form: Form,
    messages: u64,
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kafka('{}')", self.topic)
    }
}

#[async_trait]
impl TableProvider for Asked {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&COLUMNS)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        let one = |filter: &&Expr| match Bound::of(filter) {
            Some(_) => TableProviderFilterPushDown::Inexact,
            None => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(one).collect())
    }

    async fn scan(
        &self,
        _: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let mut ranges = blocking(&self.kafka, &self.topic, ranges).await?;
        if ranges.is_empty() {
            return plan_err!(
                "there is no topic {}; its name is the full one on Kafka, with its prefix",
                self.topic
            );
        }
        let bounds: Vec<Bound> = filters.iter().filter_map(Bound::of).collect();
        for bound in &bounds {
            bound.narrow(&mut ranges);
        }
        let Form::Messages { start_us, .. } = self.form else { return plan_err!("a topic has messages") };
        let start_us = bounds.iter().filter_map(|bound| bound.start_us()).chain(start_us).max();
        if let Some(start_us) = start_us {
            let find = move |kafka: &Kafka, topic: &str| {
                let mut ranges = ranges.clone();
                from_time(kafka, topic, &mut ranges, start_us)?;
                Ok(ranges)
            };
            ranges = blocking(&self.kafka, &self.topic, find).await?;
        }
        let count = ranges.iter().map(|range| u64::try_from(range.to - range.from).unwrap_or(0)).sum();
        if count > self.messages {
            let (topic, messages_max) = (self.topic.clone(), self.messages);
            return Err(DataFusionError::External(Box::new(Refused::Messages {
                topic,
                count,
                messages_max,
            })));
        }
        // A limit holds for what the filters above let through.
        let limit = limit.filter(|_| filters.is_empty());
        plan(&self.kafka, &self.topic, &ranges, self.form, &COLUMNS, projection, limit)
    }
}

/// A predicate of the form `column op number` that says where reading begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bound {
    column: &'static str,
    op: Operator,
    value: i64,
}

impl Bound {
    fn of(filter: &Expr) -> Option<Self> {
        let Expr::BinaryExpr(BinaryExpr { left, op, right }) = filter else { return None };
        let (column, op, value) = match (left.as_ref(), right.as_ref()) {
            (Expr::Column(column), Expr::Literal(value, _)) => (column, *op, value),
            (Expr::Literal(value, _), Expr::Column(column)) => (column, op.swap()?, value),
            _ => return None,
        };
        let value = match value {
            ScalarValue::Int32(value) => i64::from((*value)?),
            ScalarValue::Int64(value) | ScalarValue::TimestampMicrosecond(value, _) => (*value)?,
            _ => return None,
        };
        let column = ["partition", "offset", "timestamp"].into_iter().find(|name| *name == column.name)?;
        let is_known =
            matches!(op, Operator::Eq | Operator::Gt | Operator::GtEq | Operator::Lt | Operator::LtEq);
        is_known.then_some(Self { column, op, value })
    }

    fn narrow(self, ranges: &mut Vec<Range>) {
        let Self { column, op, value } = self;
        match column {
            "partition" => ranges.retain(|range| {
                let partition = i64::from(range.partition);
                match op {
                    Operator::Eq => partition == value,
                    Operator::Gt => partition > value,
                    Operator::GtEq => partition >= value,
                    Operator::Lt => partition < value,
                    _ => partition <= value,
                }
            }),
            "offset" => {
                let next = value.saturating_add(1);
                for range in ranges {
                    match op {
                        Operator::Eq => (range.from, range.to) = (range.from.max(value), range.to.min(next)),
                        Operator::Gt => range.from = range.from.max(next),
                        Operator::GtEq => range.from = range.from.max(value),
                        Operator::Lt => range.to = range.to.min(value),
                        _ => range.to = range.to.min(next),
                    }
                    range.to = range.to.max(range.from);
                }
            }
            _ => {}
        }
    }

    /// Before which time nothing is wanted.
    fn start_us(self) -> Option<i64> {
        let is_lower = matches!(self.op, Operator::Eq | Operator::Gt | Operator::GtEq);
        (self.column == "timestamp" && is_lower).then_some(self.value)
    }
}

#[cfg(test)]
pub(crate) mod tests;
