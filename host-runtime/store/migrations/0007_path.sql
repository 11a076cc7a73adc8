-- the socket, whatever the bus numbers are, as udev's ID_PATH_WITH_USB_REVISION; NULL: not known
ALTER TABLE usb_devices ADD COLUMN path varchar(255);
CREATE INDEX usb_devices_path ON usb_devices (path) WHERE deleted = 0;
-- 1: since the claim was made, another device of the kind has shown the same serial
ALTER TABLE claims ADD COLUMN serial_shared int NOT NULL DEFAULT 0;
-- Which socket a port of the configuration's rules meant when the rule was first seen: bus numbers
-- change at a reboot.
CREATE TABLE rule_ports (
    port            varchar(32) PRIMARY KEY,
    path            varchar(255) NOT NULL
) WITHOUT ROWID;
