//! What the call stack of `operators/calls` adds to a model call: time and CPU, beside bare reqwest to the same server.
//!
//! Run by hand, by `tests/bench/run calls`; see README.md beside this file. The server is the simulator at 0 ms, in a process of
//! its own. One call at a time, over connections that stay open; contenders take turns by short blocks, so that what else the
//! machine does meets all of them alike.

#![expect(clippy::expect_used, reason = "a measurement that cannot go on says why by panicking")]
#![expect(clippy::print_stdout, reason = "a program run by hand tells its figures")]

use clap::Parser as _;
use forebay_calls::{
    Api, Call, CallError, Listener, Model, Pool, Priced, Prices, Secret, Server, Tried, Upstream,
    client::{Hedging, Parts, client},
    pool::Endpoint,
    server::Timeouts,
    throttle::Caps,
};
use forebay_schemas::{Content, Message, Role, Sampling};
use forebay_simulator::{Options, Settings, Simulator};
use futures::{StreamExt as _, future::BoxFuture};
use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

/// Measures what the call stack adds.
#[derive(Debug, clap::Parser)]
struct Args {
    /// Calls of each contender.
    #[arg(long, default_value_t = 20_000)]
    calls: usize,
    /// Only this contender, over and over: for a profiler.
    #[arg(long)]
    only: Option<String>,
    /// Runs the model server (started by this program).
    #[arg(long, hide = true)]
    serve: bool,
    /// Given by `cargo bench`, and of no meaning here.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Calls that are made before the contenders change.
const BLOCK: usize = 50;
/// Blocks of each that are not counted.
const WARMING: usize = 10;
const REPLICAS: usize = 4;
const ASKED: &str = "What is a consumer group, and who says which member reads what?";
const INSTRUCTED: &str = "Answer from the sources alone, and say which of them each sentence rests on.";

fn main() {
    let args = Args::parse();
    let runtime = Runtime::new().expect("a runtime");
    if args.serve {
        return runtime.block_on(serve());
    }
    let (mut server, addresses) = start();
    // In a task, as a stage is: the main thread would be woken by another for each event of a socket.
    let measuring = runtime.spawn(async move {
        for stream in [false, true] {
            println!("{}", measure(&args, &addresses, stream).await);
        }
    });
    runtime.block_on(measuring).expect("it went well");
    server.kill().expect("it can be killed");
    server.wait().expect("it ends");
}

/// The model server: replicas at 0 ms, each answer 16 tokens long.
async fn serve() {
    let pairs = [("latency", "0ms"), ("answer.tokens", "16")];
    let pairs = pairs.into_iter().map(|(path, value)| (path.to_owned(), value.to_owned()));
    let options = Options {
        settings: Settings::default().with(pairs).expect("these can be"),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        replicas: REPLICAS,
        call_log: None,
        reader: |_| Ok(Vec::new()),
    };
    let simulator = Simulator::bind(options).await.expect("free ports");
    simulator.addresses().iter().for_each(|address| println!("{address}"));
    simulator.run(std::future::pending()).await;
}

fn start() -> (Child, Vec<SocketAddr>) {
    let this = std::env::current_exe().expect("this program");
    let mut child =
        Command::new(this).arg("--serve").stdout(Stdio::piped()).spawn().expect("it starts once more");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let addresses = lines.take(REPLICAS).map(|line| line.expect("it prints").parse().expect("an address"));
    let addresses = addresses.collect();
    (child, addresses)
}

/// A way to make a call.
struct Contender {
    name: &'static str,
    way: Way,
    times: Histogram<u64>,
    cpu: Duration,
}

enum Way {
    /// The body is made once, and of the answer nothing is read but its bytes.
    Bare { client: reqwest::Client, url: String, body: String },
    /// A model, as a step has it.
    Model(Arc<dyn Model>),
}

struct Deaf;

impl Listener for Deaf {
    fn started(&self, _: Upstream<'_>) {}
    fn token(&self, _: &str) {}
    fn ended(&self, _: &Tried<'_>) {}
}

fn contenders(addresses: &[SocketAddr], stream: bool) -> Vec<Contender> {
    let body = json!({
        "model": "m", "max_tokens": 16, "stream": stream, "stream_options": stream.then(|| json!({"include_usage": true})),
        "messages": [{"role": "system", "content": INSTRUCTED}, {"role": "user", "content": ASKED}],
    });
    let bare = Way::Bare {
        client: reqwest::Client::new(),
        url: format!("http://{}/v1/chat/completions", addresses[0]),
        body: without_nulls(body).to_string(),
    };
    let server = |address: &SocketAddr| {
        let (url, keys) = (format!("http://{address}/v1"), vec![Secret::new("sk-bench")]);
        Server::new(Api::Chat, &url, "m", keys, Timeouts::default()).expect("a URL")
    };
    let pool = |addresses: &[SocketAddr], prices: Option<&Arc<Prices>>, hedging, fallbacks| {
        let endpoint = |address: &SocketAddr| {
            let (name, server): (_, Arc<dyn Model>) = (address.to_string(), Arc::new(server(address)));
            let model = match prices {
                Some(prices) => Arc::new(Priced::new(server, Arc::clone(prices))),
                None => server,
            };
            let caps = Caps { outstanding: 64, requests_per_minute: None, tokens_per_minute: None };
            Endpoint {
                name,
                model,
                caps,
                origin: String::new(),
                watch: None,
                starts_cold: false,
                shared: None,
            }
        };
        let jitter = Arc::new(|| 0.5);
        let pool = Arc::new(Pool::new("m", addresses.iter().map(endpoint).collect(), jitter.clone()));
        Way::Model(client(Parts { pool, hedging, fallbacks, allowances: None, jitter }))
    };
    let table = r#"{"m": {"input_cost_per_token": 1e-7, "output_cost_per_token": 4e-7}}"#;
    let prices = Prices::new(forebay_operator::Clock::System).with_table("m.json", table, None);
    let prices = Arc::new(prices.expect("a table"));
    let prices = Some(&prices);
    let fallback: Vec<Arc<dyn Model>> = vec![Arc::new(server(&addresses[0]))];
    let all = [
        ("bare reqwest", bare),
        ("one try: `Server`", Way::Model(Arc::new(server(&addresses[0])))),
        ("`client()`, one endpoint", pool(&addresses[..1], None, Hedging::Off, Vec::new())),
        ("`client()`, pool of 4", pool(addresses, None, Hedging::Off, Vec::new())),
        ("pool of 4, prices, a fallback", pool(addresses, prices, Hedging::Off, fallback.clone())),
        ("pool of 4, prices, a fallback, hedging", pool(addresses, prices, Hedging::Usual, fallback)),
    ];
    let contender = |(name, way)| Contender {
        name,
        way,
        // Up to ten seconds, in nanoseconds.
        times: Histogram::new_with_max(10_000_000_000, 3).expect("a histogram"),
        cpu: Duration::ZERO,
    };
    all.into_iter().map(contender).collect()
}

fn without_nulls(mut body: Value) -> Value {
    if let Some(body) = body.as_object_mut() {
        body.retain(|_, value| !value.is_null());
    }
    body
}

impl Contender {
    async fn call(&self, stream: bool) {
        match &self.way {
            Way::Bare { client, url, body } => {
                let request = client.post(url).header("content-type", "application/json").body(body.clone());
                let response = request.send().await.expect("it answers");
                assert!(response.status().is_success(), "{}", response.status());
                let mut body = response.bytes_stream();
                while let Some(part) = body.next().await {
                    part.expect("it answers to the end");
                }
            }
            Way::Model(model) => {
                let reply: Result<_, CallError> = self.ask(&**model, stream).await;
                assert!(!reply.expect("it answers").text.is_empty());
            }
        }
    }

    /// A question as a step asks it: made anew for each call.
    fn ask<'a>(
        &'a self,
        model: &'a dyn Model,
        stream: bool,
    ) -> BoxFuture<'a, Result<forebay_calls::Reply, CallError>> {
        let message = |role, text: &str| Message {
            role,
            content: Some(Content::Text(text.to_owned())),
            rest: Default::default(),
        };
        Box::pin(async move {
            let call = Call {
                question: ASKED.to_owned(),
                messages: vec![message(Role::System, INSTRUCTED), message(Role::User, ASKED)],
                sampling: Sampling { max_tokens: Some(16), ..Sampling::default() },
                stream,
                ..Call::default()
            };
            model.complete(&call, &Deaf).await
        })
    }

