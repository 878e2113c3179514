//! Reading: Fetch, ListOffsets, OffsetForLeaderEpoch; and DeleteRecords, which moves where reading begins.
//!
//! Invariant: a fetch that could be answered is never left waiting: it registers with its partitions
//! before the last look, and any append wakes it.

use crate::journal::{Subject, json};
use crate::log::SliceError;
use crate::shared::Shared;
use crate::topics::{Topic, storage};
use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::delete_records_response::{
    DeleteRecordsPartitionResult, DeleteRecordsTopicResult,
};
use kafka_protocol::messages::fetch_request::FetchPartition;
use kafka_protocol::messages::fetch_response::{FetchableTopicResponse, PartitionData};
use kafka_protocol::messages::list_offsets_request::ListOffsetsPartition;
use kafka_protocol::messages::list_offsets_response::{
    ListOffsetsPartitionResponse, ListOffsetsTopicResponse,
};
use kafka_protocol::messages::offset_for_leader_epoch_response::{
    EpochEndOffset, OffsetForLeaderTopicResult,
};
use kafka_protocol::messages::{
    BrokerId, DeleteRecordsRequest, DeleteRecordsResponse, FetchRequest, FetchResponse, ListOffsetsRequest,
    ListOffsetsResponse, OffsetForLeaderEpochRequest, OffsetForLeaderEpochResponse,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Bounds the memory of one answer, whatever the client would take.
const RESPONSE_BYTES_MAX: u64 = 16 << 20;
const WAIT_MAX: Duration = Duration::from_secs(300);

pub(crate) async fn fetch(shared: &Shared, request: FetchRequest) -> FetchResponse {
    let wait = Duration::from_millis(u64::try_from(request.max_wait_ms).unwrap_or(0)).min(WAIT_MAX);
    let deadline = Instant::now() + wait;
    let enough = u64::try_from(request.min_bytes).unwrap_or(0);
    let first = look(shared, &request, None);
    if first.answers(enough) || wait.is_zero() {
        return first.response;
    }
    let waiter = Arc::new(Notify::new());
    loop {
        let look = look(shared, &request, Some(&waiter));
        if look.answers(enough) || timeout_at(deadline, waiter.notified()).await.is_err() {
            return look.response;
        }
    }
}

struct Look {
    response: FetchResponse,
    bytes: u64,
    failed: bool,
}

impl Look {
    fn answers(&self, enough: u64) -> bool {
        self.bytes >= enough.max(1) || self.failed
    }
}

fn look(shared: &Shared, request: &FetchRequest, waiter: Option<&Arc<Notify>>) -> Look {
    let mut left = u64::try_from(request.max_bytes).unwrap_or(0).min(RESPONSE_BYTES_MAX);
    let (mut bytes, mut failed) = (0, false);
    let topics = request.topics.iter().map(|asked| {
        let topic = shared.topics.get(&asked.topic);
        let partitions = asked.partitions.iter().map(|p| {
            let data = partition(topic.as_deref(), p, left, bytes == 0, waiter);
            let got = data.records.as_ref().map_or(0, |r| r.len() as u64);
            left = left.saturating_sub(got);
            bytes += got;
            failed |= data.error_code != 0;
            data
        });
        let partitions = partitions.collect();
        FetchableTopicResponse::default().with_topic(asked.topic.clone()).with_partitions(partitions)
    });
    let topics = topics.collect();
    Look { response: FetchResponse::default().with_responses(topics), bytes, failed }
}

fn partition(
    topic: Option<&Topic>,
    asked: &FetchPartition,
    left: u64,
    first: bool,
    waiter: Option<&Arc<Notify>>,
) -> PartitionData {
    let data = PartitionData::default()
        .with_partition_index(asked.partition)
        .with_preferred_read_replica(BrokerId(-1))
        .with_high_watermark(-1)
        .with_records(Some(Bytes::new()));
    let Some(partition) = topic.and_then(|t| t.partition(asked.partition)) else {
        return data.with_error_code(ResponseError::UnknownTopicOrPartition.code());
    };
    if let Err(error) = check_epoch(asked.current_leader_epoch) {
        return data.with_error_code(error.code());
    }
    let found = partition.find(asked.fetch_offset, waiter);
    let data = data
        .with_high_watermark(found.end)
        .with_last_stable_offset(found.end)
        .with_log_start_offset(found.start);
    let slice = match found.slice {
        Ok(None) => return data,
        Ok(Some(slice)) => slice,
        Err(SliceError::OutOfRange) => return data.with_error_code(ResponseError::OffsetOutOfRange.code()),
        Err(SliceError::Storage { path, source }) => {
            tracing::error!(path = %path.display(), error = %source, "could not read a segment");
            return data.with_error_code(ResponseError::KafkaStorageError.code());
        }
    };
    let bytes_max = left.min(u64::try_from(asked.partition_max_bytes).unwrap_or(0));
    match slice.read(bytes_max, first) {
        Ok(records) => data.with_records(Some(records)),
        Err(error) => data.with_error_code(unreadable(&error).code()),
    }
}

fn unreadable(error: &std::io::Error) -> ResponseError {
    tracing::error!(%error, "could not read a segment");
    ResponseError::KafkaStorageError
}

/// There has been one leader since the beginning, in epoch 0.
fn check_epoch(epoch: i32) -> Result<(), ResponseError> {
    if epoch > 0 { Err(ResponseError::UnknownLeaderEpoch) } else { Ok(()) }
}

pub(crate) fn list_offsets(
    shared: &Shared,
    version: i16,
    request: ListOffsetsRequest,
) -> ListOffsetsResponse {
    let topics = request.topics.into_iter().map(|asked| {
        let topic = shared.topics.get(&asked.name);
        let partitions = asked.partitions.iter().map(|p| list_one(topic.as_deref(), version, p)).collect();
        ListOffsetsTopicResponse::default().with_name(asked.name).with_partitions(partitions)
    });
    ListOffsetsResponse::default().with_topics(topics.collect())
}

fn list_one(
    topic: Option<&Topic>,
    version: i16,
    asked: &ListOffsetsPartition,
) -> ListOffsetsPartitionResponse {
    const LATEST: i64 = -1;
    const EARLIEST: i64 = -2;
    const MAX_TIMESTAMP: i64 = -3;
    const EARLIEST_LOCAL: i64 = -4;
    let response = ListOffsetsPartitionResponse::default()
        .with_partition_index(asked.partition_index)
        .with_timestamp(-1)
        .with_offset(-1)
        .with_leader_epoch(-1);
    let Some(partition) = topic.and_then(|t| t.partition(asked.partition_index)) else {
        return response.with_error_code(ResponseError::UnknownTopicOrPartition.code());
    };
    if let Err(error) = check_epoch(asked.current_leader_epoch) {
        return response.with_error_code(error.code());
    }
    // Versions before 4 have no field for it.
    let epoch = if version < 4 { -1 } else { 0 };
    let query = match asked.timestamp {
        LATEST => return response.with_offset(partition.with(|log| log.end())).with_leader_epoch(epoch),
        EARLIEST | EARLIEST_LOCAL => {
            return response.with_offset(partition.with(|log| log.start())).with_leader_epoch(epoch);
        }
        MAX_TIMESTAMP => partition.with(|log| log.at_latest_time()),
        at if at >= 0 => partition.with(|log| log.at_time(at)),
        _ => return response.with_error_code(ResponseError::UnsupportedVersion.code()),
    };
    match query.and_then(|q| q.answer()) {
        Ok(None) => response,
        Ok(Some((offset, timestamp))) => {
            response.with_offset(offset).with_timestamp(timestamp).with_leader_epoch(epoch)
        }
        Err(error) => response.with_error_code(unreadable(&error).code()),
    }
}

pub(crate) fn offset_for_leader_epoch(
    shared: &Shared,
    request: &OffsetForLeaderEpochRequest,
) -> OffsetForLeaderEpochResponse {
    let topics = request.topics.iter().map(|asked| {
        let topic = shared.topics.get(&asked.topic);
        let partitions = asked.partitions.iter().map(|p| {
            let response = EpochEndOffset::default().with_partition(p.partition);
            let Some(partition) = topic.as_ref().and_then(|t| t.partition(p.partition)) else {
                return response.with_error_code(ResponseError::UnknownTopicOrPartition.code());
            };
            match check_epoch(p.current_leader_epoch) {
                Err(error) => response.with_error_code(error.code()),
                Ok(()) if p.leader_epoch < 0 => response.with_leader_epoch(-1).with_end_offset(-1),
                Ok(()) => response.with_leader_epoch(0).with_end_offset(partition.with(|log| log.end())),
            }
        });
        let partitions = partitions.collect();
        OffsetForLeaderTopicResult::default().with_topic(asked.topic.clone()).with_partitions(partitions)
    });
    OffsetForLeaderEpochResponse::default().with_topics(topics.collect())
}

pub(crate) fn delete_records(shared: &Shared, request: &DeleteRecordsRequest) -> DeleteRecordsResponse {
    let topics = request.topics.iter().map(|asked| {
        let topic = shared.topics.get(&asked.name);
        let partitions = asked.partitions.iter().map(|p| {
            let response = DeleteRecordsPartitionResult::default().with_partition_index(p.partition_index);
            match delete_below(shared, topic.as_deref(), p.partition_index, p.offset) {
                Ok(start) => response.with_low_watermark(start),
                Err(error) => response.with_low_watermark(-1).with_error_code(error.code()),
            }
        });
        let partitions = partitions.collect();
        DeleteRecordsTopicResult::default().with_name(asked.name.clone()).with_partitions(partitions)
    });
    DeleteRecordsResponse::default().with_topics(topics.collect())
}

/// Deletes the records below `offset` (-1: all there are) and returns where the log now begins.
fn delete_below(
    shared: &Shared,
    topic: Option<&Topic>,
    index: i32,
    offset: i64,
) -> Result<i64, ResponseError> {
    let topic = topic.ok_or(ResponseError::UnknownTopicOrPartition)?;
    let partition = topic.partition(index).ok_or(ResponseError::UnknownTopicOrPartition)?;
    let (start, end, deletes) = partition.with(|log| (log.start(), log.end(), log.settings.delete));
    if !deletes {
        return Err(ResponseError::PolicyViolation);
    }
    let offset = if offset == -1 { end } else { offset };
    if !(0..=end).contains(&offset) {
        return Err(ResponseError::OffsetOutOfRange);
    }
    if offset <= start {
        return Ok(start);
    }
    // In the journal first: a start that is told must not move back in a restart.
    let fact = (Subject::Start(topic.id, index), Some(json(&offset)));
    shared.journal.write(&[fact]).map_err(|error| storage(&error).0)?;
    Ok(partition.with(|log| {
        log.delete_below(offset);
        log.start()
    }))
}
