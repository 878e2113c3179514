//! The key-value port: the answer cache, leases, deduplication, tables read from topics and the positions reached.
//!
//! Invariant of every adapter: an expired entry is absent to every call, whether or not it still takes up space; and
//! of any number of simultaneous [`KeyValue::set_if_absent`] on a key that is absent, exactly one gets `true`.

mod embedded;
mod redis;

use std::time::Duration;

use bytes::Bytes;

pub use self::embedded::{Embedded, Options as EmbeddedOptions};
pub use self::redis::{Options as RedisOptions, Redis};
use crate::error::check_size;
use crate::{Answer, Error};

/// The longest key.
pub const KEY_BYTES_MAX: usize = 1024;
/// The largest value.
pub const VALUE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The most keys in one call that takes several.
pub const KEYS_MAX: usize = 10_000;

/// A store of bytes by key. A future that is dropped may or may not have done its work.
pub trait KeyValue: Send + Sync + 'static {
    /// The value, if there is one that has not expired.
    fn get(&self, key: &str) -> Answer<'_, Option<Bytes>>;

    /// The values in the order of `keys`, which need not be of one moment.
    fn get_many(&self, keys: &[String]) -> Answer<'_, Vec<Option<Bytes>>>;

    /// Sets or overwrites, also the time to live: `None` never expires. Less than a millisecond counts as one.
    fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Answer<'_, ()>;

    /// Sets only what is absent, and says whether it did: leases, deduplication.
    fn set_if_absent(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Answer<'_, bool>;

    /// Removes, and says whether there was something.
    fn delete(&self, key: &str) -> Answer<'_, bool>;

    /// Removes only if the value is `expected`, and says whether it did: gives back a lease that is still mine.
    fn delete_if(&self, key: &str, expected: &[u8]) -> Answer<'_, bool>;

    /// Sets (never to expire) or, where there is no value, deletes: all or none, also after a crash, so that changes
    /// to a table and the position they bring it to go together. Later entries win over earlier ones of the same key.
    fn set_many(&self, entries: Vec<(String, Option<Bytes>)>) -> Answer<'_, ()>;

    /// Removes all whose key begins with `prefix` (all for ""), and says how many. Not in one step: what is set
    /// meanwhile may stay or go.
    fn clear(&self, prefix: &str) -> Answer<'_, u64>;

    /// Returns once what was acknowledged before survives a crash of this process.
    fn flush(&self) -> Answer<'_, ()>;
}

fn check_key(key: &str) -> Result<(), Error> {
    if key.is_empty() {
        return Err(Error::Key { key: String::new(), reason: "is empty" });
    }
    check_size("key in bytes", key.len(), KEY_BYTES_MAX)
}

fn check_keys(keys: &[String]) -> Result<(), Error> {
    check_size("number of keys", keys.len(), KEYS_MAX)?;
    keys.iter().try_for_each(|key| check_key(key))
}

fn check_entry(key: &str, value: &[u8]) -> Result<(), Error> {
    check_key(key)?;
    check_size("value in bytes", value.len(), VALUE_BYTES_MAX)
}

/// Returns the bytes of all together.
fn check_entries(entries: &[(String, Option<Bytes>)]) -> Result<usize, Error> {
    check_size("number of keys", entries.len(), KEYS_MAX)?;
    let mut bytes = 0;
    for (key, value) in entries {
        let value = value.as_deref().unwrap_or_default();
        check_entry(key, value)?;
        bytes += key.len() + value.len();
    }
    check_size("entries in bytes", bytes, crate::database::WRITE_BYTES_MAX)?;
    Ok(bytes)
}
