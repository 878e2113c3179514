//! The settings of a process: defaults, then the file, then the environment, then flags.
//!
//! Every setting stands once in [`SETTINGS`], with its default and meaning; what a file or an environment may say
//! comes from there, and so does what `config print` shows.
//!
//! Invariant: a secret is never shown and never comes by a flag, since others see a process's arguments.

pub mod alerts;
pub mod budgets;
pub mod embeddings;
pub mod pool;
pub mod prices;
pub mod registry;
pub mod rerank;
pub mod served;
pub mod tiers;

use crate::{args::Settings, console::wrong};
use anyhow::Context as _;
use forebay_plan::{
    Place,
    leaves::{Leaf, faults_of, hint, leaves},
};
use forebay_runtime::host::kafka::may_be_secret;
use forebay_telemetry::GenAi;
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

/// One setting.
struct Setting {
    /// Its path in the file; dots lead into maps.
    path: &'static str,
    /// The environment variable.
    variable: &'static str,
    /// The value where nobody says otherwise; empty means none.
    default: &'static str,
    secret: bool,
}

const fn setting(path: &'static str, variable: &'static str, default: &'static str) -> Setting {
    Setting { path, variable, default, secret: false }
}

const SETTINGS: &[Setting] = &[
    setting("bootstrap_servers", "FOREBAY_BOOTSTRAP_SERVERS", ""),
    setting("topic_prefix", "FOREBAY_TOPIC_PREFIX", ""),
    setting("data", "FOREBAY_DATA", ".forebay"),
    setting("listen", "FOREBAY_LISTEN", ""),
    setting("admin", "FOREBAY_ADMIN", ""),
    setting("partitions", "FOREBAY_PARTITIONS", "12"),
    setting("model.url", "FOREBAY_MODEL_URL", ""),
    setting("model.name", "FOREBAY_MODEL", ""),
    setting("model.api", "FOREBAY_MODEL_API", "openai"),
    setting("model.vllm", "FOREBAY_MODEL_VLLM", ""),
    setting("model.key_file", "FOREBAY_MODEL_API_KEY_FILE", ""),
    Setting { path: "model.key", variable: "FOREBAY_MODEL_API_KEY", default: "", secret: true },
    setting("embeddings.url", "FOREBAY_EMBEDDINGS_URL", ""),
    setting("embeddings.model", "FOREBAY_EMBEDDINGS_MODEL", ""),
    setting("embeddings.dimensions", "FOREBAY_EMBEDDINGS_DIMENSIONS", ""),
    setting("embeddings.outstanding", "FOREBAY_EMBEDDINGS_OUTSTANDING", "64"),
    setting("embeddings.key_file", "FOREBAY_EMBEDDINGS_API_KEY_FILE", ""),
    Setting { path: "embeddings.key", variable: "FOREBAY_EMBEDDINGS_API_KEY", default: "", secret: true },
    setting("rerank.url", "FOREBAY_RERANK_URL", ""),
    setting("rerank.model", "FOREBAY_RERANK_MODEL", ""),
    setting("rerank.api", "FOREBAY_RERANK_API", "cohere"),
    setting("rerank.outstanding", "FOREBAY_RERANK_OUTSTANDING", "64"),
    setting("rerank.key_file", "FOREBAY_RERANK_API_KEY_FILE", ""),
    Setting { path: "rerank.key", variable: "FOREBAY_RERANK_API_KEY", default: "", secret: true },
    setting("pool.outstanding", "FOREBAY_POOL_OUTSTANDING", "64"),
    setting("pool.requests_per_minute", "FOREBAY_POOL_REQUESTS_PER_MINUTE", ""),
    setting("pool.tokens_per_minute", "FOREBAY_POOL_TOKENS_PER_MINUTE", ""),
    setting("pool.hedge", "FOREBAY_POOL_HEDGE", "off"),
    setting("pool.fallback", "FOREBAY_POOL_FALLBACK", ""),
    setting("pool.starts_cold", "FOREBAY_POOL_STARTS_COLD", "false"),
    setting("pool.wake_url", "FOREBAY_POOL_WAKE_URL", ""),
    setting("tiers.models", "FOREBAY_TIERS_MODELS", ""),
    setting("tiers.rules", "FOREBAY_TIERS_RULES", ""),
    setting("tiers.classifier", "FOREBAY_TIERS_CLASSIFIER", ""),
    setting("tiers.escalate", "FOREBAY_TIERS_ESCALATE", "schema,refusal,verdict"),
    setting("prices", "FOREBAY_PRICES", ""),
    setting("budgets", "FOREBAY_BUDGETS", ""),
    setting("alerts.rate", "FOREBAY_ALERTS_RATE", ""),
    setting("alerts.ewma", "FOREBAY_ALERTS_EWMA", "5"),
    setting("alerts.floor", "FOREBAY_ALERTS_FLOOR", "0.1 USD/minute"),
    setting("alerts.forecast", "FOREBAY_ALERTS_FORECAST", "on"),
    setting("alerts.cap", "FOREBAY_ALERTS_CAP", "80%,100%"),
    setting("alerts.webhook", "FOREBAY_ALERTS_WEBHOOK", ""),
    setting("alerts.webhook_key_file", "FOREBAY_ALERTS_WEBHOOK_KEY_FILE", ""),
    Setting { path: "alerts.webhook_key", variable: "FOREBAY_ALERTS_WEBHOOK_KEY", default: "", secret: true },
    setting("stores.key_value", "FOREBAY_STORES_KEY_VALUE", ""),
    setting("avro.framing", "FOREBAY_AVRO_FRAMING", "single_object"),
    setting("avro.schema_registry", "FOREBAY_AVRO_SCHEMA_REGISTRY", ""),
    setting("avro.schema_registry_user_file", "FOREBAY_AVRO_SCHEMA_REGISTRY_USER_FILE", ""),
    Setting {
        path: "avro.schema_registry_user",
        variable: "FOREBAY_AVRO_SCHEMA_REGISTRY_USER",
        default: "",
        secret: true,
    },
    setting("memory.records", "FOREBAY_MEMORY_RECORDS", "256MiB"),
    setting("claims.over", "FOREBAY_CLAIMS_OVER", "256KiB"),
    setting("tables", "FOREBAY_TABLES", ""),
    setting("sink.flush_every", "FOREBAY_SINK_FLUSH_EVERY", "60s"),
    setting("sink.flush_bytes", "FOREBAY_SINK_FLUSH_BYTES", "128MiB"),
    setting("otlp_endpoint", "FOREBAY_OTLP_ENDPOINT", ""),
    // The variable is OpenTelemetry's own: whoever sets it for all services means this one too.
    setting("otel.semconv_stability_opt_in", "OTEL_SEMCONV_STABILITY_OPT_IN", ""),
];

