//! The counter port: how much of a limit is used, by calls that are over and by calls under way.
//!
//! Whoever is about to use something holds the most that it may take, and settles for what it took. What a process held that
//! died in between is free again after a time. Counters are named by their callers, also for the minute or the month they
//! are of: nothing here knows a calendar.
//!
//! Invariant of every adapter: of any number of simultaneous holds, those that succeed leave each counter at its limit or
//! below it; and a hold is taken on all of its lines or on none. A group that has all the counters it may have is refused new
//! ones, and nobody else is refused any; whoever has a counter keeps it.

mod local;
mod redis;

use crate::error::check_size;
use crate::{Answer, Error};
use std::time::Duration;

pub use self::local::Local;

/// The longest name of a counter or a hold.
pub const NAME_BYTES_MAX: usize = 768;
/// The most lines of a hold.
pub const LINES_MAX: usize = 64;
/// How long a settlement is remembered for a hold that may come after it: longer than one is under way.
const OVERTAKEN: Duration = Duration::from_secs(60);
/// The most counters of a list; more are counted and not listed.
pub const LIST_MAX: usize = 100_000;
/// The most counters of a page of a list.
pub const PAGE_MAX: usize = 1_000;
/// The most counters of a group.
pub const GROUP_MAX: usize = 10_000;
/// The largest amount or limit. Redis counts in its scripts by floats, which are exact up to here.
pub const AMOUNT_MAX: u64 = 1 << 53;

/// What a hold wants of one counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The counter.
    pub name: String,
    /// The most that will be used.
    pub amount: u64,
    /// The most that may be used and held at a time.
    pub limit: u64,
    /// How long the counter is kept after its last change; longer than a hold.
    pub keep: Duration,
    /// The group that the counter belongs to, where somebody else may make up as many of its kind as they like.
    pub group: Option<String>,
    /// The list by which the counter is found again; it is kept as long as the counter that was changed last.
    pub list: Option<String>,
}

/// How a counter stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The counter.
    pub name: String,
    /// What is used.
    pub used: u64,
    /// What is held.
    pub held: u64,
    /// How often there was no room, since it is there.
    pub refused: u64,
}

/// Whether there was room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// On every line.
    Taken,
    /// Not on this line, counted from 0.
    Over {
        /// Which it was.
        line: usize,
        /// What is used and held of it.
        counted: u64,
    },
    /// The counter of this line, counted from 0, is new, and there are as many of its group as may be.
    Full {
        /// Which it was.
        line: usize,
    },
}

/// A store of counters.
pub trait Counters: Send + Sync + 'static {
    /// Holds what the lines want, under an id that nobody else uses, for so long or until it is settled.
    fn hold<'a>(&'a self, id: &'a str, lines: &'a [Line], time: Duration) -> Answer<'a, Hold>;

    /// Gives a hold back and counts what was used instead: an amount for each line, 0 where it was nothing. What was used
    /// counts also where the hold had run out. Not to be repeated. A hold that arrives after its settlement, as its caller did not
    /// wait for it, holds nothing.
    fn settle<'a>(&'a self, id: &'a str, lines: &'a [Line], used: &'a [u64]) -> Answer<'a, ()>;

    /// The counters of a list that come behind this name, at most [`PAGE_MAX`], in the order of their bytes; "" comes before all. One
    /// that is no longer kept may be among them, with nothing counted.
    fn listed<'a>(&'a self, list: &'a str, after: &'a str) -> Answer<'a, Vec<Counted>>;
}

fn check(id: &str, lines: &[Line]) -> Result<(), Error> {
    check_size("the id of a hold in bytes", id.len(), NAME_BYTES_MAX)?;
    check_size("the lines of a hold", lines.len(), LINES_MAX)?;
    for line in lines {
        check_size("the name of a counter in bytes", line.name.len(), NAME_BYTES_MAX)?;
        let group_bytes = line.group.as_ref().map_or(0, String::len);
        check_size("the name of a group of counters in bytes", group_bytes, NAME_BYTES_MAX)?;
        let list_bytes = line.list.as_ref().map_or(0, String::len);
        check_size("the name of a list of counters in bytes", list_bytes, NAME_BYTES_MAX)?;
    }
    Ok(())
}
