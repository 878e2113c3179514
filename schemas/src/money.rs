//! Money is an integer: nano-dollars, 10⁻⁹ USD. Floats would not add up over a month of rows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// An amount in nano-dollars. One US dollar is 1,000,000,000; the range is about ±9.2 billion dollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct NanoUsd(pub i64);

impl NanoUsd {
    /// The sum, held at the ends of the range: a total that is too large must not turn negative.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl fmt::Display for NanoUsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dollars, nanos) = (self.0.unsigned_abs() / 1_000_000_000, self.0.unsigned_abs() % 1_000_000_000);
        let sign = if self.0 < 0 { "-" } else { "" };
        let fraction = format!("{nanos:09}");
        let fraction = fraction.trim_end_matches('0');
        // Cents are always shown, so that "$0.10" does not read as "$0.1".
        write!(f, "{sign}${dollars}.{fraction:0<2}")
    }
}

#[cfg(test)]
mod tests {
    use super::NanoUsd;

    #[test]
    fn an_amount_reads_as_dollars() {
        let shown: Vec<_> = [0, 100_000_000, -1, 12_345_678_900].map(|n| NanoUsd(n).to_string()).into();
        assert_eq!(shown, ["$0.00", "$0.10", "-$0.000000001", "$12.3456789"]);
    }
}
