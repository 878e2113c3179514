//! Honest rates: `hallucination_rate` and its strata, and `false_hit_bound`. All arithmetic is that of `forebay_estimators`; here rows
//! become its cells and its answers columns.
//!
//! Invariant: a state is a cell's own sums, so an answer does not depend on partitions but by the rounding of sums.

use super::{Function, bigint, count};
use arrow::array::{Array, ArrayRef, Float64Array, Int64Array, StringArray, StructArray, UInt64Array};
use arrow::datatypes::{DataType, Field, Fields};
use datafusion::common::cast::{
    as_boolean_array, as_float64_array, as_int64_array, as_list_array, as_struct_array, as_uint64_array,
};
use datafusion::common::{Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::Accumulator;
use datafusion::logical_expr::function::AccumulatorArgs;
use forebay_estimators::{Answer, Cell, Confidence, Error, STRATA_MAX, State, Stratum};
use std::sync::Arc;

const COUNTS: usize = State::COUNTS.len();
const SUMS: usize = State::SUMS.len();

/// What `hallucination_rate` and `stratified_rate` answer.
pub(super) fn rate_type() -> DataType {
    let field = |name, kind| Field::new(name, kind, true);
    DataType::Struct(Fields::from(vec![
        field("rate", DataType::Float64),
        field("low", DataType::Float64),
        field("high", DataType::Float64),
        field("method", DataType::Utf8),
        field("labelled", DataType::Int64),
        field("judged", DataType::Int64),
        field("naive", DataType::Float64),
    ]))
}

/// What `rate_cell` answers.
pub(super) fn cell_type() -> DataType {
    DataType::Struct(Fields::from(cell_state()))
}

/// The numbers of a cell.
pub(super) fn cell_state() -> Vec<Field> {
    let counts = State::COUNTS.iter().map(|name| Field::new(*name, DataType::UInt64, true));
    counts.chain(State::SUMS.iter().map(|name| Field::new(*name, DataType::Float64, true))).collect()
}

/// Strata, number by number.
pub(super) fn strata_state() -> Vec<Field> {
    let list = |name, kind| Field::new_list(name, Field::new_list_field(kind, true), true);
    vec![list("sums", DataType::Float64), list("counts", DataType::UInt64)]
}

pub(super) fn rate(function: &Function, _: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    Ok(Box::new(Rate { function: function.name, cell: Cell::default(), is_cell_told: false }))
}

pub(super) fn cell(function: &Function, _: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    Ok(Box::new(Rate { function: function.name, cell: Cell::default(), is_cell_told: true }))
}

pub(super) fn strata(_: &Function, _: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    Ok(Box::new(Strata::default()))
}

#[derive(Debug)]
struct Rate {
    function: &'static str,
    cell: Cell,
    is_cell_told: bool,
}

impl Rate {
    fn add(&mut self, flag: f64, label: Option<bool>, inclusion: f64) -> Result<()> {
        let added = match label {
            Some(label) => self.cell.add_labelled(flag, label, inclusion),
            None => self.cell.add_unlabelled(flag, inclusion),
        };
        added.or_else(|error| exec_err!("{}: {error}", self.function))
    }
}

impl Accumulator for Rate {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let [flags, labels, inclusions @ ..] = values else {
            return plan_err!("{} lacks arguments", self.function);
        };
        let (flags, labels) = (as_float64_array(flags)?, as_boolean_array(labels)?);
        let inclusions = inclusions.first().map(|inclusions| as_float64_array(inclusions)).transpose()?;
        for row in 0..flags.len() {
            if flags.is_null(row) {
                continue;
            }
            let inclusion = match inclusions {
                None => 1.0,
                Some(inclusions) if inclusions.is_valid(row) => inclusions.value(row),
                Some(_) => {
                    return exec_err!(
                        "{}: a judged row has a null inclusion_probability; leave such rows out with a WHERE, or give what it was drawn with",
                        self.function
                    );
                }
            };
            self.add(flags.value(row), labels.is_valid(row).then(|| labels.value(row)), inclusion)?;
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        if self.is_cell_told { told_cell(&self.cell) } else { told(Some(&self.cell.rate(Confidence::P95))) }
    }

    fn size(&self) -> usize {
        size_of_val(self)
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let State { counts, sums } = self.cell.state();
        let counts = counts.map(|count| ScalarValue::UInt64(Some(count)));
        Ok(counts.into_iter().chain(sums.map(|sum| ScalarValue::Float64(Some(sum)))).collect())
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        for cell in cells(self.function, states)? {
            self.cell.merge(&cell);
        }
        Ok(())
    }
}

/// A cell of each row of columns in the order of [`cell_state`].
fn cells(function: &str, columns: &[ArrayRef]) -> Result<Vec<Cell>> {
    let Some((counts, sums)) = columns.split_at_checked(COUNTS) else {
        return plan_err!("{function}: a cell lacks columns");
    };
    let counts: Vec<&UInt64Array> =
        counts.iter().map(|column| as_uint64_array(column)).collect::<Result<_>>()?;
    let sums: Vec<&Float64Array> =
        sums.iter().map(|column| as_float64_array(column)).collect::<Result<_>>()?;
    let rows = counts.first().map_or(0, |column| column.len());
    (0..rows)
        .map(|row| {
            let mut state = State::default();
            for (into, column) in state.counts.iter_mut().zip(&counts) {
                *into = column.value(row);
            }
            for (into, column) in state.sums.iter_mut().zip(&sums) {
                *into = column.value(row);
            }
            Cell::from_state(&state).or_else(|error| exec_err!("{function}: {error}"))
        })
        .collect()
}

fn told_cell(cell: &Cell) -> Result<ScalarValue> {
    let State { counts, sums } = cell.state();
    let counts = counts.map(|count| Arc::new(UInt64Array::from(vec![count])) as ArrayRef);
    let sums = sums.map(|sum| Arc::new(Float64Array::from(vec![sum])) as ArrayRef);
    let columns = counts.into_iter().chain(sums).collect();
    Ok(ScalarValue::Struct(Arc::new(StructArray::try_new(Fields::from(cell_state()), columns, None)?)))
}

fn told(answer: Option<&Answer>) -> Result<ScalarValue> {
    let DataType::Struct(fields) = rate_type() else { return plan_err!("a rate is a struct") };
    let estimate = answer.and_then(|answer| answer.estimate);
    let float = |value: Option<f64>| Arc::new(Float64Array::from(vec![value])) as ArrayRef;
    let whole = |value: u64| Arc::new(Int64Array::from(vec![bigint(value)])) as ArrayRef;
    let columns = vec![
        float(estimate.map(|estimate| estimate.rate)),
        float(estimate.map(|estimate| estimate.interval.low)),
        float(estimate.map(|estimate| estimate.interval.high)),
        Arc::new(StringArray::from(vec![estimate.map(|estimate| estimate.method.name())])),
        whole(answer.map_or(0, |answer| answer.labelled)),
        whole(answer.map_or(0, |answer| answer.labelled.saturating_add(answer.unlabelled))),
        float(answer.and_then(|answer| answer.uncorrected_flag_rate)),
    ];
    Ok(ScalarValue::Struct(Arc::new(StructArray::try_new(fields, columns, None)?)))
}

/// Cells with their traffic; at most [`STRATA_MAX`].
#[derive(Debug, Default)]
struct Strata(Vec<(Cell, u64)>);

impl Strata {
    fn add(&mut self, cell: Cell, traffic: u64) -> Result<()> {
        if self.0.len() >= STRATA_MAX {
            return exec_err!(
                "stratified_rate: there are more than {STRATA_MAX} strata; group by fewer columns"
            );
        }
        self.0.push((cell, traffic));
        Ok(())
    }

    fn combined(&self) -> Result<Option<Answer>, Error> {
        let traffic: Vec<u64> = self.0.iter().map(|(_, traffic)| *traffic).collect();
        if traffic.iter().all(|traffic| *traffic == 0) {
            return Ok(None);
        }
        let shares = forebay_estimators::shares(&traffic)?;
        let strata: Vec<_> =
            self.0.iter().zip(shares).map(|((cell, _), share)| Stratum { share, cell: *cell }).collect();
        forebay_estimators::combine(&strata, Confidence::P95).map(Some)
    }
}

impl Accumulator for Strata {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let [strata, traffic] = values else { return plan_err!("stratified_rate takes two arguments") };
        let (strata, traffic) = (as_struct_array(strata)?, as_int64_array(traffic)?);
        for (row, cell) in cells("stratified_rate", strata.columns())?.into_iter().enumerate() {
            if strata.is_null(row) || traffic.is_null(row) {
                return exec_err!(
                    "stratified_rate: a stratum has a null cell or null traffic; count its records in the traffic"
                );
            }
            self.add(cell, count("stratified_rate", "traffic", traffic.value(row))?)?;
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        match self.combined() {
            Ok(answer) => told(answer.as_ref()),
            Err(error) => exec_err!("stratified_rate: {error}"),
        }
    }

    fn size(&self) -> usize {
        size_of_val(self) + self.0.capacity() * size_of::<(Cell, u64)>()
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let (mut sums, mut counts) = (Vec::new(), Vec::new());
        for (cell, traffic) in &self.0 {
            let state = cell.state();
            sums.extend(state.sums.map(|sum| ScalarValue::Float64(Some(sum))));
            counts
                .extend(state.counts.iter().chain([traffic]).map(|count| ScalarValue::UInt64(Some(*count))));
        }
        Ok(vec![
            ScalarValue::List(ScalarValue::new_list_nullable(&sums, &DataType::Float64)),
            ScalarValue::List(ScalarValue::new_list_nullable(&counts, &DataType::UInt64)),
        ])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let [sums, counts] = states else { return plan_err!("stratified_rate has a state of two parts") };
        for (sums, counts) in
            as_list_array(sums)?.iter().flatten().zip(as_list_array(counts)?.iter().flatten())
        {
            let (sums, counts) = (as_float64_array(&sums)?.values(), as_uint64_array(&counts)?.values());
            for (sums, counts) in
                sums.as_chunks::<SUMS>().0.iter().zip(counts.as_chunks::<{ COUNTS + 1 }>().0)
            {
                let [labelled, unlabelled, positives, traffic] = *counts;
                let state = State { counts: [labelled, unlabelled, positives], sums: *sums };
                match Cell::from_state(&state) {
                    Ok(cell) => self.add(cell, traffic)?,
                    Err(error) => return exec_err!("stratified_rate: {error}"),
                }
            }
        }
        Ok(())
    }
}

pub(super) fn false_hit_bound(columns: &[ArrayRef]) -> Result<ArrayRef> {
    let [wrong, trials, confidence] = columns else {
        return plan_err!("false_hit_bound takes three arguments");
    };
    let (wrong, trials, confidence) =
        (as_int64_array(wrong)?, as_int64_array(trials)?, as_float64_array(confidence)?);
    let mut bounds = Float64Array::builder(wrong.len());
    for ((wrong, trials), confidence) in wrong.iter().zip(trials).zip(confidence) {
        bounds.append_option(match (wrong, trials, confidence) {
            (Some(wrong), Some(trials), Some(confidence)) if trials != 0 => {
                Some(bound(wrong, trials, confidence)?)
            }
            _ => None,
        });
    }
    Ok(Arc::new(bounds.finish()))
}

fn bound(wrong: i64, trials: i64, confidence: f64) -> Result<f64> {
    let (wrong, trials) =
        (count("false_hit_bound", "wrong", wrong)?, count("false_hit_bound", "trials", trials)?);
    Confidence::new(confidence)
        .and_then(|confidence| forebay_estimators::false_hit_bound(wrong, trials, confidence))
        .or_else(|error| exec_err!("false_hit_bound: {error}"))
}
