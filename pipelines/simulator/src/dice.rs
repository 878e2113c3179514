//! Chance that is none: numbers that follow from a seed and from what they are for.
//!
//! Invariant: the same seed and the same parts give the same numbers, on every machine and in every version. So it is
//! written out here: generators of libraries may change between their versions.

use std::time::Duration;

/// A source of numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The dice of this seed for what these parts name.
    pub fn of(seed: u64, parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        for part in parts {
            // With its length, or ("ab", "c") and ("a", "bc") would be one.
            hasher.update(&part.len().to_le_bytes());
            hasher.update(part);
        }
        Self(first_8(&hasher.finalize()))
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0, and less than 1.
    pub fn unit(&mut self) -> f64 {
        const STEPS: f64 = (1_u64 << 53) as f64;
        (self.number() >> 11) as f64 / STEPS
    }

    /// Normally distributed, with mean 0 and deviation 1 (Box–Muller).
    pub fn normal(&mut self) -> f64 {
        // From above 0: the logarithm of 0 is none.
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Less than this; 0 where it is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.number() % limit).unwrap_or(0)
    }
}

/// The beginning of a hash as a number.
pub fn first_8(hash: &blake3::Hash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// The whole part of a number that is not negative; what is beyond all counting is the most there is.
pub fn whole(number: f64) -> u64 {
    // The one conversion of the standard library that checks and does not cast.
    Duration::try_from_secs_f64(number.max(0.0)).map_or(u64::MAX, |seconds| seconds.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_parts_give_the_same_numbers_and_others_give_others() {
        let throw = |seed, parts: &[&[u8]]| Dice::of(seed, parts).number();
        assert_eq!(throw(1, &[b"ab", b"c"]), throw(1, &[b"ab", b"c"]));
        assert_ne!(throw(1, &[b"ab", b"c"]), throw(1, &[b"a", b"bc"]));
        assert_ne!(throw(1, &[b"ab"]), throw(2, &[b"ab"]));
        // Written down, so that a change that would change every fate is seen.
        assert_eq!(Dice(0).number(), 0xE220_A839_7B1D_CDAF);
    }

    #[test]
    fn numbers_are_spread_as_they_should_be() {
        let mut dice = Dice::of(7, &[]);
        let units: Vec<f64> = (0..10_000).map(|_| dice.unit()).collect();
        let mean = units.iter().sum::<f64>() / 10_000.0;
        assert!((0.48..0.52).contains(&mean), "{mean}");
        assert!(units.iter().all(|unit| (0.0..1.0).contains(unit)));
        let normals: Vec<f64> = (0..10_000).map(|_| dice.normal()).collect();
        let within = normals.iter().filter(|normal| normal.abs() < 1.0).count();
        assert!((6_600..7_050).contains(&within), "{within} of 10000 within one deviation");
    }

    #[test]
    fn whole_numbers_have_no_surprises() {
        for (number, expected) in
            [(0.0, 0), (-3.0, 0), (2.9, 2), (1e30, u64::MAX), (f64::INFINITY, u64::MAX), (f64::NAN, 0)]
        {
            assert_eq!(whole(number), expected, "{number}");
        }
    }
}
