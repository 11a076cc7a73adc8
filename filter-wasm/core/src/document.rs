//! Reads host documents, one a line.
//!
//! [`HostDocument::parse`] reads the format, but slowly: it builds a tree of values. A fleet sends
//! hundreds of megabytes of documents that all look alike, as [`HostDocument`] is serialised or
//! published: without white space, with the keys in the order of the struct, some of them left out.
//! The quick reader here expects exactly that, and compares each key with the expected one. It
//! gives up at any other input, right or wrong, and the model's reader then decides and words the
//! error.
//!
//! What the quick reader takes, the model's reader takes with the same meaning, but that the values
//! of keys which the filter has no use for are not looked at: `address`, `serial_kind`, `speed`,
//! `instance_uuid` and the texts.

use alloc::string::{String, ToString};

use virt_usb_model::HostDocument;

use crate::host_builder::{Draft, END, PATH_MARK};

/// Fills `draft` with the document of the first line, and says what the other lines are. Nothing is
/// read where the line is empty.
pub(crate) fn read<'a>(lines: &'a str, draft: &mut Draft) -> (Read, &'a str) {
    if let Some(rest) = Quick::new(lines).document(draft) {
        return (Read::Done, rest);
    }
    let (line, rest) = lines.split_once('\n').unwrap_or((lines, ""));
    if line.trim_ascii().is_empty() {
        return (Read::Nothing, rest);
    }
    match HostDocument::parse(line) {
        Ok(document) => {
            draft.read(&document);
            (Read::Done, rest)
        }
        Err(e) => (Read::Refused(e.to_string()), rest),
    }
}

/// Result of reading a line.
pub(crate) enum Read {
    Done,
    Nothing,
    Refused(String),
}

/// A place in a document. `None` from any of its functions: not as expected, ask the model.
struct Quick<'a> {
    rest: &'a [u8],
    text: &'a str,
}

impl<'a> Quick<'a> {
    const fn new(text: &'a str) -> Self {
        Self { rest: text.as_bytes(), text }
    }

