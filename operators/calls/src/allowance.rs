//! What a tenant may spend: reserved before a call, settled after it.
//!
//! How much that is, and where it is kept, is somebody else's business ([`Allowances`]): a file, a store that processes
//! share, a table of prices. Here stands only when it is asked.
//!
//! Invariant: what is reserved for a call is settled once, by what its answer took; a call without an answer settles nothing,
//! and whoever gave the allowance hears of that too.

use crate::{Call, CallError, Listener, Model, Reply, model::says_what_it_stands_around};
use futures::future::BoxFuture;
use std::sync::Arc;

/// Knows what tenants may spend.
pub trait Allowances: Send + Sync + 'static {
    /// Sets aside what a call may take, of `model` where it names none; an error where its tenant has not so much.
    fn reserve<'a>(
        &'a self,
        call: &'a Call<'_>,
        model: &'a str,
    ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>>;
}

/// What was set aside. Dropped unsettled, the call had no answer: it was given up, or all its tries failed.
pub trait Reservation: Send {
    /// The call was answered, and took what the answer says.
    fn settle<'a>(self: Box<Self>, reply: &'a Reply) -> BoxFuture<'a, ()>;
}

/// A model whose calls are paid out of allowances. Around all tries of a call: a tenant pays for an answer, not for what it took.
pub struct Allowed {
    inner: Arc<dyn Model>,
    allowances: Arc<dyn Allowances>,
}

impl Allowed {
    /// Calls of `inner`, within these allowances.
    pub fn new(inner: Arc<dyn Model>, allowances: Arc<dyn Allowances>) -> Self {
        Self { inner, allowances }
    }
}

impl Model for Allowed {
    says_what_it_stands_around!(inner);

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let reserved = self.allowances.reserve(call, self.inner.name()).await?;
            let reply = self.inner.complete(call, listener).await?;
            reserved.settle(&reply).await;
            Ok(reply)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Class,
        testing::{Heard, Next, Told, call, error},
    };
    use std::sync::Mutex;

    /// Has so many tokens for everybody.
    #[derive(Clone)]
    struct Purse(Arc<Mutex<u64>>);
    struct Held(Purse, u64);

    impl Allowances for Purse {
        fn reserve<'a>(
            &'a self,
            call: &'a Call<'_>,
            _: &'a str,
        ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>> {
            let tokens = call.tokens_estimated();
            let mut left = self.0.lock().unwrap();
            let reserved = left.checked_sub(tokens).map(|less| {
                *left = less;
                Box::new(Held(self.clone(), tokens)) as Box<dyn Reservation>
            });
            Box::pin(async move { reserved.ok_or_else(|| error(Class::Rejected)) })
        }
    }
    impl Reservation for Held {
        fn settle<'a>(mut self: Box<Self>, reply: &'a Reply) -> BoxFuture<'a, ()> {
            self.1 -= reply.usage.unwrap().total_tokens;
            drop(self);
            Box::pin(async {})
        }
    }
    impl Drop for Held {
        fn drop(&mut self) {
            *self.0.0.lock().unwrap() += self.1;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_reserved_and_settled_and_nothing_is_sent_without() {
        let one = Told::of("one", [Next::ok(0), Next::err(0, error(Class::Outage))]);
        let purse = Purse(Arc::new(Mutex::new(1_050)));
        let allowed = Allowed::new(one.clone(), Arc::new(purse.clone()));
        allowed.complete(&call("why"), &Heard::default()).await.unwrap();
        assert_eq!(*purse.0.lock().unwrap(), 1_030, "20 tokens were used");
        allowed.complete(&call("why"), &Heard::default()).await.unwrap_err();
        assert_eq!(*purse.0.lock().unwrap(), 1_030, "nothing came of it");
        let spent = Purse(Arc::new(Mutex::new(1_000)));
        Allowed::new(one.clone(), Arc::new(spent))
            .complete(&call("why"), &Heard::default())
            .await
            .unwrap_err();
        assert_eq!(one.tries(), 2);
    }
}
