//! The contract of the counter port, which both of its adapters must pass.
//!
//! The suite knows the port alone. Redis is tested where `FOREBAY_TEST_REDIS` names a server.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use forebay_stores::counters::{AMOUNT_MAX, Hold, Line, Local, NAME_BYTES_MAX};
use forebay_stores::{Counters, key_value};
use forebay_tests::services;
use futures::future::{BoxFuture, join_all};

type Outcome = Result<(), Box<dyn std::error::Error>>;
/// Lets time pass for a store, by its own clock.
type Pass<'a> = &'a (dyn Fn(Duration) -> BoxFuture<'static, ()> + Sync);

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// What every adapter promises. `store` is empty.
async fn contract(store: &Arc<dyn Counters>, pass: Pass<'_>) -> Outcome {
    what_is_settled_counts_as_used_and_no_longer_as_held(store.as_ref()).await?;
    a_hold_is_taken_on_all_of_its_lines_or_on_none(store.as_ref()).await?;
    what_a_dead_process_held_is_free_after_its_time(store.as_ref(), pass).await?;
    what_was_used_counts_also_when_its_hold_had_run_out(store.as_ref(), pass).await?;
    a_counter_is_forgotten_when_it_is_no_longer_kept(store.as_ref(), pass).await?;
    of_200_at_once_as_many_are_let_in_as_there_is_room_for(store).await?;
    amounts_are_exact_to_the_last_unit(store.as_ref()).await?;
    what_is_over_a_limit_is_refused(store.as_ref()).await
}

fn line(name: &str, amount: u64, limit: u64) -> Line {
    Line { name: name.to_owned(), amount, limit, keep: LONG }
}

async fn what_is_settled_counts_as_used_and_no_longer_as_held(store: &dyn Counters) -> Outcome {
    let lines = [line("a", 60, 100)];
    assert_eq!(store.hold("1", &lines, LONG).await?, Hold::Taken);
    assert_eq!(store.hold("2", &lines, LONG).await?, Hold::Over { line: 0, counted: 60 });
    store.settle("1", &lines, &[40]).await?;
    assert_eq!(store.hold("2", &lines, LONG).await?, Hold::Taken, "40 and 60 are 100");
    store.settle("2", &lines, &[0]).await?;
    assert_eq!(store.hold("3", &[line("a", 61, 100)], LONG).await?, Hold::Over { line: 0, counted: 40 });
    Ok(())
}

async fn a_hold_is_taken_on_all_of_its_lines_or_on_none(store: &dyn Counters) -> Outcome {
    store.hold("1", &[line("b2", 5, 9)], LONG).await?;
    let both = [line("b1", 5, 5), line("b2", 5, 9)];
    assert_eq!(store.hold("2", &both, LONG).await?, Hold::Over { line: 1, counted: 5 });
    assert_eq!(
        store.hold("3", &[line("b1", 5, 5)], LONG).await?,
        Hold::Taken,
        "nothing was held of the first"
    );
    Ok(())
}

async fn what_a_dead_process_held_is_free_after_its_time(store: &dyn Counters, pass: Pass<'_>) -> Outcome {
    let lines = [line("c", 100, 100)];
    assert_eq!(store.hold("died", &lines, SHORT).await?, Hold::Taken);
    assert_eq!(store.hold("next", &lines, SHORT).await?, Hold::Over { line: 0, counted: 100 });
    pass(SHORT * 2).await;
    assert_eq!(store.hold("next", &lines, LONG).await?, Hold::Taken);
    Ok(())
}

async fn what_was_used_counts_also_when_its_hold_had_run_out(
    store: &dyn Counters,
    pass: Pass<'_>,
) -> Outcome {
    let lines = [line("d", 60, 100)];
    store.hold("slow", &lines, SHORT).await?;
    pass(SHORT * 2).await;
    assert_eq!(store.hold("next", &lines, LONG).await?, Hold::Taken);
    store.settle("slow", &lines, &[30]).await?;
    assert_eq!(store.hold("third", &lines, LONG).await?, Hold::Over { line: 0, counted: 90 });
    Ok(())
}

async fn a_counter_is_forgotten_when_it_is_no_longer_kept(store: &dyn Counters, pass: Pass<'_>) -> Outcome {
    let lines = [Line { keep: SHORT, ..line("e", 100, 100) }];
    store.hold("1", &lines, SHORT).await?;
    store.settle("1", &lines, &[100]).await?;
    assert_eq!(store.hold("2", &lines, SHORT).await?, Hold::Over { line: 0, counted: 100 });
    pass(SHORT * 2).await;
    assert_eq!(store.hold("2", &lines, SHORT).await?, Hold::Taken);
    Ok(())
}

async fn of_200_at_once_as_many_are_let_in_as_there_is_room_for(store: &Arc<dyn Counters>) -> Outcome {
    let tasks = (0..200).map(|n| {
        let store = Arc::clone(store);
        tokio::spawn(async move { store.hold(&n.to_string(), &[line("f", 7, 100)], LONG).await })
    });
    let mut taken = 0;
    for hold in join_all(tasks).await {
        taken += usize::from(hold?? == Hold::Taken);
    }
    assert_eq!(taken, 14);
    Ok(())
}

async fn amounts_are_exact_to_the_last_unit(store: &dyn Counters) -> Outcome {
    let most = [line("g", AMOUNT_MAX - 1, AMOUNT_MAX)];
    assert_eq!(store.hold("1", &most, LONG).await?, Hold::Taken);
    store.settle("1", &most, &[AMOUNT_MAX - 2]).await?;
    let counted = AMOUNT_MAX - 2;
    assert_eq!(store.hold("2", &[line("g", 3, AMOUNT_MAX)], LONG).await?, Hold::Over { line: 0, counted });
    assert_eq!(store.hold("2", &[line("g", 2, AMOUNT_MAX)], LONG).await?, Hold::Taken);
    Ok(())
}

async fn what_is_over_a_limit_is_refused(store: &dyn Counters) -> Outcome {
    let long = "n".repeat(NAME_BYTES_MAX + 1);
    for refused in [store.hold(&long, &[], LONG).await, store.hold("1", &[line(&long, 1, 1)], LONG).await] {
        assert!(refused.is_err_and(|error| !error.is_transient()));
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn local_counters_keep_the_contract() -> Outcome {
    let began = tokio::time::Instant::now();
    let store: Arc<dyn Counters> = Arc::new(Local::new(Arc::new(move || UNIX_EPOCH + began.elapsed())));
    contract(&store, &|time| Box::pin(tokio::time::advance(time))).await
}

#[tokio::test]
async fn redis_counters_keep_the_contract() -> Outcome {
    let Some(url) = services::redis() else { return Ok(()) };
    let prefix = format!("forebay-test:{}:counters:", std::process::id());
    let options = || key_value::RedisOptions { prefix: prefix.clone(), ..key_value::RedisOptions::default() };
    let redis = Arc::new(key_value::Redis::connect(&url, options()).await?);
    let store: Arc<dyn Counters> = redis.clone();
    contract(&store, &|time| Box::pin(tokio::time::sleep(time))).await?;
    // What one process holds, another one sees.
    let other = key_value::Redis::connect(&url, options()).await?;
    assert!(matches!(other.hold("x", &[line("f", 7, 100)], LONG).await?, Hold::Over { counted: 98, .. }));
    key_value::KeyValue::clear(&*redis, "").await?;
    Ok(())
}
