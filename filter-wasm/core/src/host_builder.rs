//! One host on its way into the inventory: what the filter needs to know of it, with the texts in
//! one buffer.
//!
//! A reader of a host (the quick reader of host documents, the model's reader, a typed call) fills
//! a draft. The draft is checked once, and reused for the next host.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

use virt_usb_model::{
    Class, DeviceId, DevicePath, HostDocument, InstanceId, PortPath, ProjectId, Status, UsbId,
};

use crate::keys::{kind, port_code};
use crate::refusal::Refusal;

/// The longest host name, in bytes: DNS's own limit.
const MAX_NAME: usize = 255;
/// Ends a text among others; UTF-8 has no such byte.
pub(crate) const END: u8 = 0xff;

/// A host with its devices.
#[derive(Debug, Default)]
pub struct Draft {
    pub(crate) name: String,
    pub(crate) devices: Vec<DraftDevice>,
    /// The devices' serials, traits and projects.
    pub(crate) text: Vec<u8>,
}

/// One device of a [`Draft`].
#[derive(Debug, Clone, Default)]
pub struct DraftDevice {
    pub(crate) id: u64,
    pub(crate) kind: u32,
    pub(crate) port: u64,
    pub(crate) available: bool,
    pub(crate) serial: Range<u32>,
    /// One byte that says how many classes, less one, the classes, then each tag with its [`END`].
    pub(crate) traits: Range<u32>,
    /// Each project with its [`END`].
    pub(crate) projects: Range<u32>,
}

/// Contents of a device's [`DraftDevice::traits`].
pub(crate) struct Traits<'a> {
    pub(crate) classes: &'a [u8],
    pub(crate) tags: &'a [u8],
}

impl<'a> Traits<'a> {
    pub(crate) fn read(spelled: &'a [u8]) -> Self {
        let Some((&less_one, rest)) = spelled.split_first() else {
            return Self { classes: &[], tags: &[] };
        };
        let (classes, tags) = rest.split_at(rest.len().min(usize::from(less_one) + 1));
        Self { classes, tags }
    }
}

/// The texts of a list in which each has its [`END`].
pub(crate) fn texts(list: &[u8]) -> impl Iterator<Item = &str> {
    list.split(|b| *b == END)
        .filter_map(|text| core::str::from_utf8(text).ok())
        .filter(|text| !text.is_empty())
}

/// Byte that marks a path; a tag cannot contain it.
pub(crate) const PATH_MARK: u8 = 1;

/// The key by which devices with this path are found: a tag that no user can set.
pub(crate) fn path_tag(path: &DevicePath) -> String {
    alloc::format!("{}{path}", char::from(PATH_MARK))
}

/// How a project is compared: a UUID without regard to hyphens and case, anything else as it is
/// written.
pub(crate) fn canonical(project: &ProjectId) -> String {
    project
        .as_str()
        .parse::<InstanceId>()
        .map_or_else(|_| project.to_string(), |uuid| uuid.to_string())
}

impl Draft {
    /// Begins again with a host of this name.
    pub fn begin(&mut self, name: &str) {
        self.name.clear();
        self.name.push_str(name);
        self.devices.clear();
        self.text.clear();
    }

    /// Adds a device; its serial, classes, tags and projects are given to what is returned.
    pub fn device(
        &mut self,
        id: DeviceId,
        usb: UsbId,
        port: &PortPath,
        status: Status,
    ) -> &mut DraftDevice {
        let available = status == Status::Available;
        self.push(id.get(), kind(usb.vendor.get(), usb.product.get()), port_code(port), available)
    }

    pub(crate) fn push(
        &mut self,
        id: u64,
        kind: u32,
        port: u64,
        available: bool,
    ) -> &mut DraftDevice {
        let here = self.here();
        let (serial, traits, projects) = (here..here, here..here, here..here);
        self.devices.push(DraftDevice { id, kind, port, available, serial, traits, projects });
        let last = self.devices.len() - 1;
        &mut self.devices[last]
    }

    pub(crate) fn here(&self) -> u32 {
        self.text.len() as u32
    }

    /// Gives the last device its serial.
    pub fn serial(&mut self, text: &str) {
        let range = self.write(|buffer| buffer.extend_from_slice(text.as_bytes()));
        self.last(|device| device.serial = range);
    }

    /// Gives the last device its own class, those of its interfaces, its path and its tags.
    pub fn traits<'a>(
        &mut self,
        class: Class,
        interfaces: impl Iterator<Item = Class>,
        path: Option<&DevicePath>,
        tags: impl Iterator<Item = &'a str>,
    ) {
        let range = self.write(|buffer| {
            let start = buffer.len();
            buffer.extend([0, class.get()]);
            for interface in interfaces {
                if !buffer[start + 1..].contains(&interface.get()) {
                    buffer.push(interface.get());
                    buffer[start] += 1;
                }
            }
            if let Some(path) = path {
                buffer.extend_from_slice(path_tag(path).as_bytes());
                buffer.push(END);
            }
            for tag in tags {
                buffer.extend_from_slice(tag.as_bytes());
                buffer.push(END);
            }
        });
        self.last(|device| device.traits = range);
    }

    /// Gives the last device the only projects that may have it.
    pub fn projects<'a>(&mut self, projects: impl Iterator<Item = &'a ProjectId>) {
        let range = self.write(|buffer| {
            for project in projects {
                buffer.extend_from_slice(canonical(project).as_bytes());
                buffer.push(END);
            }
        });
        self.last(|device| device.projects = range);
    }

    fn write(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Range<u32> {
        let start = self.here();
        write(&mut self.text);
        start..self.here()
    }

    fn last(&mut self, change: impl FnOnce(&mut DraftDevice)) {
        if let Some(device) = self.devices.last_mut() {
            change(device);
        }
    }

    /// Fills it with a document that the model has read.
    pub fn read(&mut self, document: &HostDocument) {
        self.begin(&document.host);
        for entry in &document.devices {
            let usb = UsbId { vendor: entry.vendor_id, product: entry.product_id };
            self.push(
                entry.id.get(),
                kind(usb.vendor.get(), usb.product.get()),
                port_code(&entry.port_path),
                entry.state() == Ok(Status::Available),
            );
            if let Some(serial) = &entry.serial {
                self.serial(serial);
            }
            self.traits(
                entry.class,
                entry.interface_classes.iter().copied(),
                entry.path.as_ref(),
                entry.tags.iter().map(String::as_str),
            );
            self.projects(entry.projects.iter());
        }
    }

    pub(crate) fn slice(&self, range: &Range<u32>) -> &[u8] {
        self.text.get(range.start as usize..range.end as usize).unwrap_or_default()
    }

    /// Puts the devices in the order of their ids, and says what cannot be.
    pub(crate) fn settle(&mut self) -> Result<(), Refusal> {
        let refused = |why: String| Err(Refusal::Host(why));
        if self.name.is_empty()
            || self.name.len() > MAX_NAME
            || self.name.chars().any(char::is_control)
        {
            return refused(format!(
                "host: found {:?}, wanted a name of 1 to {MAX_NAME} bytes without control \
                    characters",
                self.name.chars().take(60).collect::<String>()
            ));
        }
        if !self.devices.is_sorted_by(|a, b| a.id < b.id) {
            self.devices.sort_by_key(|device| device.id);
            if let Some(pair) = self.devices.windows(2).find(|pair| pair[0].id == pair[1].id) {
                return refused(format!(
                    "devices: found the id {} twice, wanted each once",
                    pair[0].id
                ));
            }
        }
        Ok(())
    }
}
