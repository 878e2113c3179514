//! All stages of a process, over Kafka: started in order, drained together.
//!
//! Tables first: a stage reads its first record only when every table that it looks things up in has caught up, or
//! the first request after a start would find nothing.

use crate::{
    budget::Budget,
    cancels::{Cancels, CancelsTable},
    claims::Claims,
    drive::{DriveError, drive},
    host::kafka::{
        Kafka, KafkaAhead, KafkaLedger, KafkaSink, KafkaSource, ReadBounds, Reading, RegistryError,
        SettingsError, TableError, TableReader,
    },
    message::Outgoing,
    site::{Kept, Site, full_name},
    stage::Patience,
};
use forebay_operator::{Clock, Event, Host, Step, Table};
use forebay_plan::{Plan, PlannedStep};
use forebay_schemas::{Delta, Headers, Record, topics};
use forebay_telemetry::{Health, Telemetry};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{runtime::Handle, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long stages may take to end: the drain, and a second to leave their groups.
const SHUTDOWN_MAX: Duration = Duration::from_secs(11);

/// How long what is still on its way may take then. With what a process gives its stuck threads this makes the 12 s in which it
/// ends.
const FLUSH_MAX: Duration = Duration::from_millis(400);

/// What a process runs.
pub struct Launch<'a> {
    /// The cluster.
    pub kafka: &'a Kafka,
    /// Its id.
    pub cluster: Arc<str>,
    /// Goes before every topic and group.
    pub prefix: &'a str,
    /// The pipeline.
    pub plan: &'a Plan,
    /// The steps of it that run here, with their operators.
    pub steps: Vec<(&'a PlannedStep, Arc<dyn Step>)>,
    /// Topics without prefix, with the tables that follow them.
    pub tables: Vec<(String, Arc<dyn Table>)>,
    /// Whether what a step asks costs something here.
    pub is_paid: &'a (dyn Fn(&PlannedStep) -> bool + Sync),
    /// Where bodies lie that are too large to travel.
    pub claims: Arc<Claims>,
    /// Bytes of records that may be unfinished at a time.
    pub memory_bytes_max: usize,
    /// What is counted.
    pub telemetry: &'a Telemetry,
    /// Who is well.
    pub health: &'a Health,
    /// What time it is.
    pub clock: Clock,
}

/// Why a process did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No client.
    #[error(transparent)]
    Client(#[from] SettingsError),
    /// No table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// No number for a schema.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The process was told to stop first.
    #[error("stopped before the tables had caught up")]
    Stopped,
}

/// The stages of a process at work.
pub struct Running {
    stages: JoinSet<Result<(), DriveError>>,
    tables: Vec<TableReader>,
    sink: KafkaSink,
    shutdown: CancellationToken,
    /// Given when nobody waits for a broker any more.
    closed: CancellationToken,
}

impl Launch<'_> {
    /// Starts the tables, waits for them, and starts the stages.
    pub async fn start(self, shutdown: CancellationToken) -> Result<Running, LaunchError> {
        let closed = CancellationToken::new();
        if let Some(registry) = self.kafka.registry().cloned() {
            let prefix = self.prefix.to_owned();
            let registered = tokio::task::spawn_blocking(move || registry.register(&prefix)).await;
            registered.map_err(|_| LaunchError::Stopped)??;
        }
        let sink = KafkaSink::new(self.kafka, closed.clone())?;
        let cancels = Arc::new(Cancels::default());
        let tables = self.start_tables(&cancels, &shutdown).await?;
        for table in &tables {
            tokio::select! {
                caught_up = table.caught_up() => if !caught_up { return Err(LaunchError::Stopped) },
                () = shutdown.cancelled() => return Err(LaunchError::Stopped),
            }
        }
        let budget = Budget::new(self.memory_bytes_max);
        let host: Arc<dyn Host> = Arc::new(KafkaHost {
            sink: sink.clone(),
            deltas: full_name(self.prefix, topics::DELTAS.name),
            telemetry: self.telemetry.clone(),
        });
        let site = Site {
            prefix: self.prefix,
            plan: self.plan,
            cluster: Arc::clone(&self.cluster),
            telemetry: self.telemetry,
            host,
            clock: self.clock,
            patience: Patience::default(),
            retry_delay_max: Duration::MAX,
            cancels,
            claims: Arc::clone(&self.claims),
        };
        let mut stages = JoinSet::new();
        for (planned, step) in &self.steps {
            let kept = match planned.ledger.is_some() && (self.is_paid)(planned) {
                true => {
                    let topics = site.ledgers(planned).into_values().collect();
                    let log = KafkaLedger::new(self.kafka, sink.clone(), &site.groups(planned), topics)?;
                    Some(Kept { log: Arc::new(log), health: self.health.clone() })
                }
                false => None,
            };
            let ahead = KafkaAhead::new(self.kafka, site.inputs(planned), Arc::clone(&budget));
            let stage = site.stage(planned, Arc::clone(step), kept, Arc::new(ahead));
            let limits = site.limits(planned);
            let reading = Reading {
                bounds: ReadBounds::new(limits.waiting),
                budget: Arc::clone(&budget),
                meter: stage.meter().clone(),
                health: self.health.clone(),
                once: stage.once().cloned(),
            };
            let source = KafkaSource::join(self.kafka, &site.groups(planned), reading)?;
            let (sink, all) = (Arc::new(sink.clone()), shutdown.clone());
            stages.spawn(async move {
                let ended = drive(stage, source, sink, limits, all.clone()).await;
                // Whoever waits for a result must hear at once that none will come.
                if ended.is_err() {
                    all.cancel();
                }
                ended
            });
        }
        let (claims, clock, all) = (self.claims, self.clock, shutdown.clone());
        stages.spawn(async move {
            all.run_until_cancelled(claims.sweep_for_ever(clock)).await;
            Ok(())
        });
        Ok(Running { stages, tables, sink, shutdown, closed })
    }

    /// Those of the operators, and the cancels, which every process reads.
    async fn start_tables(
        &self,
        cancels: &Arc<Cancels>,
        shutdown: &CancellationToken,
    ) -> Result<Vec<TableReader>, LaunchError> {
        let cancels: Arc<dyn Table> = Arc::new(CancelsTable(Arc::clone(cancels)));
        let of_host = (topics::CANCELS.name.to_owned(), cancels);
        let mut readers = Vec::with_capacity(self.tables.len() + 1);
        for (topic, table) in self.tables.iter().chain([&of_host]) {
            let (kafka, topic, table) =
                (self.kafka.clone(), full_name(self.prefix, topic), Arc::clone(table));
            let (health, shutdown, runtime) = (self.health.clone(), shutdown.clone(), Handle::current());
            // Finding the topic's bounds blocks.
            let started = tokio::task::spawn_blocking(move || {
                TableReader::start(&kafka, &topic, table, health, &runtime, shutdown)
            });
            readers.push(started.await.map_err(|_| LaunchError::Stopped)??);
        }
        Ok(readers)
    }
}

