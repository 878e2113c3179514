//! The contract between an operator and its host.
//!
//! An operator says *what happened* to a record; the pipeline says *where it goes*; the host moves the bytes.
//! So an operator holds no spans, metrics, retries, offsets or clocks of its own: it gets a [`Context`].
//!
//! Invariant: nothing heavy is linked here. Whoever writes an operator compiles this crate and the records.

mod clock;
pub mod compliance;
mod context;
mod deltas;
mod failure;
mod ledger;
mod operator;
mod step;
mod table;

pub use clock::Clock;
pub use context::{Called, Context, Delivery, Event, Host, Operation, Quiet, Stop, StopSignal};
pub use failure::{BoxError, Failure};
pub use ledger::{Found, Known, Ledger, Turn};
pub use operator::{Operator, Output, Port};
pub use step::{Addressed, Opened, Step, step};
pub use table::{Change, Table};
