"""Invariants of a host, which hold after any crash. Each check returns the violations in words."""

from collections import defaultdict

from .daemons import open_devices, qemus
from .waiting import until_none

# Seconds. The agent releases the devices of an absent guest after two checks, 10 s apart. It must
# first start and connect again.
GRACE = 45


class Host:
    """One observation: the guests' live XML, the inventory, and the devices that are plugged in."""

    def __init__(self, w):
        self.live = {name: w.virsh.hostdevs(name) for name in w.virsh.running()}
        self.uuids = {name: w.virsh.uuid(name) for name in self.live}
        self.claims = w.product.claims()
        self.devices = [d for d in w.product.devices() if not d["deleted"]]
        self.opened = {name: open_devices(pid) for name, pid in qemus().items()}
        """The devices that QEMU has open, independent of the XML."""
        self.plugged = {g.serial: (g.address(), g.port()) for g in w.drawer.plugged()}


def shared(host):
    """No device is ever in two guests, not even for a moment."""
    users = defaultdict(list)
    for name, hostdevs in host.live.items():
        for hostdev in hostdevs:
            users[hostdev.address].append(name)
    real = {address for address, _ in host.plugged.values()}
    return [
        f"device {a} is in {' and '.join(names)}"
        for a, names in users.items()
        if len(names) > 1 and a in real
    ]


def doubly_claimed(host):
    holders = defaultdict(set)
    for claim in host.claims:
        holders[claim["device_id"]].add(claim["instance_uuid"])
    return [
        f"device {device} is held by {sorted(who)}"
        for device, who in holders.items()
        if len(who) > 1
    ]


def orphans(host):
    """A guest that is off holds no device, except by an assignment."""
    running = set(host.uuids.values())
    wrong = [
        c for c in host.claims if c["hold"] != "instance" and c["instance_uuid"] not in running
    ]
    return [f"device {c['device_id']} is held by {c['domain']}, which does not run" for c in wrong]


def misallocated(host):
    """An allocated device is in its guest, in no other, at its current address."""
    wrong = []
    names = {uuid: name for name, uuid in host.uuids.items()}
    rows = {d["id"]: d for d in host.devices}
    for claim in host.claims:
        row = rows.get(claim["device_id"])
        if row is None or row["serial"] not in host.plugged or claim["instance_uuid"] not in names:
            continue
        address, _ = host.plugged[row["serial"]]
        users = [
            name for name, hostdevs in host.live.items() if address in [h.address for h in hostdevs]
        ]
        if claim["state"] != "allocated":
            wrong.append(
                f"{row['serial']} is {claim['state']} for {claim['domain']}, not allocated"
            )
        elif users != [names.get(claim["instance_uuid"])]:
            wrong.append(
                f"{row['serial']} at {address} is allocated to {claim['domain']}, and is in {users}"
            )
    return wrong


def unclaimed(host):
    """Each device in a guest is known to the inventory."""
    rows = {d["serial"]: d["id"] for d in host.devices}
    held = {(c["instance_uuid"], c["device_id"]) for c in host.claims}
    wrong = []
    for serial, (address, _) in host.plugged.items():
        for name, hostdevs in host.live.items():
            if (
                address in [h.address for h in hostdevs]
                and (host.uuids[name], rows.get(serial)) not in held
            ):
                wrong.append(f"{serial} is in {name} without a claim")
    return wrong


def misopened(host):
    """QEMU has open exactly the devices that are allocated to its guest.

    The XML alone does not prove that.
    """
    wrong = []
    names = {uuid: name for name, uuid in host.uuids.items()}
    serials = {d["id"]: d["serial"] for d in host.devices}
    allocated = [c for c in host.claims if c["state"] == "allocated"]
    held = {(names.get(c["instance_uuid"]), serials.get(c["device_id"])) for c in allocated}
    for serial, (address, _) in host.plugged.items():
        for name in host.live:
            has, is_held = address in host.opened.get(name, ()), (name, serial) in held
            if has != is_held:
                held_or_not = "allocated" if is_held else "not allocated"
                open_or_not = "open" if has else "closed"
                wrong.append(
                    f"{serial} is {held_or_not} to {name}, whose QEMU has it {open_or_not}"
                )
    return wrong


def lost(host):
    """The inventory lists each plugged-in device at its current address."""
    wrong = []
    rows = {d["serial"]: d for d in host.devices}
    for serial, ((bus, device), port) in host.plugged.items():
        row = rows.get(serial)
        found = row and (row["bus_id"], row["device_id"], row["port_path"])
        if found != (bus, device, port):
            wrong.append(f"{serial} is at {(bus, device, port)}, the inventory says {found}")
    return wrong


SETTLED = (orphans, misallocated, unclaimed, misopened, lost)
"""The violations that may last a moment."""


def never(w):
    """The invariants that hold at every moment."""
    host = Host(w)
    return shared(host) + doubly_claimed(host)


def all_of(w):
    host = Host(w)
    checks = (shared, doubly_claimed, *SETTLED)
    return [problem for check in checks for problem in check(host)]


def settle(w, seconds=GRACE, more=lambda host: []):
    """Wait until all invariants and `more` hold. Fail at once on what must never happen."""

    def problems():
        host = Host(w)
        if worst := shared(host) + doubly_claimed(host):
            raise AssertionError("; ".join(worst))
        return [p for check in (*SETTLED, more) for p in check(host)]

    until_none(problems, "what must hold after a crash", seconds)
