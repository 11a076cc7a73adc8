//! How the document is laid out, so that what is inserted looks as if it had always been there.

/// Two blanks: what libvirt writes.
const USUAL: &str = "  ";

/// Text between the end of one element and the start of the next: a line end and the indentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Style {
    /// `\n`, `\r\n`, `\r`; empty in a document of one line.
    eol: String,
    /// The indentation of the element.
    lead: String,
    /// One level of indentation.
    unit: String,
}

impl Style {
    /// Of the element that starts at `start`, when nothing but white space is before it on its
    /// line.
    pub(crate) fn of(text: &str, start: usize, unit: &str) -> Option<Self> {
        let before = text.get(..start)?;
        let kept = before.trim_end_matches([' ', '\t']);
        let eol = ["\r\n", "\n", "\r"].into_iter().find(|eol| kept.ends_with(eol))?;
        let lead = before.get(kept.len()..)?;
        Some(Self { eol: eol.to_owned(), lead: lead.to_owned(), unit: unit.to_owned() })
    }

    /// All on one line.
    pub(crate) fn one_line() -> Self {
        Self { eol: String::new(), lead: String::new(), unit: String::new() }
    }

    /// The same, one level deeper.
    pub(crate) fn inner(&self) -> Self {
        Self { lead: format!("{}{}", self.lead, self.unit), ..self.clone() }
    }

    pub(crate) fn is_one_line(&self) -> bool {
        self.eol.is_empty()
    }

    /// Starts a line of this indentation; nothing in a document of one line.
    pub(crate) fn new_line(&self) -> String {
        format!("{}{}", self.eol, self.lead)
    }
}

/// One level of indentation, from an element and its child.
pub(crate) fn unit(text: &str, outer: usize, inner: usize) -> String {
    let lead = |start| match start {
        // The start of the document is the start of a line, with no line end before it.
        0 => Some(String::new()),
        _ => Style::of(text, start, "").map(|s| s.lead),
    };
    let unit =
        lead(outer).zip(lead(inner)).and_then(|(o, i)| i.strip_prefix(&o).map(str::to_owned));
    unit.filter(|u| !u.is_empty()).unwrap_or_else(|| USUAL.to_owned())
}

/// An element to write: `<start>` with children, or `<start/>`.
pub(crate) struct Element {
    /// Name and attributes; ASCII without markup, so that nothing needs escaping.
    pub(crate) start: String,
    pub(crate) children: Vec<Element>,
}

impl Element {
    pub(crate) fn leaf(start: String) -> Self {
        Self { start, children: Vec::new() }
    }

    /// The element on one line.
    pub(crate) fn alone(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, &Style::one_line());
        out
    }

    /// Writes the element, each tag on a line of its own.
    pub(crate) fn write(&self, out: &mut String, style: &Style) {
        out.push_str(&style.new_line());
        out.push('<');
        out.push_str(&self.start);
        if self.children.is_empty() {
            out.push_str("/>");
            return;
        }
        out.push('>');
        for child in &self.children {
            child.write(out, &style.inner());
        }
        let name = self.start.split(' ').next().unwrap_or_default();
        out.push_str(&format!("{}</{name}>", style.new_line()));
    }
}
