//! CreateTopics, DeleteTopics, CreatePartitions.

use super::text;
use crate::clock::wall_ms;
use crate::journal::Subject;
use crate::shared::Shared;
use crate::topics::{Refusal, Topic, storage, unknown};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_partitions_request::CreatePartitionsTopic;
use kafka_protocol::messages::create_partitions_response::CreatePartitionsTopicResult;
use kafka_protocol::messages::create_topics_request::CreatableTopic;
use kafka_protocol::messages::create_topics_response::{CreatableTopicConfigs, CreatableTopicResult};
use kafka_protocol::messages::delete_topics_request::DeleteTopicState;
use kafka_protocol::messages::delete_topics_response::DeletableTopicResult;
use kafka_protocol::messages::{
    CreatePartitionsRequest, CreatePartitionsResponse, CreateTopicsRequest, CreateTopicsResponse,
    DeleteTopicsRequest, DeleteTopicsResponse, TopicName,
};
use std::collections::BTreeMap;
use std::sync::Arc;

const SOURCE_TOPIC: i8 = 1;
const SOURCE_DEFAULT: i8 = 5;

pub(crate) fn create(shared: &Shared, request: &CreateTopicsRequest) -> CreateTopicsResponse {
    let topics = request.topics.iter().map(|asked| {
        let named = request.topics.iter().filter(|t| t.name == asked.name).count();
        let made = match named {
            1 => create_one(shared, asked, request.validate_only),
            _ => Err((
                ResponseError::InvalidRequest,
                format!("topic {} is named {named} times", asked.name.as_str()),
            )),
        };
        let result = CreatableTopicResult::default().with_name(asked.name.clone());
        match made {
            Ok(topic) => describe(result, &topic, asked),
            Err((error, message)) => result
                .with_error_code(error.code())
                .with_error_message(Some(text(message)))
                .with_num_partitions(-1)
                .with_replication_factor(-1),
        }
    });
    CreateTopicsResponse::default().with_topics(topics.collect())
}

fn create_one(shared: &Shared, asked: &CreatableTopic, validate_only: bool) -> Result<Topic, Refusal> {
    let partitions = count(asked)?;
    let mut set = BTreeMap::new();
    for config in &asked.configs {
        let Some(value) = &config.value else {
            let reason = format!("setting {} has no value", config.name.as_str());
            return Err((ResponseError::InvalidConfig, reason));
        };
        set.insert(config.name.to_string(), value.to_string());
    }
    shared.topics.create(&asked.name, partitions, set, validate_only, wall_ms())
}

/// Number of partitions, asked for as a number, by assignment, or left to the broker.
fn count(asked: &CreatableTopic) -> Result<i32, Refusal> {
    if !asked.assignments.is_empty() {
        let mut indexes: Vec<i32> = asked.assignments.iter().map(|a| a.partition_index).collect();
        indexes.sort_unstable();
        let here =
            asked.assignments.iter().all(|a| a.broker_ids.len() == 1 && a.broker_ids[0].0 == super::NODE);
        if !here || indexes.iter().zip(0..).any(|(have, want)| *have != want) {
            let reason = "assignment; want partitions 0, 1, … each on the one broker".to_owned();
            return Err((ResponseError::InvalidReplicaAssignment, reason));
        }
        return Ok(i32::try_from(indexes.len()).unwrap_or(i32::MAX));
    }
    if !matches!(asked.replication_factor, -1 | 1) {
        let reason =
            format!("replication factor {}; this is a single node, want 1", asked.replication_factor);
        return Err((ResponseError::InvalidReplicationFactor, reason));
    }
    Ok(if asked.num_partitions == -1 { 1 } else { asked.num_partitions })
}

fn describe(result: CreatableTopicResult, topic: &Topic, asked: &CreatableTopic) -> CreatableTopicResult {
    let configs = topic.settings.list().map(|(name, value)| {
        CreatableTopicConfigs::default()
            .with_name(text(name))
            .with_value(Some(text(value)))
            .with_config_source(if topic.set.contains_key(name) { SOURCE_TOPIC } else { SOURCE_DEFAULT })
    });
    result
        .with_topic_id(topic.id)
        .with_num_partitions(count(asked).unwrap_or(1))
        .with_replication_factor(1)
        .with_configs(Some(configs.collect()))
}

pub(crate) fn delete(shared: &Shared, version: i16, request: &DeleteTopicsRequest) -> DeleteTopicsResponse {
    let by_name = |name: &TopicName| DeleteTopicState::default().with_name(Some(name.clone()));
    let asked: Vec<DeleteTopicState> = match version {
        ..6 => request.topic_names.iter().map(by_name).collect(),
        _ => request.topics.clone(),
    };
    let responses = asked.iter().map(|asked| {
        let result =
            DeletableTopicResult::default().with_name(asked.name.clone()).with_topic_id(asked.topic_id);
        match delete_one(shared, asked) {
            Ok(topic) => result.with_name(Some(TopicName(text(topic.name.as_str())))).with_topic_id(topic.id),
            Err((error, message)) => {
                result.with_error_code(error.code()).with_error_message(Some(text(message)))
            }
        }
    });
    DeleteTopicsResponse::default().with_responses(responses.collect())
}

fn delete_one(shared: &Shared, asked: &DeleteTopicState) -> Result<Arc<Topic>, Refusal> {
    let name = match &asked.name {
        Some(name) => name.to_string(),
        None => match shared.topics.by_id(asked.topic_id) {
            Some(topic) => topic.name.clone(),
            None => {
                let reason = format!("no topic has the id {}", asked.topic_id);
                return Err((ResponseError::UnknownTopicId, reason));
            }
        },
    };
    let topic = shared.topics.delete(&name).map_err(|(error, reason)| match error {
        ResponseError::UnknownTopicOrPartition => unknown(&name),
        _ => (error, reason),
    })?;
    // Offsets into a topic that is gone would point into its successor.
    shared.offsets.forget(|_, topic, _| topic == name).map_err(|error| storage(&error))?;
    let starts: Vec<_> =
        (0..).take(topic.partitions.len()).map(|index| (Subject::Start(topic.id, index), None)).collect();
    shared.journal.write(&starts).map_err(|error| storage(&error))?;
    Ok(topic)
}

pub(crate) fn grow(shared: &Shared, request: &CreatePartitionsRequest) -> CreatePartitionsResponse {
    let results = request.topics.iter().map(|asked| {
        let result = CreatePartitionsTopicResult::default().with_name(asked.name.clone());
        match grow_one(shared, asked, request.validate_only) {
            Ok(()) => result,
            Err((error, message)) => {
                result.with_error_code(error.code()).with_error_message(Some(text(message)))
            }
        }
    });
    CreatePartitionsResponse::default().with_results(results.collect())
}

fn grow_one(shared: &Shared, asked: &CreatePartitionsTopic, validate_only: bool) -> Result<(), Refusal> {
    let elsewhere =
        asked.assignments.iter().flatten().flat_map(|a| &a.broker_ids).any(|b| b.0 != super::NODE);
    if elsewhere {
        let reason = format!("assignment to another broker than {}", super::NODE);
        return Err((ResponseError::InvalidReplicaAssignment, reason));
    }
    shared.topics.grow(&asked.name, asked.count, validate_only, wall_ms())
}
