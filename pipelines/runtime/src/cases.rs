//! Runs a case of a pipeline: its graph, its operators and the one loop, over a log in memory.
//!
//! Each act is over before the next begins: every record is committed by every stage that reads it, and every table
//! has taken its topic in. The wall clock stands where a case begins and runs from there, so what a case says of
//! ages and deadlines holds on any day.
//!
//! Why tokio's clock is not paused here, as it is in simulations: stores work on threads of their own, which a clock
//! that jumps from timer to timer would outrun, and a shipped binary would carry the pause. Nothing in a case waits
//! for time to pass, and a world that fails is waited for in milliseconds, so nothing is lost by it.
//!
//! Invariant: a case ends, and nothing that it started outlives it.

use crate::{
    claims::{BYTES_OVER_DEFAULT, Claims},
    drive::{DriveError, drive},
    host::memory::{MemoryAhead, MemoryLog, MemoryObjects, MemorySource, Stored},
    site::Site,
    stage::Patience,
};
use bytes::Bytes;
use forebay_operator::{Change, Clock, Event, Host, Step, Table};
use forebay_plan::{
    Place, Plan,
    cases::{Act, Case, CaseStep, Expect},
};
use forebay_schemas::{Answer, Delta, Headers, Record, topics};
use forebay_telemetry::Telemetry;
use std::{fmt, sync::Arc, time::Duration};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

/// The wall time at which every case begins: 14 November 2023.
const START_MS: i64 = 1_700_000_000_000;

/// How long one act may take. Far more than any does; what takes longer is stuck.
const ACT_MAX: Duration = Duration::from_secs(30);

/// How long the stages may take to end.
const END_MAX: Duration = Duration::from_secs(5);

/// How long to wait before a table that could not take changes in is given them again.
const RETRY_AFTER: Duration = Duration::from_millis(10);

/// Changes that a table takes in at once at most.
const TABLE_BATCH: usize = 1_000;

/// The operators and tables of one case. Fresh for each, or one case would answer from another's cache.
pub struct Operators {
    /// By the key of the step; every step of the plan has one.
    pub steps: Vec<(String, Arc<dyn Step>)>,
    /// By the topic that they follow.
    pub tables: Vec<(String, Arc<dyn Table>)>,
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The file.
    pub file: String,
    /// What the case shows, as a sentence.
    pub name: String,
    /// What went otherwise than the case says; empty where it passed.
    pub faults: Vec<CaseFault>,
}

impl Report {
    /// Whether all went as the case says.
    pub fn passed(&self) -> bool {
        self.faults.is_empty()
    }
}

/// One thing that went otherwise than a case says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseFault {
    /// The file.
    pub file: String,
    /// Where the file says so.
    pub place: Place,
    /// What differs.
    pub message: String,
}

impl fmt::Display for CaseFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.place.line, self.place.column, self.message)
    }
}

/// Runs a case.
pub async fn run(plan: &Plan, case: &Case, operators: Operators, telemetry: &Telemetry) -> Report {
    let mut report = Report { file: case.file.clone(), name: case.name.clone(), faults: Vec::new() };
    let fault = |place, message| CaseFault { file: case.file.clone(), place, message };
    let mut bench = match Bench::start(plan, operators, telemetry) {
        Ok(bench) => bench,
        Err(message) => {
            report.faults.push(fault(Place::START, message));
            return report;
        }
    };
    let known = case.documents.iter().map(|document| (Place::START, Act::Put(document.clone())));
    let steps = case.steps.iter().map(|CaseStep { place, act }| (*place, act.clone()));
    for (place, act) in known.chain(steps) {
        match bench.act(&act).await {
            Ok(differences) => {
                let place = match &act {
                    Act::Send { expect, .. } => expect.place.unwrap_or(place),
                    _ => place,
                };
                report.faults.extend(differences.into_iter().map(|message| fault(place, message)));
            }
            // What stands still does not move for the next act.
            Err(stuck) => {
                report.faults.push(fault(place, stuck));
                break;
            }
        }
    }
    if let Err(message) = bench.end().await {
        report.faults.push(fault(Place::START, message));
    }
    report
}

/// A pipeline at work in memory.
struct Bench {
    log: Arc<MemoryLog>,
    clock: Clock,
    /// Topics that something reads.
    read: Vec<Arc<str>>,
    at_work: JoinSet<Result<(), DriveError>>,
    shutdown: CancellationToken,
}

