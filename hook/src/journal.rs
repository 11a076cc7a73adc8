//! One record a call, with its duration: in the systemd journal or in a file.
//!
//! The journal's native protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>) is one datagram of `KEY=value` lines. The
//! domain XML is never in a record: it may hold secrets.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::answer::Answer;
use crate::call::Call;
use crate::config::Log;

const SOCKET: &str = "/run/systemd/journal/socket";

/// Writes the record. Nothing is done about a record that cannot be written: nobody must suffer for it.
pub fn record(log: &Log, call: &Call, instance: Option<&str>, answer: &Answer, took: Duration) {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    let message = message(call, answer);
    let fields = [
        ("MESSAGE", message.as_str()),
        ("PRIORITY", priority(answer)),
        ("SYSLOG_IDENTIFIER", "virt-usb-hook"),
        ("VIRT_USB_OPERATION", &call.op),
        ("VIRT_USB_DOMAIN", &call.name),
        ("VIRT_USB_INSTANCE", instance.unwrap_or_default()),
        ("VIRT_USB_OUTCOME", &answer.did),
        ("VIRT_USB_DURATION_US", &micros.to_string()),
    ];
    match log {
        Log::Off => {}
        Log::Journal => drop(to_journal(&fields)),
        Log::File(path) => {
            // One write of one line: records of hooks that run at once do not mix.
            let object: serde_json::Map<String, serde_json::Value> = fields
                .iter()
                .map(|(key, value)| (key.to_lowercase().replace("virt_usb_", ""), (*value).into()))
                .chain([("duration_us".to_owned(), micros.into()), ("at".to_owned(), seconds().into())])
                .collect();
            let line = format!("{}\n", serde_json::Value::Object(object));
            let careful = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o640)
                .custom_flags(careful)
                .open(path);
            drop(file.and_then(|mut f| f.write_all(line.as_bytes())));
        }
    }
}

fn message(call: &Call, answer: &Answer) -> String {
    let mut text = format!("{} {}: {}", call.name, call.op, answer.refusal.as_deref().unwrap_or(&answer.did));
    for warning in &answer.warnings {
        text.push_str("; ");
        text.push_str(warning);
    }
    text
}

/// syslog's numbers: 3 error, 4 warning, 6 information, 7 debug.
fn priority(answer: &Answer) -> &'static str {
    match answer {
        Answer { refusal: Some(_), .. } => "3",
        Answer { warnings, .. } if !warnings.is_empty() => "4",
        Answer { did, .. } if did == crate::run::NOTHING => "7",
        _ => "6",
    }
}

/// Seconds since 1970, to the millisecond.
fn seconds() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_secs_f64() * 1000.0).round() / 1000.0
}

fn to_journal(fields: &[(&str, &str)]) -> std::io::Result<usize> {
    let mut datagram = Vec::with_capacity(512);
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_empty()) {
        // Values are one line: names with line ends are cut there.
        let value: String = value.chars().map(|c| if c == '\n' { ' ' } else { c }).take(4096).collect();
        datagram.extend_from_slice(format!("{key}={value}\n").as_bytes());
    }
    let socket = UnixDatagram::unbound()?;
    // A journal that does not read must not hold up a domain.
    socket.set_nonblocking(true)?;
    socket.send_to(&datagram, SOCKET)
}
