//! YAML 1.2 as a tree in which every key and every value knows its place.
//!
//! Built from the parser's events rather than from its own trees: those keep only one of two equal keys, and let
//! a few lines of aliases grow to gigabytes.
//!
//! Invariant: the tree is bounded in depth, nodes and text, aliases counted as often as they are used; so all
//! that walks it may recurse.

use crate::{Faults, Place};
use saphyr::Scalar;
use saphyr_parser::{Event, Marker, Parser, ScalarStyle};
use std::collections::BTreeMap;

/// The largest file.
pub const FILE_BYTES_MAX: usize = 1024 * 1024;
/// The deepest nesting.
pub const DEPTH_MAX: usize = 64;
/// The most values in one file, those behind aliases counted at each use.
pub const NODES_MAX: usize = 50_000;
/// The most text in one file, counted alike.
const TEXT_BYTES_MAX: usize = 4 * FILE_BYTES_MAX;

/// A value and its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub place: Place,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key and its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Key {
    pub place: Place,
    pub text: String,
}

impl Node {
    /// What stands here, for a message that says what was wanted instead.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("the boolean {value}"),
            Value::Integer(value) => format!("the number {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Text(value) if value.chars().count() > 40 => "a long text".to_owned(),
            Value::Text(value) => format!("the text {value:?}"),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        }
    }

    /// The same as JSON, which has no place to keep places and no infinite numbers.
    pub fn to_json(&self, faults: &mut Faults) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Float(value) if value.is_finite() => (*value).into(),
            Value::Float(value) => {
                faults.add(self.place, format!("the number {value} cannot be written in JSON"));
                serde_json::Value::Null
            }
            Value::Text(value) => value.clone().into(),
            Value::List(items) => items.iter().map(|item| item.to_json(faults)).collect(),
            Value::Map(entries) => {
                entries.iter().map(|(key, value)| (key.text.clone(), value.to_json(faults))).collect()
            }
        }
    }

    fn size(&self) -> Size {
        let inner = |nodes: &mut dyn Iterator<Item = Size>| {
            nodes.fold(Size { depth: 0, nodes: 0, text: 0 }, |sum, size| Size {
                depth: sum.depth.max(size.depth),
                nodes: sum.nodes + size.nodes,
                text: sum.text + size.text,
            })
        };
        let Size { depth, nodes, text } = match &self.value {
            Value::Text(text) => Size { depth: 0, nodes: 0, text: text.len() },
            Value::List(items) => inner(&mut items.iter().map(Self::size)),
            Value::Map(entries) => inner(&mut entries.iter().map(|(key, value)| {
                let size = value.size();
                Size { text: size.text + key.text.len(), ..size }
            })),
            _ => Size { depth: 0, nodes: 0, text: 0 },
        };
        Size { depth: depth + 1, nodes: nodes + 1, text }
    }
}

/// What a node costs.
struct Size {
    depth: usize,
    nodes: usize,
    text: usize,
}

/// The text of a file, or the fault that says where it stops being one.
pub fn utf8<'a>(file: &str, bytes: &'a [u8]) -> Result<&'a str, Faults> {
    let error = match std::str::from_utf8(bytes) {
        Ok(text) => return Ok(text),
        Err(error) => error,
    };
    let before = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    let byte = bytes.get(error.valid_up_to()).copied().unwrap_or_default();
    let mut faults = Faults::of(file);
    let message = format!("the byte 0x{byte:02x} is not UTF-8");
    faults.add_with_hint(Place { line, column }, message, "save the file as UTF-8");
    Err(faults)
}

/// The one document of a file; `None` where there is none to speak of, and then there are faults.
pub(crate) fn read(text: &str, faults: &mut Faults) -> Option<Node> {
    if text.len() > FILE_BYTES_MAX {
        let message = format!("the file has {} bytes; at most {FILE_BYTES_MAX} are read", text.len());
        faults.add(Place::START, message);
        return None;
    }
    let mut tree = Tree::default();
    let mut parser = Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    while let Some(event) = parser.next_event() {
        let stop = match event {
            Ok((event, span)) => tree.take(event, place(span.start), faults),
            Err(error) => {
                let hint = error.info().contains("tab").then(|| "indent with spaces".to_owned());
                faults.push(place(*error.marker()), format!("this is not YAML: {}", error.info()), hint);
                Err(Stop)
            }
        };
        if stop.is_err() {
            return None;
        }
    }
    if tree.root.is_none() {
        faults.add(Place::START, "the file is empty");
    }
    tree.root
}

fn place(marker: Marker) -> Place {
    Place { line: marker.line().max(1), column: marker.col() + 1 }
}

/// The fault is told; nothing behind it can be read.
struct Stop;

/// A list or a map whose end has not come.
enum Open {
    List(Vec<Node>),
    Map { entries: Vec<(Key, Node)>, lines: BTreeMap<String, usize>, key: Option<Result<Key, Place>> },
}

#[derive(Default)]
struct Tree {
    root: Option<Node>,
    open: Vec<(Place, usize, Open)>,
    anchored: BTreeMap<usize, Node>,
    nodes: usize,
    text: usize,
}

