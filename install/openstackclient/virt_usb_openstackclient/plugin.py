"""How the openstack command finds virt-usb's API: by the catalogue's type `usb`, or at `--os-usb-endpoint`."""

from __future__ import annotations

import argparse
from typing import Any

from osc_lib import utils

from virt_usb_openstackclient.client import UsbClient

# What OpenStackClient looks for. There is one version, and no option to choose it.
API_NAME = "usb"
API_VERSION_OPTION = "os_usb_api_version"
DEFAULT_API_VERSION = "2.1"
API_VERSIONS = ("2.1",)


def make_client(instance: Any) -> UsbClient:
    """A client with the caller's token."""
    return UsbClient(
        session=instance.session,
        region_name=instance.region_name,
        interface=instance.interface,
        endpoint_override=instance._cli_options.config.get("usb_endpoint_override") or None,
    )


def build_option_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The option of all commands."""
    parser.add_argument(
        "--os-usb-endpoint",
        # So it is called in clouds.yaml, too.
        dest="os_usb_endpoint_override",
        metavar="<url>",
        default=utils.env("OS_USB_ENDPOINT"),
        help="Where the USB device API is, such as https://usb.example:8790/v2.1; without it what the catalogue says (Env: OS_USB_ENDPOINT)",
    )
    return parser
