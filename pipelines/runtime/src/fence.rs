//! Stops a member of a group that may have lost its partitions while it stood still.
//!
//! A process that was stopped (SIGSTOP, a paused machine, a laptop's lid) wakes in the belief that nothing has been. The
//! group has passed its partitions on meanwhile, but it hears of that only by its next heartbeat; until then it would
//! do again what their new owner does. So it asks the clock first: whoever stood still for nearly a session waits
//! until a heartbeat must have been answered, and only then goes on with what is still its own.
//!
//! Invariant: between two beats that lie further apart than a session allows and the end of the wait after them,
//! nothing passes. Residual: messages that the client library held already when the process was stopped.
//!
//! The clock is CLOCK_BOOTTIME, which goes on while a machine is suspended.

use rustix::time::{ClockId, clock_gettime};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// How often who waits looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Time between a heartbeat's due moment and the moment when its answer must have been acted on.
const MARGIN: Duration = Duration::from_secs(2);

/// What a member knows of its own stillness. Beats come from the thread that polls.
#[derive(Debug)]
pub struct Fence {
    stall_ms_max: AtomicU64,
    proof_ms: AtomicU64,
    beat_at_ms: AtomicU64,
    doubtful_until_ms: AtomicU64,
}

impl Fence {
    /// A fence for a group whose members are given up after `session` and beat every `heartbeat`.
    pub fn new(session: Duration, heartbeat: Duration) -> Self {
        let fence = Self {
            stall_ms_max: AtomicU64::default(),
            proof_ms: AtomicU64::default(),
            beat_at_ms: AtomicU64::new(now_ms()),
            doubtful_until_ms: AtomicU64::new(0),
        };
        fence.set(session, heartbeat);
        fence
    }

    /// The same, where it becomes known only later.
    pub fn set(&self, session: Duration, heartbeat: Duration) {
        // The last answered heartbeat may be one interval older than the last beat here.
        let stall = session.saturating_sub(heartbeat + MARGIN).max(Duration::from_secs(1));
        self.stall_ms_max.store(millis(stall), Ordering::Release);
        self.proof_ms.store(millis(heartbeat + MARGIN), Ordering::Release);
    }

    /// The polling thread is alive.
    pub fn beat(&self) {
        self.beat_at(now_ms());
    }

    /// Whether what is ours is surely still ours.
    pub fn is_sure(&self) -> bool {
        self.is_sure_at(now_ms())
    }

    /// Waits until it is sure again. Whoever waits must look afterwards whether the partition is still there.
    pub async fn sure(&self) {
        while !self.is_sure() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn beat_at(&self, now_ms: u64) {
        let before = self.beat_at_ms.load(Ordering::Acquire);
        if now_ms.saturating_sub(before) > self.stall_ms_max.load(Ordering::Acquire) {
            // Before the beat itself, so that nobody slips through between the two.
            let proven = now_ms + self.proof_ms.load(Ordering::Acquire);
            self.doubtful_until_ms.store(proven, Ordering::Release);
        }
        self.beat_at_ms.store(now_ms, Ordering::Release);
    }

    fn is_sure_at(&self, now_ms: u64) -> bool {
        let since = now_ms.saturating_sub(self.beat_at_ms.load(Ordering::Acquire));
        let still = since > self.stall_ms_max.load(Ordering::Acquire);
        !still && now_ms >= self.doubtful_until_ms.load(Ordering::Acquire)
    }
}

/// Milliseconds of a clock that goes on while the machine is suspended.
pub(crate) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds * 1_000 + nanos / 1_000_000
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fence() -> (Fence, u64) {
        let fence = Fence::new(Duration::from_secs(10), Duration::from_secs(3));
        let start = fence.beat_at_ms.load(Ordering::Acquire);
        (fence, start)
    }

    #[test]
    fn who_stood_still_for_nearly_a_session_waits_for_a_heartbeat() {
        let (fence, start) = fence();
        assert!(fence.is_sure_at(start + 5_000));
        assert!(!fence.is_sure_at(start + 5_001), "still, and no beat has come");
        fence.beat_at(start + 12_000);
        assert!(!fence.is_sure_at(start + 12_000));
        fence.beat_at(start + 14_000);
        assert!(!fence.is_sure_at(start + 16_999));
        fence.beat_at(start + 16_990);
        assert!(fence.is_sure_at(start + 17_000));
    }

    #[test]
    fn a_short_stop_costs_nothing() {
        let (fence, start) = fence();
        fence.beat_at(start + 4_000);
        assert!(fence.is_sure_at(start + 4_000));
    }

    #[test]
    fn a_session_that_becomes_known_later_counts_from_then_on() {
        let (fence, start) = fence();
        fence.set(Duration::from_secs(45), Duration::from_secs(5));
        assert!(fence.is_sure_at(start + 38_000));
        fence.beat_at(start + 38_001);
        assert!(!fence.is_sure_at(start + 38_001 + 6_999));
        assert!(fence.is_sure_at(start + 38_001 + 7_000));
    }

    proptest! {
        /// Whatever the stops: nothing passes while the session may be over and the group has not been heard.
        #[test]
        fn nothing_passes_after_a_stop_that_a_session_does_not_outlive(gaps in proptest::collection::vec(0u64..15_000, 1..50)) {
            let (fence, mut now) = fence();
            let mut doubtful_until = 0;
            for gap in gaps {
                now += gap;
                fence.beat_at(now);
                if gap + 3_000 >= 10_000 {
                    doubtful_until = now + 3_000;
                }
                prop_assert!(!(fence.is_sure_at(now) && now < doubtful_until));
            }
        }
    }
}
