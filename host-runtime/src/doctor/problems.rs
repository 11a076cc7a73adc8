//! Reports the problems of guests that the agent has recorded.

use super::{Host, Report};

/// Maximum number of problems that are shown.
const MAX_SHOWN: usize = 10;

pub(super) fn check(host: &Host, report: &Report) {
    let Ok(store) = host.store() else { return };
    match store.problems() {
        Ok(problems) if problems.is_empty() => report.ok("no guest has an open problem"),
        Ok(problems) => {
            for problem in problems.iter().take(MAX_SHOWN) {
                report.warn(
                    format!("{}: {}: {}", problem.domain, problem.about, problem.what),
                    "fix the problem above; 'virt-usb claims' shows it too",
                );
            }
            if let Some(more) = problems.len().checked_sub(MAX_SHOWN).filter(|more| *more > 0) {
                report.warn(format!("{more} more"), "'virt-usb claims' shows all");
            }
        }
        Err(e) => report.broken(e, "'virt-usb store check' shows details"),
    }
}
