//! The contract of each store port, which all its adapters must pass, and what a crash may take from the embedded ones.
//!
//! A suite knows the port alone. Redis is tested where `FOREBAY_TEST_REDIS` names a server; see [`redis_url`].

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends by a panic, also in the functions it is made of"
)]

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use forebay_stores::vectors::{self, Hit, Point};
use forebay_stores::{
    Clock, Database, Error, KeyValue, Objects, Vectors, database, key_value, objects, wall_clock,
};
use forebay_tests::services;
use futures::future::{BoxFuture, join_all};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

type Outcome = Result<(), Box<dyn std::error::Error>>;

// ---------------------------------------------------------------------------------------------------- key-value

/// Lets time pass for a store, by its own clock.
type Pass<'a> = &'a (dyn Fn(Duration) -> BoxFuture<'static, ()> + Sync);

/// Long enough for a few calls of Redis, whose clock nobody sets.
const TTL: Duration = Duration::from_secs(3);

/// What every key-value adapter promises. `store` is empty.
async fn key_value_contract(store: &Arc<dyn KeyValue>, pass: Pass<'_>) -> Outcome {
    what_is_set_is_there_until_it_is_deleted(store.as_ref()).await?;
    what_expires_is_absent_to_every_call(store.as_ref(), pass).await?;
    a_time_to_live_goes_with_the_last_set(store.as_ref(), pass).await?;
    one_of_64_gets_what_is_absent(store).await?;
    a_lease_is_given_back_by_its_holder_alone(store.as_ref()).await?;
    many_are_set_and_deleted_together(store.as_ref()).await?;
    a_prefix_is_cleared_as_it_is_written(store.as_ref()).await?;
    no_reader_sees_less_than_was_acknowledged(store).await?;
    keys_and_values_may_be_large_and_of_any_language(store.as_ref()).await?;
    what_is_over_a_limit_is_refused(store.as_ref()).await
}

fn b(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn what_is_set_is_there_until_it_is_deleted(store: &dyn KeyValue) -> Outcome {
    assert_eq!(store.get("k").await?, None);
    assert!(!store.delete("k").await?);
    store.set("k", b("1"), None).await?;
    assert_eq!(store.get("k").await?, Some(b("1")));
    store.set("k", b(""), None).await?;
    assert_eq!(store.get("k").await?, Some(b("")), "an empty value is a value");
    assert!(store.delete("k").await?);
    assert_eq!(store.get("k").await?, None);
    store.flush().await?;
    assert!(!store.delete("k").await?);

    store.set("m1", b("1"), None).await?;
    store.set("m3", b("3"), None).await?;
    let keys = ["m3", "m2", "m1", "m3"].map(String::from);
    assert_eq!(store.get_many(&keys).await?, [Some(b("3")), None, Some(b("1")), Some(b("3"))]);
    assert_eq!(store.get_many(&[]).await?, []);
    Ok(())
}

async fn what_expires_is_absent_to_every_call(store: &dyn KeyValue, pass: Pass<'_>) -> Outcome {
    let ttl = Some(TTL);
    for key in ["e1", "e2", "e3", "e4"] {
        store.set(key, b("v"), ttl).await?;
        assert_eq!(store.get(key).await?, Some(b("v")));
    }
    assert!(!store.set_if_absent("e1", b("w"), ttl).await?);
    pass(TTL * 11 / 10).await;
    assert_eq!(store.get("e1").await?, None);
    assert_eq!(store.get_many(&["e1".into(), "e2".into()]).await?, [None, None]);
    assert!(store.set_if_absent("e1", b("w"), None).await?);
    assert_eq!(store.get("e1").await?, Some(b("w")));
    assert!(!store.delete("e2").await?);
    assert!(!store.delete_if("e3", b"v").await?);
    assert_eq!(store.clear("e").await?, 1, "only e1 is left to be cleared");

    store.set("e5", b("v"), Some(Duration::ZERO)).await?;
    pass(Duration::from_millis(50)).await;
    assert_eq!(store.get("e5").await?, None);
    Ok(())
}

async fn a_time_to_live_goes_with_the_last_set(store: &dyn KeyValue, pass: Pass<'_>) -> Outcome {
    let ttl = Some(TTL);
    store.set("t1", b("v"), ttl).await?;
    store.set("t1", b("w"), None).await?;
    store.set("t2", b("v"), None).await?;
    store.set("t2", b("w"), ttl).await?;
    store.set("t3", b("v"), ttl).await?;
    store.set_many(vec![("t3".into(), Some(b("w")))]).await?;
    pass(TTL * 11 / 10).await;
    let keys = ["t1", "t2", "t3"].map(String::from);
    assert_eq!(store.get_many(&keys).await?, [Some(b("w")), None, Some(b("w"))]);
    Ok(())
}

async fn one_of_64_gets_what_is_absent(store: &Arc<dyn KeyValue>) -> Outcome {
    for round in 0..10 {
        let contenders = (0..64).map(|number| {
            let (store, key) = (Arc::clone(store), format!("lease {round}"));
            tokio::spawn(async move {
                let won =
                    store.set_if_absent(&key, b(&number.to_string()), Some(Duration::from_secs(60))).await;
                won.map(|won| won.then_some(number))
            })
        });
        let mut winners = Vec::new();
        for contender in join_all(contenders).await {
            winners.extend(contender??);
        }
        let [winner] = winners[..] else { panic!("round {round} was won by {winners:?}") };
        assert_eq!(store.get(&format!("lease {round}")).await?, Some(b(&winner.to_string())));
    }
    Ok(())
}

async fn a_lease_is_given_back_by_its_holder_alone(store: &dyn KeyValue) -> Outcome {
    assert!(!store.delete_if("l", b"mine").await?);
    assert!(store.set_if_absent("l", b("mine"), None).await?);
    assert!(!store.delete_if("l", b"yours").await?);
    assert!(!store.delete_if("l", b"min").await?);
    assert_eq!(store.get("l").await?, Some(b("mine")));
    assert!(store.delete_if("l", b"mine").await?);
    assert_eq!(store.get("l").await?, None);
    assert!(store.set_if_absent("l", b("yours"), None).await?);
    Ok(())
}

async fn many_are_set_and_deleted_together(store: &dyn KeyValue) -> Outcome {
    store.set("s1", b("old"), None).await?;
    store.set("s2", b("old"), None).await?;
    let changes = [
        ("s1", Some("new")),
        ("s2", None),
        ("s3", Some("x")),
        ("s4", Some("x")),
        ("s3", None),
        ("s4", Some("y")),
    ];
    store.set_many(changes.map(|(key, value)| (key.to_owned(), value.map(b))).to_vec()).await?;
    let keys = ["s1", "s2", "s3", "s4"].map(String::from);
    assert_eq!(store.get_many(&keys).await?, [Some(b("new")), None, None, Some(b("y"))]);
    store.set_many(vec![]).await?;
    Ok(())
}

async fn a_prefix_is_cleared_as_it_is_written(store: &dyn KeyValue) -> Outcome {
    let keys = ["c:a*:1", "c:a*:2", "c:ab:1", "c:a?", "c:[ab]", "c:a", "c:b", "c:a\u{10FFFF}"];
    for key in keys {
        store.set(key, b("v"), None).await?;
    }
    assert_eq!(store.clear("c:a*:").await?, 2);
    assert_eq!(store.clear("c:a*:").await?, 0);
    assert_eq!(store.clear("c:[ab]").await?, 1);
    assert_eq!(store.get("c:b").await?, Some(b("v")));
    assert_eq!(store.clear("c:a").await?, 4);
    assert_eq!(store.get("c:a\u{10FFFF}").await?, None);
    assert_eq!(store.clear("c:").await?, 1);
    let many = (0..1500).map(|number| (format!("many {number}"), Some(b("v")))).collect();
    store.set_many(many).await?;
    assert!(store.clear("").await? >= 1500);
    assert_eq!(store.clear("").await?, 0);
    assert_eq!(store.get("many 7").await?, None);
    Ok(())
}

/// One writes rising numbers, others read: what they get is at least what was acknowledged before they asked.
async fn no_reader_sees_less_than_was_acknowledged(store: &Arc<dyn KeyValue>) -> Outcome {
    const LAST: u64 = 500;
    let acknowledged = Arc::new(AtomicU64::new(0));
    store.set("n", b("0"), None).await?;
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (store, acknowledged) = (Arc::clone(store), Arc::clone(&acknowledged));
            tokio::spawn(async move {
                loop {
                    let at_least = acknowledged.load(Ordering::SeqCst);
                    let got = store.get("n").await.ok().flatten().unwrap_or_default();
                    let got: u64 = std::str::from_utf8(&got).unwrap_or_default().parse().unwrap_or_default();
                    assert!(got >= at_least, "got {got} after {at_least} was acknowledged");
                    if at_least == LAST {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for number in 1..=LAST {
        if number % 3 == 0 {
            store.set_many(vec![("n".into(), None), ("n".into(), Some(b(&number.to_string())))]).await?;
        } else {
            store.set("n", b(&number.to_string()), None).await?;
        }
        acknowledged.store(number, Ordering::SeqCst);
    }
    for reader in readers {
        reader.await?;
    }
    Ok(())
}

async fn keys_and_values_may_be_large_and_of_any_language(store: &dyn KeyValue) -> Outcome {
    let large: Bytes = (0..1024 * 1024u32).map(|at| at.to_le_bytes()[at as usize % 3]).collect();
    let binary = Bytes::from_static(&[0, 255, 10, 13, 0]);
    let pairs = [
        ("größe/naïve 東京 🦀", &large),
        ("e\u{301}", &binary),
        ("\u{e9}", &large),
        (" \t\n\0", &binary),
        (&"k".repeat(key_value::KEY_BYTES_MAX), &binary),
    ];
    for (key, value) in &pairs {
        store.set(key, (*value).clone(), None).await?;
    }
    store.flush().await?;
    for (key, value) in &pairs {
        assert_eq!(store.get(key).await?.as_ref(), Some(*value), "{key:?}");
    }
    Ok(())
}

async fn what_is_over_a_limit_is_refused(store: &dyn KeyValue) -> Outcome {
    let long = "k".repeat(key_value::KEY_BYTES_MAX + 1);
    let many = vec!["k".to_owned(); key_value::KEYS_MAX + 1];
    let large = Bytes::from(vec![0; key_value::VALUE_BYTES_MAX + 1]);
    assert!(matches!(store.get("").await, Err(Error::Key { .. })));
    assert!(matches!(store.delete(&long).await, Err(Error::TooLarge { .. })));
    assert!(matches!(store.get_many(&many).await, Err(Error::TooLarge { .. })));
    assert!(matches!(store.set("k", large.clone(), None).await, Err(Error::TooLarge { .. })));
    assert!(matches!(store.set_if_absent("k", large, None).await, Err(Error::TooLarge { .. })));
    let changes = vec![("kept out".to_owned(), Some(b("v"))), (String::new(), None)];
    assert!(matches!(store.set_many(changes).await, Err(Error::Key { .. })));
    assert_eq!(store.get("kept out").await?, None, "all or none");
    Ok(())
}

async fn embedded_key_value(cache_bytes: u64) -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("store");
    let now_ms = Arc::new(AtomicU64::new(1_700_000_000_000));
    let clock: Clock = {
        let now_ms = Arc::clone(&now_ms);
        Arc::new(move || UNIX_EPOCH + Duration::from_millis(now_ms.load(Ordering::SeqCst)))
    };
    let pass = move |time: Duration| -> BoxFuture<'static, ()> {
        let ms = u64::try_from(time.as_millis()).expect("short");
        now_ms.fetch_add(ms, Ordering::SeqCst);
        Box::pin(async {})
    };
    let options = key_value::EmbeddedOptions { cache_bytes, clock };
    let database = Database::open(&path, database::Options::default()).await?;
    let other = key_value::Embedded::open(&database, "other", options.clone()).await?;
    other.set("k", b("other"), None).await?;
    let store: Arc<dyn KeyValue> =
        Arc::new(key_value::Embedded::open(&database, "t", options.clone()).await?);
    key_value_contract(&store, &pass).await?;
    assert_eq!(other.get("k").await?, Some(b("other")), "tables do not see each other");

    store.set("kept", b("v"), Some(Duration::from_secs(10))).await?;
    store.set("late", b("v"), Some(Duration::from_secs(1))).await?;
    database.close().await?;
    assert!(matches!(store.set("k", b("v"), None).await, Err(Error::Closed { .. })));
    pass(Duration::from_secs(5)).await;
    let database = Database::open(&path, database::Options::default()).await?;
    let store = key_value::Embedded::open(&database, "t", options).await?;
    assert_eq!(store.get("kept").await?, Some(b("v")));
    assert_eq!(store.get("late").await?, None);
    pass(Duration::from_secs(5)).await;
    assert_eq!(store.get("kept").await?, None);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn embedded_keeps_the_key_value_contract() -> Outcome {
    embedded_key_value(8 * 1024 * 1024).await
}

/// So that every read goes to the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn embedded_keeps_the_key_value_contract_without_memory() -> Outcome {
    embedded_key_value(0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn redis_keeps_the_key_value_contract() -> Outcome {
    let Some(url) = services::redis() else { return Ok(()) };
    let options = |prefix: &str| key_value::RedisOptions {
        prefix: format!("forebay-test:{}:{prefix}", std::process::id()),
        ..key_value::RedisOptions::default()
    };
    let other = key_value::Redis::connect(&url, options("b*")).await?;
    other.set("k", b("other"), None).await?;
    let store: Arc<dyn KeyValue> = Arc::new(key_value::Redis::connect(&url, options("[a]*")).await?);
    key_value_contract(&store, &|time| Box::pin(tokio::time::sleep(time))).await?;
    assert_eq!(other.get("k").await?, Some(b("other")), "prefixes do not see each other");

    store.set("kept", b("v"), None).await?;
    let again = key_value::Redis::connect(&url, options("[a]*")).await?;
    assert_eq!(again.get("kept").await?, Some(b("v")));
    again.clear("").await?;
    other.clear("").await?;
    Ok(())
}

/// A server that accepts and says nothing: the call must come back, and say whom it waited for.
#[tokio::test]
async fn redis_that_does_not_answer_is_unavailable_in_time() -> Outcome {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = silent.local_addr()?;
    let options = key_value::RedisOptions {
        connect_timeout: Duration::from_millis(100),
        response_timeout: Duration::from_millis(100),
        ..key_value::RedisOptions::default()
    };
    let connected = key_value::Redis::connect(&format!("redis://{address}"), options).await;
    let error = connected.err().ok_or("connected to nobody")?;
    assert!(error.is_transient(), "{error:?}");
    assert_eq!(error.to_string(), format!("redis at {address} is unavailable"));
    Ok(())
}

// ------------------------------------------------------------------------------------------------------ vectors

/// What every vector adapter promises but for [`found_is_what_brute_force_finds`]. `store` is empty, and is left so.
async fn vectors_contract(store: &Arc<dyn Vectors>) -> Outcome {
    a_group_is_replaced_and_removed(store.as_ref()).await?;
    ties_go_by_id_and_then_by_group(store.as_ref()).await?;
    vectors_of_another_length_are_refused(store.as_ref()).await?;
    what_cannot_be_compared_is_refused(store.as_ref()).await?;
    no_search_sees_a_group_half_replaced(store).await
}

fn point(id: &str, scope: &str, vector: &[f32]) -> Point {
    Point {
        id: id.into(),
        scope: scope.into(),
        vector: vector.into(),
        payload: b(&format!("payload of {id}")),
    }
}

fn ids(hits: &[Hit]) -> String {
    hits.iter().map(|hit| format!("{}/{}", hit.group, hit.id)).collect::<Vec<_>>().join(" ")
}

async fn a_group_is_replaced_and_removed(store: &dyn Vectors) -> Outcome {
    assert_eq!(store.count().await?, 0);
    assert_eq!(store.search(&[1.0, 0.0], &["s"], 5).await?, []);
    store.replace("g", vec![point("a", "s", &[1.0, 0.0]), point("b", "s", &[0.0, 1.0])]).await?;
    store.replace("h", vec![point("a", "s", &[-1.0, 0.0])]).await?;
    assert_eq!(store.count().await?, 3);
    let hits = store.search(&[2.0, 0.5], &["s"], 5).await?;
    assert_eq!(ids(&hits), "g/a g/b h/a");
    assert_eq!(hits[0].payload, b("payload of a"));
    assert!(
        (hits[0].score - 0.970_142_5).abs() < 1e-5 && (hits[2].score + 0.970_142_5).abs() < 1e-5,
        "{hits:?}"
    );
    store.replace("g", vec![point("c", "s", &[1.0, 0.0]), point("d", "t", &[1.0, 0.0])]).await?;
    assert_eq!(ids(&store.search(&[1.0, 0.0], &["s"], 5).await?), "g/c h/a");
    assert_eq!(ids(&store.search(&[1.0, 0.0], &["s", "t", "s"], 5).await?), "g/c g/d h/a");
    assert_eq!(store.search(&[1.0, 0.0], &[], 5).await?, []);
    assert_eq!(store.search(&[1.0, 0.0], &["u", ""], 5).await?, []);
    assert_eq!(store.search(&[1.0, 0.0], &["s"], 0).await?, []);
    store.replace("g", vec![]).await?;
    store.replace("never there", vec![]).await?;
    assert_eq!(ids(&store.search(&[1.0, 0.0], &["s", "t"], 5).await?), "h/a");
    store.clear().await?;
    assert_eq!((store.count().await?, store.search(&[1.0, 0.0], &["s"], 5).await?), (0, vec![]));
    Ok(())
}

async fn ties_go_by_id_and_then_by_group(store: &dyn Vectors) -> Outcome {
    for group in ["y", "x"] {
        let same = ["c", "a", "b"].map(|id| point(id, if id == "a" { "s" } else { "t" }, &[0.3, 0.7]));
        store.replace(group, same.to_vec()).await?;
    }
    let hits = store.search(&[0.1, 0.2], &["t", "s"], 5).await?;
    assert_eq!(ids(&hits), "x/a y/a x/b y/b x/c");
    store.clear().await?;

    store.replace("z", vec![point("zero", "s", &[0.0, 0.0]), point("back", "s", &[-1.0, 0.0])]).await?;
    let hits = store.search(&[1.0, 0.0], &["s"], 5).await?;
    assert_eq!((ids(&hits).as_str(), hits[0].score), ("z/zero z/back", 0.0));
    store.clear().await?;
    Ok(())
}

async fn vectors_of_another_length_are_refused(store: &dyn Vectors) -> Outcome {
    store.replace("g", vec![point("a", "s", &[1.0, 0.0])]).await?;
    let longer = store.replace("h", vec![point("b", "s", &[1.0, 0.0, 0.0])]).await;
    assert!(matches!(longer, Err(Error::Dimensions { expected: 2, got: 3, .. })), "{longer:?}");
    let mixed = store.replace("g", vec![point("b", "s", &[1.0, 0.0]), point("c", "s", &[1.0])]).await;
    assert!(matches!(mixed, Err(Error::Dimensions { expected: 2, got: 1, .. })), "{mixed:?}");
    let query = store.search(&[1.0], &["s"], 5).await;
    let error = query.err().ok_or("found something")?;
    assert!(error.to_string().starts_with("the vector has 1 dimensions, those in "), "{error}");
    assert_eq!(ids(&store.search(&[1.0, 0.0], &["s"], 5).await?), "g/a", "what was refused changed nothing");
    store.clear().await?;
    let fresh = store.replace("h", vec![point("a", "s", &[1.0, 0.0]), point("b", "s", &[1.0])]).await;
    assert!(matches!(fresh, Err(Error::Dimensions { expected: 2, got: 1, .. })), "{fresh:?}");
    store.replace("h", vec![point("b", "s", &[1.0, 0.0, 0.0])]).await?;
    store.clear().await?;
    Ok(())
}

async fn what_cannot_be_compared_is_refused(store: &dyn Vectors) -> Outcome {
    for not_finite in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let put = store.replace("g", vec![point("a", "s", &[1.0, not_finite])]).await;
        assert!(matches!(put, Err(Error::NotFinite)), "{put:?}");
        assert!(matches!(store.search(&[not_finite], &["s"], 1).await, Err(Error::NotFinite)));
    }
    let twice = store.replace("g", vec![point("a", "s", &[1.0]), point("a", "t", &[1.0])]).await;
    assert!(matches!(twice, Err(Error::Duplicate { .. })), "{twice:?}");
    let long = vec![0.0; vectors::DIMENSIONS_MAX + 1];
    assert!(matches!(store.replace("g", vec![point("a", "s", &long)]).await, Err(Error::TooLarge { .. })));
    assert!(matches!(store.search(&[1.0], &["s"], vectors::HITS_MAX + 1).await, Err(Error::TooLarge { .. })));
    assert_eq!(store.count().await?, 0);
    Ok(())
}

async fn no_search_sees_a_group_half_replaced(store: &Arc<dyn Vectors>) -> Outcome {
    const SIZE: usize = 20;
    let version = |number: usize| -> Vec<Point> {
        // Each version is in other scopes and of other ids too.
        let point = |at: usize| Point {
            id: format!("{number} {at}"),
            scope: format!("s{}", (number + at) % 3),
            vector: vec![1.0, 0.01 * f32::from(u8::try_from(at).expect("few"))],
            payload: b(&number.to_string()),
        };
        (0..SIZE).map(point).collect()
    };
    store.replace("g", version(0)).await?;
    store.replace("beside", vec![point("x", "s0", &[0.0, 1.0]), point("y", "s1", &[0.0, 1.0])]).await?;
    const READERS: usize = 3;
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let saw_two = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            let (store, done, saw_two) = (Arc::clone(store), Arc::clone(&done), Arc::clone(&saw_two));
            tokio::spawn(async move {
                let mut seen = HashSet::new();
                while !done.load(Ordering::SeqCst) {
                    let hits = store.search(&[1.0, 0.0], &["s0", "s1", "s2"], 100).await.expect("searchable");
                    let versions: Vec<_> =
                        hits.iter().filter(|hit| hit.group == "g").map(|hit| &hit.payload).collect();
                    assert_eq!(versions.len(), SIZE, "{versions:?}");
                    assert!(versions.windows(2).all(|two| two[0] == two[1]), "{versions:?}");
                    assert_eq!(hits.len(), SIZE + 2);
                    if seen.insert(versions[0].clone()) && seen.len() == 2 {
                        saw_two.fetch_add(1, Ordering::SeqCst);
                    }
                    // A search may be answered in place, and others want this thread too.
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    // Until each reader has seen a change, or nothing was tested.
    let mut number = 1;
    while number < 200 || saw_two.load(Ordering::SeqCst) < READERS {
        assert!(number < 1_000_000, "a reader saw one version only");
        store.replace("g", version(number)).await?;
        tokio::task::yield_now().await;
        number += 1;
    }
    done.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await?;
    }
    store.clear().await?;
    Ok(())
}

#[derive(Clone, Debug)]
struct Trial {
    /// In order; a later one of the same group replaces the earlier.
    replaced: Vec<(String, Vec<Point>)>,
    query: Vec<f32>,
    scopes: Vec<String>,
    limit: usize,
}

/// Small whole numbers make many ties; few names make many collisions.
fn trials() -> impl Strategy<Value = Trial> {
    let component = prop_oneof![(-2i8..=2).prop_map(f32::from), -1.0f32..1.0];
    (1usize..40).prop_flat_map(move |dimensions| {
        let vector = prop::collection::vec(component.clone(), dimensions);
        let point = (prop::sample::select(&["s", "t", "u", "tenant a", ""]), vector.clone());
        let group = prop::collection::vec(point, 0..12).prop_map(|points| -> Vec<Point> {
            points.iter().enumerate().map(|(at, (scope, vector))| trial_point(at, scope, vector)).collect()
        });
        let replaced = prop::collection::vec(("[gh][0-4]", group), 0..12);
        let scopes = prop::collection::vec("s|t|u|tenant a|foreign|", 0..4);
        (replaced, vector, scopes, 0usize..20).prop_map(|(replaced, query, scopes, limit)| Trial {
            replaced,
            query,
            scopes,
            limit,
        })
    })
}

fn trial_point(at: usize, scope: &str, vector: &[f32]) -> Point {
    let payload = b(&format!("{scope} {at}"));
    Point { id: format!("{:02}", (at * 7) % 12), scope: scope.into(), vector: vector.into(), payload }
}

fn cosine(left: &[f32], right: &[f32]) -> f64 {
    let dot = |left: &[f32], right: &[f32]| -> f64 {
        left.iter().zip(right).map(|(&left, &right)| f64::from(left) * f64::from(right)).sum()
    };
    let lengths = (dot(left, left) * dot(right, right)).sqrt();
    if lengths == 0.0 { 0.0 } else { dot(left, right) / lengths }
}

/// Exact but for rounding: what was found scores what it should, and nothing left out scores more.
async fn found_is_what_brute_force_finds(store: &dyn Vectors, trial: &Trial) -> Result<(), TestCaseError> {
    const ROUNDING: f64 = 1e-5;
    let mut stored = BTreeMap::new();
    for (group, points) in &trial.replaced {
        store.replace(group, points.clone()).await.map_err(|error| TestCaseError::fail(error.to_string()))?;
        stored.insert(group.as_str(), points);
    }
    let scopes: Vec<_> = trial.scopes.iter().map(String::as_str).collect();
    let hits = store.search(&trial.query, &scopes, trial.limit).await;
    let hits = hits.map_err(|error| TestCaseError::fail(error.to_string()))?;

    let all = stored.iter().flat_map(|(&group, points)| points.iter().map(move |point| (group, point)));
    let (mine, foreign): (Vec<_>, Vec<_>) =
        all.partition(|(_, point)| scopes.contains(&point.scope.as_str()));
    prop_assert_eq!(store.count().await.ok(), u64::try_from(mine.len() + foreign.len()).ok());
    prop_assert_eq!(hits.len(), trial.limit.min(mine.len()));
    let mut mine: BTreeMap<_, _> =
        mine.into_iter().map(|(group, point)| ((group, point.id.as_str()), point)).collect();
    for hit in &hits {
        let point = mine.remove(&(hit.group.as_str(), hit.id.as_str()));
        let Some(point) = point else {
            return Err(TestCaseError::fail(format!("{hit:?} is foreign or twice")));
        };
        prop_assert_eq!(&hit.payload, &point.payload);
        prop_assert!(
            (f64::from(hit.score) - cosine(&trial.query, &point.vector)).abs() < ROUNDING,
            "{:?}",
            hit
        );
    }
    for two in hits.windows(2) {
        let tied = two[0].score == two[1].score && (&two[0].id, &two[0].group) < (&two[1].id, &two[1].group);
        prop_assert!(two[0].score > two[1].score || tied, "out of order: {:?}", two);
    }
    if let Some(worst) = hits.last() {
        for (key, point) in &mine {
            let left_out = cosine(&trial.query, &point.vector);
            prop_assert!(
                left_out < f64::from(worst.score) + ROUNDING,
                "{:?} at {} was left out",
                key,
                left_out
            );
        }
    }
    store.clear().await.map_err(|error| TestCaseError::fail(error.to_string()))
}

#[test]
fn embedded_keeps_the_vectors_contract() -> Outcome {
    let runtime = tokio::runtime::Runtime::new()?;
    let folder = tempfile::tempdir()?;
    let database = Database::open(folder.path().join("store"), database::Options::default());
    let database = runtime.block_on(database)?;
    let store: Arc<dyn Vectors> = Arc::new(runtime.block_on(vectors::Embedded::open(&database, "t"))?);
    runtime.block_on(vectors_contract(&store))?;
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&trials(), |trial| runtime.block_on(found_is_what_brute_force_finds(store.as_ref(), &trial)))?;
    Ok(())
}

#[tokio::test]
async fn embedded_vectors_are_the_same_after_reopening() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("store");
    let database = Database::open(&path, database::Options::default()).await?;
    let store = vectors::Embedded::open(&database, "t").await?;
    let other = vectors::Embedded::open(&database, "other").await?;
    other.replace("g", vec![point("o", "s", &[1.0])]).await?;
    store.replace("g", vec![point("a", "s", &[1.0, 0.3]), point("b", "t", &[0.2, -0.1])]).await?;
    store.replace("h", vec![point("a", "s", &[-0.7, 0.3]), point("z", "s", &[0.0, 0.0])]).await?;
    store.replace("gone", vec![point("a", "s", &[1.0, 1.0])]).await?;
    store.replace("gone", vec![]).await?;
    let before = store.search(&[0.4, 0.6], &["s", "t"], 10).await?;
    database.close().await?;

    let database = Database::open(&path, database::Options::default()).await?;
    let store = vectors::Embedded::open(&database, "t").await?;
    assert_eq!(store.count().await?, 4);
    assert_eq!(store.search(&[0.4, 0.6], &["s", "t"], 10).await?, before);
    let longer = store.replace("g", vec![point("a", "s", &[1.0, 0.0, 0.0])]).await;
    assert!(matches!(longer, Err(Error::Dimensions { expected: 2, .. })), "{longer:?}");
    assert!(matches!(vectors::Embedded::open(&database, "t").await, Err(Error::Opened { .. })));
    Ok(())
}

// ------------------------------------------------------------------------------------------------------ objects

/// What every object adapter promises. `store` is empty.
async fn objects_contract(store: &Arc<dyn Objects>) -> Outcome {
    an_object_is_there_until_it_is_deleted(store.as_ref()).await?;
    one_of_16_puts_what_is_absent(store).await?;
    keys_are_listed_in_order(store.as_ref()).await?;
    a_key_that_leads_elsewhere_is_refused_by_every_call(store.as_ref()).await?;
    no_reader_sees_half_an_object(store).await
}

async fn an_object_is_there_until_it_is_deleted(store: &dyn Objects) -> Outcome {
    assert_eq!(store.get("a/b").await?, None);
    store.delete("a/b").await?;
    let large: Bytes = (0..1024 * 1024u32).map(|at| at.to_le_bytes()[at as usize % 3]).collect();
    for (key, object) in [("a/b", b("1")), ("a/größe 東京 🦀.txt", large), ("empty", b("")), ("a/b", b("2"))]
    {
        store.put(key, object.clone()).await?;
        assert_eq!(store.get(key).await?, Some(object), "{key}");
    }
    assert_eq!(store.get("a").await?, None, "where others lie is no object");
    assert!(!store.put_if_absent("a/b", b("3")).await?);
    assert_eq!(store.get("a/b").await?, Some(b("2")));
    store.delete("a/b").await?;
    assert_eq!(store.get("a/b").await?, None);
    assert!(store.put_if_absent("a/b", b("3")).await?);
    assert_eq!(store.list("", 10).await?, ["a/b", "a/größe 東京 🦀.txt", "empty"]);
    for key in store.list("", 10).await? {
        store.delete(&key).await?;
    }
    assert_eq!(store.list("", 10).await?, [""; 0]);
    Ok(())
}

async fn one_of_16_puts_what_is_absent(store: &Arc<dyn Objects>) -> Outcome {
    for round in 0..5 {
        let contenders = (0..16).map(|number| {
            let (store, key) = (Arc::clone(store), format!("once/{round}"));
            tokio::spawn(async move {
                let won = store.put_if_absent(&key, b(&number.to_string())).await;
                won.map(|won| won.then_some(number))
            })
        });
        let mut winners = Vec::new();
        for contender in join_all(contenders).await {
            winners.extend(contender??);
        }
        let [winner] = winners[..] else { panic!("round {round} was won by {winners:?}") };
        assert_eq!(store.get(&format!("once/{round}")).await?, Some(b(&winner.to_string())));
        store.delete(&format!("once/{round}")).await?;
    }
    Ok(())
}

async fn keys_are_listed_in_order(store: &dyn Objects) -> Outcome {
    for key in ["l/b", "l/a/2", "l/a/1", "l/a-", "l/ab", "m", "l2", "l/c/d/e"] {
        store.put(key, b("x")).await?;
    }
    assert_eq!(store.list("l/", 10).await?, ["l/a-", "l/a/1", "l/a/2", "l/ab", "l/b", "l/c/d/e"]);
    assert_eq!(store.list("l/a", 10).await?, ["l/a-", "l/a/1", "l/a/2", "l/ab"]);
    assert_eq!(store.list("l/a/", 10).await?, ["l/a/1", "l/a/2"]);
    assert_eq!(store.list("l", 2).await?, ["l/a-", "l/a/1"]);
    assert_eq!(store.list("", 1).await?, ["l/a-"]);
    assert_eq!(store.list("", 0).await?, [""; 0]);
    assert_eq!(store.list("none/", 10).await?, [""; 0]);
    assert!(matches!(store.list("", objects::LIST_MAX + 1).await, Err(Error::TooLarge { .. })));
    Ok(())
}

async fn a_key_that_leads_elsewhere_is_refused_by_every_call(store: &dyn Objects) -> Outcome {
    let traversals = [
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "/etc/passwd",
        "a//b",
        ".",
        "./a",
        "a\\..\\b",
        "%2e%2e/x",
        "a\0b",
    ];
    for key in traversals {
        let refused =
            |done: Result<(), Error>| assert!(matches!(done, Err(Error::Key { .. })), "{key:?}: {done:?}");
        refused(store.put(key, b("x")).await);
        refused(store.put_if_absent(key, b("x")).await.map(drop));
        refused(store.get(key).await.map(drop));
        refused(store.delete(key).await);
        refused(store.list(key, 10).await.map(drop));
    }
    for key in ["", "a/"] {
        assert!(matches!(store.put(key, b("x")).await, Err(Error::Key { .. })), "{key:?}");
    }
    Ok(())
}

async fn no_reader_sees_half_an_object(store: &Arc<dyn Objects>) -> Outcome {
    let version = |number: u8| Bytes::from(vec![number; 300_000]);
    store.put("whole", version(0)).await?;
    let writer = {
        let store = Arc::clone(store);
        tokio::spawn(async move {
            for number in 1..30 {
                store.put("whole", version(number)).await?;
            }
            Ok::<_, Error>(())
        })
    };
    while !writer.is_finished() {
        let object = store.get("whole").await?.ok_or("the object is gone")?;
        assert!(object.len() == 300_000 && object.iter().all(|byte| *byte == object[0]));
    }
    writer.await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_folder_keeps_the_objects_contract() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("data/objects");
    let store: Arc<dyn Objects> = Arc::new(objects::Folder::open(&path).await?);
    objects_contract(&store).await?;
    store.put("kept/one", b("v")).await?;
    drop(store);
    let again = objects::Folder::open(&path).await?;
    assert_eq!(again.get("kept/one").await?, Some(b("v")));
    let beside: Vec<_> = std::fs::read_dir(folder.path().join("data"))?.collect();
    assert_eq!(beside.len(), 1, "something was written outside the folder: {beside:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_tenants_part_keeps_the_objects_contract_and_shows_nothing_else() -> Outcome {
    let folder = tempfile::tempdir()?;
    let whole: Arc<dyn Objects> = Arc::new(objects::Folder::open(folder.path()).await?);
    whole.put("tenant/bb/secret", b("theirs")).await?;
    whole.put("tenant/b/x", b("theirs")).await?;
    let tenant: Arc<dyn Objects> = Arc::new(objects::Prefixed::new(Arc::clone(&whole), "tenant/a")?);
    objects_contract(&tenant).await?;
    assert_eq!(tenant.get("bb/secret").await?, None);
    assert!(whole.list("tenant/a/", 100).await?.len() == tenant.list("", 100).await?.len());
    assert_eq!(whole.list("tenant/b", 100).await?, ["tenant/b/x", "tenant/bb/secret"]);
    for prefix in ["", "..", "a/..", "a/"] {
        assert!(objects::Prefixed::new(Arc::clone(&whole), prefix).is_err(), "{prefix:?}");
    }
    Ok(())
}

// -------------------------------------------------------------------------------------------------------- crash

const CRASH_FOLDER: &str = "FOREBAY_TEST_CRASH_FOLDER";
const CRASH_KEYS: u64 = 8;

async fn crash_stores(path: &Path) -> Result<(Database, key_value::Embedded, vectors::Embedded), Error> {
    let options =
        database::Options { durable_every: Duration::from_millis(20), ..database::Options::default() };
    let database = Database::open(path.join("store"), options).await?;
    let options = key_value::EmbeddedOptions { cache_bytes: 0, clock: wall_clock() };
    let entries = key_value::Embedded::open(&database, "t", options).await?;
    let points = vectors::Embedded::open(&database, "t").await?;
    Ok((database, entries, points))
}

async fn number_at(store: &dyn KeyValue, key: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let Some(value) = store.get(key).await? else { return Ok(0) };
    Ok(u64::from_be_bytes(value[..8].try_into()?))
}

/// Not a test by itself: the process that the next one kills.
#[tokio::test]
#[ignore = "is run by a_kill_takes_values_and_position_back_together"]
async fn child_that_writes_until_it_is_killed() -> Outcome {
    let Some(folder) = std::env::var_os(CRASH_FOLDER) else { return Ok(()) };
    let (_database, entries, points) = crash_stores(Path::new(&folder)).await?;
    let first = number_at(&entries, "position").await? + 1;
    let mut output = std::io::stdout();
    for number in first.. {
        // Values of several pages, so that a commit is many writes.
        let mut value = number.to_be_bytes().to_vec();
        value.resize(6000, 7);
        let value = Bytes::from(value);
        let mut changes: Vec<_> =
            (0..CRASH_KEYS).map(|key| (format!("value {key}"), Some(value.clone()))).collect();
        changes.push(("position".to_owned(), Some(Bytes::copy_from_slice(&number.to_be_bytes()))));
        entries.set_many(changes).await?;
        let payload = Bytes::copy_from_slice(&number.to_be_bytes());
        points.replace("g", vec![Point { payload, ..point("a", "s", &[1.0, 0.5]) }]).await?;
        entries.set("indexed", Bytes::copy_from_slice(&number.to_be_bytes()), None).await?;
        if number % 50 == 0 {
            entries.flush().await?;
            writeln!(output, "\nflushed {number}")?;
        } else {
            writeln!(output, "\nwritten {number}")?;
        }
        output.flush()?;
    }
    Ok(())
}

#[test]
fn a_kill_takes_values_and_position_back_together() -> Outcome {
    let folder = tempfile::tempdir()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let (mut lost, mut position) = (0, 0);
    for round in 0..8u64 {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "child_that_writes_until_it_is_killed", "--ignored", "--nocapture"])
            .env(CRASH_FOLDER, folder.path())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let (mut written, mut flushed) = (position, 0);
        let kill_at = position + 60 + 37 * round;
        while written < kill_at {
            let line = lines.next().ok_or("the child ended by itself")??;
            let number = line.split_once(' ').and_then(|(_, number)| number.parse().ok());
            match (line.split(' ').next(), number) {
                (Some("written"), Some(number)) => written = number,
                (Some("flushed"), Some(number)) => (written, flushed) = (number, number),
                _ => {}
            }
        }
        child.kill()?;
        child.wait()?;
        // What it wrote between the last line read and the kill.
        for line in lines.map_while(Result::ok) {
            let number: Option<u64> = line.split_once(' ').and_then(|(_, number)| number.parse().ok());
            if line.starts_with("written") || line.starts_with("flushed") {
                written = number.unwrap_or(written);
            }
        }

        runtime.block_on(async {
            let (database, entries, points) = crash_stores(folder.path()).await?;
            position = number_at(&entries, "position").await?;
            for key in 0..CRASH_KEYS {
                assert_eq!(
                    number_at(&entries, &format!("value {key}")).await?,
                    position,
                    "value {key} in round {round}"
                );
            }
            assert!(position >= flushed, "{position} is before {flushed}, which was flushed");
            assert!(position <= written + 1, "{position} is after {written}");
            let indexed = number_at(&entries, "indexed").await?;
            let hits = points.search(&[1.0, 0.5], &["s"], 9).await?;
            let found = u64::from_be_bytes(hits[0].payload[..8].try_into()?);
            assert!(
                hits.len() == 1 && (indexed..=indexed + 1).contains(&found),
                "{indexed} says more than {found}"
            );
            assert!((found..=found + 1).contains(&position), "{position} and {found} are of different times");
            lost += written.saturating_sub(position);
            database.close().await?;
            Ok::<_, Box<dyn std::error::Error>>(())
        })?;
    }
    println!("8 kills took back {lost} writes of {position}, all of them whole");
    Ok(())
}
