//! How records flow: bounds, commits, the end.

use crate::support::{Slow, Spec, World, header, on, pass, script};
use forebay_runtime::{
    drive::{Limits, SendError, Sink},
    message::Outgoing,
};
use futures::future::BoxFuture;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Records take so long.
fn slow(ms: u64) -> Spec {
    Spec::new(script(move |run| async move {
        pass(ms).await;
        Ok(vec![on(&run)])
    }))
}

#[tokio::test(start_paused = true)]
async fn no_more_records_are_in_the_operator_than_allowed_and_that_many_are() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&most);
    let count = script(move |run| {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            pass(10).await;
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(vec![on(&run)])
        }
    });
    let world = World::new();
    let member = world.join(&Spec { limits: Limits::new(7), ..Spec::new(count) });
    for n in 0..100 {
        world.write("requests", None, &n.to_string());
    }
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 7);
}

/// The first record takes an hour, the others nothing; with this window so many are done meanwhile.
async fn check_window(window: i64, done: usize) {
    let world = World::new();
    let first = script(|run| async move {
        pass(if run.body == "0" { 3_600_000 } else { 0 }).await;
        Ok(vec![on(&run)])
    });
    let limits = Limits { window, ..Limits::new(1_000) };
    let member = world.join(&Spec { limits, ..Spec::new(first) });
    for n in 0..100 {
        world.write("requests", None, &n.to_string());
    }
    pass(60_000).await;
    assert_eq!(world.texts("out").len(), done, "window {window}");
    assert_eq!(world.committed("requests"), 0);
    world.settled().await;
    assert_eq!(world.texts("out").len(), 100);
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_window_stops_reading_until_it_is_half_empty() {
    for window in [0, 1, 2, 10, 99] {
        // The record that fills it over is read already.
        check_window(window, usize::try_from(window).unwrap()).await;
    }
    check_window(100, 99).await;
}

#[tokio::test]
async fn a_backlog_leaves_others_their_turn_however_much_it_computes() {
    const RECORDS: usize = 2_000;
    let (done, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&done);
    // It takes a fifth of a millisecond of the processor and waits for nothing.
    let busy = script(move |run| {
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_micros(200) {
            std::hint::spin_loop();
        }
        counted.fetch_add(1, Ordering::SeqCst);
        async move { Ok(vec![on(&run)]) }
    });
    let world = World::new();
    let member = world.join(&Spec { limits: Limits::new(256), ..Spec::new(busy) });
    for n in 0..RECORDS {
        world.write("requests", None, &n.to_string());
    }
    let mut before = 0;
    while before < RECORDS {
        tokio::task::yield_now().await;
        let now = done.load(Ordering::SeqCst);
        most.fetch_max(now - before, Ordering::SeqCst);
        before = now;
    }
    member.stop().await.unwrap();
    // Ten of them are a turn.
    assert!(most.load(Ordering::SeqCst) < 100, "{most:?} records between two turns of another");
}

#[tokio::test(start_paused = true)]
async fn progress_is_committed_also_while_there_is_a_backlog() {
    let world = World::new();
    let (done, behind) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (log, most) = (Arc::clone(&world.log), Arc::clone(&behind));
    // It takes a millisecond of the machine and never waits, so the loop is never without something to do.
    let busy = script(move |run| {
        let (log, done, most) = (Arc::clone(&log), Arc::clone(&done), Arc::clone(&most));
        async move {
            tokio::time::advance(Duration::from_millis(1)).await;
            let committed = usize::try_from(log.committed("step", &"requests".into())).unwrap();
            most.fetch_max(done.fetch_add(1, Ordering::SeqCst) - committed, Ordering::SeqCst);
            Ok(vec![on(&run)])
        }
    });
    for n in 0..3_000 {
        world.write("requests", None, &n.to_string());
    }
    let member = world.join(&Spec { limits: Limits::new(4), ..Spec::new(busy) });
    world.settled().await;
    member.stop().await.unwrap();
    assert!(behind.load(Ordering::SeqCst) < 500, "{behind:?} records were finished and not committed");
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_finishes_what_is_running_and_leaves_what_waits() {
    let world = World::new();
    let spec = Spec { limits: Limits::new(10), ..slow(1_000) };
    let member = world.join(&spec);
    for n in 0..25 {
        world.write("requests", None, &n.to_string());
    }
    pass(1_500).await;
    member.stop().await.unwrap();
    assert_eq!((world.texts("out").len(), world.committed("requests")), (20, 20));
    let member = world.join(&spec);
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.texts("out").len(), 25, "none twice");
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_for_acknowledgements() {
    let world = World::new();
    let sink = Arc::new(Slow { log: Arc::clone(&world.log), ms: 2_000 });
    let member = world.join_over(&slow(10), sink);
    world.write("requests", None, "a");
    pass(100).await;
    member.stop().await.unwrap();
    assert_eq!((world.told().as_str(), world.committed("requests")), ("out a", 1));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_does_not_wait_for_ever() {
    let world = World::new();
    let member = world.join(&slow(3_600_000));
    world.write("requests", None, "a");
    pass(100).await;
    let before = tokio::time::Instant::now();
    member.stop().await.unwrap();
    assert_eq!(before.elapsed(), Duration::from_secs(10));
    assert_eq!(world.committed("requests"), 0);
}

/// Refuses all.
struct Refusing(fn() -> SendError);

impl Sink for Refusing {
    fn send(&self, _: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>> {
        Box::pin(async { Err((self.0)()) })
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_closed_sink_did_not_take_is_unfinished() {
    let world = World::new();
    let member = world.join_over(&slow(10), Arc::new(Refusing(|| SendError::Closed)));
    world.write("requests", None, "a");
    pass(1_000).await;
    member.stop().await.unwrap();
    assert_eq!(world.committed("requests"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_cannot_go_on_ends_the_stage_with_the_reason() {
    let fatal = || SendError::Fatal { topic: "out".to_owned(), reason: "fenced".to_owned() };
    let world = World::new();
    let member = world.join_over(&slow(10), Arc::new(Refusing(fatal)));
    world.write("requests", None, "a");
    let fault = member.ended().await.unwrap_err().to_string();
    assert_eq!(fault, "stage step cannot go on: could not write to topic out: fenced");
    assert_eq!(world.committed("requests"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_a_sole_writer_writes_does_not_change_with_how_late_its_record_is_delivered() {
    let as_it_came = script(|run| async move { Ok(vec![on(&run)]) });
    // Nothing is committed, so the second member is given the record again; it remembers nothing.
    let limits = Limits { commit_every: Duration::from_secs(3_600), ..Limits::new(1) };
    let spec = Spec { once: true, limits, ..Spec::new(as_it_came) };
    let world = World::new();
    world.write("requests", None, "a");
    for copies in 1..=2 {
        let member = world.join(&spec);
        pass(5_000).await;
        assert_eq!(world.texts("out").len(), copies);
        member.kill().await;
    }
    let timings: Vec<_> = world.log.read("out").iter().map(|one| header(one, "forebay-timings")).collect();
    assert_eq!(timings[0], timings[1]);
}
