"""What must hold on a host whatever has crashed. Each check returns what is wrong, in words."""

from collections import defaultdict

from .daemons import open_devices, qemus
from .waiting import until_none

# The agent frees what an absent guest held after two looks, 10 s apart; it must first be up and connected again.
GRACE = 45


class Host:
    """One look at everything: the guests' live XML, the inventory, what is really plugged in."""

    def __init__(self, w):
        self.live = {name: w.virsh.hostdevs(name) for name in w.virsh.running()}
        self.uuids = {name: w.virsh.uuid(name) for name in self.live}
        self.claims = w.product.claims()
        self.devices = [d for d in w.product.devices() if not d["deleted"]]
        self.opened = {name: open_devices(pid) for name, pid in qemus().items()}
        """What QEMU itself holds, whatever the XML says."""
        self.plugged = {g.serial: (g.address(), g.port()) for g in w.drawer.plugged()}


def shared(host):
    """A device in two guests: never, not even for a moment."""
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
    """A claim of an assignment lasts while the guest is off."""
    running = set(host.uuids.values())
    wrong = [
        c for c in host.claims if c["hold"] != "instance" and c["instance_uuid"] not in running
    ]
    return [f"device {c['device_id']} is held by {c['domain']}, which does not run" for c in wrong]


def misallocated(host):
    """Allocated means: in exactly its guest, with the address of now."""
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
    """A device in a guest that the inventory knows nothing of."""
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
    """QEMU has open exactly what is allocated to its guest, which the XML alone does not prove."""
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
    """What is plugged in is in the inventory, where it is now."""
    wrong = []
    rows = {d["serial"]: d for d in host.devices}
    for serial, ((bus, device), port) in host.plugged.items():
        row = rows.get(serial)
        found = row and (row["bus_id"], row["device_id"], row["port_path"])
        if found != (bus, device, port):
            wrong.append(f"{serial} is at {(bus, device, port)}, the inventory says {found}")
    return wrong


SETTLED = (orphans, misallocated, unclaimed, misopened, lost)
"""What may not hold for a moment."""


def never(w):
    """For every moment."""
    host = Host(w)
    return shared(host) + doubly_claimed(host)


def all_of(w):
    host = Host(w)
    checks = (shared, doubly_claimed, *SETTLED)
    return [problem for check in checks for problem in check(host)]


def settle(w, seconds=GRACE, more=lambda host: []):
    """Waits until all hold, and `more` as well; what may never be must not be meanwhile."""

    def problems():
        host = Host(w)
        if worst := shared(host) + doubly_claimed(host):
            raise AssertionError("; ".join(worst))
        return [p for check in (*SETTLED, more) for p in check(host)]

    until_none(problems, "what must hold after a crash", seconds)
