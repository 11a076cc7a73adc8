//! The inside of one tag: its name and attributes, with their places in the document.
//!
//! Stricter than the tokenizer below it: a tag that libvirt's parser would refuse, or would read in
//! another way, is an error here as well. Two readings of one document are how a hook is fooled.

use std::borrow::Cow;
use std::ops::Range;

use quick_xml::escape::unescape;

use crate::MAX_ATTRIBUTES;

/// One attribute. Ranges are byte offsets into the document's text.
#[derive(Debug, Clone)]
pub(crate) struct Attribute<'a> {
    pub(crate) name: &'a str,
    /// The value as it is written, between its quotes.
    pub(crate) raw: &'a str,
    /// Where `raw` stands.
    pub(crate) value: Range<usize>,
    /// The whole attribute with the white space before it: what to cut to remove it.
    pub(crate) whole: Range<usize>,
}

impl<'a> Attribute<'a> {
    /// The value with entities resolved and line ends as blanks, as XML asks for. A line end that
    /// is written as a reference stays one.
    pub(crate) fn decoded(&self) -> Cow<'a, str> {
        if !self.raw.bytes().any(|b| matches!(b, b'&' | b'\t' | b'\n' | b'\r')) {
            return Cow::Borrowed(self.raw);
        }
        let plain = self.raw.replace(['\t', '\n', '\r'], " ");
        // `attributes` has seen that it can be resolved.
        Cow::Owned(resolve(&plain).map(Cow::into_owned).unwrap_or_default())
    }
}

/// A start tag.
#[derive(Debug, Clone)]
pub(crate) struct Tag<'a> {
    /// The name with its prefix.
    pub(crate) name: &'a str,
    pub(crate) attributes: Vec<Attribute<'a>>,
    /// From `<` to behind `>`.
    pub(crate) span: Range<usize>,
    /// `<name/>`
    pub(crate) empty: bool,
}

/// Error in a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadTag {
    /// The description of a fault.
    Syntax(&'static str),
    /// More than [`MAX_ATTRIBUTES`].
    TooMany,
}

impl<'a> Tag<'a> {
    /// Reads `text[span]`, which is `<…>`.
    pub(crate) fn new(text: &'a str, span: Range<usize>) -> Result<Self, BadTag> {
        let whole = text.get(span.clone()).unwrap_or_default();
        let inside = whole.strip_prefix('<').and_then(|t| t.strip_suffix('>')).unwrap_or_default();
        let (inside, empty) = inside.strip_suffix('/').map_or((inside, false), |t| (t, true));
        let end = inside.bytes().position(|b| is_space(b.into())).unwrap_or(inside.len());
        let name = inside.get(..end).unwrap_or_default();
        if !is_name(name) {
            return Err(BadTag::Syntax("an element whose name is not a name"));
        }
        let rest = inside.get(name.len()..).unwrap_or_default();
        let attributes = attributes(rest, span.start + 1 + name.len())?;
        Ok(Self { name, attributes, span, empty })
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Attribute<'a>> {
        self.attributes.iter().find(|a| a.name == name)
    }

    pub(crate) fn value(&self, name: &str) -> Option<Cow<'a, str>> {
        self.get(name).map(Attribute::decoded)
    }

    pub(crate) fn is(&self, name: &str, value: &str) -> bool {
        self.value(name).is_some_and(|v| v == value)
    }
}

/// Splits ` a='b' c="d" `; `offset` is where it stands in the document. Half of a domain is
/// attributes, so each byte is looked at once: all that delimits is ASCII.
pub(crate) fn attributes(inside: &str, offset: usize) -> Result<Vec<Attribute<'_>>, BadTag> {
    let from = |at: usize| inside.as_bytes().get(at..).unwrap_or_default().iter();
    let mut found = Vec::new();
    let mut rest = 0;
    loop {
        let start = behind(inside, rest, is_blank);
        if start == inside.len() {
            break;
        }
        if start == rest {
            return Err(BadTag::Syntax("an attribute without a blank before it"));
        }
        if found.len() == MAX_ATTRIBUTES {
            return Err(BadTag::TooMany);
        }
        let name_end = behind(inside, start, is_name_byte);
        let equals = behind(inside, name_end, is_blank);
        let name = inside.get(start..name_end).unwrap_or_default();
        if from(equals).next() != Some(&b'=') || !begins_name(name) {
            let valued = from(start).any(|&b| b == b'=');
            return Err(BadTag::Syntax(match valued {
                true => "an attribute whose name is not a name",
                false => "an attribute without a value",
            }));
        }
        let quoted = behind(inside, equals + 1, is_blank);
        let quote = from(quoted).next().copied().filter(|b| matches!(b, b'\'' | b'"'));
        let quote = quote.ok_or(BadTag::Syntax("an attribute value without quotes"))?;
        let value = value(inside, quoted + 1, quote)?;
        let raw = inside.get(value.clone()).unwrap_or_default();
        let end = value.end + 1;
        let (value, whole) =
            (offset + value.start..offset + value.end, offset + rest..offset + end);
        found.push(Attribute { name, raw, value, whole });
        rest = end;
    }
    if repeated(&found) {
        Err(BadTag::Syntax("an attribute that is there twice"))
    } else {
        Ok(found)
    }
}

