//! Checks a pipeline against the topics and the operators that there are.
//!
//! First each step by itself: its operator, its topics and the records on them, its ports, its tables, its
//! settings. Then, if every name resolved, the graph they make (see [`graph`](crate::graph)).
//!
//! Invariant: no check stops another, except that a name which does not resolve is one fault and not a dozen.

use crate::{
    Ambiguous, Catalogue, Description, Faults, IN_FLIGHT_DEFAULT, Order, Pipeline, Placed, Plan, PlannedStep,
    PlannedTopic, Queueing, Step, graph, nearest, plan::ENDED,
};
use forebay_schemas::topics::{self, Cleanup};
use serde_json::Value;
use std::collections::BTreeSet;

/// Makes a plan of a pipeline, or tells all that is wrong with it.
pub fn check(pipeline: &Pipeline, catalogue: &dyn Catalogue) -> Result<Plan, Faults> {
    let mut check = Check {
        catalogue,
        topics: topics::ALL.iter().map(PlannedTopic::from).collect(),
        faults: Faults::of(&pipeline.file),
        all_resolve: !pipeline.partial,
    };
    let own_topics = check.own_topics(pipeline);
    let mut steps = Vec::new();
    for step in &pipeline.steps {
        check.step(step);
        steps.extend(catalogue.describe(&step.operator.value).map(|description| (step, description)));
    }
    let Check { topics, mut faults, all_resolve, .. } = check;
    let mut warnings = Faults::of(&pipeline.file);
    if all_resolve {
        graph::check(pipeline, &steps, &topics, catalogue, &mut faults, &mut warnings);
    }
    let plan = Plan {
        name: pipeline.name.value.clone(),
        steps: steps.iter().map(|(step, description)| planned(step, description, catalogue)).collect(),
        warnings,
        own_topics,
    };
    faults.or(plan)
}

fn planned(step: &Step, description: &Description, catalogue: &dyn Catalogue) -> PlannedStep {
    let names = |names: &[Placed<String>]| names.iter().map(|name| name.value.clone()).collect();
    let is_paid = catalogue.is_paid(&step.operator.value, &step.settings.value);
    PlannedStep {
        key: step.key.value.clone(),
        operator: step.operator.value.clone(),
        from: names(&step.from),
        to: step.to.iter().map(|route| (route.port.value.clone(), route.topic.value.clone())).collect(),
        tables: names(&step.tables),
        in_flight: step.in_flight.unwrap_or(IN_FLIGHT_DEFAULT),
        visits_max: step.visits_max,
        order: step.order,
        queue: match &step.queue {
            Some(queue) => queue.value,
            None if description.is_job && step.order == Order::Any => Queueing::Fair,
            None => Queueing::Fifo,
        },
        is_job: description.is_job,
        ledger: (is_paid && step.ledger.as_ref().is_none_or(|ledger| ledger.value))
            .then(|| step.ambiguous.as_ref().map_or(Ambiguous::default(), |ambiguous| ambiguous.value)),
        settings: step.settings.value.clone(),
    }
}

struct Check<'a> {
    catalogue: &'a dyn Catalogue,
    /// Forebay's topics and the pipeline's own.
    topics: Vec<PlannedTopic>,
    faults: Faults,
    all_resolve: bool,
}

