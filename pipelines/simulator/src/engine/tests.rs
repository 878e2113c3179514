//! The engine under a time of its own.

use super::*;
use proptest::prelude::*;

/// 1,000 tokens of prompts a second, 100 of answers, and a tenth more for each further sequence.
fn pace() -> Pace {
    Pace { prefill_per_s: 1_000.0, decode_per_s: 100.0, decode_slowdown: 0.1, slots: 4, step_tokens: 1_000 }
}

fn modelled(prompt: u32, output: u32) -> Job {
    Job { priority: 0, output, work: Work::Modelled { prompt, blocks: Vec::new() } }
}

fn timed(first: Micros, gap: Micros, output: u32) -> Job {
    Job { priority: 0, output, work: Work::Timed { first, gap } }
}

/// Submits jobs at their times, runs until nothing happens any more, and says at which millisecond each was admitted, wrote
/// its first token and was done.
fn check(pace: Pace, blocks: u32, jobs: &[(Micros, Job)], expected: &str) -> Engine {
    let mut engine = Engine::new(pace, blocks, 16);
    let mut told = Vec::new();
    let ids: Vec<Id> =
        jobs.iter().map(|(at, job)| engine.submit(*at * 1_000, job.clone(), &mut told)).collect();
    engine.advance(Micros::MAX / 2, &mut told);
    let when = |id: &Id, wanted: fn(What) -> bool| {
        told.iter().find(|told| told.id == *id && wanted(told.what)).map(|told| told.at / 1_000)
    };
    let shown = ids.iter().map(|id| {
        let done = told.iter().filter(|told| told.id == *id && told.what == What::Done).count();
        assert_eq!(done, 1, "{id:?} ends once");
        let text = |at: Option<Micros>| at.map_or("-".to_owned(), |at| at.to_string());
        [
            when(id, |what| matches!(what, What::Admitted(_))),
            when(id, |what| matches!(what, What::Written(_))),
            when(id, |what| what == What::Done),
        ]
        .map(text)
        .join(" ")
    });
    assert_eq!(shown.collect::<Vec<_>>().join(", "), expected);
    assert_eq!((engine.running(), engine.waiting(), engine.next()), (0, 0, None));
    assert!(engine.kv_usage() < 1e-9, "all blocks are let go");
    engine
}

#[test]
fn a_prompt_is_read_at_its_rate_and_tokens_follow_at_theirs() {
    // 200 ms for 200 tokens, which brings the first; then ten more of 10 ms.
    check(pace(), 100, &[(0, modelled(200, 11))], "0 200 300");
    check(pace(), 100, &[(0, modelled(200, 0))], "0 - 200");
    // Two steps of at most 1,000 tokens.
    check(pace(), 200, &[(0, modelled(2_000, 1))], "0 2000 2000");
}

#[test]
fn sequences_that_run_together_are_slower_each_and_faster_in_all() {
    let jobs = [(0, modelled(10, 11)), (0, modelled(10, 11))];
    // The second comes while the first step is under way, so the second step reads it and writes for the first.
    check(pace(), 100, &jobs, "0 10 129, 0 30 139");
    let quick = Pace { decode_slowdown: 0.0, ..pace() };
    check(quick, 100, &jobs, "0 10 120, 0 30 130");
}

#[test]
fn who_finds_no_slot_waits_by_priority_and_then_by_arrival() {
    let one = Pace { slots: 1, ..pace() };
    let urgent = Job { priority: -1, ..modelled(10, 2) };
    let jobs = [(0, modelled(10, 2)), (1, modelled(10, 2)), (2, urgent)];
    check(one, 100, &jobs, "0 10 20, 40 50 60, 20 30 40");
}

#[test]
fn a_prompt_that_does_not_fit_into_the_kv_cache_waits_and_nobody_passes_it() {
    // Six blocks: the first holds five of them.
    let jobs = [(0, modelled(80, 3)), (0, modelled(64, 1)), (0, modelled(16, 1))];
    check(pace(), 6, &jobs, "0 80 100, 100 180 180, 100 180 180");
}

#[test]
fn who_needs_a_block_where_there_is_none_puts_out_the_last() {
    // Each begins with two full blocks of five and soon needs a third: the second gives way, and its prompt and the token
    // that it had written are read again.
    let engine = check(pace(), 5, &[(0, modelled(32, 16)), (0, modelled(32, 16))], "0 32 214, 0 74 387");
    assert_eq!(engine.counts().preemptions, 1);
}

