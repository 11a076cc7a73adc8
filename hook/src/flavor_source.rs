//! The requests of a domain: those of its flavor, which has several possible sources, and its
//! assignments.

use std::path::Path;

use virt_usb_config::HoldPolicy;
use virt_usb_domxml::FlavorSource;
use virt_usb_model::{DeviceId, DeviceRequest, Flavor, Selector};
use virt_usb_store::claim::ClaimRequest;
use virt_usb_store::hints::{Hint, HintSubject, look};
use virt_usb_store::{Assignment, Source, Store};

use crate::job::HookError;

/// Flavor source, as far as the XML alone shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlavorRequest {
    /// The domain requests nothing.
    Nothing,
    /// A flavor that is written in the XML.
    Flavor(Flavor),
    /// Stored flavors with these names, one for the devices and one for the redirections. They must
    /// exist.
    Stored {
        /// Source of `usb_devices`.
        devices: Part,
        /// Source of `usb_redirection_devices`.
        redirection: Part,
    },
    /// The stored flavor with this name, if it exists. If `sure` is true, it exists or existed a
    /// moment ago.
    MaybeStored {
        /// Name of the flavor.
        name: String,
        /// Whether there is one.
        sure: bool,
    },
}

/// Source of one of a flavor's two lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The list is written in the XML.
    Given(Flavor),
    /// The list is that of the stored flavor with this name.
    Named(String),
}

impl FlavorRequest {
    /// Reads the flavor from the XML.
    ///
    /// # Errors
    /// If the flavor's text is invalid. The domain then requests something unknown.
    pub fn read(source: &FlavorSource, state_dir: &Path) -> Result<Self, HookError> {
        let wrong = |place: &str, e: virt_usb_model::ParseError| {
            HookError::of(true, format!("the flavor in {place} is wrong: {e}"))
        };
        Ok(match source {
            FlavorSource::None => Self::Nothing,
            FlavorSource::Named(name) => match look(state_dir, HintSubject::Flavor(name)) {
                Hint::No => Self::Nothing,
                hint => Self::MaybeStored { name: name.clone(), sure: hint == Hint::Yes },
            },
            FlavorSource::Metadata(text) => match name(Some(text)) {
                Some(name) => Self::Stored {
                    devices: Part::Named(name.clone()),
                    redirection: Part::Named(name),
                },
                None => {
                    Self::of(Flavor::parse(text).map_err(|e| wrong("the domain's <metadata>", e))?)
                }
            },
            FlavorSource::ExtraSpecs { devices, redirection } => {
                let given =
                    |d, r| Flavor::parse_lists(d, r).map_err(|e| wrong("Nova's extra specs", e));
                let part = |text: Option<&str>, flavor| {
                    name(text).map_or(Part::Given(flavor), Part::Named)
                };
                let (d, r) = (devices.as_deref(), redirection.as_deref());
                match (name(d), name(r)) {
                    (None, None) => Self::of(given(d, r)?),
                    (named, _) => {
                        let devices =
                            if named.is_some() { Flavor::default() } else { given(d, None)? };
                        let redirection =
                            if name(r).is_some() { Flavor::default() } else { given(None, r)? };
                        Self::Stored {
                            devices: part(d, devices),
                            redirection: part(r, redirection),
                        }
                    }
                }
            }
        })
    }

    fn of(flavor: Flavor) -> Self {
        if flavor.is_empty() { Self::Nothing } else { Self::Flavor(flavor) }
    }

    /// Whether the domain is known to request something.
    pub(crate) const fn is_certain(&self) -> bool {
        matches!(self, Self::Flavor(_) | Self::Stored { .. } | Self::MaybeStored { sure: true, .. })
    }

