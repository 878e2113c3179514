//! What a store's error means to the record that needed it.

use forebay_operator::Failure;
use forebay_stores::Error;

/// `store_unavailable` where waiting may help, `store_refused` where the record asks for what no store takes.
pub(crate) fn store_failure(what: &'static str, error: Error) -> Failure {
    match error {
        Error::TooLarge { .. } | Error::Key { .. } | Error::NotFinite | Error::Duplicate { .. } => {
            Failure::rejected("store_refused", error.to_string())
        }
        // A full disk, a damaged file, a lost server: no record is at fault, so none may be dropped for it.
        error => Failure::outage("store_unavailable", what, error),
    }
}
