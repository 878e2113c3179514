//! The copy of `chunks` in which retrieval searches.
//!
//! Where there is an embedder, its vectors lie in a copy of their own beside it: those that it made itself, and no others.
//!
//! Invariant: a document's passages change from one version to the next in one step. The copy remembers no position
//! and is read whole at start: what it holds is then what the topic says, whatever came before.

use super::lexical;
use crate::{embedder::Embedder, store_failure::store_failure, text::words};
use bytes::Bytes;
use forebay_operator::{Change, Failure, Table};
use forebay_schemas::{Chunk, Chunks, Embedding, Passage, Record as _, Split};
use forebay_stores::{Vectors, vectors::Point};
use futures::future::BoxFuture;
use std::sync::Arc;

/// The table of `Chunks` over vector stores.
pub struct ChunksTable {
    vectors: Arc<dyn Vectors>,
    embedder: Option<Embedder>,
}

impl ChunksTable {
    /// A table in this store and that of the embedder, which nothing else writes to.
    pub fn new(vectors: Arc<dyn Vectors>, embedder: Option<Embedder>) -> Self {
        Self { vectors, embedder }
    }

    /// Makes these the passages of a document.
    async fn replace(&self, document: &str, points: Vec<Both>) -> Result<(), Failure> {
        let Some(embedder) = &self.embedder else {
            let lexical = points.into_iter().map(|both| both.lexical).collect();
            return self.vectors.replace(document, lexical).await.map_err(failure);
        };
        let mut dense = Vec::new();
        let mut lexical = Vec::with_capacity(points.len());
        for Both { lexical: point, embedding } in points {
            if let Some(embedding) = embedding.filter(|embedding| embedder.knows(embedding)) {
                // One text in memory for both.
                let (id, scope, payload) = (point.id.clone(), point.scope.clone(), point.payload.clone());
                dense.push(Point { id, scope, vector: embedding.vector().to_vec(), payload });
            }
            lexical.push(point);
        }
        let _turn = embedder.changing().await;
        self.vectors.replace(document, lexical).await.map_err(failure)?;
        embedder.vectors.replace(document, dense).await.map_err(failure)
    }
}

/// A passage as it is found by its words, and what an embedder made of it.
struct Both {
    lexical: Point,
    embedding: Option<Embedding>,
}

impl Table for ChunksTable {
    fn record(&self) -> &'static str {
        Chunks::NAME
    }

    fn position(&self, _partition: i32) -> BoxFuture<'_, Result<Option<i64>, Failure>> {
        Box::pin(async { Ok(None) })
    }

    fn clear(&self) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async {
            self.vectors.clear().await.map_err(failure)?;
            match &self.embedder {
                Some(embedder) => embedder.vectors.clear().await.map_err(failure),
                None => Ok(()),
            }
        })
    }

    fn apply(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<Vec<(Change, String)>, Failure>> {
        Box::pin(async move {
            let mut passed_over = Vec::new();
            for change in changes {
                let points = match points(&change) {
                    Ok(points) => points,
                    Err(reason) => {
                        passed_over.push((change, reason));
                        continue;
                    }
                };
                match self.replace(&change.key, points).await {
                    Ok(()) => {}
                    // The store takes no such points, now or later.
                    Err(Failure::Rejected { message, .. }) => passed_over.push((change, message)),
                    Err(failure) => return Err(failure),
                }
            }
            Ok(passed_over)
        })
    }
}

fn failure(error: forebay_stores::Error) -> Failure {
    store_failure("vector store", error)
}

/// The points of a document; none where it was deleted.
fn points(change: &Change) -> Result<Vec<Both>, String> {
    let Some(value) = &change.value else { return Ok(Vec::new()) };
    let chunks = Chunks::decode(value).map_err(|error| error.to_string())?;
    if chunks.document != change.key {
        return Err(format!("the record is about document {:?}", chunks.document));
    }
    let Some(Split { tenant, version, chunks }) = chunks.content else { return Ok(Vec::new()) };
    chunks
        .into_iter()
        .map(|Chunk { id, start, end, heading, text, embedding }| {
            let stems: Vec<_> = heading.iter().chain([&text]).map(|text| words::stems(text)).collect();
            let vector = lexical::embed(stems.iter().map(Vec::as_slice));
            let (document, version, chunk) = (change.key.clone(), version.clone(), id.clone());
            let passage = Passage { document, version, chunk, start, end, heading, text, score: 0.0 };
            let payload = serde_json::to_vec(&passage).map_err(|error| error.to_string())?;
            let (scope, payload) = (tenant.as_str().to_owned(), Bytes::from(payload));
            Ok(Both { lexical: Point { id, scope, vector, payload }, embedding })
        })
        .collect()
}
