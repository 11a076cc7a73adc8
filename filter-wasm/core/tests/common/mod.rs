//! Random small fleets, and the rules once more: slow and obviously right.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part of it")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use virt_usb_filter_core::{Moment, Question, RejectionReason, Weights};
use virt_usb_model::{
    BusAddress, Class, DeviceEntry, DeviceId, DeviceRequest, HostDocument, PortPath, ProductId,
    ProjectId, Selector, Status, VendorId,
};

/// The fleet as a map of documents, with the time of each.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fleet {
    pub(crate) hosts: BTreeMap<String, (HostDocument, u64)>,
}

/// A change of the fleet.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Put(HostDocument, u64),
    Remove(String),
    Touch(String, u64),
    /// The device by its place in the host's document.
    Status(String, usize, Status),
}

pub(crate) fn name(number: u8) -> String {
    format!("host{number}")
}

fn status() -> impl Strategy<Value = Status> {
    prop_oneof![
        6 => Just(Status::Available),
        1 => Just(Status::Claimed),
        1 => Just(Status::Allocated),
        1 => Just(Status::Removed),
        1 => Just(Status::Unavailable(virt_usb_model::UnavailableReason::Whitelist)),
    ]
}

prop_compose! {
    fn device()(
        vendor in 1u16..4, product in 1u16..3, port in 1u8..5, status in status(),
        serial in prop::option::of(0u8..4), class in prop::sample::select(vec![0u8, 3, 8]),
        interfaces in prop::collection::vec(prop::sample::select(vec![3u8, 8, 0xff]), 0..3),
        tags in prop::collection::vec(prop::sample::select(vec!["erp", "blue", "crm"]), 0..3),
        projects in prop::collection::vec(prop::sample::select(vec!["p1", "p2"]), 0..2),
        restricted in 0u8..5,
    ) -> DeviceEntry {
        let address = BusAddress::new(1, 1).unwrap();
        let port_path: PortPath = format!("1-{port}").parse().unwrap();
        DeviceEntry {
            id: DeviceId::new(1).unwrap(),
            compute_node_id: 1,
            address,
            product_id: ProductId::new(product),
            vendor_id: VendorId::new(vendor),
            bus_id: 1,
            device_id: 1,
            port_id: port,
            status: status.name().into(),
            status_reason: status.reason().map(|r| r.name().into()),
            extra_info: None,
            instance_uuid: None,
            port_path,
            serial: serial.map(|s| format!("S{s}")),
            serial_kind: if serial.is_some() { "unique" } else { "missing" }.into(),
            class: Class::new(class),
            interface_classes: interfaces.into_iter().map(Class::new).collect(),
            speed: None,
            manufacturer: None,
            product_name: Some("Schlüssel \"1\"".into()).filter(|_| product == 2),
            driver: None,
            host_use: None,
            tags: tags.into_iter().map(Into::into).collect(),
            projects: if restricted == 0 {
                projects.iter().map(|p| p.parse().unwrap()).collect()
            } else {
                Vec::new()
            },
            path: (vendor == 1)
                .then(|| format!("pci-0000:00:14.0-usbv2-0:{port}").parse().unwrap()),
        }
    }
}

pub(crate) fn document() -> impl Strategy<Value = HostDocument> {
    let few = prop::collection::vec((device(), 1u64..4), 0..7);
    // More than a row holds: rare, for it is slow.
    let many = prop::collection::vec((device(), 1u64..4), 60..140);
    let devices = prop_oneof![12 => few, 1 => many];
    (0u8..10, 0u64..3, any::<u16>(), devices).prop_map(|(host, node, revision, devices)| {
        let mut id = node * 1_000_000;
        let devices = devices.into_iter().map(|(mut device, step)| {
            id += step;
            device.id = DeviceId::new(id).unwrap();
            device
        });
        HostDocument::new(name(host), node + 1, revision.into(), devices.collect())
    })
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (document(), 0u64..20).prop_map(|(d, t)| Step::Put(d, t)),
        1 => (0u8..10).prop_map(|h| Step::Remove(name(h))),
        1 => (0u8..10, 0u64..20).prop_map(|(h, t)| Step::Touch(name(h), t)),
        5 => (0u8..10, 0usize..10, status()).prop_map(|(h, d, s)| Step::Status(name(h), d, s)),
    ]
}

