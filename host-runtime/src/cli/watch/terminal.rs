//! The terminal: raw mode, keys, drawing, and restoring it at the end.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossterm::style::{Attribute, Color, Print, SetAttribute, SetForegroundColor};
use crossterm::{cursor, queue, terminal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH};
use signal_hook::{flag, low_level};

use super::screen::{By, Line};
use super::view::Tone;
use crate::cli::output::Output;

/// Timeout for the rest of a key's bytes, which arrive together except on a slow line. A lone
/// Escape is a key as well.
const KEY_TIMEOUT: Duration = Duration::from_millis(100);
/// Maximum length of a key, in bytes.
const MAX_KEY_BYTES: usize = 64;

/// An action of the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    Scroll(By),
    /// Stop the process, so that the shell has its terminal.
    Suspend,
    /// The terminal has another size, or something else has written on it.
    Redraw,
}

/// A terminal in raw mode, on its other screen.
pub(super) struct Terminal<'a> {
    out: &'a Output,
    /// Lines that are displayed.
    shown: Vec<Line>,
    /// Actions that were not handled yet.
    pending: VecDeque<Action>,
    /// Bytes of an incomplete key.
    unfinished: Vec<u8>,
    colour: bool,
    quit: Arc<AtomicBool>,
    suspend: Arc<AtomicBool>,
    resumed: Arc<AtomicBool>,
    resized: Arc<AtomicBool>,
}

impl<'a> Terminal<'a> {
    pub(super) fn open(out: &'a Output) -> anyhow::Result<Self> {
        let flags: [Arc<AtomicBool>; 4] = Default::default();
        let [quit, suspend, resumed, resized] = flags;
        for signal in [SIGTERM, SIGHUP, SIGINT, SIGQUIT] {
            // A second signal ends the program at once: a stopped terminal accepts no output, not
            // even to restore it.
            flag::register_conditional_shutdown(signal, 1, Arc::clone(&quit))?;
            flag::register(signal, Arc::clone(&quit))?;
        }
        flag::register(SIGTSTP, Arc::clone(&suspend))?;
        flag::register(SIGCONT, Arc::clone(&resumed))?;
        flag::register(SIGWINCH, Arc::clone(&resized))?;
        // A panic aborts (virt_usb_config::panics) and drops nothing. Restore the terminal first,
        // so that the message stays visible.
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            drop(restore(&Output::new(false)));
            told(info);
        }));
        // <https://no-color.org>
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let terminal = Self {
            out,
            shown: Vec::new(),
            pending: VecDeque::new(),
            unfinished: Vec::new(),
            colour,
            quit,
            suspend,
            resumed,
            resized,
        };
        terminal.take().context("cannot take the terminal: add --lines")?;
        Ok(terminal)
    }

    fn take(&self) -> anyhow::Result<()> {
        terminal::enable_raw_mode()?;
        let mut bytes = Vec::new();
        queue!(bytes, terminal::EnterAlternateScreen, cursor::Hide, terminal::DisableLineWrap)?;
        self.out.raw(&bytes)
    }

    /// Columns and rows.
    pub(super) fn size(&self) -> (u16, u16) {
        terminal::size()
            .ok()
            .filter(|(columns, rows)| *columns > 0 && *rows > 0)
            .unwrap_or((80, 24))
    }

    /// Writes the lines that changed, in one write.
    pub(super) fn show(&mut self, lines: &[Line]) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        queue!(bytes, terminal::BeginSynchronizedUpdate)?;
        if self.shown.len() != lines.len() {
            queue!(bytes, terminal::Clear(terminal::ClearType::All))?;
            self.shown = vec![Line::default(); lines.len()];
        }
        let unchanged = bytes.len();
        for ((row, line), shown) in (0..).zip(lines).zip(&mut self.shown) {
            if line != shown {
                queue!(bytes, cursor::MoveTo(0, row))?;
                write_line(&mut bytes, line, self.colour)?;
                queue!(bytes, terminal::Clear(terminal::ClearType::UntilNewLine))?;
                shown.clone_from(line);
            }
        }
        if bytes.len() == unchanged {
            return Ok(());
        }
        queue!(bytes, terminal::EndSynchronizedUpdate)?;
        self.out.raw(&bytes)
    }

    /// Waits for `timeout`, or until the user acts.
    pub(super) fn next_action(&mut self, timeout: Duration) -> anyhow::Result<Option<Action>> {
        let end = Instant::now() + timeout;
        loop {
            if self.quit.load(Ordering::Relaxed) {
                return Ok(Some(Action::Quit));
            }
            if self.suspend.swap(false, Ordering::Relaxed) {
                return self.stop().map(Some);
            }
            let resumed = self.resumed.swap(false, Ordering::Relaxed);
            if resumed {
                self.take()?;
            }
            if self.resized.swap(false, Ordering::Relaxed) || resumed {
                self.shown.clear();
                return Ok(Some(Action::Redraw));
            }
            match self.pending.pop_front() {
                Some(Action::Suspend) => return self.stop().map(Some),
                Some(Action::Redraw) => self.shown.clear(),
                Some(action) => return Ok(Some(action)),
                None => {}
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.listen(left)?;
        }
    }

    /// Reads keys that arrive within `timeout`. The end of the terminal means to quit.
    ///
    /// Reads the terminal without crossterm's own parser, which loops at the end of a closed
    /// terminal.
    fn listen(&mut self, timeout: Duration) -> anyhow::Result<()> {
        let keys = io::stdin();
        let mut ends = [PollFd::new(&keys, PollFlags::IN)];
        let timeout = if self.unfinished.is_empty() { timeout } else { KEY_TIMEOUT };
        match poll(&mut ends, Some(&Timespec::try_from(timeout)?)) {
            Ok(0) => {
                self.pending.extend(lone_escape(&mut self.unfinished));
                return Ok(());
            }
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
        let mut bytes = [0; 1024];
        match rustix::io::read(&keys, &mut bytes) {
            // EIO is how Linux says that a terminal was hung up.
            Ok(0) | Err(_) => self.pending.push_back(Action::Quit),
            Ok(read) => {
                self.unfinished.extend(&bytes[..read]);
                self.pending.extend(actions(&mut self.unfinished));
            }
        }
        Ok(())
    }

    /// Stops the process, as Ctrl-Z does, and takes the terminal again when it continues.
    fn stop(&mut self) -> anyhow::Result<Action> {
        restore(self.out)?;
        low_level::emulate_default_handler(SIGTSTP)?;
        self.resumed.store(false, Ordering::Relaxed);
        self.take()?;
        self.shown.clear();
        Ok(Action::Redraw)
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        // A closed terminal cannot be restored.
        drop(restore(self.out));
    }
}

fn restore(out: &Output) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    queue!(
        bytes,
        terminal::EndSynchronizedUpdate,
        SetAttribute(Attribute::Reset),
        terminal::EnableLineWrap,
        cursor::Show,
        terminal::LeaveAlternateScreen
    )?;
    let written = out.raw(&bytes);
    terminal::disable_raw_mode()?;
    written
}

