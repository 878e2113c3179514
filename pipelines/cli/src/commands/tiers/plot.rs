//! Draws the curve of cost and quality: in the terminal, and as an SVG.

use super::curve::{Point, float};
use std::fmt::Write as _;

/// Cells of the terminal, without the axes.
const COLUMNS: usize = 60;
const ROWS: usize = 14;
/// The drawing, in pixels, and what its axes take.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const MARGIN: f64 = 64.0;

/// From values to parts of an axis.
struct Scale {
    from: f64,
    to: f64,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let (from, to) =
            values.fold((f64::MAX, f64::MIN), |(from, to), value| (from.min(value), to.max(value)));
        // A single value stands in the middle.
        let room = if to > from { (to - from) * 0.05 } else { to.abs().max(1.0) * 0.05 };
        Self { from: from - room, to: to + room }
    }

    fn part(&self, value: f64) -> f64 {
        (value - self.from) / (self.to - self.from)
    }

    /// The cell of so many that a value lies in.
    fn cell(&self, value: f64, cells: usize) -> usize {
        let part = self.part(value) * float(cells);
        (0..cells).rev().find(|cell| float(*cell) <= part).unwrap_or(0)
    }
}

/// A thousand requests, in dollars.
pub fn dollars(nano_usd: f64) -> f64 {
    nano_usd * 1_000.0 / 1e9
}

/// The curve in characters: a point for each choice, and a diamond for the one that is recommended.
pub fn text(points: &[Point], recommended: Option<usize>) -> String {
    let costs = Scale::of(points.iter().map(|point| dollars(point.cost)));
    let qualities = Scale::of(points.iter().map(|point| point.quality));
    let mut cells = vec![vec![' '; COLUMNS]; ROWS];
    for (at, point) in points.iter().enumerate() {
        let (row, column) = (qualities.cell(point.quality, ROWS), costs.cell(dollars(point.cost), COLUMNS));
        if let Some(cell) = cells.get_mut(row).and_then(|row| row.get_mut(column))
            && *cell != '◆'
        {
            *cell = if recommended == Some(at) { '◆' } else { '●' };
        }
    }
    let mut drawn = String::from("quality\n");
    for (row, line) in cells.iter().enumerate().rev() {
        let label = match row {
            0 => format!("{:.3}", qualities.from),
            row if row + 1 == ROWS => format!("{:.3}", qualities.to),
            _ => String::new(),
        };
        let line: String = line.iter().collect();
        // Writing to a String cannot fail.
        _ = writeln!(drawn, "{label:>7} │{}", line.trim_end());
    }
    _ = writeln!(drawn, "{:>7} └{}", "", "─".repeat(COLUMNS));
    let (left, right) = (format!("{:.4}", costs.from.max(0.0)), format!("{:.4} USD/1,000", costs.to));
    _ = write!(drawn, "{:>9}{left}{right:>1$}", "", COLUMNS.saturating_sub(left.len()));
    drawn
}

/// The same as a drawing of its own.
pub fn svg(points: &[Point], recommended: Option<usize>) -> String {
    let costs = Scale::of(points.iter().map(|point| dollars(point.cost)));
    let qualities = Scale::of(points.iter().flat_map(|point| [point.low, point.high]));
    let x = |point: &Point| MARGIN + costs.part(dollars(point.cost)) * (WIDTH - 2.0 * MARGIN);
    let y = |quality: f64| HEIGHT - MARGIN - qualities.part(quality) * (HEIGHT - 2.0 * MARGIN);
    let (bottom, right) = (HEIGHT - MARGIN, WIDTH - MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <path d=\"M{MARGIN} {MARGIN}V{bottom}H{right}\" fill=\"none\" stroke=\"black\"/>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">USD for 1,000 requests</text>\n\
         <text x=\"{MARGIN}\" y=\"{:.1}\">quality, with the interval of 95 in 100</text>\n",
        WIDTH / 2.0,
        HEIGHT - 16.0,
        MARGIN - 16.0
    );
    // Four marks on each axis. Writing to a String cannot fail.
    for mark in 0..=4 {
        let part = f64::from(mark) / 4.0;
        let cost = costs.from + part * (costs.to - costs.from);
        let quality = qualities.from + part * (qualities.to - qualities.from);
        let at = MARGIN + part * (WIDTH - 2.0 * MARGIN);
        _ = writeln!(
            svg,
            "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{cost:.4}</text>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{quality:.3}</text>",
            bottom + 18.0,
            MARGIN - 6.0,
            y(quality) + 4.0
        );
    }
    let line: Vec<_> =
        points.iter().map(|point| format!("{:.1},{:.1}", x(point), y(point.quality))).collect();
    _ = writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"#2b6cb0\"/>", line.join(" "));
    for (at, point) in points.iter().enumerate() {
        let (radius, fill) = if recommended == Some(at) { (6, "#c53030") } else { (3, "#2b6cb0") };
        _ = writeln!(
            svg,
            "<path d=\"M{0:.1} {1:.1}V{2:.1}\" stroke=\"#90cdf4\"/>\
             <circle cx=\"{0:.1}\" cy=\"{3:.1}\" r=\"{radius}\" fill=\"{fill}\"/>",
            x(point),
            y(point.low),
            y(point.high),
            y(point.quality)
        );
    }
    svg + "</svg>\n"
}
