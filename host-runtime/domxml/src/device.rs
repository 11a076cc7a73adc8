//! One device of the domain, as far as virt-usb looks into it.
//!
//! A device is collected while the scanner is inside it, and judged when it ends. Of each part only
//! the first is kept, so the memory that a device takes does not grow with what stands in it.

use std::ops::Range;

use virt_usb_model::{BusAddress, PortPath, UsbId};

use crate::domain::{Redirdev, UsbHostdev};
use crate::error::XmlError;
use crate::tag::Tag;

/// An element with the places that an edit needs.
#[derive(Debug, Clone)]
pub(crate) struct Node<'a> {
    pub(crate) tag: Tag<'a>,
    /// Behind the last thing in it that is not white space; behind the start tag when there is
    /// none.
    pub(crate) content_end: usize,
    /// Where its end tag stands; empty and behind the tag for `<name/>`.
    pub(crate) close: Range<usize>,
    /// Where its first child element starts.
    pub(crate) first_child: Option<usize>,
}

impl<'a> Node<'a> {
    pub(crate) fn new(tag: Tag<'a>) -> Self {
        let end = tag.span.end;
        Self { tag, content_end: end, close: end..end, first_child: None }
    }

    /// The end tag was met.
    pub(crate) fn end(&mut self, text: &str, close: Range<usize>) {
        let inside = text.get(self.tag.span.end..close.start).unwrap_or_default();
        self.content_end = self.tag.span.end + inside.trim_end_matches(crate::tag::is_space).len();
        self.close = close;
    }
}

/// A part of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Alias,
    Address,
    Source,
    Target,
    Model,
    Master,
    SourceVendor,
    SourceProduct,
    SourceAddress,
    TargetModel,
    SourceAdapter,
    Backend,
}

impl Part {
    /// How many parts there are.
    const COUNT: usize = 12;

    /// Kind of an element, by its name and its parent (`None`: the device itself).
    pub(crate) fn new(within: Option<Self>, name: &str) -> Option<Self> {
        Some(match (within, name) {
            (None, "alias") => Self::Alias,
            (None, "address") => Self::Address,
            (None, "source") => Self::Source,
            (None, "target") => Self::Target,
            (None, "model") => Self::Model,
            (None, "master") => Self::Master,
            (None, "backend") => Self::Backend,
            (Some(Self::Source), "vendor") => Self::SourceVendor,
            (Some(Self::Source), "product") => Self::SourceProduct,
            (Some(Self::Source), "address") => Self::SourceAddress,
            (Some(Self::Source), "adapter") => Self::SourceAdapter,
            (Some(Self::Target), "model") => Self::TargetModel,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Alias => "<alias> in a USB hostdev",
            Self::Address => "<address> in a USB hostdev",
            Self::Source => "<source> in a USB hostdev",
            Self::Target => "<target> in a USB hostdev",
            Self::Model => "<model> in a USB hostdev",
            Self::Master => "<master> in a USB hostdev",
            Self::SourceVendor => "<vendor> in the source of a USB hostdev",
            Self::SourceProduct => "<product> in the source of a USB hostdev",
            Self::SourceAddress => "<address> in the source of a USB hostdev",
            Self::TargetModel => "<model> in the target of a USB hostdev",
            Self::SourceAdapter => "<adapter> in the source of a USB hostdev",
            Self::Backend => "<backend> in a USB hostdev",
        }
    }
}

/// A child of `<devices>`.
#[derive(Debug, Clone)]
pub(crate) struct Device<'a> {
    pub(crate) node: Node<'a>,
    parts: [Option<Box<Node<'a>>>; Part::COUNT],
    /// The first part that was there again, and where.
    twice: Option<(Part, usize)>,
}

impl<'a> Device<'a> {
    pub(crate) fn new(tag: Tag<'a>) -> Self {
        Self { node: Node::new(tag), parts: Default::default(), twice: None }
    }

    /// Takes in a part; says whether it is the first of its kind.
    pub(crate) fn begin(&mut self, part: Part, tag: Tag<'a>) -> bool {
        let Some(slot) = self.parts.get_mut(part as usize) else { return false };
        if slot.is_some() {
            self.twice = self.twice.or(Some((part, tag.span.start)));
            return false;
        }
        *slot = Some(Box::new(Node::new(tag)));
        true
    }

