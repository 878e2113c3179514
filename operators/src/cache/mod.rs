//! What `cache_lookup`, `infer` and `fill_cache` must agree on: which requests the cache serves, and under which key.
//!
//! Invariant: two requests share a key only if nothing that shapes an answer tells them apart: whose they are, what
//! was said before, how the model samples, which model and settings this pipeline has, and the question itself.

mod table;

pub use table::CacheTable;

use crate::text::canonical;
use forebay_schemas::{CacheStatus, Content, Message, Request, Role, Tenant};
use serde_json::{Map, Value, json};

/// The version of what the key covers and how. Raised when either changes: old entries are then never found.
const KEY_CONTEXT: &str = "forebay answer cache key v1";

/// A request that asks for more randomness wants another answer each time. Absent counts as 0: it is the provider's
/// default, and whoever minds it says so.
pub(crate) const TEMPERATURE_MAX: f64 = 0.5;

/// Where the entry of this key lies in the key-value store.
pub(crate) fn entry_key(key: &str) -> String {
    format!("entry/{key}")
}

/// What shapes all answers of a pipeline alike. Made by [`catalogue::shape`](crate::catalogue::shape).
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub(crate) fingerprint: String,
    pub(crate) temperature_max: f64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { fingerprint: String::new(), temperature_max: TEMPERATURE_MAX }
    }
}

impl Shape {
    /// Whether an answer to this request may be kept and given again.
    pub(crate) fn is_cacheable(&self, request: &Request) -> bool {
        let sampling = &request.sampling;
        let has_tools =
            sampling.tools.as_ref().is_some_and(|tools| tools.as_array().is_none_or(|t| !t.is_empty()));
        let is_steady = sampling.temperature.is_none_or(|temperature| temperature <= self.temperature_max);
        is_steady && !has_tools && !request.question().trim().is_empty()
    }

    /// Whether the cache is looked into for this request.
    pub(crate) fn is_looked_up(&self, request: &Request) -> bool {
        self.is_cacheable(request) && !request.cache.unwrap_or_default().no_cache
    }

    /// How the cache took part in an answer that did not come from it.
    pub(crate) fn status_without_hit(&self, request: &Request) -> CacheStatus {
        if self.is_looked_up(request) { CacheStatus::Miss } else { CacheStatus::Bypass }
    }

    /// The key of the answer to this request: a hash of all that shapes it, and one of the question.
    pub(crate) fn key(&self, request: &Request, tenant: &Tenant) -> String {
        let mut scope = blake3::Hasher::new_derive_key(KEY_CONTEXT);
        text(&mut scope, tenant.as_str());
        text(&mut scope, &self.fingerprint);
        json(&mut scope, &shaping(request));
        let question = blake3::hash(canonical(&request.question()).as_bytes());
        format!("{}/{}", scope.finalize().to_hex(), question.to_hex())
    }
}

/// All of a request that shapes its answer, without the question. What is left out (`id`, `deadline_ms`, `metadata`,
/// `stream`, `cache`, `tenant`, `key_id`, `job`) is named here, so that a new field shapes until somebody says otherwise.
fn shaping(request: &Request) -> Value {
    let Request {
        id: _,
        tenant: _,
        key_id: _,
        job: _,
        deadline_ms: _,
        metadata: _,
        stream: _,
        cache: _,
        prompt: _,
        messages: _,
        model,
        conversation,
        sampling,
        unknown,
    } = request;
    json!({
        "messages": history(request),
        "model": model,
        "conversation": conversation,
        "sampling": sampling,
        "unknown": unknown,
    })
}

/// The conversation with a gap where the question stands, which has a hash of its own.
fn history(request: &Request) -> Vec<Message> {
    let mut messages = messages(request);
    if let Some(last) = messages.iter_mut().rfind(|message| message.role == Role::User) {
        match &mut last.content {
            Some(Content::Parts(parts)) => {
                for text in parts.iter_mut().filter_map(|part| part.get_mut("text")) {
                    *text = Value::Null;
                }
            }
            content => *content = None,
        }
    }
    messages
}

/// The request as a conversation: a prompt is a conversation of one turn.
pub(crate) fn messages(request: &Request) -> Vec<Message> {
    match (&request.prompt, &request.messages) {
        (Some(prompt), _) => {
            let content = Some(Content::Text(prompt.clone()));
            vec![Message { role: Role::User, content, rest: Map::new() }]
        }
        (None, messages) => messages.clone().unwrap_or_default(),
    }
}

/// Hashes a text with its length before it, or "a" and "bc" would read like "ab" and "c".
fn text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_be_bytes());
    hasher.update(text.as_bytes());
}

/// Hashes JSON by what it says: the order of an object's members says nothing.
fn json(hasher: &mut blake3::Hasher, value: &Value) {
    match value {
        Value::Null => _ = hasher.update(b"z"),
        Value::Bool(value) => _ = hasher.update(if *value { b"t" } else { b"f" }),
        Value::Number(number) => {
            hasher.update(b"n");
            text(hasher, &number.to_string());
        }
        Value::String(string) => {
            hasher.update(b"s");
            text(hasher, string);
        }
        Value::Array(items) => {
            hasher.update(b"a");
            hasher.update(&(items.len() as u64).to_be_bytes());
            items.iter().for_each(|item| json(hasher, item));
        }
        Value::Object(members) => {
            hasher.update(b"o");
            hasher.update(&(members.len() as u64).to_be_bytes());
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| *name);
            for (name, value) in members {
                text(hasher, name);
                json(hasher, value);
            }
        }
    }
}

