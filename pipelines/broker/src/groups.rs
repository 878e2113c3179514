//! The classic consumer group protocol as a state machine without IO: requests and time go in, answers
//! come out, some at once, some when the group is ready for them.
//!
//! ```text
//!            join                    all joined, or time is up          leader's sync
//! Empty ───────────▶ Preparing ──────────────────────────▶ Completing ───────────────▶ Stable
//!   ▲                 ▲    │ nobody left                       │ join, leave, expiry      │ the same
//!   └─────────────────┼────┘                                   │                          │
//!                     └────────────────────────────────────────┴──────────────────────────┘
//! ```
//!
//! Invariants: a member owns partitions only in the generation that gave them, and every generation is
//! higher than the one before; a waiting join or sync is answered exactly once; a member that waits for
//! an answer is not expired (it cannot send heartbeats), any other is after its session timeout.
//!
//! Time is the time since the broker started, given by the caller, so a test runs an hour at once.

use bytes::Bytes;
use kafka_protocol::ResponseError;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Bounds memory; Kafka has no bound by default, which helps nobody on one machine.
const MEMBERS_MAX: usize = 1_000;
const GROUPS_MAX: usize = 10_000;
/// Thirty minutes, as in Kafka.
const SESSION_MAX: Duration = Duration::from_secs(30 * 60);

/// Names a request that waits for its answer.
pub(crate) type Token = u64;

/// A member's request to be in the group.
#[derive(Debug, Clone, Default)]
pub(crate) struct Join {
    pub group: String,
    pub member: String,
    pub instance: Option<String>,
    pub client_id: String,
    pub client_host: String,
    pub session: Duration,
    pub rebalance: Duration,
    pub protocol_type: String,
    /// In order of preference.
    pub protocols: Vec<(String, Bytes)>,
    /// Whether a newcomer must come back with the id it is given (JoinGroup v4 and later).
    pub two_steps: bool,
    /// Whether the client knows `skip_assignment` (JoinGroup v9).
    pub can_skip_assignment: bool,
}

/// What a join leads to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Joined {
    pub generation: i32,
    pub protocol_type: String,
    pub protocol: String,
    pub leader: String,
    pub member: String,
    pub skip_assignment: bool,
    /// For the leader only: id, instance, metadata.
    pub members: Vec<(String, Option<String>, Bytes)>,
}

/// A refused join, with the member id that the answer carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct JoinRefused {
    pub error: ResponseError,
    pub member: String,
}

/// A request for the member's share.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sync {
    pub group: String,
    pub member: String,
    pub instance: Option<String>,
    pub generation: i32,
    pub protocol_type: Option<String>,
    pub protocol: Option<String>,
    pub assignments: Vec<(String, Bytes)>,
}

/// The share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Synced {
    pub protocol_type: String,
    pub protocol: String,
    pub assignment: Bytes,
}

/// The answer to a request that may have waited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Join(Result<Joined, JoinRefused>),
    Sync(Result<Synced, ResponseError>),
}

/// Answers that are now due.
pub(crate) type Answers = Vec<(Token, Answer)>;

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Empty,
    Preparing { until: Duration, not_before: Duration },
    Completing,
    Stable,
}

impl Phase {
    /// The name the protocol gives it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Phase::Empty => "Empty",
            Phase::Preparing { .. } => "PreparingRebalance",
            Phase::Completing => "CompletingRebalance",
            Phase::Stable => "Stable",
        }
    }
}

/// One member.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub instance: Option<String>,
    pub client_id: String,
    pub client_host: String,
    session: Duration,
    rebalance: Duration,
    pub protocols: Vec<(String, Bytes)>,
    pub assignment: Bytes,
    expires: Duration,
    join: Option<Token>,
    sync: Option<Token>,
}

impl Member {
    fn metadata(&self, protocol: &str) -> Bytes {
        self.protocols.iter().find(|(name, _)| name == protocol).map(|(_, m)| m.clone()).unwrap_or_default()
    }

