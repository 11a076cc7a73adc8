"""Plugin of the openstack command.

It finds virt-usb's API by the service type `usb` of the catalogue, or at `--os-usb-endpoint`.
"""

from __future__ import annotations

import argparse
from typing import Any

from osc_lib import utils

from virt_usb_openstackclient.client import UsbClient

# The names that OpenStackClient looks for. There is one version, and no option to choose it.
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
    """Add the option of all commands."""
    parser.add_argument(
        "--os-usb-endpoint",
        # clouds.yaml uses the same name.
        dest="os_usb_endpoint_override",
        metavar="<url>",
        default=utils.env("OS_USB_ENDPOINT"),
        help="URL of the USB device API, such as https://usb.example:8790/v2.1 "
        "(default: from the catalogue; Env: OS_USB_ENDPOINT)",
    )
    return parser
