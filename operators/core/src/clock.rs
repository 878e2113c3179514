//! What time it is, passed in, so that a test can run an hour in a millisecond.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// Wall time in milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub enum Clock {
    /// The machine's.
    System,
    /// Runs with tokio's clock, which a test may pause and advance.
    Virtual {
        /// Wall time at `since`, in milliseconds since 1970.
        start_ms: i64,
        /// The moment from which it runs.
        since: Instant,
    },
}

impl Clock {
    /// A clock that shows `start_ms` now and then runs with tokio's.
    pub fn starting_at(start_ms: i64) -> Self {
        Self::Virtual { start_ms, since: Instant::now() }
    }

    /// Milliseconds since 1970.
    pub fn now_ms(&self) -> i64 {
        self.now_us() / 1000
    }

    /// Microseconds since 1970.
    pub fn now_us(&self) -> i64 {
        match self {
            Self::System => {
                #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
                let now = SystemTime::now();
                micros(now.duration_since(UNIX_EPOCH).unwrap_or_default())
            }
            Self::Virtual { start_ms, since } => start_ms.saturating_mul(1000) + micros(since.elapsed()),
        }
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
