//! Draws a plan: for a terminal, and as a Mermaid flowchart for a page.
//!
//! Invariant: both show every step and every way between steps, the implicit port `ended` included. Dead letters,
//! which any step may make, are no way onward and are not drawn.

use crate::{Ambiguous, ENDED, Order, Plan, PlannedStep, PlannedTopic, Queueing};
use forebay_schemas::topics::{self, Cleanup};
use std::fmt::Write as _;

/// The graph, for a terminal: one paragraph a step, and then the topics.
pub fn text(plan: &Plan) -> String {
    let mut out = format!("{}\n", plan.name);
    let port_width = width(plan.steps.iter().flat_map(|step| ways_out(step).map(|(port, _)| port)));
    let topic_width = width(plan.steps.iter().flat_map(|step| ways_out(step).map(|(_, topic)| topic)));
    for step in &plan.steps {
        let from = step.from.join(", ");
        let _ = write!(out, "\n{from} ─▶ {}  ({})\n", step.key, traits(step).join(", "));
        if !step.tables.is_empty() {
            let _ = writeln!(out, "  ┊  looks up in {}", step.tables.join(", "));
        }
        let ways: Vec<_> = ways_out(step).collect();
        for (at, (port, topic)) in ways.iter().enumerate() {
            let corner = if at + 1 == ways.len() { '└' } else { '├' };
            let line = if *port == ENDED { '┄' } else { '─' };
            let readers = readers(plan, topic);
            let line = format!("  {corner}{line} {port:port_width$} {line}▶ {topic:topic_width$}  {readers}");
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
    let all = plan.named_topics();
    out.push_str("\ntopics\n");
    let name_width = width(all.iter().map(|topic| topic.name.as_str()));
    let record_width = width(all.iter().map(|topic| topic.record.as_str()));
    for topic in &all {
        let PlannedTopic { name, record, .. } = topic;
        let line =
            format!("  {name:name_width$}  {record:record_width$}  {:9}  {}", kept(topic), clients(topic));
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// The graph as a Mermaid flowchart: steps are boxes, topics rounded; dotted are the ways that a pipeline does not
/// spell, and lookups.
pub fn mermaid(plan: &Plan) -> String {
    let topics = plan.named_topics();
    // Numbers, since a name may be a word of Mermaid's own, such as `end`.
    let topic_id = |name: &str| topics.iter().position(|topic| topic.name == name).unwrap_or_default();
    let mut out = String::from("flowchart LR\n");
    for (at, topic) in topics.iter().enumerate() {
        if shown(plan, &topic.name) {
            let _ = writeln!(out, "  t{at}([\"{}\"])", topic.name);
        }
    }
    for (at, step) in plan.steps.iter().enumerate() {
        let name = if step.key == step.operator {
            step.key.clone()
        } else {
            format!("{}<br/><i>{}</i>", step.key, step.operator)
        };
        let _ = writeln!(out, "  s{at}[\"{name}\"]");
        for from in &step.from {
            let _ = writeln!(out, "  t{} --> s{at}", topic_id(from));
        }
        for table in &step.tables {
            let _ = writeln!(out, "  t{} -.-o s{at}", topic_id(table));
        }
        for (port, topic) in ways_out(step) {
            let arrow = if port == ENDED { "-.->" } else { "-->" };
            let _ = writeln!(out, "  s{at} {arrow}|{port}| t{}", topic_id(topic));
        }
    }
    out
}

/// Whether a step has to do with a topic. Those of the host alone would lie beside the graph.
fn shown(plan: &Plan, topic: &str) -> bool {
    plan.steps.iter().any(|step| {
        let inputs = step.from.iter().chain(&step.tables).map(String::as_str);
        inputs.chain(ways_out(step).map(|(_, topic)| topic)).any(|name| name == topic)
    })
}

/// All ports of a step and where they lead. Only the work of a request ends.
fn ways_out(step: &PlannedStep) -> impl Iterator<Item = (&str, &str)> {
    let ended = step.is_job.then_some((ENDED, topics::ENDINGS.name));
    step.to.iter().map(|(port, topic)| (port.as_str(), topic.as_str())).chain(ended)
}

fn traits(step: &PlannedStep) -> Vec<String> {
    let mut traits = vec![step.operator.clone(), format!("{} in flight", step.in_flight)];
    if step.order == Order::Key {
        traits.push("in order of each key".to_owned());
    }
    if step.is_job && step.queue == Queueing::Fifo {
        traits.push("first come, first served".to_owned());
    }
    match step.ledger {
        Some(Ambiguous::Retry) => traits.push("paid calls in a ledger".to_owned()),
        Some(Ambiguous::Park) => traits.push("paid calls in a ledger, ambiguous ones parked".to_owned()),
        None => {}
    }
    if let Some(visits) = step.visits_max {
        traits.push(format!("at most {visits} visits"));
    }
    traits
}

fn readers(plan: &Plan, topic: &str) -> String {
    let steps: Vec<&str> = plan.readers(topic).map(|step| step.key.as_str()).collect();
    if steps.is_empty() { String::new() } else { format!("─▶ {}", steps.join(", ")) }
}

fn kept(topic: &PlannedTopic) -> String {
    match topic.cleanup {
        Cleanup::Compact | Cleanup::CompactAfter { .. } => "compacted".to_owned(),
        Cleanup::Delete { hours } if hours % 24 == 0 => format!("{} d", hours / 24),
        Cleanup::Delete { hours } => format!("{hours} h"),
    }
}

fn clients(topic: &PlannedTopic) -> &'static str {
    match (topic.from_clients, topic.to_clients) {
        (true, true) => "written and read by clients",
        (true, false) => "written by clients",
        (false, true) => "read by clients",
        (false, false) => "",
    }
}

fn width<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    names.map(|name| name.chars().count()).max().unwrap_or_default()
}
