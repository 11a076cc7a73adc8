//! The command `filter`: queries the scheduler's filter, as a scheduler does.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Serialize;
use virt_usb_filter_host::{
    Filter, Fleet, Limits, Placement, Question, Rejection, Session as Asked, Verdict, hex, sha256,
};
use virt_usb_fleet::filter_file::FilterFile;
use virt_usb_model::{DeviceEntry, DeviceId, Flavor, HostDocument, UniqueJson};
use virt_usb_store::user::User;

use super::Session;
use super::arguments::{Filter as Arguments, FilterVerb};
use super::output::{complain, table};
use crate::filter::{bench, fleet};

/// Exit status if no host can satisfy the flavor, which is an answer and not a failure.
const NO_HOST: u8 = 3;
/// Maximum size of a file of host documents, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 30;

pub(super) fn run(session: &Session, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match &arguments.verb {
        None => ask(session, arguments),
        Some(FilterVerb::Bench { hosts, devices, component }) => {
            measure(session, &load(component)?, fleet::Fleet { hosts: *hosts, devices: *devices })
        }
        Some(FilterVerb::Precompile { file, component }) => {
            precompile(session, &load(component)?, file)
        }
    }
}

/// Loads the filter with generous limits, because an operator waits for the command.
fn load(file: &FilterFile) -> anyhow::Result<Filter> {
    file.load(Limits { memory: 4 << 30, epoch: Duration::from_secs(10) })
}