/// The first place from `at` on that is not `what`.
fn behind(inside: &str, at: usize, what: impl Fn(u8) -> bool) -> usize {
    let rest = inside.as_bytes().get(at..).unwrap_or_default();
    at + rest.iter().position(|&b| !what(b)).unwrap_or(rest.len())
}

/// Where the value is that begins at `start` and ends before `quote`.
fn value(inside: &str, start: usize, quote: u8) -> Result<Range<usize>, BadTag> {
    let bytes = inside.as_bytes().get(start..).unwrap_or_default();
    let (mut less, mut entity) = (false, false);
    for (length, &byte) in bytes.iter().enumerate() {
        if byte == quote {
            let value = start..start + length;
            if less {
                return Err(BadTag::Syntax("a < in an attribute value"));
            }
            if entity && resolve(inside.get(value.clone()).unwrap_or_default()).is_none() {
                return Err(BadTag::Syntax(
                    "an entity that is not known or a character that XML does not have, in an \
                        attribute value",
                ));
            }
            return Ok(value);
        }
        less |= byte == b'<';
        entity |= byte == b'&';
    }
    Err(BadTag::Syntax("an attribute value without its end"))
}

/// The text with its entities and character references resolved; `None` where one is not known, or
/// names a character that XML does not have. libvirt's parser refuses both.
pub(crate) fn resolve(text: &str) -> Option<Cow<'_, str>> {
    // What stands in the document as it is was looked at before: see `encoding::controls`.
    unescape(text).ok().filter(|resolved| resolved.chars().all(is_char))
}

/// A character of XML 1.0 (<https://www.w3.org/TR/xml/#charsets>).
pub(crate) const fn is_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

fn repeated(attributes: &[Attribute<'_>]) -> bool {
    const FEW: usize = 16;
    if attributes.len() <= FEW {
        let earlier = |i, name| attributes.iter().take(i).any(|a: &Attribute<'_>| a.name == name);
        return attributes.iter().enumerate().any(|(i, a)| earlier(i, a.name));
    }
    let mut names: Vec<&str> = attributes.iter().map(|a| a.name).collect();
    names.sort_unstable();
    names.windows(2).any(|pair| pair.first() == pair.last())
}

/// White space as XML has it.
pub(crate) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

fn is_blank(byte: u8) -> bool {
    is_space(byte.into())
}

/// The bytes of a name, its first or further ones. Of what is not ASCII, every letter and mark is
/// taken.
const NAME_BYTES: [bool; 256] = {
    let mut is = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        is[byte] =
            b.is_ascii_alphanumeric() || matches!(b, b'_' | b':' | b'-' | b'.') || !b.is_ascii();
        byte += 1;
    }
    is
};

fn is_name_byte(byte: u8) -> bool {
    NAME_BYTES.get(usize::from(byte)).is_some_and(|is| *is)
}

fn begins_name(name: &str) -> bool {
    let first = |b: &u8| is_name_byte(*b) && !b.is_ascii_digit() && !matches!(b, b'-' | b'.');
    name.as_bytes().first().is_some_and(first)
}

fn is_name(name: &str) -> bool {
    begins_name(name) && name.bytes().all(is_name_byte)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_line_end_is_a_blank_unless_it_is_written_as_a_reference() {
        let Ok(found) = attributes(" a='b\n\tc&#10;d&#x9;&amp;e' f='g'", 0) else { panic!() };
        let values: Vec<_> = found.iter().map(Attribute::decoded).collect();
        assert_eq!(values, ["b  c\nd\t&e", "g"]);
    }
}
