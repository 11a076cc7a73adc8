-- The owner project of an instance whose domain names none, set by an administrator.
CREATE TABLE owners (
    instance_uuid   varchar(36) PRIMARY KEY,
    created_at      datetime NOT NULL,
    -- the domain's name then
    domain          varchar(255) NOT NULL,
    project_id      varchar(255) NOT NULL
) WITHOUT ROWID;
