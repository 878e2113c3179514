//! OffsetCommit, OffsetFetch, OffsetDelete.

use super::code;
use crate::Fsync;
use crate::journal::OffsetFact;
use crate::offsets::{CommitError, METADATA_BYTES_MAX};
use crate::shared::Shared;
use crate::topics::storage;
use bytes::Buf;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::offset_commit_request::OffsetCommitRequestPartition;
use kafka_protocol::messages::offset_commit_response::{
    OffsetCommitResponsePartition, OffsetCommitResponseTopic,
};
use kafka_protocol::messages::offset_delete_response::{
    OffsetDeleteResponsePartition, OffsetDeleteResponseTopic,
};
use kafka_protocol::messages::offset_fetch_response::{
    OffsetFetchResponseGroup, OffsetFetchResponsePartition, OffsetFetchResponsePartitions,
    OffsetFetchResponseTopic, OffsetFetchResponseTopics,
};
use kafka_protocol::messages::{
    ConsumerProtocolSubscription, OffsetCommitRequest, OffsetCommitResponse, OffsetDeleteRequest,
    OffsetDeleteResponse, OffsetFetchRequest, OffsetFetchResponse, TopicName,
};
use kafka_protocol::protocol::{Decodable, StrBytes};
use std::collections::{BTreeMap, HashSet};

pub(crate) async fn commit(shared: &Shared, request: OffsetCommitRequest) -> OffsetCommitResponse {
    let group = request.group_id.to_string();
    let instance = request.group_instance_id.as_deref();
    let allowed = shared.coordinator.with(|groups, now| {
        let generation = request.generation_id_or_member_epoch;
        groups.may_commit(now, &group, &request.member_id, instance, generation)
    });
    if let Err(error) = allowed {
        let (member, generation) = (request.member_id.as_str(), request.generation_id_or_member_epoch);
        tracing::debug!(group, member, generation, %error, "commit refused");
    }
    let mut accepted = Vec::new();
    let mut verdicts = BTreeMap::new();
    for topic in &request.topics {
        for p in &topic.partitions {
            let verdict = allowed.and_then(|()| check(shared, &topic.name, p));
            let at = (topic.name.to_string(), p.partition_index);
            if verdict.is_ok() {
                accepted.push((at.clone(), fact(p)));
            }
            verdicts.insert(at, verdict);
        }
    }
    if !accepted.is_empty()
        && let Err(error) = keep(shared, &group, accepted).await
    {
        verdicts.values_mut().filter(|v| v.is_ok()).for_each(|v| *v = Err(error));
    }
    let topics = request.topics.iter().map(|topic| {
        let partitions = topic.partitions.iter().map(|p| {
            let verdict = verdicts.get(&(topic.name.to_string(), p.partition_index));
            OffsetCommitResponsePartition::default()
                .with_partition_index(p.partition_index)
                .with_error_code(verdict.map_or(0, code))
        });
        OffsetCommitResponseTopic::default()
            .with_name(topic.name.clone())
            .with_partitions(partitions.collect())
    });
    OffsetCommitResponse::default().with_topics(topics.collect())
}

fn check(shared: &Shared, topic: &str, p: &OffsetCommitRequestPartition) -> Result<(), ResponseError> {
    if p.committed_metadata.as_ref().is_some_and(|m| m.len() > METADATA_BYTES_MAX) {
        return Err(ResponseError::OffsetMetadataTooLarge);
    }
    let topic = shared.topics.get(topic).ok_or(ResponseError::UnknownTopicOrPartition)?;
    topic.partition(p.partition_index).map(|_| ()).ok_or(ResponseError::UnknownTopicOrPartition)
}

fn fact(p: &OffsetCommitRequestPartition) -> OffsetFact {
    OffsetFact {
        offset: p.committed_offset,
        leader_epoch: p.committed_leader_epoch,
        metadata: p.committed_metadata.as_ref().map(ToString::to_string),
    }
}

async fn keep(
    shared: &Shared,
    group: &str,
    offsets: Vec<((String, i32), OffsetFact)>,
) -> Result<(), ResponseError> {
    shared.offsets.commit(group, offsets).map_err(|error| match error {
        CommitError::TooMany => {
            tracing::warn!(group, %error, "commit refused");
            ResponseError::InvalidCommitOffsetSize
        }
        CommitError::Journal(error) => storage(&error).0,
    })?;
    match shared.config.fsync {
        Fsync::EveryBatch => shared.journal.partition.flush().await.map_err(|error| storage(&error).0),
        Fsync::Interval(_) | Fsync::Never => Ok(()),
    }
}

/// One partition of an answer: offset, leader epoch, metadata. -1 means nothing was committed.
type Committed = (i32, i64, i32, StrBytes);

