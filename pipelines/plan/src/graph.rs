//! Checks what only the whole graph shows: who writes, who reads, whether it ends, and whether the client hears.
//!
//! Invariant: in a graph that passes, every request comes to an end and every end is told exactly once: each way
//! that a request can take leads to `results`, and no cycle is without a bound.

use crate::{Catalogue, Description, Faults, Pipeline, PlannedTopic, Route, Step, plan::HOST_TOPICS};
use forebay_schemas::{Ending, Record, topics};
use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

/// Checks the graph of a pipeline all of whose names resolve.
pub(crate) fn check(
    pipeline: &Pipeline,
    steps: &[(&Step, Description)],
    topics: &[PlannedTopic],
    catalogue: &dyn Catalogue,
    faults: &mut Faults,
    warnings: &mut Faults,
) {
    let graph = Graph { pipeline, steps, topics };
    graph.sole_writers(faults);
    graph.somebody_writes(faults, warnings);
    graph.nothing_is_taken_for_a_client(catalogue, faults);
    graph.every_request_is_answered(catalogue, faults);
    graph.somebody_reads(warnings);
    graph.one_taker(warnings);
    graph.cycles_are_bounded(faults);
}

struct Graph<'a> {
    pipeline: &'a Pipeline,
    steps: &'a [(&'a Step, Description)],
    topics: &'a [PlannedTopic],
}

