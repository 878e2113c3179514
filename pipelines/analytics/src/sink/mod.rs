//! Moves rows from their topics into their tables, each exactly once.
//!
//! One loop reads all topics as a member of one consumer group and gathers what comes for each table; [`flush`] brings it in,
//! when it is old enough or too much. The group says who reads what, and nothing else is believed of it.
//!
//! Invariant: where a partition is read from is what its table says. A committed offset of the group is for people who look at lag.

mod anew;
pub(crate) mod delta;
pub mod flush;
mod lane;

use crate::{
    compact::{self, Compacted},
    kafka_table::{patiently, ranges},
    lake, rollup,
    settings::{Settings, SettingsError},
    table::Table,
};
use delta::{DeltaLog, Letters};
use deltalake_core::DeltaTable;
use forebay_runtime::{
    budget::Budget,
    crash::crash_point,
    drive::{Event, Progress, Source as _},
    host::kafka::{
        Kafka, KafkaSink, KafkaSource, ReadBounds, Reading, SettingsError as KafkaError, TopicIds,
        TopicIdsError, UnreachableError,
        topics::{TopicsError, existing},
    },
    message::{Channel, Group, Incoming, Input, Partition},
};
use forebay_schemas::topics;
use forebay_telemetry::{Health, StartError, Telemetry, admin};
use futures::future::join_all;
use lane::{Gap, Lane};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, task::JoinHandle, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use url::Url;

/// How often the loop looks what is due; also how often its life is told.
const TICK: Duration = Duration::from_millis(100);
/// Records that may wait between the reading thread and the loop, and what they are estimated to take.
const READ: ReadBounds = ReadBounds { records: 32_768, bytes: 96 << 20 };
/// The estimates of all that is read and not gathered yet.
const READ_BYTES_MAX: usize = 256 << 20;
/// How long leaving may take: with what follows, shorter than what init systems allow before they kill.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// How long partitions that are to be given up may be written before: others wait for them.
const LAST_FLUSH_MAX: Duration = Duration::from_secs(8);
/// How long to wait for the cluster.
const KAFKA_WAIT: Duration = Duration::from_secs(10);
/// How long to wait until looking where a table ends is tried again.
const FIND_AGAIN: Duration = Duration::from_secs(1);
/// How often it is asked whether topics were made anew, where nothing is written meanwhile.
const ASK_EVERY: Duration = Duration::from_secs(30);
/// How often files are swept that no version names: all files of the table are listed for it.
const SWEEP_EVERY: Duration = Duration::from_secs(24 * 3_600);
/// In so many rounds a sink that leaves by itself looks after a table at most: more than the days that any is kept need.
const LAST_ROUNDS_MAX: usize = 100;
/// With `--once`: in so many ticks that bring nothing a topic is silent before its end, and what others of the group keep is theirs.
/// Counted in ticks that were waited, and not in time: while the sink itself is slow, it hears nothing.
const SILENT_TICKS_MAX: u32 = 100;
/// The same while nothing is ours: a group waits for a member that was killed, and there need be nobody else who writes.
const ALONE_TICKS_MAX: u32 = 600;