impl Tree {
    fn take(&mut self, event: Event<'_>, place: Place, faults: &mut Faults) -> Result<(), Stop> {
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                faults.add(place, "a second document starts here; a file holds one");
                Err(Stop)
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => Ok(()),
            Event::Scalar(text, style, anchor, tag) => {
                // Nothing stands at its key, for a reader: the parser would point behind the next line break.
                let place = match self.open.last() {
                    Some((_, _, Open::Map { key: Some(Ok(key)), .. }))
                        if text.is_empty() && style == ScalarStyle::Plain =>
                    {
                        key.place
                    }
                    _ => place,
                };
                let shown = tag.as_ref().map(ToString::to_string).unwrap_or_default();
                let value = match Scalar::parse_from_cow_and_metadata(text, style, tag.as_ref()) {
                    Some(Scalar::Null) => Value::Null,
                    Some(Scalar::Boolean(value)) => Value::Bool(value),
                    Some(Scalar::Integer(value)) => Value::Integer(value),
                    Some(Scalar::FloatingPoint(value)) => Value::Float(value.into_inner()),
                    Some(Scalar::String(value)) => Value::Text(value.into_owned()),
                    None => {
                        faults.add(place, format!("the tag {shown} does not fit this value"));
                        Value::Null
                    }
                };
                self.place_node(Node { place, value }, anchor, faults)
            }
            Event::SequenceStart(anchor, _) => self.start(place, anchor, Open::List(Vec::new()), faults),
            Event::MappingStart(anchor, _) => self.start(
                place,
                anchor,
                Open::Map { entries: Vec::new(), lines: BTreeMap::new(), key: None },
                faults,
            ),
            Event::SequenceEnd | Event::MappingEnd => {
                let Some((place, anchor, open)) = self.open.pop() else { return Ok(()) };
                let value = match open {
                    Open::List(items) => Value::List(items),
                    Open::Map { entries, .. } => Value::Map(entries),
                };
                self.place_node(Node { place, value }, anchor, faults)
            }
            Event::Alias(anchor) => {
                let Some(node) = self.anchored.get(&anchor) else {
                    faults.add(place, "this alias lies inside the value that it stands for");
                    return Err(Stop);
                };
                // Counted before it is copied, and once more as one node where it is placed.
                let size = node.size();
                self.bound(place, &size, faults)?;
                let node = node.clone();
                (self.nodes, self.text) = (self.nodes + size.nodes, self.text + size.text);
                self.place_node(node, 0, faults)
            }
        }
    }

    fn start(&mut self, place: Place, anchor: usize, open: Open, faults: &mut Faults) -> Result<(), Stop> {
        self.bound(place, &Size { depth: 1, nodes: 1, text: 0 }, faults)?;
        self.open.push((place, anchor, open));
        Ok(())
    }

    /// Refuses what would make the tree too large.
    fn bound(&self, place: Place, more: &Size, faults: &mut Faults) -> Result<(), Stop> {
        let what = if self.open.len() + more.depth > DEPTH_MAX {
            format!("values are nested more than {DEPTH_MAX} deep")
        } else if self.nodes + more.nodes > NODES_MAX {
            format!("there are more than {NODES_MAX} values, those behind aliases counted at each use")
        } else if self.text + more.text > TEXT_BYTES_MAX {
            format!(
                "there are more than {TEXT_BYTES_MAX} bytes of text, that behind aliases counted at each use"
            )
        } else {
            return Ok(());
        };
        faults.add(place, what);
        Err(Stop)
    }

    fn place_node(&mut self, node: Node, anchor: usize, faults: &mut Faults) -> Result<(), Stop> {
        let text = if let Value::Text(text) = &node.value { text.len() } else { 0 };
        self.bound(node.place, &Size { depth: 0, nodes: 1, text }, faults)?;
        (self.nodes, self.text) = (self.nodes + 1, self.text + text);
        if anchor > 0 {
            // The copy that aliases will be made of; counted, since anchors may lie within anchors.
            let size = node.size();
            self.bound(node.place, &Size { depth: 0, ..size }, faults)?;
            (self.nodes, self.text) = (self.nodes + size.nodes, self.text + size.text);
            self.anchored.insert(anchor, node.clone());
        }
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some((_, _, Open::List(items))) => items.push(node),
            Some((_, _, Open::Map { entries, lines, key })) => match key.take() {
                None => *key = Some(as_key(node, faults)),
                Some(Ok(key)) => {
                    if let Some(first) = lines.get(&key.text) {
                        let message = format!("the key {:?} stands here a second time", key.text);
                        faults.add_with_hint(key.place, message, format!("the first is in line {first}"));
                    } else {
                        lines.insert(key.text.clone(), key.place.line);
                        entries.push((key, node));
                    }
                }
                // Its key was no key; that is told.
                Some(Err(_)) => {}
            },
        }
        Ok(())
    }
}

fn as_key(node: Node, faults: &mut Faults) -> Result<Key, Place> {
    if let Value::Text(text) = node.value {
        return Ok(Key { place: node.place, text });
    }
    let message = format!("a key must be text, not {}", node.describe());
    match node.value {
        Value::Bool(_) | Value::Integer(_) | Value::Float(_) => {
            faults.add_with_hint(node.place, message, "put it in quotes");
        }
        _ => faults.add(node.place, message),
    }
    Err(node.place)
}
