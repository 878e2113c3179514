//! Everything in one process, with the embedded broker, killed again and again.

use crate::{
    seed, setting,
    site::{LIMIT, by_key, until},
};
use forebay_tests::{
    Dice, New, Record, free_port,
    product::{Up, command},
    wait_for,
};
use serde_json::json;
use std::time::{Duration, Instant};

/// Kills of one run.
const KILLS: usize = 15;

/// Requests that are written between two.
const BETWEEN: usize = 100;

#[test]
fn every_request_has_one_result_however_often_the_whole_process_is_killed() {
    let (kills, mut dice) = (setting("FOREBAY_CHAOS_KILLS", KILLS), Dice::new(seed()));
    let data = tempfile::tempdir().unwrap();
    // The same port again, so that clients find the broker that is back.
    let listen = format!("127.0.0.1:{}", free_port());
    let start = || {
        let arguments = ["up", "--listen", &listen, "--admin", "127.0.0.1:0"];
        Up::wait("forebay up", &mut command(data.path(), &arguments))
    };
    let mut up = start();
    let client = up.client();
    let mut results = client.read("results");
    let mut written = 0;
    for _ in 0..kills {
        let request = |number: usize| json!({"id": format!("r{number}"), "prompt": format!("What is {}?", number % 500)});
        client.write("requests", (written..written + BETWEEN).map(request).map(New::from));
        written += BETWEEN;
        // Between any two lines: at once, or anywhere until all are through.
        until(Instant::now() + Duration::from_millis(u64::try_from(dice.below(1_500)).unwrap()));
        up.kill();
        up = start();
    }
    results.until("a result for each request", LIMIT, |records| {
        (by_key(records).len() >= written).then_some(())
    });
    wait_for("no lag of publish", LIMIT, || (client.lag("answer.publish", "endings") == 0).then_some(()));
    let doubled = |records: &[Record]| by_key(records).into_iter().filter(|(_, count)| *count > 1).count();
    assert_eq!((doubled(results.to_the_end(LIMIT)), results.records().len()), (0, written));
    let outcomes = client.read("outcomes").to_the_end(LIMIT).to_vec();
    assert_eq!((doubled(&outcomes), outcomes.len()), (0, written));
    assert!(results.records().iter().all(|record| record.json()["status"] == "answered"));
    up.drain();
}
