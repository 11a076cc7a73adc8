-- Problems that keep an instance from a device that it should have, while they last.
CREATE TABLE problems (
    instance_uuid   varchar(36) NOT NULL,
    -- 'device 5' or 'redirection 0'
    about           varchar(36) NOT NULL,
    domain          varchar(255) NOT NULL,
    since           datetime NOT NULL,
    what            text NOT NULL,
    PRIMARY KEY (instance_uuid, about)
) WITHOUT ROWID;

-- 1: the device must leave the guest, and the claim ends with that
ALTER TABLE claims ADD COLUMN ending int NOT NULL DEFAULT 0;