    /// The document of this line, and the lines after it.
    fn document(&mut self, draft: &mut Draft) -> Option<&'a str> {
        self.exactly(b"{\"version\":1,\"host\":")?;
        let name = self.string()?;
        self.exactly(b",\"compute_node_id\":")?;
        self.number()?;
        self.exactly(b",\"revision\":")?;
        self.number()?;
        draft.begin(name);
        self.exactly(b",\"devices\":[")?;
        if !self.skip(b']') {
            loop {
                self.device(draft)?;
                if self.skip(b']') {
                    break;
                }
                self.exactly(b",")?;
            }
        }
        self.exactly(b"}")?;
        if !self.rest.is_empty() && !self.skip(b'\n') {
            return None;
        }
        self.text.get(self.text.len() - self.rest.len()..)
    }

    fn device(&mut self, draft: &mut Draft) -> Option<()> {
        self.exactly(b"{\"id\":")?;
        let id = self.number().filter(|id| (1..=virt_usb_model::DeviceId::MAX).contains(id))?;
        if self.has(b",\"compute_node_id\":") {
            self.number().filter(|node| *node > 0)?;
        }
        self.exactly(b",\"address\":")?;
        self.string()?;
        self.exactly(b",\"product_id\":\"")?;
        let product = self.hex::<4>()?;
        self.exactly(b"\",\"vendor_id\":\"")?;
        let vendor = self.hex::<4>()?;
        self.exactly(b"\"")?;
        // All three, or none.
        if self.has(b",\"bus_id\":") {
            self.number()?;
            self.exactly(b",\"device_id\":")?;
            self.number()?;
            self.exactly(b",\"port_id\":")?;
            self.number()?;
        }
        self.exactly(b",\"status\":")?;
        let available = self.status()?;
        self.passed_over(b",\"extra_info\":")?;
        self.passed_over(b",\"instance_uuid\":")?;
        self.exactly(b",\"port_path\":\"")?;
        let port = self.port()?;
        draft.push(id, vendor << 16 | product, port, available);
        self.exactly(b"\"")?;
        if self.has(b",\"serial\":")
            && let Some(serial) = self.nullable()?
        {
            draft.serial(serial);
        }
        if self.has(b",\"serial_kind\":") {
            self.string()?;
        }
        self.traits(draft)?;
        self.projects(draft)
    }

    /// `"available","status_reason":null`, or without the reason, and the like.
    fn status(&mut self) -> Option<bool> {
        if self.has(b"\"available\"") {
            self.no_reason();
            return Some(true);
        }
        match self.string()? {
            "claimed" | "allocated" | "removed" => self.no_reason(),
            "unavailable" => {
                self.exactly(b",\"status_reason\":")?;
                self.string()?.parse::<virt_usb_model::UnavailableReason>().ok()?;
            }
            _ => return None,
        }
        Some(false)
    }

    /// A reason that is not null is met by the next key, which is another.
    fn no_reason(&mut self) {
        let _ = self.has(b",\"status_reason\":null");
    }

    /// Bus and ports, to the quotation mark.
    fn port(&mut self) -> Option<u64> {
        let mut bytes = [0; 8];
        bytes[0] = self.port_number()?;
        self.exactly(b"-")?;
        bytes[1] = self.port_number()?;
        let mut next = 2;
        while self.skip(b'.') {
            *bytes.get_mut(next)? = self.port_number()?;
            next += 1;
        }
        Some(u64::from_be_bytes(bytes))
    }

    fn port_number(&mut self) -> Option<u8> {
        self.number().and_then(|n| u8::try_from(n).ok()).filter(|n| *n > 0)
    }

    /// Classes, what is passed over, and tags: written to the draft as they come.
    fn traits(&mut self, draft: &mut Draft) -> Option<()> {
        self.exactly(b",\"class\":\"")?;
        let class = self.hex::<2>()? as u8;
        self.exactly(b"\"")?;
        let start = draft.text.len();
        draft.text.extend([0, class]);
        if self.has(b",\"interface_classes\":[") && !self.skip(b']') {
            loop {
                self.exactly(b"\"")?;
                let class = self.hex::<2>()? as u8;
                self.exactly(b"\"")?;
                if !draft.text[start + 1..].contains(&class) {
                    draft.text.push(class);
                    draft.text[start] += 1;
                }
                if self.skip(b']') {
                    break;
                }
                self.exactly(b",")?;
            }
        }
        self.passed_over(b",\"speed\":")?;
        self.passed_over(b",\"manufacturer\":")?;
        self.passed_over(b",\"product_name\":")?;
        self.passed_over(b",\"driver\":")?;
        self.passed_over(b",\"host_use\":")?;
        if self.has(b",\"path\":")
            && let Some(path) = self.nullable()?
        {
            // What a path may be, the model knows.
            if !path.bytes().all(|b| b.is_ascii_graphic()) || path.len() > 255 {
                return None;
            }
            draft.text.push(PATH_MARK);
            draft.text.extend_from_slice(path.as_bytes());
            draft.text.push(END);
        }
        if self.has(b",\"tags\":[") {
            self.list(draft)?;
        }
        let end = draft.here();
        draft.devices.last_mut()?.traits = start as u32..end;
        Some(())
    }

    /// Strings up to the bracket, each with its end, as the draft keeps them.
    fn list(&mut self, draft: &mut Draft) -> Option<()> {
        if self.skip(b']') {
            return Some(());
        }
        loop {
            let text = self.string().filter(|text| !text.is_empty())?;
            // What a tag may be, the model knows: here it is what hardly needs asking.
            if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/".contains(&b))
                || text.len() > 64
            {
                return None;
            }
            draft.text.extend_from_slice(text.as_bytes());
            draft.text.push(END);
            if self.skip(b']') {
                return Some(());
            }
            self.exactly(b",")?;
        }
    }

    /// Projects are rare, and compared by a rule of the model: theirs is the slow way.
    fn projects(&mut self, draft: &mut Draft) -> Option<()> {
        if self.has(b",\"projects\":[") && !self.skip(b']') {
            let start = draft.here();
            loop {
                let project: virt_usb_model::ProjectId = self.string()?.parse().ok()?;
                draft.text.extend_from_slice(crate::host_builder::canonical(&project).as_bytes());
                draft.text.push(END);
                if self.skip(b']') {
                    break;
                }
                self.exactly(b",")?;
            }
            let end = draft.here();
            draft.devices.last_mut()?.projects = start..end;
        }
        self.exactly(b"}")
    }

    #[inline]
    fn exactly<const N: usize>(&mut self, wanted: &[u8; N]) -> Option<()> {
        match self.rest.split_first_chunk::<N>() {
            Some((start, rest)) if same(start, wanted) => {
                self.rest = rest;
                Some(())
            }
            _ => None,
        }
    }

    /// Whether it comes next; it is taken then.
    #[inline]
    fn has<const N: usize>(&mut self, wanted: &[u8; N]) -> bool {
        self.exactly(wanted).is_some()
    }

    /// A key that may be there, and its value.
    #[inline]
    fn passed_over<const N: usize>(&mut self, key: &[u8; N]) -> Option<()> {
        if self.has(key) {
            self.nullable()?;
        }
        Some(())
    }

    #[inline]
    fn skip(&mut self, byte: u8) -> bool {
        match self.rest.split_first() {
            Some((first, rest)) if *first == byte => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// A string without escapes, between its quotation marks.
    #[inline]
    fn string(&mut self) -> Option<&'a str> {
        let (first, rest) = self.rest.split_first()?;
        if *first != b'"' {
            return None;
        }
        let len = plain(rest);
        if rest.get(len) != Some(&b'"') {
            return None;
        }
        let start = self.text.len() - rest.len();
        self.rest = &rest[len + 1..];
        self.text.get(start..start + len)
    }

    #[inline]
    fn nullable(&mut self) -> Option<Option<&'a str>> {
        if self.exactly(b"null").is_some() { Some(None) } else { self.string().map(Some) }
    }

    /// Decimal digits without a needless zero in front.
    #[inline]
    fn number(&mut self) -> Option<u64> {
        let mut n = 0u64;
        let mut len = 0;
        while let Some(digit) = self.rest.get(len).map(|b| b.wrapping_sub(b'0')).filter(|d| *d < 10)
        {
            // 19 digits always fit.
            if len == 19 {
                return None;
            }
            n = n * 10 + u64::from(digit);
            len += 1;
        }
        let plain = len == 1 || len > 1 && self.rest[0] != b'0';
        // 1.5 and 1e3 go on after their digits; what comes next is compared, so they are not taken.
        self.rest = &self.rest[len..];
        plain.then_some(n)
    }

    /// Lower-case hexadecimal digits.
    #[inline]
    fn hex<const N: usize>(&mut self) -> Option<u32> {
        let (digits, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        digits.iter().try_fold(0, |n, b| {
            let digit = match b {
                b'0'..=b'9' => b - b'0',
                b'a'..=b'f' => b - b'a' + 10,
                _ => return None,
            };
            Some(n << 4 | u32::from(digit))
        })
    }
}

