//! The configuration: TOML at [`DEFAULT_PATH`], read by every program of virt-usb.
//!
//! An unknown key is an error that names the nearest known one: a misspelt `usb_white_list_switch`
//! must not silently leave the whitelist off. `install/config.toml` explains every key; a test
//! parses it with this module.

mod fleet;
pub mod host_env;
mod keystone;
pub mod panics;
mod parse;
pub mod rules;
pub mod sysfs;
mod values;

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virt_usb_model::{Aliases, Whitelist};
use virt_usb_store::flaps::Limits;

use crate::parse::{
    KEYS, Raw, absolute, api, flapping, known, libvirt_uri, log, metrics, one_line, require_agent,
    seconds, tls, top_level,
};

pub use fleet::{Fleet, User};
pub use keystone::Keystone;
pub use values::{
    Api, AttachFailurePolicy, HoldPolicy, Log, Metrics, MigrationPolicy, ReplugPolicy,
    RequireAgent, Tls,
};

/// Maximum size of a configuration in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Path of the configuration without `--config`.
pub const DEFAULT_PATH: &str = "/etc/virt-usb/config.toml";

/// The whitelist keys that a file contains. If a file contained them before and contains none now,
/// it may be truncated.
#[derive(Debug, Clone, Copy, Default)]
pub struct WhitelistKeys {
    /// Whether the file contains `usb_white_list_switch`.
    pub switch: bool,
    /// Whether the file contains `usb_passthrough_whitelist` or `usb_white_list`.
    pub rules: bool,
}

/// All values are equal, because the keys are not settings: a configuration that contains the
/// defaults equals one that omits them.
impl PartialEq for WhitelistKeys {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for WhitelistKeys {}

/// The readable parts of an invalid configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Readable {
    /// Directory of the inventory and its hints; `None` if it cannot be determined.
    pub state_dir: Option<PathBuf>,
    /// Destination of the hook's records; `None` if it cannot be determined.
    pub log: Option<Log>,
}

/// A valid configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Directory of the inventory and its locks. The installation or the agent creates it, never
    /// the hook.
    pub state_dir: PathBuf,
    /// Mount point of sysfs.
    pub sysfs_root: PathBuf,
    /// Mount point of procfs, which contains the boot id and the uptime.
    pub procfs_root: PathBuf,
    /// Rules that determine which devices are offered, and to which projects.
    pub whitelist: Whitelist,
    /// The whitelist keys that the file contains.
    pub whitelist_keys: WhitelistKeys,
    /// Devices that show several vendor and product ids in turn.
    pub aliases: Aliases,
    /// Limits after which a device counts as flapping.
    pub flapping: Limits,
    /// Policy for how long the devices of a flavor are held.
    pub hold: HoldPolicy,
    /// Policy for incoming migrations.
    pub migration: MigrationPolicy,
    /// Destination of the hook's records.
    pub log: Log,
    /// Days after which `discover` removes audit events; 0 keeps them forever.
    pub events_keep_days: u32,
    /// Days until the inventory forgets an unplugged device that no instance has held; 0 disables
    /// it.
    pub forget_after_days: u32,
    /// libvirt connection URI of the agent and the command line.
    pub libvirt_uri: String,
    /// Interval at which the agent scans all devices and guests, in addition to events.
    pub scan_interval: Duration,
    /// Time after which the agent releases the flavor's devices of an instance that is absent from
    /// libvirt.
    pub absent_grace: Duration,
    /// Time after which the assignments of an undefined domain end.
    pub undefined_grace: Duration,
    /// Delay before the agent reads a guest again that it could not read.
    pub recheck_delay: Duration,
    /// Time without an answer of libvirt about a guest after which the guest has a problem.
    pub libvirt_timeout: Duration,
    /// Time after which an unconfirmed claim of a restore or migration ends.
    pub pending_grace: Duration,
    /// Policy for the claim of an unplugged device.
    pub replug: ReplugPolicy,
    /// Policy for a guest that cannot get its device.
    pub on_attach_failure: AttachFailurePolicy,
    /// Policy for starts that depend on the agent.
    pub require_agent: RequireAgent,
    /// Address of the agent's metrics.
    pub metrics: Metrics,
    /// Address of the agent's API.
    pub api: Api,
    /// TLS certificate of the API; without one, the API listens only on loopback addresses.
    pub api_tls: Option<Tls>,
    /// Fleet in which the inventory is shared; `None` if it is not shared.
    pub fleet: Option<Fleet>,
    /// Keystone whose tokens the API accepts in addition to its own; `None` for its own tokens
    /// only.
    pub keystone: Option<Keystone>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/virt-usb".into(),
            sysfs_root: "/sys".into(),
            procfs_root: "/proc".into(),
            whitelist: Whitelist::default(),
            whitelist_keys: WhitelistKeys::default(),
            aliases: Aliases::default(),
            flapping: Limits::default(),
            hold: HoldPolicy::default(),
            migration: MigrationPolicy::default(),
            log: Log::default(),
            events_keep_days: 365,
            forget_after_days: 90,
            libvirt_uri: "qemu:///system".into(),
            scan_interval: Duration::from_secs(60),
            absent_grace: Duration::from_secs(10),
            undefined_grace: Duration::from_secs(60),
            recheck_delay: Duration::from_secs(10),
            libvirt_timeout: Duration::from_secs(30),
            pending_grace: Duration::from_secs(120),
            replug: ReplugPolicy::default(),
            on_attach_failure: AttachFailurePolicy::default(),
            require_agent: RequireAgent::default(),
            metrics: Metrics::default(),
            api: Api::default(),
            api_tls: None,
            fleet: None,
            keystone: None,
        }
    }
}

