//! `forebay sql scheduler`: takes queries, and gives their tasks to executors.
//!
//! Invariant: a job ends: done, failed, taken back, or stopped by the deadline here, whatever becomes of who asked.

use super::codec::Codec;
use super::scan::ROOT;
use super::{MESSAGE_BYTES_MAX, SCHEDULER};
use crate::session;
use anyhow::Context as _;
use ballista_core::{JobId, config::TaskSchedulingPolicy, extension::SessionConfigExt as _};
use ballista_scheduler::{
    cluster::BallistaCluster,
    config::{SchedulerConfig, TaskDistributionPolicy},
    scheduler_process::{create_scheduler, start_grpc_service_with_listener},
    scheduler_server::SchedulerServer,
};
use datafusion::{
    execution::{object_store::ObjectStoreUrl, session_state::SessionStateBuilder},
    prelude::SessionConfig,
};
use datafusion_proto::protobuf::{LogicalPlanNode, PhysicalPlanNode};
use std::{
    collections::HashMap,
    io::{self, Write as _},
    sync::Arc,
    time::Duration,
};
use tables_store::memory::InMemory;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::warn;

/// An executor that was silent for so long is taken for dead, and its tasks go to others. It speaks every
/// [`super::executor::HEARTBEAT_S`].
const EXECUTOR_SILENT_S: u64 = 10;
/// How often it is looked whether one is silent, and whether a job has run for too long.
const LOOK_EVERY_S: u64 = 1;
/// How long an answer lies at its executors that nobody reads, and what is known of a job.
const KEPT_S: u64 = 300;

/// `forebay sql scheduler`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Where executors and queries reach it. Whoever does sees the rows of all tenants: keep it to this machine or to a network of its own.
    #[arg(long, value_name = "ADDRESS", default_value = SCHEDULER)]
    listen: String,
    /// How long a query may run, whatever who asks allows it.
    #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = humantime::parse_duration)]
    deadline: Duration,
}

type Scheduler = SchedulerServer<LogicalPlanNode, PhysicalPlanNode>;

/// Runs until Ctrl-C or SIGTERM.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let listener = TcpListener::bind(&args.listen).await;
    let listener = listener.with_context(|| {
        format!("could not listen on {}; choose another address by --listen", args.listen)
    })?;
    let address = listener.local_addr()?;
    let config = SchedulerConfig {
        bind_host: address.ip().to_string(),
        bind_port: address.port(),
        external_host: address.ip().to_string(),
        // Tasks are sent as they are ready, and can be taken back.
        scheduling_policy: TaskSchedulingPolicy::PushStaged,
        task_distribution: TaskDistributionPolicy::RoundRobin,
        // Who asks reaches this address and need not reach the executors.
        enable_embedded_flight_proxy: true,
        executor_timeout_seconds: EXECUTOR_SILENT_S,
        expire_dead_executor_interval_seconds: LOOK_EVERY_S,
        no_executors_grace_period_seconds: EXECUTOR_SILENT_S,
        finished_job_data_clean_up_interval_seconds: KEPT_S,
        finished_job_state_clean_up_interval_seconds: KEPT_S,
        grpc_server_max_decoding_message_size: MESSAGE_BYTES_MAX,
        grpc_server_max_encoding_message_size: MESSAGE_BYTES_MAX,
        grpc_client_max_message_size: MESSAGE_BYTES_MAX,
        override_physical_codec: Some(Arc::new(Codec::sending())),
        override_session_builder: Some(Arc::new(|config| {
            let mut state = SessionStateBuilder::new_with_default_features().with_config(config).build();
            session::register(&mut state, None)?;
            // A scan is not taken apart without a store, which is never read here.
            state
                .runtime_env()
                .register_object_store(ObjectStoreUrl::parse(ROOT)?.as_ref(), Arc::new(InMemory::new()));
            Ok(state)
        })),
        override_config_producer: Some(Arc::new(SessionConfig::new_with_ballista)),
        ..SchedulerConfig::default()
    };
    config.validate().context("could not start the scheduler")?;
    let cluster = BallistaCluster::new_from_config(&config).await.context("could not start the scheduler")?;
    let scheduler: Scheduler =
        create_scheduler(cluster, Arc::new(config)).await.context("could not start the scheduler")?;
    writeln!(io::stderr(), "scheduler of SQL at {address}")?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        served = start_grpc_service_with_listener(listener, scheduler.clone()) => served.context("the scheduler stopped"),
        stopped = stop_late_jobs(&scheduler, args.deadline) => stopped,
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// Stops jobs whose time is over. Who asked has a deadline too, and says so when it is over, but may have died.
async fn stop_late_jobs(scheduler: &Scheduler, deadline: Duration) -> anyhow::Result<()> {
    let mut looks = interval(Duration::from_secs(LOOK_EVERY_S));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen: HashMap<JobId, Instant> = HashMap::new();
    loop {
        let now = looks.tick().await;
        let running = scheduler.state.task_manager.get_running_job_cache();
        seen.retain(|job, _| running.contains_key(job));
        for job in running.keys() {
            let since = seen.entry(job.clone()).or_insert(now);
            if now.duration_since(*since) > deadline {
                warn!(%job, deadline_s = deadline.as_secs(), "a query ran for too long and is stopped");
                scheduler.cancel_job(job.clone()).await.context("could not stop a query")?;
            }
        }
    }
}