impl<'a> Graph<'a> {
    fn topic(&self, name: &str) -> Option<&'a PlannedTopic> {
        self.topics.iter().find(|topic| topic.name == name)
    }

    fn readers(&self, topic: &'a str) -> impl Iterator<Item = &'a (&'a Step, Description)> {
        self.steps.iter().filter(move |(step, _)| reads(step, topic))
    }

    /// All routes that lead to a topic, and the steps that they leave.
    fn writers(&self, topic: &'a str) -> impl Iterator<Item = (&'a Step, &'a Route)> {
        let routes = self.steps.iter().flat_map(|(step, _)| step.to.iter().map(move |route| (*step, route)));
        routes.filter(move |(_, route)| route.topic.value == topic)
    }

    /// `results` and `outcomes` have one writer, or a request might be answered twice.
    fn sole_writers(&self, faults: &mut Faults) {
        for topic in [topics::RESULTS.name, topics::OUTCOMES.name] {
            let mut writers = self.writers(topic);
            let Some((first, _)) = writers.next() else { continue };
            for (step, route) in writers.filter(|(step, _)| step.key != first.key) {
                let message = format!("step {:?} is a second writer of {topic:?}", step.key.value);
                let hint =
                    format!("step {:?} writes it already, and each request has one result", first.key.value);
                faults.add_with_hint(route.topic.place, message, hint);
            }
        }
    }

    /// A topic that a step reads is written by a step, by clients or by the host. A table may come from another
    /// pipeline.
    fn somebody_writes(&self, faults: &mut Faults, warnings: &mut Faults) {
        let written = |name: &str| {
            self.topic(name).is_some_and(|topic| topic.from_clients)
                || HOST_TOPICS.iter().any(|topic| topic.name == name)
                || self.steps.iter().any(|(step, _)| step.to.iter().any(|route| route.topic.value == name))
        };
        for (step, _) in self.steps {
            for name in step.from.iter().filter(|name| !written(&name.value)) {
                let message =
                    format!("step {:?} reads {:?}, which nobody writes", step.key.value, name.value);
                let own = self.pipeline.topics.iter().any(|topic| topic.name.value == name.value);
                let hint = own.then(|| "if clients do, declare it with \"from_clients: true\"".to_owned());
                faults.push(name.place, message, hint);
            }
            for name in step.tables.iter().filter(|name| !written(&name.value)) {
                let message = format!(
                    "step {:?} looks things up in {:?}, which nobody in this pipeline writes",
                    step.key.value, name.value
                );
                warnings.add(name.place, message);
            }
        }
    }

    /// On a topic of clients the headers are theirs, so the envelope of a request would end there.
    fn nothing_is_taken_for_a_client(&self, catalogue: &dyn Catalogue, faults: &mut Faults) {
        let jobs = job_records(catalogue);
        for topic in
            self.topics.iter().filter(|topic| topic.from_clients && jobs.contains(topic.record.as_str()))
        {
            for (step, route) in self.writers(&topic.name) {
                let message = format!(
                    "step {:?} writes {:?}, which is for clients to write",
                    step.key.value, topic.name
                );
                let hint =
                    "its request would come back as a new one; declare a topic for it under \"topics\"";
                faults.add_with_hint(route.topic.place, message, hint);
            }
        }
    }

    /// Wherever a request goes, somebody takes it on, until its end is published.
    fn every_request_is_answered(&self, catalogue: &dyn Catalogue, faults: &mut Faults) {
        let Some((first, _)) = self.steps.iter().find(|(_, description)| description.is_job) else { return };
        let endings = topics::ENDINGS.name;
        for topic in [topics::RESULTS.name, topics::OUTCOMES.name] {
            let told = self.writers(topic).any(|(step, _)| reads(step, endings));
            if !told {
                let message = format!(
                    "step {:?} takes requests, but no step turns {endings:?} into {topic:?}",
                    first.key.value
                );
                faults.add_with_hint(first.key.place, message, "a step with the operator publish does");
            }
        }
        let jobs = job_records(catalogue);
        for (step, description) in self.steps {
            let carried = |route: &&Route| {
                self.topic(&route.topic.value).is_some_and(|t| jobs.contains(t.record.as_str()))
            };
            for route in step.to.iter().filter(|_| description.is_job).filter(carried) {
                let goes_on = self.readers(&route.topic.value).any(|(_, reader)| {
                    reader.is_job
                        && reader
                            .ports
                            .iter()
                            .any(|(_, record)| jobs.contains(record) || *record == Ending::NAME)
                });
                if !goes_on {
                    let message = format!(
                        "requests that leave step {:?} by port {:?} never reach {:?}: no step takes them on from {:?}",
                        step.key.value,
                        route.port.value,
                        topics::RESULTS.name,
                        route.topic.value
                    );
                    faults.add(route.topic.place, message);
                }
            }
        }
    }

    /// What is written is read, in here or outside. Requests that nobody reads are a fault, told already.
    fn somebody_reads(&self, warnings: &mut Faults) {
        let read = |name: &str| {
            self.topic(name).is_some_and(|topic| topic.to_clients)
                || self
                    .steps
                    .iter()
                    .any(|(step, _)| reads(step, name) || step.tables.iter().any(|t| t.value == name))
        };
        for (step, _) in self.steps {
            for route in step.to.iter().filter(|route| !read(&route.topic.value)) {
                let message = format!(
                    "nobody reads {:?}, where port {:?} of step {:?} leads",
                    route.topic.value, route.port.value, step.key.value
                );
                warnings.add(route.topic.place, message);
            }
        }
        for topic in &self.pipeline.topics {
            let name = &topic.name.value;
            let used = self.readers(name).next().is_some()
                || self.writers(name).next().is_some()
                || self.steps.iter().any(|(step, _)| step.tables.iter().any(|table| table.value == *name));
            if !used {
                warnings.add(topic.name.place, format!("no step uses topic {name:?}"));
            }
        }
    }

    /// Two consumer groups on a topic of requests are two answers to each.
    fn one_taker(&self, warnings: &mut Faults) {
        for topic in self.topics {
            let mut takers = self.readers(&topic.name).filter(|(_, description)| description.is_job);
            let Some((first, _)) = takers.next() else { continue };
            for (step, _) in takers {
                for name in step.from.iter().filter(|name| name.value == topic.name) {
                    let message = format!(
                        "steps {:?} and {:?} both read {:?}, so each request comes to two ends",
                        first.key.value, step.key.value, topic.name
                    );
                    warnings.add_with_hint(name.place, message, "only the first end is told");
                }
            }
        }
    }

    /// Every cycle passes a step that counts, or a record might go round for ever.
    fn cycles_are_bounded(&self, faults: &mut Faults) {
        // Counting steps cut the cycles that they lie on; what is left must have none.
        let mut left: BTreeSet<usize> =
            (0..self.steps.len()).filter(|at| self.steps[*at].0.visits_max.is_none()).collect();
        while let Some(cycle) = self.cycle(&left) {
            let Some(&(at, _)) = cycle.first() else { return };
            let step = self.steps[at].0;
            let mut way = step.key.value.clone();
            for (at, topic) in cycle[1..].iter().chain(&cycle[..1]) {
                way.push_str(&format!(" → {topic} → {}", self.steps[*at].0.key.value));
            }
            let hint = "give one of its steps \"visits_max\"";
            faults.add_with_hint(step.key.place, format!("a record can go round for ever: {way}"), hint);
            left.remove(&at);
        }
    }

    /// A cycle among these steps: each with the topic by which it is reached from the one before it.
    fn cycle(&self, among: &BTreeSet<usize>) -> Option<Vec<(usize, &'a str)>> {
        among.iter().find_map(|start| self.way_back(*start, among))
    }

    /// The shortest way from a step back to itself, breadth first.
    fn way_back(&self, start: usize, among: &BTreeSet<usize>) -> Option<Vec<(usize, &'a str)>> {
        let mut reached_from: BTreeMap<usize, (usize, &'a str)> = BTreeMap::new();
        let mut wave = vec![start];
        while !wave.is_empty() && !reached_from.contains_key(&start) {
            let mut next_wave = Vec::new();
            for at in wave {
                for topic in self.leads_to(at) {
                    for next in among.iter().copied().filter(|next| reads(self.steps[*next].0, topic)) {
                        if let Entry::Vacant(entry) = reached_from.entry(next) {
                            entry.insert((at, topic));
                            next_wave.push(next);
                        }
                    }
                }
            }
            wave = next_wave;
        }
        let mut way = Vec::new();
        let mut at = start;
        loop {
            let (before, topic) = *reached_from.get(&at)?;
            way.push((at, topic));
            at = before;
            if at == start {
                break;
            }
        }
        // From the start on: it was pushed first, since the way was walked back from it.
        way[1..].reverse();
        Some(way)
    }

    /// The topics to which a step's records go, the implicit port included: only the work of a request makes endings.
    fn leads_to(&self, at: usize) -> impl Iterator<Item = &'a str> {
        let (step, description) = &self.steps[at];
        let ended = description.is_job.then_some(topics::ENDINGS.name);
        step.to.iter().map(|route| route.topic.value.as_str()).chain(ended)
    }
}

fn reads(step: &Step, topic: &str) -> bool {
    step.from.iter().any(|from| from.value == topic)
}

/// The records that are the work of a request: those that some operator takes as such.
fn job_records(catalogue: &dyn Catalogue) -> BTreeSet<&'static str> {
    let described = catalogue.names().into_iter().filter_map(|name| catalogue.describe(name));
    described.filter(|description| description.is_job).map(|description| description.input).collect()
}
