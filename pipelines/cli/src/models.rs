//! From settings to the model that answers, which is the built-in one, a server, or a pool of them; to the embedder and the reranker.

use crate::{
    config::{Config, pool::Fallback, pool::PoolSettings, served::Served},
    console::{say, wrong},
};
use anyhow::Context as _;
use forebay_calls::{
    Allowed, Api, Model, Pool, Priced, Prices, Retry, Secret, Server, Shared,
    allowance::Allowances,
    batch::Size,
    client::{Parts, joining, tiered},
    pool::{Ended, Endpoint, Http, ModelStatus, Status, Wake, Watch},
    server::{Timeouts, Vllm},
};
use forebay_operator::Clock;
use forebay_operators::{
    Extractive,
    budgets::{Budgets, Unit},
    catalogue::{self, Asks},
    rates::SharedRates,
};
use forebay_plan::{Plan, PlannedStep};
use forebay_stores::{Counters, Rates, counters::Local, key_value, wall_clock};
use forebay_telemetry::pool::{Endpoint as Standing, EndpointModel};
use futures::future::BoxFuture;
use reqwest::Url;
use std::{collections::HashSet, sync::Arc, time::Duration};
use tracing::{info, warn};

/// How old what an endpoint says of itself may be; the pool itself takes it to be full then.
pub const FRESH_MS: u64 = 3_000;

/// How long Redis may take to answer for the limits; who waits for it waits for a model anyway, but not for long.
const LIMITS_MAX: Duration = Duration::from_millis(250);
/// How long waking may take.
const WAKE_MAX: Duration = Duration::from_secs(10);

/// What answers, embeds and scores, and the pools in them.
pub struct Client {
    pub model: Arc<dyn Model>,
    /// With how many numbers its vectors have; absent where nothing embeds texts.
    pub embedder: Option<(Arc<dyn Model>, usize)>,
    /// Absent where nothing scores passages.
    pub reranker: Option<Arc<dyn Model>>,
    /// Each with what it is asked as.
    pools: Vec<(Asks, Arc<Pool>)>,
    /// What tenants may spend, where anybody said so.
    pub budgets: Option<Arc<Budgets>>,
}

impl Client {
    /// The same for a process of these steps. Pools that none of them asks are left alone, and budgets where none asks anything: whoever
    /// keeps them counts as one of those that share the limits, and looks at servers that it sends nothing.
    pub fn used_by(mut self, steps: &[&PlannedStep]) -> Self {
        self.pools.retain(|(asked, _)| steps.iter().any(|step| asks(step).contains(asked)));
        self.budgets = self.budgets.filter(|_| steps.iter().any(|step| !asks(step).is_empty()));
        self
    }

    /// Looks at the endpoints of its pools for as long as the process lives.
    pub fn keep(&self) {
        for (_, pool) in &self.pools {
            let pool = Arc::clone(pool);
            tokio::spawn(async move { pool.keep().await });
        }
    }

    /// How all endpoints stand, for metrics.
    pub fn endpoints(&self) -> impl Fn() -> Vec<Standing> + Send + Sync + 'static {
        let pools = self.pools.clone();
        move || pools.iter().flat_map(|(_, pool)| pool.status()).map(|status| standing(&status)).collect()
    }

    /// How all endpoints stand, as JSON.
    pub fn status(&self) -> impl Fn() -> String + Send + Sync + 'static {
        let pools = self.pools.clone();
        move || {
            let all: Vec<_> = pools.iter().flat_map(|(_, pool)| pool.status()).collect();
            serde_json::to_string(&all).unwrap_or_default()
        }
    }
}

/// How an endpoint stands, as metrics have it. What it said too long ago is not told as if it were so.
fn standing(status: &Status) -> Standing {
    let is_fresh = status.scraped_ms_ago.is_some_and(|ago| ago <= FRESH_MS);
    let Ended { ok, failed, limited, rejected, given_up } = status.ended;
    let model = |model: &ModelStatus| EndpointModel {
        model: model.model.clone(),
        breaker: model.breaker,
        share: model.share,
        limit: model.limit,
    };
    Standing {
        name: status.name.clone(),
        endpoint: status.endpoint.clone(),
        is_ready: status.is_ready,
        in_flight: status.running,
        places: status.outstanding_max,
        tokens: status.tokens,
        ended: vec![
            ("ok", ok),
            ("failed", failed),
            ("limited", limited),
            ("rejected", rejected),
            ("given_up", given_up),
        ],
        waiting: status.waiting.filter(|_| is_fresh),
        kv_used: status.kv_used.filter(|_| is_fresh),
        models: status.models.iter().map(model).collect(),
    }
}

