//! The objects of one tenant: a store seen through a prefix.
//!
//! Invariant: whoever holds only this can neither name nor see an object outside the prefix. The prefix and the key
//! are checked apart, so neither can break out with the help of the other.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;

use super::{Objects, check_key, check_prefix};
use crate::{Answer, Error};

/// A part of another store.
pub struct Prefixed {
    inner: Arc<dyn Objects>,
    /// Ends with a slash.
    prefix: String,
}

impl Prefixed {
    /// The objects of `inner` whose keys begin with `prefix` and a slash.
    pub fn new(inner: Arc<dyn Objects>, prefix: &str) -> Result<Self, Error> {
        check_key(prefix)?;
        Ok(Self { inner, prefix: format!("{prefix}/") })
    }

    fn key(&self, key: &str) -> Result<String, Error> {
        check_key(key)?;
        Ok(format!("{}{key}", self.prefix))
    }
}

impl Objects for Prefixed {
    fn put(&self, key: &str, object: Bytes) -> Answer<'_, ()> {
        let key = self.key(key);
        async move { self.inner.put(&key?, object).await }.boxed()
    }

    fn put_if_absent(&self, key: &str, object: Bytes) -> Answer<'_, bool> {
        let key = self.key(key);
        async move { self.inner.put_if_absent(&key?, object).await }.boxed()
    }

    fn get(&self, key: &str) -> Answer<'_, Option<Bytes>> {
        let key = self.key(key);
        async move { self.inner.get(&key?).await }.boxed()
    }

    fn delete(&self, key: &str) -> Answer<'_, ()> {
        let key = self.key(key);
        async move { self.inner.delete(&key?).await }.boxed()
    }

    fn list(&self, prefix: &str, limit: usize) -> Answer<'_, Vec<String>> {
        let checked = check_prefix(prefix).map(|()| format!("{}{prefix}", self.prefix));
        async move {
            let keys = self.inner.list(&checked?, limit).await?;
            Ok(keys.iter().filter_map(|key| key.strip_prefix(&self.prefix)).map(str::to_owned).collect())
        }
        .boxed()
    }
}
