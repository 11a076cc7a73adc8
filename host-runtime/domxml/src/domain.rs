//! The contents of a domain's XML as plain data.

use virt_usb_model::{BusAddress, DeviceId, InstanceId, PortPath, ProjectId, UsbId};

use crate::host_source::HostSource;
use crate::usb_bus::UsbBus;

/// The alias prefix of a hostdev that virt-usb injected; the device's id follows.
pub(crate) const HOSTDEV_ALIAS: &str = "ua-usb-";
/// The alias prefix of a redirdev that virt-usb injected; the entry's number in the flavor follows.
pub(crate) const REDIRDEV_ALIAS: &str = "ua-usb-redir-";

/// The parts of a domain that virt-usb needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// The domain's name, never empty.
    pub name: String,
    /// The domain's UUID; a definition that libvirt has not seen yet may have none.
    pub uuid: Option<InstanceId>,
    /// Source of the flavor.
    pub flavor: FlavorSource,
    /// Why `restore` refused the domain: see [`Edits::refusal`](crate::Edits::refusal).
    pub refusal: Option<String>,
    /// The project that owns the instance (`uuid` of `nova:owner/nova:project`).
    pub project: Option<ProjectId>,
    /// Every `<hostdev type='usb'>` directly under `<devices>`, in order.
    pub hostdevs: Vec<UsbHostdev>,
    /// Every `usb-host` device that `<qemu:commandline>` gives to QEMU, in order: no libvirt
    /// device, so without an alias, and nothing edits it.
    pub commandline: Vec<UsbHostdev>,
    /// Every `<redirdev bus='usb'>` directly under `<devices>`, in order.
    pub redirdevs: Vec<Redirdev>,
    /// Resources of the host that the other devices use.
    pub host_sources: Vec<HostSource>,
    /// The USB controllers, and what occupies their ports.
    pub bus: UsbBus,
    /// Whether there is SPICE graphics, which a spicevmc redirection needs.
    pub spice: bool,
}

/// Where the domain says what it asks for. The first source that is there wins, in this order.
///
/// The values are returned as they are written: reading the JSON in them is the model's job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlavorSource {
    /// The domain says nothing, or says that it asks for nothing.
    ///
    /// Nova writes the whole of a flavor's extra specs from 32.0.0 (2025.2) on, and an empty
    /// `<nova:extraSpecs/>` when there are none: without a USB key in it there is nothing left to
    /// look up. The same holds for an empty element of our own namespace.
    None,
    /// The text of the element in our namespace under `<metadata>`, entities and CDATA resolved,
    /// trimmed.
    Metadata(String),
    /// At least one USB key in `nova:extraSpecs`.
    ExtraSpecs {
        /// The value of `usb:devices` or `usb_devices`.
        devices: Option<String>,
        /// The value of `usb:redirection_devices` or `usb_redirection_devices`.
        redirection: Option<String>,
    },
    /// A flavor's name only: from `name` of the element in our namespace or of `nova:flavor`.
    Named(String),
}

impl Domain {
    /// All host devices that the domain names: its hostdevs, then those of `<qemu:commandline>`.
    pub fn host_devices(&self) -> impl Iterator<Item = &UsbHostdev> {
        self.hostdevs.iter().chain(&self.commandline)
    }

    /// Whether the domain names a host device at all.
    pub fn has_host_devices(&self) -> bool {
        self.host_devices().next().is_some()
    }
}

/// A USB host device of the domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UsbHostdev {
    /// Vendor and product of the source. `None` when it names none, or no valid ones.
    pub usb: Option<UsbId>,
    /// The source's bus and device number on the host. `None` when it names none, or no valid ones.
    pub address: Option<BusAddress>,
    /// The source's port on the host (`<address bus='1' port='1.4'/>`, libvirt 12.8). `None` when
    /// it names none, or no valid one.
    pub port: Option<PortPath>,
    /// The alias, libvirt's own (`hostdev0`) or the user's (`ua-…`).
    pub alias: Option<String>,
    /// Whether the source has a `startupPolicy`, with which QEMU may take any device that it can
    /// open.
    pub has_startup_policy: bool,
}

impl UsbHostdev {
    /// Whether the source names a device in any way.
    pub const fn names_a_device(&self) -> bool {
        self.usb.is_some() || self.address.is_some() || self.port.is_some()
    }

    /// The device that the alias `ua-usb-<id>` names. virt-usb injects such hostdevs, but a user
    /// can write the alias too: only a claim shows that a hostdev is ours.
    pub fn injected(&self) -> Option<DeviceId> {
        let id: DeviceId = self.alias.as_deref()?.strip_prefix(HOSTDEV_ALIAS)?.parse().ok()?;
        (self.alias.as_deref() == Some(&hostdev_alias(id))).then_some(id)
    }
}

/// A USB redirection of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Redirdev {
    /// The character device's type: `spicevmc` or `tcp`. Empty when the element has none.
    pub kind: String,
    /// The alias, libvirt's own (`redir0`) or the user's (`ua-…`).
    pub alias: Option<String>,
}

impl Redirdev {
    /// The number of the flavor's entry that virt-usb injected here, from the alias
    /// `ua-usb-redir-<n>`.
    pub fn injected(&self) -> Option<usize> {
        let n: usize = self.alias.as_deref()?.strip_prefix(REDIRDEV_ALIAS)?.parse().ok()?;
        (self.alias.as_deref() == Some(&redirdev_alias(n))).then_some(n)
    }
}

/// The alias of the hostdev that virt-usb injects for a device.
pub fn hostdev_alias(id: DeviceId) -> String {
    format!("{HOSTDEV_ALIAS}{id}")
}

/// The alias of the redirdev that virt-usb injects for a flavor's entry.
pub fn redirdev_alias(n: usize) -> String {
    format!("{REDIRDEV_ALIAS}{n}")
}