/// What a group committed for the topics asked for, or for all.
fn committed(
    shared: &Shared,
    group: &str,
    asked: Option<Vec<(&str, &[i32])>>,
) -> Vec<(TopicName, Vec<Committed>)> {
    let of_group = shared.offsets.of_group(group);
    let one = |topic: &str, partition: i32| match of_group.get(&(topic.to_owned(), partition)) {
        Some(fact) => {
            let metadata = super::text(fact.metadata.clone().unwrap_or_default());
            (partition, fact.offset, fact.leader_epoch, metadata)
        }
        None => (partition, -1, -1, StrBytes::new()),
    };
    let mut topics: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
    match asked {
        Some(asked) => {
            topics.extend(asked.into_iter().map(|(topic, partitions)| (topic, partitions.to_vec())))
        }
        None => of_group.keys().for_each(|(topic, p)| topics.entry(topic).or_default().push(*p)),
    }
    let named = |topic: &str| TopicName(super::text(topic));
    topics.iter().map(|(topic, ps)| (named(topic), ps.iter().map(|p| one(topic, *p)).collect())).collect()
}

pub(crate) fn fetch(shared: &Shared, version: i16, request: OffsetFetchRequest) -> OffsetFetchResponse {
    if version < 8 {
        let asked = request
            .topics
            .as_ref()
            .map(|topics| topics.iter().map(|t| (t.name.as_str(), t.partition_indexes.as_slice())).collect());
        let topics = committed(shared, &request.group_id, asked).into_iter().map(|(name, partitions)| {
            let partitions = partitions.into_iter().map(|(index, offset, epoch, metadata)| {
                OffsetFetchResponsePartition::default()
                    .with_partition_index(index)
                    .with_committed_offset(offset)
                    .with_committed_leader_epoch(epoch)
                    .with_metadata(Some(metadata))
            });
            OffsetFetchResponseTopic::default().with_name(name).with_partitions(partitions.collect())
        });
        return OffsetFetchResponse::default().with_topics(topics.collect());
    }
    let groups = request.groups.iter().map(|group| {
        let asked = group
            .topics
            .as_ref()
            .map(|topics| topics.iter().map(|t| (t.name.as_str(), t.partition_indexes.as_slice())).collect());
        let topics = committed(shared, &group.group_id, asked).into_iter().map(|(name, partitions)| {
            let partitions = partitions.into_iter().map(|(index, offset, epoch, metadata)| {
                OffsetFetchResponsePartitions::default()
                    .with_partition_index(index)
                    .with_committed_offset(offset)
                    .with_committed_leader_epoch(epoch)
                    .with_metadata(Some(metadata))
            });
            OffsetFetchResponseTopics::default().with_name(name).with_partitions(partitions.collect())
        });
        OffsetFetchResponseGroup::default()
            .with_group_id(group.group_id.clone())
            .with_topics(topics.collect())
    });
    OffsetFetchResponse::default().with_groups(groups.collect())
}

/// Forgets offsets of topics that no member of the group reads.
pub(crate) fn delete(shared: &Shared, request: &OffsetDeleteRequest) -> OffsetDeleteResponse {
    let group = request.group_id.to_string();
    let read = subscribed(shared, &group);
    if read.is_none() && shared.offsets.of_group(&group).is_empty() {
        return OffsetDeleteResponse::default().with_error_code(ResponseError::GroupIdNotFound.code());
    }
    let read = read.unwrap_or_default();
    let topics = request.topics.iter().map(|topic| {
        let partitions = topic.partitions.iter().map(|p| {
            let deleted = if read.contains(topic.name.as_str()) {
                Err(ResponseError::GroupSubscribedToTopic)
            } else {
                let which = |g: &str, t: &str, i: i32| {
                    g == group && t == topic.name.as_str() && i == p.partition_index
                };
                shared.offsets.forget(which).map_err(|error| storage(&error).0)
            };
            OffsetDeleteResponsePartition::default()
                .with_partition_index(p.partition_index)
                .with_error_code(code(&deleted))
        });
        OffsetDeleteResponseTopic::default()
            .with_name(topic.name.clone())
            .with_partitions(partitions.collect())
    });
    OffsetDeleteResponse::default().with_topics(topics.collect())
}

/// Topics that the group's members subscribe to; `None` if the group is not known.
fn subscribed(shared: &Shared, group: &str) -> Option<HashSet<String>> {
    let group = shared.coordinator.with(|groups, _| groups.get(group).cloned())?;
    let mut topics = HashSet::new();
    for (_, metadata) in group.members.values().flat_map(|m| &m.protocols) {
        let mut bytes = metadata.clone();
        // Foreign protocol types put what they like here; what cannot be read names no topic.
        let Ok(version) = bytes.try_get_i16() else { continue };
        if let Ok(subscription) = ConsumerProtocolSubscription::decode(&mut bytes, version.clamp(0, 3)) {
            topics.extend(subscription.topics.iter().map(ToString::to_string));
        }
    }
    Some(topics)
}
