//! The speeds of guest ports on which QEMU attaches a USB device of the host.
//!
//! QEMU computes a mask of speeds from the endpoints of all configurations (`usb_host_speed_compat`
//! in `hw/usb/host-libusb.c`) and refuses a port whose own mask has none of them ("speed
//! mismatch"). The kernel's `descriptors` attribute holds the same bytes that QEMU is given by
//! libusb, so the mask is known before the guest starts. Descriptors that libusb rejects are passed
//! over here as they are there (`parse_configuration` in libusb's `descriptor.c`).

use alloc::vec::Vec;

use crate::{Class, Descriptors, Speed};

/// bDescriptorType of each standard descriptor (USB 3.2, table 9-6).
const DEVICE: u8 = 1;
const CONFIGURATION: u8 = 2;
const INTERFACE: u8 = 4;
const ENDPOINT: u8 = 5;
const SUPERSPEED_COMPANION: u8 = 0x30;

/// Bytes of each standard descriptor.
const DEVICE_BYTES: usize = 18;
const CONFIGURATION_BYTES: usize = 9;
const INTERFACE_BYTES: usize = 9;
const ENDPOINT_BYTES: usize = 7;
const COMPANION_BYTES: usize = 6;

/// Interfaces of one configuration, and endpoints of one setting, beyond which libusb rejects it.
const MAX_INTERFACES: u8 = 32;
const MAX_ENDPOINTS: u8 = 32;

/// bInterfaceSubClass of mass storage that takes SCSI commands.
const SCSI: u8 = 6;

/// Largest interrupt packet of a port at full speed, and at high speed, in bytes.
const FULL_SPEED_PACKET: u16 = 64;
const HIGH_SPEED_PACKET: u16 = 1024;

/// A set of speeds: those of a port, or those of the ports on which QEMU attaches a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpeedMask(u8);

impl SpeedMask {
    /// Every speed: a redirection, or a device whose speed is not known.
    pub const ANY: Self = Self(0b1111);

    /// The set of these speeds.
    pub const fn new(speeds: &[Speed]) -> Self {
        let mut mask = 0;
        let mut rest = speeds;
        while let [first, others @ ..] = rest {
            mask |= bit(*first);
            rest = others;
        }
        Self(mask)
    }

    /// The ports for a device that runs at `speed` on the host.
    ///
    /// Without descriptors the mask is that of a device without endpoints: nothing is ruled out
    /// that QEMU might accept.
    pub fn of(speed: Option<Speed>, descriptors: Option<&Descriptors>) -> Self {
        let Some(speed) = speed else { return Self::ANY };
        let own = bit(speed);
        if speed <= Speed::Full {
            return Self(own);
        }
        let limits = descriptors.map(|d| Limits::of(d.bytes())).unwrap_or_default();
        let high = if speed > Speed::High && !limits.not_high { bit(Speed::High) } else { 0 };
        let full = if limits.not_full { 0 } else { bit(Speed::Full) };
        Self(own | high | full)
    }

    /// Whether the two sets share a speed: QEMU attaches a device of one to a port of the other.
    pub const fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The slowest speed of the set; `None` for an empty one.
    pub fn slowest(self) -> Option<Speed> {
        SPEEDS.into_iter().find(|speed| self.0 & bit(*speed) != 0)
    }

    /// The fastest speed of the set; `None` for an empty one.
    pub fn fastest(self) -> Option<Speed> {
        SPEEDS.into_iter().rev().find(|speed| self.0 & bit(*speed) != 0)
    }
}

/// The speeds that ports have: QEMU has no port of its own for SuperSpeed+.
const SPEEDS: [Speed; 4] = [Speed::Low, Speed::Full, Speed::High, Speed::Super];

const fn bit(speed: Speed) -> u8 {
    match speed {
        Speed::Low => 1,
        Speed::Full => 2,
        Speed::High => 4,
        Speed::Super | Speed::SuperPlus => 8,
    }
}

/// The slower speeds that a device's endpoints rule out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Limits {
    not_full: bool,
    not_high: bool,
}

impl Limits {
    /// From all descriptors of a device.
    fn of(bytes: &[u8]) -> Self {
        let mut limits = Self::default();
        for bytes in configurations(bytes) {
            // QEMU stops asking for configurations at the first one that libusb rejects.
            let Some(found) = configuration(bytes) else { break };
            limits.not_full |= found.not_full;
            limits.not_high |= found.not_high;
        }
        limits
    }

