//! What a judge said of an answer: one row a judge and answer.

use crate::{RequestId, Tenant, row::json_row};

json_row! {
    /// The record of `audits`: a judge's verdict, which may be wrong. What it is worth is told by `labels`.
    Audit, request_id, shares: [score, quality, inclusion_probability];
    /// The request whose answer was judged.
    request_id: RequestId,
    /// Whose request it was; `default` when absent.
    tenant: Tenant = default,
    /// Counts redrives of the request; 0 when absent.
    generation: i32 ["redrives"] = default,
    /// Who judged: a model or a set of rules.
    judge: String,
    /// Its version. Another version is another judge: what is known of the errors of one says nothing of the other's.
    judge_version: String,
    /// Whether it holds the answer to be wrong.
    flagged: bool,
    /// How sure it is that the answer is wrong, from 0 to 1.
    score: Option<f64>,
    /// How good it holds the answer to be, from 0 to 1.
    quality: Option<f64>,
    /// The chance with which this answer came to be judged, above 0 and up to 1; 1 when absent.
    inclusion_probability: Option<f64>,
    /// What it was drawn from, such as a model and whether the cache was hit.
    stratum: Option<String>,
    /// What was found, as text or JSON.
    detail: Option<String>,
    /// When it was judged; the time of the message when absent.
    audited_at: Option<i64> ["µs since 1970"],
}
