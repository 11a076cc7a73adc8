//! From what is wanted to splices on the text, and from splices to the text.
//!
//! [`plan`] decides, [`splice`] only copies. A splice replaces a range of the text; most ranges are
//! empty. Text that no splice covers is copied unchanged.

use std::collections::BTreeSet;
use std::ops::Range;

use virt_usb_model::{BusAddress, DeviceId, UsbId};

use crate::device::{Device, Node, Part, number};
use crate::domain::{Domain, hostdev_alias, redirdev_alias};
use crate::error::XmlError;
use crate::metadata::REFUSAL_NAMESPACE;
use crate::read::Layout;
use crate::style::{Element, Style, unit};
use crate::usb_bus::{GuestPort, INJECTED_PORTS};

/// Changes to make in a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits {
    /// USB host devices to add at the end of `<devices>`, in this order. One whose alias is there
    /// is not added again.
    pub hostdevs: Vec<Hostdev>,
    /// Redirections to add behind them: the `n` of the alias `ua-usb-redir-<n>`. One whose alias is
    /// there is not added again.
    pub redirdevs: Vec<usize>,
    /// Add `<controller type='usb' model='qemu-xhci' ports='15'/>`, unless the domain declares a
    /// USB controller.
    pub controller: bool,
    /// Hostdevs that are there, by their index in [`Domain::hostdevs`], and the source and alias
    /// that they get.
    pub relocate: Vec<(usize, Hostdev)>,
    /// Handwritten hostdevs, by their index in [`Domain::hostdevs`], with the current addresses of
    /// their devices. Only the bus and device numbers of the source change, and only if the source
    /// has them.
    pub readdress: Vec<(usize, BusAddress)>,
    /// One line to write into the metadata, `<refusal xmlns='urn:virt-usb:refusal:1' why='…'/>`,
    /// for [`Domain::refusal`] to find later, unless one is there.
    pub refusal: Option<String>,
}

/// A host device as libvirt gets it: vendor, product and address together, so that libvirt refuses
/// a device that was swapped in the meantime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hostdev {
    /// Id of the device in the inventory; the alias is `ua-usb-<id>`.
    pub id: DeviceId,
    /// Vendor and product of the device.
    pub usb: UsbId,
    /// Where it is on the host.
    pub address: BusAddress,
    /// The guest's port for it; `None`: libvirt chooses. A relocated hostdev keeps its port.
    pub guest_port: Option<GuestPort>,
}

impl Hostdev {
    /// The `<hostdev>` element by itself, for a guest that runs.
    pub fn element(&self) -> String {
        hostdev(self).alone()
    }
}

/// The `<redirdev>` element of a flavor's entry by itself, for a guest that runs.
pub fn redirdev_element(n: usize) -> String {
    redirdev(n).alone()
}

/// `text[range]` becomes `with`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Splice {
    range: Range<usize>,
    with: String,
}

impl Splice {
    fn insert(at: usize, with: String) -> Self {
        Self { range: at..at, with }
    }
}

/// Applies splices that do not overlap.
pub(crate) fn splice(text: &str, mut splices: Vec<Splice>) -> String {
    // What is inserted at a place comes before what is replaced from there on.
    splices.sort_by_key(|s| (s.range.start, s.range.end));
    let added: usize = splices.iter().map(|s| s.with.len()).sum();
    let mut out = String::with_capacity(text.len() + added);
    let mut done = 0;
    for Splice { range, with } in splices {
        out.push_str(text.get(done..range.start).unwrap_or_default());
        out.push_str(&with);
        done = range.end;
    }
    out.push_str(text.get(done..).unwrap_or_default());
    out
}

