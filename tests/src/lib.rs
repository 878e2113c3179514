//! What tests across crates share: the services they run against, the processes they start, and waiting for either.
//!
//! Invariant: a test never waits without a limit, and leaves no process behind, whether it passes or panics.

#![expect(
    clippy::panic,
    reason = "every caller is a test, and a test that cannot go on says why by panicking"
)]

mod account;
mod broker;
mod client;
mod dice;
pub mod model;
mod process;
pub mod product;
mod proxy;
pub mod services;
mod wait;

pub use account::Account;
pub use broker::{Broker, Cluster};
pub use client::{Client, New, Reader, Record};
pub use dice::Dice;
pub use process::{Running, forebay, free_port};
pub use proxy::{Fault, Proxy};
pub use rustix::process::Signal;
pub use wait::{wait_for, wait_for_async};
