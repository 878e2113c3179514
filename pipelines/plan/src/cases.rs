//! Cases: examples beside a pipeline that are its tests.
//!
//! A case puts documents, sends requests one after the other, and says of each result what it expects. Whoever
//! runs cases (the memory host, under virtual time) asks [`Expect::differences`] and prints what it says.
//!
//! Invariant: a case that parses can run; a request that is not meant to be wrong is one that decodes.

use crate::{
    Faults, Place, Placed,
    fields::{self, Fields},
    nearest,
    yaml::{self, Node},
};
use forebay_schemas::{Answer, CacheStatus, Document, Record, Request, Status};
use schemars::JsonSchema;
use serde_json::Value;

/// The most steps of a case.
const STEPS_MAX: usize = 1_000;
/// The longest that a request may have waited: a year.
const AGE_MS_MAX: i64 = 366 * 24 * 60 * 60 * 1_000;

/// One example.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// The file, as its reader named it.
    pub file: String,
    /// What it shows, as a sentence.
    pub name: String,
    /// What is known before the first step.
    pub documents: Vec<Document>,
    /// What happens; each step is over before the next begins.
    pub steps: Vec<CaseStep>,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq)]
pub struct CaseStep {
    /// Where it stands, for a report.
    pub place: Place,
    /// What happens.
    pub act: Act,
}

/// What can happen in a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// A client sends a record to `requests`, and reads `results`.
    Send {
        /// The value of the record.
        body: Vec<u8>,
        /// How long it lay there before the pipeline came to it.
        age_ms: u64,
        /// What comes of it.
        expect: Expect,
    },
    /// A document is written, or written anew.
    Put(Document),
    /// The document of this id is deleted.
    Delete(String),
}

/// What is expected of a result. What it does not say may be anything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Expect {
    /// Where it stands, for a report.
    pub place: Option<Place>,
    /// How the request ended.
    pub status: Option<Status>,
    /// Whether the answer came from the cache.
    pub cache: Option<CacheStatus>,
    /// Texts that the answer has.
    pub text_contains: Vec<String>,
    /// Texts that the answer has not, nor any of its quotations.
    pub text_lacks: Vec<String>,
    /// How many citations there are at least.
    pub citations_min: Option<usize>,
    /// How many citations there are at most.
    pub citations_max: Option<usize>,
    /// Ids of documents that are cited.
    pub cites: Vec<String>,
    /// The code of the error.
    pub error_code: Option<String>,
    /// How many dead letters the step made.
    pub dead_letters: Option<usize>,
}

impl Expect {
    /// What differs between a result and what was expected, one sentence each; empty where nothing does.
    pub fn differences(&self, answer: &Answer, dead_letters: usize) -> Vec<String> {
        let mut differences = Vec::new();
        let mut differ = |what: &str, wanted: &dyn std::fmt::Debug, found: &dyn std::fmt::Debug| {
            differences.push(format!("{what} should be {wanted:?} and is {found:?}"));
        };
        if let Some(status) = self.status.filter(|status| *status != answer.status) {
            differ("status", &status.as_str(), &answer.status.as_str());
        }
        if let Some(cache) = self.cache.filter(|cache| *cache != answer.cache) {
            differ("cache", &cache.as_str(), &answer.cache.as_str());
        }
        let code = answer.error.as_ref().map(|error| error.code.as_str());
        if let Some(wanted) = self.error_code.as_deref().filter(|wanted| Some(*wanted) != code) {
            differ("error.code", &wanted, &code);
        }
        if let Some(wanted) = self.dead_letters.filter(|wanted| *wanted != dead_letters) {
            differ("the number of dead letters", &wanted, &dead_letters);
        }
        let text = answer.text.as_deref().unwrap_or_default();
        for wanted in self.text_contains.iter().filter(|wanted| !text.contains(wanted.as_str())) {
            differences.push(format!("text should contain {wanted:?} and is {text:?}"));
        }
        for unwanted in &self.text_lacks {
            let quotes = answer.citations.iter().map(|citation| citation.quote.as_str());
            if let Some(found) = quotes.chain([text]).find(|text| text.contains(unwanted.as_str())) {
                differences.push(format!("{unwanted:?} should appear nowhere and does in {found:?}"));
            }
        }
        let cited: Vec<&str> = answer.citations.iter().map(|citation| citation.document.as_str()).collect();
        for wanted in self.cites.iter().filter(|wanted| !cited.contains(&wanted.as_str())) {
            differences.push(format!("document {wanted:?} should be cited; cited are {cited:?}"));
        }
        if let Some(min) = self.citations_min.filter(|min| cited.len() < *min) {
            differences
                .push(format!("there should be at least {min} citations and there are {}", cited.len()));
        }
        if let Some(max) = self.citations_max.filter(|max| cited.len() > *max) {
            differences
                .push(format!("there should be at most {max} citations and there are {}", cited.len()));
        }
        differences
    }
}

/// Reads a case, or tells all that is wrong with its file.
pub fn parse(file: &str, text: &str) -> Result<Case, Faults> {
    let mut faults = Faults::of(file);
    let case = yaml::read(text, &mut faults).and_then(|root| case(file, &root, &mut faults));
    match case {
        Some(case) => faults.or(case),
        None => Err(faults),
    }
}

