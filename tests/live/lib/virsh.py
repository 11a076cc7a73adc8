"""libvirt as an operator sees it."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

from .shell import must, run


@dataclass(frozen=True)
class Hostdev:
    alias: str
    vendor: str
    product: str
    bus: int
    device: int

    @property
    def address(self):
        return (self.bus, self.device)


class Virsh:
    def __init__(self, prefix=()):
        # What brings a command into another libvirtd's world: the second host of a migration.
        self.prefix = tuple(prefix)

    def __call__(self, *words, timeout=60, quiet=False):
        return run(*self.prefix, "virsh", "-q", *words, timeout=timeout, quiet=quiet)

    def must(self, *words, timeout=60, quiet=False):
        return must(*self.prefix, "virsh", "-q", *words, timeout=timeout, quiet=quiet).out

    def define(self, guest):
        path = f"/tmp/{guest.name}.xml"
        with open(path, "w", encoding="utf-8") as file:
            file.write(guest.xml())
        self.must("define", path)

    def attach(self, name, device_xml, *flags):
        return self._device("attach-device", name, device_xml, flags)

    def detach(self, name, device_xml, *flags):
        return self._device("detach-device", name, device_xml, flags)

    def _device(self, verb, name, device_xml, flags):
        path = f"/tmp/{name}.device.xml"
        with open(path, "w", encoding="utf-8") as file:
            file.write(device_xml)
        return self(verb, name, path, *flags)

    def names(self, *flags):
        return self.must("list", "--name", *flags, quiet=True).split()

    def running(self):
        """Guests that have a QEMU, paused ones too."""
        return self.names()

    def xml(self, name, *flags):
        """None: there is no such domain (any more)."""
        answer = self("dumpxml", name, *flags, quiet=True)
        return answer.out if answer.ok else None

    def hostdevs(self, name):
        """The USB devices in the live XML."""
        text = self.xml(name)
        found = ElementTree.fromstring(text).findall("devices/hostdev[@type='usb']") if text else []
        return [_hostdev(element) for element in found]

    def redirdevs(self, name):
        """The aliases of the redirection ports in the live XML."""
        text = self.xml(name)
        found = ElementTree.fromstring(text).findall("devices/redirdev") if text else []
        return [element.find("alias").get("name") for element in found]


def _hostdev(element):
    source, alias = element.find("source"), element.find("alias")
    vendor, product, address = (source.find(tag) for tag in ("vendor", "product", "address"))
    number = lambda node, key: int(node.get(key), 0) if node is not None else 0
    return Hostdev(
        alias.get("name") if alias is not None else "",
        f"{number(vendor, 'id'):04x}",
        f"{number(product, 'id'):04x}",
        number(address, "bus"),
        number(address, "device"),
    )