/// Why the sink could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What it was told makes no sense.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// There is no Kafka.
    #[error(
        "the sink needs a Kafka: start `forebay up` on the same data folder, or name yours by --bootstrap-servers"
    )]
    NoKafka,
    /// How Kafka is to be spoken to makes no sense.
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    /// Nobody answers.
    #[error(transparent)]
    Unreachable(#[from] UnreachableError),
    /// The cluster does not say what it has.
    #[error(transparent)]
    Topics(#[from] TopicsError),
    /// The cluster does not say the ids of topics.
    #[error(transparent)]
    TopicIds(#[from] TopicIdsError),
    /// A table could not be opened.
    #[error(transparent)]
    Lake(#[from] lake::Error),
    /// A table could not be prepared, read or written.
    #[error(transparent)]
    Log(#[from] delta::Error),
    /// Nothing could be told of it.
    #[error(transparent)]
    Telemetry(#[from] StartError),
    /// The admin port could not be had.
    #[error(
        "could not serve metrics and health on {address}; choose another address by --admin, 127.0.0.1:0 for a free port"
    )]
    Admin {
        /// The address.
        address: String,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// Work of ours was cut off.
    #[error("asking Kafka was cut off")]
    CutOff(#[from] tokio::task::JoinError),
    /// The ends of topics could not be read.
    #[error("could not read where topic {topic} ends")]
    Ends {
        /// The topic.
        topic: String,
        /// What happened.
        #[source]
        source: rdkafka::error::KafkaError,
    },
    /// With `--once`: what the topics hold is perhaps nobody's to write.
    #[error(
        "group {group} gave this sink no partitions for {} s, so it cannot write; one that was killed keeps its own until its session is over: run it again then, and see who else is a member of the group",
        (TICK * ALONE_TICKS_MAX).as_secs()
    )]
    NoPartitions {
        /// The group.
        group: String,
    },
    /// A topic that was made anew could not be compared with what was read before.
    #[error(
        "could not read partition {partition} of topic {topic}, which was made anew, to tell its messages from those before"
    )]
    Compare {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// What happened.
        #[source]
        source: rdkafka::error::KafkaError,
    },
    /// The consumer died.
    #[error("the sink cannot read on: {0}; start it again, it goes on where its tables end")]
    Source(String),
}

/// The name under which a table keeps how far it is in a partition of its topic: the offset of the last row that it has. Topics have
/// ids, so that one which was made anew is another.
pub fn application(cluster: &str, topic_id: &str, partition: i32) -> String {
    format!("{cluster}/{topic_id}/{partition}")
}

/// When a sink leaves by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// Never.
    Never,
    /// As soon as all is written that the topics hold now.
    Written,
    /// Then, and when all is done that the files of tables need by now.
    Kept,
}

/// Runs the sink until `shutdown`, or until it leaves by itself.
pub async fn run(settings: Settings, leaves: Leaves, shutdown: CancellationToken) -> Result<(), Error> {
    let health = Health::new();
    let telemetry = telemetry(&settings)?;
    let address = settings.admin.clone().unwrap_or_else(|| "127.0.0.1:0".to_owned());
    let listener = TcpListener::bind(&address).await;
    let listener = listener.map_err(|source| Error::Admin { address: address.clone(), source })?;
    let admin = listener.local_addr().map_or(address, |address| address.to_string());
    let gone = CancellationToken::new();
    let no_pool = Arc::new(|| "[]".to_owned());
    let served =
        admin::serve(listener, telemetry.clone(), health.clone(), no_pool, gone.clone().cancelled_owned());
    let serving = tokio::spawn(served);
    let started = tokio::select! {
        started = Sink::start(&settings, &telemetry, &health, &shutdown, leaves) => started.map(Some),
        // What is not read yet need not be written.
        () = shutdown.cancelled() => Ok(None),
    };
    let done = match started {
        Ok(Some(sink)) => {
            info!(%admin, tables = %sink.place.0, topics = ?sink.lanes.keys().collect::<Vec<_>>(), "the sink is up");
            sink.work(leaves).await
        }
        Ok(None) => {
            info!("the sink leaves before it was up, as it was told to");
            Ok(())
        }
        Err(fault) => Err(fault),
    };
    telemetry.shutdown().await;
    gone.cancel();
    // It ends when its connections do, or a second later.
    let _ = serving.await;
    done
}

fn telemetry(settings: &Settings) -> Result<Telemetry, StartError> {
    let mut told = forebay_telemetry::Settings::new("forebay.sink", env!("CARGO_PKG_VERSION"));
    told.otlp_endpoint = settings.otlp_endpoint.clone();
    Telemetry::start(told)
}

