//! The settings of model servers: where each is, which API it speaks, by which key.
//!
//! Servers of one kind are a list of URLs under `model`; servers that differ stand by name under `pool.endpoints`.
//!
//! Invariant: a key comes from a file or the environment, and from a file of its own for each endpoint that has one.

use crate::{
    config::{Sourced, from, text, without_password},
    console::wrong,
};
use forebay_calls::{Api, server::Vllm};
use std::collections::{BTreeMap, BTreeSet};

/// Where the endpoints stand that have names.
pub const ENDPOINTS: &str = "pool.endpoints.";
/// What may be said of each.
pub const FIELDS: [&str; 5] = ["url", "api", "model", "key_file", "vllm"];

/// The words for APIs by which a text is asked for, the usual one first.
const ANSWERING: &[(&str, Api)] =
    &[("openai", Api::Chat), ("openai-responses", Api::Responses), ("anthropic", Api::Messages)];
/// That by which vectors are.
const EMBEDDING: &[(&str, Api)] = &[("openai", Api::Embeddings)];
/// Those by which scores are.
const RANKING: &[(&str, Api)] = &[("cohere", Api::Rerank), ("tei", Api::RerankTei)];

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Its name in the settings; none where it is one of `model.url`.
    pub name: Option<String>,
    pub url: String,
    pub api: Api,
    /// The model to ask for there; the common one where absent.
    pub model: Option<String>,
    /// Used in turn as they run out.
    pub keys: Vec<String>,
    pub vllm: Vllm,
}

impl Served {
    /// The model that is asked for there.
    pub fn asks_for<'a>(&'a self, common: Option<&'a str>) -> &'a str {
        self.model.as_deref().or(common).unwrap_or_default()
    }

    /// All of them, those of `model.url` first.
    pub fn all(values: &BTreeMap<String, Sourced>) -> anyhow::Result<Vec<Self>> {
        let mut all = Self::listed(values, "model", ANSWERING)?;
        let names: BTreeSet<&str> = values
            .keys()
            .filter_map(|path| Some(path.strip_prefix(ENDPOINTS)?.rsplit_once('.')?.0))
            .collect();
        for name in names {
            let path = format!("{ENDPOINTS}{name}");
            let url = text(values, &format!("{path}.url"));
            if url.is_empty() {
                return Err(wrong(format!("{path} has no url; give one such as http://127.0.0.1:8000/v1")));
            }
            all.push(Self::of(values, Some(name), &path, url, ANSWERING)?);
        }
        Ok(all)
    }

    /// Those that embed texts.
    pub fn embedding(values: &BTreeMap<String, Sourced>) -> anyhow::Result<Vec<Self>> {
        Self::listed(values, "embeddings", EMBEDDING)
    }

    /// Those that score passages.
    pub fn reranking(values: &BTreeMap<String, Sourced>) -> anyhow::Result<Vec<Self>> {
        Self::listed(values, "rerank", RANKING)
    }

    /// Servers of one kind.
    fn listed(
        values: &BTreeMap<String, Sourced>,
        path: &str,
        apis: &[(&str, Api)],
    ) -> anyhow::Result<Vec<Self>> {
        let urls = text(values, &format!("{path}.url")).split(',').map(str::trim);
        urls.filter(|url| !url.is_empty()).map(|url| Self::of(values, None, path, url, apis)).collect()
    }

    fn of(
        values: &BTreeMap<String, Sourced>,
        name: Option<&str>,
        path: &str,
        url: &str,
        apis: &[(&str, Api)],
    ) -> anyhow::Result<Self> {
        let at = |field: &str| format!("{path}.{field}");
        if !url.trim_end_matches('/').ends_with("/v1") {
            return Err(wrong(format!(
                "{} is {:?} (from {}); it must end in /v1, as in http://127.0.0.1:8000/v1",
                at("url"),
                without_password(url),
                from(values, &at("url"))
            )));
        }
        let refused = |field: &str, expected: &str| {
            let (value, from) = (text(values, &at(field)), from(values, &at(field)));
            wrong(format!("{} is {value:?} (from {from}); it may be {expected}", at(field)))
        };
        let known = match text(values, &at("api")) {
            "" => apis.first(),
            word => apis.iter().find(|(known, _)| *known == word),
        };
        let words: Vec<&str> = apis.iter().map(|(word, _)| *word).collect();
        let Some(&(_, api)) = known else { return Err(refused("api", &words.join(" or "))) };
        let vllm = vllm(text(values, &at("vllm")))
            .ok_or_else(|| refused("vllm", "cache_salt, priority, or both joined by a comma"))?;
        if vllm != Vllm::default() && api == Api::Messages {
            return Err(wrong(format!("{} has no effect with {}: anthropic", at("vllm"), at("api"))));
        }
        let model = Some(text(values, &at("model")).to_owned()).filter(|model| !model.is_empty());
        Ok(Self {
            name: name.map(str::to_owned),
            url: url.to_owned(),
            api,
            model,
            keys: keys(values, path)?,
            vllm,
        })
    }
}

