//! From settings to the model that answers: the built-in one, a server, or a pool of them.

use crate::{
    config::{Config, pool::Fallback, pool::PoolSettings},
    console::wrong,
};
use anyhow::Context as _;
use forebay_calls::{
    Api, Model, Pool, Retry, Secret, Server,
    client::{Parts, client},
    pool::{Endpoint, Http, Wake},
    server::Timeouts,
};
use forebay_operators::Extractive;
use futures::future::BoxFuture;
use reqwest::Url;
use std::{sync::Arc, time::Duration};
use tracing::{info, warn};

/// How long waking may take.
const WAKE_MAX: Duration = Duration::from_secs(10);

/// What answers, and the pools in it.
pub struct Client {
    pub model: Arc<dyn Model>,
    pub pools: Vec<Arc<Pool>>,
}

impl Client {
    /// Looks at the endpoints of its pools for as long as the process lives.
    pub fn keep(&self) {
        for pool in &self.pools {
            let pool = Arc::clone(pool);
            tokio::spawn(async move { pool.keep().await });
        }
    }

    /// How all endpoints stand, as JSON.
    pub fn status(&self) -> impl Fn() -> String + Send + Sync + 'static {
        let pools = self.pools.clone();
        move || {
            let all: Vec<_> = pools.iter().flat_map(|pool| pool.status()).collect();
            serde_json::to_string(&all).unwrap_or_default()
        }
    }
}

/// What the settings ask for.
pub fn model(config: &Config) -> anyhow::Result<Client> {
    let alone = |model: Arc<dyn Model>| Client { model, pools: Vec::new() };
    if config.model_urls.is_empty() {
        return Ok(alone(Arc::new(Extractive)));
    }
    let Some(name) = &config.model else {
        return Err(wrong("a model URL needs a model: add --model NAME (or model.name, or FOREBAY_MODEL)"));
    };
    let keys: Vec<_> = config.model_keys.iter().map(|key| Secret::new(key)).collect();
    let Some(settings) = &config.pool else {
        let server = server(&config.model_urls[0], name, &keys)?;
        return Ok(alone(Arc::new(Retry::new(Arc::new(server), Arc::default()))));
    };
    let first = Arc::new(pool(&config.model_urls, name, &keys, settings)?);
    let mut pools = vec![first.clone()];
    let mut fallbacks: Vec<Arc<dyn Model>> = Vec::new();
    for fallback in &settings.fallbacks {
        fallbacks.push(match fallback {
            Fallback::Extractive => Arc::new(Extractive),
            Fallback::Served { model, url } => {
                // Its breaker is its own; it wakes nobody.
                let settings = PoolSettings { starts_cold: false, wake_url: None, ..settings.clone() };
                let pool = Arc::new(pool(std::slice::from_ref(url), model, &[], &settings)?);
                pools.push(pool.clone());
                pool
            }
        });
    }
    let model = client(Parts {
        pool: first,
        hedging: settings.hedging,
        fallbacks,
        // Prices and budgets have their place here.
        allowances: None,
        jitter: Arc::new(rand::random::<f64>),
    });
    Ok(Client { model, pools })
}

fn server(url: &str, name: &str, keys: &[Secret]) -> anyhow::Result<Server> {
    Server::new(Api::Chat, url, name, keys.to_vec(), Timeouts::default()).map_err(wrong)
}

fn pool(urls: &[String], name: &str, keys: &[Secret], settings: &PoolSettings) -> anyhow::Result<Pool> {
    let endpoint = |url: &String| {
        let model = server(url, name, keys)?;
        Ok(Endpoint {
            name: model.endpoint().to_owned(),
            model: Arc::new(model),
            caps: settings.caps,
            watch: Some(Arc::new(Http::new(url).map_err(wrong)?)),
            starts_cold: settings.starts_cold,
        })
    };
    let endpoints: Vec<_> = urls.iter().map(endpoint).collect::<anyhow::Result<_>>()?;
    let pool = Pool::new(name, endpoints, Arc::new(rand::random::<f64>));
    match &settings.wake_url {
        Some(url) => Ok(pool.woken_by(Arc::new(Post::new(url)?))),
        None => Ok(pool),
    }
}

/// Wakes by an empty POST, as autoscalers and serverless hosts take it.
struct Post {
    client: reqwest::Client,
    url: Url,
}

impl Post {
    fn new(url: &str) -> anyhow::Result<Self> {
        let parsed: Url = url.parse().map_err(|_| wrong(format!("pool.wake_url is no URL: {url:?}")))?;
        let client = reqwest::Client::builder().timeout(WAKE_MAX).build().context("pool.wake_url")?;
        Ok(Self { client, url: parsed })
    }
}

impl Wake for Post {
    fn wake(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let host = self.url.host_str().unwrap_or_default();
            match self.client.post(self.url.clone()).send().await.and_then(|answer| answer.error_for_status())
            {
                Ok(_) => info!(host, "no model server was there; the hook that wakes one was asked"),
                Err(fault) => {
                    warn!(host, error = %fault.without_url(), "could not ask the hook that wakes a model server")
                }
            }
        })
    }
}
