//! The group state machine under virtual time.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

static IDS: AtomicU64 = AtomicU64::new(0);

fn new_id() -> String {
    format!("member-{}", IDS.fetch_add(1, Ordering::Relaxed))
}

/// A world of groups with a clock that only `pass` moves.
struct World {
    groups: Groups,
    now: Duration,
    token: Token,
    answers: HashMap<Token, Answer>,
}

const SESSION: u64 = 10;
const REBALANCE: u64 = 60;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn join_of(member: &str) -> Join {
    Join {
        group: "g".into(),
        member: member.into(),
        session: s(SESSION),
        rebalance: s(REBALANCE),
        protocol_type: "consumer".into(),
        protocols: vec![("range".into(), Bytes::from_static(b"topics"))],
        ..Join::default()
    }
}

impl World {
    fn new() -> World {
        World { groups: Groups::new(s(3), new_id), now: s(0), token: 0, answers: HashMap::new() }
    }

    fn take(&mut self, answers: Answers) {
        for (token, answer) in answers {
            assert!(self.answers.insert(token, answer).is_none(), "token {token} answered twice");
        }
    }

    fn join(&mut self, join: Join) -> Token {
        self.token += 1;
        let answers = self.groups.join(self.now, self.token, join);
        self.take(answers);
        self.token
    }

