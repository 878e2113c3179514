//! Wall time, which comes in by argument, so that a test can let a day pass in a microsecond.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Tells the wall time. Times to live are counted by it.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The machine's own clock.
#[must_use]
pub fn wall_clock() -> Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place of this crate that reads the clock")]
    Arc::new(SystemTime::now)
}

/// Milliseconds since 1970; a clock set before that reads 0.
pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    millis(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Whole milliseconds, rounded up and never 0: Redis refuses a time to live of 0, so no adapter may accept one.
pub(crate) fn ttl_ms(ttl: Duration) -> u64 {
    millis(ttl).saturating_add(u64::from(!ttl.subsec_nanos().is_multiple_of(1_000_000))).max(1)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
