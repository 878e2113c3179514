//! DescribeConfigs, AlterConfigs, IncrementalAlterConfigs.
//!
//! Invariant: every answer carries a message that is not null and every setting a source that is not 0;
//! librdkafka crashed on the two together.

use super::{NODE, text};
use crate::Fsync;
use crate::settings::{is_known, is_list, kind};
use crate::shared::Shared;
use crate::topics::{Refusal, Topic, unknown};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_configs_response::{
    DescribeConfigsResourceResult, DescribeConfigsResult, DescribeConfigsSynonym,
};
use kafka_protocol::messages::{
    AlterConfigsRequest, AlterConfigsResponse, DescribeConfigsRequest, DescribeConfigsResponse,
    IncrementalAlterConfigsRequest, IncrementalAlterConfigsResponse, alter_configs_response,
    incremental_alter_configs_request, incremental_alter_configs_response,
};
use std::collections::BTreeMap;

const TOPIC: i8 = 2;
const BROKER: i8 = 4;
const SOURCE_TOPIC: i8 = 1;
const SOURCE_STATIC_BROKER: i8 = 4;
const SOURCE_DEFAULT: i8 = 5;

pub(crate) fn describe(shared: &Shared, request: &DescribeConfigsRequest) -> DescribeConfigsResponse {
    let results = request.resources.iter().map(|asked| {
        let result = DescribeConfigsResult::default()
            .with_resource_type(asked.resource_type)
            .with_resource_name(asked.resource_name.clone());
        match describe_one(shared, asked) {
            Ok(mut configs) => {
                if let Some(wanted) = &asked.configuration_keys {
                    configs.retain(|c| wanted.contains(&c.name));
                }
                if !request.include_synonyms {
                    configs.iter_mut().for_each(|c| c.synonyms.clear());
                }
                result.with_error_message(Some(text(""))).with_configs(configs)
            }
            Err((error, message)) => {
                result.with_error_code(error.code()).with_error_message(Some(text(message)))
            }
        }
    });
    DescribeConfigsResponse::default().with_results(results.collect())
}

fn describe_one(
    shared: &Shared,
    asked: &DescribeConfigsResource,
) -> Result<Vec<DescribeConfigsResourceResult>, Refusal> {
    let name = asked.resource_name.as_str();
    match asked.resource_type {
        TOPIC => shared.topics.get(name).map(|t| of_topic(&t)).ok_or_else(|| unknown(name)),
        BROKER if name.is_empty() || name == NODE.to_string() => Ok(of_broker(shared)),
        BROKER => Err((ResponseError::InvalidRequest, format!("broker {name}; the only one is {NODE}"))),
        other => Err((ResponseError::InvalidRequest, format!("resource type {other} has no settings here"))),
    }
}

fn of_topic(topic: &Topic) -> Vec<DescribeConfigsResourceResult> {
    let one = |(name, value): (&'static str, String)| {
        let source = if topic.set.contains_key(name) { SOURCE_TOPIC } else { SOURCE_DEFAULT };
        setting(name, value, source).with_config_type(kind(name))
    };
    let ignored = topic.set.iter().filter(|(name, _)| topic.settings.list().all(|(n, _)| n != *name));
    let ignored = ignored.map(|(name, value)| setting(name, value.clone(), SOURCE_TOPIC));
    topic.settings.list().map(one).chain(ignored).collect()
}

fn of_broker(shared: &Shared) -> Vec<DescribeConfigsResourceResult> {
    let flush = match shared.config.fsync {
        Fsync::Interval(every) => every.as_millis().to_string(),
        Fsync::EveryBatch => "0".into(),
        Fsync::Never => i64::MAX.to_string(),
    };
    [
        ("auto.create.topics.enable", "false".into()),
        ("log.dirs", shared.config.data.display().to_string()),
        ("log.flush.interval.ms", flush),
        ("log.segment.bytes", shared.config.segment_bytes.to_string()),
        ("num.partitions", "1".into()),
        ("default.replication.factor", "1".into()),
    ]
    .into_iter()
    .map(|(name, value)| setting(name, value, SOURCE_STATIC_BROKER).with_read_only(true))
    .collect()
}

