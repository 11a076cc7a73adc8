"""A cloud of many hosts, made by copying the database rows of one compute service.

A thousand services in one process would only poll their queues.
"""

import datetime
import uuid

import sqlalchemy
from nova import context
from nova.db.api import api as api_db
from nova.db.main import api as cell_db
from oslo_utils.fixture import uuidsentinel
from placement import db_api as placement_db


def cell(mapping):
    """The database of a cell."""
    with context.target_cell(context.get_admin_context(), mapping) as of_cell:
        return cell_db.get_engine(context=of_cell)


class Table:
    """A table, with the columns of any version of Nova."""

    def __init__(self, engine, name):
        self.engine = engine
        self.table = sqlalchemy.Table(name, sqlalchemy.MetaData(), autoload_with=engine)

    def rows(self, **where):
        wanted = sqlalchemy.select(self.table).filter_by(**where)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(wanted).mappings()]

    def add(self, rows):
        with self.engine.begin() as connection:
            connection.execute(self.table.insert(), rows)

    def copy(self, names, of, **other):
        """Copy the row of a host for each name, and return its id and the ids of the copies.

        `other` has a function for each column that differs, of the name and the new row's id.
        """
        (row,) = self.rows(**of)
        with self.engine.connect() as connection:
            first = (
                connection.execute(sqlalchemy.select(sqlalchemy.func.max(self.table.c.id))).scalar()
                + 1
            )
        self.add(
            [
                row | {"id": at} | {key: make(name, at) for key, make in other.items()}
                for at, name in enumerate(names, first)
            ]
        )
        return row["id"], range(first, first + len(names))


def copy(host, names, mapping):
    """Let Nova and Placement know copies of a host under these names."""
    # The UUIDs that Nova's fake driver uses.
    uuids = {name: getattr(uuidsentinel, f"node_{name}") for name in names}
    nova, placement = cell(mapping), placement_db.get_placement_engine()
    called = {"host": lambda name, _: name}
    Table(nova, "services").copy(
        names, {"host": host, "binary": "nova-compute"}, uuid=lambda *_: str(uuid.uuid4()), **called
    )
    Table(nova, "compute_nodes").copy(
        names,
        {"host": host},
        hypervisor_hostname=lambda name, _: name,
        uuid=lambda name, _: uuids[name],
        **called,
    )
    Table(api_db.get_engine(), "host_mappings").copy(names, {"host": host}, **called)
    providers = Table(placement, "resource_providers")
    of, theirs = providers.copy(
        names,
        {"name": host},
        name=lambda name, _: name,
        uuid=lambda name, _: uuids[name],
        root_provider_id=lambda _, at: at,
    )
    for part in ("inventories", "resource_provider_traits"):
        table = Table(placement, part)
        rows = [
            {key: value for key, value in row.items() if key != "id"}
            for row in table.rows(resource_provider_id=of)
        ]
        table.add([row | {"resource_provider_id": at} for at in theirs for row in rows])


def beat(mapping):
    """Let all services have sent an update just now."""
    services = Table(cell(mapping), "services")
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    with services.engine.begin() as connection:
        connection.execute(services.table.update().values(last_seen_up=now))