/// The one place here that reads the clock: milliseconds since 1970.
fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// Looks after a table once; whether that did anything, so that more may be left to do.
async fn look_after(
    kind: Table,
    table: &mut DeltaTable,
    (root, options): &(Url, lake::Options),
    sweeps: bool,
) -> bool {
    // Before days are forgotten.
    let rolled = rollup::keep(kind, (root, options), sweeps, now_ms()).await.unwrap_or_else(|fault| {
        let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
        warn!(table = kind.name(), error = %fault, cause, "could not roll up days of a table");
        0
    });
    let kept = keep(kind, table, sweeps).await.unwrap_or_else(|fault| {
        let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
        warn!(table = kind.name(), error = %fault, cause, "could not look after the files of a table");
        Compacted::default()
    });
    rolled > 0 || kept != Compacted::default()
}

async fn keep(kind: Table, table: &mut DeltaTable, sweeps: bool) -> Result<Compacted, compact::Error> {
    let mut done = compact::keep(kind, table, now_ms()).await?;
    if sweeps {
        done.swept = compact::sweep(kind, table).await?;
    }
    if done == Compacted::default() {
        debug!(table = kind.name(), "nothing to look after");
    } else {
        info!(
            table = kind.name(),
            joined = done.joined,
            into = done.into,
            forgotten = done.forgotten,
            swept = done.swept,
            "looked after the files of a table"
        );
    }
    Ok(done)
}

struct Sink {
    kafka: Kafka,
    /// Kept: an admin client takes a tenth of a second to end, and each flush asks.
    topic_ids: Arc<TopicIds>,
    cluster: Arc<str>,
    source: KafkaSource,
    lanes: BTreeMap<Arc<str>, Lane>,
    group: String,
    /// Where the topics ended at the start, for one that leaves there.
    ends: Option<Ends>,
    /// After how many silent ticks Kafka was heard to be there though nothing came.
    heard_at: Option<u32>,
    /// Where the tables lie, and what their store is told.
    place: (Url, lake::Options),
    flush_every: Duration,
    flush_bytes: usize,
    /// What was read beyond the bound: the reading thread rests until it is told that this has gone on.
    owed: Vec<(Channel, usize)>,
    /// When looking where tables end is tried again.
    find_at: Instant,
    /// When it is asked at the latest whether topics were made anew; and, where nobody answered, when that is tried again.
    ask_at: Instant,
    ask_again_at: Instant,
    /// Given when the process is to leave, and when it must be gone.
    shutdown: CancellationToken,
    hurry: CancellationToken,
    /// Looks after files, beside the loop.
    keeping: Option<JoinHandle<()>>,
    keep_every: Duration,
    /// When that is done next; not by itself when absent.
    keep_at: Option<Instant>,
    sweep_at: Instant,
    health: Health,
}

/// Where the topics end, for a sink that leaves there: topic and partition → its first offset and its end.
type Ends = BTreeMap<(Arc<str>, i32), (i64, i64)>;

