//! Rules for which devices are offered, and to which projects.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::Serialize;
use serde_json::Value;

use crate::flavor::Tag;
use crate::json::{FromJson, Object, parse_text, whole};
use crate::{
    Class, Device, DevicePath, ParseError, PortPath, ProductId, ProjectId, UnavailableReason,
    VendorId,
};

/// One rule. What it names must all match; `tags` and `projects` are what it gives to the devices
/// it matches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct WhitelistRule {
    /// Vendor id to match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<VendorId>,
    /// Product id; needs a vendor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<ProductId>,
    /// Bus number, 1–255.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<u8>,
    /// Device number on the bus, 1–127; needs a bus. Changes at every replug: prefer `port` or
    /// `serial`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<u8>,
    /// Serial, letter for letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Port path. Bus numbers are assigned at boot: the inventory remembers which socket it meant
    /// ([`Whitelist::at`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<PortPath>,
    /// Device path to match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<DevicePath>,
    /// A class of the device or of one of its interfaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<Class>,
    /// Tags that the matched devices carry from then on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// The only projects that get the matched devices; empty: every project.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub projects: Vec<ProjectId>,
    /// Whether a matched device is set aside after each use, until an operator has looked at it.
    #[serde(skip_serializing_if = "core::ops::Not::not")]
    pub one_time_use: bool,
}

const RULE_KEYS: &[&str] = &[
    "vendor",
    "product",
    "bus",
    "device",
    "serial",
    "port",
    "path",
    "class",
    "tags",
    "projects",
    "one_time_use",
];

impl WhitelistRule {
    fn matches(&self, d: &Device) -> bool {
        self.vendor.is_none_or(|v| v == d.key.usb.vendor)
            && self.product.is_none_or(|p| p == d.key.usb.product)
            && self.bus.is_none_or(|b| b == d.address.bus())
            && self.device.is_none_or(|n| n == d.address.device())
            && self.serial.as_deref().is_none_or(|s| d.key.serial.text() == Some(s))
            && self.port.as_ref().is_none_or(|p| *p == d.key.port)
            && self.path.as_ref().is_none_or(|p| d.key.path.as_ref() == Some(p))
            && self.class.is_none_or(|c| d.is_of(c))
    }

    /// Whether the rule names devices, rather than a whole class, bus or vendor: only then does it
    /// give away what the host uses.
    const fn names(&self) -> bool {
        self.product.is_some()
            || self.serial.is_some()
            || self.port.is_some()
            || self.path.is_some()
            || self.device.is_some()
    }
}

impl FromJson for WhitelistRule {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        let object = Object::new(
            value,
            "a rule such as { vendor = \"0x136b\", product = \"0x0003\" }",
            RULE_KEYS,
        )?;
        let number = |key: &str, most: u64| match object.raw(key) {
            None => Ok(None),
            Some(value) => whole(value)
                .filter(|n| (1..=most).contains(n))
                .and_then(|n| u8::try_from(n).ok())
                .map(Some)
                .ok_or_else(|| {
                    ParseError::new(value, format!("a {key} number from 1 to {most}")).at(key)
                }),
        };
        let rule = Self {
            vendor: object.take("vendor")?,
            product: object.take("product")?,
            bus: number("bus", 255)?,
            device: number("device", 127)?,
            serial: object.take("serial")?,
            port: object.take("port")?,
            path: object.take("path")?,
            class: object.take("class")?,
            tags: object.list::<Tag>("tags")?.into_iter().map(|t| t.0).collect(),
            projects: object.list("projects")?,
            one_time_use: match object.raw("one_time_use") {
                None => false,
                Some(Value::Bool(is)) => *is,
                Some(other) => {
                    return Err(ParseError::new(other, "true or false").at("one_time_use"));
                }
            },
        };
        let selects =
            Self { tags: Vec::new(), projects: Vec::new(), one_time_use: false, ..rule.clone() };
        if object.is_empty() || selects == Self::default() {
            return Err(ParseError::new(
                value,
                "a rule that names vendor, product, bus, device, serial, port, path or class",
            ));
        }
        if rule.product.is_some() && rule.vendor.is_none() {
            return Err(ParseError::new(
                "a product alone",
                "the vendor too: product ids are the vendor's own",
            ));
        }
        if rule.device.is_some() && rule.bus.is_none() {
            return Err(ParseError::new(
                "a device number alone",
                "the bus too: device numbers are the bus's own",
            ));
        }
        if object.raw("projects").is_some() && rule.projects.is_empty() {
            return Err(ParseError::new(
                "an empty list",
                "at least one project, or no such key: then every project",
            )
            .at("projects"));
        }
        Ok(rule)
    }
}

/// The switch and its rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Whitelist {
    /// `usb_white_list_switch`: off, everything that is not protected is offered to every project.
    pub on: bool,
    /// `usb_passthrough_whitelist`, in the order written; the first that matches decides.
    pub rules: Vec<WhitelistRule>,
}

