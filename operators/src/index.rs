//! Splits a document for retrieval, and if wanted lets an embedder make vectors of its chunks.
//!
//! Invariant: the text of a version is kept whole before a chunk of it leaves, so that whatever is cited can be read
//! again; and a chunk's id says which bytes it is: the same id is the same document, version and text. Where vectors are wanted, all
//! chunks of a version have one, or it does not leave: what lacked them in silence would be found by fewer questions for ever. And what
//! says the same as it did before is not embedded again.

use crate::{
    catalogue::{Asks, Resources, Shipped},
    embedder::Embedder,
    rows::Rows,
    store_failure::store_failure,
    text::{self, split},
};
use bytes::Bytes;
use forebay_calls::{Call, Task, batch::Size};
use forebay_operator::{Context, Failure, Operator, ports};
use forebay_schemas::{Chunk, Chunks, Document, DocumentVersion, Embedding, Split, Tenant};
use forebay_stores::Objects;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    sync::Arc,
};

/// What is made of a document beside its chunks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Whether an embedder makes a vector of each chunk.
    pub embed: bool,
}

/// Hexadecimal digits of a call's number: as many as leave room for the hedge beside it.
const NUMBER_DIGITS: usize = 7;

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
    embedder: Option<Embedder>,
}

impl Shipped for Index {
    type Settings = Settings;

    fn asks(settings: &Settings) -> Vec<Asks> {
        if settings.embed { vec![Asks::Embedder] } else { Vec::new() }
    }

    fn new(Settings { embed }: Settings, resources: &Resources) -> Self {
        let embedder = resources.embedder.clone().filter(|_| embed);
        Self { objects: resources.objects.clone(), embedder }
    }
}

impl Operator for Index {
    const NAME: &'static str = "index";
    type In = Document;
    type Out = Indexed;

    async fn process(&self, document: Document, cx: &Context) -> Result<Vec<Indexed>, Failure> {
        let Document { id, tenant, format, text } = document;
        let text = text.unwrap_or_default();
        let version = DocumentVersion::of(&text);
        let mut chunks = chunks(&id, &version, &text, format);
        if let Some(embedder) = &self.embedder {
            self.embed(embedder, &id, &mut chunks, &tenant, cx).await?;
        }
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
            let (start, end, text) = (range.start, range.end, piece.to_owned());
            chunks.push(Chunk { id, start, end, heading, text, embedding: None });
        }
    }
    chunks
}

impl Index {
    /// Gives each chunk its vector: the one that it had, or a new one, in as few calls as there may be. Those of a long document follow
    /// one another; what is short shares its call with other documents of its tenant, which are indexed at the same time.
    async fn embed(
        &self,
        embedder: &Embedder,
        id: &str,
        chunks: &mut [Chunk],
        tenant: &Tenant,
        cx: &Context,
    ) -> Result<(), Failure> {
        let key = vectors_key(id);
        let store_failed = |error| store_failure("object store", error);
        if chunks.is_empty() {
            return self.objects.delete(&key).await.map_err(store_failed);
        }
        let record = cx.envelope().id.as_str();
        let kept = self.objects.get(&key).await.map_err(store_failed)?;
        // Of another version, or damaged: then all are new.
        let kept: Kept = kept.and_then(|kept| serde_json::from_slice(&kept).ok()).unwrap_or_default();
        // A record that comes again makes the same calls, so that a ledger tells of those that it made before.
        let before = if kept.record == record { kept.before } else { kept.vectors };
        let said: Vec<String> = chunks.iter().map(|chunk| text::under(&chunk.heading, &chunk.text)).collect();
        let known = |said: &String| {
            before.get(&hash(&[said.as_str()])).filter(|known| embedder.knows(known)).cloned()
        };
        let mut vectors: Vec<Option<Embedding>> = said.iter().map(known).collect();
        let new: Vec<usize> = (0..said.len()).filter(|&at| vectors[at].is_none()).collect();
        let texts: Vec<&str> = new.iter().map(|&at| said[at].as_str()).collect();
        for part in Size::default().parts(&texts) {
            let task = Task::Embed(&texts[part.clone()]);
            let (tenant, lane) = (tenant.clone(), cx.envelope().lane);
            let call = Call { task, tenant, lane, ..Call::default() };
            let rows = Rows::new(cx, &call).numbered(number(&texts[part.clone()]));
            let made = embedder.embed(&call, &rows).await?;
            let made = made.map_err(|error| error.into_failure(format!("embedder {}", embedder.name())))?;
            for (&at, vector) in new[part].iter().zip(made) {
                vectors[at] = Some(vector);
            }
        }
        if !new.is_empty() {
            let all = said.iter().map(|said| hash(&[said.as_str()])).zip(vectors.iter().flatten().cloned());
            let kept = Kept { record: record.to_owned(), vectors: all.collect(), before };
            let kept = serde_json::to_vec(&kept)
                .map_err(|error| Failure::rejected("unencodable", error.to_string()))?;
            self.objects.put(&key, Bytes::from(kept)).await.map_err(store_failed)?;
        }
        for (chunk, vector) in chunks.iter_mut().zip(vectors) {
            chunk.embedding = vector;
        }
        Ok(())
    }
}