fn setting(name: &str, value: String, source: i8) -> DescribeConfigsResourceResult {
    let value = Some(text(value));
    let synonym =
        DescribeConfigsSynonym::default().with_name(text(name)).with_value(value.clone()).with_source(source);
    DescribeConfigsResourceResult::default()
        .with_name(text(name))
        .with_value(value)
        .with_config_source(source)
        .with_synonyms(vec![synonym])
}

/// Only topics can be changed: the broker's own settings come from whoever started it.
fn only_topics(resource_type: i8) -> Result<(), Refusal> {
    if resource_type == TOPIC {
        return Ok(());
    }
    let reason = format!("resource type {resource_type}; only a topic's settings can be changed here");
    Err((ResponseError::InvalidRequest, reason))
}

/// AlterConfigs replaces all that was set.
pub(crate) fn alter(shared: &Shared, request: &AlterConfigsRequest) -> AlterConfigsResponse {
    let responses = request.resources.iter().map(|asked| {
        let altered = only_topics(asked.resource_type).and_then(|()| {
            shared.topics.alter(&asked.resource_name, request.validate_only, |_, set| {
                set.clear();
                for config in &asked.configs {
                    let value = config.value.as_ref().map(ToString::to_string);
                    set_one(set, config.name.as_str(), value)?;
                }
                Ok(())
            })
        });
        let (code, message) = outcome(altered);
        alter_configs_response::AlterConfigsResourceResponse::default()
            .with_error_code(code)
            .with_error_message(Some(text(message)))
            .with_resource_type(asked.resource_type)
            .with_resource_name(asked.resource_name.clone())
    });
    AlterConfigsResponse::default().with_responses(responses.collect())
}

/// IncrementalAlterConfigs changes what it names.
pub(crate) fn alter_incrementally(
    shared: &Shared,
    request: &IncrementalAlterConfigsRequest,
) -> IncrementalAlterConfigsResponse {
    let responses = request.resources.iter().map(|asked| {
        let altered = only_topics(asked.resource_type).and_then(|()| {
            shared.topics.alter(&asked.resource_name, request.validate_only, |topic, set| {
                asked.configs.iter().try_for_each(|change| apply(topic, set, change))
            })
        });
        let (code, message) = outcome(altered);
        incremental_alter_configs_response::AlterConfigsResourceResponse::default()
            .with_error_code(code)
            .with_error_message(Some(text(message)))
            .with_resource_type(asked.resource_type)
            .with_resource_name(asked.resource_name.clone())
    });
    IncrementalAlterConfigsResponse::default().with_responses(responses.collect())
}

fn apply(
    topic: &Topic,
    set: &mut BTreeMap<String, String>,
    change: &incremental_alter_configs_request::AlterableConfig,
) -> Result<(), Refusal> {
    let name = change.name.as_str();
    let value = change.value.as_ref().map(ToString::to_string);
    match change.config_operation {
        0 => set_one(set, name, value),
        1 if is_known(name) => {
            set.remove(name);
            Ok(())
        }
        operation @ (2 | 3) if is_list(name) => {
            let present = topic.settings.list().find(|(n, _)| *n == name).map(|(_, v)| v).unwrap_or_default();
            let given = value.unwrap_or_default();
            let mut items: Vec<&str> = present.split(',').collect();
            items.retain(|i| !given.split(',').any(|g| g.trim() == *i));
            if operation == 2 {
                items.extend(given.split(',').map(str::trim));
            }
            set.insert(name.to_owned(), items.join(","));
            Ok(())
        }
        operation => {
            let reason = format!("{name}: operation {operation} is not possible on this setting");
            Err((ResponseError::InvalidConfig, reason))
        }
    }
}

fn set_one(set: &mut BTreeMap<String, String>, name: &str, value: Option<String>) -> Result<(), Refusal> {
    let Some(value) = value else {
        return Err((ResponseError::InvalidConfig, format!("setting {name} has no value")));
    };
    set.insert(name.to_owned(), value);
    Ok(())
}

fn outcome(result: Result<(), Refusal>) -> (i16, String) {
    result.err().map_or_else(|| (0, String::new()), |(error, message)| (error.code(), message))
}