    async fn block(&mut self, stream: bool, counts: bool) {
        let before = cpu();
        for _ in 0..BLOCK {
            let sent = Instant::now();
            self.call(stream).await;
            if counts {
                self.times.saturating_record(u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX));
            }
        }
        if counts {
            self.cpu += cpu() - before;
        }
    }
}

/// User and system time of this process, all threads.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("below a second"))
}

async fn measure(args: &Args, addresses: &[SocketAddr], stream: bool) -> String {
    let mut contenders = contenders(addresses, stream);
    if let Some(only) = &args.only {
        contenders.retain(|contender| contender.name.contains(only.as_str()));
    }
    for round in 0..WARMING + args.calls / BLOCK {
        for contender in &mut contenders {
            contender.block(stream, round >= WARMING).await;
        }
    }
    let how = if stream { "streamed, 16 tokens" } else { "in one piece" };
    let mut table = format!(
        "| Call, {how} | p50 µs | p99 µs | added p50 µs | added p99 µs | CPU µs a call | added CPU µs |\n\
         |---|---|---|---|---|---|---|\n"
    );
    let us = |contender: &Contender, quantile| contender.times.value_at_quantile(quantile) as f64 / 1e3;
    let each = |contender: &Contender| contender.cpu.as_secs_f64() * 1e6 / contender.times.len() as f64;
    let bare = &contenders[0];
    for contender in &contenders {
        let [p50, p99] = [0.5, 0.99].map(|quantile| us(contender, quantile));
        let (more50, more99, cpu) = (p50 - us(bare, 0.5), p99 - us(bare, 0.99), each(contender));
        let more = cpu - each(bare);
        table += &format!(
            "| {} | {p50:.0} | {p99:.0} | {more50:.0} | {more99:.0} | {cpu:.0} | {more:.0} |\n",
            contender.name
        );
    }
    table
}
