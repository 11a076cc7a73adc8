//! libvirt, through the `virt` crate.
//!
//! ```text
//!   disconnected ── open, register events ──► connected ──► further connections, one per call
//!        ▲                                        │
//!        └── retry after 1, 2, 4 … 30 s ◄─────────┘ no keepalive, or the daemon has ended
//! ```
//! One thread runs libvirt's event loop as long as the process runs, another maintains the
//! connections. The first connection receives the events. A call can be made from any thread, and
//! has its own connection. Beside an unanswered call, other calls on the same connection are sent
//! only when the keepalive's timer expires, 5 s later (observed with libvirt 9.0), and libvirtd
//! accepts five at a time.

use std::ffi::CString;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt_sys as sys;
use virt_usb_model::InstanceId;

use super::events::{self, Registered};
use super::process::{self, Process, State};
use super::supervised::MAX_CALLS;
use super::{Event, Failure, Hypervisor, Running};

/// Interval at which the connection is checked, and shortest wait before a reconnect.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait before a reconnect.
const MAX_RECONNECT_INTERVAL: Duration = Duration::from_secs(30);
/// Time without an answer after which the daemon is reported as silent.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for the connection of a command.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Seconds between keepalive messages.
const KEEPALIVE_SECONDS: i32 = 5;
/// Maximum number of unanswered keepalive messages.
const MAX_UNANSWERED_KEEPALIVES: u32 = 3;

/// Sockets of the system's daemons. If one appears, the agent reconnects immediately.
const SOCKETS: [&str; 2] = ["/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock"];
/// Maximum number of connections in addition to the first: one for each call.
const MAX_CONNECTIONS: usize = MAX_CALLS;
/// Number of idle connections that stay open.
const IDLE_CONNECTIONS: usize = 4;

/// A libvirt daemon. Clones are cheap and share the connections.
#[derive(Clone)]
pub struct Libvirt {
    uri: Arc<str>,
    connections: Arc<Mutex<Connections>>,
    /// Whether to reconnect immediately, with a condition that is notified of that.
    retry: Arc<(Mutex<bool>, Condvar)>,
}

/// Connections to libvirt. Without the first one, the daemon counts as unreachable.
#[derive(Default)]
struct Connections {
    first: Option<Arc<Open>>,
    more: Vec<Arc<Open>>,
}

/// An open connection, closed with its last user.
struct Open {
    connect: Connect,
    /// Registered events, which must be unregistered before the connection is closed.
    registered: Mutex<Option<Registered>>,
    /// Whether a call uses the connection.
    in_use: AtomicBool,
}

impl Open {
    /// Enables keepalive. This fails with local drivers (test:///default), which need none, and in
    /// programs without an event loop.
    fn keep_alive(&self) {
        drop(self.connect.set_keep_alive(KEEPALIVE_SECONDS, MAX_UNANSWERED_KEEPALIVES));
    }

    fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    /// Converts an error of libvirt. If the connection is lost, that is the cause, regardless of
    /// the error.
    fn failure(&self, e: &Error) -> Failure {
        match failure(e) {
            Failure::Refused(why) if !self.is_alive() => Failure::Away(why),
            failure => failure,
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let registered = self.registered.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(registered) = registered {
            registered.end(&self.connect);
        }
        // An error of close cannot be handled.
        drop(self.connect.close());
    }
}

/// A connection in use by a call.
struct Lease(Arc<Open>);

impl Lease {
    /// Takes the connection for a call. `None` if another call uses it.
    fn of(open: &Arc<Open>) -> Option<Self> {
        (!open.in_use.swap(true, Ordering::AcqRel)).then(|| Self(open.clone()))
    }
}

impl Deref for Lease {
    type Target = Open;
    fn deref(&self) -> &Open {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.in_use.store(false, Ordering::Release);
    }
}

/// Way in which a domain was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// The domain was started from the given XML.
    Fresh,
    /// The domain was restored from its managed save image. The hook has given it its devices.
    Restored,
}

impl Libvirt {
    /// Creates a client of the daemon at this URI, without connecting.
    pub fn new(uri: &str) -> Self {
        Self { uri: uri.into(), connections: Arc::default(), retry: Arc::default() }
    }

