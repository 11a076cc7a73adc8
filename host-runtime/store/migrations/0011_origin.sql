-- 1: a simulation made the devices; 0: the host has them; NULL: not known. An agent that simulates
-- its guests has noted "a simulation" as its libvirt.
ALTER TABLE compute_nodes ADD COLUMN simulated int;
UPDATE compute_nodes SET simulated = 1 WHERE libvirt = 'a simulation';
