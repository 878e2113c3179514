//! From a planned step to the stage that runs it, alike in every host.
//!
//! Invariant: what a stage reads, where its ports lead and how it is bounded follow from the plan and the prefix
//! alone; a host adds only what it reads from and writes to.

use crate::{
    ahead::Ahead,
    cancels::Cancels,
    claims::Claims,
    drive::Limits,
    ledger::{
        self, LeaseClock, Ledgers, Log,
        book::{AMBIGUOUS_MAX, Terms},
    },
    message::{Group, Input},
    once::{Once, REMEMBERED_MAX},
    stage::{CommonTopics, Parts, Patience, RetryTopic, Stage},
};
use forebay_operator::{Clock, Host, Step};
use forebay_plan::{Ambiguous, Channel, Order, Plan, PlannedStep, PlannedTopic};
use forebay_schemas::topics::{self, Cleanup};
use forebay_telemetry::{Health, Telemetry};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// Where the stages of a pipeline stand: all that they have in common.
pub(crate) struct Site<'a> {
    /// Goes before every topic and group.
    pub prefix: &'a str,
    /// The pipeline.
    pub plan: &'a Plan,
    /// The id of the Kafka cluster.
    pub cluster: Arc<str>,
    /// What is counted.
    pub telemetry: &'a Telemetry,
    /// What operators may do beside their records.
    pub host: Arc<dyn Host>,
    /// What time it is.
    pub clock: Clock,
    /// How long to wait for a world that failed.
    pub patience: Patience,
    /// The longest that a record is set aside to be tried again.
    pub retry_delay_max: Duration,
    /// Requests that their clients took back.
    pub cancels: Arc<Cancels>,
    /// Where bodies lie that are too large to travel.
    pub claims: Arc<Claims>,
}

/// Where the ledgers of a stage are kept, and who waits for them.
pub(crate) struct Kept {
    /// The log.
    pub log: Arc<dyn Log>,
    /// Who is ready.
    pub health: Health,
}

