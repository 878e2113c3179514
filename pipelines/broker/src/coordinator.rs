//! Gives the group state machine what it lacks: a clock, a timer, and someone to hand the answers to.

use crate::groups::{Answer, Answers, Groups, Join, JoinRefused, Joined, Sync, Synced, Token};
use kafka_protocol::ResponseError;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Coordinator {
    state: Mutex<State>,
    started: Instant,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    groups: Groups,
    waiting: HashMap<Token, oneshot::Sender<Answer>>,
    next_token: Token,
}

impl Coordinator {
    pub(crate) fn new(groups: Groups) -> Coordinator {
        Coordinator {
            state: Mutex::new(State { groups, waiting: HashMap::new(), next_token: 0 }),
            started: Instant::now(),
            changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the groups at the present time.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Groups, Duration) -> T) -> T {
        f(&mut self.lock().groups, self.started.elapsed())
    }

    pub(crate) async fn join(&self, join: Join) -> Result<Joined, JoinRefused> {
        let gone = JoinRefused { error: ResponseError::UnknownMemberId, member: join.member.clone() };
        match self.ask(|groups, now, token| groups.join(now, token, join)).await {
            Some(Answer::Join(answer)) => answer,
            _ => Err(gone),
        }
    }

    pub(crate) async fn sync(&self, sync: Sync) -> Result<Synced, ResponseError> {
        match self.ask(|groups, now, token| groups.sync(now, token, sync)).await {
            Some(Answer::Sync(answer)) => answer,
            _ => Err(ResponseError::UnknownMemberId),
        }
    }

    pub(crate) fn leave(
        &self,
        group: &str,
        members: &[(String, Option<String>)],
    ) -> Vec<Result<(), ResponseError>> {
        let mut state = self.lock();
        let (left, answers) = state.groups.leave(self.started.elapsed(), group, members);
        state.deliver(answers);
        self.changed.notify_one();
        left
    }

    async fn ask(&self, request: impl FnOnce(&mut Groups, Duration, Token) -> Answers) -> Option<Answer> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.lock();
            let token = state.next_token;
            state.next_token += 1;
            state.waiting.insert(token, sender);
            let answers = request(&mut state.groups, self.started.elapsed(), token);
            state.deliver(answers);
        }
        self.changed.notify_one();
        receiver.await.ok()
    }

    /// Ticks the groups when something falls due; runs as long as the broker.
    pub(crate) async fn run(&self) {
        loop {
            let due = self.lock().groups.next_tick();
            match due {
                None => self.changed.notified().await,
                Some(due) => tokio::select! {
                    () = sleep_until(self.started + due) => {}
                    () = self.changed.notified() => {}
                },
            }
            let mut state = self.lock();
            let answers = state.groups.tick(self.started.elapsed());
            state.deliver(answers);
        }
    }
}

impl State {
    fn deliver(&mut self, answers: Answers) {
        for (token, answer) in answers {
            if let Some(waiting) = self.waiting.remove(&token) {
                // A connection that is gone does not want it; its member will expire.
                let _ = waiting.send(answer);
            }
        }
    }
}
