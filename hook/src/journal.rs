//! Writes one record per call, with its duration, to the systemd journal or to a file.
//!
//! The journal's native protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>) is one datagram of
//! `KEY=value` lines. The domain XML is never in a record, because it may contain secrets.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use virt_usb_config::Log;
use virt_usb_model::clean;
use virt_usb_store::user::User;

use crate::answer::Answer;
use crate::call::Call;

const SOCKET: &str = "/run/systemd/journal/socket";

/// Writes the record. If the file cannot be written, the record goes to the journal. A record that
/// cannot be written is not an error of the call.
pub fn record(log: &Log, call: &Call, instance: Option<&str>, answer: &Answer, took: Duration) {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    let (message, duration) = (message(call, answer), micros.to_string());
    let fields =
        fields(call, instance, answer, &message, &duration).map(|(key, text)| (key, clean(text)));
    match log {
        Log::Off => {}
        Log::Journal => drop(to_journal(Path::new(SOCKET), &fields)),
        Log::File(path) => {
            // Write the line with a single call, so that records of concurrent hooks do not mix.
            let object: serde_json::Map<String, serde_json::Value> = fields
                .iter()
                .map(|(key, value)| {
                    (key.to_lowercase().replace("virt_usb_", ""), value.as_str().into())
                })
                .chain([
                    ("duration_us".to_owned(), micros.into()),
                    ("at".to_owned(), seconds().into()),
                ])
                .collect();
            let line = format!("{}\n", serde_json::Value::Object(object));
            let careful = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let open = |_owner| {
                std::fs::OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o640)
                    .custom_flags(careful)
                    .open(path)
            };
            let file = User::of_folder_of(path).and_then(User::enter).and_then(open);
            if file.and_then(|mut f| f.write_all(line.as_bytes())).is_err() {
                drop(to_journal(Path::new(SOCKET), &fields));
            }
        }
    }
}

fn fields<'a>(
    call: &'a Call,
    instance: Option<&'a str>,
    answer: &'a Answer,
    message: &'a str,
    duration_us: &'a str,
) -> [(&'static str, &'a str); 8] {
    [
        ("MESSAGE", message),
        ("PRIORITY", priority(answer)),
        ("SYSLOG_IDENTIFIER", "virt-usb-hook"),
        ("VIRT_USB_OPERATION", &call.op),
        ("VIRT_USB_DOMAIN", &call.name),
        ("VIRT_USB_INSTANCE", instance.unwrap_or_default()),
        ("VIRT_USB_OUTCOME", &answer.did),
        ("VIRT_USB_DURATION_US", duration_us),
    ]
}

fn message(call: &Call, answer: &Answer) -> String {
    let mut text =
        format!("{} {}: {}", call.name, call.op, answer.refusal.as_deref().unwrap_or(&answer.did));
    for warning in &answer.warnings {
        text.push_str("; ");
        text.push_str(warning);
    }
    text
}

/// Priority in syslog's numbers: 3 error, 4 warning, 6 information, 7 debug.
fn priority(answer: &Answer) -> &'static str {
    match answer {
        Answer { refusal: Some(_), .. } => "3",
        Answer { warnings, .. } if !warnings.is_empty() => "4",
        Answer { did, .. } if did == crate::job::NOTHING => "7",
        _ => "6",
    }
}

/// Seconds since 1970, with a precision of a millisecond.
fn seconds() -> f64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_secs_f64() * 1000.0).round() / 1000.0
}

fn to_journal(socket: &Path, fields: &[(&str, String)]) -> std::io::Result<usize> {
    let mut datagram = Vec::with_capacity(512);
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_empty()) {
        // Values have been cleaned, so each is one line.
        let value: String = value.chars().take(4096).collect();
        datagram.extend_from_slice(format!("{key}={value}\n").as_bytes());
    }
    let sender = UnixDatagram::unbound()?;
    // Do not block if journald does not read.
    sender.set_nonblocking(true)?;
    sender.send_to(&datagram, socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Operation;

    fn call() -> Call {
        Call {
            config: None,
            name: "erp\nMESSAGE=forged".into(),
            op: "prepare".into(),
            operation: Operation::Gate,
            caller: crate::call::HookCaller::Process,
        }
    }

    #[test]
    fn the_journal_gets_one_datagram_of_lines() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let journal = UnixDatagram::bind(&socket).unwrap();
        let answer = Answer::refused("no key").warn("and more");
        let micros = 1234;
        to_journal(
            &socket,
            &fields(
                &call(),
                Some("uuid"),
                &answer,
                &message(&call(), &answer),
                &micros.to_string(),
            )
            .map(|(key, text)| (key, clean(text))),
        )
        .unwrap();
        let mut datagram = [0; 1024];
        let length = journal.recv(&mut datagram).unwrap();
        assert_eq!(
            std::str::from_utf8(&datagram[..length]).unwrap(),
            "MESSAGE=erp MESSAGE=forged prepare: no key; and \
                more\nPRIORITY=3\nSYSLOG_IDENTIFIER=virt-usb-hook\n\
             VIRT_USB_OPERATION=prepare\nVIRT_USB_DOMAIN=erp \
             MESSAGE=forged\nVIRT_USB_INSTANCE=uuid\n\
             VIRT_USB_OUTCOME=refused\nVIRT_USB_DURATION_US=1234\n"
        );
    }

    #[test]
    fn a_log_file_gets_one_object_per_line_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        for _ in 0..2 {
            record(
                &Log::File(file.clone()),
                &call(),
                None,
                &Answer::unchanged("claimed 5"),
                Duration::from_micros(7),
            );
        }
        let text = std::fs::read_to_string(&file).unwrap();
        for line in text.lines() {
            let object: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(
                (&object["outcome"], &object["duration_us"], &object["priority"]),
                (&"claimed 5".into(), &7.into(), &"6".into())
            );
        }
        assert_eq!(text.lines().count(), 2);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
        record(&Log::File(link), &call(), None, &Answer::unchanged("x"), Duration::ZERO);
        assert!(!dir.path().join("elsewhere").exists());
    }
}
