#![doc = include_str!("../README.md")]
//!
//! ## Modules
//!
//! ```text
//! bytes ─ encoding ─► text ─ scan, tag ─► tokens ─ read ─┬─► Domain   (metadata, device, usb_bus ─ fit)
//!                                                        └─► Layout ─┐
//!                                    bytes ◄─ encoding ─ splices ◄─ edit, style ◄─ Edits
//! ```

mod device;
mod domain;
mod edit;
mod encoding;
mod error;
mod fit;
mod metadata;
mod read;
mod scan;
mod style;
mod tag;
mod usb_bus;

pub use domain::{Domain, FlavorSource, Redirdev, UsbHostdev};
pub use edit::{Edits, Hostdev};
pub use error::XmlError;
pub use fit::Fit;
pub use metadata::NAMESPACE;
pub use usb_bus::UsbBus;

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
    let decoded = decode(xml)?;
    Ok(read::parse(&decoded.text)?.0)
}

/// Makes the changes; `None` when there is nothing to change.
///
/// Every byte that is not part of a change stays as it is. Rewriting what was rewritten, with the same edits, changes
/// nothing: a device whose alias is there is not added again.
///
/// # Errors
/// As [`read`], and [`XmlError::Relocate`] when a relocation does not fit the document.
pub fn rewrite(xml: &[u8], edits: &Edits) -> Result<Option<Vec<u8>>, XmlError> {
    let decoded = decode(xml)?;
    let (domain, layout) = read::parse(&decoded.text)?;
    let splices = edit::plan(&decoded.text, &domain, &layout, edits)?;
    Ok((!splices.is_empty()).then(|| decoded.encode(&edit::splice(&decoded.text, splices))))
}

fn decode(xml: &[u8]) -> Result<Decoded<'_>, XmlError> {
    if xml.len() > MAX_XML { Err(XmlError::TooLarge { size: xml.len() }) } else { Decoded::new(xml) }
}
