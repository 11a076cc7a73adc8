-- 1: the device is in a hostdev that somebody wrote by hand, whether or not a request is served by it too
ALTER TABLE claims ADD COLUMN by_hand int NOT NULL DEFAULT 0;
UPDATE claims SET by_hand = 1 WHERE request IS NULL;
-- seconds since boot at which a restore named the device of this firm claim: what that means only the next prepare knows
ALTER TABLE claims ADD COLUMN incoming_since real;
