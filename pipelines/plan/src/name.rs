//! What a pipeline, a step and a topic may be called.
//!
//! Invariant: whatever a pipeline and its steps are called within these bounds, the consumer group
//! `{prefix}{pipeline}.{step}` and the topics that the host derives of them are names that Kafka takes.

use crate::{Faults, Place};

/// The longest name of a pipeline, a step, or a topic of its own.
pub const NAME_CHARS_MAX: usize = 64;

/// The longest topic prefix: Kafka takes 249 characters, and the longest name derived is
/// `{prefix}ledger.{step}.retry.{step}.10s`.
pub const PREFIX_CHARS_MAX: usize =
    249 - ("ledger.".len() + NAME_CHARS_MAX + ".retry.".len() + NAME_CHARS_MAX + ".10s".len());

/// The form of a name, as the published schema says it.
pub(crate) const PATTERN: &str = "^[a-z][a-z0-9_-]*$";

/// Says what is wrong with a name, if anything is. `what` is whose name it is, such as `step`.
pub(crate) fn check(what: &str, name: &str, place: Place, faults: &mut Faults) {
    let form = "a name starts with a letter and has lower-case letters, digits, \"_\" and \"-\"";
    let starts = name.starts_with(|c: char| c.is_ascii_lowercase());
    let goes_on = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-');
    if !starts || !name.chars().all(goes_on) {
        faults.add_with_hint(place, format!("a {what} cannot be called {name:?}"), form);
    }
    let chars = name.chars().count();
    if chars > NAME_CHARS_MAX {
        let hint = format!("at most {NAME_CHARS_MAX}, since Kafka's names end at 249");
        faults.add_with_hint(place, format!("the name of this {what} has {chars} characters"), hint);
    }
}