fn asks(step: &PlannedStep) -> Vec<Asks> {
    catalogue::asks(&step.operator, &step.settings)
}

/// Whether what a step asks costs something. The extractive model does not: to ask it again is cheaper than to remember.
pub fn is_paid(config: &Config, step: &PlannedStep) -> bool {
    let is_served = |whom| match whom {
        Asks::Model => !config.served.is_empty(),
        Asks::Embedder => config.embeddings.is_some(),
        Asks::Reranker => config.rerank.is_some(),
    };
    asks(step).into_iter().any(is_served)
}

/// Whether those are named whom steps of this process ask for numbers. One that nobody asks is allowed, as settings may be those of
/// several pipelines, and said aloud; so is an embedder of questions without one of documents.
pub fn check(config: &Config, plan: &Plan, chosen: &[&PlannedStep]) -> anyhow::Result<()> {
    let all = [
        (
            Asks::Embedder,
            config.embeddings.is_some(),
            "lets an embedder make vectors",
            "embeddings.url",
            "embed",
        ),
        (
            Asks::Reranker,
            config.rerank.is_some(),
            "lets a reranker score its passages",
            "rerank.url",
            "rerank",
        ),
    ];
    for (whom, is_named, what, url, setting) in all {
        let ask = |step: &PlannedStep| asks(step).contains(&whom);
        if let Some(step) = chosen.iter().find(|step| !is_named && ask(step)) {
            let variable = format!("FOREBAY_{}", url.replace('.', "_").to_uppercase());
            return Err(wrong(format!(
                "step {:?} {what}, and none is named: give {url} (or {variable}), or leave out its setting {setting:?}",
                step.key
            )));
        }
        if is_named && !plan.steps.iter().any(ask) {
            let name = &plan.name;
            say(format_args!("{url} has no effect: no step of pipeline {name} has the setting {setting:?}"));
        }
    }
    let embed = |operator: &str| {
        let mut steps = plan.steps.iter().filter(|step| step.operator == operator);
        steps.any(|step| asks(step).contains(&Asks::Embedder))
    };
    if embed("retrieve") && !embed("index") {
        say(format_args!(
            "no step of pipeline {} gives documents vectors: questions are embedded, and found is what another pipeline embedded",
            plan.name
        ));
    }
    Ok(())
}

/// What the settings ask for.
pub async fn client(config: &Config) -> anyhow::Result<Client> {
    let mut model: Arc<dyn Model> = Arc::new(Extractive);
    let (mut embedder, mut reranker) = (None, None);
    let is_pooled = config.pool.is_some() || config.embeddings.is_some() || config.rerank.is_some();
    if config.served.is_empty() && !is_pooled {
        return Ok(Client { model, embedder, reranker, pools: Vec::new(), budgets: None });
    }
    let prices = config.prices.read()?.map(Arc::new);
    let budgets = budgets(config, prices.clone()).await?.map(Arc::new);
    let allowances = budgets.clone().map(|budgets| budgets as Arc<dyn Allowances>);
    let shared = match is_pooled {
        true => shared(config).await?,
        false => None,
    };
    let name = config.model.as_deref();
    let (names, pools) = Default::default();
    let mut making = Making { name, prices, allowances, shared, names, pools };
    if !config.served.is_empty() {
        model = making.answering(config)?;
    }
    if let Some(settings) = &config.embeddings {
        let served: Vec<_> = settings.served.iter().collect();
        let pool = making.pool(Asks::Embedder, &served, &settings.pool)?;
        let model = joining(making.parts(&pool, &settings.pool, &[]), Size::default());
        embedder = Some((model, settings.dimensions));
    }
    if let Some(settings) = &config.rerank {
        let served: Vec<_> = settings.served.iter().collect();
        let pool = making.pool(Asks::Reranker, &served, &settings.pool)?;
        reranker = Some(forebay_calls::client(making.parts(&pool, &settings.pool, &[])));
    }
    Ok(Client { model, embedder, reranker, pools: making.pools, budgets })
}

/// What all pools have in common.
struct Making<'c> {
    /// The model to ask for, where a server has no other.
    name: Option<&'c str>,
    prices: Option<Arc<Prices>>,
    allowances: Option<Arc<dyn Allowances>>,
    shared: Option<SharedBy>,
    names: Names,
    /// Those that were made.
    pools: Vec<(Asks, Arc<Pool>)>,
}

