//! The domain XML on stdin, bounded.

use std::io::{self, Read};

use virt_usb_domxml::MAX_XML;

/// The XML, or why there is none.
#[derive(Debug)]
pub enum Input {
    /// All of it.
    Xml(Vec<u8>),
    /// More than [`MAX_XML`] bytes: the first part. The rest was read and thrown away, so that the writer does not hang.
    TooLong(Vec<u8>),
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
    match io::copy(&mut source, &mut io::sink()) {
        Ok(0) => Input::Xml(xml),
        Ok(_) => Input::TooLong(xml),
        Err(e) => Input::Broken(e),
    }
}

/// Whether XML that cannot be parsed speaks of USB devices of ours. Only then may a fault of ours refuse the domain.
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

/// Whether XML that cannot be parsed seems to hold a hostdev: a filter then must not let it pass.
pub fn mentions_hostdevs(xml: &[u8]) -> bool {
    holds_any(xml, b'<', &[b"<hostdev"])
}

/// One pass for marks that begin with the same byte.
fn holds_any(xml: &[u8], first: u8, marks: &[&[u8]]) -> bool {
    let mut starts = xml.iter().enumerate().filter(|(_, byte)| **byte == first).map(|(at, _)| &xml[at..]);
    starts.any(|rest| marks.iter().any(|mark| rest.starts_with(mark)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_input_is_drained_and_cut() {
        let long = io::repeat(b'x').take(MAX_XML as u64 + 5);
        assert!(matches!(read(long), Input::TooLong(part) if part.len() == MAX_XML));
        assert!(matches!(read(&b"<domain/>"[..]), Input::Xml(xml) if xml == b"<domain/>"));
    }

    #[test]
    fn marks_are_found_in_any_bytes() {
        assert!(mentions_us(b"\xff\xfe<a>ua-usb-5"));
        assert!(!mentions_us(b"<domain>usb</domain>"));
    }
}
