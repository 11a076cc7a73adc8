//! A domain's XML: as much of it as libvirt itself looks at around a hook call.

use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use quick_xml::NsReader;
use quick_xml::escape::unescape;
use quick_xml::events::Event;
use quick_xml::name::{Namespace, ResolveResult};

/// The namespace of the metadata element that holds a flavor's JSON.
pub const FLAVOR_NAMESPACE: &str = "urn:virt-usb:flavor:1";

/// A domain XML cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// The file cannot be read.
    #[error("cannot read the domain {path}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        source: io::Error,
    },
    /// The file is not a domain that libvirt would send to a hook.
    #[error("the domain {path} cannot be sent to a hook: {what}")]
    Wrong {
        /// Path of the file.
        path: PathBuf,
        /// Description of the error.
        what: String,
    },
}

/// A domain, well-formed and named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// The text, byte for byte.
    pub xml: Vec<u8>,
    /// `<name>`.
    pub name: String,
    /// `<uuid>`, as written.
    pub uuid: Option<String>,
    hostdevs: usize,
    redirdevs: usize,
    places: Places,
}

/// Byte offsets that matter for putting a flavor in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Places {
    after_root_tag: usize,
    metadata: Option<Tag>,
    flavor: Option<Range<usize>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Tag {
    span: Range<usize>,
    empty: bool,
}

impl Domain {
    /// Reads a file; `-` is the standard input.
    ///
    /// # Errors
    /// When it cannot be read, or is no named, well-formed domain.
    pub fn load(path: &Path) -> Result<Self, DomainError> {
        let xml = Self::bytes(path)?;
        Self::parse(xml).map_err(|what| DomainError::Wrong { path: path.into(), what })
    }

    /// A file's bytes, whatever they are; `-` is the standard input.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn bytes(path: &Path) -> Result<Vec<u8>, DomainError> {
        read(path).map_err(|source| DomainError::Read { path: path.into(), source })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn parse(xml: Vec<u8>) -> Result<Self, String> {
        let text = std::str::from_utf8(&xml)
            .map_err(|e| format!("not UTF-8 at byte {}", e.valid_up_to()))?;
        let found = Scan::of(text)?;
        let name = found.name.trim().to_owned();
        if name.is_empty() {
            return Err("it has no <name>".to_owned());
        }
        let uuid = Some(found.uuid.trim().to_owned()).filter(|uuid| !uuid.is_empty());
        let (hostdevs, redirdevs, places) = (found.hostdevs, found.redirdevs, found.places);
        Ok(Self { name, uuid, hostdevs, redirdevs, places, xml })
    }

    /// A simple form of `virDomainDefCheckABIStability` (src/conf/domain_conf.c), as run on what a
    /// filter printed: the error that libvirt would show if `filtered` replaced this domain.
    ///
    /// # Errors
    /// libvirt's message.
    pub fn replaced_by(&self, filtered: &[u8]) -> Result<Self, String> {
        let new = Self::parse(filtered.to_vec()).map_err(|what| format!("XML error: {what}"))?;
        let counts = [
            ("Target domain host device count", new.hostdevs, self.hostdevs),
            ("Target domain redirected devices count", new.redirdevs, self.redirdevs),
        ];
        for (what, target, source) in counts {
            if target != source {
                return Err(format!(
                    "unsupported configuration: {what} {target} does not match source {source}"
                ));
            }
        }
        match (&new.uuid, &self.uuid) {
            (Some(target), Some(source)) if !target.eq_ignore_ascii_case(source) => Err(format!(
                "unsupported configuration: Target domain uuid {target} does not match source \
                    {source}"
            )),
            _ => Ok(new),
        }
    }

