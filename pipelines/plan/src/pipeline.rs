//! A pipeline as its file says it: every name with its place, nothing looked up yet.
//!
//! Invariant: what is wrong with the file alone is found here; what is wrong between a file and the operators and
//! topics that it names is found by [`check`](crate::check).

use crate::{
    Ambiguous, Faults, Order, Place, Queueing,
    fields::{self, Fields},
    name,
    yaml::{self, Node},
};
use forebay_schemas::topics::Cleanup;

/// The most steps of a pipeline.
const STEPS_MAX: usize = 256;
/// The most records of a step that may be under way at once.
const IN_FLIGHT_MAX: i64 = 65_536;
/// The most passes through a step.
const VISITS_MAX: i64 = 1_000;
/// The words for whether paid calls are remembered.
const LEDGERS: [(&str, bool); 2] = [("on", true), ("off", false)];
/// The words for what is done about a paid call whose end nobody knows.
const AMBIGUOUS: [(&str, Ambiguous); 2] = [("retry", Ambiguous::Retry), ("park", Ambiguous::Park)];
/// How long records of a pipeline's own topic stay, where it does not say.
pub(crate) const HOURS: u32 = 7 * 24;
/// The longest that they may stay: ten years.
const HOURS_MAX: i64 = 10 * 366 * 24;

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed<T> {
    /// The value.
    pub value: T,
    /// Its place.
    pub place: Place,
}

/// A pipeline, read and not yet checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Pipeline {
    /// The file, as its reader named it.
    pub file: String,
    /// Its name.
    pub name: Placed<String>,
    /// Topics that it declares beside Forebay's.
    pub topics: Vec<OwnTopic>,
    /// Its steps, in the order of the file.
    pub steps: Vec<Step>,
    /// Whether something in the file could not be read, so that the graph may lack what its author wrote.
    pub(crate) partial: bool,
}

/// A topic that a pipeline declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnTopic {
    /// Its name, without the prefix.
    pub name: Placed<String>,
    /// The name of the record that lies on it.
    pub record: Placed<String>,
    /// How it forgets.
    pub cleanup: Cleanup,
    /// Whether clients write to it.
    pub from_clients: bool,
    /// Whether clients read it.
    pub to_clients: bool,
}

/// A step, read and not yet checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its key, unique in the pipeline.
    pub key: Placed<String>,
    /// The operator that it runs.
    pub operator: Placed<String>,
    /// The topics that it reads.
    pub from: Vec<Placed<String>>,
    /// Where each port leads.
    pub to: Vec<Route>,
    /// The compacted topics that it looks things up in.
    pub tables: Vec<Placed<String>>,
    /// How many records may be under way at once.
    pub in_flight: Option<usize>,
    /// How often one record may pass.
    pub visits_max: Option<u32>,
    /// In which order records are done.
    pub order: Order,
    /// How the step deals with a queue that is longer than it can work off, where it says.
    pub queue: Option<Placed<Queueing>>,
    /// Whether its paid calls are remembered, where the file says so.
    pub ledger: Option<Placed<bool>>,
    /// What is done about a paid call whose end nobody knows, where the file says so.
    pub ambiguous: Option<Placed<Ambiguous>>,
    /// The operator's settings.
    pub settings: Settings,
    /// What of it could not be read, so that its absence is no fault of its author.
    pub(crate) unread: Unread,
}

/// Parts of a step in which something could not be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unread {
    pub to: bool,
    pub tables: bool,
    pub settings: bool,
}

/// Where a port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The port.
    pub port: Placed<String>,
    /// The topic.
    pub topic: Placed<String>,
}

/// An operator's settings, which know where each of them stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The settings; an empty object where the file has none.
    pub value: serde_json::Value,
    node: Option<Node>,
    key: Place,
}

