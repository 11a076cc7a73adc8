"""Guests that start in seconds under plain emulation.

Each has 64 MiB and no disk. SeaBIOS boots from a USB stick if there is one.
"""

import json
import uuid
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

NAMESPACE = uuid.UUID("7b0f5c9e-6a55-4d53-9d0e-6f0e5f6d0a11")

XHCI = "<controller type='usb' model='qemu-xhci' ports='15'/>"
NO_USB = "<controller type='usb' model='none'/>"
# USB 1.1 with two ports: libvirt's default for an i440fx guest.
UHCI = "<controller type='usb' model='piix3-uhci'/>"


def metadata(flavor):
    """A flavor in virt-usb's metadata namespace: JSON, or "@NAME"."""
    text = flavor if isinstance(flavor, str) else json.dumps(flavor)
    return (
        f"<virt-usb:flavor xmlns:virt-usb='urn:virt-usb:flavor:1'>{escape(text)}</virt-usb:flavor>"
    )


def nova(extra_specs):
    """The metadata that Nova 32 writes for a flavor with these extra specs."""
    specs = "".join(
        f"<nova:extraSpec name='{key}'>{escape(value)}</nova:extraSpec>"
        for key, value in extra_specs.items()
    )
    return (
        "<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>"
        f"<nova:flavor name='m1.erp'><nova:extraSpecs>{specs}</nova:extraSpecs></nova:flavor>"
        "</nova:instance>"
    )


def usb_devices(*requests):
    return {"usb_devices": list(requests)}


def redirections(count):
    return {"usb_redirection_devices": [{"bus": "usb", "type": "spicevmc"}] * count}


def hostdev(gadget, address=None, alias=None):
    """A hand-written <hostdev>. `address` replaces the current address."""
    bus, device = address or gadget.address()
    return (
        "<hostdev mode='subsystem' type='usb'><source>"
        f"<vendor id='0x{gadget.vendor}'/><product id='0x{gadget.product}'/>"
        f"<address bus='{bus}' device='{device}'/>"
        f"</source>{f'''<alias name='{alias}'/>''' if alias else ''}</hostdev>"
    )


@dataclass
class Guest:
    name: str
    about: str = ""
    """The contents of <metadata>."""
    devices: str = ""
    """More XML for <devices>."""
    usb: str = XHCI
    machine: str = "pc"
    serial: str = field(init=False)

    def __post_init__(self):
        self.serial = f"/tmp/{self.name}.serial"

    @property
    def uuid(self):
        return str(uuid.uuid5(NAMESPACE, self.name))

    def xml(self):
        # strict=off: the guest also boots from a stick that was attached without a <boot order>,
        # which proves that the guest has it.
        return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{self.name}</name><uuid>{self.uuid}</uuid>
<metadata>{self.about}</metadata>
<memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='{self.machine}'>hvm</type></os>
<features><acpi/></features>
<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{self.usb}
<serial type='file'><source path='{self.serial}' append='on'/></serial>
<memballoon model='none'/>{self.devices}</devices>
<qemu:commandline><qemu:arg value='-boot'/><qemu:arg value='strict=off'/></qemu:commandline>
</domain>
"""

    def booted_from(self):
        """The serials that boot code printed on the guest's COM1, in order."""
        try:
            with open(self.serial, encoding="ascii", errors="replace") as file:
                text = file.read()
        except FileNotFoundError:
            return []
        # The boot code writes byte by byte: the last line may be incomplete.
        lines = text.split("\n")[:-1]
        return [
            line.split()[1]
            for line in lines
            if line.startswith("BOOTED-FROM ") and len(line.split()) > 1
        ]
