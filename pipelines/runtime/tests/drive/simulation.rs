//! Three stages in a row, and all that can happen to them, at random moments of virtual time.
//!
//! Oracle: what was accepted ends, as its operators say and no other way; exactly once, unless a partition was lost, a
//! process killed, or an ordered stage lost its place. No commit ever passes a record whose messages are not written.
//! In odd seeds the first stage is ordered: records of one key pass it one after the other, none is passed over, and
//! the last is the last. A stage that is not ordered sets aside what met a world that failed.
//!
//! In every third seed bodies do not travel: they lie at an object store, which is away at times.
//!
//! In even seeds some requests are taken back, at any moment: such a one ends as it would have or as cancelled, and as often as another.
//!
//! A member crashes at any await point of its loop, and the next one runs on a machine whose clock goes wrong.
//!
//! A seed that fails is printed, and goes to [`FAILED`] together with the repair.

use crate::{
    order::Turns,
    support::{Member, NOW_MS, Run, Spec, Store, World, ending, header, on, pass, script, text},
};
use forebay_operator::{Clock, Failure};
use forebay_runtime::{claims::Claims, drive::Limits, host::memory::Stored, stage::Patience};
use forebay_schemas::{Claim, Retry, header as envelope};
use futures::FutureExt as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, timeout_at};

/// Seeds of a run, and of a quick one; `FOREBAY_SEEDS` says otherwise.
const SEEDS: [u64; 2] = [5_000, 500];

/// How far the clocks of two machines may lie apart, in milliseconds.
const SKEW_MS: u64 = 60_000;

/// Seeds that once failed.
const FAILED: &[u64] = &[];

/// Numbers that a seed determines (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What a record does in a stage, as its seed, its name and the stage determine.
fn dice(seed: u64, key: &str, body: &str) -> Dice {
    let name = key
        .bytes()
        .chain(body.bytes())
        .fold(seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    Dice(name)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Passes,
    Refused,
    PanicsOnce,
    PanicsTwice,
    FailsAtFirst,
    FailsForGood,
    MeetsAnOutage,
}

impl Fate {
    fn of(seed: u64, key: &str, body: &str) -> Self {
        match dice(seed, key, body).below(16) {
            0 => Self::Refused,
            1 => Self::PanicsOnce,
            2 => Self::PanicsTwice,
            3 => Self::FailsAtFirst,
            4 => Self::FailsForGood,
            5 => Self::MeetsAnOutage,
            _ => Self::Passes,
        }
    }

    /// Where the record goes from here.
    fn code(self) -> Option<&'static str> {
        match self {
            Self::Refused => Some("wrong"),
            Self::PanicsTwice => Some("panicked"),
            Self::FailsForGood => Some("down"),
            _ => None,
        }
    }

    fn now(self, before: u32) -> Result<(), Failure> {
        match self {
            Self::Refused => Err(Failure::rejected("wrong", "it is wrong")),
            Self::PanicsOnce if before == 0 => quiet_panic(),
            Self::PanicsTwice => quiet_panic(),
            Self::FailsAtFirst if before < 2 => Err(Failure::unavailable("down", "it", "refused")),
            Self::FailsForGood => Err(Failure::unavailable("down", "it", "refused")),
            Self::MeetsAnOutage if before < 5 => Err(Failure::outage("down", "it", "refused")),
            _ => Ok(()),
        }
    }
}

/// A panic that nobody prints: there are thousands.
fn quiet_panic() -> ! {
    std::panic::resume_unwind(Box::new("on purpose"))
}

/// The stages, in their order: key, input, output.
const STAGES: [(&str, &str, &str); 3] =
    [("one", "requests", "mid"), ("two", "mid", "late"), ("three", "late", "out")];

/// By how much the clock of the next machine goes wrong.
fn skew(dice: &mut Dice) -> i64 {
    i64::try_from(dice.below(2 * SKEW_MS)).unwrap() - i64::try_from(SKEW_MS).unwrap()
}

