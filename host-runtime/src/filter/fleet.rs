//! A generated fleet for benchmarks, which is the same on every machine.

use virt_usb_model::{
    BusAddress, Class, DeviceEntry, DeviceId, HostDocument, PortPath, Speed, Status, UsbId,
};

/// A license key. Half of the hosts have two free ones.
pub const COMMON: UsbId = UsbId::new(0x0529, 0x0001);
/// A device of one host in ten thousand, including the first host.
pub const RARE: UsbId = UsbId::new(0x1a6e, 0x089a);

/// A generated fleet with equal hosts.
#[derive(Debug, Clone, Copy)]
pub struct Fleet {
    /// Number of hosts.
    pub hosts: u32,
    /// Number of devices on each host.
    pub devices: u32,
}

/// Random numbers by SplitMix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % bound
    }
}

impl Fleet {
    /// Name of the host with this number.
    pub fn name(host: u32) -> String {
        format!("compute-{host:05}")
    }

    /// Document of the host with this number, counted from 0. Half of the devices have a serial,
    /// one in five has a tag, nine in ten are available. There are 200 kinds of 40 vendors.
    pub fn document(&self, host: u32) -> HostDocument {
        let mut rng = Rng(u64::from(host) << 20);
        let node = u64::from(host) + 2;
        let rare = host.is_multiple_of(10_000);
        // Half of the hosts have at least two devices of the common kind.
        let common = [0, 0, 1, 1, 2, 2, 3, 4][rng.below(8) as usize];
        let entry = |n: u32| {
            let usb = match n {
                0 if rare => RARE,
                n if n < common => COMMON,
                _ => kind(rng.below(200) as u16),
            };
            let available = usb == RARE || usb == COMMON || rng.below(10) > 0;
            device(node, n, usb, available, &mut rng)
        };
        HostDocument::new(Self::name(host), node, 1, (0..self.devices).filter_map(entry).collect())
    }
}

/// Kind of a device: 40 vendors with 5 products each.
const fn kind(number: u16) -> UsbId {
    UsbId::new(0x2000 + number / 5, 0x100 + number)
}

/// Device `n` of a host, counted from 0. `None` if 255 buses have no more ports.
fn device(node: u64, n: u32, usb: UsbId, available: bool, rng: &mut Rng) -> Option<DeviceEntry> {
    const PER_BUS: u32 = 120;
    let bus = u8::try_from(1 + n / PER_BUS).ok()?;
    let number = 1 + (n % PER_BUS) as u8;
    let port_path = PortPath::new(bus, &[1 + number / 15, 1 + number % 15])?;
    let id = DeviceId::new((node - 1) * 1_000_000 + u64::from(n) + 1)?;
    let status = if available { Status::Available } else { Status::Allocated };
    let serial =
        (rng.below(2) == 0).then(|| format!("{:08X}", (node << 10 | u64::from(n)) & 0xffff_ffff));
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
        tags: if rng.below(5) == 0 { vec!["erp".to_owned()] } else { Vec::new() },
        projects: Vec::new(),
        path: None,
    })
}
