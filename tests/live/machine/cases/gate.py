"""virsh start as an operator sees it: accepted, or refused with a message of virt-usb."""

from lib.case import case
from lib.guests import metadata, redirections, usb_devices
from lib.product import CONFIG, HOOK_LOG, HOOKS, STATE
from lib.shell import expect, refused

KEY = {"vendor_id": "0529", "product_id": "0001"}
SIMULATION = """
[[device]]
vendor = "0529"
product = "0001"
bus = 1
device = 5
port = "1-1.4"
serial = "HL-0001"
class = "ff"
speed = "full"
"""


def simulate(w, **config):
    """Let the hook read a simulated USB bus, because this machine may have none."""
    with open("/tmp/key.toml", "w", encoding="utf-8") as file:
        file.write(SIMULATION)
    w.product.configure(sysfs_root="/tmp/sys", **config)
    w.product.must("discover", "--sim", "/tmp/key.toml", "--sysfs-out", "/tmp/sys")


def asking(w, name, **more):
    return w.guest(name, metadata(usb_devices(KEY)), **more)


@case("virsh start is refused with one line that says why and what to do")
def veto(w):
    simulate(w)
    first, second = asking(w, "first"), asking(w, "second")
    w.start(first)
    answer = refused(
        w.virsh("start", "second"),
        "Hook script execution failed",
        "virt-usb: second asks for usb_devices[0]",
        "is held by first",
        "Stop the guest",
    )
    expect(
        sum("virt-usb: " in line for line in answer.text.splitlines()) == 1, "one line of virt-usb"
    )
    expect("prepare" in w.product.operations("second"), "the refusal to be on record")
    w.destroy(first)
    w.start(second)


@case(
    "without an inventory, virsh start of a guest that requests a device is refused and says what"
    " to run"
)
def no_inventory(w):
    asking(w, "g")
    refused(w.virsh("start", "g"), "virt-usb: g ", "virt-usb discover")


@case("a guest without a request starts whatever is broken")
def asks_for_nothing(w):
    plain = w.guest("plain", "<other xmlns='urn:example:other'>usb</other>")

    def works(what):
        answer = w.virsh("start", "plain")
        expect(answer.ok, f"it to start with {what}:\n{answer}")
        w.destroy(plain)

    CONFIG.write_text("this is no TOML")
    works("a broken configuration")
    w.product.configure()
    (STATE / "inventory.sqlite").write_bytes(b"no database" * 1000)
    works("a broken inventory")
    STATE.rename("/var/lib/away")
    works("no inventory")
    STATE.mkdir()
    w.product.configure(log="/no/such/folder/log")
    works("no place for the log")


@case(
    "a guest with a request is refused if the configuration is invalid, and the error names the key"
)
def broken_configuration(w):
    simulate(w)
    asking(w, "g")
    w.product.configure(usb_white_list_swich="on")
    refused(w.virsh("start", "g"), "virt-usb: ", 'did you mean "usb_white_list_switch"')


@case("libvirtd calls virt-usb's hook and another one, and either may refuse")
def beside_another(w):
    simulate(w)
    main = HOOKS.parent / "qemu"
    main.write_text(
        '#!/bin/sh\ncat > /dev/null\necho "$1 $2" >> /tmp/other.log\n'
        '[ ! -e /tmp/veto ] || [ "$2" != prepare ] || { echo "the admin says no" >&2; exit 1; }\n'
    )
    main.chmod(0o755)
    # libvirtd looks for the main script when it starts.
    w.libvirtd.restart()
    try:
        guest = asking(w, "g")
        w.start(guest)
        w.destroy(guest)
        with open("/tmp/other.log", encoding="utf-8") as file:
            called = file.read()
        expect(
            "g prepare" in called and "g release" in called,
            f"the other hook to be called: {called}",
        )
        open("/tmp/veto", "w", encoding="utf-8").close()
        refused(w.virsh("start", "g"), "the admin says no")
        expect(not w.product.claims(), "the claim to be released when the other hook refuses")
    finally:
        main.unlink()
        w.libvirtd.restart()


@case("redirections for a guest without SPICE are refused, and the error says what to add")
def no_spice(w):
    w.guest("g", metadata(redirections(1)))
    refused(w.virsh("start", "g"), "usb_redirection_devices[0]", "no SPICE graphics")


@case("each call is recorded with its duration")
def recorded(w):
    import json

    plain = w.guest("plain")
    w.start(plain)
    w.destroy(plain)
    records = [json.loads(line) for line in HOOK_LOG.read_text().splitlines()]
    expect(len(records) >= 5, f"prepare, start, started, stopped and release: {records}")
    expect(all(r["duration_us"] > 0 for r in records), f"each with its duration: {records}")
