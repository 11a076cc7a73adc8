"""Live migration between two compute hosts. Each offers one of two sticks of a product."""

import json
from contextlib import contextmanager

from lib.case import case
from lib.guests import hostdev, metadata, usb_devices
from lib.shell import done, expect, refused
from lib.waiting import until
from nested.second_host import URI, SecondHost

KEY = {"vendor_id": "0951", "product_id": "1666"}


@contextmanager
def two_hosts(w, **config):
    """This host offers the first stick, and the second host the other one."""
    one, other = w.drawer.twins(2)
    w.product.configure(**offers(one), **config)
    second = SecondHost()
    try:
        second.configure(**offers(other), **config)
        second.start()
        w.product.discover()
        second.virt_usb("discover")
        yield second, one, other
    finally:
        second.stop()


def offers(stick):
    return {"usb_white_list_switch": "on", "usb_passthrough_whitelist": [{"port": stick.port()}]}


def migrate(w, guest):
    return w.virsh(
        "migrate", guest.name, URI, "--live", "--migrateuri", "tcp://127.0.0.1", timeout=120
    )


def on_second(second, guest, stick):
    return [h for h in second.virsh.hostdevs(guest.name) if h.address == stick.address()]


@case(
    "the migration of a guest with a USB device is refused by default, and the guest keeps running"
)
def refuse(w):
    with two_hosts(w) as (second, one, _):
        guest = w.guest("g", devices=hostdev(one))
        w.start(guest)
        w.boots_from(guest, one)
        refused(migrate(w, guest), "virt-usb: g ", "migration")
        expect(
            w.virsh.running() == ["g"] and w.has_live(guest, one),
            "the guest to keep running with its device",
        )
        expect(not second.claims(), "nothing to be held on the other host")


@case('migration = "reclaim": the guest gets an equivalent device of the other host')
def reclaim(w):
    with two_hosts(w, migration="reclaim") as (second, one, other):
        guest = w.guest("g", devices=hostdev(one))
        w.start(guest)
        w.boots_from(guest, one)
        done(migrate(w, guest))
        expect(on_second(second, guest, other), f"the other stick: {second.virsh.hostdevs('g')}")
        (claim,) = second.claims()
        # QEMU closes the device while it loads the state. Only an agent reattaches it.
        expect(
            claim["state"] == "claimed" and not claim["pending"],
            f"it to be the guest's there: {claim}",
        )
        until(lambda: not w.product.claims_of(guest), "the first host's claim to end")
        expect(
            w.product.device(serial=one.serial)["status"] == "available",
            "the first stick to be available",
        )


@case("after a migration with agents on both hosts, the guest boots from its device")
def reclaim_with_agents(w):
    with two_hosts(w, migration="reclaim") as (second, one, other):
        w.product.agent.start()
        second.agent.start()
        guest = w.guest("g", metadata(usb_devices(KEY)))
        w.start(guest)
        w.allocated(guest, one)
        done(migrate(w, guest))
        until(
            lambda: (
                [c for c in second.claims() if c["state"] == "allocated"]
                and on_second(second, guest, other)
            ),
            "it to be allocated there",
        )
        before = len(guest.booted_from())
        second.virsh.must("reset", "g")
        found = until(
            lambda: guest.booted_from()[before:],
            "the guest to boot from the other stick",
            seconds=60,
        )
        expect(set(found) == {other.serial}, f"the other stick, found {found}")


@case('migration = "reclaim" is refused if the other host has no equivalent device available')
def nothing_to_reclaim(w):
    with two_hosts(w, migration="reclaim") as (second, one, other):
        guest = w.guest("g", devices=hostdev(one))
        w.start(guest)
        other.unplug()
        second.virt_usb("discover")
        # The whitelist does not apply to hand-written hostdevs. Disabling the device does.
        listed = json.loads(second.virt_usb("devices", "--json").out)
        (stick,) = (d["id"] for d in listed if d["serial"] == one.serial)
        second.virt_usb("disable", str(stick))
        refused(migrate(w, guest), "virt-usb: g ")
        expect(
            w.virsh.running() == ["g"] and w.has_live(guest, one),
            "the guest to keep running with its device",
        )


@case(
    "two libvirtds with one state_dir: the migration is refused, and the error says what to change"
)
def shared_state_dir(w):
    with two_hosts(w, migration="reclaim", state_dir="/tmp/shared") as (second, one, _):
        guest = w.guest("g", devices=hostdev(one))
        w.start(guest)
        refused(migrate(w, guest), "each libvirtd needs its own state_dir")
        expect(
            w.virsh.running() == ["g"] and w.has_live(guest, one),
            "the guest to keep running with its device",
        )
        w.destroy(guest)
