"""virt-usb's API (host-runtime/src/api/README.md), as far as the openstack command asks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

from keystoneauth1 import adapter
from keystoneauth1 import exceptions as auth_exceptions
from osc_lib import exceptions

SERVICE_TYPE = "usb"


class UsbClient:
    """Its calls. What goes wrong is a CommandError in the API's words."""

    def __init__(self, session: Any, region_name: str | None, interface: str | None, endpoint_override: str | None) -> None:
        self._api = adapter.Adapter(
            session=session,
            service_type=SERVICE_TYPE,
            region_name=region_name,
            interface=interface,
            endpoint_override=endpoint_override.rstrip("/") if endpoint_override else None,
            client_name="virt-usb-openstackclient",
        )

    def devices(self, filters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Devices, by what is known of them; page after page."""
        query = urlencode(filters)
        while True:
            page = self._ask("GET", f"/os-usb-devices?{query}")
            yield from page["usb_devices"]
            links = page.get("usb_devices_links")
            if not links:
                return
            query = links[0]["href"].partition("?")[2]

    def device(self, device: str) -> dict[str, Any]:
        """A device, by its id."""
        return dict(self._ask("GET", f"/os-usb-devices/{quote(device, safe='')}")["usb_device"])

    def change_device(self, device: str, action: str, value: dict[str, Any] | None = None) -> dict[str, Any]:
        """`enable` and `disable`."""
        return dict(self._ask("POST", f"/os-usb-devices/{quote(device, safe='')}/action", {action: value})["usb_device"])

    def servers(self, name: str) -> list[dict[str, Any]]:
        """The servers of that name."""
        return list(self._ask("GET", f"/servers?{urlencode({'name': name})}")["servers"])

    def act(self, server: str, action: str, request: dict[str, Any]) -> dict[str, Any]:
        """`attach_usb_devices` and `detach_usb_devices`."""
        return dict(self._ask("POST", f"/servers/{server}/action", {action: {"usb_devices_requests": [request]}}))

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        sent = {} if body is None else {"json": body}
        try:
            answer = self._api.request(path, method, raise_exc=False, headers={"Accept": "application/json"}, **sent)
        except auth_exceptions.EndpointNotFound as e:
            raise exceptions.CommandError(
                f"The catalogue has no service of the type {SERVICE_TYPE} in this region: "
                "an administrator makes one with 'openstack endpoint create'; or name it by --os-usb-endpoint"
            ) from e
        try:
            said = answer.json()
        except ValueError as e:
            raise exceptions.CommandError(f"What answers at {answer.url} is not the USB device API: HTTP {answer.status_code}") from e
        if answer.ok:
            return said
        told = [fault["message"] for fault in said.values() if isinstance(fault, dict) and "message" in fault] if isinstance(said, dict) else []
        request = answer.headers.get("x-openstack-request-id")
        raise exceptions.CommandError(
            f"{' '.join(told) or 'The USB device API refuses'} (HTTP {answer.status_code}{f', {request}' if request else ''})"
        )


def usb(command: Any) -> UsbClient:
    """The client of a command, as `plugin.make_client` made it."""
    client: UsbClient = command.app.client_manager.usb
    return client
