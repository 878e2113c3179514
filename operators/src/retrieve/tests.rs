//! Retrieval over real stores.

use super::*;
use crate::samples::{self, Numbers, World, document, request};
use forebay_calls::{CallError, Class};
use forebay_operator::{
    Called, Clock, Delivery, Found, Host, Known, Ledger, Operation, StopSignal, Turn, compliance,
};
use forebay_schemas::{Attempt, CallId, Delta, Document};
use futures::future::BoxFuture;
use std::sync::Mutex;
use tokio::time::Instant;

async fn seek(world: &World, tenant: &str, question: &str, retrieval: Retrieval) -> Vec<Passage> {
    let tenant = Tenant::try_from(tenant.to_owned()).unwrap();
    let retriever = Retriever::new(&world.resources);
    pack(retriever.candidates(question, &tenant, None).await.unwrap(), &retrieval)
}

const USUAL: Retrieval = Retrieval { limit: 8, tokens_max: 2400, rerank: None, embed: None };

/// Asks over the guide and says under which heading the best passage stands.
async fn check(question: &str, expected: &str) {
    let world = World::new().await;
    world.learn(document("guide.md", Some(samples::GUIDE))).await;
    let passages = seek(&world, "default", question, USUAL).await;
    let best = passages.first().map(|passage| passage.heading.join(">")).unwrap_or_default();
    assert_eq!(best, expected, "{question}");
}

#[tokio::test]
async fn the_best_passage_comes_first() {
    check("What does compaction keep?", "The broker>Compaction").await;
    check("How old do segments get before retention deletes them?", "The broker>Retention").await;
    check("Who won the chess championship?", "").await;
    check("?!", "").await;
}

#[tokio::test]
async fn a_passage_is_a_slice_of_its_document() {
    let world = World::new().await;
    world.learn(document("guide.md", Some(samples::GUIDE))).await;
    let passages = seek(&world, "default", "segments", USUAL).await;
    assert!(passages.len() >= 2);
    for passage in passages {
        assert_eq!(passage.text, samples::GUIDE[passage.start..passage.end]);
    }
}

#[tokio::test]
async fn a_tenant_finds_its_own_documents_and_those_of_everybody() {
    let world = World::new().await;
    let documents =
        [("a.md", "a", "seconds"), ("b.md", "b", "minutes"), ("all.md", SHARED_TENANT, "records")];
    for (id, tenant, unit) in documents {
        let tenant = Tenant::try_from(tenant.to_owned()).unwrap();
        let text = format!("Lag is measured in {unit}.");
        world.learn(Document { tenant, ..document(id, Some(&text)) }).await;
    }
    let mut found: Vec<_> = seek(&world, "a", "how is lag measured", USUAL)
        .await
        .into_iter()
        .map(|found| found.document)
        .collect();
    found.sort();
    assert_eq!(found, ["a.md", "all.md"]);
}

#[tokio::test]
async fn a_changed_document_replaces_itself_and_a_deleted_one_is_gone() {
    let world = World::new().await;
    world.learn(document("a.md", Some("Lag is small."))).await;
    world.learn(document("a.md", Some("Lag is large."))).await;
    let found = seek(&world, "default", "lag", USUAL).await;
    assert_eq!(found.iter().map(|found| found.text.as_str()).collect::<Vec<_>>(), ["Lag is large."]);
    world.learn(document("a.md", None)).await;
    assert_eq!(seek(&world, "default", "lag", USUAL).await, []);
}

