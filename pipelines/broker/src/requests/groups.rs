//! The group requests, translated to and from the state machine in [`crate::groups`].

use super::{Peer, code, text};
use crate::groups::{Group, Join, Sync};
use crate::shared::Shared;
use crate::topics::storage;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::delete_groups_response::DeletableGroupResult;
use kafka_protocol::messages::describe_groups_response::{DescribedGroup, DescribedGroupMember};
use kafka_protocol::messages::join_group_response::JoinGroupResponseMember;
use kafka_protocol::messages::leave_group_response::MemberResponse;
use kafka_protocol::messages::list_groups_response::ListedGroup;
use kafka_protocol::messages::{
    ConsumerGroupHeartbeatRequest, ConsumerGroupHeartbeatResponse, DeleteGroupsRequest, DeleteGroupsResponse,
    DescribeGroupsRequest, DescribeGroupsResponse, GroupId, HeartbeatRequest, HeartbeatResponse,
    JoinGroupRequest, JoinGroupResponse, LeaveGroupRequest, LeaveGroupResponse, ListGroupsRequest,
    ListGroupsResponse, SyncGroupRequest, SyncGroupResponse,
};
use kafka_protocol::protocol::StrBytes;
use std::time::Duration;

fn owned(s: Option<&StrBytes>) -> Option<String> {
    s.map(ToString::to_string)
}

fn millis(ms: i32) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

pub(crate) async fn join(
    shared: &Shared,
    peer: &Peer,
    version: i16,
    request: JoinGroupRequest,
) -> JoinGroupResponse {
    // Version 0 has one timeout for both.
    let rebalance_ms = if version == 0 { request.session_timeout_ms } else { request.rebalance_timeout_ms };
    let join = Join {
        group: request.group_id.to_string(),
        member: request.member_id.to_string(),
        instance: owned(request.group_instance_id.as_ref()),
        client_id: peer.client_id.clone(),
        client_host: format!("/{}", peer.remote.ip()),
        session: millis(request.session_timeout_ms),
        rebalance: millis(rebalance_ms),
        protocol_type: request.protocol_type.to_string(),
        protocols: request.protocols.into_iter().map(|p| (p.name.to_string(), p.metadata)).collect(),
        two_steps: version >= 4,
        can_skip_assignment: version >= 9,
    };
    match shared.coordinator.join(join).await {
        Err(refused) => JoinGroupResponse::default()
            .with_error_code(refused.error.code())
            .with_generation_id(-1)
            .with_protocol_type((version >= 7).then(|| text("")))
            // May be null from version 7 on only.
            .with_protocol_name(Some(text("")))
            .with_member_id(text(refused.member)),
        Ok(joined) => {
            let members = joined.members.into_iter().map(|(id, instance, metadata)| {
                JoinGroupResponseMember::default()
                    .with_member_id(text(id))
                    .with_group_instance_id(instance.map(text))
                    .with_metadata(metadata)
            });
            JoinGroupResponse::default()
                .with_generation_id(joined.generation)
                .with_protocol_type(Some(text(joined.protocol_type)))
                .with_protocol_name(Some(text(joined.protocol)))
                .with_leader(text(joined.leader))
                .with_skip_assignment(joined.skip_assignment)
                .with_member_id(text(joined.member))
                .with_members(members.collect())
        }
    }
}

pub(crate) async fn sync(shared: &Shared, request: SyncGroupRequest) -> SyncGroupResponse {
    let assignments = request.assignments.into_iter().map(|a| (a.member_id.to_string(), a.assignment));
    let sync = Sync {
        group: request.group_id.to_string(),
        member: request.member_id.to_string(),
        instance: owned(request.group_instance_id.as_ref()),
        generation: request.generation_id,
        protocol_type: owned(request.protocol_type.as_ref()),
        protocol: owned(request.protocol_name.as_ref()),
        assignments: assignments.collect(),
    };
    match shared.coordinator.sync(sync).await {
        Err(error) => SyncGroupResponse::default().with_error_code(error.code()),
        Ok(synced) => SyncGroupResponse::default()
            .with_protocol_type(Some(text(synced.protocol_type)))
            .with_protocol_name(Some(text(synced.protocol)))
            .with_assignment(synced.assignment),
    }
}

pub(crate) fn heartbeat(shared: &Shared, request: &HeartbeatRequest) -> HeartbeatResponse {
    let instance = request.group_instance_id.as_deref();
    let alive = shared.coordinator.with(|groups, now| {
        groups.heartbeat(now, &request.group_id, &request.member_id, instance, request.generation_id)
    });
    HeartbeatResponse::default().with_error_code(code(&alive))
}

