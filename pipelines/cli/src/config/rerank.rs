//! The settings of a reranker: where its servers are, which API they speak, by which key.
//!
//! Invariant: all of its servers are of one model, which stands in the cache's key.

use crate::{
    config::{Sourced, one_of, pool::PoolSettings, served::Served, text},
    console::wrong,
};
use forebay_calls::{client::Hedging, throttle::Caps};
use std::collections::BTreeMap;

/// What scores passages.
#[derive(Clone, Debug)]
pub struct RerankSettings {
    pub served: Vec<Served>,
    pub pool: PoolSettings,
}

impl RerankSettings {
    /// The settings, where a server is named.
    pub fn of(values: &BTreeMap<String, Sourced>) -> anyhow::Result<Option<Self>> {
        let pooled = pooled(values, "rerank", Served::reranking(values)?)?;
        Ok(pooled.map(|(served, pool)| Self { served, pool }))
    }
}

/// The servers under a section that are asked for numbers, and how their pool is used; nothing where none is named.
pub(super) fn pooled(
    values: &BTreeMap<String, Sourced>,
    section: &str,
    served: Vec<Served>,
) -> anyhow::Result<Option<(Vec<Served>, PoolSettings)>> {
    let at = |field: &str| format!("{section}.{field}");
    if served.is_empty() {
        let is_said = |(path, sourced): &(&String, &Sourced)| {
            path.starts_with(&at("")) && sourced.from != "default" && !sourced.value.is_empty()
        };
        return match values.iter().find(is_said) {
            Some((path, _)) => Err(wrong(format!("{path} has no effect without {}", at("url")))),
            None => Ok(None),
        };
    }
    if text(values, &at("model")).is_empty() {
        let variable = format!("FOREBAY_{}_MODEL", section.to_uppercase());
        let (url, model) = (at("url"), at("model"));
        return Err(wrong(format!("{url} needs a model: name it by {model} (or {variable})")));
    }
    let outstanding = one_of(values, &at("outstanding"), "1 to 10000", |text| {
        text.parse().ok().filter(|n| (1..=10_000).contains(n))
    })?;
    let caps = Caps { outstanding, requests_per_minute: None, tokens_per_minute: None };
    // A second try elsewhere would come when the question is nearly going on without; nobody stands in, as other numbers mean
    // something else.
    let (hedging, fallbacks, starts_cold, wake_url) = (Hedging::Off, Vec::new(), false, None);
    Ok(Some((served, PoolSettings { caps, hedging, fallbacks, starts_cold, wake_url })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_calls::Api;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<RerankSettings>, String> {
        let sourced = |value: &str, from: &str| Sourced { value: value.to_owned(), from: from.to_owned() };
        let mut values: BTreeMap<String, Sourced> = BTreeMap::new();
        for (path, value) in [("url", ""), ("model", ""), ("api", "cohere"), ("outstanding", "64")] {
            values.insert(format!("rerank.{path}"), sourced(value, "default"));
        }
        for (path, value) in pairs {
            values.insert(format!("rerank.{path}"), sourced(value, "f.yaml:3"));
        }
        RerankSettings::of(&values).map_err(|fault| fault.to_string())
    }

    #[test]
    fn servers_of_one_reranker_are_a_list() {
        assert!(read(&[]).unwrap().is_none());
        let named = [("url", "http://a/v1,http://b/v1"), ("model", "ranker"), ("key", "k")];
        let rerank = read(&named).unwrap().unwrap();
        let seen: Vec<_> = rerank.served.iter().map(|one| (one.url.as_str(), one.api, &*one.keys)).collect();
        let keys = ["k".to_owned()];
        assert_eq!(seen, [("http://a/v1", Api::Rerank, &keys[..]), ("http://b/v1", Api::Rerank, &keys[..])]);
        assert_eq!((rerank.served[0].model.as_deref(), rerank.pool.caps.outstanding), (Some("ranker"), 64));
        let tei = read(&[("url", "http://a/v1"), ("model", "ranker"), ("api", "tei")]).unwrap().unwrap();
        assert_eq!(tei.served[0].api, Api::RerankTei);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_its_place() {
        let refused = |pairs: &[(&str, &str)]| read(pairs).unwrap_err();
        assert_eq!(refused(&[("model", "ranker")]), "rerank.model has no effect without rerank.url");
        assert!(refused(&[("url", "http://a/v1")]).contains("FOREBAY_RERANK_MODEL"));
        let named = |more| refused(&[("url", "http://a/v1"), ("model", "ranker"), more]);
        assert_eq!(
            named(("api", "openai")),
            "rerank.api is \"openai\" (from f.yaml:3); it may be cohere or tei"
        );
        assert!(named(("outstanding", "0")).contains("1 to 10000"));
        assert!(refused(&[("url", "http://a"), ("model", "ranker")]).contains("it must end in /v1"));
    }
}
