//! Claim checks: the body of a record that is too large for a topic lies in the object store, and its message says where.
//!
//! The object comes first: its message is written when it is there. Its key says on which day it was put, whose it is and
//! what it is, so the same bytes on the same day are the same object, also when a record is processed again.
//!
//! Invariant: an object outlives every message that points to it. Nobody counts references: whatever is older than any
//! such message can be is swept.

use bytes::Bytes;
use forebay_operator::{BoxError, Clock};
use forebay_schemas::{
    Claim,
    topics::{self, Cleanup, Topic},
};
use futures::future::BoxFuture;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tracing::{info, warn};

/// A body of more bytes goes to the object store, unless somebody chooses otherwise.
pub const BYTES_OVER_DEFAULT: usize = 256 << 10;

/// All keys begin so.
const ROOM: &str = "claims/";

/// A claim may lie a week on its topic, as long once more on an overflow topic, and then in a dead letter; and a day for
/// clocks that disagree. A retry, and a redrive, puts the body anew.
const DAYS_KEPT: i64 = (hours(topics::DEAD_LETTERS) + 2 * hours(topics::PROMPTS)) / 24 + 1;

/// Objects that are deleted in one round at most: as many as an object store lists at once.
const SWEPT_MAX: usize = 10_000;

/// How often is swept; and again after how long where more is left than one round may delete.
const SWEEP_EVERY: Duration = Duration::from_secs(60 * 60);
const SWEEP_ON_AFTER: Duration = Duration::from_secs(60);

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

const fn hours(topic: Topic) -> i64 {
    match topic.cleanup {
        // Widening; `From` is not const.
        Cleanup::Delete { hours } => hours as i64,
        // It carries no claims: its records are kept for ever.
        Cleanup::Compact | Cleanup::CompactAfter { .. } => 0,
    }
}

/// An object store, as a host needs it.
pub trait Objects: Send + Sync + 'static {
    /// Writes what is absent; it is durable when this returns.
    fn put<'a>(&'a self, key: &'a str, body: Bytes) -> BoxFuture<'a, Result<(), ObjectsError>>;

    /// The object, if there is one.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, ObjectsError>>;

    /// Removes it, if it is there.
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), ObjectsError>>;

    /// The first `limit` keys that begin so, in the order of their bytes.
    fn list<'a>(&'a self, prefix: &'a str, limit: usize) -> BoxFuture<'a, Result<Vec<String>, ObjectsError>>;
}

/// Why an object store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    /// It may do so later.
    #[error("the object store is unavailable")]
    Unavailable(#[source] BoxError),
    /// It never will.
    #[error("the object store refused")]
    Refused(#[source] BoxError),
}

/// Why a claimed body is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Nothing is there.
    #[error(
        "object {key} is not in the object store; do all processes share one, and was it younger than {DAYS_KEPT} days?"
    )]
    Missing {
        /// Its key.
        key: String,
    },
    /// Something else is there.
    #[error("object {key} is not what was put there: its hash differs")]
    Damaged {
        /// Its key.
        key: String,
    },
    /// The store did not answer.
    #[error("could not get object {key}")]
    Objects {
        /// Its key.
        key: String,
        /// What it said.
        source: ObjectsError,
    },
}

impl ClaimError {
    /// The word under which a record is given up for it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "claim_missing",
            Self::Damaged { .. } => "claim_damaged",
            Self::Objects { source: ObjectsError::Unavailable(_), .. } => "store_unavailable",
            Self::Objects { source: ObjectsError::Refused(_), .. } => "store_refused",
        }
    }
}

/// The claims of a process.
pub struct Claims {
    objects: Arc<dyn Objects>,
    bytes_over: Option<usize>,
}

impl Claims {
    /// Claims to bodies of more than so many bytes; without a number all bodies stay in their messages, but claims that
    /// others made are still read.
    pub fn new(objects: Arc<dyn Objects>, bytes_over: Option<usize>) -> Self {
        Self { objects, bytes_over }
    }

    /// Whether a body of so many bytes is too large to travel.
    pub fn are_for(&self, bytes: usize) -> bool {
        self.bytes_over.is_some_and(|over| bytes > over)
    }

    /// Puts a body where it is found again; it is durable when this returns.
    pub async fn put(&self, tenant: &[u8], body: Bytes, now_ms: i64) -> Result<Claim, ObjectsError> {
        let (hash, bytes) = (blake3::hash(&body).to_hex().to_string(), body.len());
        // A tenant's name may be no key, and is nobody's business who lists the store. The day stands first, so that the
        // oldest objects are listed first, whosever they are.
        let tenant = &blake3::hash(tenant).to_hex()[..16];
        let key = format!("{ROOM}{}/{tenant}/{hash}", day(now_ms));
        self.objects.put(&key, body).await?;
        Ok(Claim { key, bytes, hash })
    }

    /// The body that was put there, byte for byte.
    pub async fn get(&self, claim: &Claim) -> Result<Bytes, ClaimError> {
        let key = claim.key.clone();
        match self.objects.get(&key).await {
            Ok(Some(body)) if blake3::hash(&body).to_hex().as_str() == claim.hash => Ok(body),
            Ok(Some(_)) => Err(ClaimError::Damaged { key }),
            Ok(None) => Err(ClaimError::Missing { key }),
            Err(source) => Err(ClaimError::Objects { key, source }),
        }
    }

