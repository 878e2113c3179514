//! `infer` against models that do as they are told.

use super::*;
use crate::{Extractive, samples};
use forebay_calls::{
    Allowed, CallError, Class, Hedge, Listener, Pool, Tried, Upstream,
    allowance::{Allowances, Reservation},
    pool::Endpoint,
    throttle::Caps,
};
use forebay_operator::{
    Called, Clock, Delivery, Event, Found, Host, Known, Ledger, StopSignal, Turn, compliance,
};
use forebay_schemas::{Attempt, CallId, Delta, JobId, KeyId, NanoUsd, Record as _, Retrieval, Usage};
use futures::future::BoxFuture;
use std::{sync::Mutex, time::Duration};

/// Makes one try that ends as told; without an end it never does.
struct Told(Option<Result<&'static str, Class>>);

const USAGE: Usage = Usage {
    prompt_tokens: 10,
    completion_tokens: 4,
    total_tokens: 14,
    cached_tokens: Some(3),
    cached_write_tokens: Some(2),
    reasoning_tokens: Some(1),
};

const HERE: Upstream<'_> = Upstream { provider: "told", endpoint: Some("http://here"), model: "small" };

impl Model for Told {
    fn provider(&self) -> &'static str {
        "told"
    }
    fn name(&self) -> &str {
        "small"
    }
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move { listener.paid(HERE, Box::pin(self.told(call, listener))).await })
    }
}

impl Told {
    async fn told(&self, call: &Call<'_>, listener: &dyn Listener) -> Result<Reply, CallError> {
        listener.started(HERE);
        if call.stream {
            listener.token("so ");
            listener.token("far");
        }
        let result = match self.0 {
            None => std::future::pending().await,
            Some(_) => self.answer(),
        };
        let duration = Duration::from_millis(5);
        listener.ended(&Tried { to: HERE, duration, ttft: None, result: result.as_ref() });
        result
    }

    fn answer(&self) -> Result<Reply, CallError> {
        match self.0 {
            None => unreachable!("it has no end"),
            Some(Ok(text)) => Ok(Reply {
                text: text.to_owned(),
                model: "small-2".to_owned(),
                usage: Some(USAGE),
                ..Reply::default()
            }),
            Some(Err(Class::Cut)) => {
                let text = "so far".to_owned();
                Err(CallError::cut(
                    "it broke off",
                    Reply { text, cost_nano_usd: Some(NanoUsd(7)), ..Reply::default() },
                ))
            }
            Some(Err(class)) => Err(CallError::new(class, "model_unavailable", "it failed").with_status(500)),
        }
    }
}

/// Reads along, and notes what happens.
#[derive(Default)]
struct Reader(Mutex<Vec<Delta>>, Mutex<Vec<Event>>);
impl Host for Reader {
    fn delta(&self, _: &str, delta: Delta) {
        self.0.lock().unwrap().push(delta);
    }
    fn observe(&self, _: &str, event: &Event) {
        self.1.lock().unwrap().push(event.clone());
    }
}

/// Remembers the answer that was paid for, after a try that nobody heard of.
#[derive(Default)]
struct Remembers {
    answer: Mutex<Option<Vec<u8>>>,
    told: Mutex<Vec<String>>,
}

impl Ledger for Remembers {
    fn find<'a>(&'a self, _: &'a CallId) -> BoxFuture<'a, Result<Found<'a>, Failure>> {
        let known = match self.answer.lock().unwrap().clone() {
            Some(answer) => Known::Answered(answer),
            None => Known::Open { attempt: 1, turn: Box::new(self) },
        };
        Box::pin(async { Ok(Found { rows: Vec::new(), known }) })
    }
}

impl Turn for &Remembers {
    fn start(&mut self, row: Attempt) -> BoxFuture<'_, Result<bool, Failure>> {
        self.told.lock().unwrap().push(format!("start {} {}", row.attempt, row.status));
        Box::pin(async { Ok(true) })
    }
    fn done(&mut self, answer: Vec<u8>, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        *self.answer.lock().unwrap() = Some(answer);
        self.told.lock().unwrap().push(format!("done {:?}", row.map(|row| row.attempt)));
        Box::pin(async { Ok(()) })
    }
    fn failed(&mut self, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        self.told.lock().unwrap().push(format!("failed {:?}", row.map(|row| row.attempt)));
        Box::pin(async { Ok(()) })
    }
}

