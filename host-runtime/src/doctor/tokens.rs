//! Checks the file of the API's tokens.

use crate::api::tokens::TokenFile;

use super::{Host, Report};

pub(super) fn check(host: &Host, report: &Report) {
    match TokenFile::new(&host.config.state_dir).entries() {
        Ok(_) => report.ok("the API's tokens can be read"),
        Err(e) => {
            report.warn(e, "fix the error above; until then every token in this file is rejected");
        }
    }
}
