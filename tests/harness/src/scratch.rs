//! An inventory and a configuration that are thrown away: nothing of the host is touched.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use toml::{Table, Value};

/// The scratch folder could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// A folder or a file of it.
    #[error("cannot make a scratch folder")]
    Make(#[from] io::Error),
    /// The further settings are no TOML.
    #[error("the scratch settings are no TOML")]
    Settings(#[from] toml::de::Error),
    /// The configuration cannot be written down.
    #[error("the scratch settings cannot be written")]
    Write(#[from] toml::ser::Error),
}

/// A folder with `config.toml`, `state/` and, for simulated devices, `sys/`; gone when dropped.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    simulated: bool,
}

impl Scratch {
    /// Makes one. `settings` is TOML for the configuration; `state_dir` is always the scratch
    /// folder's own.
    ///
    /// With `simulated` the configuration's `sysfs_root` is the scratch folder's, to be filled by
    /// `discover`.
    ///
    /// # Errors
    /// When it cannot be made, or `settings` is no TOML.
    pub fn new(settings: &str, simulated: bool) -> Result<Self, ScratchError> {
        let dir = tempfile::Builder::new().prefix("hook-harness-").tempdir()?;
        let scratch = Self { dir, simulated };
        let mut table: Table = settings.parse()?;
        let text = |path: PathBuf| Value::String(path.display().to_string());
        let state = scratch.dir.path().join("state");
        fs::DirBuilder::new().mode(0o750).create(&state)?;
        table.insert("state_dir".to_owned(), text(state));
        table.entry("log").or_insert(Value::String("off".to_owned()));
        if let Some(sysfs) = scratch.sysfs() {
            fs::create_dir(&sysfs)?;
            table.insert("sysfs_root".to_owned(), text(sysfs));
        }
        fs::write(scratch.config(), toml::to_string(&table)?)?;
        Ok(scratch)
    }

    /// The configuration's file.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }

    /// The simulated sysfs, when there is one.
    pub fn sysfs(&self) -> Option<PathBuf> {
        self.simulated.then(|| self.dir.path().join("sys"))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_stays_and_the_state_is_its_own() {
        let scratch = Scratch::new(
            "hold = 'instance'\nstate_dir = '/var/lib/virt-usb'\nlog = 'journal'",
            true,
        )
        .unwrap();
        let table: Table = fs::read_to_string(scratch.config()).unwrap().parse().unwrap();
        assert_eq!(table["hold"].as_str(), Some("instance"));
        assert_eq!(table["log"].as_str(), Some("journal"));
        assert_eq!(table["state_dir"].as_str(), scratch.path().join("state").to_str());
        assert_eq!(table["sysfs_root"].as_str(), scratch.sysfs().unwrap().to_str());
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
    }
}
