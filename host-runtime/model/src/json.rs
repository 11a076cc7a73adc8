//! Reading JSON values strictly: every key known and there once, every error with its place.

use alloc::borrow::Cow;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Map, Value};

use crate::ParseError;

/// A type that can be read from a JSON value.
pub(crate) trait FromJson: Sized {
    fn from_json(value: &Value) -> Result<Self, ParseError>;
}

/// Implements serde's `Deserialize` for types that are read from a JSON value, with the same parser
/// and the same words.
macro_rules! deserialize {
    ($($name:ty),* $(,)?) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                Self::from_json(&Value::deserialize(from)?).map_err(de::Error::custom)
            }
        }
    )*};
}

deserialize!(
    crate::DeviceId,
    crate::InstanceId,
    crate::ProjectId,
    crate::Selector,
    crate::DeviceRequest,
    crate::RedirectionRequest,
);

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
            Some(key) => {
                Err(ParseError::new(format!("key {key:?}"), format!("one of {}", known.join(", "))))
            }
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

/// A number that is whole, however it is written: in JSON `8.0` is `8`, and `-0` is `0`.
pub(crate) fn number(value: &Value) -> Option<u64> {
    let text = value.as_number()?.to_string();
    match text.strip_suffix(".0").unwrap_or(&text) {
        "-0" => Some(0),
        digits => digits.parse().ok(),
    }
}

/// The JSON text as a value; a syntax error says line and column.
pub(crate) fn parse_text(text: &str) -> Result<Value, ParseError> {
    unique(text).map_err(|e| {
        twice(&e).unwrap_or_else(|| ParseError::new(format!("text that is not JSON ({e})"), "JSON"))
    })
}

/// Parses JSON text in which no object has a duplicate key. serde_json would keep the last of two
/// values and other readers the first, so the meaning would depend on the reader.
///
/// # Errors
/// Of a text that is not JSON; and of a key that is there twice, which the error names.
pub fn unique(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str::<Unique>(text).map(|value| value.0)
}

/// The error of [`unique`] about a key that is there twice; `None`: it is about something else.
pub(crate) fn twice(e: &serde_json::Error) -> Option<ParseError> {
    // Any text that is JSON is a value: nothing else is wrong with its data.
    (e.classify() == Category::Data).then(|| ParseError::new(e, "each key once"))
}

/// A value as [`unique`] reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Unique(pub Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("JSON")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(list.into())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<Cow<'de, str>>()? {
            if map.contains_key(key.as_ref()) {
                let key: String = key.chars().take(SHOWN_KEY).collect();
                return Err(de::Error::custom(format!("the key {key:?} twice")));
            }
            let Unique(value) = entries.next_value()?;
            map.insert(key.into_owned(), value);
        }
        Ok(Value::Object(map))
    }
}

/// As much as a message shows of a key, in characters.
const SHOWN_KEY: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_there_twice_is_named() {
        for (text, key) in [
            (r#"{"id":1,"id":1}"#, "id"),
            (r#"{"a":[{"vendor_id":"1","\u0076endor_id":"2"}]}"#, "vendor_id"),
            (r#"[{"b":{"c":null,"c":null}}]"#, "c"),
            (r#"{"":0,"":0}"#, ""),
        ] {
            let error = parse_text(text).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("found the key {key:?} twice at line 1 column")),
                "{error}"
            );
            assert!(error.ends_with(", wanted each key once"), "{error}");
        }
        let long = "x".repeat(500);
        let error = parse_text(&format!("{{\"{long}\":1,\"{long}\":1}}")).unwrap_err().to_string();
        assert!(error.len() < 120, "{error}");
    }

    #[test]
    fn a_whole_number_is_whole_however_it_is_written() {
        for text in ["2251799813685247.0", "9007199254740991.0", "194.0", "1e3", "0.0"] {
            let expected: f64 = text.parse().unwrap();
            let value = parse_text(text).unwrap();
            assert_eq!(
                number(&value).map(|n| n.to_string()),
                Some(format!("{expected:.0}")),
                "{text}"
            );
        }
        assert_eq!(number(&parse_text("2251799813685247.5").unwrap()), None);
        assert_eq!(number(&parse_text("-0").unwrap()), Some(0));
        assert_eq!(number(&parse_text("-1").unwrap()), None);
    }

    #[test]
    fn all_else_is_read_as_ever() {
        for text in [
            "null",
            " [] ",
            r#"{"a":[1,-2,3.5,1e300,18446744073709551615,-9223372036854775808,true,false,null,"\u00e9\n"],"b":{"a":{}}}"#,
        ] {
            assert_eq!(
                unique(text).unwrap(),
                serde_json::from_str::<Value>(text).unwrap(),
                "{text}"
            );
        }
        for text in ["", "{", "[1,]", "{\"a\"}", "1 2", "nul", "\"\u{1}\"", &"[".repeat(200)] {
            let (mine, theirs) =
                (unique(text).unwrap_err(), serde_json::from_str::<Value>(text).unwrap_err());
            assert_eq!(mine.to_string(), theirs.to_string(), "{text}");
            assert!(
                parse_text(text).unwrap_err().to_string().contains("text that is not JSON"),
                "{text}"
            );
        }
    }
}
