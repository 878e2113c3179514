//! The ids of topics, which tell one that was deleted and made again from the one before: it begins at offset 0 anew.
//!
//! The Rust binding of librdkafka does not wrap this call, and asking over a connection of our own would need TLS and SASL a
//! second time; so it is called as it is, here and nowhere else.
//!
//! Invariant: what librdkafka gives out is copied before it is given back, and given back on every way out.

use super::{Kafka, LogContext, SettingsError};
use rdkafka::{
    admin::AdminClient,
    bindings as rd,
    types::{RDKafkaErrorCode, RDKafkaRespErr},
};
use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_char},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// The cluster did not say the id of a topic.
#[derive(Debug, thiserror::Error)]
#[error(
    "could not read the ids of topics {topics} at {bootstrap_servers}: {reason}; topics have ids since Kafka 2.8"
)]
pub struct TopicIdsError {
    topics: String,
    bootstrap_servers: String,
    reason: String,
}

/// Asks a cluster for the ids of topics, each time over the same connections, as long as it answers.
pub struct TopicIds {
    kafka: Kafka,
    /// Made anew after a question that failed: nobody looks after it in between.
    client: Mutex<Option<Arc<AdminClient<LogContext>>>>,
}

impl TopicIds {
    /// Connects to nothing yet.
    pub fn new(kafka: &Kafka) -> Result<Self, SettingsError> {
        let client = Mutex::new(Some(Arc::new(client(kafka)?)));
        Ok(Self { kafka: kafka.clone(), client })
    }

    /// Full name → id, as `kafka-topics --describe` prints it, of the topics among `names` that are there. Blocks.
    pub fn of(&self, names: &[String], wait: Duration) -> Result<BTreeMap<String, String>, TopicIdsError> {
        let fault = |reason: String| TopicIdsError {
            topics: names.join(", "),
            bootstrap_servers: self.kafka.bootstrap_servers().to_owned(),
            reason,
        };
        let texts: Vec<CString> = names
            .iter()
            .map(|name| CString::new(name.as_str()))
            .collect::<Result<_, _>>()
            .map_err(|_| fault("a name has a zero byte".to_owned()))?;
        let wait_ms = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX);
        let client = self.client().map_err(|unmade| fault(unmade.to_string()))?;
        let ids = describe(client.inner().native_ptr(), &texts, wait_ms);
        if ids.is_err() {
            *self.kept() = None;
        }
        ids.map_err(fault)
    }

    /// Shared and not lent: nobody waits for the answer to somebody else's question.
    fn client(&self) -> Result<Arc<AdminClient<LogContext>>, SettingsError> {
        let mut kept = self.kept();
        if let Some(client) = &*kept {
            return Ok(Arc::clone(client));
        }
        Ok(Arc::clone(kept.insert(Arc::new(client(&self.kafka)?))))
    }

    fn kept(&self) -> MutexGuard<'_, Option<Arc<AdminClient<LogContext>>>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn client(kafka: &Kafka) -> Result<AdminClient<LogContext>, SettingsError> {
    // Nobody polls it, so whatever it said of itself would only pile up.
    let config = kafka.config().set("statistics.interval.ms", "0").clone();
    config.create_with_context(LogContext).map_err(SettingsError::Client)
}

/// What was made by librdkafka and is given back when dropped.
struct Given<T>(*mut T, unsafe extern "C" fn(*mut T));

impl<T> Drop for Given<T> {
    #[expect(unsafe_code, reason = "gives back to librdkafka what it made")]
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the pointer came from the constructor that belongs to this destructor, and is dropped once.
            unsafe { (self.1)(self.0) }
        }
    }
}

#[expect(unsafe_code, reason = "the binding has no safe form of DescribeTopics")]
fn describe(
    client: *mut rd::rd_kafka_t,
    names: &[CString],
    wait_ms: i32,
) -> Result<BTreeMap<String, String>, String> {
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    // SAFETY: the client outlives this call; names are zero-terminated and outlive their collection; every object is
    // given back by its guard, in the opposite order; what results point into lives as long as the event does.
    unsafe {
        let topics = Given(
            rd::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len()),
            rd::rd_kafka_TopicCollection_destroy,
        );
        let options = Given(
            rd::rd_kafka_AdminOptions_new(client, rd::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS),
            rd::rd_kafka_AdminOptions_destroy,
        );
        // What it refuses is a time beyond its range; then its own default holds, and the poll below is bounded anyway.
        let _ = rd::rd_kafka_AdminOptions_set_request_timeout(options.0, wait_ms, std::ptr::null_mut(), 0);
        let queue = Given(rd::rd_kafka_queue_new(client), rd::rd_kafka_queue_destroy);
        rd::rd_kafka_DescribeTopics(client, topics.0, options.0, queue.0);
        let event = Given(rd::rd_kafka_queue_poll(queue.0, wait_ms), rd::rd_kafka_event_destroy);
        if event.0.is_null() {
            return Err(format!("no answer within {wait_ms} ms"));
        }
        let failed = rd::rd_kafka_event_error(event.0);
        if failed != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(RDKafkaErrorCode::from(failed).to_string());
        }
        let result = rd::rd_kafka_event_DescribeTopics_result(event.0);
        if result.is_null() {
            return Err("the answer was to another question".to_owned());
        }
        let mut count = 0;
        let described = rd::rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
        let mut ids = BTreeMap::new();
        for number in 0..count {
            let topic = *described.add(number);
            let failed = rd::rd_kafka_error_code(rd::rd_kafka_TopicDescription_error(topic));
            match failed {
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => {}
                RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART => continue,
                failed => return Err(RDKafkaErrorCode::from(failed).to_string()),
            }
            let name = CStr::from_ptr(rd::rd_kafka_TopicDescription_name(topic));
            let id = rd::rd_kafka_TopicDescription_topic_id(topic);
            let text = if id.is_null() { std::ptr::null() } else { rd::rd_kafka_Uuid_base64str(id) };
            // Sixteen zero bytes: a broker that knows no ids.
            let none = |text: &CStr| text.to_bytes().iter().all(|&byte| byte == b'A' || byte == b'=');
            if text.is_null() || none(CStr::from_ptr(text)) {
                return Err(format!("topic {} has none", name.to_string_lossy()));
            }
            // As Kafka's own tools write them.
            let id = CStr::from_ptr(text).to_string_lossy().replace('+', "-").replace('/', "_");
            ids.insert(name.to_string_lossy().into_owned(), id);
        }
        Ok(ids)
    }
}
