-- What an operator says of a device, or it has itself to thank for, whatever the rules say. Text says why.
ALTER TABLE usb_devices ADD COLUMN disabled text;
ALTER TABLE usb_devices ADD COLUMN quarantined text;
-- It came and went too often: it is not offered until then. What is remembered of that, JSON.
ALTER TABLE usb_devices ADD COLUMN flapping_until datetime;
ALTER TABLE usb_devices ADD COLUMN flaps text;
-- 1: the rules want it quarantined after each use
ALTER TABLE usb_devices ADD COLUMN one_time_use int NOT NULL DEFAULT 0;
-- JSON list; tags holds those of the rules
ALTER TABLE usb_devices ADD COLUMN own_tags text NOT NULL DEFAULT '[]';
-- What the device sends of itself, hexadecimal: now, and at the claim after which it was quarantined
ALTER TABLE usb_devices ADD COLUMN descriptors text;
ALTER TABLE usb_devices ADD COLUMN used_as text;

-- The descriptors when the claim was made, and whether the device was, or may have been, in the guest since
ALTER TABLE claims ADD COLUMN descriptors text;
ALTER TABLE claims ADD COLUMN used int NOT NULL DEFAULT 0;
-- Of claims that were made before nobody knows: they count as used.
UPDATE claims SET used = 1;
