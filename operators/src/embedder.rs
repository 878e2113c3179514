//! Asks for the vectors of texts, and keeps those of passages where they can be searched.
//!
//! Invariant: vectors are compared only with those of the same model and length, whatever lies on `chunks` and whatever the server
//! answers.

use crate::rows::Rows;
use forebay_calls::{Call, CallError, Class, Model, Reply};
use forebay_operator::Stop;
use forebay_schemas::Embedding;
use forebay_stores::Vectors;
use std::sync::Arc;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// An embedder, and the copy of the vectors that it made of all passages.
#[derive(Clone)]
pub struct Embedder {
    model: Arc<dyn Model>,
    dimensions: usize,
    /// Beside the copy that is searched by words, with the same groups.
    pub(crate) vectors: Arc<dyn Vectors>,
    /// Two copies change in two steps, and no search may come between.
    turn: Arc<RwLock<()>>,
}

impl Embedder {
    /// Vectors of this length, by a model that takes [`Task::Embed`](forebay_calls::Task::Embed). `vectors` holds no others.
    pub fn new(model: Arc<dyn Model>, dimensions: usize, vectors: Arc<dyn Vectors>) -> Self {
        Self { model, dimensions, vectors, turn: Arc::default() }
    }

    /// The name of its model.
    pub fn name(&self) -> &str {
        self.model.name()
    }

    /// How many numbers its vectors have.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// Whether a vector is one of its own.
    pub(crate) fn knows(&self, embedding: &Embedding) -> bool {
        embedding.is_of(self.name(), self.dimensions)
    }

    /// The turn to search both copies.
    pub(crate) async fn searching(&self) -> RwLockReadGuard<'_, ()> {
        self.turn.read().await
    }

    /// The turn to change both copies.
    pub(crate) async fn changing(&self) -> RwLockWriteGuard<'_, ()> {
        self.turn.write().await
    }

    /// The vector of each text of a call.
    pub(crate) async fn embed(
        &self,
        call: &Call<'_>,
        rows: &Rows<'_>,
    ) -> Result<Result<Vec<Embedding>, CallError>, Stop> {
        let wanted = call.task.texts().unwrap_or(0);
        let replied = rows.ask(&*self.model, call).await?;
        Ok(replied.and_then(|reply| self.read(reply, wanted)))
    }

    fn read(&self, Reply { vectors, .. }: Reply, wanted: usize) -> Result<Vec<Embedding>, CallError> {
        let malformed = |class, message| Err(CallError::new(class, "model_malformed", message));
        if vectors.len() != wanted {
            let message = format!("the embedder gave {} vectors for {wanted} texts", vectors.len());
            return malformed(Class::Transient, message);
        }
        if let Some(other) = vectors.iter().find(|vector| vector.len() != self.dimensions) {
            // Whoever mends the settings finds all documents waiting.
            return malformed(
                Class::Outage,
                format!(
                    "the vectors of embedder {:?} have {} numbers, and embeddings.dimensions says {}; correct it",
                    self.name(),
                    other.len(),
                    self.dimensions
                ),
            );
        }
        let read = vectors.into_iter().map(|vector| Embedding::new(self.name(), vector));
        match read.collect() {
            Some(embeddings) => Ok(embeddings),
            None => malformed(Class::Transient, "the embedder gave a number that is not finite".to_owned()),
        }
    }
}
