//! `forebay sql executor`: works tasks of queries out, over the tables that its own settings name.
//!
//! Invariant: of all places that a plan could name, an executor reads those below the root of the tables and no others. What it writes
//! lies in a folder of its own, which is gone when it leaves.

use super::codec::Codec;
use super::scan::ROOT;
use super::{MESSAGE_BYTES_MAX, SCHEDULER};
use crate::{lake, session, settings::Settings, shell};
use anyhow::{Context as _, bail};
use ballista_core::{
    config::TaskSchedulingPolicy, extension::SessionConfigExt as _, registry::BallistaFunctionRegistry,
};
use ballista_executor::executor_process::{ExecutorProcessConfig, start_executor_process};
use datafusion::{
    common::{DataFusionError, plan_err},
    execution::{
        disk_manager::{DiskManagerBuilder, DiskManagerMode},
        object_store::ObjectStoreRegistry,
        runtime_env::RuntimeEnvBuilder,
        session_state::SessionStateBuilder,
    },
    prelude::SessionConfig,
};
use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
};
use tables_store::ObjectStore;
use tokio::net::{TcpListener, lookup_host};
use url::Url;

/// How often an executor says that it is there.
pub(super) const HEARTBEAT_S: u64 = 2;
/// How long it looks for its scheduler at the start.
const SCHEDULER_WAIT_S: u16 = 30;
/// Where two free ports beside each other are looked for: below the range from which the kernel takes ports for outgoing connections, or
/// one of those might have them before the executor does.
const PORTS_FROM: u16 = 20_000;
const PAIRS_TRIED: u16 = 5_000;
/// What may lie on disk of what tasks have no memory for.
const SPILL_BYTES: u64 = 64 << 30;

/// `forebay sql executor`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The scheduler that it works for.
    #[arg(long, value_name = "ADDRESS", default_value = SCHEDULER)]
    scheduler: String,
    /// Where other executors and the scheduler read its rows; at the next port it takes tasks.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50051")]
    listen: String,
    /// The name or address by which others reach it, where --listen is all addresses of the machine.
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// How many tasks run at a time; one for each core when absent.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1_024))]
    tasks: Option<u32>,
    /// The memory that all tasks together may take, in MiB; what is more goes to disk.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..=1_048_576))]
    memory: u32,
    /// Where rows lie between two stages; a folder of its own is made there, and goes with it.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Tables of prices for cost(): those of who asks.
    #[arg(long, value_name = "FILES", env = "FOREBAY_PRICES")]
    prices: Option<String>,
}

/// Runs until Ctrl-C or SIGTERM, and lets its tasks end first.
pub(crate) async fn run(args: Args, settings: Settings) -> anyhow::Result<()> {
    let prices = args.prices.as_deref().map(shell::prices).transpose()?.flatten();
    let root = settings.tables_url()?;
    let options = settings.tables_options.clone().into_iter().collect();
    let store = lake::store(&root, &options)?;
    let (scheduler_host, scheduler_port) = host_and_port(&args.scheduler, "--scheduler")?;
    let address = bound(&args.listen).await?;
    let advertised = match args.advertise {
        Some(host) => host,
        None if address.ip().is_unspecified() => {
            bail!(
                "--listen is {address}, by which nobody else reaches this machine; say by --advertise how they do"
            );
        }
        None => address.ip().to_string(),
    };
    let folder = match &args.folder {
        Some(parent) => tempfile::tempdir_in(parent)
            .with_context(|| format!("could not make a folder in {}; check --folder", parent.display()))?,
        None => tempfile::tempdir().context("could not make a folder; name a place by --folder")?,
    };
    let spilled = folder.path().join("spilled");
    std::fs::create_dir(&spilled)?;
    let disk = DiskManagerBuilder::default()
        .with_mode(DiskManagerMode::Directories(vec![spilled]))
        .with_max_temp_directory_size(SPILL_BYTES);
    let runtime = RuntimeEnvBuilder::new()
        .with_object_store_registry(Arc::new(Tables(store)))
        .with_disk_manager_builder(disk)
        .build_arc()?;
    let mut state = SessionStateBuilder::new_with_default_features().build();
    session::register(&mut state, prices.clone())?;
    let rows = folder.path().join("rows");
    std::fs::create_dir(&rows)?;
    let config = ExecutorProcessConfig {
        bind_host: address.ip().to_string(),
        external_host: Some(advertised),
        port: address.port(),
        grpc_port: address.port().saturating_add(1),
        scheduler_host,
        scheduler_port,
        scheduler_connect_timeout_seconds: SCHEDULER_WAIT_S,
        // 0 is one for each core.
        vcores: args.tasks.map_or(Ok(0), usize::try_from)?,
        task_scheduling_policy: TaskSchedulingPolicy::PushStaged,
        work_dir: Some(rows.display().to_string()),
        grpc_max_decoding_message_size: MESSAGE_BYTES_MAX,
        grpc_max_encoding_message_size: MESSAGE_BYTES_MAX,
        executor_heartbeat_interval_seconds: HEARTBEAT_S,
        memory_pool_size: Some(u64::from(args.memory) << 20),
        override_function_registry: Some(Arc::new(BallistaFunctionRegistry::from(&state))),
        override_runtime_producer: Some(Arc::new(move |_| Ok(Arc::clone(&runtime)))),
        override_config_producer: Some(Arc::new(SessionConfig::new_with_ballista)),
        override_physical_codec: Some(Arc::new(Codec::executing(prices))),
        ..ExecutorProcessConfig::default()
    };
    writeln!(io::stderr(), "executor of SQL at {address} for {}, over {root}", args.scheduler)?;
    let worked = start_executor_process(Arc::new(config)).await;
    worked.with_context(|| format!("could not work for the scheduler at {}", args.scheduler))?;
    Ok(folder.close()?)
}

