//! Every served request in every served version: answered, and with an answer that version can carry.

use super::*;
use crate::Config;
use crate::log::batch;
use bytes::{Bytes, BytesMut};
use kafka_protocol::messages::*;
use std::time::Duration;

fn name(s: &str) -> TopicName {
    TopicName(text(s))
}

fn group() -> GroupId {
    GroupId(text("group"))
}

/// Requests that are answered with results, and ones that are answered with errors.
fn typical(api: ApiKey, version: i16) -> Vec<RequestKind> {
    let topics = ["t", "missing", "bad name"];
    match api {
        ApiKey::Produce => {
            use produce_request::{PartitionProduceData, TopicProduceData};
            let batch = Bytes::from(batch::build(&[(Some(b"k"), Some(b"v"), 1)]));
            let data = |topic: &&str| {
                let parts =
                    [Some(batch.clone()), None].map(|b| PartitionProduceData::default().with_records(b));
                TopicProduceData::default().with_name(name(topic)).with_partition_data(parts.to_vec())
            };
            let data: Vec<_> = topics.iter().map(data).collect();
            vec![ProduceRequest::default().with_acks(-1).with_topic_data(data).into()]
        }
        ApiKey::Fetch => {
            use fetch_request::{FetchPartition, FetchTopic};
            let part =
                |offset| FetchPartition::default().with_fetch_offset(offset).with_partition_max_bytes(1000);
            let topic =
                |t: &&str| FetchTopic::default().with_topic(name(t)).with_partitions(vec![part(0), part(99)]);
            let topics = topics.iter().map(topic).collect();
            vec![FetchRequest::default().with_max_bytes(1000).with_topics(topics).into()]
        }
        ApiKey::ListOffsets => {
            use list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
            let part = |t| ListOffsetsPartition::default().with_timestamp(t);
            let parts: Vec<_> = [-9, -4, -3, -2, -1, 0, 99].map(part).to_vec();
            let topic =
                |t: &&str| ListOffsetsTopic::default().with_name(name(t)).with_partitions(parts.clone());
            vec![ListOffsetsRequest::default().with_topics(topics.iter().map(topic).collect()).into()]
        }
        ApiKey::Metadata => {
            use metadata_request::MetadataRequestTopic;
            let topic = |t: &&str| MetadataRequestTopic::default().with_name(Some(name(t)));
            let asked: Vec<_> = topics.iter().map(topic).collect();
            let all = (version > 0).then(|| MetadataRequest::default().with_topics(None).into());
            let unknown_id = (version >= 12).then(|| {
                let topic =
                    MetadataRequestTopic::default().with_topic_id(uuid::Uuid::from_u128(7)).with_name(None);
                MetadataRequest::default().with_topics(Some(vec![topic])).into()
            });
            let named = MetadataRequest::default().with_topics(Some(asked)).into();
            [Some(named), all, unknown_id].into_iter().flatten().collect()
        }
        ApiKey::OffsetCommit => {
            use offset_commit_request::{OffsetCommitRequestPartition, OffsetCommitRequestTopic};
            let part = OffsetCommitRequestPartition::default()
                .with_committed_offset(1)
                .with_committed_metadata(None);
            let topic = |t: &&str| {
                OffsetCommitRequestTopic::default().with_name(name(t)).with_partitions(vec![part.clone()])
            };
            let request = |id: &str| {
                OffsetCommitRequest::default()
                    .with_group_id(GroupId(text(id)))
                    .with_generation_id_or_member_epoch(-1)
                    .with_topics(topics.iter().map(topic).collect())
            };
            vec![request("outsiders").into(), request("group").into()]
        }
        ApiKey::OffsetFetch => {
            use offset_fetch_request::*;
            let of = |id: &str| {
                OffsetFetchRequestGroup::default().with_group_id(GroupId(text(id))).with_topics(None)
            };
            let topic =
                OffsetFetchRequestTopic::default().with_name(name("t")).with_partition_indexes(vec![0, 1]);
            let old = OffsetFetchRequest::default().with_group_id(GroupId(text("outsiders")));
            match version {
                8.. => {
                    vec![OffsetFetchRequest::default().with_groups(vec![of("outsiders"), of("none")]).into()]
                }
                2.. => vec![old.clone().with_topics(None).into(), old.with_topics(Some(vec![topic])).into()],
                _ => vec![old.with_topics(Some(vec![topic])).into()],
            }
        }
        ApiKey::FindCoordinator => {
            let request = |kind| match version {
                4.. => FindCoordinatorRequest::default()
                    .with_coordinator_keys(vec![text("group")])
                    .with_key_type(kind),
                1.. => FindCoordinatorRequest::default().with_key(text("group")).with_key_type(kind),
                _ => FindCoordinatorRequest::default().with_key(text("group")),
            };
            vec![request(0).into(), request(1).into()]
        }
        ApiKey::JoinGroup => {
            use join_group_request::JoinGroupRequestProtocol;
            let protocol = JoinGroupRequestProtocol::default().with_name(text("range"));
            let good = JoinGroupRequest::default()
                .with_group_id(GroupId(text(format!("joined in version {version}"))))
                .with_session_timeout_ms(6000)
                .with_protocol_type(text("consumer"))
                .with_protocols(vec![protocol]);
            vec![good.clone().with_session_timeout_ms(0).into(), good.into()]
        }
        ApiKey::Heartbeat => vec![HeartbeatRequest::default().with_group_id(group()).into()],
        ApiKey::LeaveGroup => {
            use leave_group_request::MemberIdentity;
            let request = LeaveGroupRequest::default().with_group_id(group());
            let member = MemberIdentity::default().with_member_id(text("m"));
            vec![
                if version < 3 {
                    request.with_member_id(text("m"))
                } else {
                    request.with_members(vec![member])
                }
                .into(),
            ]
        }
        ApiKey::SyncGroup => vec![SyncGroupRequest::default().with_group_id(group()).into()],
        ApiKey::DescribeGroups => {
            let groups = ["group", "outsiders", "none"].map(|g| GroupId(text(g))).to_vec();
            vec![DescribeGroupsRequest::default().with_groups(groups).into()]
        }
        ApiKey::ListGroups => vec![ListGroupsRequest::default().into()],
        ApiKey::ApiVersions => vec![ApiVersionsRequest::default().into()],
        ApiKey::CreateTopics => {
            use create_topics_request::CreatableTopic;
            let new = format!("made-in-version-{version}");
            let topic = |t: &str| {
                CreatableTopic::default().with_name(name(t)).with_num_partitions(1).with_replication_factor(1)
            };
            let topics = ["t", "bad name", &new].map(topic).to_vec();
            vec![CreateTopicsRequest::default().with_topics(topics).into()]
        }
        ApiKey::DeleteTopics => {
            use delete_topics_request::DeleteTopicState;
            let names = [name(&format!("made-in-version-{}", version + 1)), name("missing")];
            let state = |n: &TopicName| DeleteTopicState::default().with_name(Some(n.clone()));
            let request = DeleteTopicsRequest::default();
            vec![match version {
                6.. => request.with_topics(names.iter().map(state).collect()).into(),
                _ => request.with_topic_names(names.to_vec()).into(),
            }]
        }
        ApiKey::DeleteRecords => {
            use delete_records_request::{DeleteRecordsPartition, DeleteRecordsTopic};
            let part = |o| DeleteRecordsPartition::default().with_offset(o);
            let topic = |t: &&str| {
                DeleteRecordsTopic::default().with_name(name(t)).with_partitions(vec![part(0), part(99)])
            };
            vec![DeleteRecordsRequest::default().with_topics(topics.iter().map(topic).collect()).into()]
        }
        ApiKey::InitProducerId => {
            let transactional =
                InitProducerIdRequest::default().with_transactional_id(Some(TransactionalId(text("x"))));
            vec![InitProducerIdRequest::default().with_transactional_id(None).into(), transactional.into()]
        }
        ApiKey::OffsetForLeaderEpoch => {
            use offset_for_leader_epoch_request::{OffsetForLeaderPartition, OffsetForLeaderTopic};
            let topic = |t: &&str| {
                let parts = vec![OffsetForLeaderPartition::default()];
                OffsetForLeaderTopic::default().with_topic(name(t)).with_partitions(parts)
            };
            vec![
                OffsetForLeaderEpochRequest::default().with_topics(topics.iter().map(topic).collect()).into(),
            ]
        }
        ApiKey::DescribeConfigs => {
            use describe_configs_request::DescribeConfigsResource;
            let of = |kind, n: &str| {
                DescribeConfigsResource::default()
                    .with_resource_type(kind)
                    .with_resource_name(text(n))
                    .with_configuration_keys(None)
            };
            let resources = vec![of(2, "t"), of(2, "missing"), of(4, "1"), of(9, "x")];
            vec![
                DescribeConfigsRequest::default()
                    .with_resources(resources)
                    .with_include_synonyms(true)
                    .into(),
            ]
        }
        ApiKey::AlterConfigs => {
            use alter_configs_request::AlterConfigsResource;
            let of =
                |n: &&str| AlterConfigsResource::default().with_resource_type(2).with_resource_name(text(*n));
            vec![AlterConfigsRequest::default().with_resources(topics.iter().map(of).collect()).into()]
        }
        ApiKey::IncrementalAlterConfigs => {
            use incremental_alter_configs_request::{AlterConfigsResource, AlterableConfig};
            let change =
                AlterableConfig::default().with_name(text("retention.ms")).with_value(Some(text("-1")));
            let of = |n: &&str| {
                AlterConfigsResource::default()
                    .with_resource_type(2)
                    .with_resource_name(text(*n))
                    .with_configs(vec![change.clone()])
            };
            vec![
                IncrementalAlterConfigsRequest::default()
                    .with_resources(topics.iter().map(of).collect())
                    .into(),
            ]
        }
        ApiKey::CreatePartitions => {
            use create_partitions_request::CreatePartitionsTopic;
            let of = |n: &&str| {
                CreatePartitionsTopic::default().with_name(name(n)).with_count(1).with_assignments(None)
            };
            vec![CreatePartitionsRequest::default().with_topics(topics.iter().map(of).collect()).into()]
        }
        ApiKey::DeleteGroups => {
            let groups = vec![GroupId(text("group")), GroupId(text("none"))];
            vec![DeleteGroupsRequest::default().with_groups_names(groups).into()]
        }
        ApiKey::OffsetDelete => {
            use offset_delete_request::{OffsetDeleteRequestPartition, OffsetDeleteRequestTopic};
            let topic = OffsetDeleteRequestTopic::default()
                .with_name(name("t"))
                .with_partitions(vec![OffsetDeleteRequestPartition::default()]);
            let of = |g: &str| {
                OffsetDeleteRequest::default()
                    .with_group_id(GroupId(text(g)))
                    .with_topics(vec![topic.clone()])
            };
            vec![of("outsiders").into(), of("none").into()]
        }
        ApiKey::DescribeCluster => vec![DescribeClusterRequest::default().into()],
        ApiKey::ConsumerGroupHeartbeat => {
            vec![ConsumerGroupHeartbeatRequest::default().with_group_id(group()).into()]
        }
        other => panic!("{other:?} is served and has no request here"),
    }
}