#[tokio::test]
async fn passages_fit_the_budget_and_do_not_repeat() {
    let world = World::new().await;
    let text = "Lag grows when consumers are slow, and shrinks when they catch up with the log again.";
    for id in ["a.md", "b.md"] {
        world.learn(document(id, Some(text))).await;
    }
    world.learn(document("c.md", Some("Lag grows again after a rebalance, until offsets are read."))).await;
    let of = |limit, tokens_max| Retrieval { limit, tokens_max, rerank: None, embed: None };
    assert_eq!(seek(&world, "default", "when does lag grow", of(8, 2400)).await.len(), 2);
    assert_eq!(seek(&world, "default", "when does lag grow", of(1, 2400)).await.len(), 1);
    assert_eq!(seek(&world, "default", "when does lag grow", of(8, 30)).await.len(), 1);
    assert_eq!(seek(&world, "default", "when does lag grow", of(8, 5)).await.len(), 0);
}

#[tokio::test]
async fn it_complies() {
    let world = World::new().await;
    world.learn(document("guide.md", Some(samples::GUIDE))).await;
    let samples = [r#"{"prompt": "what does compaction keep?"}"#, r#"{"prompt": "?"}"#];
    let samples: Vec<Vec<u8>> = samples.map(|body| body.as_bytes().to_vec()).into();
    let rerankers: [Option<Arc<dyn forebay_calls::Model>>; 3] =
        [None, Some(Numbers::backwards()), Some(Numbers::by(|_| None))];
    for reranker in rerankers {
        let resources = Resources { reranker, ..world.resources.clone() };
        let rerank_timeout_ms = NonZeroU64::new(10).unwrap();
        let settings = Settings { rerank: 8, rerank_timeout_ms, ..Settings::default() };
        compliance::assert_complies(Retrieve::new(settings, &resources), Vec::clone(&samples)).await;
    }
    for numbers in [Numbers::meanings("m"), Numbers::of("m", |_| None)] {
        let world = World::new().await.embedding(numbers, 3).await;
        let embed_timeout_ms = NonZeroU64::new(10).unwrap();
        let settings = Settings { embed: true, embed_timeout_ms, ..Settings::default() };
        let retrieve = Retrieve::new(settings, &world.resources);
        compliance::assert_complies(retrieve, Vec::clone(&samples)).await;
    }
}

/// Notes what happens.
#[derive(Default)]
struct Onlooker(Mutex<Vec<Event>>);

impl Host for Onlooker {
    fn delta(&self, _: &str, _: Delta) {}
    fn observe(&self, _: &str, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

/// What became of a question for which others were asked.
struct Seen {
    grounded: Grounded,
    rows: Vec<Attempt>,
    events: Vec<Event>,
    took: Duration,
}

impl Seen {
    fn headings(&self) -> Vec<&str> {
        self.grounded.passages.iter().map(|passage| passage.heading.last().unwrap().as_str()).collect()
    }

    fn outcome(&self) -> &'static str {
        let outcome = |event: &Event| match event {
            Event::Reranked { outcome } | Event::Embedded { outcome } => Some(*outcome),
            _ => None,
        };
        self.events.iter().find_map(outcome).unwrap()
    }

    /// It went on without, and took so long; the rows tell of these tries.
    #[track_caller]
    fn assert_degraded(&self, outcome: &str, took_ms: u64, rows: &str) {
        assert!(self.grounded.retrieval.is_degraded(), "{outcome}");
        assert_eq!(self.outcome(), outcome);
        // Timers are up to two milliseconds late.
        let late = self.took.checked_sub(Duration::from_millis(took_ms));
        assert!(late.is_some_and(|late| late <= Duration::from_millis(2)), "{outcome}: {:?}", self.took);
        let told: Vec<_> = self.rows.iter().map(|row| row.status.as_str()).collect();
        assert_eq!(told.join(" "), rows, "{outcome}");
    }
}

/// Remembers the scores that were paid for.
#[derive(Default)]
struct Remembers {
    answer: Mutex<Option<Vec<u8>>>,
    tries: Mutex<i32>,
}

impl Ledger for Remembers {
    fn find<'a>(&'a self, _: &'a CallId) -> BoxFuture<'a, Result<Found<'a>, Failure>> {
        let known = match self.answer.lock().unwrap().clone() {
            Some(answer) => Known::Answered(answer),
            None => Known::Open { attempt: *self.tries.lock().unwrap(), turn: Box::new(self) },
        };
        Box::pin(async { Ok(Found { rows: Vec::new(), known }) })
    }
}

impl Turn for &Remembers {
    fn start(&mut self, row: Attempt) -> BoxFuture<'_, Result<bool, Failure>> {
        *self.tries.lock().unwrap() = row.attempt + 1;
        Box::pin(async { Ok(true) })
    }
    fn done(&mut self, answer: Vec<u8>, _: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        *self.answer.lock().unwrap() = Some(answer);
        Box::pin(async { Ok(()) })
    }
    fn failed(&mut self, _: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async { Ok(()) })
    }
}

