//! Processes are killed, frozen and stopped at random; then some are killed under a steady load, to see how soon all is as
//! it was.
//!
//! Each job step has three processes: two that are hit, and one of all steps that survives everything, and whose memory and
//! descriptors must stay where they are.

use crate::{
    onlooker::STAGES,
    seed, setting,
    site::{LIMIT, ON_ITS_WAY_MAX, Site, drain, until},
};
use forebay_tests::{Dice, Reader, Running, Signal, product::END, services, wait_for};
use std::time::{Duration, Instant};

/// Hits of one run, and kills under a steady load behind them.
const HITS: usize = 20;
const STEADY: usize = 1;

/// Requests that are written between two hits.
const BETWEEN: usize = 100;

/// The session of a member, as it ships.
const SESSION: Duration = Duration::from_secs(10);

/// How many seconds behind it it is looked when all is as before. Who sets another number, 5 as is promised, wants it to be
/// kept: of a machine that does nothing else, and so not beside other tests.
const RECOVERY: usize = 15;

/// How much longer than that is looked, so that what is late is seen to be.
const MARGIN: Duration = Duration::from_secs(2);

/// The steady load, in percent of what was worked off at full load: by hand 50, and less beside other tests.
const LOAD: usize = 25;

/// Requests of the burst that tells what full load is.
const BURST: usize = 1_000;

/// What a survivor may have more at the end than after two thirds of the hits. Its caches have filled by then; what leaks goes on.
const RSS_MORE_MAX: usize = 96 << 20;
const DESCRIPTORS_MORE_MAX: usize = 32;

#[test]
fn every_request_has_one_result_whoever_is_killed() {
    let Some(servers) = services::kafka() else { return };
    let (hits, steady) = (setting("FOREBAY_CHAOS_HITS", HITS), setting("FOREBAY_CHAOS_STEADY", STEADY));
    let (between, mut dice) = (setting("FOREBAY_CHAOS_BETWEEN", BETWEEN), Dice::new(seed()));
    let site = Site::new("hits", &servers, "");
    let survivor = site.up();
    let mut processes: Vec<(&str, Running)> =
        STAGES.iter().chain(STAGES).map(|(stage, ..)| (*stage, site.member(stage))).collect();
    let mut results = site.client.read("results");
    let (mut written, mut frozen, mut drains, mut vitals) = (0, 0, Vec::new(), Vec::new());
    for _ in 0..hits {
        site.ask(&mut written, between);
        // Somewhere on its way: a part of these has its result, and the rest does not.
        let part = results.records().len() + dice.below(between / 2) + 1;
        // A hit process may hold all of these until its session is over: then the next is hit meanwhile.
        let late = Instant::now() + Duration::from_secs(2);
        wait_for("a part of the results, or its time", LIMIT, || {
            (results.to_the_end(LIMIT).len() >= part || Instant::now() > late).then_some(())
        });
        vitals.push(Vitals::of(survivor.process.id()));
        let (stage, mut process) = processes.remove(dice.below(processes.len()));
        match dice.below(10) {
            0..6 => kill(&mut process),
            6..8 => {
                // Frozen for 1 to 14 s, around its session; it goes on as if nothing had been.
                process.signal(Signal::STOP);
                let freeze = Duration::from_millis(u64::try_from(dice.within(1_000..14_000)).unwrap());
                let thaw = Instant::now() + freeze;
                // The last heartbeat may be an interval old.
                frozen += usize::from(freeze > Duration::from_secs(7));
                // Others go on meanwhile.
                site.ask(&mut written, between);
                until(thaw);
                process.signal(Signal::CONT);
                processes.push((stage, process));
                continue;
            }
            _ => drains.push(drain(&mut process)),
        }
        processes.push((stage, site.member(stage)));
    }
    caught_up(&mut results, written);
    let note = || vitals.push(Vitals::of(survivor.process.id()));
    let recovered = recoveries(&site, &mut results, &mut written, &mut processes, &mut dice, steady, note);
    drains.extend(processes.iter_mut().map(|(_, process)| drain(process)));
    vitals.push(Vitals::of(survivor.process.id()));
    let (early, last) = (&vitals[vitals.len() * 2 / 3], &vitals[vitals.len() - 1]);
    println!("the survivor after two thirds of all: {early:?}, at the end: {last:?}");
    println!("{} ends after SIGTERM, the longest {:?}", drains.len(), drains.iter().max());
    println!("{:#?}", site.check(&mut results, written, frozen * ON_ITS_WAY_MAX));
    let is_asked = std::env::var_os("FOREBAY_CHAOS_RECOVERY").is_some();
    let slowest = recovered.into_iter().max().unwrap_or_default();
    assert!(!is_asked || slowest < recovery(), "lag was back at its level after {slowest:?}");
    assert!(
        last.rss < early.rss + RSS_MORE_MAX && last.descriptors < early.descriptors + DESCRIPTORS_MORE_MAX
    );
    survivor.drain();
}

