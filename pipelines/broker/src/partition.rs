//! A partition: its log behind a lock, and the fetches that wait for it to grow.
//!
//! Invariant: a fetch looks and, if there is nothing, registers under one lock, so no append can slip
//! between the two. Waiting is per partition: an append wakes only the fetches that asked for it.
//!
//! File IO happens where it stands, on the broker's own worker threads. An append is a `write(2)` of one
//! batch into the page cache and a read mostly comes from there: tens of microseconds, less than the two
//! thread switches of `spawn_blocking`. What takes long (fsync, compaction, opening) goes to
//! `spawn_blocking`, outside the lock.

use crate::log::{AppendError, Appended, Log, Slice, SliceError};
use bytes::Bytes;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::Notify;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Partition {
    state: Mutex<State>,
    /// Held while syncing, so that who finds nothing left to sync knows that it *has been* synced.
    flushing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    log: Log,
    waiting: Vec<Weak<Notify>>,
    deleted: bool,
}

/// What a fetch finds: the log's bounds at one moment, and where its records are.
#[derive(Debug)]
pub(crate) struct Found {
    pub start: i64,
    pub end: i64,
    pub slice: Result<Option<Slice>, SliceError>,
}

impl Partition {
    pub(crate) fn new(log: Log) -> Partition {
        let state = Mutex::new(State { log, waiting: Vec::new(), deleted: false });
        Partition { state, flushing: tokio::sync::Mutex::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere must not take the partition with it: `append` changes memory only after the write.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the log, for what needs no waking.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Log) -> T) -> T {
        f(&mut self.lock().log)
    }

    /// Stores a batch and wakes who waits for it. `None` if the topic was deleted meanwhile.
    pub(crate) fn append(&self, batch: &Bytes, now_ms: i64) -> Option<Result<Appended, AppendError>> {
        let mut state = self.lock();
        if state.deleted {
            return None;
        }
        let appended = state.log.append(batch, now_ms);
        if appended.as_ref().is_ok_and(|a| a.new) {
            wake(&mut state);
        }
        Some(appended)
    }

    /// Looks for records at `offset`; `waiter`, if there is one, is told of the next append.
    pub(crate) fn find(&self, offset: i64, waiter: Option<&Arc<Notify>>) -> Found {
        let mut state = self.lock();
        let slice = state.log.slice(offset);
        if let Some(waiter) = waiter {
            // The list is bounded by the fetches alive: those that gave up are dropped here.
            state.waiting.retain(|w| w.strong_count() > 0 && !std::ptr::eq(w.as_ptr(), Arc::as_ptr(waiter)));
            state.waiting.push(Arc::downgrade(waiter));
        }
        Found { start: state.log.start(), end: state.log.end(), slice }
    }

    /// Makes what was appended before this call reach the disk.
    pub(crate) async fn flush(&self) -> io::Result<()> {
        let _alone = self.flushing.lock().await;
        let files = self.with(Log::take_unsynced);
        if files.is_empty() {
            return Ok(());
        }
        let syncing = files.clone();
        let synced = tokio::task::spawn_blocking(move || syncing.iter().try_for_each(|f| f.sync_data()))
            .await
            .unwrap_or_else(|stopped| Err(io::Error::other(stopped)));
        if synced.is_err() {
            self.with(|log| log.put_back_unsynced(files));
        }
        synced
    }

    /// Takes no more appends; waiting fetches look again and find the topic gone.
    pub(crate) fn delete(&self) {
        let mut state = self.lock();
        state.deleted = true;
        wake(&mut state);
    }

    /// Retention, then compaction. Blocks for as long as the disk takes; not for an async worker.
    pub(crate) fn upkeep(&self, now_ms: i64) -> io::Result<()> {
        let plan = {
            let mut state = self.lock();
            if state.deleted {
                return Ok(());
            }
            state.log.retain(now_ms);
            state.log.plan_compaction(now_ms)?
        };
        let Some(plan) = plan else { return Ok(()) };
        let rewritten = plan.run()?;
        let mut state = self.lock();
        if state.deleted {
            rewritten.discard();
            return Ok(());
        }
        tracing::debug!(log = %state.log.dir().display(), bytes = rewritten.bytes(), "compacted");
        state.log.finish_compaction(rewritten)
    }
}

fn wake(state: &mut State) {
    for waiter in state.waiting.drain(..).filter_map(|w| w.upgrade()) {
        waiter.notify_one();
    }
}
