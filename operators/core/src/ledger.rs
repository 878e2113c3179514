//! The port to whatever remembers paid calls.

use crate::Failure;
use forebay_schemas::{Attempt, CallId};
use futures::future::BoxFuture;

/// Remembers the upstream calls that one record makes, so that an answer that was paid for is never paid for again.
pub trait Ledger: Send + Sync {
    /// What is known of a call, as soon as nobody else may be making it. Until what is given is dropped, nobody in this
    /// process makes it.
    fn find<'a>(&'a self, call: &'a CallId) -> BoxFuture<'a, Result<Found<'a>, Failure>>;
}

/// What is known of a call.
pub struct Found<'a> {
    /// Rows about earlier tries that this reading of the record has not told of yet.
    pub rows: Vec<Attempt>,
    /// What is to be done.
    pub known: Known<'a>,
}

/// What is to be done about a call.
pub enum Known<'a> {
    /// Nothing: this is the answer.
    Answered(Vec<u8>),
    /// Nothing: it cannot be made any more.
    Refused(Failure),
    /// It may be made, as the try of this number or a later one.
    Open {
        /// The number.
        attempt: i32,
        /// The right to make it, once.
        turn: Box<dyn Turn + 'a>,
    },
}

/// The right to make a call. Dropped without a word after its start, the call may have been paid for; the host closes it
/// where it knows why, as when the request was taken back.
pub trait Turn: Send {
    /// Notes that the call is sent. To be sent at once when this returns true; where it returns false it must not be sent
    /// after all, and is to be asked for again. `row` is what is told of it if nobody ever hears how it ended.
    fn start(&mut self, row: Attempt) -> BoxFuture<'_, Result<bool, Failure>>;

    /// It was answered. The answer may be used when this returns.
    fn done(&mut self, answer: Vec<u8>, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>>;

    /// It failed. It may be made again when this returns.
    fn failed(&mut self, row: Option<Attempt>) -> BoxFuture<'_, Result<(), Failure>>;
}
