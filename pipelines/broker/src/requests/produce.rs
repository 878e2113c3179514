//! Produce and InitProducerId.
//!
//! Invariant: an acknowledgement leaves after the batch is written, and under `Fsync::EveryBatch` after
//! it is on disk. A retry is acknowledged with the offset of the first time.

use super::{Outcome, Peer, text};
use crate::Fsync;
use crate::clock::wall_ms;
use crate::log::AppendError;
use crate::partition::Partition;
use crate::shared::Shared;
use crate::topics::storage;
use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::produce_response::{PartitionProduceResponse, TopicProduceResponse};
use kafka_protocol::messages::{
    InitProducerIdRequest, InitProducerIdResponse, ProduceRequest, ProduceResponse, ProducerId,
};

pub(crate) async fn produce(shared: &Shared, peer: &Peer, request: ProduceRequest) -> Outcome {
    let acks = request.acks;
    let refused = match (acks, &request.transactional_id) {
        (_, Some(_)) => Some(ResponseError::TransactionalIdAuthorizationFailed),
        (-1..=1, None) => None,
        _ => Some(ResponseError::InvalidRequiredAcks),
    };
    let mut responses = Vec::with_capacity(request.topic_data.len());
    let mut failed = false;
    for data in request.topic_data {
        let topic = shared.topics.get(&data.name);
        let mut partitions = Vec::with_capacity(data.partition_data.len());
        for part in data.partition_data {
            let partition = topic.as_ref().and_then(|t| t.partition(part.index));
            let response = match (refused, partition) {
                (Some(error), _) => failure(error, None),
                (None, None) => failure(ResponseError::UnknownTopicOrPartition, None),
                (None, Some(p)) => {
                    store(p, shared.config.fsync, &part.records.unwrap_or_default(), peer).await
                }
            };
            failed |= response.error_code != 0;
            partitions.push(response.with_index(part.index));
        }
        responses
            .push(TopicProduceResponse::default().with_name(data.name).with_partition_responses(partitions));
    }
    match (acks, failed) {
        (0, false) => Outcome::Silence,
        // The only way to tell a client that wants no answer.
        (0, true) => Outcome::Close("a batch with acks=0 was refused"),
        _ => ProduceResponse::default().with_responses(responses).into(),
    }
}

async fn store(partition: &Partition, fsync: Fsync, batch: &Bytes, peer: &Peer) -> PartitionProduceResponse {
    let appended = match partition.append(batch, wall_ms()) {
        None => return failure(ResponseError::UnknownTopicOrPartition, None),
        Some(Err(error)) => return refuse(&error, peer),
        Some(Ok(appended)) => appended,
    };
    if matches!(fsync, Fsync::EveryBatch)
        && let Err(error) = partition.flush().await
    {
        return failure(storage(&error).0, None);
    }
    PartitionProduceResponse::default()
        .with_base_offset(appended.base)
        .with_log_append_time_ms(appended.append_ms)
        .with_log_start_offset(partition.with(|log| log.start()))
}

fn refuse(error: &AppendError, peer: &Peer) -> PartitionProduceResponse {
    let code = match error {
        AppendError::Corrupt(_) => ResponseError::CorruptMessage,
        AppendError::Invalid(_) => ResponseError::InvalidRecord,
        AppendError::TooLarge { .. } => ResponseError::MessageTooLarge,
        AppendError::OutOfOrder => ResponseError::OutOfOrderSequenceNumber,
        AppendError::StoredLongAgo => ResponseError::DuplicateSequenceNumber,
        AppendError::StaleEpoch => ResponseError::InvalidProducerEpoch,
        AppendError::Storage { .. } => return failure(storage(error).0, None),
    };
    tracing::warn!(peer = %peer.remote, client = peer.client_id, %error, "batch refused");
    failure(code, Some(error.to_string()))
}

fn failure(error: ResponseError, message: Option<String>) -> PartitionProduceResponse {
    PartitionProduceResponse::default()
        .with_error_code(error.code())
        .with_error_message(message.map(text))
        .with_base_offset(-1)
        .with_log_append_time_ms(-1)
}

pub(crate) fn init_producer_id(
    shared: &Shared,
    peer: &Peer,
    request: &InitProducerIdRequest,
) -> InitProducerIdResponse {
    let refused = |error: ResponseError| {
        InitProducerIdResponse::default()
            .with_error_code(error.code())
            .with_producer_id(ProducerId(-1))
            .with_producer_epoch(-1)
    };
    if let Some(id) = &request.transactional_id {
        tracing::warn!(peer = %peer.remote, transactional_id = %id.as_str(), "refused: transactions are not supported");
        return refused(ResponseError::TransactionalIdAuthorizationFailed);
    }
    // A producer that wants a higher epoch after an error gets a new id, which starts at sequence 0 too.
    match shared.producer_ids.next() {
        Ok(id) => InitProducerIdResponse::default().with_producer_id(ProducerId(id)).with_producer_epoch(0),
        Err(error) => refused(storage(&error).0),
    }
}