    /// A copy that asks for a flavor: its JSON as the text of a `flavor` element in our namespace,
    /// in the metadata.
    ///
    /// Whatever element of that namespace the domain already has there is replaced.
    ///
    /// # Errors
    /// When the result is not a domain. JSON alone cannot cause that.
    pub fn with_flavor(&self, json: &str) -> Result<Self, String> {
        let json = json.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let element = format!(
            "<virt-usb:flavor xmlns:virt-usb=\"{FLAVOR_NAMESPACE}\">{json}</virt-usb:flavor>"
        );
        let after = |offset: usize| offset..offset;
        let (place, new) = match (&self.places.flavor, &self.places.metadata) {
            (Some(old), _) => (old.clone(), element),
            (None, Some(tag)) if tag.empty => {
                (tag.span.clone(), format!("<metadata>{element}</metadata>"))
            }
            (None, Some(tag)) => (after(tag.span.end), format!("\n    {element}")),
            (None, None) => (
                after(self.places.after_root_tag),
                format!("\n  <metadata>\n    {element}\n  </metadata>"),
            ),
        };
        let mut xml = self.xml.clone();
        xml.splice(place, new.into_bytes());
        Self::parse(xml)
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    if path != Path::new("-") {
        return fs::read(path);
    }
    let mut xml = Vec::new();
    io::stdin().lock().read_to_end(&mut xml)?;
    Ok(xml)
}

/// One pass over the text.
#[derive(Default)]
struct Scan {
    path: Vec<String>,
    roots: usize,
    name: String,
    uuid: String,
    hostdevs: usize,
    redirdevs: usize,
    flavor_start: Option<usize>,
    places: Places,
}

impl Scan {
    fn of(text: &str) -> Result<Self, String> {
        let mut reader = NsReader::from_str(text);
        reader.config_mut().allow_dangling_amp = false;
        let mut scan = Self::default();
        loop {
            let start = offset(reader.buffer_position());
            let (namespace, event) =
                reader.read_resolved_event().map_err(|e| format!("not well-formed: {e}"))?;
            let flavor = namespace == ResolveResult::Bound(Namespace(FLAVOR_NAMESPACE));
            let event = event.into_owned();
            let span = start..offset(reader.buffer_position());
            match event {
                Event::Start(tag) => scan.open(&tag, flavor, span, false)?,
                Event::Empty(tag) => {
                    scan.open(&tag, flavor, span.clone(), true)?;
                    scan.close(span.end);
                }
                Event::End(_) => scan.close(span.end),
                Event::Text(text) => scan.text(&text.into_inner())?,
                Event::CData(text) => scan.text(&text.into_inner())?,
                Event::GeneralRef(name) => {
                    let raw = format!("&{};", &*name.into_inner());
                    scan.text(&unescape(&raw).map_err(|e| format!("not well-formed: {e}"))?)?;
                }
                Event::Eof => break,
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
            }
        }
        match (scan.path.last(), scan.roots) {
            (Some(open), _) => Err(format!("not well-formed: <{open}> is never closed")),
            (None, 1) => Ok(scan),
            (None, count) => {
                Err(format!("not well-formed: {count} elements at the top, one is wanted"))
            }
        }
    }

    fn open(
        &mut self,
        tag: &quick_xml::events::BytesStart<'_>,
        flavor: bool,
        span: Range<usize>,
        empty: bool,
    ) -> Result<(), String> {
        for attribute in tag.attributes() {
            attribute.map_err(|e| format!("not well-formed: {e}"))?;
        }
        let name = tag.name().0.to_owned();
        self.path.push(name);
        match self.path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["domain"] => self.places.after_root_tag = span.end,
            [root] => return Err(format!("the root is <{root}>, wanted <domain>")),
            ["domain", "devices", "hostdev"] => self.hostdevs += 1,
            ["domain", "devices", "redirdev"] => self.redirdevs += 1,
            ["domain", "metadata"] => self.places.metadata = Some(Tag { span, empty }),
            ["domain", "metadata", _] if flavor => self.flavor_start = Some(span.start),
            _ => {}
        }
        self.roots += usize::from(self.path.len() == 1);
        Ok(())
    }

