//! Any YAML file as its leaves, each with its path and place: how settings are read.

use crate::{
    Faults, Place, nearest,
    yaml::{self, Node, Value},
};

/// A value that is no map, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The keys that lead to it, joined by dots.
    pub path: String,
    /// The place of the last key.
    pub place: Place,
    /// The value as text; a list is its items joined by commas.
    pub value: String,
}

/// All leaves of a file, in its order. An empty file has none.
pub fn leaves(file: &str, text: &str) -> Result<Vec<Leaf>, Faults> {
    let mut faults = Faults::of(file);
    let mut found = Vec::new();
    let says_nothing = text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'));
    if !says_nothing && let Some(root) = yaml::read(text, &mut faults) {
        walk("", &root, root.place, &mut found, &mut faults);
    }
    faults.or(found)
}

fn walk(path: &str, node: &Node, place: Place, found: &mut Vec<Leaf>, faults: &mut Faults) {
    let value = match &node.value {
        Value::Map(entries) => {
            for (key, value) in entries {
                let path = if path.is_empty() { key.text.clone() } else { format!("{path}.{}", key.text) };
                walk(&path, value, key.place, found, faults);
            }
            return;
        }
        Value::Null => return,
        Value::List(items) => {
            let texts: Option<Vec<String>> = items.iter().map(scalar).collect();
            texts.map(|texts| texts.join(","))
        }
        _ => scalar(node),
    };
    match value {
        Some(value) if !path.is_empty() => found.push(Leaf { path: path.to_owned(), place, value }),
        _ => {
            faults.add(node.place, format!("a map or a plain value is wanted here, not {}", node.describe()))
        }
    }
}

fn scalar(node: &Node) -> Option<String> {
    match &node.value {
        Value::Bool(value) => Some(value.to_string()),
        Value::Integer(value) => Some(value.to_string()),
        Value::Float(value) => Some(value.to_string()),
        Value::Text(value) => Some(value.clone()),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

/// The faults of leaves that a reader could not use: place, what is wrong.
pub fn faults_of(file: &str, wrong: Vec<(Place, String)>) -> Faults {
    let mut faults = Faults::of(file);
    for (place, message) in wrong {
        faults.add(place, message);
    }
    faults
}

/// What to say of a name that is not among the known ones: the nearest, or else the list.
pub fn hint<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest::hint(given, known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_its_leaves_with_their_places() {
        let text = "data: x\nmodel:\n  url: y # here\nkafka: {security.protocol: SSL}\nlist: [a, 2]\n";
        let found = leaves("f", text).unwrap();
        let shown: Vec<_> = found
            .iter()
            .map(|leaf| format!("{}={} {}:{}", leaf.path, leaf.value, leaf.place.line, leaf.place.column))
            .collect();
        assert_eq!(
            shown,
            ["data=x 1:1", "model.url=y 3:3", "kafka.security.protocol=SSL 4:9", "list=a,2 5:1"]
        );
        assert_eq!(leaves("f", "# nothing\n"), Ok(Vec::new()));
        assert!(leaves("f", "- a\n").is_err());
    }
}
