//! `forebay demo`: the whole at work in one minute.
//!
//! All is real: the demo's documents and questions go through the same topics, by the same ordinary Kafka client, as
//! anybody's would.

use super::{
    ingest, tables,
    up::{Up, stopped},
};
use crate::{
    args::{Demo, PipelineArg},
    build,
    client::Client,
    config::{ADMIN_DEFAULT, Config},
    console::{out, wrong},
    documents,
    embedded::Embedded,
    offsets::Watch,
    shipped, shutdown,
};
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use forebay_schemas::{
    Answer, CacheStatus, Document, Format, NanoUsd, Record as _, Request, RequestId, SHARED_TENANT, Status,
    Tenant, topics,
};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// How many of the questions are asked again.
const REPEATS: usize = 4;

/// How long to wait for one more result before saying that something is wrong.
const PATIENCE: Duration = Duration::from_secs(120);

/// Shows the whole.
pub async fn run(args: Demo, config: Config) -> anyhow::Result<()> {
    let shutdown = shutdown::on_signal()?;
    let documents = documents_of(&args)?;
    let questions = questions_of(&args)?;
    let plan = build::plan(&PipelineArg { pipeline: "answer".to_owned() })?;
    let started = Instant::now();
    // A demo must not fail because something else serves metrics; an address that was asked for must be had.
    let admin = match &config.admin {
        Some(admin) => admin.clone(),
        None if std::net::TcpListener::bind(ADMIN_DEFAULT).is_ok() => ADMIN_DEFAULT.to_owned(),
        None => "127.0.0.1:0".to_owned(),
    };
    let up = Up::start(config, plan, None, Embedded::StartAnywhere, &admin, shutdown.clone()).await;
    let Some(up) = stopped(up)? else { return Ok(()) };
    let show = !args.json;
    if show {
        out(format_args!("Forebay {} is up after {:.1?}.", env!("CARGO_PKG_VERSION"), started.elapsed()));
    }
    let sink = tables::Sink::start(&up.config, &up.kafka, true, &up.shutdown);
    let told = tell(&up, documents, questions, show).await;
    match told {
        Ok(true) if !args.exit => {
            if show {
                farewell(&up);
            }
            shutdown.cancelled().await;
        }
        _ => shutdown.cancel(),
    }
    let ended = up.ended(sink).await;
    told?;
    ended
}

/// Ingests, asks, prints; false where it was stopped on the way.
async fn tell(
    up: &Up,
    documents: Vec<Document>,
    questions: Vec<Request>,
    show: bool,
) -> anyhow::Result<bool> {
    let watch =
        Arc::new(Watch::new(&up.kafka, &up.plan, &up.config.topic_prefix, up.running.table_readers())?);
    let started = Instant::now();
    let count = documents.len();
    ingest::write(&up.kafka, &up.config.topic(topics::DOCUMENTS.name), documents).await?;
    if !watch.quiet(&up.shutdown).await? {
        return Ok(false);
    }
    if show {
        out(format_args!(
            "{count} documents are indexed after {:.1?}. Asking {} questions.\n",
            started.elapsed(),
            questions.len()
        ));
    }
    let mut client = Client::connect(&up.kafka, &up.config, false).await?;
    let mut totals = Totals::default();
    let repeats: Vec<Request> = questions.iter().take(REPEATS).cloned().collect();
    if !ask_all(&mut client, &mut totals, questions, up, show).await? {
        return Ok(false);
    }
    // What was answered is in the cache when nothing is on its way any more.
    if !watch.quiet(&up.shutdown).await? {
        return Ok(false);
    }
    if show {
        out(format_args!("Asking the first {} again.\n", repeats.len()));
    }
    if !ask_all(&mut client, &mut totals, repeats, up, show).await? {
        return Ok(false);
    }
    if !watch.quiet(&up.shutdown).await? {
        return Ok(false);
    }
    if show {
        out(totals.table());
    }
    Ok(true)
}

/// Asks under fresh ids and prints each result as it comes.
async fn ask_all(
    client: &mut Client,
    totals: &mut Totals,
    questions: Vec<Request>,
    up: &Up,
    show: bool,
) -> anyhow::Result<bool> {
    let mut waiting = BTreeMap::new();
    for mut question in questions {
        let id = RequestId::try_from(uuid::Uuid::now_v7().to_string()).map_err(wrong)?;
        question.id = Some(id.clone());
        client.ask(&question).await?;
        waiting.insert(id, question.question());
    }
    while !waiting.is_empty() {
        let (answer, raw) = tokio::select! {
            result = tokio::time::timeout(PATIENCE, client.result()) => result.map_err(|_| {
                wrong(format!("no result for {} s; {} are still awaited", PATIENCE.as_secs(), waiting.len()))
            })??,
            () = up.shutdown.cancelled() => return Ok(false),
        };
        let Some(question) = waiting.remove(&answer.id) else { continue };
        totals.add(&answer);
        match show {
            true => print(&question, &answer),
            false => out(raw),
        }
    }
    Ok(true)
}

