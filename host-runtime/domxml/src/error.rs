//! Errors in a document.
//!
//! Every message is one line and reads well after "cannot read the domain XML: "; what it quotes is
//! escaped and cut, because the document may hold anything. Values of the document are quoted only
//! where they are ids or names: migration XML can carry secrets.

use thiserror::Error;
use virt_usb_model::clean_start;

use crate::{MAX_ATTRIBUTES, MAX_DEPTH, MAX_USB, MAX_XML};

/// Why a document cannot be read or edited.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum XmlError {
    /// More than [`MAX_XML`] bytes.
    #[error("{size} bytes of XML, more than the {MAX_XML} that are read")]
    TooLarge {
        /// The document's size in bytes.
        size: usize,
    },
    /// The encoding is not one of those that can be edited without loss.
    #[error(
        "the encoding {found} is not supported, only UTF-8, UTF-16 with a byte order mark, \
            US-ASCII, ISO-8859, windows-125x and KOI8"
    )]
    Encoding {
        /// The encoding that was declared or recognised.
        found: String,
    },
    /// Byte order mark and declaration name two encodings.
    #[error("the byte order mark says {mark}, but the XML declaration says {declared}")]
    EncodingConflict {
        /// Encoding according to the first bytes.
        mark: &'static str,
        /// Encoding according to `<?xml encoding=…?>`.
        declared: String,
    },
    /// Bytes that the document's encoding does not allow.
    #[error("invalid {encoding} at byte {offset}")]
    Malformed {
        /// The encoding that the document says it has.
        encoding: &'static str,
        /// The first bad byte, counted from 0.
        offset: usize,
    },
    /// Not well-formed XML.
    #[error("line {line}: {what}")]
    Syntax {
        /// Line, counted from 1.
        line: usize,
        /// Description of the error.
        what: String,
    },
    /// Elements nested deeper than [`MAX_DEPTH`].
    #[error("line {line}: elements are nested deeper than {MAX_DEPTH}")]
    TooDeep {
        /// Line, counted from 1.
        line: usize,
    },
    /// One tag with more than [`MAX_ATTRIBUTES`] attributes.
    #[error("line {line}: more than {MAX_ATTRIBUTES} attributes in one tag")]
    TooManyAttributes {
        /// Line, counted from 1.
        line: usize,
    },
    /// More than [`MAX_USB`] USB devices and controllers.
    #[error("line {line}: more than {MAX_USB} USB devices and controllers")]
    TooManyDevices {
        /// Line, counted from 1.
        line: usize,
    },
    /// A document type declaration: libvirt writes none, and entities could be declared in it.
    #[error("line {line}: a DOCTYPE, which a domain never has")]
    Doctype {
        /// Line, counted from 1.
        line: usize,
    },
    /// The root element is not `<domain>`.
    #[error("the root element is <{found}>, not <domain>")]
    NotADomain {
        /// The root element's name.
        found: String,
    },
    /// Something that every domain has is not there.
    #[error("there is no {what}")]
    Missing {
        /// The part that is missing.
        what: &'static str,
    },
    /// A part occurs twice that may occur only once.
    #[error("line {line}: a second {what}")]
    Twice {
        /// Name of the repeated part.
        what: &'static str,
        /// Line, counted from 1.
        line: usize,
    },
    /// A value that cannot be what it should be.
    #[error("line {line}: {what} is {found:?}, not {wanted}")]
    Value {
        /// Name of the value.
        what: &'static str,
        /// Value that was found, shortened.
        found: String,
        /// Value that was wanted.
        wanted: &'static str,
        /// Line, counted from 1.
        line: usize,
    },
    /// Two places of one flavor say different things, and neither is more right.
    #[error("{first} and {second} are both there and differ; remove one of them")]
    Conflict {
        /// The first place.
        first: String,
        /// The second place.
        second: String,
    },
    /// An [`Edits::relocate`](crate::Edits::relocate) that does not fit the document.
    #[error("hostdev number {index} cannot be given a new source: {why}")]
    Relocate {
        /// The index into [`Domain::hostdevs`](crate::Domain::hostdevs).
        index: usize,
        /// Reason for the refusal.
        why: &'static str,
    },
}

/// A few characters of something unknown, for a message.
pub(crate) fn cut(text: &str) -> String {
    clean_start(text, 60)
}

/// The line of a byte offset, counted from 1.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes().iter().take(offset).filter(|&&b| b == b'\n').count()
}
