//! The answer to the caller (output, message, exit status) and the outcome for the record.

use std::io::{self, Write};

/// The whole effect on the caller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// The XML to use instead; `None`: unchanged, nothing is printed.
    pub xml: Option<Vec<u8>>,
    /// One line that says why the domain is refused; `None`: it is not.
    pub refusal: Option<String>,
    /// Warnings for the operator about a domain that was accepted, for the record and for stderr.
    pub warnings: Vec<String>,
    /// Actions of the call, for the record: `claimed 5, 7`.
    pub did: String,
}

impl Answer {
    /// Nothing to do with us.
    pub fn unchanged(did: impl Into<String>) -> Self {
        Self { did: did.into(), ..Self::default() }
    }

    /// The domain is refused.
    pub fn refused(why: impl Into<String>) -> Self {
        Self { refusal: Some(one_line(&why.into())), did: "refused".into(), ..Self::default() }
    }

    /// The same, with a warning.
    #[must_use]
    pub fn warn(mut self, warning: impl Into<String>) -> Self {
        self.warnings.push(one_line(&warning.into()));
        self
    }

    /// The same, unless the answer says so already.
    #[must_use]
    pub(crate) fn warn_once(self, warning: &str) -> Self {
        let clean = one_line(warning);
        let said = self.refusal.iter().chain(&self.warnings).any(|text| text.contains(&clean));
        if said { self } else { self.warn(clean) }
    }

    /// 0: go on; 1: refused.
    pub const fn exit(&self) -> u8 {
        if self.refusal.is_some() { 1 } else { 0 }
    }

    /// Writes XML and message. A refusal prints no XML.
    ///
    /// # Errors
    /// When the XML cannot be written: half of it must not be taken for all of it.
    pub fn deliver(&self, mut stdout: impl Write, mut stderr: impl Write) -> io::Result<()> {
        // libvirt shows a refusal's whole stderr to the user: that is one line, the record has the
        // rest.
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

/// The longest message, in bytes: libvirt shows about a thousand, its own words included.
const LONGEST: usize = 760;

/// Messages are one line, harmless to a terminal, and short enough to be shown whole: names come
/// from outsiders. What is too long loses its middle: the end says what to do.
fn one_line(text: &str) -> String {
    let clean = virt_usb_model::clean(text);
    if clean.len() <= LONGEST {
        return clean;
    }
    let head = clean.floor_char_boundary(LONGEST * 2 / 3);
    let tail = clean.ceil_char_boundary(clean.len() - LONGEST / 3 + 4);
    format!("{}…{}", &clean[..head], &clean[tail..])
}
