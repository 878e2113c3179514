//! `infer` against models that do as they are told.

use super::*;
use crate::{Extractive, samples};
use forebay_calls::{
    CallError, Class, Hedge, Listener, Pool, Tried, Upstream, pool::Endpoint, throttle::Caps,
};
use forebay_operator::{Clock, Delivery, Event, Found, Host, Known, Ledger, StopSignal, Turn, compliance};
use forebay_schemas::{Attempt, CallId, Delta, Record as _, Retrieval, Usage};
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
            Some(Ok(text)) => Ok(Reply {
                text: text.to_owned(),
                vectors: Vec::new(),
                citations: None,
                model: "small-2".to_owned(),
                usage: Some(USAGE),
                cost_nano_usd: None,
                finish_reason: None,
                ttft: None,
                fallback: None,
            }),
            Some(Err(class)) => Err(CallError::new(class, "model_unavailable", "it failed").with_status(500)),
        };
        let duration = Duration::from_millis(5);
        listener.ended(&Tried { to: HERE, duration, ttft: None, result: result.as_ref() });
        result
    }
}

/// Reads along.
#[derive(Default)]
struct Reader(Mutex<Vec<Delta>>);
impl Host for Reader {
    fn delta(&self, delta: Delta) {
        self.0.lock().unwrap().push(delta);
    }
    fn observe(&self, _: &str, _: &Event) {}
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
    let retrieval = Retrieval { limit: 8, tokens_max: 2400 };
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
async fn a_row_says_what_its_tokens_were() {
    let cx = samples::cx();
    infer(Told(Some(Ok("yes")))).process(grounded(), &cx).await.unwrap();
    let [row] = <[_; 1]>::try_from(cx.take_rows()).unwrap();
    assert_eq!(
        (row.input_tokens, row.cached_read_tokens, row.cached_write_tokens),
        (Some(10), Some(3), Some(2))
    );
    assert_eq!((row.output_tokens, row.reasoning_tokens), (Some(4), Some(1)));
}

#[tokio::test]
async fn a_client_that_takes_its_request_back_stops_the_call() {
    let (switch, stop) = StopSignal::new();
    let host = Arc::new(Reader::default());
    let cx =
        Context::new(delivery(compliance::envelope()), Clock::starting_at(compliance::NOW_MS), host, stop);
    let (ended, ()) = tokio::join!(check(Told(None), &cx, "cancelled: 0 cancelled cancelled"), async {
        switch.send(true).unwrap();
    });
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
    let read = host.0.lock().unwrap();
    let read: Vec<_> = read.iter().map(|delta| (delta.attempt, delta.seq, delta.text.as_str())).collect();
    assert_eq!(read, [(0, 0, "so "), (0, 1, "far")]);
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
