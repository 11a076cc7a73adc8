"""virt-usb's API, for Tempest."""

import json
from urllib.parse import urlencode

from tempest.lib.common import rest_client


class UsbClient(rest_client.RestClient):
    """Its calls; what each answers is what stands in the body. An unexpected status is Tempest's exception for it."""

    def _call(self, method, path, status, body=None):
        sent = None if body is None else json.dumps(body)
        response, text = self.request(method, path, body=sent)
        self.expected_success(status, response.status)
        return json.loads(text) if text else None

    def list_hypervisors(self):
        """Hosts with their devices counted."""
        return self._call("GET", "os-hypervisors", 200)["hypervisors"]

    def show_hypervisor(self, hostname):
        """A host's devices."""
        return self._call("GET", f"os-hypervisors/{hostname}", 200)["hypervisor"]

    def list_devices(self, **filters):
        """Devices, by what is known of them."""
        return self._call("GET", f"os-usb-devices?{urlencode(filters)}", 200)["usb_devices"]

    def show_device(self, device):
        """A device."""
        return self._call("GET", f"os-usb-devices/{device}", 200)["usb_device"]

    def change_device(self, device, action, value=None):
        """`enable`, `disable` and what else there is."""
        return self._call("POST", f"os-usb-devices/{device}/action", 200, {action: value})[
            "usb_device"
        ]

    def show_server(self, server):
        """What a server has, and is to have."""
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
        """Takes them back."""
        return self._call(
            "POST",
            f"servers/{server}/action",
            202,
            {"detach_usb_devices": {"usb_devices_requests": list(requests)}},
        )

    def list_server_events(self, server):
        """What became of a server's devices."""
        return self._call("GET", f"servers/{server}/os-usb-events", 200)["events"]

    def list_claims(self):
        """Who has which, and what keeps one out."""
        return self._call("GET", "os-usb-claims", 200)

    def set_grant(self, name, devices, projects):
        """These projects may have these devices, and nobody else."""
        return self._call(
            "PUT", f"os-usb-grants/{name}", 200, {"usb_devices": devices, "projects": projects}
        )

    def delete_grant(self, name):
        """What it gave is everybody's again."""
        self._call("DELETE", f"os-usb-grants/{name}", 204)
