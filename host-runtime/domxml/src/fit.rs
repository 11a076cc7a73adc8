//! Whether a number of devices of certain speeds fits into the free ports of certain kinds.
//!
//! A matching between devices and ports. By Hall's theorem, every device finds a port exactly if no
//! set of port kinds has fewer ports than there are devices that fit only into these kinds. There
//! are four kinds, so all sets are counted; the message to the operator names the first set that
//! has too few ports. (A property test compares this with brute force.)

use virt_usb_model::{Speed, SpeedMask};

/// Devices that a port can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Serves {
    /// Low and full speed: UHCI, OHCI, the ports of a hub.
    Slow,
    /// High speed only: an EHCI port without a companion.
    High,
    /// Low to high speed: an EHCI port with its UHCI companion.
    Usb2,
    /// A port of xHCI, which serves all devices.
    All,
}

impl Serves {
    /// All kinds of ports, each at the place of its number.
    const KINDS: [Self; 4] = [Self::Slow, Self::High, Self::Usb2, Self::All];

    /// The speeds of such a port, as QEMU registers it.
    pub(crate) const fn speeds(self) -> SpeedMask {
        match self {
            Self::Slow => SpeedMask::new(&[Speed::Low, Speed::Full]),
            Self::High => SpeedMask::new(&[Speed::High]),
            Self::Usb2 => SpeedMask::new(&[Speed::Low, Speed::Full, Speed::High]),
            Self::All => SpeedMask::ANY,
        }
    }
}

/// Comparison of a domain's free USB ports with the devices to add.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// There are free ports enough, on what is declared or on the controller that libvirt adds by
    /// default.
    Fits,
    /// No controller is declared and the default one would not do: inject a `qemu-xhci` with 15
    /// ports.
    NeedsController,
    /// No controller is declared, and libvirt adds none for this machine, neither at its start nor
    /// later. An injected `qemu-xhci` would do, for a caller that uses the edited XML.
    NoController,
    /// The domain declares that it has no USB: `<controller type='usb' model='none'/>`.
    NoUsb,
    /// The machine has no PCI bus, which every USB controller that libvirt can add needs.
    NoPci,
    /// Some devices have no port.
    TooFew(TooFew),
}

/// Ports that are needed, and those that are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooFew {
    /// How many of the devices to add need a port of at least `speed`'s kind.
    pub needed: usize,
    /// How many free ports serve them.
    pub free: usize,
    /// The slowest speed at which such a port would do; `None` when ports of any speed are too few.
    pub speed: Option<Speed>,
}

/// Free ports, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Free([usize; 4]);

impl Free {
    pub(crate) fn count(ports: impl IntoIterator<Item = Serves>) -> Self {
        let mut free = Self::default();
        for port in ports {
            if let Some(count) = free.0.get_mut(port as usize) {
                *count += 1;
            }
        }
        free
    }

    /// `Ok` when each of `wants` gets a port of its own; else the devices that do not.
    pub(crate) fn take(self, wants: &[SpeedMask]) -> Result<(), TooFew> {
        // Each set of kinds, as bits; smaller sets first, so that the message names the cause and
        // not the sum.
        let mut sets: [u8; 16] = std::array::from_fn(|set| u8::try_from(set).unwrap_or_default());
        sets.sort_by_key(|set| set.count_ones());
        for set in sets {
            let chosen = |kind: &Serves| set & (1 << *kind as u8) != 0;
            let only = |want: &&SpeedMask| {
                Serves::KINDS.iter().all(|kind| chosen(kind) || !kind.speeds().meets(**want))
            };
            let needed = wants.iter().filter(only).count();
            let free =
                Serves::KINDS.iter().zip(self.0).filter(|(kind, _)| chosen(kind)).map(|(_, n)| n);
            let free = free.sum();
            if needed > free {
                let slowest = wants.iter().filter(only).filter_map(|want| want.slowest()).min();
                let speed = slowest.filter(|_| !Serves::KINDS.iter().all(chosen));
                return Err(TooFew { needed, free, speed });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virt_usb_model::Speed::{Full, High, Low, Super};

    /// Tries every assignment.
    fn possible(ports: &mut Vec<Serves>, wants: &[SpeedMask]) -> bool {
        let Some((first, rest)) = wants.split_first() else { return true };
        (0..ports.len()).any(|i| {
            let port = ports.swap_remove(i);
            let fits = port.speeds().meets(*first) && possible(&mut ports.clone(), rest);
            ports.push(port);
            let last = ports.len() - 1;
            ports.swap(i, last);
            fits
        })
    }

    fn any_want() -> impl Strategy<Value = SpeedMask> {
        let wants = [
            SpeedMask::ANY,
            SpeedMask::new(&[Low]),
            SpeedMask::new(&[Full]),
            SpeedMask::new(&[High]),
            SpeedMask::new(&[Full, High]),
            SpeedMask::new(&[Super]),
            SpeedMask::new(&[High, Super]),
            SpeedMask::new(&[Full, High, Super]),
        ];
        prop::sample::select(wants.to_vec())
    }

    fn any_port() -> impl Strategy<Value = Serves> {
        prop::sample::select(Serves::KINDS.to_vec())
    }

    proptest! {
        #[test]
        fn counting_agrees_with_brute_force(
            mut ports in prop::collection::vec(any_port(), 0..6),
            wants in prop::collection::vec(any_want(), 0..6),
        ) {
            let counted = Free::count(ports.clone()).take(&wants);
            prop_assert_eq!(counted.is_ok(), possible(&mut ports, &wants), "{:?}", counted);
        }

        #[test]
        fn a_shortage_is_a_real_shortage(
            ports in prop::collection::vec(any_port(), 0..6),
            wants in prop::collection::vec(any_want(), 0..6),
        ) {
            if let Err(TooFew { needed, free, speed }) = Free::count(ports.clone()).take(&wants) {
                prop_assert!(needed > free && needed <= wants.len() && free <= ports.len());
                let slowest: Vec<_> = wants.iter().map(|want| want.slowest()).collect();
                prop_assert!(speed.is_none() || slowest.contains(&speed));
            }
        }
    }
}
