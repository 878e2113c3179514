//! `pctl(x, p)`: a percentile that is exact to 10,000 values and within 1% beyond. `pctl_state(x)` and `pctl_merge(state, p)` are the
//! same in two steps, so that what is kept of an hour answers for a month; exact to 100 values, as what is kept should be small.
//! `pctls` and `pctls_merge` are what [`share`](super::share) makes of several calls: one look at the values, and an answer each.
//!
//! The percentile is the one of `percentile_disc`: a value that is there, of rank ⌈p·n⌉. Beyond the exact part a DDSketch holds the
//! values, which bounds the relative error of each percentile, also of the last; the built-in `approx_percentile_cont` is a t-digest,
//! whose error at p99.9 of heavy tails has no such bound (Masson, Rim, Lee 2019, DDSketch, VLDB 12, 2195–2205).
//!
//! Invariant: an answer depends on the values alone, and not on how they are spread over partitions or states. Memory is bounded:
//! 80 kB of values, or two times 2,048 counters, and sums of the 4,600 buckets from 10⁻⁹ to 10¹⁹ as far as values go.

use super::Function;
use super::sketch::Sketch;
use arrow::array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, BooleanArray, Float64Array, Float64Builder, ListArray,
    ListBuilder,
};
use arrow::datatypes::{DataType, Field};
use datafusion::common::cast::{as_binary_array, as_binary_view_array, as_float64_array, as_list_array};
use datafusion::common::{DataFusionError, Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::logical_expr::{Accumulator, EmitTo, GroupsAccumulator};
use datafusion::physical_expr::expressions::Literal;
use sketches_ddsketch::DDSketch;
use std::fmt;
use std::sync::Arc;

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

/// What several percentiles at once answer.
pub(super) fn answers() -> DataType {
    DataType::new_list(DataType::Float64, true)
}

pub(super) fn accumulator(function: &Function, arguments: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    let asked = Asked::of(function, arguments)?;
    Ok(Box::new(Percentile { values: Values::new(asked.exact_max), asked }))
}

pub(super) fn groups(function: &Function, arguments: &AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
    Ok(Box::new(Percentiles { asked: Asked::of(function, arguments)?, groups: Vec::new(), held: 0 }))
}

pub(super) fn state_of_one(columns: &[ArrayRef]) -> Result<ArrayRef> {
    let [values] = columns else { return plan_err!("pctl_state_of_one takes one argument") };
    let states = as_float64_array(values)?.iter().map(|value| {
        let value = value.filter(|value| value.is_finite())?;
        let mut state = [VALUES; 1 + size_of::<f64>()];
        state[1..].copy_from_slice(&value.to_le_bytes());
        Some(state)
    });
    Ok(Arc::new(states.collect::<BinaryViewArray>()))
}

/// What a call asks for.
#[derive(Clone, Debug)]
struct Asked {
    exact_max: usize,
    takes: Takes,
    answers: Answers,
}

impl Asked {
    fn of(function: &Function, arguments: &AccumulatorArgs) -> Result<Self> {
        let (exact_max, takes) = match function.name {
            "pctl" | "pctls" => (EXACT_MAX, Takes::Numbers),
            "pctl_state" => (STORED_EXACT_MAX, Takes::Numbers),
            _ => (STORED_EXACT_MAX, Takes::States),
        };
        let answers = match function.name {
            "pctl_state" => Answers::State,
            "pctl" | "pctl_merge" => Answers::At(fraction(function, arguments, 1)?),
            _ => {
                let each = 1..arguments.exprs.len();
                Answers::Each(each.map(|index| fraction(function, arguments, index)).collect::<Result<_>>()?)
            }
        };
        Ok(Self { exact_max, takes, answers })
    }
}

/// The p of a call, which is its argument of this number.
fn fraction(function: &Function, arguments: &AccumulatorArgs, index: usize) -> Result<f64> {
    let constant = arguments.exprs.get(index).and_then(|p| p.downcast_ref::<Literal>()).map(Literal::value);
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
    asked: Asked,
}

/// What its rows hold.
#[derive(Clone, Copy, Debug)]
enum Takes {
    Numbers,
    States,
}

/// What is answered.
#[derive(Clone, Debug)]
enum Answers {
    /// The percentile at a fraction.
    At(f64),
    /// Those at several, in a list; null without values.
    Each(Vec<f64>),
    /// What answers later.
    State,
}

/// Many values, or what is needed to know of them.
struct Values {
    exact_max: usize,
    /// All values, as long as there is no sketch; then none.
    exact: Vec<f64>,
    sketch: Option<Box<Sketch>>,
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sketched = self.sketch.as_ref().map_or(0, |sketch| sketch.values());
        write!(f, "{} values", self.exact.len() as u64 + sketched)
    }
}

