//! `forebay sql scheduler`: takes queries, and gives their tasks to executors.
//!
//! Invariant: a job ends: done, failed, taken back, or stopped by the deadline here, whatever becomes of who asked.

use super::codec::Codec;
use super::scan::ROOT;
use super::{MESSAGE_BYTES_MAX, SCHEDULER};
use crate::session;
use anyhow::Context as _;
use arrow_flight::flight_service_server::FlightServiceServer;
use axum::{extract::State, http::StatusCode, routing::get, serve::ListenerExt as _};
use ballista_core::{
    JobId, config::TaskSchedulingPolicy, extension::SessionConfigExt as _,
    flight_proxy_service::BallistaFlightProxyService,
    serde::protobuf::scheduler_grpc_server::SchedulerGrpcServer,
};
use ballista_scheduler::{
    cluster::BallistaCluster,
    config::{SchedulerConfig, TaskDistributionPolicy},
    scheduler_process::create_scheduler,
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
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};
use tables_store::memory::InMemory;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};
use tonic::service::RoutesBuilder;
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
        served = serve(listener, scheduler.clone()) => served.context("the scheduler stopped"),
        stopped = stop_late_jobs(&scheduler, args.deadline) => stopped,
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// What Ballista would serve, and beside it how many tasks the executors take at a time, which it tells nobody.
async fn serve(listener: TcpListener, scheduler: Scheduler) -> io::Result<()> {
    let bytes_max = MESSAGE_BYTES_MAX as usize;
    let mut routes = RoutesBuilder::default();
    routes.add_service(
        SchedulerGrpcServer::new(scheduler.clone())
            .max_encoding_message_size(bytes_max)
            .max_decoding_message_size(bytes_max),
    );
    // Who asks reaches this address and need not reach the executors.
    routes.add_service(
        FlightServiceServer::new(BallistaFlightProxyService::new(bytes_max, bytes_max, false, None))
            .max_encoding_message_size(bytes_max)
            .max_decoding_message_size(bytes_max),
    );
    let routes = routes.routes().into_axum_router().route("/readyz", get(ready).with_state(scheduler));
    let listener = listener.tap_io(|stream| {
        // A connection that is gone already is told of when it is read.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, routes.into_make_service_with_connect_info::<SocketAddr>()).await
}

/// Whether work would be done, and by how many.
async fn ready(State(scheduler): State<Scheduler>) -> (StatusCode, String) {
    let executors = scheduler.state.executor_manager.get_executors_state().await.unwrap_or_default();
    let tasks: u32 = executors.iter().map(|(executor, ..)| executor.specification.vcores).sum();
    let (status, word) = match scheduler.is_ready() {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
    };
    (status, format!("{word}: {} executors, {tasks} tasks\n", executors.len()))
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
