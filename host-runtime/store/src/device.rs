//! Rows of `usb_devices` and `claims`, and the one function that writes a device's state.

use rusqlite::{Row, Transaction, params};
use serde::Serialize;
use virt_usb_model::state::ClaimState;
use virt_usb_model::{
    BusAddress, Descriptors, Device, DeviceEntry, DeviceId, DeviceKey, InstanceId, PortPath,
    ProjectId, Selector, Serial, Speed, Status, UnavailableReason, UsbId, grant,
};

use crate::claim::Claimant;
use crate::error::{Sql, bad_row};
use crate::release::held;
use crate::{NOW, Store, StoreError};

/// Where a device is plugged in during this boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The port, with this boot's bus number.
    pub port: PortPath,
    /// The bus and the device number; the bus is that of the port.
    pub address: BusAddress,
}

/// A device's row: the host document's entry, and what only this host needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Published part of the device's row.
    #[serde(flatten)]
    pub entry: DeviceEntry,
    /// Time when the device was first seen.
    pub created_at: Option<String>,
    /// Time of the last change.
    pub updated_at: Option<String>,
    /// Unplugged while free.
    pub deleted_at: Option<String>,
    /// 0 = alive, else = id.
    pub deleted: u64,
    /// Plugged in when last looked at.
    #[serde(skip)]
    pub present: bool,
    /// Reason why the device will be unavailable once no instance holds it.
    #[serde(skip)]
    pub withheld: Option<UnavailableReason>,
    /// Why an operator has disabled it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled: Option<String>,
    /// Why it waits for an operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quarantined: Option<String>,
    /// End of the pause of a flapping device, which is unavailable until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flapping_until: Option<String>,
    /// Result of the whitelist rules alone: why the device is unavailable, its tags, whether it is
    /// quarantined after each use, and its projects.
    #[serde(skip)]
    pub rule_withheld: Option<UnavailableReason>,
    #[serde(skip)]
    #[expect(missing_docs, reason = "said above")]
    pub rule_tags: Vec<String>,
    #[serde(skip)]
    #[expect(missing_docs, reason = "said above")]
    pub one_time_use: bool,
    #[serde(skip)]
    #[expect(missing_docs, reason = "said above")]
    pub rule_projects: Vec<ProjectId>,
    /// The tags that an operator has given it.
    #[serde(skip)]
    pub own_tags: Vec<String>,
    /// USB descriptors that the device sends.
    #[serde(skip)]
    pub descriptors: Option<Descriptors>,
    /// Tells one stay of the device in its port from the next: see
    /// [`virt_usb_model::Device::generation`].
    #[serde(skip)]
    pub generation: Option<i64>,
    /// The same at the claim after which it was quarantined.
    #[serde(skip)]
    pub used_as: Option<Descriptors>,
}

impl Record {
    /// Identity of the device.
    pub fn key(&self) -> DeviceKey {
        let serial = Serial::new(self.entry.serial.clone(), self.entry.serial_kind == "duplicate");
        let (port, path) = (self.entry.port_path.clone(), self.entry.path.clone());
        DeviceKey { usb: self.usb(), serial, port, path }
    }

    /// Whether the selector means this device.
    pub fn is_selected_by(&self, selector: &Selector) -> bool {
        let entry = &self.entry;
        let device = Device {
            key: self.key(),
            address: entry.address,
            class: entry.class,
            interfaces: entry.interface_classes.clone(),
            speed: entry.speed,
            manufacturer: None,
            product: None,
            driver: None,
            host_use: None,
            descriptors: None,
            generation: None,
        };
        selector.matches(entry.id, &device, &entry.tags)
    }

    /// Where the device was when it was last seen.
    pub fn location(&self) -> Location {
        Location { port: self.entry.port_path.clone(), address: self.entry.address }
    }

    /// Records that the device was seen there.
    pub fn set_location(&mut self, seen: Location) {
        let Location { port, address } = seen;
        self.entry.address = address;
        self.entry.bus_id = address.bus();
        self.entry.device_id = address.device();
        self.entry.port_id = port.port_id();
        self.entry.port_path = port;
    }

