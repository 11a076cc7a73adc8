//! Two texts as a unified diff.

use std::io::{self, Write};

use similar::{ChangeTag, TextDiff};

use crate::story::Paint;

/// Writes the difference of two XML texts, three lines of context, each line after `indent`.
///
/// # Errors
/// When `out` takes no more.
pub fn unified(
    out: &mut dyn Write,
    paint: Paint,
    indent: &str,
    (before, after): (&str, &str),
    (old_name, new_name): (&str, &str),
) -> io::Result<()> {
    let diff = TextDiff::from_lines(before, after);
    writeln!(out, "{indent}{}", paint.bold(&format!("--- {old_name}")))?;
    writeln!(out, "{indent}{}", paint.bold(&format!("+++ {new_name}")))?;
    for hunk in diff.unified_diff().context_radius(3).iter_hunks() {
        writeln!(out, "{indent}{}", paint.cyan(&hunk.header().to_string()))?;
        for change in hunk.iter_changes() {
            let line = change.value().trim_end_matches('\n').trim_end_matches('\r');
            let text = format!("{}{line}", change.tag());
            let text = match change.tag() {
                ChangeTag::Delete => paint.red(&text),
                ChangeTag::Insert => paint.green(&text),
                ChangeTag::Equal => text,
            };
            writeln!(out, "{indent}{text}")?;
        }
    }
    Ok(())
}
