"""`openstack server add usb device` and `remove`."""

from __future__ import annotations

import argparse
import json
import logging
import re
from typing import Any

from osc_lib import exceptions
from osc_lib.command import command

from virt_usb_openstackclient.client import find_server, listed, usb

LOG = logging.getLogger(__name__)
# Maximum number of digits of an id.
LONGEST = 16
KIND = re.compile(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})")


def request(text: str) -> dict[str, Any]:
    """Parse a request: the id of a device, its kind, or an entry of a flavor."""
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= LONGEST:
        return {"id": int(text)}
    kind = KIND.fullmatch(text)
    if kind:
        return {"vendor_id": kind[1], "product_id": kind[2]}
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as e:
            raise exceptions.CommandError(f"{text}: no JSON: {e}") from e
    raise exceptions.CommandError(
        f"{text}: wanted the id of a device, VENDOR:PRODUCT such as 0529:0001, or JSON "
        'such as {"serial":"HL-0001"}'
    )


class _ServerUsbDevice(command.ShowOne):
    ACTION = ""
    LATER = ""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """A server and a device."""
        parser = super().get_parser(prog_name)
        parser.add_argument("server", metavar="<server>", help="Server (name or ID)")
        parser.add_argument(
            "device",
            metavar="<device>",
            help="USB device: an ID, VENDOR:PRODUCT, or JSON as in a flavor's list, with serial, "
            "port, path, class, tags or count",
        )
        return parser

    def take_action(
        self, parsed_args: argparse.Namespace
    ) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Request the device and show the result."""
        wanted = request(parsed_args.device)
        server = find_server(self, parsed_args.server)
        said = usb(self).act(server, self.ACTION, wanted)
        if not said["live"]:
            LOG.warning(self.LATER, parsed_args.server)
        devices = said["usb_devices"]
        shown = {
            "server_id": server,
            "live": said["live"],
            "device_ids": [one["id"] for one in devices],
            "already": said["already"],
            "requested": [json.dumps(one) for one in usb(self).assigned(server)],
        }
        return tuple(shown), tuple(listed(value) for value in shown.values())


class AddServerUsbDevice(_ServerUsbDevice):
    """Attach a USB device to a server: now, or at its next start if it does not run"""

    ACTION = "attach_usb_devices"
    LATER = "%s is not running: it claims the device at its start, which fails while another has it"


class RemoveServerUsbDevice(_ServerUsbDevice):
    """Detach a USB device from a server, which makes it available to others"""

    ACTION = "detach_usb_devices"
    LATER = "%s is not running: it no longer gets the device"
