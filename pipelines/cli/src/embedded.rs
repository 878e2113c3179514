//! Which Kafka this process speaks to: the one that was named, or the embedded broker.

use crate::{
    config::{self, Config, LISTEN_DEFAULT},
    console::wrong,
};
use forebay_broker::{Broker, StartError};
use forebay_runtime::host::kafka::{Kafka, KafkaSettings};
use std::{net::SocketAddr, time::Duration};

/// A cluster, and the broker where it runs in this process.
pub struct Cluster {
    pub kafka: Kafka,
    pub broker: Option<Broker>,
}

/// How the embedded broker is looked for where no cluster was named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Embedded {
    /// Started here, on its address or none.
    Start,
    /// Started here; where its usual address is taken, on any other.
    StartAnywhere,
    /// Found: another process runs it on the same data folder.
    Find,
}

/// Finds or starts the cluster.
pub async fn cluster(config: &Config, embedded: Embedded) -> anyhow::Result<Cluster> {
    if let Some(servers) = &config.bootstrap_servers {
        return Ok(Cluster { kafka: kafka(config, servers)?, broker: None });
    }
    if embedded == Embedded::Find {
        return Ok(Cluster { kafka: kafka(config, &running(config).await?)?, broker: None });
    }
    let broker = start(config, embedded).await?;
    let kafka = kafka(config, &broker.address().to_string())?;
    Ok(Cluster { kafka, broker: Some(broker) })
}

fn kafka(config: &Config, servers: &str) -> anyhow::Result<Kafka> {
    let (bootstrap_servers, registry) = (servers.to_owned(), config.registry.clone());
    let settings = KafkaSettings { bootstrap_servers, properties: config.kafka.clone(), registry };
    Kafka::new(&settings).map_err(wrong)
}

async fn start(config: &Config, embedded: Embedded) -> anyhow::Result<Broker> {
    let listen = config::address("listen", config.listen.as_deref().unwrap_or(LISTEN_DEFAULT))?;
    let mut settings = forebay_broker::Config::new(config.data.join("broker"), listen);
    let may_move = embedded == Embedded::StartAnywhere && config.listen.is_none();
    if may_move {
        settings.bind_patience = Duration::ZERO;
    }
    match Broker::start(settings.clone()).await {
        Err(StartError::AddressInUse { .. }) if may_move => {
            settings.listen = SocketAddr::from(([127, 0, 0, 1], 0));
            Ok(Broker::start(settings).await?)
        }
        started => Ok(started?),
    }
}

/// The address of the broker that another process runs on our data folder.
pub async fn running(config: &Config) -> anyhow::Result<String> {
    let file = config.data.join("broker").join("address");
    let none = || {
        wrong(format!(
            "no embedded broker runs on {}; start one by `forebay up --data {0}`, or name your Kafka by --bootstrap-servers",
            config.data.display()
        ))
    };
    let address = std::fs::read_to_string(file).map_err(|_| none())?;
    let address = address.trim().to_owned();
    let connected =
        tokio::time::timeout(Duration::from_secs(2), tokio::net::TcpStream::connect(&address)).await;
    match connected {
        Ok(Ok(_)) => Ok(address),
        _ => Err(none()),
    }
}
