//! A DDSketch that takes a value without its logarithm.
//!
//! A sketch counts values by their bucket ⌊log_γ v⌋. A float's exponent with the first bits of its fraction tells a cell that is narrower
//! than a bucket, so no more than two buckets meet in it: a look-up and a comparison tell which. Where they meet is found by the sketch's
//! own function.
//!
//! Invariant: each bucket, the least and the greatest are as if each value had been added by itself; the sum is, but for rounding.

use sketches_ddsketch::{Config, DDSketch, DDSketchError};
use std::sync::LazyLock;

/// What the encoded form stands for: within 1%, 2,048 counters to a sign.
fn config() -> Config {
    Config::defaults()
}

/// A cell is a 64th of a power of two, at most 1.6% wide, where a bucket is 2.0%.
const CELL_BITS: u32 = 6;
/// What is looked up lies from here up to there; a sketch takes what is nearly nothing for zero.
const LEAST: f64 = 1.0 / (1_u64 << 29) as f64;
const BEYOND: f64 = (1_u64 << 63) as f64;

/// Counters are made for so many buckets more than a value asks for.
const SLACK: i32 = 32;

/// Sums of a bucket are rounded by less than this.
const NEAR: f64 = 1e-9;

/// A sketch, and values that wait to be added to it by the bucket.
pub(super) struct Sketch {
    settled: DDSketch,
    /// How many values wait in each bucket from `from` on, and what they add up to.
    waiting: Vec<(u64, f64)>,
    from: i32,
    /// The least and the greatest of those that wait.
    least: f64,
    greatest: f64,
}

impl Sketch {
    /// One without values.
    pub(super) fn new() -> Self {
        let settled = DDSketch::new(config());
        Self { settled, waiting: Vec::new(), from: 0, least: f64::INFINITY, greatest: f64::NEG_INFINITY }
    }

    /// Adds a value that is not infinite or NaN.
    pub(super) fn add(&mut self, value: f64) {
        if !self.count(value) {
            if (LEAST..BEYOND).contains(&value) {
                self.make_room(BUCKETS.of(value));
                self.count(value);
            } else {
                self.settled.add(value);
            }
        }
    }

    /// Adds a value if there is a counter for it; says whether there is.
    pub(super) fn count(&mut self, value: f64) -> bool {
        if !(LEAST..BEYOND).contains(&value) {
            return false;
        }
        let place = usize::try_from(BUCKETS.of(value) - self.from);
        let Some((count, sum)) = place.ok().and_then(|place| self.waiting.get_mut(place)) else {
            return false;
        };
        *count += 1;
        *sum += value;
        self.least = self.least.min(value);
        self.greatest = self.greatest.max(value);
        true
    }

    fn make_room(&mut self, key: i32) {
        if self.waiting.is_empty() {
            self.from = key - SLACK;
        }
        let before = (self.from - key + SLACK).max(0);
        if key < self.from {
            self.waiting.splice(..0, (0..before).map(|_| (0, 0.0)));
            self.from -= before;
        }
        let wanted = (key - self.from + SLACK).unsigned_abs() as usize;
        self.waiting.resize(wanted.max(self.waiting.len()), (0, 0.0));
    }

    /// Adds all values of another.
    pub(super) fn merge(&mut self, other: &DDSketch) -> Result<(), DDSketchError> {
        self.settled.merge(other)
    }

    /// All values.
    pub(super) fn settled(&mut self) -> &DDSketch {
        if self.least > self.greatest {
            return &self.settled;
        }
        let (least, greatest) = (self.least, self.greatest);
        (self.least, self.greatest) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in [least, greatest] {
            let place = (BUCKETS.of(value) - self.from).unsigned_abs() as usize;
            let (count, sum) = &mut self.waiting[place];
            // Both may be the same one.
            if *count > 0 {
                *count -= 1;
                *sum -= value;
                self.settled.add(value);
            }
        }
        for (key, waiting) in (self.from..).zip(&mut self.waiting) {
            let (count, sum) = std::mem::take(waiting);
            if count > 0 {
                // The mean lies in the bucket too, or beside it by rounding alone.
                let mean = (sum / count as f64).clamp(least, greatest);
                let near = [1.0, 1.0 + NEAR, 1.0 - NEAR].map(|near| mean * near);
                let inside = near.into_iter().find(|value| BUCKETS.config.key(*value) == key);
                self.settled.add_with_count(inside.unwrap_or_else(|| BUCKETS.config.value(key)), count);
            }
        }
        &self.settled
    }

