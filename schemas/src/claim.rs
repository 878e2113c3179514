//! Where the body of a record lies that is too large to travel from step to step: in the object store.
//!
//! Invariant: only hosts and redrives write this header, and only on topics that no client writes to. The message that
//! bears it has an empty value, which decodes as no record and is no tombstone.

use crate::{HeaderError, Headers, retry::text};
use bytes::Bytes;

/// Header names.
pub mod header {
    crate::record::headers! {
        /// `key;bytes;hash` of the object that is the record's body: its key in the object store, its size, its BLAKE3.
        CLAIM = "forebay-claim";
    }
}

/// Where a body lies, and how to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The object's key.
    pub key: String,
    /// Its size.
    pub bytes: usize,
    /// Its BLAKE3, in hexadecimal digits.
    pub hash: String,
}

impl Claim {
    /// Reads the claim of a message; `None` where it carries its body itself.
    pub fn read(headers: &Headers) -> Result<Option<Self>, HeaderError> {
        let Some((_, value)) = headers.iter().find(|(name, _)| name == header::CLAIM) else {
            return Ok(None);
        };
        let lossy = String::from_utf8_lossy(value.as_deref().unwrap_or_default());
        let said = text(headers, header::CLAIM).and_then(Self::parse);
        said.map(Some).ok_or_else(|| HeaderError::new(header::CLAIM, &lossy, "is not key;bytes;hash"))
    }

    fn parse(text: &str) -> Option<Self> {
        // A key may have semicolons of its own.
        let (rest, hash) = text.rsplit_once(';')?;
        let (key, bytes) = rest.rsplit_once(';')?;
        let bytes = bytes.parse().ok()?;
        let is_hash = hash.len() == 64 && hash.bytes().all(|digit| digit.is_ascii_hexdigit());
        (is_hash && !key.is_empty()).then(|| Self { key: key.to_owned(), bytes, hash: hash.to_owned() })
    }

    /// The claim as a header.
    pub fn header(&self) -> (String, Option<Bytes>) {
        let Self { key, bytes, hash } = self;
        (header::CLAIM.to_owned(), Some(Bytes::from(format!("{key};{bytes};{hash}"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let claim = Claim { key: "claims/a;b".into(), bytes: 600_000, hash: "0a".repeat(32) };
        assert_eq!(Claim::read(&vec![claim.header()]).unwrap(), Some(claim));
        assert_eq!(Claim::read(&Headers::new()).unwrap(), None);
    }

    #[test]
    fn a_claim_that_is_none_is_named() {
        let short = format!("k;many;{}", "0a".repeat(32));
        for wrong in ["", "k;1", "k;1;0a", ";1;", &short] {
            let headers = vec![(header::CLAIM.to_owned(), Some(Bytes::from(wrong.to_owned())))];
            let refused = Claim::read(&headers).unwrap_err().to_string();
            assert_eq!(refused, format!("header forebay-claim is {wrong:?}, which is not key;bytes;hash"));
        }
    }
}
