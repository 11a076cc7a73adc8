"""`openstack usb device ...`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from osc_lib.command import command

from virt_usb_openstackclient.client import find_server, listed, usb

# Title of a column, and key of a device. The second list is for --long.
COLUMNS = [
    ("ID", "id"),
    ("Host", "hypervisor_hostname"),
    ("Vendor ID", "vendor_id"),
    ("Product ID", "product_id"),
    ("Name", "product_name"),
    ("Serial", "serial"),
    ("Status", "status"),
    ("Server", "instance_uuid"),
]
LONG = [
    ("Status Reason", "status_reason"),
    ("Port", "port_path"),
    ("Address", "address"),
    ("Speed", "speed"),
    ("Tags", "tags"),
    ("Held Since", "held_since"),
]
# Option, and filter of the API.
FILTERS = {
    "status": (
        "<status>",
        "available, claimed, allocated, removed (unplugged while a server has it) or unavailable",
    ),
    "vendor_id": ("<vendor-id>", "One to four hexadecimal digits"),
    "product_id": ("<product-id>", "One to four hexadecimal digits"),
    "serial": ("<serial>", "Exactly this serial number"),
    "tag": ("<tag>", "A tag of the device"),
    "instance_uuid": ("<server>", "Held by this server (name or ID)"),
}
OPTIONS = {"instance_uuid": "--server"}
CHOICES = {"status": ("available", "claimed", "allocated", "removed", "unavailable")}


def shown(device: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The fields of a device that have a value."""
    known = {key: value for key, value in device.items() if value not in (None, "")}
    return tuple(known), tuple(listed(value) for value in known.values())


class ListUsbDevice(command.Lister):
    """List the USB devices of the cloud's hosts that the project may have"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The options of the command."""
        parser = super().get_parser(prog_name)
        for name, (metavar, text) in FILTERS.items():
            parser.add_argument(
                OPTIONS.get(name, f"--{name.replace('_', '-')}"),
                dest=name,
                metavar=metavar,
                choices=CHOICES.get(name),
                help=text,
            )
        parser.add_argument("--host", metavar="<host>", help="Plugged into this host")
        parser.add_argument(
            "--deleted", action="store_true", help="Include devices that were removed (admin only)"
        )
        parser.add_argument("--long", action="store_true", help="More columns")
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace
    ) -> tuple[list[str], Iterable[tuple[Any, ...]]]:
        """Fetch all pages and show the devices."""
        filters = {
            name: getattr(parsed_args, name)
            for name in FILTERS
            if getattr(parsed_args, name) is not None
        }
        if "instance_uuid" in filters:
            filters["instance_uuid"] = find_server(self, filters["instance_uuid"])
        if parsed_args.deleted:
            filters["deleted"] = "true"
        devices = usb(self).devices(filters)
        columns = COLUMNS + (LONG if parsed_args.long else [])
        host = parsed_args.host
        rows = [
            tuple(listed(one.get(key)) for _, key in columns)
            for one in devices
            if host in (None, one["hypervisor_hostname"])
        ]
        return [head for head, _ in columns], rows


class ShowUsbDevice(command.ShowOne):
    """Show a USB device"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The argument of the command."""
        parser = super().get_parser(prog_name)
        parser.add_argument("device", metavar="<device>", help="USB device (ID)")
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace
    ) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Fetch the device and show it."""
        return shown(usb(self).device(parsed_args.device))


class EnableUsbDevice(ShowUsbDevice):
    """Make a USB device available again (admin only)"""

    def take_action(
        self, parsed_args: argparse.Namespace
    ) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Change the device."""
        return shown(usb(self).change_device(parsed_args.device, "enable"))


class DisableUsbDevice(ShowUsbDevice):
    """Make a USB device unavailable; a server that has it keeps it (admin only)"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """The argument, and an option for the reason."""
        parser = super().get_parser(prog_name)
        parser.add_argument("--reason", metavar="<reason>", help="Reason, which administrators see")
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace
    ) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Change the device."""
        value = {} if parsed_args.reason is None else {"reason": parsed_args.reason}
        return shown(usb(self).change_device(parsed_args.device, "disable", value))
