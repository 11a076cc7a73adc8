//! Reading JSON values strictly: every key known, every error with its place.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde_json::{Map, Value};

use crate::ParseError;

/// A type that can be read from a JSON value.
pub(crate) trait FromJson: Sized {
    fn from_json(value: &Value) -> Result<Self, ParseError>;
}

impl FromJson for String {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        match value {
            Value::String(text) => Ok(text.clone()),
            other => Err(ParseError::new(other, "a string")),
        }
    }
}

/// The members of a JSON object, their values as text: a string without its quotes, anything else
/// as JSON has it. `None` where the text is no object.
pub fn members(text: &str) -> Option<BTreeMap<String, String>> {
    let object: BTreeMap<String, Value> = serde_json::from_str(text).ok()?;
    let text = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    Some(object.into_iter().map(|(name, value)| (name, text(value))).collect())
}

/// An object whose keys must all be taken.
pub(crate) struct Object<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// `value` as an object that holds no key but `known`.
    pub(crate) fn new(value: &'a Value, what: &str, known: &[&str]) -> Result<Self, ParseError> {
        let map = value.as_object().ok_or_else(|| ParseError::new(value, what))?;
        match map.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(ParseError::new(format!("key {key:?}"), format!("one of {}", known.join(", ")))),
            None => Ok(Self { map }),
        }
    }

    pub(crate) fn take<T: FromJson>(&self, key: &str) -> Result<Option<T>, ParseError> {
        self.raw(key).map(|value| T::from_json(value).map_err(|e| e.at(key))).transpose()
    }

    /// A list, or one value in place of a list of one.
    pub(crate) fn list<T: FromJson>(&self, key: &str) -> Result<Vec<T>, ParseError> {
        match self.raw(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .enumerate()
                .map(|(i, item)| T::from_json(item).map_err(|e| e.at(&format!("[{i}]")).at(key)))
                .collect(),
            Some(one) => T::from_json(one).map(|item| alloc::vec![item]).map_err(|e| e.at(key)),
        }
    }

    pub(crate) fn raw(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.map.values().all(Value::is_null)
    }
}

/// A whole decimal number written as a number or a string.
pub(crate) fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
            text.parse().ok()
        }
        other => number(other),
    }
}

/// A number that is whole, however it is written: in JSON `8.0` is `8`.
pub(crate) fn number(value: &Value) -> Option<u64> {
    let text = value.as_number()?.to_string();
    text.strip_suffix(".0").unwrap_or(&text).parse().ok()
}

/// The JSON text as a value; a syntax error says line and column.
pub(crate) fn parse_text(text: &str) -> Result<Value, ParseError> {
    serde_json::from_str(text).map_err(|e| {
        let reason = e.to_string();
        ParseError::new(format!("text that is not JSON ({reason})"), "JSON")
    })
}
