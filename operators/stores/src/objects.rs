//! The object port: what is large, written once and read seldom: archives, documents, reports.
//!
//! Invariant of every adapter: an object is there whole or not at all, and a key never leads out of the store.

mod folder;
mod prefixed;

use bytes::Bytes;

pub use self::folder::Folder;
pub use self::prefixed::Prefixed;
use crate::error::check_size;
use crate::{Answer, Error};

/// The longest key: what S3 allows.
pub const KEY_BYTES_MAX: usize = 1024;
/// The longest part of a key between slashes: what Linux allows, less what a file being written adds.
pub const SEGMENT_BYTES_MAX: usize = 240;
/// The largest object.
pub const OBJECT_BYTES_MAX: usize = 256 * 1024 * 1024;
/// The most keys of one listing.
pub const LIST_MAX: usize = 10_000;

/// A store of objects by key.
///
/// A key is one or more segments joined by `/`. A segment is not empty, `.` or `..`, and has no control character and
/// none of ``\ { } ^ % ` [ ] " < > ~ # | * ?``, which S3 or Google advise against. A key may not be what another
/// continues after a `/`: in a folder, `a` cannot be both a file and where `a/b` lies.
pub trait Objects: Send + Sync + 'static {
    /// Writes or overwrites; it is on disk when this returns.
    fn put(&self, key: &str, object: Bytes) -> Answer<'_, ()>;

    /// Writes only what is absent, and says whether it did.
    fn put_if_absent(&self, key: &str, object: Bytes) -> Answer<'_, bool>;

    /// The object, if there is one.
    fn get(&self, key: &str) -> Answer<'_, Option<Bytes>>;

    /// Removes. Says nothing about whether it was there, because S3 does not.
    fn delete(&self, key: &str) -> Answer<'_, ()>;

    /// The first `limit` keys that begin with `prefix` (all for ""), in the order of their bytes.
    fn list(&self, prefix: &str, limit: usize) -> Answer<'_, Vec<String>>;
}

fn check_key(key: &str) -> Result<(), Error> {
    check_prefix(key)?;
    let reason = match key.rsplit('/').next() {
        _ if key.is_empty() => "is empty",
        Some("") => "ends with a slash",
        _ => return Ok(()),
    };
    Err(Error::Key { key: key.to_owned(), reason })
}

/// A prefix may end anywhere, also after a slash or within a segment.
fn check_prefix(prefix: &str) -> Result<(), Error> {
    check_size("key in bytes", prefix.len(), KEY_BYTES_MAX)?;
    let segments = prefix.strip_suffix('/').unwrap_or(prefix);
    match segments.split('/').find_map(segment_fault) {
        Some(reason) if !prefix.is_empty() => Err(Error::Key { key: prefix.to_owned(), reason }),
        _ => Ok(()),
    }
}

fn segment_fault(segment: &str) -> Option<&'static str> {
    const UNSAFE: &[char] =
        &['\\', '{', '}', '^', '%', '`', '[', ']', '"', '<', '>', '~', '#', '|', '*', '?'];
    match segment {
        "" => Some("has an empty segment"),
        "." | ".." => Some("has a segment that leads elsewhere"),
        _ if segment.len() > SEGMENT_BYTES_MAX => Some("has a segment of more than 240 bytes"),
        _ if segment.contains(char::is_control) => Some("has a control character"),
        _ if segment.contains(UNSAFE) => Some("has a character that object stores advise against"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(key: &str, fault: &str) {
        let found = check_key(key).err().map(|error| error.to_string()).unwrap_or_default();
        if fault.is_empty() {
            assert_eq!(found, "", "{key:?}")
        } else {
            assert!(found.contains(fault), "{key:?}: {found}")
        }
    }

    #[test]
    fn keys_that_lead_elsewhere_or_nowhere_are_refused_and_say_why() {
        check("a", "");
        check("a/b.c/ä 1", "");
        check("a..b/...", "");
        check("", "is empty");
        check("/", "empty segment");
        check("a/", "ends with a slash");
        check("/a", "empty segment");
        check("a//b", "empty segment");
        check("..", "leads elsewhere");
        check("a/../../b", "leads elsewhere");
        check("a/./b", "leads elsewhere");
        check("a\\..\\b", "advise against");
        check("%2e%2e/b", "advise against");
        check("a\0b", "control character");
        check(&"a".repeat(241), "240 bytes");
        check(&"a/".repeat(600), "over the limit of 1024");
    }
}