/// The retry topics of a stage that is not ordered, with their delays in seconds.
fn retries(key: &str) -> Vec<(&'static str, u64)> {
    match key {
        "one" => vec![("retry.one.1s", 1), ("retry.one.5s", 5)],
        "two" => vec![("retry.two.1s", 1), ("retry.two.5s", 5)],
        _ => vec![("retry.three.1s", 1), ("retry.three.5s", 5)],
    }
}

struct Chain {
    seed: u64,
    began: Instant,
    world: World,
    turns: Turns,
    wrong: Arc<Mutex<Vec<String>>>,
    /// How often each stage ran each record, over all its members: a world that failed twice does so once.
    runs: Arc<Mutex<BTreeMap<(&'static str, String), u32>>>,
    members: BTreeMap<&'static str, Member>,
    /// Where bodies lie.
    store: Arc<Store>,
    /// Up to where the commits of each topic were checked.
    checked: BTreeMap<&'static str, usize>,
    /// Requests that were taken back.
    taken_back: BTreeSet<String>,
    /// Whether a partition moved, which may interrupt a look for these.
    moved: bool,
}

impl Chain {
    fn new(seed: u64) -> Self {
        let (world, turns, wrong) = (World::new(), Turns::default(), Arc::default());
        let (runs, members, checked) = (Arc::default(), BTreeMap::new(), BTreeMap::new());
        let (store, began) = (Arc::default(), Instant::now());
        let (taken_back, moved) = (BTreeSet::new(), false);
        let mut chain =
            Self { seed, began, world, turns, wrong, runs, members, store, checked, taken_back, moved };
        STAGES.iter().for_each(|(key, ..)| chain.join(key, 0));
        chain
    }

    fn is_ordered(&self, key: &str) -> bool {
        key == "one" && self.seed % 2 == 1
    }

    /// Where no body travels.
    fn claims(&self) -> Option<Arc<Claims>> {
        let claims = || Arc::new(Claims::new(Arc::clone(&self.store) as _, Some(0)));
        self.seed.is_multiple_of(3).then(claims)
    }

    /// What a message says, wherever its body lies.
    fn text(&self, message: &Stored) -> String {
        let Some(Claim { key, .. }) = Claim::read(&message.headers).unwrap() else { return text(message) };
        let body = forebay_runtime::claims::Objects::get(&self.store.objects, &key).now_or_never().unwrap();
        String::from_utf8(body.unwrap().expect("the object comes first").to_vec()).unwrap()
    }

    fn texts(&self, topic: &str) -> Vec<String> {
        self.world.log.read(topic).iter().map(|message| self.text(message)).collect()
    }

    /// Whether something happened after which records may come twice.
    fn repeats(&self) -> bool {
        self.turns.may_repeat()
    }

    /// A member on a machine whose clock goes wrong by so much.
    fn join(&mut self, key: &'static str, skew_ms: i64) {
        let clock = Clock::Virtual { start_ms: NOW_MS + skew_ms, since: self.began };
        let member = World { clock, ..self.world.clone() }.join(&self.spec(key));
        self.members.insert(key, member);
    }

    fn spec(&self, key: &'static str) -> Spec {
        let (_, from, to) = STAGES[STAGES.iter().position(|stage| stage.0 == key).unwrap()];
        let (seed, turns, wrong) = (self.seed, self.turns.clone(), Arc::clone(&self.wrong));
        let (ordered, runs) = (self.is_ordered(key), Arc::clone(&self.runs));
        let run = script(move |run: Run| {
            let (turns, wrong, runs) = (turns.clone(), Arc::clone(&wrong), Arc::clone(&runs));
            async move {
                let turn = ordered.then(|| turns.begin(&run));
                let turn = turn.map(|turn| turn.map_err(|fault| wrong.lock().unwrap().push(fault)));
                let mut time = dice(seed.wrapping_add(1), key, &run.body);
                pass(if time.below(8) == 0 { time.below(1_000) } else { time.below(50) }).await;
                let before = {
                    let mut runs = runs.lock().unwrap();
                    let runs = runs.entry((key, run.body.clone())).or_default();
                    *runs += 1;
                    *runs - 1
                };
                Fate::of(seed, key, &run.body).now(before)?;
                drop(turn);
                Ok(vec![on(&run)])
            }
        });
        let mut bounds = dice(seed, key, "bounds");
        let in_flight = 1 + usize::try_from(bounds.below(8)).unwrap();
        let window = i64::try_from(1 + bounds.below(12)).unwrap();
        // Longer than any record takes with its retries.
        let drain = Duration::from_secs(20);
        let waits = [50, 200, 800].map(Duration::from_millis).into();
        let patience = Patience { waits, outage: Duration::from_millis(200) };
        let limits = Limits { ordered, window, drain, ..Limits::new(in_flight) };
        let retries = self.retries(key);
        let claims = self.claims();
        Spec { key, from: vec![from], to, retries, limits, patience, claims, ..Spec::new(run) }
    }

