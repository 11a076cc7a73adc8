-- Which projects may have which devices, beside what the whitelist's rules say: a host's own, or
-- its mirror of the fleet's.
CREATE TABLE grants (
    name            varchar(255) PRIMARY KEY,
    created_at      datetime NOT NULL,
    updated_at      datetime NOT NULL,
    -- the grant's JSON
    document        text NOT NULL
) WITHOUT ROWID;
-- The projects of the grants that match, a JSON list; those of the rules stand in projects.
ALTER TABLE usb_devices ADD COLUMN granted text NOT NULL DEFAULT '[]';
