//! The one place that writes to the standard output.

use std::io::{self, IsTerminal, Write};

use virt_usb_harness::story::{Paint, Story};
use virt_usb_harness::{Event, Report};

use crate::cli::Color;

/// A story for people, or a document for machines.
pub(crate) struct Ui {
    json: bool,
    paint: Paint,
    gone: bool,
}

impl Ui {
    pub(crate) fn new(json: bool, color: Color) -> Self {
        let paint = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                io::stdout().is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            }
        };
        Self { json, paint: Paint(paint), gone: false }
    }

    pub(crate) fn event(&mut self, event: &Event<'_>) {
        if !self.json {
            self.write(|story| story.tell(event));
        }
    }

    pub(crate) fn say(&mut self, line: &str) {
        if !self.json {
            self.write(|story| story.say(line));
        }
    }

    pub(crate) fn close(&mut self, report: &Report) -> io::Result<()> {
        if !self.json {
            self.write(|story| story.close(report));
            return Ok(());
        }
        let mut out = io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, report)?;
        writeln!(out)
    }

    /// A reader that has gone away (`| head`) does not end the run half-way.
    fn write(&mut self, tell: impl FnOnce(&mut Story<'_>) -> io::Result<()>) {
        let mut out = io::stdout().lock();
        if !self.gone {
            self.gone = tell(&mut Story::new(&mut out, self.paint)).is_err();
        }
    }
}
