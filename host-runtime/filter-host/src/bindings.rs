//! The world of `wit/`, as the host sees it, and the model's words in it.

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "made by wasmtime; described in wit/"
)]
mod made {
    wasmtime::component::bindgen!({ path: "../../wit", world: "filter" });
}

use virt_usb_model::scheduling::{Moment, Question, Rejection, RejectionReason, Weights};
use virt_usb_model::{DeviceRequest, Status};

pub(crate) use made::exports::virt_usb::scheduler::inventory::Guest;
pub(crate) use made::exports::virt_usb::scheduler::types as wit;
pub(crate) use made::{Filter, FilterPre};

impl From<&Question> for wit::Question {
    fn from(question: &Question) -> Self {
        let Question { requests, project, moment, weights: Weights { spare, reserve } } = question;
        Self {
            requests: requests.iter().map(Into::into).collect(),
            project: project.as_ref().map(ToString::to_string),
            moment: moment.map(|Moment { now, max_age }| wit::Moment { now, max_age }),
            weights: wit::Weights { spare: *spare, reserve: *reserve },
        }
    }
}

impl From<&DeviceRequest> for wit::Request {
    fn from(request: &DeviceRequest) -> Self {
        let selector = &request.selector;
        let (port, path) = (selector.port.as_ref(), selector.path.as_ref());
        let named = port.map(ToString::to_string).into_iter().chain(path.map(ToString::to_string));
        let place: Vec<String> = named.collect();
        Self {
            id: selector.id.map(virt_usb_model::DeviceId::get),
            vendor_id: selector.vendor_id.map(virt_usb_model::VendorId::get),
            product_id: selector.product_id.map(virt_usb_model::ProductId::get),
            serial: selector.serial.clone(),
            port: (!place.is_empty()).then(|| place.join(" ")),
            class: selector.class.map(virt_usb_model::Class::get),
            tags: selector.tags.clone(),
            count: request.count,
        }
    }
}

impl From<Status> for wit::Status {
    fn from(status: Status) -> Self {
        match status {
            Status::Available => Self::Available,
            Status::Claimed => Self::Claimed,
            Status::Allocated => Self::Allocated,
            Status::Removed => Self::Removed,
            Status::Unavailable(_) => Self::Unavailable,
        }
    }
}

impl From<wit::Rejection> for Rejection {
    fn from(r: wit::Rejection) -> Self {
        let wit::Rejection { request, reason, wanted, matching, allowed, free } = r;
        let reason = match reason {
            wit::Reason::NoSuchDevice => RejectionReason::NoSuchDevice,
            wit::Reason::TooFewFree => RejectionReason::TooFewFree,
            wit::Reason::Contention => RejectionReason::Contention,
            wit::Reason::NotAllowed => RejectionReason::NotAllowed,
            wit::Reason::NodeStale => RejectionReason::HostStale,
            wit::Reason::UnknownNode => RejectionReason::UnknownHost,
            wit::Reason::Other(text) => RejectionReason::Other(clean(&text)),
        };
        Self { request, reason, wanted, matching, allowed, free }
    }
}

/// A refusal in words. They come from the filter: made safe to print, and short.
pub(crate) fn refusal(refusal: wit::Refusal) -> String {
    match refusal {
        wit::Refusal::Question(why) | wit::Refusal::Node(why) | wit::Refusal::Other(why) => {
            clean(&why)
        }
        wit::Refusal::UnknownNode(name) => format!("the inventory has no host {:?}", clean(&name)),
        wit::Refusal::UnknownDevice(id) => format!("the host has no device {id}"),
    }
}

/// A filter's text for people: one line, harmless to a terminal, not without end.
pub(crate) fn clean(text: &str) -> String {
    virt_usb_model::clean_start(text, 500)
}
