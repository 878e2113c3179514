//! All that is measured, declared once.
//!
//! Invariant: an instrument is made from its line in [`DECLARED`] only, and METRICS.md is written from the same lines.
//! So the page, the Prometheus output and the code cannot disagree; a test fails where they would.
//!
//! Names of `gen_ai.*` and their buckets are those of the OpenTelemetry semantic conventions, v1.41; what later ones call otherwise
//! has a line for each.

use opentelemetry::metrics::{Counter, Gauge, Histogram, Meter};

/// What an instrument is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts values by size, within these upper bounds.
    Histogram(&'static [f64]),
}

/// The names of OpenTelemetry's conventions for generative AI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenAi {
    /// Those of v1.41.
    #[default]
    V1_41,
    /// The latest that are known here.
    Latest,
}

impl GenAi {
    /// What `OTEL_SEMCONV_STABILITY_OPT_IN` asks for: a list of words, of which most are about other conventions.
    pub fn opted_in(list: &str) -> Self {
        match list.split(',').any(|word| word.trim() == "gen_ai_latest_experimental") {
            true => Self::Latest,
            false => Self::V1_41,
        }
    }
}

/// One instrument, as users see it.
pub(crate) struct Declared {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// In UCUM, as OpenTelemetry writes units.
    pub(crate) unit: &'static str,
    pub(crate) labels: &'static [&'static str],
    /// Labels that only some of its series have.
    pub(crate) sometimes: &'static [&'static str],
    /// At most so many series; what comes later is counted under `otel_metric_overflow`.
    pub(crate) series_max: usize,
    /// The conventions under which it is told, where not under all.
    pub(crate) only: Option<GenAi>,
    pub(crate) meaning: &'static str,
}

/// From half a millisecond, a step that calls nobody, to five minutes, the longest call that anybody waits for.
const STEP_SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
const CALL_SECONDS: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const TTFT_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const TPOT_SECONDS: &[f64] = &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const TOKENS: &[f64] = &[
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];
/// Around the 0.15 ms that it may be; beyond, for what a store of budgets takes.
const OVERHEAD_SECONDS: &[f64] =
    &[0.000_05, 0.000_1, 0.000_15, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 1.0];