/// Result of the whitelist for one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleVerdict {
    /// Why it is not offered; `None`: it is.
    pub withheld: Option<UnavailableReason>,
    /// The rule that decided, counted from 0.
    pub rule: Option<usize>,
    /// The projects that may use it; empty: every one.
    pub projects: Vec<ProjectId>,
    /// Tags that the rule gives the device.
    pub tags: Vec<String>,
    /// Whether it is set aside after each use.
    pub one_time_use: bool,
    /// The verdict in words.
    pub because: String,
}

impl RuleVerdict {
    /// The verdict for a device that no rule can offer: another guest has it, or it cannot be used.
    #[must_use]
    pub fn withheld_for(self, why: &str) -> Self {
        Self {
            withheld: Some(UnavailableReason::HostUse),
            because: format!("{why}; no rule changes that"),
            ..self
        }
    }
}

impl Whitelist {
    /// Reads `usb_white_list_switch` (`"on"`, `"off"` or a boolean) and the rules: a list, one
    /// rule, or JSON text of either.
    ///
    /// # Errors
    /// Names the key and the rule that was wrong.
    pub fn parse(switch: Option<&Value>, rules: Option<&Value>) -> Result<Self, ParseError> {
        let on = match switch {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Bool(true)) => true,
            Some(Value::String(text)) if text.eq_ignore_ascii_case("on") => true,
            Some(Value::String(text)) if text.eq_ignore_ascii_case("off") => false,
            Some(other) => {
                return Err(ParseError::new(other, "\"on\" or \"off\"").at("usb_white_list_switch"));
            }
        };
        let rules = rules
            .map_or_else(|| Ok(Vec::new()), read_rules)
            .map_err(|e| e.at("usb_passthrough_whitelist"))?;
        Ok(Self { on, rules })
    }

    /// The same list with each port that a rule names replaced by its path, where `path` knows it.
    /// A rule keeps its port otherwise.
    #[must_use]
    pub fn at(&self, path: impl Fn(&PortPath) -> Option<DevicePath>) -> Self {
        let rules = self.rules.iter().map(|rule| match rule.port.as_ref().and_then(&path) {
            // A rule that names both a port and a path means neither more nor less than both.
            Some(found) if rule.path.as_ref().is_none_or(|named| *named == found) => {
                WhitelistRule { port: None, path: Some(found), ..rule.clone() }
            }
            _ => rule.clone(),
        });
        Self { on: self.on, rules: rules.collect() }
    }

    /// The ports that rules name, each once.
    pub fn ports(&self) -> Vec<&PortPath> {
        let mut ports: Vec<&PortPath> =
            self.rules.iter().filter_map(|rule| rule.port.as_ref()).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Judges one device. Hubs are not judged: they are never offered, and discovery keeps them
    /// apart.
    pub fn judge(&self, device: &Device) -> RuleVerdict {
        let mut matching = self.rules.iter().enumerate().filter(|(_, rule)| rule.matches(device));
        // What the host uses is given away by a rule that names it, though a broader one stands
        // before it.
        let naming =
            || matching.clone().find(|(_, rule)| rule.names() && device.host_use.is_some());
        let found = naming().or_else(|| matching.next());
        let number = found.map(|(i, _)| i);
        let by = number.map_or_else(String::new, |i| format!("rule {}", i + 1));
        let verdict = |withheld, because: String| RuleVerdict {
            withheld,
            rule: number,
            projects: found
                .filter(|_| self.on)
                .map(|(_, r)| r.projects.clone())
                .unwrap_or_default(),
            tags: found.map(|(_, r)| r.tags.clone()).unwrap_or_default(),
            one_time_use: found.is_some_and(|(_, r)| r.one_time_use),
            because,
        };
        match (found, &device.host_use) {
            (Some((_, rule)), Some(used)) if rule.names() => {
                verdict(None, format!("{by} names it, though the host uses it ({used})"))
            }
            (_, Some(used)) => verdict(
                Some(UnavailableReason::HostUse),
                format!(
                    "the host uses it ({used}); a rule that names it by product, serial, port or \
                        device would offer it"
                ),
            ),
            (Some(_), None) => verdict(None, format!("{by} offers it")),
            (None, None) if self.on => verdict(
                Some(UnavailableReason::Whitelist),
                "no rule matches it and usb_white_list_switch is on".to_string(),
            ),
            (None, None) => verdict(None, "usb_white_list_switch is off".to_string()),
        }
    }
}

