//! What a tenant may spend: reserved before a call, settled after it.
//!
//! How much that is, and where it is kept, is somebody else's business ([`Allowances`]): a file, a store that processes
//! share, a table of prices. Here stands only when it is asked.
//!
//! Invariant: nobody is asked before it is reserved, once for a call with all its tries; and it is settled once, by what the
//! answer took, or what was read of one that was cut. A call without either settles nothing, and whoever gave the allowance
//! hears of that too. A call whose answer a ledger remembers asks nobody, and so needs no room: it was paid for when it came.

use crate::{
    Call, CallError, Class, Listener, Model, Reply, Upstream,
    model::{Around, passes_on, says_what_it_stands_around},
};
use futures::future::BoxFuture;
use std::sync::Arc;
use tokio::sync::Mutex;

/// Knows what tenants, their keys and their jobs may spend.
pub trait Allowances: Send + Sync + 'static {
    /// Sets aside what a call may take, of `model` where it names none; an error where somebody who pays has not so much.
    fn reserve<'a>(
        &'a self,
        call: &'a Call<'_>,
        model: &'a str,
    ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>>;
}

/// What was set aside. Dropped unsettled, the call took nothing: it was given up, or all its tries failed.
pub trait Reservation: Send {
    /// The call was answered, and took what the answer says.
    fn settle<'a>(self: Box<Self>, reply: &'a Reply) -> BoxFuture<'a, ()>;
}

/// A model whose calls are paid out of allowances. Around all tries of a call: a tenant pays for an answer, not for what it took.
/// Inside, whoever asks at a cost tells so by [`Listener::paid`].
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
            let paying = Paying {
                allowances: &*self.allowances,
                call,
                model: self.inner.name(),
                reserved: Mutex::default(),
            };
            let result =
                self.inner.complete(call, &Asking { of: Around::Call(listener), paying: &paying }).await;
            match paying.reserved.into_inner() {
                None => result,
                Some(Ok(reserved)) => {
                    let read = match &result {
                        Ok(reply) => Some(reply),
                        Err(error) => error.partial.as_deref(),
                    };
                    if let Some(read) = read {
                        reserved.settle(read).await;
                    }
                    result
                }
                // As it was given, unless something else went wrong after it.
                Some(Err(refused)) => {
                    result.map_err(|error| if error.code == refused.code { refused } else { error })
                }
            }
        })
    }
}

/// What is set aside for a call once somebody is to be asked.
struct Paying<'c> {
    allowances: &'c dyn Allowances,
    call: &'c Call<'c>,
    model: &'c str,
    reserved: Mutex<Option<Result<Box<dyn Reservation>, CallError>>>,
}

impl Paying<'_> {
    /// Sets it aside, where no try of the call has. Whatever it was refused for, no other try and no other model can help:
    /// layers hear that the call is at fault, and so no breaker counts it.
    async fn reserve(&self) -> Result<(), CallError> {
        let mut reserved = self.reserved.lock().await;
        if reserved.is_none() {
            *reserved = Some(self.allowances.reserve(self.call, self.model).await);
        }
        match &*reserved {
            Some(Err(refused)) => Err(CallError { class: Class::Rejected, ..refused.copy() }),
            _ => Ok(()),
        }
    }
}

/// Hears when somebody is to be asked, which an answer that a ledger remembers is not.
struct Asking<'l> {
    of: Around<'l>,
    /// Shared with the hedge beside it.
    paying: &'l Paying<'l>,
}

impl Listener for Asking<'_> {
    passes_on!(of);

    fn paid<'a>(
        &'a self,
        to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        // Inside what a ledger keeps, so that it is not reached where the answer is known.
        let asked = async {
            self.paying.reserve().await?;
            call.await
        };
        self.of.paid(to, Box::pin(asked))
    }

    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        let of = Around::Hedge(self.of.beside()?);
        Some(Box::new(Asking { of, paying: self.paying }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Tried,
        testing::{Heard, Next, Told, call, error, reply},
    };
    use std::sync::Mutex;

    /// Knows the answer already.
    struct Remembers;

    impl Listener for Remembers {
        fn started(&self, _: Upstream<'_>) {}
        fn token(&self, _: &str) {}
        fn ended(&self, _: &Tried<'_>) {}
        fn paid<'a>(
            &'a self,
            _: Upstream<'a>,
            _: BoxFuture<'a, Result<Reply, CallError>>,
        ) -> BoxFuture<'a, Result<Reply, CallError>> {
            Box::pin(async { Ok(reply("yes")) })
        }
    }

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
        let cut = CallError::cut("it broke off", reply("so"));
        let one = Told::of("one", [Next::ok(0), Next::err(0, error(Class::Outage)), Next::err(0, cut)]);
        let purse = Purse(Arc::new(Mutex::new(1_050)));
        let allowed = Allowed::new(one.clone(), Arc::new(purse.clone()));
        allowed.complete(&call("why"), &Heard::default()).await.unwrap();
        assert_eq!(*purse.0.lock().unwrap(), 1_030, "20 tokens were used");
        allowed.complete(&call("why"), &Heard::default()).await.unwrap_err();
        assert_eq!(*purse.0.lock().unwrap(), 1_030, "nothing came of it");
        allowed.complete(&call("why"), &Remembers).await.unwrap();
        assert_eq!(*purse.0.lock().unwrap(), 1_030, "it was paid for when it came");
        allowed.complete(&call("why"), &Heard::default()).await.unwrap_err();
        assert_eq!(*purse.0.lock().unwrap(), 1_010, "somebody read what came of it");
        let spent = Purse(Arc::new(Mutex::new(1_000)));
        Allowed::new(one.clone(), Arc::new(spent))
            .complete(&call("why"), &Heard::default())
            .await
            .unwrap_err();
        assert_eq!(one.tries(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_remembered_needs_no_room() {
        let (one, empty) = (Told::of("one", []), Purse(Arc::new(Mutex::new(0))));
        let allowed = Allowed::new(one.clone(), Arc::new(empty));
        assert_eq!(allowed.complete(&call("why"), &Remembers).await.unwrap().text, "yes");
        assert!(allowed.complete(&call("why"), &Heard::default()).await.is_err());
        assert_eq!(one.tries(), 0);
    }
}