/// librdkafka's properties stand below this path, and are not listed one by one.
const KAFKA: &str = "kafka.";

/// What `forebay up` takes where nobody says otherwise.
pub const LISTEN_DEFAULT: &str = "127.0.0.1:9092";
/// The port that OpenTelemetry's Prometheus exporters use.
pub const ADMIN_DEFAULT: &str = "127.0.0.1:9464";

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sourced {
    pub value: String,
    pub from: String,
}

/// The settings of a process.
#[derive(Clone)]
pub struct Config {
    values: BTreeMap<String, Sourced>,
    pub bootstrap_servers: Option<String>,
    pub topic_prefix: String,
    pub data: PathBuf,
    pub listen: Option<String>,
    pub admin: Option<String>,
    pub partitions: i32,
    /// The servers of models; none where the built-in one answers.
    pub served: Vec<served::Served>,
    /// The model to ask for, where a server has no other.
    pub model: Option<String>,
    /// Absent where one endpoint is called as it is.
    pub pool: Option<pool::PoolSettings>,
    /// Which models of the pool answer what; absent where all serve one.
    pub tiers: Option<tiers::TierSettings>,
    /// What embeds texts; absent where nothing does.
    pub embeddings: Option<embeddings::EmbeddingsSettings>,
    /// What scores passages; absent where nothing does.
    pub rerank: Option<rerank::RerankSettings>,
    /// What models cost.
    pub prices: prices::PriceFiles,
    /// What tenants may spend.
    pub budgets: Vec<forebay_operators::budgets::Budget>,
    /// What is told of what they spend, and where.
    pub alerts: alerts::AlertSettings,
    pub key_value: Option<String>,
    /// The schema registry beside Kafka, and whether rows are written with its numbers.
    pub registry: Option<forebay_runtime::host::kafka::RegistrySettings>,
    pub memory_bytes: usize,
    /// Bodies of more bytes go to the object store; none where all stay in their messages.
    pub claims_over: Option<usize>,
    /// Where the tables of the output log lie; in the data folder where nobody says.
    pub tables: Option<String>,
    /// How long a row may wait for its table.
    pub sink_flush: Duration,
    /// Whether nobody said how long.
    pub sink_flush_is_default: bool,
    /// Bytes of rows that may wait for all tables together.
    pub sink_bytes: usize,
    pub otlp_endpoint: Option<String>,
    /// What calls of models are told under.
    pub gen_ai: GenAi,
    pub kafka: BTreeMap<String, String>,
}