/// A fingerprint of settings, for [`Shape`].
pub(crate) fn fingerprint(value: &Value) -> String {
    let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
    json(&mut hasher, value);
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::Record as _;
    use proptest::prelude::*;

    fn request(body: &Value) -> Request {
        Request::decode(body.to_string().as_bytes()).unwrap()
    }

    fn key(body: &Value) -> String {
        Shape::default().key(&request(body), &Tenant::default())
    }

    /// A request with the usual fields, one of them changed.
    fn varied(field: &str, value: Value) -> Value {
        let mut body = json!({
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
                {"role": "user", "content": "what is lag?"},
            ],
            "model": "m", "conversation": "c", "temperature": 0.1, "top_p": 0.9, "max_tokens": 100,
            "max_completion_tokens": 100, "stop": "x", "seed": 1, "frequency_penalty": 0.1,
            "presence_penalty": 0.1, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none",
            "top_k": 40,
        });
        let place = match field.starts_with('/') {
            true => body.pointer_mut(field).unwrap(),
            false => &mut body[field],
        };
        *place = value;
        body
    }

    #[test]
    fn all_that_shapes_an_answer_is_in_the_key() {
        let usual = key(&varied("model", json!("m")));
        let fields = [
            "model",
            "conversation",
            "temperature",
            "top_p",
            "max_tokens",
            "max_completion_tokens",
            "stop",
            "seed",
            "frequency_penalty",
            "presence_penalty",
            "response_format",
            "tools",
            "tool_choice",
            "top_k",
            "new_field",
            "/messages/0/content",
            "/messages/1/content",
            "/messages/2/content",
            "/messages/3/content",
        ];
        for field in fields {
            let value = match field {
                "model" | "conversation" => json!("other"),
                "response_format" | "tools" | "tool_choice" | "stop" => json!(["other"]),
                _ if field.starts_with('/') => json!("other"),
                _ => json!(2),
            };
            assert_ne!(usual, key(&varied(field, value)), "{field}");
        }
        assert_ne!(usual, key(&varied("/messages/0/role", json!("user"))));
        let other_tenant = Tenant::try_from("other".to_owned()).unwrap();
        let body = request(&varied("model", json!("m")));
        assert_ne!(usual, Shape::default().key(&body, &other_tenant));
        let shape = Shape { fingerprint: "other".to_owned(), ..Shape::default() };
        assert_ne!(usual, shape.key(&body, &Tenant::default()));
    }

    #[test]
    fn what_shapes_nothing_is_not_in_the_key() {
        let usual = key(&json!({"prompt": "what is lag?"}));
        for same in [
            json!({"prompt": "  what  is\nlag? "}),
            json!({"prompt": "what is lag？"}),
            json!({"messages": [{"role": "user", "content": "what is lag?"}]}),
            json!({"prompt": "what is lag?", "id": "1", "deadline_ms": 5, "stream": true, "metadata": {"a": 1},
                "cache": {"max_age_s": 5}}),
        ] {
            assert_eq!(usual, key(&same), "{same}");
        }
        assert_ne!(usual, key(&json!({"prompt": "what is Lag?"})));
    }

    #[test]
    fn a_picture_beside_the_question_is_in_the_key() {
        let part = |url: &str| {
            let picture = json!({"type": "image_url", "image_url": {"url": url}});
            let parts = json!([{"type": "text", "text": "what is this?"}, picture]);
            key(&json!({"messages": [{"role": "user", "content": parts}]}))
        };
        assert_ne!(part("a"), part("b"));
    }

    #[test]
    fn what_wants_to_be_new_each_time_is_not_cached() {
        let check = |body: Value, cacheable: bool, looked_up: bool| {
            let (shape, request) = (Shape::default(), request(&body));
            assert_eq!(
                (shape.is_cacheable(&request), shape.is_looked_up(&request)),
                (cacheable, looked_up),
                "{body}"
            );
        };
        check(json!({"prompt": "a"}), true, true);
        check(json!({"prompt": "a", "temperature": 0.5, "tools": []}), true, true);
        check(json!({"prompt": "a", "temperature": 0.6}), false, false);
        check(json!({"prompt": "a", "tools": [{}]}), false, false);
        check(json!({"prompt": "a", "cache": {"no_cache": true}}), true, false);
        check(json!({"prompt": "a", "cache": {"no_store": true}}), true, true);
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from)
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::btree_map("[a-c]{0,2}", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// Requests of few words and settings, so that two are often equal or nearly so.
    fn body() -> impl Strategy<Value = Value> {
        let turn = ("system|user|assistant", "[ab]{1,2}")
            .prop_map(|(role, content)| json!({"role": role, "content": content}));
        let field = "model|conversation|temperature|top_p|seed|response_format|tool_choice|top_k|ab";
        let value = |field: &str, number: i64| match field {
            "model" | "conversation" => json!(number.to_string()),
            _ => json!(number),
        };
        let fields = proptest::collection::btree_map(field, 0..2_i64, 0..3);
        (proptest::collection::vec(turn, 0..3), "[ab]{1,2}", fields).prop_map(
            move |(mut messages, question, fields)| {
                messages.push(json!({"role": "user", "content": question}));
                let mut body = json!({"messages": messages});
                for (field, number) in fields {
                    body[&field] = value(&field, number);
                }
                body
            },
        )
    }

    proptest! {
        #[test]
        fn two_requests_share_a_key_only_if_nothing_tells_them_apart(one in body(), other in body(), tenant in "[ab]") {
            prop_assert_eq!(one == other, key(&one) == key(&other));
            let tenant = Tenant::try_from(tenant).unwrap();
            prop_assert_ne!(key(&one), Shape::default().key(&request(&one), &tenant));
        }

        #[test]
        fn two_settings_share_a_fingerprint_only_if_they_are_equal(one in json_value(), other in json_value()) {
            prop_assert_eq!(one == other, fingerprint(&one) == fingerprint(&other));
        }
    }
}