impl Site<'_> {
    /// The stage of a step; its ledgers of paid calls, where it has any, are kept in `kept`. `ahead` reads on where it sets
    /// records aside.
    pub fn stage(
        &self,
        planned: &PlannedStep,
        step: Arc<dyn Step>,
        kept: Option<Kept>,
        ahead: Arc<dyn Ahead>,
    ) -> Arc<Stage> {
        let meter = self.telemetry.step(&planned.key, step.operator()).in_group(&self.group(planned));
        let topics = self.plan.topics();
        let inputs = planned.inputs();
        let from_clients = topics
            .iter()
            .filter(|topic| topic.from_clients && inputs.iter().any(|input| input.topic == topic.name));
        let stage = Stage::new(Parts {
            key: planned.key.as_str().into(),
            pipeline: self.plan.name.as_str().into(),
            step,
            routes: planned.to.iter().map(|(port, topic)| (port.clone(), self.name(topic))).collect(),
            from_clients: from_clients.map(|topic| self.name(&topic.name)).collect(),
            backfill: self.backfill(&topics),
            retries: self.retries(planned),
            overflow: self.overflow(&inputs),
            visits_max: planned.visits_max,
            common: CommonTopics {
                endings: self.name(topics::ENDINGS.name),
                dead_letters: self.name(topics::DEAD_LETTERS.name),
                attempts: self.name(topics::ATTEMPTS.name),
            },
            cluster: Arc::clone(&self.cluster),
            clock: self.clock,
            host: Arc::clone(&self.host),
            patience: self.patience.clone(),
            meter: meter.clone(),
        });
        let stage = stage.with_cancels(Arc::clone(&self.cancels)).with_ahead(ahead);
        let stage = match (planned.ledger, kept) {
            (Some(ambiguous), Some(Kept { log, health })) => {
                stage.with_ledgers(Arc::new(Ledgers::new(ledger::Parts {
                    log,
                    topics: self.ledgers(planned),
                    ambiguous_max: match ambiguous {
                        Ambiguous::Retry => AMBIGUOUS_MAX,
                        Ambiguous::Park => 0,
                    },
                    finished_max: self.unfinished_max(planned),
                    config: blake3::hash(planned.settings.to_string().as_bytes()).to_hex()[..16].to_owned(),
                    terms: Terms::default(),
                    lease_clock: LeaseClock::Boot,
                    clock: self.clock,
                    meter,
                    health,
                    name: format!("ledger {}", planned.key),
                })))
            }
            _ => stage,
        };
        let stage = stage.with_claims(Arc::clone(&self.claims), self.claimed(&topics));
        let once = self.written_once(planned);
        Arc::new(if once.is_empty() { stage } else { stage.with_once(Arc::new(Once::new(once))) })
    }

    /// From the full name of each input topic of a step to that of its ledger.
    pub fn ledgers(&self, planned: &PlannedStep) -> BTreeMap<Arc<str>, Arc<str>> {
        planned.ledgers().iter().map(|(of, to)| (self.name(of), self.name(to))).collect()
    }

    /// The consumer group of a step.
    pub fn group(&self, planned: &PlannedStep) -> String {
        self.plan.consumer_group(self.prefix, planned)
    }

    /// The consumer groups of a step, one for each channel: a group's partitions are shared out as one heap, so that in a group
    /// of several topics one member may get the whole of one and no other of it.
    pub fn groups(&self, planned: &PlannedStep) -> Vec<Group> {
        let group = self.group(planned);
        let of = |(name, channel): (&str, Channel)| {
            let inputs = self.inputs(planned).into_iter();
            let inputs: Vec<_> = inputs.filter(|input| input.channel == channel).collect();
            (!inputs.is_empty()).then(|| Group { name: format!("{group}{name}"), inputs })
        };
        let channels = [
            ("", Channel::Live),
            (".backfill", Channel::Backfill),
            (".retry", Channel::Retry),
            (".overflow", Channel::Overflow),
        ];
        channels.into_iter().filter_map(of).collect()
    }

    /// The topics that a step reads.
    pub fn inputs(&self, planned: &PlannedStep) -> Vec<Input> {
        let named =
            |input: forebay_plan::Input| Input { topic: self.name(&input.topic), channel: input.channel };
        planned.inputs().into_iter().map(named).collect()
    }

    /// From the full name of each topic to that of its backfill lane, where it has one.
    fn backfill(&self, topics: &[PlannedTopic]) -> BTreeMap<Arc<str>, Arc<str>> {
        let lanes = topics.iter().map(|topic| (&topic.name, topics::backfill(&topic.name)));
        let lanes = lanes.filter(|(_, lane)| topics.iter().any(|other| other.name == *lane));
        lanes.map(|(topic, lane)| (self.name(topic), self.name(&lane))).collect()
    }

    /// The full names of the topics between steps: nobody else reads them, and nothing on them is kept for ever.
    fn claimed(&self, topics: &[PlannedTopic]) -> BTreeSet<Arc<str>> {
        let is_kept_a_while = |topic: &PlannedTopic| matches!(topic.cleanup, Cleanup::Delete { .. });
        let is_between =
            |topic: &&PlannedTopic| !topic.from_clients && !topic.to_clients && is_kept_a_while(topic);
        topics.iter().filter(is_between).map(|topic| self.name(&topic.name)).collect()
    }

    fn retries(&self, planned: &PlannedStep) -> Vec<RetryTopic> {
        let retries = planned.retries().into_iter();
        let delay = |ms: i64| Duration::from_millis(ms.unsigned_abs()).min(self.retry_delay_max);
        retries.map(|(topic, ms)| RetryTopic { topic: self.name(&topic), delay: delay(ms) }).collect()
    }

    fn overflow(&self, inputs: &[forebay_plan::Input]) -> Option<Arc<str>> {
        let overflow = inputs.iter().find(|input| input.channel == Channel::Overflow)?;
        Some(self.name(&overflow.topic))
    }

    /// The bounds of a step. All steps together may have fewer records unfinished in a partition than is remembered of
    /// what was written once: whatever is delivered again after a crash, at whichever step, must be recognised.
    pub fn limits(&self, planned: &PlannedStep) -> Limits {
        let window = REMEMBERED_MAX / (self.plan.steps.len() + 2);
        let window = i64::try_from(window).unwrap_or(i64::MAX);
        Limits { ordered: planned.order == Order::Key, window, ..Limits::new(planned.in_flight) }
    }

    /// How many records of a partition this step and those before it may have unfinished together.
    fn unfinished_max(&self, planned: &PlannedStep) -> usize {
        let before = self.plan.steps.iter().take_while(|step| step.key != planned.key).count();
        (before + 1) * REMEMBERED_MAX / (self.plan.steps.len() + 2)
    }

    /// The topics of a step that clients and the table sink read: each message on them is written once.
    fn written_once(&self, planned: &PlannedStep) -> Vec<Arc<str>> {
        let once = [topics::RESULTS.name, topics::OUTCOMES.name];
        let written = once.iter().filter(|name| planned.to.values().any(|topic| topic == *name));
        written.map(|name| self.name(name)).collect()
    }

    /// The full name of a topic.
    pub fn name(&self, topic: &str) -> Arc<str> {
        full_name(self.prefix, topic)
    }
}

/// The full name of a topic.
pub(crate) fn full_name(prefix: &str, topic: &str) -> Arc<str> {
    format!("{prefix}{topic}").into()
}