/// Asks of segments; somebody waits for so many milliseconds.
async fn rerank(world: &World, ranks: Option<&Arc<Numbers>>, settings: Settings, deadline_ms: i64) -> Seen {
    rerank_with(world, ranks, settings, (deadline_ms, None)).await
}

async fn rerank_with(
    world: &World,
    ranks: Option<&Arc<Numbers>>,
    settings: Settings,
    (deadline_ms, ledger): (i64, Option<Arc<dyn Ledger>>),
) -> Seen {
    let reranker = ranks.map(|ranks| ranks.clone() as Arc<dyn forebay_calls::Model>);
    let resources = Resources { reranker, ..world.resources.clone() };
    run(&resources, "What of segments?", settings, (deadline_ms, ledger)).await
}

async fn run(
    resources: &Resources,
    question: &str,
    settings: Settings,
    (deadline_ms, ledger): (i64, Option<Arc<dyn Ledger>>),
) -> Seen {
    let retrieve = Retrieve::new(settings, resources);
    let mut envelope = compliance::envelope();
    envelope.deadline_at_ms = Some(compliance::NOW_MS + deadline_ms);
    let (stage, cluster) = ("retrieve".into(), "test".into());
    let delivery = Delivery { envelope, recorded_at_ms: compliance::NOW_MS, stage, cluster, ledger };
    let onlooker = Arc::new(Onlooker::default());
    let clock = Clock::starting_at(compliance::NOW_MS);
    let cx = Context::new(delivery, clock, onlooker.clone(), StopSignal::new().1);
    let began = Instant::now();
    let asked = request(&serde_json::json!({ "prompt": question }).to_string());
    let Retrieved::Grounded(grounded) = retrieve.process(asked, &cx).await.unwrap().remove(0);
    let events = onlooker.0.lock().unwrap().clone();
    Seen { grounded, rows: cx.take_rows(), events, took: began.elapsed() }
}

fn of_eight() -> Settings {
    Settings { rerank: 8, ..Settings::default() }
}

async fn guide() -> World {
    let world = World::new().await;
    world.learn(document("guide.md", Some(samples::GUIDE))).await;
    world
}

#[tokio::test]
async fn a_reranker_has_the_last_word_on_the_order_and_its_try_leaves_a_row() {
    let world = guide().await;
    let found = rerank(&world, None, of_eight(), 60_000).await;
    assert_eq!((found.headings().len(), &found.grounded.retrieval.rerank, found.rows.len()), (3, &None, 0));
    let ranks = Numbers::backwards();
    let seen = rerank(&world, Some(&ranks), of_eight(), 60_000).await;
    let mut backwards = found.headings();
    backwards.reverse();
    assert_eq!(seen.headings(), backwards);
    assert_eq!(seen.grounded.passages[0].score, 2.0);
    assert!(seen.grounded.retrieval.rerank.is_some() && !seen.grounded.retrieval.is_degraded());
    let [row] = &seen.rows[..] else { panic!("{:?}", seen.rows) };
    assert_eq!(
        (row.stage.as_str(), row.status.as_str(), row.model.as_deref()),
        ("retrieve", "ok", Some("ranker"))
    );
    assert_eq!(row.operation.as_deref(), Some("rerank"));
    assert_eq!((row.input_tokens, row.cost_nano_usd), (Some(40), Some(9)));
    let is_told = |event: &Event| {
        matches!(
            event,
            Event::Called(Called { operation: Operation::Rerank, texts: Some(3), error: None, .. })
        )
    };
    assert!(seen.events.iter().any(is_told), "{:?}", seen.events);
    assert_eq!(seen.outcome(), "ok");
    let asked = ranks.asked.lock().unwrap().clone();
    assert!(asked[0].iter().any(|text| text.starts_with("The broker > Retention\n")), "{asked:?}");
}

