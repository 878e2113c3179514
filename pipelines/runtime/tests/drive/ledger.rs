//! A step that pays for its calls: killed at every moment, drained, cut off, and the same request delivered twice.

use crate::support::{Member, NOW_MS, Slow, Spec, World, ending, of, pass, script, text};
use forebay_operator::{Addressed, Context, Failure, Opened, Port, Step};
use forebay_runtime::{
    drive::{Limits, SendError},
    host::memory::MemoryLedger,
    ledger::{Chunk, Log},
    message::Partition,
};
use forebay_schemas::{
    Attempt, DecodeError, EntryKind, Envelope, Headers, Hop, Identity, LedgerEntry, Origin, Record, Request,
    RequestId, Retry, Tenant,
};
use futures::future::BoxFuture;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

/// The calls that were sent, by record.
type Calls = Arc<Mutex<BTreeMap<String, usize>>>;

/// Pays for an answer: it takes `ms`, and the first `fails` calls of a record fail.
struct Paying {
    calls: Calls,
    ms: u64,
    fails: usize,
}

impl Step for Paying {
    fn operator(&self) -> &'static str {
        "paying"
    }
    fn hop(&self) -> Option<Hop> {
        None
    }
    fn input(&self) -> &'static str {
        "Text"
    }
    fn is_job(&self) -> bool {
        true
    }
    fn ports(&self) -> &'static [Port] {
        &[Port { name: "out", record: "Text" }]
    }
    fn open(&self, _: Option<&str>, body: Option<&[u8]>) -> Result<Box<dyn Opened + '_>, DecodeError> {
        let body = String::from_utf8(body.unwrap_or_default().to_vec()).unwrap();
        Ok(Box::new(Read { step: self, body }))
    }
}

/// A text; its first word is the id, and its second, where it is a number, the milliseconds until its deadline.
struct Read<'s> {
    step: &'s Paying,
    body: String,
}

impl Opened for Read<'_> {
    fn identity(&self) -> Identity {
        let mut words = self.body.split(' ');
        let id = words.next().and_then(|id| RequestId::try_from(id.to_owned()).ok());
        Identity { id, deadline_ms: words.next().and_then(|word| word.parse().ok()), ..Identity::default() }
    }
    fn request(&self) -> Option<&Request> {
        None
    }
    fn run<'a>(self: Box<Self>, cx: &'a Context) -> BoxFuture<'a, Result<Vec<Addressed>, Failure>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let Self { step, body } = *self;
            let number = Mutex::new(0);
            let row = |attempt: i32| {
                // Tries made elsewhere stand in the envelope.
                let attempt = attempt.max(i32::try_from(cx.envelope().attempts).unwrap());
                *number.lock().unwrap() = attempt;
                Ok(row(cx, attempt, "ambiguous"))
            };
            let call = async {
                let made = {
                    let mut calls = step.calls.lock().unwrap();
                    let made = calls.entry(body.clone()).or_default();
                    *made += 1;
                    *made
                };
                pass(step.ms).await;
                let attempt = *number.lock().unwrap();
                let failed = made <= step.fails;
                cx.record(self::row(cx, attempt, if failed { "failed" } else { "ok" }));
                if failed { Err(Failure::unavailable("down", "it", "busy")) } else { Ok(format!("{body}!")) }
            };
            let answer = tokio::select! {
                biased;
                stop = cx.cancelled() => return Err(stop.into()),
                answer = cx.paid(0, row, call) => answer?,
            };
            Ok(vec![Addressed { port: "out", key: None, body: Some(answer.into_bytes()) }])
        })
    }
}

fn row(cx: &Context, attempt: i32, status: &str) -> Attempt {
    let call_id = cx.call_id(0).as_str().to_owned();
    Attempt {
        attempt_id: format!("{call_id}/{attempt}"),
        call_id,
        request_id: cx.envelope().id.as_str().to_owned(),
        tenant: String::new(),
        generation: 0,
        stage: cx.stage().to_owned(),
        attempt,
        started_at: 0,
        duration_us: 0,
        ttft_us: None,
        provider: String::new(),
        endpoint: None,
        model: None,
        status: status.to_owned(),
        error_code: None,
        http_status: None,
        input_tokens: None,
        output_tokens: None,
        cost_nano_usd: (status != "ambiguous").then_some(1),
        tier: None,
        cached_read_tokens: None,
        cached_write_tokens: None,
        reasoning_tokens: None,
        key_id: None,
        job: None,
        operation: None,
    }
}

