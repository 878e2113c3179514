//! Time: counted from the start of the simulator, and what that is by the wall clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// When the simulator began, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    began: Instant,
    wall: SystemTime,
}

impl Clock {
    /// A clock that begins now.
    #[expect(clippy::disallowed_methods, reason = "the one function of this crate that reads the wall clock")]
    pub fn start() -> Self {
        Self { began: Instant::now(), wall: SystemTime::now() }
    }

    /// Microseconds since it began.
    pub fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// So many microseconds after it began.
    pub fn instant(&self, at_us: u64) -> Instant {
        self.began + Duration::from_micros(at_us)
    }

    /// The same by the wall clock.
    pub fn wall(&self, at_us: u64) -> SystemTime {
        self.wall + Duration::from_micros(at_us)
    }

    /// The same in microseconds since 1970.
    pub fn wall_us(&self, at_us: u64) -> u64 {
        let since = self.wall(at_us).duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }
}
