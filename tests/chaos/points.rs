//! Processes that crash between two named lines (`pipelines/runtime/src/crash.rs`), one line after the other.
//!
//! The simulations crash at every await point already, against a log in memory. Here the log, the groups and the model are
//! real.

use crate::{
    onlooker::STAGES,
    seed,
    site::{LIMIT, Site},
};
use forebay_tests::{Dice, Running, Signal, product::END, services, wait_for};
use std::{
    os::unix::process::ExitStatusExt as _,
    time::{Duration, Instant},
};

/// What every step passes: before what a record became is sent, when it is acknowledged, before its offset is stored, and
/// before that is committed. A process of each step crashes at each of them.
const OF_ALL: &[&str] = &["output", "written", "store", "commit"];

/// What a paid call passes besides: before `started` is sent, when it is acknowledged, when the model has answered, when it has
/// refused. A second process of the paid step crashes at each of these.
const OF_CALLS: &[&str] = &["start", "call", "done", "failed"];

/// The shortest session that a broker takes by default: every crash costs one.
const CONFIGURATION: &str = "kafka: {session.timeout.ms: 6000, heartbeat.interval.ms: 1000}\n";

/// Requests that come every so often until all have crashed that should, where not too many are under way.
const REQUESTS: usize = 50;
const UNDER_WAY_MAX: usize = 200;
const EVERY: Duration = Duration::from_millis(500);

#[test]
fn every_request_has_one_result_whatever_line_a_process_crashes_at() {
    let Some(servers) = services::kafka() else { return };
    let mut dice = Dice::new(seed());
    let site = Site::new("points", &servers, CONFIGURATION);
    let survivor = site.up();
    let mut results = site.client.read("results");
    let mut written = 0;
    for (of_all, of_calls) in OF_ALL.iter().zip(OF_CALLS) {
        let points = STAGES.iter().map(|(stage, ..)| (*stage, *of_all)).chain([("infer", *of_calls)]);
        let crash = |(stage, point): (&str, &str)| {
            // Few calls fail, and offsets are stored for many records at a time.
            let passing = match point {
                "failed" | "store" | "commit" => dice.within(1..4),
                _ => dice.within(1..40),
            };
            let at = format!("{point}:{passing}");
            let mut command = site.command(&["run", "answer", "--stage", stage]);
            let process = Running::start(stage, command.env("FOREBAY_CRASH_AT", &at));
            (format!("{stage} at {at}"), process)
        };
        let mut crashing: Vec<_> = points.map(crash).collect();
        let mut next = Instant::now();
        wait_for("all to crash", LIMIT, || {
            let under_way = written - results.to_the_end(LIMIT).len();
            if Instant::now() > next && under_way < UNDER_WAY_MAX {
                next = Instant::now() + EVERY;
                site.ask(&mut written, REQUESTS);
            }
            crashing.iter_mut().all(|(_, process)| !process.is_alive()).then_some(())
        });
        for (what, mut process) in crashing {
            let signal = process.ended(END).signal();
            assert_eq!(signal, Some(Signal::ABORT.as_raw()), "{what}: {}", process.stderr());
            println!("{what}");
        }
    }
    println!("{:#?}", site.check(&mut results, written, 0));
    survivor.drain();
}

/// What a record passes on its way to the overflow topic: before the ledger is told, when it knows, and when the copies are
/// acknowledged. A process crashes at each of them.
const OF_MOVES: &[&str] = &["move", "moved", "aside"];

/// More than the paid step works off in two seconds, so that a tenant alone goes aside.
const FLOOD: usize = 8_000;

#[test]
fn a_flood_has_one_result_each_whatever_line_a_process_crashes_at_as_it_moves_aside() {
    let Some(servers) = services::kafka() else { return };
    let mut dice = Dice::new(seed());
    let site = Site::new("aside", &servers, CONFIGURATION);
    let others = STAGES.iter().filter(|(stage, ..)| *stage != "infer");
    let others: Vec<_> = others.map(|(stage, ..)| site.member(stage)).collect();
    let (mut results, mut written) = (site.client.read("results"), 0);
    site.ask(&mut written, FLOOD);
    // Nobody calls the model yet, so all that is to be paid for is there at once.
    let mut prompts = site.client.read("prompts");
    wait_for("all that is to be paid for", LIMIT, || {
        let answered = results.to_the_end(LIMIT).len();
        (prompts.to_the_end(LIMIT).len() + answered >= FLOOD).then_some(())
    });
    for point in OF_MOVES {
        let passing = match *point {
            "aside" => dice.within(1..4),
            _ => dice.within(1..200),
        };
        let at = format!("{point}:{passing}");
        let mut command = site.command(&["run", "answer", "--stage", "infer"]);
        let mut process = Running::start("infer", command.env("FOREBAY_CRASH_AT", &at));
        wait_for(&format!("a crash at {at}"), LIMIT, || (!process.is_alive()).then_some(()));
        assert_eq!(process.ended(END).signal(), Some(Signal::ABORT.as_raw()), "{at}: {}", process.stderr());
        println!("infer at {at}");
    }
    let survivor = site.member("infer");
    println!("{:#?}", site.check(&mut results, written, 0));
    drop((survivor, others));
}
