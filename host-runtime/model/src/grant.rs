//! Grants: devices that are available to certain projects, on any host.
//!
//! ```json
//! {"usb_devices": [{"vendor_id": "0529", "product_id": "0001"}, {"tags": ["erp"]}],
//!  "projects": ["4f1c0d2e"]}
//! ```
//! A device that one of the entries matches is for these projects, for those of other grants that
//! match it, and for those of its whitelist rule; for no others. A device that no grant and no
//! rule gives to certain projects is for every one.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use serde::Serialize;

use crate::flavor::checked;
use crate::json::Object;
use crate::{ParseError, ProjectId, Selector};

/// The most entries of one grant, and the most projects.
pub const MAX_ENTRIES: usize = 127;
const RIGHT_GRANT: &str = "{\"usb_devices\":[{\"vendor_id\":\"0529\",\"product_id\":\"0001\"}],\
                           \"projects\":[\"4f1c0d2e\"]}";

/// Devices that are available to certain projects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Grant {
    /// A device is meant when one of them matches; at least one.
    pub usb_devices: Vec<Selector>,
    /// Projects that the devices are available to; at least one.
    pub projects: Vec<ProjectId>,
}

impl Grant {
    /// Reads the JSON object with the keys `usb_devices` and `projects`.
    ///
    /// # Errors
    /// Says which entry was wrong and shows the right spelling.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let value = checked(text, RIGHT_GRANT)?;
        let object = Object::new(&value, RIGHT_GRANT, &["usb_devices", "projects"])?;
        let grant =
            Self { usb_devices: object.list("usb_devices")?, projects: object.list("projects")? };
        bounded(grant.usb_devices.len()).map_err(|e| e.at("usb_devices"))?;
        bounded(grant.projects.len()).map_err(|e| e.at("projects"))?;
        Ok(grant)
    }
}

fn bounded(entries: usize) -> Result<(), ParseError> {
    if (1..=MAX_ENTRIES).contains(&entries) {
        return Ok(());
    }
    let found = if entries == 0 { "nothing".to_string() } else { format!("{entries} entries") };
    Err(ParseError::new(found, format!("1 to {MAX_ENTRIES} entries, as in {RIGHT_GRANT}")))
}

impl FromStr for Grant {
    type Err = ParseError;
    /// As [`Grant::parse`].
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::parse(text)
    }
}

impl fmt::Display for Grant {
    /// The grant as JSON, ids in their usual spelling.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

/// Both lists as one, each project once.
pub fn joined(these: &[ProjectId], those: &[ProjectId]) -> Vec<ProjectId> {
    let mut all: Vec<ProjectId> = Vec::new();
    for project in these.iter().chain(those) {
        if !all.iter().any(|known| known.is(project)) {
            all.push(project.clone());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_is_read_as_people_write_it_and_written_as_it_is_read() {
        let grant = Grant::parse(
            r#"{"usb_devices":[{"vendor_id":"0x529","product_id":1},{"tags":"erp"}],"projects":"p1"}"#,
        )
        .unwrap();
        let text = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"},{"tags":["erp"]}],"projects":["p1"]}"#;
        assert_eq!(grant.to_string(), text);
        assert_eq!(text.parse::<Grant>().unwrap(), grant);
    }

    #[test]
    fn an_invalid_grant_is_refused_with_its_place() {
        for (text, words) in [
            ("", "JSON such as {\"usb_devices\""),
            ("{}", "usb_devices: found nothing"),
            (r#"{"usb_devices":[{"id":5}]}"#, "projects: found nothing"),
            (r#"{"usb_devices":[],"projects":["p"]}"#, "usb_devices: found nothing"),
            (r#"{"usb_devices":[{}],"projects":["p"]}"#, "usb_devices[0]"),
            (r#"{"usb_devices":[{"id":5,"count":2}],"projects":["p"]}"#, "count"),
            (r#"{"usb_devices":[{"product_id":"1"}],"projects":["p"]}"#, "the vendor_id too"),
            (r#"{"usb_devices":[{"id":5}],"projects":["a b"]}"#, "projects[0]"),
            (r#"{"usb_devices":[{"id":5}],"projects":["p"],"project":"p"}"#, "\"project\""),
        ] {
            let error = Grant::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let many = alloc::vec![r#""p""#; MAX_ENTRIES + 1].join(",");
        let text = format!(r#"{{"usb_devices":[{{"id":5}}],"projects":[{many}]}}"#);
        assert!(Grant::parse(&text).unwrap_err().to_string().contains("128 entries"));
    }

    #[test]
    fn one_project_in_two_spellings_is_one() {
        let list =
            |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<ProjectId>>();
        let (a, b) = ("9a1f3c526c1b4c6e9b1c2b6c3a7d8e9f", "9a1f3c52-6c1b-4c6e-9b1c-2b6c3a7d8e9f");
        assert_eq!(joined(&list(&["p", a]), &list(&[b, "q", "p"])), list(&["p", a, "q"]));
    }
}
