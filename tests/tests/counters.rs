//! The contract of the counter port, which both of its adapters must pass, and budgets over both.
//!
//! The suite knows the port alone. Redis is tested where `FOREBAY_TEST_REDIS` names a server.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use forebay_calls::{Allowed, Call, CallError, Listener, Model, Reply, Tried, Upstream};
use forebay_operator::Clock;
use forebay_operators::budgets::{Budget, Budgets, Holder, Period, Unit};
use forebay_schemas::{JobId, Sampling, Usage};
use forebay_stores::counters::{AMOUNT_MAX, Counted, GROUP_MAX, Hold, Line, Local, NAME_BYTES_MAX, PAGE_MAX};
use forebay_stores::{Counters, key_value};
use forebay_tests::services;
use futures::future::{BoxFuture, join_all};

type Outcome = Result<(), Box<dyn std::error::Error>>;
/// Lets time pass for a store, by its own clock.
type Pass<'a> = &'a (dyn Fn(Duration) -> BoxFuture<'static, ()> + Sync);

const LONG: Duration = Duration::from_secs(60);
/// Long enough for a few calls of Redis, whose clock nobody sets.
const SHORT: Duration = Duration::from_secs(3);
const BEYOND: Duration = Duration::from_millis(3_300);

/// What every adapter promises. `store` is empty.
async fn contract(store: &Arc<dyn Counters>, pass: Pass<'_>) -> Outcome {
    what_is_settled_counts_as_used_and_no_longer_as_held(store.as_ref()).await?;
    a_hold_is_taken_on_all_of_its_lines_or_on_none(store.as_ref()).await?;
    what_a_dead_process_held_is_free_after_its_time(store.as_ref(), pass).await?;
    what_was_used_counts_also_when_its_hold_had_run_out(store.as_ref(), pass).await?;
    a_counter_is_forgotten_when_it_is_no_longer_kept(store.as_ref(), pass).await?;
    of_200_at_once_as_many_are_let_in_as_there_is_room_for(store).await?;
    amounts_are_exact_to_the_last_unit(store.as_ref()).await?;
    a_hold_that_its_settlement_overtook_holds_nothing(store.as_ref()).await?;
    a_full_group_is_refused_new_counters_and_nobody_else_is(store.as_ref(), pass).await?;
    a_list_has_all_of_its_counters_by_their_names_as_they_stand(store.as_ref(), pass).await?;
    what_is_over_a_limit_is_refused(store.as_ref()).await
}

fn line(name: &str, amount: u64, limit: u64) -> Line {
    Line { name: name.to_owned(), amount, limit, keep: LONG, group: None, list: None }
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
    pass(BEYOND).await;
    assert_eq!(store.hold("next", &lines, LONG).await?, Hold::Taken);
    Ok(())
}

async fn what_was_used_counts_also_when_its_hold_had_run_out(
    store: &dyn Counters,
    pass: Pass<'_>,
) -> Outcome {
    let lines = [line("d", 60, 100)];
    store.hold("slow", &lines, SHORT).await?;
    pass(BEYOND).await;
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
    pass(BEYOND).await;
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

async fn a_hold_that_its_settlement_overtook_holds_nothing(store: &dyn Counters) -> Outcome {
    let lines = [line("j1", 60, 100), line("j2", 60, 100)];
    store.settle("late", &lines, &[0, 0]).await?;
    store.hold("late", &lines, LONG).await?;
    assert_eq!(store.hold("next", &lines, LONG).await?, Hold::Taken);
    assert_eq!(store.hold("third", &lines, LONG).await?, Hold::Over { line: 0, counted: 60 });
    Ok(())
}

async fn a_full_group_is_refused_new_counters_and_nobody_else_is(
    store: &dyn Counters,
    pass: Pass<'_>,
) -> Outcome {
    let of = |group: &str, n: usize, keep| {
        [Line { group: Some(group.to_owned()), keep, ..line(&format!("{group}/{n}"), 1, 2) }]
    };
    let kept = of("h", 0, LONG);
    assert_eq!(store.hold("1", &kept, LONG).await?, Hold::Taken);
    let rest = (1..GROUP_MAX - 1).map(|n| of("h", n, LONG)).collect::<Vec<_>>();
    for all in rest.chunks(500) {
        for hold in join_all(all.iter().map(|lines| store.hold("1", lines, SHORT))).await {
            assert_eq!(hold?, Hold::Taken);
        }
    }
    assert_eq!(store.hold("1", &of("h", GROUP_MAX - 1, SHORT), SHORT).await?, Hold::Taken);
    let new = of("h", GROUP_MAX, LONG);
    let after_another = [line("h", 1, 1), new[0].clone()];
    assert_eq!(store.hold("2", &after_another, LONG).await?, Hold::Full { line: 1 });
    assert_eq!(store.hold("3", &after_another[..1], LONG).await?, Hold::Taken, "no line of it was held");
    assert_eq!(store.hold("2", &kept, LONG).await?, Hold::Taken, "who has a counter keeps it");
    assert_eq!(store.hold("3", &kept, LONG).await?, Hold::Over { line: 0, counted: 2 });
    assert_eq!(store.hold("2", &of("i", 0, LONG), LONG).await?, Hold::Taken, "another group");
    pass(BEYOND).await;
    assert_eq!(store.hold("2", &new, LONG).await?, Hold::Taken, "another one was forgotten");
    Ok(())
}

async fn a_list_has_all_of_its_counters_by_their_names_as_they_stand(
    store: &dyn Counters,
    pass: Pass<'_>,
) -> Outcome {
    let of = |list: &str, name: &str| [Line { list: Some(list.to_owned()), ..line(name, 60, 100) }];
    let counted = |name: &str, used, held, refused| Counted { name: name.to_owned(), used, held, refused };
    store.hold("1", &of("k", "k/b"), LONG).await?;
    store.hold("1", &of("k", "k/a"), SHORT).await?;
    store.hold("1", &of("other", "k/c"), LONG).await?;
    assert!(matches!(store.hold("2", &of("k", "k/b"), LONG).await?, Hold::Over { .. }));
    assert_eq!(store.listed("k", "").await?, [counted("k/a", 0, 60, 0), counted("k/b", 0, 60, 1)]);
    store.settle("1", &of("k", "k/b"), &[40]).await?;
    pass(BEYOND).await;
    assert_eq!(store.listed("k", "").await?, [counted("k/a", 0, 0, 0), counted("k/b", 40, 0, 1)]);
    assert_eq!(store.listed("k", "k/a").await?, [counted("k/b", 40, 0, 1)]);
    assert_eq!((store.listed("k", "k/b").await?, store.listed("none", "").await?), (vec![], vec![]));
    let names: Vec<_> = (0..=PAGE_MAX).map(|n| format!("l/{n:05}")).collect();
    for name in &names {
        store.hold("1", &of("l", name), LONG).await?;
    }
    let page = store.listed("l", "").await?;
    assert_eq!(
        page.iter().map(|one| &one.name).collect::<Vec<_>>(),
        names[..PAGE_MAX].iter().collect::<Vec<_>>()
    );
    assert_eq!(store.listed("l", &page[PAGE_MAX - 1].name).await?, [counted(&names[PAGE_MAX], 0, 60, 0)]);
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

#[tokio::test(start_paused = true)]
async fn groups_that_fill_the_memory_leave_room_for_counters_of_none() -> Outcome {
    let began = tokio::time::Instant::now();
    let store = Local::new(Arc::new(move || UNIX_EPOCH + began.elapsed()));
    let (mut holds, alone) = (0, line("alone", 1, 2));
    store.hold("1", std::slice::from_ref(&alone), LONG).await?;
    let mut group = 0;
    let refused = loop {
        let name = format!("{}", group / GROUP_MAX);
        let made_up = Line { group: Some(name), ..line(&format!("made up {group}"), 1, 1) };
        match store.hold("1", &[made_up], LONG).await? {
            Hold::Taken => holds += 1,
            refused => break refused,
        }
        group += 1;
    };
    assert_eq!((holds, refused), (200_000, Hold::Full { line: 0 }));
    assert_eq!(store.hold("2", &[alone], LONG).await?, Hold::Taken);
    assert_eq!(store.hold("2", &[line("new", 1, 1)], LONG).await?, Hold::Taken);
    Ok(())
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

/// Answers after a while, and takes as many tokens as it may.
struct Taking(AtomicU64);

impl Model for Taking {
    fn provider(&self) -> &'static str {
        "taking"
    }
    fn name(&self) -> &str {
        "m"
    }
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let sent = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let tokens = call.tokens_estimated();
            self.0.fetch_add(tokens, Ordering::Relaxed);
            Ok(Reply {
                text: "yes".to_owned(),
                model: "m".to_owned(),
                usage: Some(Usage::of(0, tokens)),
                ..Reply::default()
            })
        };
        listener.paid(Upstream { provider: "taking", endpoint: None, model: "m" }, Box::pin(sent))
    }
}

struct Deaf;

impl Listener for Deaf {
    fn started(&self, _: Upstream<'_>) {}
    fn token(&self, _: &str) {}
    fn ended(&self, _: &Tried<'_>) {}
}

/// 200 calls of 100 tokens at once, from as many processes as there are counters, of a job that has 5,050 of the tenant's
/// 8,000.
async fn burst(counters: Vec<Arc<dyn Counters>>) -> Outcome {
    let budget =
        |holder, limit| Budget { holder, of: None, unit: Unit::Tokens, period: Period::Month, limit };
    let taking = Arc::new(Taking(AtomicU64::new(0)));
    let process = |(number, counters)| {
        let budgets = vec![budget(Holder::Tenant, 8_000), budget(Holder::Job, 5_050)];
        let budgets = Budgets::new(budgets, None, counters, Clock::System, format!("process-{number}"));
        Allowed::new(taking.clone(), Arc::new(budgets))
    };
    let processes: Vec<_> = counters.into_iter().enumerate().map(process).collect();
    let sampling = Sampling { max_tokens: Some(100), ..Sampling::default() };
    let of_a_job = Call { sampling, job: Some(JobId::try_from("j".to_owned())?), ..Call::default() };
    let alone = Call { job: None, ..of_a_job.clone() };
    let asked = (0..200).map(|n| processes[n % processes.len()].complete(&of_a_job, &Deaf));
    let refused = join_all(asked).await.into_iter().filter_map(Result::err).collect::<Vec<_>>();
    assert!(
        refused
            .iter()
            .all(|error| error.code == "budget_exceeded" && error.to_string().contains("job \"j\""))
    );
    assert_eq!((200 - refused.len(), taking.0.load(Ordering::Relaxed)), (50, 5_000));
    // What the job was refused is not held of its tenant's.
    let asked = (0..200).map(|n| processes[n % processes.len()].complete(&alone, &Deaf));
    let answered = join_all(asked).await.into_iter().filter(Result::is_ok).count();
    assert_eq!((answered, taking.0.load(Ordering::Relaxed)), (30, 8_000));
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn no_burst_goes_over_a_budget_in_one_process() -> Outcome {
    let began = tokio::time::Instant::now();
    burst(vec![Arc::new(Local::new(Arc::new(move || UNIX_EPOCH + began.elapsed())))]).await
}

#[tokio::test]
async fn no_burst_goes_over_a_budget_in_four_processes() -> Outcome {
    let Some(url) = services::redis() else { return Ok(()) };
    let prefix = format!("forebay-test:{}:budgets:", std::process::id());
    let mut processes = Vec::new();
    for _ in 0..4 {
        let options =
            key_value::RedisOptions { prefix: prefix.clone(), ..key_value::RedisOptions::default() };
        processes.push(Arc::new(key_value::Redis::connect(&url, options).await?));
    }
    burst(processes.iter().map(|redis| Arc::clone(redis) as Arc<dyn Counters>).collect()).await?;
    key_value::KeyValue::clear(&*processes[0], "").await?;
    Ok(())
}
