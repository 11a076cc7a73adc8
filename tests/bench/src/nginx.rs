//! The yardstick of the API: nginx, serving the same bytes from a file. It is started here, with a
//! folder of its own, and is no service.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::daemon::Process;

/// Debian's path of nginx, which is not in the PATH of all users.
const NGINX: &str = "/usr/sbin/nginx";

/// The names of a certificate and its key.
pub(crate) type Certificate<'a> = (&'a Path, &'a Path);

pub(crate) struct Nginx {
    child: Child,
    at: SocketAddr,
    folder: TempDir,
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Killed, it would leave its workers behind.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        drop(self.child.wait());
    }
}

impl Nginx {
    /// Serves what is put into it; as fast as it can: as many workers as processors, no log, files
    /// kept open.
    pub(crate) fn start(workers: usize, certificate: Option<Certificate<'_>>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        // Free a moment ago; were it taken by now, nginx would say so.
        let at = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let (tls, keys) = certificate.map_or_else(Default::default, |(certificate, key)| {
            (
                " ssl",
                format!(
                    "ssl_protocols TLSv1.3; ssl_certificate {}; ssl_certificate_key {};",
                    certificate.display(),
                    key.display()
                ),
            )
        });
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|what| format!("    {what}_temp_path {what};\n"))
            .concat();
        // Its workers read the folder, which is ours alone.
        let config = format!(
            "daemon off;\nuser root root;\nworker_processes {workers};\npid pid;\nevents {{ \
                worker_connections 1024; }}\nhttp {{\n{temporary}    \
             access_log off;\n    sendfile on;\n    tcp_nopush on;\n    keepalive_requests \
             1000000000;\n    open_file_cache max=16;\n    \
             types {{ }}\n    default_type application/json;\n    server {{ listen {at}{tls} \
             reuseport; {keys} root served; }}\n}}\n"
        );
        fs::write(folder.path().join("nginx.conf"), config)?;
        fs::create_dir(folder.path().join("served"))?;
        let mut command = Command::new(NGINX);
        command
            .arg("-p")
            .arg(folder.path())
            .args(["-e", "log", "-c", "nginx.conf"])
            .stderr(Stdio::null());
        let child = command.spawn().map_err(needs_debian("nginx"))?;
        let mut nginx = Self { child, at, folder };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(at).is_err() {
            let ended = nginx.child.try_wait()?;
            ensure!(
                ended.is_none() && Instant::now() < deadline,
                "nginx does not serve: {}",
                nginx.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(nginx)
    }

    /// Serves this as well.
    pub(crate) fn put(&self, name: &str, content: &[u8]) -> Result<()> {
        fs::write(self.folder.path().join("served").join(name), content)
            .context("what nginx is to serve")
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.at
    }

    /// Worker processes, which do the work.
    pub(crate) fn workers(&self) -> Result<Vec<Process>> {
        Process(self.child.id()).children()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

/// A program that Debian has, and not every machine.
pub(crate) fn needs_debian(name: &'static str) -> impl Fn(io::Error) -> anyhow::Error {
    move |e| anyhow::Error::new(e).context(format!("no {name}: 'make bench-deps' brings it"))
}