/// A log that takes its time on the way there and back.
struct SlowLedger {
    inner: Arc<MemoryLedger>,
    ms: u64,
}

impl Log for SlowLedger {
    fn append(&self, at: &Partition, entry: &LedgerEntry) -> BoxFuture<'static, Result<i64, SendError>> {
        let (inner, ms, at, entry) = (Arc::clone(&self.inner), self.ms, at.clone(), entry.clone());
        Box::pin(async move {
            pass(ms).await;
            let offset = inner.append(&at, &entry).await;
            pass(ms).await;
            offset
        })
    }
    fn read(
        &self,
        at: &Partition,
        from: i64,
        entries_max: usize,
    ) -> BoxFuture<'static, Result<Chunk, String>> {
        let (read, ms) = (self.inner.read(at, from, entries_max), self.ms);
        Box::pin(async move {
            pass(ms).await;
            read.await
        })
    }
    fn committed(&self, input: &Partition) -> BoxFuture<'static, Result<(i64, String), String>> {
        self.inner.committed(input)
    }
}

struct Shop {
    world: World,
    spec: Spec,
    calls: Calls,
}

impl Shop {
    /// Calls take so long, and the first ones of a record fail.
    fn new(ms: u64, fails: usize) -> Self {
        let (world, calls) = (World::new(), Calls::default());
        let inner = Arc::new(MemoryLedger { log: Arc::clone(&world.log), group: "step".to_owned() });
        let step = Some(Arc::new(Paying { calls: Arc::clone(&calls), ms, fails }) as Arc<dyn Step>);
        let ledger = Some(Arc::new(SlowLedger { inner, ms: 10 }) as Arc<dyn Log>);
        let never = script(|_| async { Err(Failure::Cancelled) });
        let spec = Spec { step, ledger, limits: Limits::new(8), ..Spec::new(never) };
        Self { world, spec, calls }
    }

    fn join(&self) -> Member {
        self.world.join_over(&self.spec, Arc::new(Slow { log: Arc::clone(&self.world.log), ms: 20 }))
    }

    fn ask(&self, body: &str) {
        self.world.write("requests", None, body);
    }

    fn made(&self, body: &str) -> usize {
        self.calls.lock().unwrap().get(body).copied().unwrap_or(0)
    }

    /// How many rows each status has; a row that was written twice is one.
    fn rows(&self) -> BTreeMap<String, usize> {
        let rows = self.world.log.read("attempts");
        let rows = rows.iter().map(|row| Attempt::decode(row.value.as_deref().unwrap()).unwrap());
        let rows: BTreeMap<_, _> = rows.map(|row| (row.attempt_id, row.status)).collect();
        let mut counts = BTreeMap::new();
        for status in rows.into_values() {
            *counts.entry(status).or_default() += 1;
        }
        counts
    }

    fn entries(&self, kind: EntryKind) -> usize {
        self.entries_on("requests", kind)
    }

    fn entries_on(&self, topic: &str, kind: EntryKind) -> usize {
        let entries = self.world.log.read(&format!("ledger.step.{topic}"));
        let entries =
            entries.iter().map(|entry| LedgerEntry::decode(entry.value.as_deref().unwrap()).unwrap());
        entries.filter(|entry| entry.kind == kind).count()
    }