/// Reads the settings of this process.
pub fn load(settings: &Settings) -> anyhow::Result<Config> {
    let file = settings.config.clone().or_else(|| std::env::var_os("FOREBAY_CONFIG").map(PathBuf::from));
    let file = match file {
        Some(path) => {
            let name = path.display().to_string();
            let text = std::fs::read_to_string(&path)
                .map_err(|fault| wrong(format!("could not read configuration file {name}: {fault}")))?;
            Some((name, text))
        }
        None => None,
    };
    let file = file.as_ref().map(|(name, text)| (name.as_str(), text.as_str()));
    merge(file, |variable| std::env::var(variable).ok(), &flags(settings))
}

fn flags(settings: &Settings) -> Vec<(&'static str, String)> {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let given = [
        ("bootstrap_servers", settings.bootstrap_servers.clone()),
        ("topic_prefix", settings.topic_prefix.clone()),
        ("data", path(&settings.data)),
        ("listen", settings.listen.clone()),
        ("admin", settings.admin.clone()),
        ("tables", settings.tables.clone()),
        ("partitions", settings.partitions.clone()),
        ("model.url", (!settings.model_url.is_empty()).then(|| settings.model_url.join(","))),
        ("model.name", settings.model.clone()),
        ("otlp_endpoint", settings.otlp_endpoint.clone()),
    ];
    given.into_iter().filter_map(|(path, value)| Some((path, value?))).collect()
}

