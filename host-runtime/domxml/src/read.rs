//! One pass over the tokens: what the domain says, and where it says it.
//!
//! ```text
//! domain ─┬─ name, uuid ................ text
//!         ├─ os ── type ................ arch, machine
//!         ├─ metadata ─┬─ (ours) ....... text
//!         │            ├─ (refusal) .... why
//!         │            └─ nova:instance ─┬─ nova:flavor ── nova:extraSpecs ── nova:extraSpec
//!         │                              └─ nova:owner ── nova:project
//!         ├─ qemu:commandline ── qemu:arg
//!         └─ devices ── (device) ── parts, parts of <source> and <target>
//! ```
//! Everything else is passed over, whatever it is called: a `<hostdev>` in the metadata is no
//! device.

use std::borrow::Cow;
use std::ops::Range;

use virt_usb_model::InstanceId;

use crate::MAX_USB;
use crate::commandline::{is_device_option, usb_host};
use crate::device::{Device, Node, Part};
use crate::domain::{Domain, FlavorSource};
use crate::error::{XmlError, cut};
use crate::host_source::host_source;
use crate::metadata::{Metadata, Namespaces, Space};
use crate::scan::{Scanner, Token};
use crate::tag::Tag;
use crate::usb_bus::UsbBus;

/// Where things stand in the text: what an edit needs.
#[derive(Debug, Default)]
pub(crate) struct Layout<'a> {
    pub(crate) domain: Option<Node<'a>>,
    pub(crate) metadata: Option<Node<'a>>,
    pub(crate) devices: Option<Node<'a>>,
    /// Where the last child of `<devices>` starts.
    pub(crate) last_device: Option<usize>,
    /// The last `<controller>`: where it starts and ends.
    pub(crate) last_controller: Option<Range<usize>>,
    /// The USB hostdevs, as [`Domain::hostdevs`].
    pub(crate) hostdevs: Vec<Device<'a>>,
}

/// Meaning of an open element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Domain,
    Name,
    Uuid,
    Os,
    Metadata,
    Ours,
    NovaInstance,
    NovaFlavor,
    NovaExtraSpecs,
    NovaExtraSpec(&'static str),
    NovaOwner,
    Commandline,
    Devices,
    Device,
    Part(Part),
    Other,
}

impl At {
    /// Whether the element's text is wanted.
    fn has_text(self) -> bool {
        matches!(self, Self::Name | Self::Uuid | Self::Ours | Self::NovaExtraSpec(_))
    }
}

/// Reads a text into a domain and its layout.
pub(crate) fn parse(text: &str) -> Result<(Domain, Layout<'_>), XmlError> {
    let mut reader = Reading::new(text);
    while reader.step()? {}
    reader.finish()
}

struct Reading<'a> {
    text: &'a str,
    scanner: Scanner<'a>,
    stack: Vec<At>,
    namespaces: Namespaces<'a>,
    /// The text of the innermost element whose text is wanted.
    collected: String,
    metadata: Metadata,
    name: Option<String>,
    uuid: Option<InstanceId>,
    device: Option<Device<'a>>,
    layout: Layout<'a>,
    domain: Domain,
    /// Whether the argument of QEMU that comes next is a device.
    device_follows: bool,
}

