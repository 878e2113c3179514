//! The schema registry of a cluster, where rows in Avro have Confluent's framing: a zero byte and the number of their schema there, in
//! four bytes, stand before each.
//!
//! Rows are made in the form that needs no registry, Avro single-object encoding, whose ten bytes are exchanged on the way to Kafka.
//! Readers tell the two forms apart by the first byte, so a topic may hold both.
//!
//! Invariant: no row waits for a registry on its way to Kafka: the numbers of what is written are known before the first. A number that
//! was known once needs no registry any more. What a registry did not answer is an error, and no word on any row.

use forebay_schemas::{Attempt, EncodeError, Outcome, topics};
use reqwest::blocking::{Client, RequestBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

/// How long a registry may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long it is believed that a registry has no schema of a number: bytes that are no row must not each ask.
const MISSING_FOR: Duration = Duration::from_secs(30);
/// The most numbers that are known; where there are more, they are asked for anew.
const NUMBERS_MAX: usize = 10_000;
/// The most that is shown of what a registry said.
const SAID_CHARS_MAX: usize = 500;
/// The bytes before a row.
const FRAME_BYTES: usize = 5;

/// Where the registry is, and whether rows are written with its numbers; they are read with them in any case.
#[derive(Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RegistrySettings {
    /// Its address, such as `http://registry:8081`.
    pub url: String,
    /// `name:password`, where it wants one.
    #[serde(default)]
    pub user: Option<String>,
    /// Whether rows are written with Confluent's framing.
    pub is_written: bool,
}

/// The user is a secret.
impl fmt::Debug for RegistrySettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, user, is_written } = self;
        let mut shown = f.debug_struct("RegistrySettings");
        shown.field("url", url).field("has_user", &user.is_some()).field("is_written", is_written).finish()
    }
}

/// Why a registry could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Nobody answers.
    #[error(
        "could not reach the schema registry at {url}; check that it runs, and the setting avro.schema_registry"
    )]
    Unreachable {
        /// Where.
        url: String,
        /// What happened.
        #[source]
        source: reqwest::Error,
    },
    /// It answered that it would not.
    #[error("the schema registry at {url} did not {asked}: it answered {status}, {said:?}; {}", next(*status))]
    Refused {
        /// Where.
        url: String,
        /// What it was asked.
        asked: String,
        /// The HTTP status of its answer.
        status: u16,
        /// Its words.
        said: String,
    },
    /// It answered something else.
    #[error(
        "the schema registry at {url} did not {asked}: its answer {said:?} is none of a schema registry; check the setting avro.schema_registry"
    )]
    Stranger {
        /// Where.
        url: String,
        /// What it was asked.
        asked: String,
        /// What it said.
        said: String,
    },
    /// Our own declaration of a row.
    #[error("could not read the declaration of a row")]
    Declaration(#[from] EncodeError),
}

fn next(status: u16) -> &'static str {
    match status {
        401 | 403 => {
            "check the user in FOREBAY_AVRO_SCHEMA_REGISTRY_USER or in the file of avro.schema_registry_user_file"
        }
        404 => "check the path in avro.schema_registry",
        409 => {
            "rows of this version are not compatible with what is registered there: set compatibility of the subject to BACKWARD, or have \
             another topic_prefix"
        }
        _ => "see the log of the registry",
    }
}

/// See the module.
pub struct Registry {
    settings: RegistrySettings,
    /// By the full name of a topic, what stands before a row that is made, and what instead before one that is written.
    written: OnceLock<BTreeMap<String, Exchange>>,
    known: Mutex<BTreeMap<u32, Known>>,
}

struct Exchange {
    header: Vec<u8>,
    frame: [u8; FRAME_BYTES],
}

#[derive(Clone)]
enum Known {
    Schema(Arc<Value>),
    /// There was none when it was asked.
    Missing(Instant),
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.fmt(f)
    }
}

/// The number of the schema of a row with Confluent's framing.
pub fn number(body: &[u8]) -> Option<u32> {
    match body {
        [0, number @ ..] => number.first_chunk().map(|number| u32::from_be_bytes(*number)),
        _ => None,
    }
}

/// What stands before a row of this schema.
pub fn frame(number: u32) -> [u8; FRAME_BYTES] {
    let [a, b, c, d] = number.to_be_bytes();
    [0, a, b, c, d]
}

impl Registry {
    pub(super) fn new(settings: RegistrySettings) -> Self {
        Self { settings, written: OnceLock::new(), known: Mutex::default() }
    }

