//! The domain XML on stdin, bounded.

use std::io::{self, Read};

use virt_usb_domxml::MAX_XML;

/// The XML, or why there is none.
#[derive(Debug)]
pub enum Input {
    /// All of it.
    Xml(Vec<u8>),
    /// More than [`MAX_XML`] bytes: what they speak of. All of them were read, so that the writer
    /// does not hang.
    TooLong(Marks),
    /// The pipe broke.
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
        let read = match source.by_ref().take(PART).read_to_end(&mut rest) {
            Ok(read) => read,
            Err(e) => return Input::Broken(e),
        };
        // A mark may begin in one part and end in the next.
        let tail = |part: &[u8]| part.len().saturating_sub(LONGEST_MARK);
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

/// How much of a document that is too long is looked at at once, in bytes.
const PART: u64 = 1 << 20;
/// No mark is longer than this, in bytes.
const LONGEST_MARK: usize = 32;

/// Marks found in XML that cannot be parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// USB devices of ours: see [`mentions_us`].
    pub us: bool,
    /// A hostdev: see [`mentions_hostdevs`].
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

/// Whether XML that cannot be parsed refers to USB devices of ours. Only then may an error of the
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

/// Whether XML that cannot be parsed seems to hold a hostdev, or gives one to QEMU: a filter then
/// must not let it pass.
pub fn mentions_hostdevs(xml: &[u8]) -> bool {
    holds_any(xml, b'<', &[b"<hostdev"]) || holds_any(xml, b'u', &[b"usb-host"])
}

/// One pass for marks that begin with the same byte.
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

    /// Wherever it stands: in the first part, across a seam, in any later part.
    #[test]
    fn what_a_long_document_speaks_of_is_found_everywhere() {
        let mark = b"<hostdev ua-usb-5";
        let part = usize::try_from(PART).unwrap();
        for before in [
            0,
            MAX_XML - 5,
            MAX_XML,
            MAX_XML + part - 9,
            MAX_XML + 2 * part - 1,
            MAX_XML + 3 * part,
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
