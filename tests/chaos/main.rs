//! A pipeline on real clusters while its processes, its network, its brokers and its own lines fail it. README.md beside this
//! file tells what is run and what came out.
//!
//! One oracle judges all of it (`site.rs`): every request has exactly one result and one row, every call of the model is
//! explained, and an offset was committed only behind what has become something (`onlooker.rs`). A seed decides what
//! happens, when, and to whom.
//!
//! What is promised no better: what a process had already on its way to Kafka when it was frozen, or cut off, for longer
//! than its session may come a second time, byte for byte; it is counted.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]
#![expect(clippy::print_stdout, reason = "the figures of a run by hand")]

mod brokers;
mod hits;
mod network;
mod onlooker;
mod points;
mod site;
mod whole;

/// A number that whoever runs the tests may set.
fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// The seed of this run; printed, so that a run that failed can be run again.
fn seed() -> usize {
    let seed = setting("FOREBAY_CHAOS_SEED", 20_261_124);
    println!("FOREBAY_CHAOS_SEED={seed}");
    seed
}
