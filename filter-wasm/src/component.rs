//! The component: the engine behind the interfaces of `wit/`. Nothing is decided here.

use std::cell::RefCell;
use std::rc::Rc;

use virt_usb_filter_core as engine;
use virt_usb_filter_core::text as strings;
use virt_usb_model::{
    Class, DeviceId, DevicePath, DeviceRequest, ParseError, PortPath, ProductId, ProjectId,
    Selector, Status, UnavailableReason, UsbId, VendorId,
};

#[allow(
    unsafe_code,
    unreachable_pub,
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::semicolon_if_nothing_returned,
    clippy::uninlined_format_args,
    clippy::undocumented_unsafe_blocks,
    reason = "made by wit-bindgen: its raw pointers are the ABI, its docs are in wit/"
)]
mod bindings {
    wit_bindgen::generate!({ path: "../wit", world: "text-filter" });
    use super::Component;
    export!(Component);
}

use bindings::exports::virt_usb::scheduler::{inventory, text, types as wit};

struct Component;

/// A fleet, shared by its handle and the questions prepared for it. A component has one thread.
struct Fleet(Rc<RefCell<engine::Inventory>>);

struct Prepared {
    fleet: Rc<RefCell<engine::Inventory>>,
    question: RefCell<engine::Prepared>,
}

impl inventory::Guest for Component {
    type Inventory = Fleet;
    type Prepared = Prepared;
}

impl inventory::GuestInventory for Fleet {
    fn new() -> Self {
        Self(Rc::default())
    }

    fn load(&self, lines: String, received: u64) -> wit::LoadReport {
        self.0.borrow_mut().load(&lines, received).into()
    }

    fn put(&self, node: wit::Node, received: u64) -> Result<(), wit::Refusal> {
        let mut draft = draft(&node).map_err(|e| wit::Refusal::Node(e.to_string()))?;
        Ok(self.0.borrow_mut().put(&mut draft, received)?)
    }

    fn remove(&self, node: String) -> bool {
        self.0.borrow_mut().remove(&node)
    }

    fn touch(&self, node: String, received: u64) -> bool {
        self.0.borrow_mut().touch(&node, received)
    }

    fn set_status(
        &self,
        node: String,
        device: u64,
        status: wit::Status,
    ) -> Result<bool, wit::Refusal> {
        let id = DeviceId::new(device).ok_or(wit::Refusal::UnknownDevice(device))?;
        Ok(self.0.borrow_mut().set_status(&node, id, status.into())?)
    }

    fn select(
        &self,
        question: wit::Question,
        candidates: Option<Vec<String>>,
        limit: u32,
    ) -> Result<wit::Selection, wit::Refusal> {
        let question = engine::Question::try_from(question)?;
        let fleet = self.0.borrow();
        let selection = match candidates {
            None => fleet.select(&question, None, limit as usize),
            Some(names) => {
                fleet.select(&question, Some(&mut names.iter().map(String::as_str)), limit as usize)
            }
        }?;
        Ok(wit::Selection {
            matched: selection.matched,
            placements: selection.placements.into_iter().map(Into::into).collect(),
        })
    }

    fn explain(&self, question: wit::Question, node: String) -> Result<wit::Verdict, wit::Refusal> {
        Ok(self.0.borrow().explain(&question.try_into()?, &node)?.into())
    }

    fn prepare(&self, question: wit::Question) -> Result<inventory::Prepared, wit::Refusal> {
        let question = engine::Prepared::new(&self.0.borrow(), question.try_into()?)?;
        Ok(inventory::Prepared::new(Prepared {
            fleet: self.0.clone(),
            question: RefCell::new(question),
        }))
    }

    fn statistics(&self) -> wit::Statistics {
        let engine::Statistics { revision, hosts, devices, available, keys } =
            self.0.borrow().statistics();
        wit::Statistics { revision, nodes: hosts, devices, available, keys }
    }

    fn revision(&self) -> u64 {
        self.0.borrow().revision()
    }
}