    fn retries(&self, key: &str) -> Vec<(&'static str, u64)> {
        if self.is_ordered(key) { Vec::new() } else { retries(key) }
    }

    async fn befall(&mut self, dice: &mut Dice) {
        if self.claims().is_some() && dice.below(3) == 0 {
            // A drain does not wait for it.
            self.turns.repeat();
            self.store.away.fetch_xor(true, Ordering::SeqCst);
            return;
        }
        let (key, topic, _) = STAGES[usize::try_from(dice.below(3)).unwrap()];
        if self.is_ordered(key) {
            // What is finished beyond a record that still waited for its turn comes again.
            self.turns.repeat();
        }
        let retries = self.retries(key);
        let aside = usize::try_from(dice.below(4)).unwrap();
        let topic = retries.get(aside).map_or(topic, |(topic, _)| topic);
        self.moved = true;
        match dice.below(8) {
            0..4 => self.members[key].rebalance(topic),
            4 => {
                self.members[key].lose(topic);
                self.turns.repeat();
            }
            5 | 6 => {
                let member = self.members.remove(key).unwrap();
                match dice.below(4) {
                    0 => member.kill().await,
                    _ => member.crash_after(u32::try_from(dice.below(64)).unwrap()).await,
                }
                self.turns.repeat();
                self.join(key, skew(dice));
            }
            _ => {
                self.members.remove(key).unwrap().stop().await.unwrap();
                self.join(key, skew(dice));
            }
        }
    }

