//! The operators that Forebay ships. Each is one file or folder; [`catalogue`] lists them, and nothing else knows
//! them all.
//!
//! ```text
//! documents ─ index ─► chunks                                (read whole by every process that retrieves)
//! requests ─ cache_lookup ─ miss ─► questions ─ retrieve ─► prompts ─ infer ─► completions ─ validate ─► endings
//!                         └ hit ──────────────────────────────────────────────►     │
//! endings ─ publish ─► results, outcomes;  endings ─ fill_cache ─► cache   (read whole by cache_lookup)
//! ```
//!
//! Invariant: no operator knows where its records come from or go to, and none holds a clock, a span, a metric or a
//! retry of its own. What a record turns into depends on the record, its envelope, the settings and the stores alone.

pub mod budgets;
mod cache;
mod cache_lookup;
pub mod catalogue;
pub mod embedder;
mod extractive;
mod fill_cache;
mod index;
mod infer;
mod publish;
pub mod rates;
mod retrieve;
mod rows;
mod store_failure;
mod text;
mod validate;

pub use cache::{CacheTable, Shape};
pub use cache_lookup::CacheLookup;
pub use extractive::Extractive;
pub use fill_cache::FillCache;
pub use index::{Index, document_key};
pub use infer::Infer;
pub use publish::Publish;
pub use retrieve::{ChunksTable, Retrieve};
pub use validate::Validate;

#[cfg(test)]
mod samples;
