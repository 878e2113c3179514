//! Asks the next model where one cannot answer: a smaller one, another provider, in the end the passages themselves.
//!
//! A worse answer now is worth more than a better one after the outage, for who chose so. What the request itself is at
//! fault for is not asked elsewhere, and no other answer is spliced onto one that somebody has begun to read.
//!
//! Invariant: an answer says which provider it comes from where that is not the first. A model that was called, and failed, is
//! followed by another call only where the budget has it; where nothing was sent, as all breakers are open, no load is added.

use crate::{
    Budget, Call, CallError, Class, Happening, Listener, Model, Reply, Route,
    model::says_what_it_stands_around,
};
use futures::future::BoxFuture;
use std::sync::Arc;

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
            let mut error = match self.first.complete(call, listener).await {
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
                match model.complete(&call, listener).await {
                    Ok(reply) => return Ok(Reply { fallback: Some(model.provider().to_owned()), ..reply }),
                    // The first one's error says more than that its stand-in failed too.
                    Err(other) if other.may_fall_back() => {}
                    Err(other) => error = other,
                }
            }
            Err(error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Heard, Next, Told, call, error};

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
        let expected = "to one, account, closed, to two, rejected, closed => Rejected";
        check(Class::Account, Some(Class::Rejected), expected).await;
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
}
