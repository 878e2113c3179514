//! `pctl(x, p)`: a percentile that is exact to 10,000 values and within 1% beyond. `pctl_state(x)` and `pctl_merge(state, p)` are the
//! same in two steps, so that what is kept of an hour answers for a month; exact to 100 values, as what is kept should be small.
//!
//! The percentile is the one of `percentile_disc`: a value that is there, of rank ⌈p·n⌉. Beyond the exact part a DDSketch holds the
//! values, which bounds the relative error of each percentile, also of the last; the built-in `approx_percentile_cont` is a t-digest,
//! whose error at p99.9 of heavy tails has no such bound (Masson, Rim, Lee 2019, DDSketch, VLDB 12, 2195–2205).
//!
//! Invariant: an answer depends on the values alone, and not on how they are spread over partitions or states. Memory is bounded:
//! 80 kB of values, or two times 2,048 counters.

use super::Function;
use arrow::array::{ArrayRef, Float64Array};
use arrow::datatypes::{DataType, Field};
use datafusion::common::cast::{as_binary_array, as_float64_array, as_list_array};
use datafusion::common::{DataFusionError, Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::Accumulator;
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::physical_expr::expressions::Literal;
use sketches_ddsketch::{Config, DDSketch};
use std::fmt;

/// Up to so many values are kept as they are.
const EXACT_MAX: usize = 10_000;
/// The same of what is stored: 800 bytes, about what a sketch of many takes.
const STORED_EXACT_MAX: usize = 100;
/// The first byte of a stored state: values follow, or a sketch does.
const VALUES: u8 = 0;
const SKETCH: u8 = 1;

pub(super) fn state() -> Vec<Field> {
    let value = Field::new_list_field(DataType::Float64, true);
    vec![Field::new_list("values", value, true), Field::new("sketch", DataType::Binary, true)]
}

pub(super) fn accumulator(function: &Function, arguments: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    let answers = Answers::At(fraction(function, arguments)?);
    Ok(Box::new(Percentile { values: Values::new(EXACT_MAX), takes: Takes::Numbers, answers }))
}

pub(super) fn storing(_: &Function, _: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    let values = Values::new(STORED_EXACT_MAX);
    Ok(Box::new(Percentile { values, takes: Takes::Numbers, answers: Answers::State }))
}

pub(super) fn merging(function: &Function, arguments: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    let answers = Answers::At(fraction(function, arguments)?);
    Ok(Box::new(Percentile { values: Values::new(STORED_EXACT_MAX), takes: Takes::States, answers }))
}

/// The p of a call.
fn fraction(function: &Function, arguments: &AccumulatorArgs) -> Result<f64> {
    let constant = arguments.exprs.get(1).and_then(|p| p.downcast_ref::<Literal>()).map(Literal::value);
    match constant {
        Some(ScalarValue::Float64(Some(p))) if (0.0..=1.0).contains(p) => Ok(*p),
        Some(p) => plan_err!(
            "{}: p is {p}; it must lie from 0 to 1, as 0.99 does for the 99th percentile",
            function.call
        ),
        None => plan_err!("{}: p must be a constant, such as 0.99", function.call),
    }
}

#[derive(Debug)]
struct Percentile {
    values: Values,
    takes: Takes,
    answers: Answers,
}

/// What its rows hold.
#[derive(Clone, Copy, Debug)]
enum Takes {
    Numbers,
    States,
}

/// What is asked of it.
#[derive(Clone, Copy, Debug)]
enum Answers {
    /// The percentile at a fraction.
    At(f64),
    /// What answers later.
    State,
}

/// Many values, or what is needed to know of them.
struct Values {
    exact_max: usize,
    /// All values, as long as there is no sketch; then none.
    exact: Vec<f64>,
    sketch: Option<Box<DDSketch>>,
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sketched = self.sketch.as_ref().map_or(0, |sketch| sketch.count());
        write!(f, "{} values", self.exact.len() + sketched)
    }
}

impl Values {
    const fn new(exact_max: usize) -> Self {
        Self { exact_max, exact: Vec::new(), sketch: None }
    }

    fn add(&mut self, values: &Float64Array) {
        if self.sketch.is_none() && self.exact.len() + values.len() <= self.exact_max {
            self.exact.extend(finite(values));
            return;
        }
        finite(values).for_each(|value| self.add_one(value));
    }

    fn add_one(&mut self, value: f64) {
        if self.sketch.is_none() && self.exact.len() < self.exact_max {
            self.exact.push(value);
        } else {
            self.sketch().add(value);
        }
    }

    /// The sketch, which takes over what was kept until now.
    fn sketch(&mut self) -> &mut DDSketch {
        // The configuration that the encoded form stands for: 1%, 2,048 counters to a sign.
        let sketch = self.sketch.get_or_insert_with(|| Box::new(DDSketch::new(Config::defaults())));
        for value in std::mem::take(&mut self.exact) {
            sketch.add(value);
        }
        sketch
    }