fn selector() -> impl Strategy<Value = Selector> {
    let id = (0u64..3, 1u64..6).prop_map(|(node, n)| DeviceId::new(node * 1_000_000 + n));
    let some = |weight: f64| prop::bool::weighted(weight);
    (
        (some(0.1), id),
        (some(0.6), 1u16..5, some(0.5), 1u16..3),
        (some(0.1), 0u8..5),
        (some(0.15), 1u8..6, some(0.1)),
        (some(0.3), prop::sample::select(vec![0u8, 3, 8, 0xff, 7])),
        prop::collection::vec(prop::sample::select(vec!["erp", "blue", "none"]), 0..2),
    )
        .prop_map(|(id, vendor, serial, port, class, tags)| Selector {
            id: id.1.filter(|_| id.0),
            vendor_id: vendor.0.then_some(VendorId::new(vendor.1)),
            product_id: (vendor.0 && vendor.2).then_some(ProductId::new(vendor.3)),
            serial: serial.0.then(|| format!("S{}", serial.1)),
            port: port.0.then(|| format!("1-{}", port.1).parse().unwrap()),
            path: port.2.then(|| format!("pci-0000:00:14.0-usbv2-0:{}", port.1).parse().unwrap()),
            class: class.0.then_some(Class::new(class.1)),
            tags: tags.into_iter().map(Into::into).collect(),
        })
        .prop_filter("a selector names something", |s| *s != Selector::default())
}

fn request() -> impl Strategy<Value = DeviceRequest> {
    (selector(), 1u32..4).prop_map(|(selector, count)| {
        let count = if selector.id.is_some() { 1 } else { count };
        DeviceRequest { selector, count }
    })
}

pub(crate) fn question() -> impl Strategy<Value = Question> {
    let requests = prop_oneof![
        6 => prop::collection::vec(request(), 0..4),
        1 => prop::collection::vec(request(), 4..9),
    ];
    let moment =
        prop::option::of((0u64..25, 0u64..10).prop_map(|(now, max_age)| Moment { now, max_age }));
    let project = prop::option::of(prop::sample::select(vec!["p1", "p2", "p3"]));
    (requests, project, moment, 0u8..=100, 0u8..=100).prop_map(
        |(requests, project, moment, spare, reserve)| Question {
            requests,
            project: project.map(|p| p.parse::<ProjectId>().unwrap()),
            moment,
            weights: Weights { spare, reserve },
        },
    )
}

impl Fleet {
    /// Does the step; false where there was nothing to do it to.
    pub(crate) fn step(&mut self, step: &Step) -> bool {
        match step {
            Step::Put(document, at) => {
                self.hosts.insert(document.host.clone(), (document.clone(), *at));
                true
            }
            Step::Remove(host) => self.hosts.remove(host).is_some(),
            Step::Touch(host, at) => {
                self.hosts.get_mut(host).map(|(_, time)| *time = *at).is_some()
            }
            Step::Status(..) => match self.target(step) {
                None => false,
                Some((host, place)) => {
                    let Step::Status(_, _, status) = step else { return false };
                    let device = &mut self.hosts.get_mut(&host).unwrap().0.devices[place];
                    device.status = status.name().into();
                    device.status_reason = status.reason().map(|r| r.name().into());
                    true
                }
            },
        }
    }

    /// The host and the place of the device that a change of state is about.
    pub(crate) fn target(&self, step: &Step) -> Option<(String, usize)> {
        let Step::Status(host, place, _) = step else { return None };
        let (document, _) = self.hosts.get(host)?;
        (!document.devices.is_empty()).then(|| (host.clone(), place % document.devices.len()))
    }

    /// The documents as they are sent, a line each.
    pub(crate) fn line(&self, host: &str) -> String {
        serde_json::to_string(&self.hosts[host].0).unwrap()
    }

