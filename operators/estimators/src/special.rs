//! The two special functions that intervals need: the normal quantile and the beta quantile.
//!
//! Invariant: a relative error below 1e-14 for the normal; for the beta below 1e-10 with parameters up to a million and below 1e-7 up
//! to a billion, where 1 − x has no more digits. The tests hold them to values of SciPy and mpmath.

use std::f64::consts::TAU;

/// The z below which a standard normal lies with probability `p`, for `p` strictly between 0 and 1.
///
/// Wichura, M. J. (1988), Algorithm AS 241: The percentage points of the normal distribution, Applied Statistics 37, 477–484
/// (PPND16: about 16 digits).
pub(crate) fn normal_quantile(p: f64) -> f64 {
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180625 - q * q;
        return q * polynomial(r, &CENTRE.0) / polynomial(r, &CENTRE.1);
    }
    let r = (-p.min(1.0 - p).ln()).sqrt();
    let z = if r <= 5.0 {
        polynomial(r - 1.6, &TAIL.0) / polynomial(r - 1.6, &TAIL.1)
    } else {
        polynomial(r - 5.0, &FAR.0) / polynomial(r - 5.0, &FAR.1)
    };
    z.copysign(q)
}

type Ratio = ([f64; 8], [f64; 8]);

/// Coefficients from the highest power down, numerator and denominator.
const CENTRE: Ratio = (
    [
        2.509_080_928_730_122_7e3,
        3.343_057_558_358_813e4,
        6.726_577_092_700_87e4,
        4.592_195_393_154_987e4,
        1.373_169_376_550_946e4,
        1.971_590_950_306_551_3e3,
        1.331_416_678_917_843_8e2,
        3.387_132_872_796_366_5,
    ],
    [
        5.226_495_278_852_854e3,
        2.872_908_573_572_194_3e4,
        3.930_789_580_009_271e4,
        2.121_379_430_158_659_7e4,
        5.394_196_021_424_751e3,
        6.871_870_074_920_579e2,
        4.231_333_070_160_091e1,
        1.0,
    ],
);
const TAIL: Ratio = (
    [
        7.745_450_142_783_414e-4,
        2.272_384_498_926_918_4e-2,
        2.417_807_251_774_506e-1,
        1.270_458_252_452_368_4,
        3.647_848_324_763_204_5,
        5.769_497_221_460_691,
        4.630_337_846_156_546,
        1.423_437_110_749_683_5,
    ],
    [
        1.050_750_071_644_416_9e-9,
        5.475_938_084_995_345e-4,
        1.519_866_656_361_645_7e-2,
        1.481_039_764_274_800_8e-1,
        6.897_673_349_851e-1,
        1.676_384_830_183_803_8,
        2.053_191_626_637_759,
        1.0,
    ],
);
const FAR: Ratio = (
    [
        2.010_334_399_292_288_1e-7,
        2.711_555_568_743_487_6e-5,
        1.242_660_947_388_078_4e-3,
        2.653_218_952_657_612_4e-2,
        2.965_605_718_285_048_7e-1,
        1.784_826_539_917_291_3,
        5.463_784_911_164_114,
        6.657_904_643_501_103,
    ],
    [
        2.044_263_103_389_939_8e-15,
        1.421_511_758_316_446e-7,
        1.846_318_317_510_054_8e-5,
        7.868_691_311_456_133e-4,
        1.487_536_129_085_061_5e-2,
        1.369_298_809_227_358e-1,
        5.998_322_065_558_88e-1,
        1.0,
    ],
);

fn polynomial(x: f64, coefficients: &[f64; 8]) -> f64 {
    coefficients.iter().fold(0.0, |sum, coefficient| sum * x + coefficient)
}

