"""A client of virt-usb's API (docs/src/api.md) for the openstack command."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

from keystoneauth1 import adapter
from keystoneauth1 import exceptions as auth_exceptions
from osc_lib import exceptions
from osc_lib.cli import format_columns

SERVICE_TYPE = "usb"
# The API's message for an unknown path.
NOWHERE = "The resource could not be found."


class UsbClient:
    """The calls of the API. An error is a CommandError with the API's message."""

    def __init__(
        self,
        session: Any,
        region_name: str | None,
        interface: str | None,
        endpoint_override: str | None,
    ) -> None:
        self._api = adapter.Adapter(
            session=session,
            service_type=SERVICE_TYPE,
            region_name=region_name,
            interface=interface,
            endpoint_override=endpoint_override,
            client_name="virt-usb-openstackclient",
        )

    def devices(self, filters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The devices that match the filters, of all pages."""
        query = urlencode(filters)
        while True:
            page = self._ask(
                "usb_devices", "GET", f"/os-usb-devices?{query}" if query else "/os-usb-devices"
            )
            yield from page["usb_devices"]
            links = page.get("usb_devices_links")
            if not links:
                return
            query = links[0]["href"].partition("?")[2]

    def device(self, device: str) -> dict[str, Any]:
        """The device with this id."""
        return dict(
            self._ask("usb_device", "GET", f"/os-usb-devices/{quote(device, safe='')}")[
                "usb_device"
            ]
        )

    def change_device(
        self, device: str, action: str, value: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run an action on a device: `enable` or `disable`."""
        return dict(
            self._ask(
                "usb_device",
                "POST",
                f"/os-usb-devices/{quote(device, safe='')}/action",
                {action: value},
            )["usb_device"]
        )

    def servers(self, name: str) -> list[dict[str, Any]]:
        """The servers with this name."""
        return list(self._ask("servers", "GET", f"/servers?{urlencode({'name': name})}")["servers"])

    def assigned(self, server: str) -> list[dict[str, Any]]:
        """The requests that the server has in addition to its flavor."""
        return list(
            self._ask("server", "GET", f"/servers/{server}/os-usb-devices")["server"][
                "usb_devices_requests"
            ]
        )

    def act(self, server: str, action: str, request: dict[str, Any]) -> dict[str, Any]:
        """Run an action on a server: `attach_usb_devices` or `detach_usb_devices`."""
        return dict(
            self._ask(
                "live",
                "POST",
                f"/servers/{server}/action",
                {action: {"usb_devices_requests": [request]}},
            )
        )

    def _ask(
        self, key: str, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The response, which must have that key."""
        sent = {} if body is None else {"json": body}
        try:
            answer = self._api.request(
                path, method, raise_exc=False, headers={"Accept": "application/json"}, **sent
            )
        except auth_exceptions.EndpointNotFound as e:
            where = f" in the region {self._api.region_name}" if self._api.region_name else ""
            raise exceptions.CommandError(
                f"The catalogue has no {self._api.interface or 'public'} endpoint of the type "
                f"{SERVICE_TYPE}{where} ('openstack catalog show {SERVICE_TYPE}'): an "
                "administrator creates one with 'openstack endpoint create'; or choose another "
                "with --os-interface, or pass --os-usb-endpoint"
            ) from e
        try:
            said = answer.json()
        except ValueError:
            said = None
        if answer.ok and isinstance(said, dict) and key in said:
            return said
        faults = said.values() if isinstance(said, dict) else []
        told = " ".join(
            str(fault["message"])
            for fault in faults
            if isinstance(fault, dict) and "message" in fault
        )
        request = answer.headers.get("x-openstack-request-id")
        status = f"HTTP {answer.status_code}{f', {request}' if request else ''}"
        if told == NOWHERE:
            told = f"The USB device API has no {answer.url}: its endpoint ends with /v2.1"
        elif answer.status_code >= 500 and not told:
            told = f"The proxy before the USB device API at {answer.url} cannot reach it"
        raise exceptions.CommandError(
            f"{told or f'The server at {answer.url} is not the USB device API'} ({status})"
        )


def usb(command: Any) -> UsbClient:
    """The client of a command, from `plugin.make_client`."""
    client: UsbClient = command.app.client_manager.usb
    return client


def find_server(command: Any, name: str) -> str:
    """The id of a server, by its name in Nova or, without Nova, in libvirt."""
    try:
        return str(uuid.UUID(name))
    except ValueError:
        pass
    manager = command.app.client_manager
    if manager.is_service_available("compute", manager.region_name, manager.interface):
        return str(manager.sdk_connection.compute.find_server(name, ignore_missing=False).id)
    found = usb(command).servers(name)
    if len(found) != 1:
        raise exceptions.CommandError(
            f"{'More than one server exists with' if found else 'No server with'} the name "
            f"{name!r}{': use its ID' if found else ''}"
        )
    return str(found[0]["id"])


def listed(value: Any) -> Any:
    """A value in the command's output format."""
    return format_columns.ListColumn(value) if isinstance(value, list) else value
