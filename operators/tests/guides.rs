//! The operators in the order of the shipped pipeline, without topics between them, over the guides that the demo ships.
//!
//! What it shows: the extractive model answers real questions about real documents, and whatever it cites stands byte
//! for byte in the document.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]

use bytes::Bytes;
use forebay_operator::{Change, Clock, Context, compliance};
use forebay_operators::{
    Extractive, Shape,
    catalogue::{self, Resources},
    document_key,
};
use forebay_schemas::{Answer, Document, Format, Record as _, Status, Tenant};
use forebay_stores::{Database, database, key_value, objects, vectors};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::Arc};

struct World {
    resources: Resources,
    _folder: tempfile::TempDir,
}

fn guides() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../pipelines/guides")
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stores.redb");
        let database = Database::open(path, database::Options::default()).await.unwrap();
        let options = key_value::EmbeddedOptions::default();
        let resources = Resources {
            cache: Arc::new(key_value::Embedded::open(&database, "cache", options).await.unwrap()),
            vectors: Arc::new(vectors::Embedded::open(&database, "chunks").await.unwrap()),
            objects: Arc::new(objects::Folder::open(folder.path().join("objects")).await.unwrap()),
            model: Arc::new(Extractive),
            reranker: None,
            embedder: None,
            shape: Shape::default(),
        };
        let world = Self { resources, _folder: folder };
        for file in std::fs::read_dir(guides()).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                world.learn(&path).await;
            }
        }
        world
    }

    async fn learn(&self, path: &std::path::Path) {
        let id = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = Some(std::fs::read_to_string(path).unwrap());
        let document = Document { id, tenant: Tenant::default(), format: Format::Markdown, text };
        let chunks = self.run("index", document.encode().unwrap().unwrap()).await;
        let table = catalogue::table("Chunks", &self.resources).unwrap();
        for (_, value) in chunks {
            let value = Some(Bytes::from(value));
            let change = Change { partition: 0, offset: 0, key: document.id.clone(), value };
            assert_eq!(table.apply(vec![change]).await.unwrap(), []);
        }
    }

    async fn run(&self, operator: &str, body: Vec<u8>) -> Vec<(&'static str, Vec<u8>)> {
        let cx = Context::quiet(compliance::envelope(), Clock::starting_at(compliance::NOW_MS));
        let step = catalogue::build(operator, &Value::Null, &self.resources).unwrap();
        let out = step.open(None, Some(&body)).unwrap().run(&cx).await.unwrap();
        out.into_iter().map(|record| (record.port, record.body.unwrap())).collect()
    }

    async fn ask(&self, prompt: &str) -> Answer {
        let mut body = json!({"prompt": prompt}).to_string().into_bytes();
        for operator in ["cache_lookup", "retrieve", "infer", "validate", "publish"] {
            body = self.run(operator, body).await.remove(0).1;
        }
        Answer::decode(&body).unwrap()
    }
}

/// Asks, and expects these words in the answer; every citation must stand in its document.
async fn check(world: &World, prompt: &str, expected: &str) {
    let answer = world.ask(prompt).await;
    let text = answer.text.unwrap();
    assert_eq!(answer.status, Status::Answered, "{prompt}");
    assert!(text.contains(expected), "{prompt}\n{text}");
    assert_eq!(answer.citations.is_empty(), text == "No passage answers this.", "{prompt}");
    for citation in answer.citations {
        let key = document_key(&answer.tenant, &citation.document, &citation.version);
        let document = world.resources.objects.get(&key).await.unwrap().unwrap();
        assert_eq!(&document[citation.start..citation.end], citation.quote.as_bytes(), "{prompt}");
    }
}

#[tokio::test]
async fn questions_about_the_guides_are_answered_from_them() {
    let world = World::new().await;
    for (prompt, expected) in [
        ("How long are dead letters kept?", "30 days"),
        ("Which step writes to the topics results and outcomes?", "`publish`"),
        ("What happens to cached answers when a document changes?", "no longer given"),
        ("Where does the API key of the model server come from?", "FOREBAY_MODEL_API_KEY"),
        ("In which order do settings override each other?", "defaults, then the file, then the environment"),
        ("how many retries does a model call get", "at most twice more"),
        ("how do I run one stage only", "--stage infer"),
        ("Does the broker use TLS?", "It has no TLS"),
        ("where are metrics served", "`/metrics`"),
        ("Is the lexical embedder semantic?", "compares words, not meanings"),
        ("What does cost null mean?", "has no price"),
    ] {
        check(&world, prompt, expected).await;
    }
}

#[tokio::test]
async fn every_question_of_the_demo_is_answered_with_a_citation() {
    let world = World::new().await;
    let questions = std::fs::read_to_string(guides().join("questions.jsonl")).unwrap();
    for line in questions.lines() {
        let question: Value = serde_json::from_str(line).unwrap();
        let prompt = question["prompt"].as_str().unwrap();
        assert!(!world.ask(prompt).await.citations.is_empty(), "{prompt}");
        check(&world, prompt, "").await;
    }
}

#[tokio::test]
async fn what_no_guide_answers_is_not_answered() {
    let world = World::new().await;
    for prompt in
        ["What is the capital of France?", "who invented the bicycle", "Is my bank account safe?", "¿?"]
    {
        check(&world, prompt, "No passage answers this.").await;
    }
}