impl Settings {
    /// Where the key at the end of this path stands, and its value; the deepest known one where the path leads
    /// nowhere, as it does for a setting that is missing.
    pub(crate) fn find(&self, path: &[String]) -> (Place, Place) {
        let Some(mut node) = self.node.as_ref() else { return (self.key, self.key) };
        let (mut key_place, mut value_place) = (self.key, node.place);
        for part in path {
            let found = match &node.value {
                yaml::Value::Map(entries) => {
                    entries.iter().find(|(key, _)| key.text == *part).map(|(key, value)| (key.place, value))
                }
                yaml::Value::List(items) => {
                    part.parse::<usize>().ok().and_then(|at| items.get(at)).map(|item| (item.place, item))
                }
                _ => None,
            };
            // The key that should hold the missing one says more than the first of its neighbours.
            let Some((key, value)) = found else { return (key_place, key_place) };
            (key_place, value_place, node) = (key, value.place, value);
        }
        (key_place, value_place)
    }
}

/// Reads a pipeline, or tells all that is wrong with its file.
pub fn parse(file: &str, text: &str) -> Result<Pipeline, Faults> {
    let (pipeline, faults) = parse_what_can_be(file, text);
    match pipeline {
        Some(pipeline) => faults.or(pipeline),
        None => Err(faults),
    }
}

/// Reads as much as can be read. Without faults there is a pipeline.
pub(crate) fn parse_what_can_be(file: &str, text: &str) -> (Option<Pipeline>, Faults) {
    let mut faults = Faults::of(file);
    let pipeline = yaml::read(text, &mut faults).and_then(|root| pipeline(file, &root, &mut faults));
    let pipeline = pipeline.map(|pipeline| Pipeline { partial: !faults.is_empty(), ..pipeline });
    (pipeline, faults)
}

fn pipeline(file: &str, root: &Node, faults: &mut Faults) -> Option<Pipeline> {
    let mut fields = Fields::of("a pipeline", root, Place::START, faults)?;
    let name = fields.required("name", faults).and_then(|node| fields::text("\"name\"", node, faults));
    if let Some(name) = &name {
        name::check("pipeline", &name.value, name.place, faults);
    }
    let topics = fields.optional("topics").map(|node| own_topics(node, faults)).unwrap_or_default();
    let steps = fields.required("steps", faults).map(|node| steps(node, faults)).unwrap_or_default();
    fields.end(faults);
    // Without a name its steps can still be checked.
    let name = name.unwrap_or(Placed { value: "pipeline".to_owned(), place: Place::START });
    Some(Pipeline { file: file.to_owned(), name, topics, steps, partial: false })
}

fn own_topics(node: &Node, faults: &mut Faults) -> Vec<OwnTopic> {
    let entries = fields::map("\"topics\"", node, faults).unwrap_or_default();
    let topics = entries.iter().filter_map(|(key, node)| {
        name::check("topic", &key.text, key.place, faults);
        let mut fields = Fields::of(format!("topic {:?}", key.text), node, key.place, faults)?;
        let record =
            fields.required("record", faults).and_then(|node| fields::text("\"record\"", node, faults));
        let words = [("compact", true), ("delete", false)];
        let compact = fields
            .optional("cleanup")
            .and_then(|node| fields::word("\"cleanup\"", node, &words, faults))
            .unwrap_or_default();
        let hours_node = fields.optional("hours");
        let hours = hours_node
            .and_then(|node| fields::integer("\"hours\"", node, 1..=HOURS_MAX, faults))
            .unwrap_or(HOURS);
        if let (true, Some(node)) = (compact, hours_node) {
            faults.add(
                node.place,
                "a compacted topic keeps the youngest record of each key for ever, not for \"hours\"",
            );
        }
        let mut flag = |key: &'static str| {
            fields
                .optional(key)
                .and_then(|node| fields::boolean(&format!("{key:?}"), node, faults))
                .unwrap_or_default()
        };
        let (from_clients, to_clients) = (flag("from_clients"), flag("to_clients"));
        fields.end(faults);
        let cleanup = if compact { Cleanup::Compact } else { Cleanup::Delete { hours } };
        let name = Placed { value: key.text.clone(), place: key.place };
        Some(OwnTopic { name, record: record?, cleanup, from_clients, to_clients })
    });
    topics.collect()
}