impl Sink {
    async fn start(
        settings: &Settings,
        telemetry: &Telemetry,
        health: &Health,
        shutdown: &CancellationToken,
        leaves: Leaves,
    ) -> Result<Self, Error> {
        let kafka = Kafka::new(&settings.kafka().ok_or(Error::NoKafka)?)?;
        let asked = kafka.clone();
        let (cluster, there) = tokio::task::spawn_blocking(move || {
            Ok::<_, Error>((asked.cluster_id(KAFKA_WAIT)?, existing(&asked, KAFKA_WAIT)?))
        })
        .await??;
        let cluster: Arc<str> = cluster.into();
        let root = settings.tables_url()?;
        let options = settings.tables_options.clone().into_iter().collect();
        let letters = Letters {
            sink: Arc::new(KafkaSink::new(&kafka, CancellationToken::new())?),
            topic: settings.topic(topics::DEAD_LETTERS.name).into(),
            cluster: Arc::clone(&cluster),
        };
        let mut lanes = BTreeMap::new();
        for table in Table::ALL {
            let topic: Arc<str> = settings.topic(table.topic()).into();
            if !there.contains_key(&*topic) {
                warn!(topic = %topic, table = table.name(), "a topic is missing, and its table stays as it is; make it by `forebay topics apply`");
            }
            let opened = lake::open(&root, &options, *table).await?;
            let registry = kafka.registry().cloned();
            let log = DeltaLog::new(*table, opened, Arc::clone(&topic), letters.clone(), registry, now_ms)?;
            lanes.insert(topic, Lane::new(log, telemetry.table(table.name())));
        }
        // Before it joins: a member that is still busy with this would be given partitions.
        let ends = if leaves == Leaves::Never { None } else { Some(ends(&kafka, lanes.keys()).await?) };
        let inputs = lanes.keys().map(|topic| Input::live(Arc::clone(topic))).collect();
        let reading = Reading {
            bounds: READ,
            budget: Budget::new(READ_BYTES_MAX),
            meter: telemetry.step("sink", "sink"),
            health: health.clone(),
            once: None,
        };
        let group = settings.group.clone().unwrap_or_else(|| settings.topic("sink"));
        let source = KafkaSource::join(&kafka, &[Group { name: group.clone(), inputs }], reading)?;
        Ok(Self {
            topic_ids: Arc::new(TopicIds::new(&kafka)?),
            kafka,
            cluster,
            source,
            lanes,
            group,
            ends,
            heard_at: None,
            place: (root, options),
            flush_every: settings.flush_every(),
            flush_bytes: settings.flush_bytes,
            owed: Vec::new(),
            find_at: Instant::now(),
            ask_at: Instant::now() + ASK_EVERY,
            ask_again_at: Instant::now(),
            shutdown: shutdown.clone(),
            hurry: CancellationToken::new(),
            keeping: None,
            keep_every: settings.compact_every(),
            keep_at: Some(Instant::now() + settings.compact_every()),
            sweep_at: Instant::now() + SWEEP_EVERY,
            health: health.clone(),
        })
    }

    /// Runs until it leaves, and no longer than it may once it is told to.
    async fn work(mut self, leaves: Leaves) -> Result<(), Error> {
        let (told, hurry) = (self.shutdown.clone(), self.hurry.clone());
        let hurrying = tokio::spawn(async move {
            told.cancelled().await;
            tokio::time::sleep(DRAIN_MAX).await;
            hurry.cancel();
        });
        let done = self.run(leaves).await;
        hurrying.abort();
        // It may be cut off anywhere, as by a crash.
        if let Some(keeping) = self.keeping.take() {
            keeping.abort();
        }
        done
    }

    async fn run(&mut self, leaves: Leaves) -> Result<(), Error> {
        let (shutdown, hurry, ends) = (self.shutdown.clone(), self.hurry.clone(), self.ends.take());
        if leaves == Leaves::Written {
            self.keep_at = None;
        }
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent_ticks = 0;
        let (mut is_kept, mut is_leaving) = (false, false);
        loop {
            tokio::select! {
                event = self.source.next() => {
                    if self.follow(event).await? {
                        return Ok(());
                    }
                    silent_ticks = 0;
                }
                _ = ticks.tick() => {
                    self.look().await;
                    // Where it would not take what came, nothing comes.
                    silent_ticks += u32::from(!self.is_full() && self.lanes.values().all(Lane::is_set));
                }
                () = shutdown.cancelled(), if !is_leaving => {
                    info!("the sink writes what waits, and leaves");
                    self.health.stopping();
                    self.source.close();
                    is_leaving = true;
                }
                () = hurry.cancelled() => {
                    warn!("the sink leaves before all is written and the group has answered; what waits is read again");
                    return Ok(());
                }
            }
            let is_idle = !is_leaving && !self.is_keeping();
            if let (Some(ends), true) = (&ends, is_idle)
                && (is_kept || self.has_reached(ends, silent_ticks).await?)
            {
                if leaves == Leaves::Kept && !is_kept {
                    self.keep_all();
                    is_kept = true;
                    continue;
                }
                self.source.close();
                is_leaving = true;
            }
        }
    }

