//! Named places where a test may let the process crash: between which two lines a promise could break is known here.
//!
//! Invariant: a release build knows none of them.

/// Ends the process, as a crash does, where `FOREBAY_CRASH_AT=NAME:COUNT` names this place and it is passed for the
/// COUNTth time.
#[cfg(debug_assertions)]
pub fn crash_point(name: &str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };
    static AT: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let at = std::env::var("FOREBAY_CRASH_AT").ok()?;
        let (name, count) = at.split_once(':')?;
        Some((name.to_owned(), AtomicU64::new(count.parse().ok()?)))
    });
    let Some((at, left)) = &*AT else { return };
    if at == name && left.fetch_sub(1, Ordering::AcqRel) == 1 {
        std::process::abort();
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub const fn crash_point(_: &str) {}
