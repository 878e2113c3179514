//! The network between Forebay and its broker, and between Forebay and its model: late, silent, deaf, broken.
//!
//! Each step has two processes, one on each of two paths to the broker; the test asks by a third, which nothing befalls.

use crate::{
    onlooker::STAGES,
    seed, setting,
    site::{LIMIT, ON_ITS_WAY_MAX, Site, drain, until},
};
use forebay_tests::{Broker, Dice, Fault, Proxy, Running, free_port};
use std::time::{Duration, Instant};

/// What befalls the paths of one run, each of these once before any a second time.
const FAULTS: usize = 8;

/// The shortest session that a broker takes by default: half of the faults cost one.
const SESSION: Duration = Duration::from_secs(6);
const CONFIGURATION: &str = "kafka: {session.timeout.ms: 6000, heartbeat.interval.ms: 1000}\n";

/// Requests before each fault, and again while it lasts.
const REQUESTS: usize = 100;

#[test]
fn every_request_has_one_result_whatever_befalls_the_network() {
    let ports = [free_port(), free_port()];
    let paths = ports.map(Proxy::start);
    let told: Vec<_> = ports.into_iter().zip(paths.iter().map(Proxy::port)).collect();
    let Some(broker) = Broker::behind(&told) else { return };
    let (faults, mut dice) = (setting("FOREBAY_CHAOS_FAULTS", FAULTS), Dice::new(seed()));
    let site = Site::new("network", &broker.servers(), CONFIGURATION);
    let model = Proxy::start(site.model.port());
    let site = site.calling(&format!("http://127.0.0.1:{}/v1", model.port()));
    let mut processes = Vec::new();
    for path in &paths {
        for (stage, ..) in STAGES {
            let servers = format!("127.0.0.1:{}", path.port());
            let mut command = site.command_at(&servers, &["run", "answer", "--stage", stage]);
            processes.push(Running::start(&format!("stage {stage} by {servers}"), &mut command));
        }
    }
    let mut results = site.client.read("results");
    let (mut written, mut cut_off) = (0, 0);
    site.ask(&mut written, REQUESTS);
    results.at_least(written, LIMIT);
    for number in 0..faults {
        let kind = if number < FAULTS { number } else { dice.below(FAULTS) };
        let path = &paths[dice.below(paths.len())];
        let late = Fault::Late(Duration::from_millis(u64::try_from(dice.within(50..500)).unwrap()));
        let short = Duration::from_millis(u64::try_from(dice.within(2_000..5_000)).unwrap());
        site.ask(&mut written, REQUESTS);
        results.at_least(written - REQUESTS / 2, LIMIT);
        let begin = Instant::now();
        let (what, path, fault, time) = match kind {
            0 => ("the broker is late", path, late, short),
            1 => ("the broker is silent for a while", path, Fault::Silent, short),
            2 => ("the broker is silent for longer than a session", path, Fault::Silent, SESSION + short),
            3 => (
                "the broker hears and is not heard, for longer than a session",
                path,
                Fault::Deaf,
                SESSION + short,
            ),
            4 => ("the broker breaks connections", path, Fault::None, Duration::ZERO),
            5 => ("the model is late", &model, late, short),
            6 => ("the model is silent", &model, Fault::Silent, short),
            _ => ("the model hears, is not heard, and breaks connections", &model, Fault::Deaf, short),
        };
        cut_off += usize::from(time > SESSION);
        path.set(fault);
        site.ask(&mut written, REQUESTS);
        until(begin + time);
        // Half of the connections that were silent for long do not live on: somebody on their way forgot them.
        let breaks = matches!(kind, 4 | 7) || dice.below(2) == 0;
        if breaks {
            path.reset();
        }
        path.set(Fault::None);
        results.at_least(written, LIMIT);
        println!(
            "{what} for {time:?}{}: all results after {:?}",
            if breaks { ", broken" } else { "" },
            begin.elapsed()
        );
    }
    assert!(processes.iter_mut().all(Running::is_alive), "one has given up");
    println!("{:#?}", site.check(&mut results, written, cut_off * ON_ITS_WAY_MAX));
    let ends: Vec<_> = processes.iter_mut().map(drain).collect();
    println!("the longest end after SIGTERM: {:?}", ends.iter().max());
}
