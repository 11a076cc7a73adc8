-- 1: the device was seen in the guest during this run of it. The audit of an existing inventory
-- knows.
ALTER TABLE claims ADD COLUMN seen_in_guest int NOT NULL DEFAULT 0;
UPDATE claims SET seen_in_guest = 1 WHERE state = 'allocated' OR id IN (
    SELECT c.id FROM events e CROSS JOIN claims c
    ON c.device_id = e.device_id AND c.instance_uuid = e.instance_uuid
    WHERE e.event = 'allocated' AND e.at >= c.created_at);
-- The age of an event is measured against this time, which follows the clock but does not jump with
-- it.
ALTER TABLE compute_nodes ADD COLUMN audit_time datetime;
-- Seconds since boot at the last discovery.
ALTER TABLE compute_nodes ADD COLUMN scanned_uptime real;
-- What the configuration held when it was last read: 2: the whitelist, on; 1: rules, off; 0:
-- neither; NULL: not known.
ALTER TABLE compute_nodes ADD COLUMN whitelist int;
