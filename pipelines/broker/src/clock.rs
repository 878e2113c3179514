//! Wall time, read in one place.
//!
//! Everything that needs the time takes it as an argument; only the server's edge calls this.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch, as record timestamps count them.
#[expect(clippy::disallowed_methods, reason = "the one function of this crate that reads the wall clock")]
pub(crate) fn wall_ms() -> i64 {
    to_ms(SystemTime::now())
}

/// A file's modification time in the same unit; 0 for a time before 1970.
pub(crate) fn to_ms(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
