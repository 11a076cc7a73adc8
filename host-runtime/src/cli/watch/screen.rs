//! Layout of the screen: makes lines of a view and a size. Pure.
//!
//! ```text
//! virt-usb watch  HOST  3 devices: 2 available, 1 allocated
//!  ID  USB ID     NAME      PORT   STATUS     HELD BY  SINCE
//!  1   0529:0001  HASP HL   1-1.4  allocated  erp      11-25 20:40:33        devices: the rest
//! erp does not get device 1 (since ...): ...                                 at most a quarter
//! EVENTS (UTC)                                                               at least a third
//! 11-25 20:40:33  claimed        1  erp   hook prepare: usb_devices[0]
//! q quit  ↑↓ scroll                                          devices 1-3 of 3
//! ```

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::view::{Tone, View};

/// Size of the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: u16,
    pub(super) rows: u16,
}

/// A line that fits the screen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Line(pub(super) Vec<(String, Tone)>);

impl Line {
    fn of(text: &str, tone: Tone, columns: usize) -> Self {
        Self(vec![(fit(text, columns), tone)])
    }
}

/// Index of the first visible device.
#[derive(Debug, Default)]
pub(super) struct Scroll(usize);

/// Distance to scroll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    Rows(isize),
    Pages(isize),
    Start,
    End,
}

impl Scroll {
    /// Changes the position; [`draw`] limits it to the list.
    pub(super) fn by(&mut self, by: By, size: Size) {
        let page = isize::from(i16::try_from(size.rows / 2).unwrap_or(i16::MAX)).max(1);
        self.0 = match by {
            By::Rows(rows) => self.0.saturating_add_signed(rows),
            By::Pages(pages) => self.0.saturating_add_signed(pages.saturating_mul(page)),
            By::Start => 0,
            By::End => usize::MAX,
        };
    }
}

/// Number of rows for each part of the screen.
struct Shares {
    devices: usize,
    problems: usize,
    /// Events with their heading; 0 if there is no room.
    events: usize,
}

impl Shares {
    fn new(rows: usize, view: &View) -> Self {
        // Title, heading and the last line are always shown.
        let body = rows.saturating_sub(3);
        let problems = view.moment.problems.len().min(body / 4);
        let rest = body - problems;
        let devices = view.moment.devices.len().max(1);
        let at_least = if rest < 6 { 0 } else { (rest / 3).max(3) };
        let devices = devices.min(rest - at_least);
        let events = if at_least == 0 { 0 } else { rest - devices };
        Self { devices, problems, events }
    }
}

/// Returns exactly one line for each row of the screen, and limits `scroll` to the list.
pub(super) fn draw(view: &View, size: Size, scroll: &mut Scroll) -> Vec<Line> {
    let (columns, rows) = (usize::from(size.columns), usize::from(size.rows));
    let shares = Shares::new(rows, view);
    let all = view.moment.devices.len();
    scroll.0 = scroll.0.min(all.saturating_sub(shares.devices.max(1)));
    let mut lines = vec![title(view, columns)];
    lines.extend(devices(view, scroll.0, shares.devices, columns));
    let problems = view.problems();
    let hidden = problems.len() - shares.problems;
    lines.extend(
        problems.iter().take(shares.problems).map(|problem| Line::of(problem, Tone::Bad, columns)),
    );
    if hidden > 0 && shares.problems > 0 {
        let more = format!("... and {} more: 'virt-usb claims'", hidden + 1);
        lines.pop();
        lines.push(Line::of(&more, Tone::Bad, columns));
    }
    if shares.events > 0 {
        lines.push(Line::of("EVENTS (UTC)", Tone::Head, columns));
        let events = view.events(shares.events - 1);
        lines.extend(events.iter().map(|(text, tone)| Line::of(text, *tone, columns)));
    }
    lines.truncate(rows.saturating_sub(1));
    lines.resize(rows.saturating_sub(1), Line::default());
    if rows > 0 {
        let last = all.min(scroll.0 + shares.devices);
        let range = if all > shares.devices {
            format!("devices {}-{last} of {all}", scroll.0 + 1)
        } else {
            String::new()
        };
        lines.push(Line::of(
            &apart("q quit  \u{2191}\u{2193} PgUp PgDn Home End scroll", &range, columns),
            Tone::Quiet,
            columns,
        ));
    }
    lines
}

fn title(view: &View, columns: usize) -> Line {
    match &view.trouble {
        Some(trouble) => Line::of(
            &format!("NOT UP TO DATE: {}", virt_usb_model::clean(trouble)),
            Tone::Bad,
            columns,
        ),
        None => Line::of(
            &format!("virt-usb watch  {}  {}", view.host, view.summary()),
            Tone::Head,
            columns,
        ),
    }
}

