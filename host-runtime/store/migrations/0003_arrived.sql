-- 1: the guest arrived with the device by restore or migration, and its QEMU released it since: the
-- device must be reattached
ALTER TABLE claims ADD COLUMN arrived int NOT NULL DEFAULT 0;