    fn sync(&mut self, joined: &Joined, assignments: &[(&str, &'static str)]) -> Token {
        self.token += 1;
        let assignments = assignments.iter().map(|(m, a)| ((*m).into(), Bytes::from_static(a.as_bytes())));
        let sync = Sync {
            group: "g".into(),
            member: joined.member.clone(),
            generation: joined.generation,
            assignments: assignments.collect(),
            ..Sync::default()
        };
        let answers = self.groups.sync(self.now, self.token, sync);
        self.take(answers);
        self.token
    }

    fn leave(&mut self, member: &str) -> Result<(), ResponseError> {
        let (left, answers) = self.groups.leave(self.now, "g", &[(member.into(), None)]);
        self.take(answers);
        left[0]
    }

    fn beat(&mut self, joined: &Joined) -> Result<(), ResponseError> {
        self.groups.heartbeat(self.now, "g", &joined.member, None, joined.generation)
    }

    /// Lets time pass, waking whenever the machine asked to be woken.
    fn pass(&mut self, seconds: u64) {
        let until = self.now + s(seconds);
        while let Some(due) = self.groups.next_tick().filter(|due| *due <= until) {
            assert!(due >= self.now, "the machine asks for a tick in the past");
            self.now = due;
            let answers = self.groups.tick(self.now);
            self.take(answers);
            assert!(
                self.groups.next_tick() > Some(due) || self.groups.next_tick().is_none(),
                "a tick did nothing"
            );
        }
        self.now = until;
    }

    fn joined(&mut self, token: Token) -> Joined {
        match self.answers.remove(&token) {
            Some(Answer::Join(Ok(joined))) => joined,
            other => panic!("join {token} got {other:?}"),
        }
    }

    fn synced(&mut self, token: Token) -> Bytes {
        match self.answers.remove(&token) {
            Some(Answer::Sync(Ok(synced))) => synced.assignment,
            other => panic!("sync {token} got {other:?}"),
        }
    }

    fn refused(&mut self, token: Token) -> ResponseError {
        match self.answers.remove(&token) {
            Some(Answer::Join(Err(refused))) => refused.error,
            Some(Answer::Sync(Err(error))) => error,
            other => panic!("{token} got {other:?}"),
        }
    }

    fn phase(&self) -> &'static str {
        self.groups.get("g").map_or("none", |g| g.phase.name())
    }

    /// Two members in a stable group; the leader first.
    fn two() -> (World, Joined, Joined) {
        let mut w = World::new();
        let (a, b) = (w.join(join_of("")), w.join(join_of("")));
        w.pass(3);
        let (a, b) = (w.joined(a), w.joined(b));
        let (leader, follower) = if a.member == a.leader { (a, b) } else { (b, a) };
        let waits = w.sync(&follower, &[]);
        assert!(!w.answers.contains_key(&waits), "a follower waits for the leader");
        let token = w.sync(&leader, &[(&leader.member, "0"), (&follower.member, "1")]);
        assert_eq!((w.synced(token), w.synced(waits)), ("0".into(), "1".into()));
        assert_eq!(w.phase(), "Stable");
        (w, leader, follower)
    }
}

#[test]
fn a_new_group_waits_for_more_members_and_then_makes_one_generation() {
    let mut w = World::new();
    let a = w.join(join_of(""));
    w.pass(2);
    let b = w.join(join_of(""));
    assert!(w.answers.is_empty());
    w.pass(1);
    let (a, b) = (w.joined(a), w.joined(b));
    assert_eq!((a.generation, b.generation), (1, 1));
    assert_eq!(a.leader, b.leader);
    assert_eq!(a.members.len() + b.members.len(), 2, "the leader alone is told the members");
}

#[test]
fn a_newcomer_comes_back_with_the_id_it_is_given() {
    let mut w = World::new();
    let token = w.join(Join { two_steps: true, ..join_of("") });
    let Some(Answer::Join(Err(refused))) = w.answers.remove(&token) else { panic!("refused first") };
    assert_eq!(refused.error, ResponseError::MemberIdRequired);
    let token = w.join(Join { two_steps: true, ..join_of(&refused.member) });
    w.pass(3);
    assert_eq!(w.joined(token).member, refused.member);
}

#[test]
fn a_given_id_that_is_not_used_is_forgotten_after_the_session_timeout() {
    let mut w = World::new();
    let token = w.join(Join { two_steps: true, ..join_of("") });
    let Some(Answer::Join(Err(refused))) = w.answers.remove(&token) else { panic!("refused first") };
    w.pass(SESSION + 1);
    let token = w.join(join_of(&refused.member));
    assert_eq!(w.refused(token), ResponseError::UnknownMemberId);
}

#[test]
fn a_member_that_stops_beating_is_out_after_its_session_timeout() {
    let (mut w, leader, follower) = World::two();
    w.pass(SESSION - 1);
    assert_eq!(w.beat(&leader), Ok(()));
    w.pass(2);
    assert_eq!(w.beat(&leader), Err(ResponseError::RebalanceInProgress));
    assert_eq!(w.beat(&follower), Err(ResponseError::UnknownMemberId));
    let token = w.join(join_of(&leader.member));
    assert_eq!(w.joined(token).members.len(), 1);
}

#[test]
fn a_rebalance_waits_for_all_but_no_longer_than_the_rebalance_timeout() {
    let (mut w, leader, follower) = World::two();
    let newcomer = w.join(join_of(""));
    assert_eq!(w.beat(&follower), Err(ResponseError::RebalanceInProgress));
    let again = w.join(join_of(&leader.member));
    for _ in 0..REBALANCE / 5 - 1 {
        w.pass(5);
        // It lives and does not join: stuck in its last batch.
        assert_eq!(w.beat(&follower), Err(ResponseError::RebalanceInProgress));
        assert!(!w.answers.contains_key(&newcomer));
    }
    w.pass(5);
    let joined = w.joined(newcomer);
    assert_eq!((joined.generation, w.joined(again).generation), (2, 2));
    assert_eq!(w.beat(&follower), Err(ResponseError::UnknownMemberId));
}

#[test]
fn a_member_of_an_old_generation_may_neither_sync_nor_commit() {
    let (mut w, leader, follower) = World::two();
    let tokens = [w.join(join_of(&leader.member)), w.join(join_of(&follower.member))];
    for token in tokens {
        assert_eq!(w.joined(token).generation, 2);
    }
    let token = w.sync(&follower, &[]);
    assert_eq!(w.refused(token), ResponseError::IllegalGeneration);
    let commit =
        |w: &mut World, member: &str, generation| w.groups.may_commit(w.now, "g", member, None, generation);
    assert_eq!(commit(&mut w, &follower.member, 1), Err(ResponseError::IllegalGeneration));
    assert_eq!(commit(&mut w, &follower.member, 2), Err(ResponseError::RebalanceInProgress));
    assert_eq!(commit(&mut w, "stranger", 2), Err(ResponseError::UnknownMemberId));
    assert_eq!(
        commit(&mut w, "", -1),
        Err(ResponseError::UnknownMemberId),
        "a group with members is not an outsider's"
    );
}

#[test]
fn an_outsider_may_commit_for_a_group_without_members() {
    let mut w = World::new();
    assert_eq!(w.groups.may_commit(w.now, "nobody", "", None, -1), Ok(()));
    assert_eq!(w.groups.may_commit(w.now, "nobody", "m", None, 3), Err(ResponseError::IllegalGeneration));
}

#[test]
fn members_may_commit_while_others_join() {
    let (mut w, leader, follower) = World::two();
    w.join(join_of(&leader.member));
    assert_eq!(w.groups.may_commit(w.now, "g", &follower.member, None, 1), Ok(()));
}

#[test]
fn a_leader_that_dies_before_it_assigns_is_replaced() {
    let mut w = World::new();
    let (a, b) = (w.join(join_of("")), w.join(join_of("")));
    w.pass(3);
    let (a, b) = (w.joined(a), w.joined(b));
    let (leader, follower) = if a.member == a.leader { (a, b) } else { (b, a) };
    let waits = w.sync(&follower, &[]);
    w.pass(SESSION);
    assert_eq!(w.refused(waits), ResponseError::RebalanceInProgress);
    let token = w.join(join_of(&follower.member));
    let joined = w.joined(token);
    assert_eq!((joined.leader.as_str(), joined.generation), (follower.member.as_str(), 2));
    assert_eq!(w.beat(&leader), Err(ResponseError::UnknownMemberId));
}

#[test]
fn who_leaves_starts_a_rebalance_and_the_last_one_empties_the_group() {
    let (mut w, leader, follower) = World::two();
    assert_eq!(w.leave(&follower.member), Ok(()));
    assert_eq!(w.leave(&follower.member), Err(ResponseError::UnknownMemberId));
    assert_eq!(w.beat(&leader), Err(ResponseError::RebalanceInProgress));
    assert_eq!(w.groups.delete("g"), Err(ResponseError::NonEmptyGroup));
    assert_eq!(w.leave(&leader.member), Ok(()));
    assert_eq!(w.phase(), "Empty");
    assert_eq!(w.groups.delete("g"), Ok(true));
}

#[test]
fn a_join_that_is_sent_again_is_answered_again() {
    let (mut w, leader, follower) = World::two();
    let token = w.join(join_of(&follower.member));
    assert_eq!(w.joined(token).generation, 1, "a follower that asks again changes nothing");
    let changed = Join {
        protocols: vec![("range".into(), Bytes::from_static(b"more topics"))],
        ..join_of(&follower.member)
    };
    w.join(changed);
    assert_eq!(w.beat(&leader), Err(ResponseError::RebalanceInProgress), "a new subscription rebalances");
}

#[test]
fn the_protocol_all_know_and_most_prefer_is_chosen() {
    let mut w = World::new();
    let with = |names: &[&str]| Join {
        protocols: names.iter().map(|n| ((*n).to_owned(), Bytes::new())).collect(),
        ..join_of("")
    };
    let a = w.join(with(&["sticky", "range"]));
    let b = w.join(with(&["range", "cooperative-sticky"]));
    let foreign = w.join(with(&["cooperative-sticky"]));
    w.pass(3);
    assert_eq!(w.refused(foreign), ResponseError::InconsistentGroupProtocol);
    assert_eq!((w.joined(a).protocol, w.joined(b).protocol), ("range".into(), "range".into()));
}

#[test]
fn a_static_member_takes_its_old_place_without_a_rebalance() {
    let mut w = World::new();
    let fixed =
        |member: &str| Join { instance: Some("i".into()), can_skip_assignment: true, ..join_of(member) };
    let (a, b) = (w.join(fixed("")), w.join(join_of("")));
    w.pass(3);
    let (a, b) = (w.joined(a), w.joined(b));
    let (leader, follower) = if a.member == a.leader { (&a, &b) } else { (&b, &a) };
    w.sync(follower, &[]);
    let token = w.sync(leader, &[(&a.member, "static"), (&b.member, "dynamic")]);
    w.answers.remove(&token);
    let token = w.join(fixed(""));
    let back = w.joined(token);
    assert_eq!(back.generation, 1);
    assert_ne!(back.member, a.member);
    assert_eq!(back.skip_assignment, a.member == a.leader);
    assert_eq!(w.beat(&b), Ok(()), "the other member notices nothing");
    let token = w.sync(&back, &[]);
    assert_eq!(w.synced(token), Bytes::from_static(b"static"));
    let ghost = w.groups.heartbeat(w.now, "g", &a.member, Some("i"), 1);
    assert_eq!(ghost, Err(ResponseError::FencedInstanceId));
}

#[test]
fn timeouts_and_protocols_that_make_no_sense_are_refused() {
    let mut w = World::new();
    let mut check = |join, want| {
        let token = w.join(join);
        assert_eq!(w.refused(token), want);
    };
    check(Join { session: s(0), ..join_of("") }, ResponseError::InvalidSessionTimeout);
    check(Join { session: s(3600), ..join_of("") }, ResponseError::InvalidSessionTimeout);
    check(Join { group: String::new(), ..join_of("") }, ResponseError::InvalidGroupId);
    check(Join { protocols: vec![], ..join_of("") }, ResponseError::InconsistentGroupProtocol);
    check(join_of("stranger"), ResponseError::UnknownMemberId);
}

#[derive(Debug, Clone)]
enum Step {
    Join(usize),
    Sync(usize),
    Beat(usize),
    Leave(usize),
    Pass(u64),
}

/// Clients that do what they like, in any order, at any time.
#[test]
fn whatever_members_do_every_request_is_answered_once_and_generations_rise() {
    let client = 0..4usize;
    let step = prop_oneof![
        4 => client.clone().prop_map(Step::Join),
        4 => client.clone().prop_map(Step::Sync),
        2 => client.clone().prop_map(Step::Beat),
        1 => client.prop_map(Step::Leave),
        3 => (0..15u64).prop_map(Step::Pass),
    ];
    proptest!(|(steps in prop::collection::vec(step, 1..120))| {
        let mut w = World::new();
        // What each client last joined as, and the requests it sent.
        let mut joined: Vec<Option<Joined>> = vec![None; 4];
        let mut joins: HashMap<Token, usize> = HashMap::new();
        let mut sent: BTreeSet<Token> = BTreeSet::new();
        let mut shares: HashMap<i32, BTreeSet<String>> = HashMap::new();
        let mut generation = 0;
        for step in steps {
            match step {
                Step::Join(c) => {
                    let member = joined[c].as_ref().map(|j| j.member.clone()).unwrap_or_default();
                    let token = w.join(join_of(&member));
                    joins.insert(token, c);
                    sent.insert(token);
                }
                Step::Sync(c) => {
                    if let Some(j) = joined[c].clone() {
                        let all: Vec<_> = j.members.iter().map(|(m, ..)| (m.as_str(), "share")).collect();
                        sent.insert(w.sync(&j, &all));
                    }
                }
                Step::Beat(c) => {
                    if let Some(j) = joined[c].clone() {
                        let _ = w.beat(&j);
                    }
                }
                Step::Leave(c) => {
                    if let Some(j) = joined[c].take() {
                        let _ = w.leave(&j.member);
                    }
                }
                Step::Pass(seconds) => w.pass(seconds),
            }
            for (token, answer) in std::mem::take(&mut w.answers) {
                prop_assert!(sent.remove(&token), "an answer nobody waits for");
                match answer {
                    Answer::Join(Ok(j)) => {
                        prop_assert!(j.generation >= generation, "generations rise");
                        generation = j.generation;
                        joined[joins[&token]] = Some(j);
                    }
                    Answer::Join(Err(_)) => joined[joins[&token]] = None,
                    Answer::Sync(Ok(_)) => {
                        let in_group = w.groups.get("g").map(|g| g.members.keys().cloned().collect());
                        shares.entry(generation).or_insert_with(|| in_group.unwrap_or_default());
                    }
                    Answer::Sync(Err(_)) => {}
                }
            }
        }
        // With nobody acting any more, time answers the rest.
        w.pass(10 * (SESSION + REBALANCE));
        sent.retain(|token| !w.answers.contains_key(token));
        prop_assert!(sent.is_empty(), "never answered: {sent:?}");
    });
}
