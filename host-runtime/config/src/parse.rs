//! Parsers of keys and values; an error is one line that names the key.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use virt_usb_store::flaps::Limits;

use crate::values::{
    Api, AttachFailurePolicy, HoldPolicy, Log, Metrics, MigrationPolicy, ReplugPolicy,
    RequireAgent, Tls, absolute_path,
};
use crate::{fleet, keystone};

/// Keys that serde parses. The model parses the whitelist's keys.
#[derive(Deserialize)]
pub(crate) struct Raw {
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) sysfs_root: Option<PathBuf>,
    pub(crate) procfs_root: Option<PathBuf>,
    #[serde(default)]
    pub(crate) hold: HoldPolicy,
    #[serde(default)]
    pub(crate) migration: MigrationPolicy,
    pub(crate) log: Option<String>,
    pub(crate) events_keep_days: Option<u32>,
    pub(crate) forget_after_days: Option<u32>,
    #[serde(default)]
    pub(crate) usb_aliases: Vec<Vec<String>>,
    pub(crate) flap_limit: Option<u64>,
    pub(crate) flap_window: Option<u64>,
    pub(crate) flap_pause: Option<u64>,
    pub(crate) flap_quarantine: Option<u64>,
    pub(crate) libvirt_uri: Option<String>,
    pub(crate) scan_interval: Option<u64>,
    pub(crate) absent_grace: Option<u64>,
    pub(crate) undefined_grace: Option<u64>,
    pub(crate) recheck_delay: Option<u64>,
    pub(crate) libvirt_timeout: Option<u64>,
    pub(crate) pending_grace: Option<u64>,
    #[serde(default)]
    pub(crate) replug: ReplugPolicy,
    #[serde(default)]
    pub(crate) on_attach_failure: AttachFailurePolicy,
    pub(crate) metrics: Option<String>,
    pub(crate) api: Option<String>,
    pub(crate) api_certificate: Option<PathBuf>,
    pub(crate) api_key: Option<PathBuf>,
    pub(crate) fleet: Option<fleet::Raw>,
    pub(crate) keystone: Option<keystone::Raw>,
}

pub(crate) const KEYS: &[&str] = &[
    "state_dir",
    "sysfs_root",
    "procfs_root",
    "usb_white_list_switch",
    "usb_passthrough_whitelist",
    "usb_white_list",
    "usb_aliases",
    "flap_limit",
    "flap_window",
    "flap_pause",
    "flap_quarantine",
    "hold",
    "migration",
    "log",
    "events_keep_days",
    "forget_after_days",
    "libvirt_uri",
    "scan_interval",
    "absent_grace",
    "undefined_grace",
    "recheck_delay",
    "libvirt_timeout",
    "pending_grace",
    "replug",
    "on_attach_failure",
    "require_agent",
    "metrics",
    "api",
    "api_certificate",
    "api_key",
    "fleet",
    "keystone",
];

pub(crate) fn known(key: &str, keys: &[&str]) -> Result<(), String> {
    if keys.contains(&key) {
        return Ok(());
    }
    let near = keys.iter().map(|k| (strsim::damerau_levenshtein(key, k), *k)).min();
    Err(match near {
        Some((distance, k)) if distance <= 1 + k.len() / 3 => {
            format!("unknown key {key:?}: did you mean {k:?}?")
        }
        _ => format!("unknown key {key:?}: the keys are {}", keys.join(", ")),
    })
}

pub(crate) fn absolute(
    key: &str,
    value: Option<PathBuf>,
    default: PathBuf,
) -> Result<PathBuf, String> {
    value.map_or(Ok(default), |path| absolute_path(key, path))
}

pub(crate) fn log(value: Option<&str>) -> Result<Log, String> {
    match value {
        None | Some("journal") => Ok(Log::Journal),
        Some("off") => Ok(Log::Off),
        Some(path) if path.starts_with('/') => Ok(Log::File(path.into())),
        Some(other) => {
            Err(format!("log: found {other:?}, wanted \"journal\", \"off\" or an absolute path"))
        }
    }
}

pub(crate) fn libvirt_uri(value: Option<String>, default: String) -> Result<String, String> {
    match value {
        None => Ok(default),
        Some(uri) if uri.contains(":/") && !uri.contains(char::is_control) => Ok(uri),
        Some(uri) => {
            Err(format!("libvirt_uri: found {uri:?}, wanted a URI such as \"qemu:///system\""))
        }
    }
}