/// Puts `right` at the end of the line if there is room.
fn apart(left: &str, right: &str, columns: usize) -> String {
    match columns.checked_sub(left.width() + right.width()) {
        Some(room) if room > 1 => format!("{left}{}{right}", " ".repeat(room)),
        _ => left.to_owned(),
    }
}

const HEADER: [&str; 7] = ["ID", "USB ID", "NAME", "PORT", "STATUS", "HELD BY", "SINCE (UTC)"];
/// Columns that get narrower if there is no room, each with its minimum width in cells.
const SHRINK: [(usize, usize); 3] = [(2, 10), (5, 8), (4, 11)];
/// Columns to drop on a narrow terminal, in that order.
const DROP: [usize; 4] = [6, 3, 1, 2];

/// Returns the heading, and `count` rows that begin at `from`.
fn devices(view: &View, from: usize, count: usize, columns: usize) -> Vec<Line> {
    let rows = view.devices(from, count);
    if rows.is_empty() {
        let none = "the inventory holds no device: plug one in";
        return vec![Line::default(), Line::of(none, Tone::Quiet, columns)];
    }
    let mut widths = HEADER.map(UnicodeWidthStr::width);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(&row.cells) {
            *width = (*width).max(cell.width());
        }
    }
    let shown = narrow(&mut widths, columns);
    let line = |cells: &[String; 7], tone: Tone| {
        let mut spans = Vec::new();
        for column in shown.iter().copied() {
            // Only the status is coloured, so that it stands out.
            let tone = if tone == Tone::Head || column == 4 { tone } else { Tone::Plain };
            spans.push((pad(&cells[column], widths[column]), tone));
            spans.push(("  ".to_owned(), Tone::Plain));
        }
        clip(spans, columns)
    };
    let head = line(&HEADER.map(str::to_owned), Tone::Head);
    std::iter::once(head).chain(rows.iter().map(|row| line(&row.cells, row.tone))).collect()
}

/// Makes the columns fit, and returns the visible ones.
fn narrow(widths: &mut [usize; 7], columns: usize) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..widths.len()).collect();
    let mut dropped = DROP.into_iter();
    loop {
        let total: usize = shown.iter().map(|c| widths[*c] + 2).sum::<usize>().saturating_sub(2);
        let mut excess = total.saturating_sub(columns);
        for (column, least) in SHRINK {
            if shown.contains(&column) {
                let by = excess.min(widths[column].saturating_sub(least));
                widths[column] -= by;
                excess -= by;
            }
        }
        match (excess, dropped.next()) {
            (0, _) | (_, None) => return shown,
            (_, Some(column)) => shown.retain(|c| *c != column),
        }
    }
}

fn clip(spans: Vec<(String, Tone)>, columns: usize) -> Line {
    let mut left = columns;
    let mut clipped = Vec::new();
    for (text, tone) in spans {
        let text = fit(&text, left);
        left -= text.width();
        clipped.push((text, tone));
    }
    Line(clipped)
}

/// Cuts a text to `columns`, and marks the cut with `…`.
fn fit(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let mut fitted = String::new();
    let mut left = columns.saturating_sub(1);
    for c in text.chars() {
        let width = c.width().unwrap_or(0);
        if width > left {
            break;
        }
        left -= width;
        fitted.push(c);
    }
    if columns > 0 {
        fitted.push('\u{2026}');
    }
    fitted
}