fn grounded() -> Grounded {
    let completion = samples::completion();
    let retrieval = Retrieval { limit: 8, tokens_max: 2400, rerank: None, embed: None };
    Grounded { request: completion.request, retrieval, passages: completion.passages }
}

fn infer(model: impl Model) -> Infer {
    Infer { model: Arc::new(model), shape: Shape::default(), settings: Settings::default() }
}

/// Runs it and says how it ended and which rows it left.
async fn check(model: Told, cx: &Context, expected: &str) {
    let ended = match infer(model).process(grounded(), cx).await {
        Ok(_) => "ok",
        Err(failure) => failure.code(),
    };
    let rows = cx.take_rows().into_iter().map(|row| {
        assert_eq!(row.attempt_id, format!("{}/{}", cx.call_id(0).as_str(), row.attempt));
        let why = row.http_status.map(|status| status.to_string()).or(row.error_code).unwrap_or_default();
        format!("{} {} {why}", row.attempt, row.status)
    });
    assert_eq!(format!("{ended}: {}", rows.collect::<Vec<_>>().join(", ")), expected);
}

fn cx_with(change: impl FnOnce(&mut forebay_schemas::Envelope)) -> Context {
    let mut envelope = compliance::envelope();
    change(&mut envelope);
    Context::quiet(envelope, Clock::starting_at(compliance::NOW_MS))
}

#[tokio::test(start_paused = true)]
async fn every_try_leaves_a_row_however_it_ends() {
    check(Told(Some(Ok("yes"))), &samples::cx(), "ok: 0 ok ").await;
    check(Told(Some(Err(Class::Transient))), &samples::cx(), "model_unavailable: 0 failed 500").await;
    check(Told(Some(Err(Class::Rejected))), &samples::cx(), "model_unavailable: 0 rejected 500").await;
    check(Told(Some(Ok("yes"))), &cx_with(|envelope| envelope.attempts = 2), "ok: 2 ok ").await;
    let late = cx_with(|envelope| envelope.deadline_at_ms = Some(compliance::NOW_MS + 100));
    check(Told(None), &late, "deadline: 0 cancelled deadline").await;
}

#[tokio::test]
async fn a_row_says_who_asked_for_what_and_what_its_tokens_were() {
    let (cx, mut grounded) = (samples::cx(), grounded());
    grounded.request.key_id = KeyId::try_from("key-7".to_owned()).ok();
    grounded.request.job = JobId::try_from("nightly".to_owned()).ok();
    infer(Told(Some(Ok("yes")))).process(grounded, &cx).await.unwrap();
    let [row] = <[_; 1]>::try_from(cx.take_rows()).unwrap();
    assert_eq!(
        (row.input_tokens, row.cached_read_tokens, row.cached_write_tokens),
        (Some(10), Some(3), Some(2))
    );
    assert_eq!((row.output_tokens, row.reasoning_tokens), (Some(4), Some(1)));
    assert_eq!((row.key_id.as_deref(), row.job.as_deref()), (Some("key-7"), Some("nightly")));
    assert_eq!(row.operation.as_deref(), Some("chat"));
}

#[tokio::test]
async fn a_client_that_takes_its_request_back_stops_the_call() {
    let (switch, stop) = StopSignal::new();
    let host = Arc::new(Reader::default());
    let clock = Clock::starting_at(compliance::NOW_MS);
    let cx = Context::new(delivery(compliance::envelope()), clock, host.clone(), stop);
    let (ended, ()) = tokio::join!(check(Told(None), &cx, "cancelled: 0 cancelled cancelled"), async {
        switch.send(true).unwrap();
    });
    let counted = |event: &Event| matches!(event, Event::Called(Called { error: Some("cancelled"), .. }));
    assert!(host.1.lock().unwrap().iter().any(counted), "a try that was given up is counted too");
    ended
}

