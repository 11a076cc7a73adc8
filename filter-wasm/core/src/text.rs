//! The same engine for callers that speak in strings.
//!
//! Where bindings convert lists an element at a time, a thousand names cost more than the question.
//! So bulk goes in and out as one text: host documents a line each, names a line each, questions
//! and answers as JSON.
//!
//! A question is an object with these keys; only the first is required:
//! ```json
//! {"flavor": {"usb_devices": [{"vendor_id": "0529", "product_id": "0001"}]},
//!  "project": "9a1f3c526c1b4c6e9b1c2b6c3a7d8e9f",
//!  "now": 1700000000000, "max_age": 60000,
//!  "weights": {"spare": 4, "reserve": 1}}
//! ```
//! `now` and `max_age` go together, in the unit of the times that hosts were loaded with.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::Serialize;
use serde_json::{Map, Value, json};
use virt_usb_model::scheduling::{Moment, Question, Selection, Verdict, Weights};
use virt_usb_model::{DeviceId, Flavor, Status};

use crate::inventory::{Inventory, Loaded};
use crate::refusal::Refusal;

/// Reads a question.
///
/// # Errors
/// [`Refusal::Question`], which says where what was found, and what was wanted.
pub fn question(text: &str) -> Result<Question, Refusal> {
    let refused = |why: String| Refusal::Question(why);
    let value = virt_usb_model::unique_json(text).map_err(|e| {
        if e.is_data() {
            return refused(format!("found {e}, wanted each key once"));
        }
        refused(format!("found text that is not JSON ({e}), wanted a question such as {EXAMPLE}"))
    })?;
    let Value::Object(map) = value else {
        return Err(refused(format!(
            "found {}, wanted a question such as {EXAMPLE}",
            short(&value)
        )));
    };
    const KEYS: [&str; 5] = ["flavor", "project", "now", "max_age", "weights"];
    if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(refused(format!("found key {key:?}, wanted one of {}", KEYS.join(", "))));
    }
    let flavor = get(&map, "flavor")
        .ok_or_else(|| refused(format!("found no flavor, wanted a question such as {EXAMPLE}")))?;
    let flavor =
        Flavor::parse(&flavor.to_string()).map_err(|e| refused(e.at("flavor").to_string()))?;
    let project = match get(&map, "project") {
        None => None,
        Some(Value::String(text)) => Some(
            text.parse()
                .map_err(|e: virt_usb_model::ParseError| refused(e.at("project").to_string()))?,
        ),
        Some(other) => {
            return Err(refused(format!("project: found {}, wanted a string", short(other))));
        }
    };
    let moment = match (number(&map, "now")?, number(&map, "max_age")?) {
        (None, None) => None,
        (Some(now), Some(max_age)) => Some(Moment { now, max_age }),
        _ => {
            return Err(refused(
                "found only one of now and max_age, wanted both or none".to_string(),
            ));
        }
    };
    let weights = match get(&map, "weights") {
        None => Weights::default(),
        Some(Value::Object(map)) => weights(map)?,
        Some(other) => {
            return Err(refused(format!("weights: found {}, wanted an object", short(other))));
        }
    };
    Ok(Question { project, moment, weights, ..Question::new(flavor) })
}

const EXAMPLE: &str = r#"{"flavor":{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}}"#;

fn get<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|value| !value.is_null())
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}

fn number(map: &Map<String, Value>, key: &str) -> Result<Option<u64>, Refusal> {
    let wrong = |value: &Value| {
        Refusal::Question(format!("{key}: found {}, wanted a whole number from 0", short(value)))
    };
    get(map, key).map(|value| value.as_u64().ok_or_else(|| wrong(value))).transpose()
}

fn weights(map: &Map<String, Value>) -> Result<Weights, Refusal> {
    let usual = Weights::default();
    if let Some(key) = map.keys().find(|key| !["spare", "reserve"].contains(&key.as_str())) {
        return Err(Refusal::Question(format!(
            "weights: found key {key:?}, wanted spare or reserve"
        )));
    }
    let weight = |key: &str, usual: u8| match number(map, key) {
        Ok(None) => Ok(usual),
        Ok(Some(n)) => u8::try_from(n).ok().filter(|n| *n <= Weights::MAX).ok_or_else(|| {
            Refusal::Question(format!("weights.{key}: found {n}, wanted 0 to {}", Weights::MAX))
        }),
        Err(e) => Err(Refusal::Question(format!("weights.{e}"))),
    };
    let (spare, reserve) = (weight("spare", usual.spare)?, weight("reserve", usual.reserve)?);
    Ok(Weights { spare, reserve })
}

/// The names of a text, one a line.
pub fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').filter(|name| !name.is_empty())
}

/// Result of a load: `{"hosts":2,"devices":40,"refused":1,"problems":[{"line":3,"why":"…"}]}`.
pub fn loaded(loaded: &Loaded) -> String {
    let problem = |p: &crate::RefusedLine| json!({"line": p.line, "why": p.why});
    let problems: Vec<Value> = loaded.problems.iter().map(problem).collect();
    json!({
        "hosts": loaded.hosts,
        "devices": loaded.devices,
        "refused": loaded.refused,
        "problems": problems,
    })
    .to_string()
}