pub fn merge(
    file: Option<(&str, &str)>,
    variable: impl Fn(&str) -> Option<String>,
    flags: &[(&'static str, String)],
) -> anyhow::Result<Config> {
    let mut values = BTreeMap::new();
    let mut set = |path: &str, value: &str, from: String| {
        values.insert(path.to_owned(), Sourced { value: value.to_owned(), from });
    };
    for setting in SETTINGS {
        set(setting.path, setting.default, "default".to_owned());
    }
    if let Some((name, text)) = file {
        for Leaf { path, place, value } in read(name, text)? {
            set(&path, &value, format!("{name}:{}", place.line));
        }
    }
    for setting in SETTINGS {
        if let Some(value) = variable(setting.variable) {
            set(setting.path, &value, setting.variable.to_owned());
        }
    }
    for (path, value) in flags {
        set(path, value, format!("--{}", flag_of(path)));
    }
    Config::of(values)
}

fn flag_of(path: &str) -> String {
    match path {
        "model.name" => "model".to_owned(),
        path => path.replace(['.', '_'], "-"),
    }
}

/// The leaves of a configuration file; all its faults at once.
fn read(name: &str, text: &str) -> anyhow::Result<Vec<Leaf>> {
    let found = leaves(name, text).map_err(wrong)?;
    let mut faults: Vec<(Place, String)> = Vec::new();
    for leaf in &found {
        let known = SETTINGS.iter().filter(|setting| !setting.secret).map(|setting| setting.path);
        if SETTINGS.iter().any(|setting| setting.secret && setting.path == leaf.path) {
            let message = format!(
                "a key does not stand in a configuration file; name a file of its own by {}_file",
                leaf.path
            );
            faults.push((leaf.place, message));
        } else if let Some(endpoint) = leaf.path.strip_prefix(served::ENDPOINTS) {
            let (name, field) = endpoint.rsplit_once('.').unwrap_or((endpoint, ""));
            if field == "key" {
                let message = format!(
                    "a key does not stand in a configuration file; name a file of its own by {}{name}.key_file",
                    served::ENDPOINTS
                );
                faults.push((leaf.place, message));
            } else if !served::FIELDS.contains(&field) {
                let hint = hint(field, served::FIELDS).map(|hint| format!("; {hint}")).unwrap_or_default();
                faults.push((leaf.place, format!("unknown key {field:?} of endpoint {name:?}{hint}")));
            }
        } else if !leaf.path.starts_with(KAFKA) && !known.clone().any(|path| path == leaf.path) {
            let hint = hint(&leaf.path, known).map(|hint| format!("; {hint}")).unwrap_or_default();
            faults.push((leaf.place, format!("unknown key {:?}{hint}", leaf.path)));
        }
    }
    match faults.is_empty() {
        true => Ok(found),
        false => Err(wrong(faults_of(name, faults))),
    }
}

impl Config {
    fn of(values: BTreeMap<String, Sourced>) -> anyhow::Result<Self> {
        let get = |path: &str| {
            values.get(path).map(|sourced| sourced.value.as_str()).filter(|value| !value.is_empty())
        };
        let text = |path: &str| get(path).map(str::to_owned);
        let from = |path: &str| values.get(path).map(|sourced| sourced.from.as_str()).unwrap_or_default();
        let partitions = text("partitions").unwrap_or_default();
        let partitions: i32 =
            partitions.parse().ok().filter(|n| (1..=10_000).contains(n)).ok_or_else(|| {
                wrong(format!(
                    "partitions is {partitions:?} (from {}); it may be 1 to 10000",
                    from("partitions")
                ))
            })?;
        let memory = text("memory.records").unwrap_or_default();
        let memory_bytes = bytes(&memory).ok_or_else(|| {
            wrong(format!(
                "memory.records is {memory:?} (from {}); write a size with its unit, such as 256MiB",
                from("memory.records")
            ))
        })?;
        let claims = text("claims.over").unwrap_or_default();
        let claims_over = match claims.as_str() {
            "off" => None,
            size => Some(bytes(size).ok_or_else(|| {
                wrong(format!(
                    "claims.over is {claims:?} (from {}); write a size with its unit, such as 256KiB, or off",
                    from("claims.over")
                ))
            })?),
        };
        let flush = text("sink.flush_every").unwrap_or_default();
        let flush_range = Duration::from_millis(100)..=Duration::from_secs(3_600);
        let sink_flush = humantime::parse_duration(&flush).ok().filter(|flush| flush_range.contains(flush));
        let sink_flush = sink_flush.ok_or_else(|| {
            wrong(format!(
                "sink.flush_every is {flush:?} (from {}); write 100ms to 1h, such as 60s",
                from("sink.flush_every")
            ))
        })?;
        let waiting = text("sink.flush_bytes").unwrap_or_default();
        let sink_bytes =
            bytes(&waiting).filter(|bytes| (1 << 20..=1_usize << 30).contains(bytes)).ok_or_else(|| {
                wrong(format!(
                    "sink.flush_bytes is {waiting:?} (from {}); write 1MiB to 1GiB, such as 128MiB",
                    from("sink.flush_bytes")
                ))
            })?;
        let served = served::Served::all(&values)?;
        let pool = pool::PoolSettings::of(&values, &served)?;
        let tiers = tiers::TierSettings::of(&values, &served, get("model.name"), pool.as_ref())?;
        let embeddings = embeddings::EmbeddingsSettings::of(&values)?;
        let rerank = rerank::RerankSettings::of(&values)?;
        let kafka = values.iter().filter_map(|(path, sourced)| {
            Some((path.strip_prefix(KAFKA)?.to_owned(), sourced.value.clone()))
        });
        let budgets = budgets::of(&text("budgets").unwrap_or_default(), from("budgets"))?;
        let prefix = text("topic_prefix").unwrap_or_default();
        let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !prefix.chars().all(legal) || prefix.len() > forebay_plan::PREFIX_CHARS_MAX {
            return Err(wrong(format!(
                "topic_prefix is {prefix:?} (from {}); it may have up to {} of the characters a–z A–Z 0–9 . _ -",
                from("topic_prefix"),
                forebay_plan::PREFIX_CHARS_MAX
            )));
        }
        Ok(Self {
            bootstrap_servers: text("bootstrap_servers"),
            topic_prefix: prefix,
            data: PathBuf::from(text("data").unwrap_or_default()),
            listen: text("listen"),
            admin: text("admin"),
            partitions,
            served,
            model: text("model.name"),
            pool,
            tiers,
            embeddings,
            rerank,
            prices: prices::PriceFiles::of(&text("prices").unwrap_or_default()),
            alerts: alerts::AlertSettings::of(&values, !budgets.is_empty())?,
            budgets,
            key_value: text("stores.key_value"),
            registry: registry::of(&values)?,
            memory_bytes,
            claims_over,
            tables: text("tables"),
            sink_flush,
            sink_flush_is_default: from("sink.flush_every") == "default",
            sink_bytes,
            otlp_endpoint: text("otlp_endpoint"),
            gen_ai: GenAi::opted_in(get("otel.semconv_stability_opt_in").unwrap_or_default()),
            kafka: kafka.collect(),
            values,
        })
    }

    /// The full name of a topic.
    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.topic_prefix)
    }

    /// Each setting with its value and where it came from, secrets hidden.
    pub fn shown(&self) -> Vec<(String, Sourced)> {
        let hide = |path: &str| {
            // Which mechanism and which user are no secrets.
            let open = ["kafka.sasl.mechanism", "kafka.sasl.mechanisms", "kafka.sasl.username"];
            SETTINGS.iter().any(|setting| setting.path == path && setting.secret)
                || path.strip_prefix(KAFKA).is_some_and(may_be_secret) && !open.contains(&path)
        };
        let show = |(path, sourced): (&String, &Sourced)| {
            let mut sourced = sourced.clone();
            // Whoever knows the path of a webhook may often post there.
            if !sourced.value.is_empty() && (hide(path) || path == alerts::WEBHOOK) {
                sourced.value = "(hidden)".to_owned();
            } else {
                sourced.value = without_password(&sourced.value);
            }
            (path.clone(), sourced)
        };
        self.values.iter().map(show).collect()
    }
}