fn vllm(text: &str) -> Option<Vllm> {
    let mut vllm = Vllm::default();
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match word {
            "cache_salt" => vllm.cache_salt = true,
            "priority" => vllm.priority = true,
            _ => return None,
        }
    }
    Some(vllm)
}

/// One a line.
fn keys(values: &BTreeMap<String, Sourced>, path: &str) -> anyhow::Result<Vec<String>> {
    let (key, file) = (text(values, &format!("{path}.key")), format!("{path}.key_file"));
    let keys = match (key, text(values, &file)) {
        ("", "") => String::new(),
        ("", name) => std::fs::read_to_string(name).map_err(|fault| {
            wrong(format!("could not read {file} {name} (from {}): {fault}", from(values, &file)))
        })?,
        (key, _) => key.to_owned(),
    };
    Ok(keys.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Vec<Served>, String> {
        let sourced = |value: &str| Sourced { value: value.to_owned(), from: "f.yaml:3".to_owned() };
        let values = pairs.iter().map(|(path, value)| ((*path).to_owned(), sourced(value))).collect();
        Served::all(&values).map_err(|fault| fault.to_string())
    }

    #[test]
    fn servers_of_one_kind_are_a_list_and_others_have_names() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "one\ntwo\n").unwrap();
        let all = read(&[
            ("model.url", "http://a/v1, http://b/v1/"),
            ("model.api", "openai"),
            ("model.vllm", "priority,cache_salt"),
            ("model.key", "common"),
            ("pool.endpoints.claude.url", "https://c/v1"),
            ("pool.endpoints.claude.api", "anthropic"),
            ("pool.endpoints.claude.model", "c-1"),
            ("pool.endpoints.claude.key_file", file.path().to_str().unwrap()),
        ])
        .unwrap();
        assert_eq!(all.len(), 3);
        let both = Vllm { cache_salt: true, priority: true };
        for (served, url) in all.iter().zip(["http://a/v1", "http://b/v1/"]) {
            let common = Served {
                name: None,
                url: url.to_owned(),
                api: Api::Chat,
                model: None,
                keys: vec!["common".to_owned()],
                vllm: both,
            };
            assert_eq!(*served, common);
        }
        let claude = &all[2];
        assert_eq!((claude.name.as_deref(), claude.api), (Some("claude"), Api::Messages));
        assert_eq!((claude.model.as_deref(), claude.vllm), (Some("c-1"), Vllm::default()));
        assert_eq!(claude.keys, ["one", "two"]);
        assert_eq!(read(&[]).unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_its_place() {
        let refused = |pairs: &[(&str, &str)]| read(pairs).unwrap_err();
        assert_eq!(
            refused(&[("model.url", "http://a/v1"), ("model.api", "claude")]),
            "model.api is \"claude\" (from f.yaml:3); it may be openai or openai-responses or anthropic"
        );
        assert!(
            refused(&[("model.url", "http://a/v1"), ("model.vllm", "salt")]).contains("cache_salt, priority")
        );
        let salted = [("model.url", "http://a/v1"), ("model.api", "anthropic"), ("model.vllm", "cache_salt")];
        assert_eq!(refused(&salted), "model.vllm has no effect with model.api: anthropic");
        assert_eq!(
            refused(&[("pool.endpoints.b.url", "http://me:secret@b")]),
            "pool.endpoints.b.url is \"http://(hidden)@b\" (from f.yaml:3); it must end in /v1, as in http://127.0.0.1:8000/v1"
        );
        assert!(refused(&[("pool.endpoints.b.api", "openai")]).starts_with("pool.endpoints.b has no url"));
        let gone = [("pool.endpoints.b.url", "http://b/v1"), ("pool.endpoints.b.key_file", "/nowhere/key")];
        assert!(
            refused(&gone)
                .starts_with("could not read pool.endpoints.b.key_file /nowhere/key (from f.yaml:3): ")
        );
    }
}
