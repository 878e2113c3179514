//! Objects as files below one folder.
//!
//! Invariant: a file appears under its name only when all of it is on disk (written beside, fsynced, then renamed), so a
//! crash leaves the old object or the new one, and at worst a stray file that no listing shows.

use std::collections::BinaryHeap;
use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};
use tokio::task::spawn_blocking;

use super::{LIST_MAX, OBJECT_BYTES_MAX, Objects, check_key, check_prefix};
use crate::error::check_size;
use crate::{Answer, Error};

/// A folder of this machine. Links in it are followed: it is for this store alone.
pub struct Folder {
    path: PathBuf,
    files: LocalFileSystem,
}

impl Folder {
    /// Opens the folder, made if it is not there.
    pub async fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let closed = Error::Closed { path: path.clone() };
        let opened = spawn_blocking(move || {
            std::fs::create_dir_all(&path).map_err(|source| Error::io(&path, source))?;
            let files = LocalFileSystem::new_with_prefix(&path).map_err(|error| stored(&path, error))?;
            // An object that is deleted takes its folder along, or those of past days would pile up.
            Ok(Self { files: files.with_fsync(true).with_automatic_cleanup(true), path })
        });
        opened.await.unwrap_or(Err(closed))
    }

    async fn put_as(&self, key: &str, object: Bytes, mode: PutMode) -> Result<bool, Error> {
        check_size("object in bytes", object.len(), OBJECT_BYTES_MAX)?;
        match self.files.put_opts(&location(key)?, object.into(), mode.into()).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(stored(&self.path, error)),
        }
    }
}

impl Objects for Folder {
    fn put(&self, key: &str, object: Bytes) -> Answer<'_, ()> {
        let key = key.to_owned();
        async move { self.put_as(&key, object, PutMode::Overwrite).await.map(drop) }.boxed()
    }

    fn put_if_absent(&self, key: &str, object: Bytes) -> Answer<'_, bool> {
        let key = key.to_owned();
        async move { self.put_as(&key, object, PutMode::Create).await }.boxed()
    }

    fn get(&self, key: &str) -> Answer<'_, Option<Bytes>> {
        let key = key.to_owned();
        async move {
            let found = match self.files.get(&location(&key)?).await {
                Ok(found) => found,
                Err(object_store::Error::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(stored(&self.path, error)),
            };
            let bytes = found.bytes().await;
            bytes.map(Some).map_err(|error| stored(&self.path, error))
        }
        .boxed()
    }

    fn delete(&self, key: &str) -> Answer<'_, ()> {
        let key = key.to_owned();
        async move {
            match self.files.delete(&location(&key)?).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(stored(&self.path, error)),
            }
        }
        .boxed()
    }

    fn list(&self, prefix: &str, limit: usize) -> Answer<'_, Vec<String>> {
        let prefix = prefix.to_owned();
        async move {
            check_prefix(&prefix)?;
            check_size("number of keys", limit, LIST_MAX)?;
            let folder = match prefix.rsplit_once('/') {
                Some((folder, _)) => Some(location(folder)?),
                None => None,
            };
            let mut files = self.files.list(folder.as_ref());
            // The smallest `limit` seen so far, the largest of them on top: files come in no order.
            let mut first = BinaryHeap::with_capacity(limit + 1);
            while let Some(file) = files.try_next().await.map_err(|error| stored(&self.path, error))? {
                let key = file.location.to_string();
                if !key.starts_with(&prefix) {
                    continue;
                }
                first.push(key);
                if first.len() > limit {
                    first.pop();
                }
            }
            Ok(first.into_sorted_vec())
        }
        .boxed()
    }
}

fn location(key: &str) -> Result<object_store::path::Path, Error> {
    check_key(key)?;
    let refused = |_| Error::Key { key: key.to_owned(), reason: "is not a path" };
    object_store::path::Path::parse(key).map_err(refused)
}

/// What counts (no space) was said by the system, some levels down.
fn stored(path: &Path, error: object_store::Error) -> Error {
    let path = path.to_owned();
    let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
    while let Some(level) = cause {
        let kind = level.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        if matches!(kind, Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)) {
            return Error::Full { path, source: Arc::new(error) };
        }
        cause = level.source();
    }
    Error::Io { path, source: Arc::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("what the library says")]
    struct Wrapped(#[source] std::io::Error);

    #[test]
    fn a_full_disk_is_told_from_other_errors_however_deep_it_lies() {
        let deep = |kind: std::io::ErrorKind| object_store::Error::Generic {
            store: "x",
            source: Box::new(Wrapped(kind.into())),
        };
        let error = stored(Path::new("/data"), deep(std::io::ErrorKind::StorageFull));
        assert!(matches!(&error, Error::Full { path, .. } if path == Path::new("/data")), "{error:?}");
        let error = stored(Path::new("/data"), deep(std::io::ErrorKind::PermissionDenied));
        assert!(matches!(&error, Error::Io { path, .. } if path == Path::new("/data")), "{error:?}");
    }
}
