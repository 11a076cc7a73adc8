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

/// The devices above high speed, and with them those at it or below it.
struct Group {
    slow: bool,
    high: bool,
}

impl Group {
    fn has(&self, speed: Speed) -> bool {
        match speed {
            Speed::Low | Speed::Full => self.slow,
            Speed::High => self.high,
            Speed::Super | Speed::SuperPlus => true,
        }
    }
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
        let groups = [
            (Group { slow: false, high: false }, all),
            (Group { slow: false, high: true }, high + usb2 + all),
            (Group { slow: true, high: false }, slow + usb2 + all),
        ];
        for (group, free) in groups {
            let members = || wants.iter().flatten().copied().filter(|&s| group.has(s));
            let needed = members().count();
            if needed > free {
                return Err(Fit::TooFew { needed, free, speed: members().min() });
            }
        }
        let free = slow + high + usb2 + all;
        if wants.len() > free { Err(Fit::TooFew { needed: wants.len(), free, speed: None }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn serves(port: Serves, want: Option<Speed>) -> bool {
        match (port, want) {
            (Serves::All, _) | (_, None) => true,
            (Serves::Slow, Some(s)) => s <= Speed::Full,
            (Serves::High, Some(s)) => s == Speed::High,
            (Serves::Usb2, Some(s)) => s <= Speed::High,
        }
    }

    /// Tries every assignment.
    fn possible(ports: &mut Vec<Serves>, wants: &[Option<Speed>]) -> bool {
        let Some((first, rest)) = wants.split_first() else { return true };
        (0..ports.len()).any(|i| {
            let port = ports.swap_remove(i);
            let fits = serves(port, *first) && possible(&mut ports.clone(), rest);
            ports.push(port);
            let last = ports.len() - 1;
            ports.swap(i, last);
            fits
        })
    }

    fn any_speed() -> impl Strategy<Value = Option<Speed>> {
        use Speed::{Full, High, Low, Super, SuperPlus};
        prop::sample::select(vec![None, Some(Low), Some(Full), Some(High), Some(Super), Some(SuperPlus)])
    }

    fn any_port() -> impl Strategy<Value = Serves> {
        prop::sample::select(vec![Serves::Slow, Serves::High, Serves::Usb2, Serves::All])
    }

    proptest! {
        #[test]
        fn counting_agrees_with_brute_force(
            mut ports in prop::collection::vec(any_port(), 0..6),
            wants in prop::collection::vec(any_speed(), 0..6),
        ) {
            let counted = Free::count(ports.clone()).take(&wants);
            prop_assert_eq!(counted.is_ok(), possible(&mut ports, &wants), "{:?}", counted);
        }

        #[test]
        fn what_is_short_is_really_short(
            ports in prop::collection::vec(any_port(), 0..6),
            wants in prop::collection::vec(any_speed(), 0..6),
        ) {
            if let Err(Fit::TooFew { needed, free, speed }) = Free::count(ports.clone()).take(&wants) {
                prop_assert!(needed > free && needed <= wants.len() && free <= ports.len());
                prop_assert!(speed.is_none() || wants.contains(&speed));
            }
        }
    }
}
