//! Contents of the screen as rows of text. Pure.

use virt_usb_model::{EventKind, Status, clean};
use virt_usb_store::events::EventRow;
use virt_usb_store::watch::Moment;
use virt_usb_store::{ClaimRow, Record};

use crate::api::responses::Totals;
use crate::cli::claims::{in_the_way, state};
use crate::cli::devices::{name, status};

/// Meaning of a text, which its colour shows. The text says the same without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Tone {
    #[default]
    Plain,
    /// A less important text.
    Quiet,
    /// A heading of the table.
    Head,
    /// An available device.
    Free,
    /// A device that is held.
    Held,
    /// A device that needs an operator.
    Bad,
}

/// The known state, and the error that prevents an update.
pub(super) struct View {
    pub(super) host: String,
    boot_id: String,
    pub(super) moment: Moment,
    /// Why the inventory cannot be read now.
    pub(super) trouble: Option<String>,
}

/// A device's row.
pub(super) struct DeviceRow {
    /// ID, USB ID, NAME, PORT, STATUS, HELD BY, SINCE
    pub(super) cells: [String; 7],
    pub(super) tone: Tone,
}

impl View {
    pub(super) fn new(host: &str, boot_id: String) -> Self {
        Self { host: clean(host), boot_id, moment: Moment::default(), trouble: None }
    }

    /// `7 devices: 4 available, 2 allocated, 1 unavailable`
    pub(super) fn summary(&self) -> String {
        let Totals { total, available, claimed, allocated, removed, unavailable } =
            Totals::of(self.moment.devices.iter());
        let counts = [available, claimed, allocated, removed, unavailable];
        let counted: Vec<String> = counts
            .iter()
            .zip(Status::NAMES)
            .filter(|(count, _)| **count > 0)
            .map(|(count, name)| format!("{count} {name}"))
            .collect();
        let plural = if total == 1 { "" } else { "s" };
        let list =
            if counted.is_empty() { String::new() } else { format!(": {}", counted.join(", ")) };
        format!("{total} device{plural}{list}")
    }

    /// The rows from `from`, at most `count`. Of ten thousand devices, only the visible ones are
    /// formatted.
    pub(super) fn devices(&self, from: usize, count: usize) -> Vec<DeviceRow> {
        let row = |record: &Record| {
            let claim = self.moment.claims.iter().find(|c| c.device_id == record.entry.id);
            self.device(record, claim)
        };
        self.moment.devices.iter().skip(from).take(count).map(row).collect()
    }

    fn device(&self, record: &Record, claim: Option<&ClaimRow>) -> DeviceRow {
        let e = &record.entry;
        let is_late = |about: &str| about == crate::agent::plan::about_device(e.id);
        let is_stuck =
            self.moment.problems.iter().any(|p| {
                Some(p.instance_uuid) == claim.map(|c| c.instance_uuid) && is_late(&p.about)
            });
        let tone = match e.state() {
            Ok(Status::Available) => Tone::Free,
            Ok(Status::Claimed | Status::Allocated) if is_stuck => Tone::Bad,
            Ok(Status::Claimed | Status::Allocated) => Tone::Held,
            Ok(Status::Unavailable(_)) if record.is_set_aside() => Tone::Bad,
            Ok(Status::Unavailable(_)) => Tone::Quiet,
            Ok(Status::Removed) | Err(_) => Tone::Bad,
        };
        let status = match (claim, &record.flapping_until) {
            (Some(claim), _) => state(claim, !record.present, &self.boot_id),
            (None, Some(until)) => format!("{} until {}", status(record), to_the_second(until)),
            (None, None) => status(record),
        };
        let cells = [
            e.id.to_string(),
            record.usb().to_string(),
            name(e.manufacturer.as_deref(), e.product_name.as_deref()),
            e.port_path.to_string(),
            status,
            claim.map_or_else(String::new, |c| c.domain.clone()),
            claim.map_or_else(String::new, |c| to_the_second(&c.created_at)),
        ];
        DeviceRow { cells: cells.map(|cell| clean(&cell)), tone }
    }

    /// Problems that keep devices out of guests, one per line.
    pub(super) fn problems(&self) -> Vec<String> {
        self.moment.problems.iter().map(|p| clean(&in_the_way(p))).collect()
    }

    /// The newest `count` events, newest last, a line each.
    pub(super) fn events(&self, count: usize) -> Vec<(String, Tone)> {
        let events = &self.moment.events;
        events[events.len().saturating_sub(count)..].iter().map(event).collect()
    }
}

fn event(event: &EventRow) -> (String, Tone) {
    let domain = event.domain.clone().or_else(|| event.instance_uuid.map(|i| i.to_string()));
    let device = event.device_id.map_or_else(|| "-".to_owned(), |id| id.to_string());
    let text = format!(
        "{}  {:11}  {device:>4}  {:16}  {}{}",
        to_the_second(&event.at),
        event.event,
        domain.as_deref().unwrap_or("-"),
        event.actor,
        event.detail.as_ref().map_or_else(String::new, |detail| format!(": {detail}"))
    );
    let tone = match event.event.parse::<EventKind>() {
        Ok(kind) if kind.needs_attention() => Tone::Bad,
        Ok(_) | Err(_) => Tone::Plain,
    };
    (clean(&text), tone)
}

/// `2026-11-25T20:40:33.123Z` as `11-25 20:40:33`.
fn to_the_second(at: &str) -> String {
    match (at.get(5..10), at.get(11..19)) {
        (Some(day), Some(time)) => format!("{day} {time}"),
        _ => at.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::to_the_second;

    #[test]
    fn a_time_without_its_year_and_milliseconds() {
        assert_eq!(to_the_second("2026-11-25T20:40:33.123Z"), "11-25 20:40:33");
        assert_eq!(to_the_second("soon"), "soon");
    }
}
