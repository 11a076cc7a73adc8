//! Nova's table `instance_system_metadata`: under the key `usb_devices` what is assigned to the
//! instance, as a JSON list.

use rusqlite::{Transaction, params};
use serde::Serialize;
use virt_usb_model::{BusAddress, DeviceId, InstanceId, ProductId, VendorId};

use crate::NOW;
use crate::device::{parse, read_id};
use crate::error::Sql;

#[derive(Serialize)]
struct Assigned {
    id: DeviceId,
    vendor_id: VendorId,
    product_id: ProductId,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    address: BusAddress,
}

/// Brings the instance's entry in line with its claims; without any it is marked deleted.
pub(crate) fn refresh(tx: &Transaction<'_>, instance: InstanceId) -> Sql<()> {
    let instance = instance.to_string();
    let assigned: Vec<Assigned> = tx
        .prepare_cached(
            "SELECT d.id, d.vendor_id, d.product_id, d.serial, d.address FROM claims c JOIN \
                usb_devices d ON d.id = c.device_id
             WHERE c.instance_uuid = ?1 ORDER BY d.id",
        )?
        .query_map([&instance], |row| {
            Ok(Assigned {
                id: read_id(row, "id")?,
                vendor_id: parse(row, "vendor_id")?,
                product_id: parse(row, "product_id")?,
                serial: row.get("serial")?,
                address: parse(row, "address")?,
            })
        })?
        .collect::<Sql<_>>()?;
    if assigned.is_empty() {
        tx.prepare_cached(&format!(
            "UPDATE instance_system_metadata SET deleted = id, deleted_at = {NOW} WHERE \
                instance_uuid = ?1 AND key = 'usb_devices' AND deleted = 0"
        ))?
        .execute([&instance])?;
        return Ok(());
    }
    let value = serde_json::to_string(&assigned).unwrap_or_default();
    tx.prepare_cached(&format!(
        "INSERT INTO instance_system_metadata (created_at, updated_at, instance_uuid, key, value) \
            VALUES ({NOW}, {NOW}, ?1, 'usb_devices', ?2)
         ON CONFLICT (instance_uuid, key) WHERE deleted = 0 DO UPDATE SET value = excluded.value, \
         updated_at = excluded.updated_at
         WHERE value <> excluded.value"
    ))?
    .execute(params![instance, value])?;
    Ok(())
}