/// The address to listen on, where that and the next port are free; with port 0, any two. The executor itself, which takes them again,
/// would not say which it could not have.
async fn bound(listen: &str) -> anyhow::Result<SocketAddr> {
    let wrong = || format!("could not listen on {listen}; choose another address by --listen");
    let address = lookup_host(listen).await.with_context(wrong)?.next().with_context(wrong)?;
    // Whether it can be had at all.
    drop(TcpListener::bind(address).await.with_context(wrong)?);
    if address.port() != 0 {
        return pair(address).await;
    }
    // Each process begins elsewhere: two that start at once seldom look at the same ports.
    let begin = std::process::id().wrapping_mul(7919);
    for step in 0..PAIRS_TRIED {
        let pair_number = begin.wrapping_add(step.into()) % u32::from(PAIRS_TRIED);
        let port = PORTS_FROM + 2 * u16::try_from(pair_number)?;
        if let Ok(free) = pair(SocketAddr::new(address.ip(), port)).await {
            return Ok(free);
        }
    }
    bail!("found no two free ports beside each other for --listen {listen}; name the first")
}

/// The same address, where its port and the next are free.
async fn pair(address: SocketAddr) -> anyhow::Result<SocketAddr> {
    let _first = TcpListener::bind(address).await?;
    let Some(second) = address.port().checked_add(1) else {
        bail!("--listen is {address}, and there is no port behind it, where tasks are taken; choose another");
    };
    TcpListener::bind((address.ip(), second)).await.with_context(|| {
        format!("could not listen on port {second}, where tasks are taken; choose another by --listen")
    })?;
    Ok(address)
}

pub(crate) fn host_and_port(address: &str, flag: &str) -> anyhow::Result<(String, u16)> {
    let parts = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    match parts {
        Some((host, port)) if !host.is_empty() => Ok((host.to_owned(), port)),
        _ => bail!("{flag} is {address:?}; write host and port, such as {SCHEDULER}"),
    }
}

/// The store of the tables, and no other.
#[derive(Debug)]
struct Tables(Arc<dyn ObjectStore>);

impl ObjectStoreRegistry for Tables {
    fn register_store(&self, _: &Url, _: Arc<dyn ObjectStore>) -> Option<Arc<dyn ObjectStore>> {
        None
    }

    fn get_store(&self, url: &Url) -> Result<Arc<dyn ObjectStore>, DataFusionError> {
        match ROOT.starts_with(url.as_str()) && url.scheme() == "tables" {
            true => Ok(Arc::clone(&self.0)),
            false => plan_err!("an executor reads tables, and nothing at {url}"),
        }
    }
}
