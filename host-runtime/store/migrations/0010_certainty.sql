-- The boot of the last discovery. Until a discovery has run in a boot, a port may be one of the
-- boot before.
ALTER TABLE compute_nodes ADD COLUMN scanned_boot varchar(36);
UPDATE compute_nodes SET scanned_boot = boot_id;
-- 1: libvirt was asked to attach the device, and the connection was lost before it answered: it may
-- still come into the guest
ALTER TABLE claims ADD COLUMN unsure int NOT NULL DEFAULT 0;
-- The libvirt that runs the guests that hold devices, in its own words; NULL: not known.
ALTER TABLE compute_nodes ADD COLUMN libvirt text;
-- Tells one stay of a device in its port from the next, under the same address too: the inode of
-- its sysfs folder. A claim has that with which its device came into the guest. NULL: not known.
ALTER TABLE usb_devices ADD COLUMN generation int;
ALTER TABLE claims ADD COLUMN generation int;
-- Devices that are gone are found by what would make them known again, however many there are.
CREATE INDEX usb_devices_gone_serial ON usb_devices (serial) WHERE deleted <> 0;
CREATE INDEX usb_devices_gone_kind ON usb_devices (vendor_id, product_id, serial_kind)
    WHERE deleted <> 0;
-- 1: an instance has held the device. The audit of an existing inventory knows, as far as it goes.
ALTER TABLE usb_devices ADD COLUMN was_held int NOT NULL DEFAULT 0;
UPDATE usb_devices SET was_held = 1
    WHERE instance_uuid IS NOT NULL
    OR id IN (SELECT device_id FROM events WHERE instance_uuid IS NOT NULL);