fn print(question: &str, answer: &Answer) {
    out(format_args!("Q  {}", question.trim()));
    match (&answer.text, &answer.error) {
        (Some(text), _) => out(format_args!("A  {}", text.trim().replace('\n', "\n   "))),
        (None, Some(error)) => out(format_args!("!  {}: {}", answer.status.as_str(), error.message)),
        (None, None) => out(format_args!("!  {}", answer.status.as_str())),
    }
    for citation in &answer.citations {
        out(format_args!("   — {}, bytes {}–{}", citation.document, citation.start, citation.end));
    }
    let total =
        answer.timings_us.total.map_or_else(|| "?".to_owned(), |us| format!("{:.0} ms", us as f64 / 1000.0));
    out(format_args!("   cache {} · {total} · {}\n", answer.cache.as_str(), price(answer.cost_nano_usd)));
}

fn price(cost: Option<NanoUsd>) -> String {
    cost.map_or_else(|| "unpriced".to_owned(), |cost| cost.to_string())
}

/// What all results come to.
#[derive(Default)]
struct Totals {
    by_status: BTreeMap<&'static str, usize>,
    hits: usize,
    citations: usize,
    latencies_us: Vec<i64>,
    cost: NanoUsd,
    unpriced: usize,
}

impl Totals {
    fn add(&mut self, answer: &Answer) {
        *self.by_status.entry(answer.status.as_str()).or_default() += 1;
        self.hits += usize::from(answer.cache == CacheStatus::Hit && answer.status == Status::Answered);
        self.citations += answer.citations.len();
        self.latencies_us.extend(answer.timings_us.total);
        match answer.cost_nano_usd {
            Some(cost) => self.cost = self.cost.plus(cost),
            None => self.unpriced += 1,
        }
    }

    fn table(mut self) -> Table {
        self.latencies_us.sort_unstable();
        let at = |share: f64| {
            let last = self.latencies_us.len().checked_sub(1)?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a share of a small index, rounded to one"
            )]
            let index = (share * last as f64).round() as usize;
            self.latencies_us.get(index).map(|us| format!("{:.0} ms", *us as f64 / 1000.0))
        };
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY).set_header(["requests", &self.latencies_us.len().to_string()]);
        for (status, count) in &self.by_status {
            table.add_row([*status, &count.to_string()]);
        }
        table.add_row(["from the cache", &self.hits.to_string()]);
        table.add_row(["citations", &self.citations.to_string()]);
        table.add_row(["latency p50", &at(0.5).unwrap_or_default()]);
        table.add_row(["latency p99", &at(0.99).unwrap_or_default()]);
        table.add_row(["cost", &self.cost.to_string()]);
        if self.unpriced > 0 {
            table.add_row(["unpriced", &self.unpriced.to_string()]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

fn farewell(up: &Up) {
    let (servers, data) = (up.kafka.bootstrap_servers(), up.config.data.display());
    let (requests, results) = (up.config.topic("requests"), up.config.topic("results"));
    out(format_args!(
        "\nForebay stays up. Go on from another terminal:\n\
         \n  ask       forebay ask --data {data} 'What is a dead letter?'\
         \n  produce   echo '{{\"prompt\": \"What is a dead letter?\"}}' | kcat -P -b {servers} -t {requests}\
         \n  read      kcat -C -b {servers} -t {results} -o end -f '%s\\n'\
         \n  metrics   curl http://{}/metrics\
         \n  stop      Ctrl-C here",
        up.admin
    ));
}

fn documents_of(args: &Demo) -> anyhow::Result<Vec<Document>> {
    let tenant = Tenant::try_from(SHARED_TENANT.to_owned()).map_err(wrong)?;
    if !args.documents.is_empty() {
        return documents::read(&args.documents, &tenant);
    }
    let guide = |(name, text): &(&str, &str)| Document {
        id: (*name).to_owned(),
        tenant: tenant.clone(),
        format: Format::Markdown,
        text: Some((*text).to_owned()),
    };
    Ok(shipped::GUIDES.iter().map(guide).collect())
}

/// One request a line: JSON, or the text of a question.
fn questions_of(args: &Demo) -> anyhow::Result<Vec<Request>> {
    let (name, text) = match &args.questions {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|fault| wrong(format!("could not read questions {}: {fault}", path.display())))?;
            (path.display().to_string(), text)
        }
        None => ("questions.jsonl".to_owned(), shipped::QUESTIONS.to_owned()),
    };
    let mut questions = Vec::new();
    let mut faults = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        if !line.trim_start().starts_with('{') {
            questions.push(Request { prompt: Some(line.trim().to_owned()), ..Request::default() });
            continue;
        }
        match Request::decode(line.as_bytes()) {
            Ok(request) => questions.push(request),
            Err(fault) => {
                let cause =
                    std::error::Error::source(&fault).map(|cause| format!(": {cause}")).unwrap_or_default();
                faults.push(format!("{name}:{}: {fault}{cause}", number + 1));
            }
        }
    }
    if questions.is_empty() && faults.is_empty() {
        faults.push(format!("{name} has no questions; write one a line"));
    }
    if faults.is_empty() { Ok(questions) } else { Err(wrong(faults.join("\n"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_questions_can_be_read() {
        let demo = Demo { documents: Vec::new(), questions: None, exit: false, json: false };
        assert!(questions_of(&demo).unwrap().len() >= 10);
        assert!(documents_of(&demo).unwrap().len() >= 9);
    }
}
