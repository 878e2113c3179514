//! What the simulator itself costs: calls a second with no latency, CPU a call, and how late answers come.
//!
//! Run by hand: `cargo bench -p forebay-simulator`. The simulator runs in a process of its own, so that its CPU time is its
//! own; the load comes from this one, on the same cores, over connections that stay open, one call at a time on each.

#![expect(clippy::expect_used, reason = "a measurement that cannot go on says why by panicking")]
#![expect(clippy::print_stdout, reason = "a program run by hand prints its figures")]

use forebay_simulator::{Options, Settings, Simulator};
use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    runtime::Runtime,
};

const WARMING: Duration = Duration::from_secs(1);
const MEASURING: Duration = Duration::from_secs(5);

/// A way to be asked.
struct Case {
    name: &'static str,
    settings: &'static [(&'static str, &'static str)],
    is_logged: bool,
    connections: usize,
    path: &'static str,
    body: &'static str,
    /// What the call should take.
    latency_ms: f64,
}

const SHORT: &[(&str, &str)] = &[("latency", "0ms"), ("answer.tokens", "16")];
const CHAT: &str = r#"{"model": "m", "messages": [{"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a consumer group, and who says which member reads what?"}]}"#;
const STREAM: &str = r#"{"model": "m", "stream": true, "stream_options": {"include_usage": true},
    "messages": [{"role": "user", "content": "What is a consumer group, and who says which member reads what?"}]}"#;

const fn case(name: &'static str, connections: usize, body: &'static str) -> Case {
    let (settings, path) = (SHORT, "/v1/chat/completions");
    Case { name, settings, is_logged: false, connections, path, body, latency_ms: 0.0 }
}

const CASES: &[Case] = &[
    case("0 ms, one at a time", 1, CHAT),
    case("0 ms, 64 connections", 64, CHAT),
    Case { is_logged: true, ..case("0 ms, 64 connections, call log", 64, CHAT) },
    case("0 ms, 64 connections, streamed, 16 tokens", 64, STREAM),
    Case {
        path: "/v1/embeddings",
        body: r#"{"model": "m", "input": "What is a consumer group?"}"#,
        ..case("0 ms, 64 connections, embeddings of 384", 64, "")
    },
    Case {
        settings: &[("latency", "20ms"), ("answer.tokens", "16"), ("engine.slots", "4096")],
        latency_ms: 20.0,
        ..case("20 ms, 128 connections", 128, CHAT)
    },
    Case {
        settings: &[("engine.slots", "256"), ("engine.decode_tokens_per_s", "100"), ("answer.tokens", "32")],
        ..case("modelled, 256 connections, streamed, 32 tokens", 256, STREAM)
    },
];

fn main() {
    if let Some(case) = std::env::args().skip_while(|arg| arg != "serve").nth(1) {
        let case = CASES.iter().find(|known| known.name == case).expect("a case of that name");
        return serve(case);
    }
    let runtime = Runtime::new().expect("a runtime");
    println!("| Case | calls/s | simulator's CPU a call | p50 | p99 |\n|---|---|---|---|---|");
    for case in CASES {
        let (mut child, address) = start(case);
        let measured = runtime.block_on(load(case, address, &child));
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
        println!("{measured}");
    }
}

fn serve(case: &Case) {
    let pairs = case.settings.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned()));
    let folder = tempfile::tempdir().expect("a folder");
    let options = Options {
        settings: Settings::default().with(pairs).expect("these can be"),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        replicas: 1,
        call_log: case.is_logged.then(|| folder.path().join("calls.jsonl")),
        reader: |_| Ok(Vec::new()),
    };
    Runtime::new().expect("a runtime").block_on(async {
        let simulator = Simulator::bind(options).await.expect("a free port");
        println!("{}", simulator.addresses()[0]);
        simulator.run(std::future::pending()).await;
    });
}

fn start(case: &Case) -> (Child, SocketAddr) {
    let this = std::env::current_exe().expect("this program");
    let mut child = Command::new(this)
        .args(["serve", case.name])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts once more");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("it prints");
    let address = line.trim().parse().expect("an address");
    (child, address)
}

async fn load(case: &Case, address: SocketAddr, child: &Child) -> String {
    let begin = Instant::now() + WARMING;
    let end = begin + MEASURING;
    let request = format!(
        "POST {} HTTP/1.1\r\nhost: simulator\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}",
        case.path,
        case.body.len(),
        case.body
    );
    let connections: Vec<_> = (0..case.connections)
        .map(|_| {
            let request = request.clone();
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.expect("it listens");
                stream.set_nodelay(true).expect("a socket");
                let (mut buffer, mut times) = (Vec::new(), Vec::new());
                while Instant::now() < end {
                    let sent = Instant::now();
                    stream.write_all(request.as_bytes()).await.expect("it reads");
                    answer(&mut stream, &mut buffer).await;
                    if sent > begin {
                        times.push(sent.elapsed());
                    }
                }
                times
            })
        })
        .collect();
    tokio::time::sleep_until(begin.into()).await;
    let cpu_before = cpu(child);
    tokio::time::sleep_until(end.into()).await;
    let cpu = cpu(child) - cpu_before;
    let mut times = Vec::new();
    for connection in connections {
        times.extend(connection.await.expect("it went well"));
    }
    times.sort_unstable();
    let count = u32::try_from(times.len()).expect("few enough");
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e3 - case.latency_ms;
    let late = if case.latency_ms > 0.0 { " late" } else { "" };
    format!(
        "| {} | {:.0} | {:.1} µs | {:.2} ms{late} | {:.2} ms{late} |",
        case.name,
        f64::from(count) / MEASURING.as_secs_f64(),
        cpu.as_secs_f64() * 1e6 / f64::from(count),
        at(50),
        at(99)
    )
}

/// Reads an answer to its end: so many bytes, or up to the last chunk.
async fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) {
    buffer.clear();
    let is_whole = |buffer: &[u8]| {
        let Some(end) = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
        let head = std::str::from_utf8(&buffer[..end]).expect("a head of text");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        match head.split("content-length: ").nth(1) {
            Some(rest) => {
                let length: usize =
                    rest.lines().next().and_then(|length| length.parse().ok()).expect("a length");
                buffer.len() >= end + 4 + length
            }
            None => buffer.ends_with(b"\r\n0\r\n\r\n"),
        }
    };
    while !is_whole(buffer) {
        let read = stream.read_buf(buffer).await.expect("it answers");
        assert!(read > 0, "the connection ended");
    }
}

/// User and system time of the simulator, which Linux counts in hundredths of a second.
fn cpu(child: &Child) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("Linux");
    let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
    let ticks: u64 = [11, 12].iter().map(|at| fields[*at].parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}
