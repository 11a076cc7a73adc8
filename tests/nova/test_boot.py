"""The filter, weigher and validator in Nova: its API, scheduler, Placement and fake driver."""

import logging
import os
import tempfile

import fixtures
import nova.tests.functional  # noqa: F401  must be Nova's first import
from nova import conf as nova_conf
from nova.tests import fixtures as nova_fixtures
from nova.tests.functional import integrated_helpers
from nova.tests.functional.api import client
from virt_usb_nova import conf, oracle

import fleet
import hosts

CONF = nova_conf.CONF
conf.register(CONF)
FILTER, WEIGHER = "virt_usb_nova.filter.UsbDevicesFilter", "virt_usb_nova.weigher.UsbDevicesWeigher"
MINE = 1_000_001


class Boot(integrated_helpers.ProviderUsageBaseTestCase):
    """Three hosts. Without other preferences, Nova takes host1."""

    compute_driver = "fake.SmallFakeDriver"
    microversion = "2.86"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.file = os.path.join(folder.name, "hosts")
        self.flavors = os.path.join(folder.name, "flavors")
        oracle.forget()
        self.flags(
            inventory="file",
            inventory_file=self.file,
            flavors_file=self.flavors,
            component=fleet.COMPONENT,
            max_age=300,
            deadline=10.0,
            group="virt_usb",
        )
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
        """Create a flavor of Nova that requests these devices, and return its id."""
        flavor = self._create_flavor(name=name)
        self.admin_api.post_extra_spec(flavor, {"extra_specs": {"usb:devices": devices}})
        return flavor

    def boot(self, flavor, state="ACTIVE"):
        server = self.api.post_server(
            {"server": self._build_server(flavor_id=flavor, networks="none")}
        )
        # Nova's default timeout of five seconds is too short on a busy machine.
        self._wait_for_server_parameter(server, {"status": state}, max_retries=240)
        return self.admin_api.get_server(server["id"])

    def host_of(self, server):
        return server["OS-EXT-SRV-ATTR:host"]

    @property
    def log(self):
        return self.told.output


class LandsWhereTheKeyIs(Boot):
    def test_the_host_with_the_key_is_taken(self):
        fleet.write(
            self.file,
            fleet.document("host1", 2),
            fleet.document("host3", 4, fleet.device(3_000_001)),
        )
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
            "USB devices: host host1 cannot serve: too-few-free: wanted 1, 1 match, "
            "1 are for the project, 0 of these are free",
            self.log,
        )

    def test_two_flavors_want_the_same_key(self):
        first = self.usb_flavor("erp")
        second = self.usb_flavor("crm", '[{"serial":"S1"}]')
        fleet.write(
            self.file,
            fleet.document("host2", 3, fleet.device(2_000_001, serial="S1", serial_kind="unique")),
        )
        self.assertEqual("host2", self.host_of(self.boot(first)))
        # The host's hook has claimed it, and its agent has published that.
        taken = fleet.device(2_000_001, "allocated", serial="S1", serial_kind="unique")
        fleet.write(self.file, fleet.document("host2", 3, taken, revision=2))
        self.boot(second, "ERROR")
        # A second key appears on another host.
        other = fleet.device(MINE, serial="S1", serial_kind="unique")
        fleet.write(
            self.file,
            fleet.document("host2", 3, taken, revision=2),
            fleet.document("host1", 2, other),
        )
        self.assertEqual("host1", self.host_of(self.boot(second)))

    def test_a_key_of_another_project_is_none(self):
        fleet.write(
            self.file, fleet.document("host2", 3, fleet.device(2_000_001, projects=["others"]))
        )
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("not-allowed 1", self.log)

    def test_a_flavor_by_its_name(self):
        with open(self.flavors, "w", encoding="utf-8") as file:
            file.write(
                '[{"name":"erp.big","created_at":"","updated_at":"",'
                '"usb_devices":[{"vendor_id":"0529"}]}]'
            )
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)))
        self.assertEqual("host3", self.host_of(self.boot(self.usb_flavor("erp", "@erp.big"))))
        self.boot(self.usb_flavor("crm", "@none"), "ERROR")
        self.assertIn("no flavor named 'none' is stored", self.log)
        # Compute services before Nova 32 write only the flavor's name into a domain.
        self.flags(flavor_names=True, group="virt_usb")
        self.assertEqual("host3", self.host_of(self.boot(self._create_flavor(name="erp.big"))))


