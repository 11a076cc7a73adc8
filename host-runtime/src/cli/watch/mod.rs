//! The command `watch`: a screen on a terminal, otherwise one line per event.
//!
//! ```text
//! store::watch ─► View ─► Screen ─► Terminal        View and Screen are pure
//!                            └─► lines; those that changed are written, in one write
//! ```

mod screen;
mod terminal;
mod view;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virt_usb_model::{clean, clean_json};
use virt_usb_store::events::{EventRow, Filter};
use virt_usb_store::watch::Watched;

use super::arguments::Watch;
use super::output::{Output, complain};
use super::{Session, chain};
use crate::inventory::host_name;
use crate::timeouts::COMMAND_LOCK_TIMEOUT;
use screen::{Scroll, Size};
use terminal::{Action, Terminal};
use view::View;

/// Time between two checks for changes. A check reads a counter in SQLite's shared memory, which
/// takes microseconds.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Maximum number of events on the screen.
const MAX_EVENTS: u32 = 500;

pub(super) fn run(session: &Session, options: &Watch) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    let mut watched = Watched::open(&config.state_dir, COMMAND_LOCK_TIMEOUT)?;
    let is_screen = io::stdin().is_terminal()
        && io::stdout().is_terminal()
        && std::env::var_os("TERM").is_some_and(|term| term != "dumb");
    if options.lines || session.out.is_json() || !is_screen {
        return lines(&session.out, &mut watched, options.last);
    }
    let boot_id = session.context(&config, "watch")?.boot_id;
    let mut view = View::new(&host_name(&config.procfs_root)?, boot_id);
    // Report an unreadable inventory before the screen hides the message.
    view.moment = watched.store().moment(MAX_EVENTS)?;
    let mut terminal = Terminal::open(&session.out)?;
    screen(&mut terminal, &mut watched, &mut view)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs until the user quits, or the terminal is closed.
fn screen(
    terminal: &mut Terminal<'_>,
    watched: &mut Watched,
    view: &mut View,
) -> anyhow::Result<()> {
    let mut scroll = Scroll::default();
    let mut looked = None::<Instant>;
    loop {
        // Read the inventory at most once per interval, also while a key is held down.
        if looked.is_none_or(|at| at.elapsed() >= POLL_INTERVAL) {
            look(watched, view);
            looked = Some(Instant::now());
        }
        let (columns, rows) = terminal.size();
        let size = Size { columns, rows };
        let lines = screen::draw(view, size, &mut scroll);
        terminal.show(&lines)?;
        match terminal.next_action(POLL_INTERVAL)? {
            Some(Action::Quit) => return Ok(()),
            Some(Action::Scroll(by)) => scroll.by(by, size),
            Some(Action::Redraw | Action::Suspend) | None => {}
        }
    }
}

/// Updates the view. If the inventory cannot be read, the screen keeps the last state and says so.
fn look(watched: &mut Watched, view: &mut View) {
    let news = watched.has_news().and_then(|news| match news {
        true => watched.store().moment(MAX_EVENTS).map(Some),
        false => Ok(None),
    });
    match news {
        Ok(Some(moment)) => (view.moment, view.trouble) = (moment, None),
        Ok(None) => view.trouble = None,
        Err(e) => view.trouble = Some(chain(&e.into())),
    }
}

/// Prints each event as a line, until the reader of the output closes it.
fn lines(out: &Output, watched: &mut Watched, last: u32) -> anyhow::Result<ExitCode> {
    let mut events = if last == 0 { Vec::new() } else { watched.store().events(&newest(last))? };
    let mut told = match events.last() {
        Some(event) => Some(event.clone()),
        None => watched.store().events(&newest(1))?.pop(),
    };
    let mut behind = false;
    let mut trouble = None;
    loop {
        for event in &events {
            let line = if out.is_json() {
                clean_json(&serde_json::to_string(event)?)
            } else {
                line(event)
            };
            out.raw(format!("{line}\n").as_bytes())?;
        }
        if let Some(event) = events.pop() {
            told = Some(event);
        }
        if reader_has_gone()? {
            return Ok(ExitCode::SUCCESS);
        }
        events = match news(watched, &mut behind, told.as_ref()) {
            Ok(events) => {
                if trouble.take().is_some() {
                    warn("the inventory can be read again");
                }
                events
            }
            // The inventory may become readable again. Report each error once.
            Err(e) => {
                let why = chain(&e);
                if trouble.as_ref() != Some(&why) {
                    warn(&why);
                }
                trouble = Some(why);
                Vec::new()
            }
        };
    }
}

/// Returns the events since `told`. `behind` stays set if they cannot be read, so that the next
/// call reads them.
fn news(
    watched: &mut Watched,
    behind: &mut bool,
    told: Option<&EventRow>,
) -> anyhow::Result<Vec<EventRow>> {
    *behind |= watched.has_news()?;
    if !*behind {
        return Ok(Vec::new());
    }
    let events = since(watched, told)?;
    *behind = false;
    Ok(events)
}

/// Prints a warning for the user, and ignores errors.
fn warn(what: &str) {
    complain(&format!("virt-usb: watch: {what}"));
}

fn newest(limit: u32) -> Filter {
    Filter { limit, ..Filter::default() }
}

/// Returns the events after `told`. An inventory that was restored or rebuilt may count from an
/// earlier number, so events are also compared by time.
fn since(watched: &Watched, told: Option<&EventRow>) -> anyhow::Result<Vec<EventRow>> {
    let Some(told) = told else { return Ok(watched.store().events(&Filter::default())?) };
    let mut events = watched.store().events(&Filter { after: told.id - 1, ..Filter::default() })?;
    if events.first() == Some(told) {
        events.remove(0);
        return Ok(events);
    }
    events = watched.store().events(&Filter::default())?;
    events.retain(|event| event.at > told.at);
    Ok(events)
}

/// Waits for the next refresh; true as soon as the reader of stdout has closed it.
fn reader_has_gone() -> anyhow::Result<bool> {
    let stdout = io::stdout();
    // No events are requested: poll always reports that the other end is closed.
    let mut ends = [PollFd::new(&stdout, PollFlags::empty())];
    let beat = Timespec::try_from(POLL_INTERVAL)?;
    match poll(&mut ends, Some(&beat)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(false),
        Ok(_) => {
            Ok(ends[0].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL))
        }
        Err(e) => Err(io::Error::from(e).into()),
    }
}

/// `2026-11-25T20:40:33.123Z claimed device 1 erp by hook prepare: usb_devices[0]`
fn line(event: &EventRow) -> String {
    let mut line = format!("{} {}", event.at, event.event);
    if let Some(device) = event.device_id {
        line.push_str(&format!(" device {device}"));
    }
    let domain = event.domain.clone().or_else(|| event.instance_uuid.map(|i| i.to_string()));
    if let Some(domain) = domain {
        line.push_str(&format!(" {domain}"));
    }
    line.push_str(&format!(" by {}", event.actor));
    if let Some(detail) = &event.detail {
        line.push_str(&format!(": {detail}"));
    }
    clean(&line)
}
