//! Ids: who a request is, whose it is, and which paid call is which.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The longest id, in bytes of UTF-8. Ids become Kafka keys and header values; a bound keeps both small.
pub(crate) const ID_BYTES_MAX: usize = 256;

/// A text that is empty or longer than an id may be.
#[derive(Debug, thiserror::Error)]
#[error("{what} has {bytes} bytes; it may have 1 to {ID_BYTES_MAX}")]
pub struct TooLong {
    what: &'static str,
    bytes: usize,
}

macro_rules! bounded_text {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String")]
        #[schemars(!try_from)]
        pub struct $name(#[schemars(length(min = 1, max = 256))] String);

        impl $name {
            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = TooLong;
            fn try_from(text: String) -> Result<Self, TooLong> {
                match text.len() {
                    1..=ID_BYTES_MAX => Ok(Self(text)),
                    bytes => Err(TooLong { what: $what, bytes }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

bounded_text! {
    /// The id of a request: the client's string, unique per tenant, 1 to 256 bytes.
    RequestId, "an id"
}
bounded_text! {
    /// Whose a record is; 1 to 256 bytes. Caches, retrieval and budgets never cross it.
    Tenant, "a tenant"
}

bounded_text! {
    /// The id of the API key by which a request came, and never the key itself; 1 to 256 bytes.
    KeyId, "the id of a key"
}
bounded_text! {
    /// The job that a request belongs to, beside others of its tenant's; 1 to 256 bytes.
    JobId, "the id of a job"
}

impl Default for Tenant {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl RequestId {
    /// The id of a record whose client gave none: a UUIDv7 (RFC 9562) whose time is the record's timestamp and
    /// whose random bits are a hash of where the record lies.
    ///
    /// Reading the same record again gives the same id. The timestamp is hashed too, because a topic that was
    /// deleted and created anew repeats its offsets.
    pub fn derived(cluster: &str, topic: &str, partition: i32, offset: i64, timestamp_ms: i64) -> Self {
        let mut hash = blake3::Hasher::new_derive_key("forebay derived request id v1");
        for part in [cluster.as_bytes(), topic.as_bytes()] {
            hash.update(&(part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        hash.update(&partition.to_be_bytes());
        hash.update(&offset.to_be_bytes());
        hash.update(&timestamp_ms.to_be_bytes());
        let mut random = [0; 10];
        hash.finalize_xof().fill(&mut random);
        let millis = u64::try_from(timestamp_ms).unwrap_or(0);
        let id = uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid();
        Self(id.hyphenated().to_string())
    }
}

/// Which upstream call of which step of which request: the same over retries, restarts and versions, so that
/// a call which was paid for can be found again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct CallId(String);

impl CallId {
    /// Hashes what makes a call this call and no other. `again` counts redrives that asked for a new answer: any other
    /// redrive finds the answer that is recorded.
    pub fn new(
        cluster: &str,
        tenant: &Tenant,
        id: &RequestId,
        again: u32,
        stage: &str,
        visit: u32,
        call_index: u32,
    ) -> Self {
        let mut hash = blake3::Hasher::new_derive_key("forebay call id v1");
        for part in [cluster, tenant.as_str(), id.as_str(), stage] {
            hash.update(&(part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
        for number in [again, visit, call_index] {
            hash.update(&number.to_be_bytes());
        }
        Self(hash.finalize().to_hex()[..32].to_owned())
    }

    /// An id as it is written; `None` where the text is none.
    pub fn read(text: &str) -> Option<Self> {
        let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        (text.len() == 32 && text.chars().all(is_hex)).then(|| Self(text.to_owned()))
    }

    /// The id as 32 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which text of a document: a hash of its bytes, so that equal texts are one version.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct DocumentVersion(String);

impl DocumentVersion {
    /// The version of this text.
    pub fn of(text: &str) -> Self {
        Self(blake3::hash(text.as_bytes()).to_hex()[..16].to_owned())
    }

    /// The version as 16 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DocumentVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_derived_id_is_the_same_for_the_same_record_and_differs_for_its_neighbours() {
        let id = |topic, partition, offset, time| RequestId::derived("c", topic, partition, offset, time);
        let one = id("requests", 3, 17, 1_700_000_000_000);
        assert_eq!(one, id("requests", 3, 17, 1_700_000_000_000));
        assert_ne!(one, id("requests", 4, 17, 1_700_000_000_000));
        assert_ne!(one, id("requests", 3, 18, 1_700_000_000_000));
        assert_ne!(one, id("requests", 3, 17, 1_700_000_000_001), "a topic created anew repeats offsets");
        let uuid = uuid::Uuid::parse_str(one.as_str()).unwrap();
        assert_eq!(uuid.get_version_num(), 7);
    }

    #[test]
    fn an_id_of_257_bytes_is_refused_with_its_length() {
        let refused = RequestId::try_from("x".repeat(257)).unwrap_err();
        assert_eq!(refused.to_string(), "an id has 257 bytes; it may have 1 to 256");
    }
}
