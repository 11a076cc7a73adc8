-- 1: the device is in a hostdev of the domain's own XML, whether or not it also serves a request
ALTER TABLE claims ADD COLUMN by_hand int NOT NULL DEFAULT 0;
UPDATE claims SET by_hand = 1 WHERE request IS NULL;
-- seconds since boot at which a restore named the device of this firm claim: the next prepare tells
-- what that means
ALTER TABLE claims ADD COLUMN incoming_since real;
