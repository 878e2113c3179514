//! Records and stores for the tests of this crate.

use crate::{
    Extractive, Shape,
    catalogue::{self, Resources},
    embedder::Embedder,
};
use bytes::Bytes;
use forebay_calls::{Call, CallError, Class, Listener, Model, Reply, Task, Tried, Upstream};
use forebay_operator::Change;
use forebay_schemas::{
    CacheStatus, Citation, Completion, Document, DocumentVersion, Ending, Format, Generated, Judgement,
    NanoUsd, Passage, Record as _, Request, Retrieval, Status, Tenant, Usage, Verdict,
};
use forebay_stores::{Database, database, key_value, objects, vectors};
use futures::future::BoxFuture;
use std::sync::{Arc, Mutex};
use tokio::time::Instant;

/// A document about the broker.
pub(crate) const GUIDE: &str = "# The broker\n\nThe broker keeps records in segments. A segment is rolled at 64 \
    MiB.\n\n## Compaction\n\nCompaction keeps the youngest record of each key. It never touches the active segment.\n\n## \
    Retention\n\nRetention deletes segments that are older than seven days.\n";

/// Stores in a folder that goes with it.
pub(crate) struct World {
    pub(crate) resources: Resources,
    database: Database,
    _folder: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
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
        Self { resources, database, _folder: folder }
    }

    /// The same with an embedder of vectors of this length, which indexes what is learnt from now on.
    pub(crate) async fn embedding(mut self, numbers: Arc<Numbers>, dimensions: usize) -> Self {
        let vectors = vectors::Embedded::open(&self.database, "embeddings").await.unwrap();
        self.resources.embedder = Some(Embedder::new(numbers, dimensions, Arc::new(vectors)));
        self
    }

    /// Indexes a document, or deletes it, as the pipeline does.
    pub(crate) async fn learn(&self, document: Document) {
        self.learn_by(self.resources.embedder.clone(), document).await;
    }

    /// The same, by another embedder.
    pub(crate) async fn learn_by(&self, embedder: Option<Embedder>, document: Document) {
        let settings = serde_json::json!({"embed": embedder.is_some()});
        let resources = Resources { embedder, ..self.resources.clone() };
        let step = catalogue::build("index", &settings, &resources).unwrap();
        let cx = cx();
        let body = document.encode().unwrap();
        let out = step.open(Some(&document.id), body.as_deref()).unwrap().run(&cx).await.unwrap();
        for record in out {
            let (key, value) = (record.key.unwrap(), record.body.map(Bytes::from));
            self.change("Chunks", key, value).await;
        }
    }

    /// Applies a change to a table.
    pub(crate) async fn change(&self, record: &str, key: String, value: Option<Bytes>) {
        let table = catalogue::table(record, &self.resources).unwrap();
        let change = Change { partition: 0, offset: 0, key, value };
        assert_eq!(table.apply(vec![change]).await.unwrap(), []);
    }
}

pub(crate) fn cx() -> forebay_operator::Context {
    use forebay_operator::{Clock, Context, compliance};
    Context::quiet(compliance::envelope(), Clock::starting_at(compliance::NOW_MS))
}

pub(crate) fn document(id: &str, text: Option<&str>) -> Document {
    let text = text.map(str::to_owned);
    Document { id: id.to_owned(), tenant: Tenant::default(), format: Format::Markdown, text }
}

pub(crate) fn request(body: &str) -> Request {
    Request::decode(body.as_bytes()).unwrap()
}

/// A passage that starts at byte 10.
pub(crate) fn passage(text: &str) -> Passage {
    let version = DocumentVersion::of(text);
    Passage {
        document: "guide.md".to_owned(),
        chunk: format!("guide.md:{version}:0"),
        version,
        start: 10,
        end: 10 + text.len(),
        heading: vec!["The broker".to_owned()],
        text: text.to_owned(),
        score: 0.1,
    }
}

