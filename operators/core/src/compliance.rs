//! What every operator must hold to, as one test that runs on all of them. operators/README.md says it in words.

use crate::{Clock, Context, Operator, Output, step};
use forebay_schemas::{Envelope, Origin, Record, RequestId, Tenant};
use std::time::Duration;

/// Wall time of all samples.
pub const NOW_MS: i64 = 1_700_000_000_000;

/// The envelope of a sample.
pub fn envelope() -> Envelope {
    let origin = Origin { topic: "requests".to_owned(), partition: 0, offset: 0, key: None };
    let id = RequestId::derived("cluster", "requests", 0, 0, NOW_MS);
    Envelope::entering(id, Tenant::default(), origin, NOW_MS, Vec::new())
}

/// Asserts what the component spec asks of an operator, over these samples of its input.
///
/// # Panics
/// With the rule that is broken.
#[expect(
    clippy::panic,
    reason = "an assertion for tests, which lives here so that every operator's crate has it"
)]
pub async fn assert_complies<O: Operator>(operator: O, samples: Vec<Vec<u8>>) {
    let name = O::NAME;
    assert!(!samples.is_empty(), "{name}: give at least one sample");
    for port in O::Out::PORTS {
        assert!(port.name != "ended", "{name}: the port \"ended\" is the host's own");
        let lower = |c: char| c.is_ascii_lowercase() || c == '_';
        assert!(port.name.chars().all(lower), "{name}: port {:?} is not snake_case", port.name);
    }
    let erased = step(operator);
    for body in samples {
        let cx = Context::quiet(envelope(), Clock::starting_at(NOW_MS));
        let open = || match erased.open(Some("key"), Some(&body)) {
            Ok(opened) => opened,
            Err(error) => panic!("{name}: a sample cannot be read: {error}"),
        };
        let first = open().run(&cx).await.map_err(|failure| failure.to_string());
        let again = open().run(&cx).await.map_err(|failure| failure.to_string());
        assert_eq!(first, again, "{name}: the same record twice must give the same records twice");
        if let Ok(outputs) = first {
            assert!(!outputs.is_empty() || !O::In::JOB, "{name}: a request vanished");
            for output in outputs {
                let known = O::Out::PORTS.iter().any(|port| port.name == output.port);
                assert!(known, "{name}: {:?} is not among its ports", output.port);
            }
        }
        let mut expired = envelope();
        expired.deadline_at_ms = Some(NOW_MS - 1);
        let cx = Context::quiet(expired, Clock::starting_at(NOW_MS));
        let ended = tokio::time::timeout(Duration::from_secs(1), open().run(&cx)).await;
        assert!(ended.is_ok(), "{name}: goes on for a second after the deadline");
    }
}
