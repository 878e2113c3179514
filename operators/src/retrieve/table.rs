//! The copy of `chunks` in which retrieval searches.
//!
//! Invariant: a document's passages change from one version to the next in one step. The copy remembers no position
//! and is read whole at start: what it holds is then what the topic says, whatever came before.

use super::embedder;
use crate::{store_failure::store_failure, text::words};
use bytes::Bytes;
use forebay_operator::{Change, Failure, Table};
use forebay_schemas::{Chunk, Chunks, Passage, Record as _, Split};
use forebay_stores::{Vectors, vectors::Point};
use futures::future::BoxFuture;
use std::sync::Arc;

/// The table of `Chunks` over a vector store.
pub struct ChunksTable(Arc<dyn Vectors>);

impl ChunksTable {
    /// A table in this store, which nothing else writes to.
    pub fn new(vectors: Arc<dyn Vectors>) -> Self {
        Self(vectors)
    }
}

impl Table for ChunksTable {
    fn record(&self) -> &'static str {
        Chunks::NAME
    }

    fn position(&self, _partition: i32) -> BoxFuture<'_, Result<Option<i64>, Failure>> {
        Box::pin(async { Ok(None) })
    }

    fn clear(&self) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async { self.0.clear().await.map_err(failure) })
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
                match self.0.replace(&change.key, points).await.map_err(failure) {
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
fn points(change: &Change) -> Result<Vec<Point>, String> {
    let Some(value) = &change.value else { return Ok(Vec::new()) };
    let chunks = Chunks::decode(value).map_err(|error| error.to_string())?;
    if chunks.document != change.key {
        return Err(format!("the record is about document {:?}", chunks.document));
    }
    let Some(Split { tenant, version, chunks }) = chunks.content else { return Ok(Vec::new()) };
    chunks
        .into_iter()
        .map(|Chunk { id, start, end, heading, text }| {
            let stems: Vec<_> = heading.iter().chain([&text]).map(|text| words::stems(text)).collect();
            let vector = embedder::embed(stems.iter().map(Vec::as_slice));
            let (document, version, chunk) = (change.key.clone(), version.clone(), id.clone());
            let passage = Passage { document, version, chunk, start, end, heading, text, score: 0.0 };
            let payload = serde_json::to_vec(&passage).map_err(|error| error.to_string())?;
            Ok(Point { id, scope: tenant.as_str().to_owned(), vector, payload: Bytes::from(payload) })
        })
        .collect()
}