    fn waits(&self) -> bool {
        self.join.is_some() || self.sync.is_some()
    }
}

/// One group.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub phase: Phase,
    pub generation: i32,
    pub protocol_type: String,
    pub protocol: String,
    leader: String,
    pub members: BTreeMap<String, Member>,
    /// Ids given to newcomers who have not come back yet, and until when they may.
    pending: BTreeMap<String, Duration>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Groups {
    groups: HashMap<String, Group>,
    /// How long a new group waits for more members before it makes its first generation.
    first_wait: Duration,
    new_id: fn() -> String,
}

impl Groups {
    pub(crate) fn new(first_wait: Duration, new_id: fn() -> String) -> Groups {
        Groups { groups: HashMap::new(), first_wait, new_id }
    }

    pub(crate) fn get(&self, group: &str) -> Option<&Group> {
        self.groups.get(group)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Group)> {
        self.groups.iter()
    }

    /// Takes a join; `token` is answered now or in a later call's answers.
    pub(crate) fn join(&mut self, now: Duration, token: Token, join: Join) -> Answers {
        let mut answers = Answers::new();
        if let Err(refused) = self.try_join(now, token, join, &mut answers) {
            answers.push((token, Answer::Join(Err(refused))));
        }
        answers
    }

    fn try_join(
        &mut self,
        now: Duration,
        token: Token,
        join: Join,
        answers: &mut Answers,
    ) -> Result<(), JoinRefused> {
        let refuse = |error, member: &str| Err(JoinRefused { error, member: member.to_owned() });
        if join.group.is_empty() {
            return refuse(ResponseError::InvalidGroupId, &join.member);
        }
        if join.session.is_zero() || join.session > SESSION_MAX {
            return refuse(ResponseError::InvalidSessionTimeout, &join.member);
        }
        if join.protocols.is_empty() || join.protocol_type.is_empty() {
            return refuse(ResponseError::InconsistentGroupProtocol, &join.member);
        }
        if !self.groups.contains_key(&join.group) && self.groups.len() >= GROUPS_MAX {
            self.groups.retain(|_, g| g.phase != Phase::Empty || !g.pending.is_empty());
            if self.groups.len() >= GROUPS_MAX {
                return refuse(ResponseError::GroupMaxSizeReached, &join.member);
            }
        }
        let group = self.groups.entry(join.group.clone()).or_insert_with(|| Group::new(&join.protocol_type));
        if !group.suits(&join) {
            return refuse(ResponseError::InconsistentGroupProtocol, &join.member);
        }
        let owner = join.instance.as_ref().and_then(|i| group.of_instance(i));
        let member = match (join.member.is_empty(), owner) {
            (true, Some(old)) => return group.replace(now, token, &old, (self.new_id)(), join, answers),
            (false, Some(owner)) if owner != join.member => {
                return refuse(ResponseError::FencedInstanceId, &join.member);
            }
            (true, None) => {
                if group.members.len() + group.pending.len() >= MEMBERS_MAX {
                    return refuse(ResponseError::GroupMaxSizeReached, "");
                }
                let member = (self.new_id)();
                if join.two_steps && join.instance.is_none() {
                    group.pending.insert(member.clone(), now + join.session);
                    return refuse(ResponseError::MemberIdRequired, &member);
                }
                member
            }
            (false, _) => join.member.clone(),
        };
        let newcomer = join.member.is_empty() || group.pending.remove(&member).is_some();
        if !newcomer && !group.members.contains_key(&member) {
            return refuse(ResponseError::UnknownMemberId, &join.member);
        }
        group.enter(now, token, member, join, self.first_wait, answers);
        Ok(())
    }

    /// Takes a sync; `token` is answered now or in a later call's answers.
    pub(crate) fn sync(&mut self, now: Duration, token: Token, sync: Sync) -> Answers {
        let mut answers = Answers::new();
        let checked = self.member(&sync.group, &sync.member, sync.instance.as_deref(), sync.generation);
        let refused = match checked {
            Err(error) => Some(error),
            Ok(group) => group.sync(now, token, sync, &mut answers).err(),
        };
        answers.extend(refused.map(|error| (token, Answer::Sync(Err(error)))));
        answers
    }

