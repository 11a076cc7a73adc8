//! One text inside, the document's own bytes outside.
//!
//! The rest of the crate sees a `&str`. A UTF-8 document is that already; a document in a
//! single-byte encoding is read as Latin-1 and UTF-16 is transcoded. Both mappings are one to one,
//! so encoding the edited text gives back every byte that was not edited. (A letter such as `€` in
//! windows-1252 is therefore read as another letter; names and ids are ASCII in practice, and the
//! bytes stay right.)

use std::borrow::Cow;

use crate::error::{XmlError, cut, line_of};
use crate::tag;

const BOM: &str = "\u{feff}";

/// A document's text, and the way back to bytes.
#[derive(Debug)]
pub(crate) struct Decoded<'a> {
    /// The text without its byte order mark.
    pub(crate) text: Cow<'a, str>,
    encoding: Encoding,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Utf8 { bom: bool },
    SingleByte,
    Utf16 { little: bool },
}

impl<'a> Decoded<'a> {
    pub(crate) fn new(xml: &'a [u8]) -> Result<Self, XmlError> {
        let decoded = match xml {
            [0xef, 0xbb, 0xbf, rest @ ..] => utf8(rest, true, xml)?,
            [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => return Err(unsupported("UTF-32")),
            [0xff, 0xfe, rest @ ..] => utf16(rest, true)?,
            [0xfe, 0xff, rest @ ..] => utf16(rest, false)?,
            [b'<', 0, ..] | [0, b'<', ..] => {
                return Err(unsupported("UTF-16 without a byte order mark"));
            }
            _ => match declared(xml) {
                None => utf8(xml, false, xml)?,
                Some(name) => by_name(xml, &name)?,
            },
        };
        if decoded.text.starts_with(BOM) {
            return Err(XmlError::Syntax { line: 1, what: "a second byte order mark".to_owned() });
        }
        controls(&decoded.text)?;
        Ok(decoded)
    }

    /// The bytes of an edited text.
    pub(crate) fn encode(&self, text: &str) -> Vec<u8> {
        match self.encoding {
            Encoding::Utf8 { bom } => {
                [if bom { BOM.as_bytes() } else { b"" }, text.as_bytes()].concat()
            }
            // What was read this way is below 256, and what is inserted is ASCII.
            Encoding::SingleByte => {
                text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect()
            }
            Encoding::Utf16 { little } => {
                let units = BOM.encode_utf16().chain(text.encode_utf16());
                units.flat_map(|u| if little { u.to_le_bytes() } else { u.to_be_bytes() }).collect()
            }
        }
    }
}

fn unsupported(found: &str) -> XmlError {
    XmlError::Encoding { found: cut(found) }
}

/// The encoding that the XML declaration names, if there is a declaration that names one.
fn declared(xml: &[u8]) -> Option<String> {
    const LONGEST: usize = 256;
    let start = xml.get(..LONGEST.min(xml.len()))?;
    start
        .strip_prefix(b"<?xml")
        .filter(|rest| rest.first().is_some_and(|b| b.is_ascii_whitespace()))?;
    let end = start.windows(2).position(|w| w == b"?>")?;
    let inside = std::str::from_utf8(start.get(5..end)?).ok()?;
    let attributes = tag::attributes(inside, 0).ok()?;
    attributes.iter().find(|a| a.name == "encoding").map(|a| a.raw.to_owned())
}

fn by_name<'a>(xml: &'a [u8], name: &str) -> Result<Decoded<'a>, XmlError> {
    let lower = name.to_ascii_lowercase().replace('_', "-");
    let numbered = |prefix: &str| lower.strip_prefix(prefix).and_then(|n| n.parse::<u8>().ok());
    let single = matches!(lower.as_str(), "latin1" | "latin-1" | "l1" | "koi8-r" | "koi8-u")
        || numbered("iso-8859-").is_some_and(|n| (1..=16).contains(&n) && n != 12)
        || numbered("windows-125").or_else(|| numbered("cp125")).is_some_and(|n| n <= 8);
    match lower.as_str() {
        "utf-8" | "utf8" => utf8(xml, false, xml),
        "us-ascii" | "ascii" => match xml.iter().position(|b| !b.is_ascii()) {
            Some(offset) => Err(XmlError::Malformed { encoding: "US-ASCII", offset }),
            None => utf8(xml, false, xml),
        },
        "utf-16" | "utf-16le" | "utf-16be" => Err(unsupported("UTF-16 without a byte order mark")),
        _ if single => Ok(single_byte(xml)),
        _ => Err(unsupported(&format!("{name:?}"))),
    }
}

