//! The functions that SQL has beside DataFusion's own: money, speed, percentiles and honest rates.
//!
//! Invariant: each function stands once in [`FUNCTIONS`], from which its errors and the reference page are made. A wrong
//! argument is an error before the first row is read, with the way the function is called; what is not known is null and
//! never 0.

mod money;
mod pctl;
mod prices;
mod quality;
mod share;
mod sketch;

use arrow::array::ArrayRef;
use arrow::datatypes::{DataType, Field, FieldRef, TimeUnit};
use datafusion::common::{Result, ScalarValue, exec_err, internal_err, plan_err};
use datafusion::execution::FunctionRegistry;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::{AggregateOrderSensitivity, format_state_name};
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, ColumnarValue, GroupsAccumulator, ScalarFunctionArgs,
    ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

pub use prices::{Error as PricesError, Prices};
pub(crate) use share::Share;

/// One function, as the reference tells of it.
#[derive(Debug)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// How it is called; what stands in brackets may be left out.
    pub call: &'static str,
    /// Whether it makes one value of many rows.
    pub is_aggregate: bool,
    /// What it answers, in which unit, and when null.
    pub meaning: &'static str,
    /// What each argument may be.
    arguments: &'static [Argument],
    /// How many of them there must be.
    required: usize,
}

/// What an argument may be. Each is cast to one type, so that a function knows no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Argument {
    Integer,
    Number,
    Text,
    Boolean,
    /// True or false, or a score from 0 to 1.
    Flag,
    Time,
    /// What `rate_cell` answers.
    Cell,
    /// What `pctl_state` answers.
    State,
}

use Argument::{Boolean, Cell, Flag, Integer, Number, State, Text, Time};

/// The function whose answer depends on tables of prices, and so on the process that works it out.
pub(crate) const COST: &str = "cost";

/// All functions, in the order of the reference.
pub static FUNCTIONS: &[Function] = &[
    Function {
        name: COST,
        call: "cost(model, input_tokens, cached_read_tokens, cached_write_tokens, output_tokens [, at])",
        is_aggregate: false,
        meaning: "What so many tokens of a model cost by the table of prices, in nano-USD (BIGINT), rounded once and half up. \
                  Cached tokens are part of the input; null counts as none of them. Without `at` the prices of now hold, with it \
                  those of that moment. Null where the model has no price, or input or output is null. Prices for batches, and \
                  those of reasoning, take no part.",
        arguments: &[Text, Integer, Integer, Integer, Integer, Time],
        required: 5,
    },
    Function {
        name: "usd",
        call: "usd(nano_usd)",
        is_aggregate: false,
        meaning: "Nano-USD as USD with nine decimals, exactly (DECIMAL). Null stays null.",
        arguments: &[Integer],
        required: 1,
    },
    Function {
        name: "tps",
        call: "tps(output_tokens, us)",
        is_aggregate: false,
        meaning: "Tokens a second over a time in µs. Null where one of them is null or the time is not above 0.",
        arguments: &[Integer, Integer],
        required: 2,
    },
    Function {
        name: "false_hit_bound",
        call: "false_hit_bound(wrong, trials, confidence)",
        is_aggregate: false,
        meaning: "The most that a rate may be, from 0 to 1, of which `wrong` were found among `trials`: Clopper and Pearson's exact \
                  one-sided bound. `confidence` is a fraction such as 0.95. Null where one of them is null or there was no trial.",
        arguments: &[Integer, Integer, Number],
        required: 3,
    },
    Function {
        name: "cost_per_1k",
        call: "cost_per_1k(nano_usd, tokens)",
        is_aggregate: true,
        meaning: "USD for a thousand tokens: the sum of money over the sum of tokens, and no mean of ratios. Rows where one of the \
                  two is null take no part. Null where no tokens are left.",
        arguments: &[Integer, Integer],
        required: 2,
    },
    Function {
        name: "pctl",
        call: "pctl(x, p)",
        is_aggregate: true,
        meaning: "The percentile of x at the fraction p, a constant from 0 to 1: the smallest value that at least that share of the \
                  values does not exceed. Exact to 10,000 values; beyond, a DDSketch with a relative error of at most 1% for values \
                  that span up to 17 powers of ten, in which what is nearer to 0 than 1e-9 is 0. Nulls, NaN and infinities take no \
                  part. Null without values.",
        arguments: &[Number, Number],
        required: 2,
    },
    Function {
        name: "pctl_state",
        call: "pctl_state(x)",
        is_aggregate: true,
        meaning: "What `pctl_merge` needs to know of x, in at most 801 bytes to 100 values and in about 3 bytes a different value beyond, \
                  as those within 1% of each other are one. Nulls, NaN and infinities take no part. Null without values.",
        arguments: &[Number],
        required: 1,
    },
    Function {
        name: "pctl_merge",
        call: "pctl_merge(state, p)",
        is_aggregate: true,
        meaning: "The percentile at the fraction p of all values behind these states, as `pctl` would tell it: of hours the one of the \
                  week. Exact to 100 values together; beyond, with a relative error of at most 1%. Null without values.",
        arguments: &[State, Number],
        required: 2,
    },
    Function {
        name: "hallucination_rate",
        call: "hallucination_rate(flagged, label [, inclusion_probability])",
        is_aggregate: true,
        meaning: "The share of answers that are wrong, from what a judge flags and people label: a struct of `rate`, `low` and `high` \
                  (95% interval), `method` (prediction_powered or labels_only), `labelled`, `judged` (records), and `naive`, the share that \
                  the judge flags, which is not the rate. `flagged` is true or false or a score from 0 to 1, `label` is true where a \
                  person found the answer wrong and null where nobody looked. Labels must be a random subset, of one judge version. Rows \
                  without a verdict take no part. Without labels `rate` is null.",
        arguments: &[Flag, Boolean, Number],
        required: 2,
    },
    Function {
        name: "rate_cell",
        call: "rate_cell(flagged, label [, inclusion_probability])",
        is_aggregate: true,
        meaning: "The sums of one stratum, for `stratified_rate`; arguments as those of `hallucination_rate`.",
        arguments: &[Flag, Boolean, Number],
        required: 2,
    },
    Function {
        name: "stratified_rate",
        call: "stratified_rate(cell, traffic)",
        is_aggregate: true,
        meaning: "The rate of all traffic from strata, a row each: the sums of `rate_cell`, and how many records the stratum has in the \
                  traffic, not in the sample. A struct as that of `hallucination_rate`. A stratum with traffic and without labels leaves \
                  no rate of the whole.",
        arguments: &[Cell, Integer],
        required: 2,
    },
];

