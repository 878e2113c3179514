//! Lots in virtual time, before a server that knows its texts by their length.

use super::*;
use crate::{
    Priced, Prices,
    client::{Hedging, Parts, joining},
    pool::{Endpoint, Pool},
    testing::{Heard, Next, Told, error, reply},
    throttle::Caps,
};
use forebay_operator::Clock;
use futures::future::join_all;

const WAIT: Duration = Duration::from_millis(15);
const SIZE: Size = Size { texts: 3, tokens: 1_000, wait: WAIT };

/// Answers each text by its length after 100 ms, for 101 nano-dollars; a text `bad` makes it refuse, with this status.
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
        Next::says(100, Reply { vectors, cost_nano_usd: Some(NanoUsd(101)), ..reply("") })
    });
    (told, seen)
}

/// Who asks for the vectors of these words, by when.
#[derive(Clone, Copy, Default)]
struct Caller {
    words: &'static str,
    tenant: Option<&'static str>,
    within_ms: Option<u64>,
}

fn says(words: &'static str) -> Caller {
    Caller { words, ..Caller::default() }
}

async fn ask(model: &dyn Model, caller: Caller, heard: &Heard) -> Result<Reply, CallError> {
    let texts: Vec<&str> = caller.words.split_whitespace().collect();
    let tenant = caller.tenant.map(|tenant| tenant.to_owned().try_into().unwrap()).unwrap_or_default();
    let deadline = caller.within_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
    let call = Call { task: Task::Embed(&texts), tenant, deadline, ..Call::default() };
    model.complete(&call, heard).await
}

fn told_of(result: &Result<Reply, CallError>) -> String {
    match result {
        Ok(reply) => reply.vectors.concat().iter().map(f32::to_string).collect::<Vec<_>>().join(" "),
        Err(error) => format!("{:?}", error.class),
    }
}

