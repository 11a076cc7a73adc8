//! The flavor, the owner and a refusal in `<metadata>`.
//!
//! Metadata is other people's namespaces side by side, so names are resolved here, and only here:
//! the elements that libvirt reads itself have no namespace.

use std::collections::HashMap;

use virt_usb_model::ProjectId;

use crate::domain::FlavorSource;
use crate::error::{XmlError, cut};
use crate::tag::Tag;

/// The namespace of virt-usb's own metadata element.
pub const NAMESPACE: &str = "urn:virt-usb:flavor:1";
/// The namespace of the element by which `restore` hands a refusal on to `prepare`.
pub(crate) const REFUSAL_NAMESPACE: &str = "urn:virt-usb:refusal:1";
/// libvirt's namespace for what it hands to QEMU unread (<https://libvirt.org/drvqemu.html>).
const QEMU: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
/// Nova's namespaces, any version.
const NOVA: &str = "http://openstack.org/xmlns/libvirt/nova/";

const DEVICES: [&str; 2] = ["usb:devices", "usb_devices"];
const REDIRECTION: [&str; 2] = ["usb:redirection_devices", "usb_redirection_devices"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Ours,
    Refusal,
    Nova,
    Qemu,
    Other,
}

/// Prefixes in force. Looking one up costs the same however many there are.
#[derive(Default)]
pub(crate) struct Namespaces<'a> {
    bound: HashMap<&'a str, Vec<Space>>,
    /// At which depth which prefix was bound, to undo it.
    log: Vec<(usize, &'a str)>,
}

impl<'a> Namespaces<'a> {
    /// Takes in the declarations of an element that is `depth` deep.
    pub(crate) fn enter(&mut self, tag: &Tag<'a>, depth: usize) {
        for attribute in &tag.attributes {
            let prefix = match attribute.name {
                "xmlns" => "",
                name => match name.strip_prefix("xmlns:") {
                    Some(prefix) => prefix,
                    None => continue,
                },
            };
            let space = match attribute.decoded().as_ref() {
                NAMESPACE => Space::Ours,
                REFUSAL_NAMESPACE => Space::Refusal,
                QEMU => Space::Qemu,
                uri if uri.starts_with(NOVA) => Space::Nova,
                _ => Space::Other,
            };
            self.bound.entry(prefix).or_default().push(space);
            self.log.push((depth, prefix));
        }
    }

    /// Forgets the declarations of the element that was `depth` deep.
    pub(crate) fn leave(&mut self, depth: usize) {
        while let Some((_, prefix)) = self.log.pop_if(|(bound_at, _)| *bound_at >= depth) {
            if let Some(spaces) = self.bound.get_mut(prefix) {
                spaces.pop();
            }
        }
    }

    /// The namespace and the local name of an element.
    pub(crate) fn resolve(&self, name: &'a str) -> (Space, &'a str) {
        let (prefix, local) = name.split_once(':').unwrap_or(("", name));
        let space = self.bound.get(prefix).and_then(|spaces| spaces.last());
        (space.copied().unwrap_or(Space::Other), local)
    }
}

/// Values that were found so far.
#[derive(Default)]
pub(crate) struct Metadata {
    ours: Option<Ours>,
    nova_name: Option<String>,
    extra_specs: bool,
    keys: HashMap<&'static str, String>,
    clash: Option<&'static str>,
    pub(crate) project: Option<ProjectId>,
}

struct Ours {
    name: Option<String>,
    text: String,
    line: usize,
}

impl Metadata {
    /// Our own element begins.
    pub(crate) fn ours(&mut self, tag: &Tag<'_>, line: usize) -> Result<(), XmlError> {
        if self.ours.is_some() {
            return Err(XmlError::Twice {
                what: "flavor element of virt-usb in the metadata",
                line,
            });
        }
        let name = tag.value("name").map(|n| n.trim().to_owned());
        if name.as_deref() == Some("") {
            let what = "the flavor's name in the metadata";
            return Err(XmlError::Value { what, found: String::new(), wanted: "a name", line });
        }
        self.ours = Some(Ours { name, text: String::new(), line });
        Ok(())
    }

    /// The text of our own element.
    pub(crate) fn ours_text(&mut self, text: &str) {
        if let Some(ours) = &mut self.ours {
            text.trim().clone_into(&mut ours.text);
        }
    }

    /// Reads the attributes of `nova:flavor`.
    pub(crate) fn nova_flavor(&mut self, tag: &Tag<'_>) {
        let name = tag.value("name").map(|n| n.trim().to_owned()).filter(|n| !n.is_empty());
        self.nova_name = self.nova_name.take().or(name);
    }

    /// Begins the element `nova:extraSpecs`.
    pub(crate) fn extra_specs(&mut self) {
        self.extra_specs = true;
    }

    /// The key of a `nova:extraSpec`, if it is one of ours.
    pub(crate) fn key(tag: &Tag<'_>) -> Option<&'static str> {
        let name = tag.value("name")?;
        DEVICES.into_iter().chain(REDIRECTION).find(|key| *key == name)
    }

    /// The value of a key.
    pub(crate) fn extra_spec(&mut self, key: &'static str, value: &str) {
        let value = value.trim();
        match self.keys.get(key) {
            Some(before) if before != value => self.clash = Some(key),
            Some(_) => {}
            None => {
                self.keys.insert(key, value.to_owned());
            }
        }
    }

    /// Reads the attributes of `nova:project`.
    pub(crate) fn project(&mut self, tag: &Tag<'_>, line: usize) -> Result<(), XmlError> {
        let Some(uuid) = tag.value("uuid").filter(|u| !u.trim().is_empty()) else { return Ok(()) };
        let what = "the project of nova:owner";
        let wrong = |_| XmlError::Value { what, found: cut(&uuid), wanted: "a project id", line };
        self.project = Some(uuid.trim().parse().map_err(wrong)?);
        Ok(())
    }

    /// The flavor, once the whole document was seen.
    pub(crate) fn flavor(&mut self) -> Result<FlavorSource, XmlError> {
        if let Some(ours) = self.ours.take() {
            return match ours {
                Ours { name: Some(_), text, line } if !text.is_empty() => Err(XmlError::Syntax {
                    line,
                    what:
                        "the flavor element in the metadata has a name and a text; keep one of them"
                            .to_owned(),
                }),
                Ours { name: Some(name), .. } => Ok(FlavorSource::Metadata(format!("@{name}"))),
                Ours { text, .. } if text.is_empty() => Ok(FlavorSource::None),
                Ours { text, .. } => Ok(FlavorSource::Metadata(text)),
            };
        }
        if let Some(key) = self.clash {
            return Err(XmlError::Conflict { first: spec(key), second: spec(key) });
        }
        let devices = self.either(DEVICES)?;
        let redirection = self.either(REDIRECTION)?;
        Ok(match self.nova_name.take() {
            _ if devices.is_some() || redirection.is_some() => {
                FlavorSource::ExtraSpecs { devices, redirection }
            }
            Some(name) if !self.extra_specs => FlavorSource::Named(name),
            _ => FlavorSource::None,
        })
    }

    /// The value of one of two spellings of a key, the scoped one first.
    fn either(&mut self, [scoped, bare]: [&'static str; 2]) -> Result<Option<String>, XmlError> {
        match (self.keys.remove(scoped), self.keys.remove(bare)) {
            (Some(a), Some(b)) if a != b => {
                Err(XmlError::Conflict { first: spec(scoped), second: spec(bare) })
            }
            (a, b) => Ok(a.or(b)),
        }
    }
}

fn spec(key: &str) -> String {
    format!("the extra spec {key}")
}