impl Values {
    const fn new(exact_max: usize) -> Self {
        Self { exact_max, exact: Vec::new(), sketch: None }
    }

    fn add(&mut self, values: &Float64Array) {
        finite(values).for_each(|value| self.add_one(value));
    }

    fn add_one(&mut self, value: f64) {
        match &mut self.sketch {
            Some(sketch) => sketch.add(value),
            None if self.exact.len() < self.exact_max => self.exact.push(value),
            None => self.sketch().add(value),
        }
    }

    /// Adds a value if that changes nothing in what it holds beside itself; says whether it did.
    fn add_in_place(&mut self, value: f64) -> bool {
        if let Some(sketch) = &mut self.sketch {
            return sketch.count(value);
        }
        let has_room = self.exact.len() < self.exact.capacity().min(self.exact_max);
        if has_room {
            self.exact.push(value);
        }
        has_room
    }

    /// The bytes that it holds beside itself.
    fn held(&self) -> usize {
        let sketch = |sketch: &Sketch| size_of::<Sketch>() + sketch.held();
        self.exact.capacity() * size_of::<f64>() + self.sketch.as_deref().map_or(0, sketch)
    }

    /// The sketch, which takes over what was kept until now.
    fn sketch(&mut self) -> &mut Sketch {
        let sketch = self.sketch.get_or_insert_with(|| Box::new(Sketch::new()));
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
        if let Some(sketch) = &mut self.sketch {
            return Some([&[SKETCH], sketch.settled().to_java_bytes().as_slice()].concat());
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

    /// Those at several fractions; nothing without values.
    fn each(&mut self, fractions: &[f64]) -> Result<Option<Vec<Option<f64>>>> {
        let each: Vec<_> = fractions.iter().map(|p| self.at(*p)).collect::<Result<_>>()?;
        Ok(each.iter().any(Option::is_some).then_some(each))
    }

    fn at(&mut self, p: f64) -> Result<Option<f64>> {
        match &mut self.sketch {
            Some(sketch) => {
                let sketch = sketch.settled();
                at_rank(sketch, rank(p, sketch.count()))
            }
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
        match self.asked.takes {
            Takes::Numbers => self.values.add(as_float64_array(values)?),
            Takes::States => {
                for state in as_binary_view_array(values)?.iter().flatten() {
                    self.values.add_stored(state)?;
                }
            }
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        Ok(match &self.asked.answers {
            Answers::At(p) => ScalarValue::Float64(self.values.at(*p)?),
            Answers::Each(fractions) => {
                let each = self.values.each(fractions)?;
                ScalarValue::List(Arc::new(list([each])))
            }
            Answers::State => ScalarValue::BinaryView(self.values.stored()),
        })
    }

    fn size(&self) -> usize {
        size_of_val(self) + self.values.held()
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let Values { exact, sketch, .. } = &mut self.values;
        let values: Vec<_> = exact.iter().map(|value| ScalarValue::Float64(Some(*value))).collect();
        let values = ScalarValue::new_list_nullable(&values, &DataType::Float64);
        let sketch = sketch.as_mut().map(|sketch| sketch.settled().to_java_bytes());
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

/// The same of many groups.
#[derive(Debug)]
struct Percentiles {
    asked: Asked,
    groups: Vec<Values>,
    /// What they hold beside themselves, counted as it grows: there may be more groups than rows in a batch.
    held: usize,
}

impl Percentiles {
    /// Lets something be done with the values of a group.
    fn with<T>(&mut self, group: usize, change: impl FnOnce(&mut Values) -> T) -> T {
        let values = &mut self.groups[group];
        let before = values.held();
        let done = change(values);
        // A sketch takes less than the values before it.
        self.held = self.held + values.held() - before;
        done
    }

    fn add_one(&mut self, group: usize, value: f64) {
        if !self.groups[group].add_in_place(value) {
            self.with(group, |values| values.add_one(value));
        }
    }

    fn grow(&mut self, count: usize) {
        let exact_max = self.asked.exact_max;
        self.groups.resize_with(count, || Values::new(exact_max));
    }

    fn take(&mut self, emit: EmitTo) -> Vec<Values> {
        let taken = emit.take_needed(&mut self.groups);
        self.held -= taken.iter().map(Values::held).sum::<usize>();
        taken
    }
}

impl GroupsAccumulator for Percentiles {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        count: usize,
    ) -> Result<()> {
        let [values, ..] = values else { return plan_err!("pctl takes a column") };
        self.grow(count);
        let is_meant = |row: usize| {
            let is_let = filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
            is_let && values.is_valid(row)
        };
        match self.asked.takes {
            Takes::Numbers => {
                let numbers = as_float64_array(values)?;
                for (row, (&group, &value)) in groups.iter().zip(numbers.values()).enumerate() {
                    if value.is_finite() && is_meant(row) {
                        self.add_one(group, value);
                    }
                }
            }
            Takes::States => {
                let states = as_binary_view_array(values)?;
                for (row, &group) in groups.iter().enumerate() {
                    if !is_meant(row) {
                        continue;
                    }
                    match states.value(row).split_first() {
                        // Most hours of most keys have one value.
                        Some((&VALUES, value)) if let Ok(value) = value.try_into() => {
                            self.add_one(group, f64::from_le_bytes(value));
                        }
                        _ => self.with(group, |values| values.add_stored(states.value(row)))?,
                    }
                }
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        let mut groups = self.take(emit);
        Ok(match &self.asked.answers {
            Answers::At(p) => {
                let answers = groups.iter_mut().map(|values| values.at(*p));
                Arc::new(answers.collect::<Result<Float64Array>>()?)
            }
            Answers::Each(fractions) => {
                let answers = groups.iter_mut().map(|values| values.each(fractions));
                Arc::new(list(answers.collect::<Result<Vec<_>>>()?))
            }
            Answers::State => {
                let answers = groups.iter_mut().map(Values::stored);
                Arc::new(answers.collect::<BinaryViewArray>())
            }
        })
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        let mut groups = self.take(emit);
        let sketch = |values: &mut Values| Some(values.sketch.as_mut()?.settled().to_java_bytes());
        let sketches: BinaryArray = groups.iter_mut().map(sketch).collect();
        let values = list(groups.iter().map(|values| Some(values.exact.iter().copied().map(Some))));
        Ok(vec![Arc::new(values), Arc::new(sketches)])
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], count: usize) -> Result<()> {
        let [values, sketches] = states else { return plan_err!("pctl has a state of two parts") };
        let (lists, sketches) = (as_list_array(values)?, as_binary_array(sketches)?);
        self.grow(count);
        for (row, &group) in groups.iter().enumerate() {
            if lists.is_valid(row) {
                let list = lists.value(row);
                let numbers = as_float64_array(&list)?;
                self.with(group, |values| values.add(numbers));
            }
            if sketches.is_valid(row) {
                self.with(group, |values| values.add_sketch(sketches.value(row)))?;
            }
        }
        Ok(())
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let rows = values.first().map_or(0, |column| column.len());
        let mut one_each = Self { asked: self.asked.clone(), groups: Vec::new(), held: 0 };
        one_each.update_batch(values, &(0..rows).collect::<Vec<_>>(), filter, rows)?;
        one_each.state(EmitTo::All)
    }

    fn size(&self) -> usize {
        self.groups.capacity() * size_of::<Values>() + self.held
    }
}

/// A list a row.
fn list(rows: impl IntoIterator<Item = Option<impl IntoIterator<Item = Option<f64>>>>) -> ListArray {
    let mut lists = ListBuilder::new(Float64Builder::new());
    for row in rows {
        let is_list = row.is_some();
        row.into_iter().flatten().for_each(|value| lists.values().append_option(value));
        lists.append(is_list);
    }
    lists.finish()
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
