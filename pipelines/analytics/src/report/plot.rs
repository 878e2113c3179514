//! A plot as SVG: bars in pieces, or lines with the bands that they may lie in.
//!
//! Invariant: a value that is not known is a gap and never 0, and every mark tells its number to whoever points at it.

use super::escaped;
use std::fmt::Write as _;

/// The size of a plot, and what lies around its area; in units that a browser scales.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 8.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 26.0;
/// About so many lines go across, and so many words stand below.
const TICKS: f64 = 4.0;
const WORDS_MAX: usize = 8;
/// With more points than that a line has no dots.
const DOTS_MAX: usize = 100;

/// What is drawn.
pub(super) struct Plot<'a> {
    /// Tells it from the others on the page.
    pub(super) id: usize,
    pub(super) title: &'a str,
    /// What its values count.
    pub(super) unit: &'a str,
    /// What stands below, from left to right.
    pub(super) along: &'a [String],
    pub(super) series: &'a [Series],
    pub(super) form: Form,
}

/// How it is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Bars,
    Lines,
}

/// Values of one name, one for each place along.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) values: Vec<Option<f64>>,
    /// Between which bounds each value lies, where that is told.
    pub(super) bounds: Vec<Option<(f64, f64)>>,
}

/// From values to places.
struct Scale {
    low: f64,
    high: f64,
    step: f64,
}

impl Scale {
    /// One that holds 0 and all of these, and ends where a line goes across.
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (0.0_f64, 0.0_f64);
        for value in values {
            (low, high) = (low.min(value), high.max(value));
        }
        if low == high {
            high = 1.0;
        }
        let rough = (high - low) / TICKS;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value - self.low) / (self.high - self.low);
        TOP + (1.0 - share) * (HEIGHT - TOP - BOTTOM)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let count = ((self.high - self.low) / self.step).round();
        (0_u8..=20)
            .map(f64::from)
            .take_while(move |number| *number <= count)
            .map(move |number| self.low + number * self.step)
    }
}

/// The plot, with a title and a summary for who hears it.
pub(super) fn svg(plot: &Plot) -> String {
    let Plot { id, title, unit, along, series, form } = plot;
    let sums = sums(plot);
    let values = series.iter().flat_map(|one| {
        let bounds = one.bounds.iter().flatten().flat_map(|(low, high)| [*low, *high]);
        one.values.iter().flatten().copied().chain(bounds)
    });
    let scale = match form {
        Form::Bars => Scale::over(sums.iter().flat_map(|(low, high)| [*low, *high])),
        Form::Lines => Scale::over(values),
    };
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-labelledby=\"t{id} d{id}\"><title id=\"t{id}\">{}</title>\
         <desc id=\"d{id}\">{}</desc>",
        escaped(title),
        escaped(&summary(plot, &scale))
    );
    for tick in scale.ticks() {
        let y = scale.y(tick);
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 4.0,
            short(tick)
        );
    }
    let _ = write!(out, "<text x=\"2\" y=\"10\">{}</text>", escaped(unit));
    let place = (WIDTH - LEFT - RIGHT) / f64::from(u32::try_from(along.len().max(1)).unwrap_or(u32::MAX));
    let x = |index: usize| LEFT + place * (f64::from(u32::try_from(index).unwrap_or(u32::MAX)) + 0.5);
    for (index, word) in along.iter().enumerate().step_by(along.len().div_ceil(WORDS_MAX).max(1)) {
        let (x, y) = (x(index), HEIGHT - 8.0);
        let _ = write!(
            out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{}</text>",
            escaped(&brief(word))
        );
    }
    match form {
        Form::Bars => bars(&mut out, plot, &scale, &x, place * 0.8),
        Form::Lines => lines(&mut out, plot, &scale, &x),
    }
    out.push_str("</svg>");
    out
}

/// What bars come to below and above 0, place by place.
fn sums(plot: &Plot) -> Vec<(f64, f64)> {
    let sum = |index: usize| {
        let values = plot.series.iter().filter_map(|series| series.values.get(index).copied().flatten());
        values.fold((0.0, 0.0), |(low, high), value| (low + value.min(0.0), high + value.max(0.0)))
    };
    (0..plot.along.len()).map(sum).collect()
}

fn summary(plot: &Plot, scale: &Scale) -> String {
    let (first, last) = (plot.along.first(), plot.along.last());
    let names: Vec<_> = plot.series.iter().map(|series| series.name.as_str()).collect();
    format!(
        "From {} to {}, up to {} {}: {}. The numbers are in the table below.",
        first.map_or("", String::as_str),
        last.map_or("", String::as_str),
        short(scale.high),
        plot.unit,
        names.join(", ")
    )
}

fn bars(out: &mut String, plot: &Plot, scale: &Scale, x: &dyn Fn(usize) -> f64, width: f64) {
    for (index, word) in plot.along.iter().enumerate() {
        let (mut below, mut above) = (0.0, 0.0);
        for (number, series) in plot.series.iter().enumerate() {
            let Some(value) = series.values.get(index).copied().flatten().filter(|value| *value != 0.0)
            else {
                continue;
            };
            let from = if value < 0.0 { &mut below } else { &mut above };
            let (start, end) = (scale.y(*from), scale.y(*from + value));
            *from += value;
            let _ = write!(
                out,
                "<rect class=\"s{number}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\"><title>{}</title></rect>",
                x(index) - width / 2.0,
                start.min(end),
                (start - end).abs(),
                told(plot, word, series, value)
            );
        }
    }
}

