//! Retrieval over real stores.

use super::*;
use crate::samples::{self, World, document};
use forebay_operator::compliance;
use forebay_schemas::Document;

async fn seek(world: &World, tenant: &str, question: &str, retrieval: Retrieval) -> Vec<Passage> {
    let tenant = Tenant::try_from(tenant.to_owned()).unwrap();
    Retriever::new(world.resources.vectors.clone()).seek(question, &tenant, retrieval).await.unwrap()
}

const USUAL: Retrieval = Retrieval { limit: 8, tokens_max: 2400 };

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
    let of = |limit, tokens_max| Retrieval { limit, tokens_max };
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
    let samples = samples.map(|body| body.as_bytes().to_vec()).into();
    compliance::assert_complies(Retrieve::new(Settings::default(), &world.resources), samples).await;
}