/// The x below which a beta(`a`, `b`) lies with probability `p`. Both parameters are at least 1, as those of Clopper and
/// Pearson are.
///
/// Newton's steps on [`incomplete_beta`] inside a bracket that each step narrows; a step that leaves it becomes a halving.
pub(crate) fn beta_quantile(p: f64, a: f64, b: f64) -> f64 {
    const STEPS_MAX: usize = 200;
    if p <= 0.0 {
        return 0.0;
    }
    if p >= 1.0 {
        return 1.0;
    }
    let (mut low, mut high, mut x) = (0.0, 1.0, a / (a + b));
    for _ in 0..STEPS_MAX {
        let excess = incomplete_beta(x, a, b) - p;
        if excess > 0.0 {
            high = x;
        } else {
            low = x;
        }
        let density = power_over_beta(x, a, b) / (x * (1.0 - x));
        let step = x - excess / density;
        // A density of 0 far from the quantile gives no number, and that is not inside either.
        let next = if low < step && step < high { step } else { (low + high) / 2.0 };
        if (next - x).abs() <= 4.0 * f64::EPSILON * next || next <= 0.0 || next >= 1.0 {
            return next.clamp(0.0, 1.0);
        }
        x = next;
    }
    x
}

/// The probability that a beta(`a`, `b`) lies below `x`, for `x` strictly between 0 and 1.
///
/// The continued fraction of DLMF 8.17.22, evaluated after Lentz (1976) as modified by Thompson and Barnett (1986), on the side of the
/// mean where it converges fast: in about the square root of the larger parameter.
pub(crate) fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    let power = power_over_beta(x, a, b);
    // Not from 1 − x, in which a small x has few digits left.
    let excess = (a + b) * x - a;
    if x <= (a + 1.0) / (a + b + 2.0) {
        power * continued_fraction(x, excess, a, b) / a
    } else {
        1.0 - power * continued_fraction(1.0 - x, -excess, b, a) / b
    }
}

/// `excess` is `(a + b) x − a`.
fn continued_fraction(x: f64, excess: f64, a: f64, b: f64) -> f64 {
    // At parameters of 1e9, the largest that callers give, it takes some ten thousands.
    const TERMS_MAX: u32 = 1_000_000;
    const TINY: f64 = 1e-300;
    let away_from_zero = |value: f64| if value.abs() < TINY { TINY } else { value };

    let mut c = 1.0;
    let mut d = 1.0 / away_from_zero((1.0 - excess) / (a + 1.0));
    let mut fraction = d;
    for term in 1..=TERMS_MAX {
        let m = f64::from(term);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let mut change = 1.0;
        for coefficient in [even, odd] {
            d = 1.0 / away_from_zero(1.0 + coefficient * d);
            c = away_from_zero(1.0 + coefficient / c);
            change = c * d;
            fraction *= change;
        }
        if (change - 1.0).abs() <= f64::EPSILON {
            break;
        }
    }
    fraction
}

/// `x^a (1 − x)^b / B(a, b)`, by the saddle point and not by differences of large logarithms, which would leave six digits at a
/// million trials.
///
/// Loader, C. (2000), Fast and accurate computation of binomial probabilities.
fn power_over_beta(x: f64, a: f64, b: f64) -> f64 {
    let n = a + b;
    let excess = n * x - a;
    let exponent = stirling_error(n)
        - stirling_error(a)
        - stirling_error(b)
        - deviance(a, excess)
        - deviance(b, -excess);
    (a * b / n) * exponent.exp() * (n / (TAU * a * b)).sqrt()
}

/// What Stirling's formula leaves out of `ln Γ(x + 1)`: a series from 16 on, and below that by `Γ(x + 2) = (x + 1) Γ(x + 1)`.
fn stirling_error(mut x: f64) -> f64 {
    let mut sum = 0.0;
    while x < 16.0 {
        sum += (x + 0.5) * (1.0 / x).ln_1p() - 1.0;
        x += 1.0;
    }
    let xx = x * x;
    sum + (1.0 / 12.0 - (1.0 / 360.0 - (1.0 / 1260.0 - (1.0 / 1680.0 - 1.0 / (1188.0 * xx)) / xx) / xx) / xx)
        / x
}

