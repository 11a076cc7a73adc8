-- 1: the guest came in with the device by restore or migration, and its QEMU let go of it meanwhile: it is to be attached anew
ALTER TABLE claims ADD COLUMN arrived int NOT NULL DEFAULT 0;