/// Makes all functions known. `now_us` tells the time, in µs since 1970, by which `cost` without `at` looks for a price.
pub fn register(
    registry: &mut dyn FunctionRegistry,
    prices: Option<Arc<Prices>>,
    now_us: fn() -> i64,
) -> Result<()> {
    for function in FUNCTIONS {
        match function.name {
            COST => {
                registry.register_udf(cost(prices.clone(), now_us)?)?;
            }
            "usd" => scalar(registry, function, money::USD, Arc::new(money::usd))?,
            "tps" => scalar(registry, function, DataType::Float64, Arc::new(money::tps))?,
            "false_hit_bound" => {
                scalar(registry, function, DataType::Float64, Arc::new(quality::false_hit_bound))?;
            }
            _ => {
                registry.register_udaf(Arc::new(AggregateUDF::from(aggregate(function)?)))?;
            }
        }
    }
    // Nobody calls these but the planner. A plan that travels names them all the same, and who runs it looks for them here.
    registry.register_udf(state_of_one())?;
    for function in share::functions() {
        registry.register_udaf(Arc::new(AggregateUDF::from(aggregate(function)?)))?;
    }
    Ok(())
}

fn scalar(
    registry: &mut dyn FunctionRegistry,
    function: &'static Function,
    returns: DataType,
    apply: Apply,
) -> Result<()> {
    let signature = Signature::user_defined(Volatility::Immutable);
    let udf = ScalarUDF::from(Scalar { function, signature, returns, apply, prices: None });
    registry.register_udf(Arc::new(udf))?;
    Ok(())
}

/// `cost` by these prices.
pub(crate) fn cost(prices: Option<Arc<Prices>>, now_us: fn() -> i64) -> Result<Arc<ScalarUDF>> {
    by_prices(prices.as_deref().map(Prices::hash), money::cost(prices, now_us))
}

/// `cost` by the prices of this hash, in a process that passes it on, or has others.
pub(crate) fn cost_elsewhere(prices: blake3::Hash) -> Result<Arc<ScalarUDF>> {
    let refuses = |_: &[ArrayRef]| {
        exec_err!(
            "an executor has other tables of prices than who asks, or none; start it with the same --prices"
        )
    };
    by_prices(Some(prices), Arc::new(refuses))
}

