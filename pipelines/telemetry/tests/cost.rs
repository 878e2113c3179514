//! What counting costs, measured by hand:
//! `cargo test --release -p forebay-telemetry --test cost -- --ignored --nocapture`. The figures stand in src/meter.rs.

#![expect(clippy::print_stdout, reason = "prints what it measures")]

use forebay_telemetry::{Outcome, Settings, StepMeter, Telemetry};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

const ROUNDS: u32 = 2_000_000;

fn measure(what: &str, mut round: impl FnMut()) {
    let started = Instant::now();
    for _ in 0..ROUNDS {
        round();
    }
    println!("{what}: {} ns", started.elapsed().as_nanos() / u128::from(ROUNDS));
}

fn count(meter: &StepMeter) {
    meter.received(black_box("prompts"), black_box(1_000));
    meter.finished(
        black_box(Outcome::Ok),
        black_box(Duration::from_millis(7)),
        black_box(Duration::from_millis(2)),
    );
}

#[test]
#[ignore = "a measurement, to be read by a person"]
fn cost_of_counting() {
    let telemetry = Telemetry::start(Settings::new("forebay", "0.1.0")).unwrap();
    let meter = telemetry.step("infer", "infer");
    let parent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    measure("received", || meter.received(black_box("prompts"), black_box(1_000)));
    measure("received and finished", || count(&meter));
    measure("lag", || meter.lag(black_box("prompts"), 3, black_box(42)));
    measure("span without a collector", || {
        meter.span(black_box(parent), "prompts", 3, 90).end(Outcome::Ok);
    });
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..ROUNDS).for_each(|_| count(&meter)));
        }
    });
    println!("received and finished, two threads: {} ns", started.elapsed().as_nanos() / u128::from(ROUNDS));

    // Nobody answers there; what is measured is the making of spans and their dropping when the queue is full.
    let settings = Settings {
        otlp_endpoint: Some("http://127.0.0.1:9".to_owned()),
        ..Settings::new("forebay", "0.1.0")
    };
    let telemetry = Telemetry::start(settings).unwrap();
    let meter = telemetry.step("infer", "infer").in_group("forebay-infer");
    let started = Instant::now();
    for offset in 0..200_000 {
        let span = meter.span(black_box(parent), "prompts", 3, offset);
        black_box(span.traceparent());
        span.end(Outcome::Ok);
    }
    println!("span with a collector: {} ns", started.elapsed().as_nanos() / 200_000);
}