    /// Vendor and product id of the device.
    pub const fn usb(&self) -> UsbId {
        UsbId { vendor: self.entry.vendor_id, product: self.entry.product_id }
    }

    /// Whether an instance of that project may have it.
    pub fn is_for(&self, project: Option<&ProjectId>) -> bool {
        let projects = &self.entry.projects;
        projects.is_empty() || project.is_some_and(|mine| projects.iter().any(|p| p.is(mine)))
    }

    /// Whether it is not offered whatever the rules say.
    pub const fn is_set_aside(&self) -> bool {
        use UnavailableReason as Reason;
        match self.withheld {
            Some(Reason::Disabled | Reason::Quarantined | Reason::Flapping) => true,
            Some(Reason::Whitelist | Reason::HostUse | Reason::Unreachable) | None => false,
        }
    }

    /// How the device differs from its last claim, if it was quarantined after that.
    pub fn altered(&self) -> Option<String> {
        self.used_as
            .as_ref()
            .zip(self.descriptors.as_ref())
            .and_then(|(was, is)| was.difference(is))
    }

    /// The first of the tags that only a whitelist rule can take away.
    pub fn tag_of_a_rule<'a>(&self, tags: &'a [String]) -> Option<&'a String> {
        tags.iter().find(|tag| self.rule_tags.contains(tag) && !self.own_tags.contains(tag))
    }

    /// The product's name, or the maker's, for messages.
    pub fn name(&self) -> Option<&str> {
        self.entry.product_name.as_deref().or(self.entry.manufacturer.as_deref())
    }

    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        let address: BusAddress = parse(row, "address")?;
        let port_path: PortPath = parse(row, "port_path")?;
        let reason: Option<String> = row.get("status_reason")?;
        let status: String = row.get("status")?;
        Status::from_columns(&status, reason.as_deref()).map_err(|e| bad_row(row, "status", e))?;
        let (rule_tags, own_tags) = (texts(row, "tags")?, texts(row, "own_tags")?);
        let (rule_projects, granted) = (list::<ProjectId>(row, "projects")?, list(row, "granted")?);
        let entry = DeviceEntry {
            id: read_id(row, "id")?,
            compute_node_id: row.get("compute_node_id")?,
            address,
            product_id: parse(row, "product_id")?,
            vendor_id: parse(row, "vendor_id")?,
            bus_id: address.bus(),
            device_id: address.device(),
            port_id: port_path.port_id(),
            status,
            status_reason: reason,
            extra_info: row.get("extra_info")?,
            instance_uuid: parse_some(row, "instance_uuid")?,
            port_path,
            serial: row.get("serial")?,
            serial_kind: row.get("serial_kind")?,
            class: parse(row, "class")?,
            interface_classes: list(row, "interface_classes")?,
            speed: parse_some::<Speed>(row, "speed")?,
            manufacturer: row.get("manufacturer")?,
            product_name: row.get("product_name")?,
            driver: row.get("driver")?,
            host_use: row.get("host_use")?,
            tags: joined(&rule_tags, &own_tags),
            projects: grant::joined(&rule_projects, &granted),
            path: parse_some(row, "path")?,
        };
        Ok(Self {
            entry,
            created_at: row.get("created_at")?,
            updated_at: row.get("updated_at")?,
            deleted_at: row.get("deleted_at")?,
            deleted: row.get("deleted")?,
            present: row.get("present")?,
            withheld: withheld(row)?,
            disabled: row.get("disabled")?,
            quarantined: row.get("quarantined")?,
            flapping_until: row.get("flapping_until")?,
            rule_withheld: parse_some(row, "withheld")?,
            rule_tags,
            one_time_use: row.get("one_time_use")?,
            rule_projects,
            own_tags,
            descriptors: parse_some(row, "descriptors")?,
            generation: row.get("generation")?,
            used_as: parse_some(row, "used_as")?,
        })
    }
}

