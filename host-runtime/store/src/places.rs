//! Resolution of ports to paths. Bus numbers are assigned at boot, so the store keeps a path
//! instead of a port.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};
use virt_usb_model::{DevicePath, DeviceRequest, PortPath, Selector};

use crate::device::parse;
use crate::error::Sql;
use crate::{Store, StoreError};

impl Store {
    /// The paths of the ports in the configuration's rules. A port keeps the path that it had when
    /// a rule first named it, because after a reboot it would be another socket. `seen` looks up a
    /// new port on the host, and returns `None` if it cannot be resolved. Ports that no rule names
    /// are forgotten.
    ///
    /// # Errors
    /// When the database cannot be read or written.
    pub fn rule_paths(
        &mut self,
        ports: &[&PortPath],
        seen: impl Fn(&PortPath) -> Option<DevicePath>,
    ) -> Result<BTreeMap<PortPath, DevicePath>, StoreError> {
        let known = self.known_rule_paths()?;
        let mut paths = known.clone();
        paths.retain(|port, _| ports.contains(&port));
        for port in ports.iter().filter(|port| !known.contains_key(**port)) {
            if let Some(path) = seen(port) {
                paths.insert((*port).clone(), path);
            }
        }
        if paths != known {
            self.write(|tx, _| {
                tx.execute("DELETE FROM rule_ports", [])?;
                for (port, path) in &paths {
                    tx.prepare_cached("INSERT INTO rule_ports (port, path) VALUES (?1, ?2)")?
                        .execute(params![port.to_string(), path.to_string()])?;
                }
                Ok(())
            })?;
        }
        Ok(paths)
    }

    /// The selector as it would be stored: its port replaced by the port's path, where that is
    /// known.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn as_stored(&self, selector: &Selector) -> Result<Selector, StoreError> {
        let conn = self.conn()?;
        resolve(&conn, selector).map_err(|e| self.fault(&e))
    }

    /// The paths of ports that rules name, as far as they are known.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn known_rule_paths(&self) -> Result<BTreeMap<PortPath, DevicePath>, StoreError> {
        let paths = self.all("SELECT port, path FROM rule_ports", [], |row| {
            Ok((parse(row, "port")?, parse(row, "path")?))
        })?;
        Ok(paths.into_iter().collect())
    }
}

/// The requests with each port replaced by its path.
pub(crate) fn resolve_all(
    conn: &Connection,
    requests: &[DeviceRequest],
) -> Sql<Vec<DeviceRequest>> {
    requests
        .iter()
        .map(|request| {
            Ok(DeviceRequest { selector: resolve(conn, &request.selector)?, count: request.count })
        })
        .collect()
}

/// The selector with its port replaced by the port's path. A port whose path is not known stays.
pub(crate) fn resolve(conn: &Connection, selector: &Selector) -> Sql<Selector> {
    let mut resolved = selector.clone();
    if let (Some(port), None) = (&selector.port, &selector.path)
        && let Some(path) = path_at(conn, port)?
    {
        (resolved.port, resolved.path) = (None, Some(path));
    }
    Ok(resolved)
}

/// The path of a port: of the device that is plugged in there, or by another device on the same
/// bus.
fn path_at(conn: &Connection, port: &PortPath) -> Sql<Option<DevicePath>> {
    let there = conn
        .prepare_cached(
            "SELECT path FROM usb_devices WHERE port_path = ?1 AND deleted = 0 AND present = 1 AND \
                path IS NOT NULL",
        )?
        .query_row([port.to_string()], |row| parse(row, "path"))
        .optional()?;
    if there.is_some() {
        return Ok(there);
    }
    let on_bus: Vec<(PortPath, DevicePath)> = conn
        .prepare_cached(
            "SELECT port_path, path FROM usb_devices WHERE port_path LIKE ?1 AND deleted = 0 AND \
                present = 1
             AND path IS NOT NULL ORDER BY id",
        )?
        .query_map([format!("{}-%", port.bus())], |row| {
            Ok((parse(row, "port_path")?, parse(row, "path")?))
        })?
        .collect::<Sql<_>>()?;
    // A device at a USB 3 port has the path of the socket's USB 2 port, which may have another
    // number.
    let alike = on_bus.into_iter().find(|(of, path)| of.ports() == path.ports());
    Ok(alike.and_then(|(_, path)| DevicePath::new(path.controller(), path.version(), port.ports())))
}