#[derive(Serialize)]
struct Line<'a> {
    host: &'a str,
    verdict: Verdict,
}

/// Writes a value as JSON. A value that holds only texts and numbers can always be written.
fn written(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

impl Inventory {
    /// The best hosts as JSON: `{"matched":2,"placements":[{"host":"h1","score":8}]}`. Candidates
    /// are names, one a line; without them the whole fleet is asked.
    ///
    /// # Errors
    /// [`Refusal::Question`].
    pub fn select_text(
        &self,
        question: &str,
        candidates: Option<&str>,
        limit: u32,
    ) -> Result<String, Refusal> {
        Ok(written(&self.select_among(question, candidates, limit)?))
    }

    /// The best hosts as names, one a line, the best first.
    ///
    /// # Errors
    /// [`Refusal::Question`].
    pub fn select_names(
        &self,
        question: &str,
        candidates: Option<&str>,
        limit: u32,
    ) -> Result<String, Refusal> {
        let selection = self.select_among(question, candidates, limit)?;
        let mut text = String::new();
        for placement in &selection.placements {
            text.push_str(&placement.host);
            text.push('\n');
        }
        text.pop();
        Ok(text)
    }

    fn select_among(
        &self,
        question: &str,
        candidates: Option<&str>,
        limit: u32,
    ) -> Result<Selection, Refusal> {
        let question = self::question(question)?;
        let limit = limit as usize;
        match candidates {
            None => self.select(&question, None, limit),
            Some(text) => self.select(&question, Some(&mut names(text)), limit),
        }
    }

    /// A verdict a line for the hosts that are named, or else for all, by name:
    /// `{"host":"h1","verdict":{…}}`.
    ///
    /// # Errors
    /// [`Refusal::Question`].
    pub fn explain_text(&self, question: &str, hosts: Option<&str>) -> Result<String, Refusal> {
        let question = self::question(question)?;
        let plan = crate::plan::Plan::new(self, &question)?;
        let mut text = String::new();
        let mut line = |host: &str| {
            text.push_str(&written(&Line { host, verdict: self.judge(&plan, host) }));
            text.push('\n');
        };
        match hosts {
            Some(text) => names(text).for_each(&mut line),
            None => {
                let mut all: Vec<&str> = self.heads().map(|head| self.host_name(head)).collect();
                all.sort_unstable();
                all.into_iter().for_each(&mut line);
            }
        }
        Ok(text)
    }

    /// Gives a device a state by its name (`available`, `claimed`, `allocated`, `removed`,
    /// `unavailable`).
    ///
    /// # Errors
    /// As [`Inventory::set_status`]; [`Refusal::Question`] for a state or an id that cannot be.
    pub fn set_status_text(
        &mut self,
        host: &str,
        device: u64,
        status: &str,
    ) -> Result<bool, Refusal> {
        let device = DeviceId::new(device).ok_or(Refusal::UnknownDevice(device))?;
        // Which reason makes no difference here.
        let reason = (status == "unavailable").then_some("disabled");
        let status =
            Status::from_columns(status, reason).map_err(|e| Refusal::Question(e.to_string()))?;
        self.set_status(host, device, status)
    }

    /// `{"revision":7,"hosts":2,"devices":40,"available":38,"keys":12}`.
    pub fn statistics_text(&self) -> String {
        json!(self.statistics()).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_read_or_refused_with_its_place() {
        let flavor = r#""flavor":{"usb_devices":[{"vendor_id":"0529"}]}"#;
        let full = format!(
            "{{{flavor},\"project\":\"p1\",\"now\":9,\"max_age\":2,\
                \"weights\":{{\"spare\":100,\"reserve\":0}}}}"
        );
        let read = question(&full).unwrap();
        assert_eq!((read.requests.len(), read.moment), (1, Some(Moment { now: 9, max_age: 2 })));
        assert_eq!(read.weights, Weights { spare: 100, reserve: 0 });
        let wrong = [
            ("{", "not JSON"),
            ("[]", "wanted a question such as"),
            ("{}", "found no flavor"),
            (
                r#"{"flavor":{"usb_devices":[{"vendor_id":"zz"}]}}"#,
                "flavor.usb_devices[0].vendor_id",
            ),
            (r#"{"flavor":{},"now":1}"#, "only one of now and max_age"),
            (r#"{"flavor":{},"now":-1,"max_age":1}"#, "now: found -1"),
            (r#"{"flavor":{},"project":"a b"}"#, "project: found"),
            (
                r#"{"flavor":{},"weights":{"spare":1000}}"#,
                "weights.spare: found 1000, wanted 0 to 100",
            ),
            (r#"{"flavor":{},"weights":{"spare":1.5}}"#, "weights.spare: found 1.5"),
            (r#"{"flavor":{},"weights":{"spar":1}}"#, "weights: found key \"spar\""),
            (r#"{"flavour":{}}"#, "found key \"flavour\""),
        ];
        for (text, why) in wrong {
            let said = question(text).unwrap_err().to_string();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
