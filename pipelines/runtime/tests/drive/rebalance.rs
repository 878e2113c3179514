//! Partitions that come and go.

use crate::support::{Spec, World, on, pass, script};
use forebay_runtime::drive::Limits;
use std::time::Duration;

/// Reads two topics; a text that is a number takes so many milliseconds.
fn spec() -> Spec {
    let wait = script(|run| async move {
        pass(run.body.parse().unwrap()).await;
        Ok(vec![on(&run)])
    });
    Spec { from: vec!["requests", "other"], limits: Limits::new(2), ..Spec::new(wait) }
}

#[tokio::test(start_paused = true)]
async fn a_partition_is_drained_before_it_is_given_up() {
    let world = World::new();
    let member = world.join(&spec());
    for ms in ["5000", "6000", "1"] {
        world.write("requests", None, ms);
    }
    pass(100).await;
    member.rebalance("requests");
    pass(5_500).await;
    assert_eq!(world.texts("out"), ["5000"], "what waits is not begun while the rest is drained");
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.texts("out"), ["5000", "6000", "1"], "none twice");
}

#[tokio::test(start_paused = true)]
async fn the_partitions_that_are_kept_go_on_meanwhile() {
    let world = World::new();
    let member = world.join(&spec());
    world.write("requests", None, "9000");
    pass(100).await;
    member.rebalance("requests");
    for _ in 0..5 {
        world.write("other", None, "10");
    }
    pass(1_000).await;
    assert_eq!(world.texts("out"), ["10"; 5]);
    assert_eq!(world.committed("other"), 5);
    world.settled().await;
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_takes_too_long_is_given_up_and_its_record_comes_again() {
    let world = World::new();
    let member = world.join(&spec());
    world.write("requests", None, "60000");
    world.write("requests", None, "1");
    pass(100).await;
    member.rebalance("requests");
    pass(20_000).await;
    assert_eq!(world.committed("requests"), 0, "nothing passes the record that runs on");
    world.settled().await;
    member.stop().await.unwrap();
    let written = world.texts("out").iter().filter(|text| *text == "60000").count();
    assert_eq!(written, 1, "the first run ended when its partition was gone, and wrote nothing");
}

#[tokio::test(start_paused = true)]
async fn what_was_lost_is_delivered_again_and_its_late_end_writes_and_moves_nothing() {
    let world = World::new();
    let member = world.join(&spec());
    world.write("requests", None, "3000");
    pass(2_000).await;
    member.lose("requests");
    pass(2_000).await;
    assert_eq!(world.texts("out"), [""; 0], "the first delivery ends after the loss, and writes nothing");
    assert_eq!(world.committed("requests"), 0);
    world.settled().await;
    assert_eq!(world.texts("out"), ["3000"]);
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_later_revoke_waits_for_the_earlier_one() {
    let world = World::new();
    let member = world.join(&spec());
    world.write("requests", None, "8000");
    world.write("other", None, "10");
    pass(1).await;
    member.rebalance("requests");
    pass(1).await;
    member.rebalance("other");
    pass(2_000).await;
    world.write("other", None, "20");
    world.write("requests", None, "30");
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.texts("out"), ["10", "8000", "20", "30"]);
}

#[tokio::test(start_paused = true)]
async fn a_loss_in_the_middle_of_a_drain_keeps_its_progress_from_being_committed() {
    let world = World::new();
    let member = world.join(&spec());
    world.write("requests", None, "2000");
    world.write("requests", None, "5000");
    pass(100).await;
    member.rebalance("requests");
    pass(100).await;
    member.lose("requests");
    pass(4_900).await;
    assert_eq!(world.committed("requests"), 0);
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.texts("out"), ["2000", "5000", "2000", "5000"]);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_in_the_middle_of_a_drain_takes_no_longer_than_either() {
    let world = World::new();
    let member = world.join(&spec());
    world.write("requests", None, "9000");
    world.write("other", None, "3600000");
    pass(100).await;
    member.rebalance("requests");
    pass(1_000).await;
    let before = tokio::time::Instant::now();
    member.stop().await.unwrap();
    assert_eq!(before.elapsed(), Duration::from_secs(10));
    assert_eq!((world.committed("requests"), world.committed("other")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_window_that_was_full_is_open_after_a_rebalance() {
    let world = World::new();
    let member = world.join(&Spec { limits: Limits { window: 3, ..Limits::new(100) }, ..spec() });
    for n in 0..20 {
        world.write("requests", None, if n == 0 { "5000" } else { "1" });
    }
    pass(1_000).await;
    member.rebalance("requests");
    world.settled().await;
    member.stop().await.unwrap();
}
