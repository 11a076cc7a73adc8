//! The scheduler's filter over 50 000 hosts with 20 devices each: in the sandbox, and the same
//! engine natively beside it.

use std::time::Duration;

use anyhow::{Context, Result};
use virt_usb::filter::bench::{self, Figure, Questions, rounds};
use virt_usb::filter::fleet::Fleet;
use virt_usb_filter_core::Inventory;
use virt_usb_filter_host::{Filter, Options, Question};
use virt_usb_model::{DeviceId, Status};

use crate::program::Programs;
use crate::table::Table;

const MADE: Fleet = Fleet { hosts: 50_000, devices: 20 };

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    let filter = Filter::load(&programs.filter, &Options::default())?;
    let sandbox = bench::measure(&filter, MADE, &mut |_| {})?;
    let native = native()?;
    let find = |figures: &[Figure], what: &str| {
        figures
            .iter()
            .find(|f| f.what == what)
            .copied()
            .with_context(|| format!("{what} was not measured"))
    };
    for (what, reach) in [
        ("select, rare kind", "≤ 5 µs, ≤ 1.5 ×"),
        ("select, common kind × 2, best 100", "≤ 100 µs, ≤ 1.2 ×"),
        ("select, common kind × 2, counted", "≤ 100 µs, ≤ 1.2 ×"),
        ("select, overlapping requests, best 100", "≤ 2 ms, ≤ 1.6 ×"),
        ("one device changes state", "≤ 1 µs"),
        ("one host is replaced", "≤ 40 µs"),
        ("load all host documents", "≤ 1 s"),
    ] {
        let (ours, theirs) = (find(&sandbox.figures, what)?, find(&native, what)?);
        if ours.matched != theirs.matched {
            anyhow::bail!(
                "{what}: {:?} in the sandbox, {:?} natively",
                ours.matched,
                theirs.matched
            );
        }
        let times = ours.least.as_secs_f64() / theirs.least.as_secs_f64();
        table.row(
            &format!("filter, 1 M devices: {what}"),
            shown(&ours),
            &format!("native: {}", shown(&theirs)),
            &format!("{times:.2} ×"),
            reach,
        );
    }
    let cold = find(&sandbox.figures, "cold start, precompiled")?;
    table.row("filter: cold start, precompiled", shown(&cold), "", "", "≤ 1 ms");
    let cold = find(&sandbox.figures, "cold start, component")?;
    table.row("filter: cold start, compiled first", shown(&cold), "", "", "");
    let by_host = find(&sandbox.figures, "ask host by host, all of them")?;
    table.row("filter: 50 000 hosts asked one by one", shown(&by_host), "", "", "");
    let bytes = sandbox.memory as f64 / sandbox.devices as f64;
    table.row(
        "filter: memory of the instance a device",
        format!("{bytes:.1} bytes"),
        "",
        "",
        "≤ 100 bytes",
    );
    Ok(())
}

fn shown(figure: &Figure) -> String {
    format!("{} (median {})", micros(figure.least), micros(figure.median))
}

fn micros(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    if us >= 10_000.0 { format!("{:.1} ms", us / 1000.0) } else { format!("{us:.2} µs") }
}

/// The same without the sandbox.
fn native() -> Result<Vec<Figure>> {
    let documents = (0..MADE.hosts).map(|host| serde_json::to_string(&MADE.document(host)));
    let documents = documents.collect::<Result<Vec<_>, _>>()?;
    let chunks: Vec<String> = documents.chunks(25).map(|chunk| chunk.join("\n")).collect();
    let load = || {
        let mut inventory = Inventory::new();
        for chunk in &chunks {
            inventory.load(chunk, 5);
        }
        inventory
    };
    let mut figures =
        vec![rounds("load all host documents", 3, |_| Ok::<_, anyhow::Error>(load()))?];
    let mut inventory = load();
    let questions = Questions::new()?;
    let ask = |what, question: &Question, limit, count| -> Result<Figure> {
        let matched = Some(inventory.select(question, None, 0)?.matched);
        Ok(Figure { matched, ..rounds(what, count, |_| inventory.select(question, None, limit))? })
    };
    figures.push(ask("select, rare kind", &questions.rare, 100, 2000)?);
    figures.push(ask("select, common kind × 2, best 100", &questions.common, 100, 1000)?);
    figures.push(ask("select, common kind × 2, counted", &questions.common, 0, 1000)?);
    figures.push(ask("select, overlapping requests, best 100", &questions.overlapping, 100, 200)?);
    let names: Vec<(String, DeviceId)> = (0..10_000)
        .filter_map(|host| Some((Fleet::name(host), MADE.document(host).devices.last()?.id)))
        .collect();
    let states = rounds("one device changes state", 6, |round| {
        let status = if round % 2 == 0 { Status::Claimed } else { Status::Available };
        names
            .iter()
            .try_for_each(|(host, device)| inventory.set_status(host, *device, status).map(drop))
    })?;
    figures.push(bench::share(states, 10_000));
    let replaced = rounds("one host is replaced", 6, |round| {
        for document in &documents[..1000] {
            inventory.load(document, 5 + u64::from(round % 2));
        }
        Ok::<_, anyhow::Error>(())
    })?;
    figures.push(bench::share(replaced, 1000));
    Ok(figures)
}