/// What is kept of a document's vectors, by hashes of what was embedded.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// The record that they were made for.
    record: String,
    vectors: HashMap<String, Embedding>,
    /// Those that were there before it.
    before: HashMap<String, Embedding>,
}

fn hash(texts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        // Its length first, or "a" and "bc" would read like "ab" and "c".
        hasher.update(&(text.len() as u64).to_be_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// The number of the call for these texts: by what they say, since which of a record's are new depends on what is kept here. Counted,
/// another process that keeps nothing would be given the vectors of other texts by the ledger.
fn number(texts: &[&str]) -> u32 {
    u32::from_str_radix(&hash(texts)[..NUMBER_DIGITS], 16).unwrap_or_default()
}

/// Where the vectors of a document's latest version lie in the object store. Who takes a document away
/// need not say whose it was, and its id is its own over all tenants.
fn vectors_key(document: &str) -> String {
    format!("embeddings/{}", segment(document))
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
    use crate::samples::{self, Numbers};
    use forebay_calls::{CallError, Class};
    use forebay_operator::{Clock, compliance};
    use forebay_schemas::Record as _;
    use proptest::prelude::*;

    async fn chunks_of(text: Option<&str>) -> (samples::World, Chunks) {
        let world = samples::World::new().await;
        let index = Index::new(Settings::default(), &world.resources);
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
        compliance::assert_complies(Index::new(Settings::default(), &world.resources), samples).await;
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

    /// What becomes of a document of so many short sections, and the rows about calls.
    async fn embedded(
        numbers: &Arc<Numbers>,
        sections: usize,
    ) -> (Result<Vec<Indexed>, Failure>, Vec<forebay_schemas::Attempt>) {
        let world = samples::World::new().await.embedding(numbers.clone(), 3).await;
        let index = Index::new(Settings { embed: true }, &world.resources);
        let text: String =
            (0..sections).map(|number| format!("# Car {number}\n\nIt is red {number}.\n")).collect();
        let cx = samples::cx();
        let indexed = index.process(samples::document("cars.md", Some(&text)), &cx).await;
        (indexed, cx.take_rows())
    }

    #[tokio::test]
    async fn each_chunk_has_its_vector_in_as_few_calls_as_there_may_be() {
        let numbers = Numbers::of("m", |texts| {
            let number =
                |text: &&str| text.rsplit(' ').next().unwrap().trim_end_matches('.').parse().unwrap();
            Some(Ok(texts.iter().map(|text| vec![number(text), 1.0, 0.0]).collect()))
        });
        let (indexed, rows) = embedded(&numbers, 150).await;
        let [Indexed::Chunks(chunks)] = <[_; 1]>::try_from(indexed.unwrap()).unwrap();
        let chunks = chunks.content.unwrap().chunks;
        for (chunk, number) in chunks.iter().zip(0_u8..) {
            let expected = vec![f32::from(number), 1.0, 0.0];
            assert_eq!(chunk.embedding, Embedding::new("m", expected), "{}", chunk.text);
        }
        assert_eq!(chunks.len(), 150);
        let asked = numbers.asked.lock().unwrap();
        assert_eq!(asked.iter().map(Vec::len).collect::<Vec<_>>(), [64, 64, 22]);
        assert_eq!(asked[0][7], "Car 7\nIt is red 7.", "read with its headings");
        let calls: HashSet<_> = rows.iter().map(|row| (&row.call_id, row.attempt)).collect();
        assert_eq!((rows.len(), calls.len()), (3, 3));
        assert!(rows.iter().all(|row| row.operation.as_deref() == Some("embeddings")), "{rows:?}");
    }

    #[tokio::test]
    async fn no_document_leaves_without_its_vectors() {
        let refuses = |class, code| Numbers::of("m", move |_| Some(Err(CallError::new(class, code, "no"))));
        let failed = async |numbers: Arc<Numbers>| embedded(&numbers, 1).await.0.unwrap_err();
        let failure = failed(refuses(Class::Outage, "model_unavailable")).await;
        assert!(matches!(failure, Failure::Unavailable { outage: true, .. }), "{failure}");
        let failure = failed(refuses(Class::Rejected, "budget_exceeded")).await;
        assert!(matches!(failure, Failure::Rejected { .. }) && failure.code() == "budget_exceeded");
        let failure = failed(Numbers::of("m", |_| Some(Ok(Vec::new())))).await;
        assert!(matches!(failure, Failure::Unavailable { outage: false, .. }), "{failure}");
        // Whoever mends the settings finds all documents waiting.
        let failure = failed(Numbers::of("m", |texts| Some(Ok(vec![vec![1.0]; texts.len()])))).await;
        let Failure::Unavailable { outage: true, source, .. } = &failure else { panic!("{failure}") };
        assert!(source.to_string().contains("embeddings.dimensions says 3"), "{source}");
        let numbers = Numbers::meanings("m");
        assert!(embedded(&numbers, 0).await.0.is_ok() && numbers.asked.lock().unwrap().is_empty());
    }

    /// The context of another record than any before.
    fn another(records: &mut u8) -> Context {
        *records += 1;
        let id = forebay_schemas::RequestId::try_from(format!("d-{records}")).unwrap();
        let envelope = forebay_schemas::Envelope { id, ..compliance::envelope() };
        Context::quiet(envelope, Clock::starting_at(compliance::NOW_MS))
    }

    #[tokio::test]
    async fn a_record_that_comes_again_makes_the_same_calls_whatever_is_kept() {
        let world = samples::World::new().await.embedding(Numbers::meanings("m"), 3).await;
        let index = Index::new(Settings { embed: true }, &world.resources);
        let calls = async |text: &str| {
            let cx = samples::cx();
            index.process(samples::document("d.md", Some(text)), &cx).await.unwrap();
            cx.take_rows().into_iter().map(|row| row.call_id).collect::<Vec<_>>()
        };
        let (one, both) = ("# A\nA car.\n", "# A\nA car.\n# B\nA ferry.\n");
        let first = calls(both).await;
        assert_eq!((first.len(), &first), (1, &calls(both).await), "its ledger answers and tells of it");
        world.resources.objects.delete(&vectors_key("d.md")).await.unwrap();
        assert_ne!(calls(one).await, first, "of other texts, and so another call");
    }

    #[tokio::test]
    async fn what_says_the_same_is_not_embedded_again() {
        let numbers = Numbers::meanings("m");
        let world = samples::World::new().await.embedding(numbers.clone(), 3).await;
        let records = std::sync::Mutex::new(0);
        let asked_for = async |resources: &Resources, text: &str| {
            let index = Index::new(Settings { embed: true }, resources);
            let text = (!text.is_empty()).then_some(text);
            let cx = another(&mut records.lock().unwrap());
            let out = index.process(samples::document("d.md", text), &cx).await.unwrap();
            let [Indexed::Chunks(chunks)] = <[_; 1]>::try_from(out).unwrap();
            let chunks = chunks.content.map(|split| split.chunks).unwrap_or_default();
            assert!(chunks.iter().all(|chunk| chunk.embedding.is_some()), "{text:?}");
            std::mem::take(&mut *numbers.asked.lock().unwrap()).concat().join(" | ")
        };
        let (one, two) = ("# A\nA car.\n", "# B\nA ferry.\n");
        assert_eq!(asked_for(&world.resources, &format!("{one}{two}")).await, "A\nA car. | B\nA ferry.");
        assert_eq!(asked_for(&world.resources, &format!("{one}{two}")).await, "");
        assert_eq!(asked_for(&world.resources, &format!("{two}# C\nA car.\n")).await, "C\nA car.");
        assert_eq!(asked_for(&world.resources, one).await, "A\nA car.", "only the latest version is kept");
        let vectors = world.resources.vectors.clone();
        let other = Some(Embedder::new(numbers.clone(), 4, vectors));
        let other = Resources { embedder: other, ..world.resources.clone() };
        let index = Index::new(Settings { embed: true }, &other);
        let cx = another(&mut records.lock().unwrap());
        index.process(samples::document("d.md", Some(one)), &cx).await.unwrap_err();
        assert_eq!(numbers.asked.lock().unwrap().len(), 1, "vectors of another length are no use");
        numbers.asked.lock().unwrap().clear();
        let key = vectors_key("d.md");
        assert!(world.resources.objects.get(&key).await.unwrap().is_some());
        assert_eq!(asked_for(&world.resources, "").await, "");
        assert!(world.resources.objects.get(&key).await.unwrap().is_none(), "gone with its document");
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
