//! Three brokers, restarted one after the other and then one of them killed, while requests come without end. Whoever asks is
//! not told: a topic has two replicas more, and an acknowledgement waits for one of them at least.

use crate::{
    seed, setting,
    site::{LIMIT, Site},
};
use forebay_tests::{Cluster, Dice, wait_for};
use std::time::{Duration, Instant};

/// As few replicas as show what is to be shown: three Javas share the machine.
const CONFIGURATION: &str = "partitions: 3\n";

/// How often a broker is killed after all were restarted.
const KILLS: usize = 1;

/// Requests a second while all this goes on.
const PACE: u64 = 20;

/// How long requests come before and after each blow.
const CALM: Duration = Duration::from_secs(3);

#[test]
fn every_request_has_one_result_while_brokers_are_restarted_and_killed() {
    let Some(mut cluster) = Cluster::start() else { return };
    let (kills, mut dice) = (setting("FOREBAY_CHAOS_BROKER_KILLS", KILLS), Dice::new(seed()));
    let site = Site::new("brokers", &cluster.servers(), CONFIGURATION);
    cluster.in_sync(LIMIT);
    let processes = [site.up(), site.up()];
    let mut results = site.client.read("results");
    let mut written = 0;
    flow(&site, &mut written, CALM);
    for number in 0..Cluster::BROKERS {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let restarting = scope.spawn(|| {
                cluster.brokers[number].stop();
                let stopped = begin.elapsed();
                cluster.brokers[number].restart();
                let restarted = begin.elapsed();
                cluster.in_sync(LIMIT);
                (stopped, restarted)
            });
            while !restarting.is_finished() {
                flow(&site, &mut written, Duration::from_millis(200));
            }
            let (stopped, restarted) = restarting.join().unwrap();
            let synced = begin.elapsed();
            println!("broker {}: stopped in {stopped:?}, up {restarted:?}, in sync {synced:?}", number + 1);
        });
    }
    for _ in 0..kills {
        let number = dice.below(Cluster::BROKERS);
        cluster.brokers[number].kill();
        // Its partitions find other leaders; what it had acknowledged is with one of them.
        flow(&site, &mut written, Duration::from_secs(10));
        println!(
            "broker {} was killed: {} of {written} have results",
            number + 1,
            results.to_the_end(LIMIT).len()
        );
        cluster.brokers[number].restart();
        flow(&site, &mut written, CALM);
        cluster.in_sync(LIMIT);
    }
    println!("{:#?}", site.check(&mut results, written, 0));
    for process in processes {
        process.drain();
    }
}

/// Lets requests come for a while.
fn flow(site: &Site, written: &mut usize, time: Duration) {
    let (begin, every) = (Instant::now(), Duration::from_millis(1_000 / PACE));
    let mut next = begin;
    wait_for("a flow of requests", LIMIT, || {
        if Instant::now() >= next {
            next = Instant::now() + every;
            site.ask(written, 1);
        }
        (begin.elapsed() > time).then_some(())
    });
}
