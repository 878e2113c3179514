//! A source of knowledge, as its owner writes it.

use crate::{DecodeError, EncodeError, Identity, Record, Tenant, id::ID_BYTES_MAX};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A document of this tenant may be cited to every tenant.
pub const SHARED_TENANT: &str = "*";

/// How a text is to be split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// By headings, then by paragraphs.
    Markdown,
    /// By paragraphs.
    #[default]
    Text,
}

/// The record of `documents`; its key is the document's id. A message without a value deletes the document.
///
/// Unlike a request it refuses fields that it does not know: a misspelt `text` would delete the document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The document's id, unique over all tenants, 1 to 256 bytes; the record's key says the same.
    #[schemars(length(min = 1, max = 256))]
    pub id: String,
    /// Whose it is; `*` is everybody's.
    #[serde(default)]
    pub tenant: Tenant,
    /// How the text is to be split.
    #[serde(default)]
    pub format: Format,
    /// The whole text; absent means that the document is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Record for Document {
    const NAME: &'static str = "Document";

    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let document: Self = crate::from_json(body)?;
        match document.id.len() {
            1..=ID_BYTES_MAX => Ok(document),
            0 => Err(DecodeError::Meaning { record: Self::NAME, fault: "\"id\" is empty" }),
            _ => Err(DecodeError::Meaning { record: Self::NAME, fault: "\"id\" is longer than 256 bytes" }),
        }
    }

    fn encode(&self) -> Result<Option<Vec<u8>>, EncodeError> {
        if self.text.is_none() { Ok(None) } else { crate::to_json(self) }
    }

    fn decode_tombstone(key: &str) -> Option<Self> {
        let id_fits = (1..=ID_BYTES_MAX).contains(&key.len());
        id_fits.then(|| Self {
            id: key.to_owned(),
            tenant: Tenant::default(),
            format: Format::default(),
            text: None,
        })
    }

    fn key(&self) -> Option<&str> {
        Some(&self.id)
    }

    /// Whoever owns a document pays for what is asked about it.
    fn identity(&self) -> Identity {
        Identity { tenant: Some(self.tenant.clone()), ..Identity::default() }
    }
}
