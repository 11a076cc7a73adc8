"""USB devices without hardware: configfs gadgets, plugged into dummy_hcd host controllers.

Each dummy_hcd is a bus with one port. To plug a gadget in, write its UDC file. To unplug it, empty
that file.
"""

import os
from pathlib import Path

from .shell import Failure
from .waiting import until

GADGETS = Path("/sys/kernel/config/usb_gadget")
SEEN = Path("/sys/bus/usb/devices")

# Boot code for a stick: sets DS, prints the text behind it on COM1 (0x3f8) byte by byte, and halts.
BOOT_CODE = bytes.fromhex("fa31c08ed8be167cac84c07406baf803eeebf5f4ebfd")


# One vendor-defined report of 128 bytes (HID 1.11, 6.2.2).
REPORTS = bytes.fromhex("06a0ff 0901 a101 0902 1500 26ff00 7508 9580 8102 c0")


class Gadget:
    """A mass-storage stick, or another `function` of configfs.

    A guest that boots from the stick prints the stick's serial.
    """

    def __init__(self, name, vendor, product, serial, function="mass_storage"):
        self.function = function
        self.name, self.vendor, self.product, self.serial = name, vendor, product, serial
        self.slot = None
        self.folder = GADGETS / name
        self._make()

    def _make(self):
        function = self.folder / f"functions/{self.function}.0"
        for folder in (
            self.folder,
            self.folder / "strings/0x409",
            self.folder / "configs/c.1",
            function,
        ):
            folder.mkdir()
        self._write("idVendor", f"0x{self.vendor}")
        self._write("idProduct", f"0x{self.product}")
        self._write("strings/0x409/manufacturer", "virt-usb tests")
        self._write("strings/0x409/product", self.name)
        if self.serial:
            self._write("strings/0x409/serialnumber", self.serial)
        if self.function == "mass_storage":
            self._write("functions/mass_storage.0/lun.0/file", str(self._image()))
        if self.function == "hid":
            # Packet size of the interrupt endpoint, in bytes: more than full speed allows.
            self._write("functions/hid.0/report_length", "128")
            (self.folder / "functions/hid.0/report_desc").write_bytes(REPORTS)
        os.symlink(function, self.folder / f"configs/c.1/{self.function}.0")

    def _image(self):
        image = Path(f"/tmp/{self.name}.img")
        sector = BOOT_CODE + f"BOOTED-FROM {self.serial or self.name}\r\n\0".encode()
        image.write_bytes(sector.ljust(510, b"\0") + b"\x55\xaa" + bytes(1024 * 1024 - 512))
        return image

    def _write(self, path, text):
        (self.folder / path).write_text(text + "\n")

    def plug(self, slot):
        """Plug it into the slot with this number. Return when the kernel lists it."""
        self._write("UDC", f"dummy_udc.{slot}")
        self.slot = slot
        until(self.is_there, f"{self.name} in slot {slot} to be enumerated")
        return self

    def unplug(self):
        if self.slot is None:
            return
        port = port_of(self.slot)
        self._write("UDC", "")
        self.slot = None
        until(lambda: not (SEEN / port).exists(), f"{self.name} to vanish from port {port}")

    def show_as(self, product):
        """Change the product id. It takes effect at the next plug."""
        self.product = product
        self._write("idProduct", f"0x{product}")

    def add_function(self):
        """Add an interface. It takes effect at the next plug."""
        function = self.folder / "functions/mass_storage.1"
        function.mkdir()
        image = Path(f"/tmp/{self.name}.1.img")
        image.write_bytes(bytes(1024 * 1024))
        self._write("functions/mass_storage.1/lun.0/file", str(image))
        os.symlink(function, self.folder / "configs/c.1/mass_storage.1")

    def move(self, slot):
        self.unplug()
        return self.plug(slot)

    def remove(self):
        self.unplug()
        # configfs requires this order of removal.
        for link in (self.folder / "configs/c.1").glob(f"{self.function}.*"):
            link.unlink()
        functions = (self.folder / "functions").glob(f"{self.function}.*")
        for folder in (
            self.folder / "configs/c.1",
            *functions,
            self.folder / "strings/0x409",
            self.folder,
        ):
            folder.rmdir()

    def port(self):
        return port_of(self.slot)

    def address(self):
        """The current bus and device number."""
        at = SEEN / self.port()
        return int((at / "busnum").read_text()), int((at / "devnum").read_text())

    def driver(self):
        """The bound kernel driver: usb-storage if the host has it, usbfs or none if QEMU has it."""
        link = SEEN / f"{self.port()}:1.0" / "driver"
        return link.resolve().name if link.exists() else None

    def is_there(self):
        try:
            at = SEEN / self.port()
            return (
                (at / "idVendor").read_text().strip() == self.vendor
                and self.address()[1] > 1
                and (at / "bConfigurationValue").read_text().strip()
            )
        except (OSError, ValueError, Failure):
            return False


def port_of(slot):
    """A slot's port path, such as "3-1"."""
    buses = list(Path(f"/sys/devices/platform/dummy_hcd.{slot}").glob("usb*"))
    if not buses:
        raise Failure(f"slot {slot} has no bus: was dummy_hcd loaded with too small a 'num'?")
    return f"{buses[0].name.removeprefix('usb')}-1"


def renew(*slots, found=None):
    """Remove these controllers and add them again.

    Device numbers start over, as after a reboot. The kernel finds the controllers, and numbers
    their buses, in the order of `found`.
    """
    driver = Path("/sys/bus/platform/drivers/dummy_hcd")
    for verb, order in (("unbind", slots), ("bind", found or slots)):
        for slot in order:
            (driver / verb).write_text(f"dummy_hcd.{slot}\n")
    for slot in slots:
        until(
            lambda: list(Path(f"/sys/devices/platform/dummy_hcd.{slot}").glob("usb*")),
            f"slot {slot}'s bus",
        )


class Drawer:
    """All gadgets of a case, which it can remove together."""

    def __init__(self):
        self.gadgets = []

    def stick(self, name, vendor="0951", product="1666", serial=None, slot=None):
        gadget = Gadget(name, vendor, product, serial)
        self.gadgets.append(gadget)
        return gadget if slot is None else gadget.plug(slot)

    def serial_adapter(self, serial, slot):
        """Plug in a CDC-ACM device: /dev/ttyACM* on the host."""
        return self._other("acm", "a4a7", serial, slot)

    def reporter(self, serial, slot):
        """Plug in a HID device that QEMU rejects at a full-speed port."""
        return self._other("hid", "a4ac", serial, slot)

    def _other(self, function, product, serial, slot):
        gadget = Gadget(function, "0525", product, serial, function=function)
        self.gadgets.append(gadget)
        return gadget.plug(slot)

    def twins(self, count, serials=True):
        """Plug sticks of one product into the first slots."""
        return [
            self.stick(f"twin{n}", serial=f"SN{n}" if serials else None, slot=n)
            for n in range(count)
        ]

    def empty(self):
        while self.gadgets:
            self.gadgets.pop().remove()

    def plugged(self):
        return [g for g in self.gadgets if g.slot is not None]