/// Why a device is unavailable once no instance holds it: first an operator's decision, then the
/// device's behaviour, then the rules.
fn withheld(row: &Row<'_>) -> Sql<Option<UnavailableReason>> {
    let is_set =
        |column| Ok::<_, rusqlite::Error>(row.get_ref(column)? != rusqlite::types::ValueRef::Null);
    Ok(if is_set("disabled")? {
        Some(UnavailableReason::Disabled)
    } else if is_set("quarantined")? {
        Some(UnavailableReason::Quarantined)
    } else if is_set("flapping_until")? {
        Some(UnavailableReason::Flapping)
    } else {
        parse_some(row, "withheld")?
    })
}

/// A device's tags: those of the rules, then its own.
pub(crate) fn joined(of_rules: &[String], own: &[String]) -> Vec<String> {
    let more = own.iter().filter(|tag| !of_rules.contains(tag));
    of_rules.iter().chain(more).cloned().collect()
}

/// A hold on one device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClaimRow {
    /// The claim's own number.
    pub id: i64,
    /// Time when the claim was made.
    pub created_at: String,
    /// The device held.
    pub device_id: DeviceId,
    /// Instance that holds the device.
    pub instance_uuid: InstanceId,
    /// The domain's name at that time.
    pub domain: String,
    /// Owner project of the instance, if known.
    pub project_id: Option<String>,
    /// The position of the request among the instance's; none where no request is served by it.
    pub request: Option<u32>,
    /// `claimed` or `allocated`.
    pub state: String,
    /// `running` or `instance`.
    pub hold: String,
    /// An incoming restore or migration that was not confirmed yet.
    pub pending: bool,
    /// The boot it was made in.
    pub boot_id: String,
    /// The inventory's revision at its last change.
    pub revision: i64,
    /// The device is to leave the guest, and the claim ends with that.
    pub ending: bool,
    /// The guest was restored or migrated with the device. QEMU releases a host's device when it
    /// loads a guest's state and does not take it again, regardless of the live XML
    /// (hw/usb/host-libusb.c, `usb_host_post_load_bh`; libvirt names a device file, for which QEMU
    /// does not scan). The agent must detach and reattach the device. The column is named
    /// `arrived`, as in earlier versions.
    pub needs_reattach: bool,
    /// The device is in a handwritten hostdev, regardless of its alias and of whether it also
    /// serves a request. No rule takes the device away, and the hostdev is never rewritten.
    #[serde(skip)]
    pub by_hand: bool,
    /// Seconds since boot at which a restore named the device of this firm claim. The restore may
    /// be of a guest that runs, which libvirt refuses afterwards, so the claim itself stays as it
    /// was until the next prepare.
    #[serde(skip)]
    pub incoming_since: Option<f64>,
    /// Descriptors that the device sent when the claim was made.
    #[serde(skip)]
    pub descriptors: Option<Descriptors>,
    /// Whether the device was, or may have been, in the guest.
    #[serde(skip)]
    pub used: bool,
    /// Whether another device of the kind has shown the same serial since the claim was made.
    #[serde(skip)]
    pub serial_shared: bool,
    /// Whether the device was seen in the guest during this run of it: a guest that had it has lost
    /// a device, and did not fail to start.
    #[serde(skip)]
    pub seen_in_guest: bool,
    /// Whether libvirt was asked to attach the device, and was lost before it answered: the device
    /// may still come into the guest, whatever the live XML shows.
    #[serde(skip)]
    pub unsure: bool,
    /// The generation of the device with which it came into the guest, where that is known.
    #[serde(skip)]
    pub generation: Option<i64>,
}

impl ClaimRow {
    /// Whether the device is in the guest, as the live XML shows it.
    pub fn is_allocated(&self) -> bool {
        self.state == "allocated"
    }

    /// Whether the claim outlives the run of the guest (`hold = "instance"`).
    pub fn is_lasting(&self) -> bool {
        self.hold == "instance"
    }

    /// Whether the guest runs, as far as its claims tell: it has a claim for a run in this boot, or
    /// the device is in the guest.
    pub fn is_of_a_run(&self, boot_id: &str) -> bool {
        !self.pending && self.boot_id == boot_id && (self.is_allocated() || !self.is_lasting())
    }