/// Error of a configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file does not exist or cannot be read.
    #[error("cannot read the configuration {path}: {why}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        why: io::Error,
    },
    /// The content of the file is invalid.
    #[error("the configuration {path} is wrong: {what}")]
    Wrong {
        /// Path of the file.
        path: PathBuf,
        /// The key, the value that was found, and the wanted value.
        what: String,
        /// Readable parts of the file.
        readable: Readable,
    },
}

impl ConfigError {
    /// The readable parts of the file.
    pub fn readable(&self) -> Readable {
        match self {
            Self::Wrong { readable, .. } => readable.clone(),
            Self::Read { .. } => Readable::default(),
        }
    }
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] if there is none. If the default file does not exist, the
    /// defaults apply.
    ///
    /// # Errors
    /// If `path` does not exist, or if the file cannot be read or is invalid.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match read_bounded(file) {
            Ok(bytes) => Self::parse_file(&bytes).map_err(|what| ConfigError::Wrong {
                path: file.into(),
                what,
                readable: Readable::of(&String::from_utf8_lossy(&bytes)),
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.is_none() => Ok(Self::default()),
            Err(why) => Err(ConfigError::Read { path: file.into(), why }),
        }
    }

    /// Parses a file. An empty file is refused: the defaults offer every device to all projects,
    /// and a full disk or a crashed editor leaves an empty file.
    fn parse_file(bytes: &[u8]) -> Result<Self, String> {
        let text = str::from_utf8(bytes).map_err(|e| {
            let line = 1 + bytes.iter().take(e.valid_up_to()).filter(|b| **b == b'\n').count();
            format!("line {line}: it is not UTF-8")
        })?;
        if text.trim_start_matches('\u{feff}').trim().is_empty() {
            return Err(
                "it is empty, as after a full disk: restore its keys; to use the defaults, \
                which offer every device, write a comment (#) into it"
                    .into(),
            );
        }
        Self::parse(text)
    }

    /// Parses the text of a configuration file.
    ///
    /// # Errors
    /// A message of one line that names the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| one_line(&e, text))?;
        for key in table.keys() {
            known(key, KEYS)?;
        }
        for (name, keys) in [("fleet", fleet::KEYS), ("keystone", keystone::KEYS)] {
            for key in table
                .get(name)
                .and_then(toml::Value::as_table)
                .into_iter()
                .flat_map(toml::Table::keys)
            {
                known(key, keys).map_err(|e| format!("{name}: {e}"))?;
            }
        }
        let both =
            table.contains_key("usb_white_list") && table.contains_key("usb_passthrough_whitelist");
        if both {
            return Err(
                "usb_white_list and usb_passthrough_whitelist are two names of one key: keep one \
                    of them"
                    .into(),
            );
        }
        let raw: Raw = toml::from_str(text).map_err(|e: toml::de::Error| one_line(&e, text))?;
        let json = |key: &str| {
            table.get(key).map(serde_json::to_value).transpose().map_err(|e| format!("{key}: {e}"))
        };
        let (switch, listed, other) = (
            json("usb_white_list_switch")?,
            json("usb_passthrough_whitelist")?,
            json("usb_white_list")?,
        );
        let key = if other.is_some() { "usb_white_list" } else { "usb_passthrough_whitelist" };
        let whitelist = Whitelist::parse(switch.as_ref(), listed.or(other).as_ref())
            .map_err(|e| e.to_string().replacen("usb_passthrough_whitelist", key, 1))?;
        let default = Self::default();
        let flapping = flapping(&raw, default.flapping)?;
        let api_tls = tls(raw.api_certificate, raw.api_key)?;
        Ok(Self {
            state_dir: absolute("state_dir", raw.state_dir, default.state_dir)?,
            sysfs_root: absolute("sysfs_root", raw.sysfs_root, default.sysfs_root)?,
            procfs_root: absolute("procfs_root", raw.procfs_root, default.procfs_root)?,
            whitelist,
            whitelist_keys: WhitelistKeys {
                switch: table.contains_key("usb_white_list_switch"),
                rules: table.contains_key(key),
            },
            aliases: Aliases::parse(&raw.usb_aliases)
                .map_err(|e| e.at("usb_aliases").to_string())?,
            flapping,
            hold: raw.hold,
            migration: raw.migration,
            log: log(raw.log.as_deref())?,
            events_keep_days: raw.events_keep_days.unwrap_or(default.events_keep_days),
            forget_after_days: raw.forget_after_days.unwrap_or(default.forget_after_days),
            libvirt_uri: libvirt_uri(raw.libvirt_uri, default.libvirt_uri)?,
            scan_interval: seconds("scan_interval", raw.scan_interval, default.scan_interval)?,
            absent_grace: seconds("absent_grace", raw.absent_grace, default.absent_grace)?,
            undefined_grace: seconds(
                "undefined_grace",
                raw.undefined_grace,
                default.undefined_grace,
            )?,
            recheck_delay: seconds("recheck_delay", raw.recheck_delay, default.recheck_delay)?,
            libvirt_timeout: seconds(
                "libvirt_timeout",
                raw.libvirt_timeout,
                default.libvirt_timeout,
            )?,
            pending_grace: seconds("pending_grace", raw.pending_grace, default.pending_grace)?,
            replug: raw.replug,
            on_attach_failure: raw.on_attach_failure,
            require_agent: require_agent(table.get("require_agent"))?,
            metrics: metrics(raw.metrics.as_deref())?,
            api: api(raw.api.as_deref(), api_tls.is_some())?,
            api_tls,
            fleet: raw
                .fleet
                .map(fleet::Raw::check)
                .transpose()
                .map_err(|e| format!("fleet.{e}"))?,
            keystone: raw
                .keystone
                .map(keystone::Raw::check)
                .transpose()
                .map_err(|e| format!("keystone.{e}"))?,
        })
    }

    /// Path of the inventory's database.
    pub fn database(&self) -> PathBuf {
        self.state_dir.join(virt_usb_store::FILE_NAME)
    }
}