/// Cuts or pads a text to exactly `columns`.
fn pad(text: &str, columns: usize) -> String {
    let mut padded = fit(text, columns);
    padded.push_str(&" ".repeat(columns.saturating_sub(padded.width())));
    padded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virt_usb_store::watch::Moment;

    use super::*;
    use crate::discovery::{Simulated, UsbSource};
    use crate::inventory::plan;

    /// A view of an inventory of `count` devices, with a problem of device 1 and a guest of this
    /// name.
    fn view(count: usize, domain: &str) -> View {
        let dir = tempfile::tempdir().unwrap();
        let mut store =
            virt_usb_store::Store::create(dir.path(), std::time::Duration::from_secs(5)).unwrap();
        let context = virt_usb_store::Context {
            boot_id: "b".into(),
            uptime: 1.0,
            pending_grace: 120.0,
            actor: "test".into(),
        };
        let devices: String = (1..=count)
            .map(|n| {
                format!(
                    "[[device]]\nport = \"1-{n}\"\nbus = 1\ndevice = {n}\nvendor \
                    = \"f0f0\"\nproduct = \"{n:04x}\"\nserial = \"S{n}\"\nproduct_name = \"鍵 key \
                    {n}\"\n"
                )
            })
            .collect();
        let snapshot = Simulated::parse(&devices).unwrap().snapshot();
        let nothing = (&Default::default(), &Default::default());
        store
            .reconcile(
                "host1",
                &Default::default(),
                snapshot.seen(nothing.1),
                |known| plan(&snapshot, known, nothing.0, nothing.1),
                &context,
            )
            .unwrap();
        let mut view = View::new("host1", "b".into());
        view.moment = store.moment(500).unwrap();
        if let Some(device) = view.moment.devices.first() {
            let instance = "6f3c9d7e-0b51-4a55-9a3e-0d3b8c1f2a01".parse().unwrap();
            view.moment.problems.push(virt_usb_store::problems::Problem {
                instance_uuid: instance,
                about: format!("device {}", device.entry.id),
                domain: domain.into(),
                since: "2026-11-25T20:40:33.123Z".into(),
                what: "it has no USB bus".into(),
            });
        }
        view
    }

    fn text(lines: &[Line]) -> Vec<String> {
        lines
            .iter()
            .map(|line| line.0.iter().map(|(text, _)| text.as_str()).collect::<String>())
            .collect()
    }

    fn at(view: &View, columns: u16, rows: u16) -> Vec<String> {
        text(&draw(view, Size { columns, rows }, &mut Scroll::default()))
    }

    #[test]
    fn all_is_on_a_screen_of_the_usual_size() {
        let shown = at(&view(3, "erp"), 100, 24);
        assert_eq!(shown[0], "virt-usb watch  host1  3 devices: 3 available");
        assert_eq!(shown[2].trim_end(), "1   f0f0:0001  鍵 key 1  1-1   available");
        assert_eq!(
            shown[5],
            "erp does not get device 1 (since 2026-11-25T20:40:33.123Z): it has no USB bus"
        );
        assert_eq!(shown[6], "EVENTS (UTC)");
        assert!(shown[9].contains("added           3"), "{shown:?}");
        assert!(shown[23].starts_with("q quit"), "{shown:?}");
    }

    #[test]
    fn what_matters_least_goes_first() {
        let view = view(3, "erp");
        let header = |columns| at(&view, columns, 24)[1].trim_end().to_owned();
        assert_eq!(header(80), "ID  USB ID     NAME      PORT  STATUS     HELD BY  SINCE (UTC)");
        assert_eq!(header(49), "ID  USB ID     NAME      PORT  STATUS     HELD BY");
        assert_eq!(header(34), "ID  NAME      STATUS     HELD BY");
        assert_eq!(header(24), "ID  STATUS     HELD BY");
    }

    #[test]
    fn it_scrolls_to_the_end_and_no_further() {
        let view = view(60, "erp");
        let size = Size { columns: 100, rows: 24 };
        let mut scroll = Scroll::default();
        let first = |scroll: &mut Scroll| {
            let shown = text(&draw(&view, size, scroll));
            (shown[2].split(' ').next().unwrap().to_owned(), shown[23].clone())
        };
        assert_eq!(first(&mut scroll).0, "1");
        scroll.by(By::Rows(-1), size);
        assert_eq!(first(&mut scroll).0, "1");
        scroll.by(By::Rows(3), size);
        assert_eq!(first(&mut scroll).0, "4");
        scroll.by(By::End, size);
        let (id, last) = first(&mut scroll);
        assert!(last.ends_with("-60 of 60"), "{last}");
        scroll.by(By::Pages(1), size);
        assert_eq!(first(&mut scroll).0, id);
        scroll.by(By::Start, size);
        assert_eq!(first(&mut scroll).0, "1");
    }

    #[test]
    fn trouble_stands_first() {
        let mut view = view(1, "erp");
        view.trouble = Some("it is\nbroken".into());
        assert_eq!(at(&view, 80, 24)[0], "NOT UP TO DATE: it is broken");
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 64,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn whatever_the_size_no_line_is_wider_and_none_too_many(
            count in 0_usize..40,
            columns in 1_u16..130,
            rows in 1_u16..60,
            by in -50_isize..50,
            domain in "\\PC{0,40}|[\\x00-\\x1f\\x7f-\\x9f]{1,8}",
        ) {
            let view = view(count, &domain);
            let size = Size { columns, rows };
            let mut scroll = Scroll::default();
            scroll.by(By::Rows(by), size);
            let lines = text(&draw(&view, size, &mut scroll));
            prop_assert_eq!(lines.len(), usize::from(rows));
            for line in &lines {
                prop_assert!(line.width() <= usize::from(columns), "{line:?}");
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
            prop_assert!(scroll.0 < count.max(1));
        }
    }

    #[test]
    fn an_empty_inventory_says_what_to_do() {
        let mut empty = view(0, "");
        empty.moment = Moment::default();
        assert_eq!(at(&empty, 80, 24)[2], "the inventory holds no device: plug one in");
    }
}
