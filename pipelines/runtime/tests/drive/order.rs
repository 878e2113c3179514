//! Steps that take the records of one key one after the other.

use crate::support::{Run, Slow, Spec, World, on, pass, script};
use forebay_operator::Failure;
use forebay_runtime::drive::Limits;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// For each key the version that runs, and the one that was begun last.
type Keys = BTreeMap<String, (Option<u32>, u32)>;

/// Which version of each key runs, and which was begun last. A record is `key/version/…`.
#[derive(Clone, Default)]
pub struct Turns {
    keys: Arc<Mutex<Keys>>,
    may_repeat: Arc<AtomicBool>,
}

/// Held while a version runs.
pub struct Turn {
    turns: Turns,
    key: String,
}

impl Turns {
    /// From now on older versions may come again: something was lost.
    pub fn repeat(&self) {
        self.may_repeat.store(true, Ordering::SeqCst);
    }

    pub fn may_repeat(&self) -> bool {
        self.may_repeat.load(Ordering::SeqCst)
    }

    /// The version of each key that was begun last.
    pub fn last(&self) -> BTreeMap<String, u32> {
        self.keys.lock().unwrap().iter().map(|(key, (_, last))| (key.clone(), *last)).collect()
    }

    /// Begins a version; tells where another one runs, one was passed over, or a newer one was begun before.
    pub fn begin(&self, run: &Run) -> Result<Turn, String> {
        let mut parts = run.body.split('/');
        let (key, version) = (parts.next().unwrap().to_owned(), parts.next().unwrap().parse().unwrap());
        let mut keys = self.keys.lock().unwrap();
        let (running, last) = keys.entry(key.clone()).or_default();
        if let Some(running) = running {
            return Err(format!("version {version} of {key} was begun while version {running} ran"));
        }
        if version > *last + 1 || (version < *last && !self.may_repeat()) {
            return Err(format!("version {version} of {key} was begun after version {last}"));
        }
        (*running, *last) = (Some(version), version);
        drop(keys);
        Ok(Turn { turns: self.clone(), key })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.keys.lock().unwrap().get_mut(&self.key).unwrap().0 = None;
    }
}

/// An ordered step over two topics, whose records `key/version/ms` take so long; the first try of some is in vain.
fn spec(turns: &Turns, wrong: &Arc<Mutex<Vec<String>>>) -> Spec {
    let (turns, wrong) = (turns.clone(), Arc::clone(wrong));
    let wait = script(move |run| {
        let turn = turns.begin(&run);
        let turn = turn.map_err(|fault| wrong.lock().unwrap().push(fault));
        async move {
            pass(run.body.rsplit('/').next().unwrap().parse().unwrap()).await;
            drop(turn);
            match run.body.contains("/retried/") && run.before == 0 {
                true => Err(Failure::unavailable("down", "it", "refused")),
                false => Ok(vec![on(&run)]),
            }
        }
    });
    let limits = Limits { ordered: true, ..Limits::new(3) };
    Spec { from: vec!["requests", "other"], limits, ..Spec::new(wait) }
}

#[tokio::test(start_paused = true)]
async fn versions_of_a_key_neither_overlap_nor_change_places() {
    let (world, turns, wrong) = (World::new(), Turns::default(), Arc::default());
    let member = world.join(&spec(&turns, &wrong));
    let records = ["k/1/retried/100", "k/2/50", "l/1/10", "k/3/retried/10", "k/4/1", "l/2/1"];
    for record in records {
        world.write("requests", record.split('/').next(), record);
    }
    pass(1_000).await;
    member.rebalance("requests");
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(*wrong.lock().unwrap(), [""; 0]);
    let of_k = world.texts("out").into_iter().filter(|text| text.starts_with('k')).collect::<Vec<_>>();
    assert_eq!(of_k, ["k/1/retried/100", "k/2/50", "k/3/retried/10", "k/4/1"]);
}

#[tokio::test(start_paused = true)]
async fn other_keys_do_not_wait_for_a_slow_one() {
    let (world, turns, wrong) = (World::new(), Turns::default(), Arc::default());
    let member = world.join(&spec(&turns, &wrong));
    for record in ["k/1/9000", "k/2/9000", "k/3/9000", "k/4/9000", "l/1/10", "m/1/10"] {
        world.write("requests", record.split('/').next(), record);
    }
    pass(1_000).await;
    assert_eq!(world.texts("out"), ["l/1/10", "m/1/10"]);
    world.settled().await;
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_turn_that_is_taken_away_is_passed_on_to_another_topic() {
    let (world, turns, wrong) = (World::new(), Turns::default(), Arc::default());
    // The acknowledgement of k/1 comes when its room is taken: k/2 has the turn and waits for room.
    let member =
        world.join_over(&spec(&turns, &wrong), Arc::new(Slow { log: Arc::clone(&world.log), ms: 1_000 }));
    world.write("requests", Some("x"), "x/1/5000");
    world.write("requests", Some("y"), "y/1/5000");
    world.write("requests", Some("k"), "k/1/100");
    pass(10).await;
    world.write("requests", Some("k"), "k/2/100");
    pass(200).await;
    world.write("other", Some("k"), "k/3/100");
    world.write("other", Some("z"), "z/1/5000");
    pass(2_000).await;
    member.rebalance("requests");
    world.settled().await;
    member.stop().await.unwrap();
    assert!(world.texts("out").contains(&"k/3/100".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_record_that_comes_again_waits_for_its_own_first_run() {
    let (world, turns, wrong) = (World::new(), Turns::default(), Arc::default());
    let member = world.join(&spec(&turns, &wrong));
    world.write("requests", Some("k"), "k/1/5000");
    world.write("requests", Some("k"), "k/2/10");
    pass(1_000).await;
    turns.repeat();
    member.lose("requests");
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(*wrong.lock().unwrap(), [""; 0]);
    assert_eq!(world.texts("out"), ["k/1/5000", "k/2/10"], "what its first run made is not ours to write");
}
