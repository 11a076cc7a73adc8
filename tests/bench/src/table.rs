//! Formats the figures as a table for BENCHMARKS.md.

use std::fmt;
use std::time::Duration;

use crate::samples::Samples;

/// One figure. All but the ratio are for reading.
struct Row {
    figure: String,
    ours: String,
    yardstick: String,
    ratio: String,
    reach: String,
}

#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// Ours as a multiple of the yardstick, by the medians and by the least of each.
    pub(crate) fn multiple(
        &mut self,
        figure: &str,
        ours: &Samples,
        yardstick: (&str, &Samples),
        reach: &str,
    ) {
        self.compare(
            figure,
            ours,
            yardstick,
            |ours, theirs| format!("{:.2} ×", ratio(ours, theirs)),
            reach,
        );
    }

    /// The yardstick as a multiple of ours: how much faster we are.
    pub(crate) fn faster(
        &mut self,
        figure: &str,
        ours: &Samples,
        yardstick: (&str, &Samples),
        reach: &str,
    ) {
        self.compare(
            figure,
            ours,
            yardstick,
            |ours, theirs| format!("1 / {:.1}", ratio(theirs, ours)),
            reach,
        );
    }

    fn compare(
        &mut self,
        figure: &str,
        ours: &Samples,
        (name, theirs): (&str, &Samples),
        show: impl Fn(Duration, Duration) -> String,
        reach: &str,
    ) {
        let ratio = format!(
            "{} (min {})",
            show(ours.median(), theirs.median()),
            show(ours.min(), theirs.min())
        );
        self.row(figure, ours, &format!("{name}: {theirs}"), &ratio, reach);
    }

    pub(crate) fn row(
        &mut self,
        figure: &str,
        ours: impl fmt::Display,
        yardstick: &str,
        ratio: &str,
        reach: &str,
    ) {
        let row = Row {
            figure: figure.to_owned(),
            ours: ours.to_string(),
            yardstick: yardstick.to_owned(),
            ratio: ratio.to_owned(),
            reach: reach.to_owned(),
        };
        self.rows.push(row);
    }
}

pub(crate) fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["figure", "ours", "yardstick", "ratio", "to reach"].map(ToOwned::to_owned);
        let rows: Vec<[String; 5]> =
            std::iter::once(head).chain(self.rows.iter().map(Row::cells)).collect();
        let width =
            |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or_default();
        let widths: Vec<usize> = (0..5).map(width).collect();
        for (number, row) in rows.iter().enumerate() {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(f, "| {} |", cells.collect::<Vec<_>>().join(" | "))?;
            if number == 0 {
                let lines: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
                writeln!(f, "| {} |", lines.join(" | "))?;
            }
        }
        Ok(())
    }
}

impl Row {
    fn cells(&self) -> [String; 5] {
        let Self { figure, ours, yardstick, ratio, reach } = self;
        [figure, ours, yardstick, ratio, reach].map(Clone::clone)
    }
}
