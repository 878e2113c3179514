//! Lets an embedder turn the question into a vector, so that passages are found by what they mean too.
//!
//! Invariant: whatever the embedder does, the question goes on, in bounded time: by its vector and its words, or by its words.

use crate::{embedder::Embedder, rows::Rows};
use forebay_calls::Task;
use forebay_operator::{Context, Event, Stop};
use forebay_schemas::{Embed, Request};
use std::time::Duration;

/// An embedder, and how it is asked.
pub(super) struct Asked {
    pub(super) embedder: Embedder,
    /// How long it is waited for.
    pub(super) timeout: Duration,
}

impl Asked {
    /// The vector of a question; none where the embedder does not give it.
    pub(super) async fn embed(&self, request: &Request, question: &str, cx: &Context) -> Result<Embed, Stop> {
        let texts = [question];
        let call = super::call(Task::Embed(&texts), request, self.timeout, cx);
        let rows = Rows::new(cx, &call).dispensable();
        let (question, outcome) = match self.embedder.embed(&call, &rows).await? {
            Ok(vectors) => (vectors.into_iter().next(), "ok"),
            Err(error) => {
                let cause = &error as &dyn std::error::Error;
                tracing::warn!(
                    error = cause,
                    code = error.code,
                    model = self.embedder.name(),
                    "could not embed a question; passages are sought by its words alone"
                );
                (None, error.code)
            }
        };
        cx.observe(&Event::Embedded { outcome });
        Ok(Embed { question })
    }
}