fn case(file: &str, root: &Node, faults: &mut Faults) -> Option<Case> {
    let mut fields = Fields::of("a case", root, Place::START, faults)?;
    let name = fields.required("name", faults).and_then(|node| fields::text("\"name\"", node, faults));
    let documents = fields.optional("documents").and_then(|node| fields::list("\"documents\"", node, faults));
    let documents = documents.unwrap_or_default().iter().filter_map(|node| document(node, faults)).collect();
    let steps_node = fields.required("steps", faults);
    let steps = steps_node.and_then(|node| fields::list("\"steps\"", node, faults)).unwrap_or_default();
    if let Some(node) = steps_node {
        match steps.len() {
            0 if matches!(node.value, yaml::Value::List(_)) => {
                faults.add(node.place, "a case has at least one step")
            }
            STEPS_MAX.. => faults.add(node.place, format!("a case has fewer than {STEPS_MAX} steps")),
            _ => {}
        }
    }
    let steps = steps.iter().filter_map(|node| step(node, faults)).collect();
    fields.end(faults);
    Some(Case { file: file.to_owned(), name: name?.value, documents, steps })
}

fn document(node: &Node, faults: &mut Faults) -> Option<Document> {
    let told = faults.len();
    let mut fields = Fields::of("a document", node, node.place, faults)?;
    fields.required("id", faults);
    fields.required("text", faults);
    fields.optional("tenant");
    fields.optional("format");
    fields.end(faults);
    let value = node.to_json(faults);
    // What is told with its place need not be told again without.
    if faults.len() > told {
        return None;
    }
    match serde_json::from_value(value) {
        Ok(document) => Some(document),
        Err(error) => {
            faults.add(node.place, format!("this is no document: {error}"));
            None
        }
    }
}

fn step(node: &Node, faults: &mut Faults) -> Option<CaseStep> {
    let mut fields = Fields::of("a step of a case", node, node.place, faults)?;
    let send = fields.optional("send");
    let send_raw = fields.optional("send_raw");
    let put = fields.optional("put");
    let delete = fields.optional("delete");
    let age = fields.optional("age_ms");
    let expected = fields.optional("expect");
    fields.end(faults);
    let acts = [send, send_raw, put, delete];
    if acts.iter().flatten().count() != 1 {
        let message = "a step of a case has exactly one of \"send\", \"send_raw\", \"put\" and \"delete\"";
        faults.add(node.place, message);
        return None;
    }
    if send.or(send_raw).is_none() {
        for (key, node) in [("age_ms", age), ("expect", expected)] {
            if let Some(node) = node {
                faults.add(node.place, format!("{key:?} goes with \"send\" or \"send_raw\""));
            }
        }
    }
    let act = if let Some(node) = put {
        Act::Put(document(node, faults)?)
    } else if let Some(node) = delete {
        Act::Delete(fields::text("\"delete\"", node, faults)?.value)
    } else {
        let age_ms = age.and_then(|node| fields::integer("\"age_ms\"", node, 0..=AGE_MS_MAX, faults));
        if expected.is_none() {
            faults.add(node.place, "this step sends and has no key \"expect\"");
        }
        let expect = expected.and_then(|node| expect(node, faults)).unwrap_or_default();
        let body = match (send, send_raw) {
            (Some(node), _) => request(node, faults)?,
            (_, node) => fields::text("\"send_raw\"", node?, faults)?.value.into_bytes(),
        };
        Act::Send { body, age_ms: age_ms.unwrap_or_default(), expect }
    };
    Some(CaseStep { place: node.place, act })
}

/// The bytes of a request that decodes. A key that no request has is told here, where a typing error is likelier
/// than a field of the future.
fn request(node: &Node, faults: &mut Faults) -> Option<Vec<u8>> {
    let schema = schemars::schema_for!(Request).to_value();
    let known: Vec<&str> =
        schema["properties"].as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    let told = faults.len();
    for (key, _) in fields::map("\"send\"", node, faults)? {
        if !known.contains(&key.text.as_str()) {
            let hint = match nearest::nearest(&key.text, known.iter().copied()) {
                Some(name) => format!("did you mean {name:?}?"),
                None => "\"send_raw\" sends anything".to_owned(),
            };
            faults.add_with_hint(key.place, format!("a request has no field {:?}", key.text), hint);
        }
    }
    let body = node.to_json(faults).to_string().into_bytes();
    if faults.len() > told {
        return None;
    }
    if let Err(error) = Request::decode(&body) {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        faults.add_with_hint(node.place, format!("{error}{cause}"), "\"send_raw\" sends anything");
        return None;
    }
    Some(body)
}

