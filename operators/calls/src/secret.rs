//! A text that must not be seen.

use reqwest::header::HeaderValue;
use serde::Deserialize;
use std::fmt;

/// A key. It can be used and cannot be printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a key; line breaks around it, as files have them, are no part of it.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The key as the value of a header, which nobody prints either. A key that cannot be one is sent as none, and refused.
    pub(crate) fn header(&self) -> HeaderValue {
        let mut value = HeaderValue::from_str(&self.0).unwrap_or(HeaderValue::from_static(""));
        value.set_sensitive(true);
        value
    }

    /// The same as a bearer's.
    pub fn bearer(&self) -> HeaderValue {
        Self(format!("Bearer {}", self.0)).header()
    }

    /// The key itself, for whoever sends it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}
