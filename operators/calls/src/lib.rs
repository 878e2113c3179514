//! Calling what is slow, dear and unreliable.
//!
//! [`Model`] is the port: one question in, one answer out. [`Server`] makes one try. Everything else is a `Model` around a
//! `Model`, stacked by [`client`](client()), here from the outside in:
//!
//! ```text
//! Tiers       the cheapest model that is good enough; around a client for each of them
//! Allowed     a tenant spends what it may, and no more
//! Fallback    where a model is given up, the next one is asked
//! Retry       what the world failed is tried again, shortly, elsewhere, and as the budget has it
//! Hedge       what is slow is asked elsewhere too, and the first token wins
//! Batch       texts of several calls in one; for vectors only
//! Pool        the best endpoint that has room; before each, for each model:
//!   Breaker     nothing goes where nothing comes back
//!   Throttle    no more than the provider bears, of all processes together where they share it
//! Priced      what the try cost, also where it has no answer
//! Server      one HTTP request, its timeouts, its keys, its errors put into classes
//! ```
//!
//! Invariant: every try is told to the [`Listener`], also the one that fails, so that its cost is never lost; and a
//! key never reaches a log, an error or a row.

pub mod allowance;
pub mod batch;
pub mod breaker;
mod budget;
pub mod client;
mod error;
mod fallback;
pub mod hedge;
pub mod limits;
mod model;
pub mod pool;
mod priced;
pub mod prices;
pub mod retry;
mod route;
mod secret;
pub mod server;
pub mod shared;
#[cfg(test)]
mod testing;
pub mod throttle;
pub mod tiers;
mod window;

pub use allowance::Allowed;
pub use batch::Batch;
pub use budget::Budget;
pub use client::client;
pub use error::{CODES, CallError, Class, Health};
pub use fallback::Fallback;
pub use hedge::Hedge;
pub use limits::Limits;
pub use model::{Call, CostSoFar, Happening, Listener, Model, Reply, Task, Tried, TryId, Upstream, Wait};
pub use pool::Pool;
pub use priced::Priced;
pub use prices::Prices;
pub use retry::Retry;
pub use route::Route;
pub use secret::Secret;
pub use server::{Api, Server};
pub use shared::Shared;
pub use tiers::Tiers;
