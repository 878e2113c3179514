//! `forebay ingest`: files to the topic `documents`, by an ordinary Kafka client.

use super::up::cluster_id;
use crate::{
    args::Ingest,
    config::Config,
    console::{out, wrong},
    documents,
    embedded::{Embedded, cluster},
};
use anyhow::Context as _;
use forebay_runtime::host::kafka::{Kafka, LogContext};
use forebay_schemas::{Document, Record as _, Tenant, topics};
use indicatif::{ProgressBar, ProgressStyle};
use rdkafka::producer::{FutureProducer, FutureRecord};
use std::time::Duration;

/// Messages that are on their way at a time.
const UNACKNOWLEDGED_MAX: usize = 256;

/// Writes documents, or takes them away.
pub async fn run(args: Ingest, config: Config) -> anyhow::Result<()> {
    let tenant = Tenant::try_from(args.tenant).map_err(wrong)?;
    let documents = match args.delete {
        true => args.paths.iter().map(|path| deletion(documents::id(path), &tenant)).collect(),
        false => documents::read(&args.paths, &tenant)?,
    };
    let kafka = cluster(&config, Embedded::Find).await?.kafka;
    // A producer would wait for minutes where nobody answers.
    cluster_id(&kafka).await?;
    let count = documents.len();
    write(&kafka, &config.topic(topics::DOCUMENTS.name), documents).await?;
    out(format_args!("{count} documents {}", if args.delete { "deleted" } else { "written" }));
    Ok(())
}

fn deletion(id: String, tenant: &Tenant) -> Document {
    Document { id, tenant: tenant.clone(), format: forebay_schemas::Format::default(), text: None }
}

/// Writes documents; each is acknowledged when this returns.
pub async fn write(kafka: &Kafka, topic: &str, documents: Vec<Document>) -> anyhow::Result<()> {
    let producer: FutureProducer<LogContext> =
        kafka.producer_config_in_turn().create_with_context(LogContext)?;
    let progress = ProgressBar::new(documents.len() as u64);
    progress.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} documents {eta}")?);
    let mut sent = std::collections::VecDeque::new();
    for document in &documents {
        if sent.len() >= UNACKNOWLEDGED_MAX {
            acknowledge(&mut sent, &progress).await?;
        }
        sent.push_back((document.id.as_str(), send(&producer, topic, document).await?));
    }
    while !sent.is_empty() {
        acknowledge(&mut sent, &progress).await?;
    }
    progress.finish_and_clear();
    Ok(())
}

type Sent<'d> = (&'d str, rdkafka::producer::DeliveryFuture);

async fn send(
    producer: &FutureProducer<LogContext>,
    topic: &str,
    document: &Document,
) -> anyhow::Result<rdkafka::producer::DeliveryFuture> {
    let body = document.encode()?;
    loop {
        let mut record = FutureRecord::<str, [u8]>::to(topic).key(&document.id);
        record.payload = body.as_deref();
        match producer.send_result(record) {
            Ok(delivery) => return Ok(delivery),
            Err((fault, _))
                if fault.rdkafka_error_code() == Some(rdkafka::types::RDKafkaErrorCode::QueueFull) =>
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err((fault, _)) => {
                return Err(fault).with_context(|| format!("could not write document {}", document.id));
            }
        }
    }
}

async fn acknowledge(
    sent: &mut std::collections::VecDeque<Sent<'_>>,
    progress: &ProgressBar,
) -> anyhow::Result<()> {
    let Some((id, delivery)) = sent.pop_front() else { return Ok(()) };
    let delivered = delivery.await.context("the producer was closed")?;
    delivered.map_err(|(fault, _)| fault).with_context(|| format!("could not write document {id}"))?;
    progress.inc(1);
    Ok(())
}