    fn add(&mut self, endpoint: &Endpoint<'_>) {
        match endpoint.attributes & 3 {
            // Isochronous.
            1 => (self.not_full, self.not_high) = (true, true),
            // Bulk.
            2 if endpoint.has_streams() => (self.not_full, self.not_high) = (true, true),
            // Interrupt.
            3 => {
                self.not_full |= endpoint.max_packet > FULL_SPEED_PACKET;
                self.not_high |= endpoint.max_packet > HIGH_SPEED_PACKET;
            }
            _ => {}
        }
    }
}

struct Endpoint<'a> {
    attributes: u8,
    /// Unmasked wMaxPacketSize: QEMU does not mask its upper bits either.
    max_packet: u16,
    /// The descriptors of the endpoint's class.
    extra: &'a [u8],
}

impl Endpoint<'_> {
    /// Whether its SuperSpeed companion descriptor, the first one, has MaxStreams.
    fn has_streams(&self) -> bool {
        let mut rest = self.extra;
        while let [length, kind, ..] = *rest {
            if kind == SUPERSPEED_COMPANION {
                let attributes = rest.get(3).filter(|_| usize::from(length) >= COMPANION_BYTES);
                return attributes.is_some_and(|attributes| attributes & 0x1f != 0);
            }
            rest = rest.get(usize::from(length)..).unwrap_or_default();
        }
        false
    }
}

/// The configurations, each up to the next one: as many as the device descriptor says.
fn configurations(bytes: &[u8]) -> Vec<&[u8]> {
    let Some(&count) = bytes.get(DEVICE_BYTES - 1) else { return Vec::new() };
    let mut rest = bytes.get(DEVICE_BYTES..).unwrap_or_default();
    let mut found = Vec::new();
    while found.len() < usize::from(count) && is_configuration(rest) {
        let is_last = found.len() + 1 == usize::from(count);
        let end = if is_last { Some(rest.len()) } else { next_configuration(rest) };
        let Some((one, behind)) = end.and_then(|end| rest.split_at_checked(end)) else { break };
        found.push(one);
        rest = behind;
    }
    found
}

fn is_configuration(bytes: &[u8]) -> bool {
    bytes.len() >= CONFIGURATION_BYTES && bytes.get(1) == Some(&CONFIGURATION)
}

/// Where the configuration behind the first one begins.
fn next_configuration(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(&[length @ 2..=u8::MAX, kind, ..]) = bytes.get(at..) {
        if at > 0 && kind == CONFIGURATION {
            return Some(at);
        }
        at += usize::from(length);
    }
    None
}

/// Limits that the endpoints of one configuration set; `None` if libusb rejects it.
fn configuration(bytes: &[u8]) -> Option<Limits> {
    let (&length, &interfaces) = (bytes.first()?, bytes.get(4)?);
    if usize::from(length) < CONFIGURATION_BYTES || interfaces > MAX_INTERFACES {
        return None;
    }
    let mut limits = Limits::default();
    let mut rest = bytes.get(usize::from(length)..)?;
    for _ in 0..interfaces {
        let (start, whole) = skip_others(rest)?;
        if !whole {
            break;
        }
        rest = interface(start, &mut limits)?;
        if rest.len() == start.len() {
            break;
        }
    }
    Some(limits)
}

/// Reads one interface with all its settings and returns what is behind; `None` when libusb rejects
/// it.
fn interface<'a>(bytes: &'a [u8], limits: &mut Limits) -> Option<&'a [u8]> {
    let mut rest = bytes;
    let mut number = None;
    // If a setting is SCSI storage, QEMU ignores the rest of the interface.
    let mut is_scsi = false;
    while let [length, INTERFACE, this, _, endpoints, class, subclass, _, _, ..] = *rest {
        if *number.get_or_insert(this) != this {
            break;
        }
        if usize::from(length) < INTERFACE_BYTES {
            return None;
        }
        let Some(behind) = rest.get(usize::from(length)..) else { break };
        if endpoints > MAX_ENDPOINTS {
            return None;
        }
        is_scsi |= class == Class::MASS_STORAGE.get() && subclass == SCSI;
        let (behind, whole) = skip_others(behind)?;
        rest = behind;
        if !whole {
            break;
        }
        for _ in 0..endpoints {
            let Some((endpoint, behind)) = endpoint(rest)? else { break };
            if !is_scsi {
                limits.add(&endpoint);
            }
            rest = behind;
        }
    }
    Some(rest)
}