#[test]
fn a_known_beginning_is_not_read_again() {
    let job = |tail: u64| Job {
        priority: 0,
        output: 1,
        work: Work::Modelled { prompt: 64, blocks: vec![1, 2, 3, tail] },
    };
    let engine = check(pace(), 100, &[(0, job(4)), (100, job(5))], "0 64 64, 100 116 116");
    assert_eq!((engine.counts().prefix_queries, engine.counts().prefix_hits), (128, 48));
    // The whole prompt is known: its last block is computed all the same.
    check(pace(), 100, &[(0, job(4)), (100, job(4))], "0 64 64, 100 116 116");
}

#[test]
fn given_times_are_kept_and_take_slots() {
    check(pace(), 1, &[(0, timed(0, 0, 5))], "0 0 0");
    check(pace(), 1, &[(0, timed(50_000, 10_000, 5))], "0 50 90");
    check(pace(), 1, &[(0, timed(50_000, 0, 0))], "0 - 50");
    let two = Pace { slots: 2, ..pace() };
    let jobs = [(0, timed(50_000, 0, 1)), (0, timed(70_000, 0, 1)), (0, timed(10_000, 0, 1))];
    check(two, 1, &jobs, "0 50 50, 0 70 70, 50 60 60");
}

#[test]
fn a_slot_is_free_from_the_moment_at_which_its_sequence_ended() {
    let mut engine = Engine::new(Pace { slots: 1, ..pace() }, 1, 16);
    let mut told = Vec::new();
    engine.submit(0, timed(50_000, 0, 1), &mut told);
    let second = engine.submit(0, timed(50_000, 0, 1), &mut told);
    engine.advance(500_000, &mut told);
    let done = told.iter().find(|told| told.id == second && told.what == What::Done).unwrap();
    assert_eq!(done.at, 100_000, "though nobody looked before");
}

#[test]
fn what_is_cancelled_lets_its_slot_and_blocks_go() {
    let mut engine = Engine::new(Pace { slots: 1, ..pace() }, 10, 16);
    let mut told = Vec::new();
    let first = engine.submit(0, modelled(100, 50), &mut told);
    let second = engine.submit(0, modelled(100, 1), &mut told);
    let third = engine.submit(0, timed(1_000, 0, 1), &mut told);
    engine.cancel(50_000, third, &mut told);
    engine.cancel(50_000, first, &mut told);
    engine.cancel(50_000, first, &mut told);
    engine.advance(10_000_000, &mut told);
    let ended: Vec<_> =
        told.iter().filter(|told| told.what == What::Done).map(|told| (told.id, told.at)).collect();
    // The step under way goes on to its end, for nobody.
    assert_eq!(ended, [(second, 200_000)]);
    assert!((engine.kv_usage(), engine.running()) == (0.0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_job_ends_once_and_no_token_is_lost(
        jobs in prop::collection::vec((0_u64..500, 0_u32..300, 0_u32..100, -1_i64..2, any::<bool>(), 0_u64..4), 1..40)
    ) {
        // The largest job needs 25 blocks; so few make for putting out.
        let mut engine = Engine::new(pace(), 30, 16);
        let (mut told, mut ids, mut now) = (Vec::new(), Vec::new(), 0);
        for (wait_ms, prompt, output, priority, is_timed, prefix) in jobs {
            now += wait_ms * 1_000;
            let blocks = (0..u64::from(prompt / 16)).map(|block| prefix * 1_000 + block).collect();
            let work = match is_timed {
                true => Work::Timed { first: u64::from(prompt) * 1_000, gap: prefix * 1_000 },
                false => Work::Modelled { prompt, blocks },
            };
            ids.push((engine.submit(now, Job { priority, output, work }, &mut told), output));
            prop_assert!(engine.running() <= 4 && engine.kv_usage() <= 1.0);
        }
        engine.advance(Micros::MAX / 2, &mut told);
        prop_assert!(told.windows(2).all(|pair| pair[0].at <= pair[1].at), "told in order of time");
        for (id, output) in ids {
            let mine: Vec<_> = told.iter().filter(|told| told.id == id).map(|told| told.what).collect();
            let mut written: Vec<_> = mine.iter().filter_map(|what| match what { What::Written(n) => Some(*n), _ => None }).collect();
            prop_assert!(written.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert_eq!(written.pop().unwrap_or(0), output);
            prop_assert_eq!(mine.iter().filter(|what| **what == What::Done).count(), 1);
            prop_assert_eq!(mine.last(), Some(&What::Done));
        }
        prop_assert!(engine.kv_usage() < 1e-9);
    }
}
