//! What was measured, as a table and as JSON.

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// The figures of one chain in one round.
pub struct Measured {
    pub requests_per_s: f64,
    pub requests_per_cpu_s: f64,
    /// Of Apache Kafka, where that is the log.
    pub broker_cpu_ms_per_request: Option<f64>,
    /// Processors that the chain takes at the low rate.
    pub cpu_at_rest: f64,
    pub latency_us: Histogram<u64>,
}

/// One chain over all rounds.
pub struct Row {
    pub log: &'static str,
    pub chain: &'static str,
    /// The row of `chain` that this one is compared with.
    pub beside: Option<&'static str>,
    pub rounds: Vec<Measured>,
}

/// The least, the middle and the greatest.
#[derive(Clone, Copy)]
struct Spread([f64; 3]);

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self([at(0), at(values.len() / 2), at(values.len().saturating_sub(1))])
    }

    fn shown(self, decimals: usize) -> String {
        let [min, median, max] = self.0;
        format!("{median:.decimals$} ({min:.decimals$}–{max:.decimals$})")
    }

    fn json(self) -> Value {
        let [min, median, max] = self.0;
        json!({"min": min, "median": median, "max": max})
    }
}

impl Row {
    fn spread(&self, of: impl Fn(&Measured) -> f64) -> Spread {
        Spread::of(self.rounds.iter().map(of))
    }

    /// Requests per CPU-second, as a part of what the other row reaches in the same round.
    fn ratio(&self, rows: &[Self]) -> Option<Spread> {
        let other = rows.iter().find(|row| row.log == self.log && Some(row.chain) == self.beside)?;
        let pairs = self.rounds.iter().zip(&other.rounds);
        Some(Spread::of(pairs.map(|(own, bare)| own.requests_per_cpu_s / bare.requests_per_cpu_s)))
    }

    /// A quantile of latency in milliseconds, round by round: one round that the machine disturbed stands out and no more.
    fn latency_ms(&self, quantile: f64) -> Spread {
        self.spread(|round| milliseconds(round.latency_us.value_at_quantile(quantile)))
    }

    /// The same of all rounds together, for a quantile that one round has too few requests for.
    fn latency_of_all_ms(&self, quantile: f64) -> f64 {
        let mut all = Histogram::<u64>::new(3).expect("a histogram");
        for round in &self.rounds {
            all.add(&round.latency_us).expect("alike histograms");
        }
        milliseconds(all.value_at_quantile(quantile))
    }
}

/// Microseconds as milliseconds.
pub fn milliseconds(us: u64) -> f64 {
    f64::from(u32::try_from(us).unwrap_or(u32::MAX)) / 1000.0
}

/// The rows as Markdown, median (least–greatest).
pub fn table(rows: &[Row]) -> String {
    let mut table = String::from(
        "| Log | Chain | requests/s | requests per CPU-s | of bare | Kafka's CPU ms per request | CPUs at the low rate | p50 ms | p99 ms | p99.9 ms |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let ratio = row.ratio(rows).map_or_else(|| "1".to_owned(), |ratio| ratio.shown(2));
        let broker = row.rounds.iter().filter_map(|round| round.broker_cpu_ms_per_request);
        let broker: Vec<_> = broker.collect();
        let broker = match broker.is_empty() {
            true => "in process".to_owned(),
            false => Spread::of(broker.into_iter()).shown(2),
        };
        table += &format!(
            "| {} | {} | {} | {} | {ratio} | {broker} | {} | {} | {} | {:.1} |\n",
            row.log,
            row.chain,
            row.spread(|round| round.requests_per_s).shown(0),
            row.spread(|round| round.requests_per_cpu_s).shown(0),
            row.spread(|round| round.cpu_at_rest).shown(3),
            row.latency_ms(0.5).shown(1),
            row.latency_ms(0.99).shown(1),
            row.latency_of_all_ms(0.999),
        );
    }
    table
}

/// The rows for a program.
pub fn json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        json!({
            "log": row.log,
            "chain": row.chain,
            "beside": row.beside,
            "rounds": row.rounds.len(),
            "requests_per_s": row.spread(|round| round.requests_per_s).json(),
            "requests_per_cpu_s": row.spread(|round| round.requests_per_cpu_s).json(),
            "ratio": row.ratio(rows).map(Spread::json),
            "broker_cpu_ms_per_request":
                row.spread(|round| round.broker_cpu_ms_per_request.unwrap_or(f64::NAN)).json(),
            "cpus_at_low_rate": row.spread(|round| round.cpu_at_rest).json(),
            "latency_ms": {
                "p50": row.latency_ms(0.5).json(),
                "p99": row.latency_ms(0.99).json(),
                "p99.9 of all rounds": row.latency_of_all_ms(0.999),
                "max of all rounds": row.latency_of_all_ms(1.0),
            },
        })
    };
    Value::Array(rows.iter().map(row).collect())
}
