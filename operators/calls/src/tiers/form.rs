//! Whether an answer has the form that its request asked for by `response_format`.
//!
//! Of JSON Schema the keywords that servers take in structured outputs are looked at; any other refuses nothing, so an
//! answer is never called wrong for what is not understood here.
//!
//! Invariant: an answer without a wanted form has it, and no schema, however it refers to itself, is followed for long: it
//! comes from the client.

use serde_json::{Map, Value};
use std::cell::Cell;

/// How deep a schema is followed; JSON itself is read to 128 levels.
const DEPTH_MAX: usize = 128;
/// How many schemas are laid beside an answer's values. What is beyond counts as met.
const STEPS_MAX: u32 = 100_000;

/// Whether the text is in this form.
pub(super) fn has_form(text: &str, response_format: Option<&Value>) -> bool {
    let Some(format) = response_format else { return true };
    match format.get("type").and_then(Value::as_str) {
        Some("json_object") => matches!(serde_json::from_str(text), Ok(Value::Object(_))),
        Some("json_schema") => {
            let Ok(value) = serde_json::from_str(text) else { return false };
            format
                .pointer("/json_schema/schema")
                .is_none_or(|root| Schema { root, steps: Cell::new(0) }.allows(root, &value, 0))
        }
        _ => true,
    }
}

struct Schema<'a> {
    root: &'a Value,
    steps: Cell<u32>,
}

impl Schema<'_> {
    fn allows(&self, schema: &Value, value: &Value, depth: usize) -> bool {
        let Value::Object(rules) = schema else { return *schema != Value::Bool(false) };
        self.steps.set(self.steps.get() + 1);
        if depth > DEPTH_MAX || self.steps.get() > STEPS_MAX {
            return true;
        }
        rules.iter().all(|(keyword, rule)| self.keyword(rules, keyword, rule, value, depth + 1))
    }

    fn keyword(
        &self,
        rules: &Map<String, Value>,
        keyword: &str,
        rule: &Value,
        value: &Value,
        depth: usize,
    ) -> bool {
        let allows = |schema: &Value, value: &Value| self.allows(schema, value, depth);
        let some = |rule: &Value| {
            rule.as_array().map(|schemas| schemas.iter().filter(|schema| allows(schema, value)).count())
        };
        match (keyword, value) {
            ("$ref", _) => rule
                .as_str()
                .and_then(|name| self.root.pointer(name.strip_prefix('#')?))
                .is_none_or(|schema| allows(schema, value)),
            ("type", _) => match rule {
                Value::Array(kinds) => kinds.iter().any(|kind| is_a(value, kind)),
                kind => is_a(value, kind),
            },
            ("enum", _) => rule.as_array().is_none_or(|known| known.contains(value)),
            ("const", _) => rule == value,
            ("anyOf", _) => some(rule).is_none_or(|count| count > 0),
            ("oneOf", _) => some(rule).is_none_or(|count| count == 1),
            ("allOf", _) => rule.as_array().is_none_or(|all| all.iter().all(|schema| allows(schema, value))),
            ("required", Value::Object(fields)) => rule.as_array().is_none_or(|names| {
                names.iter().filter_map(Value::as_str).all(|name| fields.contains_key(name))
            }),
            ("properties", Value::Object(fields)) => rule.as_object().is_none_or(|known| {
                known.iter().all(|(name, schema)| fields.get(name).is_none_or(|value| allows(schema, value)))
            }),
            ("additionalProperties", Value::Object(fields)) => {
                let known = rules.get("properties").and_then(Value::as_object);
                let mut others =
                    fields.iter().filter(|(name, _)| known.is_none_or(|known| !known.contains_key(*name)));
                others.all(|(_, value)| allows(rule, value))
            }
            ("items", Value::Array(items)) => items.iter().all(|item| allows(rule, item)),
            ("minItems", Value::Array(items)) => {
                rule.as_u64().is_none_or(|least| count(items.len()) >= least)
            }
            ("maxItems", Value::Array(items)) => rule.as_u64().is_none_or(|most| count(items.len()) <= most),
            ("minLength", Value::String(text)) => {
                rule.as_u64().is_none_or(|least| count(text.chars().count()) >= least)
            }
            ("maxLength", Value::String(text)) => {
                rule.as_u64().is_none_or(|most| count(text.chars().count()) <= most)
            }
            ("minimum", Value::Number(number)) => {
                number.as_f64().zip(rule.as_f64()).is_none_or(|(number, least)| number >= least)
            }
            ("maximum", Value::Number(number)) => {
                number.as_f64().zip(rule.as_f64()).is_none_or(|(number, most)| number <= most)
            }
            _ => true,
        }
    }
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

fn is_a(value: &Value, kind: &Value) -> bool {
    match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        Some("number") => value.is_number(),
        // 1.0 is an integer to JSON Schema.
        Some("integer") => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(schema: Value, text: &str, expected: bool) {
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        assert_eq!(has_form(text, Some(&format)), expected, "{schema} {text}");
    }

    #[test]
    fn a_schema_is_met_or_not() {
        let person = json!({
            "type": "object", "required": ["name"], "additionalProperties": false,
            "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": ["integer", "null"], "minimum": 0}}
        });
        for (text, expected) in [
            (r#"{"name": "a", "age": 3}"#, true),
            (r#"{"name": "a", "age": 3.0}"#, true),
            (r#"{"name": "a", "age": null}"#, true),
            (r#"{"name": "a", "age": 3.5}"#, false),
            (r#"{"name": "a", "age": -1}"#, false),
            (r#"{"name": ""}"#, false),
            (r#"{"age": 3}"#, false),
            (r#"{"name": "a", "x": 1}"#, false),
            (r#"[{"name": "a"}]"#, false),
            ("```json\n{\"name\": \"a\"}\n```", false),
            ("Sure! {\"name\": \"a\"}", false),
        ] {
            check(person.clone(), text, expected);
        }
        let list = json!({"type": "array", "items": {"enum": ["a", 1]}, "minItems": 1, "maxItems": 2});
        for (text, expected) in [("[\"a\", 1]", true), ("[]", false), ("[1, 1, 1]", false), ("[2]", false)] {
            check(list.clone(), text, expected);
        }
        check(json!({"anyOf": [{"type": "string"}, {"const": 2}]}), "2", true);
        check(json!({"anyOf": [{"type": "string"}, {"const": 2}]}), "3", false);
        check(json!({"oneOf": [{"type": "number"}, {"const": 2}]}), "2", false);
        check(json!({"allOf": [{"type": "number"}, {"maximum": 2}]}), "3", false);
        check(json!({"additionalProperties": {"type": "string"}}), r#"{"a": 1}"#, false);
    }

    #[test]
    fn a_schema_may_refer_to_itself_and_what_is_unknown_refuses_nothing() {
        let tree = json!({
            "$ref": "#/$defs/node",
            "$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}
        });
        check(tree.clone(), r#"{"next": {"next": null}}"#, true);
        check(tree, r#"{"next": {"next": 3}}"#, false);
        check(json!({"$ref": "#"}), "1", true);
        check(json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}), "1", true);
        check(json!({"$ref": "#/nowhere", "dependentRequired": {"a": ["b"]}}), "1", true);
        check(json!(false), "1", false);
    }

    #[test]
    fn an_object_is_one_and_text_is_any() {
        let object = json!({"type": "json_object"});
        assert!(has_form(" {\"a\": 1} ", Some(&object)));
        assert!(!has_form("[1]", Some(&object)) && !has_form("{\"a\": 1", Some(&object)));
        assert!(has_form("anything", Some(&json!({"type": "text"}))) && has_form("anything", None));
    }
}
