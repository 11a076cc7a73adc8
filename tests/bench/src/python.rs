//! The filter asked from Python: one batch call over 10 000 candidates, beside the same rules in
//! plain Python, a host at a time.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::program::Programs;
use crate::table::Table;

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    let root = programs.filter.ancestors().nth(3).context("the filter lies in target/release")?;
    let python = root.join(".cache/embedding/venv/bin/python");
    ensure!(python.exists(), "{} is not there: 'make embedding' makes it", python.display());
    let output =
        Command::new(&python).arg("tests/embedding/compare.py").current_dir(root).output()?;
    ensure!(output.status.success(), "compare.py: {}", String::from_utf8_lossy(&output.stderr));
    let measured: Value =
        serde_json::from_slice(&output.stdout).context("what compare.py prints")?;
    let plain = &measured["pure_python_ms"];
    for form in ["component", "module"] {
        let (least, median) =
            (&measured[format!("{form}_ms")]["least"], &measured[format!("{form}_ms")]["median"]);
        let number =
            |value: &Value| value.as_f64().with_context(|| format!("no number: {measured}"));
        let ratio = number(&plain["least"])? / number(least)?;
        table.row(
            &format!("filter from Python, the {form}: 10 000 candidates in one call"),
            format!("{:.2} ms (median {:.2} ms)", number(least)?, number(median)?),
            &format!("plain Python, a host at a time: {:.1} ms", number(&plain["least"])?),
            &format!("1 / {ratio:.0}"),
            "≤ 5 ms, ≤ 1 / 50",
        );
    }
    Ok(())
}