impl Running {
    /// How far each table has come: full topic name → partition → next offset.
    pub fn tables(&self) -> BTreeMap<Arc<str>, BTreeMap<i32, i64>> {
        self.tables.iter().map(|table| (Arc::clone(table.topic()), table.positions())).collect()
    }

    /// Handles on the tables, for whoever waits for them.
    pub fn table_readers(&self) -> Vec<TableReader> {
        self.tables.clone()
    }

    /// Waits until the stages have ended: because they were told to, or because one could not go on, which stops all.
    pub async fn ended(mut self) -> Result<(), DriveError> {
        let mut outcome = Ok(());
        let shutdown = self.shutdown.clone();
        let overdue = async move {
            shutdown.cancelled().await;
            tokio::time::sleep(SHUTDOWN_MAX).await;
        };
        tokio::pin!(overdue);
        loop {
            let ended = tokio::select! {
                ended = self.stages.join_next() => ended,
                () = &mut overdue, if !self.closed.is_cancelled() => {
                    warn!("stages did not drain in time; what they left is processed again");
                    self.closed.cancel();
                    self.stages.abort_all();
                    continue;
                }
            };
            match ended {
                None => break,
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(fault))) => {
                    outcome = outcome.and(Err(fault));
                    self.shutdown.cancel();
                }
                // Aborted, as overdue; or a bug of ours.
                Some(Err(ended)) => {
                    if ended.is_panic() {
                        outcome = outcome.and(Err(DriveError::panicked()));
                    }
                    self.shutdown.cancel();
                }
            }
        }
        self.closed.cancel();
        let sink = self.sink;
        // Flushing blocks.
        let _ = tokio::task::spawn_blocking(move || sink.flush(FLUSH_MAX)).await;
        outcome
    }
}

/// What operators may do beside their records, over Kafka.
struct KafkaHost {
    sink: KafkaSink,
    deltas: Arc<str>,
    telemetry: Telemetry,
}

impl Host for KafkaHost {
    fn delta(&self, stage: &str, delta: Delta) {
        let Ok(value) = delta.encode() else { return };
        let key = Some(delta.id.into_bytes());
        let message = Outgoing { topic: Arc::clone(&self.deltas), key, value, headers: Headers::new() };
        let is_sent = self.sink.send_best_effort(&message);
        self.telemetry.delta(stage, message.value.as_ref().map_or(0, Vec::len), is_sent);
    }

    fn observe(&self, stage: &str, event: &Event) {
        self.telemetry.observe(stage, event);
    }
}
