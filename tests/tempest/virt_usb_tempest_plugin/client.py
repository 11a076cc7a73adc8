"""A client of virt-usb's API for Tempest."""

import json
from urllib.parse import urlencode

from tempest.lib.common import rest_client


class UsbClient(rest_client.RestClient):
    """The calls of the API. Each returns the body.

    An unexpected status raises Tempest's exception for it.
    """

    def _call(self, method, path, status, body=None):
        sent = None if body is None else json.dumps(body)
        response, text = self.request(method, path, body=sent)
        self.expected_success(status, response.status)
        return json.loads(text) if text else None

    def list_hypervisors(self):
        """The hosts with the numbers of their devices."""
        return self._call("GET", "os-hypervisors", 200)["hypervisors"]

    def show_hypervisor(self, hostname):
        """Show a host with its devices."""
        return self._call("GET", f"os-hypervisors/{hostname}", 200)["hypervisor"]

    def list_devices(self, **filters):
        """The devices that match the filters."""
        return self._call("GET", f"os-usb-devices?{urlencode(filters)}", 200)["usb_devices"]

    def show_device(self, device):
        """Show a device."""
        return self._call("GET", f"os-usb-devices/{device}", 200)["usb_device"]

    def change_device(self, device, action, value=None):
        """Run an action on a device, such as `enable` or `disable`."""
        return self._call("POST", f"os-usb-devices/{device}/action", 200, {action: value})[
            "usb_device"
        ]

    def show_server(self, server):
        """The devices and requests of a server."""
        return self._call("GET", f"servers/{server}/os-usb-devices", 200)["server"]

    def attach(self, server, *requests):
        """Gives a server devices."""
        return self._call(
            "POST",
            f"servers/{server}/action",
            202,
            {"attach_usb_devices": {"usb_devices_requests": list(requests)}},
        )

    def detach(self, server, *requests):
        """Detach devices from a server."""
        return self._call(
            "POST",
            f"servers/{server}/action",
            202,
            {"detach_usb_devices": {"usb_devices_requests": list(requests)}},
        )

    def list_server_events(self, server):
        """The events of a server's devices."""
        return self._call("GET", f"servers/{server}/os-usb-events", 200)["events"]

    def list_claims(self):
        """The claims and problems of all servers."""
        return self._call("GET", "os-usb-claims", 200)

    def set_grant(self, name, devices, projects):
        """Grant these devices to these projects only."""
        return self._call(
            "PUT", f"os-usb-grants/{name}", 200, {"usb_devices": devices, "projects": projects}
        )

    def delete_grant(self, name):
        """Remove a grant, so that all projects may have its devices."""
        self._call("DELETE", f"os-usb-grants/{name}", 204)