    fn add_sketch(&mut self, bytes: &[u8]) -> Result<()> {
        let other = DDSketch::from_java_bytes(bytes).map_err(external)?;
        self.sketch().merge(&other).map_err(external)
    }

    /// The same values in the same bytes, in whatever order they came; null where there are none.
    fn stored(&mut self) -> Option<Vec<u8>> {
        if let Some(sketch) = &self.sketch {
            return Some([&[SKETCH], sketch.to_java_bytes().as_slice()].concat());
        }
        self.exact.sort_unstable_by(f64::total_cmp);
        let values = self.exact.iter().flat_map(|value| value.to_le_bytes());
        (!self.exact.is_empty()).then(|| std::iter::once(VALUES).chain(values).collect())
    }

    fn add_stored(&mut self, bytes: &[u8]) -> Result<()> {
        match bytes.split_first() {
            Some((&SKETCH, sketch)) => self.add_sketch(sketch),
            Some((&VALUES, values)) if values.len().is_multiple_of(size_of::<f64>()) => {
                for value in values.as_chunks().0 {
                    self.add_one(f64::from_le_bytes(*value));
                }
                Ok(())
            }
            _ => exec_err!(
                "pctl_merge: {} bytes are no state; it must be what pctl_state answers",
                bytes.len()
            ),
        }
    }

    fn at(&mut self, p: f64) -> Result<Option<f64>> {
        match &self.sketch {
            Some(sketch) => at_rank(sketch, rank(p, sketch.count())),
            None if self.exact.is_empty() => Ok(None),
            None => {
                let rank = rank(p, self.exact.len());
                Ok(Some(*self.exact.select_nth_unstable_by(rank, f64::total_cmp).1))
            }
        }
    }
}

fn finite(values: &Float64Array) -> impl Iterator<Item = f64> {
    values.iter().flatten().filter(|value| value.is_finite())
}

/// The rank of a percentile among n values, from 0 on.
fn rank(p: f64, n: usize) -> usize {
    // 0.07 · 100 is 7.000000000000001, which must not become the eighth.
    let rank = (p * n as f64 * (1.0 - 2.0 * f64::EPSILON)).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to n, by p from 0 to 1"
    )]
    let rank = rank as usize;
    rank.clamp(1, n) - 1
}

impl Accumulator for Percentile {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let [values, ..] = values else { return plan_err!("pctl takes a column") };
        match self.takes {
            Takes::Numbers => self.values.add(as_float64_array(values)?),
            Takes::States => {
                for state in as_binary_array(values)?.iter().flatten() {
                    self.values.add_stored(state)?;
                }
            }
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        Ok(match self.answers {
            Answers::At(p) => ScalarValue::Float64(self.values.at(p)?),
            Answers::State => ScalarValue::Binary(self.values.stored()),
        })
    }

    fn size(&self) -> usize {
        let Values { exact, sketch, .. } = &self.values;
        let sketch =
            sketch.as_ref().map_or(0, |sketch| size_of::<DDSketch>() + sketch.length() * size_of::<u64>());
        size_of_val(self) + exact.capacity() * size_of::<f64>() + sketch
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let Values { exact, sketch, .. } = &self.values;
        let values: Vec<_> = exact.iter().map(|value| ScalarValue::Float64(Some(*value))).collect();
        let values = ScalarValue::new_list_nullable(&values, &DataType::Float64);
        let sketch = sketch.as_ref().map(|sketch| sketch.to_java_bytes());
        Ok(vec![ScalarValue::List(values), ScalarValue::Binary(sketch)])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let [values, sketches] = states else { return plan_err!("pctl has a state of two parts") };
        for values in as_list_array(values)?.iter().flatten() {
            self.values.add(as_float64_array(&values)?);
        }
        for bytes in as_binary_array(sketches)?.iter().flatten() {
            self.values.add_sketch(bytes)?;
        }
        Ok(())
    }
}

fn at_rank(sketch: &DDSketch, rank: usize) -> Result<Option<f64>> {
    let last = sketch.count().saturating_sub(1);
    // The sketch looks at ⌊q·(n − 1)⌋; the half keeps rounding from either neighbour.
    let q = if rank >= last {
        1.0
    } else if rank == 0 {
        0.0
    } else {
        (rank as f64 + 0.5) / last as f64
    };
    let value = sketch.quantile(q).map_err(external)?;
    // The middle of a bucket may lie beyond all that is in it.
    let within = |value: f64| value.clamp(sketch.min().unwrap_or(value), sketch.max().unwrap_or(value));
    Ok(value.map(within))
}

fn external(error: impl std::error::Error + Send + Sync + 'static) -> DataFusionError {
    DataFusionError::External(Box::new(error))
}