impl Bench {
    fn start(plan: &Plan, operators: Operators, telemetry: &Telemetry) -> Result<Self, String> {
        let clock = Clock::starting_at(START_MS);
        let log = MemoryLog::new(clock, topics::DERIVED_MESSAGE_BYTES_MAX);
        let site = Site {
            cancels: Arc::default(),
            claims: Arc::new(Claims::new(Arc::new(MemoryObjects::default()), Some(BYTES_OVER_DEFAULT))),
            prefix: "",
            plan,
            cluster: "memory".into(),
            telemetry,
            host: Arc::new(Alone),
            clock,
            patience: Patience { waits: vec![Duration::from_millis(1); 3], outage: RETRY_AFTER },
            retry_delay_max: RETRY_AFTER,
        };
        let shutdown = CancellationToken::new();
        let (mut at_work, mut read) = (JoinSet::new(), Vec::new());
        for planned in &plan.steps {
            let step = operators.steps.iter().find(|(key, _)| *key == planned.key);
            let (_, step) = step.ok_or_else(|| format!("step {:?} has no operator", planned.key))?;
            let inputs = site.inputs(planned);
            let (source, _) = MemorySource::join(&log, &site.group(planned), &inputs);
            read.extend(inputs.iter().map(|input| Arc::clone(&input.topic)));
            let mut limits = site.limits(planned);
            // Every act waits for the commits of the one before.
            limits.commit_every = Duration::from_millis(1);
            let ahead = Arc::new(MemoryAhead { log: Arc::clone(&log), inputs });
            let (stage, sink) = (site.stage(planned, Arc::clone(step), None, ahead), Arc::clone(&log));
            at_work.spawn(drive(stage, source, sink, limits, shutdown.clone()));
        }
        for (topic, table) in operators.tables {
            let (topic, log) = (site.name(&topic), Arc::clone(&log));
            log.commit(&reader_of(&topic), &topic, 0);
            let shutdown = shutdown.clone();
            at_work.spawn(async move {
                let following = follow(&log, &topic, &*table);
                let _ = shutdown.run_until_cancelled(following).await;
                Ok(())
            });
        }
        Ok(Self { log, clock, read, at_work, shutdown })
    }

    /// Does one thing and waits for all that follows from it; what differs from what is expected, or why it hangs.
    async fn act(&mut self, act: &Act) -> Result<Vec<String>, String> {
        let before = (self.written(topics::RESULTS.name), self.written(topics::DEAD_LETTERS.name));
        match act {
            Act::Send { body, age_ms, .. } => {
                let age_ms = i64::try_from(*age_ms).unwrap_or(i64::MAX);
                let timestamp_ms = self.clock.now_ms().saturating_sub(age_ms);
                self.write(timestamp_ms, topics::REQUESTS.name, None, Some(body.clone()))?;
            }
            Act::Put(document) => {
                let body = document.encode().map_err(|fault| fault.to_string())?;
                self.write_document(document.key(), body)?;
            }
            Act::Delete(id) => self.write_document(Some(id), None)?,
        }
        self.settle().await?;
        let Act::Send { expect, .. } = act else {
            return Ok(self.refused(before.1));
        };
        let results = self.log.read(topics::RESULTS.name).split_off(before.0);
        let dead_letters = self.written(topics::DEAD_LETTERS.name) - before.1;
        Ok(judge(expect, &results, dead_letters))
    }

    fn write_document(&self, id: Option<&str>, body: Option<Vec<u8>>) -> Result<(), String> {
        self.write(self.clock.now_ms(), topics::DOCUMENTS.name, id, body)
    }

    fn write(
        &self,
        timestamp_ms: i64,
        topic: &str,
        key: Option<&str>,
        body: Option<Vec<u8>>,
    ) -> Result<(), String> {
        let read = self.read.iter().find(|read| ***read == *topic);
        let topic = read.ok_or_else(|| format!("no step of this pipeline reads {topic}"))?;
        let key = key.map(|key| Bytes::copy_from_slice(key.as_bytes()));
        self.log.append_at(timestamp_ms, topic, key, body.map(Bytes::from), Headers::new());
        Ok(())
    }

    fn written(&self, topic: &str) -> usize {
        self.log.read(topic).len()
    }