    /// Every call is the answer, a failure, or told of as ambiguous.
    fn check(&self, body: &str, when: &str) {
        let rows = self.rows();
        let of = |status: &str| rows.get(status).copied().unwrap_or(0);
        let explained = of("ok") + of("failed") + of("ambiguous");
        assert!(self.made(body) <= explained, "{when}: {} calls, rows {rows:?}", self.made(body));
        assert_eq!(of("ok"), 1, "{when}: {rows:?}");
        let mut out = self.world.texts("out");
        out.dedup();
        assert_eq!(out, [format!("{body}!")], "{when}");
    }
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_moment_it_pays_again_only_for_a_call_whose_end_nobody_knows() {
    let (mut ambiguous, mut replayed) = (0, 0);
    for (fails, until) in [(0, 700), (1, 3_500)] {
        for after in (0..until).step_by(7) {
            let mut shop = Shop::new(100, fails);
            shop.spec.retries = vec![("retry", 2)];
            let first = shop.join();
            shop.ask("a");
            pass(after).await;
            let answered = shop.entries(EntryKind::Done) > 0;
            let (made, when) = (shop.made("a"), format!("killed after {after} ms, {fails} fail"));
            first.kill().await;
            let second = shop.join();
            shop.world.settled().await;
            second.stop().await.unwrap();
            shop.check("a", &when);
            if answered {
                assert_eq!(shop.made("a"), made, "{when}: the answer was in the ledger");
                replayed += 1;
            }
            ambiguous += usize::from(shop.rows().contains_key("ambiguous"));
        }
    }
    assert!(ambiguous > 10 && replayed > 10, "{ambiguous} ambiguous, {replayed} replayed");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_outlives_its_partition_is_heard_out_for_the_next_owner() {
    for lost in [false, true] {
        // Longer than the drain.
        let shop = Shop::new(15_000, 0);
        let member = shop.join();
        shop.ask("a");
        pass(1_000).await;
        if lost {
            member.lose("requests")
        } else {
            member.rebalance("requests")
        }
        shop.world.settled().await;
        member.stop().await.unwrap();
        assert_eq!(
            (shop.made("a"), shop.rows()),
            (1, BTreeMap::from([("ok".to_owned(), 1)])),
            "lost: {lost}"
        );
        shop.check("a", "heard out");
    }
}

/// The code of each entry that closes a call as failed, with the status and the cost of its row.
fn failures(shop: &Shop) -> Vec<(String, String, Option<i64>)> {
    let entries = shop.world.log.read("ledger.step.requests");
    let entries = entries.iter().map(|entry| LedgerEntry::decode(entry.value.as_deref().unwrap()).unwrap());
    let failed = entries.filter(|entry| entry.kind == EntryKind::Failed);
    let told = failed.map(|entry| {
        let row = entry.row.unwrap();
        (entry.code.unwrap(), row.status, row.cost_nano_usd)
    });
    told.collect()
}

#[tokio::test(start_paused = true)]
async fn a_call_that_a_cancel_or_a_deadline_cuts_is_closed_with_its_reason() {
    for (body, code) in [("a", "cancelled"), ("a 3000", "deadline")] {
        let shop = Shop::new(60_000, 0);
        let member = shop.join();
        shop.ask(body);
        pass(2_000).await;
        assert_eq!((shop.made(body), failures(&shop)), (1, Vec::new()), "it is under way");
        if code == "cancelled" {
            shop.world.cancel("a").await;
        }
        shop.world.settled().await;
        member.stop().await.unwrap();
        assert_eq!(failures(&shop), [(code.to_owned(), "cancelled".to_owned(), None)]);
        assert_eq!(shop.rows(), BTreeMap::from([("cancelled".to_owned(), 1)]));
        assert_eq!(ending(&shop.world.log.read("endings")[0]).error.unwrap().code, code);
        assert!(shop.world.clock.now_ms() - NOW_MS < 10_000, "nobody waited for the answer");
        assert_eq!(shop.entries(EntryKind::Started), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_moment_a_call_that_was_cut_leaves_one_row_and_is_not_made_again() {
    for after in 0..120 {
        let shop = Shop::new(60_000, 0);
        let first = shop.join();
        shop.ask("a");
        pass(1_000).await;
        shop.world.cancel("a").await;
        pass(after).await;
        first.kill().await;
        let second = shop.join();
        shop.world.settled().await;
        second.stop().await.unwrap();
        let rows = shop.rows();
        let told = ["cancelled", "ambiguous"].map(|status| rows.get(status).copied().unwrap_or(0));
        assert!(rows.len() == 1 && told.iter().sum::<usize>() == 1, "killed after {after} ms: {rows:?}");
        assert_eq!(shop.made("a"), 1, "killed after {after} ms");
        assert!(shop.world.texts("out").is_empty() && !shop.world.log.read("endings").is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_repeats_nothing() {
    let shop = Shop::new(300, 0);
    let mut member = shop.join();
    for number in 0..40 {
        shop.ask(&format!("r{number}"));
        if number % 10 == 9 {
            pass(500).await;
            member.stop().await.unwrap();
            member = shop.join();
        }
    }
    shop.world.settled().await;
    member.stop().await.unwrap();
    assert!(shop.calls.lock().unwrap().values().all(|made| *made == 1));
    assert_eq!((shop.world.texts("out").len(), shop.rows()), (40, BTreeMap::from([("ok".to_owned(), 40)])));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_twice_at_once_is_paid_for_once_and_another_under_its_id_is_refused() {
    let shop = Shop::new(500, 0);
    let member = shop.join();
    for body in ["a", "a", "a other"] {
        shop.ask(body);
    }
    shop.world.settled().await;
    member.stop().await.unwrap();
    assert_eq!((shop.made("a"), shop.made("a other")), (1, 0));
    let endings = shop.world.log.read("endings");
    let codes: Vec<_> = endings.iter().map(|message| ending(message).error.unwrap().code).collect();
    assert_eq!(
        (shop.world.texts("out"), codes),
        (vec!["a!".to_owned(); 2], vec!["ledger_input_differs".to_owned()])
    );
}

/// Kills so many members in the middle of the call; how the record ended.
async fn kill_in_the_call(ambiguous_max: usize, kills: usize) -> (String, usize, usize) {
    let mut shop = Shop::new(1_000, 0);
    shop.spec.ambiguous_max = ambiguous_max;
    shop.ask("a");
    for _ in 0..kills {
        let (member, made) = (shop.join(), shop.made("a"));
        while shop.made("a") == made {
            pass(10).await;
        }
        member.kill().await;
    }
    let last = shop.join();
    shop.world.settled().await;
    last.stop().await.unwrap();
    let letters: Vec<_> = shop.world.log.read("dead-letters").iter().map(text).collect();
    let told = if letters.is_empty() { shop.world.texts("out") } else { letters };
    (told.join(","), shop.made("a"), shop.rows().get("ambiguous").copied().unwrap_or(0))
}

#[tokio::test(start_paused = true)]
async fn an_ambiguous_call_is_made_again_twice_at_most_or_not_at_all() {
    assert_eq!(kill_in_the_call(2, 1).await, ("a!".to_owned(), 2, 1));
    assert_eq!(kill_in_the_call(2, 2).await, ("a!".to_owned(), 3, 2));
    assert_eq!(kill_in_the_call(2, 3).await, ("a".to_owned(), 3, 3));
    assert_eq!(kill_in_the_call(0, 1).await, ("a".to_owned(), 1, 1));
}

#[tokio::test(start_paused = true)]
async fn what_comes_again_after_its_first_copy_is_done_is_paid_for_once_also_by_the_next_owner() {
    let shop = Shop::new(50, 0);
    for bodies in [["a", "b"], ["a", "a other"], ["b", "a"]] {
        let member = shop.join();
        for body in bodies {
            shop.ask(body);
            shop.world.settled().await;
        }
        member.stop().await.unwrap();
    }
    assert_eq!((shop.made("a"), shop.made("b"), shop.made("a other")), (1, 1, 0));
    assert_eq!(shop.world.texts("out"), ["a!", "b!", "a!", "b!", "a!"]);
    assert_eq!(ending(&shop.world.log.read("endings")[0]).error.unwrap().code, "ledger_input_differs");
}

/// A copy of a call that was given up comes when that is done, as of a step before that crashed; then somebody redrives it.
#[tokio::test(start_paused = true)]
async fn a_call_that_was_given_up_is_made_again_only_where_it_is_redriven() {
    let mut shop = Shop::new(1_000, 0);
    (shop.spec.from, shop.spec.retries) = (vec!["prompts"], vec![("retry.10s", 10)]);
    let ask = |redrives| {
        let id = RequestId::try_from("a".to_owned()).unwrap();
        let envelope = Envelope::entering(id, Tenant::default(), Origin::default(), NOW_MS, Headers::new());
        let mut headers = envelope.write();
        let source = "prompts/0/0@0".parse().unwrap();
        Retry { due_ms: NOW_MS, tries: 1, round: 1, since_ms: NOW_MS, source, key: None, redrives }
            .write(&mut headers);
        shop.world.write_bytes("retry.10s", Some("a"), b"a", headers);
    };
    ask(0);
    for made in 0..3 {
        let member = shop.join();
        while shop.made("a") == made {
            pass(10).await;
        }
        member.kill().await;
    }
    let letters = || shop.world.log.read("dead-letters").len();
    // The first is given up; then copies of it come, to this owner and the next.
    for (redrives, made, given_up) in [(0, 3, 2), (0, 3, 3), (1, 4, 3)] {
        let member = shop.join();
        shop.world.settled().await;
        ask(redrives);
        shop.world.settled().await;
        member.stop().await.unwrap();
        assert_eq!((shop.made("a"), letters()), (made, given_up), "redriven {redrives} times");
    }
    assert_eq!(shop.rows(), BTreeMap::from([("ambiguous".to_owned(), 3), ("ok".to_owned(), 1)]));
}

#[tokio::test(start_paused = true)]
async fn what_comes_to_a_retry_topic_twice_is_tried_there_twice() {
    let mut shop = Shop::new(50, 2);
    (shop.spec.from, shop.spec.retries) = (vec!["prompts"], vec![("retry.10s", 10), ("retry.1m", 60)]);
    let (id, tenant) = (RequestId::try_from("a".to_owned()).unwrap(), Tenant::default());
    let mut envelope = Envelope::entering(id, tenant, Origin::default(), NOW_MS, Headers::new());
    // So near that a minute would be too long.
    envelope.deadline_at_ms = Some(NOW_MS + 40_000);
    shop.world.write_bytes("prompts", Some("a"), b"a", envelope.write());
    let member = shop.join();
    shop.world.settled().await;
    member.stop().await.unwrap();
    assert_eq!((shop.made("a"), shop.world.texts("out")), (3, vec!["a!".to_owned()]));
    assert_eq!(shop.world.log.read("retry.10s").len(), 2);
}

/// Two copies of each record of a flood, as of a step before that crashed. Some are paid for where they lie and some where they were
/// moved to, and no call is made at both places.
#[tokio::test(start_paused = true)]
async fn what_comes_twice_in_a_flood_is_paid_for_once_wherever_its_copies_go() {
    const RECORDS: usize = 1_400;
    let mut shop = Shop::new(50, 0);
    (shop.spec.from, shop.spec.fair, shop.spec.limits) = (vec!["prompts"], true, Limits::new(4));
    for number in (0..RECORDS).step_by(200).flat_map(|from| (from..from + 200).chain(from..from + 200)) {
        of(&shop.world, "prompts", "flood", &format!("f{number}"), &format!("f{number}"));
    }
    let first = shop.join();
    pass(10_000).await;
    first.kill().await;
    let second = shop.join();
    shop.world.settled().await;
    second.stop().await.unwrap();
    let made: usize = shop.calls.lock().unwrap().values().sum();
    let ambiguous = shop.rows().get("ambiguous").copied().unwrap_or(0);
    let moved = shop.world.log.read("overflow").len();
    assert!(moved > 100, "a flood is moved: {moved}");
    assert!(made <= RECORDS + ambiguous, "{made} calls, of which {ambiguous} ambiguous");
    assert!(ambiguous <= 4, "{ambiguous} of those under way at the kill");
    let answered: BTreeSet<_> = shop.world.texts("out").into_iter().collect();
    assert_eq!(answered.len(), RECORDS);
}

#[tokio::test(start_paused = true)]
async fn what_is_read_anew_is_bounded() {
    let shop = Shop::new(50, 0);
    let member = shop.join();
    // More than are remembered.
    for number in 0..1_300 {
        shop.ask(&format!("r{number}"));
        pass(20).await;
    }
    shop.world.settled().await;
    let metadata = shop.world.log.metadata("step", &"requests".into());
    member.stop().await.unwrap();
    let from: usize = metadata.strip_prefix("ledger=").unwrap().parse().unwrap();
    let all = shop.world.log.read("ledger.step.requests").len();
    assert!(all >= 2_600 && from > all - 2_100, "read from {from} of {all}");
}

/// A flood that went aside long ago must not hold the log for whoever comes after.
#[tokio::test(start_paused = true)]
async fn what_moved_long_ago_is_not_read_anew() {
    let mut shop = Shop::new(50, 0);
    (shop.spec.from, shop.spec.fair, shop.spec.limits) = (vec!["prompts"], true, Limits::new(4));
    let ask =
        |number: usize| of(&shop.world, "prompts", "flood", &format!("f{number}"), &format!("f{number}"));
    let member = shop.join();
    (0..2_600).for_each(ask);
    shop.world.settled().await;
    let moved = shop.entries_on("prompts", EntryKind::Moved);
    assert!(moved > 0, "a flood is moved");
    for number in 2_600..3_900 {
        ask(number);
        pass(20).await;
    }
    shop.world.settled().await;
    let metadata = shop.world.log.metadata("step", &"prompts".into());
    member.stop().await.unwrap();
    let from: usize = metadata.strip_prefix("ledger=").unwrap().parse().unwrap();
    let all = shop.world.log.read("ledger.step.prompts").len();
    assert!(from > all - 2_100, "read from {from} of {all}, with {moved} moved");
}
