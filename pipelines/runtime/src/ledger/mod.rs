//! The ledger of paid calls: an answer that was paid for and recorded is never paid for again.

pub mod book;
#[cfg(test)]
mod simulation;