fn lines(out: &mut String, plot: &Plot, scale: &Scale, x: &dyn Fn(usize) -> f64) {
    for (number, series) in plot.series.iter().enumerate() {
        // Between gaps, so that nothing is drawn where nothing is known.
        for run in runs(&series.bounds) {
            let bounds = || run.clone().filter_map(|index| Some((index, series.bounds[index]?)));
            let there = bounds().map(|(index, (_, high))| format!("{:.1},{:.1}", x(index), scale.y(high)));
            let back: Vec<_> =
                bounds().map(|(index, (low, _))| format!("{:.1},{:.1}", x(index), scale.y(low))).collect();
            let points: Vec<_> = there.chain(back.into_iter().rev()).collect();
            let _ = write!(out, "<polygon class=\"band s{number}\" points=\"{}\"/>", points.join(" "));
        }
        for run in runs(&series.values) {
            let points: Vec<_> = run
                .filter_map(|index| Some(format!("{:.1},{:.1}", x(index), scale.y(series.values[index]?))))
                .collect();
            let _ = write!(out, "<polyline class=\"line s{number}\" points=\"{}\"/>", points.join(" "));
        }
        if plot.along.len() > DOTS_MAX {
            continue;
        }
        for (index, word) in plot.along.iter().enumerate() {
            let Some(value) = series.values.get(index).copied().flatten() else { continue };
            if let Some((low, high)) = series.bounds.get(index).copied().flatten() {
                let (x, low, high) = (x(index), scale.y(low), scale.y(high));
                let _ = write!(
                    out,
                    "<line class=\"whisker s{number}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\"/>"
                );
            }
            let _ = write!(
                out,
                "<circle class=\"s{number}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}</title></circle>",
                x(index),
                scale.y(value),
                told(plot, word, series, value)
            );
        }
    }
}

/// Where values follow each other without a gap.
fn runs<T>(values: &[Option<T>]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (index, _) in values.iter().enumerate().filter(|(_, value)| value.is_some()) {
        match runs.last_mut() {
            Some(run) if run.end == index => run.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

/// What a mark tells.
fn told(plot: &Plot, word: &str, series: &Series, value: f64) -> String {
    escaped(&format!("{word}, {}: {} {}", series.name, short(value), plot.unit))
}

/// A day without its year, an hour without its day's.
fn brief(word: &str) -> String {
    let short = word.get(5..).map(|rest| rest.trim_end_matches(":00:00Z").replace('T', " "));
    short.filter(|_| word.starts_with("20")).unwrap_or_else(|| word.to_owned())
}

/// A number to read at a glance; the table has all of its digits.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    let (scaled, unit) = match size {
        1e9.. => (value / 1e9, "G"),
        1e6.. => (value / 1e6, "M"),
        1e4.. => (value / 1e3, "k"),
        _ => (value, ""),
    };
    // Three digits that count.
    let decimals = if scaled == 0.0 { 0.0 } else { (2.0 - scaled.abs().log10().floor()).clamp(0.0, 9.0) };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 9")]
    let text = format!("{scaled:.*}", decimals as usize);
    let text =
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text.as_str() };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, values: &[Option<f64>]) -> Series {
        Series { name: name.to_owned(), values: values.to_vec(), bounds: Vec::new() }
    }

    fn drawn(series: &[Series], form: Form) -> String {
        let along: Vec<String> =
            (1..=series[0].values.len()).map(|day| format!("2026-11-{day:02}")).collect();
        svg(&Plot { id: 1, title: "t", unit: "USD", along: &along, series, form })
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [0.0, 0.001_234, 1.0, 12.345, 9_999.0, 12_300.0, 4.5e6, -2e9].map(short);
        assert_eq!(numbers, ["0", "0.00123", "1", "12.3", "9999", "12.3k", "4.5M", "-2G"]);
    }

    #[test]
    fn lines_go_across_at_round_numbers_and_hold_all_values() {
        for (values, low, high) in
            [(vec![3.0, 97.0], 0.0, 100.0), (vec![-0.3, 0.4], -0.4, 0.4), (vec![], 0.0, 1.0)]
        {
            let scale = Scale::over(values.into_iter());
            assert!(
                (scale.low - low).abs() < 1e-9 && (scale.high - high).abs() < 1e-9,
                "{} to {}",
                scale.low,
                scale.high
            );
            assert!((3..=7).contains(&scale.ticks().count()));
        }
    }

    #[test]
    fn a_gap_breaks_a_line_and_stands_for_no_bar() {
        let gap = [Some(1.0), None, Some(2.0), Some(3.0)];
        let lines = drawn(&[series("a", &gap)], Form::Lines);
        assert_eq!((lines.matches("<polyline").count(), lines.matches("<circle").count()), (2, 3));
        let bars = drawn(&[series("a", &gap), series("b", &[Some(0.0), Some(-1.0), None, None])], Form::Bars);
        assert_eq!(bars.matches("<rect").count(), 4);
        assert!(bars.contains("2026-11-02, b: -1 USD"), "{bars}");
        assert!(!bars.contains("NaN") && !bars.contains("inf"));
    }

    #[test]
    fn pieces_of_a_bar_stand_on_each_other() {
        let bars = drawn(&[series("a", &[Some(50.0)]), series("b", &[Some(50.0)])], Form::Bars);
        let number = |rect: &str, name: &str| -> f64 {
            rect.split(&format!(" {name}=\"")).nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        let rects: Vec<&str> = bars.split("<rect").skip(1).collect();
        let [lower, upper] = [0, 1].map(|index| (number(rects[index], "y"), number(rects[index], "height")));
        assert!((upper.0 + upper.1 - lower.0).abs() < 0.11 && (upper.1 - lower.1).abs() < 0.11, "{bars}");
    }
}
