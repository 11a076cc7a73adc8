//! Text of outsiders, made safe to print and to log. This is the only place that says what is safe.
//!
//! Names come from devices, guests, tenants and other hosts. A terminal obeys control characters
//! (C0 and C1), and bidirectional ones turn a line around, so that it reads as another one.

use alloc::string::String;
use core::fmt::Write as _;

/// The character, or U+FFFD for one that a terminal obeys, that is not seen, or that turns the
/// order of a line around.
pub const fn printable(c: char) -> char {
    let hidden = matches!(
        c,
        '\0'..='\u{1f}'
            | '\u{7f}'..='\u{9f}'
            | '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}'
            | '\u{feff}'
    );
    if hidden { '\u{fffd}' } else { c }
}

/// One line for a terminal or a log: line ends and tabs become blanks, and what is not
/// [`printable`] becomes U+FFFD.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if matches!(c, '\t' | '\n' | '\r') { ' ' } else { printable(c) }).collect()
}

/// The same, at most `most` characters; what is longer ends with `…`.
pub fn clean_start(text: &str, most: usize) -> String {
    let start = text.char_indices().nth(most).map(|(end, _)| end);
    let mut clean = clean(&text[..start.unwrap_or(text.len())]);
    if start.is_some() {
        clean.push('…');
    }
    clean
}

/// Lines for a terminal: as [`clean`], with the line ends kept.
pub fn clean_lines(text: &str) -> String {
    text.split('\n').map(clean).collect::<alloc::vec::Vec<_>>().join("\n")
}

/// JSON text for a terminal: what is not [`printable`] is escaped, so that programs read what it
/// was. Line ends stay: in JSON text they are layout.
pub fn clean_json(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\n' || printable(c) == c {
            clean.push(c);
        } else {
            // All of them are in the basic plane. Writing to a string does not fail.
            let _ = write!(clean, "\\u{:04x}", u32::from(c));
        }
    }
    clean
}

/// A string of a device, made safe to print and to store: as [`printable`], trimmed, and at most
/// 126 characters (a USB string descriptor holds no more, USB 2.0, 9.6.7). Returns `None` for empty
/// text.
pub fn clean_text(text: &str) -> Option<String> {
    let trimmed = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    let clean: String = trimmed.chars().take(126).map(printable).collect();
    (!clean.is_empty()).then_some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_devices_is_harmless() {
        assert_eq!(clean_text("  HASP key\n"), Some("HASP key".into()));
        assert_eq!(clean_text("a\u{1b}[31mb\u{202e}c"), Some("a\u{fffd}[31mb\u{fffd}c".into()));
        assert_eq!(clean_text(" \0 "), None);
        assert_eq!(clean_text(&"x".repeat(500)).unwrap().len(), 126);
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        let hostile = "a\x1b[2Jb\u{9b}c\nd\te\u{202e}f\u{7f}é鍵";
        assert_eq!(clean(hostile), "a\u{fffd}[2Jb\u{fffd}c d e\u{fffd}f\u{fffd}é鍵");
        assert_eq!(clean_lines("a\n\u{85}\r\n"), "a\n\u{fffd} \n");
        assert_eq!(clean_start("ab\u{200b}d", 3), "ab\u{fffd}…");
        assert_eq!(clean_start("abc", 3), "abc");
        for c in '\0'..=char::MAX {
            let (control, shown) = (c.is_control(), clean(c.encode_utf8(&mut [0; 4])));
            assert!(!shown.contains(char::is_control), "{c:?}");
            // UAX #9: every character that sets a direction.
            let turns = matches!(
                c,
                '\u{61c}'
                    | '\u{200e}'
                    | '\u{200f}'
                    | '\u{202a}'..='\u{202e}'
                    | '\u{2066}'..='\u{2069}'
            );
            assert!(!(control || turns) || matches!(shown.as_str(), " " | "\u{fffd}"), "{c:?}");
        }
    }

    #[test]
    fn json_says_the_same_afterwards() {
        let hostile = "a\x1b\u{9b}\u{202e}\u{feff}\n\"\\é";
        let text = serde_json::to_string_pretty(&[hostile]).unwrap();
        let clean = clean_json(&text);
        assert!(clean.chars().all(|c| c == '\n' || printable(c) == c), "{clean:?}");
        assert_eq!(serde_json::from_str::<[String; 1]>(&clean).unwrap(), [hostile]);
    }
}
