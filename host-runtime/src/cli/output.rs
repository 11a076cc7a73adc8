//! Output to stdout and stderr.

use std::io::{self, Write};

use anyhow::Context as _;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use virt_usb_model::{clean, clean_json, clean_lines};

/// Tables for people, JSON for programs.
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) const fn new(json: bool) -> Self {
        Self { json }
    }

    pub(super) const fn is_json(&self) -> bool {
        self.json
    }

    /// Prints `value` as JSON with `--json`, otherwise the result of `text`.
    pub(super) fn show(
        &self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let shown = if self.json {
            clean_json(&serde_json::to_string_pretty(value)?)
        } else {
            clean_lines(&text())
        };
        self.raw(format!("{}\n", shown.trim_end()).as_bytes())
    }

    /// Prints a line for people; nothing with `--json`.
    pub(super) fn line(&self, text: &str) -> anyhow::Result<()> {
        if self.json {
            Ok(())
        } else {
            self.raw(format!("{}\n", clean_lines(text).trim_end()).as_bytes())
        }
    }

    /// Prints `value` with `--json`; otherwise nothing, because the lines were printed already.
    pub(super) fn json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        if self.json { self.show(value, String::new) } else { Ok(()) }
    }

    pub(super) fn raw(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).context("cannot write the output")
    }
}

/// Writes one line to stderr.
pub(super) fn complain(text: &str) {
    // The reader of the output closed it: there is no one to report to.
    drop(writeln!(io::stderr(), "{}", clean(text)));
}

/// Formats a table that fits the terminal; returns `empty` if it has no rows.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>, empty: &str) -> String {
    if rows.is_empty() {
        return empty.to_owned();
    }
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header)
        .add_rows(rows);
    // The last column is padded, too: remove the white space at the ends of lines.
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Formats a cell that may be empty.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}
