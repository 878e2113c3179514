//! Asks the next model where one cannot answer: a smaller one, another provider, in the end the passages themselves.
//!
//! A worse answer now is worth more than a better one after the outage, for who chose so. What the request itself is at
//! fault for is not asked elsewhere, and no other answer is spliced onto one that somebody has begun to read. What a stand-in
//! says is wrong with a request is said of the stand-in alone, whose context may be shorter: the next one is asked, and where
//! none answers, the first one's error stands, so that its outage is waited for.
//!
//! Invariant: an answer says which provider it comes from where that is not the first, also when a ledger gives it again: what
//! the ledger keeps says so, as first and stand-in are one call to it. A model that was called, and failed, is
//! followed by another call only where the budget has it; where nothing was sent, as all breakers are open, no load is added.

use crate::{
    Budget, Call, CallError, Class, Happening, Listener, Model, Reply, Route, Upstream,
    model::{Around, passes_on, says_what_it_stands_around},
};
use futures::future::BoxFuture;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// A model, and those that answer in its stead.
pub struct Fallback {
    first: Arc<dyn Model>,
    then: Vec<Arc<dyn Model>>,
    budget: Arc<Budget>,
}

impl Fallback {
    /// `then` are asked in this order.
    pub fn new(first: Arc<dyn Model>, then: Vec<Arc<dyn Model>>, budget: Arc<Budget>) -> Self {
        Self { first, then, budget }
    }

    /// The same where `first` was asked already, and could not be reached.
    pub(crate) fn instead_of(first: Arc<dyn Model>, then: Vec<Arc<dyn Model>>, budget: Arc<Budget>) -> Self {
        Self::new(Arc::new(Down(first)), then, budget)
    }
}

/// A model that is known to be out of reach.
struct Down(Arc<dyn Model>);

impl Model for Down {
    says_what_it_stands_around!(0);

    fn complete<'a>(
        &'a self,
        _: &'a Call<'_>,
        _: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async {
            Err(CallError::new(Class::Outage, "model_unavailable", "the model was out of reach"))
        })
    }
}

impl Model for Fallback {
    fn provider(&self) -> &'static str {
        self.first.provider()
    }

    fn name(&self) -> &str {
        self.first.name()
    }

    fn reads_messages(&self) -> bool {
        self.first.reads_messages() || self.then.iter().any(|model| model.reads_messages())
    }

    fn has_another_way(&self, call: &Call<'_>) -> bool {
        self.first.has_another_way(call)
    }

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let error = match self.first.complete(call, listener).await {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            for model in &self.then {
                let adds_load = error.class != Class::Closed && !model.is_local();
                if !error.may_fall_back() || (adds_load && !self.budget.draw()) {
                    break;
                }
                listener.happened(Happening::FellBack);
                // The name that the client gave is the first one's.
                let call = Call { model: None, route: Route::default(), ..call.clone() };
                let standing_in = StandingIn {
                    provider: model.provider(),
                    of: Around::Call(listener),
                    is_paid: Arc::default(),
                    is_asked: Arc::default(),
                };
                match model.complete(&call, &standing_in).await {
                    // A ledger may have kept the first one's answer, which is no stand-in's for being read now.
                    Ok(reply) if standing_in.is_paid.load(Ordering::Relaxed) => return Ok(reply),
                    Ok(reply) => return Ok(standing_in.mark(reply)),
                    // The first one's error says more than that its stand-in failed too.
                    Err(other) if other.may_fall_back() || standing_in.has_rejected(&other) => {}
                    Err(other) => return Err(other),
                }
            }
            Err(error)
        })
    }
}

/// Hears a stand-in, and marks its answers inside what a ledger keeps.
struct StandingIn<'l> {
    provider: &'static str,
    of: Around<'l>,
    /// Whether a ledger was asked; of what costs nothing it is not. Shared with the hedge beside it.
    is_paid: Arc<AtomicBool>,
    /// Whether ledger and budget let it be asked then; shared so too.
    is_asked: Arc<AtomicBool>,
}

