//! What can go wrong with a store. Each message names the store and, where a person must act, what to do next.
//!
//! Invariant: an error carries no value, and a key only where the key itself is the fault. It is `Clone`, because one
//! failed commit answers every write that shared it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The cause, shared by all who are told of it.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// Why a store could not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another handle, most likely another process, has the file open.
    #[error("store {} is in use by another process; stop that one, or give this one a data folder of its own", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file is not what was written to it.
    #[error(
        "store {} is damaged; move it away and start again, and what it held is rebuilt from the topics",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        source: Cause,
    },
    /// There is no space left for what was to be written.
    #[error("no space left for store {}; free some, then restart", path.display())]
    Full {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: Cause,
    },
    /// Reading or writing went wrong for another reason than space.
    #[error("could not read or write store {}; see to the cause, then restart", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: Cause,
    },
    /// The store was closed, or stopped in the middle of a write.
    #[error("store {} is closed; restart", path.display())]
    Closed {
        /// The file.
        path: PathBuf,
    },
    /// Two adapters over one name would each cache what the other changes.
    #[error("{name:?} is already open in store {}; share the first handle", path.display())]
    Opened {
        /// The file.
        path: PathBuf,
        /// The name that was opened twice.
        name: String,
    },
    /// A server could not be reached, or did not answer in time. A write may or may not have happened. Worth a retry.
    #[error("{what} is unavailable")]
    Unavailable {
        /// The server, without credentials.
        what: String,
        /// What the client said.
        source: Cause,
    },
    /// A server answered with a refusal. The same call would be refused again.
    #[error("{what} refused the command")]
    Refused {
        /// The server, without credentials.
        what: String,
        /// What the server said.
        source: Cause,
    },
    /// Something is over its limit.
    #[error("{what} is {size}, over the limit of {size_max}")]
    TooLarge {
        /// What, with its unit.
        what: &'static str,
        /// How large it is.
        size: usize,
        /// How large it may be.
        size_max: usize,
    },
    /// A key that cannot be used.
    #[error("key {key:?} {reason}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A vector of another length than those stored: most likely of another embedder.
    #[error("the vector has {got} dimensions, those in {store:?} have {expected}; was the embedder changed?")]
    Dimensions {
        /// The vector store's name.
        store: String,
        /// The length of the vectors stored.
        expected: usize,
        /// The length of this one.
        got: usize,
    },
    /// A vector that has no direction to compare.
    #[error("the vector has a component that is not a finite number")]
    NotFinite,
    /// Two points of one group with the same id.
    #[error("point {id:?} occurs twice in group {group:?}")]
    Duplicate {
        /// The group.
        group: String,
        /// The id.
        id: String,
    },
}

impl Error {
    /// Whether the same call may succeed later without anyone doing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        let (path, kind) = (path.to_owned(), source.kind());
        let source: Cause = Arc::new(source);
        match kind {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path, source },
            // redb's word for "this file is not one of mine", and what a file cut short reads as.
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Self::Damaged { path, source },
            _ => Self::Io { path, source },
        }
    }

    pub(crate) fn redb(path: &Path, error: redb::Error) -> Self {
        match error {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => {
                Self::Locked { path: path.to_owned() }
            }
            redb::Error::DatabaseClosed => Self::Closed { path: path.to_owned() },
            redb::Error::Io(source) => Self::io(path, source),
            redb::Error::PreviousIo | redb::Error::Backend(_) | redb::Error::Unsupported => {
                Self::Io { path: path.to_owned(), source: Arc::new(error) }
            }
            // A file of another format, a table of other types, a checksum: nothing that a retry mends.
            _ => Self::Damaged { path: path.to_owned(), source: Arc::new(error) },
        }
    }
}

/// The limit is part of a port's contract, so it is checked here and not by whatever lies below.
pub(crate) fn check_size(what: &'static str, size: usize, size_max: usize) -> Result<(), Error> {
    if size > size_max { Err(Error::TooLarge { what, size, size_max }) } else { Ok(()) }
}