impl Readable {
    /// Reads each key on its own, even if others are invalid. A key with two different values is
    /// left out.
    fn of(text: &str) -> Self {
        let table = text.parse().unwrap_or_else(|_| top_level(text));
        let word = |key: &str| table.get(key).and_then(toml::Value::as_str);
        Self {
            state_dir: word("state_dir").map(PathBuf::from).filter(|path| path.is_absolute()),
            log: word("log").and_then(|text| log(Some(text)).ok()),
        }
    }
}

/// Reads a regular file of at most 1 MiB, such as the configuration or a certificate. A pipe or a
/// device is an error, and does not block the call.
///
/// # Errors
/// If the file cannot be read, is larger, or is not a regular file.
pub fn read_bounded(file: &Path) -> io::Result<Vec<u8>> {
    let careful =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(file)?;
    if !careful.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    careful.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn a_file_that_was_emptied_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        for emptied in ["", "\n", " \r\n\t\n", "\u{feff}\n"] {
            std::fs::write(&file, emptied).unwrap();
            let error = Config::load(Some(&file)).unwrap_err();
            assert!(error.to_string().contains("it is empty, as after a full disk"), "{error}");
            assert_eq!(error.readable(), Readable::default());
        }
        std::fs::write(&file, "# the defaults\n").unwrap();
        assert_eq!(Config::load(Some(&file)).unwrap(), Config::default());
    }

    #[test]
    fn state_dir_is_read_from_an_invalid_file() {
        let state_dir = |text: &[u8]| {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("config.toml");
            std::fs::write(&file, text).unwrap();
            let error = Config::load(Some(&file)).unwrap_err();
            error.readable().state_dir.map(|path| path.to_str().unwrap().to_owned())
        };
        for wrong in [
            "colour = 1",
            "hold = 5",
            "scan_interval = 'often'",
            "usb_white_list = [{vendor='zz'}]",
            "hold = ",
            "usb_white_list = [",
            "usb_white_list = [\n[\n['a', 'b'],\n",
            "= = =",
            "[fleet\nstate_dir = '/fleet'",
            "[fleet]\nstate_dir = '/fleet'",
            "state_dir = '/s' # twice",
        ] {
            for text in [
                format!("state_dir = '/s'\n{wrong}"),
                format!(" \"state_dir\"=\"/s\"\t# it\r\n{wrong}\n"),
            ] {
                assert_eq!(state_dir(text.as_bytes()).as_deref(), Some("/s"), "{text}");
            }
            if !wrong.starts_with("[f") && !wrong.starts_with("state") {
                let text = format!("{wrong}\nstate_dir = '/s'\n");
                assert_eq!(state_dir(text.as_bytes()).as_deref(), Some("/s"), "{text}");
            }
        }
        assert_eq!(state_dir(b"state_dir = '/s'\n# \xff\n").as_deref(), Some("/s"));
        for unknown in [
            "state_dir = 5",
            "state_dir = 's'",
            "state_dir = '/s",
            "state_dir = ",
            "state_dir = '/s'\nstate_dir = '/t'",
            "hold = 5",
            "[fleet]\nstate_dir = '/s'",
        ] {
            assert_eq!(state_dir(unknown.as_bytes()), None, "{unknown}");
        }
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
            libvirt_uri = "qemu:///session"
            scan_interval = 5
            absent_grace = 2
            undefined_grace = 3
            recheck_delay = 4
            libvirt_timeout = 6
            pending_grace = 5
            replug = "release"
            on_attach_failure = "stop"
            require_agent = true
            metrics = "127.0.0.1:9177"
            api = "[::1]:8791"
            usb_aliases = [["1a6e:089a", "18d1:9302"]]
            flap_limit = 0
            flap_window = 10
            flap_pause = 20
            flap_quarantine = 7
            "#,
        )
        .unwrap();
        assert_eq!(config.flapping, Limits { limit: 0, window: 10, pause: 20, quarantine: 7 });
        assert_ne!(config.aliases, Aliases::default());
        assert_eq!(
            (config.replug, config.on_attach_failure),
            (ReplugPolicy::Release, AttachFailurePolicy::Stop)
        );
        assert_eq!(
            (config.require_agent, config.scan_interval),
            (RequireAgent::Always, Duration::from_secs(5))
        );
        let waits = [
            config.absent_grace,
            config.undefined_grace,
            config.recheck_delay,
            config.pending_grace,
        ];
        assert_eq!(waits, [2, 3, 4, 5].map(Duration::from_secs));
        assert_eq!(config.libvirt_timeout, Duration::from_secs(6));
        assert_eq!(config.metrics, Metrics::Tcp("127.0.0.1:9177".parse().unwrap()));
        assert_eq!(config.api, Api::On("[::1]:8791".parse().unwrap()));
        assert!(config.whitelist.on);
        assert_eq!(config.whitelist.rules.len(), 1);
        assert_eq!(
            (config.hold, config.migration),
            (HoldPolicy::Instance, MigrationPolicy::Reclaim)
        );
        let json = Config::parse(
            r#"usb_white_list = '[{"product":"0x0003","vendor":"0x136b","bus":"2","device":"2"}]'"#,
        )
        .unwrap();
        assert_eq!(json.whitelist.rules, config.whitelist.rules);
    }

    #[test]
    fn only_regular_files_of_limited_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
        assert!(Config::load(Some(&file)).unwrap_err().to_string().contains("not a regular file"));
        assert!(
            Config::load(Some(Path::new("/dev/zero")))
                .unwrap_err()
                .to_string()
                .contains("not a regular file")
        );
        std::fs::remove_file(&file).unwrap();
        std::fs::File::create(&file).unwrap().set_len(MAX_CONFIG_BYTES + 1).unwrap();
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
            error("usb_white_list = []\nusb_passthrough_whitelist = []")
                .contains("two names of one key")
        );
        assert!(error("state_dir = 'x'").contains("state_dir: x is not an absolute path"));
        assert!(error("\n\nhold = 'ever'").contains("line 3"), "{}", error("\n\nhold = 'ever'"));
        assert!(error("usb_white_list = [{vendor='zz'}]").starts_with("usb_white_list[0].vendor"));
        assert!(error("log = 'syslog'").starts_with("log: found"));
        assert!(
            error("usb_aliases = [['1:1']]")
                .starts_with("usb_aliases: found a list of fewer than two")
        );
        assert!(error("flap_pause = 0").contains("flap_pause: found 0, wanted 1 to 86400"));
        let waits =
            ["scan_interval", "absent_grace", "undefined_grace", "recheck_delay", "pending_grace"];
        for key in waits.into_iter().chain(["libvirt_timeout"]) {
            assert_eq!(
                error(&format!("{key} = 0")),
                format!("{key}: found 0, wanted 1 to 86400 seconds")
            );
        }
        assert!(error("require_agent = 'yes'").contains("wanted \"auto\", true or false"));
        assert!(error("metrics = '0.0.0.0:9177'").contains("wanted \"off\", a loopback address"));
        assert!(
            error("api = '0.0.0.0:80'")
                .contains("without TLS, tokens could be read on the network")
        );
        assert!(error("api = 'here'").contains("wanted \"off\" or an address"));
        assert!(error("api_key = '/k'").contains("set api_certificate as well"));
        assert!(error("api_certificate = '/c'").contains("set api_key as well"));
        assert!(
            error("api_certificate = 'c'\napi_key = '/k'")
                .contains("api_certificate: c is not an absolute path")
        );
        let open =
            Config::parse("api = '0.0.0.0:80'\napi_certificate = '/c'\napi_key = '/k'").unwrap();
        assert_eq!(open.api, Api::On("0.0.0.0:80".parse().unwrap()));
        assert_eq!(open.api_tls, Some(Tls { certificate: "/c".into(), key: "/k".into() }));
        assert!(error("libvirt_uri = 'qemu'").starts_with("libvirt_uri: found \"qemu\""));
        assert!(error("hold = ").starts_with("line 1"));
    }

    #[test]
    fn a_keystone_is_named_by_its_address() {
        let right = "[keystone]\nurl = 'https://id.example:5000/v3/'\npassword_file = '/p'\n";
        let keystone = Config::parse(right).unwrap().keystone.unwrap();
        assert_eq!(keystone.url, "https://id.example:5000/v3");
        assert_eq!(
            [&keystone.user, &keystone.user_domain, &keystone.project, &keystone.project_domain],
            ["virt-usb", "Default", "service", "Default"]
        );
        assert_eq!((keystone.cache.as_secs(), keystone.roles.len(), keystone.ca), (60, 3, None));
        let with = |more: &str| Config::parse(&format!("{right}{more}"));
        let whole = with(
            "ca = '/ca'\nuser = 'usb'\nuser_domain = 'd'\nproject = 's'\nproject_domain = \
                'e'\ncache = 0\nroles = { operator = 'admin' }",
        );
        let keystone = whole.unwrap().keystone.unwrap();
        assert_eq!((keystone.cache.as_secs(), keystone.roles["operator"].as_str()), (0, "admin"));
        for (more, why) in [
            ("user = ''", "keystone.user: found an empty name"),
            ("cache = 3601", "keystone.cache: found 3601, wanted 0 to 3600 seconds"),
            ("roles = { operator = 'root' }", "keystone.roles.operator: found \"root\""),
            ("roles = {}", "keystone.roles: found none"),
            ("ca = 'ca'", "keystone.ca: ca is not an absolute path"),
            ("pasword = 'x'", "keystone: unknown key \"pasword\""),
        ] {
            let error = with(more).unwrap_err();
            assert!(error.starts_with(why), "{more}: {error}");
        }
        for url in [
            "",
            "id.example/v3",
            "https://id.example",
            "https:///v3",
            "https://u:p@id/v3",
            "http://id/v3?x",
            "ftp://id/v3",
        ] {
            let error = Config::parse(&format!("[keystone]\nurl = '{url}'\npassword_file = '/p'"))
                .unwrap_err();
            assert!(error.starts_with("keystone.url: found "), "{url}: {error}");
        }
        let error = Config::parse("[keystone]\nurl = 'http://id/v3'").unwrap_err();
        assert!(error.starts_with("keystone.password_file: found none"), "{error}");
    }

    #[test]
    fn a_fleet_is_named_by_its_endpoints() {
        let fleet =
            Config::parse("[fleet]\nendpoints = ['http://127.0.0.1:2379']").unwrap().fleet.unwrap();
        assert_eq!((fleet.prefix.as_str(), fleet.lease.as_secs()), ("/virt-usb/", 30));
        assert_eq!((fleet.user, fleet.identity), (None, None));
        let whole = r#"
            [fleet]
            endpoints = ["https://a:2379", "https://[::1]:2379"]
            prefix = "/cloud/usb/"
            ca = "/ca"
            certificate = "/c"
            key = "/k"
            user = "host1"
            password_file = "/p"
            lease = 10
            heartbeat = 20
            machine_id = "/m"
        "#;
        let fleet = Config::parse(whole).unwrap().fleet.unwrap();
        assert_eq!(
            (fleet.endpoints.len(), fleet.prefix.as_str(), fleet.lease.as_secs()),
            (2, "/cloud/usb/", 10)
        );
        assert_eq!(fleet.identity, Some(Tls { certificate: "/c".into(), key: "/k".into() }));
        assert_eq!(fleet.user, Some(User { name: "host1".into(), password_file: "/p".into() }));
        let error = |text: &str| Config::parse(&format!("[fleet]\n{text}")).unwrap_err();
        assert_eq!(
            error("endpoint = ['http://a:1']"),
            "fleet: unknown key \"endpoint\": did you mean \"endpoints\"?"
        );
        assert!(error("lease = 10").starts_with("fleet.endpoints: found none"));
        let with = |text: &str| error(&format!("endpoints = ['http://a:1']\n{text}"));
        assert!(error("endpoints = ['a:1']").contains("found \"a:1\", wanted an address"));
        assert!(error("endpoints = ['http://u:p@a:1']").contains("wanted an address"));
        assert!(
            error("endpoints = ['http://a:1', 'https://b:1']")
                .contains("some are https and some http")
        );
        assert!(with("prefix = 'x'").contains("fleet.prefix: found \"x\""));
        assert!(with("ca = '/ca'").contains("are for endpoints that begin with https"));
        assert!(with("user = 'x'").contains("its password is missing"));
        assert!(with("password_file = '/x'").contains("its user is missing"));
        assert!(with("lease = 1").contains("fleet.lease: found 1, wanted 5 to 86400 seconds"));
        assert!(with("machine_id = 'x'").contains("fleet.machine_id: x is not an absolute path"));
    }
}