    /// A sign of life. `REBALANCE_IN_PROGRESS` tells the member to join again.
    pub(crate) fn heartbeat(
        &mut self,
        now: Duration,
        group: &str,
        member: &str,
        instance: Option<&str>,
        generation: i32,
    ) -> Result<(), ResponseError> {
        let group = self.member(group, member, instance, generation)?;
        group.touch(now, member);
        match group.phase {
            Phase::Preparing { .. } => Err(ResponseError::RebalanceInProgress),
            _ => Ok(()),
        }
    }

    /// Takes members out, each named by id or by instance.
    pub(crate) fn leave(
        &mut self,
        now: Duration,
        group: &str,
        members: &[(String, Option<String>)],
    ) -> (Vec<Result<(), ResponseError>>, Answers) {
        let mut answers = Answers::new();
        let Some(group) = self.groups.get_mut(group) else {
            return (vec![Err(ResponseError::UnknownMemberId); members.len()], answers);
        };
        let left = members.iter().map(|(member, instance)| {
            let owner = instance.as_ref().and_then(|i| group.of_instance(i));
            let member = match (instance, owner) {
                (Some(_), None) => return Err(ResponseError::UnknownMemberId),
                (Some(_), Some(owner)) if !member.is_empty() && *member != owner => {
                    return Err(ResponseError::FencedInstanceId);
                }
                (Some(_), Some(owner)) => owner,
                (None, _) => member.clone(),
            };
            if group.pending.remove(&member).is_some() || group.remove(&member, &mut answers) {
                return Ok(());
            }
            Err(ResponseError::UnknownMemberId)
        });
        let left: Vec<_> = left.collect();
        if left.iter().any(Result::is_ok) {
            group.prepare_unless_preparing(now, &mut answers);
            group.complete_if_ready(now, &mut answers);
        }
        (left, answers)
    }

    /// Whether a member (or, with a negative generation, an outsider) may commit offsets now.
    pub(crate) fn may_commit(
        &mut self,
        now: Duration,
        group: &str,
        member: &str,
        instance: Option<&str>,
        generation: i32,
    ) -> Result<(), ResponseError> {
        match self.groups.get(group) {
            None if generation < 0 => return Ok(()),
            None => return Err(ResponseError::IllegalGeneration),
            Some(g) if generation < 0 && g.members.is_empty() => return Ok(()),
            Some(_) => {}
        }
        let group = self.member(group, member, instance, generation)?;
        if group.phase == Phase::Completing {
            return Err(ResponseError::RebalanceInProgress);
        }
        group.touch(now, member);
        Ok(())
    }

    /// Forgets a group that has no members.
    pub(crate) fn delete(&mut self, group: &str) -> Result<bool, ResponseError> {
        match self.groups.get(group) {
            None => Ok(false),
            Some(g) if !g.members.is_empty() => Err(ResponseError::NonEmptyGroup),
            Some(_) => Ok(self.groups.remove(group).is_some()),
        }
    }

    /// Lets time do its work: expires members, ends waits.
    pub(crate) fn tick(&mut self, now: Duration) -> Answers {
        let mut answers = Answers::new();
        for group in self.groups.values_mut() {
            group.tick(now, &mut answers);
        }
        answers
    }

    /// When `tick` will next have something to do.
    pub(crate) fn next_tick(&self) -> Option<Duration> {
        self.groups.values().filter_map(Group::next_tick).min()
    }

    fn member(
        &mut self,
        group: &str,
        member: &str,
        instance: Option<&str>,
        generation: i32,
    ) -> Result<&mut Group, ResponseError> {
        let group = self.groups.get_mut(group).ok_or(ResponseError::UnknownMemberId)?;
        if let Some(owner) = instance.and_then(|i| group.of_instance(i))
            && owner != member
        {
            return Err(ResponseError::FencedInstanceId);
        }
        if !group.members.contains_key(member) {
            return Err(ResponseError::UnknownMemberId);
        }
        if group.generation != generation {
            return Err(ResponseError::IllegalGeneration);
        }
        Ok(group)
    }
}

