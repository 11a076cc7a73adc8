"""Nova for real: its API, its scheduler, its placement, its fake driver; and our filter, weigher and validator in it."""

import logging
import os
import tempfile

import fixtures
import nova.tests.functional  # noqa: F401  it must be the first of Nova's
from nova import conf as nova_conf
from nova.tests import fixtures as nova_fixtures
from nova.tests.functional import integrated_helpers
from nova.tests.functional.api import client
from virt_usb_nova import conf, oracle

import fleet

CONF = nova_conf.CONF
conf.register(CONF)
FILTER, WEIGHER = "virt_usb_nova.filter.UsbDevicesFilter", "virt_usb_nova.weigher.UsbDevicesWeigher"
MINE = 1_000_001


class Boot(integrated_helpers.ProviderUsageBaseTestCase):
    """Three hosts, of which Nova left to itself takes host1."""

    compute_driver = "fake.SmallFakeDriver"
    microversion = "2.86"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.file = os.path.join(folder.name, "hosts")
        self.flavors = os.path.join(folder.name, "flavors")
        oracle.forget()
        self.flags(
            inventory="file", inventory_file=self.file, flavors_file=self.flavors, component=fleet.COMPONENT,
            deadline=10.0, group="virt_usb",
        )  # fmt: skip
        available = ["nova.scheduler.filters.all_filters", FILTER]
        self.flags(
            available_filters=available,
            enabled_filters=[*CONF.filter_scheduler.enabled_filters, "UsbDevicesFilter"],
            group="filter_scheduler",
        )
        self.weigh()
        self.told = self.useFixture(fixtures.FakeLogger("virt_usb_nova", level=logging.DEBUG))
        super().setUp()
        for host in ("host1", "host2", "host3"):
            self._start_compute(host)
        fleet.write(self.file)

    def weigh(self):
        self.useFixture(nova_fixtures.HostNameWeigherFixture())

    def usb_flavor(self, name, devices=fleet.ASKS):
        """A flavor of Nova's that asks for these; its id."""
        flavor = self._create_flavor(name=name)
        self.admin_api.post_extra_spec(flavor, {"extra_specs": {"usb:devices": devices}})
        return flavor

    def boot(self, flavor, state="ACTIVE"):
        server = self._create_server(flavor_id=flavor, networks="none", expected_state=state)
        return self.admin_api.get_server(server["id"])

    def host_of(self, server):
        return server["OS-EXT-SRV-ATTR:host"]

    @property
    def log(self):
        return self.told.output


class LandsWhereTheKeyIs(Boot):
    def test_the_host_with_the_key_is_taken(self):
        fleet.write(self.file, fleet.document("host1", 2), fleet.document("host3", 4, fleet.device(3_000_001)))
        self.assertEqual("host3", self.host_of(self.boot(self.usb_flavor("erp"))))
        self.assertIn("USB devices: 1 of 3 hosts can serve", self.log)

    def test_what_asks_for_no_device_is_not_asked_about(self):
        os.remove(self.file)
        self.assertEqual("host1", self.host_of(self.boot(self._create_flavor(name="plain"))))
        self.assertNotIn("USB devices:", self.log)

    def test_none_free_is_no_valid_host_with_our_reasons(self):
        held = fleet.document("host1", 2, fleet.device(MINE, "allocated"))
        fleet.write(self.file, held, fleet.document("host2", 3))
        server = self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("No valid host", server["fault"]["message"])
        self.assertIn("USB devices: 0 of 3 hosts can serve", self.log)
        self.assertIn("no-such-device 1", self.log)
        self.assertIn(
            "USB devices: host host1 cannot serve: too-few-free: wanted 1, 1 match, 1 are for the project, 0 of these are free",
            self.log,
        )

    def test_two_flavors_want_the_same_key(self):
        first = self.usb_flavor("erp")
        second = self.usb_flavor("crm", '[{"serial":"S1"}]')
        fleet.write(self.file, fleet.document("host2", 3, fleet.device(2_000_001, serial="S1", serial_kind="unique")))
        self.assertEqual("host2", self.host_of(self.boot(first)))
        # The host's hook has claimed it, and its agent has said so.
        taken = fleet.device(2_000_001, "allocated", serial="S1", serial_kind="unique")
        fleet.write(self.file, fleet.document("host2", 3, taken, revision=2))
        self.boot(second, "ERROR")
        # A second key comes, elsewhere.
        other = fleet.device(MINE, serial="S1", serial_kind="unique")
        fleet.write(self.file, fleet.document("host2", 3, taken, revision=2), fleet.document("host1", 2, other))
        self.assertEqual("host1", self.host_of(self.boot(second)))

    def test_a_key_of_another_project_is_none(self):
        fleet.write(self.file, fleet.document("host2", 3, fleet.device(2_000_001, projects=["others"])))
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("not-allowed 1", self.log)

    def test_a_flavor_by_its_name(self):
        with open(self.flavors, "w", encoding="utf-8") as file:
            file.write('[{"name":"erp.big","created_at":"","updated_at":"","usb_devices":[{"vendor_id":"0529"}]}]')
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)))
        self.assertEqual("host3", self.host_of(self.boot(self.usb_flavor("erp", "@erp.big"))))
        self.boot(self.usb_flavor("crm", "@none"), "ERROR")
        self.assertIn("no flavor of the name 'none' is stored", self.log)
        # Computes before Nova 32 tell a domain the flavor's name alone.
        self.flags(flavor_names=True, group="virt_usb")
        self.assertEqual("host3", self.host_of(self.boot(self._create_flavor(name="erp.big"))))


