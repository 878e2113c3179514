//! The keys of one account or several, used in turn as they run out.
//!
//! Invariant: a key that was refused is left alone while another may be good. With all of them refused, or one only, the
//! one that comes back first is used: whether it is good again only its provider knows.

use crate::{CallError, Class, Secret};
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How long a key is left alone that is not good, or on which nothing is left.
const DEAD_FOR: Duration = Duration::from_secs(600);
/// The same after a rate limit that names no wait.
const LIMITED_FOR: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Keys {
    keys: Vec<Secret>,
    /// Until when each is left alone.
    out_until: Mutex<Vec<Option<Instant>>>,
}

impl Keys {
    pub(super) fn new(keys: Vec<Secret>) -> Self {
        let out_until = Mutex::new(vec![None; keys.len()]);
        Self { keys, out_until }
    }

    /// The number of the key to use now; absent where there is none at all.
    pub(super) fn pick(&self) -> Option<usize> {
        let (out, now) = (self.out_until.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        (0..self.keys.len()).min_by_key(|&index| out[index].filter(|&until| until > now))
    }

    pub(super) fn get(&self, index: usize) -> &Secret {
        &self.keys[index]
    }

    /// A call with it failed.
    pub(super) fn failed(&self, index: usize, error: &CallError) {
        let out_for = match error.class {
            Class::Account => DEAD_FOR,
            Class::Limited => error.retry_after.unwrap_or(LIMITED_FOR),
            _ => return,
        };
        let until = Instant::now() + out_for.min(DEAD_FOR);
        self.out_until.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(until);
    }

    /// Whether the next call would use a key that is not left alone, while another is.
    pub(super) fn has_rotated(&self) -> bool {
        let (out, now) = (self.out_until.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        let good = out.iter().filter(|until| until.is_none_or(|until| until <= now)).count();
        0 < good && good < self.keys.len()
    }

    /// The same text without any of them: a server may echo the key it was given.
    pub(super) fn redact(&self, text: &str) -> String {
        let keys = self.keys.iter().map(Secret::expose).filter(|key| !key.is_empty());
        keys.fold(text.to_owned(), |text, key| text.replace(key, "(redacted)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{error, limited};

    #[tokio::test(start_paused = true)]
    async fn a_key_that_is_refused_makes_way_for_the_next() {
        let keys = Keys::new(["a", "b"].map(Secret::new).into());
        assert_eq!((keys.pick(), keys.has_rotated()), (Some(0), false));
        keys.failed(0, &error(Class::Transient));
        assert_eq!(keys.pick(), Some(0), "that was not the key");
        keys.failed(0, &error(Class::Account));
        assert_eq!((keys.pick(), keys.has_rotated()), (Some(1), true));
        keys.failed(1, &limited(Duration::from_secs(3)));
        assert_eq!((keys.pick(), keys.has_rotated()), (Some(1), false), "it comes back first");
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!((keys.pick(), keys.has_rotated()), (Some(1), true));
        tokio::time::advance(DEAD_FOR).await;
        assert_eq!((keys.pick(), keys.has_rotated()), (Some(0), false));
    }

    #[tokio::test(start_paused = true)]
    async fn one_key_is_used_whatever_it_came_to() {
        let keys = Keys::new(vec![Secret::new("a")]);
        keys.failed(0, &error(Class::Account));
        assert_eq!((keys.pick(), keys.has_rotated()), (Some(0), false));
        assert_eq!(keys.redact("no good: a"), "no good: (redacted)");
        assert_eq!(Keys::new(Vec::new()).pick(), None);
    }
}
