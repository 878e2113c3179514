//! `forebay up` and `forebay run`: stages at work until they are told to stop.

use super::{tables, topics};
use crate::{
    alerts,
    args::{PipelineArg, Run},
    build,
    config::{self, ADMIN_DEFAULT, Config},
    console::{say, wrong},
    embedded::{Cluster, Embedded, cluster},
    models, shutdown, standings,
    watchdog::Watchdog,
};
use anyhow::Context as _;
use forebay_broker::Broker;
use forebay_operator::Clock;
use forebay_plan::{Plan, PlannedStep};
use forebay_runtime::{
    host::kafka::Kafka,
    process::{Launch, LaunchError, Running},
};
use forebay_telemetry::{
    Health, Settings, Telemetry,
    admin::{self, Pages},
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

/// All stages of a pipeline.
pub async fn up(pipeline: &PipelineArg, config: Config) -> anyhow::Result<()> {
    let shutdown = shutdown::on_signal()?;
    let plan = build::plan(pipeline)?;
    let admin = config.admin.clone().unwrap_or_else(|| ADMIN_DEFAULT.to_owned());
    let Some(up) = stopped(Up::start(config, plan, None, Embedded::Start, &admin, shutdown).await)? else {
        return Ok(());
    };
    say(format_args!("forebay: pipeline {} is up", up.plan.name));
    up.tell();
    let sink = tables::Sink::start(&up.config, &up.kafka, false, &up.shutdown);
    up.ended(sink).await
}

/// One stage of a pipeline.
pub async fn run(args: &Run, config: Config) -> anyhow::Result<()> {
    let shutdown = shutdown::on_signal()?;
    let plan = build::plan(&PipelineArg { pipeline: args.pipeline.clone() })?;
    plan.step(&args.stage).map_err(wrong)?;
    // A free port: several stages share a machine.
    let admin = config.admin.clone().unwrap_or_else(|| "127.0.0.1:0".to_owned());
    let started = Up::start(config, plan, Some(&args.stage), Embedded::Find, &admin, shutdown).await;
    let Some(up) = stopped(started)? else { return Ok(()) };
    say(format_args!("forebay: stage {} of pipeline {} is up", args.stage, up.plan.name));
    up.tell();
    up.ended(None).await
}

/// Nothing where the process was told to stop before it was up: that is what it did.
pub fn stopped(started: anyhow::Result<Up>) -> anyhow::Result<Option<Up>> {
    match started {
        Err(fault) if matches!(fault.downcast_ref(), Some(LaunchError::Stopped)) => Ok(None),
        started => started.map(Some),
    }
}

/// A process at work.
pub struct Up {
    pub config: Config,
    pub plan: Plan,
    pub kafka: Kafka,
    pub running: Running,
    pub admin: SocketAddr,
    pub shutdown: CancellationToken,
    broker: Option<Broker>,
    telemetry: Telemetry,
    _watchdog: Watchdog,
    /// Given when everything has ended and the admin port may go.
    gone: CancellationToken,
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Up {
    /// Starts the broker where it is ours, the tables, the stages (all, or the one of this key) and the admin port.
    pub async fn start(
        config: Config,
        plan: Plan,
        stage: Option<&str>,
        embedded: Embedded,
        admin: &str,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Self> {
        let listener = listen(admin).await?;
        let admin = listener.local_addr()?;
        let telemetry = telemetry(&config, stage)?;
        let health = Health::new();
        let _watchdog = Watchdog::start(health.clone())?;
        let gone = CancellationToken::new();
        let chosen: Vec<&PlannedStep> =
            plan.steps.iter().filter(|step| stage.is_none_or(|stage| step.key == stage)).collect();
        models::check(&config, &plan, &chosen)?;
        let client = models::client(&config).await?.used_by(&chosen);
        telemetry.watch_pool(client.endpoints());
        let serving = tokio::spawn(admin::serve(
            listener,
            telemetry.clone(),
            health.clone(),
            Pages {
                pool: Arc::new(client.status()),
                budgets: standings::page(client.budgets.clone(), Clock::System),
            },
            gone.clone().cancelled_owned(),
        ));
        let Cluster { kafka, broker } = cluster(&config, embedded).await?;
        let cluster = cluster_id(&kafka).await?;
        match &broker {
            Some(_) => topics::make(&kafka, &plan, &config).await?,
            None => topics::demand(&kafka, &plan, &config).await?,
        }
        let database = build::copies(&config.data).await?;
        let resources = build::resources(&config, &plan, &cluster, &client, &database).await?;
        client.keep();
        if let Some(budgets) = client.budgets {
            let memory = alerts::Memory::open(&config, &database).await?;
            let (meter, clock) = (telemetry.alerts(), Clock::System);
            alerts::start(budgets, memory, &config, &kafka, meter, clock, shutdown.clone())?;
        }
        let launch = Launch {
            kafka: &kafka,
            cluster,
            prefix: &config.topic_prefix,
            plan: &plan,
            steps: build::steps(chosen.iter().copied(), &resources)?,
            tables: build::tables(&plan, chosen.iter().copied(), &resources),
            is_paid: &|step| models::is_paid(&config, step),
            claims: build::claims(&config).await?,
            memory_bytes_max: config.memory_bytes,
            telemetry: &telemetry,
            health: &health,
            clock: Clock::System,
        };
        let running = launch.start(shutdown.clone()).await?;
        let stopping = (health.clone(), shutdown.clone());
        tokio::spawn(async move {
            stopping.1.cancelled().await;
            stopping.0.stopping();
        });
        Ok(Self {
            config,
            plan,
            kafka,
            running,
            admin,
            shutdown,
            broker,
            telemetry,
            _watchdog,
            gone,
            serving,
        })
    }

    /// Says where things are.
    pub fn tell(&self) {
        let servers = self.kafka.bootstrap_servers();
        match &self.broker {
            Some(_) => say(format_args!(
                "  broker   {servers}  (embedded: one node, no TLS, data in {})",
                self.config.data.display()
            )),
            None => say(format_args!("  broker   {servers}")),
        }
        say(format_args!("  metrics  http://{}/metrics", self.admin));
        say(format_args!("  health   http://{}/healthz  http://{0}/readyz", self.admin));
        say("  stop     Ctrl-C, or SIGTERM");
        info!(admin = %self.admin, broker = servers, pipeline = self.plan.name, "up");
    }

    /// Waits for the end of all stages, then ends the rest in order: the log last, since all others speak to it.
    pub async fn ended(self, sink: Option<tables::Sink>) -> anyhow::Result<()> {
        let outcome = self.running.ended().await;
        if let Some(sink) = sink {
            sink.end().await;
        }
        self.telemetry.shutdown().await;
        if let Some(broker) = self.broker {
            broker.shutdown().await;
        }
        self.gone.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(2), self.serving).await;
        Ok(outcome?)
    }
}

async fn listen(address: &str) -> anyhow::Result<TcpListener> {
    let parsed = config::address("admin", address)?;
    TcpListener::bind(parsed).await.map_err(|fault| {
        anyhow::anyhow!("could not serve metrics and health on {parsed}: {fault}; choose another address by --admin, 127.0.0.1:0 for a free port")
    })
}

fn telemetry(config: &Config, stage: Option<&str>) -> anyhow::Result<Telemetry> {
    let name = stage.map_or_else(|| "forebay".to_owned(), |stage| format!("forebay.{stage}"));
    let mut settings = Settings::new(name, env!("CARGO_PKG_VERSION"));
    settings.otlp_endpoint = config.otlp_endpoint.clone();
    settings.gen_ai = config.gen_ai;
    Ok(Telemetry::start(settings)?)
}

/// The id of the cluster; an error that names its address where nobody answers there soon.
pub async fn cluster_id(kafka: &Kafka) -> anyhow::Result<Arc<str>> {
    let kafka = kafka.clone();
    let asked = tokio::task::spawn_blocking(move || kafka.cluster_id(Duration::from_secs(10)));
    Ok(asked.await.context("cluster id")??.into())
}