#[tokio::test]
async fn only_the_best_candidates_are_scored() {
    let world = guide().await;
    let ranks = Numbers::backwards();
    let settings = Settings { limit: NonZeroUsize::MIN, rerank: 2, ..Settings::default() };
    let seen = rerank(&world, Some(&ranks), settings, 60_000).await;
    let found = rerank(&world, None, of_eight(), 60_000).await;
    assert_eq!(ranks.asked.lock().unwrap()[0].len(), 2);
    assert_eq!(seen.headings(), [found.headings()[1]]);
}

/// The reranker does so; the passages must have the order in which they were found, after so many milliseconds.
async fn check_degraded(
    world: &World,
    deadline_ms: i64,
    told: impl Fn(&[&str]) -> Option<Result<Vec<f32>, CallError>> + Send + Sync + 'static,
    (outcome, took_ms, rows): (&str, u64, &str),
) {
    let found = rerank(world, None, of_eight(), 60_000).await;
    let seen = rerank(world, Some(&Numbers::by(told)), of_eight(), deadline_ms).await;
    assert_eq!(seen.grounded.passages, found.grounded.passages, "{outcome}");
    seen.assert_degraded(outcome, took_ms, rows);
}

#[tokio::test]
async fn whatever_the_reranker_does_the_question_goes_on_in_its_time() {
    let world = guide().await;
    tokio::time::pause();
    let refuses = |class, code| move |_: &[&str]| Some(Err(CallError::new(class, code, "no")));
    let gives = |scores: &[f32]| {
        let scores = scores.to_vec();
        move |_: &[&str]| Some(Ok(scores.clone()))
    };
    let (gone, wrong) = ("model_unavailable", "model_rejected");
    check_degraded(&world, 60_000, refuses(Class::Outage, gone), (gone, 0, "failed")).await;
    check_degraded(&world, 60_000, refuses(Class::Rejected, wrong), (wrong, 0, "rejected")).await;
    check_degraded(&world, 60_000, gives(&[1.0]), ("model_malformed", 0, "ok")).await;
    check_degraded(&world, 60_000, gives(&[f32::NAN; 3]), ("model_malformed", 0, "ok")).await;
    check_degraded(&world, 60_000, |_| None, ("model_timeout", 2_000, "failed")).await;
    // Half of the time is left for whoever writes the answer.
    check_degraded(&world, 600, |_| None, ("model_timeout", 300, "failed")).await;
}

#[tokio::test]
async fn a_record_that_comes_twice_has_the_same_passages_and_scores_are_paid_for_once() {
    let world = guide().await;
    let found = rerank(&world, None, of_eight(), 60_000).await.grounded.passages;
    for answers_first in [true, false] {
        let ledger = Arc::new(Remembers::default());
        let twice = async |ranks: &Arc<Numbers>| {
            let ledger = Some(ledger.clone() as Arc<dyn Ledger>);
            rerank_with(&world, Some(ranks), of_eight(), (60_000, ledger)).await
        };
        let (good, bad) = (
            Numbers::backwards(),
            Numbers::by(|_| Some(Err(CallError::new(Class::Outage, "model_unavailable", "no")))),
        );
        let (first, second) = if answers_first { (&good, &bad) } else { (&bad, &good) };
        let (seen, again) = (twice(first).await, twice(second).await);
        assert_eq!(seen.grounded, again.grounded);
        assert_eq!(seen.grounded.passages == found, !answers_first);
        assert_eq!(again.outcome(), if answers_first { "ok" } else { "tried_before" });
        assert_eq!(again.rows.len(), 0, "nobody was asked: {:?}", again.rows);
    }
}

