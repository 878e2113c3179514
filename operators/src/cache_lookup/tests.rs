//! A cache is filled as the pipeline fills it, and then asked.

use super::*;
use crate::{
    catalogue,
    samples::{self, Numbers, World, document, request},
};
use forebay_operator::{Clock, compliance};
use forebay_schemas::{Completion, Ending, Envelope, Tenant};
use forebay_stores::{Answer, Error};
use serde_json::{Value, json};
use std::time::Duration;

const QUESTION: &str = r#"{"prompt": "What does compaction keep?"}"#;

/// Runs a step on a record and gives what leaves by each port.
async fn run(world: &World, operator: &str, body: &[u8], cx: &Context) -> Vec<(&'static str, Vec<u8>)> {
    let settings = match (operator, &world.resources.reranker, &world.resources.embedder) {
        ("retrieve", Some(_), _) => json!({"rerank": 8}),
        ("retrieve", _, Some(_)) => json!({"embed": true}),
        _ => Value::Null,
    };
    let step = catalogue::build(operator, &settings, &world.resources).unwrap();
    let out = step.open(None, Some(body)).unwrap().run(cx).await.unwrap();
    out.into_iter().map(|record| (record.port, record.body.unwrap())).collect()
}

/// Asks the question and takes it the whole way to the cache; gives the ending.
async fn fill(world: &World, question: &str) -> Ending {
    let mut body = question.as_bytes().to_vec();
    for operator in ["retrieve", "infer", "validate"] {
        let mut envelope = compliance::envelope();
        envelope.timings.cache = Some(1);
        let cx = Context::quiet(envelope, Clock::starting_at(compliance::NOW_MS));
        body = run(world, operator, &body, &cx).await.remove(0).1;
    }
    for (_, entry) in run(world, "fill_cache", &body, &samples::cx()).await {
        let key = CacheEntry::decode(&entry).unwrap().key;
        world.change("CacheEntry", key, Some(entry.into())).await;
    }
    Ending::decode(&body).unwrap()
}

async fn world() -> World {
    let world = World::new().await;
    world.learn(document("guide.md", Some(samples::GUIDE))).await;
    world
}

/// Looks up, `later_s` seconds after the cache was filled.
async fn look(world: &World, question: &str, mut settings: Value, later_s: i64) -> Looked {
    if settings["timeout_ms"].is_null() {
        // The store answers, however busy the machine.
        settings["timeout_ms"] = json!(60_000);
    }
    let settings = serde_json::from_value(settings).unwrap();
    let lookup = CacheLookup::new(settings, &world.resources);
    let clock = Clock::starting_at(compliance::NOW_MS + later_s * 1000);
    let cx = Context::quiet(compliance::envelope(), clock);
    lookup.process(request(question), &cx).await.unwrap().remove(0)
}

async fn check(world: &World, question: &str, expected: &str) {
    let looked = look(world, question, json!({}), 0).await;
    assert_eq!(forebay_operator::Output::port(&looked), expected, "{question}");
}

