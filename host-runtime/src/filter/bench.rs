//! `virt-usb filter bench`: generates a fleet, feeds it to a filter, and measures the answers.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use virt_usb_filter_host::{Error, Filter, Fleet, Moment, Options, Question, Session};
use virt_usb_model::{Flavor, ParseError, Status};

use super::fleet::{self, COMMON, RARE};

/// A measurement of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figure {
    /// Description of the measurement.
    pub what: &'static str,
    /// Minimum of all rounds, which excludes most other load of the machine.
    pub least: Duration,
    /// Median of all rounds.
    pub median: Duration,
    /// Number of matching hosts, if a question was asked.
    pub matched: Option<u32>,
}

/// The questions that are measured.
pub struct Questions {
    /// Question for a device that few hosts have.
    pub rare: Question,
    /// Question for two devices that half of the hosts have.
    pub common: Question,
    /// Question with three requests that match the same devices.
    pub overlapping: Question,
    /// Question with more requests than the filter decides by their subsets. Two of three requests
    /// match the same devices.
    pub many: Question,
}

impl Questions {
    /// Creates the questions.
    ///
    /// # Errors
    /// None, because the flavors are valid.
    pub fn new() -> Result<Self, ParseError> {
        // Every host is fresh, but the filter checks that.
        let ask = |devices: &str| {
            let flavor = Flavor::parse_lists(Some(devices), None)?;
            Ok(Question { moment: Some(Moment { now: 10, max_age: 10 }), ..Question::new(flavor) })
        };
        let kind = |id: virt_usb_model::UsbId| {
            format!(r#""vendor_id":"{}","product_id":"{}""#, id.vendor, id.product)
        };
        let six: Vec<String> = ["0x03", "0x08", "0x0b", "0xff"]
            .map(|class| format!(r#"{{"class":"{class}"}}"#))
            .into();
        let six =
            [six.join(","), format!(r#"{{"vendor_id":"{}"}},{{{}}}"#, COMMON.vendor, kind(COMMON))]
                .join(",");
        Ok(Self {
            many: ask(&format!("[{six}]"))?,
            rare: ask(&format!("[{{{}}}]", kind(RARE)))?,
            common: ask(&format!(r#"[{{{},"count":2}}]"#, kind(COMMON)))?,
            overlapping: ask(&format!(
                r#"[{{"vendor_id":"{}"}},{{{}}},{{"class":"vendor-specific"}}]"#,
                COMMON.vendor,
                kind(COMMON)
            ))?,
        })
    }
}

/// Measures the time from loading the file to the first answer about an empty fleet.
fn cold(filter: &Filter, question: &Question) -> anyhow::Result<[Figure; 2]> {
    let dir = std::env::temp_dir().join(format!("virt-usb-filter-bench-{}", std::process::id()));
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("cannot create the directory {}", dir.display()))?;
    let file = dir.join("filter.cwasm");
    let start = |path: &Path| {
        let options = Options { limits: filter.limits(), sha256: None };
        Filter::load(path, &options)?.session(&Fleet::new()).select(question, None, 1)?;
        Ok::<_, anyhow::Error>(())
    };
    let measured = filter.precompile().map_err(anyhow::Error::from).and_then(|code| {
        std::fs::write(&file, code).with_context(|| format!("cannot write {}", file.display()))?;
        Ok([
            rounds("cold start, component", 3, |_| start(filter.path()))?,
            rounds("cold start, precompiled", 20, |_| start(&file))?,
        ])
    });
    std::fs::remove_dir_all(&dir)?;
    measured
}

/// Measures `count` rounds of `act`.
pub fn rounds<T, E>(
    what: &'static str,
    count: u32,
    mut act: impl FnMut(u32) -> Result<T, E>,
) -> Result<Figure, E> {
    act(0)?;
    let mut times = Vec::new();
    for round in 0..count {
        let start = Instant::now();
        std::hint::black_box(act(round)?);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let at = |n: usize| times.get(n).copied().unwrap_or_default();
    Ok(Figure { what, least: at(0), median: at(times.len() / 2), matched: None })
}

/// Results of the benchmark.
pub struct Measured {
    /// Figures of the measurements.
    pub figures: Vec<Figure>,
    /// Memory of the filter's instance in bytes.
    pub memory: usize,
    /// Number of devices in the instance.
    pub devices: u64,
}

/// Runs the benchmark.
///
/// # Errors
/// If the filter fails.
pub fn measure(
    filter: &Filter,
    made: fleet::Fleet,
    say: &mut dyn FnMut(&str),
) -> Result<Measured, anyhow::Error> {
    let questions = Questions::new()?;
    say(&format!("making {} hosts with {} devices each", made.hosts, made.devices));
    let fleet = Fleet::new();
    for host in 0..made.hosts {
        fleet.put(&made.document(host), 5)?;
    }
    let mut session = filter.session(&fleet);
    let mut figures = vec![rounds("a fresh instance", 20, |_| {
        filter.session(&Fleet::new()).select(&questions.rare, None, 1)
    })?];
    figures.extend(cold(filter, &questions.rare)?);
    say("loading");
    let load = || filter.session(&fleet).select(&questions.rare, None, 1);
    figures.push(rounds("load all host documents", 3, |_| load())?);
    say("asking");
    let ask = |session: &mut Session, what, question: &Question, count| {
        let matched = session.select(question, None, 0)?.matched;
        let figure = rounds(what, count, |_| session.select(question, None, 100))?;
        Ok::<_, Error>(Figure { matched: Some(matched), ..figure })
    };
    figures.push(ask(&mut session, "select, rare kind", &questions.rare, 2000)?);
    figures.push(ask(&mut session, "select, common kind × 2, best 100", &questions.common, 1000)?);
    let matched = session.select(&questions.common, None, 0)?.matched;
    let counted = rounds("select, common kind × 2, counted", 1000, |_| {
        session.select(&questions.common, None, 0)
    })?;
    figures.push(Figure { matched: Some(matched), ..counted });
    figures.push(ask(
        &mut session,
        "select, overlapping requests, best 100",
        &questions.overlapping,
        200,
    )?);
    figures.push(ask(&mut session, "select, six requests, best 100", &questions.many, 20)?);
    figures.push(by_host(&mut session, made, &questions.common)?);
    figures.push(changes(&mut session, &fleet, made, &questions.rare)?);
    figures.push(replacements(&mut session, &fleet, made, &questions.rare)?);
    let statistics = session.statistics()?;
    Ok(Measured { figures, memory: session.memory(), devices: statistics.devices })
}

fn by_host(
    session: &mut Session,
    made: fleet::Fleet,
    question: &Question,
) -> Result<Figure, Error> {
    let names: Vec<String> = (0..made.hosts).map(fleet::Fleet::name).collect();
    let prepared = session.prepare(question.clone())?;
    let asked = rounds("ask host by host, all of them", 3, |_| {
        names.iter().try_for_each(|name| session.check(&prepared, name, 10).map(drop))
    });
    drop(prepared);
    asked
}

/// Measures many changes with the question that feeds them, and divides the time by their number.
fn changes(
    session: &mut Session,
    fleet: &Fleet,
    made: fleet::Fleet,
    question: &Question,
) -> Result<Figure, Error> {
    const MANY: u32 = 10_000;
    let last = |host| Some((fleet::Fleet::name(host), made.document(host).devices.last()?.id));
    let devices: Vec<_> = (0..MANY).filter_map(|n| last(n % made.hosts)).collect();
    let figure = rounds("one device changes state", 6, |round| {
        let status = if round % 2 == 0 { Status::Claimed } else { Status::Available };
        for (host, device) in &devices {
            fleet.set_status(host, *device, status);
        }
        session.select(question, None, 1)
    })?;
    Ok(share(figure, MANY))
}

fn replacements(
    session: &mut Session,
    fleet: &Fleet,
    made: fleet::Fleet,
    question: &Question,
) -> Result<Figure, anyhow::Error> {
    const MANY: u32 = 1_000;
    let documents: Vec<_> = (0..MANY).map(|n| made.document(n % made.hosts)).collect();
    let texts = documents.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
    let figure = rounds("one host is replaced", 6, |round| {
        for text in &texts {
            fleet.put_text(text, 5 + u64::from(round % 2))?;
        }
        session.select(question, None, 1)?;
        Ok::<_, anyhow::Error>(())
    })?;
    Ok(share(figure, MANY))
}

/// Divides a figure by the number of operations in a round.
pub fn share(figure: Figure, of: u32) -> Figure {
    Figure { least: figure.least / of, median: figure.median / of, ..figure }
}