#[tokio::test]
async fn whoever_reads_along_gets_the_tokens() {
    let mut envelope = compliance::envelope();
    envelope.stream = true;
    let host = Arc::new(Reader::default());
    let clock = Clock::starting_at(compliance::NOW_MS);
    let cx = Context::new(delivery(envelope), clock, host.clone(), StopSignal::new().1);
    infer(Told(Some(Ok("so far")))).process(grounded(), &cx).await.unwrap();
    cx.flush_deltas();
    let read = host.0.lock().unwrap();
    let read: Vec<_> = read.iter().map(|delta| (delta.attempt, delta.seq, delta.text.as_str())).collect();
    assert_eq!(read, [(0, 0, "so "), (0, 1, "far")]);
}

/// Takes a second to answer, and writes a token each 300 ms.
struct Slow;
impl Model for Slow {
    fn provider(&self) -> &'static str {
        "told"
    }
    fn name(&self) -> &str {
        "small"
    }
    fn complete<'a>(
        &'a self,
        _: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let told = async move {
            listener.started(HERE);
            let sent = Instant::now();
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(300)).await;
                listener.token("so ");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            let answered = Told(Some(Ok("so so so "))).answer();
            let (duration, ttft) = (sent.elapsed(), Some(Duration::from_millis(300)));
            listener.ended(&Tried { to: HERE, duration, ttft, result: answered.as_ref() });
            answered
        };
        listener.paid(HERE, Box::pin(told))
    }
}