    fn close(&mut self, end: usize) {
        self.path.pop();
        if self.path.len() == 2
            && let Some(start) = self.flavor_start.take()
        {
            self.places.flavor = Some(start..end);
        }
    }

    fn text(&mut self, text: &str) -> Result<(), String> {
        match self.path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["domain", "name"] => self.name.push_str(text),
            ["domain", "uuid"] => self.uuid.push_str(text),
            [] if !text.trim().is_empty() => {
                return Err("not well-formed: text outside the root".to_owned());
            }
            _ => {}
        }
        Ok(())
    }
}

fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(inner: &str) -> Domain {
        Domain::parse(format!("<domain type='kvm'>{inner}</domain>").into_bytes()).unwrap()
    }

    #[test]
    fn name_and_uuid() {
        let found = domain(
            "<name>a&amp;b</name><uuid> 1-2 </uuid><devices><x><name>c</name></x></devices>",
        );
        assert_eq!((found.name.as_str(), found.uuid.as_deref()), ("a&b", Some("1-2")));
    }

    #[test]
    fn what_is_no_domain() {
        let wrong = |text: &str| Domain::parse(text.as_bytes().to_vec()).unwrap_err();
        assert!(wrong("").contains("0 elements"));
        assert!(wrong("<domain><name>x</name>").contains("<domain> is never closed"));
        assert!(wrong("<domain><name>x</nam></domain>").contains("not well-formed"));
        assert!(wrong("<domain/><domain/>").contains("2 elements"));
        assert!(wrong("<domain/>").contains("no <name>"));
        assert!(wrong("<network><name>n</name></network>").contains("wanted <domain>"));
        assert!(wrong("<domain a=1><name>n</name></domain>").contains("not well-formed"));
        assert!(Domain::parse(vec![0xff]).unwrap_err().contains("not UTF-8"));
    }

    #[test]
    fn a_filter_may_not_change_the_number_of_devices() {
        let old = domain("<name>x</name><uuid>AB</uuid><devices><hostdev/></devices>");
        let more = domain("<name>x</name><uuid>ab</uuid><devices><hostdev/><hostdev/></devices>");
        let redirected = domain("<name>x</name><devices><hostdev/><redirdev/></devices>");
        let other = domain("<name>x</name><uuid>cd</uuid><devices><hostdev/></devices>");
        let refused = |new: &Domain| old.replaced_by(&new.xml).unwrap_err();
        assert_eq!(
            refused(&more),
            "unsupported configuration: Target domain host device count 2 does not match source 1"
        );
        assert!(
            refused(&redirected).contains("redirected devices count 1 does not match source 0")
        );
        assert!(refused(&other).contains("uuid cd does not match source AB"));
        assert!(old.replaced_by(b"<domain>").unwrap_err().starts_with("XML error: "));
        assert!(old.replaced_by(&old.xml.clone()).is_ok());
    }

    #[test]
    fn a_flavor_goes_where_the_metadata_is() {
        let json = r#"{"a":"<&>"}"#;
        let put = |inner: &str| {
            let once = domain(inner).with_flavor(json).unwrap();
            let twice = once.with_flavor(json).unwrap();
            assert_eq!(once, twice, "a second time replaces the first");
            let text = String::from_utf8(once.xml).unwrap();
            assert!(text.contains(r#">{"a":"&lt;&amp;&gt;"}</virt-usb:flavor>"#), "{text}");
            assert_eq!(text.matches("<metadata>").count(), 1, "{text}");
        };
        put("<name>x</name>");
        put("<name>x</name><metadata/>");
        put("<name>x</name><metadata><y:z xmlns:y='urn:y'/></metadata>");
        put("<name>x</name><metadata><f:flavor \
                xmlns:f='urn:virt-usb:flavor:1'><deep/>old</f:flavor></metadata>");
        put("<name>x</name><metadata><any xmlns='urn:virt-usb:flavor:1'/></metadata>");
    }
}