/// From what somebody who looks on waits for, to an hour in which nothing was written.
const FRESH_SECONDS: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0];
const ITEMS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
const PASSAGES: &[f64] = &[0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

const STEP: &[&str] = &["stage", "operator"];
const STEP_TOPIC: &[&str] = &["stage", "operator", "topic"];
const STEP_PARTITION: &[&str] = &["stage", "operator", "topic", "partition"];
const CALL: &[&str] = &["stage", "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"];
const TABLE: &[&str] = &["table"];
const ENDPOINT: &[&str] = &["endpoint", "name"];
const ENDPOINT_MODEL: &[&str] = &["endpoint", "name", "model"];

/// Enough for a hundred steps with a handful of series each.
const SERIES: usize = 1_000;
/// A series a partition: 40 input topics of 100 partitions.
const SERIES_OF_PARTITIONS: usize = 4_000;

/// A line of the table; what differs from it is said by name.
const LINE: Declared = Declared {
    name: "",
    kind: Kind::Counter,
    unit: "",
    labels: STEP,
    sometimes: &[],
    series_max: SERIES,
    only: None,
    meaning: "",
};

pub(crate) const RECEIVED_RECORDS: Declared = Declared {
    name: "forebay.step.received.records",
    unit: "{record}",
    labels: STEP_TOPIC,
    meaning: "Records that came from a topic.",
    ..LINE
};
pub(crate) const RECEIVED_BYTES: Declared = Declared {
    name: "forebay.step.received",
    unit: "By",
    labels: STEP_TOPIC,
    meaning: "Bytes of keys and values that came from a topic.",
    ..LINE
};
pub(crate) const EMITTED_RECORDS: Declared = Declared {
    name: "forebay.step.emitted.records",
    unit: "{record}",
    labels: STEP_TOPIC,
    meaning: "Records that a topic acknowledged.",
    ..LINE
};
pub(crate) const EMITTED_BYTES: Declared = Declared {
    name: "forebay.step.emitted",
    unit: "By",
    labels: STEP_TOPIC,
    meaning: "Bytes of keys and values that a topic acknowledged.",
    ..LINE
};
pub(crate) const FINISHED: Declared = Declared {
    name: "forebay.step.finished.records",
    unit: "{record}",
    labels: &["stage", "operator", "outcome"],
    meaning: "Records that a step is done with, by outcome: ok, expired, cancelled, rejected, unavailable, \
              undecodable or panicked.",
    ..LINE
};
pub(crate) const DURATION: Declared = Declared {
    name: "forebay.step.duration",
    kind: Kind::Histogram(STEP_SECONDS),
    unit: "s",
    labels: &["stage", "operator", "outcome"],
    meaning: "From the dispatch of a record to its outcome, retries in place included.",
    ..LINE
};
pub(crate) const QUEUE_WAIT: Declared = Declared {
    name: "forebay.step.queue_wait",
    kind: Kind::Histogram(STEP_SECONDS),
    unit: "s",
    meaning: "From the time stamp of a record in its topic to its dispatch.",
    ..LINE
};
pub(crate) const RETRIES: Declared = Declared {
    name: "forebay.step.retries",
    unit: "{retry}",
    meaning: "Times that a record was processed again because the world failed.",
    ..LINE
};
pub(crate) const DEDUPLICATED: Declared = Declared {
    name: "forebay.step.deduplicated",
    unit: "{message}",
    meaning: "Messages not written again, because their request's was written before.",
    ..LINE
};
pub(crate) const REPEATED: Declared = Declared {
    name: "forebay.results.repeated",
    unit: "{message}",
    meaning: "Messages that lie twice on a topic whose messages are written once, as its writer found when it read back what \
              was written of late. A process was cut off beyond its session with them on their way.",
    ..LINE
};
pub(crate) const LEDGER_ENTRIES: Declared = Declared {
    name: "forebay.ledger.entries",
    unit: "{entry}",
    labels: &["stage", "operator", "kind"],
    meaning: "Entries that a ledger of paid calls acknowledged, by kind: started, done, failed, moved, renewed or \
              released.",
    ..LINE
};
pub(crate) const LEDGER_REPLAYED: Declared = Declared {
    name: "forebay.ledger.replayed",
    unit: "{call}",
    meaning: "Calls answered from the ledger: nothing was paid.",
    ..LINE
};
pub(crate) const LEDGER_AMBIGUOUS: Declared = Declared {
    name: "forebay.ledger.ambiguous",
    unit: "{call}",
    meaning: "Tries that were under way when their process vanished; they may have been paid for.",
    ..LINE
};
pub(crate) const LEDGER_WAIT: Declared = Declared {
    name: "forebay.ledger.wait",
    kind: Kind::Histogram(STEP_SECONDS),
    unit: "s",
    meaning: "How long a paid call waited for its ledger: for the lease, and after a takeover until the ledger is read and \
              whoever had it before is silent.",
    ..LINE
};
pub(crate) const DEAD_LETTERS: Declared = Declared {
    name: "forebay.step.dead_letters",
    unit: "{record}",
    labels: &["stage", "operator", "class"],
    meaning: "Records put aside as dead letters, by class of error.",
    ..LINE
};
pub(crate) const SET_ASIDE: Declared = Declared {
    name: "forebay.step.set_aside",
    unit: "{record}",
    labels: &["stage", "operator", "why"],
    meaning: "Records moved to a topic of the step's own: `retry`, to be tried again; `overflow`, beyond a tenant's share.",
    ..LINE
};
pub(crate) const CLAIMS_RECORDS: Declared = Declared {
    name: "forebay.step.claims.records",
    unit: "{record}",
    labels: &["stage", "operator", "way"],
    meaning: "Records whose body was `put` to the object store because it is too large for a topic, or `fetched` from there.",
    ..LINE
};
pub(crate) const CLAIMS_BYTES: Declared = Declared {
    name: "forebay.step.claims",
    unit: "By",
    labels: &["stage", "operator", "way"],
    meaning: "Bytes of these bodies.",
    ..LINE
};
pub(crate) const IN_FLIGHT: Declared = Declared {
    name: "forebay.step.in_flight.records",
    kind: Kind::Gauge,
    unit: "{record}",
    meaning: "Records being processed.",
    ..LINE
};
pub(crate) const BUFFERED_RECORDS: Declared = Declared {
    name: "forebay.step.buffered.records",
    kind: Kind::Gauge,
    unit: "{record}",
    meaning: "Records held in memory: read and not yet committed.",
    ..LINE
};
pub(crate) const BUFFERED_BYTES: Declared = Declared {
    name: "forebay.step.buffered",
    kind: Kind::Gauge,
    unit: "By",
    meaning: "Bytes of the records held in memory.",
    ..LINE
};
pub(crate) const ASSIGNED: Declared = Declared {
    name: "forebay.step.assigned.partitions",
    kind: Kind::Gauge,
    unit: "{partition}",
    meaning: "Partitions that this process reads.",
    ..LINE
};
pub(crate) const PAUSED: Declared = Declared {
    name: "forebay.step.paused.partitions",
    kind: Kind::Gauge,
    unit: "{partition}",
    meaning: "Assigned partitions that are not read at the moment, because a limit is reached or a retry waits.",
    ..LINE
};
pub(crate) const LAG: Declared = Declared {
    name: "forebay.step.lag",
    kind: Kind::Gauge,
    unit: "{record}",
    labels: STEP_PARTITION,
    series_max: SERIES_OF_PARTITIONS,
    meaning: "Records of an assigned partition that are not committed. A partition that is read elsewhere has no \
              series here, so that the sum over processes is right.",
    ..LINE
};
pub(crate) const COMMITTED: Declared = Declared {
    name: "forebay.step.committed_offset",
    kind: Kind::Gauge,
    unit: "{offset}",
    labels: STEP_PARTITION,
    series_max: SERIES_OF_PARTITIONS,
    meaning: "The offset from which an assigned partition would be read again.",
    ..LINE
};
pub(crate) const REBALANCES: Declared = Declared {
    name: "forebay.step.rebalances",
    unit: "{rebalance}",
    meaning: "Times that the consumer group gave or took partitions.",
    ..LINE
};
pub(crate) const WORK_QUEUED: Declared = Declared {
    name: "forebay.step.work_queued",
    kind: Kind::Gauge,
    unit: "s",
    meaning: "How long the records that this process has not finished would take it: their number, times the mean time \
              of one, over the places that it has. What to scale and to admit on.",
    ..LINE
};
pub(crate) const CACHE_LOOKUPS: Declared = Declared {
    name: "forebay.cache.lookups",
    unit: "{lookup}",
    labels: &["stage", "status"],
    meaning: "Questions to the cache of answers, by status: hit, miss or bypass.",
    ..LINE
};
pub(crate) const RETRIEVED: Declared = Declared {
    name: "forebay.retrieved.passages",
    kind: Kind::Histogram(PASSAGES),
    unit: "{passage}",
    labels: &["stage"],
    meaning: "Passages found for a question. The bucket 0 counts the questions for which nothing was found.",
    ..LINE
};
pub(crate) const EMBEDDED: Declared = Declared {
    name: "forebay.embedded.questions",
    unit: "{question}",
    labels: &["stage", "outcome"],
    meaning: "Questions that an embedder was to make a vector of, by outcome: `ok`, or the code of the error for which their passages \
              were sought by their words alone.",
    ..LINE
};
pub(crate) const RERANKED: Declared = Declared {
    name: "forebay.reranked.questions",
    unit: "{question}",
    labels: &["stage", "outcome"],
    meaning: "Questions whose passages a reranker was to score, by outcome: `ok`, or the code of the error for which they kept the \
              order in which they were found.",
    ..LINE
};
pub(crate) const JUDGEMENTS: Declared = Declared {
    name: "forebay.judgements",
    unit: "{answer}",
    labels: &["stage", "judgement"],
    meaning: "Answers judged, by judgement: pass, annotate or block.",
    ..LINE
};
pub(crate) const DELTAS_RECORDS: Declared = Declared {
    name: "forebay.deltas.records",
    unit: "{record}",
    labels: &["stage", "outcome"],
    meaning: "Pieces of answers for whoever reads along: `sent`, or `lost` because too many were on their way.",
    ..LINE
};
pub(crate) const DELTAS_BYTES: Declared = Declared {
    name: "forebay.deltas",
    unit: "By",
    labels: &["stage", "outcome"],
    meaning: "Bytes of these records.",
    ..LINE
};
pub(crate) const CALL_DURATION: Declared = Declared {
    name: "gen_ai.client.operation.duration",
    kind: Kind::Histogram(CALL_SECONDS),
    unit: "s",
    labels: CALL,
    sometimes: &["gen_ai.response.model", "error.type"],
    meaning: "How long a try of a call of a model took, from its sending to the end of its answer. One that failed has the label \
              error_type, a code of operators/README.md; one that was answered, gen_ai_response_model.",
    ..LINE
};
pub(crate) const TOKEN_USAGE: Declared = Declared {
    name: "gen_ai.client.token.usage",
    kind: Kind::Histogram(TOKENS),
    unit: "{token}",
    labels: &[
        "stage",
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "gen_ai.token.type",
    ],
    sometimes: &["gen_ai.response.model"],
    meaning: "Tokens of a call, by type: input or output.",
    ..LINE
};
pub(crate) const TTFT: Declared = Declared {
    name: "gen_ai.server.time_to_first_token",
    kind: Kind::Histogram(TTFT_SECONDS),
    unit: "s",
    labels: CALL,
    sometimes: &["gen_ai.response.model"],
    only: Some(GenAi::V1_41),
    meaning: "From the sending of a streamed call that was answered to its first token that is not empty, as the caller saw it.",
    ..LINE
};
pub(crate) const TPOT: Declared = Declared {
    name: "gen_ai.server.time_per_output_token",
    kind: Kind::Histogram(TPOT_SECONDS),
    unit: "s",
    labels: CALL,
    sometimes: &["gen_ai.response.model"],
    only: Some(GenAi::V1_41),
    meaning: "Time per output token after the first of a streamed call that was answered, as the caller saw it: from the first \
              token to the end, by the number of the others.",
    ..LINE
};
pub(crate) const TIME_TO_FIRST_CHUNK: Declared = Declared {
    name: "gen_ai.client.operation.time_to_first_chunk",
    kind: Kind::Histogram(CALL_SECONDS),
    unit: "s",
    labels: CALL,
    sometimes: &["gen_ai.response.model", "error.type"],
    only: Some(GenAi::Latest),
    meaning: "From the sending of a streamed call to the first piece of its answer that is not empty.",
    ..LINE
};
pub(crate) const TIME_PER_OUTPUT_CHUNK: Declared = Declared {
    name: "gen_ai.client.operation.time_per_output_chunk",
    kind: Kind::Histogram(CALL_SECONDS),
    unit: "s",
    labels: CALL,
    sometimes: &["gen_ai.response.model", "error.type"],
    only: Some(GenAi::Latest),
    meaning: "From each piece of a streamed answer to the next.",
    ..LINE
};
pub(crate) const CALL_BATCH: Declared = Declared {
    name: "forebay.call.batch.items",
    kind: Kind::Histogram(ITEMS),
    unit: "{item}",
    labels: CALL,
    meaning: "Texts that a try of a call brought for vectors (`embeddings`), or documents for scores (`rerank`). A try that several \
              calls share counts once, with the texts of all.",
    ..LINE
};
pub(crate) const CALL_WAIT: Declared = Declared {
    name: "forebay.call.wait",
    kind: Kind::Histogram(CALL_SECONDS),
    unit: "s",
    labels: &["stage", "for"],
    meaning: "How long a call waited, apart from its tries: for `room` at an endpoint, as breakers and throttles have it; for others, to \
              share a try for vectors (`batch`); for its next try (`retry`); for the `ledger` to write down each try, and how it \
              ended. A call that found room at once counts with 0.",
    ..LINE
};
pub(crate) const CALL_EXTENDED: Declared = Declared {
    name: "forebay.call.extended",
    unit: "{call}",
    labels: &["stage", "how"],
    meaning: "Times that more than the first try of a call was made: a `retry`, a `hedge` beside a slow try, a `fallback` to the next model; \
              and tries that lost to the other one (`hedge_lost`).",
    ..LINE
};
pub(crate) const CALL_OVERHEAD: Declared = Declared {
    name: "forebay.call.overhead",
    kind: Kind::Histogram(OVERHEAD_SECONDS),
    unit: "s",
    labels: &["stage"],
    meaning: "What Forebay's own layers took of a call: all of its time but its tries and its waits. The books of budgets count here.",
    ..LINE
};
pub(crate) const POOL_READY: Declared = Declared {
    name: "forebay.pool.ready",
    kind: Kind::Gauge,
    unit: "{endpoint}",
    labels: ENDPOINT,
    meaning: "Whether an endpoint gets calls: 0 where it starts cold and was not yet seen to answer.",
    ..LINE
};
pub(crate) const POOL_CALLS: Declared = Declared {
    name: "forebay.pool.calls",
    unit: "{call}",
    labels: &["endpoint", "name", "outcome"],
    meaning: "Calls of an endpoint that ended, by outcome: ok, failed, limited (it took no more of us, or no key was good), rejected \
              (the request was at fault), given_up (another try was faster, or nobody waited any more).",
    ..LINE
};
pub(crate) const POOL_IN_FLIGHT: Declared = Declared {
    name: "forebay.pool.in_flight.calls",
    kind: Kind::Gauge,
    unit: "{call}",
    labels: ENDPOINT,
    meaning: "Calls of ours that run at an endpoint.",
    ..LINE
};
pub(crate) const POOL_PLACES: Declared = Declared {
    name: "forebay.pool.places",
    kind: Kind::Gauge,
    unit: "{call}",
    labels: ENDPOINT,
    meaning: "The most calls that may run there, as configured.",
    ..LINE
};
pub(crate) const POOL_TOKENS: Declared = Declared {
    name: "forebay.pool.in_flight.tokens",
    kind: Kind::Gauge,
    unit: "{token}",
    labels: ENDPOINT,
    meaning: "Tokens that these calls may take.",
    ..LINE
};
pub(crate) const POOL_WAITING: Declared = Declared {
    name: "forebay.pool.engine.waiting",
    kind: Kind::Gauge,
    unit: "{request}",
    labels: ENDPOINT,
    meaning: "Requests that wait in an endpoint's engine, as it said within the last seconds.",
    ..LINE
};
pub(crate) const POOL_KV: Declared = Declared {
    name: "forebay.pool.engine.kv_used",
    kind: Kind::Gauge,
    unit: "1",
    labels: ENDPOINT,
    meaning: "The part of its KV cache that is in use, from 0 to 1, as it said within the last seconds.",
    ..LINE
};
pub(crate) const POOL_BREAKER: Declared = Declared {
    name: "forebay.pool.breaker",
    kind: Kind::Gauge,
    unit: "{state}",
    labels: &["endpoint", "name", "model", "state"],
    meaning: "1 for the state that a model's breaker at an endpoint is in: closed, ramp, open or half_open; 0 for the others.",
    ..LINE
};
pub(crate) const POOL_SHARE: Declared = Declared {
    name: "forebay.pool.share",
    kind: Kind::Gauge,
    unit: "1",
    labels: ENDPOINT_MODEL,
    meaning: "The part of its calls that a model at an endpoint gets, from 0 to 1: less while it comes back.",
    ..LINE
};
pub(crate) const POOL_LIMIT: Declared = Declared {
    name: "forebay.pool.limit",
    kind: Kind::Gauge,
    unit: "{call}",
    labels: ENDPOINT_MODEL,
    meaning: "Calls at once that a model at an endpoint was seen to bear.",
    ..LINE
};
pub(crate) const TABLE_ROWS: Declared = Declared {
    name: "forebay.table.rows",
    unit: "{row}",
    labels: TABLE,
    meaning: "Messages of a table's topic whose rows are in the table by a commit of this process.",
    ..LINE
};
pub(crate) const TABLE_BYTES: Declared = Declared {
    name: "forebay.table.written",
    unit: "By",
    labels: TABLE,
    meaning: "Bytes of the Parquet files that were written for a table.",
    ..LINE
};
pub(crate) const TABLE_FILES: Declared =
    Declared { name: "forebay.table.files", unit: "{file}", labels: TABLE, meaning: "These files.", ..LINE };
pub(crate) const TABLE_VERSIONS: Declared = Declared {
    name: "forebay.table.commits",
    unit: "{commit}",
    labels: TABLE,
    meaning: "Versions of a table that this process made.",
    ..LINE
};
pub(crate) const TABLE_CONFLICTS: Declared = Declared {
    name: "forebay.table.conflicts",
    unit: "{commit}",
    labels: TABLE,
    meaning: "Commits that had to look again, because another writer was first or the store did not answer.",
    ..LINE
};
pub(crate) const TABLE_REPEATED: Declared = Declared {
    name: "forebay.table.repeated.rows",
    unit: "{row}",
    labels: TABLE,
    meaning: "Messages that were read once more and dropped, since their rows were in the table.",
    ..LINE
};
pub(crate) const TABLE_REJECTED: Declared = Declared {
    name: "forebay.table.rejected.rows",
    unit: "{row}",
    labels: TABLE,
    meaning: "Messages that are no row of the table; each is among the dead letters.",
    ..LINE
};
pub(crate) const TABLE_LOST: Declared = Declared {
    name: "forebay.table.lost.rows",
    unit: "{row}",
    labels: TABLE,
    meaning: "Messages that their topic forgot before they came into the table. Anything but 0 is a loss.",
    ..LINE
};
pub(crate) const TABLE_FRESHNESS: Declared = Declared {
    name: "forebay.table.freshness",
    kind: Kind::Histogram(FRESH_SECONDS),
    unit: "s",
    labels: TABLE,
    meaning: "From the writing of a message to the commit of its row, for the oldest row of each commit.",
    ..LINE
};

pub(crate) const ALERTS: Declared = Declared {
    name: "forebay.alerts",
    unit: "{alert}",
    labels: &["kind", "state"],
    meaning: "Alerts that this process wrote to their topic, by kind (rate, ewma, forecast or cap) and state (firing or resolved).",
    ..LINE
};
pub(crate) const ALERTS_LOST: Declared = Declared {
    name: "forebay.alerts.lost",
    unit: "{alert}",
    labels: &["why"],
    meaning: "Alerts that did not come where they should: `topic`, too many waited for their topic; `webhook`, it did not take them; \
              `late`, they were older than a day when the webhook could have them. Beside them `counters`, minutes in which the \
              counters of budgets could not be read.",
    ..LINE
};

/// The table.
pub(crate) const DECLARED: &[Declared] = &[
    RECEIVED_RECORDS,
    RECEIVED_BYTES,
    EMITTED_RECORDS,
    EMITTED_BYTES,
    FINISHED,
    DURATION,
    QUEUE_WAIT,
    RETRIES,
    DEDUPLICATED,
    REPEATED,
    LEDGER_ENTRIES,
    LEDGER_REPLAYED,
    LEDGER_AMBIGUOUS,
    LEDGER_WAIT,
    DEAD_LETTERS,
    SET_ASIDE,
    CLAIMS_RECORDS,
    CLAIMS_BYTES,
    IN_FLIGHT,
    BUFFERED_RECORDS,
    BUFFERED_BYTES,
    ASSIGNED,
    PAUSED,
    LAG,
    COMMITTED,
    REBALANCES,
    WORK_QUEUED,
    CACHE_LOOKUPS,
    RETRIEVED,
    EMBEDDED,
    RERANKED,
    JUDGEMENTS,
    DELTAS_RECORDS,
    DELTAS_BYTES,
    CALL_DURATION,
    TOKEN_USAGE,
    TTFT,
    TPOT,
    TIME_TO_FIRST_CHUNK,
    TIME_PER_OUTPUT_CHUNK,
    CALL_BATCH,
    CALL_WAIT,
    CALL_EXTENDED,
    CALL_OVERHEAD,
    POOL_READY,
    POOL_CALLS,
    POOL_IN_FLIGHT,
    POOL_PLACES,
    POOL_TOKENS,
    POOL_WAITING,
    POOL_KV,
    POOL_BREAKER,
    POOL_SHARE,
    POOL_LIMIT,
    TABLE_ROWS,
    TABLE_BYTES,
    TABLE_FILES,
    TABLE_VERSIONS,
    TABLE_CONFLICTS,
    TABLE_REPEATED,
    TABLE_REJECTED,
    TABLE_LOST,
    TABLE_FRESHNESS,
    ALERTS,
    ALERTS_LOST,
];

impl Declared {
    pub(crate) fn counter(&self, meter: &Meter) -> Counter<u64> {
        meter.u64_counter(self.name).with_unit(self.unit).with_description(self.meaning).build()
    }

    pub(crate) fn gauge_u64(&self, meter: &Meter) -> Gauge<u64> {
        meter.u64_gauge(self.name).with_unit(self.unit).with_description(self.meaning).build()
    }

    pub(crate) fn gauge_f64(&self, meter: &Meter) -> Gauge<f64> {
        meter.f64_gauge(self.name).with_unit(self.unit).with_description(self.meaning).build()
    }

    pub(crate) fn histogram_u64(&self, meter: &Meter) -> Histogram<u64> {
        let builder = meter.u64_histogram(self.name).with_unit(self.unit).with_description(self.meaning);
        builder.with_boundaries(self.bounds().to_vec()).build()
    }

    pub(crate) fn histogram_f64(&self, meter: &Meter) -> Histogram<f64> {
        let builder = meter.f64_histogram(self.name).with_unit(self.unit).with_description(self.meaning);
        builder.with_boundaries(self.bounds().to_vec()).build()
    }

    fn bounds(&self) -> &'static [f64] {
        match self.kind {
            Kind::Histogram(bounds) => bounds,
            Kind::Counter | Kind::Gauge => &[],
        }
    }
}