fn single_byte(xml: &[u8]) -> Decoded<'_> {
    let text = match std::str::from_utf8(xml) {
        Ok(text) if xml.is_ascii() => Cow::Borrowed(text),
        _ => Cow::Owned(xml.iter().map(|&b| char::from(b)).collect()),
    };
    Decoded { text, encoding: Encoding::SingleByte }
}

fn utf8<'a>(rest: &'a [u8], bom: bool, whole: &[u8]) -> Result<Decoded<'a>, XmlError> {
    let skipped = whole.len() - rest.len();
    match declared(rest) {
        Some(name) if bom && !matches!(name.to_ascii_lowercase().as_str(), "utf-8" | "utf8") => {
            return Err(XmlError::EncodingConflict { mark: "UTF-8", declared: cut(&name) });
        }
        _ => {}
    }
    let text = std::str::from_utf8(rest).map_err(|e| XmlError::Malformed {
        encoding: "UTF-8",
        offset: skipped + e.valid_up_to(),
    })?;
    Ok(Decoded { text: Cow::Borrowed(text), encoding: Encoding::Utf8 { bom } })
}

fn utf16(rest: &[u8], little: bool) -> Result<Decoded<'static>, XmlError> {
    const BOM_BYTES: usize = 2;
    let bad = |offset| XmlError::Malformed { encoding: "UTF-16", offset };
    if !rest.len().is_multiple_of(2) {
        return Err(bad(BOM_BYTES + rest.len() - 1));
    }
    let units = rest.chunks_exact(2).map(|pair| match *pair {
        [a, b] if little => u16::from_le_bytes([a, b]),
        [a, b] => u16::from_be_bytes([a, b]),
        _ => 0,
    });
    let mut text = String::with_capacity(rest.len() / 2);
    let mut offset = BOM_BYTES;
    for unit in char::decode_utf16(units) {
        let c = unit.map_err(|_| bad(offset))?;
        offset += 2 * c.len_utf16();
        text.push(c);
    }
    match declared(text.as_bytes()) {
        Some(name) if !name.to_ascii_lowercase().starts_with("utf-16") => {
            Err(XmlError::EncodingConflict { mark: "UTF-16", declared: cut(&name) })
        }
        _ => Ok(Decoded { text: Cow::Owned(text), encoding: Encoding::Utf16 { little } }),
    }
}

/// XML 1.0 has no control characters but tab, line feed and carriage return, NUL least of all; and
/// neither U+FFFE nor U+FFFF.
fn controls(text: &str) -> Result<(), XmlError> {
    let bad = |&b: &u8| b < 0x20 && !matches!(b, b'\t' | b'\n' | b'\r');
    // The first byte of the two in UTF-8, and of much else.
    let odd = |b: &u8| bad(b) || *b == 0xef;
    // Without an early end the compiler looks at many bytes at once, and there is nearly never one
    // to find.
    if !text.as_bytes().iter().fold(false, |any, b| any | odd(b)) {
        return Ok(());
    }
    if let Some(at) = text.find(['\u{fffe}', '\u{ffff}']) {
        let what = "the character U+FFFE or U+FFFF, which XML does not allow".to_owned();
        return Err(XmlError::Syntax { line: line_of(text, at), what });
    }
    match text.as_bytes().iter().position(bad) {
        None => Ok(()),
        Some(at) => {
            let byte = text.as_bytes().get(at).copied().unwrap_or_default();
            Err(XmlError::Syntax {
                line: line_of(text, at),
                what: format!("the control character 0x{byte:02x}, which XML does not allow"),
            })
        }
    }
}