/// Whether both are the same, eight bytes at a time: for wasm the compiler makes of `==` a loop
/// over bytes.
#[inline(always)]
fn same<const N: usize>(a: &[u8; N], b: &[u8; N]) -> bool {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let differ = |(a, b): (&[u8; 8], &[u8; 8])| u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
    let words = a.iter().zip(b).map(differ).fold(0, |all, word| all | word);
    let bytes = a_rest.iter().zip(b_rest).fold(0, |all, (a, b)| all | (a ^ b));
    words == 0 && bytes == 0
}

const fn each(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// How many bytes there are before a quotation mark, a backslash or a control character; eight at a
/// time ("Bit Twiddling Hacks", determine if a word has a byte less than n).
#[inline]
fn plain(text: &[u8]) -> usize {
    let (words, rest) = text.as_chunks::<8>();
    for (at, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let is = |byte| {
            let differ = word ^ each(byte);
            differ.wrapping_sub(each(1)) & !differ
        };
        let less = word.wrapping_sub(each(0x20)) & !word;
        let found = (is(b'"') | is(b'\\') | less) & each(0x80);
        if found != 0 {
            // Above the first there may be wrong ones, below it none.
            return at * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let special = |b: &u8| *b == b'"' || *b == b'\\' || *b < 0x20;
    words.len() * 8 + rest.iter().position(special).unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn eight_at_a_time_is_one_at_a_time(
            text in prop::collection::vec(
                prop_oneof![Just(b'"'), Just(b'\\'), 0u8..0x21, any::<u8>(), Just(b'a')],
                0..40,
            ),
            at in 0usize..20,
        ) {
            let special = |b: &u8| *b == b'"' || *b == b'\\' || *b < 0x20;
            prop_assert_eq!(plain(&text), text.iter().position(special).unwrap_or(text.len()));
            if let Some(bytes) = text.first_chunk::<19>() {
                let mut other = *bytes;
                prop_assert!(same(bytes, &other));
                other[at % 19] ^= 1;
                prop_assert!(!same(bytes, &other));
            }
        }
    }
}