const WHAT_CAR: &str = "Which hue has the automobile?";

/// Documents of which no word of that question stands in the one that answers it; and, of each, how it is found.
async fn cars(numbers: Arc<Numbers>) -> World {
    let world = World::new().await.embedding(numbers, 3).await;
    world.learn(document("car.md", Some("The car is red."))).await;
    world.learn(document("ferry.md", Some("The ferry leaves at seven."))).await;
    world
}

fn embedding() -> Settings {
    Settings { embed: true, ..Settings::default() }
}

fn documents(seen: &Seen) -> Vec<&str> {
    seen.grounded.passages.iter().map(|passage| passage.document.as_str()).collect()
}

#[tokio::test]
async fn what_no_word_finds_its_meaning_does_and_the_try_leaves_a_row() {
    let numbers = Numbers::meanings("m");
    let world = cars(numbers.clone()).await;
    let by_words = run(&world.resources, WHAT_CAR, Settings::default(), (60_000, None)).await;
    assert_eq!((documents(&by_words), by_words.rows.len()), (vec![], 0));
    assert_eq!(by_words.grounded.retrieval, USUAL);
    let seen = run(&world.resources, WHAT_CAR, embedding(), (60_000, None)).await;
    assert_eq!(documents(&seen), ["car.md"], "the other lies beyond a right angle");
    let [row] = &seen.rows[..] else { panic!("{:?}", seen.rows) };
    assert_eq!((row.status.as_str(), row.model.as_deref(), row.cost_nano_usd), ("ok", Some("m"), Some(9)));
    let is_told = |event: &Event| {
        matches!(event, Event::Called(Called { operation: Operation::Embeddings, texts: Some(1), .. }))
    };
    assert!(seen.events.iter().any(is_told) && seen.outcome() == "ok", "{:?}", seen.events);
    let question = seen.grounded.retrieval.embed.unwrap().question;
    assert_eq!(question, Embedding::new("m", vec![1.0, 0.25, 0.0]));
    let asked = numbers.asked.lock().unwrap().concat();
    assert_eq!(asked, ["The car is red.", "The ferry leaves at seven.", WHAT_CAR]);
    // Where the words speak for one and the meaning for another, both are there.
    let both = run(&world.resources, "Is the ferry an automobile?", embedding(), (60_000, None)).await;
    let mut both = documents(&both);
    both.sort();
    assert_eq!(both, ["car.md", "ferry.md"]);
}

#[tokio::test]
async fn vectors_of_another_model_or_length_are_not_compared_and_their_passages_found_by_words() {
    let world = World::new().await.embedding(Numbers::meanings("m"), 3).await;
    let vectors = world.resources.embedder.as_ref().unwrap().vectors.clone();
    let other = |numbers, dimensions| Some(Embedder::new(numbers, dimensions, vectors.clone()));
    let longer = Numbers::of("m", |texts| Some(Ok(vec![vec![1.0, 0.25, 0.0, 0.0]; texts.len()])));
    world.learn_by(other(Numbers::meanings("n"), 3), document("a.md", Some("The car is red."))).await;
    world.learn_by(other(longer, 4), document("b.md", Some("A car is green."))).await;
    world.learn_by(None, document("c.md", Some("Each car is blue."))).await;
    assert_eq!(vectors.count().await.unwrap(), 0);
    let seen = run(&world.resources, WHAT_CAR, embedding(), (60_000, None)).await;
    assert_eq!((documents(&seen), seen.outcome()), (vec![], "ok"));
    let seen = run(&world.resources, "Is the car green?", embedding(), (60_000, None)).await;
    assert_eq!((documents(&seen).len(), documents(&seen)[0]), (3, "b.md"), "by its words");
    world.learn(document("a.md", Some("The car is red."))).await;
    let seen = run(&world.resources, WHAT_CAR, embedding(), (60_000, None)).await;
    assert_eq!(documents(&seen), ["a.md"], "indexed anew");
    world.learn(document("a.md", None)).await;
    assert_eq!(vectors.count().await.unwrap(), 0);
}