#[tokio::test(start_paused = true)]
async fn where_the_time_of_a_call_went_is_told_apart() {
    let endpoint = Endpoint {
        name: "http://here".to_owned(),
        model: Arc::new(Slow),
        caps: Caps { outstanding: 1, requests_per_minute: None, tokens_per_minute: None },
        origin: String::new(),
        watch: None,
        starts_cold: false,
        shared: None,
    };
    let infer = infer(Pool::new("small", vec![endpoint], Arc::new(|| 0.5)));
    let ask = async || {
        let envelope = forebay_schemas::Envelope { stream: true, ..compliance::envelope() };
        let (host, clock) = (Arc::new(Reader::default()), Clock::starting_at(compliance::NOW_MS));
        let cx = Context::new(delivery(envelope), clock, host.clone(), StopSignal::new().1);
        infer.process(grounded(), &cx).await.unwrap();
        host.1.lock().unwrap().clone()
    };
    let (first, second) = tokio::join!(ask(), ask());
    let started_at_us = compliance::NOW_MS * 1_000;
    let events = |waited_us| {
        let waited = |what, duration_us| Event::CallWaited { what, duration_us };
        let called = Event::Called(Called {
            provider: "told".to_owned(),
            model: "small".to_owned(),
            endpoint: Some("http://here".to_owned()),
            response_model: Some("small-2".to_owned()),
            started_at_us: started_at_us + waited_us,
            duration_us: 1_000_000,
            ttft_us: Some(300_000),
            gaps_us: vec![300_000, 300_000],
            input_tokens: Some(10),
            output_tokens: Some(4),
            ..Called::default()
        });
        let own = Event::CallOverhead { duration_us: 0 };
        [waited("room", waited_us), called, waited("ledger", 0), own]
    };
    assert_eq!((first, second), (events(0).to_vec(), events(1_000_000).to_vec()));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_paid_for_is_not_asked_for_again() {
    let ledger = Arc::new(Remembers::default());
    let ask = async |model: Told| {
        let delivery = Delivery { ledger: Some(ledger.clone()), ..delivery(compliance::envelope()) };
        let clock = Clock::starting_at(compliance::NOW_MS);
        let cx = Context::new(delivery, clock, Arc::new(Reader::default()), StopSignal::new().1);
        let answered = infer(model).process(grounded(), &cx).await.map_err(|failure| failure.to_string());
        (answered, cx.take_rows().iter().map(|row| row.attempt).collect::<Vec<_>>())
    };
    assert_eq!(ask(Told(Some(Err(Class::Transient)))).await.1, [1]);
    let (paid, rows) = ask(Told(Some(Ok("the broker keeps records [1]")))).await;
    assert_eq!(rows, [1]);
    assert_eq!(ask(Told(Some(Err(Class::Outage)))).await, (paid, Vec::new()));
    let told = ledger.told.lock().unwrap().join(", ");
    assert_eq!(told, "start 1 ambiguous, failed Some(1), start 1 ambiguous, done Some(1)");
}

#[tokio::test(start_paused = true)]
async fn what_was_read_of_an_answer_that_was_cut_is_kept_and_nobody_is_asked_again() {
    let ledger = Arc::new(Remembers::default());
    let ask = async |model: Told| {
        let envelope = forebay_schemas::Envelope { stream: true, ..compliance::envelope() };
        let delivery = Delivery { ledger: Some(ledger.clone()), ..delivery(envelope) };
        let clock = Clock::starting_at(compliance::NOW_MS);
        let cx = Context::new(delivery, clock, Arc::new(Reader::default()), StopSignal::new().1);
        match infer(model).process(grounded(), &cx).await {
            Err(Failure::Rejected { code: "model_cut", partial: Some(read), .. }) => {
                (read.text, read.provider, read.cost_nano_usd)
            }
            other => panic!("{other:?}"),
        }
    };
    let expected = ("so far".to_owned(), "told".to_owned(), Some(NanoUsd(7)));
    // The second time as after a crash, when the model could answer.
    for model in [Told(Some(Err(Class::Cut))), Told(Some(Ok("another answer")))] {
        assert_eq!(ask(model).await, expected);
    }
    assert_eq!(ledger.told.lock().unwrap().join(", "), "start 1 ambiguous, done Some(1)");
    let kept = ledger.answer.lock().unwrap().clone().unwrap();
    let as_before = serde_json::from_slice::<Reply>(&kept);
    assert!(as_before.is_err(), "a version that knows nothing of this takes it for no answer");
}

/// Has room for nobody.
struct Empty;

impl Allowances for Empty {
    fn reserve<'a>(
        &'a self,
        _: &'a Call<'_>,
        _: &'a str,
    ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>> {
        Box::pin(async { Err(CallError::new(Class::Rejected, "budget_exceeded", "nothing is left")) })
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_paid_for_is_given_also_when_nothing_is_left_to_spend() {
    let ledger = Arc::new(Remembers::default());
    let ask = async |model: Arc<dyn Model>| {
        let delivery = Delivery { ledger: Some(ledger.clone()), ..delivery(compliance::envelope()) };
        let clock = Clock::starting_at(compliance::NOW_MS);
        let cx = Context::new(delivery, clock, Arc::new(Reader::default()), StopSignal::new().1);
        let infer = Infer { model, shape: Shape::default(), settings: Settings::default() };
        let answered = infer.process(grounded(), &cx).await.map_err(|failure| failure.code());
        (answered, cx.take_rows().len())
    };
    let told = || Arc::new(Told(Some(Ok("the broker keeps records [1]")))) as Arc<dyn Model>;
    let broke = || Arc::new(Allowed::new(told(), Arc::new(Empty))) as Arc<dyn Model>;
    assert_eq!(ask(broke()).await, (Err("budget_exceeded"), 0), "nothing was sent, and no row says so");
    let (paid, _) = ask(told()).await;
    assert!(paid.is_ok());
    assert_eq!(ask(broke()).await, (paid, 0));
    let told = ledger.told.lock().unwrap().join(", ");
    assert_eq!(told, "start 1 ambiguous, failed None, start 1 ambiguous, done Some(1)");
}

/// Answers at once, but its 21st try not for an hour.
struct Sticks(Arc<std::sync::atomic::AtomicUsize>);

impl Model for Sticks {
    fn provider(&self) -> &'static str {
        "told"
    }
    fn name(&self) -> &str {
        "small"
    }
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let sticks = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 20;
        Box::pin(async move {
            let told = Told(Some(Ok("yes")));
            let tried = async {
                match sticks {
                    false => told.told(call, listener).await,
                    true => {
                        listener.started(HERE);
                        std::future::pending().await
                    }
                }
            };
            listener.paid(HERE, Box::pin(tried)).await
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_hedge_is_a_call_of_its_own_to_the_ledger_and_leaves_a_row_as_does_whom_it_beat() {
    let tries = Arc::default();
    let endpoint = || Endpoint {
        name: "http://here".to_owned(),
        model: Arc::new(Sticks(Arc::clone(&tries))),
        caps: Caps { outstanding: 8, requests_per_minute: None, tokens_per_minute: None },
        origin: String::new(),
        watch: None,

        starts_cold: false,
        shared: None,
    };
    let pool = Arc::new(Pool::new("small", vec![endpoint(), endpoint()], Arc::new(|| 0.5)));
    let hedge: Arc<dyn Model> = Arc::new(Hedge::new(pool, Arc::default(), Some(Duration::from_secs(1))));
    let ledger = Arc::new(Remembers::default());
    let ask = async |ledger: Option<Arc<dyn Ledger>>| {
        let delivery = Delivery { ledger, ..delivery(compliance::envelope()) };
        let clock = Clock::starting_at(compliance::NOW_MS);
        let cx = Context::new(delivery, clock, Arc::new(Reader::default()), StopSignal::new().1);
        let infer = Infer { model: hedge.clone(), shape: Shape::default(), settings: Settings::default() };
        infer.process(grounded(), &cx).await.unwrap();
        let calls = [0, 1].map(|index| cx.call_id(index).as_str().to_owned());
        cx.take_rows()
            .into_iter()
            .map(|row| {
                let call = calls.iter().position(|call| *call == row.call_id).unwrap();
                assert_eq!(row.attempt_id, format!("{}/{}", row.call_id, row.attempt));
                format!("call {call} try {} {}", row.attempt, row.status)
            })
            .collect::<Vec<_>>()
    };
    for _ in 0..20 {
        assert_eq!(ask(None).await, ["call 0 try 0 ok"]);
    }
    assert_eq!(ask(Some(ledger.clone())).await, ["call 1 try 2 ok", "call 0 try 1 hedge_lost"]);
    let told = ledger.told.lock().unwrap().join(", ");
    assert_eq!(told, "start 1 ambiguous, start 2 ambiguous, done Some(1), done Some(2)");
}

fn delivery(envelope: forebay_schemas::Envelope) -> Delivery {
    Delivery { envelope, recorded_at_ms: 0, stage: "infer".into(), cluster: "test".into(), ledger: None }
}

#[tokio::test]
async fn an_answer_of_a_served_model_gets_citations_and_the_way_past_the_cache_is_told() {
    let answer = async |change: fn(&mut forebay_schemas::Envelope)| {
        let model = Told(Some(Ok("Records are kept in segments by the broker [1].")));
        let [Inferred::Completion(completion)] =
            <[_; 1]>::try_from(infer(model).process(grounded(), &cx_with(change)).await.unwrap()).unwrap();
        completion
    };
    let completion = answer(|envelope| envelope.timings.cache = Some(3)).await;
    assert_eq!(completion.answer.citations.len(), 1);
    assert!(completion.answer.citations[0].quote.contains("the broker keeps records in segments."));
    assert_eq!(completion.cache, CacheStatus::Miss);
    assert_eq!(answer(|_| {}).await.cache, CacheStatus::Bypass);
}

#[tokio::test]
async fn it_complies() {
    let mut bare = grounded();
    bare.passages.clear();
    let samples = [grounded(), bare].map(|sample| sample.encode().unwrap().unwrap());
    compliance::assert_complies(infer(Extractive), samples.clone().into()).await;
    compliance::assert_complies(infer(Told(Some(Ok("yes [1]")))), samples.clone().into()).await;
    compliance::assert_complies(infer(Told(Some(Err(Class::Outage)))), samples.into()).await;
}

/// A tier that does as it is told, and counts.
fn told_tier(name: &'static str, model: Arc<CountedTier>) -> forebay_calls::tiers::Tier {
    forebay_calls::tiers::Tier { name: name.to_owned(), model: model.clone(), alone: model, stand_ins: None }
}

/// Answers as it is told, at a cost of 5 where it answers, each try inside the ledger.
struct CountedTier {
    says: Mutex<Result<&'static str, Class>>,
    asked: std::sync::atomic::AtomicUsize,
}

impl CountedTier {
    fn new(says: Result<&'static str, Class>) -> Arc<Self> {
        Arc::new(Self { says: Mutex::new(says), asked: Default::default() })
    }
}

impl Model for CountedTier {
    fn provider(&self) -> &'static str {
        "told"
    }
    fn name(&self) -> &str {
        "small"
    }
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let said = *self.says.lock().unwrap();
        Box::pin(async move {
            let tried = async move {
                self.asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let told = Told(Some(said));
                told.told(call, listener).await
            };
            listener.paid(HERE, Box::pin(tried)).await
        })
    }
}

/// A call of a [`Book`]: how many tries it had, and its answer.
#[derive(Clone, Default)]
struct Kept {
    tries: i32,
    answer: Option<Vec<u8>>,
    rows: Vec<Attempt>,
}

/// Remembers each call by its id, and tells of all tries that one reading has not made, as the host's ledger does.
#[derive(Default)]
struct Book {
    calls: Mutex<std::collections::BTreeMap<String, Kept>>,
    told: Mutex<std::collections::BTreeSet<String>>,
}

struct Entry<'a> {
    book: &'a Book,
    call: String,
}

impl Ledger for Book {
    fn find<'a>(&'a self, call: &'a CallId) -> BoxFuture<'a, Result<Found<'a>, Failure>> {
        let (calls, mut told) = (self.calls.lock().unwrap(), self.told.lock().unwrap());
        let rows = calls.values().flat_map(|kept| kept.rows.clone());
        let rows = rows.filter(|row| told.insert(row.attempt_id.clone())).collect();
        let Kept { tries, answer, .. } = calls.get(call.as_str()).cloned().unwrap_or_default();
        let known = match answer {
            Some(answer) => Known::Answered(answer),
            None => {
                let entry = Entry { book: self, call: call.as_str().to_owned() };
                Known::Open { attempt: tries, turn: Box::new(entry) }
            }
        };
        Box::pin(async { Ok(Found { rows, known }) })
    }
}

impl Entry<'_> {
    fn keep(&self, answer: Option<Vec<u8>>, row: Option<Attempt>) {
        let mut calls = self.book.calls.lock().unwrap();
        let kept = calls.entry(self.call.clone()).or_default();
        (kept.tries, kept.answer) = (kept.tries + 1, answer);
        kept.rows.extend(row);
    }
}