impl inventory::GuestPrepared for Prepared {
    fn check(&self, node: String, now: u64) -> wit::Verdict {
        match self.fleet.borrow().check(&mut self.question.borrow_mut(), &node, Some(now)) {
            Ok(verdict) => verdict.into(),
            // It was taken when it was prepared, so this does not happen.
            Err(refused) => wit::Verdict::Rejected(wit::Rejection {
                request: None,
                reason: wit::Reason::Other(refused.to_string()),
                wanted: 0,
                matching: 0,
                allowed: 0,
                free: 0,
            }),
        }
    }
}

impl text::Guest for Component {
    fn load(fleet: text::InventoryBorrow<'_>, lines: String, received: u64) -> String {
        strings::loaded(&fleet.get::<Fleet>().0.borrow_mut().load(&lines, received))
    }

    fn set_status(
        fleet: text::InventoryBorrow<'_>,
        node: String,
        device: u64,
        status: String,
    ) -> Result<bool, String> {
        let mut fleet = fleet.get::<Fleet>().0.borrow_mut();
        fleet.set_status_text(&node, device, &status).map_err(|e| e.to_string())
    }

    fn select(
        fleet: text::InventoryBorrow<'_>,
        question: String,
        candidates: Option<String>,
        limit: u32,
    ) -> Result<String, String> {
        let fleet = fleet.get::<Fleet>().0.borrow();
        fleet.select_text(&question, candidates.as_deref(), limit).map_err(|e| e.to_string())
    }

    fn select_names(
        fleet: text::InventoryBorrow<'_>,
        question: String,
        candidates: Option<String>,
        limit: u32,
    ) -> Result<String, String> {
        let fleet = fleet.get::<Fleet>().0.borrow();
        fleet.select_names(&question, candidates.as_deref(), limit).map_err(|e| e.to_string())
    }

    fn explain(
        fleet: text::InventoryBorrow<'_>,
        question: String,
        nodes: Option<String>,
    ) -> Result<String, String> {
        let fleet = fleet.get::<Fleet>().0.borrow();
        fleet.explain_text(&question, nodes.as_deref()).map_err(|e| e.to_string())
    }

    fn statistics(fleet: text::InventoryBorrow<'_>) -> String {
        fleet.get::<Fleet>().0.borrow().statistics_text()
    }
}

/// A node on its way in; errors name the device.
fn draft(node: &wit::Node) -> Result<engine::Draft, ParseError> {
    let mut draft = engine::Draft::default();
    draft.begin(&node.name);
    for (number, device) in node.devices.iter().enumerate() {
        add(&mut draft, device).map_err(|e| e.at(&format!("[{number}]")).at("devices"))?;
    }
    Ok(draft)
}

fn add(draft: &mut engine::Draft, device: &wit::Device) -> Result<(), ParseError> {
    let (port, path) = place(&device.port).map_err(|e| e.at("port"))?;
    let port = port
        .ok_or_else(|| ParseError::new(&device.port, "a port path such as \"1-1.4\"").at("port"))?;
    let usb = UsbId::new(device.vendor_id, device.product_id);
    draft.device(device_id(device.id)?, usb, &port, device.status.into());
    if let Some(serial) = &device.serial {
        draft.serial(serial);
    }
    let interfaces = device.interface_classes.iter().copied().map(Class::new);
    let tags = device.tags.iter().map(String::as_str);
    draft.traits(Class::new(device.class), interfaces, path.as_ref(), tags);
    let projects: Vec<ProjectId> = device
        .projects
        .iter()
        .map(|p| p.parse())
        .collect::<Result<_, _>>()
        .map_err(|e: ParseError| e.at("projects"))?;
    draft.projects(projects.iter());
    Ok(())
}

/// A port path, a device path, or both with a space between them.
fn place(text: &str) -> Result<(Option<PortPath>, Option<DevicePath>), ParseError> {
    let (mut port, mut path) = (None, None);
    for part in text.split(' ') {
        match part.parse() {
            Ok(is) => path = Some(is),
            Err(_) => port = Some(part.parse()?),
        }
    }
    Ok((port, path))
}

fn device_id(id: u64) -> Result<DeviceId, ParseError> {
    DeviceId::new(id).ok_or_else(|| ParseError::new(id, "a device id from 1 to 2^53 - 1").at("id"))
}

impl TryFrom<wit::Question> for engine::Question {
    type Error = wit::Refusal;

