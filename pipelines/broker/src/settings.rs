//! A topic's settings: which names exist, what values they take, what is the default.
//!
//! Invariant: a setting that is not obeyed is not accepted, but for the few in [`IGNORED`], which cannot
//! matter on a single node. The names and defaults are Apache Kafka's.

use std::collections::BTreeMap;

/// Accepted so that a topic made for a cluster can be made here, and without effect on one node.
const IGNORED: &[&str] = &[
    "file.delete.delay.ms",
    "flush.messages",
    "flush.ms",
    "index.interval.bytes",
    "max.compaction.lag.ms",
    "message.downconversion.enable",
    "min.insync.replicas",
    "preallocate",
    "segment.index.bytes",
    "segment.jitter.ms",
    "unclean.leader.election.enable",
];

/// Names of the settings that are obeyed.
const NAMES: &[&str] = &[
    "cleanup.policy",
    "compression.type",
    "delete.retention.ms",
    "max.message.bytes",
    "message.timestamp.type",
    "min.cleanable.dirty.ratio",
    "min.compaction.lag.ms",
    "retention.bytes",
    "retention.ms",
    "segment.bytes",
    "segment.ms",
];

/// The most `max.message.bytes` may be: a batch must fit in a request.
const MESSAGE_BYTES_MAX: u64 = 64 << 20;

/// The settings in the form the log uses.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub delete: bool,
    pub compact: bool,
    /// `None`: without bound.
    pub retention_ms: Option<i64>,
    pub retention_bytes: Option<u64>,
    pub segment_bytes: u64,
    pub segment_ms: i64,
    pub message_bytes_max: u64,
    pub log_append_time: bool,
    pub compaction_lag_ms: i64,
    pub tombstone_ms: i64,
    pub dirty_ratio: f64,
}

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

impl Settings {
    /// Kafka's defaults, with the broker's own segment size.
    pub(crate) fn new(segment_bytes: u64) -> Settings {
        Settings {
            delete: true,
            compact: false,
            retention_ms: Some(7 * DAY_MS),
            retention_bytes: None,
            segment_bytes,
            segment_ms: 7 * DAY_MS,
            message_bytes_max: 1_048_588,
            log_append_time: false,
            compaction_lag_ms: 0,
            tombstone_ms: DAY_MS,
            dirty_ratio: 0.5,
        }
    }

    /// Applies what a client set; the message of an error names the setting and the value.
    pub(crate) fn parse(set: &BTreeMap<String, String>, segment_bytes: u64) -> Result<Settings, String> {
        let mut settings = Settings::new(segment_bytes);
        for (name, value) in set {
            settings.apply(name, value).map_err(|want| format!("{name}={value}: {want}"))?;
        }
        Ok(settings)
    }

    fn apply(&mut self, name: &str, value: &str) -> Result<(), String> {
        let value = value.trim();
        match name {
            "cleanup.policy" => {
                let policies: Vec<&str> = value.split(',').map(str::trim).filter(|p| !p.is_empty()).collect();
                if policies.is_empty() || policies.iter().any(|p| !matches!(*p, "delete" | "compact")) {
                    return Err("want delete, compact or compact,delete".into());
                }
                self.delete = policies.contains(&"delete");
                self.compact = policies.contains(&"compact");
            }
            "compression.type" if value == "producer" => {}
            "compression.type" => return Err("batches are stored as they come; want producer".into()),
            "retention.ms" => self.retention_ms = unbounded(value)?,
            "retention.bytes" => {
                self.retention_bytes = unbounded(value)?.map(|b| u64::try_from(b).unwrap_or(0));
            }
            "segment.bytes" => self.segment_bytes = whole(value, 1024, 1 << 30)?,
            "segment.ms" => self.segment_ms = signed(value, 1)?,
            "max.message.bytes" => self.message_bytes_max = whole(value, 0, MESSAGE_BYTES_MAX)?,
            "message.timestamp.type" => {
                self.log_append_time = match value {
                    "CreateTime" => false,
                    "LogAppendTime" => true,
                    _ => return Err("want CreateTime or LogAppendTime".into()),
                }
            }
            "min.compaction.lag.ms" => self.compaction_lag_ms = signed(value, 0)?,
            "delete.retention.ms" => self.tombstone_ms = signed(value, 0)?,
            "min.cleanable.dirty.ratio" => match value.parse::<f64>() {
                Ok(ratio) if (0.0..=1.0).contains(&ratio) => self.dirty_ratio = ratio,
                _ => return Err("want a number from 0 to 1".into()),
            },
            name if IGNORED.contains(&name) => {}
            _ => return Err("no such setting".into()),
        }
        Ok(())
    }