    /// Deletes what no message can point to any more, the oldest first; how much, and whether that is all.
    pub async fn sweep(&self, now_ms: i64) -> Result<(usize, bool), ObjectsError> {
        let kept = format!("{ROOM}{}", day(now_ms.saturating_sub(DAYS_KEPT * DAY_MS)));
        let keys = self.objects.list(ROOM, SWEPT_MAX).await?;
        let old = keys.partition_point(|key| *key < kept);
        for key in &keys[..old] {
            self.objects.delete(key).await?;
        }
        Ok((old, old < SWEPT_MAX))
    }

    /// Sweeps every hour, for ever. Several processes may: what one deletes another does not find.
    pub async fn sweep_for_ever(&self, clock: Clock) {
        loop {
            let wait = match self.sweep(clock.now_ms()).await {
                Ok((0, _)) => SWEEP_EVERY,
                Ok((objects, is_all)) => {
                    info!(objects, "swept objects that no record points to any more");
                    if is_all { SWEEP_EVERY } else { SWEEP_ON_AFTER }
                }
                Err(fault) => {
                    warn!(
                        error = &fault as &dyn std::error::Error,
                        "could not sweep the object store; will try again"
                    );
                    SWEEP_EVERY
                }
            };
            tokio::time::sleep(wait).await;
        }
    }
}

/// A day as a segment of a key, such as `2026-11-24`: text in the order of time.
fn day(ms: i64) -> String {
    // The last day that is written with four digits of a year.
    const LAST_MS: u64 = 253_402_214_400_000;
    let since = Duration::from_millis(u64::try_from(ms).unwrap_or(0).min(LAST_MS));
    let mut text = humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + since).to_string();
    text.truncate("2026-11-24".len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::memory::MemoryObjects;

    const NOW_MS: i64 = 1_700_000_000_000;

    fn claims() -> (Arc<MemoryObjects>, Claims) {
        let objects = Arc::new(MemoryObjects::default());
        (Arc::clone(&objects), Claims::new(objects, Some(3)))
    }

    #[test]
    fn days_are_in_order_whatever_a_clock_says() {
        let days = [i64::MIN, 0, NOW_MS, NOW_MS + DAY_MS, i64::MAX].map(day);
        assert_eq!(days, ["1970-01-01", "1970-01-01", "2023-11-14", "2023-11-15", "9999-12-31"]);
    }

    #[test]
    fn a_claim_outlives_its_message_on_two_topics_and_its_dead_letter() {
        assert_eq!(DAYS_KEPT, 7 + 7 + 30 + 1);
    }

    #[tokio::test]
    async fn the_same_bytes_of_a_tenant_are_one_object_that_day() {
        let (objects, claims) = claims();
        let put = async |tenant: &str, body: &'static str, days: i64| {
            claims.put(tenant.as_bytes(), body.into(), NOW_MS + days * DAY_MS).await.unwrap()
        };
        let first = put("a", "body", 0).await;
        assert!(first.key.starts_with("claims/2023-11-14/") && first.key.ends_with(&first.hash), "{first:?}");
        assert_eq!(put("a", "body", 0).await, first);
        for other in [put("b", "body", 0).await, put("a", "bodies", 0).await, put("a", "body", 1).await] {
            assert_ne!(other.key, first.key);
        }
        assert_eq!(objects.keys().len(), 4);
        assert_eq!(claims.get(&first).await.unwrap(), "body");
    }

    #[tokio::test]
    async fn what_is_not_there_and_what_is_something_else_are_told_apart() {
        let (objects, claims) = claims();
        let claim = claims.put(b"a", "body".into(), NOW_MS).await.unwrap();
        objects.replace(&claim.key, "buddy".into());
        assert_eq!(claims.get(&claim).await.unwrap_err().code(), "claim_damaged");
        objects.delete(&claim.key).await.unwrap();
        assert_eq!(claims.get(&claim).await.unwrap_err().code(), "claim_missing");
    }

    #[tokio::test]
    async fn what_is_too_old_is_swept_and_nothing_else() {
        let (objects, claims) = claims();
        objects.put("documents/1970", "not ours".into()).await.unwrap();
        let old = claims.put(b"a", "old".into(), NOW_MS - 1).await.unwrap();
        let young = claims.put(b"b", "young".into(), NOW_MS + DAY_MS).await.unwrap();
        let last_day = NOW_MS + DAYS_KEPT * DAY_MS;
        assert_eq!(claims.sweep(last_day).await.unwrap(), (0, true));
        assert_eq!(claims.get(&old).await.unwrap(), "old");
        assert_eq!(claims.sweep(last_day + DAY_MS).await.unwrap(), (1, true));
        assert_eq!(claims.sweep(last_day + DAY_MS).await.unwrap(), (0, true));
        assert_eq!(objects.keys(), [young.key, "documents/1970".to_owned()]);
    }

    #[tokio::test(start_paused = true)]
    async fn more_than_one_round_deletes_is_swept_in_several_and_then_every_hour() {
        let (objects, claims) = claims();
        for n in 0..SWEPT_MAX + 1 {
            claims.put(b"a", n.to_string().into(), NOW_MS).await.unwrap();
        }
        let clock = Clock::starting_at(NOW_MS + (DAYS_KEPT + 1) * DAY_MS);
        let all = Duration::from_secs(61);
        assert!(tokio::time::timeout(all, claims.sweep_for_ever(clock)).await.is_err(), "it never ends");
        assert_eq!(objects.keys().len(), 0);
        claims.put(b"a", "dies in the last hour of its last day".into(), NOW_MS).await.unwrap();
        let hour = SWEEP_EVERY + Duration::from_secs(1);
        assert!(tokio::time::timeout(hour, claims.sweep_for_ever(clock)).await.is_err(), "it never ends");
        assert_eq!(objects.keys().len(), 0);
    }
}
