//! Which requests their clients took back, and whom to tell.
//!
//! Every process reads the topic `cancels` whole. A cancel reaches a record that is running at once: its upstream call is
//! dropped, and it ends as `cancelled`. One that waits hears of it when its turn comes; one that was set aside, whose turn
//! may be minutes away, is looked for ([`crate::ahead`]).
//!
//! Invariant: a cancel that came first is known when its request comes, for the last [`CANCELS_MAX`] cancels.

use forebay_operator::{Change, Failure, StopSignal, Table};
use forebay_schemas::{Cancel, Record, RequestId, Tenant};
use futures::future::BoxFuture;
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::watch;

/// How many cancels are remembered.
pub const CANCELS_MAX: usize = 100_000;

type Job = (Tenant, RequestId);

/// The cancels that are known, and the requests that are running.
#[derive(Debug, Default)]
pub struct Cancels(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    cancelled: HashSet<Job>,
    order: VecDeque<Job>,
    /// How many came so far, also those that are forgotten.
    heard: u64,
    /// Each running request with the number of its registration: two deliveries of one may run side by side.
    running: HashMap<Job, Vec<(u64, watch::Sender<bool>)>>,
    registrations: u64,
}

/// A request that is running; dropping it says that it is not any more.
pub struct Registered {
    cancels: Arc<Cancels>,
    job: Job,
    number: u64,
    signal: StopSignal,
}

impl Cancels {
    /// Notes that a request runs. Its signal is given when a cancel comes, or came already.
    pub fn register(self: &Arc<Self>, tenant: &Tenant, id: &RequestId) -> Registered {
        let (switch, signal) = StopSignal::new();
        let job = (tenant.clone(), id.clone());
        let mut state = self.lock();
        if state.cancelled.contains(&job) {
            switch.send_replace(true);
        }
        state.registrations += 1;
        let number = state.registrations;
        state.running.entry(job.clone()).or_default().push((number, switch));
        drop(state);
        Registered { cancels: Arc::clone(self), job, number, signal }
    }

    /// Whether a request was taken back.
    pub fn contains(&self, tenant: &Tenant, id: &RequestId) -> bool {
        let state = self.lock();
        // The usual case costs no copies.
        !state.cancelled.is_empty() && state.cancelled.contains(&(tenant.clone(), id.clone()))
    }

    /// How many requests were taken back so far, as far as this process has heard.
    pub fn heard(&self) -> u64 {
        self.lock().heard
    }

    fn cancel(&self, job: Job) {
        let mut state = self.lock();
        for (_, switch) in state.running.get(&job).into_iter().flatten() {
            switch.send_replace(true);
        }
        if state.cancelled.insert(job.clone()) {
            state.order.push_back(job);
            state.heard += 1;
        }
        while state.order.len() > CANCELS_MAX {
            if let Some(oldest) = state.order.pop_front() {
                state.cancelled.remove(&oldest);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registered {
    /// Given when the request is taken back.
    pub fn signal(&self) -> StopSignal {
        self.signal.clone()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut state = self.cancels.lock();
        if let Some(switches) = state.running.get_mut(&self.job) {
            switches.retain(|(number, _)| *number != self.number);
            if switches.is_empty() {
                state.running.remove(&self.job);
            }
        }
    }
}

/// The topic `cancels`, read whole.
pub struct CancelsTable(pub Arc<Cancels>);

impl Table for CancelsTable {
    fn record(&self) -> &'static str {
        Cancel::NAME
    }

    fn needs_key(&self) -> bool {
        false
    }

    fn position(&self, _: i32) -> BoxFuture<'_, Result<Option<i64>, Failure>> {
        Box::pin(async { Ok(None) })
    }

    fn clear(&self) -> BoxFuture<'_, Result<(), Failure>> {
        Box::pin(async { Ok(()) })
    }

    fn apply(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<Vec<(Change, String)>, Failure>> {
        let mut refused = Vec::new();
        for change in changes {
            // A message without a value takes nothing back.
            let Some(value) = &change.value else { continue };
            match Cancel::decode(value) {
                Ok(Cancel { id, tenant }) => self.0.cancel((tenant, id)),
                Err(fault) => refused.push((change, fault.to_string())),
            }
        }
        Box::pin(async { Ok(refused) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn job(id: &str) -> Job {
        (Tenant::default(), RequestId::try_from(id.to_owned()).unwrap())
    }

    async fn apply(cancels: &Arc<Cancels>, body: &str) -> usize {
        let change =
            Change { partition: 0, offset: 0, key: String::new(), value: Some(Bytes::from(body.to_owned())) };
        CancelsTable(Arc::clone(cancels)).apply(vec![change]).await.unwrap().len()
    }

    #[tokio::test]
    async fn a_cancel_reaches_what_runs_and_what_comes_later() {
        let cancels = Arc::new(Cancels::default());
        let (tenant, id) = job("a");
        let running = cancels.register(&tenant, &id);
        assert!(!cancels.contains(&tenant, &id));
        assert_eq!(apply(&cancels, r#"{"id": "a"}"#).await, 0);
        running.signal().given().await;
        assert!(cancels.contains(&tenant, &id));
        assert_eq!((apply(&cancels, r#"{"id": "a"}"#).await, cancels.heard()), (0, 1), "it was known");
        cancels.register(&tenant, &id).signal().given().await;
        let (_, other) = job("b");
        assert!(!cancels.contains(&tenant, &other));
        assert!(!cancels.contains(&Tenant::try_from("other".to_owned()).unwrap(), &id), "tenants are apart");
    }

    #[tokio::test]
    async fn what_is_no_cancel_is_refused_and_what_has_ended_is_forgotten() {
        let cancels = Arc::new(Cancels::default());
        assert_eq!(apply(&cancels, "nonsense").await, 1);
        let (tenant, id) = job("a");
        let (first, second) = (cancels.register(&tenant, &id), cancels.register(&tenant, &id));
        drop(first);
        assert_eq!(cancels.lock().running.len(), 1);
        drop(second);
        assert!(cancels.lock().running.is_empty());
    }
}