    fn value(&self, name: &str) -> String {
        let optional = |v: Option<String>| v.unwrap_or_else(|| "-1".into());
        match name {
            "cleanup.policy" => match (self.compact, self.delete) {
                (true, true) => "compact,delete".into(),
                (true, false) => "compact".into(),
                _ => "delete".into(),
            },
            "delete.retention.ms" => self.tombstone_ms.to_string(),
            "max.message.bytes" => self.message_bytes_max.to_string(),
            "message.timestamp.type" => {
                if self.log_append_time {
                    "LogAppendTime".into()
                } else {
                    "CreateTime".into()
                }
            }
            "min.cleanable.dirty.ratio" => self.dirty_ratio.to_string(),
            "min.compaction.lag.ms" => self.compaction_lag_ms.to_string(),
            "retention.bytes" => optional(self.retention_bytes.map(|v| v.to_string())),
            "retention.ms" => optional(self.retention_ms.map(|v| v.to_string())),
            "segment.bytes" => self.segment_bytes.to_string(),
            "segment.ms" => self.segment_ms.to_string(),
            _ => "producer".into(),
        }
    }

    /// Every setting that is obeyed, with its value.
    pub(crate) fn list(&self) -> impl Iterator<Item = (&'static str, String)> + '_ {
        NAMES.iter().map(|name| (*name, self.value(name)))
    }
}

fn signed(value: &str, least: i64) -> Result<i64, String> {
    match value.parse() {
        Ok(n) if n >= least => Ok(n),
        _ => Err(format!("want a whole number of at least {least}")),
    }
}

fn unbounded(value: &str) -> Result<Option<i64>, String> {
    signed(value, -1).map(|n| (n >= 0).then_some(n))
}

fn whole(value: &str, least: u64, most: u64) -> Result<u64, String> {
    match value.parse() {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        _ => Err(format!("want a whole number from {least} to {most}")),
    }
}

/// Whether a setting's name is one of Kafka's booleans, numbers …: the code DescribeConfigs wants.
pub(crate) fn kind(name: &str) -> i8 {
    match name {
        "cleanup.policy" => 7,
        "compression.type" | "message.timestamp.type" => 2,
        "max.message.bytes" | "segment.bytes" => 3,
        "min.cleanable.dirty.ratio" => 6,
        _ => 5,
    }
}

/// Whether a list setting takes APPEND and SUBTRACT in IncrementalAlterConfigs.
pub(crate) fn is_list(name: &str) -> bool {
    name == "cleanup.policy"
}

/// Whether the name is known at all.
pub(crate) fn is_known(name: &str) -> bool {
    NAMES.contains(&name) || IGNORED.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(set: &[(&str, &str)], want: Result<&str, &str>) {
        let set = set.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let got = Settings::parse(&set, 1 << 20).map(|s| s.value("cleanup.policy"));
        assert_eq!(got.as_deref().map_err(String::as_str), want);
    }

    #[test]
    fn a_value_that_would_not_be_obeyed_is_refused_by_name() {
        check(&[("cleanup.policy", "compact, delete")], Ok("compact,delete"));
        check(&[("min.insync.replicas", "2")], Ok("delete"));
        check(
            &[("cleanup.policy", "shred")],
            Err("cleanup.policy=shred: want delete, compact or compact,delete"),
        );
        check(&[("retention.msec", "1")], Err("retention.msec=1: no such setting"));
        check(&[("segment.bytes", "3")], Err("segment.bytes=3: want a whole number from 1024 to 1073741824"));
        check(
            &[("compression.type", "zstd")],
            Err("compression.type=zstd: batches are stored as they come; want producer"),
        );
    }
}