impl<'a> Reading<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            scanner: Scanner::new(text),
            stack: Vec::new(),
            namespaces: Namespaces::default(),
            collected: String::new(),
            metadata: Metadata::default(),
            name: None,
            uuid: None,
            device: None,
            layout: Layout::default(),
            domain: Domain {
                name: String::new(),
                uuid: None,
                flavor: FlavorSource::None,
                refusal: None,
                project: None,
                hostdevs: Vec::new(),
                commandline: Vec::new(),
                redirdevs: Vec::new(),
                host_sources: Vec::new(),
                bus: UsbBus::default(),
                spice: false,
            },
            device_follows: false,
        }
    }

    /// Takes one token; says whether there is another.
    fn step(&mut self) -> Result<bool, XmlError> {
        match self.scanner.next()? {
            Token::Open(tag) => self.open(tag)?,
            Token::Close(span) => self.close(span)?,
            Token::Text(text) if self.stack.last().is_some_and(|at| at.has_text()) => {
                self.collected.push_str(&text);
            }
            Token::Text(_) | Token::Aside => {}
            Token::End => return Ok(false),
        }
        Ok(true)
    }

    fn finish(mut self) -> Result<(Domain, Layout<'a>), XmlError> {
        self.domain.name = self.name.ok_or(XmlError::Missing { what: "<name>" })?;
        self.domain.uuid = self.uuid;
        self.domain.flavor = self.metadata.flavor()?;
        self.domain.project = self.metadata.project;
        Ok((self.domain, self.layout))
    }

    fn open(&mut self, tag: Tag<'a>) -> Result<(), XmlError> {
        let parent = self.stack.last().copied();
        let depth = self.stack.len();
        let empty = tag.empty;
        let end = tag.span.end;
        if parent.is_none_or(|at| matches!(at, At::Domain | At::Commandline)) || self.in_metadata()
        {
            self.namespaces.enter(&tag, depth);
        }
        self.first_child(parent, tag.span.start);
        let at = match parent {
            None => self.root(tag)?,
            Some(At::Domain) => self.in_domain(tag)?,
            Some(At::Os) => self.in_os(&tag),
            Some(At::Commandline) => self.in_commandline(&tag)?,
            Some(At::Devices) => {
                self.layout.last_device = Some(tag.span.start);
                self.device = Some(Device::new(tag));
                At::Device
            }
            Some(At::Device) => self.part(None, tag),
            Some(At::Part(within)) => self.part(Some(within), tag),
            Some(At::Ours) => {
                let what = format!(
                    "<{}> in the flavor's metadata, where only JSON text belongs",
                    cut(tag.name)
                );
                return Err(XmlError::Syntax { line: self.scanner.line(tag.span.start), what });
            }
            Some(within) => self.in_metadata_element(within, &tag)?,
        };
        if at.has_text() {
            self.collected.clear();
        }
        self.stack.push(at);
        if empty {
            self.close(end..end)?;
        }
        Ok(())
    }

    fn close(&mut self, span: Range<usize>) -> Result<(), XmlError> {
        let Some(at) = self.stack.pop() else { return Ok(()) };
        self.namespaces.leave(self.stack.len());
        let line = || self.scanner.line(span.start);
        match at {
            At::Name if self.collected.is_empty() => {
                return Err(XmlError::Missing { what: "text in <name>" });
            }
            At::Name => self.name = Some(std::mem::take(&mut self.collected)),
            At::Uuid => {
                let wrong = |_| XmlError::Value {
                    what: "<uuid>",
                    found: cut(self.collected.trim()),
                    wanted: "a UUID of 32 hexadecimal digits",
                    line: line(),
                };
                self.uuid = Some(self.collected.parse().map_err(wrong)?);
            }
            At::Ours => self.metadata.ours_text(&self.collected),
            At::NovaExtraSpec(key) => self.metadata.extra_spec(key, &self.collected),
            At::Part(part) => {
                if let Some(device) = &mut self.device {
                    device.end(part, self.text, span);
                }
            }
            At::Device => self.device_ends(span)?,
            At::Metadata => {
                if let Some(node) = &mut self.layout.metadata {
                    node.end(self.text, span);
                }
            }
            At::Devices => {
                if let Some(node) = &mut self.layout.devices {
                    node.end(self.text, span);
                }
            }
            At::Domain => {
                if let Some(node) = &mut self.layout.domain {
                    node.end(self.text, span);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn in_metadata(&self) -> bool {
        self.stack.get(1) == Some(&At::Metadata)
    }

    fn root(&mut self, tag: Tag<'a>) -> Result<At, XmlError> {
        if tag.name != "domain" {
            return Err(XmlError::NotADomain { found: cut(tag.name) });
        }
        self.layout.domain = Some(Node::new(tag));
        Ok(At::Domain)
    }

    fn in_domain(&mut self, tag: Tag<'a>) -> Result<At, XmlError> {
        let again = |there: bool, what| match there {
            true => Err(XmlError::Twice { what, line: self.scanner.line(tag.span.start) }),
            false => Ok(()),
        };
        Ok(match tag.name {
            "name" => {
                again(self.name.is_some(), "<name>")?;
                At::Name
            }
            "uuid" => {
                again(self.uuid.is_some(), "<uuid>")?;
                At::Uuid
            }
            "os" => At::Os,
            "metadata" => {
                again(self.layout.metadata.is_some(), "<metadata>")?;
                self.layout.metadata = Some(Node::new(tag));
                At::Metadata
            }
            "devices" => {
                again(self.layout.devices.is_some(), "<devices>")?;
                self.layout.devices = Some(Node::new(tag));
                At::Devices
            }
            name if self.namespaces.resolve(name) == (Space::Qemu, "commandline") => {
                At::Commandline
            }
            _ => At::Other,
        })
    }

    /// Takes in an argument of QEMU, where it is a device of this host.
    fn in_commandline(&mut self, tag: &Tag<'a>) -> Result<At, XmlError> {
        if self.namespaces.resolve(tag.name) != (Space::Qemu, "arg") {
            return Ok(At::Other);
        }
        let value = tag.value("value").unwrap_or_default();
        let is_device = std::mem::replace(&mut self.device_follows, is_device_option(&value));
        if is_device && let Some(device) = usb_host(&value) {
            if self.domain.commandline.len() >= MAX_USB {
                return Err(XmlError::TooManyDevices { line: self.scanner.line(tag.span.start) });
            }
            self.domain.commandline.push(device);
        }
        Ok(At::Other)
    }

    fn in_os(&mut self, tag: &Tag<'a>) -> At {
        if tag.name == "type" {
            let value = |name| tag.value(name).unwrap_or_default();
            self.domain.bus.set_machine(&value("arch"), &value("machine"));
        }
        At::Other
    }

    fn in_metadata_element(&mut self, within: At, tag: &Tag<'a>) -> Result<At, XmlError> {
        let (space, local) = self.namespaces.resolve(tag.name);
        let line = || self.scanner.line(tag.span.start);
        Ok(match (within, space, local) {
            (At::Metadata, Space::Ours, _) => {
                let line = line();
                self.metadata.ours(tag, line)?;
                At::Ours
            }
            (At::Metadata, Space::Refusal, _) => {
                self.domain.refusal = tag.value("why").map(Cow::into_owned);
                At::Other
            }
            (At::Metadata, Space::Nova, "instance") => At::NovaInstance,
            (At::NovaInstance, Space::Nova, "flavor") => {
                self.metadata.nova_flavor(tag);
                At::NovaFlavor
            }
            (At::NovaFlavor, Space::Nova, "extraSpecs") => {
                self.metadata.extra_specs();
                At::NovaExtraSpecs
            }
            (At::NovaExtraSpecs, Space::Nova, "extraSpec") => {
                Metadata::key(tag).map_or(At::Other, At::NovaExtraSpec)
            }
            (At::NovaInstance, Space::Nova, "owner") => At::NovaOwner,
            (At::NovaOwner, Space::Nova, "project") => {
                let line = line();
                self.metadata.project(tag, line)?;
                At::Other
            }
            _ => At::Other,
        })
    }

    /// Remembers where the first child of an element starts, for its indentation.
    fn first_child(&mut self, parent: Option<At>, start: usize) {
        let node = match parent {
            Some(At::Domain) => self.layout.domain.as_mut(),
            Some(At::Metadata) => self.layout.metadata.as_mut(),
            Some(At::Devices) => self.layout.devices.as_mut(),
            Some(At::Device) => self.device.as_mut().map(|d| &mut d.node),
            Some(At::Part(part)) => {
                if let Some(device) = &mut self.device {
                    device.child(part, start);
                }
                None
            }
            _ => None,
        };
        if let Some(node) = node {
            node.first_child = node.first_child.or(Some(start));
        }
    }

    fn part(&mut self, within: Option<Part>, tag: Tag<'a>) -> At {
        let Some(part) = Part::new(within, tag.name) else { return At::Other };
        let first = self.device.as_mut().is_some_and(|device| device.begin(part, tag));
        if first { At::Part(part) } else { At::Other }
    }

    fn device_ends(&mut self, span: Range<usize>) -> Result<(), XmlError> {
        let Some(mut device) = self.device.take() else { return Ok(()) };
        let end = span.end;
        device.node.end(self.text, span);
        let start = device.node.tag.span.start;
        self.domain.bus.add(&device);
        if self.domain.bus.len() > MAX_USB {
            return Err(XmlError::TooManyDevices { line: self.scanner.line(start) });
        }
        self.domain.host_sources.extend(host_source(&device, self.text));
        match device.node.tag.name {
            "graphics" => self.domain.spice |= device.node.tag.is("type", "spice"),
            "controller" => self.layout.last_controller = Some(start..end),
            _ if device.is_usb_redirdev() => self.domain.redirdevs.push(device.redirdev()),
            _ if device.is_usb_hostdev() => {
                self.domain.hostdevs.push(device.hostdev(|offset| self.scanner.line(offset))?);
                self.layout.hostdevs.push(device);
            }
            _ => {}
        }
        Ok(())
    }
}