fn steps(node: &Node, faults: &mut Faults) -> Vec<Step> {
    let Some(entries) = fields::map("\"steps\"", node, faults) else { return Vec::new() };
    if entries.is_empty() {
        faults.add(node.place, "a pipeline has at least one step");
    }
    if entries.len() > STEPS_MAX {
        faults.add(
            node.place,
            format!("there are {} steps; a pipeline has at most {STEPS_MAX}", entries.len()),
        );
        return Vec::new();
    }
    entries
        .iter()
        .filter_map(|(key, node)| {
            name::check("step", &key.text, key.place, faults);
            step(Placed { value: key.text.clone(), place: key.place }, node, faults)
        })
        .collect()
}

fn step(key: Placed<String>, node: &Node, faults: &mut Faults) -> Option<Step> {
    let mut fields = Fields::of(format!("step {:?}", key.value), node, key.place, faults)?;
    let operator =
        fields.required("operator", faults).and_then(|node| fields::text("\"operator\"", node, faults));
    let from_node = fields.required("from", faults);
    let from = from_node.map(|node| fields::texts("\"from\"", node, faults)).unwrap_or_default();
    if let Some(Node { value: yaml::Value::List(items), place }) = from_node
        && items.is_empty()
    {
        faults.add(*place, format!("step {:?} reads from no topic", key.value));
    }
    let mut unread = Unread::default();
    let told = faults.len();
    let to = fields.optional("to").map(|node| routes(node, faults)).unwrap_or_default();
    unread.to = faults.len() > told;
    let told = faults.len();
    let tables = fields.optional("tables").map(|node| fields::texts("\"tables\"", node, faults));
    let tables = tables.unwrap_or_default();
    unread.tables = faults.len() > told;
    let in_flight = fields
        .optional("in_flight")
        .and_then(|node| fields::integer("\"in_flight\"", node, 1..=IN_FLIGHT_MAX, faults));
    let visits_max = fields
        .optional("visits_max")
        .and_then(|node| fields::integer("\"visits_max\"", node, 1..=VISITS_MAX, faults));
    let orders = [("any", Order::Any), ("key", Order::Key)];
    let order = fields
        .optional("order")
        .and_then(|node| fields::word("\"order\"", node, &orders, faults))
        .unwrap_or_default();
    let queueings = [("fifo", Queueing::Fifo), ("fair", Queueing::Fair)];
    let queue_node = fields.optional("queue");
    let queue = queue_node.and_then(|node| {
        let value = fields::word("\"queue\"", node, &queueings, faults)?;
        Some(Placed { value, place: node.place })
    });
    let placed = |node: &Node| node.place;
    let ledger_node = fields.optional("ledger");
    let ledger = ledger_node.and_then(|node| fields::word("\"ledger\"", node, &LEDGERS, faults));
    let ledger = ledger_node.map(placed).zip(ledger).map(|(place, value)| Placed { value, place });
    let ambiguous_node = fields.optional("ambiguous");
    let ambiguous = ambiguous_node.and_then(|node| fields::word("\"ambiguous\"", node, &AMBIGUOUS, faults));
    let ambiguous = ambiguous_node.map(placed).zip(ambiguous).map(|(place, value)| Placed { value, place });
    let told = faults.len();
    let settings = settings(fields.optional("settings"), key.place, faults);
    unread.settings = faults.len() > told;
    fields.end(faults);
    Some(Step {
        key,
        operator: operator?,
        from,
        to,
        tables,
        in_flight,
        visits_max,
        order,
        queue,
        ledger,
        ambiguous,
        settings,
        unread,
    })
}

fn routes(node: &Node, faults: &mut Faults) -> Vec<Route> {
    let entries = fields::map("\"to\"", node, faults).unwrap_or_default();
    let routes = entries.iter().filter_map(|(key, node)| {
        let topic = fields::text(&format!("port {:?}", key.text), node, faults)?;
        Some(Route { port: Placed { value: key.text.clone(), place: key.place }, topic })
    });
    routes.collect()
}

fn settings(node: Option<&Node>, step: Place, faults: &mut Faults) -> Settings {
    let node = node.filter(|node| fields::map("\"settings\"", node, faults).is_some());
    let value = node.map(|node| node.to_json(faults)).unwrap_or_else(|| serde_json::json!({}));
    Settings { value, node: node.cloned(), key: node.map_or(step, |node| node.place) }
}