impl Group {
    fn new(protocol_type: &str) -> Group {
        Group {
            phase: Phase::Empty,
            generation: 0,
            protocol_type: protocol_type.to_owned(),
            protocol: String::new(),
            leader: String::new(),
            members: BTreeMap::new(),
            pending: BTreeMap::new(),
        }
    }

    fn of_instance(&self, instance: &str) -> Option<String> {
        let same = |m: &Member| m.instance.as_deref() == Some(instance);
        self.members.iter().find(|(_, m)| same(m)).map(|(id, _)| id.clone())
    }

    /// Whether all others could work with this member: same type, one protocol in common.
    fn suits(&mut self, join: &Join) -> bool {
        if self.members.is_empty() {
            self.protocol_type.clone_from(&join.protocol_type);
            return true;
        }
        let knows = |m: &Member, name: &str| m.protocols.iter().any(|(n, _)| n == name);
        let others = || self.members.iter().filter(|(id, _)| **id != join.member).map(|(_, m)| m);
        self.protocol_type == join.protocol_type
            && join.protocols.iter().any(|(name, _)| others().all(|m| knows(m, name)))
    }

    fn touch(&mut self, now: Duration, member: &str) {
        if let Some(m) = self.members.get_mut(member) {
            m.expires = now + m.session;
        }
    }

    /// A member, new or known, asks to be in the next generation; or asks again for this one.
    fn enter(
        &mut self,
        now: Duration,
        token: Token,
        member: String,
        join: Join,
        first_wait: Duration,
        answers: &mut Answers,
    ) {
        let unchanged = self.members.get(&member).is_some_and(|m| m.protocols == join.protocols);
        let again = match self.phase {
            // Its answer was lost; the generation it asks for is the one that is being made.
            Phase::Completing => unchanged,
            // A leader that joins again wants new assignments: its subscription's topics may have grown.
            Phase::Stable => unchanged && member != self.leader,
            Phase::Empty | Phase::Preparing { .. } => false,
        };
        let assignment = self.members.get(&member).map(|m| m.assignment.clone()).unwrap_or_default();
        let old = self.members.insert(
            member.clone(),
            Member {
                instance: join.instance,
                client_id: join.client_id,
                client_host: join.client_host,
                session: join.session,
                rebalance: join.rebalance,
                protocols: join.protocols,
                assignment,
                expires: now + join.session,
                join: None,
                sync: None,
            },
        );
        // The client gave up on these; nobody listens, but every token is answered.
        if let Some(old) = old {
            withdraw(&old, &member, answers);
        }
        if again {
            answers.push((token, Answer::Join(Ok(self.joined(&member)))));
            return;
        }
        if let Some(m) = self.members.get_mut(&member) {
            m.join = Some(token);
        }
        match self.phase {
            Phase::Empty => {
                self.prepare(now, answers);
                if let Phase::Preparing { not_before, .. } = &mut self.phase {
                    *not_before = now + first_wait;
                }
            }
            Phase::Preparing { .. } => {}
            Phase::Completing | Phase::Stable => self.prepare(now, answers),
        }
        self.complete_if_ready(now, answers);
    }