    /// Registers the schemas of what this process writes, where that is written with their numbers. Blocks.
    pub fn register(&self, prefix: &str) -> Result<(), RegistryError> {
        if !self.settings.is_written || self.written.get().is_some() {
            return Ok(());
        }
        let mut written = BTreeMap::new();
        for (topic, forms) in [(topics::OUTCOMES, Outcome::forms()?), (topics::ATTEMPTS, Attempt::forms()?)] {
            // The present form; the others are of older versions.
            let Some((header, schema)) = forms.into_iter().next() else { continue };
            let topic = format!("{prefix}{}", topic.name);
            let number = self.number_of(&topic, &schema)?;
            self.lock().insert(number, Known::Schema(Arc::new(schema)));
            written.insert(topic, Exchange { header, frame: frame(number) });
        }
        // Whoever came first had the same answers.
        let _ = self.written.set(written);
        Ok(())
    }

    fn number_of(&self, topic: &str, schema: &Value) -> Result<u32, RegistryError> {
        let asked = format!("register the schema of topic {topic} under subject {topic}-value");
        let path = format!("subjects/{topic}-value/versions");
        let body = json!({"schema": schema.to_string(), "schemaType": "AVRO"});
        let answer = self.ask(&asked, |client, url| client.post(format!("{url}/{path}")).json(&body))?;
        let number = answer.get("id").and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| self.strange(&asked, &answer.to_string()))
    }

    /// The same row as it is written to its topic; none where that is as it was made.
    pub(super) fn framed(&self, topic: &str, body: &[u8]) -> Option<Vec<u8>> {
        let Exchange { header, frame } = self.written.get()?.get(topic)?;
        let datum = body.strip_prefix(header.as_slice())?;
        Some([frame.as_slice(), datum].concat())
    }

    /// The schema of a number; none where the registry has none. Blocks where it is not known yet.
    pub fn schema(&self, number: u32) -> Result<Option<Arc<Value>>, RegistryError> {
        match self.lock().get(&number).cloned() {
            Some(Known::Schema(schema)) => return Ok(Some(schema)),
            Some(Known::Missing(since)) if since.elapsed() < MISSING_FOR => return Ok(None),
            Some(Known::Missing(_)) | None => {}
        }
        let asked = format!("give the schema of number {number}");
        let path = format!("schemas/ids/{number}");
        let schema = match self.ask(&asked, |client, url| client.get(format!("{url}/{path}"))) {
            Ok(answer) => {
                let text = answer.get("schema").and_then(Value::as_str);
                let schema = text.and_then(|text| serde_json::from_str(text).ok());
                Some(Arc::new(schema.ok_or_else(|| self.strange(&asked, &answer.to_string()))?))
            }
            Err(RegistryError::Refused { status: 404, .. }) => None,
            Err(fault) => return Err(fault),
        };
        self.learn(number, schema.clone());
        Ok(schema)
    }

    /// Takes over what a number is.
    pub fn learn(&self, number: u32, schema: Option<Arc<Value>>) {
        let mut known = self.lock();
        if known.len() >= NUMBERS_MAX {
            known.clear();
        }
        known.insert(number, schema.map_or_else(|| Known::Missing(Instant::now()), Known::Schema));
    }

    fn ask(
        &self,
        asked: &str,
        request: impl FnOnce(&Client, &str) -> RequestBuilder,
    ) -> Result<Value, RegistryError> {
        let url = self.settings.url.trim_end_matches('/');
        let unreachable = |source: reqwest::Error| RegistryError::Unreachable {
            url: url.to_owned(),
            source: source.without_url(),
        };
        // Made for each question, of which a process asks a handful: one that lives on would be dropped where nothing may block.
        let client = Client::builder().timeout(ANSWER_MAX).build().map_err(unreachable)?;
        let mut request = request(&client, url).header("accept", "application/vnd.schemaregistry.v1+json");
        if let Some((name, password)) = self.settings.user.as_deref().and_then(|user| user.split_once(':')) {
            request = request.basic_auth(name, Some(password));
        }
        let answer = request.send().map_err(unreachable)?;
        let status = answer.status();
        let text = answer.text().map_err(unreachable)?;
        if status.is_success() {
            return serde_json::from_str(&text).map_err(|_| self.strange(asked, &text));
        }
        let told: Option<Value> = serde_json::from_str(&text).ok();
        let message = told.as_ref().and_then(|told| told.get("message")).and_then(Value::as_str);
        Err(RegistryError::Refused {
            url: url.to_owned(),
            asked: asked.to_owned(),
            status: status.as_u16(),
            said: message.unwrap_or(&text).chars().take(SAID_CHARS_MAX).collect(),
        })
    }

    fn strange(&self, asked: &str, said: &str) -> RegistryError {
        let said = said.chars().take(SAID_CHARS_MAX).collect();
        RegistryError::Stranger { url: self.settings.url.clone(), asked: asked.to_owned(), said }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether rows of their schema are rows of ours: each column that both have is of one type, and what they do not have may be null. What
/// they have besides is passed over. The columns that are not so, and why.
pub fn fits(theirs: &Value, ours: &Value) -> Result<(), String> {
    let columns = |schema: &Value| -> Option<BTreeMap<String, Value>> {
        let fields = schema.get("fields")?.as_array()?.iter();
        fields
            .map(|field| Some((field.get("name")?.as_str()?.to_owned(), kind(field.get("type")?))))
            .collect()
    };
    let (Some(theirs), Some(ours)) = (columns(theirs), columns(ours)) else {
        return Err("it is no record".to_owned());
    };
    for (name, own) in ours {
        match theirs.get(&name) {
            Some(their) if *their == own => {}
            Some(their) => return Err(format!("its {name} is {their}, and here it is {own}")),
            None if own.as_array().is_some_and(|kinds| kinds.contains(&json!("null"))) => {}
            None => return Err(format!("it has no {name}")),
        }
    }
    Ok(())
}

/// A type, however it is written: "long" and {"type": "long"} are one.
fn kind(kind: &Value) -> Value {
    match kind {
        Value::Array(kinds) => kinds.iter().map(self::kind).collect(),
        Value::Object(fields) => match (fields.get("type"), fields.get("logicalType")) {
            (Some(plain), Some(logical)) => json!({"type": self::kind(plain), "logicalType": logical}),
            (Some(plain), None) => self::kind(plain),
            (None, _) => kind.clone(),
        },
        _ => kind.clone(),
    }
}

/// The form of ours, by its place, that a schema is; none where it is none.
pub fn form_of(schema: &Value, forms: &[(Vec<u8>, Value)]) -> Option<usize> {
    let columns = |schema: &Value| schema.get("fields").and_then(Value::as_array).map(Vec::len);
    forms.iter().position(|(_, form)| columns(form) == columns(schema) && fits(schema, form).is_ok())
}

/// A row as it was made, whichever framing it has: for who reads rows one by one. Blocks where a number is not known yet.
pub fn plain(
    registry: Option<&Registry>,
    body: &[u8],
    forms: &[(Vec<u8>, Value)],
) -> Result<Vec<u8>, RegistryError> {
    let (Some(registry), Some(number)) = (registry, number(body)) else { return Ok(body.to_vec()) };
    let form = registry.schema(number)?.and_then(|schema| form_of(&schema, forms));
    let header = form.and_then(|form| forms.get(form)).map(|(header, _)| header.as_slice());
    Ok(match (header, body.get(FRAME_BYTES..)) {
        (Some(header), Some(datum)) => [header, datum].concat(),
        _ => body.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::Record as _;
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    const OUTCOME: &[u8] = include_bytes!("../../../../../schemas/golden/v0.1/outcome.avro");

    fn registry(is_written: bool) -> Registry {
        let url = "http://127.0.0.1:1".to_owned();
        Registry::new(RegistrySettings { url, user: Some("ana:canary".to_owned()), is_written })
    }

    #[test]
    fn a_row_is_framed_on_its_topic_alone_and_read_as_it_was_made() {
        let (registry, forms) = (registry(true), Outcome::forms().unwrap());
        let (header, schema) = forms[0].clone();
        registry.learn(7, Some(Arc::new(schema)));
        let exchange = Exchange { header, frame: frame(7) };
        assert!(registry.written.set(BTreeMap::from([("p-outcomes".to_owned(), exchange)])).is_ok());
        let framed = registry.framed("p-outcomes", OUTCOME).unwrap();
        assert_eq!(framed[..5], [0, 0, 0, 0, 7]);
        assert_eq!(framed[5..], OUTCOME[10..]);
        assert_eq!(registry.framed("p-attempts", OUTCOME), None);
        assert_eq!(registry.framed("p-outcomes", b"{}"), None);
        let read = |body: &[u8]| Outcome::decode(&plain(Some(&registry), body, &forms).unwrap());
        assert_eq!(read(&framed).unwrap(), read(OUTCOME).unwrap());
        assert_eq!(number(OUTCOME), None);
        assert_eq!(number(&[0, 1, 2]), None);
    }

    #[test]
    fn a_number_that_is_known_needs_no_registry_and_any_other_is_an_error() {
        let registry = registry(false);
        registry.learn(1, Some(Arc::new(json!("int"))));
        registry.learn(2, None);
        assert_eq!(registry.schema(1).unwrap().as_deref(), Some(&json!("int")));
        assert_eq!(registry.schema(2).unwrap(), None);
        let said = registry.schema(3).unwrap_err().to_string();
        assert!(
            said.starts_with("could not reach the schema registry at http://127.0.0.1:1; check"),
            "{said}"
        );
        assert!(!format!("{registry:?}").contains("canary"));
        registry.register("").unwrap();
        assert_eq!(registry.framed("outcomes", OUTCOME), None, "it is read only");
    }

    /// What a registry is asked, and what becomes of its answers.
    #[test]
    fn a_refusal_says_who_refused_what_and_what_to_do() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/path/", listener.local_addr().unwrap());
        let answers = [
            ("401 Unauthorized", r#"{"error_code": 401, "message": "who are you"}"#),
            ("409 Conflict", r#"{"error_code": 409, "message": "a column is gone"}"#),
            ("200 OK", "<html>"),
            ("404 Not Found", r#"{"error_code": 40403, "message": "no such schema"}"#),
            ("200 OK", r#"{"schema": "\"int\""}"#),
        ];
        let served = std::thread::spawn(move || {
            answers.map(|(status, body)| {
                let (mut connection, _) = listener.accept().unwrap();
                let mut asked = Vec::new();
                let mut byte = [0];
                while !asked.ends_with(b"\r\n\r\n") {
                    connection.read_exact(&mut byte).unwrap();
                    asked.push(byte[0]);
                }
                let length = body.len();
                write!(
                    connection,
                    "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
                )
                .unwrap();
                String::from_utf8(asked).unwrap().to_lowercase()
            })
        });
        let registry = Registry::new(RegistrySettings {
            url: url.clone(),
            user: Some("ana:canary".to_owned()),
            is_written: true,
        });
        let unauthorized = registry.schema(7).unwrap_err().to_string();
        assert!(
            unauthorized.contains("did not give the schema of number 7: it answered 401, \"who are you\""),
            "{unauthorized}"
        );
        assert!(
            unauthorized.contains("FOREBAY_AVRO_SCHEMA_REGISTRY_USER") && !unauthorized.contains("canary")
        );
        let conflict = registry.schema(7).unwrap_err().to_string();
        assert!(
            conflict.contains("\"a column is gone\"; rows of this version are not compatible"),
            "{conflict}"
        );
        let strange = registry.schema(7).unwrap_err().to_string();
        assert!(strange.contains("its answer \"<html>\" is none of a schema registry"), "{strange}");
        assert_eq!(registry.schema(7).unwrap(), None);
        assert_eq!(registry.schema(7).unwrap(), None, "it is not asked again at once");
        assert_eq!(registry.schema(8).unwrap().as_deref(), Some(&json!("int")));
        let asked = served.join().unwrap();
        assert!(asked[4].starts_with("get /path/schemas/ids/8 http"), "{}", asked[4]);
        // ana:canary
        assert!(asked[4].contains("authorization: basic yw5homnhbmfyeq=="), "{}", asked[4]);
    }

    #[test]
    fn a_schema_fits_by_names_and_types() {
        let forms = Outcome::forms().unwrap();
        let ours = &forms[0].1;
        for (place, (_, form)) in forms.iter().enumerate() {
            assert_eq!((fits(form, ours), form_of(form, &forms)), (Ok(()), Some(place)));
        }
        let mut newer = ours.clone();
        let fields = newer["fields"].as_array_mut().unwrap();
        fields.push(json!({"name": "mood", "type": ["null", "string"], "default": null}));
        assert_eq!((fits(&newer, ours), form_of(&newer, &forms)), (Ok(()), None));
        let mut other = ours.clone();
        other["fields"][0]["type"] = json!({"type": "string"});
        assert_eq!(fits(&other, ours), Ok(()));
        other["fields"][0]["type"] = json!("int");
        assert_eq!(fits(&other, ours).unwrap_err(), "its request_id is \"int\", and here it is \"string\"");
        other["fields"].as_array_mut().unwrap().remove(0);
        assert_eq!(fits(&other, ours).unwrap_err(), "it has no request_id");
        assert!(fits(&json!("long"), ours).is_err());
    }
}