    /// Opens a connection for a command, which makes a few calls.
    ///
    /// # Errors
    /// [`Failure::Away`].
    pub fn open(uri: &str) -> Result<Self, Failure> {
        quiet();
        let libvirt = Self::new(uri);
        let (dialler, (to, from)) = (libvirt.clone(), channel());
        let dial = move || drop(to.send(dialler.dial()));
        let thread = std::thread::Builder::new().name("libvirt".into()).spawn(dial);
        thread.map_err(|e| Failure::Away(e.to_string()))?;
        let dialled = from.recv_timeout(CONNECT_TIMEOUT).map_err(|_| {
            Failure::Away(format!(
                "{uri} has not answered for {CONNECT_TIMEOUT:?}: 'systemctl status libvirtd' shows \
                 its status"
            ))
        })?;
        libvirt.set(Some(Arc::new(dialled?)));
        Ok(libvirt)
    }

    /// Maintains a connection forever, and sends its events.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn follow(&self, events: Sender<Event>) -> std::io::Result<()> {
        quiet();
        let loops = || {
            virt::event::event_register_default_impl()?;
            Ok::<_, Error>(())
        };
        loops().map_err(|e| std::io::Error::other(e.to_string()))?;
        std::thread::Builder::new().name("libvirt-events".into()).spawn(|| {
            loop {
                if virt::event::event_run_default_impl().is_err() {
                    std::thread::sleep(CHECK_INTERVAL);
                }
            }
        })?;
        let this = self.clone();
        std::thread::Builder::new().name("libvirt".into()).spawn(move || this.keep(&events))?;
        Ok(())
    }

    fn keep(&self, events: &Sender<Event>) {
        let mut wait = CHECK_INTERVAL;
        let mut reported = None;
        loop {
            match self.connect(events) {
                Ok(open) => {
                    (wait, reported) = (CHECK_INTERVAL, None);
                    self.set(Some(open.clone()));
                    if events.send(Event::Connected).is_err() {
                        return;
                    }
                    while open.is_alive() {
                        self.close_unused();
                        std::thread::sleep(CHECK_INTERVAL);
                    }
                    drop(open);
                    self.set(None);
                    drop(events.send(Event::Lost("the connection broke".into())));
                }
                Err(why) => {
                    let why = why.to_string();
                    // Report each reason once.
                    let is_new = reported.as_ref() != Some(&why);
                    if is_new && events.send(Event::Lost(why.clone())).is_err() {
                        return;
                    }
                    reported = Some(why);
                    wait = if self.wait(wait) {
                        CHECK_INTERVAL
                    } else {
                        (wait * 2).min(MAX_RECONNECT_INTERVAL)
                    };
                }
            }
        }
    }

    /// Connects immediately instead of waiting, because libvirt has shown a sign of life.
    pub fn retry(&self) {
        let (requested, condition) = &*self.retry;
        *requested.lock().unwrap_or_else(PoisonError::into_inner) = true;
        condition.notify_one();
    }

    /// Waits before the next attempt to connect. Returns true if the wait was cut short by
    /// [`Libvirt::retry`] or a new socket.
    fn wait(&self, wait: Duration) -> bool {
        let (requested, condition) = &*self.retry;
        let until = Instant::now() + wait;
        let sockets = || {
            SOCKETS.map(|socket| fs::metadata(socket).ok().map(|found| (found.dev(), found.ino())))
        };
        let before = sockets();
        let mut guard = requested.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if std::mem::take(&mut *guard) || sockets() != before {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = condition.wait_timeout(guard, left.min(CHECK_INTERVAL / 4));
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn connect(&self, events: &Sender<Event>) -> Result<Arc<Open>, Failure> {
        let (answered, answer) = channel::<()>();
        let (uri, to) = (self.uri.clone(), events.clone());
        let watch = move || {
            // Report a daemon that accepts the connection and does not answer.
            if answer.recv_timeout(SILENCE_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
                let why = format!("{uri} has not answered for {SILENCE_TIMEOUT:?}");
                drop(to.send(Event::Lost(why)));
            }
        };
        // Without this thread, only that report is missing.
        drop(std::thread::Builder::new().name("libvirt-watch".into()).spawn(watch));
        let dialled = self.dial();
        drop(answered);
        let open = dialled?;
        let registered = events::register(&open.connect, events);
        let registered = registered.map_err(|e| Failure::Away(e.message().to_owned()))?;
        *open.registered.lock().unwrap_or_else(PoisonError::into_inner) = Some(registered);
        open.keep_alive();
        Ok(Arc::new(open))
    }

    fn dial(&self) -> Result<Open, Failure> {
        let connect = Connect::open(Some(&self.uri))
            .map_err(|e| Failure::Away(format!("{}: {}", self.uri, e.message())))?;
        Ok(Open { connect, registered: Mutex::default(), in_use: AtomicBool::new(false) })
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, first: Option<Arc<Open>>) {
        let before =
            std::mem::replace(&mut *self.connections(), Connections { first, more: Vec::new() });
        // Closing a connection may take a while: do not wait for it.
        drop(before);
    }

    /// Closes further connections that are broken or not needed.
    fn close_unused(&self) {
        let mut spare = 0;
        let mut is_kept = |open: &Arc<Open>| {
            let in_use = open.in_use.load(Ordering::Acquire);
            spare += usize::from(!in_use);
            in_use || (spare <= IDLE_CONNECTIONS && open.is_alive())
        };
        let unused: Vec<Arc<Open>> = {
            let more = &mut self.connections().more;
            let (kept, unused) = std::mem::take(more).into_iter().partition(|open| is_kept(open));
            *more = kept;
            unused
        };
        // Closing a connection may take a while: do not wait for it.
        drop(unused);
    }

    /// Returns a connection for a call.
    fn connection(&self) -> Result<Lease, Failure> {
        {
            let connections = self.connections();
            let Some(first) = &connections.first else {
                return Err(Failure::Away(format!("no connection to {}", self.uri)));
            };
            let has_events =
                first.registered.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            let first = Some(first).filter(|_| !has_events);
            let alive = |open: &&Arc<Open>| open.is_alive();
            if let Some(lease) =
                first.into_iter().chain(&connections.more).filter(alive).find_map(Lease::of)
            {
                return Ok(lease);
            }
            if connections.more.len() >= MAX_CONNECTIONS {
                return Err(Failure::Silent(format!("{MAX_CONNECTIONS} calls have no answer yet")));
            }
        }
        // A refused connection means that the daemon has ended. Other errors are not an outage.
        let open = self.dial().map_err(|e| match e {
            Failure::Away(why) if !why.contains("Failed to connect socket") => {
                Failure::Busy(format!("there is no other connection: {why}"))
            }
            other => other,
        })?;
        open.keep_alive();
        let open = Arc::new(open);
        let lease = Lease::of(&open);
        let mut connections = self.connections();
        if connections.first.is_some() {
            connections.more.push(open);
        }
        lease.ok_or_else(|| Failure::Busy("its connection is in use".into()))
    }

    fn find(&self, open: &Open, instance: InstanceId) -> Result<Domain, Failure> {
        Domain::lookup_by_uuid_string(&open.connect, &instance.to_string())
            .map_err(|e| open.failure(&e))
    }

    /// Returns the UUID of the domain with this name or UUID.
    ///
    /// # Errors
    /// [`Failure::Gone`] if there is none.
    pub fn resolve(&self, name: &str) -> Result<InstanceId, Failure> {
        let open = self.connection()?;
        let domain = Domain::lookup_by_name(&open.connect, name)
            .or_else(|e| Domain::lookup_by_uuid_string(&open.connect, name).map_err(|_| e))
            .map_err(|e| open.failure(&e))?;
        uuid(&domain)
    }

    /// Returns the definition of a persistent domain that is not running, with its secrets, as
    /// needed for a start.
    ///
    /// # Errors
    /// [`Failure::Refused`] if the domain is running.
    pub fn definition(&self, instance: InstanceId) -> Result<String, Failure> {
        let open = self.connection()?;
        let domain = self.find(&open, instance)?;
        if domain.is_active().map_err(|e| open.failure(&e))? {
            return Err(Failure::Refused("it is already running".into()));
        }
        domain
            .get_xml_desc(sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE)
            .map_err(|e| open.failure(&e))
    }

    /// Starts a persistent domain, with `xml` instead of its definition if given; the definition
    /// does not change. A saved domain is restored: to start it without its state would leave an
    /// image that no longer matches its disks.
    ///
    /// # Errors
    /// The error of libvirt, which includes the hook's message.
    pub fn start(&self, instance: InstanceId, xml: Option<&str>) -> Result<Started, Failure> {
        let open = self.connection()?;
        let domain = self.find(&open, instance)?;
        let saved = domain.has_managed_save(0).map_err(|e| open.failure(&e))?;
        match xml.filter(|_| !saved) {
            // The `virt` crate converts the XML to a C string, and panics at a NUL byte.
            Some(xml) if xml.contains('\0') => {
                return Err(Failure::Refused("its XML contains a NUL byte".into()));
            }
            Some(xml) => {
                Domain::create_xml(&open.connect, xml, 0)
                    .map(drop)
                    .map_err(|e| open.failure(&e))?;
            }
            None => domain.create().map(drop).map_err(|e| open.failure(&e))?,
        }
        Ok(if saved { Started::Restored } else { Started::Fresh })
    }

    /// QEMU's capabilities on this host, for the machine's own architecture
    /// (<https://libvirt.org/formatdomaincaps.html>).
    ///
    /// # Errors
    /// [`Failure::Away`], [`Failure::Refused`].
    pub fn domain_capabilities(&self) -> Result<String, Failure> {
        let open = self.connection()?;
        open.connect
            .get_domain_capabilities(None, None, None, None, 0)
            .map_err(|e| open.failure(&e))
    }

    /// Returns the definitions of all persistent domains. A domain that is undefined in the
    /// meantime is left out.
    ///
    /// # Errors
    /// [`Failure::Away`].
    pub fn definitions(&self) -> Result<Vec<String>, Failure> {
        let open = self.connection()?;
        let domains = open
            .connect
            .list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_PERSISTENT)
            .map_err(|e| open.failure(&e))?;
        Ok(domains
            .iter()
            .filter_map(|d| d.get_xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).ok())
            .collect())
    }

    /// Whether the domain has a managed save image.
    ///
    /// # Errors
    /// As [`Hypervisor::look`].
    pub fn is_saved(&self, instance: InstanceId) -> Result<bool, Failure> {
        let open = self.connection()?;
        self.find(&open, instance)?.has_managed_save(0).map_err(|e| open.failure(&e))
    }
}

