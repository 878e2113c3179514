//! How a quantity varies: a latency or a number of tokens, as one writes it in a setting.
//!
//! `50ms` · `50ms..5s` (all alike likely) · `log-normal 200ms sigma 0.8` · `log-normal 50ms..5s` (99 of 100 lie between
//! these bounds before they are cut off at them) · any of these with `, 1% 30s` behind it (one in a hundred takes that
//! long instead).

use crate::dice::Dice;
use std::time::Duration;

/// How a quantity varies. Latencies are in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    most: Shape,
    slow: Option<(f64, f64)>,
}

#[derive(Clone, Debug, PartialEq)]
enum Shape {
    Fixed(f64),
    Uniform(f64, f64),
    LogNormal { median: f64, sigma: f64, low: f64, high: f64 },
}

/// Half the width, in deviations, of what holds 99 of 100.
const DEVIATIONS: f64 = 2.576;

impl Spread {
    /// Always this.
    pub const fn fixed(value: f64) -> Self {
        Self { most: Shape::Fixed(value), slow: None }
    }

    /// Whether it is always 0.
    pub fn is_zero(&self) -> bool {
        *self == Self::fixed(0.0)
    }

    /// One value.
    pub fn draw(&self, dice: &mut Dice) -> f64 {
        // Drawn whether or not it matters, so that adding a share of slow ones leaves the others as they are.
        let chance = dice.unit();
        let value = match self.most {
            Shape::Fixed(value) => value,
            Shape::Uniform(low, high) => low + (high - low) * dice.unit(),
            Shape::LogNormal { median, sigma, low, high } => {
                (median * (sigma * dice.normal()).exp()).clamp(low, high)
            }
        };
        match self.slow {
            Some((share, slow)) if chance < share => slow,
            _ => value,
        }
    }

    /// The spread of latencies that a text names.
    pub fn of_latencies(text: &str) -> Result<Self, String> {
        Self::read(text, |text| Some(humantime::parse_duration(text).ok()?.as_secs_f64()))
            .ok_or_else(|| "write 50ms, 50ms..5s, log-normal 200ms sigma 0.8 or log-normal 50ms..5s, and if some are slow \", 1% 30s\" behind it".to_owned())
    }

    /// The spread of counts that a text names.
    pub fn of_counts(text: &str) -> Result<Self, String> {
        let count = |text: &str| text.parse::<u32>().ok().map(f64::from);
        Self::read(text, count).ok_or_else(|| {
            "write 64, 16..256, log-normal 64 sigma 0.8 or log-normal 16..256, and if some are long \", 1% 2000\" behind it".to_owned()
        })
    }

    fn read(text: &str, value: impl Fn(&str) -> Option<f64>) -> Option<Self> {
        let (most, slow) = match text.split_once(',') {
            Some((most, slow)) => (most.trim(), Some(slow.trim())),
            None => (text.trim(), None),
        };
        let slow = match slow {
            Some(slow) => {
                let (chance, slow) = slow.split_once(' ')?;
                Some((share(chance).ok()?, value(slow.trim())?))
            }
            None => None,
        };
        let bounds = |text: &str| {
            let (low, high) = text.split_once("..")?;
            let (low, high) = (value(low.trim())?, value(high.trim())?);
            (low <= high).then_some((low, high))
        };
        let most = if let Some(text) = most.strip_prefix("log-normal ") {
            if let Some((median, sigma)) = text.split_once(" sigma ") {
                let sigma: f64 = sigma.trim().parse().ok().filter(|sigma| (0.0..=10.0).contains(sigma))?;
                Shape::LogNormal { median: value(median.trim())?, sigma, low: 0.0, high: f64::INFINITY }
            } else {
                let (low, high) = bounds(text).filter(|(low, _)| *low > 0.0)?;
                let sigma = (high / low).ln() / (2.0 * DEVIATIONS);
                Shape::LogNormal { median: (low * high).sqrt(), sigma, low, high }
            }
        } else if let Some((low, high)) = bounds(most) {
            Shape::Uniform(low, high)
        } else {
            Shape::Fixed(value(most)?)
        };
        Some(Self { most, slow })
    }
}

/// A share, as `5%` or `0.05`.
pub fn share(text: &str) -> Result<f64, String> {
    let read = match text.trim().strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().map(|percent| percent / 100.0),
        None => text.trim().parse::<f64>(),
    };
    read.ok()
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| "write a share from 0 to 1, or from 0% to 100%".to_owned())
}

/// A time of so many seconds.
pub fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, shares: &[(f64, f64)]) {
        let spread = Spread::of_latencies(text).unwrap();
        let mut dice = Dice::of(1, &[text.as_bytes()]);
        let mut values: Vec<f64> = (0..20_000).map(|_| spread.draw(&mut dice)).collect();
        values.sort_by(f64::total_cmp);
        for (share, expected) in shares {
            let place = usize::try_from(crate::dice::whole(share * 19_999.0)).unwrap();
            let found = values[place];
            assert!((found - expected).abs() <= expected * 0.1, "{text}: {found} at {share}, not {expected}");
        }
    }

    #[test]
    fn values_are_spread_as_the_text_says() {
        check("50ms", &[(0.0, 0.05), (1.0, 0.05)]);
        check("1s..3s", &[(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)]);
        check("log-normal 200ms sigma 0.5", &[(0.5, 0.2), (0.8413, 0.2 * 0.5_f64.exp())]);
        check("log-normal 50ms..5s", &[(0.0, 0.05), (0.5, 0.5), (1.0, 5.0)]);
        check("50ms, 1% 30s", &[(0.98, 0.05), (0.995, 30.0)]);
        assert!(Spread::of_latencies("0ms").unwrap().is_zero());
        assert!((Spread::of_counts("64").unwrap().draw(&mut Dice::of(0, &[])) - 64.0).abs() < 1e-9);
    }

    #[test]
    fn what_names_no_spread_is_refused() {
        for text in
            ["", "50", "5s..50ms", "log-normal 0s..5s", "log-normal 1s sigma x", "50ms, 1%", "50ms, 200% 1s"]
        {
            assert!(Spread::of_latencies(text).is_err(), "{text:?}");
        }
        assert!(Spread::of_counts("-1").is_err());
        assert_eq!((share("5%"), share("0.05")), (Ok(0.05), Ok(0.05)));
        assert!(share("1.5").is_err() && share("nan").is_err());
    }
}
