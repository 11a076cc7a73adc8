//! The configuration: TOML at [`DEFAULT_PATH`], read by every program of virt-usb.
//!
//! An unknown key is an error that names the nearest known one: a misspelt `usb_white_list_switch` must not leave
//! the whitelist off in silence. `install/config.toml` explains every key; a test reads it with this module.

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use virt_usb_model::Whitelist;

/// The largest configuration read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Where the configuration is looked for when `--config` does not say.
pub const DEFAULT_PATH: &str = "/etc/virt-usb/config.toml";

/// How long an instance keeps what its flavor gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HoldPolicy {
    /// From prepare to release.
    #[default]
    Running,
    /// Until the instance is gone: a stop or a reboot keeps it.
    Instance,
}

/// What happens to a guest with a passed-through USB device that migrates to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationPolicy {
    /// It is refused.
    #[default]
    Refuse,
    /// An equivalent device of this host is claimed for it.
    Reclaim,
}

/// Where the record of each hook call goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Log {
    /// The systemd journal.
    #[default]
    Journal,
    /// A file, one JSON object a line.
    File(PathBuf),
    /// Nowhere.
    Off,
}

/// The configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Holds the inventory and its locks; made by install or agent, never by the hook.
    pub state_dir: PathBuf,
    /// Where sysfs is mounted.
    pub sysfs_root: PathBuf,
    /// Where procfs is mounted: the boot id and the time since boot are read there.
    pub procfs_root: PathBuf,
    /// Which devices are offered, and to whom.
    pub whitelist: Whitelist,
    /// How long a flavor's devices are held.
    pub hold: HoldPolicy,
    /// What an incoming migration gets.
    pub migration: MigrationPolicy,
    /// Where the hook's records go.
    pub log: Log,
    /// Audit events older than this many days are pruned by `discover`; 0 keeps them for ever.
    pub events_keep_days: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/virt-usb".into(),
            sysfs_root: "/sys".into(),
            procfs_root: "/proc".into(),
            whitelist: Whitelist::default(),
            hold: HoldPolicy::default(),
            migration: MigrationPolicy::default(),
            log: Log::default(),
            events_keep_days: 365,
        }
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was named is not there or not readable.
    #[error("cannot read the configuration {path}: {why}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        why: io::Error,
    },
    /// The file does not say what a configuration may say.
    #[error("the configuration {path} is wrong: {what}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Which key, what it holds, what it should hold.
        what: String,
    },
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] when none is named; a default file that is not there means the defaults.
    ///
    /// # Errors
    /// When the file is named and missing, cannot be read, or is wrong anywhere.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match read_bounded(file) {
            Ok(text) => Self::parse(&text).map_err(|what| ConfigError::Wrong { path: file.into(), what }),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.is_none() => Ok(Self::default()),
            Err(why) => Err(ConfigError::Read { path: file.into(), why }),
        }
    }

    /// Reads the text of a configuration file.
    ///
    /// # Errors
    /// One line that names the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| one_line(&e, text))?;
        for key in table.keys() {
            known(key)?;
        }
        let both = table.contains_key("usb_white_list") && table.contains_key("usb_passthrough_whitelist");
        if both {
            return Err(
                "usb_white_list and usb_passthrough_whitelist are two names of one key: keep one of them"
                    .into(),
            );
        }
        let raw: Raw = toml::from_str(text).map_err(|e: toml::de::Error| one_line(&e, text))?;
        let json = |key: &str| {
            table.get(key).map(serde_json::to_value).transpose().map_err(|e| format!("{key}: {e}"))
        };
        let (switch, listed, other) =
            (json("usb_white_list_switch")?, json("usb_passthrough_whitelist")?, json("usb_white_list")?);
        let named = if other.is_some() { "usb_white_list" } else { "usb_passthrough_whitelist" };
        let whitelist = Whitelist::parse(switch.as_ref(), listed.or(other).as_ref())
            .map_err(|e| e.to_string().replacen("usb_passthrough_whitelist", named, 1))?;
        let default = Self::default();
        Ok(Self {
            state_dir: absolute("state_dir", raw.state_dir, default.state_dir)?,
            sysfs_root: absolute("sysfs_root", raw.sysfs_root, default.sysfs_root)?,
            procfs_root: absolute("procfs_root", raw.procfs_root, default.procfs_root)?,
            whitelist,
            hold: raw.hold,
            migration: raw.migration,
            log: log(raw.log.as_deref())?,
            events_keep_days: raw.events_keep_days.unwrap_or(default.events_keep_days),
        })
    }

    /// The inventory's file.
    pub fn database(&self) -> PathBuf {
        self.state_dir.join(virt_usb_store::FILE_NAME)
    }
}

