//! TCP ports of loopback for servers of a test. `ports.py` of `tests/lib` reserves them in the
//! same way.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// The kernel uses ports from 32768 on for connections. If a server restarts on such a port, a
/// connection may have taken it. A client that retries a port of that range may even connect to
/// itself.
const FIRST: u16 = 16_000;
const COUNT: u32 = 16_768;

/// A free port that no other test reserves while this value lives.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) number: u16,
    _reserved: UnixListener,
}

impl Port {
    pub(crate) fn reserve() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Processes begin at different places.
        let begin = std::process::id();
        for _ in 0..COUNT {
            let step = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(101);
            let number = FIRST + u16::try_from(begin.wrapping_add(step) % COUNT).unwrap();
            let name =
                SocketAddr::from_abstract_name(format!("virt-usb-test-port-{number}")).unwrap();
            let reserved = match UnixListener::bind_addr(&name) {
                Ok(reserved) => reserved,
                Err(e) if e.kind() == ErrorKind::AddrInUse => continue,
                Err(e) => panic!("an abstract socket cannot be bound: {e}"),
            };
            if TcpListener::bind(("127.0.0.1", number)).is_ok() {
                return Self { number, _reserved: reserved };
            }
        }
        panic!("none of the {COUNT} TCP ports from {FIRST} on is free")
    }
}