fn kill(process: &mut Running) {
    process.signal(Signal::KILL);
    process.ended(END);
}

fn caught_up(results: &mut Reader, written: usize) {
    results.at_least(written, LIMIT);
}

/// How long after a kill all must be as before.
fn recovery() -> Duration {
    let behind = u64::try_from(setting("FOREBAY_CHAOS_RECOVERY", RECOVERY)).unwrap();
    SESSION + Duration::from_secs(behind)
}

/// Kills a process of one step after the other while requests come at a part of the rate at which they can be worked off, and tells
/// how long it took each time until no more were under way than before. `note` is called after each.
fn recoveries(
    site: &Site,
    results: &mut Reader,
    written: &mut usize,
    processes: &mut Vec<(&'static str, Running)>,
    dice: &mut Dice,
    kills: usize,
    mut note: impl FnMut(),
) -> Vec<Duration> {
    // All groups are settled by the end of the burst.
    let begin = Instant::now();
    site.ask(written, BURST);
    caught_up(results, *written);
    let whole = BURST * 1_000 / usize::try_from(begin.elapsed().as_millis()).unwrap().max(1);
    let pace = (whole * setting("FOREBAY_CHAOS_LOAD", LOAD) / 100).max(1);
    println!("{whole} requests a second at full load; now {pace}");
    let mut recovered = Vec::new();
    for _ in 0..kills {
        let (level, _) = steady(site, results, written, pace, Duration::from_secs(3), usize::MAX);
        let (stage, mut process) = processes.remove(dice.below(processes.len()));
        kill(&mut process);
        processes.push((stage, site.member(stage)));
        // A little more than before is as before.
        let slack = level + pace / 4;
        let (most, last) = steady(site, results, written, pace, recovery() + MARGIN, slack);
        println!(
            "{stage} killed: {level} under way before, {most} at most after it, as before after {last:?}"
        );
        recovered.push(last);
        note();
    }
    caught_up(results, *written);
    recovered
}

/// Asks at a steady pace for a time: how many requests were under way at most, and when last more than so many were. Ends
/// earlier where a session is over and all has been as before for a while.
fn steady(
    site: &Site,
    results: &mut Reader,
    written: &mut usize,
    pace: usize,
    time: Duration,
    level: usize,
) -> (usize, Duration) {
    let (begin, first) = (Instant::now(), *written);
    let (mut most, mut last) = (0, Duration::ZERO);
    wait_for("the end of a steady load", LIMIT, || {
        let since = begin.elapsed();
        let due = first + usize::try_from(since.as_millis()).unwrap() * pace / 1_000;
        if due > *written {
            site.ask(written, due - *written);
        }
        let under_way = written.saturating_sub(results.to_the_end(LIMIT).len());
        most = most.max(under_way);
        if under_way > level {
            last = begin.elapsed();
        }
        let is_as_before = since > SESSION + MARGIN && since > last + MARGIN;
        (since > time || is_as_before).then_some(())
    });
    (most, last)
}

/// What a process holds.
#[derive(Debug)]
struct Vitals {
    /// Resident memory, in bytes.
    rss: usize,
    descriptors: usize,
}

impl Vitals {
    fn of(process: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
        let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
        Self { rss: kib << 10, descriptors }
    }
}