/// Each list of words is a caller, all at once; says what each got, which calls were made and how long it took.
async fn check(callers: &[&'static str], size: Size, status: u16, expected: &str) {
    let (told, seen) = lengths(status);
    let (batch, began, heard) = (Batch::new(told, size), Instant::now(), Heard::default());
    let got = join_all(callers.iter().map(|&words| ask(&batch, says(words), &heard))).await;
    let got: Vec<_> = got.iter().map(told_of).collect();
    let mut seen = lock(&seen).clone();
    seen.sort();
    let ms = began.elapsed().as_millis();
    assert_eq!(format!("{} <= {} in {ms} ms", got.join(", "), seen.join(" | ")), expected, "{callers:?}");
}

#[tokio::test(start_paused = true)]
async fn a_full_lot_goes_at_once_and_any_other_after_its_wait() {
    check(&["a", "bb", "ccc"], SIZE, 400, "1, 2, 3 <= a bb ccc in 100 ms").await;
    check(&["a", "bb"], SIZE, 400, "1, 2 <= a bb in 115 ms").await;
    check(&["a"], SIZE, 400, "1 <= a in 115 ms").await;
    check(&["a bb ccc"], SIZE, 400, "1 2 3 <= a bb ccc in 100 ms").await;
    check(&["a bb", "ccc dddd"], SIZE, 400, "1 2, 3 4 <= a bb | ccc dddd in 115 ms").await;
    check(&["a bb ccc dddd"], SIZE, 400, "1 2 3 4 <= a bb ccc dddd in 100 ms").await;
}

#[tokio::test(start_paused = true)]
async fn tokens_are_counted_too() {
    let few = Size { tokens: 4, ..SIZE };
    let expected =
        "8, 8, 8, 20, 8 <= aaaaaaaa | aaaaaaaa | aaaaaaaa aaaaaaaa | bbbbbbbbbbbbbbbbbbbb in 115 ms";
    check(&["aaaaaaaa", "aaaaaaaa", "aaaaaaaa", "bbbbbbbbbbbbbbbbbbbb", "aaaaaaaa"], few, 400, expected)
        .await;
}

#[test]
fn a_long_list_is_parted_by_texts_and_by_tokens() {
    let few = Size { tokens: 4, ..SIZE };
    assert!(few.parts(&[]).is_empty());
    assert_eq!(few.parts(&["a"; 7]), [0..3, 3..6, 6..7]);
    let long = "b".repeat(20);
    assert_eq!(few.parts(&["aaaaaaaa", "aaaaaaaa", "a", &long, "a"]), [0..2, 2..3, 3..4, 4..5]);
}

#[tokio::test(start_paused = true)]
async fn one_bad_text_fails_its_own_caller_and_no_other() {
    let six = Size { texts: 6, ..SIZE };
    check(
        &["a", "bb", "bad", "ccc"],
        six,
        400,
        "1, 2, Rejected, 3 <= a | a bb bad ccc | bad | bb | ccc in 115 ms",
    )
    .await;
    check(&["a", "bad"], six, 404, "Rejected, Rejected <= a bad in 15 ms").await;
    check(&["bad a"], six, 400, "Rejected <= bad a in 15 ms").await;
}

#[tokio::test(start_paused = true)]
async fn who_shares_a_try_hears_of_it_with_its_part() {
    let (told, _) = lengths(400);
    let batch = Batch::new(told, SIZE);
    let (first, second) = (Heard::default(), Heard::default());
    let (one, two) =
        tokio::join!(ask(&batch, says("aaaa"), &first), ask(&batch, says("bbbbbbbbbbbb"), &second),);
    // 10 tokens and 101 nano-dollars, a quarter and three.
    let took = |reply: Result<Reply, CallError>| {
        let reply = reply.unwrap();
        (reply.usage.unwrap().prompt_tokens, reply.cost_nano_usd.unwrap().0)
    };
    assert_eq!((took(one), took(two)), ((2, 25), (8, 76)));
    assert_eq!(first.take(), "to server, ok 25, kept ");
    assert_eq!(second.take(), "to server, ok 76, kept ");
    let waited = |wait, ms| Happening::Waited(wait, Duration::from_millis(ms));
    let happened = |texts| vec![Happening::Joined(texts), waited(Wait::Batch, 15), waited(Wait::Room, 0)];
    assert_eq!(first.take_happenings(), happened(Some(2)));
    assert_eq!(second.take_happenings(), happened(None));
    // Alone it is as if there were no lot.
    ask(&batch, says("aaaa"), &first).await.unwrap();
    assert_eq!(first.take(), "to server, ok 101, kept ");
    assert_eq!(first.take_happenings(), [waited(Wait::Batch, 15)]);
}

#[tokio::test(start_paused = true)]
async fn tenants_share_no_call() {
    let (told, seen) = lengths(400);
    let (batch, heard) = (Batch::new(told, SIZE), Heard::default());
    let of = |tenant, words| ask(&batch, Caller { tenant: Some(tenant), ..says(words) }, &heard);
    let got = tokio::join!(of("shop", "a bb"), of("club", "ccc"), of("shop", "ee"));
    assert_eq!([got.0, got.1, got.2].map(|got| told_of(&got)), ["1 2", "3", "2"]);
    let mut seen = lock(&seen).clone();
    seen.sort();
    assert_eq!(seen, ["a bb ee", "ccc"]);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_takes_nobody_s_answer_away_and_the_last_takes_the_call_along() {
    let (told, _) = lengths(400);
    let (batch, heard) = (Batch::new(told.clone(), SIZE), Heard::default());
    let soon = |words, ms| Caller { within_ms: Some(ms), ..says(words) };
    let other = Heard::default();
    let (leaves, stays) = tokio::join!(ask(&batch, soon("a", 50), &heard), ask(&batch, says("bb"), &other));
    assert_eq!(leaves.unwrap_err().code, "model_timeout");
    assert_eq!(heard.take(), "to server, transient, closed", "it was sent, and its end is told");
    assert_eq!(told_of(&stays), "2");
    // Left before the lot was sent, then nobody is there to send it, and who comes later begins a new one.
    ask(&batch, soon("gone", 5), &heard).await.unwrap_err();
    assert_eq!(heard.take(), "closed");
    assert_eq!(told_of(&ask(&batch, says("ccc"), &heard).await), "3");
    assert_eq!(told.tries(), 2);
    assert!(lock(&batch.open).len() <= 1, "lots are forgotten");
}

#[tokio::test(start_paused = true)]
async fn who_leaves_before_the_end_has_its_part_of_what_the_try_has_cost_by_then() {
    let table = r#"{
        "by-token": {"input_cost_per_token": 1e-6},
        "by-time": {"input_cost_per_second": 0.001}
    }"#;
    // 4 tokens at 1,000 each, or 35 ms at 1,000,000 a second; a quarter of it.
    for (server, expected) in [("by-token", "cost 1000"), ("by-time", "cost 8750")] {
        let vectors = vec![vec![1.0], vec![2.0]];
        let both = Next::says(100, Reply { vectors, usage: Some(Usage::of(4, 0)), ..reply("") });
        let prices = Prices::new(Clock::System).with_table("t.json", table, None).unwrap();
        let batch = Batch::new(Arc::new(Priced::new(Told::of(server, [both]), Arc::new(prices))), SIZE);
        let [late, cancelled, stays] = [(); 3].map(|()| Heard::default());
        let soon = Caller { within_ms: Some(50), ..says("aaaa") };
        let (leaves, stayed) =
            tokio::join!(ask(&batch, soon, &late), ask(&batch, says("bbbbbbbbbbbb"), &stays));
        leaves.unwrap_err();
        assert_eq!(late.take(), format!("to {server}, {expected}, transient, closed"));
        let whole = if server == "by-token" { 4_000 } else { 100_000 };
        assert_eq!(stayed.unwrap().cost_nano_usd, Some(NanoUsd(whole * 3 / 4)), "{server}");

        let took_back =
            tokio::time::timeout(Duration::from_millis(50), ask(&batch, says("aaaa"), &cancelled));
        let (took_back, stayed) = tokio::join!(took_back, ask(&batch, says("bbbbbbbbbbbb"), &stays));
        assert!(took_back.is_err() && stayed.is_err(), "the server has but one answer with vectors");
        assert_eq!(cancelled.take(), format!("to {server}, {expected}"));
    }
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
    let (hedging, fallbacks, allowances) = (Hedging::Off, Vec::new(), None);
    let model = joining(Parts { pool, hedging, fallbacks, allowances, jitter: Arc::new(|| 1.0) }, SIZE);
    let heard = Heard::default();
    for _ in 0..20 {
        let (one, two) = tokio::join!(ask(&*model, says("a"), &heard), ask(&*model, says("bb"), &heard));
        assert_eq!((told_of(&one), told_of(&two)), ("1".to_owned(), "2".to_owned()));
    }
    assert_eq!(good.tries(), 20);
    let failed = failing.tries();
    assert!((1..=10).contains(&failed), "{failed} tries; a retry went elsewhere each time");
    let words = heard.take();
    assert_eq!(words.matches("to dead").count(), 2 * failed, "each hears of the try that failed: {words}");
}