class Stale(Boot):
    def test_what_is_stale_is_refused(self):
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)), age=500)
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("USB devices: no host can be chosen: ", self.log)
        self.assertRegex(self.log, "was written 50[0-9] s ago")
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)))
        self.assertEqual("host3", self.host_of(self.boot(self.usb_flavor("crm"))))

    def test_or_passes_where_an_operator_says_so(self):
        self.flags(on_stale_inventory="pass", group="virt_usb")
        os.remove(self.file)
        self.assertEqual("host1", self.host_of(self.boot(self.usb_flavor("erp"))))
        self.assertIn("not known which host has them, so all pass", self.log)

    def test_a_broken_filter_is_not_no_such_host_in_silence(self):
        self.flags(component="/nowhere.wasm", group="virt_usb")
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)))
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("the filter is broken", self.log)


class Weighed(Boot):
    def weigh(self):
        # Nova's own weighers would find all hosts alike.
        self.flags(weight_classes=[WEIGHER], group="filter_scheduler")

    def test_the_host_with_more_to_spare_is_taken(self):
        two = (fleet.device(2_000_001), fleet.device(2_000_002, port_path="1-2", address="usb_1_6", device_id=6))
        fleet.write(self.file, fleet.document("host1", 2, fleet.device(MINE)), fleet.document("host2", 3, *two))
        self.assertEqual("host2", self.host_of(self.boot(self.usb_flavor("erp"))))


class Validated(Boot):
    def refused(self, key, value):
        flavor = self._create_flavor()
        fault = self.assertRaises(client.OpenStackApiException, self.admin_api.post_extra_spec, flavor, {"extra_specs": {key: value}})
        self.assertEqual(400, fault.response.status_code)
        return str(fault)

    def test_extra_specs_are_looked_at_when_they_are_set(self):
        for value, words in (
            ("[{]", "is no JSON"),
            ("[{}]", "it names nothing"),
            ('[{"product_id":"0001"}]', "the vendor_id too"),
            ('[{"vendor":"0529"}]', "there is no key 'vendor'"),
            ('[{"vendor_id":"xyzzy"}]', "[0].vendor_id"),
            ('[{"vendor_id":"0529","count":128}]', "[0].count"),
            ("@", "no name follows"),
        ):
            self.assertIn(words, self.refused("usb:devices", value))
        self.assertIn("spicevmc", self.refused("usb:redirection_devices", '[{"bus":"usb","type":"tcp"}]'))
        self.assertIn("not appear to be a valid extra spec", self.refused("usb:device", "[]"))
        # Nova's own limit comes first where the API knows it; what is said must help either way.
        self.refused("usb:devices", '[{"serial":"' + "x" * 300 + '"}]')
        for value in (fleet.ASKS, '{"vendor_id":1321}', "@erp"):
            self.usb_flavor(f"f{len(value)}", value)
