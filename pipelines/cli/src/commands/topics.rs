//! `forebay topics apply|describe`, and the same for commands that need the topics to be there.

use crate::{
    args::Topics,
    build,
    config::Config,
    console::{out, wrong},
    embedded::{Embedded, cluster},
};
use anyhow::Context as _;
use forebay_plan::Plan;
use forebay_runtime::host::kafka::{
    Kafka,
    topics::{Change, Wanted, apply, compare, existing},
};
use forebay_schemas::topics::{ENDINGS, OUTCOMES, RESULTS, Topic};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

const WAIT: Duration = Duration::from_secs(10);

/// How long a topic that somebody has just made may be unknown to a broker of several, and how often to look.
const SEEN_MAX: Duration = Duration::from_secs(5);
const SEEN_EVERY: Duration = Duration::from_millis(500);

/// Looks at the topics, or makes them.
pub async fn run(topics: Topics, config: Config) -> anyhow::Result<()> {
    let (pipeline, dry_run, replication) = match &topics {
        Topics::Apply { pipeline, dry_run, replication_factor } => (pipeline, *dry_run, *replication_factor),
        Topics::Describe { pipeline } => (pipeline, true, None),
    };
    let plan = build::plan(pipeline)?;
    let kafka = cluster(&config, Embedded::Find).await?.kafka;
    let changes = changes(&kafka, &plan, &config).await?;
    out(format_args!("topics of pipeline {} at {}:", plan.name, kafka.bootstrap_servers()));
    for change in &changes {
        out(change);
    }
    if dry_run {
        return Ok(());
    }
    apply(&kafka, &changes, replication.unwrap_or(-1)).await?;
    out("done");
    Ok(())
}

/// Makes all topics, as only the embedded broker's owner may without being asked.
pub async fn make(kafka: &Kafka, plan: &Plan, config: &Config) -> anyhow::Result<()> {
    let changes = changes(kafka, plan, config).await?;
    Ok(apply(kafka, &changes, 1).await?)
}

/// Names the topics that are missing, and how to have them.
pub async fn demand(kafka: &Kafka, plan: &Plan, config: &Config) -> anyhow::Result<()> {
    demand_within(kafka, plan, config, SEEN_MAX).await
}

async fn demand_within(kafka: &Kafka, plan: &Plan, config: &Config, wait: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + wait;
    let missing = loop {
        let missing = missing(&changes(kafka, plan, config).await?);
        if missing.is_empty() {
            return alike(kafka, plan, config).await;
        }
        if Instant::now() >= until {
            break missing;
        }
        tokio::time::sleep(SEEN_EVERY).await;
    };
    Err(wrong(format!(
        "Kafka at {} has no topic {}; make the topics by `forebay topics apply --bootstrap-servers {0}{}`",
        kafka.bootstrap_servers(),
        missing.join(", "),
        match config.topic_prefix.as_str() {
            "" => String::new(),
            prefix => format!(" --topic-prefix {prefix}"),
        }
    )))
}

fn missing(changes: &[Change]) -> Vec<String> {
    let name = |change: &Change| match change {
        Change::Create(wanted) => Some(wanted.name.clone()),
        _ => None,
    };
    changes.iter().filter_map(name).collect()
}

/// A record and what it becomes lie at the same partition number, and so do a record and the ledger of its paid calls:
/// without that a result could be written, or a call paid for, twice.
async fn alike(kafka: &Kafka, plan: &Plan, config: &Config) -> anyhow::Result<()> {
    let there = there(kafka).await?;
    let together = [&ENDINGS, &RESULTS, &OUTCOMES].map(|topic: &Topic| topic.name.to_owned()).into();
    let ledgers = plan.steps.iter().flat_map(|step| step.ledgers());
    let groups = ledgers.map(|(input, ledger)| vec![input, ledger]).chain([together]);
    for group in groups {
        let count = |topic: &String| there.get_key_value(&config.topic(topic));
        let counts: Vec<_> = group.iter().filter_map(count).collect();
        if counts.windows(2).any(|pair| pair[0].1 != pair[1].1) {
            let shown: Vec<_> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
            return Err(wrong(format!(
                "these topics must have equally many partitions, and have: {}; make them anew by `forebay topics apply`",
                shown.join(", ")
            )));
        }
    }
    Ok(())
}

/// Full name → number of partitions, of all topics of the cluster.
pub async fn there(kafka: &Kafka) -> anyhow::Result<BTreeMap<String, i32>> {
    let kafka = kafka.clone();
    // Asking blocks.
    Ok(tokio::task::spawn_blocking(move || existing(&kafka, WAIT)).await.context("topics")??)
}

async fn changes(kafka: &Kafka, plan: &Plan, config: &Config) -> anyhow::Result<Vec<Change>> {
    let wanted = plan.topics().into_iter().map(|topic| {
        Wanted::new(config.topic(&topic.name), config.partitions, topic.cleanup, topic.from_clients)
    });
    Ok(compare(wanted.collect(), &there(kafka).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{args::PipelineArg, config::merge};

    #[tokio::test(flavor = "multi_thread")]
    async fn topics_that_are_made_a_moment_later_are_seen() {
        let data = tempfile::tempdir().unwrap();
        let flags = [("data", data.path().to_str().unwrap()), ("listen", "127.0.0.1:0"), ("partitions", "1")];
        let config = merge(None, |_| None, &flags.map(|(path, value)| (path, value.to_owned()))).unwrap();
        let plan = build::plan(&PipelineArg { pipeline: "answer".to_owned() }).unwrap();
        let cluster = cluster(&config, Embedded::Start).await.unwrap();
        let (demanded, made) = tokio::join!(
            demand_within(&cluster.kafka, &plan, &config, Duration::from_secs(60)),
            make(&cluster.kafka, &plan, &config)
        );
        made.unwrap();
        demanded.unwrap();
        cluster.broker.unwrap().shutdown().await;
    }
}