#[tokio::test]
async fn a_repeated_question_is_answered_from_the_cache() {
    let world = world().await;
    check(&world, QUESTION, "miss").await;
    let filled = fill(&world, QUESTION).await;
    assert_eq!(filled.cache, CacheStatus::Miss);
    let Looked::Hit(hit) = look(&world, r#"{"prompt": " What does  compaction keep?"}"#, json!({}), 0).await
    else {
        panic!("a miss")
    };
    let made = filled.answer.unwrap();
    assert_eq!((hit.cache, &hit.answer.text, hit.answer.usage), (CacheStatus::Hit, &made.text, made.usage));
    let chunks: Vec<_> = hit.passages.iter().map(|passage| passage.chunk.clone()).collect();
    assert_eq!(chunks, filled.chunks, "a hit shows the evidence that the model saw");
    let validated = run(&world, "validate", &hit.encode().unwrap().unwrap(), &samples::cx()).await;
    assert_eq!(validated[0].0, "passed");
    assert_eq!(Completion::decode(&hit.encode().unwrap().unwrap()).unwrap(), hit);
}

#[tokio::test]
async fn another_question_or_another_tenant_misses() {
    let world = world().await;
    fill(&world, QUESTION).await;
    check(&world, r#"{"prompt": "What does compaction not keep?"}"#, "miss").await;
    check(&world, r#"{"prompt": "What does compaction keep?", "model": "large"}"#, "miss").await;
    let origin = compliance::envelope().origin;
    let tenant = Tenant::try_from("other".to_owned()).unwrap();
    let envelope =
        Envelope::entering(compliance::envelope().id, tenant, origin, compliance::NOW_MS, Vec::new());
    let cx = Context::quiet(envelope, Clock::starting_at(compliance::NOW_MS));
    let lookup = CacheLookup::new(Settings::default(), &world.resources);
    assert!(matches!(lookup.process(request(QUESTION), &cx).await.unwrap()[..], [Looked::Miss(_)]));
}

#[tokio::test]
async fn no_answer_outlives_the_document_that_it_rests_on() {
    let world = world().await;
    fill(&world, QUESTION).await;
    check(&world, QUESTION, "hit").await;
    let changed = samples::GUIDE.replace("youngest", "oldest");
    world.learn(document("guide.md", Some(&changed))).await;
    check(&world, QUESTION, "miss").await;
    world.learn(document("guide.md", Some(samples::GUIDE))).await;
    check(&world, QUESTION, "hit").await;
    world.learn(document("other.md", Some("Compaction keeps something else since today."))).await;
    check(&world, QUESTION, "miss").await;
    world.learn(document("other.md", None)).await;
    world.learn(document("guide.md", None)).await;
    check(&world, QUESTION, "miss").await;
}

#[tokio::test]
async fn an_answer_from_reranked_passages_is_given_again_without_asking_the_reranker() {
    const QUESTION: &str = r#"{"prompt": "What of segments?"}"#;
    let mut world = world().await;
    let found = fill(&world, QUESTION).await.chunks;
    let ranks = Numbers::backwards();
    world.resources.reranker = Some(ranks.clone());
    let mut filled = fill(&world, QUESTION).await.chunks;
    let Looked::Hit(hit) = look(&world, QUESTION, json!({}), 0).await else { panic!("a miss") };
    assert!(hit.passages.iter().map(|passage| &passage.chunk).eq(&filled), "in the order that the model saw");
    filled.reverse();
    assert!(filled == found && found.len() > 1, "{found:?}");
    assert_eq!(ranks.asked.lock().unwrap().len(), 1);
    world.learn(document("other.md", Some("Segments are told of here too."))).await;
    check(&world, QUESTION, "miss").await;
    world.learn(document("other.md", None)).await;
    check(&world, QUESTION, "hit").await;
}

#[tokio::test]
async fn an_answer_that_was_found_by_its_meaning_is_given_again_without_asking_the_embedder() {
    const QUESTION: &str = r#"{"prompt": "Which hue has the automobile?"}"#;
    let numbers = Numbers::meanings("m");
    let mut world = World::new().await.embedding(numbers.clone(), 3).await;
    world.learn(document("car.md", Some("The car is red."))).await;
    assert_eq!(fill(&world, QUESTION).await.chunks.len(), 1);
    check(&world, QUESTION, "hit").await;
    assert_eq!(numbers.asked.lock().unwrap().len(), 2, "the document, and the question once");
    // What means the same is a source too, whatever its words.
    world.learn(document("other.md", Some("No car is green."))).await;
    check(&world, QUESTION, "miss").await;
    world.learn(document("other.md", None)).await;
    check(&world, QUESTION, "hit").await;
    // Whoever does not know that embedder cannot tell.
    world.resources.embedder = None;
    check(&world, QUESTION, "miss").await;
}

#[tokio::test]
async fn a_client_says_how_old_an_answer_may_be_and_the_pipeline_too() {
    let world = world().await;
    fill(&world, QUESTION).await;
    let with = |cache: Value| json!({"prompt": "What does compaction keep?", "cache": cache}).to_string();
    check(&world, &with(json!({"no_store": true})), "hit").await;
    check(&world, &with(json!({"no_cache": true})), "miss").await;
    let is_hit = async |question: &str, settings: Value, later_s: i64| {
        matches!(look(&world, question, settings, later_s).await, Looked::Hit(_))
    };
    // Far enough from the bound for a busy machine: clocks go on meanwhile.
    assert!(is_hit(&with(json!({"max_age_s": 600})), json!({}), 500).await);
    assert!(!is_hit(&with(json!({"max_age_s": 600})), json!({}), 700).await);
    assert!(is_hit(QUESTION, json!({"ttl_s": 600}), 500).await);
    assert!(!is_hit(QUESTION, json!({"ttl_s": 600}), 700).await);
    assert!(!is_hit(QUESTION, json!({"ttl_s": 600}), 0).await, "what was too old is gone");
}

/// A key-value store that never answers, or answers with an error.
struct Broken {
    hangs: bool,
}

impl Broken {
    fn answer<T: Send + 'static>(&self) -> Answer<'_, T> {
        let hangs = self.hangs;
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            Err(Error::Closed { path: "broken".into() })
        })
    }
}

impl KeyValue for Broken {
    fn get(&self, _: &str) -> Answer<'_, Option<bytes::Bytes>> {
        self.answer()
    }
    fn get_many(&self, _: &[String]) -> Answer<'_, Vec<Option<bytes::Bytes>>> {
        self.answer()
    }
    fn set(&self, _: &str, _: bytes::Bytes, _: Option<Duration>) -> Answer<'_, ()> {
        self.answer()
    }
    fn set_if_absent(&self, _: &str, _: bytes::Bytes, _: Option<Duration>) -> Answer<'_, bool> {
        self.answer()
    }
    fn delete(&self, _: &str) -> Answer<'_, bool> {
        self.answer()
    }
    fn delete_if(&self, _: &str, _: &[u8]) -> Answer<'_, bool> {
        self.answer()
    }
    fn set_many(&self, _: Vec<(String, Option<bytes::Bytes>)>) -> Answer<'_, ()> {
        self.answer()
    }
    fn clear(&self, _: &str) -> Answer<'_, u64> {
        self.answer()
    }
    fn flush(&self) -> Answer<'_, ()> {
        self.answer()
    }
}

#[tokio::test]
async fn a_cache_that_fails_or_hangs_is_a_miss() {
    for hangs in [false, true] {
        let mut world = World::new().await;
        world.resources.cache = Arc::new(Broken { hangs });
        let looked = look(&world, QUESTION, json!({"timeout_ms": 10}), 0).await;
        assert_eq!(looked, Looked::Miss(request(QUESTION)), "hangs: {hangs}");
    }
}

#[tokio::test]
async fn it_complies() {
    let world = world().await;
    fill(&world, QUESTION).await;
    let samples = [QUESTION, r#"{"prompt": "other"}"#, r#"{"prompt": "a", "temperature": 2}"#];
    let samples = samples.map(|body| body.as_bytes().to_vec()).into();
    compliance::assert_complies(CacheLookup::new(Settings::default(), &world.resources), samples).await;
}
