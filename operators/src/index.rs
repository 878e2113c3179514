//! Splits a document for retrieval.
//!
//! Invariant: the text of a version is kept whole before a chunk of it leaves, so that whatever is cited can be read
//! again; and a chunk's id says which bytes it is: the same id is the same document, version and text.

use crate::{
    catalogue::{Resources, Shipped},
    store_failure::store_failure,
    text::split,
};
use bytes::Bytes;
use forebay_operator::{Context, Failure, Operator, ports};
use forebay_schemas::{Chunk, Chunks, Document, DocumentVersion, Split, Tenant};
use forebay_stores::Objects;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::HashSet, fmt::Write as _, sync::Arc};

/// `index` has none yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {}

ports! {
    /// What `index` gives.
    pub enum Indexed {
        /// The document in pieces, or the word that it is gone.
        Chunks(Chunks) = "chunks",
    }
}

/// The operator `index`.
pub struct Index {
    objects: Arc<dyn Objects>,
}

impl Shipped for Index {
    type Settings = Settings;

    fn new(Settings {}: Settings, resources: &Resources) -> Self {
        Self { objects: resources.objects.clone() }
    }
}

impl Operator for Index {
    const NAME: &'static str = "index";
    type In = Document;
    type Out = Indexed;

    async fn process(&self, document: Document, _: &Context) -> Result<Vec<Indexed>, Failure> {
        let Document { id, tenant, format, text } = document;
        let text = text.unwrap_or_default();
        let version = DocumentVersion::of(&text);
        let chunks = chunks(&id, &version, &text, format);
        let mut content = None;
        if !chunks.is_empty() {
            let key = document_key(&tenant, &id, &version);
            let kept = self.objects.put(&key, Bytes::from(text)).await;
            kept.map_err(|error| store_failure("object store", error))?;
            content = Some(Split { tenant, version, chunks });
        }
        Ok(vec![Indexed::Chunks(Chunks { document: id, content })])
    }
}

fn chunks(id: &str, version: &DocumentVersion, text: &str, format: forebay_schemas::Format) -> Vec<Chunk> {
    let mut seen = HashSet::new();
    let mut chunks = Vec::new();
    for split::Piece { range, heading } in split::split(text, format) {
        let piece = &text[range.clone()];
        let hash = blake3::hash(piece.as_bytes()).to_hex();
        // A text that comes again, such as a notice under every heading, is found once.
        if seen.insert(hash) {
            let id = format!("{id}:{version}:{}", &hash[..16]);
            chunks.push(Chunk { id, start: range.start, end: range.end, heading, text: piece.to_owned() });
        }
    }
    chunks
}

/// Where the text of a version lies in the object store: `documents/{tenant}/{document}/{version}`.
///
/// What an object store does not take in a name is written as `=` and its bytes in hexadecimal; a name that is too
/// long is its hash.
pub fn document_key(tenant: &Tenant, document: &str, version: &DocumentVersion) -> String {
    format!("documents/{}/{}/{version}", segment(tenant.as_str()), segment(document))
}

fn segment(name: &str) -> String {
    let mut segment = String::with_capacity(name.len());
    for (at, byte) in name.bytes().enumerate() {
        match byte {
            // A leading dot could make "." or "..".
            b'.' if at == 0 => segment.push_str("=2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => segment.push(char::from(byte)),
            // Writing to a String cannot fail.
            _ => _ = write!(segment, "={byte:02x}"),
        }
    }
    if segment.len() > forebay_stores::objects::SEGMENT_BYTES_MAX {
        // No escaped name holds "=h", so none can be mistaken for a hash.
        segment = format!("=h{}", blake3::hash(name.as_bytes()).to_hex());
    }
    segment
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use forebay_operator::{Clock, compliance};
    use forebay_schemas::Record as _;
    use proptest::prelude::*;

    async fn chunks_of(text: Option<&str>) -> (samples::World, Chunks) {
        let world = samples::World::new().await;
        let index = Index::new(Settings {}, &world.resources);
        let cx = Context::quiet(compliance::envelope(), Clock::starting_at(compliance::NOW_MS));
        let out = index.process(samples::document("guide.md", text), &cx).await.unwrap();
        let [Indexed::Chunks(chunks)] = <[_; 1]>::try_from(out).unwrap();
        (world, chunks)
    }

    #[tokio::test]
    async fn it_complies() {
        let world = samples::World::new().await;
        let sample = |text| samples::document("guide.md", Some(text)).encode().unwrap().unwrap();
        let samples = vec![sample(samples::GUIDE), sample(""), sample("# Only a heading")];
        compliance::assert_complies(Index::new(Settings {}, &world.resources), samples).await;
    }

    #[tokio::test]
    async fn what_is_cited_can_be_read_again() {
        let (world, chunks) = chunks_of(Some(samples::GUIDE)).await;
        let split = chunks.content.unwrap();
        let key = document_key(&split.tenant, "guide.md", &split.version);
        let kept = world.resources.objects.get(&key).await.unwrap().unwrap();
        assert!(!split.chunks.is_empty());
        for chunk in split.chunks {
            assert_eq!(&kept[chunk.start..chunk.end], chunk.text.as_bytes());
        }
    }

    #[tokio::test]
    async fn a_document_without_a_text_is_gone() {
        for text in [None, Some(""), Some(" \n"), Some("# Only a heading\n")] {
            assert_eq!(chunks_of(text).await.1.content, None, "{text:?}");
        }
    }

    #[test]
    fn a_text_that_repeats_is_one_chunk() {
        let text = "# A\nSame.\n# B\nSame.\n# C\nOther.\n";
        let chunks = chunks("d", &DocumentVersion::of(text), text, forebay_schemas::Format::Markdown);
        assert_eq!(chunks.iter().map(|chunk| chunk.text.as_str()).collect::<Vec<_>>(), ["Same.", "Other."]);
    }

    #[test]
    fn no_name_leads_elsewhere() {
        let version = DocumentVersion::of("x");
        let key = |document: &str| document_key(&Tenant::default(), document, &version);
        assert_eq!(key("guides/a b.md"), format!("documents/default/guides=2fa=20b.md/{version}"));
        assert_eq!(key(".."), format!("documents/default/=2e./{version}"));
        assert!(key(&"ä".repeat(100)).len() < 120);
    }

    proptest! {
        #[test]
        fn two_names_never_share_a_place(one: String, other: String) {
            prop_assert_eq!(one == other, segment(&one) == segment(&other));
        }
    }
}