    /// Follows an event; true where nothing more will come.
    async fn follow(&mut self, event: Event) -> Result<bool, Error> {
        match event {
            Event::Assigned(partitions) => {
                for (topic, lane) in &mut self.lanes {
                    lane.take_on(partitions.iter().filter(|one| one.topic == *topic).map(|one| one.number));
                }
                info!(partitions = partitions.len(), "partitions came");
                self.find_at = Instant::now();
                self.find().await;
            }
            Event::Revoked { partitions, lost } => {
                // Lost ones may be another's already; the tables would not take a row twice, but time is short.
                if !lost
                    && tokio::time::timeout(LAST_FLUSH_MAX, self.flush(|lane| !lane.is_empty()))
                        .await
                        .is_err()
                {
                    warn!(
                        "what waits could not be written in time; who reads its partitions next reads it again"
                    );
                }
                for Partition { topic, number } in partitions {
                    if let Some(lane) = self.lanes.get_mut(&topic) {
                        lane.give_up(number);
                    }
                }
                self.settle();
                self.source.release();
            }
            Event::Records(records) => self.take(records).await,
            Event::Rewound(Partition { topic, number }) => {
                if let Some(lane) = self.lanes.get_mut(&topic) {
                    lane.found(number);
                }
            }
            Event::Ended => return Ok(true),
            Event::Failed(reason) => return Err(Error::Source(reason)),
        }
        Ok(false)
    }

    async fn take(&mut self, records: Vec<Incoming>) {
        for incoming in records {
            let bytes = Incoming::bytes(incoming.key.as_deref(), incoming.value.as_deref());
            self.owed.push((incoming.channel, bytes));
            let topic = Arc::clone(&incoming.partition.topic);
            let gap = self.lanes.get_mut(&topic).and_then(|lane| lane.take(incoming));
            if let Some(gap) = gap {
                self.tell_gap(&topic, gap).await;
            }
        }
        if self.is_full() {
            let now = Instant::now();
            self.flush(|lane| lane.may_flush(now)).await;
        }
        self.settle();
    }

    fn is_full(&self) -> bool {
        self.lanes.values().map(Lane::bytes).sum::<usize>() >= self.flush_bytes
    }

    /// Lets the reading thread go on, unless as much waits as may: then it stops by its own bounds.
    fn settle(&mut self) {
        if !self.is_full() {
            for (channel, bytes) in self.owed.drain(..) {
                self.source.dispatched(channel, bytes);
            }
        }
    }

    /// What is due, and what could not be done before.
    async fn look(&mut self) {
        self.source.commit();
        let went_back = self.lanes.values_mut().fold(false, |any, lane| lane.went_back() | any);
        if went_back || Instant::now() >= self.ask_at {
            // With nothing to write, for what it asks first.
            self.write(|_| false).await;
        }
        self.find().await;
        let (now, wait_max, is_full) = (Instant::now(), self.flush_every, self.is_full());
        self.flush(|lane| lane.is_due(wait_max, now) || is_full && lane.may_flush(now)).await;
        self.settle();
        self.keep();
    }

    /// Has the files of tables looked after where that is due.
    fn keep(&mut self) {
        let now = Instant::now();
        if self.keep_at.is_none_or(|at| now < at) || self.is_keeping() {
            return;
        }
        self.keep_at = Some(now + self.keep_every);
        let sweeps = now >= self.sweep_at;
        if sweeps {
            self.sweep_at = now + SWEEP_EVERY;
        }
        self.keep_in(1, sweeps);
    }

    /// Has all done that files need by now, before the sink leaves. Swept as well: a sink that is run each night is never there for a day.
    fn keep_all(&mut self) {
        self.keep_at = None;
        self.keep_in(LAST_ROUNDS_MAX, true);
    }

    /// Has files looked after beside the loop, one table after the other, each for so many rounds at most.
    fn keep_in(&mut self, rounds_max: usize, sweeps: bool) {
        let tables: Vec<_> = self.lanes.values().filter_map(Lane::kept_here).collect();
        let place = self.place.clone();
        self.keeping = Some(tokio::spawn(async move {
            for (kind, mut table) in tables {
                for round in 0..rounds_max {
                    if !look_after(kind, &mut table, &place, sweeps && round == 0).await {
                        break;
                    }
                }
            }
        }));
    }