    /// Instance and owner of the claim when it was made.
    pub fn claimant(&self) -> Claimant {
        Claimant {
            instance: self.instance_uuid,
            domain: self.domain.clone(),
            project: self.project_id.as_deref().and_then(|project| project.parse().ok()),
        }
    }

    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        Ok(Self {
            id: row.get("id")?,
            created_at: row.get("created_at")?,
            device_id: read_id(row, "device_id")?,
            instance_uuid: parse(row, "instance_uuid")?,
            domain: row.get("domain")?,
            project_id: row.get("project_id")?,
            request: row.get("request")?,
            state: row.get("state")?,
            hold: row.get("hold")?,
            pending: row.get::<_, Option<f64>>("pending_since")?.is_some(),
            boot_id: row.get("boot_id")?,
            revision: row.get("revision")?,
            ending: row.get("ending")?,
            needs_reattach: row.get("arrived")?,
            by_hand: row.get("by_hand")?,
            incoming_since: row.get("incoming_since")?,
            unsure: row.get("unsure")?,
            descriptors: parse_some(row, "descriptors")?,
            generation: row.get("generation")?,
            used: row.get("used")?,
            serial_shared: row.get("serial_shared")?,
            seen_in_guest: row.get("seen_in_guest")?,
        })
    }
}

impl Store {
    /// All devices that are plugged in or held, by id.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn devices(&self) -> Result<Vec<Record>, StoreError> {
        self.records("deleted = 0")
    }

    /// All devices ever seen, those that were unplugged too, by id.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn all_devices(&self) -> Result<Vec<Record>, StoreError> {
        self.records("1")
    }

    /// All claims, ordered by device.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn claims(&self) -> Result<Vec<ClaimRow>, StoreError> {
        self.all("SELECT * FROM claims ORDER BY device_id", [], ClaimRow::read)
    }

    /// Devices that concern one instance: those that it holds, those with these ids, and those at
    /// these addresses and ports.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn devices_about(
        &self,
        instance: InstanceId,
        ids: &[DeviceId],
        addresses: &[BusAddress],
        ports: &[PortPath],
    ) -> Result<Vec<Record>, StoreError> {
        // Numbers, addresses and ports hold nothing that SQL would read.
        let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
        let addresses: Vec<String> = addresses.iter().map(|a| format!("'{a}'")).collect();
        let ports: Vec<String> = ports.iter().map(|p| format!("'{p}'")).collect();
        self.records(&format!(
            "deleted = 0 AND (instance_uuid = '{instance}' OR id IN ({}) OR address IN ({}) OR \
                port_path IN ({}))",
            ids.join(", "),
            addresses.join(", "),
            ports.join(", ")
        ))
    }

    /// Claims of one instance, by device.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn claims_of(&self, instance: InstanceId) -> Result<Vec<ClaimRow>, StoreError> {
        held(&*self.conn()?, instance).map_err(|e| self.fault(&e))
    }

    pub(crate) fn records(&self, which: &str) -> Result<Vec<Record>, StoreError> {
        self.all(&format!("SELECT * FROM usb_devices WHERE {which} ORDER BY id"), [], Record::read)
    }

    pub(crate) fn all<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnMut(&Row<'_>) -> Sql<T>,
    ) -> Result<Vec<T>, StoreError> {
        let conn = self.conn()?;
        let rows = || conn.prepare_cached(sql)?.query_map(params, read)?.collect::<Sql<Vec<T>>>();
        rows().map_err(|e| self.fault(&e))
    }
}