impl StandingIn<'_> {
    /// Whether this is what the stand-in says of the request, and not what a ledger or a budget does that let nobody be asked.
    fn has_rejected(&self, error: &CallError) -> bool {
        let [is_paid, is_asked] = [&self.is_paid, &self.is_asked].map(|flag| flag.load(Ordering::Relaxed));
        error.class == Class::Rejected && is_paid == is_asked
    }

    fn mark(&self, reply: Reply) -> Reply {
        Reply { fallback: Some(self.provider.to_owned()), ..reply }
    }
}

impl Listener for StandingIn<'_> {
    passes_on!(of);

    fn paid<'a>(
        &'a self,
        to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        self.is_paid.store(true, Ordering::Relaxed);
        let marked = async {
            self.is_asked.store(true, Ordering::Relaxed);
            let result = call.await;
            result.map(|reply| self.mark(reply)).map_err(|error| error.with_partial(|read| self.mark(read)))
        };
        self.of.paid(to, Box::pin(marked))
    }

    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        let of = Around::Hedge(self.of.beside()?);
        let (is_paid, is_asked) = (self.is_paid.clone(), self.is_asked.clone());
        Some(Box::new(StandingIn { provider: self.provider, of, is_paid, is_asked }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Tried,
        testing::{Heard, Next, Told, call, error},
    };
    use forebay_schemas::NanoUsd;
    use std::sync::Mutex;

    /// Asks two models of which the first fails so, and the second too or not.
    async fn check(first: Class, second: Option<Class>, expected: &str) {
        let one = Told::by("one", move |_| Next::err(0, error(first)));
        let two = Told::by("two", move |asked| {
            assert_eq!(asked.model, None);
            second.map_or(Next::ok(0), |class| Next::err(0, error(class)))
        });
        let fallback = Fallback::new(one, vec![two], Arc::default());
        let (heard, asked) = (Heard::default(), Call { model: Some("large".to_owned()), ..call("why") });
        let end = match fallback.complete(&asked, &heard).await {
            Ok(reply) => format!("answered by {:?}", reply.fallback),
            Err(error) => format!("{:?}", error.class),
        };
        assert_eq!(format!("{} => {end}", heard.take()), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_answers_where_the_world_failed() {
        let expected = r#"to one, outage, closed, to two, ok, kept two => answered by Some("told")"#;
        check(Class::Outage, None, expected).await;
        let expected = "to one, limited, closed, to two, transient, closed => Limited";
        check(Class::Limited, Some(Class::Transient), expected).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_stand_in_rejects_may_still_be_answered_by_the_next_or_by_the_first_when_it_is_back() {
        let expected = "to one, outage, closed, to two, rejected, closed => Outage";
        check(Class::Outage, Some(Class::Rejected), expected).await;
        let fails = |name, class| Told::by(name, move |_| Next::err(0, error(class)));
        let then: Vec<Arc<dyn Model>> = vec![fails("two", Class::Rejected), Told::of("three", [])];
        let fallback = Fallback::new(fails("one", Class::Unreachable), then, Arc::default());
        let reply = fallback.complete(&call("why"), &Heard::default()).await.unwrap();
        assert_eq!(reply.text, "three");
    }

    /// Lets nobody be asked.
    struct Refuses;

    impl Listener for Refuses {
        fn started(&self, _: Upstream<'_>) {}
        fn token(&self, _: &str) {}
        fn ended(&self, _: &Tried<'_>) {}
        fn paid<'a>(
            &'a self,
            _: Upstream<'a>,
            _: BoxFuture<'a, Result<Reply, CallError>>,
        ) -> BoxFuture<'a, Result<Reply, CallError>> {
            Box::pin(async { Err(CallError::new(Class::Rejected, "budget_exceeded", "nothing is left")) })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_before_anybody_is_asked_is_no_stand_in_s_and_ends_it() {
        let down = Down(Told::of("one", []));
        let then: Vec<Arc<dyn Model>> = vec![Told::of("two", []), Told::of("three", [])];
        let fallback = Fallback::new(Arc::new(down), then, Arc::default());
        let error = fallback.complete(&call("why"), &Refuses).await.unwrap_err();
        assert_eq!((error.class, error.code), (Class::Rejected, "budget_exceeded"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_request_s_fault_and_a_cut_stream_end_it() {
        check(Class::Rejected, None, "to one, rejected, closed => Rejected").await;
        check(Class::Cut, None, "to one, cut, closed => Cut").await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_budget_stops_what_adds_load_and_nothing_else() {
        let budget = Arc::new(Budget::default());
        while budget.draw() {}
        for (class, expected) in [(Class::Outage, 0), (Class::Closed, 1)] {
            let (one, two) =
                (Told::by("one", move |_| Next::err(0, error(class))), Told::by("two", |_| Next::ok(0)));
            let fallback = Fallback::new(one, vec![two.clone()], budget.clone());
            let _ = fallback.complete(&call("why"), &Heard::default()).await;
            assert_eq!(two.tries(), expected, "{class:?}");
        }
    }

    /// A ledger that outlives the process: one call, whoever answers it.
    #[derive(Default)]
    struct Ledger(Mutex<Option<Reply>>);

    impl Listener for Ledger {
        fn started(&self, _: Upstream<'_>) {}
        fn token(&self, _: &str) {}
        fn ended(&self, _: &Tried<'_>) {}
        fn paid<'a>(
            &'a self,
            _: Upstream<'a>,
            call: BoxFuture<'a, Result<Reply, CallError>>,
        ) -> BoxFuture<'a, Result<Reply, CallError>> {
            Box::pin(async {
                let known = self.0.lock().unwrap().clone();
                if let Some(reply) = known {
                    return Ok(reply);
                }
                let result = call.await;
                *self.0.lock().unwrap() = result.as_ref().ok().cloned();
                result
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_a_ledger_gives_again_is_a_stand_in_s_though_the_first_is_back() {
        let one = Told::of("one", [Next::err(0, error(Class::Outage))]);
        let fallback = Fallback::new(one.clone(), vec![Told::of("two", [])], Arc::default());
        let ledger = Ledger::default();
        for _ in 0..2 {
            let reply = fallback.complete(&call("why"), &ledger).await.unwrap();
            assert_eq!((reply.text.as_str(), reply.fallback.as_deref()), ("two", Some("told")));
        }
        assert_eq!(one.tries(), 1, "the second time its answer was remembered");
        // And the first one's stays its own, whoever was asked when it was given again.
        let ledger = Ledger(Mutex::new(Some(crate::testing::reply("one"))));
        let down = Down(Told::of("one", []));
        let fallback = Fallback::new(Arc::new(down), vec![Told::of("two", [])], Arc::default());
        let reply = fallback.complete(&call("why"), &ledger).await.unwrap();
        assert_eq!((reply.text.as_str(), reply.fallback), ("one", None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_read_of_a_stand_in_that_broke_off_is_a_stand_in_s() {
        let down = Down(Told::of("one", []));
        let cut = || Next::err(1, CallError::cut("it broke off", crate::testing::reply("two")));
        let fallback = Fallback::new(Arc::new(down), vec![Told::of("two", [cut()])], Arc::default());
        let error = fallback.complete(&call("why"), &Heard::default()).await.unwrap_err();
        assert_eq!(error.partial.unwrap().fallback.as_deref(), Some("told"));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_listens_hears_of_a_stand_in_all_that_it_tells() {
        let heard = Heard::default();
        let (is_paid, is_asked) = Default::default();
        let standing_in = StandingIn { provider: "two", of: Around::Call(&heard), is_paid, is_asked };
        let told =
            Told::of("two", [Next { first_token: Some(std::time::Duration::from_millis(1)), ..Next::ok(5) }]);
        told.complete(&call("why"), &standing_in).await.unwrap();
        standing_in.happened(Happening::Retried);
        standing_in.cost(NanoUsd(7));
        standing_in.tier(1, "large");
        standing_in.beside().unwrap().token("x");
        assert_eq!(heard.take(), "to two, two, ok, kept two, cost 7, tier 1 large, hedge x");
        assert_eq!(heard.take_happenings(), [Happening::Retried]);
    }
}