fn by_prices(prices: Option<blake3::Hash>, apply: Apply) -> Result<Arc<ScalarUDF>> {
    let Some(function) = FUNCTIONS.iter().find(|function| function.name == COST) else {
        return internal_err!("{COST} is not listed");
    };
    // Prices hold from a moment on: within one query alike, over two perhaps not.
    let signature = Signature::user_defined(Volatility::Stable);
    let returns = DataType::Int64;
    Ok(Arc::new(ScalarUDF::from(Scalar { function, signature, returns, apply, prices })))
}

/// By which tables of prices a function answers; none where it needs none, or has none.
pub(crate) fn prices_of(function: &ScalarUDF) -> Option<blake3::Hash> {
    function.inner().downcast_ref::<Scalar>()?.prices
}

/// What `cost` says without prices.
pub(crate) fn without_prices<T>() -> Result<T> {
    plan_err!(
        "cost has no table of prices; name one as setting prices or FOREBAY_PRICES (prices.json, in LiteLLM's form)"
    )
}

fn aggregate(function: &'static Function) -> Result<Aggregate> {
    let (returns, state, start): (_, fn() -> Vec<Field>, Start) = match function.name {
        "cost_per_1k" => (DataType::Float64, money::ratio_state, money::ratio),
        "pctl" | "pctl_merge" => (DataType::Float64, pctl::state, pctl::accumulator),
        "pctl_state" => (DataType::BinaryView, pctl::state, pctl::accumulator),
        "pctls" | "pctls_merge" => (pctl::answers(), pctl::state, pctl::accumulator),
        "hallucination_rate" => (quality::rate_type(), quality::cell_state, quality::rate),
        "rate_cell" => (quality::cell_type(), quality::cell_state, quality::cell),
        "stratified_rate" => (quality::rate_type(), quality::strata_state, quality::strata),
        name => return plan_err!("function {name} is listed and not written"),
    };
    let grouped: Option<Grouped> = match function.name {
        "cost_per_1k" => Some(money::ratios),
        name if name.starts_with("pctl") => Some(pctl::groups),
        _ => None,
    };
    let signature = Signature::user_defined(Volatility::Immutable);
    Ok(Aggregate { function, signature, returns, state, start, grouped })
}

/// `pctl_state` of one row alone: for what puts a row in the place of a group.
pub(crate) fn state_of_one() -> Arc<ScalarUDF> {
    static FUNCTION: Function = Function {
        name: "pctl_state_of_one",
        call: "pctl_state_of_one(x)",
        is_aggregate: false,
        meaning: "What `pctl_state` answers of this value alone.",
        arguments: &[Number],
        required: 1,
    };
    let signature = Signature::user_defined(Volatility::Immutable);
    let (returns, apply) = (DataType::BinaryView, Arc::new(pctl::state_of_one));
    Arc::new(ScalarUDF::from(Scalar { function: &FUNCTION, signature, returns, apply, prices: None }))
}

impl Function {
    /// The types that the arguments are cast to, or what is wrong with them.
    fn coerce(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        let (call, most) = (self.call, self.arguments.len());
        if given.len() < self.required || given.len() > most {
            let wanted =
                if self.required == most { most.to_string() } else { format!("{} or {most}", self.required) };
            return plan_err!("{call} takes {wanted} arguments; {} were given", given.len());
        }
        let mut types = Vec::with_capacity(given.len());
        for (number, (argument, given)) in self.arguments.iter().zip(given).enumerate() {
            match argument.cast(given) {
                Some(cast) => types.push(cast),
                None => {
                    let (number, wanted) = (number + 1, argument.wanted());
                    return plan_err!("{call}: argument {number} is of type {given}; it must be {wanted}");
                }
            }
        }
        Ok(types)
    }
}

impl Argument {
    /// The type that this one is cast to; none where it does not fit.
    fn cast(self, given: &DataType) -> Option<DataType> {
        let fits = match self {
            Integer => given.is_integer(),
            Number => given.is_numeric(),
            Text => is_text(given),
            Boolean => matches!(given, DataType::Boolean),
            Flag => matches!(given, DataType::Boolean) || given.is_numeric(),
            // A literal such as '2026-11-01' is text.
            Time => given.is_temporal() || is_text(given),
            Cell => *given == quality::cell_type(),
            State => given.is_binary(),
        };
        (fits || given.is_null()).then(|| match self {
            Integer => DataType::Int64,
            Number | Flag => DataType::Float64,
            Text => DataType::Utf8,
            Boolean => DataType::Boolean,
            Time => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Cell => quality::cell_type(),
            // As the tables are read: a state of one value lies in the view itself.
            State => DataType::BinaryView,
        })
    }

