//! What a process of tables or SQL is told: where Kafka is, where the tables lie.
//!
//! `forebay sink|sql|report` resolves its own settings (file, environment, flags) and hands them down as JSON in
//! the environment, so that there is one place where settings are read and no secret in a command line. Started by itself,
//! the binary reads the few variables that `forebay` reads too.
//!
//! Invariant: every bound has its default here.

use forebay_runtime::host::kafka::{KafkaSettings, RegistrySettings};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};
use url::Url;

/// The environment variable that holds the settings, as JSON.
pub const VARIABLE: &str = "FOREBAY_SQL_SETTINGS";

/// The settings, as they are handed down.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `host:port`, joined by commas; null where there is no Kafka, and then there are tables only.
    #[serde(default)]
    pub bootstrap_servers: Option<String>,
    /// librdkafka's properties; they may hold secrets.
    #[serde(default)]
    pub kafka: BTreeMap<String, String>,
    /// The schema registry beside it, which says what rows with Confluent's framing are.
    #[serde(default)]
    pub schema_registry: Option<RegistrySettings>,
    /// Goes before the name of every topic and consumer group.
    #[serde(default)]
    pub topic_prefix: String,
    /// Where local data lies.
    #[serde(default = "data")]
    pub data: PathBuf,
    /// Where the tables lie: a URL (`s3://…`, `file://…`) or a folder; `{data}/tables` when absent.
    #[serde(default)]
    pub tables: Option<String>,
    /// What the object store of the tables is told, under the names of object_store (`aws_endpoint`, …); may hold secrets.
    #[serde(default)]
    pub tables_options: BTreeMap<String, String>,
    /// Where metrics and health are served; a free port when absent.
    #[serde(default)]
    pub admin: Option<String>,
    /// Where traces and metrics are sent by OTLP over HTTP.
    #[serde(default)]
    pub otlp_endpoint: Option<String>,
    /// The consumer group of the sink; `{topic_prefix}sink` when absent. Sinks of two groups each read everything, and still no
    /// row is in a table twice.
    #[serde(default)]
    pub group: Option<String>,
    /// How long a row may wait for its table.
    #[serde(default = "flush_ms")]
    pub flush_ms: u64,
    /// How many bytes of rows may wait for all tables together.
    #[serde(default = "flush_bytes")]
    pub flush_bytes: usize,
    /// How often small files are joined and old days forgotten.
    #[serde(default = "compact_ms")]
    pub compact_ms: u64,
}

/// As much may wait at most: texts of a column are numbered by their bytes, up to 2 GiB, and what is being read comes on top.
const FLUSH_BYTES_MAX: usize = 1 << 30;

fn data() -> PathBuf {
    PathBuf::from(".forebay")
}

const fn flush_ms() -> u64 {
    60_000
}

const fn flush_bytes() -> usize {
    128 << 20
}

const fn compact_ms() -> u64 {
    300_000
}

/// The properties may hold secrets.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("topic_prefix", &self.topic_prefix)
            .field("data", &self.data)
            .finish_non_exhaustive()
    }
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The variable holds no settings.
    #[error(
        "could not read the settings in {VARIABLE}; start this program by `forebay sink` or `forebay sql`"
    )]
    Json(#[source] serde_json::Error),
    /// A place for tables that is none.
    #[error("tables is {tables:?}; it may be a folder or a URL such as s3://bucket/folder")]
    Tables {
        /// What was said.
        tables: String,
    },
    /// A bound that nothing could keep.
    #[error("{setting} is {value}; it may be {range}")]
    Range {
        /// Which.
        setting: &'static str,
        /// What was said.
        value: u64,
        /// What may be said.
        range: &'static str,
    },
}

impl Settings {
    /// The settings in the environment: those that `forebay` handed down, or else the variables that it reads too.
    pub fn load(variable: impl Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        let settings = match variable(VARIABLE) {
            Some(json) => serde_json::from_str(&json).map_err(SettingsError::Json)?,
            None => {
                let text = |name: &str| variable(name).filter(|value| !value.is_empty());
                Self {
                    bootstrap_servers: text("FOREBAY_BOOTSTRAP_SERVERS"),
                    topic_prefix: text("FOREBAY_TOPIC_PREFIX").unwrap_or_default(),
                    data: text("FOREBAY_DATA").map_or_else(data, PathBuf::from),
                    tables: text("FOREBAY_TABLES"),
                    admin: text("FOREBAY_ADMIN"),
                    otlp_endpoint: text("FOREBAY_OTLP_ENDPOINT"),
                    kafka: BTreeMap::new(),
                    schema_registry: text("FOREBAY_AVRO_SCHEMA_REGISTRY").map(|url| RegistrySettings {
                        url,
                        user: text("FOREBAY_AVRO_SCHEMA_REGISTRY_USER"),
                        is_written: false,
                    }),
                    tables_options: BTreeMap::new(),
                    group: None,
                    flush_ms: flush_ms(),
                    flush_bytes: flush_bytes(),
                    compact_ms: compact_ms(),
                }
            }
        };
        let settings: Self = settings;
        if !(100..=3_600_000).contains(&settings.flush_ms) {
            let (setting, range) = ("flush_ms", "100 to 3600000");
            return Err(SettingsError::Range { setting, value: settings.flush_ms, range });
        }
        if !(1_000..=86_400_000).contains(&settings.compact_ms) {
            let (setting, range) = ("compact_ms", "1000 to 86400000");
            return Err(SettingsError::Range { setting, value: settings.compact_ms, range });
        }
        if !((1 << 20)..=FLUSH_BYTES_MAX).contains(&settings.flush_bytes) {
            let (setting, range) = ("flush_bytes", "1 MiB to 1 GiB, as a column holds 2 GiB of text at most");
            return Err(SettingsError::Range { setting, value: settings.flush_bytes as u64, range });
        }
        Ok(settings)
    }

