//! What a client asks.

use crate::{DecodeError, Identity, JobId, KeyId, Record, RequestId, Tenant, to_json};
use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, MapAccess, Visitor},
};
use serde_json::{Map, Value};
use std::fmt;

/// The deepest nesting of a request's JSON, the request itself being the first level.
///
/// JSON is read to 128 levels, and later records hold the request one level further in. Without this limit a
/// request could be taken at the door, and the ending that tells of it could not be read by anyone.
const NESTING_MAX: usize = 64;

/// Who speaks in a conversation, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The one who sets the rules.
    System,
    /// The same, under OpenAI's newer name.
    Developer,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called.
    Tool,
}

/// What is said: a text, or OpenAI's list of parts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "\"content\" is neither a text nor a list of parts")]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts; those of type `text` are read, others go to the model as they are.
    Parts(Vec<Value>),
}

impl Content {
    /// The text in it; parts are joined by line breaks.
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => {
                let texts: Vec<_> = parts.iter().filter_map(|part| part.get("text")?.as_str()).collect();
                texts.join("\n")
            }
        }
    }
}

/// One turn of a conversation, in OpenAI's form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; null where a turn only calls tools.
    #[serde(default)]
    pub content: Option<Content>,
    /// Fields of OpenAI's that Forebay only hands on: `name`, `tool_calls`, `tool_call_id`, …
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// How the client wants its answer kept; the words of HTTP's `Cache-Control`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheControl {
    /// Do not answer from the cache.
    #[serde(default)]
    pub no_cache: bool,
    /// Do not keep the answer.
    #[serde(default)]
    pub no_store: bool,
    /// Answer from the cache only what is at most so old.
    #[serde(default)]
    pub max_age_s: Option<u64>,
}

/// What shapes the sampling; OpenAI's names, handed to the model as they are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Sampling {
    /// 0 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// The most tokens to write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    /// The same, under OpenAI's newer name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_completion_tokens: Option<u64>,
    /// A text, or a list of texts, at which to stop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Value>,
    /// Asks for repeatable sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// -2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// -2 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// The form that the answer must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_format: Option<Value>,
    /// Tools that the model may call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// Which of them it must call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<Value>,
}

/// The record of `requests` and `questions`: `{"prompt": "…"}` or `{"messages": […]}`, and what else is wanted.
///
/// It may be nested 64 levels deep.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
#[schemars(extend("oneOf" = [
    {"required": ["prompt"], "properties": {"prompt": {"type": "string", "pattern": "\\S"}}},
    {"required": ["messages"], "properties": {"messages": {"type": "array", "minItems": 1}}},
]))]
pub struct Request {
    /// The client's id, unique per tenant; without one it is derived from where the record lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<RequestId>,
    /// Whose request it is; `default` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<Tenant>,
    /// The id of the API key by which it came, and never the key itself; a budget may hold for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<KeyId>,
    /// The job that it belongs to, with others of its tenant's; a budget may hold for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobId>,
    /// A question in one text; exactly one of `prompt` and `messages` is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// A conversation whose last turn asks; exactly one of `prompt` and `messages` is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// The model that is wanted; the pipeline's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The conversation that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversation: Option<String>,
    /// Milliseconds from the record's timestamp until nobody waits any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Anything; it comes back in the result. Numbers are 64-bit integers or doubles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Value>,
    /// Whether somebody reads the tokens on `deltas` as they come.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
    /// How the answer may be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheControl>,
    /// What shapes the sampling.
    #[serde(flatten)]
    pub sampling: Sampling,
    /// Fields that no version of this record knows; they survive every hop.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// Reads a request field by field. Derived, it would first put every field of the two flattened parts aside, and it
/// is read at every hop.
macro_rules! read_by_field {
    (own: $($own:ident),+; of_sampling: $($of_sampling:ident),+) => {
        #[derive(Deserialize)]
        #[serde(field_identifier)]
        #[expect(non_camel_case_types, reason = "the names of the fields")]
        enum Field { $($own,)+ $($of_sampling,)+ unknown(String) }

        impl<'de> Visitor<'de> for Fields {
            type Value = Request;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("struct Request")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Request, A::Error> {
                $(let mut $own = None;)+
                $(let mut $of_sampling = None;)+
                let mut unknown = Map::new();
                while let Some(field) = map.next_key()? {
                    match field {
                        $(Field::$own => once(&mut map, stringify!($own), &mut $own)?,)+
                        $(Field::$of_sampling => once(&mut map, stringify!($of_sampling), &mut $of_sampling)?,)+
                        Field::unknown(name) => _ = unknown.insert(name, map.next_value()?),
                    }
                }
                let sampling = Sampling { $($of_sampling: $of_sampling.unwrap_or_default()),+ };
                Ok(Request { $($own: $own.unwrap_or_default(),)+ sampling, unknown })
            }
        }
    };
}

read_by_field! {
    own: id, tenant, key_id, job, prompt, messages, model, conversation, deadline_ms, metadata, stream, cache;
    of_sampling: temperature, top_p, max_tokens, max_completion_tokens, stop, seed, frequency_penalty,
        presence_penalty, response_format, tools, tool_choice
}

struct Fields;

/// Reads a field that may be there once.
fn once<'de, A: MapAccess<'de>, T: Deserialize<'de>>(
    map: &mut A,
    name: &'static str,
    field: &mut Option<T>,
) -> Result<(), A::Error> {
    if field.is_some() {
        return Err(A::Error::duplicate_field(name));
    }
    *field = Some(map.next_value()?);
    Ok(())
}

