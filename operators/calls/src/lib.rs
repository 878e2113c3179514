//! Calling what is slow, dear and unreliable.
//!
//! [`Model`] is the port: one question in, one answer out. [`OpenAi`] is a client of the OpenAI chat API that makes
//! one try; [`Retry`] stands around a model and makes a few. They stack, each a `Model` itself, so that later
//! layers (budgets, hedges, breakers) find their place between them:
//!
//! ```text
//! Retry       an error of the world is tried again, shortly and never past the deadline
//!   OpenAi    one HTTP request, its timeouts, its errors put into classes
//! ```
//!
//! Invariant: every try is told to the [`Listener`], also the one that fails, so that its cost is never lost; and a
//! key never reaches a log, an error or a row.

pub mod breaker;
mod budget;
mod error;
pub mod hedge;
pub mod limits;
mod model;
pub mod openai;
pub mod pool;
pub mod retry;
mod route;
mod secret;
#[cfg(test)]
mod testing;
pub mod throttle;
mod window;

pub use budget::Budget;
pub use error::{CallError, Class, Health};
pub use hedge::Hedge;
pub use limits::Limits;
pub use model::{Call, Listener, Model, Reply, Tried, Upstream};
pub use openai::OpenAi;
pub use pool::Pool;
pub use retry::Retry;
pub use route::Route;
pub use secret::Secret;
