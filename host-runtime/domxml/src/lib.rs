#![doc = include_str!("../README.md")]
//!
//! ## Modules
//!
//! ```text
//! bytes ─ encoding ─► text ─ scan, tag ─► tokens ─ read ─┬─► Domain   (metadata, device,
//! commandline, usb_bus ─ fit)
//!                                                        └─► Layout ─┐
//!                                    bytes ◄─ encoding ─ splices ◄─ edit, style ◄─ Edits
//! ```

mod commandline;
mod device;
mod domain;
mod edit;
mod encoding;
mod error;
mod fit;
mod host_source;
mod metadata;
mod read;
mod scan;
mod style;
mod tag;
mod usb_bus;

pub use domain::{Domain, FlavorSource, Redirdev, UsbHostdev, hostdev_alias, redirdev_alias};
pub use edit::{Edits, Hostdev, redirdev_element};
pub use error::XmlError;
pub use fit::{Fit, TooFew};
pub use host_source::{HostPlace, HostSource};
pub use metadata::NAMESPACE;
pub use usb_bus::{AssignedPort, GuestPort, UsbBus};

use encoding::Decoded;

/// The largest document that is read: 16 MiB. libvirt itself takes no more than that from a client.
pub const MAX_XML: usize = 16 << 20;
/// The deepest nesting of elements: what libxml2, libvirt's parser, allows.
pub const MAX_DEPTH: usize = 256;
/// The most attributes in one tag; a domain's tags have a dozen.
pub const MAX_ATTRIBUTES: usize = 256;
/// The most USB devices and controllers in one domain; a USB bus has 127 addresses.
pub const MAX_USB: usize = 1024;

/// Reads a domain in one pass, in time and memory bounded by its size.
///
/// # Errors
/// [`XmlError`] when the document is not a domain that libvirt could have written.
pub fn read(xml: &[u8]) -> Result<Domain, XmlError> {
    Ok(Text::new(xml)?.read()?.into_domain())
}

/// Makes the changes: [`Text::new`], [`Text::read`] and [`Document::rewrite`] in one.
///
/// # Errors
/// As those.
pub fn rewrite(xml: &[u8], edits: &Edits) -> Result<Option<Vec<u8>>, XmlError> {
    Text::new(xml)?.read()?.rewrite(edits)
}

/// The text of a document, whatever its encoding.
#[derive(Debug)]
pub struct Text<'a>(Decoded<'a>);

impl<'a> Text<'a> {
    /// Decodes the document.
    ///
    /// # Errors
    /// [`XmlError::TooLarge`], and what is wrong with the encoding.
    pub fn new(xml: &'a [u8]) -> Result<Self, XmlError> {
        if xml.len() > MAX_XML {
            Err(XmlError::TooLarge { size: xml.len() })
        } else {
            Decoded::new(xml).map(Self)
        }
    }

    /// Reads the domain, in one pass.
    ///
    /// # Errors
    /// When it is not a domain that libvirt could have written.
    pub fn read(&self) -> Result<Document<'_>, XmlError> {
        let (domain, layout) = read::parse(&self.0.text)?;
        Ok(Document { text: &self.0, domain, layout })
    }
}

/// A domain that was read, and where in the text its parts stand: it can be rewritten without
/// reading it again.
#[derive(Debug)]
pub struct Document<'t> {
    text: &'t Decoded<'t>,
    domain: Domain,
    layout: read::Layout<'t>,
}

impl Document<'_> {
    /// The parsed domain.
    pub const fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Returns the parsed domain without the text.
    pub fn into_domain(self) -> Domain {
        self.domain
    }

    /// Makes the changes; `None` when there is nothing to change.
    ///
    /// Rewrites the document. Every byte that is not part of a change stays unchanged. Rewriting
    /// the result with the same edits changes nothing: a device whose alias exists is not added
    /// again.
    ///
    /// # Errors
    /// [`XmlError::Relocate`] when a relocation does not fit the document.
    pub fn rewrite(&self, edits: &Edits) -> Result<Option<Vec<u8>>, XmlError> {
        let text = &self.text.text;
        let splices = edit::plan(text, &self.domain, &self.layout, edits)?;
        Ok((!splices.is_empty()).then(|| self.text.encode(&edit::splice(text, splices))))
    }
}
