//! Finds and loads the filter, for programs that use it.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use virt_usb_filter_host::{Filter, Limits, Options};

/// Name of the filter's file.
const FILE_NAME: &str = "virt-usb-filter.wasm";
/// Folder into which packages install the filter.
const INSTALLED: &str = "/usr/lib/virt-usb";

/// Options that name the filter's file.
#[derive(Debug, Args)]
pub struct FilterFile {
    /// Filter: a WebAssembly component of the world virt-usb:scheduler/filter [default: the one
    /// beside this program or in /usr/lib/virt-usb]
    #[arg(long, value_name = "FILE", env = "VIRT_USB_FILTER", hide_env_values = true)]
    pub component: Option<PathBuf>,
    /// Accept only a filter with this SHA-256
    #[arg(long, value_name = "HEX", value_parser = digest)]
    pub sha256: Option<[u8; 32]>,
}

impl FilterFile {
    /// Loads the filter, bounded by `limits`.
    ///
    /// # Errors
    /// If no filter is found, or the file is not a filter.
    pub fn load(&self, limits: Limits) -> anyhow::Result<Filter> {
        let path = match &self.component {
            Some(path) => path.clone(),
            None => find()?,
        };
        Ok(Filter::load(path, &Options { limits, sha256: self.sha256 })?)
    }
}

fn find() -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe()
        .context("cannot find this program's own path")?
        .with_file_name(FILE_NAME);
    let installed = Path::new(INSTALLED).join(FILE_NAME);
    let places = [beside, installed];
    let found = places.iter().find(|path| path.exists());
    found.cloned().with_context(|| {
        let [beside, installed] = places.each_ref().map(|path| path.display());
        format!(
            "there is no filter at {beside} or {installed}: build one with 'make filter', or name \
            one with --component"
        )
    })
}

fn digest(text: &str) -> Result<[u8; 32], String> {
    let mut digest = [0; 32];
    let digits = text.as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err("wanted 64 hexadecimal digits".to_owned());
    }
    for (to, pair) in digest.iter_mut().zip(digits.chunks(2)) {
        *to = byte(pair).ok_or("wanted hexadecimal digits")?;
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::digest;

    #[test]
    fn a_digest_is_64_digits() {
        assert_eq!(digest(&"0f".repeat(32)), Ok([15; 32]));
        for wrong in ["", "0f", &"zz".repeat(32), &"é".repeat(32), &"+f".repeat(32)] {
            assert!(digest(wrong).is_err(), "{wrong}");
        }
    }
}