/// Returns the UUID of a domain, which is part of libvirt's handle and needs no call.
fn uuid(domain: &Domain) -> Result<InstanceId, Failure> {
    let text = domain.get_uuid_string().map_err(|e| failure(&e))?;
    text.parse().map_err(|_| Failure::Refused(format!("{text:?} is not a UUID")))
}

/// Reads a running domain. `None` if it has stopped in the meantime.
fn read(open: &Open, domain: &Domain) -> Result<Option<Running>, Failure> {
    let read = || {
        if !domain.is_active()? {
            return Ok::<_, Error>(None);
        }
        // While a restore or migration loads the state, the guest is paused with this reason.
        let (state, reason) = domain.get_state()?;
        let moving = state == sys::VIR_DOMAIN_PAUSED
            && reason == sys::VIR_DOMAIN_PAUSED_MIGRATION.cast_signed();
        Ok(Some((domain.get_name()?, domain.get_xml_desc(0)?, moving)))
    };
    match read() {
        Ok(None) => Ok(None),
        Ok(Some((name, xml, moving))) => {
            Ok(Some(Running { instance: uuid(domain)?, name, xml, moving }))
        }
        Err(e) => match open.failure(&e) {
            Failure::Gone => Ok(None),
            other => Err(other),
        },
    }
}