/// Brings one device's state in line with its claim, its presence and its verdict.
pub(crate) fn refresh(tx: &Transaction<'_>, device: DeviceId) -> Sql<()> {
    let (present, withheld, state, instance) = tx
        .prepare_cached(
            // All columns of the device, because `withheld` chooses those that it reads.
            "SELECT d.*, c.state AS claim_state, c.instance_uuid AS claimed_by
             FROM usb_devices d LEFT JOIN claims c ON c.device_id = d.id WHERE d.id = ?1",
        )?
        .query_row([sql_id(device)], |row| {
            let state: Option<String> = row.get("claim_state")?;
            let holder: Option<String> = row.get("claimed_by")?;
            Ok((row.get::<_, bool>("present")?, withheld(row)?, state, holder))
        })?;
    let hold =
        state.map(|s| if s == "allocated" { ClaimState::Allocated } else { ClaimState::Claimed });
    write_state(tx, device, Status::derive(hold, present, withheld), instance.as_deref())
}

/// The only writer of `status`, `status_reason`, `instance_uuid` and `deleted`: for [`refresh`],
/// and for who has just made the facts and needs not read them.
pub(crate) fn write_state(
    tx: &Transaction<'_>,
    device: DeviceId,
    status: Option<Status>,
    instance: Option<&str>,
) -> Sql<()> {
    tx.prepare_cached(&format!(
        "UPDATE usb_devices SET status = ?2, status_reason = ?3, instance_uuid = ?4, was_held = \
            was_held OR ?4 IS NOT NULL, deleted = iif(?5, id, 0),
         deleted_at = iif(?5, coalesce(deleted_at, {NOW}), NULL), updated_at = {NOW}, revision = \
         (SELECT max(revision) FROM compute_nodes)
         WHERE id = ?1"
    ))?
    .execute(params![
        sql_id(device),
        status.map_or("removed", Status::name),
        status.and_then(Status::reason).map(UnavailableReason::name),
        instance,
        status.is_none(),
    ])?;
    Ok(())
}

/// Corrects the stored port and address to those that were just seen.
pub(crate) fn set_location(tx: &Transaction<'_>, device: DeviceId, seen: &Location) -> Sql<()> {
    let Location { port, address } = seen;
    tx.prepare_cached(
        "UPDATE usb_devices SET address = ?2, bus_id = ?3, device_id = ?4, port_path = ?5, port_id \
            = ?6, generation = NULL
         WHERE id = ?1 AND (address, port_path) <> (?2, ?5)",
    )?
    .execute(params![
        sql_id(device),
        address.to_string(),
        address.bus(),
        address.device(),
        port.to_string(),
        port.port_id(),
    ])?;
    Ok(())
}

/// One step of the inventory's revision; once a transaction that changes devices.
pub(crate) fn step_revision(tx: &Transaction<'_>) -> Sql<()> {
    tx.prepare_cached("UPDATE compute_nodes SET revision = revision + 1 WHERE deleted = 0")?
        .execute([])?;
    Ok(())
}

/// Ids are below 2⁵³.
pub(crate) fn sql_id(id: DeviceId) -> i64 {
    i64::try_from(id.get()).unwrap_or(i64::MAX)
}

pub(crate) fn read_id(row: &Row<'_>, column: &str) -> Sql<DeviceId> {
    let value: i64 = row.get(column)?;
    u64::try_from(value)
        .ok()
        .and_then(DeviceId::new)
        .ok_or_else(|| bad_row(row, column, format!("{value} is no device id")))
}

pub(crate) fn parse<T>(row: &Row<'_>, column: &str) -> Sql<T>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    parse_some(row, column)?.ok_or_else(|| bad_row(row, column, "is empty"))
}

pub(crate) fn parse_some<T>(row: &Row<'_>, column: &str) -> Sql<Option<T>>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    let text: Option<String> = row.get(column)?;
    text.map(|t| t.parse().map_err(|e| bad_row(row, column, e))).transpose()
}

fn texts(row: &Row<'_>, column: &str) -> Sql<Vec<String>> {
    let text: String = row.get(column)?;
    if text == "[]" {
        return Ok(Vec::new());
    }
    serde_json::from_str(&text).map_err(|e| bad_row(row, column, e))
}

fn list<T>(row: &Row<'_>, column: &str) -> Sql<Vec<T>>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    texts(row, column)?.iter().map(|t| t.parse().map_err(|e| bad_row(row, column, e))).collect()
}
