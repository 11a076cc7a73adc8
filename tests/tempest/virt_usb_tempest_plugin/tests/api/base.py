"""The base class of all tests."""

import contextlib
import json
import time

from oslo_concurrency.fixture import lockutils
from tempest import config, test
from tempest.common import waiters
from tempest.lib import exceptions
from tempest.lib.common.utils import data_utils

CONF = config.CONF


class UsbTest(test.BaseTestCase):
    """A test with a member, an administrator, and the device of the configuration."""

    credentials = ["primary", "admin"]  # noqa: RUF012

    @classmethod
    def skip_checks(cls):
        """Skip the tests in a cloud without virt-usb."""
        super().skip_checks()
        if not CONF.service_available.virt_usb:
            raise cls.skipException("virt-usb is not available: service_available.virt_usb")
        if not CONF.service_available.nova:
            raise cls.skipException(
                "Nova, which creates the servers, is not available: service_available.nova"
            )

    @classmethod
    def setup_credentials(cls):
        """Create no network, because no test needs one."""
        cls.set_network_resources()
        super().setup_credentials()

    @classmethod
    def setup_clients(cls):
        """Create the clients of both users."""
        super().setup_clients()
        cls.usb = cls.os_primary.usb.UsbClient()
        cls.admin_usb = cls.os_admin.usb.UsbClient()
        cls.kind = {"vendor_id": CONF.usb.vendor_id, "product_id": CONF.usb.product_id}

    def setUp(self):
        """Lock the only device, so that concurrent tests wait."""
        super().setUp()
        self.useFixture(lockutils.LockFixture("virt-usb-device"))
        # An earlier test may still be releasing the device.
        self.given_back()

    def device(self, client=None):
        """The current state of the device."""
        found = (client or self.usb).list_devices(**self.kind)
        self.assertEqual(
            1,
            len(found),
            "usb.vendor_id and usb.product_id must name one device that all projects may have",
        )
        return found[0]

    def flavor(self, **specs):
        """Create a flavor with these lists in its extra specs."""
        client = self.os_admin.flavors_client
        name = data_utils.rand_name("usb-flavor")
        made = client.create_flavor(name=name, ram=64, vcpus=1, disk=1)["flavor"]
        self.addCleanup(client.delete_flavor, made["id"])
        if specs:
            client.set_flavor_extra_spec(
                made["id"], **{f"usb:{key}": json.dumps(value) for key, value in specs.items()}
            )
        return made["id"]

    def server(self, manager, flavor, status="ACTIVE"):
        """Create a server with that flavor, and wait for its status."""
        client = manager.servers_client
        name = data_utils.rand_name("usb-server")
        made = client.create_server(name=name, imageRef=CONF.compute.image_ref, flavorRef=flavor)[
            "server"
        ]
        self.addCleanup(self.gone, client, made["id"])
        waiters.wait_for_server_status(client, made["id"], status, raise_on_error=status != "ERROR")
        return made["id"]

    @staticmethod
    def gone(client, server):
        """Delete a server if it still exists, and wait until it is gone."""
        try:
            client.delete_server(server)
        except exceptions.NotFound:
            return
        waiters.wait_for_server_termination(client, server)

    def attach(self, client, server, wanted):
        """Attach the device to a server, and detach it after the test in any case."""
        self.addCleanup(self.detach_if_there, client, server, wanted)
        return client.attach(server, wanted)

    @staticmethod
    def detach_if_there(client, server, wanted):
        """Detach the device if the server still has it."""
        with contextlib.suppress(exceptions.NotFound):
            client.detach(server, wanted)

    def given_back(self):
        """Wait until the device is available, and return it."""
        return self._reaches("available", "")

    def given_to(self, server):
        """Wait until the guest of a server has the device, and return the device.

        A server is ACTIVE as soon as its guest runs, and the agent attaches the device after that.
        """
        return self._reaches("allocated", server)

    def _reaches(self, status, instance_uuid):
        until = time.monotonic() + CONF.usb.timeout
        while True:
            device = self.device()
            if (device["status"], device["instance_uuid"]) == (status, instance_uuid):
                return device
            self.assertLess(
                time.monotonic(),
                until,
                f"wanted {status} for {instance_uuid or 'no server'}, the device is {device}",
            )
            time.sleep(0.2)