impl Hypervisor for Libvirt {
    fn running(&self) -> Result<Vec<InstanceId>, Failure> {
        let open = self.connection()?;
        let domains = open
            .connect
            .list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            .map_err(|e| open.failure(&e))?;
        domains.iter().map(uuid).collect()
    }

    fn all(&self) -> Result<Vec<InstanceId>, Failure> {
        let open = self.connection()?;
        open.connect.list_all_domains(0).map_err(|e| open.failure(&e))?.iter().map(uuid).collect()
    }

    fn look(&self, instance: InstanceId) -> Result<Option<Running>, Failure> {
        let open = self.connection()?;
        match self.find(&open, instance) {
            Ok(domain) => read(&open, &domain),
            Err(Failure::Gone) => Ok(None),
            Err(other) => Err(other),
        }
    }

    fn xml(&self, instance: InstanceId) -> Result<Option<String>, Failure> {
        let open = self.connection()?;
        match self
            .find(&open, instance)
            .and_then(|domain| domain.get_xml_desc(0).map_err(|e| open.failure(&e)))
        {
            Ok(xml) => Ok(Some(xml)),
            Err(Failure::Gone) => Ok(None),
            Err(other) => Err(other),
        }
    }

    fn attach(&self, instance: InstanceId, device: &str) -> Result<(), Failure> {
        refuse_stopped(instance)?;
        let open = self.connection()?;
        let domain = self.find(&open, instance)?;
        let attach = || {
            domain
                .attach_device_flags(device, sys::VIR_DOMAIN_AFFECT_LIVE)
                .map(drop)
                .map_err(|e| open.failure(&e))
        };
        match attach() {
            Err(Failure::Refused(why)) => {
                let Some(alias) = unknown_to_libvirt(&why, device) else {
                    return Err(Failure::Refused(why));
                };
                let command =
                    serde_json::json!({"execute": "device_del", "arguments": {"id": alias}});
                domain
                    .qemu_monitor_command(&command.to_string(), 0)
                    .map_err(|e| open.failure(&e))?;
                // libvirt handles QEMU's event about the removal. If it came after the new attach,
                // libvirt would remove the new device, which has the same alias.
                std::thread::sleep(CHECK_INTERVAL);
                tracing::warn!(%instance, alias, "QEMU already had {alias}, unknown to libvirt: \
                    it was removed and attached again");
                attach()
            }
            done => done,
        }
    }

