//! The one loop, over a log in memory, under virtual time.

#![cfg(test)]

mod aside;
mod cancels;
mod claims;
mod deltas;
mod endings;
mod flow;
mod ledger;
mod order;
mod rebalance;
mod simulation;
mod support;
