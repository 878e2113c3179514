//! What was asked and answered, as text: kept apart from what it cost, since it is forgotten sooner.

use crate::{RequestId, Tenant, row::json_row};

json_row! {
    /// The record of `payloads`: the texts of one request.
    Payload, request_id, shares: [];
    /// The request's id.
    request_id: RequestId,
    /// Whose request it was; `default` when absent.
    tenant: Tenant = default,
    /// Counts redrives of the request; 0 when absent.
    generation: i32 ["redrives"] = default,
    /// What was asked: a text, or messages as JSON.
    prompt: String,
    /// What was answered; null where nothing was.
    answer: Option<String>,
    /// What the model saw beside the question: passages as JSON.
    passages: Option<String>,
    /// The model that answered.
    model: Option<String>,
    /// When the request ended; the time of the message when absent.
    ended_at: Option<i64> ["µs since 1970"],
}
