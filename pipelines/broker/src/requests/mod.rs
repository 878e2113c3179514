//! Which requests are served, in which versions, and who serves each.
//!
//! Invariant: what [`SERVED`] lists is what ApiVersions tells clients and what `answer` can answer; a
//! version is listed only if every field it adds is obeyed or harmless on a single node.

mod configs;
mod fetch;
mod groups;
mod metadata;
mod offsets;
mod produce;
mod topics;

use crate::shared::Shared;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::{ApiKey, RequestKind, ResponseKind};
use kafka_protocol::protocol::StrBytes;
use std::net::SocketAddr;

/// Request, lowest and highest version.
pub(crate) const SERVED: &[(ApiKey, i16, i16)] = &[
    (ApiKey::Produce, 3, 9),
    (ApiKey::Fetch, 4, 12),
    (ApiKey::ListOffsets, 1, 8),
    (ApiKey::Metadata, 0, 12),
    (ApiKey::OffsetCommit, 2, 9),
    (ApiKey::OffsetFetch, 1, 9),
    (ApiKey::FindCoordinator, 0, 5),
    (ApiKey::JoinGroup, 0, 9),
    (ApiKey::Heartbeat, 0, 4),
    (ApiKey::LeaveGroup, 0, 5),
    (ApiKey::SyncGroup, 0, 5),
    (ApiKey::DescribeGroups, 0, 5),
    (ApiKey::ListGroups, 0, 5),
    (ApiKey::ApiVersions, 0, 3),
    (ApiKey::CreateTopics, 2, 7),
    (ApiKey::DeleteTopics, 1, 6),
    (ApiKey::DeleteRecords, 0, 2),
    (ApiKey::InitProducerId, 0, 4),
    (ApiKey::OffsetForLeaderEpoch, 2, 4),
    (ApiKey::DescribeConfigs, 1, 4),
    (ApiKey::AlterConfigs, 0, 2),
    (ApiKey::CreatePartitions, 0, 3),
    (ApiKey::DeleteGroups, 0, 2),
    (ApiKey::IncrementalAlterConfigs, 0, 1),
    (ApiKey::OffsetDelete, 0, 0),
    (ApiKey::DescribeCluster, 0, 1),
    // Served only to be refused in words: librdkafka waits for ever on a broker that does not list it.
    (ApiKey::ConsumerGroupHeartbeat, 0, 1),
];

/// The one node's id.
pub(crate) const NODE: i32 = 1;

/// Who asks.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub remote: SocketAddr,
    /// The address by which the client reached the broker: what Metadata tells it to use.
    pub local: SocketAddr,
    pub client_id: String,
}

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    Reply(Box<ResponseKind>),
    /// The client wants no answer (`acks=0`).
    Silence,
    /// There is no answer in the protocol for this.
    Close(&'static str),
}

impl<T: Into<ResponseKind>> From<T> for Outcome {
    fn from(response: T) -> Outcome {
        Outcome::Reply(Box::new(response.into()))
    }
}

/// Serves one request.
pub(crate) async fn answer(shared: &Shared, peer: &Peer, version: i16, request: RequestKind) -> Outcome {
    match request {
        RequestKind::Produce(r) => produce::produce(shared, peer, r).await,
        RequestKind::Fetch(r) => fetch::fetch(shared, r).await.into(),
        RequestKind::ListOffsets(r) => fetch::list_offsets(shared, version, r).into(),
        RequestKind::Metadata(r) => metadata::metadata(shared, peer, version, &r).into(),
        RequestKind::OffsetCommit(r) => offsets::commit(shared, r).await.into(),
        RequestKind::OffsetFetch(r) => offsets::fetch(shared, version, r).into(),
        RequestKind::FindCoordinator(r) => metadata::find_coordinator(peer, version, &r).into(),
        RequestKind::JoinGroup(r) => groups::join(shared, peer, version, r).await.into(),
        RequestKind::Heartbeat(r) => groups::heartbeat(shared, &r).into(),
        RequestKind::LeaveGroup(r) => groups::leave(shared, version, &r).into(),
        RequestKind::SyncGroup(r) => groups::sync(shared, r).await.into(),
        RequestKind::DescribeGroups(r) => groups::describe(shared, &r).into(),
        RequestKind::ListGroups(r) => groups::list(shared, &r).into(),
        RequestKind::ApiVersions(_) => api_versions(None).into(),
        RequestKind::CreateTopics(r) => topics::create(shared, &r).into(),
        RequestKind::DeleteTopics(r) => topics::delete(shared, version, &r).into(),
        RequestKind::DeleteRecords(r) => fetch::delete_records(shared, &r).into(),
        RequestKind::InitProducerId(r) => produce::init_producer_id(shared, peer, &r).into(),
        RequestKind::OffsetForLeaderEpoch(r) => fetch::offset_for_leader_epoch(shared, &r).into(),
        RequestKind::DescribeConfigs(r) => configs::describe(shared, &r).into(),
        RequestKind::AlterConfigs(r) => configs::alter(shared, &r).into(),
        RequestKind::CreatePartitions(r) => topics::grow(shared, &r).into(),
        RequestKind::DeleteGroups(r) => groups::delete(shared, &r).into(),
        RequestKind::IncrementalAlterConfigs(r) => configs::alter_incrementally(shared, &r).into(),
        RequestKind::OffsetDelete(r) => offsets::delete(shared, &r).into(),
        RequestKind::DescribeCluster(r) => metadata::describe_cluster(shared, peer, &r).into(),
        RequestKind::ConsumerGroupHeartbeat(r) => groups::refuse_kip_848(peer, &r).into(),
        _ => Outcome::Close("request is not served"),
    }
}

pub(crate) use metadata::api_versions;

fn text(s: impl Into<String>) -> StrBytes {
    StrBytes::from_string(s.into())
}

/// The protocol's code of a result.
fn code<T>(result: &Result<T, ResponseError>) -> i16 {
    result.as_ref().err().map_or(0, |e| e.code())
}

#[cfg(test)]
mod tests;