impl Check<'_> {
    /// Adds the pipeline's own topics to those that are known.
    fn own_topics(&mut self, pipeline: &Pipeline) -> Vec<PlannedTopic> {
        let records = records(self.catalogue);
        let mut own = Vec::new();
        for topic in &pipeline.topics {
            if topics::find(&topic.name.value).is_some() {
                let message =
                    format!("{:?} is one of Forebay's topics and needs no declaration", topic.name.value);
                self.faults.add(topic.name.place, message);
                continue;
            }
            if topics::is_made_by_hosts(&topic.name.value) {
                let message =
                    format!("{:?} is a name that Forebay gives to topics of its own", topic.name.value);
                self.faults.add(topic.name.place, message);
            }
            if !records.contains(topic.record.value.as_str()) {
                let hint = nearest::hint(&topic.record.value, records.iter().copied());
                self.faults.push(
                    topic.record.place,
                    format!("unknown record {:?}", topic.record.value),
                    hint,
                );
                self.all_resolve = false;
            }
            own.push(PlannedTopic {
                name: topic.name.value.clone(),
                record: topic.record.value.clone(),
                cleanup: topic.cleanup,
                from_clients: topic.from_clients,
                to_clients: topic.to_clients,
            });
        }
        self.topics.extend(own.iter().cloned());
        own
    }

    /// The topic of this name, or a fault.
    fn topic(&mut self, name: &Placed<String>) -> Option<PlannedTopic> {
        let found = self.topics.iter().find(|topic| topic.name == name.value).cloned();
        if found.is_none() {
            let hint = nearest::hint(&name.value, self.topics.iter().map(|topic| topic.name.as_str()))
                .unwrap_or_else(|| "topics of one's own stand under \"topics\"".to_owned());
            self.faults.add_with_hint(name.place, format!("unknown topic {:?}", name.value), hint);
            self.all_resolve = false;
        }
        found
    }

    fn step(&mut self, step: &Step) {
        let Some(description) = self.catalogue.describe(&step.operator.value) else {
            let hint = nearest::hint(&step.operator.value, self.catalogue.names());
            let message = format!("unknown operator {:?}", step.operator.value);
            self.faults.push(step.operator.place, message, hint);
            self.all_resolve = false;
            // Its topics can still be misspelt.
            for name in step.from.iter().chain(step.to.iter().map(|route| &route.topic)).chain(&step.tables) {
                self.topic(name);
            }
            return;
        };
        self.inputs(step, &description);
        self.ports(step, &description);
        self.tables(step, &description);
        self.queue(step, &description);
        self.ledger(step);
        self.settings(step);
    }

    /// Only a call that costs something is remembered.
    fn ledger(&mut self, step: &Step) {
        let (ledger, ambiguous) = (step.ledger.as_ref(), step.ambiguous.as_ref());
        if !self.catalogue.is_paid(&step.operator.value, &step.settings.value) {
            let told = ledger.map(|one| ("ledger", one.place));
            let told = told.into_iter().chain(ambiguous.map(|one| ("ambiguous", one.place)));
            let is_paid = |name: &&str| self.catalogue.is_paid(name, &Value::Null);
            let paid: Vec<_> = self.catalogue.names().into_iter().filter(is_paid).collect();
            for (key, place) in told {
                let message = format!(
                    "step {:?} cannot have {key:?}: {} makes no calls that cost something",
                    step.key.value, step.operator.value
                );
                self.faults.add_with_hint(
                    place,
                    message,
                    format!("{} does", nearest::list(paid.iter().copied())),
                );
            }
        } else if let (Some(Placed { value: false, .. }), Some(ambiguous)) = (ledger, ambiguous) {
            let message = format!(
                "step {:?} has no ledger, so nobody knows which of its calls are ambiguous",
                step.key.value
            );
            self.faults.add_with_hint(
                ambiguous.place,
                message,
                "leave out one of \"ledger\" and \"ambiguous\"",
            );
        }
    }

    /// Tenants take turns only where records are somebody's, and may come out of order.
    fn queue(&mut self, step: &Step, description: &Description) {
        let fair = |queue: &&Placed<Queueing>| queue.value == Queueing::Fair;
        let Some(queue) = step.queue.as_ref().filter(fair) else { return };
        let key = &step.key.value;
        if !description.is_job {
            let message = format!("step {key:?} cannot have a fair queue: its records are nobody's requests");
            self.faults.add(queue.place, message);
        }
        if step.order == Order::Key {
            let message =
                format!("step {key:?} cannot have a fair queue: what is set aside comes out of order");
            self.faults.add(queue.place, message);
        }
    }

    fn inputs(&mut self, step: &Step, description: &Description) {
        let mut seen = BTreeSet::new();
        for name in &step.from {
            let Some(topic) = self.topic(name) else { continue };
            if !seen.insert(&name.value) {
                self.faults
                    .add(name.place, format!("step {:?} reads {:?} twice", step.key.value, name.value));
            }
            if topic.record != description.input {
                let carrying = self.topics.iter().filter(|other| other.record == description.input);
                let message = format!(
                    "{:?} carries {}, but {} takes {}",
                    topic.name, topic.record, step.operator.value, description.input
                );
                let hint = carried_by(description.input, carrying);
                self.faults.push(name.place, message, hint);
            }
        }
    }

    fn ports(&mut self, step: &Step, description: &Description) {
        let names = || description.ports.iter().map(|(port, _)| *port);
        for route in &step.to {
            let topic = self.topic(&route.topic);
            if route.port.value == ENDED {
                let message =
                    format!("port {ENDED:?} leads to {:?} by itself; leave it out", topics::ENDINGS.name);
                self.faults.add(route.port.place, message);
                continue;
            }
            let Some((_, record)) = description.ports.iter().find(|(port, _)| *port == route.port.value)
            else {
                let message = format!("{} has no port {:?}", step.operator.value, route.port.value);
                self.faults.push(route.port.place, message, nearest::hint(&route.port.value, names()));
                self.all_resolve = false;
                continue;
            };
            if let Some(topic) = topic
                && topic.record != *record
            {
                let carrying = self.topics.iter().filter(|other| other.record == *record);
                let message = format!(
                    "{record} leaves {} by port {:?}, but {:?} carries {}",
                    step.operator.value, route.port.value, topic.name, topic.record
                );
                let hint = carried_by(record, carrying);
                self.faults.push(route.topic.place, message, hint);
            }
        }
        for port in names() {
            let routed = step.to.iter().any(|route| route.port.value == port);
            // A misspelt port is told once, where it stands.
            let misspelt =
                step.to.iter().any(|route| nearest::nearest(&route.port.value, names()) == Some(port));
            if !routed && !misspelt && !step.unread.to {
                let message = format!("step {:?} does not say where port {port:?} leads", step.key.value);
                self.faults.add(step.key.place, message);
                self.all_resolve = false;
            }
        }
    }

    fn tables(&mut self, step: &Step, description: &Description) {
        let mut given = Vec::new();
        for name in &step.tables {
            let Some(topic) = self.topic(name) else {
                // Whatever was meant, it may be the one that is wanted.
                return;
            };
            if !description.tables.contains(&topic.record.as_str()) {
                let message =
                    format!("{} looks nothing up in a table of {}", step.operator.value, topic.record);
                let hint = match description.tables.as_slice() {
                    [] => "it needs no tables".to_owned(),
                    records => format!("it needs one of {}", records.join(" and one of ")),
                };
                self.faults.add_with_hint(name.place, message, hint);
                continue;
            }
            if given.contains(&topic.record) {
                let message = format!("step {:?} has a second table of {}", step.key.value, topic.record);
                self.faults.add(name.place, message);
            }
            if topic.cleanup != Cleanup::Compact {
                let message = format!("{:?} is not compacted, and a table is read whole", topic.name);
                self.faults.add(name.place, message);
            }
            given.push(topic.record);
        }
        if step.unread.tables {
            return;
        }
        for record in description.tables.iter().filter(|record| !given.iter().any(|other| other == *record)) {
            let compacted =
                |topic: &&PlannedTopic| topic.record == *record && topic.cleanup == Cleanup::Compact;
            let hint = match self.topics.iter().find(compacted) {
                Some(topic) => format!("add {:?} to its \"tables\"", topic.name),
                None => "declare a compacted topic of it under \"topics\"".to_owned(),
            };
            let message = format!("step {:?} needs a table of {record} to look things up in", step.key.value);
            self.faults.add_with_hint(step.key.place, message, hint);
        }
    }

    fn settings(&mut self, step: &Step) {
        if step.unread.settings {
            return;
        }
        for fault in self.catalogue.check_settings(&step.operator.value, &step.settings.value) {
            let (key, value) = step.settings.find(&fault.path);
            let place = if fault.known.is_empty() { value } else { key };
            let hint = fault
                .path
                .last()
                .and_then(|given| nearest::hint(given, fault.known.iter().map(String::as_str)));
            self.faults.push(place, fault.message, hint);
        }
    }
}

/// The names of all records that a topic may carry.
fn records(catalogue: &dyn Catalogue) -> BTreeSet<&'static str> {
    let mut records: BTreeSet<_> = topics::ALL.iter().map(|topic| topic.record).collect();
    for description in catalogue.names().into_iter().filter_map(|name| catalogue.describe(name)) {
        records.insert(description.input);
        records.extend(description.ports.iter().map(|(_, record)| *record));
    }
    records
}

fn carried_by<'a>(record: &str, topics: impl Iterator<Item = &'a PlannedTopic>) -> Option<String> {
    let names: Vec<&str> = topics.map(|topic| topic.name.as_str()).collect();
    (!names.is_empty()).then(|| format!("{record} lies on {}", nearest::list(names)))
}