    fn wanted(self) -> &'static str {
        match self {
            Integer => "a whole number; write CAST(x AS BIGINT) where rounding is meant",
            Number => "a number",
            Text => "text",
            Boolean => "true or false; write x = 1 where it is a number",
            Flag => "true or false, or a score from 0 to 1",
            Time => "a time",
            Cell => "what rate_cell answers",
            State => "what pctl_state answers",
        }
    }
}

fn is_text(given: &DataType) -> bool {
    match given {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => is_text(values),
        _ => false,
    }
}

type Apply = Arc<dyn Fn(&[ArrayRef]) -> Result<ArrayRef> + Send + Sync>;
type Start = fn(&Function, &AccumulatorArgs) -> Result<Box<dyn Accumulator>>;
type Grouped = fn(&Function, &AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>>;

/// A function of one row.
struct Scalar {
    function: &'static Function,
    signature: Signature,
    returns: DataType,
    apply: Apply,
    /// By which tables of prices it answers, if by any.
    prices: Option<blake3::Hash>,
}

impl ScalarUDFImpl for Scalar {
    fn name(&self) -> &str {
        self.function.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(self.returns.clone())
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        self.function.coerce(given)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let is_constant = arguments.args.iter().all(|argument| matches!(argument, ColumnarValue::Scalar(_)));
        // A constant is worked out once, not once a row.
        let rows = if is_constant { 1 } else { arguments.number_rows };
        let columns: Vec<ArrayRef> =
            arguments.args.iter().map(|argument| argument.to_array(rows)).collect::<Result<_>>()?;
        let answer = (self.apply)(&columns)?;
        Ok(if is_constant {
            ColumnarValue::Scalar(ScalarValue::try_from_array(&answer, 0)?)
        } else {
            ColumnarValue::Array(answer)
        })
    }
}

/// A function of many rows.
struct Aggregate {
    function: &'static Function,
    signature: Signature,
    returns: DataType,
    state: fn() -> Vec<Field>,
    start: Start,
    /// The same of many groups at once, where there may be many rows.
    grouped: Option<Grouped>,
}

impl AggregateUDFImpl for Aggregate {
    fn name(&self) -> &str {
        self.function.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(self.returns.clone())
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        self.function.coerce(given)
    }

    fn accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        if arguments.is_distinct {
            let name = self.function.name;
            return plan_err!(
                "{name} has no DISTINCT; select the distinct rows in a subquery, and call it on that"
            );
        }
        (self.start)(self.function, &arguments)
    }

    fn groups_accumulator_supported(&self, arguments: AccumulatorArgs) -> bool {
        self.grouped.is_some() && !arguments.is_distinct
    }

    fn create_groups_accumulator(&self, arguments: AccumulatorArgs) -> Result<Box<dyn GroupsAccumulator>> {
        match self.grouped {
            Some(start) => start(self.function, &arguments),
            None => plan_err!("{} is worked out group by group", self.function.name),
        }
    }

    fn state_fields(&self, arguments: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let named = |field: Field| {
            let name = format_state_name(arguments.name, field.name());
            Arc::new(field.with_name(name))
        };
        Ok((self.state)().into_iter().map(named).collect())
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }
}

macro_rules! known_by_name {
    ($($kind:ident),*) => { $(
        impl fmt::Debug for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.function.name)
            }
        }
        // Within a session a name is one function.
        impl PartialEq for $kind {
            fn eq(&self, other: &Self) -> bool {
                self.function.name == other.function.name
            }
        }
        impl Eq for $kind {}
        impl Hash for $kind {
            fn hash<H: Hasher>(&self, state: &mut H) {
                self.function.name.hash(state);
            }
        }
    )* };
}
known_by_name!(Scalar, Aggregate);

/// A count that goes into a column of BIGINT.
fn bigint(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A count out of a column of BIGINT.
fn count(function: &str, name: &str, value: i64) -> Result<u64> {
    match u64::try_from(value) {
        Ok(count) => Ok(count),
        Err(_) => exec_err!("{function}: {name} is {value}; it must be 0 or more"),
    }
}

#[cfg(test)]
mod tests;
