"""The domains that old and new versions of Nova write, and how the hook changes them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as etree
from pathlib import Path

BIN = Path(
    os.environ.get("VIRT_USB", str(Path(__file__).parents[2] / "target/release/virt-usb"))
).parent
OLD = os.environ["NOVA_OLD"]
PROJECT = "3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908"
ASKS = '[{"vendor_id":"0529","product_id":"0001"}]'
PORT = {"bus": "usb", "type": "spicevmc"}
# Nova uses hw:usb_model only if the guest has no USB tablet, which it has by default. Without model
# and tablet, Nova disables USB.
XHCI = {"hw:usb_model": "qemu-xhci"}
VIRTIO = {"hw_input_bus": "virtio"}
DEVICES = """
[[device]]
vendor = "0529"
product = "0001"
bus = 1
device = 5
port = "1-1"
speed = "full"
serial = "HL-0001"
"""


class Nova:
    """A Nova in its own process, which writes domains."""

    def __init__(self, path):
        command = [sys.executable, Path(__file__).parent / "domain.py"]
        environment = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, asked):
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("DOMAIN "):
                return json.loads(line[len("DOMAIN ") :])
        raise AssertionError("Nova has written no domain: see the output above")

    def end(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class WhatNovaWrites(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.novas = {False: Nova(os.environ.get("PYTHONPATH", "")), True: Nova(OLD)}

    @classmethod
    def tearDownClass(cls):
        for nova in cls.novas.values():
            nova.end()

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="virt-usb-nova-"))
        self.addCleanup(shutil.rmtree, self.folder)
        (self.folder / "devices.toml").write_text(DEVICES)
        (self.folder / "config.toml").write_text(
            f'state_dir = "{self.folder}/state"\nsysfs_root = "{self.folder}/sys"\n'
        )
        self.run_usb(
            "discover", "--sim", self.folder / "devices.toml", "--sysfs-out", self.folder / "sys"
        )

    def run_usb(self, *arguments):
        command = [BIN / "virt-usb", "--config", self.folder / "config.toml", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def domain(self, specs=None, flavor="m1.erp", old=False, **more):
        asked = {
            "flavor": flavor,
            "extra_specs": specs or {},
            "project": PROJECT,
            "image": VIRTIO,
            **more,
        }
        return self.novas[old](asked)

    def hook(self, xml):
        """The hook's exit status, stdout and stderr."""
        command = [
            BIN / "virt-usb-hook",
            "--config",
            self.folder / "config.toml",
            "instance-0000002a",
            "prepare",
            "begin",
            "-",
        ]
        done = subprocess.run(command, input=xml, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def passed(self, xml):
        """The numbers of devices and of redirected ports that the guest gets."""
        status, printed, said = self.hook(xml)
        self.assertEqual(0, status, said)
        devices = etree.fromstring(printed or xml).find("devices")
        return len(devices.findall("hostdev")), len(devices.findall("redirdev"))

    def test_extra_specs_of_32_and_later(self):
        xml = self.domain({"usb:devices": ASKS, **XHCI})
        self.assertIn("extraSpec", xml)
        self.assertEqual((1, 0), self.passed(xml))
        self.assertRegex(self.run_usb("claims"), "instance-0000002a .*claimed")

    def test_the_flavors_name_is_all_that_is_told_before_32(self):
        xml = self.domain({"usb:devices": ASKS, **XHCI}, old=True, image={})
        self.assertNotIn("extraSpec", xml)
        self.assertEqual((0, 0), self.passed(xml), "no flavor is stored under the name")
        self.run_usb("flavor", "set", "m1.erp", f'{{"usb_devices":{ASKS}}}')
        self.assertEqual((1, 0), self.passed(xml))
        # This version of Nova does not know hw:usb_model.
        status, _, said = self.hook(self.domain({"usb:devices": ASKS, **XHCI}, old=True))
        self.assertEqual(1, status)
        self.assertIn("before Nova 32: image hw_input_bus=usb", said)
        self.assertEqual((1, 0), self.passed(self.domain(old=True, image={"hw_input_bus": "usb"})))
        # If the domain has extra specs, the hook does not look up the name.
        self.run_usb("claims", "release", "5d3b9a10-7c41-4f0e-9a3f-2f6f3f9c1e01", "--force")
        self.assertEqual((0, 0), self.passed(self.domain(XHCI)))

    def test_a_stored_flavor_in_an_extra_spec(self):
        self.run_usb("flavor", "set", "erp.big", f'{{"usb_devices":{ASKS}}}')
        self.assertEqual((1, 0), self.passed(self.domain({"usb:devices": "@erp.big", **XHCI})))

    def test_redirected_ports_of_both_are_not_doubled(self):
        for nova, ours, wanted in ((0, 2, 2), (2, 0, 2), (2, 2, 2), (3, 2, 3), (2, 3, 3)):
            specs = dict(XHCI)
            if nova:
                specs["hw:redirected_usb_ports"] = str(nova)
            if ours:
                specs["usb:redirection_devices"] = json.dumps([PORT] * ours)
            with self.subTest(nova=nova, ours=ours):
                self.assertEqual((0, wanted), self.passed(self.domain(specs)))
        self.assertEqual(
            (1, 2),
            self.passed(
                self.domain(
                    {
                        **specs,
                        "usb:devices": ASKS,
                        "usb:redirection_devices": json.dumps([PORT] * 2),
                    }
                )
            ),
        )

    def test_what_nova_has_switched_off_is_said(self):
        status, _, said = self.hook(self.domain({"usb:devices": ASKS}))
        self.assertEqual(1, status)
        self.assertIn("hw:usb_model", said)
        status, _, said = self.hook(
            self.domain({"usb:redirection_devices": json.dumps([PORT]), **XHCI}, spice=False)
        )
        self.assertEqual(1, status)
        self.assertIn("SPICE", said)

    def test_a_tablet_leaves_too_few_ports(self):
        specs = {"usb:devices": ASKS, "hw:redirected_usb_ports": "2", **XHCI}
        status, _, said = self.hook(self.domain(specs, image={}))
        self.assertEqual(1, status)
        self.assertIn("which takes effect if the image has hw_input_bus=virtio", said)
        self.assertEqual((1, 2), self.passed(self.domain(specs)))

    def test_the_project_that_nova_names_counts(self):
        self.run_usb("grant", "set", "erp", f'{{"usb_devices":{ASKS},"projects":["others"]}}')
        status, _, said = self.hook(self.domain({"usb:devices": ASKS, **XHCI}))
        self.assertEqual(1, status)
        self.assertIn("certain projects only", said)
        self.run_usb("grant", "set", "erp", f'{{"usb_devices":{ASKS},"projects":["{PROJECT}"]}}')
        self.assertEqual((1, 0), self.passed(self.domain({"usb:devices": ASKS, **XHCI})))


if __name__ == "__main__":
    unittest.main()