/// The splices that make the edits.
pub(crate) fn plan(
    text: &str,
    domain: &Domain,
    layout: &Layout<'_>,
    edits: &Edits,
) -> Result<Vec<Splice>, XmlError> {
    let unit = document_unit(text, layout);
    let mut splices = Vec::new();
    let moved: BTreeSet<usize> = edits.relocate.iter().map(|(index, _)| *index).collect();
    let kept = domain.hostdevs.iter().enumerate().filter(|(i, _)| !moved.contains(i));
    let mut ids: BTreeSet<DeviceId> = kept.filter_map(|(_, h)| h.injected()).collect();
    let mut relocated = BTreeSet::new();
    for (index, to) in &edits.relocate {
        let no = |why| XmlError::Relocate { index: *index, why };
        let device =
            layout.hostdevs.get(*index).ok_or_else(|| no("the domain has no such hostdev"))?;
        if !relocated.insert(*index) {
            return Err(no("it is given two"));
        }
        if !ids.insert(to.id) {
            return Err(no("another hostdev is that device"));
        }
        Relocation { text, device, unit: &unit, splices: &mut splices }.run(to);
    }
    for (index, to) in &edits.readdress {
        let no = |why| XmlError::Relocate { index: *index, why };
        let device =
            layout.hostdevs.get(*index).ok_or_else(|| no("the domain has no such hostdev"))?;
        if !relocated.insert(*index) {
            return Err(no("it is given two"));
        }
        if let Some(address) =
            device.part(Part::SourceAddress).filter(|a| a.tag.get("device").is_some())
        {
            Relocation { text, device, unit: &unit, splices: &mut splices }.numbers(address, *to);
        }
    }
    let mut redirs: BTreeSet<usize> =
        domain.redirdevs.iter().filter_map(|r| r.injected()).collect();

    let hostdevs = edits.hostdevs.iter().filter(|h| ids.insert(h.id)).map(hostdev);
    let redirdevs = edits.redirdevs.iter().filter(|n| redirs.insert(**n)).map(|n| redirdev(*n));
    let new_devices: Vec<Element> = hostdevs.chain(redirdevs).collect();
    let new_controller = (edits.controller && !domain.bus.has_controller()).then(controller);
    add(text, layout, &unit, new_controller, new_devices, &mut splices);
    if let Some(why) = edits.refusal.as_ref().filter(|_| domain.refusal.is_none()) {
        add_metadata(text, layout, &unit, refusal(why), &mut splices);
    }
    Ok(splices)
}

fn source(to: &Hostdev) -> [Element; 3] {
    [
        Element::leaf(format!("vendor id='0x{}'", to.usb.vendor)),
        Element::leaf(format!("product id='0x{}'", to.usb.product)),
        Element::leaf(format!(
            "address bus='{}' device='{}'",
            to.address.bus(),
            to.address.device()
        )),
    ]
}

fn alias(name: &str) -> Element {
    Element::leaf(format!("alias name='{name}'"))
}

fn hostdev(device: &Hostdev) -> Element {
    let source = Element { start: "source".to_owned(), children: source(device).into() };
    let mut children = vec![source, alias(&hostdev_alias(device.id))];
    children
        .extend(device.guest_port.map(|port| Element::leaf(format!("address type='usb' {port}"))));
    Element { start: "hostdev mode='subsystem' type='usb'".to_owned(), children }
}

fn redirdev(n: usize) -> Element {
    Element {
        start: "redirdev bus='usb' type='spicevmc'".to_owned(),
        children: vec![alias(&redirdev_alias(n))],
    }
}

fn controller() -> Element {
    Element::leaf(format!("controller type='usb' model='qemu-xhci' ports='{INJECTED_PORTS}'"))
}

fn refusal(why: &str) -> Element {
    let mut value = String::with_capacity(why.len());
    for c in why.chars() {
        match c {
            ' '..='~' if !matches!(c, '&' | '<' | '\'') => value.push(c),
            // What XML has no way to write: see its production Char,
            // <https://www.w3.org/TR/xml/#charsets>.
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => value.push('?'),
            // A reference is understood in every encoding.
            c => value.push_str(&format!("&#{};", u32::from(c))),
        }
    }
    Element::leaf(format!("refusal xmlns='{REFUSAL_NAMESPACE}' why='{value}'"))
}

/// One level of indentation in this document.
fn document_unit(text: &str, layout: &Layout<'_>) -> String {
    let pair = |node: &Option<Node<'_>>| {
        node.as_ref().and_then(|n| Some((n.tag.span.start, n.first_child?)))
    };
    let (outer, inner) = pair(&layout.devices).or_else(|| pair(&layout.domain)).unwrap_or((0, 0));
    unit(text, outer, inner)
}

