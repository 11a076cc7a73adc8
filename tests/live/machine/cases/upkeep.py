"""Daemons that end and come back while guests run."""

import signal
from pathlib import Path

from lib.case import case
from lib.guests import NO_USB, metadata, usb_devices
from lib.product import AGENT, STATE, USER
from lib.shell import expect, must, refused, run
from lib.waiting import stays, until

from .endings import claimed, free
from .redirection import desk


@case("libvirtd is restarted: the guest lives, and so does its claim")
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


@case(
    "libvirtd is killed: the guest lives, and so does its claim, though the inventory is broken meanwhile"
)
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


@case("the agent connects again when libvirtd comes back")
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


@case(
    "a guest that was started while the agent was down gets what it asks for when the agent comes"
)
def late_agent(w):
    w.product.configure(require_agent=False)
    guest = desk(w, 1)
    w.start(guest)
    expect(w.virsh.redirdevs("desk") == [], "nothing yet")
    w.product.agent.start()
    until(lambda: w.virsh.redirdevs("desk") == ["ua-usb-redir-0"], "the redirection to be there")


@case("a second agent on one host does not start")
def second_agent(w):
    w.product.agent.start()
    second = run(AGENT)
    expect(second.status == 1 and "another agent runs" in second.err, f"the reason: {second}")


@case("the configuration is removed while the agent runs: the rules of before count on")
def configuration_gone(w):
    from lib.product import AGENT_LOG, CONFIG

    w.product.agent.start()
    CONFIG.unlink()
    until(
        lambda: (
            "config.toml was removed; the previous rules stay in effect" in AGENT_LOG.read_text()
        ),
        "it to be said",
    )
    expect(w.product.agent.is_running(), "the agent to go on")


@case("virt-usb doctor finds nothing, then a guest without USB bus, then libvirtd that is down")
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
    "the inventory is damaged while a guest runs: it is made anew, and the guest's claim with it; then a backup is restored"
)
def damaged(w):
    guest = claimed(w)
    copy = STATE / "copy"
    w.product.must("store", "backup", str(copy))
    inventory = STATE / "inventory.sqlite"
    with inventory.open("r+b") as file:
        file.write(b"\x5a" * 100)
    refused(w.product("devices"), "is damaged", "virt-usb store rebuild")
    anew = w.product.must("store", "rebuild", "--sim", "/tmp/key.toml")
    expect("rebuilt" in anew.out and ".before-rebuild-" in anew.out, f"what was done: {anew.out}")
    expect(w.product.claims_of(guest), "its claim to live")
    restored = w.product.must("store", "restore", str(copy), "--sim", "/tmp/key.toml")
    expect(".before-restore-" in restored.out, f"what was done: {restored.out}")
    expect(w.product.claims_of(guest), "its claim to live")
    expect(
        inventory.owner() == USER and inventory.stat().st_mode & 0o777 == 0o640,
        "the agent's user to own it",
    )
    w.product.must("store", "check")
    w.destroy(guest)
    free(w, guest)


def connections(pid):
    """The numbers of this process's connections, as libvirtd counts them."""
    listed = must("virt-admin", "-q", "srv-clients-list", "libvirtd", quiet=True).out
    numbers = [line.split()[0] for line in listed.splitlines() if line.strip()]
    info = lambda number: run(
        "virt-admin", "-q", "client-info", "libvirtd", number, quiet=True
    ).out.split()
    return [number for number in numbers if str(pid) in info(number)]


@case("the agent's connection is lost again and again, and no descriptor stays")
def descriptors(w):
    w.product.agent.start()
    pid = w.product.agent.process.pid
    connected = lambda: w.product.agent.log().count("connected to libvirt")
    until(lambda: connected() == 1, "the agent to be connected")
    open_files = lambda: len(list(Path(f"/proc/{pid}/fd").iterdir()))
    first = None
    for time in range(max(w.kills, 3)):
        for number in connections(pid):
            # The agent may have closed it meanwhile, for it has lost another one.
            run("virt-admin", "-q", "client-disconnect", "libvirtd", number, quiet=True)
        until(lambda: connected() == time + 2, "the agent to be connected again")
        # One connection more or less may be about to be closed.
        if time == 1:
            first = open_files()
    until(lambda: open_files() <= first, f"as many descriptors as after two reconnects, {first}")