impl Making<'_> {
    /// What answers.
    fn answering(&mut self, config: &Config) -> anyhow::Result<Arc<dyn Model>> {
        let Some(settings) = &config.pool else {
            let server = server(&config.served[0], self.name)?;
            let model: Arc<dyn Model> =
                Arc::new(Retry::new(priced(server, self.prices.clone()), Arc::default()));
            return Ok(match &self.allowances {
                Some(allowances) => Arc::new(Allowed::new(model, allowances.clone())),
                None => model,
            });
        };
        // Who stands in takes no other calls.
        let stands_in = |served: &Served| settings.fallbacks.iter().any(|fallback| fallback.is(served));
        let served: Vec<_> = config.served.iter().filter(|served| !stands_in(served)).collect();
        let mut first = Vec::new();
        // Of each tier, or of all where there are none.
        let tiers = config.tiers.as_ref().map_or(vec![None], |tiers| tiers.models.iter().map(Some).collect());
        for tier in tiers {
            let serves = |served: &&&Served| tier.is_none_or(|tier| served.asks_for(self.name) == tier);
            let served: Vec<_> = served.iter().filter(serves).copied().collect();
            first.push(self.pool(Asks::Model, &served, settings)?);
        }
        let mut fallbacks: Vec<Arc<dyn Model>> = Vec::new();
        for fallback in &settings.fallbacks {
            let served = match fallback {
                Fallback::Extractive => {
                    fallbacks.push(Arc::new(Extractive));
                    continue;
                }
                Fallback::Endpoint(_) => config.served.iter().find(|served| fallback.is(served)).cloned(),
                Fallback::Served { model, url } => Some(Served {
                    name: None,
                    url: url.clone(),
                    api: Api::Chat,
                    model: Some(model.clone()),
                    keys: Vec::new(),
                    vllm: Vllm::default(),
                }),
            };
            // Its breaker is its own; it wakes nobody.
            let settings = PoolSettings { starts_cold: false, wake_url: None, ..settings.clone() };
            let served = served.iter().collect::<Vec<_>>();
            fallbacks.push(self.pool(Asks::Model, &served, &settings)?);
        }
        let parts = |pool: &Arc<Pool>| self.parts(pool, settings, &fallbacks);
        Ok(match &config.tiers {
            None => forebay_calls::client(parts(&first[0])),
            Some(tiers) => {
                let named = tiers.models.iter().cloned().zip(first.iter().map(parts));
                tiered(named.collect(), tiers.policy.clone())
            }
        })
    }

    /// What a client of a pool is made of.
    fn parts(&self, pool: &Arc<Pool>, settings: &PoolSettings, fallbacks: &[Arc<dyn Model>]) -> Parts {
        Parts {
            pool: pool.clone(),
            hedging: settings.hedging,
            fallbacks: fallbacks.to_vec(),
            allowances: self.allowances.clone(),
            jitter: Arc::new(rand::random::<f64>),
        }
    }

    fn pool(
        &mut self,
        asked: Asks,
        served: &[&Served],
        settings: &PoolSettings,
    ) -> anyhow::Result<Arc<Pool>> {
        let Self { name, prices, shared, names, .. } = self;
        let endpoint = |served: &&Served| {
            let model = server(served, *name)?;
            let watch: Option<Arc<dyn Watch>> = match served.api {
                // A service in the cloud, without an engine to be looked at.
                Api::Messages => None,
                _ => Some(Arc::new(Http::new(&served.url).map_err(wrong)?)),
            };
            Ok(Endpoint {
                name: names.of(served, &model),
                origin: model.endpoint().to_owned(),
                model: priced(model, prices.clone()),
                caps: settings.caps,
                watch,
                starts_cold: settings.starts_cold,
                shared: shared.as_ref().map(|SharedBy { rates, sharer }| {
                    // Two endpoints at one URL, each with its key, have limits of their own.
                    let endpoint = served.name.clone().unwrap_or_else(|| served.url.clone());
                    let rates = SharedRates::new(Arc::clone(rates), endpoint, sharer.clone());
                    Arc::new(rates) as Arc<dyn Shared>
                }),
            })
        };
        let endpoints: Vec<_> = served.iter().map(endpoint).collect::<anyhow::Result<_>>()?;
        // Endpoints of a pool serve one model, if under several names; the first one's is shown and stands in the cache's key.
        let name = endpoints.first().map(|endpoint| endpoint.model.name().to_owned()).unwrap_or_default();
        let pool = Pool::new(name, endpoints, Arc::new(rand::random::<f64>));
        let pool = Arc::new(match &settings.wake_url {
            Some(url) => pool.woken_by(Arc::new(Post::new(url)?)),
            None => pool,
        });
        self.pools.push((asked, pool.clone()));
        Ok(pool)
    }
}

