//! Reads the domain XML from stdin, up to a maximum size.

use std::io::{self, Read};

use virt_usb_domxml::MAX_XML;

/// Result of reading stdin.
#[derive(Debug)]
pub enum Input {
    /// The whole XML.
    Xml(Vec<u8>),
    /// The XML is longer than [`MAX_XML`] bytes. All of it was read, so that the writer does not
    /// block, and searched for marks.
    TooLong(Marks),
    /// The XML cannot be read.
    Broken(io::Error),
}

/// Reads to the end of `source`, keeping at most [`MAX_XML`] bytes.
pub fn read(mut source: impl Read) -> Input {
    let mut xml = Vec::with_capacity(32 * 1024);
    if let Err(e) = source.by_ref().take(MAX_XML as u64).read_to_end(&mut xml) {
        return Input::Broken(e);
    }
    if xml.len() < MAX_XML {
        return Input::Xml(xml);
    }
    let (mut rest, mut marks) = (Vec::new(), None::<Marks>);
    loop {
        let read = match source.by_ref().take(CHUNK_BYTES).read_to_end(&mut rest) {
            Ok(read) => read,
            Err(e) => return Input::Broken(e),
        };
        // A mark may begin in one chunk and end in the next.
        let tail = |chunk: &[u8]| chunk.len().saturating_sub(MAX_MARK_BYTES);
        marks = match marks {
            None if read == 0 => return Input::Xml(xml),
            Some(marks) if read == 0 => return Input::TooLong(marks),
            None => {
                let seam = [xml.get(tail(&xml)..).unwrap_or_default(), &rest].concat();
                Some(Marks::of(&xml).and(Marks::of(&seam)))
            }
            Some(marks) => Some(marks.and(Marks::of(&rest))),
        };
        rest.drain(..tail(&rest));
    }
}

/// Size in bytes of the chunks in which a document that is too long is searched.
const CHUNK_BYTES: u64 = 1 << 20;
/// Maximum length of a mark in bytes.
const MAX_MARK_BYTES: usize = 32;

/// Marks found in XML that cannot be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// Whether the XML refers to devices of virt-usb; see [`mentions_us`].
    pub us: bool,
    /// Whether the XML contains a hostdev; see [`mentions_hostdevs`].
    pub hostdevs: bool,
}

impl Marks {
    fn of(xml: &[u8]) -> Self {
        Self { us: mentions_us(xml), hostdevs: mentions_hostdevs(xml) }
    }

    const fn and(self, other: Self) -> Self {
        Self { us: self.us || other.us, hostdevs: self.hostdevs || other.hostdevs }
    }
}

/// Whether XML that cannot be parsed refers to devices of virt-usb. Only then may an error of the
/// hook refuse the domain.
pub fn mentions_us(xml: &[u8]) -> bool {
    const MARKS: [&[u8]; 6] = [
        b"urn:virt-usb:flavor:1",
        b"usb:devices",
        b"usb_devices",
        b"usb:redirection_devices",
        b"usb_redirection_devices",
        b"ua-usb-",
    ];
    holds_any(xml, b'u', &MARKS)
}

/// Whether XML that cannot be parsed seems to contain a hostdev, or one in QEMU's command line. A
/// restore or migration of such a domain must be refused.
pub fn mentions_hostdevs(xml: &[u8]) -> bool {
    holds_any(xml, b'<', &[b"<hostdev"]) || holds_any(xml, b'u', &[b"usb-host"])
}

/// Whether the XML contains any of the marks, which all begin with the same byte.
fn holds_any(xml: &[u8], first: u8, marks: &[&[u8]]) -> bool {
    let mut starts =
        xml.iter().enumerate().filter(|(_, byte)| **byte == first).map(|(at, _)| &xml[at..]);
    starts.any(|rest| marks.iter().any(|mark| rest.starts_with(mark)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_input_is_drained_and_cut() {
        let long = io::repeat(b'x').take(MAX_XML as u64 + 5);
        assert!(matches!(read(long), Input::TooLong(marks) if marks == Marks::default()));
        let whole = io::repeat(b'x').take(MAX_XML as u64);
        assert!(matches!(read(whole), Input::Xml(xml) if xml.len() == MAX_XML));
        assert!(matches!(read(&b"<domain/>"[..]), Input::Xml(xml) if xml == b"<domain/>"));
    }

    /// Tests marks in the first chunk, across chunks, and in later chunks.
    #[test]
    fn marks_are_found_anywhere_in_a_long_document() {
        let mark = b"<hostdev ua-usb-5";
        let chunk = usize::try_from(CHUNK_BYTES).unwrap();
        for before in [
            0,
            MAX_XML - 5,
            MAX_XML,
            MAX_XML + chunk - 9,
            MAX_XML + 2 * chunk - 1,
            MAX_XML + 3 * chunk,
        ] {
            let text = io::repeat(b'x')
                .take(before as u64)
                .chain(&mark[..])
                .chain(io::repeat(b'y').take(MAX_XML as u64));
            let Input::TooLong(marks) = read(text) else { panic!("{before}") };
            assert_eq!(marks, Marks { us: true, hostdevs: true }, "{before}");
        }
    }

    #[test]
    fn marks_are_found_in_any_bytes() {
        assert!(mentions_us(b"\xff\xfe<a>ua-usb-5"));
        assert!(!mentions_us(b"<domain>usb</domain>"));
    }
}