/// `x ln(x / mean) + mean − x` with `excess` = mean − x; as a series where both are close, since there the terms cancel.
fn deviance(x: f64, excess: f64) -> f64 {
    let mean = x + excess;
    if excess.abs() >= 0.1 * (x + mean) {
        return x * (x / mean).ln() + excess;
    }
    let ratio = -excess / (x + mean);
    let mut sum = -excess * ratio;
    let mut power = 2.0 * x * ratio;
    // Each term is at most a hundredth of the one before.
    for odd in [3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0] {
        power *= ratio * ratio;
        sum += power / odd;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(got: f64, wanted: f64, relative: f64) {
        assert!((got - wanted).abs() <= relative * wanted.abs(), "{got:e} and not {wanted:e}");
    }

    /// mpmath 1.3 with 40 digits: `sqrt(2) * erfinv(2 * mpf(p) - 1)`; at 1e-300 the root of `ncdf(x) = p`.
    #[test]
    fn normal_quantiles_are_those_of_mpmath() {
        for (p, z) in [
            (1e-300, -37.047_096_299_361_2),
            (1e-10, -6.361_340_902_404_056),
            (1e-5, -4.264_890_793_922_825),
            (0.001, -3.090_232_306_167_813_5),
            (0.025, -1.959_963_984_540_054_2),
            (0.05, -1.644_853_626_951_472_7),
            (0.1, -1.281_551_565_544_600_4),
            (0.3, -0.524_400_512_708_040_8),
            (0.5, 0.0),
            (0.7, 0.524_400_512_708_040_7),
            (0.95, 1.644_853_626_951_472_3),
            (0.975, 1.959_963_984_540_053_9),
            (0.995, 2.575_829_303_548_900_5),
            (0.9995, 3.290_526_731_491_926),
        ] {
            check(normal_quantile(p), z, 1e-14);
        }
    }

    /// mpmath 1.3 with 40 digits, `betainc(a, b, 0, x, regularized=True)`, up to parameters of 9,000; SciPy 1.17.1,
    /// `scipy.special.betainc(a, b, x)`, for the larger ones, where mpmath does not end.
    #[test]
    fn the_incomplete_beta_is_that_of_mpmath_and_scipy() {
        for (a, b, x, probability) in [
            (1.0, 1.0, 0.3, 0.3),
            (2.0, 3.0, 0.5, 0.6875),
            (10.0, 21.0, 0.2, 0.061_087_148_288_655_5),
            (1.0, 300.0, 0.001, 0.259_292_967_843_900_54),
            (300.0, 1.0, 0.999, 0.740_707_032_156_099_3),
            (41.0, 160.0, 0.25, 0.942_150_170_862_873_9),
            (1000.0, 9000.0, 0.1, 0.503_546_220_751_864),
            (1000.0, 9000.0, 0.11, 0.999_420_876_583_065_1),
            (0.5, 0.5, 0.2, 0.295_167_235_300_866_5),
            (3.7, 0.4, 0.9, 0.320_860_894_725_634_84),
            (5.0, 999_996.0, 1e-5, 0.970_747_879_419_631_6),
            (2.5, 1e6, 1e-6, 0.150_855_309_838_531_24),
            (5e5, 5e5, 0.5004, 0.788_144_580_558_795_9),
            (1.0, 1e9, 1e-9, 0.632_120_559_012_497_4),
            (1e6, 9e8, 0.001_11, 0.543_949_894_163_648_5),
        ] {
            check(incomplete_beta(x, a, b), probability, if a + b > 2e6 { 1e-9 } else { 1e-11 });
        }
    }

    #[test]
    fn the_beta_quantile_undoes_the_incomplete_beta() {
        for (a, b) in
            [(1.0, 1.0), (1.0, 300.0), (300.0, 1.0), (17.0, 5.0), (1.0, 1e9), (4e5, 6e5), (1e9, 1.0)]
        {
            for p in [1e-9, 0.005, 0.025, 0.5, 0.95, 0.999] {
                check(incomplete_beta(beta_quantile(p, a, b), a, b), p, 1e-6);
            }
        }
    }
}
