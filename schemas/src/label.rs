//! What a person said of an answer: the truth by which judges are measured.

use crate::{RequestId, Tenant, row::json_row};

json_row! {
    /// The record of `labels`. Who labels must draw at random from what was judged: labels of what looked bad mend nothing.
    Label, request_id, shares: [quality, inclusion_probability];
    /// The request whose answer was labelled.
    request_id: RequestId,
    /// Whose request it was; `default` when absent.
    tenant: Tenant = default,
    /// Counts redrives of the request; 0 when absent.
    generation: i32 ["redrives"] = default,
    /// Whether the answer is wrong: what a judge's `flagged` guesses.
    wrong: bool,
    /// How good the answer is, from 0 to 1.
    quality: Option<f64>,
    /// Who labelled.
    labeller: Option<String>,
    /// The chance with which this answer came to be labelled once it was judged, above 0 and up to 1; 1 when absent.
    inclusion_probability: Option<f64>,
    /// What the labeller noted.
    note: Option<String>,
    /// When it was labelled; the time of the message when absent.
    labelled_at: Option<i64> ["µs since 1970"],
}