    /// How many values there are.
    pub(super) fn values(&self) -> u64 {
        self.settled.count() as u64 + self.waiting.iter().map(|(count, _)| count).sum::<u64>()
    }

    /// The bytes that it holds beside itself.
    pub(super) fn held(&self) -> usize {
        self.settled.length() * size_of::<u64>() + self.waiting.capacity() * size_of::<(u64, f64)>()
    }
}

/// Up to `bound` a value is of the bucket `key`, and from there on of the next.
struct Cell {
    bound: f64,
    key: i32,
}

struct Buckets {
    config: Config,
    cells: Vec<Cell>,
}

static BUCKETS: LazyLock<Buckets> = LazyLock::new(|| {
    let config = config();
    let edges = cell(LEAST)..cell(BEYOND);
    let cells = edges.map(|cell| {
        let (mut low, mut high) = (edge(cell), edge(cell + 1));
        let key = config.key(f64::from_bits(low));
        // By bisection over all floats of the cell; the first of the next cell where all are of one bucket.
        while low + 1 < high {
            let middle = low.midpoint(high);
            *if config.key(f64::from_bits(middle)) == key { &mut low } else { &mut high } = middle;
        }
        Cell { bound: f64::from_bits(high), key }
    });
    Buckets { cells: cells.collect(), config }
});

/// The number of the cell in which a value lies that is not negative.
const fn cell(value: f64) -> u64 {
    value.to_bits() >> (f64::MANTISSA_DIGITS - 1 - CELL_BITS)
}

/// The bits of the first value of a cell.
const fn edge(cell: u64) -> u64 {
    cell << (f64::MANTISSA_DIGITS - 1 - CELL_BITS)
}

impl Buckets {
    /// The bucket of a value that is looked up.
    fn of(&self, value: f64) -> i32 {
        #[expect(clippy::cast_possible_truncation, reason = "there are some thousands")]
        let Cell { bound, key } = self.cells[(cell(value) - cell(LEAST)) as usize];
        key + i32::from(value >= bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_in_the_bucket_in_which_the_sketch_puts_it() {
        let config = config();
        let of = |value: f64| (BUCKETS.of(value), config.key(value));
        for cell in &BUCKETS.cells {
            for bits in [cell.bound.to_bits() - 1, cell.bound.to_bits()] {
                let value = f64::from_bits(bits).min(f64::from_bits(BEYOND.to_bits() - 1));
                let (ours, theirs) = of(value);
                assert_eq!(ours, theirs, "{value:?}");
            }
        }
        let mut seed = 7_u64;
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let share = (seed >> 11) as f64 / (1_u64 << 53) as f64;
            let value = LEAST * (BEYOND / LEAST).powf(share);
            let (ours, theirs) = of(value);
            assert_eq!(ours, theirs, "{value:?}");
        }
    }

    #[test]
    fn many_are_as_each_by_itself() {
        let lists: [Vec<f64>; 9] = [
            vec![],
            vec![3.0],
            vec![3.0, 3.0],
            (1..15_000).map(f64::from).collect(),
            (1..5_000).rev().map(|value| f64::from(value).powi(3) / 7.0).collect(),
            (-2_000..2_000).map(f64::from).collect(),
            vec![1e-12, 5.0, 7.0, 1e300, 8.0],
            (0..5_000).map(|value| f64::from(value % 7)).collect(),
            // The mean of some is rounded out of the bucket, of which all are the first.
            BUCKETS.cells.iter().skip(2_000).take(300).flat_map(|cell| [cell.bound; 77]).collect(),
        ];
        for values in lists {
            let (mut ours, mut theirs) = (Sketch::new(), DDSketch::new(config()));
            for values in values.chunks(7_700) {
                values.iter().for_each(|value| ours.add(*value));
                values.iter().for_each(|value| theirs.add(*value));
                assert_eq!(ours.values(), theirs.count() as u64);
                // It goes on after an answer.
                ours.settled();
            }
            let ours = ours.settled();
            assert_eq!((ours.count(), ours.min(), ours.max()), (theirs.count(), theirs.min(), theirs.max()));
            for rank in 0..=1_000 {
                let q = f64::from(rank) / 1_000.0;
                assert_eq!(ours.quantile(q).unwrap(), theirs.quantile(q).unwrap(), "{q} of {}", values.len());
            }
            let (ours, theirs) = (ours.sum().unwrap_or(0.0), theirs.sum().unwrap_or(0.0));
            assert!((ours - theirs).abs() <= NEAR * theirs.abs(), "{ours} and {theirs}");
        }
    }
}