    fn detach(&self, instance: InstanceId, alias: &str) -> Result<(), Failure> {
        refuse_stopped(instance)?;
        let open = self.connection()?;
        let domain = self.find(&open, instance)?;
        let alias = CString::new(alias)
            .map_err(|_| Failure::Refused("the alias contains a NUL byte".into()))?;
        match events::detach_alias(&domain, &alias) {
            Err(e) if e.code() == ErrorNumber::DeviceMissing => Ok(()),
            done => done.map_err(|e| open.failure(&e)),
        }
    }

    fn stop(&self, instance: InstanceId) -> Result<(), Failure> {
        let open = self.connection()?;
        self.find(&open, instance)?.destroy().map_err(|e| open.failure(&e))
    }

    fn is_busy(&self, instance: InstanceId) -> Result<bool, Failure> {
        let open = self.connection()?;
        match self
            .find(&open, instance)
            .and_then(|domain| events::is_busy(&domain).map_err(|e| open.failure(&e)))
        {
            // The domain does not exist or is not running.
            Err(Failure::Gone) => Ok(false),
            Ok(is_busy) => Ok(is_busy),
            Err(other) => Err(other),
        }
    }

    fn process(&self, instance: InstanceId) -> Option<u32> {
        process::of(instance).map(|qemu| qemu.pid)
    }

    fn identity(&self) -> Result<String, Failure> {
        let open = self.connection()?;
        let connect = &open.connect;
        // The host's UUID is not used: on machines without one in the firmware, libvirtd creates a
        // new one at each start (virSetHostUUIDStr).
        let identity = || {
            let (kind, uri, host) =
                (connect.get_type()?, connect.get_uri()?, connect.get_hostname()?);
            Ok::<_, Error>(format!("{kind} {uri} on {host}"))
        };
        identity().map_err(|e| open.failure(&e))
    }
}

/// Refuses a call about a guest whose QEMU is stopped or blocked. QEMU would not answer libvirt,
/// and the call would occupy one of libvirtd's 20 workers (`max_workers`).
fn refuse_stopped(instance: InstanceId) -> Result<(), Failure> {
    let why = match process::settled(instance) {
        Some(Process { pid, state: State::Stopped }) => {
            tracing::warn!(%instance, pid, "instance {instance}: its QEMU, process {pid}, is \
                stopped");
            "its QEMU is stopped, by a signal or a debugger: SIGCONT resumes it"
        }
        Some(Process { pid, state: State::Blocked }) => {
            tracing::warn!(%instance, pid, "instance {instance}: its QEMU, process {pid}, waits in \
                the kernel");
            "its QEMU waits in the kernel, as for a disk or a network file system that does not \
                answer"
        }
        Some(Process { state: State::Running, .. }) | None => return Ok(()),
    };
    Err(Failure::Hung(why.into()))
}