/// Adds devices to `<devices>`, wherever that is: the controller behind the last controller, the
/// rest at the end.
fn add(
    text: &str,
    layout: &Layout<'_>,
    unit: &str,
    controller: Option<Element>,
    devices: Vec<Element>,
    splices: &mut Vec<Splice>,
) {
    if controller.is_none() && devices.is_empty() {
        return;
    }
    let Some(node) = &layout.devices else {
        let children = controller.into_iter().chain(devices).collect();
        add_to_domain(
            text,
            layout,
            unit,
            &Element { start: "devices".to_owned(), children },
            splices,
        );
        return;
    };
    let last = layout.last_controller.as_ref();
    let style = last_child_style(text, layout, node, unit);
    let (apart, together) = match (controller, last) {
        (Some(controller), Some(last)) => (Some((controller, last)), devices),
        (controller, _) => (None, controller.into_iter().chain(devices).collect()),
    };
    if let Some((controller, last)) = apart {
        let style = Style::of(text, last.start, unit).unwrap_or_else(Style::one_line);
        let mut out = String::new();
        controller.write(&mut out, &style);
        splices.push(Splice::insert(last.end, out));
    }
    append(text, node, &style, &together, splices);
}

/// Adds an element to `<metadata>`, wherever that is.
fn add_metadata(
    text: &str,
    layout: &Layout<'_>,
    unit: &str,
    element: Element,
    splices: &mut Vec<Splice>,
) {
    match &layout.metadata {
        Some(node) => {
            let style = child_style(text, node, unit);
            append(text, node, &style, &[element], splices);
        }
        None => {
            let metadata = Element { start: "metadata".to_owned(), children: vec![element] };
            add_to_domain(text, layout, unit, &metadata, splices);
        }
    }
}

/// Adds an element at the end of the domain.
fn add_to_domain(
    text: &str,
    layout: &Layout<'_>,
    unit: &str,
    element: &Element,
    splices: &mut Vec<Splice>,
) {
    let Some(domain) = &layout.domain else { return };
    let style =
        domain.first_child.and_then(|at| Style::of(text, at, unit)).unwrap_or_else(Style::one_line);
    let mut out = String::new();
    element.write(&mut out, &style);
    splices.push(Splice::insert(domain.content_end, out));
}

/// How a further child of `<devices>` is to look.
fn last_child_style(text: &str, layout: &Layout<'_>, node: &Node<'_>, unit: &str) -> Style {
    let children = [layout.last_device, node.first_child];
    let like_a_child = children.into_iter().flatten().find_map(|at| Style::of(text, at, unit));
    like_a_child.or_else(|| style_inside(text, node, unit)).unwrap_or_else(Style::one_line)
}

/// How a further child of an element is to look.
fn child_style(text: &str, node: &Node<'_>, unit: &str) -> Style {
    let like_a_child = node.first_child.and_then(|at| Style::of(text, at, unit));
    like_a_child.or_else(|| style_inside(text, node, unit)).unwrap_or_else(Style::one_line)
}

/// How a child of this element is to look when there is none to look at. An element with content on
/// one line keeps that.
fn style_inside(text: &str, node: &Node<'_>, unit: &str) -> Option<Style> {
    let has_content = node.content_end > node.tag.span.end;
    let from_close = Style::of(text, node.close.start, unit).filter(|_| !node.tag.empty);
    let from_start = Style::of(text, node.tag.span.start, unit).filter(|_| !has_content);
    from_close.or(from_start).map(|outer| outer.inner())
}

/// Adds children at the end of an element, opening it when it is `<name/>`.
fn append(
    text: &str,
    node: &Node<'_>,
    style: &Style,
    children: &[Element],
    splices: &mut Vec<Splice>,
) {
    if children.is_empty() {
        return;
    }
    let mut out = String::new();
    for child in children {
        child.write(&mut out, style);
    }
    let outer = Style::of(text, node.tag.span.start, "").filter(|_| !style.is_one_line());
    let closing_line = outer.as_ref().map(Style::new_line).unwrap_or_default();
    if node.tag.empty {
        let slash = node.tag.span.end - "/>".len();
        let whole = format!(">{out}{closing_line}</{}>", node.tag.name);
        splices.push(Splice { range: slash..node.tag.span.end, with: whole });
        return;
    }
    let rest = text.get(node.content_end..node.close.start).unwrap_or_default();
    if node.content_end == node.tag.span.end && !rest.contains(['\n', '\r']) {
        out.push_str(&closing_line);
    }
    splices.push(Splice::insert(node.content_end, out));
}

