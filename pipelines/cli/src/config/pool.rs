//! The settings of a pool of model servers.
//!
//! Invariant: one model URL without any of them is called as it always was, without a pool.

use crate::{
    config::{Sourced, one_of, served::Served, text},
    console::wrong,
};
use forebay_calls::{client::Hedging, throttle::Caps};
use std::collections::BTreeMap;

/// What answers where no endpoint of the pool can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The extractive model.
    Extractive,
    /// Another model at another server, without a key.
    Served { model: String, url: String },
    /// The endpoint of this name, which then takes no other calls.
    Endpoint(String),
}

impl Fallback {
    /// Whether it is this server.
    pub fn is(&self, served: &Served) -> bool {
        matches!(self, Self::Endpoint(name) if served.name.as_ref() == Some(name))
    }
}

/// How a pool is used.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    /// The most that each endpoint gets.
    pub caps: Caps,
    pub hedging: Hedging,
    /// In this order.
    pub fallbacks: Vec<Fallback>,
    /// Whether endpoints get calls only once they answer.
    pub starts_cold: bool,
    /// Asked once when a call waits and no endpoint is there.
    pub wake_url: Option<String>,
}

impl PoolSettings {
    /// The settings, where there is a pool: several servers, or anything that is said of one.
    pub fn of(values: &BTreeMap<String, Sourced>, served: &[Served]) -> anyhow::Result<Option<Self>> {
        let is_said = values.iter().any(|(path, value)| path.starts_with("pool.") && value.from != "default");
        if served.is_empty() && is_said {
            return Err(wrong("settings under pool have no effect without a model URL: add --model-url URL"));
        }
        if served.len() <= 1 && !is_said {
            return Ok(None);
        }
        let hedging =
            one_of(values, "pool.hedge", "off, usual, or a time such as 800ms", |text| match text {
                "off" => Some(Hedging::Off),
                "usual" => Some(Hedging::Usual),
                text => {
                    humantime::parse_duration(text).ok().filter(|time| !time.is_zero()).map(Hedging::After)
                }
            })?;
        let starts_cold: bool =
            one_of(values, "pool.starts_cold", "true or false", |text| text.parse().ok())?;
        let outstanding = one_of(values, "pool.outstanding", "1 to 10000", |text| {
            text.parse().ok().filter(|n| (1..=10_000).contains(n))
        })?;
        let per_minute = |path| match text(values, path) {
            "" => Ok(None),
            _ => one_of(values, path, "a number above 0, or nothing", |text| {
                text.parse().ok().filter(|&number: &u64| number > 0).map(Some)
            }),
        };
        let caps = Caps {
            outstanding,
            requests_per_minute: per_minute("pool.requests_per_minute")?,
            tokens_per_minute: per_minute("pool.tokens_per_minute")?,
        };
        let fallbacks = one_of(
            values,
            "pool.fallback",
            "extractive, a model at a server such as small@http://127.0.0.1:8001/v1, an endpoint of pool.endpoints, \
             or several joined by commas",
            |text| fallbacks(text, served),
        )?;
        let stands_in = |served: &Served| fallbacks.iter().any(|fallback| fallback.is(served));
        if served.iter().all(stands_in) {
            return Err(wrong("pool.fallback names every endpoint, and leaves none for the pool"));
        }
        let wake_url = Some(text(values, "pool.wake_url").to_owned()).filter(|url| !url.is_empty());
        if wake_url.is_some() && !starts_cold {
            return Err(wrong("pool.wake_url has no effect without pool.starts_cold: true"));
        }
        Ok(Some(Self { caps, hedging, fallbacks, starts_cold, wake_url }))
    }
}

fn fallbacks(text: &str, served: &[Served]) -> Option<Vec<Fallback>> {
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    items
        .map(|item| match item.split_once('@') {
            None if item == "extractive" => Some(Fallback::Extractive),
            None => {
                let is_known = served.iter().any(|served| served.name.as_deref() == Some(item));
                is_known.then(|| Fallback::Endpoint(item.to_owned()))
            }
            Some((model, url)) => {
                let is_whole = !model.is_empty() && url.trim_end_matches('/').ends_with("/v1");
                is_whole.then(|| Fallback::Served { model: model.to_owned(), url: url.to_owned() })
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_calls::Api;
    use std::time::Duration;

    fn served(name: Option<&str>) -> Served {
        Served {
            name: name.map(str::to_owned),
            url: "http://h/v1".to_owned(),
            api: Api::default(),
            model: None,
            keys: Vec::new(),
            vllm: Default::default(),
        }
    }

    fn read(pairs: &[(&str, &str)], urls: usize) -> Result<Option<PoolSettings>, String> {
        let mut values: BTreeMap<String, Sourced> = BTreeMap::new();
        for (path, value) in
            [("hedge", "off"), ("starts_cold", "false"), ("outstanding", "64"), ("fallback", "")]
        {
            let sourced = Sourced { value: value.to_owned(), from: "default".to_owned() };
            values.insert(format!("pool.{path}"), sourced);
        }
        for (path, value) in pairs {
            let sourced = Sourced { value: (*value).to_owned(), from: "f.yaml:3".to_owned() };
            values.insert(format!("pool.{path}"), sourced);
        }
        let mut all = vec![served(None); urls];
        if urls > 1 {
            all.push(served(Some("claude")));
        }
        PoolSettings::of(&values, &all).map_err(|fault| fault.to_string())
    }

    #[test]
    fn there_is_a_pool_where_anything_is_said_of_one() {
        assert!(read(&[], 1).unwrap().is_none());
        assert_eq!(read(&[], 2).unwrap().unwrap().caps.outstanding, 64);
        let pool = read(&[("hedge", "800ms"), ("tokens_per_minute", "9000")], 1).unwrap().unwrap();
        assert_eq!(pool.hedging, Hedging::After(Duration::from_millis(800)));
        assert_eq!((pool.caps.tokens_per_minute, pool.caps.requests_per_minute), (Some(9_000), None));
        let pool = read(&[("fallback", "small@http://h:1/v1, extractive")], 1).unwrap().unwrap();
        let small = Fallback::Served { model: "small".to_owned(), url: "http://h:1/v1".to_owned() };
        assert_eq!(pool.fallbacks, [small, Fallback::Extractive]);
        let pool = read(&[("fallback", "claude, extractive")], 2).unwrap().unwrap();
        assert_eq!(pool.fallbacks, [Fallback::Endpoint("claude".to_owned()), Fallback::Extractive]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_its_place() {
        let refused = |path: &str, value: &str| read(&[(path, value)], 2).unwrap_err();
        assert_eq!(
            refused("hedge", "soon"),
            "pool.hedge is \"soon\" (from f.yaml:3); it may be off, usual, or a time such as 800ms"
        );
        assert!(refused("outstanding", "0").contains("1 to 10000"));
        assert!(refused("requests_per_minute", "-1").contains("above 0"));
        assert!(refused("fallback", "small@http://h:1").contains("small@http://127.0.0.1:8001/v1"));
        assert!(refused("fallback", "gemini").contains("an endpoint of pool.endpoints"));
        assert!(refused("starts_cold", "yes").contains("true or false"));
        assert!(refused("wake_url", "http://h").contains("pool.starts_cold"));
        assert!(read(&[("hedge", "usual")], 0).unwrap_err().contains("--model-url"));
    }
}
