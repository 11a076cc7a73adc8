//! Everything that reads requests accepts the same ones.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{LazyLock, Mutex};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use virt_usb_model::request_key::{REQUEST_KEYS, RequestKey};
use virt_usb_model::{Flavor, Grant};
use virt_usb_suite::root;

/// The program that answers for the schema and for Nova; ends with its standard input.
struct Readers {
    _child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

static READERS: LazyLock<Mutex<Readers>> = LazyLock::new(|| {
    let mut child = Command::new("python3")
        .arg(root().join("tests/suite/tests/selectors/readers.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let questions = child.stdin.take().unwrap();
    let answers = BufReader::new(child.stdout.take().unwrap());
    Mutex::new(Readers { _child: child, questions, answers })
});

/// Whether the schema accepts the entry, and the folded entry, and Nova accepts the entry.
fn ask(schema: &str, entry: &Value) -> [bool; 3] {
    let mut readers = READERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let question = json!({
        "schema": schema,
        "entry": entry.to_string(),
        "folded": folded(entry).to_string(),
    });
    writeln!(readers.questions, "{question}").unwrap();
    let mut answer = String::new();
    readers.answers.read_line(&mut answer).unwrap();
    let bits: Vec<bool> = answer.split_whitespace().map(|bit| bit == "1").collect();
    bits.try_into().expect("readers.py has ended: its error is above")
}

/// The entry with its texts in the one spelling that the schema shows, where there are several.
fn folded(entry: &Value) -> Value {
    let mut entry = entry.clone();
    for key in REQUEST_KEYS.iter().filter(|key| key.is_folded) {
        if let Some(Value::String(text)) = entry.get_mut(key.name) {
            *text = text.to_ascii_lowercase().replace(['_', ' '], "-");
        }
    }
    entry
}

/// Whether the model accepts the entry as a request, and as a selector of a grant.
fn model_accepts(entry: &Value) -> [bool; 2] {
    let grant = json!({ "usb_devices": [entry], "projects": ["a"] });
    [
        Flavor::parse_lists(Some(&json!([entry]).to_string()), None).is_ok(),
        Grant::parse(&grant.to_string()).is_ok(),
    ]
}

fn assert_agreement(entry: &Value) {
    let [request, selector] = model_accepts(entry);
    let [as_written, in_schema, in_nova] = ask("UsbDeviceRequest", entry);
    assert_eq!(request, in_schema, "the model, and the schema: {entry}");
    assert_eq!(request, in_nova, "the model, and Nova's validator: {entry}");
    assert!(request || !as_written, "the schema alone accepts {entry}");
    let [as_written, in_schema, _] = ask("UsbDeviceSelector", entry);
    assert_eq!(selector, in_schema, "the model, and the schema of a grant: {entry}");
    assert!(selector || !as_written, "the schema of a grant alone accepts {entry}");
}

/// Values that were chosen for one of the keys.
fn chosen(key: &RequestKey) -> Vec<Value> {
    let texts = key.accepted.iter().chain(key.refused);
    texts.map(|text| serde_json::from_str(text).unwrap()).collect()
}

fn value() -> impl Strategy<Value = Value> {
    let all: Vec<Value> = REQUEST_KEYS.iter().flat_map(chosen).collect();
    prop_oneof![
        4 => prop::sample::select(all),
        1 => prop::sample::select(vec![json!(null), json!([]), json!([[]])]),
        1 => prop::sample::select(vec![json!(-0.0), json!(1e2)]),
        1 => any::<u64>().prop_map(Value::from),
        1 => (0u64..70_000).prop_map(Value::from),
        1 => any::<f64>().prop_filter("JSON", |n| n.is_finite()).prop_map(Value::from),
        2 => "[0-9]{0,17}".prop_map(Value::from),
        1 => "(0[xX])?[0-9a-g]{0,5}".prop_map(Value::from),
        1 => "[0-9]{1,3}-[0-9]{1,3}(\\.[0-9]{1,3}){0,7}".prop_map(Value::from),
        1 => "[a-c: .]{0,3}-usbv[0-9]{1,3}-0:[0-9]{1,3}(\\.[0-9]{1,3}){0,7}".prop_map(Value::from),
        1 => "[a-zA-Z0-9_.:/ü²٣ \n,-]{0,5}".prop_map(Value::from),
        1 => prop::collection::vec("[a-z0-9_.:/ü²٣ ,-]{0,4}", 0..3).prop_map(Value::from),
        1 => "[ -~]{0,130}".prop_map(Value::from),
    ]
}

/// Requests: mostly values that the key takes.
fn entry() -> impl Strategy<Value = Value> {
    let one = |key: &'static RequestKey| {
        let own: Vec<Value> =
            key.accepted.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        let value = prop_oneof![3 => prop::sample::select(own), 2 => value()];
        prop::option::weighted(0.3, value).prop_map(|value| (key.name, value))
    };
    static KEYS: [RequestKey; REQUEST_KEYS.len()] = REQUEST_KEYS;
    let keys: Vec<_> = KEYS.iter().map(one).collect();
    (keys, prop::bool::weighted(0.05)).prop_map(|(values, has_unknown)| {
        let mut entry = Map::new();
        entry.extend(values.into_iter().filter_map(|(key, v)| Some((key.to_owned(), v?))));
        if has_unknown {
            entry.insert("vendor".into(), "0529".into());
        }
        Value::Object(entry)
    })
}

proptest! {
    #[test]
    fn everything_that_reads_requests_accepts_the_same_ones(
        entries in prop::collection::vec(entry(), 1..20)
    ) {
        entries.iter().for_each(assert_agreement);
    }
}

#[test]
fn every_chosen_value_is_accepted_or_refused_everywhere() {
    let all: Vec<Value> = REQUEST_KEYS.iter().flat_map(chosen).chain([json!(null)]).collect();
    for key in &REQUEST_KEYS {
        for value in &all {
            let alone = json!({ (key.name): value });
            let mut beside = json!({ "vendor_id": "0529" });
            beside[key.name] = value.clone();
            assert_agreement(&alone);
            assert_agreement(&beside);
        }
    }
    for other in [json!(1), json!("x"), json!(null), json!([]), json!({})] {
        assert_agreement(&other);
    }
}