pub(crate) fn flapping(raw: &Raw, default: Limits) -> Result<Limits, String> {
    let number = |key: &str, value: Option<u64>, default: u64, least: u64, most: u64| match value {
        None => Ok(default),
        Some(value) if (least..=most).contains(&value) => Ok(value),
        Some(other) => Err(format!("{key}: found {other}, wanted {least} to {most}")),
    };
    let few = |key, value, default: u32| -> Result<u32, String> {
        let value = number(key, value, default.into(), 0, 1000)?;
        Ok(u32::try_from(value).unwrap_or(default))
    };
    Ok(Limits {
        limit: few("flap_limit", raw.flap_limit, default.limit)?,
        window: number("flap_window", raw.flap_window, default.window, 1, 86400)?,
        pause: number("flap_pause", raw.flap_pause, default.pause, 1, 86400)?,
        quarantine: few("flap_quarantine", raw.flap_quarantine, default.quarantine)?,
    })
}

/// A duration in seconds, from 1 second to a day.
pub(crate) fn seconds(
    key: &str,
    value: Option<u64>,
    default: Duration,
) -> Result<Duration, String> {
    match value {
        None => Ok(default),
        Some(seconds @ 1..=86400) => Ok(Duration::from_secs(seconds)),
        Some(other) => Err(format!("{key}: found {other}, wanted 1 to 86400 seconds")),
    }
}

pub(crate) fn require_agent(value: Option<&toml::Value>) -> Result<RequireAgent, String> {
    match value {
        None => Ok(RequireAgent::Auto),
        Some(toml::Value::Boolean(true)) => Ok(RequireAgent::Always),
        Some(toml::Value::Boolean(false)) => Ok(RequireAgent::Never),
        Some(toml::Value::String(word)) if word == "auto" => Ok(RequireAgent::Auto),
        Some(other) => Err(format!("require_agent: found {other}, wanted \"auto\", true or false")),
    }
}

/// Parses the address of the metrics. They contain data of this host, so only loopback addresses
/// and sockets are accepted.
pub(crate) fn metrics(value: Option<&str>) -> Result<Metrics, String> {
    match value {
        None | Some("off") => Ok(Metrics::Off),
        Some(path) if path.starts_with('/') => Ok(Metrics::Unix(path.into())),
        Some(address) => match address.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Metrics::Tcp(address)),
            _ => Err(format!(
                "metrics: found {address:?}, wanted \"off\", a loopback address such \
                    as \"127.0.0.1:9177\", or an absolute path for a socket"
            )),
        },
    }
}

pub(crate) fn api(value: Option<&str>, encrypted: bool) -> Result<Api, String> {
    match value {
        None => Ok(Api::default()),
        Some("off") => Ok(Api::Off),
        Some(address) => match address.parse::<SocketAddr>() {
            Ok(address) if encrypted || address.ip().is_loopback() => Ok(Api::On(address)),
            Ok(_) => Err(format!(
                "api: found {address:?}, which other hosts can reach: without TLS, tokens could \
                 be read on the network: set api_certificate and api_key, or use a loopback address"
            )),
            Err(_) => Err(format!(
                "api: found {address:?}, wanted \"off\" or an address such as \"127.0.0.1:8790\""
            )),
        },
    }
}

pub(crate) fn tls(
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<Tls>, String> {
    match (certificate, key) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => {
            let certificate = absolute_path("api_certificate", certificate)?;
            Ok(Some(Tls { certificate, key: absolute_path("api_key", key)? }))
        }
        (Some(_), None) => {
            Err("api_certificate: its key is missing: set api_key as well".to_owned())
        }
        (None, Some(_)) => {
            Err("api_key: its certificate is missing: set api_certificate as well".to_owned())
        }
    }
}

pub(crate) fn one_line(e: &toml::de::Error, text: &str) -> String {
    let line = e.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
    let message = e.message().split_whitespace().collect::<Vec<_>>().join(" ");
    line.map_or_else(|| message.clone(), |line| format!("line {line}: {message}"))
}

/// The top-level keys of a text that is not valid TOML, from those lines above the first section
/// that are valid on their own.
pub(crate) fn top_level(text: &str) -> toml::Table {
    let is_section = |line: &str| {
        let name = line.trim_start_matches('[').split(']').next().unwrap_or_default();
        line.starts_with('[')
            && !name.is_empty()
            && name.chars().all(|c| c.is_alphanumeric() || "._- ".contains(c))
    };
    let mut found = toml::Table::new();
    for line in text.lines().map(str::trim).take_while(|line| !is_section(line)) {
        for (key, value) in line.parse::<toml::Table>().unwrap_or_default() {
            let same = found.get(&key).is_none_or(|was| *was == value);
            found.insert(key, if same { value } else { toml::Value::Boolean(false) });
        }
    }
    found
}