    /// Whether the store is needed to read or to satisfy the request.
    pub(crate) const fn needs_store(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::Flavor(flavor) => !flavor.usb_devices.is_empty(),
            Self::Stored { .. } | Self::MaybeStored { .. } => true,
        }
    }

    /// Returns the flavor, after looking up stored flavors.
    ///
    /// # Errors
    /// If a flavor that must exist is not stored, or the store cannot be read.
    pub fn resolve(self, store: &Store) -> Result<Flavor, HookError> {
        let concerned = self.is_certain();
        let stored = |name: &str| {
            store.flavor(name).map(|f| f.map(|f| f.flavor)).map_err(|e| HookError::of(concerned, e))
        };
        let must = |part: Part| match part {
            Part::Given(flavor) => Ok(flavor),
            Part::Named(name) if name.is_empty() => Err(HookError::of(
                true,
                "it names a stored flavor with @, but no name follows: write @NAME",
            )),
            Part::Named(name) => stored(&name)?.ok_or_else(|| {
                HookError::of(
                    true,
                    format!(
                        "it names the flavor @{name}, which this host does not know: 'virt-usb \
                         flavor list' shows the known flavors, 'virt-usb flavor set {name} JSON' \
                         stores one"
                    ),
                )
            }),
        };
        Ok(match self {
            Self::Nothing => Flavor::default(),
            Self::Flavor(flavor) => flavor,
            Self::MaybeStored { name, .. } => stored(&name)?.unwrap_or_default(),
            Self::Stored { devices, redirection } => Flavor {
                usb_devices: must(devices)?.usb_devices,
                usb_redirection_devices: must(redirection)?.usb_redirection_devices,
            },
        })
    }
}

/// Returns the name in `@NAME`, which means a stored flavor. JSON never begins with `@`.
fn name(text: Option<&str>) -> Option<String> {
    text.and_then(|t| t.trim().strip_prefix('@')).map(|n| n.trim().to_owned())
}

/// Returns the requests of the flavor, followed by the assignments of operators. With `hold =
/// "instance"`, an instance without a visible flavor keeps its flavor's earlier requests.
pub(crate) fn wants(
    flavor: &Flavor,
    hold: HoldPolicy,
    assigned: &[Assignment],
) -> Vec<ClaimRequest> {
    let lasting = hold == HoldPolicy::Instance;
    let of =
        |source| assigned.iter().filter(move |a| a.source == source).map(|a| a.request.clone());
    let mut requests = flavor.usb_devices.clone();
    if requests.is_empty() && lasting {
        requests = of(Source::Flavor).collect();
    }
    let wants = requests.into_iter().map(|request| ClaimRequest::new(request, lasting));
    wants.chain(of(Source::Operator).map(|request| ClaimRequest::new(request, true))).collect()
}

/// Request for one particular device.
pub(crate) fn only(id: DeviceId) -> DeviceRequest {
    DeviceRequest { selector: Selector { id: Some(id), ..Selector::default() }, count: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(source: &FlavorSource) -> Result<FlavorRequest, HookError> {
        FlavorRequest::read(source, Path::new("/nowhere"))
    }

    #[test]
    fn names_and_lists_mix() {
        let specs = |d: &str, r: &str| FlavorSource::ExtraSpecs {
            devices: Some(d.into()),
            redirection: Some(r.into()),
        };
        let request = read(&specs("@erp", r#"[{"bus":"usb","type":"spicevmc"}]"#)).unwrap();
        let FlavorRequest::Stored { devices: Part::Named(name), redirection: Part::Given(flavor) } =
            request
        else {
            panic!()
        };
        assert_eq!((name.as_str(), flavor.usb_redirection_devices.len()), ("erp", 1));
        assert_eq!(read(&specs("[]", "[]")).unwrap(), FlavorRequest::Nothing);
        assert!(read(&specs("[", "[]")).unwrap_err().concerned);
        assert_eq!(
            read(&FlavorSource::Named("m1.small".into())).unwrap(),
            FlavorRequest::Nothing,
            "no database, no stored flavor"
        );
    }
}