/// What a setting says; nothing where it says nothing.
fn text<'a>(values: &'a BTreeMap<String, Sourced>, path: &str) -> &'a str {
    values.get(path).map(|sourced| sourced.value.as_str()).unwrap_or_default()
}

/// Where it is said.
fn from<'a>(values: &'a BTreeMap<String, Sourced>, path: &str) -> &'a str {
    values.get(path).map(|sourced| sourced.from.as_str()).unwrap_or_default()
}

/// What a setting says, read as one of what is expected.
fn one_of<T>(
    values: &BTreeMap<String, Sourced>,
    path: &str,
    expected: &str,
    read: impl Fn(&str) -> Option<T>,
) -> anyhow::Result<T> {
    let value = text(values, path);
    read(value).ok_or_else(|| {
        wrong(format!(
            "{path} is {:?} (from {}); it may be {expected}",
            without_password(value),
            from(values, path)
        ))
    })
}

/// A URL without what may be secret in it: user and password, and the query. Anything else as it is.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, _)| (rest, "?(hidden)"));
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://(hidden)@{host}{query}"),
        None => format!("{scheme}://{rest}{query}"),
    }
}

/// A size with its unit.
fn bytes(text: &str) -> Option<usize> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: usize = match unit.trim() {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(unit).filter(|&bytes| bytes > 0)
}

