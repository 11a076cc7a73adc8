//! Functions that the `virt` crate does not wrap: domain events, detaching by alias, and the state
//! of QEMU's monitor. Only this module needs C's pointers.
//!
//! libvirt calls back on the thread that runs its event loop, with the domain and numbers; each
//! callback only sends a plain value into a channel. (libvirt-domain.h:
//! `virConnectDomainEventRegisterAny`, `virDomainDetachDeviceAlias`.)

#![allow(unsafe_code, reason = "the C API of libvirt, where the virt crate has no wrapper")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::mpsc::Sender;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;
use virt_usb_model::InstanceId;

use super::Event;

type Send = Box<dyn Fn(Event) + std::marker::Send>;

/// Registered callbacks of libvirt, by their numbers.
pub(super) struct Registered(Vec<c_int>);

impl Registered {
    /// Unregisters the callbacks. Each event keeps a reference to its connection: a connection that
    /// is closed with events is never freed, and keeps its descriptors.
    pub(super) fn end(self, connection: &Connect) {
        for id in self.0 {
            // SAFETY: the connection is open or broken, and not freed yet. On a broken connection,
            // the call only does not reach libvirtd.
            unsafe { sys::virConnectDomainEventDeregisterAny(connection.as_ptr(), id) };
        }
    }
}

/// Registers for an event of libvirt for every domain that starts, stops, disappears, or gets or
/// loses a device.
pub(super) fn register(connection: &Connect, to: &Sender<Event>) -> Result<Registered, Error> {
    type Lifecycle = unsafe extern "C" fn(
        sys::virConnectPtr,
        sys::virDomainPtr,
        c_int,
        c_int,
        *mut c_void,
    ) -> c_int;
    type Device =
        unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);
    // SAFETY: libvirt wants every callback as this type, and calls it as the one that belongs to
    // the event (virConnectDomainEventCallback, virConnectDomainEventDeviceAddedCallback and its
    // like), which are those above.
    let (lifecycle, device) = unsafe {
        (
            std::mem::transmute::<Lifecycle, Generic>(on_lifecycle),
            std::mem::transmute::<Device, Generic>(on_device),
        )
    };
    let mut registered = Registered(Vec::new());
    for (id, callback) in [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, device),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, device),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, device),
    ] {
        match register_one(connection, id, callback, to) {
            Ok(number) => registered.0.push(number),
            Err(e) => {
                registered.end(connection);
                return Err(e);
            }
        }
    }
    Ok(registered)
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

fn register_one(
    connection: &Connect,
    id: sys::virDomainEventID,
    callback: Generic,
    to: &Sender<Event>,
) -> Result<c_int, Error> {
    let to = to.clone();
    // If the receiver was dropped, the event is not needed.
    let send: Box<Send> = Box::new(Box::new(move |event| drop(to.send(event))));
    let opaque = Box::into_raw(send).cast::<c_void>();
    // SAFETY: the connection is open; a null domain means all; `opaque` is a `Send` that only the
    // callbacks use, until libvirt hands it to `free`.
    let registered = unsafe {
        sys::virConnectDomainEventRegisterAny(
            connection.as_ptr(),
            std::ptr::null_mut(),
            id as c_int,
            Some(callback),
            opaque,
            Some(free),
        )
    };
    if registered < 0 {
        let error = Error::last_error();
        // SAFETY: libvirt did not take the pointer, so no other code frees it.
        unsafe { free(opaque) };
        return Err(error);
    }
    Ok(registered)
}

unsafe extern "C" fn free(opaque: *mut c_void) {
    // SAFETY: it came from `Box::into_raw` in `register_one`, and libvirt calls this once.
    drop(unsafe { Box::from_raw(opaque.cast::<Send>()) });
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a domain that is valid during the call, and the `opaque` of
    // `register_one`.
    let (instance, send) = unsafe { (instance(domain), &*opaque.cast::<Send>()) };
    if let Some(instance) = instance {
        let started = event == sys::VIR_DOMAIN_EVENT_STARTED as c_int;
        let migrated = detail == sys::VIR_DOMAIN_EVENT_STARTED_MIGRATED as c_int;
        send(if started && !migrated {
            Event::Started(instance)
        } else {
            Event::Changed(instance)
        });
    }
    0
}

unsafe extern "C" fn on_device(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_lifecycle`.
    let (instance, send) = unsafe { (instance(domain), &*opaque.cast::<Send>()) };
    if let Some(instance) = instance {
        send(Event::Changed(instance));
    }
}

/// Returns the instance of an event.
///
/// # Safety
/// The domain is valid.
unsafe fn instance(domain: sys::virDomainPtr) -> Option<InstanceId> {
    let mut text: [c_char; sys::VIR_UUID_STRING_BUFLEN as usize] =
        [0; sys::VIR_UUID_STRING_BUFLEN as usize];
    // SAFETY: the buffer is as long as libvirt wants it, and holds a C string where it returns 0.
    unsafe {
        (sys::virDomainGetUUIDString(domain, text.as_mut_ptr()) == 0)
            .then(|| CStr::from_ptr(text.as_ptr()).to_str().ok()?.parse().ok())
            .flatten()
    }
}

/// Detaches a device from a running domain by its alias, because its address may be outdated. Does
/// not wait for the guest.
pub(super) fn detach_alias(domain: &Domain, alias: &CString) -> Result<(), Error> {
    let live = sys::VIR_DOMAIN_AFFECT_LIVE;
    // SAFETY: the domain is valid as long as it is borrowed, and the alias is a C string.
    match unsafe { sys::virDomainDetachDeviceAlias(domain.as_ptr(), alias.as_ptr(), live) } {
        0 => Ok(()),
        _ => Err(Error::last_error()),
    }
}

/// Whether a running domain is busy with a job, or with a command that QEMU has not answered.
pub(super) fn is_busy(domain: &Domain) -> Result<bool, Error> {
    let mut info = sys::virDomainControlInfo { state: 0, details: 0, stateTime: 0 };
    // SAFETY: the domain is valid as long as it is borrowed, and libvirt writes one
    // `virDomainControlInfo`.
    match unsafe { sys::virDomainGetControlInfo(domain.as_ptr(), &raw mut info, 0) } {
        0 => {
            Ok([sys::VIR_DOMAIN_CONTROL_JOB, sys::VIR_DOMAIN_CONTROL_OCCUPIED]
                .contains(&info.state))
        }
        _ => Err(Error::last_error()),
    }
}
