//! A selector as SQL: what an index can find, the index finds.

use rusqlite::types::Value;
use virt_usb_model::Selector;

use crate::device::sql_id;

/// A WHERE clause over `usb_devices d` and its parameters. Every selector names something, so it is never empty.
pub(crate) struct Clause {
    pub(crate) sql: String,
    pub(crate) params: Vec<Value>,
}

pub(crate) fn clause(selector: &Selector) -> Clause {
    let mut parts: Vec<&str> = Vec::new();
    let mut params: Vec<Value> = Vec::new();
    if let Some(id) = selector.id {
        parts.push("d.id = ?");
        params.push(sql_id(id).into());
    }
    let mut text = |part: &'static str, value: Option<String>| {
        if let Some(value) = value {
            parts.push(part);
            params.push(value.into());
        }
    };
    text("d.vendor_id = ?", selector.vendor_id.map(|v| v.to_string()));
    text("d.product_id = ?", selector.product_id.map(|p| p.to_string()));
    text("d.serial = ?", selector.serial.clone());
    text("d.port_path = ?", selector.port.as_ref().map(ToString::to_string));
    let label = "d.id IN (SELECT device_id FROM device_labels WHERE kind = ? AND value = ?)";
    let labels = selector.class.iter().map(|c| ("class", c.to_string()));
    for (kind, value) in labels.chain(selector.tags.iter().map(|t| ("tag", t.clone()))) {
        parts.push(label);
        params.push(kind.to_owned().into());
        params.push(value.into());
    }
    Clause { sql: parts.join(" AND "), params }
}
