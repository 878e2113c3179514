//! Lots in virtual time, before a server that knows its texts by their length.

use super::*;
use crate::{
    Reply,
    client::{Hedging, Parts, client},
    pool::{Endpoint, Pool},
    testing::{Heard, Next, Told, error, reply},
    throttle::Caps,
};

const WAIT: Duration = Duration::from_millis(15);
const SIZE: Size = Size { texts: 3, tokens: 1_000, wait: WAIT };

/// Answers each text by its length after 100 ms; a text `bad` makes it refuse, with this status.
fn lengths(status: u16) -> (Arc<Told>, Arc<Mutex<Vec<String>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = seen.clone();
    let told = Told::by("server", move |call| {
        let Task::Embed(texts) = call.task else { panic!("vectors are wanted") };
        lock(&note).push(texts.join(" "));
        if texts.contains(&"bad") {
            return Next::err(0, error(Class::Rejected).with_status(status));
        }
        let vectors = texts.iter().map(|text| vec![f32::from(u8::try_from(text.len()).unwrap())]).collect();
        Next { result: Ok(Reply { vectors, ..reply("") }), ..Next::ok(100) }
    });
    (told, seen)
}

fn embeddings(model: Arc<dyn Model>, size: Size) -> Embeddings {
    Embeddings::new(model, size, Arc::new(|| Box::new(Heard::default())))
}

fn texts(words: &str) -> Vec<String> {
    words.split_whitespace().map(str::to_owned).collect()
}

/// Each list of words is a caller, all at once; says what each got, which calls were made and how long it took.
async fn check(callers: &[&str], size: Size, status: u16, expected: &str) {
    let (told, seen) = lengths(status);
    let (embeddings, began) = (embeddings(told, size), Instant::now());
    let asker = Asker::default();
    let got = join_all(callers.iter().map(|words| embeddings.embed(texts(words), &asker))).await;
    let got: Vec<_> = got
        .into_iter()
        .map(|got| match got {
            Ok(vectors) => vectors.concat().iter().map(f32::to_string).collect::<Vec<_>>().join(" "),
            Err(error) => format!("{:?}", error.class),
        })
        .collect();
    let seen = lock(&seen).join(" | ");
    let ms = began.elapsed().as_millis();
    assert_eq!(format!("{} <= {seen} in {ms} ms", got.join(", ")), expected, "{callers:?}");
}

#[tokio::test(start_paused = true)]
async fn a_full_lot_goes_at_once_and_any_other_after_its_wait() {
    check(&["a", "bb", "ccc"], SIZE, 400, "1, 2, 3 <= a bb ccc in 100 ms").await;
    check(&["a", "bb"], SIZE, 400, "1, 2 <= a bb in 115 ms").await;
    check(&["a bb", "ccc dddd"], SIZE, 400, "1 2, 3 4 <= a bb ccc | dddd in 115 ms").await;
    check(
        &["a bb ccc dddd eeeee ffffff g"],
        SIZE,
        400,
        "1 2 3 4 5 6 1 <= a bb ccc | dddd eeeee ffffff | g in 115 ms",
    )
    .await;
    check(&[""], SIZE, 400, " <=  in 0 ms").await;
}

#[tokio::test(start_paused = true)]
async fn tokens_are_counted_too() {
    let few = Size { tokens: 4, ..SIZE };
    let (eight, twenty) = ("a".repeat(8), "b".repeat(20));
    let both = format!("{eight} {eight} {eight} {twenty} {eight}");
    let expected = format!("8 8 8 20 8 <= {eight} {eight} | {eight} | {twenty} | {eight} in 115 ms");
    check(&[&both], few, 400, &expected).await;
}

#[tokio::test(start_paused = true)]
async fn one_bad_text_fails_its_own_caller_and_no_other() {
    let six = Size { texts: 6, ..SIZE };
    let expected = "1, 2, Rejected, 3, 4, 5 <= a bb bad ccc dddd eeeee | a bb bad | a | bb bad | bb | bad | ccc dddd eeeee in 300 ms";
    check(&["a", "bb", "bad", "ccc", "dddd", "eeeee"], six, 400, expected).await;
    check(&["a", "bad", "bb"], SIZE, 404, "Rejected, Rejected, Rejected <= a bad bb in 0 ms").await;
}