    /// Lets time pass, and looks at every commit meanwhile.
    async fn live(&mut self, ms: u64) -> Result<(), String> {
        let (mut commits, until) = (self.world.log.commits(), Instant::now() + Duration::from_millis(ms));
        loop {
            self.check_commits()?;
            if timeout_at(until, commits.changed()).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Every record before a committed offset has its messages, at any moment.
    fn check_commits(&mut self) -> Result<(), String> {
        for (key, from, to) in STAGES {
            let retries = self.retries(key);
            let inputs = std::iter::once(from).chain(retries.iter().map(|(topic, _)| *topic));
            for input in inputs {
                let committed = self.world.log.committed(key, &input.into());
                let committed = usize::try_from(committed).unwrap();
                let checked = self.checked.insert(input, committed).unwrap_or(0);
                if committed < checked {
                    return Err(format!("{key} went back from {checked} to {committed} on {input}"));
                }
                let new = &self.world.log.read(input)[checked..committed];
                if new.is_empty() {
                    continue;
                }
                let mut out = self.texts(to);
                for (topic, _) in retries.iter().filter(|(topic, _)| *topic != input) {
                    out.extend(self.texts(topic));
                }
                let endings = self.endings();
                let records = new.iter().filter(|message| Retry::ended(&message.headers).is_none());
                for text in records.map(|message| self.text(message)) {
                    let ended = endings.iter().any(|(id, stage, _)| *id == text && stage == key);
                    if !ended && !out.contains(&text) {
                        return Err(format!("{key} committed {committed} on {input} with {text} unfinished"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Id, stage, code.
    fn endings(&self) -> Vec<(String, String, String)> {
        let endings = self.world.log.read("endings");
        let told = |message| {
            let ending = ending(message);
            (header(message, envelope::ID), ending.stage, ending.error.unwrap().code)
        };
        endings.iter().map(told).collect()
    }

    /// Each record has ended as it must.
    fn check_ends(&self, records: &[String]) -> Result<(), String> {
        let (out, endings) = (self.texts("out"), self.endings());
        for record in records {
            let end =
                STAGES.iter().find_map(|(key, ..)| Some((*key, Fate::of(self.seed, key, record).code()?)));
            let passed = out.iter().filter(|text| *text == record).count();
            let ended: Vec<_> = endings.iter().filter(|(id, ..)| id == record).collect();
            let is_taken_back = |(_, _, told): &&&_| self.taken_back.contains(record) && told == "cancelled";
            let is_cancelled = ended.iter().filter(is_taken_back).count();
            let right = match end {
                _ if is_cancelled > 0 => self.repeats() || (passed == 0 && (self.moved || ended.len() == 1)),
                None => passed > 0 && ended.is_empty(),
                Some((key, code)) => {
                    passed == 0
                        && !ended.is_empty()
                        && ended.iter().all(|(_, stage, told)| stage == key && told == code)
                }
            };
            let often = passed.max(ended.len());
            if !right || (often > 1 && !self.repeats()) {
                return Err(format!(
                    "{record} should end as {end:?}; passed {passed} times, ended as {ended:?}"
                ));
            }
        }
        Ok(())
    }
}

/// Runs one seed; what went wrong, if anything did.
async fn simulate(seed: u64) -> Result<(), String> {
    let mut dice = Dice(seed);
    let mut chain = Chain::new(seed);
    let mut records = Vec::new();
    let mut versions = BTreeMap::<String, u32>::new();
    for _ in 0..5 + dice.below(15) {
        for _ in 0..dice.below(4) {
            let key = format!("k{}", dice.below(5));
            let version = versions.entry(key.clone()).or_default();
            *version += 1;
            let record = format!("{key}/{version}");
            chain.world.write("requests", Some(&key), &record);
            records.push(record);
        }
        chain.live(dice.below(400)).await?;
        if dice.below(4) == 0 {
            chain.befall(&mut dice).await;
        }
        if dice.below(3) == 0 && !records.is_empty() && !chain.is_ordered("one") {
            let record = &records[usize::try_from(dice.below(records.len() as u64)).unwrap()];
            chain.world.cancel(record).await;
            chain.taken_back.insert(record.clone());
        }
    }
    chain.store.away.store(false, Ordering::SeqCst);
    while !chain.world.log.lags().is_empty() {
        if chain.world.clock.now_ms() > NOW_MS + 24 * 3_600_000 {
            return Err(format!("stuck; behind: {:?}", chain.world.log.lags()));
        }
        chain.live(1_000).await?;
    }
    chain.check_ends(&records)?;
    if chain.is_ordered("one") && chain.turns.last() != versions {
        return Err(format!("the last versions begun were {:?}, not {versions:?}", chain.turns.last()));
    }
    chain.wrong.lock().unwrap().first().map_or(Ok(()), |wrong| Err(wrong.clone()))
}

#[test]
fn whatever_happens_every_record_ends_as_it_must() {
    let usual = SEEDS[usize::from(std::env::var_os("FOREBAY_TEST_QUICK").is_some())];
    let seeds = std::env::var("FOREBAY_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(usual);
    let next = AtomicU64::new(0);
    let failed = Mutex::new(FAILED.iter().copied().filter_map(failure).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while failed.lock().unwrap().len() < 5 {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= seeds {
                        return;
                    }
                    failed.lock().unwrap().extend(failure(seed));
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{failed:#?}");
}

fn failure(seed: u64) -> Option<String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(simulate(seed))));
    let fault = match result {
        Ok(result) => result.err()?,
        Err(panic) => panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "it panicked".to_owned()),
    };
    Some(format!("seed {seed}: {fault}"))
}
