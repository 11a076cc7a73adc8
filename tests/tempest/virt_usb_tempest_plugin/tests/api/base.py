"""What all tests need."""

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
    """A member, an administrator, and the device that the configuration names."""

    credentials = ["primary", "admin"]  # noqa: RUF012

    @classmethod
    def skip_checks(cls):
        """Where there is no virt-usb there is nothing to test."""
        super().skip_checks()
        if not CONF.service_available.virt_usb:
            raise cls.skipException("there is no virt-usb: service_available.virt_usb")
        if not CONF.service_available.nova:
            raise cls.skipException(
                "there is no Nova, which makes the servers: service_available.nova"
            )

    @classmethod
    def setup_credentials(cls):
        """None of it needs a network."""
        cls.set_network_resources()
        super().setup_credentials()

    @classmethod
    def setup_clients(cls):
        """Theirs."""
        super().setup_clients()
        cls.usb = cls.os_primary.usb.UsbClient()
        cls.admin_usb = cls.os_admin.usb.UsbClient()
        cls.kind = {"vendor_id": CONF.usb.vendor_id, "product_id": CONF.usb.product_id}

    def setUp(self):
        """There is one device: whoever tests beside this one waits."""
        super().setUp()
        self.useFixture(lockutils.LockFixture("virt-usb-device"))
        # What a test before this one has left is on its way.
        self.given_back()

    def device(self, client=None):
        """The device, as it is now."""
        found = (client or self.usb).list_devices(**self.kind)
        self.assertEqual(
            1,
            len(found),
            "usb.vendor_id and usb.product_id are to name one device that every project may have",
        )
        return found[0]

    def flavor(self, **specs):
        """A flavor with these lists in its extra specs."""
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
        """A server of that flavor, as soon as it is so."""
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
        """Deletes a server, if it is there still, and waits until it is gone."""
        try:
            client.delete_server(server)
        except exceptions.NotFound:
            return
        waiters.wait_for_server_termination(client, server)

    def attach(self, client, server, wanted):
        """Gives a server the device, and takes it back in the end, whatever comes."""
        self.addCleanup(self.detach_if_there, client, server, wanted)
        return client.attach(server, wanted)

    @staticmethod
    def detach_if_there(client, server, wanted):
        """Takes it back, where the server has it still."""
        with contextlib.suppress(exceptions.NotFound):
            client.detach(server, wanted)

    def given_back(self):
        """Waits until the device is free; returns it."""
        return self._reaches("available", "")

    def given_to(self, server):
        """Waits until the guest of a server has the device; returns the device.

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
                f"wanted {status} for {instance_uuid or 'nobody'}, the device is {device}",
            )
            time.sleep(0.2)
