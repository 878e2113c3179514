//! How many more calls are made than were asked for.
//!
//! Retries alone make a failure worse: three tries each are three times the load on servers that fail from load. So all
//! that is made beyond the first try of a call (retries, hedges, fallbacks) draws on one budget, which the first tries
//! fill. As in Finagle's `RetryBudget`, with a floor so that a client with few calls may retry at all.
//!
//! Invariant: within ten seconds no more than a fifth of the requests, and a hundred, are extra.

use crate::window::Window;
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Over which time it is kept.
const OVER: Duration = Duration::from_secs(10);
/// One extra call for so many requests.
const REQUESTS_PER_EXTRA: u64 = 5;
/// Extra calls that are free in that time: ten a second.
const FREE: u64 = 100;

const REQUESTS: usize = 0;
const EXTRAS: usize = 1;

/// The budget of all that is made beyond the first try of a call.
#[derive(Debug)]
pub struct Budget(Mutex<Window<2>>);

impl Default for Budget {
    fn default() -> Self {
        Self(Mutex::new(Window::new(OVER)))
    }
}

impl Budget {
    /// A call is made for the first time.
    pub fn asked(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).add(REQUESTS, 1, Instant::now());
    }

    /// Whether one more may be made; then it counts as made.
    pub fn draw(&self) -> bool {
        let (mut window, now) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        let [requests, extras] = window.sums(now);
        let may = extras < FREE + requests / REQUESTS_PER_EXTRA;
        if may {
            window.add(EXTRAS, 1, now);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(budget: &Budget) -> usize {
        (0..10_000).take_while(|_| budget.draw()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_fifth_of_the_requests_and_ten_a_second_may_be_extra() {
        let budget = Budget::default();
        (0..1_000).for_each(|_| budget.asked());
        assert_eq!(drawn(&budget), 300);
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(drawn(&budget), 100, "without requests there is the floor");
    }
}
