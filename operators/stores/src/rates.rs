//! The rate port: how much may still be sent within a minute, told to all who share a limit.
//!
//! Whoever is about to send takes a slice of the allowance, uses it up within [`SLICE`], and gives back what it did not use
//! when it takes the next. Beside the limits that are configured, a store keeps what a provider last said is left, as a bucket
//! that refills, and until when nobody shall send. A rate is named by its callers: nothing here knows a provider.
//!
//! Invariant of every adapter: what is sent within any minute, each slice within its time, is at most the limit. A slice
//! therefore counts for its second, the time that it may be used in, and a minute; by the store's clock, so that no two callers
//! need agree on the time.

mod local;
mod redis;

use crate::error::check_size;
use crate::{Answer, Error};
use std::time::Duration;

pub use self::local::Local;

/// The longest name of a rate, or of who shares it.
pub const NAME_BYTES_MAX: usize = 512;
/// How long a slice may be used, from when it was asked for.
pub const SLICE: Duration = Duration::from_secs(1);
/// The most amounts that are given back at a time: as many as there are seconds that still count.
pub const BACK_MAX: usize = 62;
/// The largest amount. Redis counts in its scripts by floats, which are exact up to here.
pub const AMOUNT_MAX: u64 = 1 << 53;

/// How long a slice counts from the beginning of the second in which it was taken: that second, its use, and a minute.
const COUNTS_S: u64 = 62;
/// What was taken in this second or so many before may not have reached the provider yet: as long as a slice may be used.
const UNCOUNTED_S: u64 = 1;
/// How long a bucket is kept that nobody tells of again.
const HEARD_MS: u64 = 60_000;
/// A slice is this part of what is left, where that is more than the taker needs: others want some of it too.
const PART: u64 = 4;
/// How long somebody counts as one who shares, after it asked last.
const SHARES_MS: u64 = 150_000;
/// How long a rate is kept that nobody asks for.
const KEEP_MS: u64 = 10 * 60_000;
/// The shortest wait that is told: what is rounded down to nothing would be asked for at once again.
const WAIT_MS_MIN: u64 = 10;

/// What is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measures<T> {
    /// Requests.
    pub requests: T,
    /// Tokens.
    pub tokens: T,
}

impl<T: Copy> Measures<T> {
    /// The same of both.
    pub fn each(of: T) -> Self {
        Self { requests: of, tokens: of }
    }

    fn array(self) -> [T; 2] {
        [self.requests, self.tokens]
    }
}

impl<T: Copy> From<[T; 2]> for Measures<T> {
    fn from([requests, tokens]: [T; 2]) -> Self {
        Self { requests, tokens }
    }
}

/// What a provider says is left of a limit of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Heard {
    /// How much is left now.
    pub level: u64,
    /// How much there is when all of it is there.
    pub full: u64,
    /// How much comes back until the reset, evenly.
    pub refills: u64,
    /// When that is.
    pub reset: Duration,
}

/// Part of a slice that was not used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Back {
    /// The second in which it was taken.
    pub second: u64,
    /// How much.
    pub amount: Measures<u64>,
}

/// What one who shares a rate tells and asks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ask {
    /// What may be sent in a minute; all that is asked for where nothing is configured.
    pub limits: Measures<Option<u64>>,
    /// The least that is of use; nothing to ask for nothing.
    pub need: Measures<u64>,
    /// The most that is of use.
    pub want: Measures<u64>,
    /// What was not used of earlier slices.
    pub back: Vec<Back>,
    /// What was sent beyond any slice.
    pub beyond: Measures<u64>,
    /// What the provider said, where it said anything since the last time.
    pub heard: Measures<Option<Heard>>,
    /// For how long nobody shall send, where the provider asked for it.
    pub pause: Option<Duration>,
}

/// What there is for one who asked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slice {
    /// How much; nothing, or no less than what was needed.
    pub amount: Measures<u64>,
    /// The second in which it was taken.
    pub second: u64,
    /// Whether anything is limited: by a configured limit, or by what a provider said within the last minute.
    pub is_limited: bool,
    /// After which there may be more, where there was not enough.
    pub wait: Option<Duration>,
    /// For how long nobody shall send.
    pub pause: Option<Duration>,
    /// How many share what this store keeps.
    pub sharers: u64,
}

/// A store of rates.
pub trait Rates: Send + Sync + 'static {
    /// Tells what `sharer` has to tell of the rate `name`, and takes a slice of it. Not to be repeated.
    fn take<'a>(&'a self, name: &'a str, sharer: &'a str, ask: &'a Ask) -> Answer<'a, Slice>;
}

fn check(name: &str, sharer: &str, ask: &Ask) -> Result<(), Error> {
    check_size("the name of a rate in bytes", name.len(), NAME_BYTES_MAX)?;
    check_size("the name of who shares it in bytes", sharer.len(), NAME_BYTES_MAX)?;
    check_size("what is given back of a rate", ask.back.len(), BACK_MAX)
}
