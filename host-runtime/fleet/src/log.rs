//! Logging and argument parsing of the long-running programs.

use std::fmt::Debug;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use tracing::field::{DisplayValue, Field, Value, Visit, display};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Starts logging. If systemd has connected stderr to the journal (`JOURNAL_STREAM`,
/// systemd.exec(5)), the log goes to the journal, otherwise to stderr.
pub fn start(level: Level) {
    let registry = tracing_subscriber::registry().with(LevelFilter::from_level(level));
    match is_journal().then(tracing_journald::layer).and_then(Result::ok) {
        Some(journal) => registry.with(Cleaned(journal)).init(),
        None => {
            let plain = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_target(false)
                .with_ansi(false);
            registry.with(Cleaned(plain)).init();
        }
    }
}

/// Returns the exit status of a long-running program. Logs an error with all its causes.
pub fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let chain: Vec<String> = e.chain().map(ToString::to_string).collect();
            tracing::error!("{}", chain.join(": "));
            ExitCode::FAILURE
        }
    }
}

/// Whether `JOURNAL_STREAM` refers to this process's stderr. A program that a service starts
/// inherits the variable, and may have another stderr.
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let stderr = std::io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let ours = stderr
        .and_then(|file| file.metadata())
        .map(|found| format!("{}:{}", found.dev(), found.ino()));
    ours.is_ok_and(|ours| stream == *ours)
}

/// Layer that removes control characters from the texts of events. Names in them come from devices,
/// guests, tenants and other hosts.
struct Cleaned<L>(L);

impl<S: Subscriber, L: Layer<S>> Layer<S> for Cleaned<L> {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let fields = event.metadata().fields();
        let mut texts = Texts(std::iter::repeat_with(|| None).take(fields.len()).collect());
        event.record(&mut texts);
        let values: Vec<Option<&dyn Value>> =
            texts.0.iter().map(|text| text.as_ref().map(Text::value)).collect();
        self.0.on_event(&Event::new(event.metadata(), &fields.value_set_all(&values)), context);
    }
    // Only other crates use spans.
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        self.0.on_new_span(attributes, id, context);
    }
    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        self.0.on_record(id, values, context);
    }
}

/// Text of a field, ready to be written.
enum Text {
    /// A string, which is written in quotes.
    Quoted(String),
    /// Text of any other value.
    Plain(DisplayValue<String>),
}

impl Text {
    fn value(&self) -> &dyn Value {
        match self {
            Self::Quoted(text) => text,
            Self::Plain(text) => text,
        }
    }
}

/// The texts of an event's fields, by the fields' positions.
struct Texts(Vec<Option<Text>>);

impl Texts {
    fn set(&mut self, field: &Field, text: Text) {
        if let Some(place) = self.0.get_mut(field.index()) {
            *place = Some(text);
        }
    }
}

impl Visit for Texts {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, Text::Quoted(virt_usb_model::clean(value)));
    }
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.set(field, Text::Plain(display(virt_usb_model::clean(&format!("{value:?}")))));
    }
}

/// Parses the program's arguments. Removes control characters from clap's messages, because they
/// quote the arguments.
///
/// # Errors
/// The exit status, if the arguments are invalid. The message was printed.
pub fn arguments<T: clap::Parser>() -> Result<T, ExitCode> {
    match T::try_parse() {
        Ok(arguments) => Ok(arguments),
        Err(e) if e.use_stderr() => {
            let text = virt_usb_model::clean_lines(e.render().to_string().trim_end());
            // An error here means that stderr is closed.
            drop(writeln!(std::io::stderr(), "{text}"));
            Err(ExitCode::from(2))
        }
        // Help or version, as requested.
        Err(e) => e.exit(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_entry_is_one_line_without_control_characters() {
        let written = Written::default();
        let writer = written.clone();
        let plain = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_target(false)
            .without_time()
            .with_ansi(false);
        let subscriber = tracing_subscriber::registry().with(Cleaned(plain));
        let name = "a\x1b[2J\u{9b}\u{202e}\nb";
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(name, shown = %name, number = 5, none = None::<u8>, "{name} is there");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let clean = "a\u{fffd}[2J\u{fffd}\u{fffd} b";
        assert_eq!(text, format!(" WARN {clean} is there name={clean:?} shown={clean} number=5\n"));
    }
}
