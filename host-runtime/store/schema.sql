-- The whole schema, as the migrations make it (a test compares them). Times are UTC, ISO 8601 with
-- milliseconds.

CREATE TABLE compute_nodes (
    created_at      datetime,
    updated_at      datetime,
    deleted_at      datetime,
    deleted         int NOT NULL DEFAULT 0,
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    host            varchar(255) NOT NULL,
    -- grows with every change of the inventory
    revision        int NOT NULL DEFAULT 0,
    scanned_at      datetime,
    -- the boot whose claims these are: those of the boots before were swept
    boot_id         varchar(36),
    -- the age of an event is measured against this time, which follows the clock but does not jump
    -- with it
    audit_time      datetime,
    -- seconds since boot at the last discovery
    scanned_uptime  real,
    -- what the configuration held when it was last read: 2: the whitelist, on; 1: rules, off; 0:
    -- neither; NULL: not known
    whitelist       int,
    -- the boot of the last discovery; until one has run in a boot, a port may be one of the boot
    -- before
    scanned_boot    varchar(36),
    -- the libvirt that runs the guests that hold devices, in its own words; NULL: not known
    libvirt         text,
    -- 1: a simulation made the devices; 0: the host has them; NULL: not known
    simulated       int
);

CREATE TABLE usb_devices (
    created_at      datetime,
    updated_at      datetime,
    deleted_at      datetime,
    -- 0 = alive, else = id
    deleted         int NOT NULL DEFAULT 0,
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    compute_node_id int NOT NULL,
    -- usb_<bus>_<device>
    address         varchar(12) NOT NULL,
    product_id      varchar(4),
    vendor_id       varchar(4),
    bus_id          int,
    device_id       int,
    -- the last number of port_path
    port_id         int,
    status          varchar(36) NOT NULL,
    extra_info      text,
    instance_uuid   varchar(36),
    status_reason   varchar(36),
    port_path       varchar(32) NOT NULL,
    serial          text,
    serial_kind     varchar(9) NOT NULL,
    class           varchar(2) NOT NULL,
    -- JSON lists
    interface_classes text NOT NULL DEFAULT '[]',
    tags            text NOT NULL DEFAULT '[]',
    projects        text NOT NULL DEFAULT '[]',
    speed           varchar(10),
    manufacturer    text,
    product_name    text,
    driver          text,
    host_use        text,
    -- plugged in when last looked at
    present         int NOT NULL DEFAULT 1,
    -- why the device is not offered while no instance holds it; status and status_reason are
    -- derived from the claim, present and this column
    withheld        varchar(36),
    revision        int NOT NULL DEFAULT 0,
    -- why an operator has disabled it; why it waits for an operator
    disabled        text,
    quarantined     text,
    -- end of the pause of a flapping device, and its history as JSON
    flapping_until  datetime,
    flaps           text,
    -- 1: the rules want it quarantined after each use
    one_time_use    int NOT NULL DEFAULT 0,
    -- an operator's tags, JSON list; tags holds those of the rules
    own_tags        text NOT NULL DEFAULT '[]',
    -- the device's descriptors, hexadecimal: now, and at the claim after which it was quarantined
    descriptors     text,
    used_as         text,
    -- the projects of the grants that match, a JSON list; those of the whitelist's rule stand in
    -- projects
    granted         text NOT NULL DEFAULT '[]',
    -- the socket, whatever the bus numbers are, as udev's ID_PATH_WITH_USB_REVISION; NULL: not
    -- known
    path            varchar(255),
    -- tells one stay of the device in its port from the next: the inode of its sysfs folder; NULL:
    -- not known
    generation      int,
    -- 1: an instance has held the device
    was_held        int NOT NULL DEFAULT 0
);
CREATE INDEX usb_devices_compute_node ON usb_devices (compute_node_id);
CREATE INDEX usb_devices_instance ON usb_devices (instance_uuid) WHERE instance_uuid IS NOT NULL;
CREATE INDEX usb_devices_kind ON usb_devices (vendor_id, product_id, status) WHERE deleted = 0;
CREATE INDEX usb_devices_vendor ON usb_devices (vendor_id, status) WHERE deleted = 0;
CREATE INDEX usb_devices_serial ON usb_devices (serial) WHERE deleted = 0;
CREATE INDEX usb_devices_port ON usb_devices (port_path) WHERE deleted = 0;
CREATE INDEX usb_devices_path ON usb_devices (path) WHERE deleted = 0;
CREATE INDEX usb_devices_gone_serial ON usb_devices (serial) WHERE deleted <> 0;
CREATE INDEX usb_devices_gone_kind ON usb_devices (vendor_id, product_id, serial_kind)
    WHERE deleted <> 0;

-- Labels that selectors match and a device can have several of: kind is 'class' or 'tag'.
CREATE TABLE device_labels (
    kind            varchar(5) NOT NULL,
    value           varchar(64) NOT NULL,
    device_id       int NOT NULL REFERENCES usb_devices (id),
    PRIMARY KEY (kind, value, device_id)
) WITHOUT ROWID;
CREATE INDEX device_labels_device ON device_labels (device_id);