fn server(served: &Served, name: Option<&str>) -> anyhow::Result<Server> {
    let Some(name) = served.model.as_deref().or(name) else {
        return Err(wrong("a model URL needs a model: add --model NAME (or model.name, or FOREBAY_MODEL)"));
    };
    let keys = served.keys.iter().map(|key| Secret::new(key)).collect();
    let server = Server::new(served.api, &served.url, name, keys, Timeouts::default()).map_err(wrong)?;
    Ok(server.with_vllm(served.vllm))
}

/// What tenants may spend, where anybody said so: counted in Redis where the key-value store is there, else by this process.
async fn budgets(config: &Config, prices: Option<Arc<Prices>>) -> anyhow::Result<Option<Budgets>> {
    if config.budgets.is_empty() {
        return Ok(None);
    }
    if prices.is_none() && config.budgets.iter().any(|budget| budget.unit == Unit::Money) {
        return Err(wrong("a budget of money needs to know what models cost; name a table by prices"));
    }
    let counters = match shared_counters(config).await? {
        Some(counters) => counters,
        None => Arc::new(Local::new(wall_clock())),
    };
    let owner = format!("{:016x}", rand::random::<u64>());
    Ok(Some(Budgets::new(config.budgets.clone(), prices, counters, Clock::System, owner)))
}

/// Where processes count together what is spent; none where each counts for itself.
pub async fn shared_counters(config: &Config) -> anyhow::Result<Option<Arc<dyn Counters>>> {
    let Some(url) = &config.key_value else { return Ok(None) };
    let prefix = format!("forebay:budgets:{}", config.topic_prefix);
    let options = key_value::RedisOptions { prefix, ..key_value::RedisOptions::default() };
    Ok(Some(Arc::new(key_value::Redis::connect(url, options).await.context("stores.key_value")?)))
}

/// What keeps the limits for all processes, and what this one is called there; none where no Redis is named.
struct SharedBy {
    rates: Arc<dyn Rates>,
    sharer: String,
}

async fn shared(config: &Config) -> anyhow::Result<Option<SharedBy>> {
    let Some(url) = &config.key_value else { return Ok(None) };
    let prefix = format!("forebay:limits:{}", config.topic_prefix);
    let options = key_value::RedisOptions { prefix, response_timeout: LIMITS_MAX, ..Default::default() };
    let rates = Arc::new(key_value::Redis::connect(url, options).await.context("stores.key_value")?);
    Ok(Some(SharedBy { rates, sharer: format!("{:016x}", rand::random::<u64>()) }))
}

/// The same with a cost on each try, where anybody said what it is.
fn priced(server: Server, prices: Option<Arc<Prices>>) -> Arc<dyn Model> {
    match prices {
        Some(prices) => Arc::new(Priced::new(Arc::new(server), prices)),
        None => Arc::new(server),
    }
}

/// What endpoints are called: by their names in the settings, else by their models, with a number where another at the same
/// origin is called so.
#[derive(Default)]
struct Names(HashSet<(String, String)>);