    /// A static member came back under a new id: it takes its own old place.
    fn replace(
        &mut self,
        now: Duration,
        token: Token,
        old: &str,
        new: String,
        join: Join,
        answers: &mut Answers,
    ) -> Result<(), JoinRefused> {
        let Some(mut member) = self.members.remove(old) else { return Ok(()) };
        for (token, answer) in fence(&member, old) {
            answers.push((token, answer));
        }
        (member.join, member.sync) = (None, None);
        let unchanged = member.protocols == join.protocols;
        let was_leader = self.leader == old;
        (member.expires, member.session) = (now + join.session, join.session);
        self.members.insert(new.clone(), member);
        if was_leader {
            self.leader.clone_from(&new);
        }
        if self.phase == Phase::Stable && unchanged {
            // Nothing changed for the others. A leader that cannot be told to skip the assignment is
            // told that another leads: the stored assignment is what its sync gets.
            let mut joined = self.joined(&new);
            joined.skip_assignment = was_leader && join.can_skip_assignment;
            if was_leader && !join.can_skip_assignment {
                old.clone_into(&mut joined.leader);
                joined.members.clear();
            }
            answers.push((token, Answer::Join(Ok(joined))));
            return Ok(());
        }
        self.enter(now, token, new, join, Duration::ZERO, answers);
        Ok(())
    }

    /// Takes a member out; true if it was there.
    fn remove(&mut self, member: &str, answers: &mut Answers) -> bool {
        let Some(gone) = self.members.remove(member) else { return false };
        withdraw(&gone, member, answers);
        true
    }

    fn prepare_unless_preparing(&mut self, now: Duration, answers: &mut Answers) {
        if matches!(self.phase, Phase::Completing | Phase::Stable) {
            self.prepare(now, answers);
        }
    }

    /// Begins a rebalance: everyone is asked to join again, until the most patient member's time is up.
    fn prepare(&mut self, now: Duration, answers: &mut Answers) {
        for member in self.members.values_mut() {
            if let Some(token) = member.sync.take() {
                answers.push((token, Answer::Sync(Err(ResponseError::RebalanceInProgress))));
                member.expires = now + member.session;
            }
        }
        let patience = self.members.values().map(|m| m.rebalance).max().unwrap_or_default();
        self.phase = Phase::Preparing { until: now + patience, not_before: now };
    }

    fn complete_if_ready(&mut self, now: Duration, answers: &mut Answers) {
        let Phase::Preparing { until, not_before } = self.phase else { return };
        let all = self.pending.is_empty() && self.members.values().all(|m| m.join.is_some());
        if now < not_before || !(all || now >= until) {
            return;
        }
        // Who did not come in time is out; a static member keeps its place until its session ends.
        self.members.retain(|_, m| m.join.is_some() || m.instance.is_some());
        self.generation += 1;
        if self.members.is_empty() {
            self.phase = Phase::Empty;
            self.protocol.clear();
            self.leader.clear();
            return;
        }
        self.phase = Phase::Completing;
        self.protocol = self.elect_protocol();
        if self.members.get(&self.leader).is_none_or(|m| m.join.is_none()) {
            let present = self.members.iter().find(|(_, m)| m.join.is_some()).map(|(id, _)| id.clone());
            self.leader = present.unwrap_or_default();
        }
        let waiting: Vec<_> =
            self.members.iter_mut().filter_map(|(id, m)| Some((id.clone(), m.join.take()?))).collect();
        for (member, token) in waiting {
            self.touch(now, &member);
            answers.push((token, Answer::Join(Ok(self.joined(&member)))));
        }
        for member in self.members.values_mut() {
            member.assignment = Bytes::new();
        }
    }

    /// Of the protocols that all know, the one most members like best; the first member's order decides ties.
    fn elect_protocol(&self) -> String {
        let known = |name: &str| self.members.values().all(|m| m.protocols.iter().any(|(n, _)| n == name));
        let mut votes: Vec<(&str, usize)> = Vec::new();
        for member in self.members.values() {
            let Some((name, _)) = member.protocols.iter().find(|(name, _)| known(name)) else { continue };
            match votes.iter_mut().find(|(voted, _)| voted == name) {
                Some((_, count)) => *count += 1,
                None => votes.push((name, 1)),
            }
        }
        let most = votes.iter().map(|(_, count)| *count).max();
        votes.iter().find(|(_, count)| Some(*count) == most).map(|(n, _)| (*n).to_owned()).unwrap_or_default()
    }

