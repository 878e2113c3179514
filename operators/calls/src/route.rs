//! Where a call was tried already, so that its next try goes elsewhere.

use std::sync::{Mutex, PoisonError};

/// How many tries are remembered; more than a call ever has.
const TRIED_MAX: usize = 16;

/// The way of one call through a pool. Layers that stand apart share it: who balances notes where a try went, and
/// who retries or hedges need not know endpoints.
#[derive(Debug, Default)]
pub struct Route {
    tried: Mutex<Vec<usize>>,
    is_hedge: bool,
}

impl Clone for Route {
    fn clone(&self) -> Self {
        Self { tried: Mutex::new(self.tried()), is_hedge: self.is_hedge }
    }
}

impl Route {
    /// The same for a try beside the one that goes on: elsewhere, at once, or not at all.
    pub(crate) fn hedge(&self) -> Self {
        Self { is_hedge: true, ..self.clone() }
    }

    /// The endpoints at which it was tried, in order.
    pub(crate) fn tried(&self) -> Vec<usize> {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A try goes to this endpoint.
    pub(crate) fn goes_to(&self, endpoint: usize) {
        let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
        if tried.len() < TRIED_MAX {
            tried.push(endpoint);
        }
    }

    /// Whether this is a try beside another.
    pub(crate) fn is_hedge(&self) -> bool {
        self.is_hedge
    }
}