/// Parses keys as xterm and its relatives send them. An incomplete key stays in the buffer. See
/// <https://invisible-island.net/xterm/ctlseqs/ctlseqs.html>, "Special Keyboard Keys".
fn actions(typed: &mut Vec<u8>) -> Vec<Action> {
    let mut found = Vec::new();
    let mut bytes = typed.as_slice();
    while let Some(length) = key_length(bytes) {
        let (key, after) = bytes.split_at(length);
        bytes = after;
        found.extend(match key {
            b"q" | b"\x03" | b"\x04" | b"\x1c" => Some(Action::Quit),
            b"\x1a" => Some(Action::Suspend),
            b"\x0c" => Some(Action::Redraw),
            b"k" | b"\x1b[A" | b"\x1bOA" => Some(Action::Scroll(By::Rows(-1))),
            b"j" | b"\x1b[B" | b"\x1bOB" => Some(Action::Scroll(By::Rows(1))),
            b"\x1b[5~" => Some(Action::Scroll(By::Pages(-1))),
            b" " | b"\x1b[6~" => Some(Action::Scroll(By::Pages(1))),
            b"g" | b"\x1b[H" | b"\x1bOH" | b"\x1b[1~" | b"\x1b[7~" => {
                Some(Action::Scroll(By::Start))
            }
            b"G" | b"\x1b[F" | b"\x1bOF" | b"\x1b[4~" | b"\x1b[8~" => Some(Action::Scroll(By::End)),
            _ => None,
        });
    }
    *typed = bytes.to_vec();
    found
}

