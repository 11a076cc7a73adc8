"""libvirt as an operator sees it.

A case uses virsh where virsh is the subject. Preparations (define, start, stop and inspect a guest)
use one connection to libvirt, because each virsh takes half a second under emulation.
"""

import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import libvirt

from .shell import Failure, must, run, transcript

# Timeout of a call, and of the start of libvirtd, in seconds.
TIMEOUT = 60
# Errors are raised, so libvirt need not print them.
libvirt.registerErrorHandler(lambda *_: None, None)


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
    def __init__(self, prefix=(), uri="qemu:///system"):
        # The command that enters another libvirtd's namespaces, and its URI: the second host of a
        # migration.
        self.prefix, self.uri = tuple(prefix), uri
        self._connection = None
        # A libvirtd that hangs must not block the case.
        self._asks = ThreadPoolExecutor(4)

    def ask(self, question):
        """Libvirt's answer; None if there is no such domain."""
        try:
            return self._answer(question)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise Failure(f"libvirt: {error}") from None

    def act(self, what, name, deed):
        """Run `deed` on a domain. Raise Failure on any error."""
        try:
            self._answer(lambda connection: deed(connection.lookupByName(name)))
            transcript.append(f"$ {what} {name}")
        except libvirt.libvirtError as error:
            raise Failure(f"{what} {name}: {error}") from None

    def start(self, name):
        self.act("start", name, lambda domain: domain.create())

    def destroy(self, name):
        self.act("destroy", name, lambda domain: domain.destroy())

    def undefine(self, name):
        self.act(
            "undefine",
            name,
            lambda domain: domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE),
        )

    def _answer(self, question):
        """Connect, again if libvirtd has ended or is starting."""
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                return self._asks.submit(self._ask, question).result(TIMEOUT)
            except TimeoutError:
                self._connection, self._asks = None, ThreadPoolExecutor(4)
                raise Failure(f"libvirt does not answer within {TIMEOUT} s") from None
            except libvirt.libvirtError as error:
                unconnected = (
                    error.get_error_domain() == libvirt.VIR_FROM_RPC
                    or error.get_error_code() == libvirt.VIR_ERR_NO_CONNECT
                )
                if not unconnected or time.monotonic() > end:
                    raise
                self._connection = None
                time.sleep(0.2)

    def _ask(self, question):
        if self._connection is None:
            self._connection = libvirt.open(self.uri)
        return question(self._connection)

    def __call__(self, *words, timeout=60, quiet=False):
        return run(*self.prefix, "virsh", "-q", *words, timeout=timeout, quiet=quiet)

    def must(self, *words, timeout=60, quiet=False):
        return must(*self.prefix, "virsh", "-q", *words, timeout=timeout, quiet=quiet).out

    def define(self, guest):
        self.ask(lambda connection: connection.defineXML(guest.xml()))

    def attach(self, name, device_xml, *flags):
        return self._device("attach-device", name, device_xml, flags)

    def detach(self, name, device_xml, *flags):
        return self._device("detach-device", name, device_xml, flags)

    def _device(self, verb, name, device_xml, flags):
        path = f"/tmp/{name}.device.xml"
        with open(path, "w", encoding="utf-8") as file:
            file.write(device_xml)
        return self(verb, name, path, *flags)

    def names(self):
        """All domains that are defined or run."""
        return self.ask(
            lambda connection: [domain.name() for domain in connection.listAllDomains()]
        )

    def running(self):
        """Guests that have a QEMU, including paused ones."""
        active = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
        return self.ask(
            lambda connection: [domain.name() for domain in connection.listAllDomains(active)]
        )

    def xml(self, name, inactive=False):
        """The live XML, or the XML of the definition; None if the domain does not exist."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        return self.ask(lambda connection: connection.lookupByName(name).XMLDesc(flags))

    def uuid(self, name):
        return self.ask(lambda connection: connection.lookupByName(name).UUIDString())

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