    fn try_from(question: wit::Question) -> Result<Self, wit::Refusal> {
        let refused = |e: ParseError| wit::Refusal::Question(e.to_string());
        let requests = question.requests.into_iter().enumerate();
        let requests = requests
            .map(|(number, r)| request(r).map_err(|e| e.at(&format!("[{number}]")).at("requests")))
            .collect::<Result<_, _>>()
            .map_err(refused)?;
        let project = question.project.map(|p| p.parse()).transpose();
        Ok(Self {
            requests,
            project: project.map_err(|e: ParseError| refused(e.at("project")))?,
            moment: question.moment.map(|m| engine::Moment { now: m.now, max_age: m.max_age }),
            weights: engine::Weights {
                spare: question.weights.spare,
                reserve: question.weights.reserve,
            },
        })
    }
}

fn request(request: wit::Request) -> Result<DeviceRequest, ParseError> {
    let named = request.port.map(|text| place(&text)).transpose().map_err(|e| e.at("port"))?;
    let (port, path) = named.unwrap_or_default();
    Ok(DeviceRequest {
        selector: Selector {
            id: request.id.map(device_id).transpose()?,
            vendor_id: request.vendor_id.map(VendorId::new),
            product_id: request.product_id.map(ProductId::new),
            serial: request.serial,
            port,
            path,
            class: request.class.map(Class::new),
            tags: request.tags,
        },
        count: request.count,
    })
}

impl From<wit::Status> for Status {
    fn from(status: wit::Status) -> Self {
        match status {
            wit::Status::Available => Self::Available,
            wit::Status::Claimed => Self::Claimed,
            wit::Status::Allocated => Self::Allocated,
            wit::Status::Removed => Self::Removed,
            // Why it is unavailable makes no difference to a request.
            wit::Status::Unavailable => Self::Unavailable(UnavailableReason::Disabled),
        }
    }
}

impl From<engine::Loaded> for wit::LoadReport {
    fn from(loaded: engine::Loaded) -> Self {
        let problem = |p: engine::RefusedLine| wit::RefusedLine { line: p.line, why: p.why };
        Self {
            nodes: loaded.hosts,
            devices: loaded.devices,
            refused: loaded.refused,
            problems: loaded.problems.into_iter().map(problem).collect(),
        }
    }
}

impl From<engine::Placement> for wit::Placement {
    fn from(placement: engine::Placement) -> Self {
        Self { node: placement.host, score: placement.score }
    }
}

fn ids(devices: Vec<DeviceId>) -> Vec<u64> {
    devices.into_iter().map(DeviceId::get).collect()
}

impl From<engine::Verdict> for wit::Verdict {
    fn from(verdict: engine::Verdict) -> Self {
        match verdict {
            engine::Verdict::Accepted { score, devices } => {
                Self::Accepted(wit::Acceptance { score, devices: ids(devices) })
            }
            engine::Verdict::Rejected(r) => Self::Rejected(wit::Rejection {
                request: r.request,
                reason: r.reason.into(),
                wanted: r.wanted,
                matching: r.matching,
                allowed: r.allowed,
                free: r.free,
            }),
        }
    }
}

impl From<engine::RejectionReason> for wit::Reason {
    fn from(reason: engine::RejectionReason) -> Self {
        match reason {
            engine::RejectionReason::NoSuchDevice => Self::NoSuchDevice,
            engine::RejectionReason::TooFewFree => Self::TooFewFree,
            engine::RejectionReason::Contention => Self::Contention,
            engine::RejectionReason::NotAllowed => Self::NotAllowed,
            engine::RejectionReason::HostStale => Self::NodeStale,
            engine::RejectionReason::UnknownHost => Self::UnknownNode,
            engine::RejectionReason::Other(text) => Self::Other(text),
        }
    }
}

impl From<engine::Refusal> for wit::Refusal {
    fn from(refusal: engine::Refusal) -> Self {
        match refusal {
            engine::Refusal::Question(why) => Self::Question(why),
            engine::Refusal::Host(why) => Self::Node(why),
            engine::Refusal::UnknownHost(name) => Self::UnknownNode(name),
            engine::Refusal::UnknownDevice(id) => Self::UnknownDevice(id),
        }
    }
}
