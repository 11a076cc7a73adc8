//! Files and texts that list the keys of a request.

use serde_json::{Value, json};
use virt_usb_model::flavor::{MAX_DEVICES, MAX_REDIRECTIONS};
use virt_usb_model::request_key::{
    Numbers, REQUEST_KEY_NAMES, REQUEST_KEYS, RequestKey, SELECTOR_KEYS,
};
use virt_usb_suite::root;

/// Compares a checked-in file with what it is generated from; `BLESS=1` writes it.
fn assert_generated(file: &str, made: &Value) {
    let (path, made) = (root().join(file), format!("{made:#}\n"));
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == made, "{file} does not follow from the model's keys: BLESS=1 writes it");
}

#[test]
fn nova_has_the_keys_of_the_model() {
    let numbers = |numbers: Numbers| match numbers {
        Numbers::None => Value::Null,
        Numbers::Any => "any".into(),
        Numbers::Whole { min, max } => json!([min, max]),
    };
    let key = |key: &RequestKey| {
        // All fields are named: Nova's validator has to know about a new one.
        let RequestKey { name, description, pattern, is_folded, is_list, .. } = key;
        let RequestKey { numbers: range, accepted: _, refused: _, .. } = key;
        json!({
            "name": name,
            "description": description,
            "numbers": numbers(*range),
            "pattern": pattern(),
            "is_folded": is_folded,
            "is_list": is_list,
        })
    };
    let made = json!({
        "max_devices": MAX_DEVICES,
        "max_redirections": MAX_REDIRECTIONS,
        "selectors": SELECTOR_KEYS,
        "keys": REQUEST_KEYS.iter().map(key).collect::<Vec<_>>(),
    });
    assert_generated("install/nova/virt_usb_nova/request_keys.json", &made);
}

#[test]
fn the_tests_in_nova_have_the_values_of_the_model() {
    let mut values = Vec::new();
    for key in &REQUEST_KEYS {
        for (list, is_accepted) in [(key.accepted, true), (key.refused, false)] {
            for text in list {
                let value: Value = serde_json::from_str(text).unwrap();
                values.push(json!({ "key": key.name, "value": value, "is_accepted": is_accepted }));
            }
        }
    }
    assert_generated("tests/nova/request_values.json", &Value::Array(values));
}

#[test]
fn every_text_that_lists_the_keys_lists_all_of_them() {
    for (file, mark) in [
        ("docs/src/flavors.md", "`"),
        ("wit/README.md", "`"),
        ("install/openstackclient/virt_usb_openstackclient/server.py", ""),
        ("tests/fuzz/dictionaries/flavor", "\\\""),
        ("tests/fuzz/dictionaries/filter_question", "\\\""),
    ] {
        let text = std::fs::read_to_string(root().join(file)).unwrap();
        for name in REQUEST_KEY_NAMES {
            let marked = format!("{mark}{name}{mark}");
            assert!(text.contains(&marked), "{file} does not name the key {marked}");
        }
    }
}