#[tokio::test(start_paused = true)]
async fn every_version_that_is_listed_can_be_asked_and_answered() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::new(dir.path(), ([127, 0, 0, 1], 0));
    config.group_wait = Duration::ZERO;
    let shared = Shared::open(config).unwrap();
    shared.topics.create("t", 1, Default::default(), false, 0).unwrap();
    let address = ([127, 0, 0, 1], 9092).into();
    let peer = Peer { remote: address, local: address, client_id: "test".into() };
    for (api, min, max) in SERVED {
        for version in *min..=*max {
            for request in typical(*api, version) {
                // Through its bytes, so that a request no client could send does not count.
                let mut bytes = BytesMut::new();
                request
                    .encode(&mut bytes, version)
                    .unwrap_or_else(|e| panic!("{api:?} v{version} request: {e:?}"));
                let request = RequestKind::decode(*api, &mut bytes.freeze(), version).unwrap();
                let Outcome::Reply(response) = answer(&shared, &peer, version, request).await else {
                    panic!("{api:?} v{version} was not answered");
                };
                let mut bytes = BytesMut::new();
                response
                    .encode(&mut bytes, version)
                    .unwrap_or_else(|e| panic!("{api:?} v{version} response: {e:?}"));
                let decoded = ResponseKind::decode(*api, &mut bytes.freeze(), version);
                assert!(decoded.is_ok(), "{api:?} v{version}: {decoded:?}");
            }
        }
    }
}

#[test]
fn the_readme_lists_what_is_served() {
    let readme = include_str!("../../README.md");
    for (api, min, max) in SERVED {
        let versions = if min == max { min.to_string() } else { format!("{min}–{max}") };
        assert!(readme.contains(&format!("| {api:?} {versions} ")), "README.md lacks {api:?} {versions}");
    }
}