pub(crate) fn completion() -> Completion {
    let passage = passage("Größe: the broker keeps records in segments.");
    let (start, end) = (passage.start + 9, passage.end);
    let citation = Citation {
        document: passage.document.clone(),
        version: passage.version.clone(),
        start,
        end,
        quote: passage.text[9..].to_owned(),
    };
    Completion {
        request: request(r#"{"prompt": "what does the broker keep?", "metadata": {"a": 1}}"#),
        retrieval: Some(Retrieval { limit: 8, tokens_max: 2400, rerank: None, embed: None }),
        passages: vec![passage],
        cache: CacheStatus::Miss,
        answer: Generated {
            text: "Records.".to_owned(),
            citations: vec![citation],
            model: "small".to_owned(),
            provider: "openai_compatible".to_owned(),
            usage: Some(Usage::of(3, 1)),
            cost_nano_usd: Some(NanoUsd(7)),
            finish_reason: Some("stop".to_owned()),
            ttft_us: None,
            is_fallback: false,
            tier: None,
        },
    }
}

pub(crate) fn ending() -> Ending {
    let Completion { request, retrieval, passages, cache, answer } = completion();
    Ending {
        status: Status::Answered,
        stage: "validate".to_owned(),
        request: Some(request),
        retrieval,
        chunks: passages.into_iter().map(|passage| passage.chunk).collect(),
        cache,
        answer: Some(answer),
        verdict: Some(Verdict { judgement: Judgement::Pass, findings: Vec::new() }),
        error: None,
    }
}

/// What is done with texts: numbers for each, an error, or nothing until nobody waits any more.
type Telling = dyn Fn(&[&str]) -> Option<Result<Vec<Vec<f32>>, CallError>> + Send + Sync;

/// A reranker or an embedder that does as it is told, and keeps what it was asked.
pub(crate) struct Numbers {
    name: &'static str,
    told: Box<Telling>,
    pub(crate) asked: Mutex<Vec<Vec<String>>>,
}

impl Numbers {
    pub(crate) fn by(
        told: impl Fn(&[&str]) -> Option<Result<Vec<f32>, CallError>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let each = |scores: Vec<f32>| scores.into_iter().map(|score| vec![score]).collect();
        Self::of("ranker", move |documents| Some(told(documents)?.map(each)))
    }

    /// An embedder of this name.
    pub(crate) fn of(
        name: &'static str,
        told: impl Fn(&[&str]) -> Option<Result<Vec<Vec<f32>>, CallError>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { name, told: Box::new(told), asked: Mutex::default() })
    }

    /// An embedder that knows that a car is an automobile, and nothing else.
    pub(crate) fn meanings(name: &'static str) -> Arc<Self> {
        let means = |text: &&str| match text.contains("car") || text.contains("automobile") {
            true => vec![1.0, 0.25, 0.0],
            false => vec![-0.25, 1.0, 0.0],
        };
        Self::of(name, move |texts| Some(Ok(texts.iter().map(means).collect())))
    }

    /// The last becomes the first.
    pub(crate) fn backwards() -> Arc<Self> {
        Self::by(|documents| {
            Some(Ok((0..documents.len()).map(|at| f32::from(u8::try_from(at).unwrap())).collect()))
        })
    }
}

impl Model for Numbers {
    fn provider(&self) -> &'static str {
        "told"
    }
    fn name(&self) -> &str {
        self.name
    }
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let here = Upstream { provider: "told", endpoint: Some("http://here"), model: self.name };
        let (Task::Rank { documents, .. } | Task::Embed(documents)) = call.task else {
            panic!("it writes no answers")
        };
        self.asked.lock().unwrap().push(documents.iter().map(|&text| text.to_owned()).collect());
        let tried = async move {
            listener.started(here);
            let began = Instant::now();
            let result = match (self.told)(documents) {
                Some(numbers) => numbers.map(|vectors| Reply {
                    vectors,
                    model: "ranker-2".to_owned(),
                    usage: Some(Usage::of(40, 0)),
                    cost_nano_usd: Some(NanoUsd(9)),
                    ..Reply::default()
                }),
                None => {
                    tokio::time::sleep_until(call.deadline.unwrap()).await;
                    Err(CallError::new(Class::Transient, "model_timeout", "no whole answer in time"))
                }
            };
            let duration = began.elapsed();
            listener.ended(&Tried { to: here, duration, ttft: None, result: result.as_ref() });
            result
        };
        listener.paid(here, Box::pin(tried))
    }
}