impl Turn for Entry<'_> {
    fn start(&mut self, row: Attempt) -> BoxFuture<'_, Result<bool, Failure>> {
        self.book.told.lock().unwrap().insert(row.attempt_id);
        Box::pin(async { Ok(true) })
    }
    fn done(&mut self, answer: Vec<u8>, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        self.keep(Some(answer), row);
        Box::pin(async { Ok(()) })
    }
    fn failed(&mut self, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>> {
        self.keep(None, row);
        Box::pin(async { Ok(()) })
    }
}

/// One reading of a record by two tiers: how it ended, and each row as `call/attempt tier status`.
async fn read_by_tiers(
    [small, large]: [&Arc<CountedTier>; 2],
    book: Option<&Arc<Book>>,
    host: &Arc<Reader>,
) -> (String, Option<String>, Vec<String>) {
    let ledger = book.map(|book| {
        book.told.lock().unwrap().clear();
        Arc::clone(book) as Arc<dyn Ledger>
    });
    let escalation = forebay_calls::tiers::Escalation {
        on_verdict: true,
        on_refusal: true,
        ..forebay_calls::tiers::Escalation::default()
    };
    let policy = forebay_calls::tiers::Policy { escalation, ..Default::default() };
    let tiers = vec![told_tier("small", small.clone()), told_tier("large", large.clone())];
    let model = Arc::new(forebay_calls::Tiers::new(tiers, policy));
    let infer = Infer { model, shape: Shape::default(), settings: Settings::default() };
    let mut envelope = compliance::envelope();
    envelope.stream = true;
    let clock = Clock::starting_at(compliance::NOW_MS);
    let cx =
        Context::new(Delivery { ledger, ..delivery(envelope) }, clock, host.clone(), StopSignal::new().1);
    let (text, tier) = match infer.process(grounded(), &cx).await {
        Ok(mut answered) => {
            let Some(Inferred::Completion(completion)) = answered.pop() else { panic!("no answer") };
            (completion.answer.text, completion.answer.tier)
        }
        Err(failure) => (failure.code().to_owned(), None),
    };
    cx.flush_deltas();
    let calls = [0, 1, 2].map(|index| cx.call_id(index).as_str().to_owned());
    let rows = cx.take_rows().into_iter().map(|row| {
        let call = calls.iter().position(|call| *call == row.call_id).unwrap();
        assert_eq!(row.attempt_id, format!("{}/{}", row.call_id, row.attempt));
        format!("{call}/{} {} {}", row.attempt, row.tier.unwrap(), row.status)
    });
    (text, tier, rows.collect())
}

