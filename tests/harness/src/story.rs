//! Formats the results for people.

use std::io::{self, Write};

use serde_json::Value;

use crate::diff;
use crate::domain::Domain;
use crate::lifecycle::Event;
use crate::record::{
    CallOutcome, CallRecord, Expect, Outcome, OutputFate, Play, ProductRun, Report,
};

/// Colours, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paint(pub bool);

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(crate) fn cyan(self, text: &str) -> String {
        self.with("36", text)
    }

    fn dim(self, text: &str) -> String {
        self.with("2", text)
    }
}

/// Tells each event as it comes.
pub struct Story<'a> {
    out: &'a mut dyn Write,
    paint: Paint,
}

impl<'a> Story<'a> {
    /// A story that goes to `out`.
    pub fn new(out: &'a mut dyn Write, paint: Paint) -> Self {
        Self { out, paint }
    }

    /// Tells one event.
    ///
    /// # Errors
    /// When the reader is gone.
    pub fn tell(&mut self, event: &Event<'_>) -> io::Result<()> {
        match event {
            Event::Begin { action, say, domain } => self.begin(action, *say, *domain),
            Event::Called(call) => self.called(call),
            Event::End(play) => self.end(play),
        }?;
        self.out.flush()
    }

    /// Says a line of its own.
    ///
    /// # Errors
    /// When the reader is gone.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.out, "{line}")
    }

    /// Ends the story.
    ///
    /// # Errors
    /// When the reader is gone.
    pub fn close(&mut self, report: &Report) -> io::Result<()> {
        // A difference from libvirtd may explain a failure, and is harmless otherwise.
        if report.verdict == CallOutcome::NotAsExpected {
            for difference in &report.differences {
                writeln!(self.out, "{}", self.paint.dim(&format!("note: {difference}")))?;
            }
        }
        let wrong = report.plays.iter().filter(|play| play.problem.is_some());
        let line = match report.verdict {
            CallOutcome::AsExpected => self.paint.green("all as expected"),
            CallOutcome::NotAsExpected => {
                let steps = wrong
                    .map(|play| format!("{} ({})", play.step, play.action))
                    .collect::<Vec<_>>();
                self.paint.red(&format!("not as expected: step {}", steps.join(", ")))
            }
        };
        writeln!(self.out, "{line}")?;
        self.out.flush()
    }

    fn begin(
        &mut self,
        action: &str,
        say: Option<&str>,
        domain: Option<&Domain>,
    ) -> io::Result<()> {
        if let Some(say) = say {
            writeln!(self.out, "{}", self.paint.dim(&format!("# {say}")))?;
        }
        let title = match domain {
            None => action.to_owned(),
            Some(Domain { name, uuid: None, .. }) => format!("{action} {name}"),
            Some(Domain { name, uuid: Some(uuid), .. }) => format!("{action} {name} ({uuid})"),
        };
        writeln!(self.out, "{}", self.paint.bold(&title))
    }

    fn called(&mut self, call: &CallRecord) -> io::Result<()> {
        let args = call.args.iter().rev().take(3).rev().cloned().collect::<Vec<_>>().join(" ");
        let ended = match (&call.hang, call.exit, call.signal) {
            (Some(_), ..) => self.paint.red("no end"),
            (None, Some(0), _) => self.paint.green("exit 0"),
            (None, Some(code), _) => self.paint.red(&format!("exit {code}")),
            (None, None, signal) => {
                self.paint.red(&format!("signal {}", signal.unwrap_or_default()))
            }
        };
        let file = call
            .hook
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        writeln!(
            self.out,
            "  {args:<24} {:>9}  {ended}  {}",
            time(call.duration_us),
            self.paint.dim(&file)
        )?;
        if let Some(message) = &call.message {
            message
                .lines()
                .try_for_each(|line| writeln!(self.out, "      {}", self.paint.red(line)))?;
        } else if !call.stderr.trim().is_empty() {
            writeln!(self.out, "      stderr, which libvirt shows on failure only:")?;
            call.stderr.lines().try_for_each(|line| writeln!(self.out, "        {line}"))?;
        }
        self.printed(call)
    }

    fn printed(&mut self, call: &CallRecord) -> io::Result<()> {
        let fate = match (call.output, call.op.as_str()) {
            (OutputFate::None, _) => return Ok(()),
            (OutputFate::Unchanged, _) => {
                return writeln!(self.out, "      printed nothing: the XML stays as it is");
            }
            (OutputFate::Used, _) => "printed XML, which is used from here on:",
            (OutputFate::Refused, _) => "printed XML, which libvirt refuses:",
            (OutputFate::Discarded, "prepare") => {
                "printed XML; libvirt discards this, a caller with a filter contract starts it \
                    (--caller filter):"
            }
            (OutputFate::Discarded, _) => "printed XML; libvirt discards this:",
        };
        if !call.stdout.trim_start().starts_with('<') {
            let first = call.stdout.trim().lines().next().unwrap_or_default();
            let size = call.stdout.len();
            return writeln!(
                self.out,
                "      {} {size} bytes that are no XML: {first}",
                self.paint.red("printed")
            );
        }
        if call.stdout == call.stdin {
            return writeln!(self.out, "      printed the XML as it was");
        }
        writeln!(self.out, "      {fate}")?;
        let names = ("as the hook was given it", "as the hook printed it");
        diff::unified(self.out, self.paint, "      ", (&call.stdin, &call.stdout), names)
    }

    fn end(&mut self, play: &Play) -> io::Result<()> {
        if let Some(run) = &play.product {
            self.product(run)?;
        }
        for remark in &play.remarks {
            writeln!(self.out, "  {remark}")?;
        }
        if let (Some(before), Some(after)) = (&play.claims_before, &play.claims_after) {
            self.claims(before, after)?;
        }
        let line = match (&play.problem, &play.outcome, play.expected.outcome) {
            (Some(_), Outcome::Refused { op, message }, Expect::Ok) if is_shown(play, message) => {
                self.paint.red(&format!("not as expected: {op} was refused, as shown above"))
            }
            (Some(problem), ..) => self.paint.red(&format!("not as expected: {problem}")),
            (None, Outcome::Refused { .. }, _) => self.paint.green("refused, as expected"),
            (None, Outcome::Done, Expect::Ok | Expect::Veto) => self.paint.green("done"),
        };
        writeln!(self.out, "  {line}\n")
    }

    fn product(&mut self, run: &ProductRun) -> io::Result<()> {
        let exit = run.exit.map_or_else(|| "signal".to_owned(), |code| format!("exit {code}"));
        writeln!(self.out, "  virt-usb {}  {}  {exit}", run.args.join(" "), time(run.duration_us))?;
        for line in run.stdout.lines().chain(run.stderr.lines()) {
            writeln!(self.out, "      {line}")?;
        }
        Ok(())
    }

    fn claims(&mut self, before: &Value, after: &Value) -> io::Result<()> {
        if before == after {
            return self.table("claims, before and after", after);
        }
        self.table("claims before", before)?;
        self.table("claims after", after)
    }

    fn table(&mut self, title: &str, claims: &Value) -> io::Result<()> {
        let rows = rows(claims);
        if rows.len() < 2 {
            return writeln!(self.out, "  {title}: none");
        }
        writeln!(self.out, "  {title}:")?;
        let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max()
        };
        let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
        for row in &rows {
            let cells: Vec<_> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(self.out, "      {}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Whether the calls of the step, or the run of `virt-usb`, have already shown the message.
fn is_shown(play: &Play, message: &str) -> bool {
    play.calls.iter().filter_map(|call| call.message.as_deref()).any(|shown| shown == message)
        || play.product.as_ref().is_some_and(|run| run.stderr.trim() == message)
}

/// Milliseconds, as people read them.
fn time(microseconds: u128) -> String {
    format!("{}.{} ms", microseconds / 1000, microseconds % 1000 / 100)
}

/// The columns that say most about a claim; what a document has of them is shown.
const COLUMNS: [&str; 7] =
    ["device_id", "address", "domain", "instance_uuid", "state", "pending", "hold"];

/// A header and a row for each claim.
fn rows(claims: &Value) -> Vec<Vec<String>> {
    let list = claims.as_array().or_else(|| claims.get("claims")?.as_array());
    let objects: Vec<_> = list.into_iter().flatten().filter_map(Value::as_object).collect();
    let known: Vec<_> = COLUMNS
        .into_iter()
        .filter(|key| objects.iter().any(|o| o.get(*key).is_some_and(|v| !v.is_null())))
        .collect();
    let header = known.iter().map(|key| (*key).to_owned()).collect();
    let cell = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let body =
        objects.iter().map(|object| known.iter().map(|key| cell(object.get(*key))).collect());
    std::iter::once(header).chain(body).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_become_rows() {
        let claims =
            serde_json::json!([{"device_id": 5, "instance_uuid": "u", "domain": null, "odd": 1}]);
        assert_eq!(rows(&claims), [vec!["device_id", "instance_uuid"], vec!["5", "u"]]);
        assert_eq!(rows(&serde_json::json!({"claims": []})).len(), 1);
    }

    #[test]
    fn times_are_milliseconds() {
        assert_eq!(time(1_234), "1.2 ms");
        assert_eq!(time(30_000_999), "30000.9 ms");
    }
}
