//! Joins the pieces of an answer, so that not every token becomes a record.
//!
//! The first piece of an attempt goes at once: whoever reads along waits for it, and it costs one record an answer. From then
//! on the text that comes within 20 ms of the first unsent piece goes together, which no reader's eye tells apart.
//!
//! Invariant: text leaves in the order in which it came, and is numbered from 0 without a gap within an attempt. No more than
//! [`HELD_BYTES_MAX`] and the piece that exceeded it is held. Sans-IO.

use std::time::Duration;
use tokio::time::Instant;

/// How long a piece may wait for others.
const WAIT_MAX: Duration = Duration::from_millis(20);
/// The text that may wait; a token has about four bytes.
const HELD_BYTES_MAX: usize = 16 * 1024;

/// A piece that is to go now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) attempt: u32,
    pub(crate) seq: u32,
    pub(crate) text: String,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Deltas {
    attempt: u32,
    /// The number of the next piece.
    seq: u32,
    held: String,
    /// When the first of what is held came; none where nothing is held.
    since: Option<Instant>,
}

impl Deltas {
    /// A text came. Gives what is to go now: at most the rest of what came before, and this.
    pub(crate) fn add(&mut self, attempt: u32, text: &str, now: Instant) -> [Option<Piece>; 2] {
        if text.is_empty() {
            return [None, None];
        }
        let is_other = attempt != self.attempt;
        let before = if is_other { self.take() } else { self.take_due(now) };
        if is_other {
            (self.attempt, self.seq) = (attempt, 0);
        }
        self.held.push_str(text);
        self.since.get_or_insert(now);
        let goes = self.seq == 0 || self.held.len() > HELD_BYTES_MAX;
        [before, if goes { self.take() } else { None }]
    }

    /// When what is held is to go.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + WAIT_MAX)
    }

    /// What has waited long enough.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Piece> {
        self.due().filter(|&due| due <= now).and_then(|_| self.take())
    }

    /// All that is held.
    pub(crate) fn take(&mut self) -> Option<Piece> {
        self.since.take()?;
        let (attempt, seq, text) = (self.attempt, self.seq, std::mem::take(&mut self.held));
        self.seq = seq.saturating_add(1);
        Some(Piece { attempt, seq, text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Texts by attempt and the millisecond at which they came; what left, as `attempt.seq text`.
    fn check(came: &[(u32, u64, &str)], expected: &[&str]) {
        let (mut deltas, began, mut left) = (Deltas::default(), Instant::now(), Vec::new());
        let show = |Piece { attempt, seq, text }: Piece| format!("{attempt}.{seq} {text}");
        for &(attempt, at, text) in came {
            left.extend(deltas.add(attempt, text, began + ms(at)).into_iter().flatten().map(show));
        }
        left.extend(deltas.take().map(show));
        assert_eq!(left, expected, "{came:?}");
        assert_eq!((deltas.take(), deltas.due()), (None, None), "nothing is left");
    }

    #[test]
    fn the_first_piece_goes_at_once_and_others_together_while_the_first_of_them_is_young() {
        check(&[(0, 0, "a"), (0, 1, "b"), (0, 20, "c"), (0, 21, "d")], &["0.0 a", "0.1 bc", "0.2 d"]);
        check(&[(0, 0, "a"), (0, 50, "b"), (0, 69, "c"), (0, 70, "d")], &["0.0 a", "0.1 bc", "0.2 d"]);
        check(&[(0, 0, ""), (0, 0, "a"), (0, 0, "")], &["0.0 a"]);
        check(&[], &[]);
    }

    #[test]
    fn a_higher_attempt_begins_anew_behind_the_rest_of_the_lower() {
        check(&[(0, 0, "a"), (0, 1, "b"), (1, 2, "c"), (1, 3, "d")], &["0.0 a", "0.1 b", "1.0 c", "1.1 d"]);
        check(&[(3, 0, "a"), (3, 1, "b")], &["3.0 a", "3.1 b"]);
    }

    #[test]
    fn what_is_held_is_bounded() {
        let (mut deltas, now) = (Deltas::default(), Instant::now());
        let (text, mut sent) = ("ü".repeat(500), 0);
        for _ in 0..100 {
            sent +=
                deltas.add(0, &text, now).into_iter().flatten().map(|piece| piece.text.len()).sum::<usize>();
            assert!(deltas.held.len() <= HELD_BYTES_MAX, "{}", deltas.held.len());
        }
        assert_eq!(sent + deltas.held.len(), 100 * text.len());
    }
}
