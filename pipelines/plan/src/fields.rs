//! Reads typed values out of a map, and says what was wanted where something else stands.
//!
//! Invariant: a key is known because some code asked for it; there is no list of keys to keep beside the reader.

use crate::{
    Faults, Place, nearest,
    pipeline::Placed,
    yaml::{Key, Node, Value},
};
use std::ops::RangeInclusive;

/// A map whose keys are being asked for.
pub(crate) struct Fields<'a> {
    /// Whose map it is, such as `step "infer"`.
    of: String,
    place: Place,
    entries: &'a [(Key, Node)],
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The fields of a map; whatever else stands there is a fault.
    pub fn of(of: impl Into<String>, node: &'a Node, place: Place, faults: &mut Faults) -> Option<Self> {
        let of = of.into();
        let entries = map(&of, node, faults)?;
        Some(Self { of, place, entries, known: Vec::new() })
    }

    /// The value of a key that may be absent.
    pub fn optional(&mut self, key: &'static str) -> Option<&'a Node> {
        self.known.push(key);
        self.entries.iter().find(|(other, _)| other.text == key).map(|(_, node)| node)
    }

    /// The value of a key that must be there.
    pub fn required(&mut self, key: &'static str, faults: &mut Faults) -> Option<&'a Node> {
        let node = self.optional(key);
        if node.is_none() {
            // A misspelt key is told once, by the hint of `end`.
            let misspelt =
                self.entries.iter().any(|(other, _)| nearest::nearest(&other.text, [key]).is_some());
            if !misspelt {
                faults.add(self.place, format!("{} has no key {key:?}", self.of));
            }
        }
        node
    }

    /// Nothing more will be asked: all other keys are faults.
    pub fn end(self, faults: &mut Faults) {
        for (key, _) in self.entries {
            if !self.known.contains(&key.text.as_str()) {
                let free = self.known.iter().copied().filter(|known| {
                    // What is there already was not meant.
                    !self.entries.iter().any(|(other, _)| other.text == *known)
                });
                let hint = nearest::nearest(&key.text, free)
                    .map(|name| format!("did you mean {name:?}?"))
                    .unwrap_or_else(|| format!("known: {}", nearest::list(self.known.iter().copied())));
                faults.add_with_hint(key.place, format!("unknown key {:?} in {}", key.text, self.of), hint);
            }
        }
    }
}

fn wanted(what: &str, wanted: &str, node: &Node, faults: &mut Faults) {
    faults.add(node.place, format!("{what} wants {wanted}, not {}", node.describe()));
}

/// The entries of a map.
pub(crate) fn map<'a>(what: &str, node: &'a Node, faults: &mut Faults) -> Option<&'a [(Key, Node)]> {
    let Value::Map(entries) = &node.value else {
        wanted(what, "a map", node, faults);
        return None;
    };
    Some(entries)
}

/// The items of a list.
pub(crate) fn list<'a>(what: &str, node: &'a Node, faults: &mut Faults) -> Option<&'a [Node]> {
    let Value::List(items) = &node.value else {
        wanted(what, "a list", node, faults);
        return None;
    };
    Some(items)
}

/// A text. A number or a boolean without quotes is none, though it may look like one.
pub(crate) fn text(what: &str, node: &Node, faults: &mut Faults) -> Option<Placed<String>> {
    let Value::Text(text) = &node.value else {
        match node.value {
            Value::Bool(_) | Value::Integer(_) | Value::Float(_) => faults.add_with_hint(
                node.place,
                format!("{what} wants a text, not {}", node.describe()),
                "put it in quotes if it is meant",
            ),
            _ => wanted(what, "a text", node, faults),
        }
        return None;
    };
    Some(Placed { value: text.clone(), place: node.place })
}

/// One text, or a list of them.
pub(crate) fn texts(what: &str, node: &Node, faults: &mut Faults) -> Vec<Placed<String>> {
    match &node.value {
        Value::List(items) => items.iter().filter_map(|item| text(what, item, faults)).collect(),
        Value::Text(_) => text(what, node, faults).into_iter().collect(),
        _ => {
            wanted(what, "a text or a list of texts", node, faults);
            Vec::new()
        }
    }
}

/// A boolean.
pub(crate) fn boolean(what: &str, node: &Node, faults: &mut Faults) -> Option<bool> {
    let Value::Bool(value) = node.value else {
        wanted(what, "true or false", node, faults);
        return None;
    };
    Some(value)
}

/// A whole number within bounds.
pub(crate) fn integer<N: TryFrom<i64>>(
    what: &str,
    node: &Node,
    bounds: RangeInclusive<i64>,
    faults: &mut Faults,
) -> Option<N> {
    if let Value::Integer(value) = node.value
        && bounds.contains(&value)
        && let Ok(value) = N::try_from(value)
    {
        return Some(value);
    }
    let range = format!("a whole number from {} to {}", bounds.start(), bounds.end());
    wanted(what, &range, node, faults);
    None
}

/// One of a few words.
pub(crate) fn word<T: Copy>(
    what: &str,
    node: &Node,
    words: &[(&'static str, T)],
    faults: &mut Faults,
) -> Option<T> {
    let names = || words.iter().map(|(word, _)| *word);
    let Value::Text(given) = &node.value else {
        wanted(what, &format!("one of {}", nearest::list(names())), node, faults);
        return None;
    };
    let found = words.iter().find(|(word, _)| word == given).map(|(_, value)| *value);
    if found.is_none() {
        let hint = nearest::hint(given, names());
        faults.push(node.place, format!("{what} cannot be {given:?}"), hint);
    }
    found
}
