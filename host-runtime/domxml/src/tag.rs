//! The inside of one tag: its name and attributes, with their places in the document.
//!
//! Stricter than the tokenizer below it: a tag that libvirt's parser would refuse, or would read in another way, is
//! an error here as well. Two readings of one document are how a hook is fooled.

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
    /// The value with entities resolved and line ends as blanks, as XML asks for.
    pub(crate) fn decoded(&self) -> Cow<'a, str> {
        // `attributes` has seen that it can be unescaped.
        let value = unescape(self.raw).unwrap_or(Cow::Borrowed(self.raw));
        if value.contains(['\t', '\n', '\r']) { value.replace(['\t', '\n', '\r'], " ").into() } else { value }
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

/// What is wrong with a tag.
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

/// Splits ` a='b' c="d" `; `offset` is where it stands in the document.
pub(crate) fn attributes(inside: &str, offset: usize) -> Result<Vec<Attribute<'_>>, BadTag> {
    let mut found = Vec::new();
    let mut rest = inside;
    loop {
        let at = inside.len() - rest.len();
        let trimmed = rest.trim_start_matches(is_space);
        if trimmed.is_empty() {
            break;
        }
        if trimmed.len() == rest.len() {
            return Err(BadTag::Syntax("an attribute without a blank before it"));
        }
        if found.len() == MAX_ATTRIBUTES {
            return Err(BadTag::TooMany);
        }
        let (name, after) = trimmed.split_once('=').ok_or(BadTag::Syntax("an attribute without a value"))?;
        let name = name.trim_end_matches(is_space);
        if !is_name(name) {
            return Err(BadTag::Syntax("an attribute whose name is not a name"));
        }
        let after = after.trim_start_matches(is_space);
        let quote = after.chars().next().filter(|c| matches!(c, '\'' | '"'));
        let quote = quote.ok_or(BadTag::Syntax("an attribute value without quotes"))?;
        let value = after.get(1..).unwrap_or_default();
        let (raw, left) =
            value.split_once(quote).ok_or(BadTag::Syntax("an attribute value without its end"))?;
        if raw.contains('<') {
            return Err(BadTag::Syntax("a < in an attribute value"));
        }
        if raw.contains('&') && unescape(raw).is_err() {
            return Err(BadTag::Syntax("an entity that is not known, in an attribute value"));
        }
        let start = offset + inside.len() - value.len();
        let end = start + raw.len();
        found.push(Attribute { name, raw, value: start..end, whole: offset + at..end + 1 });
        rest = left;
    }
    if repeated(&found) { Err(BadTag::Syntax("an attribute that is there twice")) } else { Ok(found) }
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

fn is_name(name: &str) -> bool {
    // Bytes will do: of what is not ASCII, every letter and mark is taken.
    let first = |b: &u8| b.is_ascii_alphabetic() || matches!(b, b'_' | b':') || !b.is_ascii();
    let further = |b: &u8| first(b) || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    name.as_bytes().first().is_some_and(first) && name.as_bytes().iter().all(further)
}
