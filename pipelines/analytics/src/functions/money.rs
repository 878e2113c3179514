//! Money and speed: `cost`, `usd`, `tps`, and `cost_per_1k`, which is a ratio of sums.
//!
//! Invariant: money is whole nano-dollars until the last step, so a month of rows adds up to the last digit.

use super::prices::Tokens;
use super::{Apply, Function, Prices, count, without_prices};
use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, BooleanArray, Decimal128Array, Float64Array, Int64Array,
    PrimitiveArray, StringArray,
};
use arrow::datatypes::{DataType, Decimal128Type, Field, Int64Type, TimestampMicrosecondType};
use datafusion::common::cast::{as_decimal128_array, as_int64_array, as_primitive_array, as_string_array};
use datafusion::common::{Result, ScalarValue, plan_err};
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::logical_expr::{Accumulator, EmitTo, GroupsAccumulator};
use std::sync::Arc;

/// What `usd` answers: the same number with the point nine digits further left.
pub(super) const USD: DataType = DataType::Decimal128(19, 9);

const NANO_PER_USD: f64 = 1e9;

pub(super) fn cost(prices: Option<Arc<Prices>>, now_us: fn() -> i64) -> Apply {
    Arc::new(move |columns| {
        let Some(prices) = &prices else { return without_prices() };
        let [models, tokens @ ..] = columns else { return plan_err!("cost was called without arguments") };
        let models: &StringArray = as_string_array(models)?;
        let (tokens, at) = match tokens {
            [tokens @ .., at] if tokens.len() == 4 => {
                (tokens, Some(as_primitive_array::<TimestampMicrosecondType>(at)?))
            }
            tokens => (tokens, None),
        };
        let tokens: Vec<&Int64Array> =
            tokens.iter().map(|column| as_int64_array(column)).collect::<Result<_>>()?;
        let now_us = now_us();
        let mut costs = Int64Array::builder(models.len());
        for row in 0..models.len() {
            let [input, cached_read, cached_write, output] =
                [0, 1, 2, 3].map(|kind| value::<Int64Type>(tokens.get(kind).copied(), row));
            let at_us = if at.is_some() { value(at, row) } else { Some(now_us) };
            costs.append_option(match (models.is_valid(row), input, output, at_us) {
                (true, Some(input), Some(output), Some(at_us)) => {
                    let (cached_read, cached_write) = (cached_read.unwrap_or(0), cached_write.unwrap_or(0));
                    for (name, tokens) in [
                        ("input_tokens", input),
                        ("cached_read_tokens", cached_read),
                        ("cached_write_tokens", cached_write),
                        ("output_tokens", output),
                    ] {
                        count("cost", name, tokens)?;
                    }
                    prices.of(models.value(row), Tokens { input, cached_read, cached_write, output }, at_us)
                }
                _ => None,
            });
        }
        Ok(Arc::new(costs.finish()))
    })
}

fn value<T: ArrowPrimitiveType>(column: Option<&PrimitiveArray<T>>, row: usize) -> Option<T::Native> {
    column.filter(|column| column.is_valid(row)).map(|column| column.value(row))
}

pub(super) fn usd(columns: &[ArrayRef]) -> Result<ArrayRef> {
    let [nano] = columns else { return plan_err!("usd takes one argument") };
    let dollars: Decimal128Array = as_int64_array(nano)?.unary::<_, Decimal128Type>(i128::from);
    Ok(Arc::new(dollars.with_data_type(USD)))
}

pub(super) fn tps(columns: &[ArrayRef]) -> Result<ArrayRef> {
    let [tokens, us] = columns else { return plan_err!("tps takes two arguments") };
    let pairs = as_int64_array(tokens)?.iter().zip(as_int64_array(us)?);
    let speeds: Float64Array = pairs
        .map(|pair| match pair {
            (Some(tokens), Some(us)) if us > 0 => Some(tokens as f64 / us as f64 * 1e6),
            _ => None,
        })
        .collect();
    Ok(Arc::new(speeds))
}

pub(super) fn ratio_state() -> Vec<Field> {
    // Whole numbers of 38 digits hold the sum of any number of BIGINTs that there can be.
    ["nano_usd", "tokens"].map(|name| Field::new(name, DataType::Decimal128(38, 0), false)).into()
}

pub(super) fn ratio(_: &Function, _: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
    Ok(Box::new(Ratio::default()))
}