fn read_rules(value: &Value) -> Result<Vec<WhitelistRule>, ParseError> {
    match value {
        Value::String(text) if text.trim().is_empty() => Ok(Vec::new()),
        Value::String(text) => match parse_text(text)? {
            Value::String(_) => Err(ParseError::new(text, "a JSON list of rules")),
            inner => read_rules(&inner),
        },
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(i, item)| WhitelistRule::from_json(item).map_err(|e| e.at(&format!("[{i}]"))))
            .collect(),
        one => WhitelistRule::from_json(one).map(|rule| alloc::vec![rule]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BusAddress, DeviceKey, Serial, UsbId};
    use serde_json::json;

    fn stick(host_use: Option<&str>) -> Device {
        Device {
            key: DeviceKey {
                usb: UsbId::new(0x136b, 3),
                serial: Serial::Unique("A1".into()),
                port: "2-1".parse().unwrap(),
                path: None,
            },
            address: BusAddress::new(2, 2).unwrap(),
            class: Class::new(0),
            interfaces: alloc::vec![Class::new(8)],
            speed: None,
            manufacturer: None,
            product: None,
            driver: None,
            host_use: host_use.map(Into::into),
            descriptors: None,
            generation: None,
        }
    }

    fn list(on: bool, rules: &Value) -> Whitelist {
        Whitelist::parse(Some(&json!(on)), Some(rules)).unwrap()
    }

    #[test]
    fn off_offers_everything_but_what_the_host_uses() {
        let off = Whitelist::default();
        assert_eq!(off.judge(&stick(None)).withheld, None);
        assert_eq!(
            off.judge(&stick(Some("mounted on /"))).withheld,
            Some(UnavailableReason::HostUse)
        );
    }

    #[test]
    fn the_documented_rule_in_both_spellings() {
        let rule = json!([{"product":"0x0003","vendor":"0x136b","bus":"2","device":"2"}]);
        let text = json!(rule.to_string());
        assert_eq!(list(true, &rule), list(true, &text));
        assert_eq!(list(true, &rule).judge(&stick(None)).rule, Some(0));
        let other = json!([{"vendor":"0x136b","bus":3}]);
        assert_eq!(
            list(true, &other).judge(&stick(None)).withheld,
            Some(UnavailableReason::Whitelist)
        );
    }

    #[test]
    fn only_a_rule_that_names_it_gives_away_what_the_host_uses() {
        let used = stick(Some("mounted on /"));
        for broad in [json!({"class":"mass-storage"}), json!({"vendor":"136b"}), json!({"bus":2})] {
            assert_eq!(
                list(true, &broad).judge(&used).withheld,
                Some(UnavailableReason::HostUse),
                "{broad}"
            );
        }
        for exact in [
            json!({"vendor":"136b","product":3}),
            json!({"serial":"A1"}),
            json!({"port":"2-1"}),
            json!({"bus":2,"device":2}),
        ] {
            for on in [true, false] {
                assert_eq!(list(on, &exact).judge(&used).withheld, None, "{exact}");
            }
        }
    }

    #[test]
    fn projects_count_only_while_the_switch_is_on() {
        let rule = json!({"vendor":"136b","projects":["p1"],"tags":["erp"]});
        assert_eq!(list(true, &rule).judge(&stick(None)).projects.len(), 1);
        let off = list(false, &rule).judge(&stick(None));
        assert!(off.projects.is_empty());
        assert_eq!(off.tags, ["erp"]);
    }

    #[test]
    fn a_rule_may_let_a_device_be_used_once() {
        for (rule, once) in [
            (json!({"vendor":"136b","one_time_use":true}), true),
            (json!({"vendor":"136b"}), false),
        ] {
            assert_eq!(list(true, &rule).judge(&stick(None)).one_time_use, once);
        }
        assert!(
            Whitelist::parse(None, Some(&json!([{"one_time_use":true}]))).is_err(),
            "it names nothing"
        );
        let wrong = Whitelist::parse(None, Some(&json!([{"vendor":"1","one_time_use":"yes"}])))
            .unwrap_err();
        assert!(
            wrong.to_string().contains("[0].one_time_use: found \"yes\", wanted true or false"),
            "{wrong}"
        );
    }

    #[test]
    fn wrong_rules_are_named() {
        let error = |rules: Value| Whitelist::parse(None, Some(&rules)).unwrap_err().to_string();
        assert!(
            error(json!([{"vendor":"1"},{"vender":"1"}]))
                .starts_with("usb_passthrough_whitelist[1]: found key \"vender\"")
        );
        assert!(error(json!([{"tags":["a"]}])).contains("a rule that names"));
        assert!(error(json!([{"product":"1"}])).contains("the vendor too"));
        assert!(
            error(json!([{"vendor":"1","projects":[]}]))
                .contains("usb_passthrough_whitelist[0].projects")
        );
        assert!(error(json!("[{")).contains("not JSON"));
        assert!(
            error(json!([{"bus":"2","device":"200","vendor":"1"}]))
                .contains("device number from 1 to 127")
        );
        assert!(
            Whitelist::parse(Some(&json!("maybe")), None)
                .unwrap_err()
                .to_string()
                .contains("usb_white_list_switch")
        );
    }
}