-- Lasting intent: the instance gets these devices at each start. Survives stop and reboot.
CREATE TABLE assignments (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    created_at      datetime NOT NULL,
    instance_uuid   varchar(36) NOT NULL,
    -- one entry of usb_devices, JSON
    request         text NOT NULL,
    -- 'flavor' or 'operator'
    source          varchar(8) NOT NULL
);
CREATE INDEX assignments_instance ON assignments (instance_uuid);

-- The owner project of an instance whose domain names none, set by an administrator.
CREATE TABLE owners (
    instance_uuid   varchar(36) PRIMARY KEY,
    created_at      datetime NOT NULL,
    -- the domain's name then
    domain          varchar(255) NOT NULL,
    project_id      varchar(255) NOT NULL
) WITHOUT ROWID;

-- A hold on one device. One row a device: two instances can never hold the same.
CREATE TABLE claims (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    created_at      datetime NOT NULL,
    device_id       int NOT NULL UNIQUE REFERENCES usb_devices (id),
    instance_uuid   varchar(36) NOT NULL,
    domain          varchar(255) NOT NULL,
    project_id      varchar(255),
    -- the position of the request among the instance's; NULL: no request is served by it
    request         int,
    -- 'claimed' or 'allocated'
    state           varchar(9) NOT NULL,
    -- 'running': ends with release or with the boot; 'instance': ends with the assignment
    hold            varchar(8) NOT NULL,
    -- seconds since boot at which an incoming restore or migration claimed it; NULL once confirmed
    pending_since   real,
    boot_id         varchar(36) NOT NULL,
    revision        int NOT NULL,
    -- 1: the device must leave the guest, and the claim ends with that
    ending          int NOT NULL DEFAULT 0,
    -- 1: the guest arrived with the device by restore or migration, and its QEMU released it since:
    -- the device must be reattached
    arrived         int NOT NULL DEFAULT 0,
    -- the device's descriptors when the claim was made
    descriptors     text,
    -- 1: the device was, or may have been, in the guest since
    used            int NOT NULL DEFAULT 0,
    -- 1: since the claim was made, another device of the kind has shown the same serial
    serial_shared   int NOT NULL DEFAULT 0,
    -- 1: the device was seen in the guest during this run of it
    seen_in_guest   int NOT NULL DEFAULT 0,
    -- 1: the device is in a hostdev of the domain's own XML, whether or not it also serves a
    -- request
    by_hand         int NOT NULL DEFAULT 0,
    -- seconds since boot at which a restore named the device of this firm claim: the next prepare
    -- tells what that means
    incoming_since  real,
    -- 1: libvirt was asked to attach the device, and the connection was lost before it answered: it
    -- may still come into the guest
    unsure          int NOT NULL DEFAULT 0,
    -- the device's generation when it came into the guest; NULL: not known
    generation      int
);
CREATE INDEX claims_instance ON claims (instance_uuid);
CREATE INDEX claims_pending ON claims (pending_since) WHERE pending_since IS NOT NULL;

-- Nova's table of that name: key 'usb_devices', value what was assigned to the instance, JSON.
CREATE TABLE instance_system_metadata (
    created_at      datetime,
    updated_at      datetime,
    deleted_at      datetime,
    deleted         int NOT NULL DEFAULT 0,
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    instance_uuid   varchar(36) NOT NULL,
    key             varchar(255) NOT NULL,
    value           text
);
CREATE UNIQUE INDEX instance_system_metadata_key ON instance_system_metadata (instance_uuid, key)
    WHERE deleted = 0;

CREATE TABLE flavors (
    name            varchar(255) PRIMARY KEY,
    created_at      datetime NOT NULL,
    updated_at      datetime NOT NULL,
    -- the flavor's JSON
    document        text NOT NULL
) WITHOUT ROWID;

-- Which projects may have which devices, beside what the whitelist's rules say.
CREATE TABLE grants (
    name            varchar(255) PRIMARY KEY,
    created_at      datetime NOT NULL,
    updated_at      datetime NOT NULL,
    -- the grant's JSON
    document        text NOT NULL
) WITHOUT ROWID;

-- Which socket a port of the configuration's rules meant when the rule was first seen: bus numbers
-- change at a reboot.
CREATE TABLE rule_ports (
    port            varchar(32) PRIMARY KEY,
    path            varchar(255) NOT NULL
) WITHOUT ROWID;

-- Problems that keep an instance from a device that it should have, while they last.
CREATE TABLE problems (
    instance_uuid   varchar(36) NOT NULL,
    -- 'device 5' or 'redirection 0'
    about           varchar(36) NOT NULL,
    domain          varchar(255) NOT NULL,
    since           datetime NOT NULL,
    what            text NOT NULL,
    PRIMARY KEY (instance_uuid, about)
) WITHOUT ROWID;

-- The audit: which instance got which device, when and why. Append-only: rows are never changed,
-- and pruned only after a day at the earliest.
CREATE TABLE events (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    at              datetime NOT NULL,
    event           varchar(16) NOT NULL,
    instance_uuid   varchar(36),
    domain          varchar(255),
    project_id      varchar(255),
    device_id       int,
    -- the program, and what it was doing
    actor           varchar(64) NOT NULL,
    detail          text
);
CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events
    BEGIN SELECT raise(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_are_kept BEFORE DELETE ON events
    WHEN old.at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 day')
    BEGIN SELECT raise(ABORT, 'events are kept for a day at least'); END;
