"""Daemons that stop and start again while guests run."""

import signal
from pathlib import Path

from lib.case import case
from lib.guests import NO_USB, metadata, usb_devices
from lib.product import AGENT, STATE, USER
from lib.shell import expect, must, refused, run
from lib.waiting import stays, until

from .endings import claimed, free
from .redirection import desk


@case("a guest and its claim survive a restart of libvirtd")
def restart(w):
    guest = claimed(w)
    w.libvirtd.restart(signal.SIGTERM)
    until(
        lambda: "reconnect" in w.product.operations("g"),
        "the hook to be called for the guest that runs",
    )
    expect(w.virsh.running() == ["g"], "the guest to live")
    expect(w.product.claims_of(guest), "its claim to live")
    w.destroy(guest)
    free(w, guest)


@case("a guest and its claim survive kill -9 of libvirtd while the inventory is broken")
def killed(w):
    from lib.product import CONFIG

    guest = claimed(w)
    good = CONFIG.read_text()
    CONFIG.write_text("this is no TOML")
    w.libvirtd.kill()
    w.libvirtd.start()
    until(lambda: w.virsh.running() == ["g"], "the guest to live")
    stays(lambda: w.virsh.running() == ["g"], "the guest lives on", seconds=2)
    CONFIG.write_text(good)
    expect(w.product.claims_of(guest), "its claim to live")
    w.destroy(guest)
    free(w, guest)


@case("the agent reconnects when libvirtd is back")
def reconnect(w):
    w.product.agent.start()
    w.libvirtd.restart()
    guest = desk(w, 1)
    w.start(guest)
    until(
        lambda: w.virsh.redirdevs("desk") == ["ua-usb-redir-0"],
        "the redirection to be there",
        seconds=60,
    )


@case("a guest that started while the agent was down gets its devices when the agent starts")
def late_agent(w):
    w.product.configure(require_agent=False)
    guest = desk(w, 1)
    w.start(guest)
    expect(w.virsh.redirdevs("desk") == [], "nothing yet")
    w.product.agent.start()
    until(lambda: w.virsh.redirdevs("desk") == ["ua-usb-redir-0"], "the redirection to be there")


@case("a second agent on a host does not start")
def second_agent(w):
    w.product.agent.start()
    second = run(AGENT)
    expect(second.status == 1 and "another agent runs" in second.err, f"the reason: {second}")


@case("the rules stay in effect if the configuration is removed while the agent runs")
def configuration_gone(w):
    from lib.product import AGENT_LOG, CONFIG

    w.product.agent.start()
    CONFIG.unlink()
    until(
        lambda: (
            "config.toml was removed; the previous rules stay in effect" in AGENT_LOG.read_text()
        ),
        "a message about it",
    )
    expect(w.product.agent.is_running(), "the agent to keep running")


@case("virt-usb doctor reports no problem, a guest without a USB bus, a libvirtd that is down")
def doctor(w):
    w.product.agent.start()
    desk(w, 1)
    # There is no udevd here.
    control = Path("/run/udev/control")
    control.parent.mkdir(exist_ok=True)
    control.touch()
    well = w.product("doctor", "--all")
    expect(well.status == 0, f"nothing to be found: {well}")
    for words in (
        "QEMU can pass USB devices through",
        "QEMU has SPICE",
        "1 domain(s) request USB devices",
        "agent: it runs",
    ):
        expect(words in well.out, f"{words} in {well.out}")
    w.guest("nova", metadata(usb_devices({"vendor_id": "0951"})), usb=NO_USB)
    bus = w.product("doctor")
    expect(
        bus.status == 1 and "nova requests USB devices, but it has no USB bus" in bus.out,
        f"the guest to be found: {bus}",
    )
    w.libvirtd.kill()
    away = w.product("doctor")
    expect(away.status == 2 and "BROKEN   libvirt: " in away.out, f"libvirtd to be missed: {away}")


@case(
    "a damaged inventory is rebuilt with the claim of a running guest, and a backup can be restored"
)
def damaged(w):
    guest = claimed(w)
    copy = STATE / "copy"
    w.product.must("store", "backup", str(copy))
    inventory = STATE / "inventory.sqlite"
    with inventory.open("r+b") as file:
        file.write(b"\x5a" * 100)
    refused(w.product("devices"), "is damaged", "virt-usb store rebuild")
    rebuilt = w.product.must("store", "rebuild", "--sim", "/tmp/key.toml")
    expect(
        "rebuilt" in rebuilt.out and ".before-rebuild-" in rebuilt.out,
        f"the steps taken: {rebuilt.out}",
    )
    expect(w.product.claims_of(guest), "its claim to live")
    restored = w.product.must("store", "restore", str(copy), "--sim", "/tmp/key.toml")
    expect(".before-restore-" in restored.out, f"the steps taken: {restored.out}")
    expect(w.product.claims_of(guest), "its claim to live")
    expect(
        inventory.owner() == USER and inventory.stat().st_mode & 0o777 == 0o640,
        "the agent's user to own it",
    )
    w.product.must("store", "check")
    w.destroy(guest)
    free(w, guest)


def connections(pid):
    """The ids of this process's connections in libvirtd."""
    listed = must("virt-admin", "-q", "srv-clients-list", "libvirtd", quiet=True).out
    numbers = [line.split()[0] for line in listed.splitlines() if line.strip()]
    info = lambda number: run(
        "virt-admin", "-q", "client-info", "libvirtd", number, quiet=True
    ).out.split()
    return [number for number in numbers if str(pid) in info(number)]


@case("the agent leaks no descriptor when it loses its connection repeatedly")
def descriptors(w):
    w.product.agent.start()
    pid = w.product.agent.process.pid
    connected = lambda: w.product.agent.log().count("connected to libvirt")
    until(lambda: connected() == 1, "the agent to be connected")
    open_files = lambda: len(list(Path(f"/proc/{pid}/fd").iterdir()))
    first = None
    for time in range(max(w.kills, 3)):
        for number in connections(pid):
            # The agent may have closed this one already, because it has lost another one.
            run("virt-admin", "-q", "client-disconnect", "libvirtd", number, quiet=True)
        until(lambda: connected() == time + 2, "the agent to be connected again")
        # A connection may just be closing.
        if time == 1:
            first = open_files()
    until(lambda: open_files() <= first, f"as many descriptors as after two reconnects, {first}")