    /// The folder of all tables, as a URL that ends with a slash.
    pub fn tables_url(&self) -> Result<Url, SettingsError> {
        let wrong = || SettingsError::Tables { tables: self.tables.clone().unwrap_or_default() };
        let folder = match &self.tables {
            Some(url) if url.contains("://") => {
                let url = if url.ends_with('/') { url.clone() } else { format!("{url}/") };
                return Url::parse(&url).map_err(|_| wrong());
            }
            Some(folder) => PathBuf::from(folder),
            None => self.data.join("tables"),
        };
        let folder = std::path::absolute(folder).map_err(|_| wrong())?;
        Url::from_directory_path(folder).map_err(|()| wrong())
    }

    /// How Kafka is spoken to; nothing where there is none.
    pub fn kafka(&self) -> Option<KafkaSettings> {
        let bootstrap_servers = self.bootstrap_servers.clone()?;
        let (properties, registry) = (self.kafka.clone(), self.schema_registry.clone());
        Some(KafkaSettings { bootstrap_servers, properties, registry })
    }

    /// The full name of a topic.
    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.topic_prefix)
    }

    /// How often the files of tables are looked after.
    pub const fn compact_every(&self) -> Duration {
        Duration::from_millis(self.compact_ms)
    }

    /// How long a row may wait for its table.
    pub const fn flush_every(&self) -> Duration {
        Duration::from_millis(self.flush_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed_down(json: &str) -> Result<Settings, SettingsError> {
        Settings::load(|name| (name == VARIABLE).then(|| json.to_owned()))
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let settings = handed_down("{}").unwrap();
        assert_eq!((settings.flush_ms, settings.flush_bytes), (60_000, 128 << 20));
        assert!(settings.tables_url().unwrap().as_str().ends_with("/.forebay/tables/"));
        assert!(settings.kafka().is_none());
    }

    /// `forebay` hands over these names; it has a test with them too.
    #[test]
    fn what_is_handed_over_is_read() {
        let settings = handed_down(
            r#"{"bootstrap_servers": "k:9092", "kafka": {"sasl.password": "canary"}, "topic_prefix": "", "data": ".forebay",
                "schema_registry": {"url": "http://r:8081", "user": "ana:canary", "is_written": true},
                "tables": "s3://bucket/log", "admin": null, "otlp_endpoint": null, "flush_ms": 5000, "flush_bytes": 134217728}"#,
        );
        assert_eq!(settings.unwrap().flush_ms, 5_000);
    }

    #[test]
    fn tables_lie_at_a_url_or_in_a_folder() {
        let url = |tables: &str| {
            handed_down(&format!(r#"{{"tables": "{tables}"}}"#)).unwrap().tables_url().map(String::from)
        };
        assert_eq!(url("s3://bucket/log").unwrap(), "s3://bucket/log/");
        assert_eq!(url("/srv/tables").unwrap(), "file:///srv/tables/");
        assert!(url("://x").unwrap_err().to_string().contains("s3://bucket/folder"));
    }

    #[test]
    fn what_is_misspelt_or_out_of_range_is_named() {
        let cause =
            |json: &str| std::error::Error::source(&handed_down(json).unwrap_err()).unwrap().to_string();
        assert!(cause(r#"{"bootstrap_server": "x"}"#).contains("bootstrap_servers"));
        assert!(handed_down(r#"{"flush_ms": 1}"#).unwrap_err().to_string().contains("flush_ms is 1"));
        let much = handed_down(r#"{"flush_bytes": 1073741825}"#).unwrap_err().to_string();
        assert_eq!(
            much,
            "flush_bytes is 1073741825; it may be 1 MiB to 1 GiB, as a column holds 2 GiB of text at most"
        );
        assert!(handed_down(r#"{"flush_bytes": 1073741824}"#).is_ok());
        let secret = handed_down(r#"{"kafka": {"sasl.password": "canary"}}"#).unwrap();
        assert!(!format!("{secret:?}").contains("canary"));
    }
}