impl<'de> Deserialize<'de> for Request {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields)
    }
}

impl Request {
    /// The text that is asked about: the prompt, or the last thing that the user said.
    pub fn question(&self) -> String {
        if let Some(prompt) = &self.prompt {
            return prompt.clone();
        }
        let said = self.messages.iter().flatten().rev().find(|message| message.role == Role::User);
        said.and_then(|message| message.content.as_ref()).map(Content::text).unwrap_or_default()
    }

    /// Whose request it is.
    pub fn tenant(&self) -> Tenant {
        self.tenant.clone().unwrap_or_default()
    }

    /// What the derive cannot say: exactly one of the two forms is there, and it asks something.
    fn fault(&self) -> Option<&'static str> {
        match (&self.prompt, &self.messages) {
            (None, None) => Some("neither \"prompt\" nor \"messages\" is there; give one of them"),
            (Some(_), Some(_)) => Some("both \"prompt\" and \"messages\" are there; give one of them"),
            (Some(prompt), None) if prompt.trim().is_empty() => Some("\"prompt\" is empty"),
            (None, Some(messages)) if messages.is_empty() => Some("\"messages\" is empty"),
            _ => None,
        }
    }
}

/// How deep arrays and objects stand in each other; `json` is known to be JSON.
fn nesting(json: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in json {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b'[' | b'{') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (false, b']' | b'}') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

impl Record for Request {
    const NAME: &'static str = "Request";
    const JOB: bool = true;

    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let request: Self = crate::from_json(body)?;
        let too_deep = (nesting(body) > NESTING_MAX).then_some("it is nested more than 64 levels deep");
        match request.fault().or(too_deep) {
            Some(fault) => Err(DecodeError::Meaning { record: Self::NAME, fault }),
            None => Ok(request),
        }
    }

    fn encode(&self) -> Result<Option<Vec<u8>>, crate::EncodeError> {
        to_json(self)
    }

    fn request(&self) -> Option<&Request> {
        Some(self)
    }

    fn identity(&self) -> Identity {
        Identity {
            id: self.id.clone(),
            tenant: self.tenant.clone(),
            deadline_ms: self.deadline_ms,
            stream: self.stream,
            unknown_fields: self.unknown.keys().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(body: &str) -> String {
        let error = Request::decode(body.as_bytes()).expect_err(body);
        match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn a_request_that_is_none_says_why() {
        assert!(refusal(r#"{"prompt": 5}"#).contains("expected a string at line 1 column 12"));
        assert!(refusal("{}").contains("neither"));
        assert!(refusal(r#"{"prompt": "a", "messages": []}"#).contains("both"));
        assert!(refusal(r#"{"prompt": "  "}"#).contains("empty"));
        assert!(refusal(r#"{"prompt": "a", "id": ""}"#).contains("an id has 0 bytes"));
        assert!(refusal("hello").contains("line 1 column 1"));
        assert!(refusal("[]").contains("Request"));
    }

    #[test]
    fn fields_that_nobody_knows_survive_a_hop() {
        let body = br#"{"prompt":"a","temperature":0.5,"x_trace":{"deep":[1,2.5]}}"#;
        let request = Request::decode(body).unwrap();
        assert_eq!(request.identity().unknown_fields, ["x_trace"]);
        assert_eq!(request.sampling.temperature, Some(0.5));
        assert_eq!(request.encode().unwrap().unwrap(), body);
    }

    #[test]
    fn the_question_of_a_conversation_is_what_the_user_said_last() {
        let body =
            br#"{"messages": [{"role": "user", "content": "first"}, {"role": "assistant", "content": null,
            "tool_calls": []}, {"role": "user", "content": [{"type": "text", "text": "second"}]}]}"#;
        assert_eq!(Request::decode(body).unwrap().question(), "second");
    }
}