/// Returns the alias of virt-usb, if QEMU refuses the device because it has one with that alias. A
/// libvirtd that ends between QEMU's answer and writing its own status file does not know the
/// device, and can neither detach nor attach it. If the alias is in the domain's XML, libvirt
/// itself refuses it ("non unique alias detected", virDomainDeviceDefValidateAliasesHotplug). The
/// message is "Duplicate device ID 'ua-usb-2'" in QEMU 6.2 and later, "Duplicate ID 'ua-usb-2' for
/// device" in earlier versions.
fn unknown_to_libvirt<'a>(why: &'a str, device: &str) -> Option<&'a str> {
    let (_, after) = why.split_once("Duplicate ")?;
    let alias =
        after.strip_prefix("device ").unwrap_or(after).strip_prefix("ID '")?.split('\'').next()?;
    device.contains(&format!("<alias name='{alias}'/>")).then_some(alias)
}

/// Whether the message means that libvirt has lost the guest's QEMU, and not that this process has
/// lost libvirt: "Unable to write to monitor: Broken pipe", "End of file from qemu monitor", "qemu
/// monitor was closed".
fn is_end_of_qemu(message: &str) -> bool {
    message.contains("monitor")
        && ["Broken pipe", "End of file", "closed"].iter().any(|end| message.contains(end))
}

/// Converts an error of libvirt.
fn failure(e: &Error) -> Failure {
    let message = e.message().to_owned();
    match e.code() {
        ErrorNumber::NoDomain => Failure::Gone,
        ErrorNumber::OperationInvalid if message.contains("not running") => Failure::Gone,
        ErrorNumber::OperationTimeout => Failure::Busy(message),
        _ if is_end_of_qemu(&message) => Failure::Gone,
        ErrorNumber::Rpc | ErrorNumber::NoConnect | ErrorNumber::InvalidConn => {
            Failure::Away(message)
        }
        ErrorNumber::SystemError | ErrorNumber::InternalError
            if [
                "client socket is closed",
                "End of file while reading data",
                "Broken pipe",
                "Connection refused",
            ]
            .iter()
            .any(|sign| message.contains(sign)) =>
        {
            Failure::Away(message)
        }
        _ => Failure::Refused(message),
    }
}

/// Stops libvirt from printing errors to stderr; they are returned as well.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(virt::error::clear_error_callback);
}

#[cfg(test)]
mod tests {
    use super::{is_end_of_qemu, unknown_to_libvirt};

    #[test]
    fn the_end_of_qemu_differs_from_that_of_libvirt() {
        for (message, expected) in [
            ("Unable to write to monitor: Broken pipe", true),
            ("internal error: End of file from qemu monitor", true),
            ("internal error: qemu monitor was closed", true),
            ("Cannot write data: Broken pipe", false),
            ("internal error: client socket is closed", false),
            (
                "Cannot acquire state change lock (held by \
                    monitor=remoteDispatchDomainAttachDevice)",
                false,
            ),
        ] {
            assert_eq!(is_end_of_qemu(message), expected, "{message}");
        }
    }

    #[test]
    fn only_a_device_of_virt_usb_is_removed_without_libvirt() {
        let device = "<hostdev mode='subsystem' type='usb'><alias name='ua-usb-2'/></hostdev>";
        let new = "internal error: unable to execute QEMU command 'device_add': Duplicate device \
            ID 'ua-usb-2'";
        let old = "internal error: unable to execute QEMU command 'device_add': Duplicate ID \
            'ua-usb-2' for device";
        assert_eq!(unknown_to_libvirt(new, device), Some("ua-usb-2"));
        assert_eq!(unknown_to_libvirt(old, device), Some("ua-usb-2"));
        for other in [
            &new.replace("ua-usb-2", "ua-usb-21"),
            &new.replace("ua-usb-2", "hostdev0"),
            "non unique alias detected: ua-usb-2",
        ] {
            assert_eq!(unknown_to_libvirt(other, device), None, "{other}");
        }
    }
}