/// Answer of the filter to a query.
#[derive(Serialize)]
struct Answer {
    flavor: Flavor,
    /// Number of hosts in the query.
    hosts: usize,
    /// Number of hosts that can satisfy the flavor, shown or not.
    matched: u32,
    placements: Vec<Chosen>,
    /// Rejected hosts, if they were requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    rejected: Option<Vec<Rejected>>,
    /// Number of other hosts for each reason.
    reasons: BTreeMap<String, usize>,
    problems: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Chosen {
    #[serde(flatten)]
    placement: Placement,
    devices: Vec<DeviceEntry>,
}

#[derive(Serialize)]
struct Rejected {
    host: String,
    #[serde(flatten)]
    rejection: Rejection,
    /// The rejection in words.
    because: String,
}

fn ask(session: &Session, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let flavor = flavor(session, arguments.flavor.as_deref().unwrap_or_default())?;
    let question = Question { project: arguments.project.clone(), ..Question::new(flavor.clone()) };
    let documents = documents(session, arguments.hosts.as_deref())?;
    let fleet = Fleet::new();
    for document in documents.values() {
        fleet.put(document, 0)?;
    }
    let mut asked = load(&arguments.component)?.session(&fleet);
    let selection = asked.select(&question, None, arguments.limit)?;
    let placements = selection.placements.into_iter();
    let placements = placements
        .map(|placement| chosen(&mut asked, &question, placement, &documents))
        .collect::<anyhow::Result<_>>()?;
    let (rejected, reasons) = others(&mut asked, &question, &fleet)?;
    // If no host can satisfy the flavor, the operator needs the reasons.
    let shown = arguments.explain || selection.matched == 0;
    let answer = Answer {
        flavor,
        hosts: documents.len(),
        matched: selection.matched,
        placements,
        rejected: shown.then_some(rejected),
        reasons,
        problems: asked.problems().clone(),
    };
    session.out.show(&answer, || text(&answer))?;
    Ok(if answer.matched == 0 { ExitCode::from(NO_HOST) } else { ExitCode::SUCCESS })
}

/// Reads a flavor that is JSON, or looks up the stored flavor of that name.
fn flavor(session: &Session, text: &str) -> anyhow::Result<Flavor> {
    match text.trim_start().bytes().next() {
        Some(b'{') => Flavor::parse(text).context("--flavor"),
        Some(b'[') => Flavor::parse_lists(Some(text), None).context("--flavor"),
        _ => {
            // A domain's metadata writes the name with an @.
            let name = text.strip_prefix('@').unwrap_or(text);
            match session.store()?.flavor(name)? {
                Some(stored) => Ok(stored.flavor),
                None => bail!("{}", super::named_resources::unknown::<Flavor>(name)),
            }
        }
    }
}

type Documents = BTreeMap<String, HostDocument>;

fn documents(session: &Session, file: Option<&Path>) -> anyhow::Result<Documents> {
    let Some(file) = file else {
        let own = session.store()?.host_document()?;
        let own = own.context(
            "the inventory knows no host yet: run 'virt-usb discover', or name a file with --hosts",
        )?;
        return Ok(Documents::from([(own.host.clone(), own)]));
    };
    let name = file.display();
    let mut text = String::new();
    let read = match file.as_os_str() == "-" {
        true => std::io::stdin().lock().take(MAX_FILE_BYTES).read_to_string(&mut text),
        false => std::fs::File::open(file)
            .and_then(|open| open.take(MAX_FILE_BYTES).read_to_string(&mut text)),
    };
    read.with_context(|| format!("cannot read the host documents of {name}"))?;
    read_documents(&text).with_context(|| format!("the host documents of {name}"))
}

/// Reads host documents: one after another, each on one or more lines, or as a list.
fn read_documents(text: &str) -> anyhow::Result<Documents> {
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut found = Documents::new();
    let mut take = |value: &serde_json::Value| {
        let number = found.len() + 1;
        let document = HostDocument::parse(&value.to_string())
            .with_context(|| format!("document {number}"))?;
        match found.insert(document.host.clone(), document) {
            None => Ok(()),
            Some(twice) => bail!("document {number}: the host {:?} appears twice", twice.host),
        }
    };
    for value in serde_json::Deserializer::from_str(text).into_iter::<UniqueJson>() {
        match value?.0 {
            serde_json::Value::Array(list) => list.iter().try_for_each(&mut take)?,
            one => take(&one)?,
        }
    }
    if found.is_empty() {
        bail!("found none: wanted JSON documents, such as 'virt-usb hosts --documents' prints");
    }
    Ok(found)
}

fn chosen(
    asked: &mut Asked,
    question: &Question,
    placement: Placement,
    documents: &Documents,
) -> anyhow::Result<Chosen> {
    let ids = match asked.explain(question, &placement.host)? {
        Verdict::Accepted { devices, .. } => devices,
        Verdict::Rejected(why) => {
            bail!(
                "the filter chooses {} and rejects it when asked about it alone: {why}",
                placement.host
            )
        }
    };
    let all = documents.get(&placement.host).map_or(&[][..], |document| &document.devices);
    let entry = |id: &DeviceId| all.iter().find(|device| device.id == *id).cloned();
    Ok(Chosen { devices: ids.iter().filter_map(entry).collect(), placement })
}

/// Returns the hosts that cannot satisfy the flavor, and their number for each reason.
fn others(
    asked: &mut Asked,
    question: &Question,
    fleet: &Fleet,
) -> anyhow::Result<(Vec<Rejected>, BTreeMap<String, usize>)> {
    let (mut rejected, mut reasons) = (Vec::new(), BTreeMap::new());
    let prepared = asked.prepare(question.clone())?;
    for host in fleet.hosts() {
        if let Verdict::Rejected(rejection) = asked.check(&prepared, &host, 0)? {
            *reasons.entry(rejection.reason.name().to_owned()).or_default() += 1;
            let because = rejection.to_string();
            rejected.push(Rejected { host, rejection, because });
        }
    }
    Ok((rejected, reasons))
}

fn text(answer: &Answer) -> String {
    let chosen = |(number, c): (usize, &Chosen)| {
        let devices: Vec<String> = c.devices.iter().map(device).collect();
        vec![
            (number + 1).to_string(),
            c.placement.host.clone(),
            c.placement.score.to_string(),
            devices.join(", "),
        ]
    };
    let rows = answer.placements.iter().enumerate().map(chosen).collect();
    let none = format!("none of {} host(s) can serve {}", answer.hosts, answer.flavor);
    let mut text = table(
        &["RANK", "HOST", "SCORE", "WOULD USE"],
        rows,
        if answer.matched == 0 { &none } else { "" },
    );
    if answer.matched > 0 {
        let shown = answer.placements.len();
        let best = if shown < answer.matched as usize {
            format!(", the best {shown} are shown")
        } else {
            String::new()
        };
        text.push_str(&format!(
            "\n\n{} of {} host(s) can serve{best}",
            answer.matched, answer.hosts
        ));
    }
    match &answer.rejected {
        Some(rejected) if !rejected.is_empty() => {
            let row = |r: &Rejected| {
                vec![r.host.clone(), r.rejection.reason.name().to_owned(), r.because.clone()]
            };
            let rows = rejected.iter().map(row).collect();
            text.push_str(&format!("\n\n{}", table(&["HOST", "WHY NOT", "BECAUSE"], rows, "")));
        }
        Some(_) => {}
        None if answer.reasons.is_empty() => {}
        None => {
            let each: Vec<String> =
                answer.reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
            text.push_str(&format!("; the others: {} (--explain says more)", each.join(", ")));
        }
    }
    for (host, why) in &answer.problems {
        text.push_str(&format!("\nnot read: {host}: {why}"));
    }
    text
}

fn device(entry: &DeviceEntry) -> String {
    let name = entry.product_name.as_deref().or(entry.manufacturer.as_deref());
    let name = name.map(|name| format!(" {name}")).unwrap_or_default();
    format!(
        "{} ({}:{}{name} at port {})",
        entry.id, entry.vendor_id, entry.product_id, entry.port_path
    )
}

#[derive(Serialize)]
struct Measured {
    hosts: u32,
    devices_each: u32,
    figures: Vec<Shown>,
    bytes_a_device: f64,
}

#[derive(Serialize)]
struct Shown {
    what: String,
    least_us: f64,
    median_us: f64,
    matched: Option<u32>,
}

fn measure(session: &Session, filter: &Filter, made: fleet::Fleet) -> anyhow::Result<ExitCode> {
    let mut say = |what: &str| {
        complain(&format!("virt-usb filter bench: {what}"));
    };
    let measured = bench::measure(filter, made, &mut say)?;
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let shown = |f: &bench::Figure| Shown {
        what: f.what.to_owned(),
        least_us: micros(f.least),
        median_us: micros(f.median),
        matched: f.matched,
    };
    let answer = Measured {
        hosts: made.hosts,
        devices_each: made.devices,
        figures: measured.figures.iter().map(shown).collect(),
        bytes_a_device: measured.memory as f64 / measured.devices.max(1) as f64,
    };
    session.out.show(&answer, || {
        let row = |f: &Shown| {
            let hosts = f.matched.map_or_else(|| "-".to_owned(), |n| n.to_string());
            vec![
                f.what.clone(),
                format!("{:.2} µs", f.least_us),
                format!("{:.2} µs", f.median_us),
                hosts,
            ]
        };
        let rows = answer.figures.iter().map(row).collect();
        let table = table(&["WHAT", "LEAST", "MEDIAN", "HOSTS THAT CAN SERVE"], rows, "");
        format!(
            "{} hosts with {} devices each\n\n{table}\n\n{:.1} bytes of the filter's memory a \
                device",
            made.hosts, made.devices, answer.bytes_a_device
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Precompiled {
    file: PathBuf,
    sha256: String,
    /// Digest of the component; none if the filter was already machine code.
    of: Option<String>,
}

/// Writes to a second file and renames it, so that no program loads half a file.
fn precompile(session: &Session, filter: &Filter, file: &Path) -> anyhow::Result<ExitCode> {
    let cannot = || format!("cannot write {}", file.display());
    let machine_code = filter.precompile()?;
    if file.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        bail!("{} exists and is not a regular file: name another", file.display());
    }
    if file
        .canonicalize()
        .ok()
        .is_some_and(|to| filter.path().canonicalize().is_ok_and(|from| from == to))
    {
        bail!("{} is the filter itself: name another file", file.display());
    }
    let name = file.file_name().with_context(|| format!("{} names no file", file.display()))?;
    let beside = file.with_file_name(format!(".{}.{}.part", name.display(), std::process::id()));
    let _owner = User::of_folder_of(file).and_then(User::enter).with_context(cannot)?;
    let written = write_new(&beside, &machine_code).and_then(|()| std::fs::rename(&beside, file));
    if written.is_err() {
        // If the file was not created, there is nothing to remove.
        drop(std::fs::remove_file(&beside));
    }
    written.with_context(cannot)?;
    let limits = virt_usb_filter_host::Options { limits: filter.limits(), sha256: None };
    Filter::load(file, &limits).context("what was written cannot be loaded")?;
    let of = filter.sha256().as_ref().map(hex);
    let done = Precompiled { file: file.to_owned(), sha256: hex(&sha256(&machine_code)), of };
    session.out.show(&done, || format!("written: {}\nSHA-256: {}", file.display(), done.sha256))?;
    Ok(ExitCode::SUCCESS)
}

/// Creates a new file that only the owner may write to; otherwise it would not be loaded.
fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_come_a_line_each_or_spread_or_as_a_list() {
        let one = |host: &str| {
            format!(
                r#"{{"version":1,"host":"{host}","compute_node_id":2,"revision":1,"devices":[]}}"#
            )
        };
        let lines = format!("{}\n\n{}\n", one("a"), one("b"));
        let list = format!("[{},\n{}]", one("a"), one("b"));
        let spread = lines.replace(',', ",\n  ");
        let marked = format!("\u{feff}{lines}");
        for text in [lines, list, spread, marked] {
            assert_eq!(read_documents(&text).unwrap().len(), 2, "{text}");
        }
        let error = |text: &str| format!("{:#}", read_documents(text).unwrap_err());
        assert!(
            error(&format!("{}{}", one("a"), one("a")))
                .contains("document 2: the host \"a\" appears twice")
        );
        assert!(error(&format!("{} {{}}", one("a"))).contains("document 2: version: found none"));
        assert!(error(" ").starts_with("found none: wanted JSON documents"));
        assert!(error("{").contains("EOF"));
    }
}