pub(crate) fn leave(shared: &Shared, version: i16, request: &LeaveGroupRequest) -> LeaveGroupResponse {
    let members: Vec<(String, Option<String>)> = match version {
        ..3 => vec![(request.member_id.to_string(), None)],
        _ => request
            .members
            .iter()
            .map(|m| (m.member_id.to_string(), owned(m.group_instance_id.as_ref())))
            .collect(),
    };
    let left = shared.coordinator.leave(&request.group_id, &members);
    if version < 3 {
        return LeaveGroupResponse::default().with_error_code(left.first().map_or(0, code));
    }
    let members = members.into_iter().zip(&left).map(|((member, instance), left)| {
        MemberResponse::default()
            .with_member_id(text(member))
            .with_group_instance_id(instance.map(text))
            .with_error_code(code(left))
    });
    LeaveGroupResponse::default().with_members(members.collect())
}

/// Groups with members, and those of which only offsets are left.
pub(crate) fn list(shared: &Shared, request: &ListGroupsRequest) -> ListGroupsResponse {
    let listed = |id: &str, state: &str, protocol_type: &str| {
        ListedGroup::default()
            .with_group_id(GroupId(text(id)))
            .with_protocol_type(text(protocol_type))
            .with_group_state(text(state))
            .with_group_type(text("classic"))
    };
    let mut groups: Vec<ListedGroup> = shared.coordinator.with(|groups, _| {
        groups.iter().map(|(id, g)| listed(id, g.phase.name(), &g.protocol_type)).collect()
    });
    for id in shared.offsets.groups() {
        if !groups.iter().any(|g| g.group_id.as_str() == id) {
            groups.push(listed(&id, "Empty", ""));
        }
    }
    let wanted = |filter: &[StrBytes], value: &str| {
        filter.is_empty() || filter.iter().any(|f| f.as_str().eq_ignore_ascii_case(value))
    };
    groups.retain(|g| {
        wanted(&request.states_filter, &g.group_state) && wanted(&request.types_filter, &g.group_type)
    });
    groups.sort_by(|a, b| a.group_id.as_str().cmp(b.group_id.as_str()));
    ListGroupsResponse::default().with_groups(groups)
}

pub(crate) fn describe(shared: &Shared, request: &DescribeGroupsRequest) -> DescribeGroupsResponse {
    let groups = request.groups.iter().map(|id| {
        let known = shared.coordinator.with(|groups, _| groups.get(id).cloned());
        let described =
            DescribedGroup::default().with_group_id(id.clone()).with_authorized_operations(i32::MIN);
        match known {
            Some(group) => describe_members(described, &group),
            None if shared.offsets.of_group(id).is_empty() => described.with_group_state(text("Dead")),
            None => described.with_group_state(text("Empty")),
        }
    });
    DescribeGroupsResponse::default().with_groups(groups.collect())
}

fn describe_members(described: DescribedGroup, group: &Group) -> DescribedGroup {
    let members = group.members.iter().map(|(id, m)| {
        let metadata = m.protocols.iter().find(|(name, _)| *name == group.protocol);
        DescribedGroupMember::default()
            .with_member_id(text(id.as_str()))
            .with_group_instance_id(m.instance.clone().map(text))
            .with_client_id(text(m.client_id.as_str()))
            .with_client_host(text(m.client_host.as_str()))
            .with_member_metadata(metadata.map(|(_, m)| m.clone()).unwrap_or_default())
            .with_member_assignment(m.assignment.clone())
    });
    described
        .with_group_state(text(group.phase.name()))
        .with_protocol_type(text(group.protocol_type.as_str()))
        .with_protocol_data(text(group.protocol.as_str()))
        .with_members(members.collect())
}

/// Deletes a group with its offsets, if nobody is in it.
pub(crate) fn delete(shared: &Shared, request: &DeleteGroupsRequest) -> DeleteGroupsResponse {
    let results = request.groups_names.iter().map(|id| {
        let deleted = delete_one(shared, id);
        DeletableGroupResult::default().with_group_id(id.clone()).with_error_code(code(&deleted))
    });
    DeleteGroupsResponse::default().with_results(results.collect())
}

fn delete_one(shared: &Shared, id: &str) -> Result<(), ResponseError> {
    let known = shared.coordinator.with(|groups, _| groups.delete(id))?;
    let forgotten = shared.offsets.forget(|group, _, _| group == id).map_err(|error| storage(&error).0)?;
    if known || forgotten > 0 { Ok(()) } else { Err(ResponseError::GroupIdNotFound) }
}

/// `group.protocol=consumer` is not served; the answer is one that clients take as final.
pub(crate) fn refuse_kip_848(
    peer: &Peer,
    request: &ConsumerGroupHeartbeatRequest,
) -> ConsumerGroupHeartbeatResponse {
    tracing::warn!(peer = %peer.remote, client = peer.client_id, group = request.group_id.as_str(),
        "refused group.protocol=consumer; set group.protocol=classic");
    ConsumerGroupHeartbeatResponse::default()
        .with_error_code(ResponseError::UnsupportedVersion.code())
        .with_error_message(Some(text(
            "the embedded broker does not support group.protocol=consumer; set group.protocol=classic",
        )))
}
