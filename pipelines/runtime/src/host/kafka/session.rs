//! How long a member of a group may be silent, and how often it speaks: what its fence is built on.
//!
//! By the classic protocol the member itself says so when it joins. By KIP-848 the broker decides, for each group, and
//! librdkafka keeps the answer to itself; so the group is asked for its settings.

use super::client::{Kafka, LogContext, is_kip_848};
use crate::fence::Fence;
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
};
use std::time::Duration;
use tracing::{info, warn};

/// How long the cluster may take to say it. Far below what the fence of a member that has just begun could miss.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What Kafka's brokers say where nobody told them otherwise.
const KIP_848_SESSION: Duration = Duration::from_secs(45);
const KIP_848_HEARTBEAT: Duration = Duration::from_secs(5);

/// The fence of a member with these settings, as far as they tell.
pub(super) fn fence(config: &ClientConfig) -> Fence {
    if is_kip_848(config) {
        return Fence::new(KIP_848_SESSION, KIP_848_HEARTBEAT);
    }
    let millis = |name: &str, usual: u64| {
        let set = config.get(name).and_then(|value| value.parse().ok());
        Duration::from_millis(set.unwrap_or(usual))
    };
    Fence::new(millis("session.timeout.ms", 10_000), millis("heartbeat.interval.ms", 1_000))
}

/// Sets the fence to what the broker has decided. Blocks.
pub(super) fn ask(kafka: &Kafka, group: &str, fence: &Fence) {
    match asked(kafka, group) {
        Ok((session, heartbeat)) => {
            info!(group, ?session, ?heartbeat, "the group's sessions");
            fence.set(session, heartbeat);
        }
        Err(reason) => warn!(
            group,
            reason,
            assumed = ?KIP_848_SESSION,
            "could not ask for the group's session timeout; if the broker's is shorter, a process that stood still for longer may write results again"
        ),
    }
}

fn asked(kafka: &Kafka, group: &str) -> Result<(Duration, Duration), String> {
    let said = |fault: rdkafka::error::KafkaError| fault.to_string();
    let admin: AdminClient<LogContext> = kafka.config().create_with_context(LogContext).map_err(said)?;
    let options = AdminOptions::new().request_timeout(Some(ANSWER_MAX));
    let group = [ResourceSpecifier::Group(group)];
    let answers = futures::executor::block_on(admin.describe_configs(&group, &options)).map_err(said)?;
    let answer = answers.into_iter().next().ok_or("no answer")?.map_err(|code| code.to_string())?;
    let millis = |name: &str| {
        let value = answer.get(name).and_then(|entry| entry.value.as_ref()?.parse().ok());
        value.map(Duration::from_millis).ok_or_else(|| format!("the group has no {name}"))
    };
    Ok((millis("consumer.session.timeout.ms")?, millis("consumer.heartbeat.interval.ms")?))
}