/// Reads one endpoint and returns what is behind it; `Some(None)` when there is none, `None` when
/// libusb rejects it.
#[expect(clippy::option_option, reason = "rejected, absent and read are three outcomes")]
fn endpoint(bytes: &[u8]) -> Option<Option<(Endpoint<'_>, &[u8])>> {
    let &[length, kind, ..] = bytes else { return None };
    if kind != ENDPOINT {
        return Some(None);
    }
    if usize::from(length) < ENDPOINT_BYTES {
        return None;
    }
    let (Some(behind), &[_, _, _, attributes, low, high, ..]) =
        (bytes.get(usize::from(length)..), bytes)
    else {
        return Some(None);
    };
    let (rest, whole) = skip_others(behind)?;
    // What is cut off hides all that the class has said of the endpoint.
    let extra = behind.get(..behind.len() - rest.len()).filter(|_| whole).unwrap_or_default();
    Some(Some((Endpoint { attributes, max_packet: u16::from_le_bytes([low, high]), extra }, rest)))
}

/// Skips descriptors of classes and vendors; false: one of them is cut off. `None` when libusb
/// rejects one.
fn skip_others(bytes: &[u8]) -> Option<(&[u8], bool)> {
    let mut rest = bytes;
    while let [length, kind, ..] = *rest {
        if length < 2 {
            return None;
        }
        if usize::from(length) > rest.len() {
            return Some((rest, false));
        }
        if matches!(kind, DEVICE | CONFIGURATION | INTERFACE | ENDPOINT) {
            break;
        }
        rest = rest.get(usize::from(length)..).unwrap_or_default();
    }
    Some((rest, true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// QEMU's and libusb's own way: a tree of all descriptors first, then the loops over it.
    mod oracle {
        use alloc::vec::Vec;

        pub(super) struct Endpoint {
            attributes: u8,
            max_packet: u16,
            extra: Vec<u8>,
        }
        pub(super) struct Setting {
            class: u8,
            subclass: u8,
            endpoints: Vec<Endpoint>,
        }
        type Interface = Vec<Setting>;
        struct Rejected;

        /// `usb_host_speed_compat`: whether the device fits high speed and full speed.
        pub(super) fn compat(bytes: &[u8]) -> (bool, bool) {
            let (mut high, mut full) = (true, true);
            for c in 0.. {
                let Some(Ok(interfaces)) = slice(bytes, c).map(parse_configuration) else { break };
                for settings in &interfaces {
                    for setting in settings {
                        if setting.class == 8 && setting.subclass == 6 {
                            break;
                        }
                        for endpoint in &setting.endpoints {
                            match endpoint.attributes & 3 {
                                1 => (high, full) = (false, false),
                                2 if streams(&endpoint.extra) > 0 => (high, full) = (false, false),
                                3 => {
                                    full &= endpoint.max_packet <= 64;
                                    high &= endpoint.max_packet <= 1024;
                                }
                                _ => {}
                            }
                        }
                    }
                }
            }
            (high, full)
        }

        /// The `n`th configuration, as `parse_config_descriptors` in libusb's `os/linux_usbfs.c`
        /// cuts it.
        fn slice(bytes: &[u8], n: usize) -> Option<&[u8]> {
            let count = usize::from(*bytes.get(17)?);
            let (mut start, mut found) = (18, 0);
            while found < count {
                let rest = bytes.get(start..)?;
                if rest.len() < 9 || rest[1] != 2 {
                    return None;
                }
                let mut end = rest.len();
                if found + 1 < count {
                    let mut at = 0;
                    end = loop {
                        if at >= rest.len() || rest.len() - at < 2 || rest[at] < 2 {
                            return None;
                        }
                        if at > 0 && rest[at + 1] == 2 {
                            break at;
                        }
                        at += usize::from(rest[at]);
                    };
                }
                if found == n {
                    return Some(&rest[..end]);
                }
                (start, found) = (start + end, found + 1);
            }
            None
        }

        fn parse_configuration(bytes: &[u8]) -> Result<Vec<Interface>, Rejected> {
            if bytes[0] < 9 || usize::from(bytes[0]) > bytes.len() || bytes[4] > 32 {
                return Err(Rejected);
            }
            let mut at = usize::from(bytes[0]);
            let mut interfaces = Vec::new();
            for _ in 0..bytes[4] {
                if !skip(bytes, &mut at)? {
                    return Ok(interfaces);
                }
                let before = at;
                interfaces.push(parse_interface(bytes, &mut at)?);
                if at == before {
                    interfaces.pop();
                    break;
                }
            }
            Ok(interfaces)
        }

        fn parse_interface(bytes: &[u8], at: &mut usize) -> Result<Interface, Rejected> {
            let mut settings = Vec::new();
            let mut number = None;
            while bytes.len() - *at >= 9 {
                let head = &bytes[*at..*at + 9];
                if head[1] != 4 || number.is_some_and(|n| n != head[2]) {
                    break;
                }
                if head[0] < 9 {
                    return Err(Rejected);
                }
                if usize::from(head[0]) > bytes.len() - *at {
                    break;
                }
                if head[4] > 32 {
                    return Err(Rejected);
                }
                number = Some(head[2]);
                *at += usize::from(head[0]);
                let mut setting =
                    Setting { class: head[5], subclass: head[6], endpoints: Vec::new() };
                let whole = skip(bytes, at)?;
                for _ in 0..if whole { head[4] } else { 0 } {
                    match parse_endpoint(bytes, at)? {
                        Some(endpoint) => setting.endpoints.push(endpoint),
                        None => break,
                    }
                }
                settings.push(setting);
                if !whole {
                    break;
                }
            }
            Ok(settings)
        }

        fn parse_endpoint(bytes: &[u8], at: &mut usize) -> Result<Option<Endpoint>, Rejected> {
            let left = bytes.len() - *at;
            if left < 2 {
                return Err(Rejected);
            }
            let length = usize::from(bytes[*at]);
            if bytes[*at + 1] != 5 {
                return Ok(None);
            }
            if length < 7 {
                return Err(Rejected);
            }
            if length > left {
                return Ok(None);
            }
            let head = &bytes[*at..*at + 7];
            *at += length;
            let begin = *at;
            let whole = skip(bytes, at)?;
            let extra = if whole { bytes[begin..*at].to_vec() } else { Vec::new() };
            let max_packet = u16::from(head[4]) + 256 * u16::from(head[5]);
            Ok(Some(Endpoint { attributes: head[3], max_packet, extra }))
        }

        fn skip(bytes: &[u8], at: &mut usize) -> Result<bool, Rejected> {
            while bytes.len() - *at >= 2 {
                let length = usize::from(bytes[*at]);
                if length < 2 {
                    return Err(Rejected);
                }
                if length > bytes.len() - *at {
                    return Ok(false);
                }
                if [1, 2, 4, 5].contains(&bytes[*at + 1]) {
                    break;
                }
                *at += length;
            }
            Ok(true)
        }

        /// `libusb_get_ss_endpoint_companion_descriptor`, and the five bits that QEMU takes of it.
        fn streams(extra: &[u8]) -> u8 {
            let mut at = 0;
            while at + 2 <= extra.len() {
                if extra[at + 1] == 0x30 {
                    return if extra[at] < 6 { 0 } else { extra[at + 3] & 0x1f };
                }
                at += usize::from(extra[at]);
            }
            0
        }
    }

    const ISOCHRONOUS: u8 = 1;
    const BULK: u8 = 2;
    const INTERRUPT: u8 = 3;

    fn device(configurations: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = alloc::vec![18, 1, 0, 2, 0, 0, 0, 64, 3, 4, 1, 0x60, 0, 1, 1, 2, 3];
        bytes.push(u8::try_from(configurations.len()).unwrap());
        bytes.extend(configurations.concat());
        bytes
    }

    fn configuration(interfaces: &[Vec<u8>]) -> Vec<u8> {
        let mut numbers: Vec<u8> = interfaces.iter().map(|i| i[2]).collect();
        numbers.dedup();
        let bytes = interfaces.concat();
        let total = u16::try_from(9 + bytes.len()).unwrap().to_le_bytes();
        let count = u8::try_from(numbers.len()).unwrap();
        [&[9, 2, total[0], total[1], count, 1, 0, 0x80, 50][..], &bytes].concat()
    }

    fn interface(number: u8, class: u8, subclass: u8, endpoints: &[Vec<u8>]) -> Vec<u8> {
        let count = u8::try_from(endpoints.len()).unwrap();
        [&[9, 4, number, 0, count, class, subclass, 0, 0][..], &endpoints.concat()].concat()
    }

    fn endpoint(kind: u8, max_packet: u16) -> Vec<u8> {
        let [low, high] = max_packet.to_le_bytes();
        alloc::vec![7, 5, 0x81, kind, low, high, 1]
    }

    fn companion(attributes: u8) -> Vec<u8> {
        alloc::vec![6, 0x30, 15, attributes, 0, 0]
    }

    /// The mask of a device at `speed` with one interface of a vendor's class.
    fn mask(speed: Speed, endpoints: &[Vec<u8>]) -> SpeedMask {
        of(speed, &device(&[configuration(&[interface(0, 0xff, 0, endpoints)])]))
    }

    fn of(speed: Speed, bytes: &[u8]) -> SpeedMask {
        SpeedMask::of(Some(speed), Descriptors::new(bytes.to_vec()).as_ref())
    }

    use Speed::{Full, High, Low, Super, SuperPlus};

    #[test]
    fn slower_ports_serve_what_qemu_slows_down() {
        let all = SpeedMask::new(&[Super, High, Full]);
        assert_eq!(
            mask(High, &[endpoint(BULK, 512)]),
            SpeedMask::new(&[High, Full]),
            "a licence key"
        );
        assert_eq!(mask(Super, &[endpoint(BULK, 1024)]), all);
        assert_eq!(mask(SuperPlus, &[endpoint(BULK, 1024)]), all);
        assert_eq!(mask(High, &[endpoint(INTERRUPT, 64)]), SpeedMask::new(&[High, Full]));
        assert_eq!(mask(High, &[endpoint(INTERRUPT, 65)]), SpeedMask::new(&[High]));
        assert_eq!(mask(Super, &[endpoint(INTERRUPT, 65)]), SpeedMask::new(&[Super, High]));
        assert_eq!(mask(Super, &[endpoint(INTERRUPT, 1024)]), SpeedMask::new(&[Super, High]));
        assert_eq!(mask(Super, &[endpoint(INTERRUPT, 1025)]), SpeedMask::new(&[Super]));
        assert_eq!(
            mask(High, &[endpoint(INTERRUPT, 0x1400)]),
            SpeedMask::new(&[High]),
            "three a frame"
        );
        assert_eq!(mask(High, &[endpoint(ISOCHRONOUS, 8)]), SpeedMask::new(&[High]), "a camera");
        assert_eq!(mask(Super, &[endpoint(ISOCHRONOUS, 8)]), SpeedMask::new(&[Super]));
        let streams = [[endpoint(BULK, 1024), companion(4)].concat()];
        assert_eq!(mask(Super, &streams), SpeedMask::new(&[Super]));
        assert_eq!(mask(Super, &[[endpoint(BULK, 1024), companion(0)].concat()]), all);
        // An interrupt endpoint's companion says nothing of streams.
        assert_eq!(mask(Super, &[[endpoint(INTERRUPT, 8), companion(4)].concat()]), all);
    }

    #[test]
    fn low_and_full_speed_stay_and_what_is_not_known_is_not_refused() {
        let camera = [endpoint(ISOCHRONOUS, 8)];
        assert_eq!(mask(Low, &[]), SpeedMask::new(&[Low]));
        assert_eq!(mask(Full, &camera), SpeedMask::new(&[Full]));
        assert_eq!(SpeedMask::of(Some(High), None), SpeedMask::new(&[High, Full]));
        assert_eq!(SpeedMask::of(Some(Super), None), SpeedMask::new(&[Super, High, Full]));
        assert_eq!(SpeedMask::of(None, None), SpeedMask::ANY);
        assert_eq!((SpeedMask::ANY.slowest(), SpeedMask::ANY.fastest()), (Some(Low), Some(Super)));
        assert!(
            !SpeedMask::new(&[]).meets(SpeedMask::ANY) && SpeedMask::new(&[]).slowest().is_none()
        );
    }

    #[test]
    fn every_configuration_and_setting_counts() {
        let quiet = interface(0, 0xff, 0, &[endpoint(BULK, 512)]);
        let mut loud = interface(0, 0xff, 0, &[endpoint(ISOCHRONOUS, 8)]);
        loud[3] = 1;
        let one = configuration(&[quiet.clone(), loud.clone()]);
        assert_eq!(of(High, &device(&[one])), SpeedMask::new(&[High]), "an alternate setting");
        let two = [configuration(&[quiet]), configuration(&[loud])];
        assert_eq!(of(High, &device(&two)), SpeedMask::new(&[High]), "the second configuration");
        let cut = &device(&two)[..18 + two[0].len()];
        assert_eq!(of(High, cut), SpeedMask::new(&[High, Full]), "which is not there");
    }

    #[test]
    fn scsi_storage_is_passed_over() {
        let streams = [endpoint(BULK, 1024), companion(4)].concat();
        let bulk = interface(0, 8, 6, &[endpoint(BULK, 1024)]);
        let mut uas = interface(0, 8, 6, core::slice::from_ref(&streams));
        uas[3] = 1;
        let disk = device(&[configuration(&[bulk.clone(), uas.clone()])]);
        assert_eq!(of(Super, &disk), SpeedMask::new(&[Super, High, Full]));
        // QEMU leaves the interface at its first SCSI setting, whatever is behind it.
        let mut behind = interface(0, 0xff, 0, &[endpoint(ISOCHRONOUS, 8)]);
        behind[3] = 2;
        let hidden = device(&[configuration(&[bulk.clone(), behind.clone()])]);
        assert_eq!(of(High, &hidden), SpeedMask::new(&[High, Full]));
        behind[2] = 1;
        let beside = device(&[configuration(&[bulk, behind])]);
        assert_eq!(of(High, &beside), SpeedMask::new(&[High]));
        let other = device(&[configuration(&[interface(0, 8, 5, &[streams])])]);
        assert_eq!(of(Super, &other), SpeedMask::new(&[Super]), "storage without SCSI commands");
    }

    fn agree(bytes: &[u8]) -> Result<(), TestCaseError> {
        let limits = Limits::of(bytes);
        prop_assert_eq!((!limits.not_high, !limits.not_full), oracle::compat(bytes), "{:?}", bytes);
        Ok(())
    }

    fn any_endpoint() -> impl Strategy<Value = Vec<u8>> {
        let packet = prop::sample::select(alloc::vec![8, 64, 65, 512, 1024, 1025, 0x1400]);
        let extra = prop::collection::vec(prop::sample::select(alloc::vec![0x30u8, 0x25]), 0..3);
        (0..4u8, packet, extra, 0..8u8).prop_map(|(kind, packet, extra, attributes)| {
            let behind = extra.iter().flat_map(|kind| [6, *kind, 0, attributes, 0, 0]);
            endpoint(kind, packet).into_iter().chain(behind).collect()
        })
    }

    fn any_interface() -> impl Strategy<Value = Vec<u8>> {
        let class = prop::sample::select(alloc::vec![8u8, 3, 0xff]);
        (0..3u8, class, 5..7u8, prop::collection::vec(any_endpoint(), 0..3)).prop_map(
            |(number, class, subclass, endpoints)| interface(number, class, subclass, &endpoints),
        )
    }

    fn any_device() -> impl Strategy<Value = Vec<u8>> {
        let configuration =
            prop::collection::vec(any_interface(), 0..4).prop_map(|i| configuration(&i));
        prop::collection::vec(configuration, 0..3).prop_map(|c| device(&c))
    }

    proptest! {
        #[test]
        fn devices_are_judged_as_qemu_judges_them(bytes in any_device()) {
            agree(&bytes)?;
        }

        #[test]
        fn broken_devices_too(
            bytes in any_device(),
            cut in any::<prop::sample::Index>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0..40u8), 0..6),
        ) {
            let mut bytes = bytes;
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            agree(&bytes)?;
            agree(&bytes[..cut.index(bytes.len() + 1)])?;
        }

        #[test]
        fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            agree(&bytes)?;
        }

        #[test]
        fn a_mask_has_the_device_s_own_speed_and_nothing_faster(bytes in any_device()) {
            for speed in [Low, Full, High, Super] {
                let mask = of(speed, &bytes);
                prop_assert!(mask.meets(SpeedMask::new(&[speed])));
                prop_assert_eq!(mask.fastest(), Some(speed));
            }
        }
    }
}
