"""Devices: list, attach, detach, request in a flavor, release, and isolation of projects."""

import collections

from tempest import config
from tempest.lib import decorators, exceptions
from tempest.lib.common.utils import data_utils

from virt_usb_tempest_plugin.tests.api import base

CONF = config.CONF
# The first keys of a device in their order, on which clients rely, with the type of their values.
PROMISED = {
    "id": int,
    "compute_node_id": int,
    "address": str,
    "product_id": str,
    "vendor_id": str,
    "bus_id": str,
    "device_id": str,
    "port_id": str,
    "status": str,
    "extra_info": str,
    "instance_uuid": str,
}


class TestUsbDevices(base.UsbTest):
    """Tests with members of two projects."""

    credentials = ["primary", "alt", "admin"]  # noqa: RUF012

    @classmethod
    def setup_clients(cls):
        """Create the client of the other member, too."""
        super().setup_clients()
        cls.alt_usb = cls.os_alt.usb.UsbClient()

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c01")
    def test_a_hypervisor_shows_its_devices(self):
        device = self.device()
        host = self.usb.show_hypervisor(device["hypervisor_hostname"])
        shown = [one for one in host["usb_device_stats"] if one["id"] == device["id"]]
        self.assertEqual(
            [list(PROMISED.items())],
            [[(key, type(value)) for key, value in one.items()][: len(PROMISED)] for one in shown],
        )
        self.assertEqual("available", shown[0]["status"])
        listed = {one["hypervisor_hostname"]: one for one in self.usb.list_hypervisors()}
        totals = listed[device["hypervisor_hostname"]]["usb_device_totals"]
        states = collections.Counter(one["status"] for one in host["usb_device_stats"])
        self.assertEqual(
            {**states, "total": states.total()},
            {state: count for state, count in totals.items() if count},
        )
        self.assertRaises(
            exceptions.NotFound, self.usb.show_hypervisor, data_utils.rand_name("nowhere")
        )

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c02")
    def test_attach_to_a_running_server_and_detach(self):
        server = self.server(self.os_primary, self.flavor())
        self.assertEqual([], self.usb.show_server(server)["usb_devices"])
        attached = self.attach(self.usb, server, self.kind)
        self.assertTrue(attached["live"])
        device = self.device()
        self.assertEqual(("allocated", server), (device["status"], device["instance_uuid"]))
        self.assertEqual(
            [device["id"]], [one["id"] for one in self.usb.show_server(server)["usb_devices"]]
        )
        # A second request has no further effect.
        self.usb.attach(server, {"id": device["id"]})
        self.usb.detach(server, {"id": device["id"]})
        self.assertEqual("available", self.device()["status"])
        self.assertEqual([], self.usb.show_server(server)["usb_devices"])
        self.assertRaises(exceptions.NotFound, self.usb.detach, server, {"id": device["id"]})
        told = [one["event"] for one in self.usb.list_server_events(server)]
        self.assertIn("claimed", told)
        self.assertIn("released", told)

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c03")
    def test_a_second_taker_is_refused(self):
        flavor = self.flavor()
        first, second = self.server(self.os_primary, flavor), self.server(self.os_primary, flavor)
        self.attach(self.usb, first, self.kind)
        refused = self.assertRaises(exceptions.Conflict, self.usb.attach, second, self.kind)
        self.assertIn(first, str(refused))
        self.assertEqual(first, self.device()["instance_uuid"])
        self.assertEqual([], self.usb.show_server(second)["usb_devices"])
        # A device of another project is shown only as in use.
        other = self.server(self.os_alt, flavor)
        refused = self.assertRaises(exceptions.Conflict, self.alt_usb.attach, other, self.kind)
        self.assertNotIn(first, str(refused))
        self.assertEqual("", self.device(self.alt_usb)["instance_uuid"])
        self.usb.detach(first, self.kind)
        self.attach(self.alt_usb, other, self.kind)
        self.alt_usb.detach(other, self.kind)

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c04")
    def test_a_flavor_with_passthrough_and_deleting_the_server_gives_the_device_back(self):
        flavor = self.flavor(devices=[self.kind])
        server = self.server(self.os_primary, flavor)
        device = self.given_to(server)
        self.assertEqual(
            [device["id"]], [one["id"] for one in self.usb.show_server(server)["usb_devices"]]
        )
        late = self.server(self.os_primary, flavor, status="ERROR")
        self.assertEqual(server, self.device()["instance_uuid"])
        self.gone(self.os_primary.servers_client, late)
        self.gone(self.os_primary.servers_client, server)
        self.given_back()
        # The next server can have the device.
        self.given_to(self.server(self.os_primary, flavor))

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c05")
    def test_a_flavor_with_redirection(self):
        # Only SPICE shows whether a client can use the port. Here the server starts, takes no
        # device, and has no problem.
        server = self.server(
            self.os_primary, self.flavor(redirection_devices=[{"bus": "usb", "type": "spicevmc"}])
        )
        self.assertEqual([], self.usb.show_server(server)["usb_devices"])
        self.assertEqual("available", self.device()["status"])
        problems = [
            one for one in self.usb.list_claims()["usb_problems"] if one["instance_uuid"] == server
        ]
        self.assertEqual([], problems)

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c06")
    def test_a_member_cannot_take_what_is_not_his(self):
        flavor = self.flavor()
        mine, others = self.server(self.os_primary, flavor), self.server(self.os_alt, flavor)
        device = self.device()
        # Neither attach a device to a server of another project, nor read it.
        self.assertRaises(exceptions.NotFound, self.usb.attach, others, self.kind)
        self.assertRaises(exceptions.NotFound, self.usb.show_server, others)
        # A device that only another project may have.
        name = data_utils.rand_name("grant")
        self.admin_usb.set_grant(name, [self.kind], [self.os_alt.credentials.project_id])
        self.addCleanup(self.admin_usb.delete_grant, name)
        self.assertRaises(exceptions.NotFound, self.usb.show_device, device["id"])
        self.assertRaises(exceptions.NotFound, self.usb.attach, mine, {"id": device["id"]})
        self.assertRaises(exceptions.Conflict, self.usb.attach, mine, self.kind)
        self.attach(self.alt_usb, others, self.kind)
        self.assertRaises(exceptions.NotFound, self.usb.detach, others, {"id": device["id"]})
        self.alt_usb.detach(others, {"id": device["id"]})

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c07")
    def test_administrators_alone_change_what_all_have(self):
        device = self.device()["id"]
        self.assertRaises(
            exceptions.Forbidden, self.usb.change_device, device, "disable", {"reason": "mine"}
        )
        self.assertRaises(
            exceptions.Forbidden,
            self.usb.set_grant,
            data_utils.rand_name("grant"),
            [self.kind],
            ["p"],
        )
        self.addCleanup(self.admin_usb.change_device, device, "enable")
        self.assertEqual(
            "unavailable",
            self.admin_usb.change_device(device, "disable", {"reason": "lent"})["status"],
        )
        server = self.server(self.os_primary, self.flavor())
        self.assertRaises(exceptions.Conflict, self.usb.attach, server, self.kind)
        self.assertEqual("available", self.admin_usb.change_device(device, "enable")["status"])


class TestUsbReader(base.UsbTest):
    """Tests with readers."""

    credentials = ["primary", "admin", ["reader", "reader"]]  # noqa: RUF012

    @classmethod
    def setup_clients(cls):
        """Create the client of the reader, too."""
        super().setup_clients()
        cls.reader_usb = cls.os_roles_reader.usb.UsbClient()

    @decorators.idempotent_id("6c1fd3ad-6a5c-4f7f-9f6a-0a8a3f7a1c08")
    def test_a_reader_looks_and_takes_nothing(self):
        server = self.server(self.os_primary, self.flavor())
        self.assertEqual(self.kind, {key: self.device(self.reader_usb)[key] for key in self.kind})
        self.assertRaises(exceptions.Forbidden, self.reader_usb.attach, server, self.kind)
        self.assertEqual("available", self.device()["status"])
