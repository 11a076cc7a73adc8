"""libvirtd in a container, as in OpenStack Kolla."""

from pathlib import Path

from lib.case import case
from lib.shell import expect
from lib.waiting import until

from .live import asking, known

CONTAINER = Path(__file__).parents[1] / "container"


def in_container(w, *options):
    """Stop libvirtd on the host and start it in a container."""
    w.libvirtd.kill()
    w.libvirtd.prefix = ("unshare", "--mount", CONTAINER, *options)
    w.libvirtd.start()


@case("libvirtd in a container needs four mounts, and the doctor names the missing ones")
def kolla(w):
    (stick,) = w.drawer.twins(1)
    try:
        in_container(w)
        w.product.agent.start()
        until(lambda: known(w, stick), "the agent to find the stick")
        doctor = lambda: [
            line for line in w.product("doctor").out.splitlines() if line.startswith("BROKEN")
        ]
        until(
            lambda: any("libvirtd has another root directory" in line for line in doctor()),
            "the doctor to miss files there",
        )
        missing = [
            name
            for name in ("50-virt-usb", "config.toml", "inventory.sqlite")
            if not any(f"/{name} is missing" in line for line in doctor())
        ]
        expect(not missing, f"the doctor to miss {missing} too")
        in_container(w, "--mounted")
        guest = asking(w, "g")
        w.start(guest)
        expect(
            w.product.claims_of(guest),
            "the hook in the container to claim the stick in the host's inventory",
        )
        w.allocated(guest, stick)
        w.boots_from(guest, stick, reset=True)
        until(lambda: not doctor(), "the doctor to find nothing broken")
        w.destroy(guest)
        until(lambda: known(w, stick)["status"] == "available", "it to be available again")
    finally:
        w.libvirtd.kill()
        w.libvirtd.prefix = ()
        w.libvirtd.start()
