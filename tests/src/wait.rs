//! Waiting for what another process does, which no event here announces.
//!
//! Invariant: every wait ends, by its condition or by its limit, and then says what it waited for.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

const INTERVAL: Duration = Duration::from_millis(20);

/// Asks `condition` until it gives a value, and gives that value on.
///
/// # Panics
/// When `limit` has passed without one.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    wait_for_ok(what, limit, || condition().ok_or("it did not come"))
}

/// [`wait_for`] what says why it is not there yet: the last reason is in the panic.
///
/// # Panics
/// When `limit` has passed without a value.
#[track_caller]
pub fn wait_for_ok<T, E: Display>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<T, E>,
) -> T {
    let start = Instant::now();
    loop {
        let reason = match condition() {
            Ok(value) => return value,
            Err(reason) => reason,
        };
        if start.elapsed() >= limit {
            panic!("waited {limit:?} in vain for {what}: {reason}");
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "another process announces nothing here; it has to be asked"
        )]
        std::thread::sleep(INTERVAL);
    }
}

/// Ends a wait that has its own way to wait.
///
/// # Panics
/// When `limit` has passed since `start`.
#[track_caller]
pub(crate) fn spent(what: &str, start: Instant, limit: Duration) {
    assert!(start.elapsed() < limit, "waited {limit:?} in vain for {what}");
}

/// [`wait_for`] in async code. A condition that hangs does not outlive the limit either.
///
/// # Panics
/// When `limit` has passed without a value.
pub async fn wait_for_async<T>(
    what: &str,
    limit: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> T {
    let asking = async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    match tokio::time::timeout(limit, asking).await {
        Ok(value) => value,
        Err(_) => panic!("waited {limit:?} in vain for {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_value_that_ended_the_wait() {
        let mut asked = 0;
        let value = wait_for("the third question", Duration::from_secs(5), || {
            asked += 1;
            (asked == 3).then_some("here")
        });
        assert_eq!((value, asked), ("here", 3));
    }

    #[test]
    #[should_panic(expected = "in vain for godot")]
    fn ends_at_its_limit_and_says_what_it_waited_for() {
        wait_for("godot", Duration::from_millis(30), || None::<()>);
    }

    #[test]
    #[should_panic(expected = "in vain for godot: he sent a boy")]
    fn says_why_it_was_in_vain_where_that_is_known() {
        wait_for_ok("godot", Duration::from_millis(30), || Err::<(), _>("he sent a boy"));
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "in vain for an answer")]
    async fn a_condition_that_hangs_ends_at_the_limit_too() {
        wait_for_async("an answer", Duration::from_secs(3600), async || {
            std::future::pending::<Option<()>>().await
        })
        .await;
    }
}