/// The embedder answers the question so; the passages must be those that its words find.
async fn check_without(
    told: impl Fn(&[&str]) -> Option<Result<Vec<Vec<f32>>, CallError>> + Send + Sync + 'static,
    (outcome, took_ms, rows): (&str, u64, &str),
) {
    const QUESTION: &str = "Is the car red?";
    let world = cars(Numbers::meanings("m")).await;
    let found = run(&world.resources, QUESTION, Settings::default(), (60_000, None)).await;
    let vectors = world.resources.embedder.as_ref().unwrap().vectors.clone();
    let embedder = Some(Embedder::new(Numbers::of("m", told), 3, vectors));
    let resources = Resources { embedder, ..world.resources.clone() };
    tokio::time::pause();
    let seen = run(&resources, QUESTION, embedding(), (60_000, None)).await;
    tokio::time::resume();
    assert!(
        !found.grounded.passages.is_empty() && seen.grounded.passages == found.grounded.passages,
        "{outcome}"
    );
    seen.assert_degraded(outcome, took_ms, rows);
}

#[tokio::test]
async fn whatever_the_embedder_does_the_question_goes_on_by_its_words() {
    let refuses = |class, code| move |_: &[&str]| Some(Err(CallError::new(class, code, "no")));
    let gives = |vectors: Vec<Vec<f32>>| move |_: &[&str]| Some(Ok(vectors.clone()));
    let (gone, wrong, malformed) = ("model_unavailable", "model_rejected", "model_malformed");
    check_without(refuses(Class::Outage, gone), (gone, 0, "failed")).await;
    check_without(refuses(Class::Rejected, wrong), (wrong, 0, "rejected")).await;
    check_without(gives(vec![]), (malformed, 0, "ok")).await;
    check_without(gives(vec![vec![1.0, 0.0, 0.0]; 2]), (malformed, 0, "ok")).await;
    check_without(gives(vec![vec![1.0, 0.0]]), (malformed, 0, "ok")).await;
    check_without(gives(vec![vec![1.0, f32::NAN, 0.0]]), (malformed, 0, "ok")).await;
    check_without(|_| None, ("model_timeout", 2_000, "failed")).await;
}

#[tokio::test]
async fn a_question_that_comes_twice_is_embedded_once_and_each_of_its_calls_is_its_own() {
    let world = cars(Numbers::meanings("m")).await;
    let ledger = Arc::new(Remembers::default());
    let twice = async || {
        let ledger = Some(ledger.clone() as Arc<dyn Ledger>);
        run(&world.resources, WHAT_CAR, embedding(), (60_000, ledger)).await
    };
    let (seen, again) = (twice().await, twice().await);
    assert_eq!((seen.rows.len(), again.rows.len(), again.outcome()), (1, 0, "ok"));
    assert_eq!(seen.grounded, again.grounded);
    // With a reranker there are two calls, and so two ids; the second's tries are numbered on.
    let resources = Resources { reranker: Some(Numbers::backwards()), ..world.resources.clone() };
    let settings = Settings { rerank: 8, ..embedding() };
    let seen = run(&resources, WHAT_CAR, settings, (60_000, None)).await;
    let [embedded, scored] = &seen.rows[..] else { panic!("{:?}", seen.rows) };
    assert_eq!((embedded.model.as_deref(), scored.model.as_deref()), (Some("m"), Some("ranker")));
    assert_ne!(embedded.call_id, scored.call_id);
    assert_eq!((embedded.attempt, scored.attempt), (0, 1));
}
