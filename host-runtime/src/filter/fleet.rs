//! A made fleet, for measuring: the same for the same numbers, on every machine.

use virt_usb_model::{
    BusAddress, Class, DeviceEntry, DeviceId, HostDocument, PortPath, Speed, Status, UsbId,
};

/// The licence key that half of the hosts have two free ones of.
pub const COMMON: UsbId = UsbId::new(0x0529, 0x0001);
/// A device that one host in ten thousand has, and the first one has in any case.
pub const RARE: UsbId = UsbId::new(0x1a6e, 0x089a);

/// A generated fleet with equal hosts.
#[derive(Debug, Clone, Copy)]
pub struct Fleet {
    /// Number of hosts.
    pub hosts: u32,
    /// Devices on each.
    pub devices: u32,
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and good enough to mix a fleet.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % sides
    }
}

impl Fleet {
    /// The name of a host.
    pub fn name(host: u32) -> String {
        format!("compute-{host:05}")
    }

    /// One host's document; its number counts from 0. Half of the devices carry a serial, one in
    /// five a tag, nine in ten are available, and there are some two hundred kinds of forty
    /// vendors.
    pub fn document(&self, host: u32) -> HostDocument {
        let mut dice = Dice(u64::from(host) << 20);
        let node = u64::from(host) + 2;
        let rare = host.is_multiple_of(10_000);
        // Half of the hosts have two of the common kind at least.
        let common = [0, 0, 1, 1, 2, 2, 3, 4][dice.roll(8) as usize];
        let entry = |n: u32| {
            let usb = match n {
                0 if rare => RARE,
                n if n < common => COMMON,
                _ => kind(dice.roll(200) as u16),
            };
            let available = usb == RARE || usb == COMMON || dice.roll(10) > 0;
            device(node, n, usb, available, &mut dice)
        };
        HostDocument::new(Self::name(host), node, 1, (0..self.devices).filter_map(entry).collect())
    }
}

/// Forty vendors of five products each.
const fn kind(number: u16) -> UsbId {
    UsbId::new(0x2000 + number / 5, 0x100 + number)
}

/// The device number `n` of a host, from 0. `None` beyond what 255 buses hold.
fn device(node: u64, n: u32, usb: UsbId, available: bool, dice: &mut Dice) -> Option<DeviceEntry> {
    const PER_BUS: u32 = 120;
    let bus = u8::try_from(1 + n / PER_BUS).ok()?;
    let number = 1 + (n % PER_BUS) as u8;
    let port_path = PortPath::new(bus, &[1 + number / 15, 1 + number % 15])?;
    let id = DeviceId::new((node - 1) * 1_000_000 + u64::from(n) + 1)?;
    let status = if available { Status::Available } else { Status::Allocated };
    let serial =
        (dice.roll(2) == 0).then(|| format!("{:08X}", (node << 10 | u64::from(n)) & 0xffff_ffff));
    let class = [0x03, 0x08, 0x0b, 0xff][usize::from(usb.product.get() % 4)];
    Some(DeviceEntry {
        id,
        compute_node_id: node,
        address: BusAddress::new(bus, number)?,
        product_id: usb.product,
        vendor_id: usb.vendor,
        bus_id: bus,
        device_id: number,
        port_id: port_path.port_id(),
        status: status.name().to_owned(),
        status_reason: None,
        extra_info: None,
        instance_uuid: (!available)
            .then(|| format!("{:032x}", u128::from(id.get())))
            .and_then(|u| u.parse().ok()),
        port_path,
        serial_kind: if serial.is_some() { "unique" } else { "missing" }.to_owned(),
        serial,
        class: Class::new(0),
        interface_classes: vec![Class::new(class)],
        speed: Some(Speed::Full),
        manufacturer: Some("Aladdin Knowledge Systems".to_owned()),
        product_name: Some("HASP HL 3.25".to_owned()),
        driver: None,
        host_use: None,
        tags: if dice.roll(5) == 0 { vec!["erp".to_owned()] } else { Vec::new() },
        projects: Vec::new(),
        path: None,
    })
}