impl Names {
    fn of(&mut self, served: &Served, model: &Server) -> String {
        let base = served.name.as_deref().unwrap_or_else(|| model.name());
        let numbered = (2_usize..).map(|number| format!("{base}-{number}"));
        let mut names = std::iter::once(base.to_owned()).chain(numbered);
        let is_free = |name: &String| self.0.insert((model.endpoint().to_owned(), name.clone()));
        names.find(is_free).unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::PipelineArg;

    #[tokio::test]
    async fn endpoints_at_one_origin_are_told_apart() {
        let yaml = "
model: {name: mini, url: 'http://h:1/a/v1,http://h:1/b/v1,http://i:1/v1'}
pool:
  fallback: large@http://h:1/v1,extractive
  endpoints:
    first: {url: 'http://h:1/v1', model: mini}
    second: {url: 'http://h:1/v1', model: mini}
";
        let config = crate::config::merge(Some(("forebay.yaml", yaml)), |_| None, &[]).unwrap();
        let client = client(&config).await.unwrap();
        let standing = client.endpoints()();
        let names: Vec<_> = standing.iter().map(|one| format!("{} {}", one.endpoint, one.name)).collect();
        let expected = ["h:1 mini", "h:1 mini-2", "i:1 mini", "h:1 first", "h:1 second", "h:1 large"];
        assert_eq!(names, expected.map(|name| format!("http://{name}")));
        let page: Vec<serde_json::Value> = serde_json::from_str(&client.status()()).unwrap();
        assert_eq!((page.len(), page[3]["name"].as_str()), (6, Some("first")));
    }

    fn settings(yaml: &str) -> Config {
        crate::config::merge(Some(("forebay.yaml", yaml)), |_| None, &[]).unwrap()
    }

    /// The shipped pipeline, whose documents and questions are embedded and whose passages a reranker scores.
    fn asking_all() -> Plan {
        asking("{limit: 8, rerank: 32, embed: true}", "{embed: true}")
    }

    fn asking(retrieve: &str, index: &str) -> Plan {
        let (file, text) = crate::shipped::pipeline("answer").unwrap();
        let index = format!("order: key\n    settings: {index}");
        let text = text.replace("{limit: 8}", retrieve).replace("order: key", &index);
        forebay_plan::plan(file, &text, &crate::build::Shipped).unwrap_or_else(|faults| panic!("{faults}"))
    }

    const ALL: &str = "
model: {name: m, url: 'http://h:1/v1'}
pool: {outstanding: 2}
rerank: {model: r, url: 'http://h:2/v1', outstanding: 3}
embeddings: {model: e, url: 'http://h:3/v1', outstanding: 4, dimensions: 5}
";

    #[tokio::test]
    async fn a_process_keeps_the_pools_that_its_steps_ask() {
        let config = settings(ALL);
        let plan = asking_all();
        let steps: Vec<&PlannedStep> = plan.steps.iter().collect();
        let kept = async |steps: &[&PlannedStep]| {
            let standing = client(&config).await.unwrap().used_by(steps).endpoints()();
            standing
                .iter()
                .map(|one| format!("{} of {}", one.places, one.name))
                .collect::<Vec<_>>()
                .join(", ")
        };
        assert_eq!(kept(&steps).await, "2 of m, 4 of e, 3 of r");
        for step in steps {
            let expected = match step.operator.as_str() {
                "infer" => "2 of m",
                "retrieve" => "4 of e, 3 of r",
                "index" => "4 of e",
                _ => "",
            };
            assert_eq!(kept(&[step]).await, expected, "{}", step.key);
            assert_eq!(is_paid(&config, step), !expected.is_empty(), "{}", step.key);
        }
        let usual = crate::build::plan(&PipelineArg { pipeline: "answer".to_owned() }).unwrap();
        let steps: Vec<&PlannedStep> = usual.steps.iter().collect();
        assert_eq!(kept(&steps).await, "2 of m", "nobody asks the others");
        assert!(
            !steps.iter().any(|step| is_paid(&settings("data: d"), step)),
            "the extractive model costs 0"
        );
    }

    #[test]
    fn whoever_is_asked_for_numbers_must_be_named() {
        let unnamed = settings("model: {name: m, url: 'http://h:1/v1'}");
        for (plan, step, expected) in [
            (
                asking("{rerank: 32}", "{}"),
                "retrieve",
                "lets a reranker score its passages, and none is named: give rerank.url",
            ),
            (
                asking("{embed: true}", "{}"),
                "retrieve",
                "lets an embedder make vectors, and none is named: give embeddings.url",
            ),
            (
                asking("{}", "{embed: true}"),
                "index",
                "(or FOREBAY_EMBEDDINGS_URL), or leave out its setting \"embed\"",
            ),
        ] {
            let of = |operator| plan.steps.iter().find(|step| step.operator == operator).unwrap();
            let fault = check(&unnamed, &plan, &[of("infer"), of(step)]).unwrap_err().to_string();
            assert!(fault.starts_with(&format!("step {step:?} ")) && fault.contains(expected), "{fault}");
            assert!(check(&unnamed, &plan, &[of("infer")]).is_ok(), "it runs elsewhere");
            assert!(check(&settings(ALL), &plan, &[of(step)]).is_ok());
        }
    }
}
