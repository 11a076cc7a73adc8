//! A selector as SQL.
//!
//! SQLite keeps no statistics here, and one host may hold 10 000 devices of one kind: which index
//! finds the devices is decided here, not guessed by its planner. What names fewest devices drives;
//! a unary `+` keeps the other columns' indexes out of it. Every driving index ends with the id, so
//! that devices come in its order, unsorted, and the reader may stop early.

use rusqlite::types::Value;
use virt_usb_model::Selector;

use crate::device::sql_id;

/// A SELECT's FROM and WHERE over `usb_devices d`, the parameters of it, and the id to order by.
pub(crate) struct Query {
    from: &'static str,
    /// Every selector names something, so it is never empty.
    conditions: Vec<String>,
    pub(crate) params: Vec<Value>,
    order: &'static str,
}

impl Query {
    /// `SELECT what`, of devices that are alive and for which `extra` holds.
    pub(crate) fn sql(&self, what: &str, extra: &str) -> String {
        let Self { from, conditions, .. } = self;
        format!(
            "SELECT {what} FROM {from} WHERE {} AND d.deleted = 0 AND {extra}",
            conditions.join(" AND ")
        )
    }

    /// The same, by id.
    pub(crate) fn sorted(&self, what: &str, extra: &str) -> String {
        format!("{} ORDER BY {}", self.sql(what, extra), self.order)
    }
}

#[derive(PartialEq, Clone, Copy)]
enum Driver {
    Elsewhere,
    Serial,
    Path,
    Port,
    Vendor,
    Label,
}

/// All devices that match; the selector itself finds them.
pub(crate) fn find(selector: &Selector) -> Query {
    let driver = match selector {
        Selector { id: Some(_), .. } => Driver::Elsewhere,
        Selector { serial: Some(_), .. } => Driver::Serial,
        Selector { path: Some(_), .. } => Driver::Path,
        Selector { port: Some(_), .. } => Driver::Port,
        Selector { vendor_id: Some(_), .. } => Driver::Vendor,
        _ => Driver::Label,
    };
    build(selector, driver)
}

/// The same as a mere test, of devices that another condition finds.
pub(crate) fn test(selector: &Selector) -> Query {
    build(selector, Driver::Elsewhere)
}

fn build(selector: &Selector, driver: Driver) -> Query {
    let mut query =
        Query { from: "usb_devices d", conditions: Vec::new(), params: Vec::new(), order: "d.id" };
    let Selector { id, vendor_id, product_id, serial, port, path, class, tags } = selector;
    let mut labels = class.iter().map(|c| ("class", c.to_string())).collect::<Vec<_>>();
    labels.extend(tags.iter().map(|t| ("tag", t.clone())));
    for (at, (kind, value)) in labels.into_iter().enumerate() {
        if driver == Driver::Label && at == 0 {
            query.from = "device_labels l CROSS JOIN usb_devices d ON d.id = l.device_id";
            query.order = "l.device_id";
            query.conditions.push("l.kind = ? AND l.value = ?".into());
        } else {
            query.conditions.push(
                "EXISTS (SELECT 1 FROM device_labels WHERE kind = ? AND value = ? AND device_id = \
                    d.id)"
                    .into(),
            );
        }
        query.params.extend([kind.to_owned().into(), value.into()]);
    }
    let mut column = |name: &str, drives: bool, value: Option<Value>| {
        if let Some(value) = value {
            query.conditions.push(format!("{}d.{name} = ?", if drives { "" } else { "+" }));
            query.params.push(value);
        }
    };
    column("id", true, id.map(|id| sql_id(id).into()));
    column("serial", driver == Driver::Serial, serial.clone().map(Into::into));
    column("port_path", driver == Driver::Port, port.as_ref().map(|p| p.to_string().into()));
    column("path", driver == Driver::Path, path.as_ref().map(|p| p.to_string().into()));
    column("vendor_id", driver == Driver::Vendor, vendor_id.map(|v| v.to_string().into()));
    column("product_id", driver == Driver::Vendor, product_id.map(|p| p.to_string().into()));
    query
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::{Connection, params_from_iter};
    use virt_usb_model::Flavor;

    fn plan(sql: &str, params: &[Value]) -> String {
        let conn = Connection::open_in_memory().unwrap();
        conn.execute_batch(include_str!("../schema.sql")).unwrap();
        let mut statement = conn.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let lines =
            statement.query_map(params_from_iter(params), |row| row.get::<_, String>(3)).unwrap();
        lines.map(Result::unwrap).collect::<Vec<_>>().join("; ")
    }

    fn selector(request: &str) -> Selector {
        Flavor::parse_lists(Some(request), None).unwrap().usb_devices.remove(0).selector
    }

    #[test]
    fn every_selector_is_found_by_an_index_and_nothing_is_sorted() {
        let cases = [
            (r#"{"id":5}"#, "INTEGER PRIMARY KEY"),
            (r#"{"id":5,"vendor_id":"0529","serial":"A","class":"03"}"#, "INTEGER PRIMARY KEY"),
            (r#"{"vendor_id":"0529"}"#, "usb_devices_vendor"),
            (r#"{"vendor_id":"0529","product_id":"0001"}"#, "usb_devices_kind"),
            (
                r#"{"vendor_id":"0529","product_id":"0001","class":"03","tags":["erp"]}"#,
                "usb_devices_kind",
            ),
            (r#"{"serial":"A"}"#, "usb_devices_serial"),
            (r#"{"vendor_id":"0529","product_id":"0001","serial":"A"}"#, "usb_devices_serial"),
            (r#"{"port":"1-1.4"}"#, "usb_devices_port"),
            (r#"{"vendor_id":"0529","port":"1-1.4"}"#, "usb_devices_port"),
            (
                r#"{"vendor_id":"0529","port":"1-4","path":"pci-0000:00:14.0-usbv2-0:4"}"#,
                "usb_devices_path",
            ),
            (r#"{"class":"03"}"#, "SEARCH l USING PRIMARY KEY (kind=? AND value=?)"),
            (r#"{"tags":["erp","blue"]}"#, "SEARCH l USING PRIMARY KEY (kind=? AND value=?)"),
        ];
        for (request, index) in cases {
            let query = find(&selector(request));
            for sql in [query.sorted("d.*", "d.status = 'available'"), query.sql("d.*", "1")] {
                let plan = plan(&sql, &query.params);
                assert!(plan.contains(index), "{request}: {plan}");
                assert!(
                    !plan.contains("SCAN") && !plan.contains("TEMP B-TREE"),
                    "{request}: {plan}"
                );
            }
        }
    }

    #[test]
    fn devices_of_an_instance_are_found_by_the_instance() {
        for request in [
            r#"{"vendor_id":"0529","product_id":"0001"}"#,
            r#"{"serial":"A","port":"1-1"}"#,
            r#"{"class":"03"}"#,
        ] {
            let query = test(&selector(request));
            let mut params = query.params.clone();
            params.push("0".to_owned().into());
            let plan = plan(&query.sorted("d.*", "d.instance_uuid = ?"), &params);
            assert!(
                plan.contains("usb_devices_instance") && !plan.contains("TEMP B-TREE"),
                "{request}: {plan}"
            );
        }
    }

    #[test]
    fn void_claims_are_found_by_indexes() {
        let plan = plan(crate::release::UNCONFIRMED, &[1.0.into(), 120.0.into()]);
        assert!(plan.contains("claims_pending") && !plan.contains("SCAN"), "{plan}");
    }
}