    fn joined(&self, member: &str) -> Joined {
        let list = || {
            let of =
                |(id, m): (&String, &Member)| (id.clone(), m.instance.clone(), m.metadata(&self.protocol));
            self.members.iter().map(of).collect()
        };
        Joined {
            generation: self.generation,
            protocol_type: self.protocol_type.clone(),
            protocol: self.protocol.clone(),
            leader: self.leader.clone(),
            member: member.to_owned(),
            skip_assignment: false,
            members: if member == self.leader { list() } else { Vec::new() },
        }
    }

    fn sync(
        &mut self,
        now: Duration,
        token: Token,
        sync: Sync,
        answers: &mut Answers,
    ) -> Result<(), ResponseError> {
        let differs = |want: &Option<String>, have: &str| want.as_deref().is_some_and(|w| w != have);
        if differs(&sync.protocol_type, &self.protocol_type) || differs(&sync.protocol, &self.protocol) {
            return Err(ResponseError::InconsistentGroupProtocol);
        }
        match self.phase {
            Phase::Empty => return Err(ResponseError::UnknownMemberId),
            Phase::Preparing { .. } => return Err(ResponseError::RebalanceInProgress),
            Phase::Stable => {}
            Phase::Completing if sync.member == self.leader => {
                for (member, assignment) in sync.assignments {
                    if let Some(m) = self.members.get_mut(&member) {
                        m.assignment = assignment;
                    }
                }
                self.phase = Phase::Stable;
            }
            Phase::Completing => {}
        }
        if let Some(m) = self.members.get_mut(&sync.member)
            && let Some(lost) = m.sync.replace(token)
        {
            answers.push((lost, Answer::Sync(Err(ResponseError::RebalanceInProgress))));
        }
        if self.phase == Phase::Stable {
            self.hand_out(now, answers);
        }
        Ok(())
    }

    /// Answers every sync that waits.
    fn hand_out(&mut self, now: Duration, answers: &mut Answers) {
        for member in self.members.values_mut() {
            let Some(token) = member.sync.take() else { continue };
            member.expires = now + member.session;
            let synced = Synced {
                protocol_type: self.protocol_type.clone(),
                protocol: self.protocol.clone(),
                assignment: member.assignment.clone(),
            };
            answers.push((token, Answer::Sync(Ok(synced))));
        }
    }

    fn tick(&mut self, now: Duration, answers: &mut Answers) {
        self.pending.retain(|_, until| *until > now);
        let expired: Vec<String> = self
            .members
            .iter()
            .filter(|(_, m)| !m.waits() && m.expires <= now)
            .map(|(id, _)| id.clone())
            .collect();
        for member in &expired {
            self.remove(member, answers);
        }
        if !expired.is_empty() {
            self.prepare_unless_preparing(now, answers);
        }
        self.complete_if_ready(now, answers);
    }

    fn next_tick(&self) -> Option<Duration> {
        let expiries = self.members.values().filter(|m| !m.waits()).map(|m| m.expires);
        let pending = self.pending.values().copied();
        let phase = match self.phase {
            Phase::Preparing { until, not_before } => {
                let all = self.pending.is_empty() && self.members.values().all(|m| m.join.is_some());
                Some(if all { not_before } else { until.max(not_before) })
            }
            _ => None,
        };
        expiries.chain(pending).chain(phase).min()
    }
}

/// Answers what a member waited for when it is no longer in the group.
fn withdraw(member: &Member, id: &str, answers: &mut Answers) {
    let error = ResponseError::UnknownMemberId;
    answers.extend(refusals(member, id, error));
}

/// Answers what the old holder of an instance waited for.
fn fence(member: &Member, id: &str) -> Answers {
    refusals(member, id, ResponseError::FencedInstanceId)
}

fn refusals(member: &Member, id: &str, error: ResponseError) -> Answers {
    let refused = JoinRefused { error, member: id.to_owned() };
    let join = member.join.map(|token| (token, Answer::Join(Err(refused))));
    let sync = member.sync.map(|token| (token, Answer::Sync(Err(error))));
    join.into_iter().chain(sync).collect()
}

#[cfg(test)]
#[path = "groups_tests.rs"]
mod tests;