/// The address of a setting, such as `listen`.
pub fn address(what: &str, text: &str) -> anyhow::Result<std::net::SocketAddr> {
    let parsed = text.parse().ok().or_else(|| {
        use std::net::ToSocketAddrs as _;
        text.to_socket_addrs().ok()?.next()
    });
    parsed
        .ok_or_else(|| wrong(format!("{what} is {text:?}; an address looks like 127.0.0.1:9092")))
        .context("settings")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(
        file: &str,
        environment: &[(&str, &str)],
        flags: &[(&'static str, &str)],
    ) -> anyhow::Result<Config> {
        let variable = |name: &str| {
            environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        let flags: Vec<_> = flags.iter().map(|(path, value)| (*path, (*value).to_owned())).collect();
        merge(Some(("f.yaml", file)), variable, &flags)
    }

    fn refused(file: &str) -> String {
        merged(file, &[], &[]).err().expect(file).to_string()
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = "data: from-file\ntopic_prefix: from-file-\npartitions: 3\n";
        let config =
            merged(file, &[("FOREBAY_DATA", "env"), ("FOREBAY_PARTITIONS", "4")], &[("data", "flag")]);
        let config = config.unwrap();
        assert_eq!(config.data, PathBuf::from("flag"));
        assert_eq!(config.partitions, 4);
        assert_eq!(config.topic_prefix, "from-file-");
        let from: BTreeMap<_, _> =
            config.shown().into_iter().map(|(path, sourced)| (path, sourced.from)).collect();
        assert_eq!(from["data"], "--data");
        assert_eq!(from["partitions"], "FOREBAY_PARTITIONS");
        assert_eq!(from["topic_prefix"], "f.yaml:2");
        assert_eq!(from["listen"], "default");
    }

    #[test]
    fn secrets_are_not_shown() {
        let file = "kafka: {sasl.password: canary, ssl.key.password: canary}\notlp_endpoint: 'http://u:canary@h'\n\
                    stores: {key_value: 'redis://:canary@h:1?password=canary'}\nbudgets: '* 9 tokens/day'\n\
                    alerts: {webhook: 'https://hooks.example.com/canary'}\nrerank: {url: 'http://h/v1', model: m}\n\
                    embeddings: {url: 'http://h/v1', model: m, dimensions: 3}\n";
        let variables = [
            ("FOREBAY_MODEL_API_KEY", "canary"),
            ("FOREBAY_EMBEDDINGS_API_KEY", "canary"),
            ("FOREBAY_RERANK_API_KEY", "canary"),
            ("FOREBAY_ALERTS_WEBHOOK_KEY", "canary"),
        ];
        let config = merged(file, &variables, &[]).unwrap();
        assert!(!format!("{:?}", config.shown()).contains("canary"));
        assert_eq!(config.kafka["sasl.password"], "canary");
    }

    #[test]
    fn what_is_wrong_has_a_place_and_a_hint() {
        assert!(
            refused("data: x\ntopic_prefx: y\n")
                .contains("f.yaml:2:1: unknown key \"topic_prefx\"; did you mean \"topic_prefix\"?")
        );
        assert!(refused("model: {key: abc}").contains("model.key_file"));
        assert!(refused("embeddings: {key: abc}").contains("embeddings.key_file"));
        assert!(refused("embeddings: {dimension: 3}").contains("did you mean \"embeddings.dimensions\"?"));
        assert!(refused("rerank: {key: abc}").contains("rerank.key_file"));
        assert!(refused("alerts: {webhook_key: abc}").contains("alerts.webhook_key_file"));
        assert!(refused("alerts: {forecat: off}").contains("did you mean \"alerts.forecast\"?"));
        assert!(refused("partitions: none").contains("1 to 10000"));
        assert!(refused("memory: {records: 12}").contains("256MiB"));
        assert!(refused("claims: {over: never}").contains("or off"));
        assert!(refused("sink: {flush_every: 2h}").contains("100ms to 1h"));
        assert!(refused("sink: {flush_bytes: 1KiB}").contains("1MiB to 1GiB"));
        assert!(refused("sink: {flush_bytes: 2GiB}").contains("1MiB to 1GiB"));
        assert!(refused("model: {url: 'http://h'}").contains("/v1"));
        assert!(refused("model: {url: ['http://a/v1', 'http://b']}").contains("\"http://b\""));
        assert!(
            refused("pool: {endpoints: {b: {url: 'http://b/v1', apy: x}}}")
                .contains("unknown key \"apy\" of endpoint \"b\"; did you mean \"api\"?")
        );
        assert!(refused("pool: {endpoints: {b: {key: abc}}}").contains("pool.endpoints.b.key_file"));
        assert!(refused("pool: {hedg: usual}").contains("did you mean \"pool.hedge\"?"));
    }
}
