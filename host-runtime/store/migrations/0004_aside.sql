-- Why a device is not offered whatever the rules say: an operator has disabled it, or it is
-- quarantined.
ALTER TABLE usb_devices ADD COLUMN disabled text;
ALTER TABLE usb_devices ADD COLUMN quarantined text;
-- End of the pause of a flapping device, and its history as JSON.
ALTER TABLE usb_devices ADD COLUMN flapping_until datetime;
ALTER TABLE usb_devices ADD COLUMN flaps text;
-- 1: the rules want it quarantined after each use
ALTER TABLE usb_devices ADD COLUMN one_time_use int NOT NULL DEFAULT 0;
-- JSON list; tags holds those of the rules
ALTER TABLE usb_devices ADD COLUMN own_tags text NOT NULL DEFAULT '[]';
-- The device's descriptors, hexadecimal: now, and at the claim after which it was quarantined
ALTER TABLE usb_devices ADD COLUMN descriptors text;
ALTER TABLE usb_devices ADD COLUMN used_as text;

-- The descriptors when the claim was made, and whether the device was, or may have been, in the
-- guest since
ALTER TABLE claims ADD COLUMN descriptors text;
ALTER TABLE claims ADD COLUMN used int NOT NULL DEFAULT 0;
-- For older claims this is unknown: they count as used.
UPDATE claims SET used = 1;