fn expect(node: &Node, faults: &mut Faults) -> Option<Expect> {
    let mut fields = Fields::of("\"expect\"", node, node.place, faults)?;
    let statuses = [Status::Answered, Status::Failed, Status::Expired, Status::Cancelled, Status::Blocked]
        .map(|status| (status.as_str(), status));
    let caches =
        [CacheStatus::Hit, CacheStatus::Miss, CacheStatus::Bypass].map(|status| (status.as_str(), status));
    let expect = Expect {
        place: Some(node.place),
        status: fields
            .optional("status")
            .and_then(|node| fields::word("\"status\"", node, &statuses, faults)),
        cache: fields.optional("cache").and_then(|node| fields::word("\"cache\"", node, &caches, faults)),
        text_contains: values(&mut fields, "text_contains", faults),
        text_lacks: values(&mut fields, "text_lacks", faults),
        citations_min: count(&mut fields, "citations_min", faults),
        citations_max: count(&mut fields, "citations_max", faults),
        cites: values(&mut fields, "cites", faults),
        error_code: fields
            .optional("error_code")
            .and_then(|node| fields::text("\"error_code\"", node, faults))
            .map(|code| code.value),
        dead_letters: count(&mut fields, "dead_letters", faults),
    };
    fields.end(faults);
    if fields::map("\"expect\"", node, faults).is_some_and(<[_]>::is_empty) {
        faults.add(node.place, "\"expect\" expects nothing");
    }
    Some(expect)
}

fn values(fields: &mut Fields<'_>, key: &'static str, faults: &mut Faults) -> Vec<String> {
    let texts = fields.optional(key).map(|node| fields::texts(&format!("{key:?}"), node, faults));
    texts.into_iter().flatten().map(|Placed { value, .. }| value).collect()
}

fn count(fields: &mut Fields<'_>, key: &'static str, faults: &mut Faults) -> Option<usize> {
    fields.optional(key).and_then(|node| fields::integer(&format!("{key:?}"), node, 0..=1_000_000, faults))
}

/// The JSON Schema of a case's file.
pub fn json_schema() -> Value {
    schemars::schema_for!(form::Case).to_value()
}

/// The published form of a case; a test compares its keys with those that the reader asks for.
mod form {
    #![expect(
        dead_code,
        reason = "the types are the published form; the reader keeps places, which they cannot"
    )]

    use super::{CacheStatus, Document, JsonSchema, Request, Status};

    /// An example that is a test of the pipeline beside which it lies.
    #[derive(JsonSchema)]
    #[schemars(title = "Forebay case", deny_unknown_fields)]
    pub struct Case {
        /// What it shows, as a sentence.
        name: String,
        /// What is known before the first step.
        #[schemars(default, skip_serializing_if = "unstated", with = "Vec<Document>")]
        documents: (),
        /// What happens, one after the other.
        steps: Vec<Step>,
    }

    /// One of `send`, `send_raw`, `put` and `delete`.
    #[derive(JsonSchema)]
    #[schemars(deny_unknown_fields)]
    pub struct Step {
        /// A request, as a client writes it.
        #[schemars(default, skip_serializing_if = "unstated", with = "Request")]
        send: (),
        /// Bytes that may be no request at all.
        #[schemars(default, skip_serializing_if = "unstated")]
        send_raw: String,
        /// A document, new or changed.
        #[schemars(default, skip_serializing_if = "unstated", with = "Document")]
        put: (),
        /// The id of a document that is deleted.
        #[schemars(default, skip_serializing_if = "unstated")]
        delete: String,
        /// How long the request lay on its topic before the pipeline came to it.
        #[schemars(default)]
        age_ms: u64,
        /// What comes of a request.
        #[schemars(default, skip_serializing_if = "unstated", with = "Expect")]
        expect: (),
    }

    /// What is expected of a result; what is not said may be anything.
    #[derive(JsonSchema)]
    #[schemars(deny_unknown_fields)]
    pub struct Expect {
        /// How the request ended.
        #[schemars(default, skip_serializing_if = "unstated", with = "Status")]
        status: (),
        /// Whether the answer came from the cache.
        #[schemars(default, skip_serializing_if = "unstated", with = "CacheStatus")]
        cache: (),
        /// A text that the answer has, or a list of them.
        #[schemars(default, skip_serializing_if = "unstated", with = "OneOrMany")]
        text_contains: (),
        /// A text that neither the answer nor a quotation has, or a list of them.
        #[schemars(default, skip_serializing_if = "unstated", with = "OneOrMany")]
        text_lacks: (),
        /// How many citations there are at least.
        #[schemars(default, skip_serializing_if = "unstated")]
        citations_min: usize,
        /// How many citations there are at most.
        #[schemars(default, skip_serializing_if = "unstated")]
        citations_max: usize,
        /// The id of a document that is cited, or a list of them.
        #[schemars(default, skip_serializing_if = "unstated", with = "OneOrMany")]
        cites: (),
        /// The code of the error.
        #[schemars(default, skip_serializing_if = "unstated")]
        error_code: String,
        /// How many dead letters it makes.
        #[schemars(default, skip_serializing_if = "unstated")]
        dead_letters: usize,
    }

    /// One text, or a list of them.
    #[derive(JsonSchema)]
    #[schemars(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }

    /// A key that may be absent, and whose absence is not some value.
    fn unstated<T>(_: &T) -> bool {
        true
    }
}
