//! The table that others read: Nova's columns, in Nova's order.

use crate::common::*;

#[test]
fn usb_devices_has_the_columns_that_were_promised() {
    let (dir, _store) = inventory();
    let conn = raw(dir.path());
    let mut statement = conn.prepare("PRAGMA table_info(usb_devices)").unwrap();
    let columns: Vec<(String, String, bool, bool)> = statement
        .query_map([], |row| {
            Ok((row.get(1)?, row.get::<_, String>(2)?.to_lowercase(), row.get(3)?, row.get(5)?))
        })
        .unwrap()
        .map(Result::unwrap)
        .collect();
    // SQLite's own rule: an INTEGER PRIMARY KEY is NOT NULL without saying so.
    let wanted = [
        ("created_at", "datetime", false, false),
        ("updated_at", "datetime", false, false),
        ("deleted_at", "datetime", false, false),
        ("deleted", "int", true, false),
        ("id", "integer", false, true),
        ("compute_node_id", "int", true, false),
        ("address", "varchar(12)", true, false),
        ("product_id", "varchar(4)", false, false),
        ("vendor_id", "varchar(4)", false, false),
        ("bus_id", "int", false, false),
        ("device_id", "int", false, false),
        ("port_id", "int", false, false),
        ("status", "varchar(36)", true, false),
        ("extra_info", "text", false, false),
        ("instance_uuid", "varchar(36)", false, false),
    ];
    let first: Vec<_> = columns
        .iter()
        .take(wanted.len())
        .map(|(n, t, nn, pk)| (n.as_str(), t.as_str(), *nn, *pk))
        .collect();
    assert_eq!(first, wanted);
    assert!(columns.iter().any(|(name, ..)| name == "status_reason"));

    let indexed: Vec<String> = conn
        .prepare(
            "SELECT i.name FROM pragma_index_list('usb_devices') l, pragma_index_info(l.name) i \
                WHERE i.seqno = 0",
        )
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    for column in ["compute_node_id", "instance_uuid"] {
        assert!(indexed.contains(&column.to_owned()), "{indexed:?}");
    }
    let sequence: String = conn
        .query_row("SELECT sql FROM sqlite_schema WHERE name = 'usb_devices'", [], |row| row.get(0))
        .unwrap();
    assert!(sequence.contains("AUTOINCREMENT"), "ids are never used again");
}