    /// What a document became that no step could process.
    fn refused(&self, before: usize) -> Vec<String> {
        let refused = self.log.read(topics::DEAD_LETTERS.name).split_off(before);
        let reasons = refused.iter().map(|letter| reason(&letter.headers));
        reasons.map(|reason| format!("the document became a dead letter: {reason}")).collect()
    }

    /// Waits until all that was written is read and finished.
    async fn settle(&mut self) -> Result<(), String> {
        let mut commits = self.log.commits();
        let until = Instant::now() + ACT_MAX;
        loop {
            commits.mark_unchanged();
            let lags = self.log.lags();
            if lags.is_empty() {
                return Ok(());
            }
            tokio::select! {
                _ = commits.changed() => {}
                Some(ended) = self.at_work.join_next() => return Err(ending(ended)),
                () = tokio::time::sleep_until(until) => {
                    let behind = lags.into_iter().map(|((reader, topic), lag)| format!("{reader} by {lag} on {topic}"));
                    let behind: Vec<_> = behind.collect();
                    return Err(format!("not over after {} s; behind: {}", ACT_MAX.as_secs(), behind.join(", ")));
                }
            }
        }
    }

    async fn end(mut self) -> Result<(), String> {
        self.shutdown.cancel();
        let all = async {
            while let Some(ended) = self.at_work.join_next().await {
                match ended {
                    Ok(Ok(())) => {}
                    ended => return Err(ending(ended)),
                }
            }
            Ok(())
        };
        let ended = timeout(END_MAX, all).await;
        self.at_work.shutdown().await;
        ended.unwrap_or_else(|_| Err(format!("the pipeline did not end within {} s", END_MAX.as_secs())))
    }
}

/// The result of a request beside what was expected of it.
fn judge(expect: &Expect, results: &[Stored], dead_letters: usize) -> Vec<String> {
    let [result] = results else {
        return vec![format!("one result should come and {} came", results.len())];
    };
    match result.value.as_deref().map(Answer::decode) {
        Some(Ok(answer)) => expect.differences(&answer, dead_letters),
        Some(Err(fault)) => vec![format!("the result cannot be read: {fault}")],
        None => vec!["the result has no value".to_owned()],
    }
}

fn reason(headers: &Headers) -> String {
    let header = headers.iter().find(|(name, _)| name == forebay_schemas::dead_letter::header::MESSAGE);
    let value = header.and_then(|(_, value)| value.as_deref()).unwrap_or_default();
    String::from_utf8_lossy(value).into_owned()
}

fn ending(ended: Result<Result<(), DriveError>, tokio::task::JoinError>) -> String {
    match ended {
        Ok(Ok(())) => "a stage ended too early".to_owned(),
        Ok(Err(fault)) => fault.to_string(),
        Err(panic) => format!("a task panicked: {panic}"),
    }
}

fn reader_of(topic: &str) -> String {
    format!("table {topic}")
}

/// Follows a topic with a table.
async fn follow(log: &MemoryLog, topic: &Arc<str>, table: &dyn Table) {
    let mut grew = log.growth();
    let mut position: i64 = 0;
    loop {
        grew.mark_unchanged();
        let changes: Vec<Change> =
            (position..).map_while(|offset| change(log, topic, offset)).take(TABLE_BATCH).collect();
        let Some(last) = changes.last() else {
            // The log outlives whoever follows it.
            let _ = grew.changed().await;
            continue;
        };
        let next = last.offset + 1;
        match table.apply(changes).await {
            Ok(refused) => {
                for (change, reason) in refused {
                    error!(%topic, offset = change.offset, reason, "a record of a table cannot be read; it is passed over");
                }
                position = next;
                log.commit(&reader_of(topic), topic, position);
            }
            Err(failure) => {
                warn!(%topic, error = %failure, "could not change a table; will try again");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

fn change(log: &MemoryLog, topic: &str, offset: i64) -> Option<Change> {
    let Stored { key, value, .. } = log.at(topic, offset)?;
    let key = String::from_utf8_lossy(key.as_deref().unwrap_or_default()).into_owned();
    Some(Change { partition: 0, offset, key, value })
}

/// Nobody reads along with a case, and nobody counts.
struct Alone;

impl Host for Alone {
    fn delta(&self, _: &str, _: Delta) {}
    fn observe(&self, _: &str, _: &Event) {}
}
