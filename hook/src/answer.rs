//! The answer to the caller (output, message, exit status) and the outcome for the record.

use std::io::{self, Write};

/// Complete result of a call for the caller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// The rewritten XML to print. `None`: the XML is unchanged, and nothing is printed.
    pub xml: Option<Vec<u8>>,
    /// One line with the reason of a refusal. `None`: the domain is accepted.
    pub refusal: Option<String>,
    /// Warnings for the operator about a domain that was accepted, for the record and for stderr.
    pub warnings: Vec<String>,
    /// Actions of the call, for the record: `claimed 5, 7`.
    pub did: String,
}

impl Answer {
    /// Accepts the domain without changes.
    pub fn unchanged(did: impl Into<String>) -> Self {
        Self { did: did.into(), ..Self::default() }
    }

    /// Refuses the domain.
    pub fn refused(why: impl Into<String>) -> Self {
        Self { refusal: Some(one_line(&why.into())), did: "refused".into(), ..Self::default() }
    }

    /// Adds a warning.
    #[must_use]
    pub fn warn(mut self, warning: impl Into<String>) -> Self {
        self.warnings.push(one_line(&warning.into()));
        self
    }

    /// Adds a warning, unless the answer contains it already.
    #[must_use]
    pub(crate) fn warn_once(self, warning: &str) -> Self {
        let clean = one_line(warning);
        let is_known = self.refusal.iter().chain(&self.warnings).any(|text| text.contains(&clean));
        if is_known { self } else { self.warn(clean) }
    }

    /// Exit status: 0 accepted, 1 refused.
    pub const fn exit(&self) -> u8 {
        if self.refusal.is_some() { 1 } else { 0 }
    }

    /// Writes the XML and the messages. A refusal prints no XML.
    ///
    /// # Errors
    /// If the XML cannot be written completely. The caller must then not use it.
    pub fn deliver(&self, mut stdout: impl Write, mut stderr: impl Write) -> io::Result<()> {
        // libvirt shows all of stderr to the user, so a refusal prints one line. The warnings are
        // in the record.
        if let Some(why) = &self.refusal {
            drop(stderr.write_all(format!("virt-usb: {why}\n").as_bytes()));
            return Ok(());
        }
        let warnings: String =
            self.warnings.iter().map(|w| format!("virt-usb: warning: {w}\n")).collect();
        drop(stderr.write_all(warnings.as_bytes()));
        match &self.xml {
            Some(xml) => stdout.write_all(xml).and_then(|()| stdout.flush()),
            None => Ok(()),
        }
    }
}

/// Maximum length of a message in bytes. libvirt shows about 1000, including its own words.
const MAX_MESSAGE_BYTES: usize = 760;

/// Cleans a message: one line without control characters, because names come from users. Shortens a
/// long message in the middle, because its end contains the advice.
fn one_line(text: &str) -> String {
    let clean = virt_usb_model::clean(text);
    if clean.len() <= MAX_MESSAGE_BYTES {
        return clean;
    }
    let head = clean.floor_char_boundary(MAX_MESSAGE_BYTES * 2 / 3);
    let tail = clean.ceil_char_boundary(clean.len() - MAX_MESSAGE_BYTES / 3 + 4);
    format!("{}…{}", &clean[..head], &clean[tail..])
}