    /// A part that began here ends.
    pub(crate) fn end(&mut self, part: Part, text: &str, close: Range<usize>) {
        if let Some(Some(node)) = self.parts.get_mut(part as usize) {
            node.end(text, close);
        }
    }

    /// A child element starts inside of a part.
    pub(crate) fn child(&mut self, part: Part, start: usize) {
        if let Some(Some(node)) = self.parts.get_mut(part as usize) {
            node.first_child = node.first_child.or(Some(start));
        }
    }

    pub(crate) fn part(&self, part: Part) -> Option<&Node<'a>> {
        self.parts.get(part as usize).and_then(|p| p.as_deref())
    }

    /// An attribute's value; the empty text when the part or the attribute is not there.
    pub(crate) fn value(&self, part: Part, attribute: &str) -> String {
        let value = self.part(part).and_then(|node| node.tag.value(attribute));
        value.map(std::borrow::Cow::into_owned).unwrap_or_default()
    }

    /// The text of a part, as it is written; `None` when there is none.
    pub(crate) fn text(&self, part: Part, text: &str) -> Option<String> {
        let node = self.part(part)?;
        let inside =
            text.get(node.tag.span.end..node.content_end)?.trim_start_matches(crate::tag::is_space);
        (!inside.is_empty()).then(|| inside.to_owned())
    }

    pub(crate) fn is_usb_hostdev(&self) -> bool {
        let tag = &self.node.tag;
        tag.name == "hostdev"
            && tag.is("type", "usb")
            && tag.value("mode").is_none_or(|m| m == "subsystem")
    }

    pub(crate) fn is_usb_redirdev(&self) -> bool {
        self.node.tag.name == "redirdev" && self.node.tag.is("bus", "usb")
    }

    fn alias(&self) -> Option<String> {
        self.part(Part::Alias)
            .and_then(|node| node.tag.value("name"))
            .map(std::borrow::Cow::into_owned)
    }

    pub(crate) fn hostdev(&self, line: impl Fn(usize) -> usize) -> Result<UsbHostdev, XmlError> {
        if let Some((part, offset)) = self.twice {
            return Err(XmlError::Twice { what: part.name(), line: line(offset) });
        }
        let source = self.part(Part::Source);
        Ok(UsbHostdev {
            usb: self.usb_id(),
            address: self.bus_address(),
            port: self.port(),
            alias: self.alias(),
            has_startup_policy: source.is_some_and(|node| node.tag.get("startupPolicy").is_some()),
        })
    }

    pub(crate) fn redirdev(&self) -> Redirdev {
        let kind = self.node.tag.value("type").unwrap_or_default().into_owned();
        Redirdev { kind, alias: self.alias() }
    }

    /// Vendor and product of the source.
    pub(crate) fn usb_id(&self) -> Option<UsbId> {
        let vendor = number(&self.value(Part::SourceVendor, "id"))?;
        let product = number(&self.value(Part::SourceProduct, "id"))?;
        Some(UsbId::new(vendor.try_into().ok()?, product.try_into().ok()?))
    }

    /// Bus and device number of the source.
    pub(crate) fn bus_address(&self) -> Option<BusAddress> {
        let bus = number(&self.value(Part::SourceAddress, "bus"))?;
        let device = number(&self.value(Part::SourceAddress, "device"))?;
        BusAddress::new(bus.try_into().ok()?, device.try_into().ok()?)
    }

    /// Bus and port of the source.
    fn port(&self) -> Option<PortPath> {
        host_port(
            number(&self.value(Part::SourceAddress, "bus"))?,
            &self.value(Part::SourceAddress, "port"),
        )
    }
}

/// A port of the host as libvirt writes it: a bus, and the numbers of its ports with dots between
/// them.
pub(crate) fn host_port(bus: u32, port: &str) -> Option<PortPath> {
    let ports: Option<Vec<u8>> = port.split('.').map(|p| number(p)?.try_into().ok()).collect();
    PortPath::new(bus.try_into().ok()?, &ports?)
}

/// A number as libvirt reads it: C's `strtoul` with base 0, so `0x1f` is hexadecimal and `010`
/// octal.
pub(crate) fn number(text: &str) -> Option<u32> {
    let text = text.trim_start_matches(crate::tag::is_space);
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if text.len() > 1 && text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    let plain = !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
    plain.then(|| u32::from_str_radix(digits, radix).ok()).flatten()
}
