//! The settings of an embedder: where its servers are, which model they serve, how long its vectors are.
//!
//! Invariant: all of its servers are of one model. It stands in every vector and in the cache's key, and vectors of another are not
//! compared with those of this one.

use crate::config::{Sourced, one_of, pool::PoolSettings, rerank::pooled, served::Served};
use forebay_stores::vectors::DIMENSIONS_MAX;
use std::collections::BTreeMap;

/// What embeds texts.
#[derive(Clone, Debug)]
pub struct EmbeddingsSettings {
    pub served: Vec<Served>,
    pub pool: PoolSettings,
    /// How many numbers each vector has. Said and not learnt: processes that hold vectors and ask nobody must know it too.
    pub dimensions: usize,
}

impl EmbeddingsSettings {
    /// The settings, where a server is named.
    pub fn of(values: &BTreeMap<String, Sourced>) -> anyhow::Result<Option<Self>> {
        let Some((served, pool)) = pooled(values, "embeddings", Served::embedding(values)?)? else {
            return Ok(None);
        };
        let expected = format!("how many numbers a vector of the model has, 1 to {DIMENSIONS_MAX}");
        let dimensions = one_of(values, "embeddings.dimensions", &expected, |text| {
            text.parse().ok().filter(|n| (1..=DIMENSIONS_MAX).contains(n))
        })?;
        Ok(Some(Self { served, pool, dimensions }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_calls::Api;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<EmbeddingsSettings>, String> {
        let sourced = |value: &str, from: &str| Sourced { value: value.to_owned(), from: from.to_owned() };
        let mut values: BTreeMap<String, Sourced> = BTreeMap::new();
        for (path, value) in [("url", ""), ("model", ""), ("dimensions", ""), ("outstanding", "64")] {
            values.insert(format!("embeddings.{path}"), sourced(value, "default"));
        }
        for (path, value) in pairs {
            values.insert(format!("embeddings.{path}"), sourced(value, "f.yaml:3"));
        }
        EmbeddingsSettings::of(&values).map_err(|fault| fault.to_string())
    }

    const NAMED: [(&str, &str); 3] =
        [("url", "http://a/v1,http://b/v1"), ("model", "small"), ("dimensions", "384")];

    #[test]
    fn servers_of_one_embedder_are_a_list() {
        assert!(read(&[]).unwrap().is_none());
        let embeddings = read(&NAMED).unwrap().unwrap();
        let seen: Vec<_> = embeddings.served.iter().map(|one| (one.url.as_str(), one.api)).collect();
        assert_eq!(seen, [("http://a/v1", Api::Embeddings), ("http://b/v1", Api::Embeddings)]);
        assert_eq!(embeddings.served[0].model.as_deref(), Some("small"));
        assert_eq!((embeddings.dimensions, embeddings.pool.caps.outstanding), (384, 64));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_its_place() {
        let refused = |pairs: &[(&str, &str)]| read(pairs).unwrap_err();
        assert_eq!(
            refused(&[("dimensions", "384")]),
            "embeddings.dimensions has no effect without embeddings.url"
        );
        assert!(refused(&NAMED[..1]).contains("FOREBAY_EMBEDDINGS_MODEL"));
        assert!(refused(&NAMED[..2]).contains("embeddings.dimensions is \"\""));
        for wrong in ["0", "8193", "small"] {
            let refused = refused(&[NAMED[0], NAMED[1], ("dimensions", wrong)]);
            assert!(refused.contains(wrong) && refused.contains("1 to 8192"), "{refused}");
        }
    }
}