/// Length of the first key in bytes; `None` if there is none, or only its beginning.
fn key_length(bytes: &[u8]) -> Option<usize> {
    match *bytes {
        [] | [0x1b] | [0x1b, b'O'] => None,
        [0x1b, b'[', ref rest @ ..] => match rest.iter().position(|b| (0x40..0x7f).contains(b)) {
            Some(last) => Some(last + 3),
            None => (bytes.len() > MAX_KEY_BYTES).then_some(bytes.len()),
        },
        [0x1b, b'O', _, ..] => Some(3),
        // Alt and a key, which means nothing here. Escape twice is Escape.
        [0x1b, 0x1b, ..] => Some(1),
        [0x1b, _, ..] => Some(2),
        _ => Some(1),
    }
}

/// The action of an incomplete key after the timeout: a lone Escape quits.
fn lone_escape(unfinished: &mut Vec<u8>) -> Option<Action> {
    (std::mem::take(unfinished) == b"\x1b").then_some(Action::Quit)
}

fn write_line(bytes: &mut Vec<u8>, line: &Line, colour: bool) -> io::Result<()> {
    for (text, tone) in &line.0 {
        match tone {
            Tone::Plain => {}
            Tone::Head => queue!(bytes, SetAttribute(Attribute::Bold))?,
            Tone::Quiet => queue!(bytes, SetAttribute(Attribute::Dim))?,
            Tone::Free if colour => queue!(bytes, SetForegroundColor(Color::DarkGreen))?,
            Tone::Held if colour => queue!(bytes, SetForegroundColor(Color::DarkCyan))?,
            Tone::Bad if colour => queue!(bytes, SetForegroundColor(Color::DarkRed))?,
            Tone::Bad => queue!(bytes, SetAttribute(Attribute::Bold))?,
            Tone::Free | Tone::Held => {}
        }
        queue!(bytes, Print(text))?;
        if *tone != Tone::Plain {
            queue!(bytes, SetAttribute(Attribute::Reset))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parsed keys, and the bytes that are left.
    fn parsed(typed: &[u8]) -> (Vec<Action>, Vec<u8>) {
        let mut typed = typed.to_vec();
        let found = actions(&mut typed);
        (found, typed)
    }

    #[test]
    fn keys_are_told_apart_however_many_come_at_once() {
        use Action::{Quit, Scroll, Suspend};
        let all = [
            Scroll(By::Rows(-1)),
            Scroll(By::Rows(1)),
            Scroll(By::Pages(1)),
            Scroll(By::Start),
            Scroll(By::End),
            Suspend,
        ];
        let typed = b"\x1b[Aj\x1b[6~\x1bOH\x1b[1;5Cx\xc3\xa9G\x1a";
        assert_eq!(parsed(typed), (all.to_vec(), vec![]));
        assert_eq!(parsed(b"\x1bxq"), (vec![Quit], vec![]), "Alt-x is not Escape");
        assert_eq!(parsed(b"\x1b[200\x01"), (vec![], b"\x1b[200\x01".to_vec()));
        assert_eq!(
            parsed(&[b"\x1b[".as_slice(), &[b'0'; 100]].concat()),
            (vec![], vec![]),
            "it has an end"
        );
    }

    #[test]
    fn keys_that_come_in_pieces_are_what_they_are_whole() {
        let whole = b"\x1b[Aj\x1b[6~\x1bOH\x1b[1;5CxG";
        for cut in 0..whole.len() {
            let (first, mut typed) = parsed(&whole[..cut]);
            typed.extend(&whole[cut..]);
            let (second, left) = parsed(&typed);
            assert_eq!(([first, second].concat(), left), parsed(whole), "cut at {cut}");
        }
    }

    #[test]
    fn a_lone_escape_is_a_key_once_nothing_follows() {
        let (none, mut typed) = parsed(b"\x1b");
        assert_eq!((none, lone_escape(&mut typed)), (vec![], Some(Action::Quit)));
        for unfinished in [&b"\x1b["[..], b"\x1bO", b"\x1b[1;5", b""] {
            assert_eq!(lone_escape(&mut unfinished.to_vec()), None, "{unfinished:?}");
        }
    }
}
