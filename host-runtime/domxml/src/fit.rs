//! Do so many devices of such speeds fit into so many free ports of such kinds?
//!
//! A matching between devices and ports, but a small one: four kinds of ports and four groups of devices. By Hall's
//! theorem everybody finds a port exactly when no group of devices has fewer ports than members, so the groups are
//! counted, and the one that comes short is what the operator is told. (A property test compares this with brute
//! force.)

use virt_usb_model::Speed;

/// What a port can serve.
///
/// QEMU refuses a device on a port of another speed ("speed mismatch"), and what runs at SuperSpeed on the host
/// is not slowed down for an EHCI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Serves {
    /// Low and full speed: UHCI, OHCI, the ports of a hub.
    Slow,
    /// High speed only: an EHCI port without a companion.
    High,
    /// Low to high speed: an EHCI port with its UHCI companion.
    Usb2,
    /// Everything: xHCI.
    All,
}

/// How a domain's free USB ports compare with what is to be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// There are free ports enough, on what is declared or on the controller that libvirt adds by default.
    Fits,
    /// No controller is declared and the default one would not do: inject a `qemu-xhci` with 15 ports.
    NeedsController,
    /// The domain has no USB: `<controller type='usb' model='none'>`, or a machine that never gets a controller.
    NoUsb,
    /// Some devices have no port.
    TooFew {
        /// How many of the devices to add need a port of at least `speed`'s kind.
        needed: usize,
        /// How many free ports serve them.
        free: usize,
        /// The slowest speed among those devices; `None` when ports of any speed are too few.
        speed: Option<Speed>,
    },
}

/// Free ports, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Free {
    pub(crate) slow: usize,
    pub(crate) high: usize,
    pub(crate) usb2: usize,
    pub(crate) all: usize,
}

impl Free {
    pub(crate) fn count(ports: impl IntoIterator<Item = Serves>) -> Self {
        ports.into_iter().fold(Self::default(), |mut free, port| {
            match port {
                Serves::Slow => free.slow += 1,
                Serves::High => free.high += 1,
                Serves::Usb2 => free.usb2 += 1,
                Serves::All => free.all += 1,
            }
            free
        })
    }

    /// `Ok` when each of `wants` gets a port of its own; else the group that does not, as [`Fit::TooFew`].
    pub(crate) fn take(self, wants: &[Option<Speed>]) -> Result<(), Fit> {
        let Self { slow, high, usb2, all } = self;
        // Each group with the ports that serve any of it; the other groups follow from these.
        let groups: [(fn(Speed) -> bool, usize); 3] = [
            (|s| s > Speed::High, all),
            (|s| s >= Speed::High, high + usb2 + all),
            (|s| s != Speed::High, slow + usb2 + all),
        ];
        for (belongs, free) in groups {
            let members = || wants.iter().flatten().copied().filter(|&s| belongs(s));
            let needed = members().count();
            if needed > free {
                return Err(Fit::TooFew { needed, free, speed: members().min() });
            }
        }
        let free = slow + high + usb2 + all;
        if wants.len() > free { Err(Fit::TooFew { needed: wants.len(), free, speed: None }) } else { Ok(()) }
    }
}
