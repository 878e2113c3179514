//! Tiers that do as they are told, in virtual time.

use super::*;
use crate::{
    Allowed, Class,
    allowance::{Allowances, Reservation},
    testing::{Heard, Next, Told, call, error, reply},
};
use forebay_schemas::Sampling;
use serde_json::json;
use std::sync::Mutex;

const ALL: Escalation = Escalation {
    on_schema: true,
    on_refusal: true,
    on_verdict: true,
    on_outage: false,
    logprob_min: Some(-1.0),
};

fn policy(rules: &str, escalation: Escalation) -> Policy {
    let names = ["small", "large"].map(str::to_owned);
    Policy { rules: Rule::all(rules, &names).unwrap(), classifier: None, escalation }
}

fn tier(name: &str, model: Arc<dyn Model>) -> Tier {
    Tier { name: name.to_owned(), model: model.clone(), alone: model, stand_ins: None }
}

/// Two tiers of which each does this once, and then answers after 100 ms.
fn tiers(small: Next, large: Next, policy: Policy) -> Tiers {
    let small = Told::of("small", [small]);
    Tiers::new(vec![tier("small", small), tier("large", Told::of("large", [large]))], policy)
}

async fn ask(tiers: &Tiers, asked: &Call<'_>) -> (String, Option<Answered>, String) {
    let heard = Heard::default();
    let (text, answered) = match tiers.complete(asked, &heard).await {
        Ok(reply) => (reply.text, reply.answered),
        Err(error) => (format!("{:?}", error.class), None),
    };
    (text, answered, heard.take())
}

/// Asks two tiers; the answer that stands.
async fn check(asked: &Call<'_>, small: Next, large: Next, escalation: Escalation, expected: &str) {
    let tiers = tiers(small, large, policy("", escalation));
    assert_eq!(ask(&tiers, asked).await.0, expected, "{escalation:?}");
}

fn says(text: &str) -> Next {
    Next::says(100, reply(text))
}