/// The file's text. Whatever stands in its place: nothing is waited for, and nothing without end is read.
fn read_bounded(file: &Path) -> io::Result<String> {
    let careful = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(file)?;
    if !careful.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut text = String::new();
    careful.take(MAX_CONFIG + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB"));
    }
    Ok(text)
}

/// What serde reads; the whitelist's keys are read by the model.
#[derive(Deserialize)]
struct Raw {
    state_dir: Option<PathBuf>,
    sysfs_root: Option<PathBuf>,
    procfs_root: Option<PathBuf>,
    #[serde(default)]
    hold: HoldPolicy,
    #[serde(default)]
    migration: MigrationPolicy,
    log: Option<String>,
    events_keep_days: Option<u32>,
}

const KEYS: &[&str] = &[
    "state_dir",
    "sysfs_root",
    "procfs_root",
    "usb_white_list_switch",
    "usb_passthrough_whitelist",
    "usb_white_list",
    "hold",
    "migration",
    "log",
    "events_keep_days",
];

fn known(key: &str) -> Result<(), String> {
    if KEYS.contains(&key) {
        return Ok(());
    }
    let near = KEYS.iter().map(|k| (strsim::damerau_levenshtein(key, k), *k)).min();
    Err(match near {
        Some((distance, k)) if distance <= 1 + k.len() / 3 => {
            format!("unknown key {key:?}: did you mean {k:?}?")
        }
        _ => format!("unknown key {key:?}: the keys are {}", KEYS.join(", ")),
    })
}

fn absolute(key: &str, value: Option<PathBuf>, default: PathBuf) -> Result<PathBuf, String> {
    match value {
        None => Ok(default),
        Some(path) if path.is_absolute() => Ok(path),
        Some(path) => Err(format!("{key}: {} is not an absolute path", path.display())),
    }
}

fn log(value: Option<&str>) -> Result<Log, String> {
    match value {
        None | Some("journal") => Ok(Log::Journal),
        Some("off") => Ok(Log::Off),
        Some(path) if path.starts_with('/') => Ok(Log::File(path.into())),
        Some(other) => Err(format!("log: found {other:?}, wanted \"journal\", \"off\" or an absolute path")),
    }
}

fn one_line(e: &toml::de::Error, text: &str) -> String {
    let line = e.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
    let message = e.message().split_whitespace().collect::<Vec<_>>().join(" ");
    line.map_or_else(|| message.clone(), |line| format!("line {line}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_documented_keys() {
        let config = Config::parse(
            r#"
            state_dir = "/srv/usb"
            usb_white_list_switch = "on"
            usb_passthrough_whitelist = [{ product = "0x0003", vendor = "0x136b", bus = "2", device = "2" }]
            hold = "instance"
            migration = "reclaim"
            log = "/var/log/virt-usb.log"
            "#,
        )
        .unwrap();
        assert!(config.whitelist.on);
        assert_eq!(config.whitelist.rules.len(), 1);
        assert_eq!((config.hold, config.migration), (HoldPolicy::Instance, MigrationPolicy::Reclaim));
        let json = Config::parse(
            r#"usb_white_list = '[{"product":"0x0003","vendor":"0x136b","bus":"2","device":"2"}]'"#,
        )
        .unwrap();
        assert_eq!(json.whitelist.rules, config.whitelist.rules);
    }

    #[test]
    fn what_is_no_file_or_has_no_end_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
        assert!(Config::load(Some(&file)).unwrap_err().to_string().contains("no regular file"));
        assert!(
            Config::load(Some(Path::new("/dev/zero"))).unwrap_err().to_string().contains("no regular file")
        );
        std::fs::remove_file(&file).unwrap();
        std::fs::File::create(&file).unwrap().set_len(MAX_CONFIG + 1).unwrap();
        assert!(Config::load(Some(&file)).unwrap_err().to_string().contains("larger than 1 MiB"));
    }

    #[test]
    fn errors_name_the_key() {
        let error = |text: &str| Config::parse(text).unwrap_err();
        assert_eq!(
            error("usb_whitelist_switch = 'on'"),
            "unknown key \"usb_whitelist_switch\": did you mean \"usb_white_list_switch\"?"
        );
        assert!(error("colour = 1").starts_with("unknown key \"colour\": the keys are state_dir,"));
        assert!(
            error("usb_white_list = []\nusb_passthrough_whitelist = []").contains("two names of one key")
        );
        assert!(error("state_dir = 'x'").contains("state_dir: x is not an absolute path"));
        assert!(error("\n\nhold = 'ever'").contains("line 3"), "{}", error("\n\nhold = 'ever'"));
        assert!(error("usb_white_list = [{vendor='zz'}]").starts_with("usb_white_list[0].vendor"));
        assert!(error("log = 'syslog'").starts_with("log: found"));
        assert!(error("hold = ").starts_with("line 1"));
    }
}