#[tokio::test(start_paused = true)]
async fn a_tier_whose_answer_is_not_good_enough_is_followed_by_the_next_and_each_leaves_a_row() {
    for (said, expected) in [
        ("It is so [7].", "42 [1]"),
        (" ", "42 [1]"),
        ("I cannot help with that.", "42 [1]"),
        ("It is so [1].", "It is so [1]."),
    ] {
        let (small, large, host) =
            (CountedTier::new(Ok(said)), CountedTier::new(Ok("42 [1]")), Arc::default());
        let (text, tier, rows) = read_by_tiers([&small, &large], None, &host).await;
        let escalated = text == "42 [1]";
        assert_eq!(text, expected);
        assert_eq!(tier.as_deref(), Some(if escalated { "large" } else { "small" }));
        let expected: &[&str] = match escalated {
            true => &["0/0 small ok", "2/1 large ok"],
            false => &["0/0 small ok"],
        };
        assert_eq!(rows, expected);
        let deltas =
            host.0.lock().unwrap().iter().map(|delta| (delta.attempt, delta.seq)).collect::<Vec<_>>();
        let all = [(0, 0), (0, 1), (1, 0), (1, 1)];
        assert_eq!(deltas, all[..2 * rows.len()], "a higher attempt takes the place of a lower one");
    }
}