#[tokio::test(start_paused = true)]
async fn a_rule_picks_then_the_model_that_is_asked_for_and_else_the_cheapest() {
    let tiers = tiers(Next::ok(1), Next::ok(1), policy("tokens > 50 -> large", ALL));
    let asked = |text: &str, model: Option<&str>| Call { model: model.map(str::to_owned), ..call(text) };
    let long = "x".repeat(300);
    for (text, model, expected) in
        [("why", None, "small"), ("why", Some("large"), "large"), (&long, Some("small"), "large")]
    {
        let (text, answered, _) = ask(&tiers, &asked(text, model)).await;
        assert_eq!(text, expected);
        assert_eq!(answered, Some(Answered { tier: expected.to_owned(), provider: "told" }));
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_that_means_no_tier_goes_to_the_first_one_s_server_and_to_no_other() {
    let told = |name, expected: Option<&'static str>, text: &'static str| {
        Told::by(name, move |asked| {
            assert_eq!(asked.model.as_deref(), expected, "{name}");
            says(text)
        })
    };
    let small = told("small", Some("other"), "I cannot help with that.");
    let all = vec![tier("small", small), tier("large", told("large", None, "Gladly."))];
    let asked = Call { model: Some("other".to_owned()), ..call("why") };
    assert_eq!(ask(&Tiers::new(all, policy("", ALL)), &asked).await.0, "Gladly.");
}

#[tokio::test(start_paused = true)]
async fn each_cause_makes_the_next_tier_answer_where_it_is_told_to() {
    let form = Sampling { response_format: Some(json!({"type": "json_object"})), ..Sampling::default() };
    let formed = Call { sampling: form, ..call("why") };
    let judged = |reply: &Reply| match reply.text.as_str() {
        "bad" => Verdict::Bad,
        "doubtful" => Verdict::Doubtful,
        _ => Verdict::Good,
    };
    let judged = Call { judge: Judge(Some(&judged)), ..call("why") };
    let unsure = || Next::says(100, Reply { logprob: Some(-1.5), ..reply("hm") });
    let sure = || Next::says(100, Reply { logprob: Some(-0.5), ..reply("hm") });
    let withheld =
        || Next::says(100, Reply { finish_reason: Some("content_filter".to_owned()), ..reply("I") });
    let refused = || Next::err(100, CallError::new(Class::Rejected, "model_refused", "no"));
    let off = Escalation::default();
    check(&formed, says("no object"), says("{}"), ALL, "{}").await;
    check(&formed, says("no object"), says("{}"), off, "no object").await;
    check(&judged, says("bad"), says("good"), ALL, "good").await;
    check(&judged, says("doubtful"), says("good"), ALL, "good").await;
    check(&judged, says("bad"), says("good"), off, "bad").await;
    check(&call("why"), says("I’m unable to say."), says("42"), ALL, "42").await;
    check(&call("why"), says("I’m unable to say."), says("42"), off, "I’m unable to say.").await;
    check(&call("why"), withheld(), says("42"), ALL, "42").await;
    check(&call("why"), refused(), says("42"), ALL, "42").await;
    check(&call("why"), refused(), says("42"), off, "Rejected").await;
    check(&call("why"), unsure(), says("42"), ALL, "42").await;
    check(&call("why"), unsure(), says("42"), off, "hm").await;
    check(&call("why"), sure(), says("42"), ALL, "hm").await;
    let down = || Next::err(100, error(Class::Outage));
    check(&call("why"), down(), says("42"), ALL, "Outage").await;
    check(&call("why"), down(), says("42"), Escalation { on_outage: true, ..off }, "42").await;
}

#[tokio::test(start_paused = true)]
async fn each_tier_is_a_call_of_its_own_with_its_own_cost() {
    let costs = |cost, text: &str| {
        Next::says(10, Reply { cost_nano_usd: Some(forebay_schemas::NanoUsd(cost)), ..reply(text) })
    };
    let tiers = tiers(costs(3, "I cannot help with it."), costs(70, "42"), policy("", ALL));
    let (_, _, heard) = ask(&tiers, &call("why")).await;
    assert_eq!(
        heard,
        "tier 0 small, to small, ok 3, kept I cannot help with it., tier 1 large, to large, ok 70, kept 42"
    );
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_may_go_out_stands_where_the_better_tier_fails_and_another_does_not() {
    let soft = || says("I cannot help with it.");
    for class in [Class::Outage, Class::Rejected, Class::Closed] {
        check(&call("why"), soft(), Next::err(5, error(class)), ALL, "I cannot help with it.").await;
    }
    let formed = Call {
        sampling: Sampling { response_format: Some(json!({"type": "json_object"})), ..Sampling::default() },
        ..call("why")
    };
    check(&formed, says("no object"), Next::err(5, error(Class::Outage)), ALL, "Outage").await;
    check(&formed, says("no object"), says("none either"), ALL, "none either").await;
    check(&formed, says("{\"I cannot help\": 1}"), says("no object"), ALL, "{\"I cannot help\": 1}").await;
}

#[tokio::test(start_paused = true)]
async fn a_better_tier_that_is_too_slow_or_comes_too_late_leaves_the_answer_that_stands() {
    let within = async |ms: u64, first_ms: u64| {
        let small = Next::says(first_ms, reply("I cannot help with it."));
        let large = Told::of("large", [Next::ok(60_000)]);
        let all = vec![tier("small", Told::of("small", [small])), tier("large", large.clone())];
        let start = Instant::now();
        let asked = Call { deadline: Some(start + Duration::from_millis(ms)), ..call("why") };
        let (text, _, _) = ask(&Tiers::new(all, policy("", ALL)), &asked).await;
        assert_eq!(text, "I cannot help with it.");
        (start.elapsed().as_millis(), large.tries())
    };
    // A tenth of what is left is kept, and this model does not look at deadlines.
    assert_eq!(within(1_100, 100).await, (100 + 900 + 50, 1));
    assert_eq!(within(301, 100).await, (100 + 101 + 50, 1));
    assert_eq!(within(300, 100).await, (100, 0), "no time to ask and to write the answer down");
}

/// Has room for so many calls.
struct Room(Mutex<usize>);
struct Held;

impl Reservation for Held {
    fn settle<'a>(self: Box<Self>, _: &'a Reply) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }
}

impl Allowances for Room {
    fn reserve<'a>(
        &'a self,
        _: &'a Call<'_>,
        _: &'a str,
    ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>> {
        let mut room = self.0.lock().unwrap();
        let left = room.checked_sub(1).inspect(|left| *room = *left);
        let spent = || CallError::new(Class::Rejected, "budget_exceeded", "nothing is left");
        Box::pin(async move { left.map(|_| Box::new(Held) as Box<dyn Reservation>).ok_or_else(spent) })
    }
}

#[tokio::test(start_paused = true)]
async fn a_better_tier_that_cannot_be_paid_leaves_the_answer_that_stands() {
    for (room, expected, tries) in [(0, "Rejected", 0), (1, "I cannot help with it.", 0), (2, "large", 1)] {
        let room = Arc::new(Room(Mutex::new(room)));
        let large = Told::of("large", []);
        let paid = |told: Arc<Told>| Arc::new(Allowed::new(told, room.clone()));
        let small = Told::of("small", [says("I cannot help with it.")]);
        let all = vec![tier("small", paid(small)), tier("large", paid(large.clone()))];
        let (text, _, _) = ask(&Tiers::new(all, policy("", ALL)), &call("why")).await;
        assert_eq!((text.as_str(), large.tries()), (expected, tries));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stand_in_answers_where_nothing_stands_and_never_for_an_answer_that_does() {
    let stand_in = |tries: &Arc<Told>| Tier {
        name: "large".to_owned(),
        model: tries.clone(),
        alone: Told::by("down", |_| Next::err(0, error(Class::Outage))),
        stand_ins: None,
    };
    for (small, expected, asked) in [("I cannot help with it.", "I cannot help with it.", 0), ("{", "{}", 1)]
    {
        let extractive = Told::by("extractive", |_| says("{}"));
        let all = vec![tier("small", Told::of("small", [says(small)])), stand_in(&extractive)];
        let format = if asked == 1 { Some(json!({"type": "json_object"})) } else { None };
        let formed =
            Call { sampling: Sampling { response_format: format, ..Sampling::default() }, ..call("why") };
        assert_eq!(ask(&Tiers::new(all, policy("", ALL)), &formed).await.0, expected);
        assert_eq!(extractive.tries(), asked);
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_stays_one_though_a_better_tier_rejects_and_stand_ins_answer_it() {
    let escalation = Escalation { on_outage: true, ..Escalation::default() };
    let down = |told: &Arc<Told>, stand_in: Option<Arc<Told>>| Tier {
        name: "small".to_owned(),
        model: Told::of("never", []),
        alone: told.clone(),
        stand_ins: stand_in.map(|stand_in| stand_in as Arc<dyn Model>),
    };
    let outage = || Told::by("small", |_| Next::err(0, error(Class::Outage)));
    for (large, stand_in, expected) in [
        (Class::Rejected, None, "Outage"),
        (Class::Rejected, Some(Next::ok(1)), "extractive"),
        (Class::Rejected, Some(Next::err(1, error(Class::Rejected))), "Outage"),
        // Somebody has read the beginning of an answer.
        (Class::Cut, Some(Next::ok(1)), "Cut"),
    ] {
        let small = outage();
        let stand_in = stand_in.map(|next| Told::of("extractive", [next]));
        let large = Told::by("large", move |_| Next::err(0, error(large)));
        let all = vec![down(&small, stand_in), tier("large", large)];
        let (text, answered, _) = ask(&Tiers::new(all, policy("", escalation)), &call("why")).await;
        assert_eq!((text.as_str(), small.tries()), (expected, 1));
        assert!(answered.is_none() && text != "never");
    }
}

/// Takes some time to write down what was paid.
struct Writes(Duration);

impl Listener for Writes {
    fn started(&self, _: crate::Upstream<'_>) {}
    fn token(&self, _: &str) {}
    fn ended(&self, _: &crate::Tried<'_>) {}
    fn paid<'a>(
        &'a self,
        _: crate::Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async {
            let result = call.await;
            tokio::time::sleep(self.0).await;
            result
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_better_answer_that_came_in_time_is_not_lost_while_it_is_written_down() {
    // Of the time that is left by then 100 ms are kept, of 1,000 as of 250.
    for (left_ms, write_ms, expected) in [
        (1_000, 20, "large"),
        (1_000, 60, "I cannot help with it."),
        (250, 45, "large"),
        (250, 60, "I cannot help with it."),
    ] {
        let (small, large) = (says("I cannot help with it."), Next::ok(left_ms - 102));
        let deadline = Some(Instant::now() + Duration::from_millis(100 + left_ms + write_ms));
        let asked = Call { deadline, ..call("why") };
        let listener = Writes(Duration::from_millis(write_ms));
        let reply = tiers(small, large, policy("", ALL)).complete(&asked, &listener).await.unwrap();
        assert_eq!(reply.text, expected, "{left_ms} {write_ms}");
    }
}