    fn is_keeping(&self) -> bool {
        self.keeping.as_ref().is_some_and(|keeping| !keeping.is_finished())
    }

    /// Sets partitions to where their tables end.
    async fn find(&mut self) {
        if Instant::now() < self.find_at || !self.lanes.values().any(Lane::has_unknown) {
            return;
        }
        if let Err(fault) = self.try_find().await {
            let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
            error!(error = %fault, cause, "could not look where the tables end; will try again");
            self.health.set_ready("tables", Err("could not look where the tables end"));
        } else {
            self.health.set_ready("tables", true);
        }
        // What is not known yet: all where nobody answered, or a topic that is gone.
        self.find_at = Instant::now() + FIND_AGAIN;
    }

    async fn try_find(&mut self) -> Result<(), Error> {
        // Asked anew each time: a topic that was made anew has another id, and begins anew.
        let ids = anew::ids(&self.topic_ids, self.lanes.keys()).await?;
        let cluster = Arc::clone(&self.cluster);
        for (topic, lane) in self.lanes.iter_mut().filter(|(_, lane)| lane.has_unknown()) {
            let Some(id) = ids.get(&**topic) else { continue };
            for (number, next) in lane.find(|partition| application(&cluster, id, partition)).await? {
                self.source.rewind(&Partition { topic: Arc::clone(topic), number }, next);
            }
        }
        Ok(())
    }

    /// Writes what waits for some tables, where anything does.
    async fn flush(&mut self, which: impl Fn(&Lane) -> bool) {
        if self.lanes.values().any(&which) {
            self.write(which).await;
        }
    }

    /// Asks whether the topics are those that were read, and writes what waits for some tables, side by side; meanwhile the group is told
    /// that we live.
    async fn write(&mut self, which: impl Fn(&Lane) -> bool) {
        if Instant::now() < self.ask_again_at {
            return;
        }
        self.ask_at = Instant::now() + ASK_EVERY;
        let (kafka, asked, cluster, lanes) = (&self.kafka, &self.topic_ids, &self.cluster, &mut self.lanes);
        let flushing = async {
            anew::renew(kafka, asked, cluster, lanes).await?;
            let due = lanes.iter_mut().filter(|(_, lane)| which(lane));
            let due = due.map(|(topic, lane)| async { (Arc::clone(topic), lane.flush(now_ms).await) });
            Ok::<_, Error>(join_all(due).await)
        };
        tokio::pin!(flushing);
        let hurry = self.hurry.clone();
        let mut ticks = tokio::time::interval(TICK);
        let flushed = loop {
            tokio::select! {
                flushed = &mut flushing => break flushed,
                _ = ticks.tick() => self.source.commit(),
                // The store does not answer, and the time to leave is over.
                () = hurry.cancelled() => break Ok(Vec::new()),
            }
        };
        let flushed = flushed.unwrap_or_else(|fault| {
            let cause = std::error::Error::source(&fault).map(ToString::to_string).unwrap_or_default();
            error!(error = %fault, cause, "could not ask which topics these are; what waits for its tables is kept and tried again");
            self.ask_again_at = Instant::now() + FIND_AGAIN;
            Vec::new()
        });
        for (topic, ends) in flushed {
            let progress = |(number, offset): (i32, i64)| Progress {
                partition: Partition { topic: Arc::clone(&topic), number },
                offset,
                metadata: String::new(),
            };
            let progress: Vec<_> = ends.into_iter().map(progress).collect();
            self.source.store(&progress);
            crash_point("sink.stored");
        }
    }