/// One hostdev that gets a new source and alias.
struct Relocation<'t, 'a> {
    text: &'t str,
    device: &'t Device<'a>,
    unit: &'t str,
    splices: &'t mut Vec<Splice>,
}

impl Relocation<'_, '_> {
    fn run(mut self, to: &Hostdev) {
        let name = hostdev_alias(to.id);
        let mut behind = Vec::new();
        match self.device.part(Part::Source) {
            Some(source) => self.source(source, to),
            None => {
                behind.push(Element { start: "source".to_owned(), children: source(to).into() });
            }
        }
        match self.device.part(Part::Alias) {
            Some(node) => self.set(node, "name", &name, |old| old == name),
            None => behind.push(alias(&name)),
        }
        self.append(&self.device.node, &behind);
    }

    fn source(&mut self, node: &Node<'_>, to: &Hostdev) {
        // With a startup policy and the device gone, QEMU takes any device that it can open.
        self.remove(node, "startupPolicy");
        let [vendor, product, address] = source(to);
        let id = |wanted: u16| move |old: &str| number(old) == Some(u32::from(wanted));
        let device = self.device;
        let mut in_front = Vec::new();
        let mut behind = Vec::new();
        match device.part(Part::SourceVendor) {
            Some(node) => {
                self.set(node, "id", &format!("0x{}", to.usb.vendor), id(to.usb.vendor.get()));
            }
            None => in_front.push(vendor),
        }
        match device.part(Part::SourceProduct) {
            Some(node) => {
                self.set(node, "id", &format!("0x{}", to.usb.product), id(to.usb.product.get()));
            }
            // The schema has the product behind the vendor.
            None => match device.part(Part::SourceVendor) {
                Some(vendor) => self.insert_behind(vendor, &product),
                None => in_front.push(product),
            },
        }
        match device.part(Part::SourceAddress) {
            Some(node) => {
                // A host port, which late versions of libvirt take, would contradict the device
                // number.
                self.remove(node, "port");
                self.numbers(node, to.address);
            }
            None => behind.push(address),
        }
        if node.content_end == node.tag.span.end {
            in_front.append(&mut behind);
            self.append(node, &in_front);
            return;
        }
        let style = self.style(node);
        let mut out = String::new();
        in_front.iter().for_each(|e| e.write(&mut out, &style));
        if !out.is_empty() {
            self.splices.push(Splice::insert(node.tag.span.end, out));
        }
        self.append(node, &behind);
    }

    /// Bus and device number of a source's address.
    fn numbers(&mut self, node: &Node<'_>, to: BusAddress) {
        let is = |wanted: u8| move |old: &str| number(old) == Some(u32::from(wanted));
        self.set(node, "bus", &to.bus().to_string(), is(to.bus()));
        self.set(node, "device", &to.device().to_string(), is(to.device()));
    }

    /// Gives an attribute its value, unless `same` says that it has it.
    fn set(&mut self, node: &Node<'_>, name: &str, value: &str, same: impl Fn(&str) -> bool) {
        match node.tag.get(name) {
            Some(attribute) if same(&attribute.decoded()) => {}
            Some(attribute) => {
                self.splices
                    .push(Splice { range: attribute.value.clone(), with: value.to_owned() });
            }
            None => {
                let at = node.tag.span.start + 1 + node.tag.name.len();
                self.splices.push(Splice::insert(at, format!(" {name}='{value}'")));
            }
        }
    }

    fn remove(&mut self, node: &Node<'_>, name: &str) {
        if let Some(attribute) = node.tag.get(name) {
            self.splices.push(Splice { range: attribute.whole.clone(), with: String::new() });
        }
    }

    fn insert_behind(&mut self, node: &Node<'_>, element: &Element) {
        let style =
            Style::of(self.text, node.tag.span.start, self.unit).unwrap_or_else(Style::one_line);
        let mut out = String::new();
        element.write(&mut out, &style);
        self.splices.push(Splice::insert(node.close.end, out));
    }

    fn append(&mut self, node: &Node<'_>, children: &[Element]) {
        append(self.text, node, &self.style(node), children, self.splices);
    }

    fn style(&self, node: &Node<'_>) -> Style {
        child_style(self.text, node, self.unit)
    }
}
