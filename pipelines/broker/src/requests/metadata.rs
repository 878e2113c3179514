//! Who is there: ApiVersions, Metadata, DescribeCluster, FindCoordinator.
//!
//! Invariant: looking a topic up never makes it, whatever the client allows.

use super::{NODE, Peer, SERVED, text};
use crate::shared::Shared;
use crate::topics::{Topic, check_name};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::api_versions_response::ApiVersion;
use kafka_protocol::messages::describe_cluster_response::DescribeClusterBroker;
use kafka_protocol::messages::find_coordinator_response::Coordinator;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use kafka_protocol::messages::{
    ApiVersionsResponse, BrokerId, DescribeClusterRequest, DescribeClusterResponse, FindCoordinatorRequest,
    FindCoordinatorResponse, MetadataRequest, MetadataResponse, TopicName,
};

/// "Not asked for", as authorized operations count.
const NOT_ASKED: i32 = i32::MIN;

/// What is served; with an error when the client asked in a version that is not.
pub(crate) fn api_versions(error: Option<ResponseError>) -> ApiVersionsResponse {
    let keys = SERVED.iter().map(|(api, min, max)| {
        ApiVersion::default().with_api_key(*api as i16).with_min_version(*min).with_max_version(*max)
    });
    ApiVersionsResponse::default()
        .with_error_code(error.map_or(0, |e| e.code()))
        .with_api_keys(keys.collect())
}

pub(crate) fn metadata(
    shared: &Shared,
    peer: &Peer,
    version: i16,
    request: &MetadataRequest,
) -> MetadataResponse {
    // In version 0 an empty list means all topics, later an absent one does.
    let topics = match &request.topics {
        Some(asked) if version > 0 || !asked.is_empty() => {
            asked.iter().map(|t| asked_for(shared, t)).collect()
        }
        _ => shared.topics.all().iter().map(|t| describe(t)).collect(),
    };
    let broker = MetadataResponseBroker::default()
        .with_node_id(BrokerId(NODE))
        .with_host(text(peer.local.ip().to_string()))
        .with_port(i32::from(peer.local.port()));
    MetadataResponse::default()
        .with_brokers(vec![broker])
        .with_cluster_id(Some(text(shared.cluster_id())))
        .with_controller_id(BrokerId(NODE))
        .with_topics(topics)
        .with_cluster_authorized_operations(NOT_ASKED)
}

fn asked_for(shared: &Shared, asked: &MetadataRequestTopic) -> MetadataResponseTopic {
    let missing = MetadataResponseTopic::default()
        .with_name(asked.name.clone())
        .with_topic_id(asked.topic_id)
        .with_topic_authorized_operations(NOT_ASKED);
    let Some(name) = &asked.name else {
        return match shared.topics.by_id(asked.topic_id) {
            Some(topic) => describe(&topic),
            None => missing.with_error_code(ResponseError::UnknownTopicId.code()),
        };
    };
    match (shared.topics.get(name), check_name(name)) {
        (Some(topic), _) => describe(&topic),
        (None, Err((error, _))) => missing.with_error_code(error.code()),
        (None, Ok(())) => missing.with_error_code(ResponseError::UnknownTopicOrPartition.code()),
    }
}

fn describe(topic: &Topic) -> MetadataResponseTopic {
    let node = vec![BrokerId(NODE)];
    let partitions = (0..).take(topic.partitions.len()).map(|index| {
        MetadataResponsePartition::default()
            .with_partition_index(index)
            .with_leader_id(BrokerId(NODE))
            .with_leader_epoch(0)
            .with_replica_nodes(node.clone())
            .with_isr_nodes(node.clone())
    });
    MetadataResponseTopic::default()
        .with_name(Some(TopicName(text(topic.name.as_str()))))
        .with_topic_id(topic.id)
        .with_partitions(partitions.collect())
        .with_topic_authorized_operations(NOT_ASKED)
}

pub(crate) fn describe_cluster(
    shared: &Shared,
    peer: &Peer,
    request: &DescribeClusterRequest,
) -> DescribeClusterResponse {
    let broker = DescribeClusterBroker::default()
        .with_broker_id(BrokerId(NODE))
        .with_host(text(peer.local.ip().to_string()))
        .with_port(i32::from(peer.local.port()));
    DescribeClusterResponse::default()
        .with_endpoint_type(request.endpoint_type)
        .with_cluster_id(text(shared.cluster_id()))
        .with_controller_id(BrokerId(NODE))
        .with_brokers(vec![broker])
        .with_cluster_authorized_operations(NOT_ASKED)
}

/// There is one node, so it coordinates every group; and no transactions.
pub(crate) fn find_coordinator(
    peer: &Peer,
    version: i16,
    request: &FindCoordinatorRequest,
) -> FindCoordinatorResponse {
    let host = text(peer.local.ip().to_string());
    let port = i32::from(peer.local.port());
    let refused = (request.key_type != 0).then(|| {
        tracing::warn!(peer = %peer.remote, key_type = request.key_type, "refused a coordinator that is not for groups");
        // Clients give up on this one and show its text; on others they ask again for ever.
        let error = match request.key_type {
            1 => ResponseError::TransactionalIdAuthorizationFailed,
            _ => ResponseError::InvalidRequest,
        };
        (error.code(), text("the embedded broker does not support transactions or share groups; use Apache Kafka"))
    });
    let (error, message) = refused.map_or((0, None), |(code, message)| (code, Some(message)));
    let node = if error == 0 { BrokerId(NODE) } else { BrokerId(-1) };
    if version < 4 {
        return FindCoordinatorResponse::default()
            .with_error_code(error)
            .with_error_message(message)
            .with_node_id(node)
            .with_host(host)
            .with_port(port);
    }
    let coordinators = request.coordinator_keys.iter().map(|key| {
        Coordinator::default()
            .with_key(key.clone())
            .with_error_code(error)
            .with_error_message(message.clone())
            .with_node_id(node)
            .with_host(host.clone())
            .with_port(port)
    });
    FindCoordinatorResponse::default().with_coordinators(coordinators.collect())
}