#[tokio::test(start_paused = true)]
async fn a_tier_that_was_paid_for_before_a_crash_is_not_paid_again_and_the_next_one_s_tries_count_on() {
    let book = Arc::new(Book::default());
    let (small, large, host) = (
        CountedTier::new(Ok("It is empty but for this [9].")),
        CountedTier::new(Err(Class::Outage)),
        Arc::default(),
    );
    // The better tier is down, and nobody has a better answer: this one stands. Then the process dies before its output is
    // written, and the record is read again.
    let (text, _, rows) = read_by_tiers([&small, &large], Some(&book), &host).await;
    assert_eq!((text.as_str(), rows.len()), ("It is empty but for this [9].", 2));
    *large.says.lock().unwrap() = Ok("42 [1]");
    *small.says.lock().unwrap() = Err(Class::Rejected);
    host.0.lock().unwrap().clear();
    let (text, tier, rows) = read_by_tiers([&small, &large], Some(&book), &host).await;
    assert_eq!((text.as_str(), tier.as_deref()), ("42 [1]", Some("large")));
    assert_eq!(rows, ["0/0 small ok", "2/1 large failed", "2/2 large ok"]);
    assert!(host.0.lock().unwrap().iter().all(|delta| delta.attempt == 2), "above all that was read before");
    let asked = |tier: &Arc<CountedTier>| tier.asked.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((asked(&small), asked(&large)), (1, 2));
    // And again, when all is known: nobody is asked.
    let (text, tier, _) = read_by_tiers([&small, &large], Some(&book), &host).await;
    assert_eq!((text.as_str(), tier.as_deref()), ("42 [1]", Some("large")));
    assert_eq!((asked(&small), asked(&large)), (1, 2));
}