    /// Messages are missing where a partition begins: forgotten by its topic, or never there.
    async fn tell_gap(&self, topic: &Arc<str>, gap: Gap) {
        let ranges = patiently(&self.kafka, topic, ranges).await.ok().and_then(Result::ok);
        let found = ranges.iter().flatten().find(|range| range.partition == gap.partition);
        // Not known: said as the worst that it may be.
        let low = found.map_or(gap.found, |range| range.from);
        if low > gap.expected {
            let lost = low.min(gap.found) - gap.expected;
            error!(topic = %topic, partition = gap.partition, table_ends = gap.expected, topic_begins = low, lost,
                "messages were deleted before they came into their table; raise retention.ms of the topic, or run the sink more often");
            if let Some(lane) = self.lanes.get(topic) {
                lane.lost(u64::try_from(lost).unwrap_or_default());
            }
        }
    }

    /// Whether all is written that was there at the start, as far as it is ours to write.
    async fn has_reached(&mut self, ends: &Ends, silent_ticks: u32) -> Result<bool, Error> {
        let owned: usize = self.lanes.values().map(|lane| lane.partitions().count()).sum();
        let is_alone = owned == 0 && !ends.is_empty();
        let is_silent = silent_ticks >= if is_alone { ALONE_TICKS_MAX } else { SILENT_TICKS_MAX };
        if !is_silent {
            self.heard_at = None;
        }
        if is_alone && is_silent {
            // Where Kafka is away no group gives anything, and that is what is told.
            self::ends(&self.kafka, topics_of(ends).into_iter()).await?;
            return Err(Error::NoPartitions { group: self.group.clone() });
        }
        // Others of the group may have the rest, but not while it is still being shared out.
        if owned < ends.len() && !is_silent {
            return Ok(false);
        }
        let behind = ends.iter().filter(|((topic, partition), (low, end))| {
            self.lanes.get(topic).is_some_and(|lane| !lane.has_read(*partition, *low, *end))
        });
        let behind = behind.count();
        if behind > 0 && !(is_silent && self.is_there(ends, silent_ticks).await?) {
            return Ok(false);
        }
        // Nothing more is to come: no need to wait until what is here is old. What fails is tried again with the next look.
        let now = Instant::now();
        self.flush(|lane| lane.may_flush(now)).await;
        if !self.lanes.values().all(Lane::is_empty) {
            return Ok(false);
        }
        if behind > 0 {
            warn!(
                partitions = behind,
                "nothing came before the end of these partitions for long; leaving without"
            );
        }
        if owned < ends.len() {
            warn!(
                partitions = ends.len() - owned,
                "others of the group read these partitions; leaving them to those"
            );
        }
        Ok(true)
    }

    /// Whether nothing has come for as long as a topic may be silent since Kafka was heard to be there: what is away is silent too.
    async fn is_there(&mut self, ends: &Ends, silent_ticks: u32) -> Result<bool, Error> {
        if let Some(heard_at) = self.heard_at {
            return Ok(silent_ticks >= heard_at.saturating_add(SILENT_TICKS_MAX));
        }
        match self::ends(&self.kafka, topics_of(ends).into_iter()).await {
            Ok(_) => self.heard_at = Some(silent_ticks),
            Err(fault) if silent_ticks >= ALONE_TICKS_MAX => return Err(fault),
            Err(fault) => {
                warn!(error = %fault, "Kafka is silent before the end of what is to be written; waiting for it");
            }
        }
        Ok(false)
    }
}

fn topics_of(ends: &Ends) -> BTreeSet<&Arc<str>> {
    ends.keys().map(|(topic, _)| topic).collect()
}

/// Where the topics end now.
async fn ends(kafka: &Kafka, topics: impl Iterator<Item = &Arc<str>>) -> Result<Ends, Error> {
    let mut ends = Ends::new();
    for topic in topics {
        let ranges = patiently(kafka, topic, ranges).await?;
        let ranges = ranges.map_err(|source| Error::Ends { topic: topic.to_string(), source })?;
        ends.extend(
            ranges.iter().map(|range| ((Arc::clone(topic), range.partition), (range.from, range.to))),
        );
    }
    Ok(ends)
}
