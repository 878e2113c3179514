//! What an operator is.

use crate::{Context, Failure};
use forebay_schemas::{EncodeError, Hop, Record};
use std::future::Future;

/// One stateless step. Delivered twice, it must be harmless twice.
pub trait Operator: Send + Sync + 'static {
    /// The name by which pipelines choose it.
    const NAME: &'static str;
    /// The part of the way under which its time is told apart in a result.
    const HOP: Option<Hop> = None;
    /// The record that it takes.
    type In: Record;
    /// The records that it gives, each leaving by a named port.
    type Out: Output;

    /// Processes one record. A record that is the work of a request must give at least one record or a failure:
    /// a request never vanishes.
    fn process(
        &self,
        input: Self::In,
        cx: &Context,
    ) -> impl Future<Output = Result<Vec<Self::Out>, Failure>> + Send;
}

/// A way out of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name, by which a pipeline routes it.
    pub name: &'static str,
    /// The name of the record that leaves by it.
    pub record: &'static str,
}

/// What an operator gives: an enum with one variant a port. Made by [`ports!`](crate::ports).
pub trait Output: Send + 'static {
    /// All ports, in the order of the variants.
    const PORTS: &'static [Port];

    /// The port by which this one leaves.
    fn port(&self) -> &'static str;

    /// The key under which it is produced; `None` means the id of the request.
    fn key(&self) -> Option<&str>;

    /// Its wire form; `None` is a tombstone.
    fn encode(&self) -> Result<Option<Vec<u8>>, EncodeError>;
}

/// Declares what an operator gives.
///
/// ```
/// use forebay_schemas::{Completion, Request};
/// forebay_operator::ports! {
///     /// What a look in the cache gives.
///     pub enum Looked {
///         /// The answer was there.
///         Hit(Completion) = "hit",
///         /// It was not.
///         Miss(Request) = "miss",
///     }
/// }
/// ```
#[macro_export]
macro_rules! ports {
    ($(#[$doc:meta])* pub enum $name:ident { $($(#[$port_doc:meta])* $variant:ident($record:ty) = $port:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        // `allow`, since whether the lint fires depends on the records.
        #[allow(clippy::large_enum_variant, reason = "each lives for one hop, in a vector of one")]
        pub enum $name { $($(#[$port_doc])* $variant($record)),+ }

        impl $crate::Output for $name {
            const PORTS: &'static [$crate::Port] = &[
                $($crate::Port { name: $port, record: <$record as forebay_schemas::Record>::NAME }),+
            ];
            fn port(&self) -> &'static str {
                match self { $(Self::$variant(_) => $port),+ }
            }
            fn key(&self) -> Option<&str> {
                match self { $(Self::$variant(record) => forebay_schemas::Record::key(record)),+ }
            }
            fn encode(&self) -> Result<Option<Vec<u8>>, forebay_schemas::EncodeError> {
                match self { $(Self::$variant(record) => forebay_schemas::Record::encode(record)),+ }
            }
        }
    };
}
