//! docs/src/messages.md against the source: each row is a message of the source, and each message
//! has a row.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The words to look for, a list a row: all of a row's stand in its message.
fn rows() -> Vec<Vec<String>> {
    let text = fs::read_to_string(repository().join("docs/src/messages.md")).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix("| `"));
    lines
        .map(|line| {
            let cell = line.split(" | ").next().unwrap();
            let quoted =
                cell.split('`').enumerate().filter(|(n, _)| n % 2 == 0).map(|(_, words)| words);
            let parts = quoted.flat_map(|words| words.split("...")).map(str::trim);
            parts.filter(|words| !words.is_empty()).map(str::to_owned).collect()
        })
        .collect()
}

/// The product's source, without its tests; strings that go over several lines are one.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = [
        "hook/src",
        "host-runtime/config/src",
        "host-runtime/fleet/src",
        "host-runtime/src",
        "host-runtime/store/src",
        "host-runtime/domxml/src",
        "host-runtime/model/src",
    ]
    .map(|folder| repository().join(folder))
    .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
                found.push((path, joined(text)));
            }
        }
    }
    found
}

fn joined(text: &str) -> String {
    let mut parts = text.split("\\\n");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str(part.trim_start());
    }
    out
}

/// The first string that stands within a call.
fn string_after(text: &str) -> Option<String> {
    let begin = text.find(['"', ';']).filter(|at| text[*at..].starts_with('"') && *at < 120)? + 1;
    let mut literal = String::new();
    let mut characters = text[begin..].chars();
    loop {
        match characters.next()? {
            '"' => return Some(literal),
            '\\' => literal.push(characters.next()?),
            c => literal.push(c),
        }
    }
}

/// Without what stands for names and numbers.
fn words_of(literal: &str) -> usize {
    let outside =
        literal.split('{').map(|part| part.split_once('}').map_or(part, |(_, rest)| rest));
    outside.map(|part| part.trim().len()).sum()
}

#[test]
fn every_row_is_said_somewhere() {
    let sources = sources();
    let is_said = |words: &str| sources.iter().any(|(_, text)| text.contains(words));
    let mut unsaid: Vec<String> = rows().into_iter().flatten().collect();
    unsaid.retain(|words| !is_said(words));
    assert_eq!(unsaid, Vec::<String>::new(), "nothing says that");
}

#[test]
fn what_is_said_has_a_row() {
    const SAID_BY: [&str; 6] = ["refused(", ".warn(", "bail!(", "Failed(", "Refused(", "#[error("];
    let rows = rows();
    let (mut said, mut missing) = (0, Vec::new());
    for (path, text) in sources() {
        let name = path.to_string_lossy().into_owned();
        // The doctor says what to do itself; what is simulated is libvirt's; what is wrong in XML
        // or JSON is said behind one of the rows.
        let own = ["/doctor/", "/simulated", "/bench.rs", "/metrics/", "/domxml/", "/model/"];
        if own.iter().any(|part| name.contains(part)) {
            continue;
        }
        for call in SAID_BY {
            for (at, _) in text.match_indices(call) {
                let Some(literal) = string_after(&text[at + call.len()..]) else { continue };
                if words_of(&literal) < 8 {
                    continue;
                }
                said += 1;
                if !rows.iter().any(|row| row.iter().all(|words| literal.contains(words.as_str())))
                {
                    missing.push(format!("{name}: {literal}"));
                }
            }
        }
    }
    assert!(said > 50, "only {said} messages were found");
    assert!(missing.is_empty(), "docs/src/messages.md has no row for\n{}", missing.join("\n"));
}

#[test]
fn every_refusal_of_the_goldens_has_a_row() {
    let rows = rows();
    let (mut looked_at, mut missing) = (0, Vec::new());
    for case in fs::read_dir(repository().join("tests/suite/goldens")).unwrap() {
        for file in ["stderr", "prepare"] {
            let Ok(text) = fs::read_to_string(case.as_ref().unwrap().path().join(file)) else {
                continue;
            };
            for line in text.lines() {
                looked_at += 1;
                if !rows.iter().any(|row| row.iter().all(|words| line.contains(words.as_str()))) {
                    missing.push(line.to_owned());
                }
            }
        }
    }
    assert!(looked_at > 50, "only {looked_at} messages were found");
    assert!(missing.is_empty(), "docs/src/messages.md has no row for\n{}", missing.join("\n"));
}