/// Two sums over the rows in which both are known.
#[derive(Clone, Copy, Debug, Default)]
struct Ratio {
    nano_usd: i128,
    tokens: i128,
}

impl Ratio {
    fn usd_per_1k(self) -> Option<f64> {
        let usd_per_1k = || self.nano_usd as f64 / self.tokens as f64 * 1_000.0 / NANO_PER_USD;
        (self.tokens != 0).then(usd_per_1k)
    }
}

impl Accumulator for Ratio {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let [nano_usd, tokens] = values else { return plan_err!("cost_per_1k takes two arguments") };
        let (nano_usd, tokens) = (as_int64_array(nano_usd)?, as_int64_array(tokens)?);
        for (nano_usd, tokens) in nano_usd.iter().zip(tokens) {
            if let (Some(nano_usd), Some(tokens)) = (nano_usd, tokens) {
                self.nano_usd += i128::from(nano_usd);
                self.tokens += i128::from(tokens);
            }
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        Ok(ScalarValue::Float64(self.usd_per_1k()))
    }

    fn size(&self) -> usize {
        size_of_val(self)
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        Ok([self.nano_usd, self.tokens].map(|sum| ScalarValue::Decimal128(Some(sum), 38, 0)).into())
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let [nano_usd, tokens] = states else { return plan_err!("cost_per_1k has a state of two sums") };
        self.nano_usd += as_decimal128_array(nano_usd)?.iter().flatten().sum::<i128>();
        self.tokens += as_decimal128_array(tokens)?.iter().flatten().sum::<i128>();
        Ok(())
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let mut left = Self::default();
        left.update_batch(values)?;
        self.nano_usd -= left.nano_usd;
        self.tokens -= left.tokens;
        Ok(())
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }
}

pub(super) fn ratios(_: &Function, _: &AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
    Ok(Box::new(Ratios::default()))
}

/// The same of many groups.
#[derive(Debug, Default)]
struct Ratios(Vec<Ratio>);

impl GroupsAccumulator for Ratios {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        count: usize,
    ) -> Result<()> {
        let [nano_usd, tokens] = values else { return plan_err!("cost_per_1k takes two arguments") };
        let (nano_usd, tokens) = (as_int64_array(nano_usd)?, as_int64_array(tokens)?);
        self.0.resize(count, Ratio::default());
        let is_all = nano_usd.null_count() == 0 && tokens.null_count() == 0 && filter.is_none();
        let is_meant = |row: usize| {
            let is_let = filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
            is_let && nano_usd.is_valid(row) && tokens.is_valid(row)
        };
        let both = nano_usd.values().iter().zip(tokens.values());
        for (row, (&group, (nano_usd, tokens))) in groups.iter().zip(both).enumerate() {
            if is_all || is_meant(row) {
                let ratio = &mut self.0[group];
                ratio.nano_usd += i128::from(*nano_usd);
                ratio.tokens += i128::from(*tokens);
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        let ratios = emit.take_needed(&mut self.0).into_iter();
        Ok(Arc::new(ratios.map(Ratio::usd_per_1k).collect::<Float64Array>()))
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        let ratios = emit.take_needed(&mut self.0);
        let sums = |sum: fn(&Ratio) -> i128| -> Result<ArrayRef> {
            let sums = Decimal128Array::from_iter_values(ratios.iter().map(sum));
            Ok(Arc::new(sums.with_precision_and_scale(38, 0)?))
        };
        Ok(vec![sums(|ratio| ratio.nano_usd)?, sums(|ratio| ratio.tokens)?])
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], count: usize) -> Result<()> {
        let [nano_usd, tokens] = states else { return plan_err!("cost_per_1k has a state of two sums") };
        let (nano_usd, tokens) = (as_decimal128_array(nano_usd)?, as_decimal128_array(tokens)?);
        self.0.resize(count, Ratio::default());
        for (&group, (nano_usd, tokens)) in groups.iter().zip(nano_usd.iter().zip(tokens)) {
            let ratio = &mut self.0[group];
            ratio.nano_usd += nano_usd.unwrap_or_default();
            ratio.tokens += tokens.unwrap_or_default();
        }
        Ok(())
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let rows = values.first().map_or(0, |column| column.len());
        let mut one_each = Self::default();
        one_each.update_batch(values, &(0..rows).collect::<Vec<_>>(), filter, rows)?;
        one_each.state(EmitTo::All)
    }

    fn size(&self) -> usize {
        self.0.capacity() * size_of::<Ratio>()
    }
}
