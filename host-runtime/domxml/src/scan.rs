//! The document as tokens with places, checked for well-formedness on the way.
//!
//! quick-xml finds the ends of tags, comments, CDATA and references, and matches start tags with
//! end tags. Here the rest of what XML asks for is added (one root, no text beside it, strict tags,
//! known entities), and what a hook must not meet is refused: document types and deep nesting. One
//! token is held at a time.

use std::borrow::Cow;
use std::ops::Range;

use quick_xml::events::Event;
use quick_xml::reader::Reader;
use virt_usb_model::clean_start;

use crate::MAX_DEPTH;
use crate::error::{XmlError, line_of};
use crate::tag::{BadTag, Tag, is_space, resolve};

pub(crate) enum Token<'a> {
    /// `<name …>` or `<name …/>`; the latter is followed by no [`Token::Close`].
    Open(Tag<'a>),
    /// `</name>`
    Close(Range<usize>),
    /// Character data: text, CDATA or a resolved reference.
    Text(Cow<'a, str>),
    /// Comments, processing instructions, the declaration.
    Aside,
    /// The document is complete.
    End,
}

pub(crate) struct Scanner<'a> {
    text: &'a str,
    reader: Reader<&'a [u8]>,
    depth: usize,
    root_seen: bool,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        let mut reader = Reader::from_str(text);
        let config = reader.config_mut();
        config.check_comments = true;
        config.allow_dangling_amp = false;
        Self { text, reader, depth: 0, root_seen: false }
    }

    pub(crate) fn next(&mut self) -> Result<Token<'a>, XmlError> {
        let start = self.position();
        let event = self
            .reader
            .read_event()
            .map_err(|e| self.syntax(self.error_position(), &e.to_string()))?;
        let span = start..self.position();
        match event {
            Event::Start(_) | Event::Empty(_) => self.open(span),
            Event::End(_) => {
                self.depth = self.depth.saturating_sub(1);
                Ok(Token::Close(span))
            }
            Event::Text(_) => self.character_data(start, Cow::Borrowed(self.slice(&span, 0, 0))),
            Event::CData(_) => {
                self.inside_root(start)?;
                Ok(Token::Text(Cow::Borrowed(self.slice(&span, "<![CDATA[".len(), "]]>".len()))))
            }
            Event::GeneralRef(_) => {
                self.inside_root(start)?;
                resolve(self.slice(&span, 0, 0)).map(Token::Text).ok_or_else(|| {
                    self.syntax(
                        start,
                        "an entity that is not known or a character that XML does not have",
                    )
                })
            }
            Event::Decl(_) if start > 0 => {
                Err(self.syntax(start, "an XML declaration that is not at the start"))
            }
            Event::Comment(_) | Event::PI(_) | Event::Decl(_) => Ok(Token::Aside),
            Event::DocType(_) => Err(XmlError::Doctype { line: self.line(start) }),
            Event::Eof if self.depth > 0 => {
                Err(self.syntax(start, "the document ends inside an element"))
            }
            Event::Eof if !self.root_seen => {
                Err(XmlError::Missing { what: "element in the document" })
            }
            Event::Eof => Ok(Token::End),
        }
    }

    /// The line of an offset, counted from 1. Costs a pass: for errors only.
    pub(crate) fn line(&self, offset: usize) -> usize {
        line_of(self.text, offset)
    }

    fn open(&mut self, span: Range<usize>) -> Result<Token<'a>, XmlError> {
        let start = span.start;
        if self.depth == 0 && self.root_seen {
            return Err(self.syntax(start, "a second root element"));
        }
        let tag = Tag::new(self.text, span).map_err(|bad| match bad {
            BadTag::Syntax(what) => self.syntax(start, what),
            BadTag::TooMany => XmlError::TooManyAttributes { line: self.line(start) },
        })?;
        self.root_seen = true;
        if self.depth == MAX_DEPTH {
            return Err(XmlError::TooDeep { line: self.line(start) });
        }
        self.depth += usize::from(!tag.empty);
        Ok(Token::Open(tag))
    }

    fn character_data(&self, start: usize, text: Cow<'a, str>) -> Result<Token<'a>, XmlError> {
        if let Some(visible) = text.bytes().position(|b| !is_space(b.into())) {
            self.inside_root(start + visible)?;
        }
        Ok(Token::Text(text))
    }

    fn inside_root(&self, start: usize) -> Result<(), XmlError> {
        if self.depth > 0 {
            Ok(())
        } else {
            Err(self.syntax(start, "text outside the root element"))
        }
    }

    fn slice(&self, span: &Range<usize>, skip: usize, drop: usize) -> &'a str {
        self.text.get(span.start + skip..span.end.saturating_sub(drop)).unwrap_or_default()
    }

    fn syntax(&self, offset: usize, what: &str) -> XmlError {
        XmlError::Syntax { line: self.line(offset), what: clean_start(what, 160) }
    }

    fn position(&self) -> usize {
        usize::try_from(self.reader.buffer_position()).unwrap_or(usize::MAX)
    }

    fn error_position(&self) -> usize {
        usize::try_from(self.reader.error_position()).unwrap_or(usize::MAX)
    }
}
