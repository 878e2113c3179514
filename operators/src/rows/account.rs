//! Where the time of a call goes: to upstreams, to waits, and what is left, which is our own.
//!
//! Invariant: the time during which any try is under way counts once, however many are. Where a try beside another waits, that wait
//! lies within the other's time and is taken off twice, so with a hedge the rest is too small rather than too large.

use forebay_calls::Wait;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// The account of a call and its tries.
#[derive(Clone)]
pub(super) struct Account(Arc<Mutex<Entries>>);

struct Entries {
    began: Instant,
    waited: Duration,
    /// Tries under way, and since when any was.
    away: (u32, Instant),
    away_before: Duration,
    was_sent: bool,
}

impl Account {
    pub(super) fn new() -> Self {
        let began = Instant::now();
        let (waited, away_before) = (Duration::ZERO, Duration::ZERO);
        let entries = Entries { began, waited, away: (0, began), away_before, was_sent: false };
        Self(Arc::new(Mutex::new(entries)))
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The call waited.
    pub(super) fn waited(&self, duration: Duration) {
        self.entries().waited += duration;
    }

    /// A try is under way until this is dropped.
    pub(super) fn sent(&self) -> Away {
        let mut entries = self.entries();
        entries.was_sent = true;
        if entries.away.0 == 0 {
            entries.away.1 = Instant::now();
        }
        entries.away.0 += 1;
        Away(self.clone())
    }

    /// What our own layers took so far; nothing where no try was made.
    pub(super) fn rest(&self) -> Option<Duration> {
        let entries = self.entries();
        let others = entries.waited + entries.away_before;
        entries.was_sent.then(|| entries.began.elapsed().saturating_sub(others))
    }
}

/// See [`Account::sent`].
pub(super) struct Away(Account);

impl Drop for Away {
    fn drop(&mut self) {
        let mut entries = self.0.entries();
        entries.away.0 = entries.away.0.saturating_sub(1);
        if entries.away.0 == 0 {
            let more = entries.away.1.elapsed();
            entries.away_before += more;
        }
    }
}

/// The word for what a call waits for.
pub(super) fn word(wait: Wait) -> &'static str {
    match wait {
        Wait::Room => "room",
        Wait::Batch => "batch",
        Wait::Retry => "retry",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_left_of_a_call_is_neither_waited_nor_upstream() {
        let pass = async |ms| tokio::time::sleep(Duration::from_millis(ms)).await;
        let account = Account::new();
        pass(2).await;
        assert_eq!(account.rest(), None, "nothing was sent");
        let first = account.sent();
        pass(50).await;
        let second = account.sent();
        pass(10).await;
        drop(first);
        pass(10).await;
        drop(second);
        pass(5).await;
        account.waited(Duration::from_millis(5));
        pass(1).await;
        drop(account.sent());
        assert_eq!(account.rest(), Some(Duration::from_millis(3)));
    }
}