#[tokio::test(start_paused = true)]
async fn where_all_are_bad_the_calls_are_counted() {
    let (told, seen) = lengths(422);
    let many = Size { texts: 1_000, tokens: 1_000_000, ..SIZE };
    let embeddings = embeddings(told, many);
    embeddings.embed(texts(&"bad ".repeat(1_000)), &Asker::default()).await.unwrap_err();
    let calls = u32::try_from(lock(&seen).len()).unwrap();
    assert_eq!(calls, 2 * HALVED_MAX + 1);
}

#[tokio::test(start_paused = true)]
async fn tenants_share_no_call() {
    let (told, seen) = lengths(400);
    let embeddings = embeddings(told, SIZE);
    let of = |tenant: &str| Asker { tenant: tenant.to_owned().try_into().unwrap(), ..Asker::default() };
    let (shop, club) = (of("shop"), of("club"));
    let embed = |words, asker| embeddings.embed(texts(words), asker);
    let got = tokio::join!(embed("a bb", &shop), embed("ccc", &club), embed("ee", &shop));
    assert_eq!(got.0.unwrap(), [[1.0], [2.0]]);
    assert_eq!((got.1.unwrap(), got.2.unwrap()), (vec![vec![3.0]], vec![vec![2.0]]));
    let mut seen = lock(&seen).clone();
    seen.sort();
    assert_eq!(seen, ["a bb ee", "ccc"]);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_takes_nobody_s_answer_away_and_the_last_takes_the_call_along() {
    let (told, _) = lengths(400);
    let embeddings = embeddings(told.clone(), SIZE);
    let (asker, soon) = (
        Asker::default(),
        Asker { deadline: Some(Instant::now() + Duration::from_millis(50)), ..Asker::default() },
    );
    let (leaves, stays) =
        tokio::join!(embeddings.embed(texts("a"), &soon), embeddings.embed(texts("bb"), &asker));
    assert_eq!(leaves.unwrap_err().code, "model_timeout");
    assert_eq!(stays.unwrap(), [[2.0]]);
    // Left before the lot was sent, then nobody is there to send it, and who comes later begins a new one.
    let soon = Asker { deadline: Some(Instant::now() + Duration::from_millis(5)), ..Asker::default() };
    embeddings.embed(texts("gone"), &soon).await.unwrap_err();
    assert_eq!(embeddings.embed(texts("ccc"), &asker).await.unwrap(), [[3.0]]);
    assert_eq!(told.tries(), 2);
    assert!(lock(&embeddings.0.open).len() <= 1, "lots are forgotten");
}

#[tokio::test(start_paused = true)]
async fn lots_go_through_the_layers_that_answers_go_through() {
    let failing = Told::of("dead", (0..1_000).map(|_| Next::err(0, error(Class::Outage).with_status(503))));
    let (good, _) = lengths(400);
    let endpoint = |told: &Arc<Told>| Endpoint {
        name: "e".to_owned(),
        model: told.clone(),
        caps: Caps { outstanding: 8, requests_per_minute: None, tokens_per_minute: None },
        origin: String::new(),
        watch: None,
        starts_cold: false,
        shared: None,
    };
    let pool = Arc::new(Pool::new("m", vec![endpoint(&failing), endpoint(&good)], Arc::new(|| 0.5)));
    let model = client(Parts {
        pool: pool.clone(),
        hedging: Hedging::Off,
        fallbacks: Vec::new(),
        allowances: None,
        jitter: Arc::new(|| 1.0),
    });
    let embeddings = embeddings(model, SIZE);
    for _ in 0..20 {
        assert_eq!(embeddings.embed(texts("a bb"), &Asker::default()).await.unwrap(), [[1.0], [2.0]]);
    }
    assert_eq!(good.tries(), 20);
    assert!(
        (1..=10).contains(&failing.tries()),
        "{} tries; a retry went elsewhere each time",
        failing.tries()
    );
}