    /// The expected verdict about a host: accepted with its score, or the reason and the request.
    pub(crate) fn judge(
        &self,
        question: &Question,
        host: &str,
    ) -> Result<i32, (Option<u32>, RejectionReason)> {
        let found = self.hosts.get(host);
        let free = |d: &DeviceEntry| d.state().unwrap() == Status::Available;
        let all = found.map_or(&[][..], |(document, _)| &document.devices);
        let wanted_by_none = |d: &&DeviceEntry| {
            free(d)
                && !question.requests.iter().any(|r| fits(&r.selector, d) && allowed(question, d))
        };
        let others = all.iter().filter(wanted_by_none).count();
        let score = |slack: usize| {
            i32::try_from(
                i64::from(question.weights.spare) * slack.min(127) as i64
                    - i64::from(question.weights.reserve) * others.min(255) as i64,
            )
            .unwrap()
        };
        if question.requests.is_empty() {
            return Ok(score(0));
        }
        let Some((_, time)) = found else { return Err((None, RejectionReason::UnknownHost)) };
        if question.moment.is_some_and(|m| time + m.max_age < m.now) {
            return Err((None, RejectionReason::HostStale));
        }
        for (number, request) in (0u32..).zip(&question.requests) {
            let wanted = request.count as usize;
            let matching: Vec<_> = all.iter().filter(|d| fits(&request.selector, d)).collect();
            let may = matching.iter().filter(|d| allowed(question, d)).count();
            let ready = matching.iter().filter(|d| allowed(question, d) && free(d)).count();
            if ready < wanted {
                let reason = if matching.is_empty() {
                    RejectionReason::NoSuchDevice
                } else if may == 0 || (may < wanted && matching.len() >= wanted) {
                    RejectionReason::NotAllowed
                } else {
                    RejectionReason::TooFewFree
                };
                return Err((Some(number), reason));
            }
        }
        let usable: Vec<&DeviceEntry> =
            all.iter().filter(|d| free(d) && allowed(question, d)).collect();
        let mut wishes = Vec::new();
        for request in &question.requests {
            let wish: Vec<usize> =
                (0..usable.len()).filter(|at| fits(&request.selector, usable[*at])).collect();
            wishes.extend(std::iter::repeat_n(wish, request.count as usize));
        }
        if !all_served(&wishes, usable.len()) {
            return Err((None, RejectionReason::Contention));
        }
        let mut slack = 127;
        for request in &question.requests {
            let wish: Vec<usize> =
                (0..usable.len()).filter(|at| fits(&request.selector, usable[*at])).collect();
            let more = |extra: &usize| {
                let mut wishes = wishes.clone();
                wishes.extend(std::iter::repeat_n(wish.clone(), *extra));
                all_served(&wishes, usable.len())
            };
            slack = slack.min((1..128).take_while(more).count());
        }
        Ok(score(slack))
    }

    /// Whether devices are what a host may be asked for: distinct, free, allowed, and each request
    /// served.
    pub(crate) fn may_be_used(
        &self,
        question: &Question,
        host: &str,
        devices: &[DeviceId],
    ) -> bool {
        let Some((document, _)) = self.hosts.get(host) else { return devices.is_empty() };
        let mut ids = devices.iter();
        let mut seen = std::collections::BTreeSet::new();
        let served = question.requests.iter().all(|request| {
            (0..request.count).all(|_| {
                let device =
                    ids.next().and_then(|id| document.devices.iter().find(|d| d.id == *id));
                device.is_some_and(|d| {
                    seen.insert(d.id)
                        && fits(&request.selector, d)
                        && allowed(question, d)
                        && d.state().unwrap() == Status::Available
                })
            })
        });
        served && ids.next().is_none()
    }
}

fn fits(selector: &Selector, d: &DeviceEntry) -> bool {
    let Selector { id, vendor_id, product_id, serial, port, path, class, tags } = selector;
    id.is_none_or(|id| id == d.id)
        && vendor_id.is_none_or(|v| v == d.vendor_id)
        && product_id.is_none_or(|p| p == d.product_id)
        && serial.as_ref().is_none_or(|s| d.serial.as_ref() == Some(s))
        && port.as_ref().is_none_or(|p| *p == d.port_path)
        && path.as_ref().is_none_or(|p| d.path.as_ref() == Some(p))
        && class.is_none_or(|c| d.class == c || d.interface_classes.contains(&c))
        && tags.iter().all(|t| d.tags.contains(t))
}

fn allowed(question: &Question, d: &DeviceEntry) -> bool {
    d.projects.is_empty()
        || question.project.as_ref().is_some_and(|mine| d.projects.iter().any(|p| p.is(mine)))
}

/// Whether every request gets a device of its own. Requests are served one after another, and move
/// others aside (Kuhn).
fn all_served(wishes: &[Vec<usize>], devices: usize) -> bool {
    fn serve(
        wishes: &[Vec<usize>],
        wish: usize,
        owner: &mut [Option<usize>],
        seen: &mut [bool],
    ) -> bool {
        for &device in &wishes[wish] {
            if !std::mem::replace(&mut seen[device], true)
                && owner[device].is_none_or(|other| serve(wishes, other, owner, seen))
            {
                owner[device] = Some(wish);
                return true;
            }
        }
        false
    }
    let mut owner = vec![None; devices];
    (0..wishes.len()).all(|wish| serve(wishes, wish, &mut owner, &mut vec![false; devices]))
}
