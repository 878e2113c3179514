//! What a response that is no success means.

use crate::{Call, CallError, Class, limits::retry_after};
use reqwest::header::HeaderMap;
use serde_json::Value;

/// The longest reason of a server's that is repeated, in characters.
const REASON_CHARS_MAX: usize = 300;

/// Puts a refusal of this call into its class.
pub(super) fn read(status: u16, headers: &HeaderMap, body: &[u8], call: &Call<'_>) -> CallError {
    let error = serde_json::from_slice::<Value>(body).ok();
    let error = error.as_ref().map(|body| body.get("error").unwrap_or(body));
    let text = |name| error.and_then(|error| error.get(name)).and_then(Value::as_str).unwrap_or_default();
    let reason = text("message");
    let says_spent =
        |reason: String| reason.contains("usage limit") || reason.contains("credit balance is too low");
    let spent = text("code") == "insufficient_quota" || (status == 400 && says_spent(reason.to_lowercase()));
    let (class, code) = match status {
        401..=403 => (Class::Account, "model_unauthorized"),
        400 | 429 if spent => (Class::Account, "model_unauthorized"),
        429 => (Class::Limited, "model_rate_limited"),
        408 => (Class::Transient, "model_timeout"),
        502..=504 | 529 => (Class::Outage, "model_unavailable"),
        500..=599 => (Class::Transient, "model_unavailable"),
        400..=499 => (Class::Rejected, "model_rejected"),
        // A redirect, most likely: the address is wrong, and no request is at fault for that.
        _ => (Class::Outage, "model_unavailable"),
    };
    // Only of a rejected request does the reason matter to its sender; of the others it may hold part of a key.
    let reason = match class {
        Class::Rejected => repeatable(reason, call),
        _ => String::new(),
    };
    let message = format!("the server answered with status {status}{reason}");
    CallError {
        retry_after: retry_after(headers),
        ..CallError::new(class, code, message).with_status(status)
    }
}

/// The reason, cut, and left out where it repeats what was asked.
fn repeatable(reason: &str, call: &Call<'_>) -> String {
    if reason.is_empty() || call.is_repeated_in(reason) {
        return String::new();
    }
    format!(": {}", reason.chars().take(REASON_CHARS_MAX).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Call<'static> {
        Call { question: "what is my secret".to_owned(), ..Call::default() }
    }

    fn check(status: u16, headers: &[(&'static str, &str)], body: &str, expected: &str) {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let error = read(status, &headers.collect(), body.as_bytes(), &asked());
        let wait =
            error.retry_after.map(|wait| format!(" after {} ms", wait.as_millis())).unwrap_or_default();
        assert_eq!(format!("{:?} {}{wait}", error.class, error.code), expected, "{status} {body}");
    }

    #[test]
    fn each_status_has_its_class() {
        for (status, expected) in [
            (302, "Outage model_unavailable"),
            (400, "Rejected model_rejected"),
            (401, "Account model_unauthorized"),
            (402, "Account model_unauthorized"),
            (403, "Account model_unauthorized"),
            (404, "Rejected model_rejected"),
            (408, "Transient model_timeout"),
            (413, "Rejected model_rejected"),
            (422, "Rejected model_rejected"),
            (429, "Limited model_rate_limited"),
            (500, "Transient model_unavailable"),
            (502, "Outage model_unavailable"),
            (503, "Outage model_unavailable"),
            (504, "Outage model_unavailable"),
            (529, "Outage model_unavailable"),
        ] {
            check(status, &[], "", expected);
        }
    }

    #[test]
    fn a_wait_goes_with_the_error() {
        check(429, &[("retry-after", "3")], "", "Limited model_rate_limited after 3000 ms");
        check(503, &[("retry-after-ms", "1500")], "", "Outage model_unavailable after 1500 ms");
    }

    #[test]
    fn an_account_with_nothing_left_is_no_rate_limit_and_no_fault_of_the_request() {
        let quota = r#"{"error": {"message": "You exceeded it", "code": "insufficient_quota"}}"#;
        check(429, &[], quota, "Account model_unauthorized");
        let limit = r#"{"error": {"message": "You have reached your specified API usage limits."}}"#;
        check(400, &[], limit, "Account model_unauthorized");
        let credit = r#"{"type": "error", "error": {"type": "invalid_request_error",
            "message": "Your credit balance is too low to access the Anthropic API."}}"#;
        check(400, &[], credit, "Account model_unauthorized");
    }

    #[test]
    fn the_reason_of_a_rejection_is_kept_unless_it_repeats_the_question() {
        let message = |body: &str| read(400, &HeaderMap::new(), body.as_bytes(), &asked()).message;
        let long = r#"{"error": {"message": "maximum context length is 4096 tokens"}}"#;
        let kept = "the server answered with status 400: maximum context length is 4096 tokens";
        assert_eq!(message(long), kept);
        let echo = r#"{"message": "bad input: what is my secret"}"#;
        assert_eq!(message(echo), "the server answered with status 400");
    }
}
