//! Counts what happened of late, in slots of time, so that old things fall out and memory stays what it is.

use std::{collections::VecDeque, time::Duration};
use tokio::time::Instant;

/// Slots of a window: what falls out of it does so in steps of this part of its length.
const SLOTS: u32 = 30;

/// Sums of `N` things over the last `length`.
#[derive(Debug)]
pub(crate) struct Window<const N: usize> {
    slot: Duration,
    /// From the beginning of each slot that is not empty, oldest first.
    slots: VecDeque<(Instant, [u64; N])>,
    sums: [u64; N],
}

impl<const N: usize> Window<N> {
    pub(crate) fn new(length: Duration) -> Self {
        Self { slot: length / SLOTS, slots: VecDeque::new(), sums: [0; N] }
    }

    /// Adds to the thing of this number.
    pub(crate) fn add(&mut self, what: usize, amount: u64, now: Instant) {
        self.forget(now);
        match self.slots.back_mut() {
            Some((began, slot)) if now < *began + self.slot => slot[what] += amount,
            _ => {
                let mut slot = [0; N];
                slot[what] = amount;
                self.slots.push_back((now, slot));
            }
        }
        self.sums[what] += amount;
    }

    /// Takes back what was added at `when` and was not needed. What fell out already is gone.
    pub(crate) fn take_back(&mut self, what: usize, amount: u64, when: Instant) {
        let Some((_, slot)) = self.slots.iter_mut().rev().find(|(began, _)| *began <= when) else { return };
        let amount = amount.min(slot[what]);
        slot[what] -= amount;
        self.sums[what] -= amount;
    }

    /// The sums.
    pub(crate) fn sums(&mut self, now: Instant) -> [u64; N] {
        self.forget(now);
        self.sums
    }

    /// When the next slot falls out; absent where there is none.
    pub(crate) fn changes_at(&self) -> Option<Instant> {
        self.slots.front().map(|(began, _)| *began + self.length())
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.slots.clear();
        self.sums = [0; N];
    }

    /// A slot counts until its youngest entry is as old as the window is long.
    fn length(&self) -> Duration {
        self.slot * (SLOTS + 1)
    }

    fn forget(&mut self, now: Instant) {
        while let Some((began, slot)) = self.slots.front()
            && *began + self.length() <= now
        {
            for (sum, amount) in self.sums.iter_mut().zip(slot) {
                *sum -= amount;
            }
            self.slots.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_old_falls_out() {
        let (start, s) = (Instant::now(), Duration::from_secs);
        let mut window = Window::<2>::new(s(30));
        window.add(0, 5, start);
        window.add(1, 7, start + s(10));
        assert_eq!(window.sums(start + s(30)), [5, 7]);
        assert_eq!(window.changes_at(), Some(start + s(31)));
        assert_eq!(window.sums(start + s(31)), [0, 7]);
        window.take_back(1, 3, start + s(10));
        assert_eq!(window.sums(start + s(31)), [0, 4]);
        window.take_back(0, 3, start);
        assert_eq!(window.sums(start + s(41)), [0, 0]);
        assert_eq!(window.changes_at(), None);
    }

    #[test]
    fn it_never_holds_more_than_its_slots() {
        let start = Instant::now();
        let mut window = Window::<1>::new(Duration::from_secs(30));
        for ms in 0..100_000 {
            window.add(0, 1, start + Duration::from_millis(ms));
        }
        assert!(window.slots.len() <= 32, "{}", window.slots.len());
        let sum = window.sums(start + Duration::from_secs(100))[0];
        assert!((30_000..=31_000).contains(&sum), "{sum}");
    }
}