class AThousandHosts(Boot):
    """One host more than Placement returns."""

    OTHERS = tuple(f"other{number:03}" for number in range(998))

    def setUp(self):
        super().setUp()
        hosts.copy("host3", self.OTHERS, self.cell_mappings["cell1"])
        # Nova's fixture must not map the host again when a compute service starts.
        self.host_mappings |= dict.fromkeys(self.OTHERS, self.host_mappings["host3"])
        self.every = ["host1", "host2", "host3", *self.OTHERS]

    def publish(self, *with_key):
        """Each host has a mouse, a scanner and a key. The key is free on these hosts only."""
        documents = []
        for node, host in enumerate(self.every, 2):
            first = (node - 1) * 1_000_000
            key = fleet.device(first + 1, "available" if host in with_key else "allocated")
            rest = [
                fleet.device(
                    first + at, vendor_id="046d", product_id=f"{at:04x}", port_path=f"1-{at}"
                )
                for at in (2, 3)
            ]
            documents.append(fleet.document(host, node, key, *rest))
        fleet.write(self.file, *documents)

    def boot(self, flavor, state="ACTIVE"):
        hosts.beat(self.cell_mappings["cell1"])
        return super().boot(flavor, state)

    def test_the_one_that_has_the_key_is_found(self):
        erp = self.usb_flavor("erp")
        self.publish()
        self.boot(erp, "ERROR")
        self.assertIn("USB devices: 0 of 1000 hosts can serve (too-few-free 1000): ", self.log)
        self.assertNotIn("could", self.log)
        # One host was not among them.
        (last,) = (host for host in self.every if f"host {host} cannot serve" not in self.log)
        for host in [host for host in self.computes if host != last][:2]:
            self.publish(host)
            self.assertEqual(host, self.host_of(self.boot(erp)))
        self.assertIn("USB devices: 1 of 1000 hosts can serve (too-few-free 999): ", self.log)
        # Placement does not return the host with the key, and the log says so.
        self.publish(last)
        self.boot(erp, "ERROR")
        self.assertIn(f"; {last} could, but Nova did not ask about them: ", self.log)
        self.assertIn("[scheduler] max_placement_results = 1000 hosts", self.log)
        self.flags(max_placement_results=10_000, group="scheduler")
        if last not in self.computes:
            self._start_compute(last)
        self.assertEqual(last, self.host_of(self.boot(erp)))
        self.assertIn("USB devices: 1 of 1001 hosts can serve (too-few-free 1000): ", self.log)


class Stale(Boot):
    def test_what_is_stale_is_refused(self):
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)), age=500)
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("USB devices: no host passes: ", self.log)
        self.assertRegex(self.log, "was written 5[0-9]{2} s ago")
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)))
        self.assertEqual("host3", self.host_of(self.boot(self.usb_flavor("crm"))))

    def test_or_passes_where_an_operator_says_so(self):
        self.flags(on_stale_inventory="pass", group="virt_usb")
        os.remove(self.file)
        self.assertEqual("host1", self.host_of(self.boot(self.usb_flavor("erp"))))
        self.assertIn("cannot tell which host has them, so all hosts pass", self.log)
        # Names of flavors are unknown, too.
        self.assertEqual("host1", self.host_of(self.boot(self.usb_flavor("crm", "@erp.big"))))

    def test_what_asks_for_no_device_is_not_held_up_by_anything(self):
        plain = self._create_flavor(name="plain")
        os.remove(self.file)
        for wrong in (
            {"component": "/nowhere.wasm"},
            {"inventory_file": None},
            {"flavor_names": True},
        ):
            oracle.forget()
            self.flags(**wrong, group="virt_usb")
            self.assertEqual("host1", self.host_of(self.boot(plain)))
        self.assertIn(
            "cannot tell whether the flavor plain requests any, so all hosts pass: "
            "inventory = file needs inventory_file",
            self.log,
        )
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn(
            "because the configuration is invalid: [virt_usb] inventory = file needs "
            "inventory_file",
            self.log,
        )

    def test_hosts_that_are_called_otherwise(self):
        fleet.write(self.file, fleet.document("host1.example", 2, fleet.device(MINE)))
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("USB devices: 0 of 3 hosts can serve (unknown-host 3): ", self.log)
        self.assertIn(
            "; host1.example could: if these are the same hosts, set [virt_usb] host_name "
            "(now 'host')",
            self.log,
        )

    def test_a_broken_filter_is_not_no_such_host_in_silence(self):
        self.flags(component="/nowhere.wasm", group="virt_usb")
        fleet.write(self.file, fleet.document("host3", 4, fleet.device(3_000_001)))
        self.boot(self.usb_flavor("erp"), "ERROR")
        self.assertIn("the filter failed", self.log)


class Weighed(Boot):
    def weigh(self):
        # Nova's own weighers would weigh all hosts the same.
        self.flags(weight_classes=[WEIGHER], group="filter_scheduler")

    def test_the_host_with_more_to_spare_is_taken(self):
        two = (
            fleet.device(2_000_001),
            fleet.device(2_000_002, port_path="1-2", address="usb_1_6", device_id=6),
        )
        fleet.write(
            self.file,
            fleet.document("host1", 2, fleet.device(MINE)),
            fleet.document("host2", 3, *two),
        )
        self.assertEqual("host2", self.host_of(self.boot(self.usb_flavor("erp"))))


class Validated(Boot):
    def refused(self, key, value):
        flavor = self._create_flavor()
        fault = self.assertRaises(
            client.OpenStackApiException,
            self.admin_api.post_extra_spec,
            flavor,
            {"extra_specs": {key: value}},
        )
        self.assertEqual(400, fault.response.status_code)
        return str(fault)

    def test_extra_specs_are_looked_at_when_they_are_set(self):
        for value, words in (
            ("[{]", "invalid JSON"),
            ("[{}]", "no selector"),
            ('[{"product_id":"0001"}]', "product_id without vendor_id"),
            ('[{"vendor":"0529"}]', "unknown key 'vendor'"),
            ('[{"vendor_id":"xyzzy"}]', "[0].vendor_id"),
            ('[{"vendor_id":"0529","count":128}]', "[0].count"),
            ("@", "the name after the @"),
        ):
            self.assertIn(words, self.refused("usb:devices", value))
        self.assertIn(
            "spicevmc", self.refused("usb:redirection_devices", '[{"bus":"usb","type":"tcp"}]')
        )
        self.assertIn("not appear to be a valid extra spec", self.refused("usb:device", "[]"))
        # Newer Nova APIs check their own limit first. Either message must help.
        self.refused("usb:devices", '[{"serial":"' + "x" * 300 + '"}]')
        for value in (fleet.ASKS, '{"vendor_id":1321}', "@erp"):
            self.usb_flavor(f"f{len(value)}", value)
